//! Mappings of files that somebody else may shorten: touching what is gone ends no process.
//!
//! A page beyond the end of a mapped file is no memory, and touching it is a SIGBUS, which ends the process. A file whose
//! length others can change may lose its end at any time after it was checked. So the handler of the signal looks whether the
//! address lies in a mapping that is [`Shared`], and if so puts zeros in the place of all of it. Whoever touched it goes on,
//! with zeros, and is to ask [`Shared::is_lost`] before it believes what it has read.
//!
//! # Rules
//! 1. The handler makes one system call (mmap) and touches atomics; it takes no lock and allocates nothing.
//! 2. A mapping lives as long as its entry in the table: nothing else can be where the handler puts zeros.
//! 3. A SIGBUS of any other kind goes to who handled it before, or ends the process as ever.

#![expect(unsafe_code, reason = "handlers of signals and mappings at given addresses")]

use std::io;
use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use vm_memory::mmap::MmapRegion;

use crate::sync::Mutex;

/// Mappings at a time at most.
const SLOTS: usize = 8192;

/// An entry of the table; `end` is 0 while nobody has it.
struct Slot {
    start: AtomicUsize,
    end: AtomicUsize,
    lost: AtomicBool,
}

static TABLE: [Slot; SLOTS] =
    [const { Slot { start: AtomicUsize::new(0), end: AtomicUsize::new(0), lost: AtomicBool::new(false) } }; SLOTS];
/// Entries behind this many were never used.
static USED: AtomicUsize = AtomicUsize::new(0);
/// Free entries before that.
static FREE: Mutex<Vec<usize>> = Mutex::new(Vec::new());
/// What was done about the signal before.
static BEFORE: OnceLock<libc::sigaction> = OnceLock::new();

/// A mapping in the table.
#[derive(Debug)]
pub struct Shared {
    map: Arc<MmapRegion<()>>,
    slot: usize,
}

impl Shared {
    /// Enters a mapping, which may be touched from then on as long as this lives.
    ///
    /// # Errors
    /// When there are too many, or the host does not let the signal be handled.
    pub fn new(map: MmapRegion<()>) -> io::Result<Self> {
        let mut free = FREE.lock();
        install()?;
        let slot = match free.pop() {
            Some(slot) => slot,
            None if USED.load(Ordering::Relaxed) < SLOTS => USED.fetch_add(1, Ordering::SeqCst),
            None => return Err(io::Error::other("too many regions of memory are shared")),
        };
        let start = map.as_ptr().expose_provenance();
        TABLE[slot].lost.store(false, Ordering::SeqCst);
        TABLE[slot].start.store(start, Ordering::SeqCst);
        TABLE[slot].end.store(start + map.size(), Ordering::SeqCst);
        Ok(Self { map: Arc::new(map), slot })
    }

    /// Returns the mapping.
    #[must_use]
    pub fn map(&self) -> &Arc<MmapRegion<()>> {
        &self.map
    }

    /// Tells whether a part of it was touched that was gone. What was read may be zeros instead.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        TABLE[self.slot].lost.load(Ordering::SeqCst)
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        TABLE[self.slot].end.store(0, Ordering::SeqCst);
        FREE.lock().push(self.slot);
    }
}

/// Installs the handler, once; the caller has the lock of the table.
fn install() -> io::Result<()> {
    if BEFORE.get().is_some() {
        return Ok(());
    }
    // SAFETY: all bits zero are a valid `sigaction`: no flags, an empty mask, the default action.
    let mut ours: libc::sigaction = unsafe { std::mem::zeroed() };
    let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) = on_bus_error;
    ours.sa_sigaction = handler as *const () as usize;
    ours.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    // SAFETY: as above.
    let mut before: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: both point to valid structures, and the handler does only what a handler may.
    if unsafe { libc::sigaction(libc::SIGBUS, &raw const ours, &raw mut before) } != 0 {
        return Err(io::Error::last_os_error());
    }
    assert!(BEFORE.set(before).is_ok(), "the table is locked");
    Ok(())
}

extern "C" fn on_bus_error(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid pointer to handlers with SA_SIGINFO.
    let told = unsafe { &*info };
    // SAFETY: every SIGBUS of the kernel has an address, and that of any other is not used.
    let address = unsafe { told.si_addr() }.addr();
    if told.si_code > 0 && replace(address) {
        return;
    }
    pass_on(signal, info, context);
}

