//! Views of the catalog from before it was opened anew, as happens after a fold that found no room.
//!
//! # Rules
//! 1. No fold while one of them is in use: the database does not know of it, and would use pages again that it reads.
//! 2. Nobody waits for that with anything locked: a fold gives up its turn, and only who finds the journal full waits, and not
//!    for ever. One who reads and then has to commit could wait for himself.

use std::sync::{Arc, Weak};
use std::time::Duration;

use super::catalog::View;
use crate::clock;
use crate::error::{Error, Result};
use crate::sync::Mutex;

/// How long a change that finds the journal full waits: a walk over the map is over by then.
const WAIT_MAX: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_millis(5);

/// The views that are no longer those of the open catalog.
#[derive(Debug, Default)]
pub(super) struct Outdated(Mutex<Vec<Weak<View>>>);

impl Outdated {
    /// Notes one that was replaced.
    pub(super) fn note(&self, view: &Arc<View>) {
        self.0.lock().push(Arc::downgrade(view));
    }

    /// Tells whether somebody has one.
    pub(super) fn are_read(&self) -> bool {
        let mut views = self.0.lock();
        views.retain(|view| view.strong_count() > 0);
        !views.is_empty()
    }

    /// Waits until nobody has one.
    ///
    /// # Errors
    /// `NoSpace` when that takes too long.
    pub(super) fn let_go(&self) -> Result<()> {
        let begun = clock::now();
        while self.are_read() {
            if begun.elapsed() > WAIT_MAX {
                let what = "the journal is full, and the catalog is still read as it was before the host ran full";
                return Err(Error::no_space(what)
                    .hint("try again when the diffs, backups and checks that are under way have ended"));
            }
            clock::sleep(PAUSE);
        }
        Ok(())
    }
}
