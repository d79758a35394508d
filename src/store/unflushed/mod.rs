//! A log of the changes of the map that are acknowledged and not flushed: it outlives the process and is not trusted over a
//! loss of power.
//!
//! The data of a write is with the host as soon as the write returns; only the entry that names its new place waits in
//! memory for a flush. Programs on the mount see the server die and know that what they have not synced is gone. A client
//! that connects again (NBD, vhost-user) does not: its next flush must hold for what another process had acknowledged.
//!
//! ```text
//!   write, discard --under the chunk's lock--> record in file n   -+
//!   flush: the next records go to file 1 - n; frame durable; file n is cut to its header
//!   opening: header is of this boot and the last opening --> records in order, flush, files removed
//! ```
//!
//! # Rules
//! 1. Written while another holder than the mount has the lease, before the change is acknowledged; never synced. What was
//!    changed before is flushed when the lease is taken. Overwriting in place needs no record, except where the journal has
//!    an older copy of the block, which an opening would write over the newer data.
//! 2. A flush begins a generation before it copies entries, and drops the older one when its frame is durable: what is in the
//!    newer one and in the frame, too, is replayed in vain. A failed flush drops nothing.
//! 3. A change that cannot be written down (no room, an I/O error) makes every write be flushed before it is answered, until a
//!    flush has covered it ([`Unflushed::is_strict`]).
//! 4. A log as long as [`LONG`] is flushed.
//! 5. After a failed sync the page cache is not what is on the disk, so no log of that opening is believed any more: they
//!    are emptied when the pool begins to refuse writes (`Files::spoil`).
//! 6. Where there was a log to be and it cannot be trusted to the end, who comes back under a reservation is told: its first
//!    flush fails (`Disk::flush`). Until then no log is begun, whoever writes: that there is none is how the next opening
//!    knows, should this process be killed before. Rule 3 holds meanwhile.
//!
//! # After a crash
//! The files stay. The next opening replays or refuses them before it takes its number, and removes them after.

mod file;
mod replay;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

pub use file::{LOG_HEADER_LEN, LogHeader, LogRecord, MapChange, log_path};
pub(super) use replay::Recovery;
use uuid::Uuid;

use super::Store;
use super::head::Head;
use crate::error::{Error, Result};
use crate::media::{File, Media, Open};
use crate::pool::UNFLUSHED_DIR;
use crate::sync::Mutex;
use crate::units::DiskId;

/// Bytes of one generation at which a writer flushes.
pub const LONG: u64 = 4 << 20;

#[derive(Debug, Default)]
struct Inner {
    /// Both files of the disk; `None` while there are none.
    files: Option<[Arc<dyn File>; 2]>,
    /// The one that records go to.
    current: usize,
    /// Where the next one goes.
    end: u64,
    /// Flushes that have begun.
    generation: u64,
    /// The file of the generation that is being flushed.
    closing: Option<usize>,
    /// The last generation of which a change is not written down.
    missing: Option<u64>,
}

/// The files of all logs of this opening. Its lock is held for nothing else, see [`super::ledger::Ledger::on_poison`].
#[derive(Debug, Default)]
pub(super) struct Files(Mutex<Vec<Arc<dyn File>>>);

impl Files {
    /// Empties them, so that nothing is replayed and who comes back is told.
    pub(super) fn spoil(&self) {
        for file in &*self.0.lock() {
            if let Err(error) = file.set_len(0) {
                tracing::error!("a log of unflushed changes that is not to be believed cannot be emptied: {error}");
            }
        }
    }
}

/// The log of a disk.
#[derive(Debug, Default)]
pub struct Unflushed {
    inner: Mutex<Inner>,
    strict: AtomicBool,
    long: AtomicBool,
}

impl Unflushed {
    /// Tells whether a change is not written down, so that every write has to be flushed before it is answered.
    pub fn is_strict(&self) -> bool {
        self.strict.load(Ordering::SeqCst)
    }

    /// Tells whether a write that has been entered must be flushed before it is answered.
    pub fn must_flush(&self) -> bool {
        self.is_strict() || self.long.load(Ordering::Relaxed)
    }

    /// Writes a change down; the caller has the lock of the chunk, and has made the change.
    fn append(&self, change: MapChange) {
        let mut inner = self.inner.lock();
        let generation = inner.generation;
        if inner.missing == Some(generation) {
            return;
        }
        let record = LogRecord { generation, change }.encode();
        let written = match &inner.files {
            Some(files) => files[inner.current].write_at(&record, inner.end),
            None => Err(std::io::Error::other("there is no log")),
        };
        match written {
            Ok(()) => {
                inner.end += record.len() as u64;
                if inner.end >= LONG {
                    self.long.store(true, Ordering::Relaxed);
                }
            }
            Err(error) => {
                tracing::warn!("unflushed changes cannot be written down, so writes are flushed one by one: {error}");
                if let Some(files) = &inner.files {
                    // Best effort: what is left of the record would look like damage.
                    files[inner.current].set_len(inner.end).ok();
                }
                self.miss(&mut inner);
            }
        }
    }

    fn miss(&self, inner: &mut Inner) {
        inner.missing = Some(inner.generation);
        self.strict.store(true, Ordering::SeqCst);
    }

