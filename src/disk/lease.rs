//! One writer to a disk: whoever has the lease. A holder may have it several times; others are told who it is.
//!
//! # Rules
//! 1. Front ends that write take the lease before their first write and keep it as long as they may write. The mount takes
//!    it as [`MOUNT`], all its files together; everybody else under a name of its own that tells people who it is.
//! 2. Growing and renaming need no lease. Reverting, receiving, shrinking and removing are refused while somebody has it.
//! 3. What a disk is attached to ([`Attached`]) keeps it from being removed, whether or not somebody writes.
//!
//! How long a lease is waited for, and how the mount's cache stays right: [`crate::store::tenancy`].

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::Disk;
use crate::error::{Error, Kind, Result};
use crate::store::tenancy::{Refusal, Removal};
use crate::store::{Change, Head, Store};
use crate::units::DiskId;

/// The name under which the mount takes leases. The kernel keeps its cache in step with nobody else's writes.
pub const MOUNT: &str = "mount";

/// The right to write to a disk, until it is dropped.
#[derive(Debug)]
pub struct Lease {
    head: Arc<Head>,
    closing: AtomicBool,
}

impl Lease {
    /// Says that it is being closed: it will be dropped soon, and is worth waiting for.
    pub fn closing(&self) {
        self.head.tenancy.closing(!self.closing.swap(true, Ordering::AcqRel));
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.head.tenancy.let_go(self.closing.load(Ordering::Acquire));
    }
}

/// What a disk is attached to, until it is dropped.
#[derive(Debug)]
pub struct Attached {
    head: Arc<Head>,
    what: String,
}

impl Drop for Attached {
    fn drop(&mut self) {
        self.head.tenancy.detach(&self.what);
    }
}

impl Disk {
    /// Takes the lease in the name of `holder`. Waits for one that is about to fall, 2 s at most. When this returns, the
    /// mount has nothing cached that `holder` could make untrue.
    ///
    /// # Errors
    /// `Busy` when another holder has it, or it is reserved for one; any error of the flush that comes before the first write
    /// of another one than the mount.
    pub fn lease(self: &Arc<Self>, holder: &str) -> Result<Lease> {
        let (head, id) = (&self.head, self.head.id);
        let mut begun = Ok(());
        let before = || {
            self.store.tell(&Change::Written { disk: id });
            // Last: what the mount had cached may have been written meanwhile.
            begun = self.store.begin_foreign(head);
        };
        head.tenancy.take(holder, holder != MOUNT, before).map_err(|refusal| self.store.refused(id, refusal))?;
        let lease = Lease { head: Arc::clone(head), closing: AtomicBool::new(false) };
        begun.map(|()| lease)
    }

    /// Fails when `holder` would not get the lease; waits as [`Disk::lease`] does, and does not take it.
    ///
    /// # Errors
    /// `Busy` with the name of who has it.
    pub fn refuse_others(&self, holder: &str) -> Result<()> {
        self.head.tenancy.wait_vacant(Some(holder)).map_err(|refusal| self.store.refused(self.head.id, refusal))
    }

    /// Tells whether nobody else can have changed the disk since `holder` had it: it has it, or it is kept for it.
    #[must_use]
    pub fn remembers(&self, holder: &str) -> bool {
        self.head.tenancy.remembers(holder)
    }

    /// Keeps the lease for `holder` for so long, unless somebody has it: nobody else gets it meanwhile.
    ///
    /// It has written before the pool was opened. If some of that may be lost, its first flush will say so.
    pub fn reserve(&self, holder: &str, time: Duration) {
        self.reserve_after(holder, Some(time), self.store.lost_changes(self.head.id));
    }

    /// As [`Disk::reserve`], for a caller that knows why something may be `lost`, if it may; without an end for no `time`.
    pub fn reserve_after(&self, holder: &str, time: Option<Duration>, lost: Option<String>) {
        match lost {
            Some(why) => self.head.tenancy.note_loss(holder, why),
            // Should the next process find no log, it is one that was lost.
            None => self.store.begin_log(&self.head),
        }
        self.head.tenancy.reserve(holder, time);
    }

    /// Notes that `holder`, for which nothing is kept, has to be told why something it had written may be lost, if it comes.
    pub fn owe_loss(&self, holder: &str, why: String) {
        self.head.tenancy.note_loss(holder, why);
    }

    /// Keeps the lease for `holder`, which may or may not have written and cannot come to this process.
    pub fn keep_for(&self, holder: &str) {
        self.head.tenancy.reserve(holder, None);
    }

