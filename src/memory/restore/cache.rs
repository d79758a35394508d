//! Storage blocks that were read lately: one read for all who want one at the same time, and for the page blocks that follow.

use std::collections::VecDeque;
use std::sync::{Arc, OnceLock};

use crate::checkpoint::{Reader, StorageBlock};
use crate::error::{Error, Result};
use crate::sync::Mutex;
use crate::sys::pages::Pages;

/// A storage block: the number of its layer, and its own.
pub(super) type Key = (usize, StorageBlock);

/// One that is read, or being read by whoever came first.
pub(super) type Entry = Arc<OnceLock<Result<Pages, Error>>>;

/// The storage blocks, the latest last.
#[derive(Debug)]
pub(super) struct Cache {
    state: Mutex<State>,
    most: usize,
}

#[derive(Debug, Default)]
struct State {
    entries: VecDeque<(Key, Entry)>,
    /// Buffers to read into again: new ones would be a fault of ours for each page.
    free: Vec<Pages>,
}

impl Cache {
    /// Makes one of at most so many storage blocks, beside those that somebody is working with.
    pub(super) fn new(most: usize) -> Self {
        Self { state: Mutex::default(), most }
    }

    /// Calls `work` with a storage block.
    pub(super) fn with<T>(&self, reader: &Reader, key: Key, work: impl FnOnce(&[u8]) -> Result<T>) -> Result<T> {
        let entry = self.entry(key);
        let read = entry.get_or_init(|| self.read(reader, key));
        match read {
            Ok(bytes) => work(bytes),
            Err(error) => {
                // The next one who wants it tries again.
                let error = error.again();
                self.state.lock().entries.retain(|(of, it)| *of != key || !Arc::ptr_eq(it, &entry));
                Err(error)
            }
        }
    }

    /// Forgets everything: what was read may be mended in the file by now.
    pub(super) fn clear(&self) {
        self.state.lock().entries.clear();
    }

    fn read(&self, reader: &Reader, (layer, block): Key) -> Result<Pages> {
        let free = self.state.lock().free.pop();
        let size = reader.layers()[layer].geometry().storage_block();
        let mut bytes = match free.filter(|free| free.len() == size) {
            Some(bytes) => bytes,
            None => {
                Pages::new(size).map_err(|error| Error::io("there is no memory to read a checkpoint into", error))?
            }
        };
        reader.read_block(layer, block, &mut bytes)?;
        Ok(bytes)
    }

    fn entry(&self, key: Key) -> Entry {
        let mut state = self.state.lock();
        if let Some(at) = state.entries.iter().position(|(of, _)| *of == key) {
            // Back to the end: it is used.
            let found = state.entries.remove(at).expect("it was just there");
            let entry = Arc::clone(&found.1);
            state.entries.push_back(found);
            return entry;
        }
        if state.entries.len() >= self.most
            && let Some((_, old)) = state.entries.pop_front()
            && let Some(Ok(bytes)) = Arc::into_inner(old).and_then(OnceLock::into_inner)
        {
            state.free.push(bytes);
        }
        let entry = Entry::default();
        state.entries.push_back((key, Arc::clone(&entry)));
        entry
    }
}
