//! Sockets in the file system: where programs of this machine find each other.
//!
//! # Rules
//! 1. Only its owner can open a socket, from the moment it is there.
//! 2. A socket that somebody listens on, and whatever else is there by that name, is left alone. One that nobody listens on
//!    was left behind and is removed.
//! 3. When it is dropped its name goes, unless another has it by then.
//!
//! The kernel takes 107 bytes for the path of a socket, and pools lie deeper than that: a long one is reached through its
//! open directory, as `/proc/self/fd/N/NAME` ([`ShortPath`]).
//!
//! # After a crash
//! The name stays, and rule 2 lets the next one have it.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::Mode;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use crate::error::{Error, Result};

/// Longest path the kernel takes beside its closing zero (unix(7)).
const PATH_LEN_MAX: usize = 107;

/// A path of a socket that the kernel accepts, for as long as this lives.
#[derive(Debug)]
pub struct ShortPath {
    path: PathBuf,
    /// The path leads through it.
    _directory: Option<File>,
}

impl ShortPath {
    /// Finds the way to `path`.
    ///
    /// # Errors
    /// When the path is long, and its directory cannot be opened.
    pub fn of(path: &Path) -> io::Result<Self> {
        if path.as_os_str().len() <= PATH_LEN_MAX {
            return Ok(Self { path: path.to_owned(), _directory: None });
        }
        let name = path.file_name().unwrap_or(OsStr::new(""));
        let directory = File::open(path.parent().unwrap_or(Path::new(".")))?;
        let path = Path::new("/proc/self/fd").join(directory.as_raw_fd().to_string()).join(name);
        Ok(Self { path, _directory: Some(directory) })
    }

    /// Returns the path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// A socket that listens.
#[derive(Debug)]
pub struct Socket {
    listener: UnixListener,
    path: PathBuf,
    /// Device and inode.
    identity: (u64, u64),
    /// Its name has gone: the next one there may have the same inode.
    removed: AtomicBool,
}

impl Socket {
    /// Makes a socket, and listens; the kernel keeps `backlog` connections that were not accepted yet.
    ///
    /// # Errors
    /// `Busy` when somebody listens there, `Exists` when something else is there, any error of the host.
    pub fn listen(path: &Path, backlog: i32) -> Result<Self> {
        let fail = |e: io::Error| Error::io(format!("cannot listen on {}", path.display()), e);
        let short = ShortPath::of(path).map_err(fail)?;
        make_way(path, short.path())?;
        let bind = || -> io::Result<UnixListener> {
            let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
            // On Linux the name gets the mode of the socket, so it never has a wider one.
            rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
            rustix::net::bind(&socket, &SocketAddrUnix::new(short.path())?)?;
            rustix::net::listen(&socket, backlog)?;
            Ok(UnixListener::from(socket))
        };
        let listener = bind().map_err(fail)?;
        let found = path.symlink_metadata().map_err(fail)?;
        let (path, identity) = (path.to_owned(), (found.dev(), found.ino()));
        Ok(Self { listener, path, identity, removed: AtomicBool::new(false) })
    }

    /// Returns what accepts connections. It waits for them unless it is told not to.
    #[must_use]
    pub fn listener(&self) -> &UnixListener {
        &self.listener
    }

    /// Returns its name.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Removes its name, if it still is its own: nobody new connects.
    pub fn remove(&self) {
        let ours = || self.path.symlink_metadata().is_ok_and(|found| (found.dev(), found.ino()) == self.identity);
        if !self.removed.swap(true, Ordering::Relaxed)
            && ours()
            && let Err(error) = fs::remove_file(&self.path)
        {
            tracing::warn!("the socket {} stays behind: {error}", self.path.display());
        }
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        self.remove();
    }
}

/// Removes a socket that nobody listens on.
fn make_way(path: &Path, short: &Path) -> Result<()> {
    let Ok(found) = path.symlink_metadata() else { return Ok(()) };
    if !found.file_type().is_socket() {
        return Err(Error::exists(format!("{} is there and is no socket", path.display()))
            .hint("name another path, or remove it"));
    }
    let busy = || Error::busy(format!("somebody listens on {}", path.display())).hint("name another path");
    match connect_now(short) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            fs::remove_file(path).map_err(|e| Error::io(format!("cannot remove {}", path.display()), e))
        }
        // One who accepts nobody listens all the same.
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Err(busy()),
        Ok(_) => Err(busy()),
        Err(error) => Err(Error::io(format!("cannot tell whether somebody listens on {}", path.display()), error)),
    }
}

/// Connects, or says that this would have to wait: for one that listens and has as many to accept as it takes.
fn connect_now(path: &Path) -> io::Result<UnixStream> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(UnixStream::from(socket))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_is_private_and_makes_way_only_when_nobody_listens() {
        let dir = tempfile::tempdir().unwrap();
        let long = dir.path().join("d".repeat(120));
        std::fs::create_dir(&long).unwrap();
        for path in [dir.path().join("s"), long.join("s")] {
            let first = Socket::listen(&path, 1).unwrap();
            let mode = path.metadata().unwrap().mode();
            assert_eq!(mode & 0o777, 0o600);
            let error = Socket::listen(&path, 1).unwrap_err();
            assert_eq!(error.kind(), crate::error::Kind::Busy, "{error}");
            // Killed, its name stays.
            let left = dir.path().join("left");
            std::fs::hard_link(&path, &left).unwrap();
            drop(first);
            assert!(!path.exists());
            std::fs::hard_link(&left, &path).unwrap();
            std::fs::remove_file(&left).unwrap();
            let second = Socket::listen(&path, 1).unwrap();
            std::fs::remove_file(&path).unwrap();
            let third = Socket::listen(&path, 1).unwrap();
            drop(second);
            assert!(path.exists(), "the name belongs to another by then");
            drop(third);
        }
        // As many wait to be accepted as there may, and nobody accepts them.
        let full = dir.path().join("full");
        let first = Socket::listen(&full, 1).unwrap();
        let mut waiting = Vec::new();
        waiting.extend(std::iter::from_fn(|| connect_now(&full).ok()));
        assert!(!waiting.is_empty());
        assert_eq!(Socket::listen(&full, 1).unwrap_err().kind(), crate::error::Kind::Busy);
        assert!(full.exists());
        drop(first);
        let file = dir.path().join("file");
        std::fs::OpenOptions::new().write(true).create_new(true).open(&file).unwrap();
        assert_eq!(Socket::listen(&file, 1).unwrap_err().kind(), crate::error::Kind::Exists);
        Socket::listen(&dir.path().join("no/such"), 1).unwrap_err();
    }
}
