//! Disks: named, thin, resizable; read, written, flushed, discarded.
//!
//! # Rules
//! 1. A snapshot contains every write that returned before it was asked for; a flush makes them durable.
//! 2. The first write of a block in a slot is always the whole 4096 bytes, merged from the older block where the write
//!    covers only a part. A slot that is not mapped is never trusted to be zero.
//! 3. Blocks born in the current epoch are overwritten in place; all others are left alone and get a new address.
//! 4. Writers of one block take turns; writers of different blocks do not wait for each other.
//! 5. Nothing here waits on purpose, for room or for a limit: front ends do, with [`BlockDevice::take_turn`],
//!    [`BlockDevice::waits_for`] and [`BlockDevice::wait`].
//!
//! # After a crash
//! Every flushed write is there. A write that was not flushed is there, or not, block by block.

mod begin;
mod buffers;
pub mod engine;
pub mod import;
mod lease;
mod manage;
pub(crate) mod patience;
mod read_only;
mod scrub;
mod write;

use std::sync::Arc;
use std::sync::atomic::Ordering;

pub use begin::Writing;
pub use buffers::Buffers;
pub use engine::Engine;
pub(crate) use engine::pieces;
pub use import::{ImportReport, import};
pub use lease::{Attached, Lease, MOUNT};
pub(crate) use manage::new_row;
pub use manage::{
    check_disk_name, check_snapshot_name, create, create_empty, remove, rename, round_size, set, set_all, unique,
};
pub use read_only::ReadOnly;
pub use scrub::{Damage, LISTED_MAX, ScrubReport, scrub};

use crate::error::{Error, Result};
use crate::store::{Cancel, Edit, EnospcPolicy, Go, Head, Line, Located, Need, Store};
use crate::units::{BLOCK_SIZE, CHUNK_SIZE, DISK_SIZE_MAX, DiskId, to_usize};

/// Something that is read and written in bytes and keeps blocks.
pub trait BlockDevice: Send + Sync + std::fmt::Debug {
    /// Returns the size in bytes.
    fn size(&self) -> u64;
    /// Reads any range inside the size; unmapped blocks are zeros.
    ///
    /// # Errors
    /// `Usage` beyond the size, `Corrupt` for a block that cannot be trusted, any error of the host.
    fn read(&self, buf: &mut [u8], offset: u64) -> Result<()>;
    /// Finds where a range lies, for a caller that reads it from the host itself; `None` when that cannot be told without
    /// waiting, or the range is not one of whole blocks: [`BlockDevice::read`] it then.
    ///
    /// # Errors
    /// As [`BlockDevice::read`].
    fn begin_read(&self, _len: usize, _offset: u64) -> Result<Option<Located>> {
        Ok(None)
    }
    /// Writes any range inside the size. It is durable after a flush.
    ///
    /// # Errors
    /// `Usage` beyond the size, `NoSpace`, `ReadOnly`, any error of the host.
    fn write(&self, data: &[u8], offset: u64) -> Result<()>;
    /// Chooses where whole blocks go, for a caller that brings them there itself and then calls
    /// [`BlockDevice::end_write`], whatever became of it; `None` when that needs waiting: [`BlockDevice::write`] then.
    ///
    /// # Errors
    /// None of its own: what is wrong is for [`BlockDevice::write`] to say.
    fn begin_write(&self, _len: usize, _offset: u64) -> Result<Option<Writing>> {
        Ok(None)
    }
    /// Maps what was written, if all of it was. `written` says for each extent how many bytes the host took. Tells whether
    /// the device must be flushed before the write is answered: it has many changes, or the mount has cached what changed.
    ///
    /// # Errors
    /// As [`BlockDevice::write`].
    fn end_write(&self, _writing: Writing, _data: &[u8], _written: &[std::io::Result<usize>]) -> Result<bool> {
        Err(Error::failed("a write was ended that this device has not begun"))
    }
    /// Tells whether a read or write is one system call, which waits for nothing but the disk of the host.
    fn is_prompt(&self) -> bool {
        false
    }
    /// Takes the turn of a read or write of so many bytes, by the limits of the disk. If it has to wait for it, returns what
    /// for: the caller reads or writes after it has waited ([`BlockDevice::wait`]), without asking again.
    fn take_turn(&self, _bytes: u64) -> Option<Need> {
        None
    }
    /// Returns what a write that failed is to wait for, to be attempted again then.
    fn waits_for(&self, _error: &Error) -> Option<Need> {
        None
    }
    /// Lets a request wait, and calls `go` when that is over.
    fn wait(&self, _need: Need, _cancel: &Arc<Cancel>, go: Go) {
        go(Ok(()));
    }
    /// Returns how many threads may wait for it at a time beside a ring: for flushes and discards, and reads of what is not in
    /// memory. A device that cannot see from here which of its requests wait on purpose has one for each.
    fn threads(&self) -> usize {
        8
    }
    /// Says what calls back requests to this device, for one that cannot see from here whether they wait on purpose: those
    /// under way then come back soon, as ones to wait for.
    fn heed(&self, _cancel: &Arc<Cancel>) {}
    /// Makes every write that returned before durable.
    ///
    /// # Errors
    /// `ReadOnly` or the error of the host that made it so.
    fn flush(&self) -> Result<()>;
    /// Unmaps whole blocks; partial ones at the edges are left alone.
    ///
    /// # Errors
    /// As [`BlockDevice::write`].
    fn discard(&self, offset: u64, len: u64) -> Result<()>;
    /// Makes the range read as zeros: whole blocks are unmapped, partial ones are written.
    ///
    /// # Errors
    /// As [`BlockDevice::write`].
    fn write_zeroes(&self, offset: u64, len: u64) -> Result<()>;
    /// Returns the first mapped extent at or after `offset`, as `(start, end)` clipped to the size.
    ///
    /// # Errors
    /// When the map cannot be read.
    fn next_data(&self, offset: u64) -> Result<Option<(u64, u64)>>;
    /// Returns the bytes mapped.
    fn mapped(&self) -> u64;
    /// Tells whether writes are refused.
    fn read_only(&self) -> bool;
}

