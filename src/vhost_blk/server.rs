//! The socket of a disk: takes one front end after another and tells it of a new size.
//!
//! # Rules
//! 1. A disk has one front end at a time, as a device has one driver; the next one waits until it is gone. One that does not
//!    even say that it owns the device, for [`PATIENCE`], gives way to it.
//! 2. Whatever a front end does wrong ends its connection, and the server goes on listening. What its messages bring is looked
//!    at before they are received ([`super::sent`]).
//! 3. When the server stops, or a front end goes, what its queues had taken is finished first. What the disk was served
//!    under, its lease, belongs to the thread that does that, however long it takes.
//!
//! # Why the message for a new size is written here
//! `vhost` keeps the channel to the front end to itself and sends only what it knows, and of a changed configuration it
//! does not know. A descriptor that is looked at before it is received (MSG_PEEK) is there twice: one is ours.

use std::any::Any;
use std::fs::File;
use std::io::{self, IoSliceMut};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags};
use vhost::vhost_user::message::{BackendReq, FrontendReq};
use vhost::vhost_user::{BackendReqHandler, Error as ProtocolError};

use super::bell;
use super::sent::{HEAD, Inspector, Verdict};
use super::service::Target;
use super::session::{Session, failed};
use crate::budget::Pot;
use crate::clock::{self, Instant};
use crate::error::lacks_descriptors;
use crate::media::socket::Socket;
use crate::sync::{Condvar, Mutex};

/// Descriptors of a connection: itself three times, the channel back, what is in flight, and one that is on its way.
const DESCRIPTORS: usize = 6;
/// The version of the protocol, in the flags.
const VERSION: u32 = 1;
/// How long a front end that says nothing keeps the next one waiting.
const PATIENCE: Duration = Duration::from_secs(10);
/// How often it is looked after that whether there is a next one.
const LOOK_EACH: Duration = Duration::from_secs(1);

/// The connection to a front end.
#[derive(Debug)]
pub(super) struct Line {
    stream: UnixStream,
    greeted: Mutex<bool>,
    changed: Condvar,
}

impl Line {
    fn new(stream: UnixStream) -> Self {
        Self { stream, greeted: Mutex::new(false), changed: Condvar::new() }
    }

    /// Notes that the front end has said that it owns the device, or has gone: nobody has to look at it any more.
    pub(super) fn greeted(&self) {
        *self.greeted.lock() = true;
        self.changed.notify_all();
    }

    /// Waits for that; tells whether it came in time.
    fn wait_greeted(&self, deadline: Instant) -> bool {
        let mut greeted = self.greeted.lock();
        while !*greeted && !self.changed.wait_until(&mut greeted, deadline).timed_out() {}
        *greeted
    }

    /// Ends the connection.
    pub(super) fn cut(&self) {
        if let Err(error) = self.stream.shutdown(std::net::Shutdown::Both) {
            tracing::debug!("a connection was closed already: {error}");
        }
    }
}

/// What the thread and the handle share.
pub(super) struct Shared {
    pub(super) target: Arc<Target>,
    pub(super) queues: usize,
    /// Out of which what front ends take is paid.
    descriptors: Arc<Pot>,
    stopping: AtomicBool,
    stop: File,
    /// The connection there is, to end it.
    connection: Mutex<Option<Arc<Line>>>,
    /// Where its front end hears of changes.
    channel: Mutex<Option<OwnedFd>>,
    /// Threads that look at what front ends send.
    inspectors: Arc<AtomicUsize>,
    /// The thread has let everything go.
    ended: Mutex<bool>,
    over: Condvar,
}

/// What must live as long as anything can reach the disk.
struct Kept {
    keep: Option<Box<dyn Any + Send + Sync>>,
    shared: Arc<Shared>,
}

impl Drop for Kept {
    fn drop(&mut self) {
        drop(self.keep.take());
        *self.shared.ended.lock() = true;
        self.shared.over.notify_all();
    }
}

