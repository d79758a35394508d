//! What an NBD server shows its clients: the targets of an export under the names they have now.
//!
//! # Rules
//! 1. A client that may write has the lease of the disk from the moment it chose the disk until its connection ends; all
//!    clients of one export are one holder. So a client that dies lets go when its connection is closed.
//! 2. The disk of a virtual machine is leased by its export, which ends when its last client has been gone for a while; what
//!    a client has under way keeps the lease, too.
//! 3. With one target the empty name stands for it.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::book::Book;
use super::served::{Served, Writer};
use super::wish::What;
use crate::disk::{self, BlockDevice, Disk, ReadOnly};
use crate::error::{Error, Result};
use crate::nbd::{self, Exported};
use crate::store::Store;

/// An export as an NBD server sees it.
pub(super) struct Shown {
    pub(super) store: Arc<Store>,
    pub(super) served: Arc<[Served]>,
    pub(super) read_only: bool,
    /// The name it takes leases under.
    pub(super) holder: String,
    /// The export itself has the lease: its clients share it.
    pub(super) writer: Option<Arc<Writer>>,
    pub(super) clients: Arc<AtomicUsize>,
    /// Called when the last client has gone.
    pub(super) left: Option<Left>,
    /// Where it is noted who writes, if the export comes back after a restart.
    pub(super) book: Option<Arc<Book>>,
}

/// Called when the last client of an export has gone; returns at once.
pub(super) type Left = Arc<dyn Fn() + Send + Sync>;

/// A client: counted, and perhaps a writer, until its connection ends.
struct Client {
    clients: Arc<AtomicUsize>,
    left: Option<Left>,
    writer: Option<Arc<Writer>>,
}

impl Drop for Client {
    fn drop(&mut self) {
        self.writer = None;
        if self.clients.fetch_sub(1, Ordering::AcqRel) == 1
            && let Some(left) = &self.left
        {
            left();
        }
    }
}

impl Shown {
    fn find(&self, name: &str) -> Result<&Served> {
        if let ([only], true) = (&*self.served, name.is_empty()) {
            return Ok(only);
        }
        Served::find(&self.served, &self.store, name)
            .ok_or_else(|| Error::not_found(format!("there is no export '{name}'")))
    }

    /// Returns what makes a client of somebody who has chosen.
    fn entrance(&self, disk: Option<Arc<Disk>>) -> Box<dyn Fn() -> Result<nbd::Keep> + Send + Sync> {
        let (clients, book, holder) = (Arc::clone(&self.clients), self.book.clone(), self.holder.clone());
        let (shared, left) = (self.writer.clone(), self.left.clone());
        Box::new(move || {
            let writer = match (&disk, &shared) {
                (Some(_), Some(writer)) => Some(Arc::clone(writer)),
                (Some(disk), None) => Some(Arc::new(Writer::begin(disk, &holder, book.clone())?)),
                (None, _) => None,
            };
            clients.fetch_add(1, Ordering::AcqRel);
            Ok(Box::new(Client { clients: Arc::clone(&clients), left: left.clone(), writer }))
        })
    }
}

impl nbd::Exports for Shown {
    fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = Vec::new();
        for name in self.served.iter().map(|one| one.name(&self.store)) {
            if !names.contains(&name) {
                names.push(name);
            }
        }
        names
    }

    fn open(&self, name: &str) -> Result<nbd::Export> {
        let served = self.find(name)?;
        let (device, exported, writer): (Arc<dyn BlockDevice>, _, _) = match (served.what, &served.snapshot) {
            (What::Disk(id), _) => {
                let disk = disk::open_by_id(&self.store, id)?;
                if self.read_only {
                    (Arc::new(ReadOnly::new(disk)), Exported::Disk(id), None)
                } else {
                    (Arc::clone(&disk) as Arc<dyn BlockDevice>, Exported::Disk(id), Some(disk))
                }
            }
            (What::Snapshot(id), Some(device)) => {
                (Arc::clone(device) as Arc<dyn BlockDevice>, Exported::Snapshot(id), None)
            }
            (What::Snapshot(_), None) => return Err(Error::failed(format!("'{name}' is not open"))),
        };
        let name = served.name(&self.store);
        let sort = match served.what {
            What::Disk(_) if self.read_only => "disk, read-only",
            What::Disk(_) => "disk",
            What::Snapshot(_) => "snapshot",
        };
        Ok(nbd::Export {
            description: format!("{sort} {name}"),
            name,
            device,
            contexts: nbd::contexts_of(&self.store, exported),
            enter: self.entrance(writer),
        })
    }
}
