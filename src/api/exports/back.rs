//! What a restart brings back: exports that persist, and the disks of those that were writing.
//!
//! # Rules
//! 1. A server starts what persists, and keeps the disks of who was writing for them ([`super::book`]). One that cannot be
//!    started is kept, with its hold on its disks, and shown with the reason.
//! 2. A process that serves nothing starts nothing, and keeps all that a server would: the disk of a writable export that
//!    persists is not reverted, received into, shrunk or removed, and what is only read is not removed.
//! 3. A disk is kept for a virtual machine as long as that runs: its exports are not in the list, it asks for them again.
//! 4. Disks and snapshots that are gone, and snapshots that are retired, are taken out of what persists; so is an export of
//!    which nothing is left.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};

use super::book;
use super::served::Served;
use super::wish::What;
use super::{Exports, Front, Running, holder};
use crate::clock;
use crate::disk;
use crate::error::Result;
use crate::pool::{ExportList, ExportRow, LeaseRow};
use crate::units::{DiskId, SnapshotId};

impl Exports {
    /// Starts what the list says, without what is gone.
    pub(super) fn restore(self: &Arc<Self>) -> Result<()> {
        let ExportList { exports: mut rows, mut leases, .. } = self.book.read()?;
        rows.retain_mut(|row| self.drop_gone(row));
        leases.retain_mut(|lease| self.is_claim(lease, &rows));
        leases.iter().for_each(|lease| self.reserve(lease, true));
        self.book.restore(rows.clone(), leases.clone())?;
        for row in rows {
            let (id, address) = (row.id, row.address());
            let running = self.begin(&row, true, false).unwrap_or_else(|error| {
                tracing::error!("export {id} ({address}) could not be started again: {error}");
                // A device has the lease before it has its socket: it may have had it, and let it go.
                let own = leases.iter().filter(|lease| lease.holder == holder(&row));
                own.for_each(|lease| self.await_again(lease));
                self.failed(row, &error)
            });
            self.table.lock().running.insert(id, running);
        }
        if !leases.is_empty() {
            purge_later(self);
        }
        Ok(())
    }

    /// Waits again for who was writing, after an attempt to serve it that failed.
    pub(super) fn await_again(&self, lease: &LeaseRow) {
        self.reserve(lease, true);
        self.book.await_again(lease);
    }

    /// Makes what is left of an export that cannot be started.
    fn failed(&self, row: ExportRow, error: &crate::error::Error) -> Running {
        Running {
            persist: true,
            front: Front::Failed(error.to_string()),
            clients: Arc::default(),
            served: Served::not_opened(&self.store, &row).into(),
            machine: None,
            attached: self.hold_disks(&row).unwrap_or_default(),
            row,
        }
    }

    /// Keeps, in a process that serves nothing, what the next server is going to serve.
    ///
    /// # Errors
    /// When the list cannot be read, or what may be lost cannot be noted.
    pub(in crate::api) fn keep(&self) -> Result<()> {
        let ExportList { exports: mut rows, mut leases, .. } = self.book.read()?;
        rows.retain_mut(|row| self.drop_gone(row));
        let mut kept = self.kept.lock();
        for row in &rows {
            let Ok(attached) = self.hold_disks(row) else { continue };
            kept.insert(row.id, attached);
            if !row.read_only {
                self.disks_of(row).for_each(|disk| disk.keep_for(&holder(row)));
            }
        }
        drop(kept);
        leases.retain_mut(|lease| self.is_claim(lease, &rows));
        // Last: who was writing is the one to be named.
        leases.iter().for_each(|lease| self.reserve(lease, false));
        self.book.note_losses(leases)
    }

    /// Lets go of what is kept for an export.
    pub(super) fn keep_no_more(&self, row: &ExportRow) {
        self.kept.lock().remove(&row.id);
        self.disks_of(row).for_each(|disk| disk.unreserve(&holder(row)));
    }

    /// Returns the disks of a row that are there.
    pub(super) fn disks_of(&self, row: &ExportRow) -> impl Iterator<Item = Arc<disk::Disk>> {
        row.disks.iter().filter_map(|id| disk::open_by_id(&self.store, DiskId(*id)).ok())
    }

    /// Keeps the disks of a row from being removed.
    pub(super) fn hold_disks(&self, row: &ExportRow) -> Result<Vec<disk::Attached>> {
        let what = holder(row);
        row.disks.iter().map(|id| disk::open_by_id(&self.store, DiskId(*id))?.attach(&what)).collect()
    }

    /// Takes what is gone out of a row; tells whether anything is left.
    fn drop_gone(&self, row: &mut ExportRow) -> bool {
        let before = row.clone();
        let is_there = |what: What| what.is_readable(&self.store);
        row.disks.retain(|id| is_there(What::Disk(DiskId(*id))));
        row.snapshots.retain(|id| is_there(What::Snapshot(SnapshotId(*id))));
        if *row != before {
            tracing::warn!("of export {} ({}), what was removed is served no longer", row.id, row.address());
        }
        !(row.disks.is_empty() && row.snapshots.is_empty())
    }

    /// Tells whether somebody may still come back for a disk or has to be told of a loss, and brings up to date what it may
    /// have lost.
    fn is_claim(&self, lease: &mut LeaseRow, rows: &[ExportRow]) -> bool {
        if !What::Disk(DiskId(lease.disk)).is_readable(&self.store) {
            return false;
        }
        if self.has_machine_ended(&lease.holder) == Some(true) {
            return false;
        }
        let over = book::time_left(lease).is_none();
        if !self.store.was_closed() {
            // A client of a Unix socket is a program of this host and ended with it: who connects there now is another
            // one, which has nothing to be told.
            let local = |row: &ExportRow| row.socket.is_some() && holder(row) == lease.holder;
            if self.store.restarted() && rows.iter().any(local) {
                return false;
            }
            // Who did not write then was not told of an older one, either.
            let older = lease.lost.take().filter(|_| over);
            lease.lost = self.store.lost_changes(DiskId(lease.disk)).or(older);
        }
        !over || lease.lost.is_some()
    }

    /// Keeps a disk for who was writing to it, while its time lasts; without an end where nobody can come back.
    fn reserve(&self, lease: &LeaseRow, serves: bool) {
        let Ok(disk) = disk::open_by_id(&self.store, DiskId(lease.disk)) else { return };
        match (book::time_left(lease), &lease.lost) {
            (Some((left, _)), lost) => disk.reserve_after(&lease.holder, serves.then_some(left), lost.clone()),
            (None, Some(why)) => disk.owe_loss(&lease.holder, why.clone()),
            (None, None) => {}
        }
    }
}

/// Forgets in a minute who has not come back by then.
fn purge_later(exports: &Arc<Exports>) {
    let exports: Weak<Exports> = Arc::downgrade(exports);
    let purge = move || {
        clock::sleep(book::RESERVED);
        let Some(exports) = exports.upgrade() else { return };
        exports.book.purge();
        if exports.was_idle.load(Ordering::SeqCst) && exports.table.lock().is_empty() {
            exports.tell_idle();
        }
    };
    if let Err(error) = std::thread::Builder::new().name("exports".into()).spawn(purge) {
        tracing::warn!("the host has no thread to forget who does not come back: {error}");
    }
}
