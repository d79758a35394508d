//! A Unix socket to listen on.
//!
//! # Rules
//! 1. Only its owner can open it, from the moment it is there.
//! 2. A socket that somebody listens on, and whatever else is there by that name, is left alone. One that nobody listens on
//!    was left behind and is removed.
//! 3. When it is dropped its name goes, unless another has it by then.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::fs::Mode;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use crate::error::{Error, Result};

/// Longest path the kernel takes beside its closing zero (unix(7)); a longer one is reached through its open directory.
const PATH_LEN_MAX: usize = 107;
/// Front ends that may wait to be accepted.
const BACKLOG: i32 = 16;

/// The socket.
#[derive(Debug)]
pub(super) struct Socket {
    listener: UnixListener,
    path: PathBuf,
    /// Device and inode.
    identity: (u64, u64),
}

impl Socket {
    /// Makes it and listens.
    ///
    /// # Errors
    /// `Busy` when somebody listens there, `Exists` when something else is there, any error of the host.
    pub(super) fn listen(path: &Path) -> Result<Self> {
        let what = || format!("cannot listen on {}", path.display());
        let (short, directory) = shorten(path).map_err(|e| Error::io(what(), e))?;
        make_way(path, &short)?;
        let bind = || -> io::Result<UnixListener> {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
            // The name gets the mode of the socket.
            rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
            rustix::net::bind(&socket, &SocketAddrUnix::new(&short)?)?;
            rustix::net::listen(&socket, BACKLOG)?;
            Ok(UnixListener::from(socket))
        };
        let listener = bind().map_err(|e| Error::io(what(), e))?;
        drop(directory);
        let found = path.symlink_metadata().map_err(|e| Error::io(what(), e))?;
        Ok(Self { listener, path: path.to_owned(), identity: (found.dev(), found.ino()) })
    }

    pub(super) fn listener(&self) -> &UnixListener {
        &self.listener
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        let ours = self.path.symlink_metadata().is_ok_and(|found| (found.dev(), found.ino()) == self.identity);
        if ours && let Err(error) = std::fs::remove_file(&self.path) {
            tracing::warn!("the socket {} stays behind: {error}", self.path.display());
        }
    }
}

/// Returns a path that the kernel accepts, and what it leads through.
fn shorten(path: &Path) -> io::Result<(PathBuf, Option<File>)> {
    if path.as_os_str().len() <= PATH_LEN_MAX {
        return Ok((path.to_owned(), None));
    }
    let name = path.file_name().unwrap_or(OsStr::new(""));
    let directory = File::open(path.parent().unwrap_or(Path::new(".")))?;
    let short = Path::new("/proc/self/fd").join(directory.as_raw_fd().to_string()).join(name);
    Ok((short, Some(directory)))
}

/// Removes a socket that nobody listens on.
fn make_way(path: &Path, short: &Path) -> Result<()> {
    let Ok(found) = path.symlink_metadata() else { return Ok(()) };
    if !found.file_type().is_socket() {
        return Err(Error::exists(format!("{} is there and is no socket", path.display()))
            .hint("name another path, or remove it"));
    }
    match UnixStream::connect(short) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path).map_err(|e| Error::io(format!("cannot remove {}", path.display()), e))
        }
        Ok(_) => Err(Error::busy(format!("somebody listens on {}", path.display())).hint("name another path")),
        Err(error) => Err(Error::io(format!("cannot tell whether somebody listens on {}", path.display()), error)),
    }
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
            let first = Socket::listen(&path).unwrap();
            let mode = path.metadata().unwrap().mode();
            assert_eq!(mode & 0o777, 0o600);
            let error = Socket::listen(&path).unwrap_err();
            assert_eq!(error.kind(), crate::error::Kind::Busy, "{error}");
            // Killed, its name stays.
            let left = dir.path().join("left");
            std::fs::hard_link(&path, &left).unwrap();
            drop(first);
            assert!(!path.exists());
            std::fs::rename(&left, &path).unwrap();
            let second = Socket::listen(&path).unwrap();
            std::fs::remove_file(&path).unwrap();
            let third = Socket::listen(&path).unwrap();
            drop(second);
            assert!(path.exists(), "the name belongs to another by then");
            drop(third);
        }
        let file = dir.path().join("file");
        std::fs::File::create(&file).unwrap();
        assert_eq!(Socket::listen(&file).unwrap_err().kind(), crate::error::Kind::Exists);
        assert!(Socket::listen(&dir.path().join("no/such")).is_err());
    }
}
