//! The descriptors that a front end sends: looked at before they are received.
//!
//! A descriptor may be of anything, also of a file whose server is the front end itself (FUSE) or somebody it has bribed
//! (NFS, 9p): reading, mapping, asking for its length, and even closing it, wait then for as long as it likes. So a message
//! is first looked at (MSG_PEEK) by a thread that has a table of its own for that ([`crate::sys::apart`]). Only a message whose
//! descriptors are all of a kind that lets nobody wait is received here; of any other the connection ends.
//!
//! # Rules
//! 1. Of a kind that is taken are eventfds, local sockets, and memory: memfd, tmpfs, hugetlbfs, and regular files of file systems of
//!    this host's own disks.
//! 2. What tells a kind asks the kernel and no file system.
//! 3. A message that is not looked at to its last descriptor is not received.
//! 4. A thread that waits for ever to close something harms nobody, but is one: with [`STUCK_MAX`] of them a disk takes no more
//!    front ends until one has ended.

use std::fs;
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};

use rustix::fs::{AtFlags, FileType, StatxFlags};
use rustix::net::{AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags};

use crate::error::lacks_descriptors;
use crate::sys::apart;

/// Threads that wait to close something, of one disk, at most.
pub(super) const STUCK_MAX: usize = 8;
/// Bytes of the head of a message: request, flags, length of what follows.
pub(super) const HEAD: usize = 12;
/// Descriptors that the kernel lets a message have at most.
const DESCRIPTORS_MAX: usize = 253;
/// The type of a FUSE file system, also one on a disk of its own (linux/magic.h).
const FUSE: u64 = 0x6573_5546;
/// File systems of local disks that have numbers of their own for devices, so that those tell nothing.
const LOCAL: [&str; 3] = ["btrfs", "zfs", "bcachefs"];

/// What a descriptor is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// An eventfd.
    Event,
    /// A socket of this host.
    Socket,
    /// Something that can be mapped.
    Memory,
}

impl Kind {
    /// Tells what a descriptor is of.
    ///
    /// # Errors
    /// What it is instead, when it is of no kind that is taken.
    pub(super) fn of(descriptor: BorrowedFd<'_>) -> Result<Self, String> {
        // Only what lies in memory of the kernel has seals, if perhaps none that are set.
        if rustix::fs::fcntl_get_seals(descriptor).is_ok() {
            return Ok(Self::Memory);
        }
        if let Ok(family) = rustix::net::sockopt::socket_domain(descriptor) {
            let local = family == AddressFamily::UNIX;
            return if local { Ok(Self::Socket) } else { Err("it is a socket to somewhere else".into()) };
        }
        let at = format!("/proc/thread-self/fd/{}", descriptor.as_raw_fd());
        let link = rustix::fs::readlink(at, Vec::new()).map_err(|e| format!("nothing can be told of it: {e}"))?;
        let link = link.to_string_lossy();
        // The path of no file begins like that.
        if link == "anon_inode:[eventfd]" {
            return Ok(Self::Event);
        }
        local_file(descriptor).map_err(|what| format!("it is {what}: {link}")).map(|()| Self::Memory)
    }

    /// Makes sure that a descriptor is of this kind.
    ///
    /// # Errors
    /// `InvalidInput` when it is not.
    pub(super) fn check(self, descriptor: &impl AsFd) -> io::Result<()> {
        let what = match Self::of(descriptor.as_fd()) {
            Ok(kind) if kind == self => return Ok(()),
            Ok(kind) => format!("of kind {kind:?}"),
            Err(what) => what,
        };
        Err(io::Error::new(io::ErrorKind::InvalidInput, format!("a descriptor must be of kind {self:?}: {what}")))
    }
}

