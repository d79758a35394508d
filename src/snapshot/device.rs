//! Reading a snapshot.

use std::sync::Arc;

use crate::disk::BlockDevice;
use crate::error::{Error, Result};
use crate::map::Run;
use crate::store::{Located, Source, Status, Store};
use crate::units::{BLOCK_SIZE, ChunkIndex, Epoch, SnapshotId};

/// An open snapshot: read-only, and kept whole until the last of its users lets go.
#[derive(Debug)]
pub struct SnapshotDevice {
    store: Arc<Store>,
    id: SnapshotId,
    source: Source,
    mapped: u64,
}

/// Opens a snapshot.
///
/// # Errors
/// `NotFound`; `Failed` when it is retired: its data is gone.
pub fn open(store: &Arc<Store>, disk: &str, snapshot: &str) -> Result<Arc<SnapshotDevice>> {
    let id = {
        let tables = store.tables.read();
        tables.snapshot(tables.disk_id(disk)?, snapshot)?.1.snapshot
    };
    open_by_id(store, id)
}

/// Opens a snapshot.
///
/// # Errors
/// As [`open`].
pub fn open_by_id(store: &Arc<Store>, id: SnapshotId) -> Result<Arc<SnapshotDevice>> {
    // Held before its status is read, so that it cannot begin to go away in between.
    store.hold_open(id);
    let found = {
        let tables = store.tables.read();
        tables.snapshot_by_id(id).and_then(|(key, row)| match row.status {
            Status::Live | Status::Hidden => Ok((key, row.size, row.referenced)),
            Status::Retired => {
                let name = tables.called_snapshot(row);
                Err(Error::failed(format!("snapshot {name} is retired: its data is gone"))
                    .hint("it can still be the base of a diff"))
            }
            Status::Dying | Status::Ghost => Err(Error::not_found("the snapshot was removed")),
        })
    };
    match found {
        Ok((key, size, blocks)) => {
            let source = Source { owner: store.new_owner(), branch: key.0, upto: key.1, size };
            Ok(Arc::new(SnapshotDevice { store: Arc::clone(store), id, source, mapped: blocks * BLOCK_SIZE }))
        }
        Err(error) => {
            store.let_go(id);
            Err(error)
        }
    }
}

impl Drop for SnapshotDevice {
    fn drop(&mut self) {
        self.store.cache.forget(self.source.owner);
        self.store.let_go(self.id);
    }
}

impl SnapshotDevice {
    /// Returns the id.
    #[must_use]
    pub fn id(&self) -> SnapshotId {
        self.id
    }

    /// Returns the pool it is in.
    #[must_use]
    pub fn store(&self) -> &Arc<Store> {
        &self.store
    }

    /// Returns the last epoch it can have blocks of.
    #[must_use]
    pub fn epoch(&self) -> Epoch {
        self.source.upto
    }

    /// Returns where the blocks `first..last` of a chunk are.
    ///
    /// # Errors
    /// When the map cannot be read.
    pub fn runs(&self, chunk: ChunkIndex, first: usize, last: usize) -> Result<Vec<Run>> {
        let cached = self.store.chunk(&self.source, chunk)?;
        let runs = cached.lock().entry.runs(first, last);
        Ok(runs)
    }

    fn refuse(&self) -> Error {
        Error::read_only("a snapshot is never written").hint("clone it with `afterimage clone` and write to the clone")
    }
}

impl BlockDevice for SnapshotDevice {
    fn size(&self) -> u64 {
        self.source.size
    }

    fn read(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.store.read(&self.source, buf, offset).map_err(|error| self.store.name_snapshot(error, self.id))
    }

    fn begin_read(&self, len: usize, offset: u64) -> Result<Option<Located>> {
        self.store.locate(&self.source, len, offset)
    }

    fn write(&self, _data: &[u8], _offset: u64) -> Result<()> {
        Err(self.refuse())
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn discard(&self, _offset: u64, _len: u64) -> Result<()> {
        Err(self.refuse())
    }

    fn write_zeroes(&self, _offset: u64, _len: u64) -> Result<()> {
        Err(self.refuse())
    }

    fn next_data(&self, offset: u64) -> Result<Option<(u64, u64)>> {
        self.store.next_data(&self.source, None, offset)
    }

    fn mapped(&self) -> u64 {
        self.mapped
    }

    fn read_only(&self) -> bool {
        true
    }
}
