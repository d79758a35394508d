//! Block devices of the host, as files: what a stream is received into besides regular files.
//!
//! # Rules
//! 1. The path may lead through symbolic links, as names of devices do. The device is opened once.
//! 2. A length cannot be changed. Punching asks the device to zero and unmap; one that cannot is written with zeros.

use std::fs;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;

use super::File;
use super::host::read_up_to_end;
use crate::sys::hole;
use crate::units::to_usize;

/// Bytes of zeros written at once.
const ZEROS: u64 = 1 << 20;

#[derive(Debug)]
struct BlockFile {
    file: fs::File,
}

/// Opens a block device for writing; fails with EBUSY while the host has it mounted, with ENOTBLK when it is none.
pub fn open_device(path: &Path) -> io::Result<Arc<dyn File>> {
    // O_EXCL without O_CREAT claims the device (open(2)).
    let flags = libc::O_EXCL | libc::O_NOCTTY | libc::O_NONBLOCK;
    let file = fs::OpenOptions::new().read(true).write(true).custom_flags(flags).open(path)?;
    if !file.metadata()?.file_type().is_block_device() {
        return Err(io::Error::from_raw_os_error(libc::ENOTBLK));
    }
    Ok(Arc::new(BlockFile { file }))
}

/// Tells whether a path leads to a block device.
pub fn is_device(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|meta| meta.file_type().is_block_device())
}

impl File for BlockFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        read_up_to_end(&self.file, buf, offset)
    }

    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        self.file.write_all_at(data, offset)
    }

    fn sync(&self) -> io::Result<()> {
        Ok(rustix::fs::fdatasync(&self.file)?)
    }

    fn len(&self) -> io::Result<u64> {
        (&self.file).seek(SeekFrom::End(0))
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        if self.len()? == len { Ok(()) } else { Err(io::Error::from_raw_os_error(libc::EINVAL)) }
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        if len == 0 {
            return Ok(());
        }
        match hole::punch_hole(&self.file, offset, len) {
            Err(error) if matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EINVAL | libc::ENODEV)) => {
                let zeros = vec![0; to_usize(ZEROS.min(len))];
                let mut at = offset;
                while at < offset + len {
                    let here = ZEROS.min(offset + len - at);
                    self.file.write_all_at(&zeros[..to_usize(here)], at)?;
                    at += here;
                }
                Ok(())
            }
            other => other,
        }
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<(u64, u64)>> {
        let len = self.len()?;
        Ok((offset < len).then_some((offset, len)))
    }

    fn allocated(&self) -> io::Result<u64> {
        self.len()
    }
}
