//! Bringing images into the pool: raw, qcow2 and vmdk become a new disk.
//!
//! # Rules
//! 1. All or nothing. The data goes to a disk with a name of its own (`NAME~import-1a2b3c4d`), which gets the wanted name
//!    after it was flushed. When anything fails it is removed; after a crash it is left, and plainly not the disk.
//! 2. Holes stay holes, and a block of zeros becomes one. Memory is bounded whatever the size of the image.
//! 3. An image is hostile until proven otherwise: its bytes never choose which file is read. Backing files, external data
//!    files and extents by foreign names are refused. The one file a person named is opened once; all readers get that
//!    descriptor and no path.
//! 4. Bytes that the image says are there and are not (a copy that was cut short) are an error, never zeros.
//!
//! # What reads which format
//! | format | reader | why |
//! |---|---|---|
//! | raw | this program | the mapping is `SEEK_DATA` |
//! | qcow2 | the crate `imago` 0.2, feature `sync` | maintained; in process; no tokio; tells data from zeros; its `DenyImplicitOpenGate` opens nothing else |
//! | qcow2 with zstd, extended L2 entries or the dirty bit | `qemu-img` | `imago` refuses these features |
//! | vmdk | `qemu-img` | `imago` reads only flat vmdk extents, no other maintained crate reads the sparse and compressed ones |
//!
//! `imago` takes what lies beyond the end of the file for zeros, and so does qemu for qcow2; rule 4 is why `qcow2` walks the
//! tables itself first. Of `qemu-img`, `map` tells what is data and `convert` of one window at a time into anonymous
//! memory reads it. Weighed and left: `convert` into a temporary file (needs the room of the whole image a second time),
//! `dd` (`skip` with `count` means different things in different versions), `qemu-nbd` (a client for a protocol and a
//! socket to guard, for the same bytes).

mod qcow2;
mod qemu;
mod raw;
mod source;
#[cfg(test)]
mod tests;
mod vmdk;

use std::path::Path;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{BlockDevice, check_disk_name, create, open, remove, rename};
use crate::error::{Error, Result};
use crate::progress::Progress;
use crate::store::Store;
use crate::units::{BLOCK_SIZE, DiskId, to_usize};
use source::{Format, Image, Source};

/// Bytes read at once.
const BUFFER: u64 = 4 << 20;
const SECTOR: usize = 512;
const ZEROS: [u8; to_usize(BLOCK_SIZE)] = [0; to_usize(BLOCK_SIZE)];
/// Bytes of a name that are kept for the disk while it is half-made; with the rest it must be a good name.
const STEM_MAX: usize = 100;

/// What an import did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct ImportReport {
    /// Bytes of content read from the image; its holes are not read.
    pub bytes_read: u64,
    /// Bytes written to the disk; zeros are not written.
    pub bytes_written: u64,
    /// Format of the image.
    pub format: String,
    /// Size of the disk.
    pub size: u64,
}

/// Makes the disk `name` from the image at `path`, whose format is found out from its first bytes unless it is given.
///
/// # Errors
/// `Usage` for an unknown format or a bad name, `Exists`; `Failed` for an image that needs other files or a key, or when
/// the caller cancels; `Corrupt` for a damaged image; `Unsupported` when a tool is missing; any error of the host. There is
/// no disk then.
pub fn import(
    store: &Arc<Store>,
    path: &Path,
    format: Option<&str>,
    name: &str,
    progress: &dyn Progress,
) -> Result<ImportReport> {
    check_disk_name(name)?;
    let format = format.map(Format::by_name).transpose()?;
    refuse_taken(store, name)?;
    store.ledger.writable()?;
    bring_in(store, path, format, name, progress)
        .map_err(|error| error.context(format_args!("cannot import {}", path.display())))
}

fn refuse_taken(store: &Store, name: &str) -> Result<()> {
    if store.tables.read().has_disk(name) {
        return Err(Error::exists(format!("there is a disk '{name}' already")));
    }
    Ok(())
}

