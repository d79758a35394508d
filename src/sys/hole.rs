//! Sparse files: punching holes, finding data between them, and what is really allocated.
//!
//! # Rules
//! 1. Punching keeps the length (`FALLOC_FL_KEEP_SIZE`; the kernel refuses to punch without it).
//! 2. `next_data` gives absolute offsets to `lseek`, so threads that share a descriptor do not disturb each other.
//!    It does move the file position, which nobody in this program uses.

use std::io;
use std::os::fd::AsFd;

use rustix::fs::{FallocateFlags, SeekFrom};
use rustix::io::Errno;

/// Bytes of the unit that `st_blocks` counts in, whatever the block size of the file system (stat(3type)).
const STAT_BLOCK: u64 = 512;

/// Frees `len` bytes from `offset`: whole blocks go back to the host, the rest is zeroed. `len` must not be zero.
pub fn punch_hole(file: impl AsFd, offset: u64, len: u64) -> io::Result<()> {
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    Ok(rustix::io::retry_on_intr(|| rustix::fs::fallocate(&file, flags, offset, len))?)
}

/// Returns the first extent of data at or after `offset` as `(start, end)`, or `None` when only holes follow.
///
/// A file system may call zeros data, never data a hole.
pub fn next_data(file: impl AsFd, offset: u64) -> io::Result<Option<(u64, u64)>> {
    let start = match rustix::fs::seek(&file, SeekFrom::Data(offset)) {
        Ok(start) => start,
        Err(Errno::NXIO) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    match rustix::fs::seek(&file, SeekFrom::Hole(start)) {
        Ok(end) if end > start => Ok(Some((start, end))),
        // The data went away between the two calls (cut or punched): what follows is for a later look.
        Ok(_) | Err(Errno::NXIO) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Returns the bytes that are allocated on the host.
pub fn allocated(file: impl AsFd) -> io::Result<u64> {
    let blocks = rustix::fs::fstat(file)?.st_blocks;
    Ok(u64::try_from(blocks).unwrap_or(0) * STAT_BLOCK)
}