/// A live disk. Cheap to make: everything shared is in the store.
#[derive(Debug)]
pub struct Disk {
    store: Arc<Store>,
    head: Arc<Head>,
}

/// Opens a disk.
///
/// # Errors
/// `NotFound`.
pub fn open(store: &Arc<Store>, name: &str) -> Result<Arc<Disk>> {
    let id = store.tables.read().disk_id(name)?;
    open_by_id(store, id)
}

/// Opens a disk.
///
/// # Errors
/// `NotFound`.
pub fn open_by_id(store: &Arc<Store>, id: DiskId) -> Result<Arc<Disk>> {
    let head = store.head(id)?;
    Ok(Arc::new(Disk { store: Arc::clone(store), head }))
}

impl Disk {
    /// Returns the id.
    #[must_use]
    pub fn id(&self) -> DiskId {
        self.head.id
    }

    /// Returns what people call it, for a message.
    #[must_use]
    pub fn called(&self) -> String {
        self.store.tables.read().called(self.head.id)
    }

    /// Returns a number that is another one after every change of the content: what was read before it is out of date.
    #[must_use]
    pub fn changes(&self) -> u64 {
        self.head.changes()
    }

    /// Tells whether nothing was ever written to it, so that it may become a clone.
    #[must_use]
    pub fn never_written(&self) -> bool {
        let row_touched = self.store.tables.read().disk(self.head.id).is_ok_and(|row| row.touched);
        !row_touched && self.head.dirty_chunks() == 0
    }

    /// Tells whether requests to the disk may have to wait on purpose: for room, or for a limit.
    #[must_use]
    pub fn may_wait(&self) -> bool {
        self.store.tables.read().disk(self.head.id).is_ok_and(|row| {
            let settings = &row.settings;
            settings.enospc == EnospcPolicy::Wait || settings.iops.is_some() || settings.bandwidth.is_some()
        })
    }

    fn inside(&self, line: &Line, what: &str, offset: u64, len: u64) -> Result<()> {
        if offset.checked_add(len).is_some_and(|end| end <= line.size) {
            return Ok(());
        }
        Err(Error::usage(format!(
            "{what} of {len} bytes at {offset} lies beyond the end of the disk ({} bytes)",
            line.size
        )))
    }

