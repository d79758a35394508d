//! Writing an increment directory on the host.
//!
//! # Rules
//! 1. All or nothing: everything goes into a directory beside the wanted one, is synced, and gets the wanted name in one
//!    step. When anything fails it is removed; after a crash it is left under its own name.
//! 2. Nothing that is there is overwritten: the directory must be new or empty.
//! 3. Blocks of zeros become holes of the files, so a copy takes no more room than the data.
//! 4. What was read is compared with its seals before it is written: no damaged block gets a fresh checksum.
//! 5. One pass: the checksums come from the bytes as they go by, so the texts that hold them are written last.

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use rustix::fs::AtFlags;
use uuid::Uuid;

use super::{Cksum, Increment, Member, Part, Sums};
use crate::error::{Error, Kind, Result};
use crate::media::{File, HostMedia, Media, Open};
use crate::progress::Progress;
use crate::snapshot::{SnapshotDevice, VerifiedReader};
use crate::units::{BLOCK_SIZE, show_size, to_usize};

/// Bytes read at once.
const PIECE: u64 = 4 << 20;
const ZEROS: [u8; to_usize(BLOCK_SIZE)] = [0; to_usize(BLOCK_SIZE)];

/// Writes the directory `dir`, whose parent must exist; `device` is the new state. Returns its path without links.
///
/// # Errors
/// `Exists` when there is something in it, `NoSpace`, `Corrupt` when a block is not what was sealed, `Failed` when the caller cancels, any error of the host or of reading.
/// There is no directory then, or the empty one that was there.
pub fn write(increment: &Increment, device: &SnapshotDevice, dir: &Path, progress: &dyn Progress) -> Result<PathBuf> {
    write_all(increment, device, dir, progress)
        .map_err(|error| error.context(format_args!("cannot export to {}", dir.display())))
}

fn write_all(increment: &Increment, device: &SnapshotDevice, dir: &Path, progress: &dyn Progress) -> Result<PathBuf> {
    let dir = free_name(dir)?;
    let (Some(parent), Some(name)) = (dir.parent(), dir.file_name().and_then(|name| name.to_str())) else {
        return Err(Error::usage("it is no directory that could be made, or its name is not UTF-8"));
    };
    let media = HostMedia::new(parent).map_err(|e| Error::io(format!("cannot open {}", parent.display()), e))?;
    let space = media.space().map_err(|e| Error::io("cannot tell how much room there is", e))?;
    let data = increment.data();
    if data > space.free {
        let (data, free) = (show_size(data), show_size(space.free));
        return Err(Error::no_space(format!("it takes {data}, and {free} are free")));
    }
    let salt = Uuid::new_v4().simple().to_string();
    let interim = format!("{name}.part-{}", &salt[..8]);
    media.make_dir(&interim).map_err(|e| Error::io("cannot make a directory beside it", e))?;
    let half = HalfMade(Some(parent.join(&interim)));
    let writer = Writer { media: &media, dir: &interim, progress };
    writer.fill(increment, device)?;
    let sync = |e| Error::io("cannot sync", e);
    // One for all: there may be 65,536 files.
    rustix::fs::syncfs(media.as_fd()).map_err(|e| sync(e.into()))?;
    media.rename(&interim, name).map_err(|e| {
        let error = Error::io("cannot give it its name", e);
        if error.kind() == Kind::Busy {
            error.hint("a mount point cannot be replaced: name a directory in it")
        } else {
            error
        }
    })?;
    half.done();
    media.sync_dir("").map_err(sync)?;
    Ok(dir)
}

/// Returns the path of a directory that is not there or empty, without links.
fn free_name(dir: &Path) -> Result<PathBuf> {
    let cannot = |e| Error::io("cannot look at it", e);
    match fs::read_dir(dir) {
        Ok(mut entries) => match entries.next() {
            None => fs::canonicalize(dir).map_err(cannot),
            Some(_) => Err(Error::exists("there is something in it").hint("name a directory that is new or empty")),
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(dir.to_owned()),
        Err(error) => Err(cannot(error)),
    }
}

/// Removes the directory unless it was finished, also when something panics.
struct HalfMade(Option<PathBuf>);

impl HalfMade {
    fn done(mut self) {
        self.0 = None;
    }
}

impl Drop for HalfMade {
    fn drop(&mut self) {
        let Some(dir) = &self.0 else { return };
        if let Err(error) = fs::remove_dir_all(dir) {
            tracing::warn!("{} was not exported whole and could not be removed: {error}", dir.display());
        }
    }
}

struct Writer<'a> {
    media: &'a HostMedia,
    dir: &'a str,
    progress: &'a dyn Progress,
}

