//! Direct I/O: between the disk and the caller's memory, past the page cache.
//!
//! # Rules
//! 1. Offset, length and memory must be multiples of 4096 for the kernel. Memory that is not goes through an aligned buffer
//!    of the thread; a read of an unaligned range reads the blocks around it.
//! 2. Writes of unaligned ranges are not done here: the caller takes the page cache for them.
//!
//! # Why
//! Measured through FUSE with clients that open with O_DIRECT, against the page cache: twice as fast sequentially, as fast
//! at 4 KiB; and the memory of the host stays with the guests. Mixing both modes on one file costs a writeback per read.

use std::cell::RefCell;
use std::fs;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use crate::units::to_usize;

const ALIGN: usize = 4096;
const BUFFER: usize = 1 << 20;

thread_local! {
    static BOUNCE: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// Calls `f` with an aligned buffer of [`BUFFER`] bytes.
fn with_bounce<T>(f: impl FnOnce(&mut [u8]) -> T) -> T {
    BOUNCE.with_borrow_mut(|memory| {
        if memory.is_empty() {
            memory.resize(BUFFER + ALIGN, 0);
        }
        let skip = memory.as_ptr().align_offset(ALIGN);
        f(&mut memory[skip..skip + BUFFER])
    })
}

/// Tells whether a range of a file is one of whole blocks.
pub(super) fn aligned(offset: u64, len: usize) -> bool {
    offset.is_multiple_of(ALIGN as u64) && len.is_multiple_of(ALIGN)
}

/// A file opened with O_DIRECT.
#[derive(Debug)]
pub(super) struct Direct {
    file: Arc<fs::File>,
}

impl Direct {
    pub(super) fn new(file: fs::File) -> Self {
        Self { file: Arc::new(file) }
    }

    pub(super) fn file(&self) -> Arc<fs::File> {
        Arc::clone(&self.file)
    }

    /// Reads into aligned memory. Ends at the end of the file, where the kernel returns an odd number of bytes.
    fn fill(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let mut done = 0;
        while done < buf.len() {
            match self.file.read_at(&mut buf[done..], offset + done as u64) {
                Ok(got) => {
                    done += got;
                    if !got.is_multiple_of(ALIGN) || got == 0 {
                        break;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(done)
    }

    /// Reads any range into any memory.
    pub(super) fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        if aligned(offset, buf.len()) && buf.as_ptr().align_offset(ALIGN) == 0 {
            return self.fill(buf, offset);
        }
        let mut done = 0;
        while done < buf.len() {
            let at = offset + done as u64;
            let skip = to_usize(at % ALIGN as u64);
            let want = (buf.len() - done).min(BUFFER - skip);
            let got = with_bounce(|bounce| -> io::Result<usize> {
                let around = (skip + want).next_multiple_of(ALIGN);
                let got = self.fill(&mut bounce[..around], at - skip as u64)?;
                let usable = got.saturating_sub(skip).min(want);
                buf[done..done + usable].copy_from_slice(&bounce[skip..skip + usable]);
                Ok(usable)
            })?;
            done += got;
            if got < want {
                break;
            }
        }
        Ok(done)
    }

    /// Writes a range of whole blocks from any memory.
    pub(super) fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        if data.as_ptr().align_offset(ALIGN) == 0 {
            return self.file.write_all_at(data, offset);
        }
        let mut at = offset;
        for part in data.chunks(BUFFER) {
            with_bounce(|bounce| {
                bounce[..part.len()].copy_from_slice(part);
                self.file.write_all_at(&bounce[..part.len()], at)
            })?;
            at += part.len() as u64;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use crate::media::{HostMedia, Media, Open};
    use crate::units::to_usize;

    #[test]
    fn any_range_reads_what_was_written() {
        // Not in the usual temporary directory: a tmpfs may have no direct I/O.
        let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let media = HostMedia::new(dir.path()).unwrap();
        let file = media.open_direct("f", Open::New).unwrap();
        let data: Vec<u8> = (0..3_000_000u32).map(|i| (i % 251) as u8).collect();
        file.write_at(&data[..2_490_368], 4096).unwrap();
        file.write_at(&data[2_490_368..], 4096 + 2_490_368).unwrap();
        let mut all = vec![0; 3_100_000];
        for (offset, len) in
            [(0, 4096), (4096, 1 << 20), (5000, 3000), (4095, 2), (1_000_001, 1_999_999), (3_000_000, 9000)]
        {
            let got = file.read_at(&mut all[1..1 + len], offset).unwrap();
            let end = (to_usize(offset) + len).min(3_004_096);
            assert_eq!(got, end - to_usize(offset));
            for i in 0..got {
                let at = to_usize(offset) + i;
                let expected = if at < 4096 { 0 } else { data[at - 4096] };
                assert_eq!(all[1 + i], expected, "byte {at}");
            }
        }
        assert_eq!(file.read_at(&mut all, 9_000_000).unwrap(), 0);
    }
}
