//! The gate that keeps the thread of the faults out while something changes under it.
//!
//! The thread takes no lock. It goes in before it does something about a fault, and comes out after; when the gate is closed it puts
//! the fault off. Who closes it waits until the thread is outside.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::clock;
use crate::sync::{Mutex, MutexGuard};

/// The gate, for one thread that goes through it.
#[derive(Debug, Default)]
pub(super) struct Gate {
    closed: AtomicBool,
    inside: AtomicBool,
    turn: Mutex<()>,
}

/// Proof that the thread is inside.
#[derive(Debug)]
pub(super) struct Inside<'a>(&'a Gate);

/// Proof that it is outside, and stays there.
#[derive(Debug)]
pub(super) struct Closed<'a> {
    gate: &'a Gate,
    _turn: MutexGuard<'a, ()>,
}

impl Gate {
    /// Goes in, unless it is closed.
    pub(super) fn enter(&self) -> Option<Inside<'_>> {
        self.inside.store(true, Ordering::SeqCst);
        let inside = Inside(self);
        (!self.closed.load(Ordering::SeqCst)).then_some(inside)
    }

    /// Closes it, and waits until the thread is outside.
    pub(super) fn close(&self) -> Closed<'_> {
        let turn = self.turn.lock();
        self.closed.store(true, Ordering::SeqCst);
        let mut spins = 0;
        while self.inside.load(Ordering::SeqCst) {
            spins += 1;
            // It copies 64 KiB at most in there, unless it waits for room in the ring.
            if spins < 100 { std::thread::yield_now() } else { clock::sleep(Duration::from_micros(50)) }
        }
        Closed { gate: self, _turn: turn }
    }
}

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        self.0.inside.store(false, Ordering::SeqCst);
    }
}

impl Drop for Closed<'_> {
    fn drop(&mut self) {
        self.gate.closed.store(false, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU64;

    use super::*;

    #[test]
    fn nobody_is_inside_while_it_is_closed() {
        let (gate, over, shared) = (Gate::default(), AtomicBool::new(false), AtomicU64::new(0));
        let entered = std::thread::scope(|scope| {
            let through = scope.spawn(|| {
                let mut entered = 0_u64;
                while !over.load(Ordering::Relaxed) {
                    if let Some(_inside) = gate.enter() {
                        let before = shared.fetch_add(1, Ordering::SeqCst);
                        assert_eq!(shared.swap(before, Ordering::SeqCst), before + 1);
                        entered += 1;
                    }
                }
                entered
            });
            for _ in 0..2000 {
                let _closed = gate.close();
                let before = shared.load(Ordering::SeqCst);
                std::thread::yield_now();
                assert_eq!(shared.swap(before + 7, Ordering::SeqCst), before);
            }
            over.store(true, Ordering::Relaxed);
            through.join().unwrap()
        });
        assert!(entered > 0, "it comes through in between");
    }
}