impl Shared {
    pub(super) fn new(target: Arc<Target>, queues: usize, descriptors: Arc<Pot>) -> io::Result<Self> {
        Ok(Self {
            target,
            queues,
            descriptors,
            stopping: AtomicBool::new(false),
            stop: bell::eventfd()?,
            connection: Mutex::default(),
            channel: Mutex::default(),
            inspectors: Arc::default(),
            ended: Mutex::new(false),
            over: Condvar::new(),
        })
    }

    /// Tells the front end, if there is one, to look at the configuration again.
    pub(super) fn tell_changed(&self) {
        let Some(channel) = &*self.channel.lock() else { return };
        let mut message = [0; HEAD];
        message[..4].copy_from_slice(&u32::from(BackendReq::CONFIG_CHANGE_MSG).to_le_bytes());
        message[4..8].copy_from_slice(&VERSION.to_le_bytes());
        // A front end that does not read its channel is not waited for.
        if let Err(error) = rustix::net::send(channel, &message, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
            tracing::debug!("a front end was not told of a new size: {error}");
        }
    }

    /// Tells whether a front end is connected.
    pub(super) fn connected(&self) -> bool {
        self.connection.lock().is_some()
    }

    /// Ends the connection and takes no other.
    pub(super) fn stop(&self) {
        self.stopping.store(true, Ordering::SeqCst);
        self.target.end();
        bell::ring(&self.stop);
        if let Some(line) = &*self.connection.lock() {
            line.cut();
        }
    }

    /// Waits until the thread has let everything go; tells whether it has.
    pub(super) fn wait_for_end(&self, deadline: Instant) -> bool {
        let mut ended = self.ended.lock();
        while !*ended && !self.over.wait_until(&mut ended, deadline).timed_out() {}
        *ended
    }

    fn stops(&self) -> bool {
        self.stopping.load(Ordering::SeqCst)
    }
}

/// Serves until it is told to stop; `keep` is dropped last.
pub(super) fn run(socket: Socket, shared: Arc<Shared>, keep: Box<dyn Any + Send + Sync>) -> io::Result<JoinHandle<()>> {
    let kept = Kept { keep: Some(keep), shared: Arc::clone(&shared) };
    std::thread::Builder::new().name("vhost-blk".into()).spawn(move || {
        // In this order, so that they go in the other one, also when something panics.
        let (_kept, socket) = (kept, socket);
        while !shared.stops() {
            match accept(socket.listener(), &shared) {
                Ok(Some(stream)) => serve(stream, socket.listener(), &shared, PATIENCE),
                Ok(None) => {}
                Err(error) => {
                    tracing::error!("no front end can connect to {} any more: {error}", socket.path().display());
                    break;
                }
            }
        }
    })
}

