//! Pipes between the command line and whoever does the work.

use std::io;
use std::os::fd::AsFd;

/// Asks for so much room in a pipe; ordinary users get up to 1 MiB (pipe(7)).
pub fn widen(pipe: impl AsFd, bytes: usize) -> io::Result<()> {
    rustix::pipe::fcntl_setpipe_size(pipe, bytes)?;
    Ok(())
}
