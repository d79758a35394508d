//! What an NBD server shows its clients: the targets of an export under the names they have now.
//!
//! # Rules
//! 1. A client that may write has the lease of the disk for as long as its connection lasts; all clients of one export are
//!    one holder. So a client that dies lets go when its connection is closed.
//! 2. With one target the empty name stands for it.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::book::Book;
use super::wish::What;
use crate::disk::{self, BlockDevice, Lease, ReadOnly};
use crate::error::{Error, Result};
use crate::nbd::{self, Exported};
use crate::snapshot;
use crate::store::Store;
use crate::units::DiskId;

/// An export as an NBD server sees it.
pub(super) struct Shown {
    pub(super) store: Arc<Store>,
    pub(super) targets: Vec<What>,
    pub(super) read_only: bool,
    /// The name it takes leases under.
    pub(super) holder: String,
    pub(super) clients: Arc<AtomicUsize>,
    /// Where it is noted who writes, if the export comes back after a restart.
    pub(super) book: Option<Arc<Book>>,
}

/// A client: counted, and the holder of a lease, until its connection ends.
struct Client {
    clients: Arc<AtomicUsize>,
    /// In this order: once the lease is free, nothing says any more that it should be kept.
    writer: Option<(Claim, Lease)>,
}

/// The note that somebody writes.
struct Claim {
    book: Option<Arc<Book>>,
    disk: DiskId,
    holder: String,
}

impl Drop for Claim {
    fn drop(&mut self) {
        if let Some(book) = &self.book {
            book.went(self.disk, &self.holder);
        }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.writer = None;
        self.clients.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Shown {
    fn find(&self, name: &str) -> Result<What> {
        if let ([only], true) = (self.targets.as_slice(), name.is_empty()) {
            return Ok(*only);
        }
        let found = self.targets.iter().find(|what| what.name(&self.store).is_ok_and(|is| is == name));
        found.copied().ok_or_else(|| Error::not_found(format!("there is no export '{name}'")))
    }

    fn open_disk(&self, id: DiskId, client: &mut Client) -> Result<Arc<dyn BlockDevice>> {
        let disk = disk::open_by_id(&self.store, id)?;
        if self.read_only {
            return Ok(Arc::new(ReadOnly::new(disk)));
        }
        let lease = disk.lease(&self.holder)?;
        let claim = Claim { book: self.book.clone(), disk: id, holder: self.holder.clone() };
        if let Some(book) = &self.book {
            book.came(id, &self.holder);
        }
        client.writer = Some((claim, lease));
        Ok(disk)
    }
}

impl nbd::Exports for Shown {
    fn names(&self) -> Vec<String> {
        self.targets.iter().filter_map(|what| what.name(&self.store).ok()).collect()
    }

    fn open(&self, name: &str) -> Result<nbd::Export> {
        let what = self.find(name)?;
        self.clients.fetch_add(1, Ordering::AcqRel);
        let mut client = Client { clients: Arc::clone(&self.clients), writer: None };
        let (device, exported) = match what {
            What::Disk(id) => (self.open_disk(id, &mut client)?, Exported::Disk(id)),
            What::Snapshot(id) => {
                let device: Arc<dyn BlockDevice> = snapshot::open_by_id(&self.store, id)?;
                (device, Exported::Snapshot(id))
            }
        };
        let name = what.name(&self.store)?;
        let sort = match what {
            What::Disk(_) if self.read_only => "disk, read-only",
            What::Disk(_) => "disk",
            What::Snapshot(_) => "snapshot",
        };
        Ok(nbd::Export {
            description: format!("{sort} {name}"),
            name,
            device,
            contexts: nbd::contexts_of(&self.store, exported),
            keep: Box::new(client),
        })
    }
}
