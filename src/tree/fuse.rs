//! The adapter between the kernel's requests and the tree: it turns arguments, answers and errnos over, nothing more.
//!
//! # Rules
//! 1. fuser's types stay in the `fuse` files; what an operation means is decided in [`super::names`],
//!    [`super::file`] and [`super::copy`].
//! 2. A handler never panics the session: [`Mount::run`] catches it, and the reply, dropped unanswered, becomes EIO.
//! 3. Handlers run on fuser's threads and block in the core's I/O; how many there are is decided in
//!    [`super::fuse_session`]. Where the host has io_uring, reads, writes and syncs do not come here but to
//!    [`super::fuse_loop`].
//! 4. Reads go through a page-aligned buffer of the thread, so a core that opens its segments with O_DIRECT reads
//!    without another copy.
//!
//! # What the kernel is asked for
//! Direct I/O in parallel (ASYNC_DIO, and PARALLEL_DIRECT_WRITES for files opened with O_DIRECT), listings with
//! attributes, explicit invalidation. Never WRITEBACK_CACHE: a write that was answered must be in the next snapshot.
//! Extended attributes are answered with ENOSYS, which the kernel remembers: otherwise each write asks for
//! `security.capability`. A close is told of (FLUSH) only for files that are open for writing, see [`super::file`].

use std::cell::RefCell;
use std::ffi::OsStr;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{
    BsdFileFlags, CopyFileRangeFlags, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo,
    InitFlags, IoctlFlags, KernelConfig, LockOwner, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData,
    ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyIoctl, ReplyLseek, ReplyOpen, ReplyStatfs,
    ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};

use super::errno::{Answer, Errno};
use super::file::Opened;
use super::names::RenameHow;
use super::node::{FILE_NAME_MAX, Node, Sort};
use super::stale;
use super::state::{Attr, Tree};
use super::waits::{self, Ask, Asker, Halt, Waits};
use crate::units::BLOCK_SIZE;

/// How long the kernel may keep what it is told to forget when it changes.
const KEEP: Duration = Duration::from_secs(24 * 3600);
/// Bytes of a request at most (the kernel's own limit is 256 pages).
pub(super) const REQUEST_MAX: u32 = 1 << 20;
/// Requests the kernel may have under way in the background.
const BACKGROUND_MAX: u16 = 64;
const PAGE: usize = 4096;
const GENERATION: Generation = Generation(0);

thread_local! {
    static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// The file system as fuser sees it.
#[derive(Debug)]
pub(super) struct Mount {
    pub(super) tree: Arc<Tree>,
    pub(super) waits: Arc<Waits>,
    /// Marks the handler threads, see [`stale::enter_handler`].
    pub(super) number: u64,
    pub(super) queue: Arc<stale::Queue>,
}

impl Mount {
    /// Runs a handler: marks the thread, and keeps a panic from ending the session.
    fn run(&self, operation: &'static str, handler: impl FnOnce(&Tree)) {
        stale::enter_handler(self.number);
        if catch_unwind(AssertUnwindSafe(|| handler(&self.tree))).is_err() {
            tracing::error!(operation, "the operation failed on a mistake in this program; it was answered with EIO");
        }
    }

    /// Runs a handler that may have to wait on purpose.
    fn patiently<T: 'static>(
        &self,
        request: &Request,
        work: impl FnMut(&Tree, bool) -> Result<T, Halt> + Send + 'static,
        answer: impl FnOnce(Answer<T>) + Send + 'static,
    ) {
        stale::enter_handler(self.number);
        self.waits.here(asker(request), Ask { work, answer });
    }

    /// Runs a handler that may take long (a record, a lease that is about to fall) on a thread of its own, so that requests for
    /// other disks, and the `rm` that makes room, find the handler threads free.
    fn run_aside(&self, operation: &'static str, handler: impl FnOnce(&Tree) + Send + 'static) {
        let (tree, number) = (Arc::clone(&self.tree), self.number);
        let work = move || {
            stale::enter_handler(number);
            if catch_unwind(AssertUnwindSafe(|| handler(&tree))).is_err() {
                tracing::error!(operation, "the operation failed on a mistake in this program");
            }
        };
        if let Err(error) = std::thread::Builder::new().name("afterimage-wait".into()).spawn(work) {
            tracing::error!(operation, "the host has no thread for a write that may wait: {error}");
        }
    }

    fn file_attr(&self, attr: &Attr) -> FileAttr {
        let time = UNIX_EPOCH + Duration::from_secs(attr.mtime);
        FileAttr {
            ino: INodeNo(attr.ino),
            size: attr.size,
            blocks: attr.blocks,
            atime: time,
            mtime: time,
            ctime: time,
            crtime: time,
            kind: kind(attr.sort),
            perm: attr.perm,
            nlink: attr.nlink,
            uid: self.tree.owner.uid,
            gid: self.tree.owner.gid,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        }
    }

    /// Why no directory, link or special file is made or removed here.
    fn refused(&self, parent: INodeNo) -> Errno {
        match self.tree.node(parent.0) {
            Ok(node) if node.is_exported() => Errno::EROFS,
            _ => Errno::EPERM,
        }
    }

    fn entry(&self, answer: Answer<Attr>, reply: ReplyEntry) {
        match answer {
            Ok(attr) => reply.entry_with_ttls(&ttl(&attr), &name_ttl(&attr), &self.file_attr(&attr), GENERATION),
            Err(errno) => reply.error(code(errno)),
        }
    }
}

