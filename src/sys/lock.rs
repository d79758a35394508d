//! One owner per file or directory, held by the kernel.
//!
//! # Rules
//! 1. The lock belongs to the open file description: closing its last descriptor releases it, and so does the death of
//!    the process. There is nothing to clean up after a crash.
//! 2. It is advisory: it stops a second program that asks, not one that does not.

use std::io;
use std::os::fd::AsFd;

use rustix::fs::FlockOperation;
use rustix::io::Errno;

/// Takes the exclusive lock of an open file or directory without waiting; `false` when somebody else holds it.
pub fn try_exclusive(file: impl AsFd) -> io::Result<bool> {
    try_lock(file, FlockOperation::NonBlockingLockExclusive)
}

/// Takes the lock of an open file together with all others who do so; `false` when somebody has it exclusively.
pub fn try_shared(file: impl AsFd) -> io::Result<bool> {
    try_lock(file, FlockOperation::NonBlockingLockShared)
}

fn try_lock(file: impl AsFd, operation: FlockOperation) -> io::Result<bool> {
    match rustix::fs::flock(file, operation) {
        Ok(()) => Ok(true),
        Err(Errno::WOULDBLOCK) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_description_is_refused_until_the_first_closes() {
        let dir = tempfile::tempdir().unwrap();
        let first = std::fs::File::open(dir.path()).unwrap();
        let second = std::fs::File::open(dir.path()).unwrap();
        assert!(try_exclusive(&first).unwrap());
        assert!(try_exclusive(&first).unwrap(), "taking it again is harmless");
        assert!(!try_exclusive(&second).unwrap());
        assert!(!try_shared(&second).unwrap());
        drop(first);
        assert!(try_exclusive(&second).unwrap());
        assert!(try_shared(&second).unwrap(), "it gives the exclusive lock up");
        let third = std::fs::File::open(dir.path()).unwrap();
        assert!(try_shared(&third).unwrap() && !try_exclusive(&third).unwrap());
    }
}
