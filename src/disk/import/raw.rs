//! Raw images: files with holes, and block devices.

use std::io;

use super::source::{Image, Source};
use crate::error::{Error, Result};
use crate::sys::hole;

/// A raw image.
#[derive(Debug)]
pub(super) struct RawImage {
    source: Source,
    /// Block devices and some file systems cannot tell holes: everything is data then.
    holes: bool,
}

impl RawImage {
    pub(super) fn new(source: Source) -> Self {
        let holes = !source.device;
        Self { source, holes }
    }

    fn next_data(&self, at: u64) -> io::Result<Option<(u64, u64)>> {
        match hole::next_data(&self.source.file, at) {
            Err(e) if matches!(e.raw_os_error(), Some(libc::EINVAL | libc::EOPNOTSUPP | libc::ENOSYS)) => {
                Ok(Some((at, self.source.len)))
            }
            result => result,
        }
    }
}

impl Image for RawImage {
    fn size(&self) -> u64 {
        self.source.len
    }

    fn extent(&mut self, at: u64) -> Result<(u64, bool)> {
        if !self.holes {
            return Ok((self.source.len, true));
        }
        match self.next_data(at).map_err(|error| Error::io(format!("cannot find the data after {at}"), error))? {
            Some((start, end)) if start <= at => Ok((end, true)),
            Some((start, _)) => Ok((start, false)),
            None => {
                // The end of a file that was cut meanwhile looks like a hole.
                let len =
                    self.source.file.metadata().map_err(|error| Error::io("cannot read its length", error))?.len();
                if len < self.source.len {
                    return Err(Error::failed("the file became shorter while it was read"));
                }
                Ok((self.source.len, false))
            }
        }
    }

    fn read(&mut self, buf: &mut [u8], at: u64) -> Result<()> {
        self.source.read(buf, at)
    }
}