fn asker(request: &Request) -> Asker {
    Asker { unique: request.unique().0, thread: request.pid() }
}

fn kind(sort: Sort) -> FileType {
    match sort {
        Sort::Dir => FileType::Directory,
        Sort::File => FileType::RegularFile,
        Sort::Link => FileType::Symlink,
    }
}

fn ttl(attr: &Attr) -> Duration {
    if attr.keep { KEEP } else { Duration::ZERO }
}

/// How long a name may be kept. Some come, go and change with the file of another directory, and the handler that changes
/// that one cannot wait until the kernel has forgotten this name: so it is asked for each time.
fn name_ttl(attr: &Attr) -> Duration {
    match Node::from_ino(attr.ino) {
        Some(Node::Root | Node::Disks | Node::Snapshots | Node::Retired | Node::Exports | Node::Checkpoints) => KEEP,
        Some(Node::Disk(_) | Node::Extent { .. } | Node::Untouched { .. } | Node::Member { .. }) => KEEP,
        _ => Duration::ZERO,
    }
}

fn code(errno: Errno) -> fuser::Errno {
    fuser::Errno::from_i32(errno.0)
}

fn empty(answer: Answer<()>, reply: ReplyEmpty) {
    match answer {
        Ok(()) => reply.ok(),
        Err(errno) => reply.error(code(errno)),
    }
}

fn written(answer: Answer<u64>, reply: ReplyWrite) {
    match answer {
        Ok(length) => reply.written(u32::try_from(length).expect("no request is longer")),
        Err(errno) => reply.error(code(errno)),
    }
}

fn open_flags(opened: &Opened) -> FopenFlags {
    let cache = if opened.direct {
        let parallel = if opened.parallel { FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES } else { FopenFlags::empty() };
        FopenFlags::FOPEN_DIRECT_IO | parallel
    } else if opened.keep_cache {
        FopenFlags::FOPEN_KEEP_CACHE
    } else {
        FopenFlags::empty()
    };
    if opened.writes { cache } else { cache | FopenFlags::FOPEN_NOFLUSH }
}

/// Gives `read` a page-aligned buffer of `size` bytes, this thread's own.
fn with_buffer<T>(size: usize, read: impl FnOnce(&mut [u8]) -> T) -> T {
    BUFFER.with_borrow_mut(|buffer| {
        if buffer.len() < size + PAGE {
            buffer.resize(size + PAGE, 0);
        }
        let start = buffer.as_ptr().align_offset(PAGE).min(PAGE);
        read(&mut buffer[start..start + size])
    })
}

