//! Locks, and the fence that tells when everything begun before has ended.
//!
//! All locks of the project come from here (a lint refuses the ones of `std`), so that a model checker can be put in
//! their place. The order in which locks are taken is written down once, in [`crate::store`].

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

pub use parking_lot::{Condvar, Mutex, MutexGuard, RwLock, RwLockReadGuard, RwLockWriteGuard};

/// A shared lock that owns what it locks.
pub type OwnedReadGuard<T> = parking_lot::ArcRwLockReadGuard<parking_lot::RawRwLock, T>;

/// Lets one side wait until every I/O that began before a moment has ended, without stopping new I/O.
///
/// Readers enter one of two counters; a waiter flips which one newcomers use and waits for the other to drain
/// (the scheme of SRCU, McKenney 2006, with sequentially consistent counters).
#[derive(Debug, Default)]
pub struct Fence {
    side: AtomicU64,
    inside: [AtomicU64; 2],
    turn: Mutex<()>,
}

/// Proof of being inside a [`Fence`]; leaving is dropping it.
#[derive(Debug)]
pub struct Inside<'a> {
    counter: &'a AtomicU64,
}

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        self.counter.fetch_sub(1, Ordering::SeqCst);
    }
}

/// As [`Inside`], of a fence that it keeps alive.
#[derive(Debug)]
pub struct InsideOwned {
    fence: Arc<Fence>,
    which: usize,
}

impl Drop for InsideOwned {
    fn drop(&mut self) {
        self.fence.inside[self.which].fetch_sub(1, Ordering::SeqCst);
    }
}

impl Fence {
    /// Enters; what the caller looks up after this stays readable until the guard is dropped.
    pub fn enter(&self) -> Inside<'_> {
        Inside { counter: &self.inside[self.join()] }
    }

    /// As [`Fence::enter`], for I/O that outlives the function that begins it.
    pub fn enter_owned(self: &Arc<Self>) -> InsideOwned {
        InsideOwned { which: self.join(), fence: Arc::clone(self) }
    }

    /// Enters one of the counters and returns which.
    fn join(&self) -> usize {
        loop {
            let side = self.side.load(Ordering::SeqCst);
            let which = (side & 1) as usize;
            self.inside[which].fetch_add(1, Ordering::SeqCst);
            // A flip between load and add could let the waiter miss us: go round again.
            if self.side.load(Ordering::SeqCst) == side {
                return which;
            }
            self.inside[which].fetch_sub(1, Ordering::SeqCst);
        }
    }

    /// Waits until everyone who was inside when this was called has left.
    pub fn wait(&self) {
        let _turn = self.turn.lock();
        let side = self.side.fetch_add(1, Ordering::SeqCst);
        let counter = &self.inside[(side & 1) as usize];
        let mut pause_us = 5;
        while counter.load(Ordering::SeqCst) != 0 {
            std::thread::sleep(Duration::from_micros(pause_us));
            pause_us = (pause_us * 2).min(1000);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::AtomicBool;

    use super::*;

    #[test]
    fn waits_for_those_inside_and_not_for_newcomers() {
        let fence = Arc::new(Fence::default());
        let first = fence.enter();
        let done = Arc::new(AtomicBool::new(false));
        let waiter = std::thread::spawn({
            let (fence, done) = (Arc::clone(&fence), Arc::clone(&done));
            move || {
                fence.wait();
                done.store(true, Ordering::SeqCst);
            }
        });
        while fence.side.load(Ordering::SeqCst) == 0 {
            std::thread::yield_now();
        }
        let second = fence.enter();
        assert!(!done.load(Ordering::SeqCst));
        drop(first);
        waiter.join().unwrap();
        assert!(done.load(Ordering::SeqCst), "the newcomer does not hold the waiter up");
        drop(second);
        fence.wait();
    }
}
