//! Host files under one directory, reached through a descriptor of it.
//!
//! # Rules
//! 1. Every name is resolved from the descriptor of the root (`openat` and friends). A later `chdir`, or somebody who
//!    renames the pool directory, changes nothing for a running program.
//! 2. A symbolic link is never followed in the last component of a path: nothing here makes one.
//! 3. Files are 0600, directories 0700: they hold the contents of disks.
//! 4. One `write_at` is one `pwrite`, unless the kernel cuts it short; there is no buffering of our own.
//!
//! # After a crash
//! What `sync` and `sync_dir` promised is there (fdatasync, fsync of the directory); the rest is up to the host.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{AtFlags, FileType, Mode, OFlags};

use super::direct::{self, Direct};
use super::{File, Media, Open, Space};
use crate::sys::{cow, hole, lock};

/// Bytes of one request to read ahead.
const READ_AHEAD: usize = 2 << 20;
const FILE_MODE: Mode = Mode::RUSR.union(Mode::WUSR);
const DIR_MODE: Mode = Mode::RWXU;
const DIR_FLAGS: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);

/// The host file system below a directory. Clones share the descriptor of the directory.
///
/// It lends that descriptor ([`AsFd`]) so that the pool can be locked by locking its directory.
#[derive(Debug, Clone)]
pub struct HostMedia {
    root: Arc<Path>,
    dir: Arc<OwnedFd>,
}

impl HostMedia {
    /// Opens the directory, which must exist; it may itself be reached through symbolic links.
    pub fn new(root: &Path) -> io::Result<Self> {
        let dir = rustix::fs::open(root, DIR_FLAGS, Mode::empty())?;
        Ok(Self { root: root.into(), dir: Arc::new(dir) })
    }

    /// Returns the path that was opened, for messages. It may have been renamed since.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    fn open_dir(&self, path: &str) -> io::Result<OwnedFd> {
        let name = if path.is_empty() { "." } else { super::checked(path)? };
        Ok(rustix::fs::openat(&self.dir, name, DIR_FLAGS | OFlags::NOFOLLOW, Mode::empty())?)
    }
}

impl AsFd for HostMedia {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.dir.as_fd()
    }
}

impl HostMedia {
    fn open_file(&self, path: &str, how: Open) -> io::Result<HostFile> {
        let access = match how {
            Open::Existing => OFlags::RDWR,
            Open::New => OFlags::RDWR | OFlags::CREATE | OFlags::EXCL,
            // A pipe in our place would be waited for until somebody writes into it.
            Open::ReadOnly | Open::ReadCached => OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY,
        };
        let flags = access | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = rustix::fs::openat(&self.dir, super::checked(path)?, flags, FILE_MODE)?;
        // A directory opens for reading and a device in our place would lie about sparseness.
        match FileType::from_raw_mode(rustix::fs::fstat(&file)?.st_mode) {
            FileType::RegularFile => {}
            FileType::Directory => return Err(io::Error::from_raw_os_error(libc::EISDIR)),
            _ => return Err(io::Error::from_raw_os_error(libc::EINVAL)),
        }
        if access.contains(OFlags::NONBLOCK) {
            // Reads of it through a ring would else be refused where they have to wait.
            rustix::fs::fcntl_setfl(&file, OFlags::empty())?;
        }
        // Clean pages may be ones whose write-back failed: what is read from here on comes from the disk.
        if how != Open::ReadCached {
            rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?;
        }
        Ok(HostFile { file: file.into(), direct: None })
    }
}

impl Media for HostMedia {
    fn open(&self, path: &str, how: Open) -> io::Result<Arc<dyn File>> {
        Ok(Arc::new(self.open_file(path, how)?))
    }

    fn open_direct(&self, path: &str, how: Open) -> io::Result<Arc<dyn File>> {
        let mut file = self.open_file(path, how)?;
        let access = if how.writes() { OFlags::RDWR } else { OFlags::RDONLY };
        let flags = access | OFlags::DIRECT | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        match rustix::fs::openat(&self.dir, super::checked(path)?, flags, Mode::empty()) {
            Ok(direct) => file.direct = Some(Direct::new(direct.into())),
            // The file system has no direct I/O: the page cache serves as well, if more slowly.
            Err(rustix::io::Errno::INVAL) => {}
            Err(error) => return Err(error.into()),
        }
        Ok(Arc::new(file))
    }

    fn make_dir(&self, path: &str) -> io::Result<()> {
        Ok(rustix::fs::mkdirat(&self.dir, super::checked(path)?, DIR_MODE)?)
    }

    fn remove(&self, path: &str) -> io::Result<()> {
        Ok(rustix::fs::unlinkat(&self.dir, super::checked(path)?, AtFlags::empty())?)
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        Ok(rustix::fs::renameat(&self.dir, super::checked(from)?, &self.dir, super::checked(to)?)?)
    }

