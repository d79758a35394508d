//! The descriptors by which front end and server wake each other.
//!
//! # Rules
//! 1. They come from the front end, so they may be anything: none is ever waited for in a read or write.
//! 2. One that has ended (a pipe whose other end is closed) is readable for ever and brings nothing: whoever waits for it is
//!    told, or it would wake him again at once.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;

use rustix::event::{EventfdFlags, PollFd, PollFlags};
use rustix::fs::OFlags;

use crate::sync::Mutex;

/// Makes reads and writes of a descriptor return at once.
pub(super) fn never_wait(file: &File) -> io::Result<()> {
    let flags = rustix::fs::fcntl_getfl(file)?;
    Ok(rustix::fs::fcntl_setfl(file, flags | OFlags::NONBLOCK)?)
}

/// Makes a descriptor that this program rings itself.
pub(super) fn eventfd() -> io::Result<File> {
    Ok(File::from(rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?))
}

/// Makes a descriptor readable.
pub(super) fn ring(file: &File) {
    // Full means readable already, and one that nobody reads any more wakes nobody.
    if let Err(error) = rustix::io::write(file, &1_u64.to_le_bytes())
        && error != rustix::io::Errno::AGAIN
    {
        tracing::debug!("a notification was not sent: {error}");
    }
}

/// Takes what made a descriptor readable; tells whether anything had.
///
/// # Errors
/// When nothing will ever make it readable again.
pub(super) fn silence(file: impl AsFd) -> io::Result<bool> {
    match rustix::io::read(file, &mut [0_u8; 8]) {
        Ok(0) => Err(io::Error::new(io::ErrorKind::UnexpectedEof, "its other end is closed")),
        Ok(_) => Ok(true),
        Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Waits until one of two descriptors is readable, or can never be; tells whether the first is.
pub(super) fn wait(first: impl AsFd, second: impl AsFd) -> io::Result<bool> {
    let mut fds = [PollFd::new(&first, PollFlags::IN), PollFd::new(&second, PollFlags::IN)];
    loop {
        match rustix::event::poll(&mut fds, None) {
            Ok(_) => return Ok(!fds[0].revents().is_empty()),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Tells whether a descriptor is readable now.
pub(super) fn is_ringing(file: &impl AsFd) -> bool {
    let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
    rustix::event::poll(&mut [PollFd::new(file, PollFlags::IN)], Some(&now)).is_ok_and(|ringing| ringing > 0)
}

/// Where the guest is told that requests are answered; the front end may put another one there at any time.
#[derive(Debug, Default)]
pub(super) struct Bell {
    file: Mutex<Option<File>>,
}

impl Bell {
    /// Puts another one there, or none.
    pub(super) fn set(&self, file: Option<File>) {
        *self.file.lock() = file;
    }

    /// Tells the guest.
    pub(super) fn ring(&self) {
        if let Some(file) = &*self.file.lock() {
            ring(file);
        }
    }
}
