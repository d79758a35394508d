//! A raw file of the host, or a block device of it, as the disk of a guest.
//!
//! # Rules
//! 1. Its size is what it was when it was looked at last ([`FileDisk::look`]): others may let it grow. What is beyond is
//!    refused here, and what somebody cut off by the host.
//! 2. A flush is an fdatasync, and no write is durable before one.
//! 3. Discards and zeros punch holes where the host can; where it cannot, a discard does nothing and zeros are written.

use std::fs::File;
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::FlockOperation;

use crate::disk::BlockDevice;
use crate::error::{Error, Result};
use crate::sys::{hole, open};

/// Bytes of zeros that are written at a time.
const ZEROS: usize = 1 << 16;

/// The file.
#[derive(Debug)]
pub struct FileDisk {
    file: File,
    path: PathBuf,
    size: AtomicU64,
    read_only: bool,
}

impl FileDisk {
    /// Opens a file. Others who lock files as this does are kept out, or only from writing if this one only reads.
    ///
    /// # Errors
    /// `Busy` when somebody else has it locked, `Usage` when it is neither file nor block device, any error of the host.
    pub fn open(path: &Path, read_only: bool) -> Result<Self> {
        let cannot = |e| Error::io(format!("cannot open the disk {}", path.display()), e);
        let file = open::without_waiting(path, !read_only).map_err(cannot)?;
        let kind = file.metadata().map_err(cannot)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(Error::usage(format!("{} is neither a file nor a block device", path.display())));
        }
        let lock =
            if read_only { FlockOperation::NonBlockingLockShared } else { FlockOperation::NonBlockingLockExclusive };
        match rustix::fs::flock(&file, lock) {
            Ok(()) => {}
            Err(rustix::io::Errno::AGAIN) => {
                return Err(Error::busy(format!("the disk {} is in use", path.display())));
            }
            Err(error) => return Err(cannot(error.into())),
        }
        let disk = Self { file, path: path.to_owned(), size: AtomicU64::new(0), read_only };
        disk.look()?;
        Ok(disk)
    }

    /// Looks how large it is; tells whether that has changed.
    ///
    /// # Errors
    /// Those of the host.
    pub fn look(&self) -> Result<bool> {
        let end = rustix::fs::seek(&self.file, rustix::fs::SeekFrom::End(0));
        let size = end.map_err(|e| self.failed("find the end of", e.into()))?;
        Ok(self.size.swap(size, Ordering::Relaxed) != size)
    }

    fn failed(&self, what: &str, error: std::io::Error) -> Error {
        Error::io(format!("cannot {what} the disk {}", self.path.display()), error)
    }

    fn check(&self, offset: u64, len: u64) -> Result<()> {
        if offset.checked_add(len).is_none_or(|end| end > self.size()) {
            return Err(Error::usage(format!("bytes {offset} to {offset}+{len} are beyond {}", self.path.display())));
        }
        Ok(())
    }

    fn check_write(&self, offset: u64, len: u64) -> Result<()> {
        if self.read_only {
            return Err(Error::read_only(format!("the disk {} is only read", self.path.display())));
        }
        self.check(offset, len)
    }
}

impl BlockDevice for FileDisk {
    fn size(&self) -> u64 {
        self.size.load(Ordering::Relaxed)
    }

    fn read(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.check(offset, buf.len() as u64)?;
        self.file.read_exact_at(buf, offset).map_err(|e| self.failed("read", e))
    }

    fn write(&self, data: &[u8], offset: u64) -> Result<()> {
        self.check_write(offset, data.len() as u64)?;
        self.file.write_all_at(data, offset).map_err(|e| self.failed("write", e))
    }

    fn flush(&self) -> Result<()> {
        self.file.sync_data().map_err(|e| self.failed("flush", e))
    }

    fn discard(&self, offset: u64, len: u64) -> Result<()> {
        self.check_write(offset, len)?;
        if len > 0
            && let Err(error) = hole::punch_hole(&self.file, offset, len)
        {
            tracing::debug!("no hole in {}: {error}", self.path.display());
        }
        Ok(())
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        self.check_write(offset, len)?;
        if len == 0 || hole::punch_hole(&self.file, offset, len).is_ok() {
            return Ok(());
        }
        let zeros = [0; ZEROS];
        let mut at = offset;
        while at < offset + len {
            let part = usize::try_from(offset + len - at).unwrap_or(ZEROS).min(ZEROS);
            self.write(&zeros[..part], at)?;
            at += part as u64;
        }
        Ok(())
    }

    fn next_data(&self, offset: u64) -> Result<Option<(u64, u64)>> {
        hole::next_data(&self.file, offset).map_err(|e| self.failed("look for data in", e))
    }

    fn mapped(&self) -> u64 {
        hole::allocated(&self.file).unwrap_or_else(|_| self.size())
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn is_prompt(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;

    fn disk(size: u64) -> (tempfile::NamedTempFile, FileDisk) {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(size).unwrap();
        let disk = FileDisk::open(file.path(), false).unwrap();
        (file, disk)
    }

    #[test]
    fn bytes_come_back_and_zeros_replace_them() {
        let (_file, disk) = disk(1 << 20);
        disk.write(&[7; 8192], 4096).unwrap();
        disk.write_zeroes(5000, 1000).unwrap();
        let mut back = vec![0; 8192];
        disk.read(&mut back, 4096).unwrap();
        let zeros = back.iter().filter(|byte| **byte == 0).count();
        assert_eq!((zeros, back[903], back[904], back[1903], back[1904]), (1000, 7, 0, 0, 7));
        disk.flush().unwrap();
        disk.discard(0, 1 << 20).unwrap();
        disk.read(&mut back, 4096).unwrap();
        assert_eq!(back, [0; 8192]);
    }

    #[test]
    fn nothing_is_done_beyond_the_end() {
        let (_file, disk) = disk(8192);
        for (offset, len) in [(8191, 2), (8193, 0), (u64::MAX, 2)] {
            assert_eq!(disk.write_zeroes(offset, len).unwrap_err().kind(), Kind::Usage, "{offset} {len}");
        }
        assert_eq!(disk.size(), 8192);
    }

    #[test]
    fn a_file_that_grows_is_a_larger_disk_once_it_is_looked_at() {
        let (file, disk) = disk(4096);
        assert!(!disk.look().unwrap());
        file.as_file().set_len(8192).unwrap();
        assert_eq!(disk.write(&[1; 512], 4096).unwrap_err().kind(), Kind::Usage);
        assert!(disk.look().unwrap() && disk.size() == 8192);
        disk.write(&[1; 512], 4096).unwrap();
    }

    #[test]
    fn a_disk_has_one_writer_or_several_readers() {
        let (file, disk) = disk(4096);
        assert_eq!(FileDisk::open(file.path(), false).unwrap_err().kind(), Kind::Busy);
        assert_eq!(FileDisk::open(file.path(), true).unwrap_err().kind(), Kind::Busy);
        drop(disk);
        let first = FileDisk::open(file.path(), true).unwrap();
        let _second = FileDisk::open(file.path(), true).unwrap();
        assert_eq!(first.write(&[1], 0).unwrap_err().kind(), Kind::ReadOnly);
    }

    #[test]
    fn only_files_and_block_devices_are_disks() {
        assert_eq!(FileDisk::open(Path::new("/dev/null"), false).unwrap_err().kind(), Kind::Usage);
        assert_eq!(FileDisk::open(Path::new("/no/such/disk"), false).unwrap_err().kind(), Kind::NotFound);
    }
}
