//! Where the control socket is.
//!
//! The kernel takes 107 bytes for the path of a socket and pools lie deeper than that, so a long one is reached through
//! the open directory: `/proc/self/fd/N/control.sock`.

use std::fs::File;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// File name of the socket in the pool directory.
const NAME: &str = "control.sock";

/// Longest path `sun_path` holds beside its closing zero (unix(7)).
const PATH_LEN_MAX: usize = 107;

/// A path of the socket that the kernel accepts, for as long as this lives.
#[derive(Debug)]
pub(super) struct SocketPath {
    path: PathBuf,
    #[expect(dead_code, reason = "the path leads through this descriptor")]
    directory: Option<File>,
}

impl SocketPath {
    /// Finds the way to the socket of `pool`, which must be a directory.
    pub(super) fn of(pool: &Path) -> Result<Self> {
        let path = pool.join(NAME);
        if path.as_os_str().len() <= PATH_LEN_MAX {
            return Ok(Self { path, directory: None });
        }
        let directory = File::open(pool).map_err(|e| Error::io(format!("cannot open {}", pool.display()), e))?;
        let number = std::os::fd::AsRawFd::as_raw_fd(&directory);
        Ok(Self { path: format!("/proc/self/fd/{number}/{NAME}").into(), directory: Some(directory) })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}
