//! userfaultfd(2): who touches a page of guest memory that is missing, or writes one that is protected, waits until we say so.
//!
//! # Rules
//! 1. Every call names a [`GuestRegion`] and a range inside it, so no memory but that of guests is ever filled, protected or taken.
//!    Guest memory is only reached by volatile accesses and system calls: bytes that appear or change there surprise nobody. One that
//!    another process has sent acts on the memory of that process, and takes regions of it alone.
//! 2. Faults of the kernel count as well (KVM's, and those of system calls with a pointer into guest memory): the descriptor is
//!    never made for user mode only.
//! 3. `EAGAIN` from a call that changes memory means that a message about removed memory waits to be read. Who reads messages must
//!    not wait for such a call; all others try again.
//! 4. A call that copied a part says how much: [`Copied`].
//!
//! # Why not a crate
//! `userfaultfd` makes its bindings with libclang at build time and knows neither protected copies nor poison.

#![expect(unsafe_code, reason = "ioctls that take addresses")]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::fs::{Mode, OFlags};

use super::guest::GuestRegion;

const API: u64 = 0xaa;
const NEW: u32 = 0xaa00;
const UFFDIO_API: u32 = number(BOTH, 0x3f, 24);
const REGISTER: u32 = number(BOTH, 0x00, 32);
const UNREGISTER: u32 = number(OUT, 0x01, 16);
const WAKE: u32 = number(OUT, 0x02, 16);
const COPY: u32 = number(BOTH, 0x03, 40);
const WRITE_PROTECT: u32 = number(BOTH, 0x06, 24);
const POISON: u32 = number(BOTH, 0x08, 32);

/// What the threads that save and restore memory ask of the kernel beside reading and writing, for those who filter system calls.
pub const IOCTLS: [u32; 6] = [REGISTER, UNREGISTER, WAKE, COPY, WRITE_PROTECT, POISON];

const OUT: u32 = 2;
const BOTH: u32 = 3;

/// Returns the number of an `ioctl` of userfaultfd (include/uapi/linux/userfaultfd.h).
const fn number(direction: u32, number: u32, size: u32) -> u32 {
    direction << 30 | size << 16 | 0xaa << 8 | number
}

const FEATURE_WP: u64 = 1;
const FEATURE_EVENT_REMOVE: u64 = 1 << 3;
const FEATURE_MISSING_SHMEM: u64 = 1 << 5;
const FEATURE_WP_SHMEM: u64 = 1 << 12;
const FEATURE_POISON: u64 = 1 << 14;

/// What the kernel must have, with the words for people.
const NEEDED: [(u64, &str); 4] = [
    (FEATURE_WP, "write protection"),
    (FEATURE_EVENT_REMOVE, "messages about removed memory"),
    (FEATURE_MISSING_SHMEM, "missing pages of shared memory"),
    (FEATURE_WP_SHMEM, "write protection of shared memory, which Linux has since 5.19"),
];

const EVENT_PAGEFAULT: u64 = 0x12;
const EVENT_REMOVE: u64 = 0x15;
const FLAG_WP: u64 = 1 << 1;
const MODE_MISSING: u64 = 1;
const MODE_WP: u64 = 1 << 1;
const COPY_DONTWAKE: u64 = 1;
const COPY_WP: u64 = 1 << 1;

/// Bytes of a message.
const MESSAGE: usize = 32;

#[repr(C)]
struct ApiArgument {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct RangeArgument {
    start: u64,
    len: u64,
}

#[repr(C)]
struct RegisterArgument {
    range: RangeArgument,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct CopyArgument {
    to: u64,
    from: u64,
    len: u64,
    mode: u64,
    copied: i64,
}

#[repr(C)]
struct WriteProtectArgument {
    range: RangeArgument,
    mode: u64,
}

#[repr(C)]
struct PoisonArgument {
    range: RangeArgument,
    mode: u64,
    updated: i64,
}

/// What is told of memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Message {
    /// Somebody waits for a page that is missing; an address in this process.
    Missing(u64),
    /// Somebody waits to write a page that is protected; an address in this process.
    Protected(u64),
    /// Somebody waits to take memory away, and goes on now that this is read; addresses in this process.
    Removed(u64, u64),
    /// Something that was not asked for.
    Other(u8),
}

/// What a fault is to be raised for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Watched {
    /// A page that is missing is touched.
    pub missing: bool,
    /// A page that is protected is written.
    pub protected: bool,
}

