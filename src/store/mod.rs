//! The commit point of a pool: journal and catalog, names, epochs, and what is written but not yet durable.
//!
//! # Parts
//! [`ledger`] keeps rows durable; `tables` and `tree` are the small tables in memory; `head` is the live side of a disk;
//! `commit` turns changed chunks into rows; `reclaim` finds addresses that no state holds any more, `punch` gives them
//! back to the host; `view` answers look-ups for any state, `locate` those that must not wait; `heirs` counts what was
//! written since a snapshot that is gone; `space` watches the host file system; `tenancy` knows who writes; `unflushed` keeps what a killed process had
//! acknowledged; `record_faults` knows
//! which records of retired snapshots are faulty; `check` proves the whole.
//!
//! # Locks, in the order in which they are taken
//! | lock | guards | may wait for the disk while held |
//! |---|---|---|
//! | `Store::tidying` | one piece of background work at a time | yes |
//! | `Head::commit` of several disks in order of id | the order of frames of a disk: flush, snapshot, revert | yes |
//! | `Head::gate` in order of id | shared by writers, exclusive for an epoch switch, resize, revert | shared: one write; exclusive: no |
//! | claims on blocks of a chunk (`ChunkGuard::claim`), chunks in order | the blocks being written | yes |
//! | a chunk's lock | its entry | only to load it |
//! | `Head::alloc` | the slab to hand out next | to make a segment |
//! | `Store::reclaim` | who holds what, while it is decided what becomes free | reads only |
//! | `Store::tables` | the small tables | no |
//! | `Store::heads` | the list of the live sides | no |
//! | the ledger's own locks | rows | as its header says |
//! | those of `Tenancy` (its `taking_over` and `announcement`: until the kernel was told, with no other lock) | who writes | no |
//! | that of `Head::unflushed` | the log of a disk | a write to the page cache |
//! | `Head::earlier` | what an earlier process may have left unsynced | yes |
//! | that of the waiting room, with none above but `tidying` | who waits on purpose | no, but asks the host for its room |
//! | leaves: `Head::line`, `dirty`, `frozen`, `slabs`, `owed`, `crcs` | single fields | no |
//!
//! A thread that has begun writes and not ended them (`disk::begin`) holds gates and claims, and takes none by waiting:
//! only by trying. So it is never part of a circle.
//!
//! # After a crash
//! Opening reads the catalog, then the frames of the journal behind it. What was submitted and not in a whole frame never
//! happened; every acknowledged flush, snapshot or name is in one.
//!
#![doc = include_str!("FORMAT.md")]

mod backup;
mod catalog;
mod check;
mod commit;
mod flatten;
mod frozen;
mod head;
mod heirs;
mod journal;
mod keeper;
pub mod ledger;
mod limits;
mod listing;
mod locate;
mod logged;
mod lookups;
mod open;
pub mod origin;
mod past;
mod punch;
mod rebuild;
mod reclaim;
mod record_faults;
pub mod rows;
mod seal;
pub mod seal_file;
mod settings;
mod space;
pub mod state_file;
mod state_files;
mod states;
mod tables;
pub mod tenancy;
mod touch;
mod tree;
pub mod unflushed;
mod unmap;
mod view;
mod waiting;
mod walk;

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

pub use backup::{backup_name, backups};
pub use catalog::panic_is_guarded;
pub use check::{CheckReport, LISTED_MAX, Problem, SealDue, SealsDue, check};
pub use commit::Capture;
pub use frozen::Frozen;
pub use head::{Head, Line, Slab};
pub use journal::{JOURNAL_MIN, Journal, Mark, encode_row};
pub use listing::{DiskInfo, SnapshotInfo, SnapshotState};
pub use locate::{Extent, Located};
pub use open::{InitOptions, OpenOptions};
pub use origin::Origin;
pub use past::{Moment, OpeningRow, RetiredRow, decode_stamp, encode_stamp};
pub use punch::ReclaimReport;
pub use rebuild::{RebuildReport, RebuiltDisk, rebuild};
pub use record_faults::{RecordFault, record_path};
pub use settings::{EnospcPolicy, Settings};
pub use space::Room;
pub use states::{DiskRow, StateRow, Status};
pub use tables::{Edit, StateKey, Tables};
pub use tree::Stretch;
pub use view::{Resolved, Source};
pub use waiting::{Cancel, Go, Lobby, Need};
pub use walk::{Found, MapView, MapWalk, Unsaved};

