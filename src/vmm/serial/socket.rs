//! The serial port as a socket: for the agent that shows it to people.
//!
//! # Rules
//! 1. A client is told one line, `afterimage-serial 1 boot=UUID start=N end=N`, and then gets the bytes from number `start`
//!    on, for as long as it stays. What it sends is typed. `end` is how far the log went when it connected.
//! 2. There is one client at a time. Another one is told `afterimage-serial 1 busy` and sent away. One that has hung up is
//!    none: who connects after that takes its place, behind what the other has typed.
//! 3. The guest never waits for a client: one that is a whole log (1 MiB) behind misses the oldest bytes.
//! 4. When the socket is dropped nobody of it is left: not the name, not a thread, nothing that keeps the devices.
//!
//! # After a crash
//! The socket file stays; the next start takes it away ([`Socket`]).

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};
use uuid::Uuid;
use vmm_sys_util::eventfd::EventFd;

use crate::error::{Error, Result};
use crate::media::socket::Socket;
use crate::sys::event::descriptor;
use crate::vmm::bus::Bus;

/// Bytes that are taken from a client at a time.
const TYPED: usize = 256;
/// Clients that may wait to be told that they cannot be served.
const BACKLOG: i32 = 16;
/// How long it takes no client when the host has no more descriptors.
const BREATH: Duration = Duration::from_millis(100);

/// The socket, until this is dropped.
#[derive(Debug)]
pub(in crate::vmm) struct SerialSocket {
    stop: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
}

impl SerialSocket {
    /// Listens at a path.
    ///
    /// # Errors
    /// `Busy` when somebody listens there, and those of the host.
    pub(in crate::vmm) fn listen(path: &Path, bus: Arc<Bus>, boot: Uuid) -> Result<Self> {
        let cannot = |e| Error::io(format!("cannot listen at {}", path.display()), e);
        let socket = Socket::listen(path, BACKLOG)?;
        socket.listener().set_nonblocking(true).map_err(cannot)?;
        let stop = Arc::new(EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(cannot)?);
        let port = Arc::new(Port { bus, boot });
        let thread = std::thread::Builder::new().name("serial".into()).spawn({
            let stop = Arc::clone(&stop);
            move || serve(&socket, &stop, &port)
        });
        Ok(Self { stop, thread: Some(thread.map_err(cannot)?) })
    }
}

impl Drop for SerialSocket {
    fn drop(&mut self) {
        if let Err(error) = self.stop.write(1) {
            tracing::error!("the serial socket cannot be told to end: {error}");
            return;
        }
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the serial socket failed on a mistake in this program");
        }
    }
}

/// Serves clients until it is told to stop.
fn serve(socket: &Socket, stop: &EventFd, port: &Arc<Port>) {
    let mut client: Option<Client> = None;
    loop {
        let mut fds =
            [PollFd::new(socket.listener(), PollFlags::IN), PollFd::from_borrowed_fd(descriptor(stop), PollFlags::IN)];
        match rustix::event::poll(&mut fds, None) {
            Ok(_) if !fds[1].revents().is_empty() => break,
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => {
                tracing::error!("the serial socket has no clients any more: {error}");
                break;
            }
        }
        match socket.listener().accept() {
            Ok((stream, _)) => {
                if let Err(error) = admit(&mut client, stream, port) {
                    tracing::debug!("a client of the serial socket was lost: {error}");
                }
            }
            Err(error) if matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM)) => {
                tracing::warn!("the serial socket takes no client now: {error}");
                crate::clock::sleep(BREATH);
            }
            Err(error) => tracing::debug!("a client of the serial socket has gone: {error}"),
        }
    }
    if let Some(client) = client {
        // One that has gone cannot be sent away.
        client.stream.shutdown(Shutdown::Both).ok();
        client.wait();
    }
}

/// Gives a client the place, if nobody has it.
fn admit(place: &mut Option<Client>, mut stream: UnixStream, port: &Arc<Port>) -> std::io::Result<()> {
    if place.as_ref().is_some_and(Client::stays) {
        return stream.write_all(b"afterimage-serial 1 busy\n");
    }
    if let Some(before) = place.take() {
        before.wait();
    }
    *place = Some(Client::start(stream, port)?);
    Ok(())
}

/// Who has the port.
#[derive(Debug)]
struct Client {
    stream: UnixStream,
    thread: JoinHandle<()>,
}

impl Client {
    fn start(stream: UnixStream, port: &Arc<Port>) -> std::io::Result<Self> {
        let (reader, mut writer) = (stream.try_clone()?, stream.try_clone()?);
        let gone = Arc::new(AtomicBool::new(false));
        let typist = std::thread::Builder::new().name("serial-in".into()).spawn({
            let (port, gone) = (Arc::clone(port), Arc::clone(&gone));
            move || {
                port.listen_to(reader);
                gone.store(true, Ordering::SeqCst);
                port.bus.serial.log().wake();
            }
        })?;
        let port = Arc::clone(port);
        let shown = std::thread::Builder::new().name("serial-out".into()).spawn(move || {
            if let Err(error) = port.show(&mut writer, &gone) {
                tracing::debug!("a client of the serial socket was lost: {error}");
            }
            // Ends the other thread as well; one that has gone cannot be sent away.
            writer.shutdown(Shutdown::Both).ok();
            if typist.join().is_err() {
                tracing::error!("a client of the serial socket failed on a mistake in this program");
            }
        });
        if shown.is_err() {
            stream.shutdown(Shutdown::Both).ok();
        }
        Ok(Self { stream, thread: shown? })
    }

    /// Tells whether it is still there.
    fn stays(&self) -> bool {
        let mut hang_up = [PollFd::new(&self.stream, PollFlags::empty())];
        let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
        let hung_up = rustix::event::poll(&mut hang_up, Some(&at_once)).is_ok_and(|count| count > 0);
        !hung_up && !self.thread.is_finished()
    }

    /// Waits until what it typed has been typed and its threads have ended.
    fn wait(self) {
        if self.thread.join().is_err() {
            tracing::error!("a client of the serial socket failed on a mistake in this program");
        }
    }
}

/// What is served.
#[derive(Debug)]
struct Port {
    bus: Arc<Bus>,
    boot: Uuid,
}

impl Port {
    /// Sends what the guest says until one of the two is gone.
    fn show(&self, client: &mut UnixStream, gone: &AtomicBool) -> std::io::Result<()> {
        let log = self.bus.serial.log();
        let (start, end) = log.range();
        writeln!(client, "afterimage-serial 1 boot={} start={start} end={end}", self.boot)?;
        let mut next = start;
        while let Some(part) = log.part_while(next, || !gone.load(Ordering::SeqCst)) {
            client.write_all(&part.bytes)?;
            next = part.start + part.bytes.len() as u64;
        }
        Ok(())
    }

    /// Types what the client sends; returns when it is gone. One that only says no more still wants to see.
    fn listen_to(&self, mut client: UnixStream) {
        let mut typed = [0; TYPED];
        while let Ok(len) = client.read(&mut typed) {
            if len == 0 {
                break;
            }
            self.bus.serial.type_in(&typed[..len]);
        }
        let mut hang_up = [PollFd::new(&client, PollFlags::empty())];
        while rustix::event::poll(&mut hang_up, None) == Err(rustix::io::Errno::INTR) {}
    }
}