impl Writer<'_> {
    fn fill(&self, increment: &Increment, device: &SnapshotDevice) -> Result<()> {
        self.progress.total(increment.data());
        let mut buffer = vec![0; to_usize(PIECE)];
        let mut reader = VerifiedReader::new(device)?;
        let mut sums = Vec::with_capacity(increment.plan.files.len());
        for part in &increment.plan.files {
            sums.push(self.copy(*part, &mut reader, &mut buffer)?);
        }
        let sums = Sums(sums);
        self.text(Member::Zeros, &increment.zeros_text())?;
        self.text(Member::Manifest, &increment.manifest_text(&sums))?;
        self.text(Member::Cksums, &increment.cksums_text(&sums))?;
        self.text(Member::Apply, &increment.apply_text())?;
        // As private as the rest, and a script.
        let (name, mode) = (Member::Apply.name(), rustix::fs::Mode::RWXU);
        let path = format!("{}/{name}", self.dir);
        rustix::fs::chmodat(self.media, path, mode, AtFlags::empty()).map_err(|e| cannot_write(&name, e.into()))
    }

    fn make(&self, name: &str) -> Result<std::sync::Arc<dyn File>> {
        self.media
            .open(&format!("{}/{name}", self.dir), Open::New)
            .map_err(|e| Error::io(format!("cannot make the file {name}"), e))
    }

    fn text(&self, member: Member, text: &str) -> Result<()> {
        let name = member.name();
        self.make(&name)?.write_at(text.as_bytes(), 0).map_err(|e| cannot_write(&name, e))
    }

    /// Copies a range into its file and returns its checksum.
    fn copy(&self, part: Part, reader: &mut VerifiedReader<'_>, buffer: &mut [u8]) -> Result<u32> {
        let name = part.name();
        let file = self.make(&name)?;
        let mut sum = Cksum::default();
        let mut at = 0;
        let mut end = 0;
        while at < part.length {
            if self.progress.cancelled() {
                return Err(Error::failed("cancelled"));
            }
            let piece = &mut buffer[..to_usize(PIECE.min(part.length - at))];
            reader.read(piece, part.offset + at)?;
            sum.update(piece);
            end = write_data(&*file, piece, at).map_err(|e| cannot_write(&name, e))?.unwrap_or(end);
            at += piece.len() as u64;
            self.progress.advance(piece.len() as u64);
        }
        if end < part.length {
            file.set_len(part.length).map_err(|e| cannot_write(&name, e))?;
        }
        Ok(sum.finish())
    }
}

fn cannot_write(name: &str, error: io::Error) -> Error {
    Error::io(format!("cannot write the file {name}"), error)
}

/// Writes the blocks that are not zero, neighbours together; returns where the last of them ended.
fn write_data(file: &dyn File, data: &[u8], offset: u64) -> io::Result<Option<u64>> {
    let mut last = None;
    let mut start = None;
    let mut at = 0;
    for block in data.chunks(ZEROS.len()) {
        match (block == &ZEROS[..block.len()], start) {
            (false, None) => start = Some(at),
            (true, Some(first)) => {
                file.write_at(&data[first..at], offset + first as u64)?;
                last = Some(offset + at as u64);
                start = None;
            }
            _ => {}
        }
        at += block.len();
    }
    if let Some(first) = start {
        file.write_at(&data[first..], offset + first as u64)?;
        last = Some(offset + at as u64);
    }
    Ok(last)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::media::SimMedia;

    #[test]
    fn blocks_of_zeros_are_left_out() {
        let media = SimMedia::new(1);
        let file = media.open("f", Open::New).unwrap();
        let mut data = vec![0; 5 * 4096 + 512];
        assert_eq!(write_data(&*file, &data, 0).unwrap(), None);
        data[4096] = 1;
        data[3 * 4096 - 1] = 1;
        assert_eq!(write_data(&*file, &data, 0).unwrap(), Some(3 * 4096));
        data[5 * 4096 + 511] = 1;
        assert_eq!(write_data(&*file, &data, 1 << 20).unwrap(), Some((1 << 20) + 5 * 4096 + 512));
        let mut found = vec![0; data.len()];
        file.read_exact_at(&mut found, 1 << 20).unwrap();
        assert!(found == data);
    }
}
