//! One writer to a disk: whoever has the lease. A holder may have it several times; others are told who it is.

use std::sync::Arc;

use super::Disk;
use crate::error::{Error, Result};
use crate::store::{Head, Store};
use crate::units::DiskId;

/// The right to write to a disk, until it is dropped.
#[derive(Debug)]
pub struct Lease {
    head: Arc<Head>,
}

impl Drop for Lease {
    fn drop(&mut self) {
        let mut tenancy = self.head.tenancy.lock();
        tenancy.handles -= 1;
        if tenancy.handles == 0 {
            tenancy.holder = None;
        }
    }
}

impl Disk {
    /// Takes the lease in the name of `holder`.
    ///
    /// # Errors
    /// `Busy` when another holder has it.
    pub fn lease(self: &Arc<Self>, holder: &str) -> Result<Lease> {
        let mut tenancy = self.head.tenancy.lock();
        match &tenancy.holder {
            Some(other) if other != holder => Err(in_use(&self.store, self.head.id, other)),
            _ => {
                tenancy.holder = Some(holder.to_owned());
                tenancy.handles += 1;
                Ok(Lease { head: Arc::clone(&self.head) })
            }
        }
    }
}

fn in_use(store: &Store, id: DiskId, holder: &str) -> Error {
    let name = store.tables.read().disk(id).map(|row| row.name.clone()).unwrap_or_default();
    Error::busy(format!("disk '{name}' is open for writing by {holder}")).hint("close it there first")
}

impl Store {
    /// Fails when somebody has the disk open for writing.
    ///
    /// # Errors
    /// `Busy` with the holder's name.
    pub fn refuse_leased(&self, head: &Head) -> Result<()> {
        match &head.tenancy.lock().holder {
            Some(holder) => Err(in_use(self, head.id, holder)),
            None => Ok(()),
        }
    }
}