use std::collections::{BTreeMap, HashMap};

use roaring::RoaringTreemap;
use uuid::Uuid;

use crate::error::Result;
use crate::map::Cache;
use crate::media::Media;
use crate::pool::{Segments, Superblock};
use crate::sync::{Fence, Mutex, RwLock};
use crate::units::{DiskId, SegmentId, SnapshotId};

/// A change that others may have cached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// A disk was made, renamed, resized, removed, or its content was replaced.
    Disk {
        /// The disk.
        id: DiskId,
        /// Its name now (the last one, when it is gone).
        name: String,
        /// Its name before, after a rename.
        was: Option<String>,
        /// It was removed.
        gone: bool,
        /// Its size changed.
        resized: bool,
        /// Its content was replaced, as by a revert.
        data: bool,
    },
    /// Another one than the mount is about to write to a disk, or has written after the mount had read: what is cached of
    /// its content is out of date.
    Written {
        /// The disk.
        disk: DiskId,
    },
    /// A snapshot was taken, renamed, retired or removed.
    Snapshot {
        /// The disk.
        disk: DiskId,
        /// Name of the disk.
        disk_name: String,
        /// The snapshot.
        id: SnapshotId,
        /// Its name now (the last one, when it is gone).
        name: String,
        /// Its name before, after a rename.
        was: Option<String>,
        /// It was removed.
        gone: bool,
        /// It is a retired one (from now on, or was until now).
        retired: bool,
    },
}

type Hook = Box<dyn Fn(&Change) + Send + Sync>;
/// Writes the record of one retired snapshot; false when there is none to write.
type Recorder = fn(&Store) -> Result<bool>;

/// An open pool.
pub struct Store {
    media: Arc<dyn Media>,
    superblock: Superblock,
    options: OpenOptions,
    /// Rows.
    pub ledger: ledger::Ledger,
    /// Small tables.
    pub tables: RwLock<Tables>,
    /// Segment files.
    pub segments: Segments,
    /// Decoded chunks.
    pub cache: Cache,
    /// Everyone who reads or writes segments is inside; punching waits for those who were.
    pub fence: Arc<Fence>,
    heads: Mutex<HashMap<DiskId, Arc<Head>>>,
    owners: AtomicU64,
    /// Held for one piece of background work, whoever does it: two that seal or reclaim one state would undo each other.
    pub(crate) tidying: Mutex<()>,
    reclaim: Mutex<reclaim::Progressing>,
    /// The row of the queue that was punched last.
    punched: Mutex<Option<rows::Key>>,
    holders: Mutex<HashMap<SnapshotId, usize>>,
    /// Addresses of blocks that do not match their checksum.
    bad: RwLock<RoaringTreemap>,
    /// Snapshots whose epochs cannot be sealed in this opening, and why.
    unsealable: Mutex<BTreeMap<SnapshotId, String>>,
    /// Records of retired snapshots that were found to be missing or damaged.
    record_faults: Mutex<BTreeMap<SnapshotId, RecordFault>>,
    /// Retired snapshots whose records could not be written, and why: they are passed by until somebody waits for them.
    unrecorded: Mutex<BTreeMap<SnapshotId, String>>,
    space: space::SpaceGuard,
    waiting: waiting::WaitingRoom,
    opening: u64,
    /// The last opening was not closed in order.
    unclean: bool,
    recovery: Mutex<unflushed::Recovery>,
    logs: Arc<unflushed::Files>,
    hooks: RwLock<Vec<Hook>>,
    recorder: RwLock<Option<Recorder>>,
    /// Stamps that were left when the last idle ones were dropped.
    stamps_needed: std::sync::atomic::AtomicUsize,
    changes: AtomicU64,
    keeper: keeper::Keeper,
    state_files: state_files::StateFiles,
    backups: backup::BackupKeeper,
    /// Counters for `metrics`.
    pub counters: Counters,
}

