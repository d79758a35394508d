//! Open files: reading, writing, seeking, punching, cutting and growing, with the meaning a Linux file gives them.
//!
//! The storage core knows disks of a size; a file grows when it is written past its end, ends where nothing was
//! written, and can be cut to nothing. That difference is made up here.
//!
//! # Rules
//! 1. A handle opened for writing holds a lease on its disk until it is released; so does a cut by name while it lasts.
//!    All handles of the mount count as one writer. A close(2) of a handle that writes is announced by the kernel before
//!    it returns, its release comes later: from the announcement on others wait for the lease.
//! 2. A write whose flags ask for O_DSYNC is flushed before it is answered. For files the kernel caches it sends an
//!    fsync as well, which then finds nothing to do; for direct and asynchronous ones it does not, so this is the only
//!    place that holds for all.
//! 3. A size only grows under `DiskFile::grow`, so of two writers past the end the later one cannot cut the other.
//! 4. While a copy is under way ([`super::copy`]) the file is as long as what was copied, whatever the disk says.
//!
//! # Why reads clip and writes grow here
//! NBD and the virtual machine have devices of a fixed size, for which a request beyond the end is an error.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use super::copy::Cloning;
use super::errno::{Answer, Errno};
use super::fixed::Fixed;
use super::names::Listing;
use super::node::{Node, Sort};
use super::state::{HOLDER, Tree};
use super::waits::Halt;
use crate::disk::{BlockDevice, Disk, Lease};
use crate::error::Kind;
use crate::snapshot::SnapshotDevice;
use crate::sync::Mutex;
use crate::units::{DISK_SIZE_MAX, DiskId};

/// What all handles of one disk share.
#[derive(Debug)]
pub struct DiskFile {
    disk: Arc<Disk>,
    growing: Mutex<()>,
    /// Handles that write past the kernel's cache.
    direct_writers: AtomicUsize,
    pub(super) cloning: Mutex<Option<Cloning>>,
    /// Set while `cloning` is `Some`: the lock is not taken for nothing on each read and write.
    pub(super) is_cloning: AtomicBool,
}

/// An open file or directory.
#[derive(Debug)]
pub enum Handle {
    /// A disk.
    Disk(DiskHandle),
    /// A snapshot.
    Snapshot(SnapshotHandle),
    /// A file that never changes.
    Fixed(Fixed),
    /// A directory and its listing, made when reading begins.
    Dir(Mutex<Arc<Listing>>),
}

/// An open disk.
#[derive(Debug)]
pub struct DiskHandle {
    pub(super) file: Arc<DiskFile>,
    lease: Option<Lease>,
    direct: bool,
    flags: i32,
}

/// An open snapshot; it is held until this goes.
#[derive(Debug)]
pub struct SnapshotHandle {
    pub(super) node: Node,
    pub(super) device: Arc<SnapshotDevice>,
}

/// How a file was opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Opened {
    /// The handle's number.
    pub handle: u64,
    /// The kernel may keep what it has cached of the file.
    pub keep_cache: bool,
    /// I/O goes past the kernel's cache: the program asked for it, or somebody else writes the disk.
    pub direct: bool,
    /// Direct writes need not wait for each other in the kernel. One that waits on purpose would keep others from opening
    /// the file, so this is not for disks that let writes wait.
    pub parallel: bool,
    /// It has a lease, so its close is of interest ([`Tree::closing`]).
    pub writes: bool,
}

impl DiskFile {
    /// Wraps a disk.
    pub(super) fn new(disk: Arc<Disk>) -> Self {
        Self {
            disk,
            growing: Mutex::new(()),
            direct_writers: AtomicUsize::new(0),
            cloning: Mutex::new(None),
            is_cloning: AtomicBool::new(false),
        }
    }

    /// Returns the disk.
    pub(super) fn disk(&self) -> &Arc<Disk> {
        &self.disk
    }

    /// Returns the length of the file.
    pub(super) fn size(&self) -> u64 {
        if self.is_cloning.load(Ordering::Acquire)
            && let Some(cloning) = self.cloning.lock().as_ref()
        {
            return cloning.upto;
        }
        self.disk.size()
    }

    /// Makes the file at least `size` long; returns the length it had.
    pub(super) fn grow(&self, size: u64) -> Result<u64, Halt> {
        if size > DISK_SIZE_MAX {
            return Err(Errno::EFBIG.into());
        }
        let old = self.disk.size();
        if size <= old {
            return Ok(old);
        }
        let _growing = self.growing.lock();
        let old = self.disk.size();
        if size > old {
            self.disk.extend(size).map_err(|error| Halt::of(&self.disk, error))?;
        }
        Ok(old)
    }

