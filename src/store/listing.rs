//! What `ls` and `info` show; answered from memory.

use std::sync::atomic::Ordering;
use uuid::Uuid;

use super::states::{StateRow, Status};
use super::tables::Tables;
use super::{Origin, RecordFault, Settings, Store, origin};
use crate::error::{Error, Result};
use crate::metrics::{Kind, Text};
use crate::units::{BLOCK_SIZE, DiskId, SnapshotId};

/// A disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskInfo {
    /// Id in the pool.
    pub id: DiskId,
    /// Name.
    pub name: String,
    /// Identity, kept over renames.
    pub uuid: Uuid,
    /// Bytes.
    pub size: u64,
    /// Bytes mapped.
    pub referenced: u64,
    /// Of them, bytes written since the previous snapshot, retired or not.
    pub written: u64,
    /// Seconds since 1970 when it was made.
    pub created: u64,
    /// Seconds since 1970 when its map last changed.
    pub modified: u64,
    /// Snapshots, retired ones included.
    pub snapshots: usize,
    /// What it was cloned from.
    pub origin: Option<Origin>,
    /// Its settings.
    pub settings: Settings,
    /// Who has it open for writing.
    pub holder: Option<String>,
    /// Whom the lease is kept for after a restart.
    pub reserved: Option<String>,
    /// Writes that wait for room.
    pub waiting: usize,
}

/// Whether a snapshot has its data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SnapshotState {
    /// It can be read.
    Live,
    /// Only its addresses are left.
    Retired,
}

/// A snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotInfo {
    /// Id in the pool.
    pub id: SnapshotId,
    /// Name of its disk.
    pub disk: String,
    /// Its disk.
    pub disk_id: DiskId,
    /// Name.
    pub name: String,
    /// Identity, kept over renames and transfers.
    pub uuid: Uuid,
    /// Bytes of the disk when it was taken.
    pub size: u64,
    /// Bytes mapped.
    pub referenced: u64,
    /// Of them, bytes written since the snapshot before.
    pub written: u64,
    /// Seconds since 1970 when it was taken.
    pub created: u64,
    /// Whether it has its data.
    pub state: SnapshotState,
    /// Why it must not be deleted.
    pub holds: Vec<String>,
}

/// Tells whether a disk of that name is one that the program keeps for itself: no user can give such a name.
pub(super) fn is_hidden(name: &str) -> bool {
    name.starts_with('.')
}

fn snapshot(tables: &Tables, row: &StateRow) -> SnapshotInfo {
    SnapshotInfo {
        id: row.snapshot,
        disk: tables.disk(row.disk).map(|disk| disk.name.clone()).unwrap_or_default(),
        disk_id: row.disk,
        name: row.name.clone(),
        uuid: row.uuid,
        size: row.size,
        referenced: row.referenced * BLOCK_SIZE,
        written: row.written.min(row.referenced) * BLOCK_SIZE,
        created: row.created,
        state: if row.status == Status::Retired { SnapshotState::Retired } else { SnapshotState::Live },
        holds: row.holds.clone(),
    }
}

impl Tables {
    /// Returns a disk as people call it, for a message.
    #[must_use]
    pub fn called(&self, id: DiskId) -> String {
        self.disk(id).map_or_else(|_| "that was removed".to_owned(), |row| format!("'{}'", row.name))
    }

    /// Returns a snapshot as people call it, for a message.
    #[must_use]
    pub fn called_snapshot(&self, row: &StateRow) -> String {
        self.disk(row.disk).map_or_else(|_| format!("'{}'", row.name), |disk| format!("'{}@{}'", disk.name, row.name))
    }
}

impl Store {
    fn disk_of(&self, tables: &Tables, id: DiskId) -> Result<DiskInfo> {
        let row = tables.disk(id)?;
        let head = self.heads.lock().get(&id).cloned();
        let now = head.as_ref().map(|head| head.referenced.load(Ordering::Relaxed));
        let referenced = now.map_or(row.referenced, |blocks| u64::try_from(blocks).unwrap_or(0));
        Ok(DiskInfo {
            id,
            name: row.name.clone(),
            uuid: row.uuid,
            size: row.size,
            referenced: referenced * BLOCK_SIZE,
            written: tables.written_since(id)?.min(referenced) * BLOCK_SIZE,
            created: row.created,
            modified: row.modified,
            snapshots: tables.snapshot_count(id),
            origin: row.origin.as_deref().map(|text| origin::find(tables, text)),
            settings: row.settings.clone(),
            reserved: head.as_ref().and_then(|head| head.tenancy.reserved()),
            waiting: head.as_ref().map_or(0, |head| head.waiters.for_room()),
            holder: head.as_ref().and_then(|head| head.tenancy.holder()),
        })
    }

    /// Returns all disks, by name; those that the program keeps for itself are not listed.
    pub fn disks(&self) -> Vec<DiskInfo> {
        let tables = self.tables.read();
        let listed = tables.disks_by_name().filter(|(_, row)| !is_hidden(&row.name));
        listed.filter_map(|(id, _)| self.disk_of(&tables, id).ok()).collect()
    }

