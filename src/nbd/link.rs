//! A connection: a socket, and TLS on it after STARTTLS.
//!
//! # Rules
//! 1. The socket itself waits; each call says whether it may. So a thread with nothing else to do sleeps in the call that
//!    brings it the next request.
//! 2. Without TLS the kernel puts bytes where they belong and takes them from where they are; with TLS they are copied
//!    once on each way.
//! 3. The handshake has a deadline for each message, and one for all of it. (Later a client may be silent as long as it
//!    likes.)

use std::io::{self, ErrorKind, IoSlice, IoSliceMut, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, epoll};
use rustix::net::{RecvAncillaryBuffer, RecvFlags, SendAncillaryBuffer, SendFlags, sockopt};
use rustls::ServerConnection;

use super::tls::Tls;
use crate::clock::{self, Instant};

/// Bytes that are encrypted before they are sent.
const TLS_BUFFER: usize = 256 << 10;

/// The connection.
#[derive(Debug)]
pub(super) struct Link {
    socket: Arc<OwnedFd>,
    tls: Option<Box<ServerConnection>>,
    /// Decrypted bytes that were not taken yet.
    decrypted: usize,
    /// How long a call waits for bytes at most.
    patience: Option<Duration>,
}

/// The socket as rustls wants it.
struct Raw<'a> {
    socket: BorrowedFd<'a>,
    wait: bool,
}

impl Read for Raw<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let flags = if self.wait { RecvFlags::empty() } else { RecvFlags::DONTWAIT };
        Ok(rustix::io::retry_on_intr(|| rustix::net::recv(self.socket, &mut *buf, flags)).map(|(got, _)| got)?)
    }
}

impl Write for Raw<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        Ok(rustix::io::retry_on_intr(|| rustix::net::send(self.socket, buf, flags))?)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Link {
    /// Takes a connected socket.
    pub(super) fn new(socket: Arc<OwnedFd>) -> Self {
        Self { socket, tls: None, decrypted: 0, patience: None }
    }

    /// Lets a call that waits for bytes return now and then, as if there were none to come.
    pub(super) fn wait_at_most(&mut self, time: Duration) -> io::Result<()> {
        self.patience = Some(time);
        Ok(sockopt::set_socket_timeout(&self.socket, sockopt::Timeout::Recv, Some(time))?)
    }

    /// Returns what tells whether the client has gone, or at least says nothing more.
    pub(super) fn gone(&self) -> impl Fn() -> bool + Sync + use<> {
        let socket = Arc::clone(&self.socket);
        move || {
            let (flags, now) = (PollFlags::RDHUP, Timespec { tv_sec: 0, tv_nsec: 0 });
            rustix::event::poll(&mut [PollFd::new(&socket, flags)], Some(&now)).is_ok_and(|ready| ready > 0)
        }
    }

    /// Tells whether it is encrypted.
    pub(super) fn is_secret(&self) -> bool {
        self.tls.is_some()
    }

    /// Tells whether there are bytes that no watching of the socket tells of.
    pub(super) fn has_more(&self) -> bool {
        self.decrypted > 0
    }