    /// Writes, growing the file if needed; returns how much of `data` lies below the largest size and was written.
    ///
    /// # Errors
    /// `Waits` when there is no room and the disk waits for it; the file is as long as before then.
    pub(super) fn write(&self, data: &[u8], offset: u64) -> Result<usize, Halt> {
        self.settle()?;
        if data.is_empty() {
            return Ok(0);
        }
        if offset >= DISK_SIZE_MAX {
            return Err(Errno::EFBIG.into());
        }
        let room = usize::try_from(DISK_SIZE_MAX - offset).unwrap_or(usize::MAX);
        let data = &data[..data.len().min(room)];
        let end = offset + data.len() as u64;
        let old = self.grow(end)?;
        if let Err(error) = self.disk.write(data, offset) {
            let _growing = self.growing.lock();
            if end > old && self.disk.size() == end {
                self.disk.resize(old, true)?;
            }
            return Err(Halt::of(&self.disk, error));
        }
        Ok(data.len())
    }

    /// Makes `[offset, offset + len)` zero, as far as the file goes.
    pub(super) fn zero(&self, offset: u64, len: u64) -> Result<(), Halt> {
        let end = offset.saturating_add(len).min(self.disk.size());
        if offset < end {
            self.disk.write_zeroes(offset, end - offset).map_err(|error| Halt::of(&self.disk, error))?;
        }
        Ok(())
    }

    /// Cuts or grows the file to `size`.
    fn truncate(self: &Arc<Self>, size: u64) -> Answer<()> {
        if size > DISK_SIZE_MAX {
            return Err(Errno::EFBIG);
        }
        self.settle()?;
        let _growing = self.growing.lock();
        let now = self.disk.size();
        // Growing does nobody harm, whoever writes.
        let _lease = if size < now { Some(self.disk.lease(HOLDER)?) } else { None };
        if size != now {
            self.disk.resize(size, size < now)?;
        }
        Ok(())
    }

    /// Checks that `[offset, offset + len)` could be written: the room of the host is compared with what is not mapped.
    fn check_room(&self, offset: u64, len: u64, free: u64) -> Answer<()> {
        let end = offset + len;
        let (mut at, mut missing) = (offset, 0);
        while at < end && missing <= free {
            let (start, stop) = match self.disk.next_data(at)? {
                Some((start, stop)) if start < end && stop > at => (start.max(at), stop.min(end)),
                _ => (end, end),
            };
            missing += start - at;
            at = stop;
        }
        if missing > free { Err(Errno::ENOSPC) } else { Ok(()) }
    }
}

/// Returns where data begins at or after `offset`.
fn seek_data(device: &dyn BlockDevice, size: u64, offset: u64) -> Answer<u64> {
    if offset >= size {
        return Err(Errno::ENXIO);
    }
    match device.next_data(offset)? {
        Some((start, _)) if start < size => Ok(start.max(offset)),
        _ => Err(Errno::ENXIO),
    }
}

/// Returns where a hole begins at or after `offset`; the end of the file counts as one.
fn seek_hole(device: &dyn BlockDevice, size: u64, offset: u64) -> Answer<u64> {
    if offset >= size {
        return Err(Errno::ENXIO);
    }
    let mut at = offset;
    while at < size {
        match device.next_data(at)? {
            Some((start, end)) if start <= at && end > at => at = end,
            _ => break,
        }
    }
    Ok(at.min(size))
}

/// Reads what there is of `[offset, offset + buf.len())` below `size()`; returns how much.
fn read_clipped(device: &dyn BlockDevice, size: &dyn Fn() -> u64, buf: &mut [u8], offset: u64) -> Answer<usize> {
    let mut last = None;
    loop {
        let now = size();
        let len = usize::try_from(now.saturating_sub(offset)).unwrap_or(usize::MAX).min(buf.len());
        if len == 0 {
            return Ok(0);
        }
        match device.read(&mut buf[..len], offset) {
            Ok(()) => return Ok(len),
            // The file was cut between the two calls: look again.
            Err(error) if error.kind() == Kind::Usage && last != Some(now) && size() != now => last = Some(now),
            Err(error) => return Err(Errno::from(error).stale()),
        }
    }
}

impl Handle {
    /// Returns the device behind a file.
    pub(super) fn device(&self) -> Answer<&dyn BlockDevice> {
        match self {
            Self::Disk(handle) => Ok(handle.file.disk.as_ref()),
            Self::Snapshot(handle) => Ok(handle.device.as_ref()),
            Self::Fixed(file) => Ok(file),
            Self::Dir(_) => Err(Errno::EISDIR),
        }
    }

