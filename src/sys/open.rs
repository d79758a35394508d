//! Opening what a person named, whatever it is.

use std::fs::File;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};

/// Opens a file for reading, and for writing if that is wanted, without waiting: a FIFO of which nobody has the other end,
/// or a line without a carrier, is opened at once, so that the caller can look what it is. Reads and writes wait as ever.
pub fn without_waiting(path: &Path, write: bool) -> io::Result<File> {
    let file = File::options().read(true).write(write).custom_flags(libc::O_NONBLOCK).open(path)?;
    fcntl_setfl(&file, fcntl_getfl(&file)? - OFlags::NONBLOCK)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fifo_is_opened_at_once_and_read_as_ever() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("fifo");
        rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
        let file = without_waiting(&path, false).unwrap();
        assert!(!file.metadata().unwrap().is_file());
        assert!(!fcntl_getfl(&file).unwrap().contains(OFlags::NONBLOCK));
    }
}