/// How bytes are put into missing pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct How {
    /// Who waits for them goes on.
    pub wake: bool,
    /// The pages are protected from the beginning.
    pub protect: bool,
}

/// How far a copy came.
#[derive(Debug)]
pub struct Copied {
    /// Bytes that are in place, whole pages from the beginning.
    pub bytes: usize,
    /// Why not all: `AlreadyExists` when the next page is there, `WouldBlock` for a message that waits, `NotFound` for memory that is gone.
    pub stopped: Option<io::Error>,
}

/// Room for messages, so that reading them allocates nothing.
#[derive(Debug)]
pub struct Messages {
    bytes: Box<[u8]>,
    filled: usize,
}

impl Messages {
    /// Makes room for so many at a time.
    #[must_use]
    pub fn new(most: usize) -> Self {
        Self { bytes: vec![0; most * MESSAGE].into(), filled: 0 }
    }

    /// Returns those that were read last: faults first, then removals (the kernel hands them out so).
    pub fn iter(&self) -> impl Iterator<Item = Message> {
        self.bytes[..self.filled].chunks_exact(MESSAGE).map(|bytes| {
            let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
            match word(0) & 0xff {
                EVENT_PAGEFAULT if word(8) & FLAG_WP != 0 => Message::Protected(word(16)),
                EVENT_PAGEFAULT => Message::Missing(word(16)),
                EVENT_REMOVE => Message::Removed(word(8), word(16)),
                _ => Message::Other(bytes[0]),
            }
        })
    }
}

const _: () = assert!(cfg!(target_endian = "little"), "messages have the byte order of the processor");

/// A userfaultfd.
#[derive(Debug)]
pub struct Userfault {
    fd: OwnedFd,
    features: u64,
    /// It is of another process.
    elsewhere: bool,
}

/// What the kernel calls the file of a userfaultfd.
const FILE: &str = "anon_inode:[userfaultfd]";

impl Userfault {
    /// Makes one that reports missing pages, protected pages and removed memory.
    ///
    /// # Errors
    /// `Unsupported` that names what this kernel lacks; what the host says when it does not let this process have one.
    pub fn new() -> io::Result<Self> {
        let features = agree(&open()?, 0)?;
        let lacking: Vec<&str> = NEEDED.iter().filter(|(bit, _)| features & bit == 0).map(|(_, name)| *name).collect();
        if !lacking.is_empty() {
            let what = format!("userfaultfd of this kernel lacks {}", lacking.join(", "));
            return Err(io::Error::new(io::ErrorKind::Unsupported, what));
        }
        let wanted = NEEDED.iter().fold(features & FEATURE_POISON, |all, (bit, _)| all | bit);
        // Features are agreed on once for each descriptor: the one that was asked what there is is of no more use.
        let fd = open()?;
        agree(&fd, wanted)?;
        Ok(Self { fd, features: wanted, elsewhere: false })
    }

