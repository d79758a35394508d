//! A memory that another program has written to a file: flat, with holes where it wrote nothing.
//!
//! # Rules
//! 1. It is opened once, and only a regular file or a block device: a pipe would be waited for.
//! 2. Holes are not read. A file system that does not tell them has none.
//! 3. What is read was there all the time: a file that has another length, or was written to, when all is read is an error. A write
//!    through a mapping is seen when the host notes the time of it, which it does for files on a disk and not for those in memory:
//!    whoever has the memory mapped must have stopped.

use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use crate::error::{Error, Kind, Result};
use crate::sys::hole;
use crate::units::to_usize;

/// What changes when a file is written to.
type Stamp = (u64, i64, i64, i64, i64);

/// The open file.
#[derive(Debug)]
pub(super) struct Flat {
    what: String,
    file: File,
    len: u64,
    /// Seconds since 1970 when it was last written to.
    written: u64,
    stamp: Stamp,
}

impl Flat {
    /// Opens a file; `what` says what it is to be.
    pub(super) fn open(path: &Path, what: &str) -> Result<Self> {
        let what = format!("{what} {}", path.display());
        let fail = |error| {
            let user = rustix::process::geteuid().as_raw();
            let error = Error::io(format!("cannot read {what}"), error);
            match error.kind() {
                Kind::Denied => error.hint(format!(
                    "it is read by the process that has the pool open, which is user {user}: let that user read it"
                )),
                _ => error,
            }
        };
        let how = libc::O_NONBLOCK | libc::O_NOCTTY;
        let file = OpenOptions::new().read(true).custom_flags(how).open(path).map_err(fail)?;
        let meta = file.metadata().map_err(fail)?;
        let len = match meta.file_type() {
            kind if kind.is_file() => meta.len(),
            kind if kind.is_block_device() => {
                rustix::fs::seek(&file, rustix::fs::SeekFrom::End(0)).map_err(|e| fail(e.into()))?
            }
            _ => return Err(Error::failed(format!("{what} is neither a regular file nor a block device"))),
        };
        let written = u64::try_from(meta.mtime()).unwrap_or(0);
        Ok(Self { what, file, len, written, stamp: stamp(&meta) })
    }

    /// Returns what it is called in errors.
    pub(super) fn what(&self) -> &str {
        &self.what
    }

    /// Returns its length when it was opened.
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// Returns the time of the last write, in seconds since 1970.
    pub(super) fn written(&self) -> u64 {
        self.written
    }

    /// Says that it is read from the beginning to the end. Better so on most hosts, and never needed.
    pub(super) fn will_be_read_in_order(&self) {
        if let Err(error) = rustix::fs::fadvise(&self.file, 0, None, rustix::fs::Advice::Sequential) {
            tracing::debug!("{} is read like any file: {error}", self.what);
        }
    }

    /// Returns the first extent of data at or after `offset` as `(start, end)`, or `None` when only a hole follows.
    pub(super) fn next_data(&self, offset: u64) -> Result<Option<(u64, u64)>> {
        match hole::next_data(&self.file, offset) {
            Ok(found) => Ok(found),
            Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EOPNOTSUPP)) => {
                Ok((offset < self.len).then_some((offset, self.len)))
            }
            Err(error) => Err(Error::io(format!("cannot find the data of {}", self.what), error)),
        }
    }

    /// Fills `out` from `offset` on.
    pub(super) fn read(&self, out: &mut [u8], offset: u64) -> Result<()> {
        self.file.read_exact_at(out, offset).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => self.changed("it became shorter"),
            _ => Error::io(format!("cannot read {} at byte {offset}", self.what), error),
        })
    }

    /// Returns all of it.
    pub(super) fn read_all(&self) -> Result<Vec<u8>> {
        let mut bytes = vec![0; to_usize(self.len)];
        self.read(&mut bytes, 0)?;
        self.require_same()?;
        Ok(bytes)
    }

    /// Makes sure that what was read is what it has.
    pub(super) fn require_same(&self) -> Result<()> {
        let meta = self.file.metadata().map_err(|e| Error::io(format!("cannot look at {}", self.what), e))?;
        let now = stamp(&meta);
        if now.0 != self.stamp.0 {
            return Err(self.changed(&format!("it has {} bytes and had {}", now.0, self.stamp.0)));
        }
        if now == self.stamp { Ok(()) } else { Err(self.changed("it was written to")) }
    }

    fn changed(&self, how: &str) -> Error {
        Error::failed(format!("{} changed while it was read: {how}", self.what))
            .hint("what it has is of no one instant, so nothing is saved: stop who writes it, and try again")
    }
}

fn stamp(meta: &Metadata) -> Stamp {
    (meta.len(), meta.mtime(), meta.mtime_nsec(), meta.ctime(), meta.ctime_nsec())
}