    /// Returns the length of a file.
    pub(super) fn size(&self) -> u64 {
        match self {
            Self::Disk(handle) => handle.file.size(),
            Self::Snapshot(handle) => handle.device.size(),
            Self::Fixed(file) => file.size(),
            Self::Dir(_) => 0,
        }
    }

    /// Returns the disk behind a handle that may write it.
    ///
    /// # Errors
    /// EROFS for a snapshot or another file that never changes, EBADF for a handle opened for reading.
    pub(super) fn writable(&self) -> Answer<&DiskHandle> {
        match self {
            Self::Disk(handle) if handle.lease.is_some() => Ok(handle),
            Self::Disk(_) | Self::Dir(_) => Err(Errno::EBADF),
            Self::Snapshot(_) | Self::Fixed(_) => Err(Errno::EROFS),
        }
    }

    /// Called before bytes of the file are given to the kernel, which may keep them.
    pub(super) fn note_reader(&self) {
        if let Self::Disk(handle) = self {
            handle.file.disk.note_reader();
        }
    }

    /// Returns the flags a disk was opened with.
    pub(super) fn sync_always(&self) -> bool {
        matches!(self, Self::Disk(handle) if handle.flags & libc::O_DSYNC != 0)
    }

    /// Reads as far as the file goes.
    pub(super) fn read(&self, buf: &mut [u8], offset: u64) -> Answer<usize> {
        self.note_reader();
        read_clipped(self.device()?, &|| self.size(), buf, offset)
    }
}

impl DiskHandle {
    /// Returns the disk if this handle wrote past the kernel's cache.
    pub(super) fn wrote_direct(&self) -> Option<DiskId> {
        (self.direct && self.lease.is_some()).then(|| self.file.disk.id())
    }
}

impl Drop for DiskHandle {
    fn drop(&mut self) {
        self.file.direct_writers.fetch_sub(usize::from(self.wrote_direct().is_some()), Ordering::AcqRel);
        if self.lease.is_some()
            && let Err(error) = self.file.settle()
        {
            let name = self.file.disk.called();
            tracing::error!("a copy into disk {name} was left incomplete and could not be cut: {error}");
        }
    }
}

/// Tells whether open flags ask for writing.
fn writes(flags: i32) -> bool {
    flags & libc::O_ACCMODE != libc::O_RDONLY
}

impl Tree {
    /// Opens a file. A snapshot `new` from its creation opens for writing as well; what is written is refused later.
    ///
    /// # Errors
    /// EBUSY when another holder writes the disk, EROFS for writing a snapshot, ESTALE when it is gone.
    pub fn open(&self, ino: u64, flags: i32, new: bool) -> Answer<Opened> {
        let direct = flags & libc::O_DIRECT != 0;
        match self.node(ino)? {
            Node::Disk(id) => {
                let file = self.disk_file(id)?;
                let lease = if writes(flags) { Some(file.disk.lease(HOLDER)?) } else { None };
                let attr = self.attr(ino)?;
                let direct = direct || !attr.keep;
                // A cached read that competed with a direct write may have left the older bytes there. (Linux 6.18 drops
                // them after the write; other kernels are not relied on to.)
                let keep_cache = self.trust_cache(id) && file.direct_writers.load(Ordering::Acquire) == 0;
                file.direct_writers.fetch_add(usize::from(direct && lease.is_some()), Ordering::AcqRel);
                let writes = lease.is_some();
                let parallel = !file.disk.may_wait();
                let handle = self.enter(Handle::Disk(DiskHandle { file, lease, direct, flags }));
                Ok(Opened { handle, keep_cache, direct, parallel, writes })
            }
            Node::Snapshot(_) if writes(flags) && !new => Err(Errno::EROFS),
            node @ Node::Snapshot(_) => {
                let device = self.snapshot_device(node)?;
                let handle = self.enter(Handle::Snapshot(SnapshotHandle { node, device }));
                Ok(Opened { handle, keep_cache: true, direct, parallel: true, writes: false })
            }
            node => {
                if node.sort() == Sort::File && writes(flags) {
                    return Err(Errno::EROFS);
                }
                let (file, keep_cache) = self.open_fixed(node)?;
                let handle = self.enter(Handle::Fixed(file));
                Ok(Opened { handle, keep_cache, direct, parallel: true, writes: false })
            }
        }
    }

    /// Notes that one of those who share a handle closes it. Its release may follow.
    pub fn closing(&self, handle: u64) {
        if let Ok(Handle::Disk(DiskHandle { lease: Some(lease), .. })) = self.handle(handle).as_deref() {
            lease.closing();
        }
    }

    /// Reads into `buf`; returns how much there was.
    ///
    /// # Errors
    /// EIO for what cannot be read or fails its checksum.
    pub fn read(&self, handle: u64, buf: &mut [u8], offset: u64) -> Answer<usize> {
        self.handle(handle)?.read(buf, offset)
    }

