//! `console.log`: what a guest has said on its serial port, since it was started last.
//!
//! # Rules
//! 1. It has a bounded length; a guest that says more begins it anew.
//! 2. A log that cannot be written is told of once, and the guest runs on.
//! 3. It is written whether or not a screen takes what the guest says (see `audience`).
//!
//! # After a crash
//! What was written is there, as far as the host has it.

use std::fs::File;
use std::io::{self, Seek, Write};
use std::os::unix::fs::OpenOptionsExt;

use super::Log;
use super::home::Home;
use crate::sync::Mutex;

/// Bytes of `console.log` at most; a guest that says more begins it anew.
const LOG_MAX: u64 = 16 << 20;

/// Opens it anew; a machine runs without one that cannot be opened.
pub(super) fn open(home: &Home) -> Option<File> {
    let path = home.path("console.log");
    let opened = File::options().write(true).create(true).truncate(true).mode(0o600).open(&path);
    opened.map_err(|e| tracing::warn!("cannot write {}: {e}", path.display())).ok()
}

/// Writes what a guest says, until it ends.
pub(super) fn follow(console: &Log, log: &Mutex<Option<File>>) {
    let mut next = 0;
    while let Some(part) = console.part(next) {
        next = part.start + part.bytes.len() as u64;
        let mut log = log.lock();
        if let Some(file) = &mut *log
            && let Err(error) = write(file, &part.bytes)
        {
            tracing::warn!("console.log is not written any more: {error}");
            *log = None;
        }
    }
}

/// Writes to the end of a log, which begins anew when it is full.
fn write(file: &mut File, bytes: &[u8]) -> io::Result<()> {
    if file.stream_position()? + bytes.len() as u64 > LOG_MAX {
        file.set_len(0)?;
        file.rewind()?;
    }
    file.write_all(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_that_talks_for_ever_does_not_fill_the_host() {
        let mut file = tempfile::tempfile().unwrap();
        let part = vec![b'x'; 1 << 20];
        for _ in 0..LOG_MAX / (1 << 20) {
            write(&mut file, &part).unwrap();
        }
        assert_eq!(file.metadata().unwrap().len(), LOG_MAX);
        write(&mut file, b"more").unwrap();
        assert_eq!(file.metadata().unwrap().len(), 4);
    }
}
