//! What an export serves: disks and snapshots, open as long as the export lasts.
//!
//! # Rules
//! 1. A snapshot is opened once, when the export begins, and is held until it ends: whoever connects meanwhile, and connects
//!    again, finds it, also after it was removed or retired.
//! 2. What is served has the name it has now, and what was removed the last one it had. Where both are the same, the name
//!    stands for what is there.

use std::sync::Arc;

use super::book::Book;
use super::wish::What;
use crate::disk::{Disk, Lease};
use crate::error::Result;
use crate::pool::ExportRow;
use crate::snapshot::{self, SnapshotDevice};
use crate::store::{Change, Store};
use crate::sync::Mutex;

/// A disk or a snapshot that is served.
#[derive(Debug)]
pub(super) struct Served {
    pub(super) what: What,
    /// The snapshot; `None` for a disk, and where the export could not be started.
    pub(super) snapshot: Option<Arc<SnapshotDevice>>,
    last_name: Mutex<String>,
}

impl Served {
    /// Opens all that a row names, disks first.
    ///
    /// # Errors
    /// `NotFound`; `Failed` for a snapshot that is retired.
    pub(super) fn open(store: &Arc<Store>, row: &ExportRow) -> Result<Vec<Self>> {
        let open = |what| -> Result<Self> {
            let snapshot = match what {
                What::Disk(_) => None,
                What::Snapshot(id) => Some(snapshot::open_by_id(store, id)?),
            };
            Ok(Self { snapshot, ..Self::closed(store, what) })
        };
        What::of(row).into_iter().map(open).collect()
    }

    /// Names all that a row names, without opening it.
    pub(super) fn not_opened(store: &Store, row: &ExportRow) -> Vec<Self> {
        What::of(row).into_iter().map(|what| Self::closed(store, what)).collect()
    }

    fn closed(store: &Store, what: What) -> Self {
        let name = what.name(store).unwrap_or_else(|_| "(removed)".to_owned());
        Self { what, snapshot: None, last_name: Mutex::new(name) }
    }

    /// Returns its name as of now, or its last one.
    pub(super) fn name(&self, store: &Store) -> String {
        self.what.name(store).unwrap_or_else(|_| self.last_name.lock().clone())
    }

    /// Takes notice of a change of its name, so that the last one is known when it is gone.
    pub(super) fn notice(&self, store: &Store, change: &Change) {
        match (change, self.what) {
            (Change::Snapshot { id, disk_name, name, .. }, What::Snapshot(own)) if *id == own => {
                *self.last_name.lock() = format!("{disk_name}@{name}");
            }
            (Change::Disk { was: Some(_), .. }, _) => {
                if let Ok(name) = self.what.name(store) {
                    *self.last_name.lock() = name;
                }
            }
            _ => {}
        }
    }

    /// Finds what a name stands for: what is there before what was.
    pub(super) fn find<'a>(served: &'a [Self], store: &Store, name: &str) -> Option<&'a Self> {
        let there = |one: &&Self| one.what.name(store).is_ok_and(|is| is == name);
        served.iter().find(there).or_else(|| served.iter().find(|one| one.name(store) == name))
    }
}

/// The right to write to a disk, and the note of it for a restart, until it is dropped.
#[derive(Debug)]
pub(super) struct Writer {
    /// In this order: once the lease is free, nothing says any more that it should be kept.
    _claim: Claim,
    lease: Lease,
}

/// The note that somebody writes.
#[derive(Debug)]
struct Claim {
    /// `None` for what does not come back after a restart.
    book: Option<Arc<Book>>,
    disk: Arc<Disk>,
    holder: String,
}

impl Writer {
    /// Takes the lease, and notes who has it before anything is written.
    ///
    /// # Errors
    /// `Busy` when another one has it.
    pub(super) fn begin(disk: &Arc<Disk>, holder: &str, book: Option<Arc<Book>>) -> Result<Self> {
        let lease = disk.lease(holder)?;
        if let Some(book) = &book {
            book.came(disk.id(), holder);
        }
        let claim = Claim { book, disk: Arc::clone(disk), holder: holder.to_owned() };
        Ok(Self { _claim: claim, lease })
    }

    /// Says that it is worth waiting for: it may be dropped soon.
    pub(super) fn closing(&self) {
        self.lease.closing();
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if let Some(book) = &self.book {
            book.went(self.disk.id(), &self.holder, self.disk.owes_loss_to(&self.holder));
        }
    }
}
