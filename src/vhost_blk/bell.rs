//! The events by which front end and server wake each other.
//!
//! # Rules
//! 1. Those of a front end are eventfds ([`super::sent`]), and shared with it: it may take back that they do not make
//!    anybody wait, fill or empty them at any time. So no read or write of one waits, whatever it does ([`Notify`]).

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec};
use rustix::fs::OFlags;
use rustix::io::{Errno, ReadWriteFlags};

use crate::sync::Mutex;
use crate::sys::notify::Notify;

/// Makes an event that this program rings itself.
pub(super) fn eventfd() -> io::Result<File> {
    Ok(File::from(rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?))
}

/// Makes an event of our own readable, or one that nobody shares who would make us wait.
pub(super) fn ring(file: &File) {
    // Full means readable already, and one that nobody reads any more wakes nobody.
    if let Err(error) = rustix::io::write(file, &1_u64.to_le_bytes())
        && error != Errno::AGAIN
    {
        tracing::debug!("a notification was not sent: {error}");
    }
}

/// Takes what made an event readable; tells whether anything had.
///
/// # Errors
/// Any error of the host.
pub(super) fn silence(file: impl AsFd) -> io::Result<bool> {
    let mut count = [0_u8; 8];
    let into = &mut [io::IoSliceMut::new(&mut count)];
    // Not at an offset, which an event does not have.
    match rustix::io::preadv2(file, into, u64::MAX, ReadWriteFlags::NOWAIT) {
        Ok(_) => Ok(true),
        Err(Errno::AGAIN | Errno::INTR) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Waits until one of two descriptors is readable, or can never be; tells whether the first is. `None` when the time is over
/// before.
pub(super) fn wait(first: impl AsFd, second: impl AsFd, at_most: Option<Duration>) -> io::Result<Option<bool>> {
    let mut fds = [PollFd::new(&first, PollFlags::IN), PollFd::new(&second, PollFlags::IN)];
    let time = at_most.map(|time| Timespec::try_from(time).expect("times here are short"));
    loop {
        match rustix::event::poll(&mut fds, time.as_ref()) {
            Ok(0) => return Ok(None),
            Ok(_) => return Ok(Some(!fds[0].revents().is_empty())),
            // Longer then, which does no harm.
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Tells whether a descriptor is readable now.
pub(super) fn is_ringing(file: &impl AsFd) -> bool {
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    rustix::event::poll(&mut [PollFd::new(file, PollFlags::IN)], Some(&now)).is_ok_and(|ringing| ringing > 0)
}

#[derive(Debug)]
enum Way {
    Kernel(Box<Notify>),
    /// Where there is no io_uring: it waits for a front end that has taken O_NONBLOCK back and fills the counter.
    Write(File),
}

/// An event of the front end, which may put another one there at any time: tells the guest that requests are answered, or the
/// front end that a queue has ended.
#[derive(Debug, Default)]
pub(super) struct Bell(Mutex<Option<Way>>);

impl Bell {
    /// Puts another one there, or none.
    ///
    /// # Errors
    /// When it can be rung in no way.
    pub(super) fn set(&self, file: Option<File>) -> io::Result<()> {
        let way = |file: File| match Notify::new(&file) {
            Ok(notify) => Ok(Way::Kernel(Box::new(notify))),
            Err(_) => never_wait(&file).map(|()| Way::Write(file)),
        };
        *self.0.lock() = file.map(way).transpose()?;
        Ok(())
    }

    /// Rings it.
    pub(super) fn ring(&self) {
        match &mut *self.0.lock() {
            Some(Way::Kernel(notify)) => {
                if let Err(error) = notify.ring() {
                    tracing::debug!("a notification was not sent: {error}");
                }
            }
            Some(Way::Write(file)) => ring(file),
            None => {}
        }
    }
}

fn never_wait(file: &File) -> io::Result<()> {
    let flags = rustix::fs::fcntl_getfl(file)?;
    Ok(rustix::fs::fcntl_setfl(file, flags | OFlags::NONBLOCK)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_that_makes_others_wait_makes_nobody_wait() {
        let event = File::from(rustix::event::eventfd(0, EventfdFlags::CLOEXEC).unwrap());
        assert!(!silence(&event).unwrap());
        ring(&event);
        assert!(is_ringing(&event) && silence(&event).unwrap() && !silence(&event).unwrap());
        let bell = Bell::default();
        bell.ring();
        bell.set(Some(event.try_clone().unwrap())).unwrap();
        bell.ring();
        assert!(silence(&event).unwrap());
        rustix::io::write(&event, &(u64::MAX - 1).to_le_bytes()).unwrap();
        bell.ring();
        assert!(silence(&event).unwrap());
        bell.set(None).unwrap();
        bell.ring();
        assert!(!silence(&event).unwrap());
        let (_reader, writer) = rustix::pipe::pipe().unwrap();
        silence(&writer).unwrap_err();
    }
}
