//! copy_file_range(2): a copy of a whole disk or snapshot into a new disk is a clone, anything else copies bytes.
//!
//! `cp` does not say that it means to copy everything. It asks for pieces, skips holes, and may stop half-way. So the
//! clone is made at the first piece, and from then on the file *shows* only what was asked for so far
//! (`Cloning::upto`): each further piece in order costs nothing and only moves the mark. Any other operation on the
//! file first settles it: what was not asked for is cut off. A program that copies the first megabyte of a terabyte has
//! a file of one megabyte.
//!
//! # Rules
//! 1. The answer of each call is true at the time of the answer: what was copied is there and durable as any write.
//! 2. The file never shows a byte that was not asked for, except to a snapshot taken through the command line while the
//!    copy is under way, and after a crash in that time: there the whole source may be seen.
//! 3. A gap between pieces is a hole: the bytes of the source that were skipped are zeroed.
//! 4. Work per call is bounded (`COPY_MAX`), since a call that does not wait on purpose cannot be interrupted and holds a
//!    thread; callers go on after a short answer, as they must.

use std::sync::atomic::Ordering;

use super::errno::{Answer, Errno};
use super::file::{DiskFile, Handle};
use super::node::Node;
use super::state::Tree;
use super::waits::Halt;
use crate::disk::BlockDevice;
use crate::error::Result;
use crate::snapshot;
use crate::units::DISK_SIZE_MAX;

/// Bytes copied by one call at most; holes cost nothing and are not counted.
const COPY_MAX: u64 = 64 << 20;
/// Bytes read and written at once.
const BUFFER: usize = 1 << 20;
/// The largest answer: the reply has 32 bits.
const ANSWER_MAX: u64 = 0xffff_f000;

/// A copy under way into a disk that was cloned from the source at the first piece.
#[derive(Debug)]
pub(super) struct Cloning {
    source: Node,
    /// Where the source ended when it was cloned.
    end: u64,
    /// What was asked for so far, from 0.
    pub(super) upto: u64,
}

impl DiskFile {
    /// Ends a copy under way: what was not asked for is cut off.
    pub(super) fn settle(&self) -> Result<()> {
        if !self.is_cloning.load(Ordering::Acquire) {
            return Ok(());
        }
        let mut cloning = self.cloning.lock();
        let Some(Cloning { end, upto, .. }) = *cloning else { return Ok(()) };
        if upto < end {
            self.disk().resize(upto, true)?;
        }
        *cloning = None;
        self.is_cloning.store(false, Ordering::Release);
        Ok(())
    }

    /// Goes on with a copy under way if `[offset, offset + len)` of `source` is its next piece; tells whether it was.
    fn go_on(&self, source: Node, offset: u64, len: u64) -> Answer<bool> {
        if !self.is_cloning.load(Ordering::Acquire) {
            return Ok(false);
        }
        let mut guard = self.cloning.lock();
        let Some(cloning) = guard.as_mut() else { return Ok(false) };
        if cloning.source != source || offset < cloning.upto {
            return Ok(false);
        }
        let next = offset.min(cloning.end);
        if let Some((start, _)) = self.disk().next_data(cloning.upto)?
            && start < next
        {
            let start = start.max(cloning.upto);
            self.disk().write_zeroes(start, next - start)?;
        }
        cloning.upto = (offset + len).min(cloning.end);
        if cloning.upto == cloning.end {
            *guard = None;
            self.is_cloning.store(false, Ordering::Release);
        }
        Ok(true)
    }
}

impl Tree {
    /// Copies between two open files; returns how much, which may be less than `len` and is 0 at the source's end.
    ///
    /// # Errors
    /// EROFS for a snapshot as the target, EFBIG, ENOSPC, EIO; `Waits` when a disk lets it wait and nothing was copied yet:
    /// with `had_turn` it has waited.
    pub fn copy(&self, from: (u64, u64), to: (u64, u64), len: u64, had_turn: bool) -> Result<u64, Halt> {
        let (source, offset) = (self.handle(from.0)?, from.1);
        let (handle, target) = (self.handle(to.0)?, to.1);
        let file = &handle.writable()?.file;
        let len = len.min(source.size().saturating_sub(offset)).min(ANSWER_MAX);
        if len == 0 {
            return Ok(0);
        }
        if target >= DISK_SIZE_MAX {
            return Err(Errno::EFBIG.into());
        }
        let len = len.min(DISK_SIZE_MAX - target);
        let done = if offset == target && self.clone_piece(&source, file, offset, len)? {
            len
        } else {
            file.settle()?;
            copy_bytes(&source, offset, (&handle, file), target, len, had_turn)?
        };
        if handle.sync_always() {
            file.disk().flush()?;
        }
        Ok(done)
    }