/// Waits for a front end.
fn accept(listener: &UnixListener, shared: &Shared) -> io::Result<Option<UnixStream>> {
    if bell::wait(listener, &shared.stop, None)? != Some(true) {
        return Ok(None);
    }
    match listener.accept() {
        Ok((stream, _)) => {
            stream.set_nonblocking(false)?;
            Ok(Some(stream))
        }
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted
            ) =>
        {
            Ok(None)
        }
        Err(error) if matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM)) => {
            tracing::warn!("a front end cannot connect now: {error}");
            clock::sleep(std::time::Duration::from_millis(100));
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// Serves one front end until it goes.
fn serve(stream: UnixStream, listener: &UnixListener, shared: &Shared, patience: Duration) {
    let Some(_paid) = shared.descriptors.take(DESCRIPTORS) else {
        return tracing::warn!("a front end is not taken, for there are no descriptors for it");
    };
    let copies = stream.try_clone().and_then(|copy| Ok((copy, stream.try_clone()?)));
    let Ok((peeked, kept)) = copies else {
        tracing::error!("the host has no descriptor for a front end");
        return;
    };
    let inspector = match Inspector::start(&stream, &shared.inspectors) {
        Ok(inspector) => inspector,
        Err(error) => return tracing::error!("a front end is not taken: {error}"),
    };
    let line = Arc::new(Line::new(kept));
    *shared.connection.lock() = Some(Arc::clone(&line));
    if shared.stops() {
        return;
    }
    tracing::debug!("a front end has connected");
    std::thread::scope(|scope| {
        let watching = std::thread::Builder::new().name("vhost-greet".into());
        match watching.spawn_scoped(scope, || watch(&line, listener, patience)) {
            Ok(_) => listen(stream, &peeked, &inspector, &line, shared),
            Err(error) => tracing::error!("the host has no thread for a front end: {error}"),
        }
        line.greeted();
    });
    // Also of the thread that looks at what comes: it has the connection, too.
    line.cut();
    *shared.connection.lock() = None;
}

/// Ends the connection of a front end that says nothing while another one waits.
fn watch(line: &Line, listener: &UnixListener, patience: Duration) {
    let mut wait = patience;
    while !line.wait_greeted(clock::now() + wait) {
        if bell::is_ringing(listener) {
            tracing::warn!("a front end that has not said a word gives way to the next one");
            return line.cut();
        }
        wait = LOOK_EACH.min(patience);
    }
}

/// Does what a front end says.
fn listen(stream: UnixStream, peeked: &UnixStream, inspector: &Inspector, line: &Arc<Line>, shared: &Shared) {
    let session = Arc::new(Session::new(
        Arc::clone(&shared.target),
        shared.queues,
        Arc::clone(&shared.descriptors),
        Arc::clone(line),
    ));
    let mut handler = BackendReqHandler::from_stream(stream, Arc::clone(&session));
    let ended = loop {
        match inspector.look() {
            Verdict::Fine => {}
            Verdict::Gone => break ProtocolError::Disconnected,
            Verdict::Refused(what) => break ProtocolError::ReqHandlerError(io::Error::other(what)),
            Verdict::Lacks => break failed(io::Error::from_raw_os_error(libc::EMFILE)),
        }
        if let Some(channel) = peek_channel(peeked) {
            *shared.channel.lock() = Some(channel);
        }
        if let Err(error) = handler.handle_request() {
            break error;
        }
    };
    *shared.channel.lock() = None;
    session.end();
    match ended {
        ProtocolError::Disconnected | ProtocolError::SocketBroken(_) => tracing::debug!("a front end has gone"),
        error if shared.stops() => tracing::debug!("a front end was disconnected: {error}"),
        // The log has it already.
        ProtocolError::ReqHandlerError(error) if lacks_descriptors(&error) => {}
        error => tracing::warn!("a front end was disconnected, for it sent something that cannot be: {error}"),
    }
}

/// Returns a descriptor of the channel to the front end if the next message brings that.
fn peek_channel(stream: &UnixStream) -> Option<OwnedFd> {
    let mut head = [0; HEAD];
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut received = RecvAncillaryBuffer::new(&mut space);
    let message = rustix::net::recvmsg(
        stream,
        &mut [IoSliceMut::new(&mut head)],
        &mut received,
        RecvFlags::PEEK | RecvFlags::CMSG_CLOEXEC,
    )
    .ok()?;
    // All descriptors are closed that are not returned.
    let files = received.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(files) => Some(files),
        _ => None,
    });
    let first = files.flatten().next();
    let request = u32::from_le_bytes(head[..4].try_into().expect("4 bytes"));
    (message.bytes == HEAD && request == u32::from(FrontendReq::SET_BACKEND_REQ_FD)).then_some(first)?
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn who_says_nothing_gives_way_to_the_next_and_keeps_its_place_while_there_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        let (line, short) = (UnixStream::pair().unwrap(), Duration::from_millis(5));
        let (mut theirs, line) = (line.0, Line::new(line.1));
        std::thread::scope(|scope| {
            let watching = scope.spawn(|| watch(&line, &listener, short));
            theirs.set_read_timeout(Some(short * 10)).unwrap();
            theirs.read_exact(&mut [0; 1]).expect_err("nobody else is there");
            assert!(!watching.is_finished());
            let _next = UnixStream::connect(&path).unwrap();
            theirs.set_read_timeout(None).unwrap();
            assert_eq!(theirs.read(&mut [0; 1]).unwrap(), 0);
        });
        // One that has said a word stays.
        let (_theirs, ours) = UnixStream::pair().unwrap();
        let line = Line::new(ours);
        line.greeted();
        watch(&line, &listener, short);
        rustix::net::send(&line.stream, &[1], SendFlags::NOSIGNAL).expect("it is not cut");
    }
}
