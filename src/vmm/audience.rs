//! Whoever started a machine in the foreground, and is shown what its guest says.
//!
//! # Rules
//! 1. Nothing waits for a screen: a pager that was stopped, a terminal that was told to hold, a pipe that nobody reads. What
//!    shows has a thread of its own, which may stand still for as long as the screen does, also when the guest has ended.
//! 2. At the end of a guest its last words are given [`LAST_WORDS_TIME`] to be shown.
//! 3. A screen that stood still goes on with what is kept of what the guest said then, and with what it says now.

use std::sync::Arc;
use std::time::Duration;

use super::Log;
use crate::error::{Error, Result};
use crate::sync::{Condvar, Mutex};

/// How long a screen may take to show what a guest said last.
const LAST_WORDS_TIME: Duration = Duration::from_secs(1);

/// Shows what a guest says.
pub type Show = Box<dyn Fn(&[u8]) + Send>;

/// What the thread does.
#[derive(Debug, Default)]
struct Turn {
    /// What it is to show next.
    next: Option<Arc<Log>>,
    /// It shows something.
    busy: bool,
    /// There will be nothing more.
    over: bool,
}

#[derive(Debug, Default)]
struct Shared {
    turn: Mutex<Turn>,
    changed: Condvar,
}

/// The thread that shows; it ends some time after this was dropped.
#[derive(Debug)]
pub(super) struct Audience(Arc<Shared>);

impl Audience {
    /// Starts the thread.
    ///
    /// # Errors
    /// Those of the host.
    pub(super) fn new(show: Show) -> Result<Self> {
        let shared = Arc::new(Shared::default());
        let of_thread = Arc::clone(&shared);
        let thread = std::thread::Builder::new().name("screen".into()).spawn(move || of_thread.show(&*show));
        thread.map_err(|e| Error::io("no thread for what the guest says", e))?;
        Ok(Self(shared))
    }

    /// Has a log shown, to its end. One that was not begun yet is left out for it.
    pub(super) fn follow(&self, log: Arc<Log>) {
        self.0.turn.lock().next = Some(log);
        self.0.changed.notify_all();
    }

    /// Waits until a log that has been closed was shown, or the screen has taken too long.
    pub(super) fn hear_last_words(&self) {
        let until = crate::clock::now() + LAST_WORDS_TIME;
        let mut turn = self.0.turn.lock();
        while turn.busy || turn.next.is_some() {
            if self.0.changed.wait_until(&mut turn, until).timed_out() {
                tracing::debug!("the screen does not take what the guest said last; console.log has it");
                return;
            }
        }
    }
}

impl Drop for Audience {
    fn drop(&mut self) {
        self.0.turn.lock().over = true;
        self.0.changed.notify_all();
    }
}

impl Shared {
    /// The thread.
    fn show(&self, show: &dyn Fn(&[u8])) {
        while let Some(log) = self.next() {
            let mut next = 0;
            while let Some(part) = log.part(next) {
                next = part.start + part.bytes.len() as u64;
                show(&part.bytes);
            }
        }
    }

    /// Waits for the next log; `None` when there will be none.
    fn next(&self) -> Option<Arc<Log>> {
        let mut turn = self.turn.lock();
        turn.busy = false;
        self.changed.notify_all();
        loop {
            if let Some(log) = turn.next.take() {
                turn.busy = true;
                return Some(log);
            }
            if turn.over {
                return None;
            }
            self.changed.wait(&mut turn);
        }
    }
}
