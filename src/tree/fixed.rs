//! Open files that never change: extents, records, what increment directories consist of, and what checkpoints have.
//!
//! # Rules
//! 1. What an open file is made from is held until it is closed, whatever becomes of the names.
//! 2. Holes are told as the map has them: an extent that was never touched is one, however it was asked for.

use std::sync::Arc;

use super::checkpoints::Told;
use super::window::Window;
use crate::checkpoint::Image;
use crate::disk::BlockDevice;
use crate::error::{Error, Result};
use crate::media::File;
use crate::units::to_usize;

/// An open file that never changes.
#[derive(Debug)]
pub enum Fixed {
    /// A range of a snapshot.
    Window(Window),
    /// So many zeros.
    Zeros(u64),
    /// A file of the pool and its length.
    File(Arc<dyn File>, u64),
    /// The memory of a checkpoint.
    Memory(Arc<Image>),
    /// What a checkpoint tells.
    Told(Arc<Told>),
    /// A text made by this program.
    Text(Arc<[u8]>),
}

fn refuse<T>() -> Result<T> {
    Err(Error::read_only("what a snapshot was is never written"))
}

impl Fixed {
    fn inside(&self, offset: u64, len: u64) -> Result<()> {
        let size = self.size();
        if offset.checked_add(len).is_some_and(|end| end <= size) {
            return Ok(());
        }
        Err(Error::usage(format!("{len} bytes at {offset} lie beyond the end ({size} bytes)")))
    }
}

/// Copies what lies at `offset` of a text; the caller has checked that it does.
fn copy(text: &[u8], buf: &mut [u8], offset: u64) -> Result<()> {
    let start = to_usize(offset);
    buf.copy_from_slice(&text[start..start + buf.len()]);
    Ok(())
}

impl BlockDevice for Fixed {
    fn size(&self) -> u64 {
        match self {
            Self::Window(window) => window.size(),
            Self::Zeros(length) | Self::File(_, length) => *length,
            Self::Memory(image) => image.size(),
            Self::Told(told) => told.text.len() as u64,
            Self::Text(text) => text.len() as u64,
        }
    }

    fn read(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.inside(offset, buf.len() as u64)?;
        match self {
            Self::Window(window) => window.read(buf, offset),
            Self::Zeros(_) => {
                buf.fill(0);
                Ok(())
            }
            Self::File(file, _) => {
                file.read_exact_at(buf, offset).map_err(|error| Error::io("cannot read a file of the pool", error))
            }
            Self::Memory(image) => image.read(buf, offset),
            Self::Told(told) => copy(&told.text, buf, offset),
            Self::Text(text) => copy(text, buf, offset),
        }
    }

    fn write(&self, _data: &[u8], _offset: u64) -> Result<()> {
        refuse()
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn discard(&self, _offset: u64, _len: u64) -> Result<()> {
        refuse()
    }

    fn write_zeroes(&self, _offset: u64, _len: u64) -> Result<()> {
        refuse()
    }

    fn next_data(&self, offset: u64) -> Result<Option<(u64, u64)>> {
        let size = self.size();
        if offset >= size {
            return Ok(None);
        }
        match self {
            Self::Window(window) => window.next_data(offset),
            Self::Zeros(_) => Ok(None),
            Self::Memory(image) => image.next_data(offset),
            Self::File(file, _) => {
                let found =
                    file.next_data(offset).map_err(|error| Error::io("cannot look at a file of the pool", error))?;
                Ok(found.map(|(start, end)| (start, end.min(size))).filter(|(start, end)| start < end))
            }
            Self::Told(_) | Self::Text(_) => Ok(Some((offset, size))),
        }
    }

    fn mapped(&self) -> u64 {
        self.size()
    }

    fn read_only(&self) -> bool {
        true
    }
}