    /// Changes the size. Growing is online; shrinking drops everything beyond for ever and must be asked for. Who shrinks
    /// has the lease, or has made sure that nobody minds.
    ///
    /// # Errors
    /// `Failed` for a shrink without `shrink`.
    pub fn resize(&self, size: u64, shrink: bool) -> Result<()> {
        if size > DISK_SIZE_MAX {
            return Err(Error::usage(format!("{size} bytes is more than the largest disk, 64 TiB")));
        }
        let now = self.head.line().size;
        if size < now && !shrink {
            let name = self.store.tables.read().disk(self.head.id)?.name.clone();
            return Err(Error::failed(format!(
                "disk '{name}' has {now} bytes; making it {size} would lose what lies beyond"
            ))
            .hint("say --shrink if that is what you want"));
        }
        if size < now {
            self.shrink(size)?;
        } else if size > now {
            self.extend(size)?;
            let ticket = *self.head.owed_row.lock();
            self.store.ledger.wait(ticket)?;
        }
        self.store.tell_resized(self.head.id);
        Ok(())
    }

    /// Grows the disk for a write behind its end; durable with the next flush. Smaller sizes change nothing.
    ///
    /// # Errors
    /// `Usage` beyond 64 TiB, `ReadOnly`, `NotFound` when the disk was removed.
    pub fn extend(&self, size: u64) -> Result<()> {
        if size > DISK_SIZE_MAX {
            return Err(Error::usage(format!("{size} bytes is more than the largest disk, 64 TiB")));
        }
        let (gate, line) = loop {
            let seen = self.size();
            if size <= seen {
                return Ok(());
            }
            if self.store.tables.read().disk(self.head.id)?.trim {
                // What a shrink left beyond the end must not come to light again.
                self.store.trim(&self.head)?;
                self.zero_last_block()?;
            }
            let touched = self.store.touch_ends(&self.head, seen, size)?;
            if touched.unsaved {
                self.store.flush(&self.head)?;
            }
            let gate = self.head.gate.write();
            let line = self.head.line();
            if line.size == seen && line.epoch == touched.epoch {
                break (gate, line);
            }
            // Somebody resized it meanwhile, or took a snapshot.
            drop(gate);
        };
        self.head.refuse_gone()?;
        let ticket = {
            let mut tables = self.store.tables.write();
            let mut edit = Edit::new(&mut tables);
            edit.change_disk(self.head.id, |row| {
                row.size = size;
                row.trim = false;
            })?;
            self.store.ledger.submit(edit.finish())?
        };
        self.head.set_line(Line { size, ..line });
        *self.head.owed_row.lock() = ticket;
        drop(gate);
        Ok(())
    }

    /// Unmaps at once, and durably, what a shrink left beyond the end.
    ///
    /// # Errors
    /// `ReadOnly`, or any error of the host.
    pub fn trim(&self) -> Result<()> {
        self.store.trim(&self.head)
    }

    /// Says of data that could not be had which disk it is of.
    fn name(&self, error: Error) -> Error {
        match self.store.tables.read().disk(self.head.id) {
            Ok(row) if error.is_of_data() => error.context(format_args!("disk '{}'", row.name)),
            _ => error,
        }
    }

    /// Flushes because the program needs it, not because the holder of the disk asks for it.
    fn flush_own(&self) -> Result<()> {
        let flushed = self.store.flush(&self.head);
        self.announce();
        flushed
    }

    /// Zeroes what the last block has beyond the end of the disk: bytes that a shrink left, and that nobody can read
    /// before the disk grows.
    fn zero_last_block(&self) -> Result<()> {
        let size = self.head.line().size;
        let end = size.next_multiple_of(BLOCK_SIZE);
        let mapped = size < end && self.store.next_data(&self.whole_blocks(), Some(&self.head), size)?.is_some();
        if mapped {
            let zeros = vec![0; to_usize(end - size)];
            self.write_upto(&zeros, size, end)?;
        }
        // Also when it is unmapped: that must not be undone by a power cut once the size is larger.
        self.flush_own()
    }

    /// Returns what to read of the disk, its last block whole.
    fn whole_blocks(&self) -> crate::store::Source {
        let source = self.head.line().source();
        crate::store::Source { size: source.size.next_multiple_of(BLOCK_SIZE), ..source }
    }

