//! Writing to whoever may have stopped reading.
//!
//! # Rules
//! 1. A write waits for room for [`ROOM_TIME`], and fails then. While there is none, the next do not wait at all.
//! 2. What always has room, such as a file, is written as ever.
//!
//! # Why not O_NONBLOCK
//! It belongs to the open file, which the shell and others have open as well, and would meet them.

use std::io::{self, Write};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// How long a write waits for room.
const ROOM_TIME: Duration = Duration::from_secs(1);

/// Bytes a pipe that says it has room has room for.
const PIECE: usize = 4096;

/// The last write found no room.
static FULL: AtomicBool = AtomicBool::new(false);

/// Writes where there is room.
#[derive(Debug)]
pub(super) struct Prompt<W> {
    to: W,
}

impl<W: Write + AsFd> Prompt<W> {
    pub(super) fn new(to: W) -> Self {
        Self { to }
    }

    /// Tells whether there is room, now or soon.
    fn has_room(&self) -> bool {
        let wait = if FULL.load(Ordering::Relaxed) { Duration::ZERO } else { ROOM_TIME };
        let wait = Timespec::try_from(wait).expect("a second or less");
        // Interrupted or refused: what cannot be waited for is written as ever.
        !matches!(poll(&mut [PollFd::new(&self.to, PollFlags::OUT)], Some(&wait)), Ok(0))
    }
}

impl<W: Write + AsFd> Write for Prompt<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let has_room = self.has_room();
        FULL.store(!has_room, Ordering::Relaxed);
        if !has_room {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        self.to.write(&bytes[..bytes.len().min(PIECE)])
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Read;

    use super::*;

    #[test]
    fn a_pipe_that_nobody_reads_is_waited_for_once_and_written_again_when_somebody_does() {
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        let (mut reader, mut prompt) = (File::from(reader), Prompt::new(File::from(writer)));
        let mut written = 0;
        let begun = crate::clock::now();
        while prompt.write_all(&[7; 1000]).is_ok() {
            written += 1000;
        }
        assert!(written > PIECE && begun.elapsed() >= ROOM_TIME);
        let begun = crate::clock::now();
        for _ in 0..100 {
            prompt.write_all(b"line").unwrap_err();
        }
        assert!(begun.elapsed() < 20 * ROOM_TIME, "none of them waited");
        reader.read_exact(&mut vec![0; written]).unwrap();
        prompt.write_all(b"line").unwrap();
    }
}
