//! A sorted heap of map entries on disk: seals list them by state, and they are needed by chunk.
//!
//! A database of its own in `rebuild.scratch`, removed by the rebuild that is done, or by the next one.

use std::collections::BTreeMap;

use super::super::catalog::{Catalog, View};
use super::super::journal::Mark;
use super::super::rows::{Key, KeyParts, decode_entry, encode_entry};
use super::BATCH;
use crate::error::{Error, Result};
use crate::map::Entry;
use crate::media::{Media, Open};
use crate::units::{BranchId, ChunkIndex, Epoch};

/// Its name.
pub(super) const NAME: &str = "rebuild.scratch";
const CACHE: usize = 32 << 20;
const PAGE: usize = 4096;

/// Entries by lineage, chunk and epoch.
pub(super) struct Scratch {
    catalog: Catalog,
    rows: Vec<(Key, Vec<u8>)>,
}

impl Scratch {
    pub(super) fn create(media: &dyn Media) -> Result<Self> {
        super::remove(media, NAME)?;
        let file = media.open(NAME, Open::New).map_err(|e| Error::io(format!("cannot make {NAME}"), e))?;
        Ok(Self { catalog: Catalog::create(file, CACHE)?, rows: Vec::new() })
    }

    pub(super) fn put(&mut self, lineage: BranchId, chunk: ChunkIndex, epoch: Epoch, entry: &Entry) -> Result<()> {
        self.rows.push((Key::map(lineage, chunk, epoch), encode_entry(entry)));
        if self.rows.len() >= BATCH { self.write() } else { Ok(()) }
    }

    fn write(&mut self) -> Result<()> {
        let mut rows = self.rows.iter().map(|(key, value)| (*key, Some(&value[..])));
        self.catalog.fold(&mut rows, Mark::START)?;
        self.rows.clear();
        Ok(())
    }

    /// Ends the writing.
    pub(super) fn view(&mut self) -> Result<View> {
        self.write()?;
        self.catalog.view()
    }
}

/// Calls `each` for every chunk of every lineage, in order, with the entries of its epochs.
pub(super) fn by_chunk(
    view: &View,
    each: &mut dyn FnMut(BranchId, ChunkIndex, BTreeMap<Epoch, Entry>) -> Result<()>,
) -> Result<()> {
    let mut at = Key::meta();
    let mut current: Option<(BranchId, ChunkIndex, BTreeMap<Epoch, Entry>)> = None;
    loop {
        let rows = view.page(&at, &Key::last(), PAGE)?;
        let more = (rows.len() == PAGE).then(|| rows[PAGE - 1].0.after());
        for (key, value) in rows {
            let KeyParts::Map(lineage, chunk, epoch) = key.parts()? else { continue };
            let same = current.as_ref().is_some_and(|now| (now.0, now.1) == (lineage, chunk));
            if !same && let Some((lineage, chunk, entries)) = current.take() {
                each(lineage, chunk, entries)?;
            }
            let now = current.get_or_insert_with(|| (lineage, chunk, BTreeMap::new()));
            now.2.insert(epoch, decode_entry(&value)?);
        }
        let Some(next) = more else { break };
        at = next;
    }
    match current {
        Some((lineage, chunk, entries)) => each(lineage, chunk, entries),
        None => Ok(()),
    }
}