fn bring_in(
    store: &Arc<Store>,
    path: &Path,
    format: Option<Format>,
    name: &str,
    progress: &dyn Progress,
) -> Result<ImportReport> {
    let source = Source::open(path)?;
    let format = format.map_or_else(|| source.detect(), Ok)?;
    progress.message(&format!("reading the {} image", format.name()));
    let mut image: Box<dyn Image> = match format {
        Format::Raw => Box::new(raw::RawImage::new(source)),
        Format::Qcow2 => qcow2::open(source, progress)?,
        Format::Vmdk => Box::new(vmdk::open(source, path)?),
    };
    let interim = interim_name(name);
    let info = create(store, &interim, image.size())?;
    let mut half = HalfMade { store, id: None };
    let disk = open(store, &interim)?;
    half.id = Some(disk.id());
    let lease = disk.lease("an import")?;
    let mut report =
        ImportReport { bytes_read: 0, bytes_written: 0, format: format.name().to_owned(), size: info.size };
    copy(&mut *image, &*disk, &mut report, progress)?;
    disk.flush()?;
    go_on(progress)?;
    rename(store, &interim, name)?;
    half.id = None;
    drop(lease);
    Ok(report)
}

/// Returns a name that nobody has and that tells what the disk was to become.
fn interim_name(name: &str) -> String {
    let mut end = name.len().min(STEM_MAX);
    while !name.is_char_boundary(end) {
        end -= 1;
    }
    let salt = Uuid::new_v4().simple().to_string();
    format!("{}~import-{}", &name[..end], &salt[..8])
}

/// Removes the disk unless it was finished, also when something panics.
struct HalfMade<'a> {
    store: &'a Arc<Store>,
    id: Option<DiskId>,
}

impl Drop for HalfMade<'_> {
    fn drop(&mut self) {
        let Some(id) = self.id else { return };
        let name = self.store.tables.read().disk(id).map(|row| row.name.clone());
        if let Err(error) = name.and_then(|name| remove(self.store, &name, true)) {
            tracing::warn!("a disk that was not imported whole could not be removed: {error}");
        }
    }
}

fn go_on(progress: &dyn Progress) -> Result<()> {
    if progress.cancelled() { Err(Error::failed("cancelled")) } else { Ok(()) }
}

/// Copies what is not zero. Everything is done in whole blocks, so no block is written twice.
fn copy(
    image: &mut dyn Image,
    disk: &dyn BlockDevice,
    report: &mut ImportReport,
    progress: &dyn Progress,
) -> Result<()> {
    let size = image.size();
    progress.total(size);
    let mut buffer = vec![0; usize::try_from(BUFFER.min(disk.size())).expect("a few MiB")];
    let mut at = 0;
    while at < size {
        go_on(progress)?;
        let (end, data) = step(image, at, size)?;
        if data {
            let part = &mut buffer[..usize::try_from(end - at).expect("at most the buffer")];
            image.read(part, at)?;
            report.bytes_read += end - at;
            // The last sector of a raw file may be cut short.
            let padded = part.len().next_multiple_of(SECTOR);
            let len = part.len();
            buffer[len..padded].fill(0);
            report.bytes_written += write_data(disk, &buffer[..padded], at)?;
        }
        progress.advance(end - at);
        at = end;
    }
    Ok(())
}

/// Returns where the next step ends, on the edge of a block or the end of the image, and whether there is data in it.
fn step(image: &mut dyn Image, at: u64, size: u64) -> Result<(u64, bool)> {
    let (end, data) = image.extent(at)?;
    let end = end.min(size);
    if end <= at {
        return Err(Error::corrupt(format!("the map of the image does not go on at {at}")));
    }
    if !data {
        let whole = if end == size { size } else { end / BLOCK_SIZE * BLOCK_SIZE };
        if whole > at {
            return Ok((whole, false));
        }
    }
    // Data, or a block that is a hole only in part.
    let end = if data { end.next_multiple_of(BLOCK_SIZE) } else { at + BLOCK_SIZE };
    Ok((end.min(size).min(at + BUFFER), true))
}

/// Writes the blocks that are not zero, neighbours together, and returns how many bytes that were.
fn write_data(disk: &dyn BlockDevice, data: &[u8], offset: u64) -> Result<u64> {
    let block = ZEROS.len();
    let is_zero = |at: usize| {
        let part = &data[at..data.len().min(at + block)];
        part == &ZEROS[..part.len()]
    };
    let mut written = 0;
    let mut at = 0;
    while at < data.len() {
        let start = at;
        while at < data.len() && !is_zero(at) {
            at += block;
        }
        let end = at.min(data.len());
        if start < end {
            disk.write(&data[start..end], offset + start as u64)?;
            written += (end - start) as u64;
        }
        while at < data.len() && is_zero(at) {
            at += block;
        }
    }
    Ok(written)
}