    /// Makes the files, if they are not there.
    fn begin(&self, media: &dyn Media, header: Result<LogHeader>, all: &Files) {
        let mut inner = self.inner.lock();
        if inner.files.is_some() {
            return;
        }
        match header.and_then(|header| make(media, &header)) {
            Ok(files) => {
                all.0.lock().extend(files.iter().map(Arc::clone));
                inner.files = Some(files);
                inner.end = LOG_HEADER_LEN as u64;
            }
            Err(error) => {
                tracing::warn!("no log of unflushed changes, so writes are flushed one by one: {error}");
                self.miss(&mut inner);
            }
        }
    }

    /// Begins the next generation, for a flush that has not copied anything yet. Returns the one before.
    fn switch(&self) -> u64 {
        let mut inner = self.inner.lock();
        let closed = inner.generation;
        inner.generation += 1;
        // What a flush left that failed stays, until the frame of its changes is durable: the next flush waits for that.
        if inner.closing.is_none() && inner.end > LOG_HEADER_LEN as u64 {
            inner.closing = Some(inner.current);
            inner.current = 1 - inner.current;
            inner.end = LOG_HEADER_LEN as u64;
        }
        self.long.store(false, Ordering::Relaxed);
        closed
    }

    /// Drops a generation whose frame is durable; one flush at a time.
    fn drop_closed(&self, closed: u64) -> Result<()> {
        let file = {
            let inner = self.inner.lock();
            inner.closing.and_then(|n| inner.files.as_ref().map(|files| Arc::clone(&files[n])))
        };
        if let Some(file) = file {
            let cut = file.set_len(LOG_HEADER_LEN as u64);
            cut.map_err(|e| Error::io("cannot drop the log of changes that are flushed", e))?;
        }
        let mut inner = self.inner.lock();
        inner.closing = None;
        if inner.missing.is_some_and(|missing| missing <= closed) {
            inner.missing = None;
            self.strict.store(false, Ordering::SeqCst);
        }
        Ok(())
    }
}

fn make(media: &dyn Media, header: &LogHeader) -> Result<[Arc<dyn File>; 2]> {
    let fail = |e| Error::io("cannot make a log of unflushed changes", e);
    match media.make_dir(UNFLUSHED_DIR) {
        Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => return Err(fail(e)),
        _ => {}
    }
    let one = |which| {
        let path = log_path(header.disk, which);
        match media.remove(&path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(fail(e)),
            _ => {}
        }
        let file = media.open(&path, Open::New).map_err(fail)?;
        file.write_at(&header.encode(), 0).map_err(fail)?;
        Ok(file)
    };
    Ok([one(0)?, one(1)?])
}

impl Head {
    /// Writes a change of the map down, if somebody may come back for it; the caller has the lock of the chunk, and has made
    /// the change.
    pub fn write_down(&self, change: impl FnOnce() -> MapChange) {
        if self.tenancy.is_foreign() {
            self.unflushed.append(change());
        }
    }
}

impl Store {
    fn log_header(&self, disk: DiskId) -> Result<LogHeader> {
        let boot = self.media.boot().map_err(|e| Error::io("cannot tell one run of the host from another", e))?;
        Ok(LogHeader { pool: self.uuid(), boot: Uuid::from_u128(boot), opening: self.opening, disk })
    }

    /// Makes the log of a disk, for a holder that may come back or is awaited. Without it, writes are flushed one by one.
    pub fn begin_log(&self, head: &Head) {
        // A pool that refuses writes has lost something; who is awaited is to be told by the next process, too. So is who has
        // not been told of an older loss, whoever writes meanwhile: a second crash must not look like no loss.
        if self.ledger.writable().is_ok() && !head.tenancy.owes_loss() {
            head.unflushed.begin(&*self.media, self.log_header(head.id), &self.logs);
        }
    }

    /// Makes sure that all changes are flushed or will be written down, for a foreign holder that has just got the lease.
    ///
    /// # Errors
    /// As [`Store::flush`]; none where the pool refuses writes anyway.
    pub fn begin_foreign(&self, head: &Head) -> Result<()> {
        if self.ledger.writable().is_err() {
            return Ok(());
        }
        // The flush makes the log.
        self.flush(head)
    }

    /// The part of a flush that comes before anything is copied.
    pub(super) fn switch_log(&self, head: &Head) -> u64 {
        if head.tenancy.is_foreign() {
            self.begin_log(head);
        }
        head.unflushed.switch()
    }

    /// The part of a flush that comes when its frame is durable.
    ///
    /// # Errors
    /// Any error of the host; the pool refuses writes then, because old records must not be replayed after newer frames.
    pub(super) fn drop_log(&self, head: &Head, closed: u64) -> Result<()> {
        head.unflushed.drop_closed(closed).inspect_err(|error| self.ledger.poison(error))
    }

    /// Tells why changes of a disk that were acknowledged may be lost, if they may.
    #[must_use]
    pub fn lost_changes(&self, id: DiskId) -> Option<String> {
        self.recovery.lock().lost(id)
    }

    /// Tells whether the last process that had the pool open closed it.
    #[must_use]
    pub fn was_closed(&self) -> bool {
        self.recovery.lock().was_closed()
    }

    /// Tells whether the host was restarted since the last opening, as far as a log of it was found that says so.
    #[must_use]
    pub fn restarted(&self) -> bool {
        self.recovery.lock().restarted()
    }

    /// Removes the files; what is left of them is not of the next opening.
    pub(super) fn remove_logs(&self) {
        for name in self.media.list(UNFLUSHED_DIR).unwrap_or_default() {
            if let Err(error) = self.media.remove(&format!("{UNFLUSHED_DIR}/{name}")) {
                tracing::warn!("{UNFLUSHED_DIR}/{name} is of no use any more and cannot be removed: {error}");
            }
        }
    }
}