    fn list(&self, path: &str) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in rustix::fs::Dir::new(self.open_dir(path)?)? {
            // A name that is not UTF-8 is none of ours; it shows, mangled, so that it is not silently there.
            let name = entry?.file_name().to_string_lossy().into_owned();
            if name != "." && name != ".." {
                names.push(name);
            }
        }
        names.sort_unstable();
        Ok(names)
    }

    fn sync_dir(&self, path: &str) -> io::Result<()> {
        Ok(rustix::fs::fsync(self.open_dir(path)?)?)
    }

    fn space(&self) -> io::Result<Space> {
        let stat = rustix::fs::fstatvfs(&self.dir)?;
        Ok(Space { free: stat.f_bavail * stat.f_frsize, total: stat.f_blocks * stat.f_frsize })
    }

    fn boot(&self) -> io::Result<u128> {
        let text = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
        let id = u128::from_str_radix(&text.trim().replace('-', ""), 16);
        id.map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))
    }
}

#[derive(Debug)]
struct HostFile {
    file: fs::File,
    /// The same file, opened for direct I/O.
    direct: Option<Direct>,
}

/// Reads until the buffer is full or the file ends; returns how many bytes there were.
pub(super) fn read_up_to_end(file: &fs::File, buf: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut done = 0;
    while done < buf.len() {
        match file.read_at(&mut buf[done..], offset + done as u64) {
            Ok(0) => break,
            Ok(got) => done += got,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}

impl File for HostFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        if let Some(direct) = &self.direct {
            return direct.read_at(buf, offset);
        }
        read_up_to_end(&self.file, buf, offset)
    }

    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        match &self.direct {
            Some(direct) if direct::aligned(offset, data.len()) => direct.write_at(data, offset),
            _ => self.file.write_all_at(data, offset),
        }
    }

    fn write_cached_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        self.file.write_all_at(data, offset)
    }

    fn will_be_overwritten(&self) {
        // Best effort: without it all is as correct, and slower on some hosts.
        if let Err(error) = cow::write_in_place(&self.file) {
            tracing::debug!("a file could not be marked as written in place: {error}");
        }
    }

    fn will_be_read(&self, len: u64) {
        // A piece at a time: the kernel cuts what it reads ahead at the size of the device's queue, or at 2 MiB.
        for at in (0..len.min(self.len().unwrap_or(0))).step_by(READ_AHEAD) {
            let piece = std::num::NonZeroU64::new(READ_AHEAD as u64);
            if rustix::fs::fadvise(&self.file, at, piece, rustix::fs::Advice::WillNeed).is_err() {
                return;
            }
        }
    }

    fn direct(&self) -> Option<Arc<fs::File>> {
        self.direct.as_ref().map(Direct::file)
    }

    fn sync(&self) -> io::Result<()> {
        // Never retried: after a failed fdatasync Linux marks the pages clean and a second one would lie.
        Ok(rustix::fs::fdatasync(&self.file)?)
    }

    fn len(&self) -> io::Result<u64> {
        let size = rustix::fs::fstat(&self.file)?.st_size;
        Ok(u64::try_from(size).expect("the kernel keeps no negative lengths"))
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.file.set_len(len)
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        if len == 0 {
            return Ok(());
        }
        hole::punch_hole(&self.file, offset, len)
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<(u64, u64)>> {
        hole::next_data(&self.file, offset)
    }

    fn allocated(&self) -> io::Result<u64> {
        hole::allocated(&self.file)
    }

    fn modified(&self) -> io::Result<Option<u64>> {
        Ok(u64::try_from(rustix::fs::fstat(&self.file)?.st_mtime).ok())
    }

    fn identity(&self) -> io::Result<Option<(u64, u64)>> {
        let stat = rustix::fs::fstat(&self.file)?;
        Ok(Some((stat.st_dev, stat.st_ino)))
    }

    fn try_lock(&self) -> io::Result<bool> {
        lock::try_exclusive(&self.file)
    }

    fn try_lock_shared(&self) -> io::Result<bool> {
        lock::try_shared(&self.file)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    #[test]
    fn the_root_may_move_and_modes_are_private() {
        let outer = tempfile::tempdir().unwrap();
        let (old, new) = (outer.path().join("old"), outer.path().join("new"));
        fs::create_dir(&old).unwrap();
        let media = HostMedia::new(&old).unwrap();
        HostMedia::new(outer.path()).unwrap().rename("old", "new").unwrap();
        media.make_dir("d").unwrap();
        media.open("d/f", Open::New).unwrap().write_at(b"abc", 0).unwrap();
        let mode = |path: &str| fs::metadata(new.join(path)).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode("d"), mode("d/f")), (0o700, 0o600));
        assert_eq!(media.root(), old);
    }

    #[test]
    fn links_are_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let media = HostMedia::new(dir.path()).unwrap();
        symlink("/etc/hostname", dir.path().join("link")).unwrap();
        let error = media.open("link", Open::ReadOnly).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ELOOP));
    }

    #[test]
    fn the_directory_can_be_locked() {
        let dir = tempfile::tempdir().unwrap();
        let (one, two) = (HostMedia::new(dir.path()).unwrap(), HostMedia::new(dir.path()).unwrap());
        assert!(lock::try_exclusive(&one).unwrap());
        assert!(!lock::try_exclusive(&two).unwrap());
    }
}
