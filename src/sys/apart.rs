//! Threads that have a table of descriptors of their own.
//!
//! To receive a descriptor is to have it in a table, and the only way out of a table is close(2), which may wait: that of a
//! file on a FUSE mount asks its server and waits for the answer, whatever signals come. A process whose table has such
//! a file cannot even end. So who has to take what strangers send takes it into a table that nobody else needs.
//!
//! # Rules
//! 1. Such a thread has the standard streams and a descriptor of what it was started with, and whatever it makes or receives
//!    itself. It writes no logs: where they go is open for the others.
//! 2. What waits in it waits alone: the process ends without it, and its locks, sockets and files are let go of.
//! 3. What is open when it begins must be what can be closed: the kernel copies a few of the lowest descriptors into a new
//!    table, and they are closed there.

#![expect(unsafe_code, reason = "a table of descriptors belongs to a thread behind the back of the standard library")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::mpsc;

use rustix::process::{PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

/// Starts a thread that has a descriptor of `kept`, and of nothing else that is open now. Nobody waits for its end.
///
/// # Errors
/// When the host has no thread, or cannot part tables (Linux before 5.9).
pub fn spawn(name: &str, kept: BorrowedFd<'_>, run: impl FnOnce(OwnedFd) + Send + 'static) -> io::Result<()> {
    let number = kept.as_raw_fd();
    let (told, parted) = mpsc::sync_channel(1);
    std::thread::Builder::new().name(name.into()).spawn(move || {
        // Whoever asked waits for this, and keeps `kept` open meanwhile.
        let (done, own) = match part().and_then(|()| fetch(number)) {
            Ok(own) => (Ok(()), Some(own)),
            Err(error) => (Err(error), None),
        };
        told.send(done).ok();
        if let Some(own) = own {
            run(own);
        }
    })?;
    parted.recv().unwrap_or_else(|_| Err(io::Error::other("a thread ended before it began")))
}

/// Gives the calling thread a table of its own, with the standard streams.
fn part() -> io::Result<()> {
    let first = libc::STDERR_FILENO.cast_unsigned() + 1;
    // SAFETY: it concerns this thread alone, which has no descriptor of its own yet; all others keep theirs.
    if unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, libc::CLOSE_RANGE_UNSHARE) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Takes a descriptor out of the table that the rest of the process has.
fn fetch(number: i32) -> io::Result<OwnedFd> {
    let process = pidfd_open(rustix::process::getpid(), PidfdFlags::empty())?;
    Ok(pidfd_getfd(process, number, PidfdGetfdFlags::empty())?)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn a_thread_apart_has_what_it_was_given_and_takes_nothing_from_the_others() {
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        let (told, open) = mpsc::channel();
        spawn("apart", writer.as_fd(), move |writer| {
            let mine = std::fs::read_dir("/proc/thread-self/fd").unwrap();
            let numbers: Vec<_> = mine.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
            rustix::io::write(&writer, b"x").unwrap();
            told.send((writer.as_raw_fd(), numbers)).unwrap();
        })
        .unwrap();
        let (number, mut numbers) = open.recv().unwrap();
        // Beside the directory that is being read.
        numbers.retain(|open| !["0", "1", "2"].contains(&open.as_str()) && *open != number.to_string());
        assert!(numbers.len() == 1, "{numbers:?}");
        let mut byte = [0];
        assert_eq!(rustix::io::read(&reader, &mut byte).unwrap(), 1);
        drop(writer);
        assert_eq!(rustix::io::read(&reader, &mut byte).unwrap(), 0, "the thread has ended, and its table with it");
    }
}