    /// Receives into `parts`, one after the other, what is there; 0 at the end. `None` when nothing is there, which is
    /// waited for with `wait`.
    pub(super) fn receive(&mut self, parts: &mut [IoSliceMut<'_>], wait: bool) -> io::Result<Option<usize>> {
        if self.tls.is_some() {
            return self.receive_secret(parts, wait);
        }
        let flags = if wait { RecvFlags::empty() } else { RecvFlags::DONTWAIT };
        loop {
            match rustix::net::recvmsg(&self.socket, parts, &mut RecvAncillaryBuffer::default(), flags) {
                Ok(message) => return Ok(Some(message.bytes)),
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => return Ok(None),
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn receive_secret(&mut self, parts: &mut [IoSliceMut<'_>], wait: bool) -> io::Result<Option<usize>> {
        let Some(tls) = &mut self.tls else { return Ok(Some(0)) };
        let deadline = self.patience.filter(|_| wait).map(|patience| clock::now() + patience);
        loop {
            let (got, ended) = take_decrypted(tls, parts)?;
            if got > 0 || ended {
                self.decrypted = self.decrypted.saturating_sub(got);
                return Ok(Some(got));
            }
            // Nothing can be decrypted before its record is there in full, and bytes of that may come one at a time.
            if deadline.is_some_and(|deadline| clock::now() >= deadline) {
                return Ok(None);
            }
            match tls.read_tls(&mut Raw { socket: self.socket.as_fd(), wait }) {
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(None),
                Err(error) => return Err(error),
            }
            let state = tls.process_new_packets().map_err(io::Error::other);
            push(tls, self.socket.as_fd())?;
            self.decrypted = state?.plaintext_bytes_to_read();
        }
    }

    /// Sends what goes without waiting, and returns how many bytes were taken.
    pub(super) fn send(&mut self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        let Some(tls) = &mut self.tls else {
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            loop {
                match rustix::net::sendmsg(&self.socket, parts, &mut SendAncillaryBuffer::default(), flags) {
                    Ok(sent) => return Ok(sent),
                    Err(rustix::io::Errno::INTR) => {}
                    Err(rustix::io::Errno::AGAIN) => return Ok(0),
                    Err(error) => return Err(error.into()),
                }
            }
        };
        let mut taken = 0;
        if push(tls, self.socket.as_fd())? {
            for part in parts {
                let len = tls.writer().write(part)?;
                taken += len;
                if len < part.len() {
                    break;
                }
            }
            push(tls, self.socket.as_fd())?;
        }
        Ok(taken)
    }

    /// Tells whether bytes were taken that are not sent.
    pub(super) fn must_send(&self) -> bool {
        self.tls.as_ref().is_some_and(|tls| tls.wants_write())
    }

    /// Tells whether the peer has sent all it will send, or the connection broke; it may not be received yet.
    pub(super) fn is_gone(&self) -> bool {
        let mut fds = [PollFd::new(&self.socket, PollFlags::RDHUP)];
        // What cannot be asked is found out when something is received.
        rustix::event::poll(&mut fds, Some(&Timespec::default())).is_ok_and(|ready| ready > 0)
    }

    /// Waits until the socket can be read or, with `send`, written.
    pub(super) fn wait(&self, receive: bool, send: bool, deadline: Option<Instant>) -> io::Result<()> {
        let mut flags = PollFlags::empty();
        flags.set(PollFlags::IN, receive);
        flags.set(PollFlags::OUT, send);
        loop {
            let left = deadline.map(|deadline| deadline.saturating_duration_since(clock::now()));
            if left.is_some_and(|left| left.is_zero()) {
                return Err(ErrorKind::TimedOut.into());
            }
            let left = left.map(|left| Timespec::try_from(left).expect("deadlines are near"));
            match rustix::event::poll(&mut [PollFd::new(&self.socket, flags)], left.as_ref()) {
                Ok(0) | Err(rustix::io::Errno::INTR) => {}
                Ok(_) => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Receives exactly that much.
    pub(super) fn receive_all(&mut self, buf: &mut [u8], deadline: Instant) -> io::Result<()> {
        let mut at = 0;
        while at < buf.len() {
            match self.receive(&mut [IoSliceMut::new(&mut buf[at..])], false)? {
                Some(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Some(got) => at += got,
                None => self.wait(true, false, Some(deadline))?,
            }
        }
        Ok(())
    }

    /// Sends all of it.
    pub(super) fn send_all(&mut self, mut bytes: &[u8], deadline: Instant) -> io::Result<()> {
        while !bytes.is_empty() || self.must_send() {
            let sent = self.send(&[IoSlice::new(bytes)])?;
            bytes = &bytes[sent..];
            if !bytes.is_empty() && sent == 0 || bytes.is_empty() && self.must_send() {
                self.wait(false, true, Some(deadline))?;
            }
        }
        Ok(())
    }

    /// Begins TLS; what the client sends next must be its hello.
    pub(super) fn start_tls(&mut self, config: &Tls, deadline: Instant) -> io::Result<()> {
        let mut tls = Box::new(config.accept().map_err(io::Error::other)?);
        tls.set_buffer_limit(Some(TLS_BUFFER));
        while tls.is_handshaking() {
            if !push(&mut tls, self.socket.as_fd())? {
                self.wait(false, true, Some(deadline))?;
                continue;
            }
            match tls.read_tls(&mut Raw { socket: self.socket.as_fd(), wait: false }) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => self.wait(true, false, Some(deadline))?,
                Err(error) => return Err(error),
            }
            let state = tls.process_new_packets().map_err(io::Error::other);
            if state.is_err() {
                // The alert says why, if it still gets through.
                push(&mut tls, self.socket.as_fd())?;
            }
            self.decrypted = state?.plaintext_bytes_to_read();
        }
        self.tls = Some(tls);
        Ok(())
    }

    /// Says that nothing follows.
    pub(super) fn end(&mut self) {
        if let Some(tls) = &mut self.tls {
            tls.send_close_notify();
            // A client that has gone does not miss it.
            push(tls, self.socket.as_fd()).ok();
        }
        rustix::net::shutdown(&self.socket, rustix::net::Shutdown::Both).ok();
    }
}

/// Takes what is decrypted; tells whether it is the end.
fn take_decrypted(tls: &mut ServerConnection, parts: &mut [IoSliceMut<'_>]) -> io::Result<(usize, bool)> {
    let mut got = 0;
    for part in parts {
        let mut at = 0;
        while at < part.len() {
            match tls.reader().read(&mut part[at..]) {
                Ok(0) => return Ok((got, true)),
                Ok(len) => (at, got) = (at + len, got + len),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok((got, false)),
                // Cut off without a farewell: as good as one, since requests tell their lengths.
                Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok((got, true)),
                Err(error) => return Err(error),
            }
        }
    }
    Ok((got, false))
}

/// Sends what is encrypted, as far as it goes without waiting; tells whether that was all.
fn push(tls: &mut ServerConnection, socket: BorrowedFd<'_>) -> io::Result<bool> {
    while tls.wants_write() {
        match tls.write_tls(&mut Raw { socket, wait: false }) {
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
            Err(error) => return Err(error),
        }
    }
    Ok(true)
}

/// Lets one descriptor tell that a connection can be read, or written, or both.
#[derive(Debug)]
pub(super) struct Watch {
    epoll: OwnedFd,
    socket: Arc<OwnedFd>,
    set: epoll::EventFlags,
}

impl Watch {
    /// Watches for nothing yet.
    pub(super) fn new(link: &Link) -> io::Result<Self> {
        let socket = Arc::clone(&link.socket);
        let (epoll, set) = (epoll::create(epoll::CreateFlags::CLOEXEC)?, epoll::EventFlags::empty());
        epoll::add(&epoll, &socket, epoll::EventData::new_u64(0), set)?;
        Ok(Self { epoll, socket, set })
    }

    /// Says what is watched for, `end` being that the peer has sent all; `None` when that is nothing.
    pub(super) fn on(&mut self, receive: bool, send: bool, end: bool) -> io::Result<Option<BorrowedFd<'_>>> {
        if !receive && !send && !end {
            return Ok(None);
        }
        let mut set = epoll::EventFlags::empty();
        set.set(epoll::EventFlags::IN, receive);
        set.set(epoll::EventFlags::OUT, send);
        set.set(epoll::EventFlags::RDHUP, end);
        if set != self.set {
            epoll::modify(&self.epoll, &self.socket, epoll::EventData::new_u64(0), set)?;
            self.set = set;
        }
        Ok(Some(self.epoll.as_fd()))
    }
}
