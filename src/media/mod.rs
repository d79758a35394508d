//! The disk seam: every host file the storage layers touch goes through these two traits.
//!
//! [`host::HostMedia`] is the real thing, rooted at a pool directory. [`sim::SimMedia`] keeps a volatile and a durable
//! image of every file and directory in memory, can fail or "lose power" at any I/O, and decides by a seed which of the
//! writes that were not synced survive, whole, torn or not at all.
//!
//! # Rules
//! 1. Paths are relative to the root, with `/` between components; they are made by the program, never by a user.
//! 2. A write is durable after [`File::sync`] of that file returned; a new, renamed or removed name after
//!    [`Media::sync_dir`] of its directory. Nothing else is ever durable.
//! 3. `write_at` is whole or an error. `read_at` returns what is there: fewer bytes only at the end of the file.
//! 4. A hole reads as zeros. Punching frees whole 4 KiB blocks and needs no new space.
//!
//! # Why a trait
//! A disk format can only be trusted after it has crashed at every I/O. Six verbs suffice for that.

#[cfg(test)]
mod conformance;
pub mod device;
mod direct;
pub mod host;
pub mod sim;
pub mod socket;

use std::fmt::Debug;
use std::io;
use std::sync::Arc;

pub use host::HostMedia;
pub use sim::SimMedia;

/// How a file is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Open {
    /// The file must exist.
    Existing,
    /// The file must not exist; it is made with mode 0600 (O_EXCL).
    New,
    /// The file must exist and is never written.
    ReadOnly,
    /// As [`Open::ReadOnly`], and what the host has cached of it is believed: for a file of which every byte is checked when it
    /// is used.
    ReadCached,
}

impl Open {
    /// Tells whether the file can be written to.
    #[must_use]
    pub fn writes(self) -> bool {
        matches!(self, Self::Existing | Self::New)
    }
}

/// Free and total bytes of the host file system, as an ordinary user may use them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Space {
    /// Bytes that can still be allocated.
    pub free: u64,
    /// Size of the file system.
    pub total: u64,
}

/// A directory tree on the host (or in the simulator).
pub trait Media: Send + Sync + Debug {
    /// Opens a file.
    fn open(&self, path: &str, how: Open) -> io::Result<Arc<dyn File>>;
    /// Opens a file for large I/O that keeps out of the page cache where the host can do that. Only ranges of whole
    /// 4 KiB blocks profit; all others work.
    fn open_direct(&self, path: &str, how: Open) -> io::Result<Arc<dyn File>> {
        self.open(path, how)
    }
    /// Makes a directory (mode 0700); its parent must exist. `AlreadyExists` if it is there.
    fn make_dir(&self, path: &str) -> io::Result<()>;
    /// Removes a file.
    fn remove(&self, path: &str) -> io::Result<()>;
    /// Renames a file over `to`, atomically.
    fn rename(&self, from: &str, to: &str) -> io::Result<()>;
    /// Lists the names in a directory, sorted; the root is "".
    fn list(&self, path: &str) -> io::Result<Vec<String>>;
    /// Makes the names in a directory durable; the root is "".
    fn sync_dir(&self, path: &str) -> io::Result<()>;
    /// Returns the room on the host file system.
    fn space(&self) -> io::Result<Space>;
    /// Returns what names this run of the host: while it is the same, everything that was written is there, synced or not.
    /// After a loss of power it is another one.
    fn boot(&self) -> io::Result<u128>;
}

/// A host file. All methods take `&self`: positions are explicit and callers bring their own order.
#[expect(clippy::len_without_is_empty, reason = "a length that can fail to be read; nobody asks for emptiness")]
pub trait File: Send + Sync + Debug {
    /// Reads into `buf` from `offset`; returns how many bytes there were (fewer only at the end of the file).
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize>;
    /// Writes all of `data` at `offset`, growing the file as needed.
    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()>;
    /// As [`File::write_at`], through the page cache also for a file opened with [`Media::open_direct`].
    fn write_cached_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        self.write_at(data, offset)
    }
    /// Says, of an empty file, that it will be overwritten in place again and again. The host may make use of that.
    fn will_be_overwritten(&self) {}
    /// Says that most of the first `len` bytes are about to be read, in no order. The host may read ahead.
    fn will_be_read(&self, _len: u64) {}
    /// Returns the host file behind it, opened for direct I/O, for those who have many reads and writes under way at once
    /// (`sys::ring`); `None` where there is none, and the other methods have to do. Ranges and memory are whole blocks.
    fn direct(&self) -> Option<Arc<std::fs::File>> {
        None
    }
    /// Makes data and length durable (fdatasync).
    fn sync(&self) -> io::Result<()>;
    /// Returns the length.
    fn len(&self) -> io::Result<u64>;
    /// Cuts or extends (with a hole) to `len`.
    fn set_len(&self, len: u64) -> io::Result<()>;
    /// Frees the range; it reads as zeros after. The length stays.
    fn punch(&self, offset: u64, len: u64) -> io::Result<()>;
    /// Returns the first extent of data at or after `offset` as `(start, end)`, or `None` when only holes follow.
    fn next_data(&self, offset: u64) -> io::Result<Option<(u64, u64)>>;
    /// Returns the bytes that are allocated on the host.
    fn allocated(&self) -> io::Result<u64>;

    /// Returns when it was last written to, in whole seconds since 1970; `None` where that is not known.
    fn modified(&self) -> io::Result<Option<u64>> {
        Ok(None)
    }
    /// Returns what tells it from all other files there are while it is open: two that are open are the same file if this is
    /// equal. `None` where that is not known, and nobody locks.
    fn identity(&self) -> io::Result<Option<(u64, u64)>> {
        Ok(None)
    }
    /// Takes the file for this process for as long as it is open; false when another one has it.
    fn try_lock(&self) -> io::Result<bool> {
        Ok(true)
    }

    /// As [`File::try_lock`], together with others who do the same; false while one has it for itself.
    fn try_lock_shared(&self) -> io::Result<bool> {
        Ok(true)
    }

    /// Reads exactly `buf.len()` bytes.
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let got = self.read_at(buf, offset)?;
        if got == buf.len() {
            return Ok(());
        }
        Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the file ends early"))
    }
}

/// Passes on a path of at least one name; a path that could leave the root is a bug of the caller (EINVAL).
fn checked(path: &str) -> io::Result<&str> {
    if path.split('/').any(|name| matches!(name, "" | "." | "..")) {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    Ok(path)
}