/// What the store did since it was opened.
#[derive(Debug, Default)]
pub struct Counters {
    /// Bytes read by users of disks and snapshots.
    pub read_bytes: AtomicU64,
    /// Reads.
    pub reads: AtomicU64,
    /// Bytes written by users of disks.
    pub written_bytes: AtomicU64,
    /// Writes.
    pub writes: AtomicU64,
    /// Flushes asked for.
    pub flushes: AtomicU64,
    /// Blocks given back to the host.
    pub punched_blocks: AtomicU64,
    /// Hole punching calls.
    pub punches: AtomicU64,
    /// States that were asked for their entry of a chunk, to find out whether blocks that another one lost are free.
    pub looks_around: AtomicU64,
    /// Snapshots taken.
    pub snapshots: AtomicU64,
    /// Nanoseconds the last snapshot kept writers out.
    pub snapshot_stop_ns: AtomicU64,
    /// The longest of those.
    pub snapshot_stop_ns_max: AtomicU64,
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Store").field("pool", &self.superblock.uuid).finish_non_exhaustive()
    }
}

impl Store {
    /// Returns the identity of the pool.
    #[must_use]
    pub fn uuid(&self) -> Uuid {
        self.superblock.uuid
    }

    /// Returns why the pool refuses writes, if it does.
    #[must_use]
    pub fn health(&self) -> Option<String> {
        self.ledger.poisoned()
    }

    /// Returns what of the pool is lost, if anything is: the segment files that were missing when it was opened.
    #[must_use]
    pub fn damage(&self) -> Option<String> {
        let lost = self.missing_segments();
        let first = crate::pool::segment_path(*lost.first()?);
        let what = match lost.len() {
            1 => format!("segment file {first} is missing"),
            n => format!("{n} segment files are missing, {first} the first of them"),
        };
        Some(format!("{what}; put back what you have a copy of while the pool is closed, `check` names them all"))
    }

    /// Returns the segments of which the files were missing when the pool was opened, and which have something mapped.
    #[must_use]
    pub fn missing_segments(&self) -> Vec<SegmentId> {
        let (lost, tables) = (self.segments.lost(), self.tables.read());
        lost.into_iter().filter(|id| tables.segment(*id).is_ok_and(|row| row.mapped > 0)).collect()
    }

    /// Returns the host directory.
    pub fn media(&self) -> &Arc<dyn Media> {
        &self.media
    }

    /// Says how the records of retired snapshots are written: the format is above this layer, and the background is in it.
    /// The first time `before` is run, in turn with the background: nobody writes a record meanwhile.
    pub fn set_recorder(&self, recorder: Recorder, before: impl FnOnce()) {
        if self.recorder.read().is_some() {
            return;
        }
        let _turn = self.tidying.lock();
        let mut place = self.recorder.write();
        if place.is_none() {
            before();
            *place = Some(recorder);
        }
    }

    /// Writes one record of a retired snapshot.
    fn record_one(&self) -> Result<bool> {
        let recorder = *self.recorder.read();
        recorder.map_or(Ok(false), |write| write(self))
    }

    /// Calls `hook` after each change of names, sizes or content. It is called without any lock of the store, on the
    /// thread that made the change.
    pub fn subscribe(&self, hook: Hook) {
        self.hooks.write().push(hook);
    }

    /// Returns a number that grows with every change told to the hooks.
    #[must_use]
    pub fn changes(&self) -> u64 {
        self.changes.load(std::sync::atomic::Ordering::Acquire)
    }

    /// Tells everybody of a change, unless it is of a disk that nobody sees.
    pub fn tell(&self, change: &Change) {
        if let Change::Disk { name, .. } = change
            && listing::is_hidden(name)
        {
            return;
        }
        self.changes.fetch_add(1, std::sync::atomic::Ordering::AcqRel);
        for hook in &*self.hooks.read() {
            hook(change);
        }
    }

    /// Hands out a number for an owner of cached chunks.
    pub fn new_owner(&self) -> u64 {
        self.owners.fetch_add(1, std::sync::atomic::Ordering::Relaxed)
    }

    /// Keeps the data of a snapshot while somebody reads it.
    pub fn hold_open(&self, id: SnapshotId) {
        *self.holders.lock().entry(id).or_default() += 1;
    }

    /// Ends [`Store::hold_open`].
    pub fn let_go(&self, id: SnapshotId) {
        let mut holders = self.holders.lock();
        if let Some(count) = holders.get_mut(&id) {
            *count -= 1;
            if *count == 0 {
                holders.remove(&id);
            }
        }
        drop(holders);
        self.keeper.wake();
    }

    /// Asks the background to look for work at once.
    pub fn wake_keeper(&self) {
        self.keeper.wake();
    }

    /// Tells whether somebody reads a snapshot, whose data stays as long.
    pub fn is_held_open(&self, id: SnapshotId) -> bool {
        self.holders.lock().contains_key(&id)
    }
}