    /// Answers a piece by a clone, a new one or the one under way; tells whether it could.
    fn clone_piece(&self, source: &Handle, file: &DiskFile, offset: u64, len: u64) -> Answer<bool> {
        let node = match source {
            Handle::Disk(handle) => Node::Disk(handle.file.disk().id()),
            Handle::Snapshot(handle) => handle.node,
            Handle::Dir(_) | Handle::Fixed(_) => return Ok(false),
        };
        let target = file.disk();
        if node == Node::Disk(target.id()) {
            return Ok(false);
        }
        if offset > 0 || file.is_cloning.load(Ordering::Acquire) {
            return file.go_on(node, offset, len);
        }
        if !target.never_written() || target.size() > len {
            return Ok(false);
        }
        if let Handle::Disk(handle) = source {
            handle.file.settle()?;
        }
        let mut cloning = file.cloning.lock();
        let cloned = match node {
            Node::Snapshot(id) => self
                .store
                .snapshot_info_by_id(id)
                .and_then(|info| snapshot::clone_into(&self.store, &info.disk, Some(&info.name), target.id())),
            Node::Disk(id) => self
                .store
                .disk_info_by_id(id)
                .and_then(|info| snapshot::clone_into(&self.store, &info.name, None, target.id())),
            _ => return Ok(false),
        };
        if let Err(error) = cloned {
            // The source was deleted while open, a quota, another lineage: then it is a copy like any other.
            let name = target.called();
            tracing::debug!("a copy into disk {name} cannot be a clone: {error}");
            return Ok(false);
        }
        let end = target.size();
        if len < end {
            *cloning = Some(Cloning { source: node, end, upto: len });
            file.is_cloning.store(true, Ordering::Release);
        }
        Ok(true)
    }
}

/// Copies up to [`COPY_MAX`] bytes of data and the holes between them; returns how far it came.
fn copy_bytes(
    source: &Handle,
    offset: u64,
    (handle, file): (&Handle, &DiskFile),
    target: u64,
    len: u64,
    had_turn: bool,
) -> Result<u64, Halt> {
    let device = source.device()?;
    let mut buf = Vec::new();
    let (mut done, mut copied) = (0, 0);
    while done < len && copied < COPY_MAX {
        let piece = match device.next_data(offset + done)? {
            Some((start, end)) if start <= offset + done => (end - offset - done).min(len - done).min(BUFFER as u64),
            Some((start, _)) => {
                done += hole(file, target + done, (start - offset - done).min(len - done))?;
                continue;
            }
            None => {
                done += hole(file, target + done, len - done)?;
                continue;
            }
        };
        buf.resize(BUFFER, 0);
        let want = usize::try_from(piece).unwrap_or(BUFFER).min(BUFFER);
        let turn = || match had_turn && copied == 0 {
            true => Ok(()),
            false => source.take_turn(piece).and_then(|()| handle.take_turn(piece)),
        };
        let read = turn().and_then(|()| Ok(source.read(&mut buf[..want], offset + done)?));
        match read.and_then(|got| file.write(&buf[..got], target + done)) {
            Ok(0) => break, // The source was cut meanwhile.
            Ok(written) => {
                done += written as u64;
                copied += written as u64;
            }
            Err(_) if done > 0 => break,
            Err(halt) => return Err(halt),
        }
    }
    Ok(done)
}

/// Makes a hole of `len` bytes in the target, growing it if it lies beyond the end.
fn hole(file: &DiskFile, target: u64, len: u64) -> Result<u64, Halt> {
    file.zero(target, len)?;
    file.grow(target + len)?;
    Ok(len)
}
