//! Reads and writes that need no waiting, begun on a handle: the caller does the I/O on the host, many at a time.
//!
//! # Rules
//! 1. `None` means: do it in the ordinary way ([`super::file`]). That way also says what is wrong, if anything is.
//! 2. What an operation means is the same in both ways: a read ends with the file, a write never grows it here.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::errno::{Answer, Errno};
use super::file::Handle;
use super::state::Tree;
use crate::disk::{BlockDevice, Writing};
use crate::store::Located;
use crate::units::BLOCK_SIZE;

/// A write under way, and the file it goes to.
#[derive(Debug)]
pub struct BegunWrite {
    handle: Arc<Handle>,
    /// Where it goes.
    pub writing: Writing,
}

impl Tree {
    /// Finds where `len` bytes of a file lie, as far as the file goes; returns how many there are.
    pub fn begin_read(&self, handle: u64, len: usize, offset: u64) -> Option<(Located, usize)> {
        let handle = self.handle(handle).ok()?;
        if let Handle::Disk(disk) = handle.as_ref()
            && disk.file.is_cloning.load(Ordering::Acquire)
        {
            return None;
        }
        handle.note_reader();
        let device = handle.device().ok()?;
        let left = usize::try_from(device.size().saturating_sub(offset)).unwrap_or(usize::MAX);
        let len = len.min(left);
        let located = device.begin_read(len, offset).ok()??;
        Some((located, len))
    }

    /// Returns a number that is another one after every change of a file's content; `None` when that cannot be told. Who
    /// asks may give the kernel what was read at that number.
    pub fn stamp(&self, handle: u64) -> Option<u64> {
        let handle = self.handle(handle).ok()?;
        handle.note_reader();
        match handle.as_ref() {
            Handle::Disk(disk) if disk.file.is_cloning.load(Ordering::Acquire) => None,
            Handle::Disk(disk) => Some(disk.file.disk().changes()),
            Handle::Snapshot(_) => Some(0),
            Handle::Fixed(_) | Handle::Dir(_) => None,
        }
    }

    /// Chooses where `len` bytes at `offset` of a disk go; `flags` are those of the file and the call.
    pub fn begin_write(&self, handle: u64, len: usize, offset: u64, flags: i32) -> Option<BegunWrite> {
        if flags & libc::O_DSYNC != 0 || !(len as u64).is_multiple_of(BLOCK_SIZE) {
            return None;
        }
        let handle = self.handle(handle).ok()?;
        let file = &handle.writable().ok()?.file;
        if file.is_cloning.load(Ordering::Acquire) {
            return None;
        }
        let writing = file.disk().begin_write(len, offset).ok()??;
        Some(BegunWrite { handle, writing })
    }

    /// Ends a write; tells whether [`Tree::settle_write`] must follow before it is answered.
    ///
    /// # Errors
    /// As [`Tree::write`].
    pub fn end_write(
        &self,
        begun: BegunWrite,
        data: &[u8],
        written: &[std::io::Result<usize>],
    ) -> Answer<Option<Arc<Handle>>> {
        let BegunWrite { handle, writing } = begun;
        let flush =
            handle.writable()?.file.disk().end_write(writing, data, written).map_err(|e| Errno::from(e).stale())?;
        Ok(flush.then_some(handle))
    }

    /// Flushes a disk that has too many changes; may take long.
    ///
    /// # Errors
    /// As [`Tree::sync`].
    pub fn settle_write(handle: &Handle) -> Answer<()> {
        Ok(handle.device()?.flush()?)
    }
}