    /// One row commits the new size; what lies beyond is unmapped after.
    fn shrink(&self, size: u64) -> Result<()> {
        let mut order = self.head.order();
        // Nobody ends the epoch while the order is held.
        self.store.touch_ends(&self.head, self.size(), size)?;
        self.store.flush_ordered(&self.head, &mut order)?;
        let gate = self.head.gate.write();
        let line = self.head.line();
        let ticket = {
            let mut tables = self.store.tables.write();
            let mut edit = Edit::new(&mut tables);
            edit.change_disk(self.head.id, |row| {
                row.size = size;
                row.trim = true;
                row.touched = true;
            })?;
            self.store.ledger.submit(edit.finish())?
        };
        self.head.set_line(Line { size, ..line });
        drop(gate);
        drop(order);
        self.store.ledger.wait(ticket)?;
        // What a chunk that stays has beyond the end goes at once, in this epoch if it can: its extent got a new time now
        // and is not to get another one later for what nobody sees.
        self.store.unmap_beyond(&self.head, size.next_multiple_of(CHUNK_SIZE))
    }
}

impl BlockDevice for Disk {
    fn size(&self) -> u64 {
        self.head.line().size
    }

    fn read(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.head.refuse_gone()?;
        self.store.read(&self.head.line().source(), buf, offset).map_err(|error| self.name(error))
    }

    fn begin_read(&self, len: usize, offset: u64) -> Result<Option<Located>> {
        self.head.refuse_gone()?;
        self.store.locate(&self.head.line().source(), len, offset)
    }

    fn write(&self, data: &[u8], offset: u64) -> Result<()> {
        let written = self.write_upto(data, offset, self.size());
        // Also after a failure: some of it may be there.
        self.announce();
        written
    }

    fn begin_write(&self, len: usize, offset: u64) -> Result<Option<Writing>> {
        Ok(self.plan_write(len, offset))
    }

    fn end_write(&self, writing: Writing, data: &[u8], written: &[std::io::Result<usize>]) -> Result<bool> {
        self.finish_write(writing, data, written)
    }

    fn take_turn(&self, bytes: u64) -> Option<Need> {
        (!self.store.has_turn(&self.head, bytes)).then_some(Need::Turn { bytes })
    }

    fn waits_for(&self, error: &Error) -> Option<Need> {
        self.store.lacks_room(self.head.id, error).map(|bytes| Need::Room { bytes })
    }

    fn wait(&self, need: Need, cancel: &Arc<Cancel>, go: Go) {
        self.store.wait(&self.head, need, cancel, go);
    }

    fn flush(&self) -> Result<()> {
        self.flush_own().and_then(|()| self.tell_loss())
    }

    fn discard(&self, offset: u64, len: u64) -> Result<()> {
        self.store.ledger.writable()?;
        let line = self.head.line();
        self.inside(&line, "a discard", offset, len)?;
        let end = offset + len;
        // The last block of a disk may be shorter than a block: it is whole as far as the disk goes.
        let last = if end == line.size { end.next_multiple_of(BLOCK_SIZE) } else { end / BLOCK_SIZE * BLOCK_SIZE };
        let first = offset.next_multiple_of(BLOCK_SIZE);
        if first >= last {
            return Ok(());
        }
        let unmapped = self.store.unmap(&self.head, first, last);
        self.announce();
        unmapped
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        self.store.ledger.writable()?;
        self.inside(&self.head.line(), "write-zeroes", offset, len)?;
        let end = offset + len;
        let first = offset.next_multiple_of(BLOCK_SIZE).min(end);
        let last = (end / BLOCK_SIZE * BLOCK_SIZE).max(first);
        let head = self.zero_part(offset, first);
        let done = head.and_then(|()| self.discard(first, last - first)).and_then(|()| self.zero_part(last, end));
        self.announce();
        done
    }

    fn next_data(&self, offset: u64) -> Result<Option<(u64, u64)>> {
        self.store.next_data(&self.head.line().source(), Some(&self.head), offset)
    }

    fn mapped(&self) -> u64 {
        u64::try_from(self.head.referenced.load(Ordering::Relaxed)).unwrap_or(0) * BLOCK_SIZE
    }

    fn read_only(&self) -> bool {
        self.store.health().is_some()
    }
}
