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
use rustix::io::Errno;

use crate::clock;

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
        let mut wait = if FULL.load(Ordering::Relaxed) { Duration::ZERO } else { ROOM_TIME };
        let until = clock::now() + wait;
        loop {
            let time = Timespec::try_from(wait).expect("a second or less");
            match poll(&mut [PollFd::new(&self.to, PollFlags::OUT)], Some(&time)) {
                // The threads of processors are called out of what they do by signals.
                Err(Errno::INTR) => wait = until.saturating_duration_since(clock::now()),
                Ok(0) => return false,
                // What cannot be waited for is written as ever.
                Ok(_) | Err(_) => return true,
            }
        }
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
        let begun = clock::now();
        while prompt.write_all(&[7; 1000]).is_ok() {
            written += 1000;
        }
        assert!(written > PIECE && begun.elapsed() >= ROOM_TIME);
        let begun = clock::now();
        for _ in 0..100 {
            prompt.write_all(b"line").unwrap_err();
        }
        assert!(begun.elapsed() < 20 * ROOM_TIME, "none of them waited");
        reader.read_exact(&mut vec![0; written]).unwrap();
        prompt.write_all(b"line").unwrap();
    }
}
