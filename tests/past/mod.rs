//! Retired snapshots and diffs: one test for each way in which tracking changes has gone wrong in other systems.
//!
//! Each opens with what broke elsewhere. The model test drives the same things at random; these name them.

mod bases;
mod bugs;
mod crashes;
mod crowds;
mod faults;
mod figures;
mod lost;

use std::sync::Arc;

use afterimage::disk::{self, BlockDevice, Disk};
use afterimage::media::{Media, SimMedia};
use afterimage::progress::Silent;
use afterimage::snapshot;
use afterimage::snapshot::diff::{self, Extent, StateName};
use afterimage::store::{InitOptions, OpenOptions, SnapshotState, Store};

pub const BLOCK: u64 = 4096;
pub const MIB: u64 = 1 << 20;

pub fn options() -> OpenOptions {
    OpenOptions {
        cache_bytes: 1 << 20,
        catalog_cache_bytes: 1 << 20,
        background: false,
        low_water: Some(0),
        ballast: 4096,
        segment_blocks: 64,
        depth_max: 8,
    }
}

/// A pool on simulated files.
pub struct Pool {
    pub media: SimMedia,
    pub store: Arc<Store>,
}

impl Pool {
    pub fn new() -> Self {
        Self::seeded(1)
    }

    /// The seed decides what a power cut leaves of what was not synced.
    pub fn seeded(seed: u64) -> Self {
        let media = SimMedia::new(seed);
        let shared: Arc<dyn Media> = Arc::new(media.clone());
        Store::init(&shared, InitOptions { journal: 1 << 20, ballast: 4096, probe: false }).unwrap();
        let store = Self::open(&media);
        Self { media, store }
    }

    pub fn open(media: &SimMedia) -> Arc<Store> {
        let store = Store::open(Arc::new(media.clone()), options()).unwrap();
        snapshot::attend(&store);
        store
    }

    /// Closes the pool in order and opens it again.
    pub fn reopen(&mut self) {
        self.store.close().unwrap();
        self.store = Self::open(&self.media);
    }

    pub fn disk(&self, name: &str, size: u64) -> Arc<Disk> {
        disk::create(&self.store, name, size).unwrap();
        disk::open(&self.store, name).unwrap()
    }

    pub fn take(&self, disk: &str, snap: &str) {
        snapshot::take(&self.store, &[(disk.into(), snap.into())]).unwrap();
    }

    pub fn retire(&self, disk: &str, snap: &str) {
        snapshot::retire(&self.store, &[(disk.into(), snap.into())]).unwrap();
        snapshot::wait_retired(&self.store, &Silent).unwrap();
        let info = self.store.snapshot_info(disk, snap).unwrap();
        assert_eq!(info.state, SnapshotState::Retired);
        self.sound();
    }

    pub fn diff(&self, from: &str, to: &str) -> Vec<Extent> {
        let diff = diff::open(&self.store, &StateName::parse(from), &StateName::parse(to)).unwrap();
        diff.extents().unwrap()
    }

    pub fn sound(&self) {
        let report = snapshot::check(&self.store, false, &Silent).unwrap();
        assert!(report.problems.is_empty(), "check found {:#?}", report.problems);
    }

    /// Returns the blocks that the host has allocated for segments.
    pub fn allocated(&self) -> u64 {
        let tables = self.store.tables.read();
        let ids: Vec<_> = tables.segments().filter(|(_, row)| !row.removed).map(|(id, _)| id).collect();
        drop(tables);
        ids.into_iter().map(|id| self.store.segment(id).unwrap().allocated().unwrap()).sum::<u64>() / BLOCK
    }
}

pub fn fill(disk: &Disk, from: u64, upto: u64, tag: u8) {
    disk.write(&vec![tag; usize::try_from(upto - from).unwrap()], from).unwrap();
}

pub fn data(offset: u64, length: u64) -> Extent {
    Extent { offset, length, zero: false }
}

pub fn zero(offset: u64, length: u64) -> Extent {
    Extent { offset, length, zero: true }
}