/// Puts zeros in the place of the mapping that an address lies in; tells whether there is one.
fn replace(address: usize) -> bool {
    for slot in &TABLE[..USED.load(Ordering::SeqCst).min(SLOTS)] {
        let (end, start) = (slot.end.load(Ordering::SeqCst), slot.start.load(Ordering::SeqCst));
        if address < start || address >= end {
            continue;
        }
        // Before: who sees zeros finds it lost.
        slot.lost.store(true, Ordering::SeqCst);
        // SAFETY: it always points to the errno of this thread.
        let errno = unsafe { libc::__errno_location() };
        // SAFETY: as above.
        let kept = unsafe { *errno };
        // SAFETY: the range is a mapping that lives as long as the entry, all of it: of huge pages no part could be
        // replaced. Its users go through volatile accesses, for which any bytes will do.
        let mapped = unsafe {
            libc::mmap(
                std::ptr::with_exposed_provenance_mut(start),
                end - start,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_FIXED | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        // SAFETY: as above.
        unsafe { *errno = kept };
        return mapped != libc::MAP_FAILED;
    }
    false
}

/// Leaves the signal to who handled it before.
fn pass_on(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    if let Some(before) = BEFORE.get()
        && before.sa_sigaction != libc::SIG_DFL
        && before.sa_sigaction != libc::SIG_IGN
        && before.sa_flags & libc::SA_SIGINFO != 0
    {
        type Handler = extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void);
        // SAFETY: with SA_SIGINFO it is the address of such a function, and no process forgets its code.
        let handler: Handler = unsafe { std::mem::transmute::<usize, Handler>(before.sa_sigaction) };
        return handler(signal, info, context);
    }
    // The instruction is done again, and ends the process.
    // SAFETY: the default action needs no handler.
    unsafe { libc::signal(libc::SIGBUS, libc::SIG_DFL) };
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::process::Command;

    use rustix::fs::MemfdFlags;
    use vm_memory::volatile_memory::VolatileMemory;
    use vm_memory::{Bytes, FileOffset};

    use super::*;

    fn mapped(len: usize) -> (File, MmapRegion<()>) {
        let file = File::from(rustix::fs::memfd_create("shared", MemfdFlags::CLOEXEC).unwrap());
        file.set_len(len as u64).unwrap();
        let map = MmapRegion::from_file(FileOffset::new(file.try_clone().unwrap(), 0), len).unwrap();
        (file, map)
    }

    #[test]
    fn memory_that_is_taken_away_reads_as_zeros_and_is_told() {
        let (file, map) = mapped(1 << 20);
        let (other_file, other) = mapped(1 << 20);
        let (shared, other) = (Shared::new(map).unwrap(), Shared::new(other).unwrap());
        let memory = shared.map().as_volatile_slice();
        memory.write_slice(&[7; 9000], 4096).unwrap();
        file.set_len(8192).unwrap();
        let mut bytes = [1; 4096];
        memory.read_slice(&mut bytes, 4096).unwrap();
        assert!(bytes == [7; 4096] && !shared.is_lost(), "what is left is left");
        // From several threads at once, reading and writing.
        std::thread::scope(|scope| {
            for n in 0..4 {
                let map = shared.map();
                scope.spawn(move || {
                    let memory = map.as_volatile_slice();
                    let mut bytes = [1; 64];
                    memory.read_slice(&mut bytes, (n + 3) * 4096).unwrap();
                    memory.write_slice(&[9; 64], (n + 3) * 8192).unwrap();
                    bytes
                });
            }
        });
        assert!(shared.is_lost() && !other.is_lost());
        // The next one with its place in the table is not lost.
        drop(shared);
        let (_file, map) = mapped(4096);
        assert!(!Shared::new(map).unwrap().is_lost());
        other_file.set_len(0).unwrap();
        other.map().as_volatile_slice().write_slice(&[1; 10], 100).unwrap();
        assert!(other.is_lost());
    }

    /// Not run by itself: the test below runs it in a process of its own.
    #[test]
    #[ignore = "it ends its process"]
    fn a_mapping_that_nobody_entered() {
        let (_kept, map) = mapped(4096);
        let _shared = Shared::new(map).unwrap();
        let (file, map) = mapped(4096);
        file.set_len(0).unwrap();
        map.as_volatile_slice().write_slice(&[1; 10], 0).unwrap();
    }

    #[test]
    fn any_other_bus_error_ends_the_process_as_ever() {
        use std::os::unix::process::ExitStatusExt;
        let this = std::env::current_exe().unwrap();
        let name = "sys::shared::tests::a_mapping_that_nobody_entered";
        let ended = Command::new(this).args(["--exact", name, "--ignored"]).output().unwrap();
        assert_eq!(ended.status.signal(), Some(libc::SIGBUS), "{ended:?}");
    }
}
