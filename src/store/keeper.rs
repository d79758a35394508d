//! The threads in the background: flush every five seconds, fold, seal, reclaim, punch, cut loose.
//!
//! # Rules
//! 1. Everything they do can also be called directly, step by step; tests and the crash simulator run without them.
//! 2. They hold the store weakly: a store that is closed or dropped ends them.
//! 3. An error is logged and tried again later with a pause; errors that matter have poisoned the pool by themselves.
//! 4. A panic poisons the pool: what the thread was at is half done in memory, and nobody else would do its work. Reads go
//!    on, writers are told, and whoever waits for this work finds out instead of waiting for ever.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::Duration;

use super::Store;
use crate::error::{Error, Kind, Result};
use crate::sync::{Condvar, Mutex};

const FLUSH_EVERY: Duration = Duration::from_secs(5);
const TIDY_EVERY: Duration = Duration::from_secs(1);
/// The journal is folded when it is this full, in percent.
const FOLD_AT: u64 = 40;

#[derive(Debug, Default)]
struct Bell {
    rung: Mutex<bool>,
    bell: Condvar,
    stop: AtomicBool,
}

impl Bell {
    /// Sleeps until rung or the time is over; returns false when it is time to end.
    fn sleep(&self, time: Duration) -> bool {
        let mut rung = self.rung.lock();
        if !*rung && !self.stop.load(Ordering::Acquire) {
            let _timeout = self.bell.wait_for(&mut rung, time);
        }
        *rung = false;
        !self.stop.load(Ordering::Acquire)
    }

    fn ring(&self) {
        *self.rung.lock() = true;
        self.bell.notify_all();
    }
}

/// The background threads of a store.
#[derive(Debug, Default)]
pub(super) struct Keeper {
    flusher: Arc<Bell>,
    tidier: Arc<Bell>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl Keeper {
    /// Starts the threads.
    ///
    /// # Errors
    /// When the host has no threads to give.
    pub(super) fn start(&self, store: &Arc<Store>) -> std::io::Result<()> {
        self.spawn("afterimage-flush", &self.flusher, store, FLUSH_EVERY, |store| {
            store.flush_all()?;
            Ok(false)
        })?;
        self.spawn("afterimage-tidy", &self.tidier, store, TIDY_EVERY, Store::tidy_step)
    }

    fn spawn(
        &self,
        name: &str,
        bell: &Arc<Bell>,
        store: &Arc<Store>,
        every: Duration,
        step: fn(&Store) -> Result<bool>,
    ) -> std::io::Result<()> {
        let (bell, store) = (Arc::clone(bell), Arc::downgrade(store));
        let run = move || run(&bell, &store, every, step);
        self.threads.lock().push(std::thread::Builder::new().name(name.into()).spawn(run)?);
        Ok(())
    }

    /// Tells whether the threads were asked to end: long work breaks off then.
    pub(super) fn stopping(&self) -> bool {
        self.tidier.stop.load(Ordering::Acquire)
    }

    /// Asks the tidier to look at once.
    pub(super) fn wake(&self) {
        self.tidier.ring();
    }

    /// Ends the threads and waits for them.
    pub(super) fn stop(&self) {
        for bell in [&self.flusher, &self.tidier] {
            bell.stop.store(true, Ordering::Release);
            bell.ring();
        }
        for thread in std::mem::take(&mut *self.threads.lock()) {
            // A store may be dropped by one of its own threads, which cannot wait for itself.
            if thread.thread().id() != std::thread::current().id() && thread.join().is_err() {
                tracing::error!("a background thread of the pool panicked");
            }
        }
    }
}

/// Does a step; a panic poisons the pool.
fn guarded(store: &Store, step: fn(&Store) -> Result<bool>) -> Result<bool> {
    catch_unwind(AssertUnwindSafe(|| step(store))).unwrap_or_else(|_| {
        let error = Error::failed("work in the background failed on a mistake in this program");
        store.ledger.poison(&error);
        Err(error)
    })
}

fn run(bell: &Bell, store: &Weak<Store>, every: Duration, step: fn(&Store) -> Result<bool>) {
    while bell.sleep(every) {
        loop {
            let Some(store) = store.upgrade() else { return };
            match guarded(&store, step) {
                Ok(true) if !bell.stop.load(Ordering::Acquire) => {}
                Ok(_) => break,
                Err(error) => {
                    if error.kind() != Kind::ReadOnly {
                        tracing::warn!("work in the background failed and is tried again: {error}");
                    }
                    break;
                }
            }
        }
    }
}

impl Store {
    /// Does one piece of the work that waits in the background. Returns whether there may be more.
    ///
    /// # Errors
    /// What the piece of work returns.
    pub fn tidy_step(&self) -> Result<bool> {
        if self.ledger.writable().is_err() {
            return Ok(false);
        }
        let fold = |store: &Self| {
            let must = store.ledger.journal_percent() >= FOLD_AT;
            // That is for speed only: what is kept for those that must is not spent on it.
            let has_room = || store.space().is_ok_and(|space| space.free > store.low_water(space));
            Ok((must || store.ledger.is_littered() && has_room()) && store.fold()?)
        };
        let punch = |store: &Self| {
            let punched = store.punch_step(true)? > 0;
            if punched {
                store.waiting.look();
            }
            Ok(punched)
        };
        // What gives room comes first, and one that fails does not keep the others from their turn: on a full host file
        // system neither a fold nor a seal can be written, and punching must go on all the same.
        let steps: [fn(&Self) -> Result<bool>; 10] = [
            fold,
            Self::trim_one,
            Self::reclaim_one,
            Self::sweep,
            punch,
            Self::record_one,
            Self::seal_one,
            Self::tend_state_files,
            Self::flatten_one,
            Self::drop_stamps,
        ];
        let mut more = false;
        let mut failed = None;
        for step in steps {
            let turn = self.tidying.lock();
            let result = step(self);
            drop(turn);
            match result {
                Ok(again) => more |= again,
                Err(error) => failed = failed.or(Some(error)),
            }
        }
        if !more {
            let _turn = self.tidying.lock();
            if self.remove_empty_segments()? > 0 {
                self.waiting.look();
            }
            self.restore_ballast();
            self.back_up_if_due();
        }
        match failed {
            // Try it again once the rest is done.
            Some(error) if !more => return Err(error),
            Some(error) => tracing::debug!("a piece of work in the background failed: {error}"),
            None => {}
        }
        Ok(more)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::media::{Media, SimMedia};
    use crate::store::{InitOptions, OpenOptions};

    /// The thread ended, and nothing said so: no flush, no punching, and `reclaim --wait` waited for ever.
    #[test]
    fn a_panic_in_the_background_poisons_the_pool_and_ends_no_thread() {
        let media: Arc<dyn Media> = Arc::new(SimMedia::new(1));
        Store::init(&media, InitOptions { journal: 1 << 20, ballast: 4096, probe: false }).unwrap();
        let options = OpenOptions { background: false, low_water: Some(0), ballast: 4096, ..OpenOptions::default() };
        let store = Store::open(media, options).unwrap();
        store.keeper.spawn("panics", &store.keeper.tidier, &store, Duration::ZERO, |_| panic!("a mistake")).unwrap();
        while store.health().is_none() {
            std::thread::yield_now();
        }
        assert!(store.health().unwrap().contains("mistake in this program"), "{:?}", store.health());
        assert!(!store.keeper.threads.lock()[0].is_finished());
        store.keeper.stop();
    }
}