/// Makes sure that it is a regular file of a disk of this host.
fn local_file(file: BorrowedFd<'_>) -> Result<(), &'static str> {
    let unknown = "something that tells nothing of itself";
    // As the kernel knows it; the server of a file system is not asked.
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    let told = rustix::fs::statx(file, c"", flags, StatxFlags::TYPE | StatxFlags::MNT_ID).map_err(|_| unknown)?;
    if FileType::from_raw_mode(told.stx_mode.into()) != FileType::RegularFile {
        return Err("no file, memory or event");
    }
    let of_a_disk = told.stx_dev_major != 0;
    if of_a_disk {
        // Only root can mount one that is FUSE all the same.
        let system = rustix::fs::fstatfs(file).map_err(|_| unknown)?;
        return if system.f_type.cast_unsigned() == FUSE { Err("a file of a FUSE mount") } else { Ok(()) };
    }
    let mounts =
        fs::read_to_string("/proc/thread-self/mountinfo").map_err(|error| match lacks_descriptors(&error) {
            true => "not known what, for this process has no more descriptors",
            false => unknown,
        })?;
    let named = mounts.lines().find_map(|line| {
        let (id, rest) = line.split_once(' ')?;
        let (_, system) = rest.split_once(" - ")?;
        (id.parse() == Ok(told.stx_mnt_id)).then(|| system.split(' ').next())?
    });
    if named.is_some_and(|system| LOCAL.contains(&system)) {
        return Ok(());
    }
    Err("a file of a file system that may make others wait (use a memfd, /dev/shm, hugetlbfs or a local disk)")
}

/// What has been found out about the next message.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It can be received.
    Fine,
    /// There is none, and there will be none.
    Gone,
    /// It must not be received.
    Refused(String),
    /// This process has no room for all the descriptors that it brings, which is nobody else's fault.
    Lacks,
}

/// Looks at the messages of one connection.
#[derive(Debug)]
pub(super) struct Inspector {
    asks: Sender<()>,
    verdicts: Receiver<Verdict>,
}

