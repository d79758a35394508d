//! A live disk for those who may only read it.

use std::sync::Arc;

use super::{BlockDevice, Disk};
use crate::error::{Error, Result};
use crate::store::{Cancel, Go, Located, Need};

/// A disk that is not written through this; others may write to it.
#[derive(Debug)]
pub struct ReadOnly(Arc<Disk>);

impl ReadOnly {
    /// Wraps a disk.
    #[must_use]
    pub fn new(disk: Arc<Disk>) -> Self {
        Self(disk)
    }

    fn refuse() -> Error {
        Error::read_only("the disk is served for reading only")
    }
}

impl BlockDevice for ReadOnly {
    fn size(&self) -> u64 {
        self.0.size()
    }

    fn read(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.0.read(buf, offset)
    }

    fn begin_read(&self, len: usize, offset: u64) -> Result<Option<Located>> {
        self.0.begin_read(len, offset)
    }

    fn take_turn(&self, bytes: u64) -> Option<Need> {
        self.0.take_turn(bytes)
    }

    fn wait(&self, need: Need, cancel: &Arc<Cancel>, go: Go) {
        self.0.wait(need, cancel, go);
    }

    fn write(&self, _data: &[u8], _offset: u64) -> Result<()> {
        Err(Self::refuse())
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn discard(&self, _offset: u64, _len: u64) -> Result<()> {
        Err(Self::refuse())
    }

    fn write_zeroes(&self, _offset: u64, _len: u64) -> Result<()> {
        Err(Self::refuse())
    }

    fn next_data(&self, offset: u64) -> Result<Option<(u64, u64)>> {
        self.0.next_data(offset)
    }

    fn mapped(&self) -> u64 {
        self.0.mapped()
    }

    fn read_only(&self) -> bool {
        true
    }
}