    /// Writes, growing the disk if needed; `flags` are those of the file and the call (O_DSYNC).
    ///
    /// # Errors
    /// EROFS for a snapshot, EFBIG beyond the largest disk, ENOSPC; `Waits` instead if the disk waits for room.
    pub fn write(&self, handle: u64, data: &[u8], offset: u64, flags: i32) -> Result<usize, Halt> {
        let handle = self.handle(handle)?;
        let file = &handle.writable()?.file;
        let written = file.write(data, offset)?;
        if flags & libc::O_DSYNC != 0 {
            file.disk.flush()?;
        }
        Ok(written)
    }

    /// Makes everything written so far durable.
    ///
    /// # Errors
    /// EIO when it is not; the pool then refuses writes.
    pub fn sync(&self, handle: u64) -> Answer<()> {
        let handle = self.handle(handle)?;
        if let Handle::Disk(disk) = handle.as_ref() {
            disk.file.settle()?;
        }
        Ok(handle.device()?.flush()?)
    }

    /// Cuts or grows a file, by name or by handle.
    ///
    /// # Errors
    /// EROFS for a snapshot, EBUSY when another holder writes the disk, EFBIG beyond the largest disk.
    pub fn truncate(&self, ino: u64, size: u64) -> Answer<()> {
        match self.node(ino)? {
            Node::Disk(id) => self.disk_file(id)?.truncate(size),
            node if node.sort() == Sort::File => Err(Errno::EROFS),
            _ => Err(Errno::EISDIR),
        }
    }

    /// Finds data or a hole at or after `offset` (SEEK_DATA, SEEK_HOLE).
    ///
    /// # Errors
    /// ENXIO at or beyond the end, and for data when only a hole follows; EINVAL for another `whence`.
    pub fn seek(&self, handle: u64, offset: i64, whence: i32) -> Answer<u64> {
        let handle = self.handle(handle)?;
        let offset = u64::try_from(offset).map_err(|_| Errno::ENXIO)?;
        match whence {
            libc::SEEK_DATA => seek_data(handle.device()?, handle.size(), offset),
            libc::SEEK_HOLE => seek_hole(handle.device()?, handle.size(), offset),
            _ => Err(Errno::EINVAL),
        }
    }

    /// Punches, zeroes, or checks that there is room and grows (fallocate(2)). Nothing is ever reserved.
    ///
    /// # Errors
    /// ENOSPC, EFBIG, and EOPNOTSUPP for collapse, insert and unshare; `Waits` as [`Tree::write`].
    pub fn fallocate(&self, handle: u64, offset: u64, len: u64, mode: i32) -> Result<(), Halt> {
        let handle = self.handle(handle)?;
        let file = &handle.writable()?.file;
        let end = offset.checked_add(len).filter(|end| *end <= DISK_SIZE_MAX).ok_or(Errno::EFBIG)?;
        file.settle()?;
        let keep_size = mode & libc::FALLOC_FL_KEEP_SIZE != 0;
        match mode & !libc::FALLOC_FL_KEEP_SIZE {
            0 => file.check_room(offset, len, self.store.room()?.available())?,
            libc::FALLOC_FL_PUNCH_HOLE if keep_size => file.zero(offset, len)?,
            libc::FALLOC_FL_ZERO_RANGE => file.zero(offset, len)?,
            _ => return Err(Errno::EOPNOTSUPP.into()),
        }
        if !keep_size {
            file.grow(end)?;
        }
        if handle.sync_always() { Ok(file.disk.flush()?) } else { Ok(()) }
    }

    /// Opens a directory.
    ///
    /// # Errors
    /// ENOTDIR for a file, ESTALE when it is gone.
    pub fn open_dir(&self, ino: u64) -> Answer<u64> {
        if self.attr(ino)?.sort != Sort::Dir {
            return Err(Errno::ENOTDIR);
        }
        Ok(self.enter(Handle::Dir(Mutex::default())))
    }

    /// Returns the listing of an open directory: the one that reading began with, or a new one from `offset` 0.
    ///
    /// # Errors
    /// ESTALE when the directory is gone.
    pub fn listing(&self, ino: u64, handle: u64, offset: u64) -> Answer<Arc<Listing>> {
        let handle = self.handle(handle)?;
        let Handle::Dir(listing) = handle.as_ref() else { return Err(Errno::ENOTDIR) };
        if offset == 0 {
            let fresh = Arc::new(self.list(ino)?);
            *listing.lock() = Arc::clone(&fresh);
            return Ok(fresh);
        }
        Ok(Arc::clone(&listing.lock()))
    }
}