    /// Tells whether `holder` has still to be told that something it had written may be lost.
    #[must_use]
    pub fn owes_loss_to(&self, holder: &str) -> bool {
        self.head.tenancy.owes_loss_to(holder)
    }

    /// Says that `holder` begins anew, and need not be told that something was lost.
    pub fn forgive_loss(&self, holder: &str) {
        self.head.tenancy.forgive_loss(holder);
    }

    /// Ends a reservation for `holder`.
    pub fn unreserve(&self, holder: &str) {
        self.head.tenancy.unreserve(holder);
    }

    /// Says what the disk is attached to: it is not removed until the answer is dropped.
    ///
    /// # Errors
    /// `NotFound` when it was removed, `Busy` while it is being removed.
    pub fn attach(&self, what: &str) -> Result<Attached> {
        if !self.head.tenancy.attach(what) {
            return Err(Error::busy("the disk is being removed"));
        }
        let attached = Attached { head: Arc::clone(&self.head), what: what.to_owned() };
        // After it was noted: a removal begins only while nothing is noted, and has marked the disk as gone when it ends.
        self.head.refuse_gone()?;
        Ok(attached)
    }

    /// Called before bytes are read that the kernel may keep: the next change by another one than the mount makes it
    /// forget them.
    pub fn note_reader(&self) {
        self.head.tenancy.note_reader();
    }

    /// Fails when the holder has to be told that something was lost; once.
    pub(super) fn tell_loss(&self) -> Result<()> {
        let Some(why) = self.head.tenancy.tell_loss() else { return Ok(()) };
        let name = self.store.tables.read().disk(self.head.id).map(|row| row.name.clone()).unwrap_or_default();
        let error = Error::new(
            Kind::Io,
            format!(
                "disk '{name}': writes that were acknowledged and not flushed were lost when the server ended: {why}"
            ),
        )
        .hint("check what is on the disk; flushes hold again from now on");
        tracing::error!("{error}");
        Err(error)
    }

    /// Makes mounts forget what a change made untrue; called after it, and before it is acknowledged.
    pub(super) fn announce(&self) {
        self.head.tenancy.announce(|| self.store.tell(&Change::Written { disk: self.head.id }));
    }
}

impl Store {
    fn refused(&self, id: DiskId, refusal: Refusal) -> Error {
        let name = self.tables.read().disk(id).map(|row| row.name.clone()).unwrap_or_default();
        refusal.error(&name)
    }

    /// Fails when somebody has the disk open for writing, or will have it again.
    ///
    /// # Errors
    /// `Busy` with the holder's name.
    pub fn refuse_leased(&self, head: &Head) -> Result<()> {
        match head.tenancy.refusal(None) {
            Some(refusal) => Err(self.refused(head.id, refusal)),
            None => Ok(()),
        }
    }

    /// As [`Store::refuse_leased`], for a caller without locks: waits for a lease that is about to fall.
    ///
    /// # Errors
    /// `Busy` with the holder's name.
    pub fn wait_unleased(&self, head: &Head) -> Result<()> {
        head.tenancy.wait_vacant(None).map_err(|refusal| self.refused(head.id, refusal))
    }

    /// Fails when a disk is attached to something.
    ///
    /// # Errors
    /// `Busy` with what it is attached to.
    pub fn refuse_attached(&self, head: &Head) -> Result<()> {
        head.tenancy.attached().map_or(Ok(()), |what| Err(self.is_attached(head, &what)))
    }

    fn is_attached(&self, head: &Head, what: &str) -> Error {
        let name = self.tables.read().disk(head.id).map(|row| row.name.clone()).unwrap_or_default();
        Error::busy(format!("disk '{name}' is attached as {what}")).hint("detach it first with 'afterimage detach'")
    }

    /// As [`Store::refuse_attached`], and it is not attached to anything until the answer is dropped.
    ///
    /// # Errors
    /// `Busy` with what it is attached to.
    pub fn begin_removal<'a>(&self, head: &'a Head) -> Result<Removal<'a>> {
        head.tenancy.begin_removal().map_err(|what| self.is_attached(head, &what))
    }

    /// Tells whether somebody has a disk open for writing.
    #[must_use]
    pub fn is_leased(&self, id: DiskId) -> bool {
        self.head(id).is_ok_and(|head| head.tenancy.holder().is_some())
    }

    /// Tells whether another one than `holder` has a disk open for writing.
    #[must_use]
    pub fn is_leased_by_other(&self, id: DiskId, holder: &str) -> bool {
        self.head(id).is_ok_and(|head| head.tenancy.refusal(Some(holder)).is_some())
    }
}
