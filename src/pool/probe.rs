//! What the host file system can do; asked once, when a pool is made.

use std::sync::Arc;

use crate::error::{Error, Result};
use crate::media::{File, Media, Open};
use crate::units::SEGMENT_SIZE_MAX;

const NAME: &str = "probe.tmp";

/// Which of the things the pool stands on the host has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Probe {
    /// Punching frees a single 4 KiB block.
    pub punch: bool,
    /// Holes can be found (SEEK_DATA).
    pub holes: bool,
    /// A file can be 1 TiB long and sparse.
    pub large: bool,
    /// Direct I/O in blocks of 4 KiB.
    pub direct: DirectIo,
}

/// What the host file system does of direct I/O.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DirectIo {
    /// It works in blocks of 4 KiB.
    Works,
    /// There is none: the page cache does its work, slower and with the memory of the guests.
    Missing,
    /// There is some, and it refuses blocks of 4 KiB, so reads and writes of disks would fail.
    Fails,
}

impl Probe {
    /// Names what is missing.
    ///
    /// # Errors
    /// `Unsupported` with the list, if there is any.
    pub fn require(&self) -> Result<()> {
        let missing: Vec<&str> = [
            (self.punch, "punching a hole frees 4 KiB"),
            (self.holes, "SEEK_DATA finds holes"),
            (self.large, "sparse files of 1 TiB"),
            (self.direct != DirectIo::Fails, "direct I/O in blocks of 4 KiB"),
        ]
        .into_iter()
        .filter_map(|(there, name)| (!there).then_some(name))
        .collect();
        if missing.is_empty() {
            return Ok(());
        }
        Err(Error::unsupported(format!("the host file system lacks what a pool needs: {}", missing.join(", ")))
            .hint("put the pool on ext4, xfs or btrfs"))
    }
}

/// Tries each thing on a temporary file in the directory.
///
/// # Errors
/// When the file cannot be made, written or removed.
pub fn probe(media: &dyn Media) -> Result<Probe> {
    let fail = |e| Error::io("cannot try out the host file system", e);
    match media.remove(NAME) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(fail(e)),
        _ => {}
    }
    let file = media.open(NAME, Open::New).map_err(fail)?;
    let found = try_out(&file).and_then(|found| Ok(Probe { direct: try_direct(media)?, ..found }));
    drop(file);
    media.remove(NAME).map_err(fail)?;
    found.map_err(fail)
}

/// Writes a block past the page cache and reads it back.
fn try_direct(media: &dyn Media) -> std::io::Result<DirectIo> {
    let file = media.open_direct(NAME, Open::Existing)?;
    if file.direct().is_none() {
        return Ok(DirectIo::Missing);
    }
    let (block, mut found) = ([0xa5; 4096], [0; 4096]);
    let done = file.write_at(&block, 8192).and_then(|()| file.read_exact_at(&mut found, 8192));
    Ok(if done.is_ok() && found == block { DirectIo::Works } else { DirectIo::Fails })
}

fn try_out(file: &Arc<dyn File>) -> std::io::Result<Probe> {
    file.write_at(&[0x5a; 16384], 0)?;
    file.sync()?;
    let before = file.allocated()?;
    let punch = file.punch(4096, 4096).and_then(|()| file.sync()).is_ok() && {
        let mut block = [1; 4096];
        file.read_exact_at(&mut block, 4096)?;
        block == [0; 4096] && file.allocated()? < before
    };
    let large = file.set_len(SEGMENT_SIZE_MAX).and_then(|()| file.write_at(&[1], SEGMENT_SIZE_MAX - 1)).is_ok();
    let holes = file.next_data(4096).is_ok_and(|found| found == Some((8192, 16384)));
    Ok(Probe { punch, holes, large, direct: DirectIo::Missing })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;
    use crate::media::{HostMedia, SimMedia};

    #[test]
    fn what_the_host_lacks_is_named() {
        let whole = Probe { punch: true, holes: true, large: true, direct: DirectIo::Works };
        whole.require().unwrap();
        Probe { direct: DirectIo::Missing, ..whole }.require().unwrap();
        let error = Probe { holes: false, direct: DirectIo::Fails, ..whole }.require().unwrap_err();
        assert_eq!(error.kind(), Kind::Unsupported);
        let said = error.to_string();
        assert!(said.contains("SEEK_DATA") && said.contains("direct I/O in blocks of 4 KiB"), "{said}");
        assert!(!said.contains("1 TiB"), "{said}");
    }

    #[test]
    fn direct_io_is_tried_out() {
        assert_eq!(probe(&SimMedia::new(1)).unwrap().direct, DirectIo::Missing);
        // Not in the usual temporary directory: a tmpfs may have no direct I/O.
        let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let media = HostMedia::new(dir.path()).unwrap();
        assert_eq!(probe(&media).unwrap().direct, DirectIo::Works);
        assert!(media.list("").unwrap().is_empty(), "it leaves nothing behind");
    }
}
