//! What the daemon asks of the kernel for itself as a whole.

use std::io;

use rustix::process::{Resource, Rlimit};

/// Tells the kernel that this process serves block or file system I/O (`PR_SET_IO_FLUSHER`, Linux 5.6).
///
/// Allocating memory then never waits for write-back that would in turn wait for this process. It covers the calling
/// thread and the threads it starts afterwards, so call it first. Needs `CAP_SYS_RESOURCE`.
pub fn set_io_flusher() -> io::Result<()> {
    Ok(rustix::process::configure_io_flusher_behavior(true)?)
}

/// Raises the soft limit of open files to the hard one and returns it (`u64::MAX` when there is none).
pub fn raise_open_files() -> io::Result<u64> {
    let limit = rustix::process::getrlimit(Resource::Nofile);
    if limit.current != limit.maximum {
        rustix::process::setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum })?;
    }
    Ok(limit.maximum.unwrap_or(u64::MAX))
}

/// Returns one part in `parts` of the files that this process may have open, as the limit is now.
#[must_use]
pub fn share_of_open_files(parts: usize) -> usize {
    let limit = rustix::process::getrlimit(Resource::Nofile).current;
    limit.map_or(usize::MAX, |limit| usize::try_from(limit).unwrap_or(usize::MAX)) / parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn open_files_are_raised_to_the_hard_limit() {
        let limit = raise_open_files().unwrap();
        assert!(limit > 0);
        let now = rustix::process::getrlimit(Resource::Nofile);
        assert_eq!(now.current, now.maximum);
    }

    #[test]
    fn the_flusher_state_is_set_or_refused_for_want_of_privilege() {
        match set_io_flusher() {
            Ok(()) => assert!(rustix::process::is_io_flusher().unwrap()),
            // Kernels before 5.6 do not know the option.
            Err(error) => assert!(matches!(error.raw_os_error(), Some(libc::EPERM | libc::EINVAL)), "{error}"),
        }
    }
}