/// One of the threads of a disk that look at messages.
struct Counted(Arc<AtomicUsize>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Inspector {
    /// Makes one; `count` is of those that there are. It ends when this is dropped and the connection is cut.
    ///
    /// # Errors
    /// `ResourceBusy` when there are too many, any error of the host.
    pub(super) fn start(stream: &impl AsFd, count: &Arc<AtomicUsize>) -> io::Result<Self> {
        let counted = Counted(Arc::clone(count));
        if count.fetch_add(1, Ordering::AcqRel) >= STUCK_MAX {
            let what = "earlier ones have sent files that cannot be closed, for their file systems do not answer";
            return Err(io::Error::new(io::ErrorKind::ResourceBusy, what));
        }
        let (asks, asked) = mpsc::channel();
        let (tells, verdicts) = mpsc::channel();
        apart::spawn("vhost-look", stream.as_fd(), move |stream| {
            let _counted = counted;
            for () in asked {
                let (verdict, seen) = look(stream.as_fd());
                // Before they are closed, which may take for ever.
                let over = tells.send(verdict).is_err();
                drop(seen);
                if over {
                    break;
                }
            }
        })?;
        Ok(Self { asks, verdicts })
    }

    /// Waits for the next message and looks at it.
    pub(super) fn look(&self) -> Verdict {
        if self.asks.send(()).is_err() {
            return Verdict::Gone;
        }
        self.verdicts.recv().unwrap_or(Verdict::Gone)
    }
}

/// Looks at the next message; returns also what it has seen, to be closed.
fn look(stream: BorrowedFd<'_>) -> (Verdict, Vec<OwnedFd>) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let (message, seen) = loop {
        let (mut head, mut received) = ([0; HEAD], RecvAncillaryBuffer::new(&mut space));
        let flags = RecvFlags::PEEK | RecvFlags::CMSG_CLOEXEC;
        match rustix::net::recvmsg(stream, &mut [IoSliceMut::new(&mut head)], &mut received, flags) {
            Ok(message) => {
                let sent = received.drain().filter_map(|message| match message {
                    RecvAncillaryMessage::ScmRights(files) => Some(files),
                    _ => None,
                });
                break (message, sent.flatten().collect::<Vec<_>>());
            }
            Err(rustix::io::Errno::INTR) => {}
            Err(_) => return (Verdict::Gone, Vec::new()),
        }
    };
    if message.bytes == 0 {
        return (Verdict::Gone, seen);
    }
    let wrong = seen.iter().find_map(|file| Kind::of(file.as_fd()).err());
    let verdict = if message.flags.contains(ReturnFlags::CTRUNC) {
        Verdict::Lacks
    } else if let Some(what) = wrong {
        Verdict::Refused(format!("a descriptor that may make others wait: {what}"))
    } else if message.bytes < HEAD {
        // What comes with the rest of it was not looked at.
        Verdict::Refused("a message in parts".into())
    } else {
        Verdict::Fine
    };
    (verdict, seen)
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::net::UnixStream;

    use rustix::fs::MemfdFlags;
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};

    use super::*;
    use crate::vhost_blk::bell;

    #[test]
    fn kinds_are_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let memory = File::from(rustix::fs::memfd_create("a", MemfdFlags::CLOEXEC).unwrap());
        let shm = tempfile::tempfile_in("/dev/shm").unwrap();
        let event = bell::eventfd().unwrap();
        let (socket, _other) = UnixStream::pair().unwrap();
        assert_eq!(Kind::of(memory.as_fd()), Ok(Kind::Memory));
        assert_eq!(Kind::of(shm.as_fd()), Ok(Kind::Memory));
        assert_eq!(Kind::of(event.as_fd()), Ok(Kind::Event));
        assert_eq!(Kind::of(socket.as_fd()), Ok(Kind::Socket));
        Kind::Event.check(&event).unwrap();
        Kind::Event.check(&memory).unwrap_err();
        Kind::Memory.check(&event).unwrap_err();
        let (pipe, _writer) = rustix::pipe::pipe().unwrap();
        let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        // A file that is called like an event is none, and no path begins like it.
        let odd = File::options().write(true).create_new(true).open(dir.path().join("anon_inode:[eventfd]")).unwrap();
        assert_ne!(Kind::of(odd.as_fd()), Ok(Kind::Event));
        let others = [
            File::open("/dev/zero").unwrap().into(),
            File::open("/proc/self/status").unwrap().into(),
            File::open(dir.path()).unwrap().into(),
            pipe,
            tcp.into(),
            rustix::event::epoll::create(rustix::event::epoll::CreateFlags::CLOEXEC).unwrap(),
        ];
        for other in others {
            let what = Kind::of(other.as_fd()).unwrap_err();
            Kind::Memory.check(&other).expect_err(&what);
        }
    }

    fn send(stream: &UnixStream, bytes: usize, files: &[BorrowedFd<'_>]) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(files.is_empty() || control.push(SendAncillaryMessage::ScmRights(files)));
        let data = vec![0; bytes];
        rustix::net::sendmsg(stream, &[io::IoSlice::new(&data)], &mut control, SendFlags::NOSIGNAL).unwrap();
    }

    #[test]
    fn a_message_is_fine_when_all_that_it_brings_is() {
        let (event, (pipe, _writer)) = (bell::eventfd().unwrap(), rustix::pipe::pipe().unwrap());
        let (event, pipe) = (event.as_fd(), pipe.as_fd());
        for (pieces, fine) in [
            (vec![(HEAD, vec![])], true),
            (vec![(HEAD + 40, vec![event])], true),
            (vec![(3, vec![]), (HEAD - 3, vec![event])], true),
            (vec![(3, vec![]), (HEAD - 3, vec![pipe])], false),
            (vec![(HEAD - 1, vec![])], false),
            (vec![(1, vec![event]), (HEAD, vec![])], false),
            (vec![(HEAD, vec![pipe])], false),
            (vec![(HEAD, [vec![event; DESCRIPTORS_MAX - 1], vec![pipe]].concat())], false),
            (vec![(HEAD, vec![event; DESCRIPTORS_MAX])], true),
        ] {
            let (theirs, ours) = UnixStream::pair().unwrap();
            pieces.iter().for_each(|(bytes, files)| send(&theirs, *bytes, files));
            let count = Arc::default();
            let inspector = Inspector::start(&ours, &count).unwrap();
            for _ in 0..2 {
                // It takes nothing out of the stream.
                let verdict = inspector.look();
                assert_eq!(verdict == Verdict::Fine, fine, "{verdict:?} of {pieces:?}");
            }
            drop(inspector);
            ours.shutdown(std::net::Shutdown::Both).unwrap();
            while count.load(Ordering::Acquire) > 0 {
                std::thread::yield_now();
            }
        }
        let (theirs, ours) = UnixStream::pair().unwrap();
        let inspector = Inspector::start(&ours, &Arc::default()).unwrap();
        drop(theirs);
        assert_eq!(inspector.look(), Verdict::Gone);
    }

    #[test]
    fn there_are_not_too_many_of_them() {
        let (_theirs, ours) = UnixStream::pair().unwrap();
        let count = Arc::default();
        let all: Vec<_> = (0..STUCK_MAX).map(|_| Inspector::start(&ours, &count).unwrap()).collect();
        assert_eq!(Inspector::start(&ours, &count).unwrap_err().kind(), io::ErrorKind::ResourceBusy);
        drop(all);
        while count.load(Ordering::Acquire) > 0 {
            std::thread::yield_now();
        }
        Inspector::start(&ours, &count).unwrap();
    }
}
