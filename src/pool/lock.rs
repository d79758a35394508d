//! The lock that keeps a second writer out of a pool.
//!
//! An flock on `POOL/lock`, so the kernel lets go of it whatever way the holder ends; the pid inside is for people.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustix::fs::{FlockOperation, flock};

use crate::error::{Error, Result};

/// Holds the pool; dropping it lets the next one in.
#[derive(Debug)]
pub struct PoolLock {
    _file: File,
}

impl PoolLock {
    /// Takes the lock without waiting.
    ///
    /// # Errors
    /// `Busy` with the pid of the holder; any error of the host otherwise.
    pub fn take(pool: &Path) -> Result<Self> {
        let path = pool.join("lock");
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(|e| Error::io(format!("cannot open {}", path.display()), e))?;
        if let Err(errno) = flock(&file, FlockOperation::NonBlockingLockExclusive) {
            if errno != rustix::io::Errno::WOULDBLOCK {
                return Err(Error::io(format!("cannot lock {}", path.display()), errno.into()));
            }
            let mut pid = String::new();
            let known = file.read_to_string(&mut pid).is_ok() && pid.trim().parse::<u32>().is_ok();
            let holder = if known { format!("process {}", pid.trim()) } else { "another process".into() };
            return Err(Error::busy(format!("the pool {} is in use by {holder}", pool.display()))
                .hint("wait for it to end, or talk to it through the same command while it serves the pool"));
        }
        let line = format!("{}\n", std::process::id());
        // Over what is there, and only then cut: on a full file system a block given up might not come back.
        let wrote =
            file.rewind().and_then(|()| file.write_all(line.as_bytes())).and_then(|()| file.set_len(line.len() as u64));
        match wrote {
            Ok(()) => {}
            // The lock is what counts. Better no number than that of somebody else.
            Err(error) if error.kind() == std::io::ErrorKind::StorageFull => {
                file.set_len(0).map_err(|e| Error::io(format!("cannot write {}", path.display()), e))?;
            }
            Err(error) => return Err(Error::io(format!("cannot write {}", path.display()), error)),
        }
        Ok(Self { _file: file })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;

    #[test]
    fn a_second_holder_is_told_the_first() {
        let dir = tempfile::tempdir().unwrap();
        let first = PoolLock::take(dir.path()).unwrap();
        let error = PoolLock::take(dir.path()).unwrap_err();
        assert_eq!(error.kind(), Kind::Busy);
        assert!(error.message().contains(&std::process::id().to_string()), "{error}");
        drop(first);
        PoolLock::take(dir.path()).unwrap();
    }
}
