//! The serial port as a socket: for the agent that shows it to people.
//!
//! # Rules
//! 1. A client is told one line, `afterimage-serial 1 boot=UUID start=N end=N`, and then gets the bytes from number `start`
//!    on, for as long as it stays. What it sends is typed. `end` is how far the log went when it connected.
//! 2. There is one client at a time. Another one is told `afterimage-serial 1 busy` and sent away.
//! 3. The guest never waits for a client: one that is a whole log (1 MiB) behind misses the oldest bytes.
//!
//! # After a crash
//! The socket file stays; the next start takes it away.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use rustix::event::{PollFd, PollFlags};
use uuid::Uuid;

use crate::error::{Error, Result};
use crate::sync::Mutex;
use crate::vmm::bus::Bus;

/// Bytes that are taken from a client at a time.
const TYPED: usize = 256;

/// The socket, until this is dropped.
#[derive(Debug)]
pub(in crate::vmm) struct SerialSocket {
    path: PathBuf,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    bus: Arc<Bus>,
    boot: Uuid,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    client: Option<UnixStream>,
    closed: bool,
}

impl SerialSocket {
    /// Listens at a path, where nobody else may.
    ///
    /// # Errors
    /// Those of the host.
    pub(in crate::vmm) fn listen(path: &Path, bus: Arc<Bus>, boot: Uuid) -> Result<Self> {
        let cannot = |e| Error::io(format!("cannot listen at {}", path.display()), e);
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(cannot(error)),
            _ => {}
        }
        let listener = UnixListener::bind(path).map_err(cannot)?;
        let shared = Arc::new(Shared { bus, boot, state: Mutex::default() });
        let thread = std::thread::Builder::new().name("serial".into()).spawn({
            let shared = Arc::clone(&shared);
            move || shared.accept(&listener)
        });
        let thread = Some(thread.map_err(cannot)?);
        Ok(Self { path: path.to_owned(), shared, thread })
    }
}

impl Drop for SerialSocket {
    fn drop(&mut self) {
        self.shared.hang_up();
        // Wakes the thread, which sees then that it is over.
        if let Err(error) = UnixStream::connect(&self.path) {
            tracing::debug!("the serial socket is gone already: {error}");
        }
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the serial socket failed on a mistake in this program");
        }
        if let Err(error) = std::fs::remove_file(&self.path) {
            tracing::debug!("the serial socket could not be removed: {error}");
        }
    }
}

impl Shared {
    fn hang_up(&self) {
        let mut state = self.state.lock();
        state.closed = true;
        if let Some(client) = &state.client {
            // One that has gone cannot be sent away.
            client.shutdown(Shutdown::Both).ok();
        }
    }

    fn accept(self: &Arc<Self>, listener: &UnixListener) {
        loop {
            let client = listener.accept();
            if self.state.lock().closed {
                return;
            }
            match client {
                Ok((client, _)) => {
                    if let Err(error) = self.admit(client) {
                        tracing::debug!("a client of the serial socket was lost: {error}");
                    }
                }
                Err(error) => {
                    tracing::warn!("the serial socket has no client: {error}");
                    crate::clock::sleep(std::time::Duration::from_millis(100));
                }
            }
        }
    }

    fn admit(self: &Arc<Self>, mut client: UnixStream) -> std::io::Result<()> {
        let mut state = self.state.lock();
        if state.client.is_some() {
            return client.write_all(b"afterimage-serial 1 busy\n");
        }
        let gone = Arc::new(AtomicBool::new(false));
        let (reader, shared, left) = (client.try_clone()?, Arc::clone(self), Arc::clone(&gone));
        state.client = Some(client.try_clone()?);
        drop(state);
        let typist = std::thread::Builder::new().name("serial-in".into()).spawn(move || {
            shared.listen_to(reader);
            left.store(true, Ordering::SeqCst);
            shared.bus.serial.log().wake();
        });
        let shared = Arc::clone(self);
        let shown = typist.and_then(|typist| {
            std::thread::Builder::new().name("serial-out".into()).spawn(move || {
                if let Err(error) = shared.show(&mut client, &gone) {
                    tracing::debug!("a client of the serial socket was lost: {error}");
                }
                // Ends the other thread as well; one that has gone cannot be sent away.
                client.shutdown(Shutdown::Both).ok();
                if typist.join().is_err() {
                    tracing::error!("a client of the serial socket failed on a mistake in this program");
                }
                shared.state.lock().client = None;
            })
        });
        if shown.is_err() {
            self.state.lock().client = None;
        }
        shown.map(drop)
    }

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
