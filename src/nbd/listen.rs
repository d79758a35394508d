//! Where a server listens: a socket in the file system, or a port.
//!
//! # Rules
//! 1. A socket file is for its owner (0600) from the moment it exists.
//! 2. One that is in the way is removed if nobody listens on it, as after a crash. A live one, or anything else by that
//!    name, is not touched.

use std::fs::{self, File};
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::Mode;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, sockopt};

use crate::error::{Error, Result};

/// Longest path that `sun_path` holds beside its closing zero (unix(7)).
const PATH_LEN_MAX: usize = 107;
/// Connections the kernel keeps before they are accepted.
const BACKLOG: i32 = 128;
/// What a socket is asked to keep for a reader that is slow: some large replies.
const SEND_BUFFER: usize = 2 << 20;
/// After so long without a sign of life a peer is asked for one, ...
const ALIVE_AFTER: Duration = Duration::from_secs(60);
/// ... this often, ...
const ALIVE_EACH: Duration = Duration::from_secs(10);
/// ... before it is given up.
const ALIVE_TRIES: u32 = 6;

/// Where to listen.
#[derive(Debug, Clone)]
pub enum Listen {
    /// On a socket in the file system.
    Unix(PathBuf),
    /// On a port; 0 for one that is free.
    Tcp(SocketAddr),
}

/// A socket that listens; a socket file is removed with it.
#[derive(Debug)]
pub(super) struct Listener {
    pub(super) socket: OwnedFd,
    /// As people write it.
    pub(super) address: String,
    file: Option<SocketFile>,
}

#[derive(Debug)]
struct SocketFile {
    path: PathBuf,
    /// Device and inode.
    identity: (u64, u64),
}

impl Listener {
    /// Begins to listen.
    ///
    /// # Errors
    /// `Busy` when somebody else does; any error of the host.
    pub(super) fn bind(listen: &Listen) -> Result<Self> {
        match listen {
            Listen::Tcp(address) => {
                let fail = |e| Error::io(format!("cannot listen on {address}"), e);
                let listener = TcpListener::bind(address).map_err(fail)?;
                let address = listener.local_addr().map_err(fail)?.to_string();
                Ok(Self { socket: listener.into(), address, file: None })
            }
            Listen::Unix(path) => {
                let fail = |e| Error::io(format!("cannot listen on {}", path.display()), e);
                let (short, _directory) = shorten(path).map_err(fail)?;
                if is_stale(path, &short)? {
                    fs::remove_file(path).map_err(fail)?;
                }
                let socket = bind(&short).map_err(fail)?;
                let meta = fs::symlink_metadata(path).map_err(fail)?;
                let path = path.clone();
                let address = path.display().to_string();
                let file = SocketFile { path, identity: (meta.dev(), meta.ino()) };
                Ok(Self { socket, address, file: Some(file) })
            }
        }
    }

    /// Waits for a connection.
    pub(super) fn accept(&self) -> io::Result<OwnedFd> {
        let socket = rustix::net::accept_with(&self.socket, SocketFlags::CLOEXEC)?;
        // All of these only make it better; a host that refuses them is served all the same.
        if self.file.is_some() {
            if sockopt::set_socket_send_buffer_size_force(&socket, SEND_BUFFER).is_err() {
                sockopt::set_socket_send_buffer_size(&socket, SEND_BUFFER).ok();
            }
        } else {
            sockopt::set_tcp_nodelay(&socket, true).ok();
            sockopt::set_tcp_keepidle(&socket, ALIVE_AFTER).ok();
            sockopt::set_tcp_keepintvl(&socket, ALIVE_EACH).ok();
            sockopt::set_tcp_keepcnt(&socket, ALIVE_TRIES).ok();
            sockopt::set_socket_keepalive(&socket, true).ok();
        }
        Ok(socket)
    }

    /// Ends all waiting for connections, for ever.
    pub(super) fn close(&self) {
        if let Err(error) = rustix::net::shutdown(&self.socket, rustix::net::Shutdown::Both) {
            tracing::warn!("cannot close the listening socket {}: {error}", self.address);
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let Some(SocketFile { path, identity }) = &self.file else { return };
        // Somebody may have put another one there.
        if fs::symlink_metadata(path).is_ok_and(|meta| (meta.dev(), meta.ino()) == *identity)
            && let Err(error) = fs::remove_file(path)
        {
            tracing::warn!("cannot remove {}: {error}", path.display());
        }
    }
}

/// Returns a way to a path that is short enough for a socket, for as long as the directory is open.
fn shorten(path: &Path) -> io::Result<(PathBuf, Option<File>)> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    if path.as_os_str().len() <= PATH_LEN_MAX {
        return Ok((path.to_owned(), None));
    }
    let directory = File::open(parent)?;
    let short = PathBuf::from(format!("/proc/self/fd/{}", directory.as_raw_fd())).join(name);
    Ok((short, Some(directory)))
}

/// Tells whether a socket that nobody listens on is in the way.
fn is_stale(path: &Path, short: &Path) -> Result<bool> {
    let shown = path.display();
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(Error::io(format!("cannot look at {shown}"), error)),
        Ok(meta) if !meta.file_type().is_socket() => {
            Err(Error::exists(format!("{shown} is there already and is no socket")).hint("name another path"))
        }
        Ok(_) => match UnixStream::connect(short) {
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            _ => Err(Error::busy(format!("somebody listens on {shown}")).hint("name another path, or end that server")),
        },
    }
}

fn bind(path: &Path) -> io::Result<OwnedFd> {
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    // On Linux the file takes the mode of the socket, so it never has a wider one.
    rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(socket)
}
