//! Where a server listens: a socket in the file system, or a port.
//!
//! # Rules
//! 1. A socket in the file system is as [`Socket`] has it: for its owner, and in nobody's way.
//! 2. A peer on a port that has gone without a word is found out and given up.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::time::Duration;

use rustix::net::{SocketFlags, sockopt};

use crate::error::{Error, Result};
use crate::media::socket::Socket;

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
    bound: Bound,
    /// As people write it.
    pub(super) address: String,
}

#[derive(Debug)]
enum Bound {
    Unix(Socket),
    Tcp(TcpListener),
}

impl AsFd for Bound {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Unix(socket) => socket.as_fd(),
            Self::Tcp(listener) => listener.as_fd(),
        }
    }
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
                let listener = TcpListener::bind(address).map_err(|error| match error.kind() {
                    io::ErrorKind::AddrInUse => {
                        Error::busy(format!("somebody listens on {address}")).hint("name another port").because(error)
                    }
                    _ => fail(error),
                })?;
                let address = listener.local_addr().map_err(fail)?.to_string();
                Ok(Self { bound: Bound::Tcp(listener), address })
            }
            Listen::Unix(path) => {
                let socket = Socket::listen(path, BACKLOG)?;
                Ok(Self { bound: Bound::Unix(socket), address: path.display().to_string() })
            }
        }
    }

    /// Waits for a connection.
    pub(super) fn accept(&self) -> io::Result<OwnedFd> {
        let socket = rustix::net::accept_with(&self.bound, SocketFlags::CLOEXEC)?;
        // All of these only make it better; a host that refuses them is served all the same.
        if matches!(self.bound, Bound::Unix(_)) {
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

    /// Ends all waiting for connections, for ever, and removes the socket file.
    pub(super) fn close(&self) {
        if let Err(error) = rustix::net::shutdown(&self.bound, rustix::net::Shutdown::Both) {
            tracing::warn!("cannot close the listening socket {}: {error}", self.address);
        }
        if let Bound::Unix(socket) = &self.bound {
            socket.remove();
        }
    }
}