    /// Takes one that another process has made and sent. It has agreed on features itself, and registered its memory.
    ///
    /// # Errors
    /// `InvalidInput` for another descriptor; errors of the host.
    pub fn sent(fd: OwnedFd) -> io::Result<Self> {
        let link = format!("/proc/self/fd/{}", fd.as_raw_fd());
        // Calls of the same numbers mean something else to another file.
        if rustix::fs::readlink(link, Vec::new())?.to_bytes() != FILE.as_bytes() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the descriptor that was sent is no userfaultfd"));
        }
        rustix::fs::fcntl_setfl(&fd, rustix::fs::fcntl_getfl(&fd)? | OFlags::NONBLOCK)?;
        // Whether it can poison is the kernel's to say; who may not ask it finds out by trying.
        let features = open().and_then(|own| agree(&own, 0)).unwrap_or(FEATURE_POISON) & FEATURE_POISON;
        Ok(Self { fd, features, elsewhere: true })
    }

    /// Returns another descriptor of it: a range of memory that is watched through either is watched through both.
    ///
    /// # Errors
    /// Errors of the host.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self { fd: self.fd.try_clone()?, ..*self })
    }

    /// Returns one of a kernel that cannot poison pages, as those before Linux 6.6, to see what becomes of it there.
    #[must_use]
    pub fn without_poison(self) -> Self {
        Self { features: self.features & !FEATURE_POISON, ..self }
    }

    /// Tells whether pages can be poisoned (Linux 6.6).
    #[must_use]
    pub fn can_poison(&self) -> bool {
        self.features & FEATURE_POISON != 0
    }

    /// Reads all messages there are room for; false when there is none.
    ///
    /// # Errors
    /// Errors of the host.
    pub fn read(&self, messages: &mut Messages) -> io::Result<bool> {
        messages.filled = 0;
        match rustix::io::retry_on_intr(|| rustix::io::read(&self.fd, &mut messages.bytes[..])) {
            Ok(bytes) => {
                messages.filled = bytes;
                Ok(bytes > 0)
            }
            Err(rustix::io::Errno::AGAIN) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Begins to watch a range. One that is watched already is watched for more.
    ///
    /// # Errors
    /// `ResourceBusy` when another userfaultfd watches it; errors of the host.
    pub fn register(&self, region: &GuestRegion, offset: u64, len: u64, watched: Watched) -> io::Result<()> {
        let mode = if watched.missing { MODE_MISSING } else { 0 } | if watched.protected { MODE_WP } else { 0 };
        let mut argument = RegisterArgument { range: self.range(region, offset, len), mode, ioctls: 0 };
        // SAFETY: the argument is the structure of this call; the range is memory of a guest.
        unsafe { call(&self.fd, REGISTER, &raw mut argument) }
    }

    /// Ends watching a range: protection is gone. The kernel wakes those who wait for missing pages; those who wait to write are to be
    /// woken by [`Self::wake`].
    ///
    /// # Errors
    /// Errors of the host.
    pub fn unregister(&self, region: &GuestRegion, offset: u64, len: u64) -> io::Result<()> {
        let mut argument = self.range(region, offset, len);
        // SAFETY: as in `register`.
        unsafe { call(&self.fd, UNREGISTER, &raw mut argument) }
    }

    /// Protects a range against writing, holes included, or ends that and wakes who waits.
    ///
    /// # Errors
    /// `WouldBlock` for a message that waits to be read; `NotFound` when it is not watched; errors of the host.
    pub fn protect(&self, region: &GuestRegion, offset: u64, len: u64, on: bool) -> io::Result<()> {
        let mut argument = WriteProtectArgument { range: self.range(region, offset, len), mode: u64::from(on) };
        // SAFETY: as in `register`.
        unsafe { call(&self.fd, WRITE_PROTECT, &raw mut argument) }
    }

    /// Puts bytes into missing pages, each as a whole and at once.
    #[must_use = "it may have stopped on the way"]
    pub fn copy(&self, region: &GuestRegion, offset: u64, data: &[u8], how: How) -> Copied {
        let to = self.range(region, offset, data.len() as u64);
        let mode = if how.wake { 0 } else { COPY_DONTWAKE } | if how.protect { COPY_WP } else { 0 };
        let from = data.as_ptr().expose_provenance() as u64;
        let mut argument = CopyArgument { to: to.start, from, len: to.len, mode, copied: 0 };
        // SAFETY: the argument is the structure of this call; it reads `data` and fills memory of a guest.
        match unsafe { call(&self.fd, COPY, &raw mut argument) } {
            Ok(()) => Copied { bytes: data.len(), stopped: None },
            // What was copied, or the error once more as a negative number.
            Err(error) => Copied { bytes: usize::try_from(argument.copied).unwrap_or(0), stopped: Some(error) },
        }
    }

    /// Wakes who waits in a range.
    ///
    /// # Errors
    /// Errors of the host.
    pub fn wake(&self, region: &GuestRegion, offset: u64, len: u64) -> io::Result<()> {
        let mut argument = self.range(region, offset, len);
        // SAFETY: as in `register`.
        unsafe { call(&self.fd, WAKE, &raw mut argument) }
    }

    /// Makes missing pages a SIGBUS for whoever touches them, and wakes who waits.
    ///
    /// # Errors
    /// `AlreadyExists` for a page that is there; `WouldBlock` for a message that waits; `Unsupported` when it cannot
    /// ([`Self::can_poison`]); errors of the host.
    pub fn poison(&self, region: &GuestRegion, offset: u64, len: u64) -> io::Result<()> {
        if !self.can_poison() {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let mut argument = PoisonArgument { range: self.range(region, offset, len), mode: 0, updated: 0 };
        // SAFETY: as in `register`.
        unsafe { call(&self.fd, POISON, &raw mut argument) }
    }
}

impl Userfault {
    /// Returns the addresses of a range of a region.
    fn range(&self, region: &GuestRegion, offset: u64, len: u64) -> RangeArgument {
        let inside = offset.checked_add(len).is_some_and(|end| end <= region.len());
        assert!(inside, "{len} bytes at {offset} are not in a region of {}", region.len());
        assert_eq!(region.is_elsewhere(), self.elsewhere, "the memory of one process is not that of another");
        RangeArgument { start: region.mapped_at() + offset, len }
    }
}

impl AsFd for Userfault {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Makes a descriptor: by the device, which can be given away, or else by the system call, which takes CAP_SYS_PTRACE.
fn open() -> io::Result<OwnedFd> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    let by_device = rustix::fs::open("/dev/userfaultfd", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty());
    let raw = match &by_device {
        // SAFETY: this call takes flags and makes a descriptor.
        Ok(device) => unsafe { libc::ioctl(device.as_raw_fd(), u64::from(NEW), flags) },
        // SAFETY: as above.
        Err(_) => i32::try_from(unsafe { libc::syscall(libc::SYS_userfaultfd, flags) }).unwrap_or(-1),
    };
    if raw >= 0 {
        // SAFETY: the kernel has just made it, and nobody else knows it.
        return Ok(unsafe { OwnedFd::from_raw_fd(raw) });
    }
    let error = io::Error::last_os_error();
    let missing = matches!(error.raw_os_error(), Some(libc::ENOSYS)).then_some(io::ErrorKind::Unsupported);
    let first =
        by_device.err().map(|error| format!("/dev/userfaultfd: {}; ", io::Error::from(error))).unwrap_or_default();
    Err(io::Error::new(missing.unwrap_or(error.kind()), format!("{first}userfaultfd: {error}")))
}

/// Agrees on features; returns all that there are.
fn agree(fd: &OwnedFd, features: u64) -> io::Result<u64> {
    let mut argument = ApiArgument { api: API, features, ioctls: 0 };
    // SAFETY: the argument is the structure of this call.
    unsafe { call(fd, UFFDIO_API, &raw mut argument) }?;
    Ok(argument.features)
}

/// Makes a call.
///
/// # Safety
/// The argument is valid, of the type that the call takes, and what the call does to the memory it names is sound.
unsafe fn call<T>(fd: &OwnedFd, number: u32, argument: *mut T) -> io::Result<()> {
    // SAFETY: the caller promises it.
    if unsafe { libc::ioctl(fd.as_raw_fd(), u64::from(number), argument) } == 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    // The process whose memory it is has ended, and its memory with it.
    Err(if error.raw_os_error() == Some(libc::ESRCH) { io::ErrorKind::NotFound.into() } else { error })
}

#[cfg(test)]
mod tests {
    use rustix::fs::MemfdFlags;
    use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

    use super::*;
    use crate::sys::guest::PAGE;
    use crate::units::to_usize;

    fn memory(pages: u64) -> (GuestMemoryMmap<()>, GuestRegion) {
        let file = std::fs::File::from(rustix::fs::memfd_create("watched", MemfdFlags::CLOEXEC).unwrap());
        file.set_len(pages * PAGE).unwrap();
        let range = (GuestAddress(0), to_usize(pages * PAGE), Some(FileOffset::new(file, 0)));
        let memory = GuestMemoryMmap::<()>::from_ranges_with_files([range]).unwrap();
        let region = GuestRegion::all(&memory).unwrap().remove(0);
        (memory, region)
    }

    /// Waits for a message.
    fn next(faults: &Userfault, messages: &mut Messages) -> Message {
        loop {
            if faults.read(messages).unwrap() {
                return messages.iter().next().unwrap();
            }
            std::thread::yield_now();
        }
    }

    #[test]
    fn numbers_are_those_of_the_kernel() {
        // As strace and the headers of the kernel have them.
        assert_eq!(IOCTLS, [0xc020_aa00, 0x8010_aa01, 0x8010_aa02, 0xc028_aa03, 0xc018_aa06, 0xc020_aa08]);
        assert_eq!(UFFDIO_API, 0xc018_aa3f);
    }

    #[test]
    fn faults_are_told_and_answered() {
        let (memory, region) = memory(16);
        let faults = Userfault::new().unwrap();
        let both = Watched { missing: true, protected: true };
        faults.register(&region, 0, region.len(), both).unwrap();
        let mut messages = Messages::new(4);
        assert!(!faults.read(&mut messages).unwrap());
        let at = |page: u64| region.mapped_at() + page * PAGE;
        std::thread::scope(|scope| {
            let reading = scope.spawn(|| memory.read_obj::<u64>(GuestAddress(3 * PAGE + 8)).unwrap());
            assert_eq!(next(&faults, &mut messages), Message::Missing(at(3)));
            let data = [7; to_usize(2 * PAGE)];
            let copied = faults.copy(&region, 2 * PAGE, &data, How { wake: true, protect: true });
            assert!(copied.bytes == data.len() && copied.stopped.is_none());
            assert_eq!(reading.join().unwrap(), u64::from_le_bytes([7; 8]));
            // The second page is there: the copy ends before it, and says so.
            let copied = faults.copy(&region, PAGE, &data, How { wake: false, protect: false });
            assert_eq!(copied.bytes, to_usize(PAGE));
            let again = faults.copy(&region, 2 * PAGE, &data[..to_usize(PAGE)], How { wake: false, protect: false });
            assert_eq!(again.stopped.unwrap().kind(), io::ErrorKind::AlreadyExists);
            let writing = scope.spawn(|| memory.write_obj(1_u64, GuestAddress(3 * PAGE)).unwrap());
            assert_eq!(next(&faults, &mut messages), Message::Protected(at(3)));
            faults.protect(&region, 3 * PAGE, PAGE, false).unwrap();
            writing.join().unwrap();
            let removing = scope.spawn(|| region.give_back(3 * PAGE, 2 * PAGE).unwrap());
            assert_eq!(next(&faults, &mut messages), Message::Removed(at(3), at(5)));
            removing.join().unwrap();
        });
        faults.unregister(&region, 0, region.len()).unwrap();
        assert_eq!(memory.read_obj::<u64>(GuestAddress(3 * PAGE)).unwrap(), 0);
        assert_eq!(faults.protect(&region, 0, PAGE, true).unwrap_err().kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn only_a_userfaultfd_is_taken_from_another_process() {
        let file = rustix::fs::memfd_create("anon_inode:[userfaultfd]", MemfdFlags::CLOEXEC).unwrap();
        assert_eq!(Userfault::sent(file).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        let event = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap();
        assert_eq!(Userfault::sent(event).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        let faults = Userfault::sent(Userfault::new().unwrap().fd).unwrap();
        assert_eq!(faults.can_poison(), Userfault::new().unwrap().can_poison());
    }

    #[test]
    #[should_panic(expected = "the memory of one process is not that of another")]
    fn memory_of_this_process_is_not_reached_by_what_was_sent() {
        let (_memory, region) = memory(4);
        Userfault::sent(Userfault::new().unwrap().fd).unwrap().wake(&region, 0, PAGE).unwrap();
    }

    #[test]
    #[should_panic(expected = "are not in a region")]
    fn nothing_beside_a_region_is_reached() {
        let (_memory, region) = memory(4);
        let faults = Userfault::new().unwrap();
        faults.wake(&region, 3 * PAGE, 2 * PAGE).unwrap();
    }
}
