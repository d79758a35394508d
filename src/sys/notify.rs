//! Events of somebody else, rung without waiting for him.
//!
//! A write to an eventfd waits while its counter is full, unless the descriptor says that it must not (`O_NONBLOCK`). But
//! that is said of the open file, so whoever shares it can take it back at any time, and fill the counter. The kernel itself
//! never waits there: what it completes in an io_uring it notifies of, and a full counter stays full. So a ring with
//! nothing but such an event does nothing, and the kernel notifies.
//!
//! # Rules
//! 1. The ring keeps the event; who rings needs no descriptor of it.
//! 2. It may be rung by any thread, by one at a time.

#![expect(unsafe_code, reason = "the submission queue holds raw entries")]

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use io_uring::{IoUring, opcode};

/// An event that can be rung.
pub struct Notify(IoUring);

impl std::fmt::Debug for Notify {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Notify").finish()
    }
}

impl Notify {
    /// Makes it for an eventfd.
    ///
    /// # Errors
    /// When it is none, or the host allows no io_uring.
    pub fn new(event: impl AsFd) -> io::Result<Self> {
        let ring = IoUring::new(1)?;
        ring.submitter().register_eventfd(event.as_fd().as_raw_fd())?;
        Ok(Self(ring))
    }

    /// Makes the event readable.
    ///
    /// # Errors
    /// Any error of the host.
    pub fn ring(&mut self) -> io::Result<()> {
        let nothing = opcode::Nop::new().build();
        // One that the kernel did not take before is still there, and as good.
        // SAFETY: it names no memory and no file.
        unsafe { self.0.submission().push(&nothing) }.ok();
        let done = self.0.submit();
        self.0.completion().for_each(drop);
        done.map(drop)
    }
}

#[cfg(test)]
mod tests {
    use rustix::event::{EventfdFlags, eventfd};

    use super::*;

    #[test]
    fn an_event_is_rung_also_when_it_is_full_and_would_make_a_write_wait() {
        let event = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        let Ok(mut notify) = Notify::new(&event) else {
            assert!(std::env::var_os("CI").is_none(), "CI must have io_uring");
            eprintln!("SKIPPED: there is no io_uring");
            return;
        };
        let mut count = [0; 8];
        for rung in 1..=3_u64 {
            (0..rung).for_each(|_| notify.ring().unwrap());
            rustix::io::read(&event, &mut count).unwrap();
            assert_eq!(u64::from_le_bytes(count), rung);
        }
        let full = u64::MAX - 1;
        rustix::io::write(&event, &full.to_le_bytes()).unwrap();
        // A write would wait here for ever.
        (0..3).for_each(|_| notify.ring().unwrap());
        rustix::io::read(&event, &mut count).unwrap();
        assert!(u64::from_le_bytes(count) >= full);
        notify.ring().unwrap();
        rustix::io::read(&event, &mut count).unwrap();
        assert_eq!(u64::from_le_bytes(count), 1);
        let (pipe, _writer) = rustix::pipe::pipe().unwrap();
        Notify::new(&pipe).unwrap_err();
    }
}
