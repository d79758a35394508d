//! Looking rows up in the ledger: in memory first, then in the catalog.
//!
//! # Rules
//! 1. What is in memory holds over what the catalog has; a row that memory deletes is not there.
//! 2. A fold that finds no room ends the database under everybody's feet, and it is opened anew: who was looking something up
//!    waits for that and looks again. Who walks over all rows of an instant ([`Frozen`]) cannot, and is told.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use super::catalog::{View, is_ended};
use super::frozen::Frozen;
use super::ledger::Ledger;
use super::rows::Key;
use crate::clock;
use crate::error::{Error, Result};

const PAGE: usize = 1024;
/// How long a look-up waits for the database to be opened anew.
const WAIT_MAX: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_millis(1);

/// What was found, or why not, and with which view of the catalog.
type Looked<T> = std::result::Result<T, (Error, Arc<View>)>;

/// A batch of rows.
#[derive(Debug)]
pub struct Page {
    /// The rows, in order.
    pub rows: Vec<(Key, Vec<u8>)>,
    /// Where to go on, if there may be more.
    pub next: Option<Key>,
}

impl Ledger {
    /// Returns all rows as of one instant; they stay as they are while others go on.
    pub fn frozen(&self) -> Frozen {
        let layers = self.layers.lock();
        let memory = layers.newest_first().into_iter().filter(|layer| !layer.is_empty()).cloned().collect();
        Frozen::new(memory, Arc::clone(&layers.view))
    }

    /// Returns the value of a row as of now.
    ///
    /// # Errors
    /// When the catalog cannot be read.
    pub fn get(&self, key: &Key) -> Result<Option<Vec<u8>>> {
        self.look(|| {
            let view = {
                let layers = self.layers.lock();
                if let Some(found) = layers.get(key) {
                    return Ok(found.map(|value| value.to_vec()));
                }
                Arc::clone(&layers.view)
            };
            view.get(key).map_err(|error| (error, view))
        })
    }

    /// Returns the last row from `low` to `high`, both included, as of now.
    ///
    /// # Errors
    /// When the catalog cannot be read.
    pub fn last_in(&self, low: &Key, high: &Key) -> Result<Option<(Key, Vec<u8>)>> {
        if low > high {
            return Ok(None);
        }
        self.look(|| self.last_now(low, high))
    }

    fn last_now(&self, low: &Key, high: &Key) -> Looked<Option<(Key, Vec<u8>)>> {
        let mut high = *high;
        loop {
            let (newest, view) = {
                let layers = self.layers.lock();
                let tops = layers.newest_first().map(|layer| layer.range(*low..=high).next_back().map(|(key, _)| *key));
                let newest = tops.into_iter().flatten().max().map(|key| (key, layers.get(&key).expect("just seen")));
                (newest, Arc::clone(&layers.view))
            };
            let below = view.last_in(low, &high).map_err(|error| (error, view))?;
            match (newest, below) {
                (None, below) => return Ok(below.map(|(key, value)| (key, value.bytes().to_vec()))),
                (Some((key, _)), Some((stored, value))) if stored > key => {
                    return Ok(Some((stored, value.bytes().to_vec())));
                }
                (Some((key, Some(value))), _) => return Ok(Some((key, value.to_vec()))),
                // Deleted in memory: look below it.
                (Some((key, None)), _) => match key.before() {
                    Some(lower) if lower >= *low => high = lower,
                    _ => return Ok(None),
                },
            }
        }
    }

    /// Returns rows from `low` to `high`, both included, in order: at most about `most`, and the key to go on from when
    /// there may be more.
    ///
    /// # Errors
    /// When the catalog cannot be read.
    pub fn page(&self, low: &Key, high: &Key, most: usize) -> Result<Page> {
        self.look(|| self.page_now(low, high, most))
    }

    fn page_now(&self, low: &Key, high: &Key, most: usize) -> Looked<Page> {
        let (memory, view) = {
            let layers = self.layers.lock();
            let mut memory = BTreeMap::new();
            for layer in layers.newest_first() {
                for (key, value) in layer.range(*low..=*high).take(most) {
                    memory.entry(*key).or_insert_with(|| value.clone());
                }
            }
            (memory, Arc::clone(&layers.view))
        };
        let stored = view.page(low, high, most).map_err(|error| (error, view))?;
        // Beyond the last key of a full batch, any layer may have keys that were not taken.
        let mut end = *high;
        let mut more = false;
        let mut cut = |last: Option<Key>, count: usize| {
            if let Some(last) = last.filter(|last| count == most && *last < end) {
                end = last;
                more = true;
            }
        };
        cut(stored.last().map(|row| row.0), stored.len());
        // `memory` is a union: its first `most` keys are complete up to the last of them.
        cut(memory.keys().nth(most - 1).copied(), memory.len().min(most));
        let mut merged: BTreeMap<Key, Vec<u8>> = stored.into_iter().filter(|row| row.0 <= end).collect();
        for (key, value) in memory.range(..=end) {
            match value {
                Some(value) => drop(merged.insert(*key, value.to_vec())),
                None => drop(merged.remove(key)),
            }
        }
        Ok(Page { rows: merged.into_iter().collect(), next: more.then(|| end.after()) })
    }

    /// Returns the first rows from `low` to `high`, both included, in order: at most about `most`, none only when there are
    /// none. (A page may be empty and not the last: all of its rows may be deleted in memory.)
    ///
    /// # Errors
    /// When the catalog cannot be read.
    pub fn first_rows(&self, low: &Key, high: &Key, most: usize) -> Result<Vec<(Key, Vec<u8>)>> {
        let mut page = self.page(low, high, most)?;
        while page.rows.is_empty()
            && let Some(next) = page.next.filter(|next| next <= high)
        {
            page = self.page(&next, high, most.max(16))?;
        }
        Ok(page.rows)
    }

    /// Calls `each` for every row from `low` to `high`, in order, page by page.
    ///
    /// # Errors
    /// When the catalog cannot be read, or what `each` returns.
    pub fn scan(&self, low: &Key, high: &Key, each: &mut dyn FnMut(Key, Vec<u8>) -> Result<()>) -> Result<()> {
        let mut from = Some(*low);
        while let Some(low) = from.filter(|low| low <= high) {
            let page = self.page(&low, high, PAGE)?;
            for (key, value) in page.rows {
                each(key, value)?;
            }
            from = page.next;
        }
        Ok(())
    }

    /// Looks, and looks again with the next view where the database of the first was ended.
    fn look<T>(&self, look: impl Fn() -> Looked<T>) -> Result<T> {
        loop {
            match look() {
                Ok(found) => return Ok(found),
                Err((error, view)) if is_ended(&error) && self.is_replaced(&view) => {}
                Err((error, _)) => return Err(error),
            }
        }
    }

    /// Waits until there is another view than this; false when none comes: without a fold under way nobody opens the database
    /// anew, as after a read that has failed.
    fn is_replaced(&self, view: &Arc<View>) -> bool {
        let begun = clock::now();
        loop {
            let folds = self.catalog.try_lock().is_none();
            if !Arc::ptr_eq(&self.layers.lock().view, view) {
                return true;
            }
            if !folds || self.poisoned().is_some() || begun.elapsed() > WAIT_MAX {
                return false;
            }
            clock::sleep(PAUSE);
        }
    }
}