impl Filesystem for Mount {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        let wanted = InitFlags::FUSE_ASYNC_DIO
            | InitFlags::FUSE_PARALLEL_DIROPS
            | InitFlags::FUSE_EXPLICIT_INVAL_DATA
            | InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP
            | InitFlags::FUSE_DO_READDIRPLUS
            | InitFlags::FUSE_READDIRPLUS_AUTO;
        for flag in wanted.iter() {
            if config.add_capabilities(flag).is_err() {
                tracing::info!("this kernel does not offer {flag:?}");
            }
        }
        if let Err(limit) = config.set_max_write(REQUEST_MAX) {
            tracing::info!("requests are limited to {limit} bytes");
        }
        if let Err(limit) = config.set_max_background(BACKGROUND_MAX) {
            tracing::info!("background requests are limited to {limit}");
        }
        Ok(())
    }

    fn destroy(&mut self) {
        self.queue.close();
        self.tree.release_all();
    }

    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        self.run("lookup", |tree| self.entry(tree.lookup(parent.0, name), reply));
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        self.run("getattr", |tree| match tree.attr(ino.0) {
            Ok(attr) => reply.attr(&ttl(&attr), &self.file_attr(&attr)),
            Err(errno) => reply.error(code(errno)),
        });
    }

    fn setattr(
        &self,
        _: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        _atime: Option<TimeOrNow>,
        _mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        self.run("setattr", |tree| match tree.set_attr(ino.0, mode, uid, gid, size) {
            Ok(attr) => reply.attr(&ttl(&attr), &self.file_attr(&attr)),
            Err(errno) => reply.error(code(errno)),
        });
    }

    fn mknod(&self, _: &Request, parent: INodeNo, name: &OsStr, mode: u32, _: u32, _: u32, reply: ReplyEntry) {
        self.run("mknod", |tree| {
            let regular = matches!(mode & libc::S_IFMT, 0 | libc::S_IFREG);
            let made = if regular { tree.create(parent.0, name, true) } else { Err(Errno::EPERM) };
            self.entry(made.map(|made| made.attr), reply);
        });
    }

    fn mkdir(&self, _: &Request, parent: INodeNo, _: &OsStr, _: u32, _: u32, reply: ReplyEntry) {
        reply.error(code(self.refused(parent)));
    }

    fn rmdir(&self, _: &Request, parent: INodeNo, _: &OsStr, reply: ReplyEmpty) {
        reply.error(code(self.refused(parent)));
    }

    fn symlink(&self, _: &Request, parent: INodeNo, _: &OsStr, _: &Path, reply: ReplyEntry) {
        reply.error(code(self.refused(parent)));
    }

    fn link(&self, _: &Request, _: INodeNo, parent: INodeNo, _: &OsStr, reply: ReplyEntry) {
        reply.error(code(self.refused(parent)));
    }

    fn readlink(&self, _: &Request, ino: INodeNo, reply: ReplyData) {
        self.run("readlink", |tree| match tree.read_link(ino.0) {
            Ok(target) => reply.data(target.as_bytes()),
            Err(errno) => reply.error(code(errno)),
        });
    }

    fn unlink(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        if self.tree.unlink_may_wait(parent.0, name) {
            let name = name.to_owned();
            return self.run_aside("unlink", move |tree| empty(tree.unlink(parent.0, &name), reply));
        }
        self.run("unlink", |tree| empty(tree.unlink(parent.0, name), reply));
    }

    fn rename(
        &self,
        _: &Request,
        parent: INodeNo,
        name: &OsStr,
        newparent: INodeNo,
        newname: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        self.run("rename", |tree| {
            let how = RenameHow { exotic: !(flags - RenameFlags::RENAME_NOREPLACE).is_empty() };
            empty(tree.rename((parent.0, name), (newparent.0, newname), how), reply);
        });
    }

    fn open(&self, _: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let open = move |tree: &Tree| match tree.open(ino.0, flags.0, false) {
            Ok(opened) => reply.opened(FileHandle(opened.handle), open_flags(&opened)),
            Err(errno) => reply.error(code(errno)),
        };
        if self.tree.open_may_wait(ino.0) { self.run_aside("open", open) } else { self.run("open", open) }
    }

    fn create(&self, _: &Request, parent: INodeNo, name: &OsStr, _: u32, _: u32, flags: i32, reply: ReplyCreate) {
        self.run("create", |tree| {
            let made = tree.create(parent.0, name, flags & libc::O_EXCL != 0);
            let opened = made.and_then(|made| Ok((made, tree.open(made.attr.ino, flags, made.new)?)));
            match opened {
                Ok((made, opened)) => {
                    let (ttl, attr) = (ttl(&made.attr), self.file_attr(&made.attr));
                    reply.created(&ttl, &attr, GENERATION, FileHandle(opened.handle), open_flags(&opened));
                }
                Err(errno) => reply.error(code(errno)),
            }
        });
    }

    fn read(
        &self,
        request: &Request,
        _: INodeNo,
        handle: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let size = size.min(REQUEST_MAX) as usize;
        if let Some(need) = self.tree.take_turn(handle.0, size as u64) {
            let work = move |tree: &Tree, _| {
                let mut data = vec![0; size];
                let len = tree.read(handle.0, &mut data, offset)?;
                data.truncate(len);
                Ok(data)
            };
            let answer = move |answer: Answer<Vec<u8>>| match answer {
                Ok(data) => reply.data(&data),
                Err(errno) => reply.error(code(errno)),
            };
            return self.waits.after(asker(request), need, Ask { work, answer });
        }
        self.run("read", |tree| {
            with_buffer(size, |buffer| match tree.read(handle.0, buffer, offset) {
                Ok(length) => reply.data(&buffer[..length]),
                Err(errno) => reply.error(code(errno)),
            });
        });
    }

    fn write(
        &self,
        request: &Request,
        _: INodeNo,
        handle: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        flags: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let need = match self.tree.take_turn(handle.0, data.len() as u64) {
            Some(need) => need,
            None => {
                stale::enter_handler(self.number);
                let attempt = || self.tree.write(handle.0, data, offset, flags.0);
                match waits::guarded(attempt) {
                    Err(Halt::Waits(disk, need)) => (disk, need),
                    Err(Halt::Failed(errno)) => return written(Err(errno), reply),
                    Ok(length) => return written(Ok(length as u64), reply),
                }
            }
        };
        let data = data.to_vec();
        let work = move |tree: &Tree, _| tree.write(handle.0, &data, offset, flags.0).map(|length| length as u64);
        self.waits.after(asker(request), need, Ask { work, answer: |answer| written(answer, reply) });
    }

    fn flush(&self, _: &Request, _: INodeNo, handle: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        self.run("flush", |tree| {
            tree.closing(handle.0);
            reply.ok();
        });
    }

    fn fsync(&self, _: &Request, ino: INodeNo, handle: FileHandle, _: bool, reply: ReplyEmpty) {
        tracing::trace!(%ino, "fsync");
        self.run("fsync", |tree| empty(tree.sync(handle.0), reply));
    }

    fn release(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        _: OpenFlags,
        _: Option<LockOwner>,
        _: bool,
        reply: ReplyEmpty,
    ) {
        self.run("release", |tree| {
            tree.release(handle.0);
            reply.ok();
        });
    }

    fn opendir(&self, _: &Request, ino: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        self.run("opendir", |tree| match tree.open_dir(ino.0) {
            Ok(handle) => reply.opened(FileHandle(handle), FopenFlags::empty()),
            Err(errno) => reply.error(code(errno)),
        });
    }

    fn readdir(&self, _: &Request, ino: INodeNo, handle: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        self.run("readdir", |tree| match tree.listing(ino.0, handle.0, offset) {
            Ok(listing) => {
                let outcome = tree.each_entry(&listing, from(offset), |next, entry| {
                    reply.add(INodeNo(entry.node.ino()), next, kind(entry.node.sort()), &entry.name)
                });
                match outcome {
                    Ok(()) => reply.ok(),
                    Err(errno) => reply.error(code(errno)),
                }
            }
            Err(errno) => reply.error(code(errno)),
        });
    }

    fn readdirplus(&self, _: &Request, ino: INodeNo, handle: FileHandle, offset: u64, mut reply: ReplyDirectoryPlus) {
        self.run("readdirplus", |tree| match tree.listing(ino.0, handle.0, offset) {
            Ok(listing) => {
                let outcome = tree.each_entry(&listing, from(offset), |next, entry| {
                    // Asked anew: the listing may be older than a change the kernel was told of.
                    let Some(attr) = tree.listed(&listing, entry) else { return false };
                    let ttl = ttl(&attr).min(name_ttl(&attr));
                    reply.add(INodeNo(attr.ino), next, &entry.name, &ttl, &self.file_attr(&attr), GENERATION)
                });
                match outcome {
                    Ok(()) => reply.ok(),
                    Err(errno) => reply.error(code(errno)),
                }
            }
            Err(errno) => reply.error(code(errno)),
        });
    }

    fn releasedir(&self, _: &Request, _: INodeNo, handle: FileHandle, _: OpenFlags, reply: ReplyEmpty) {
        self.run("releasedir", |tree| {
            tree.release(handle.0);
            reply.ok();
        });
    }

    fn fsyncdir(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        // Names are durable when the operation that made them is answered.
        reply.ok();
    }

    fn statfs(&self, _: &Request, _: INodeNo, reply: ReplyStatfs) {
        self.run("statfs", |tree| match tree.room() {
            // What is kept for deleting and metadata counts as free, and nobody can write there: as what ext4 keeps for root.
            Ok(room) => {
                let blocks = |bytes: u64| bytes / BLOCK_SIZE;
                let (total, free, available) = (blocks(room.total), blocks(room.free), blocks(room.available()));
                reply.statfs(total, free, available, 0, 0, 4096, FILE_NAME_MAX, 4096);
            }
            Err(errno) => reply.error(code(errno)),
        });
    }

    fn setxattr(&self, _: &Request, _: INodeNo, _: &OsStr, _: &[u8], _: i32, _: u32, reply: ReplyEmpty) {
        reply.error(code(Errno::ENOSYS));
    }

    fn getxattr(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, reply: ReplyXattr) {
        reply.error(code(Errno::ENOSYS));
    }

    fn listxattr(&self, _: &Request, _: INodeNo, _: u32, reply: ReplyXattr) {
        reply.error(code(Errno::ENOSYS));
    }

    fn removexattr(&self, _: &Request, _: INodeNo, _: &OsStr, reply: ReplyEmpty) {
        reply.error(code(Errno::ENOSYS));
    }

    fn fallocate(
        &self,
        request: &Request,
        _: INodeNo,
        handle: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let work = move |tree: &Tree, _| tree.fallocate(handle.0, offset, length, mode);
        self.patiently(request, work, |answer| empty(answer, reply));
    }

    fn lseek(&self, _: &Request, _: INodeNo, handle: FileHandle, offset: i64, whence: i32, reply: ReplyLseek) {
        self.run("lseek", |tree| match tree.seek(handle.0, offset, whence) {
            Ok(offset) => reply.offset(i64::try_from(offset).expect("disks end at 64 TiB")),
            Err(errno) => reply.error(code(errno)),
        });
    }

    fn copy_file_range(
        &self,
        request: &Request,
        _: INodeNo,
        source: FileHandle,
        offset: u64,
        _: INodeNo,
        target: FileHandle,
        target_offset: u64,
        length: u64,
        _: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        let work =
            move |tree: &Tree, had_turn| tree.copy((source.0, offset), (target.0, target_offset), length, had_turn);
        self.patiently(request, work, |answer| written(answer, reply));
    }

    fn ioctl(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        _: IoctlFlags,
        _: u32,
        _: &[u8],
        _: u32,
        reply: ReplyIoctl,
    ) {
        reply.error(fuser::Errno::ENOTTY);
    }
}

/// Returns where a listing goes on.
fn from(offset: u64) -> usize {
    usize::try_from(offset).unwrap_or(usize::MAX)
}

/// Tells the kernel to forget something.
pub(super) fn tell(notifier: &fuser::Notifier, stale: &stale::Stale) -> io::Result<()> {
    match stale {
        stale::Stale::Entry { parent, name } => notifier.inval_entry(INodeNo(*parent), OsStr::new(name)),
        stale::Stale::Attr(ino) => notifier.inval_inode(INodeNo(*ino), -1, 0),
        stale::Stale::Data(ino) => notifier.inval_inode(INodeNo(*ino), 0, 0),
    }
}