    /// Returns a disk.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn disk_info(&self, name: &str) -> Result<DiskInfo> {
        if is_hidden(name) {
            return Err(Error::not_found(format!("there is no disk '{name}'")));
        }
        let tables = self.tables.read();
        self.disk_of(&tables, tables.disk_id(name)?)
    }

    /// Returns a disk.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn disk_info_by_id(&self, id: DiskId) -> Result<DiskInfo> {
        self.disk_of(&self.tables.read(), id)
    }

    /// Returns the snapshots of a disk, oldest first.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn snapshots(&self, disk: &str) -> Result<Vec<SnapshotInfo>> {
        let id = self.tables.read().disk_id(disk)?;
        self.snapshots_by_id(id)
    }

    /// Returns the snapshots of a disk, oldest first.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn snapshots_by_id(&self, id: DiskId) -> Result<Vec<SnapshotInfo>> {
        let tables = self.tables.read();
        tables.disk(id)?;
        Ok(tables.snapshots_of(id).map(|(_, row)| snapshot(&tables, row)).collect())
    }

    /// Returns a snapshot.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn snapshot_info(&self, disk: &str, name: &str) -> Result<SnapshotInfo> {
        let tables = self.tables.read();
        let (_, row) = tables.snapshot(tables.disk_id(disk)?, name)?;
        Ok(snapshot(&tables, row))
    }

    /// Returns a snapshot.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn snapshot_info_by_id(&self, id: SnapshotId) -> Result<SnapshotInfo> {
        let tables = self.tables.read();
        let (_, row) = tables.snapshot_by_id(id)?;
        Ok(snapshot(&tables, row))
    }

    /// Returns the newest live snapshot of a disk.
    pub fn latest(&self, disk: DiskId) -> Option<SnapshotInfo> {
        let tables = self.tables.read();
        let newest = tables.states_of(disk).rev().find(|(_, row)| row.status == Status::Live);
        newest.map(|(_, row)| snapshot(&tables, row))
    }

    /// Returns the metrics in the text format of Prometheus.
    pub fn metrics_text(&self) -> String {
        let mut out = Text::new();
        let c = &self.counters;
        let load = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
        out.counter("reads_total", "Reads of disks and snapshots.", load(&c.reads));
        out.counter("read_bytes_total", "Bytes read.", load(&c.read_bytes));
        out.counter("writes_total", "Writes of disks.", load(&c.writes));
        out.counter("written_bytes_total", "Bytes written.", load(&c.written_bytes));
        out.counter("flushes_total", "Flushes asked for.", load(&c.flushes));
        out.counter("journal_frames_total", "Journal frames written.", load(&self.ledger.counters.frames));
        out.counter("folds_total", "Folds of the journal.", load(&self.ledger.counters.folds));
        out.gauge("journal_used_percent", "How full the journal is.", self.ledger.journal_percent());
        out.counter("snapshots_total", "Snapshots taken.", load(&c.snapshots));
        out.gauge("snapshot_stop_ns", "How long the last snapshot stopped writers.", load(&c.snapshot_stop_ns));
        out.gauge("snapshot_stop_ns_max", "The longest such stop.", load(&c.snapshot_stop_ns_max));
        out.counter("punched_blocks_total", "Blocks given back to the host.", load(&c.punched_blocks));
        out.counter("punches_total", "Hole punching calls.", load(&c.punches));
        out.counter(
            "looks_around_total",
            "States asked whether they have blocks that another one lost.",
            load(&c.looks_around),
        );
        out.gauge("map_cache_bytes", "Bytes of the map cache.", self.cache.used() as u64);
        out.gauge("pool_poisoned", "1 when the pool refuses writes.", u64::from(self.health().is_some()));
        out.gauge("segments_missing", "Segment files that are not there.", self.missing_segments().len() as u64);
        let faults = self.all_record_faults().unwrap_or_default();
        let with = |fault| faults.values().filter(|other| **other == fault).count() as u64;
        let (missing, damaged) = (with(RecordFault::Missing), with(RecordFault::Damaged));
        out.gauge("records_missing", "Records of retired snapshots that are gone.", missing);
        out.gauge("records_damaged", "Records that a check or diff found damaged.", damaged);
        if let Ok(room) = self.room() {
            out.gauge("host_free_bytes", "Free bytes of the host file system.", room.free);
            out.gauge("host_available_bytes", "Of them, bytes that new data may take.", room.available());
        }
        self.disk_metrics(&mut out);
        out.finish()
    }

    fn disk_metrics(&self, out: &mut Text) {
        type Column = (&'static str, &'static str, fn(&DiskInfo) -> u64);
        let columns: [Column; 5] = [
            ("disk_size_bytes", "Size of the disk.", |d| d.size),
            ("disk_referenced_bytes", "Bytes mapped.", |d| d.referenced),
            ("disk_written_bytes", "Bytes written since the previous snapshot.", |d| d.written),
            ("disk_snapshots", "Snapshots, retired ones included.", |d| d.snapshots as u64),
            ("disk_waiting_writes", "Writes that wait for room.", |d| d.waiting as u64),
        ];
        let disks = self.disks();
        for (name, help, value) in columns {
            let mut family = out.family(Kind::Gauge, name, help);
            for disk in &disks {
                family.value(&[("disk", &disk.name)], value(disk));
            }
        }
    }
}
