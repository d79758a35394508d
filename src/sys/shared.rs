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
//! 4. Of huge pages only whole ones are mapped: the kernel maps them whole in any case, and replaces or unmaps no part of
//!    one, so the zeros would have no place.
//! 5. An entry is read between two looks at its generation: who is in the handler may meet one that changes hands.

#![expect(unsafe_code, reason = "handlers of signals and mappings at given addresses")]

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use vm_memory::FileOffset;
use vm_memory::mmap::MmapRegion;

use crate::sync::Mutex;

/// Mappings at a time at most.
const SLOTS: usize = 8192;

/// An entry of the table.
struct Slot {
    /// Odd while somebody has it; `start` and `end` change only while it is even.
    generation: AtomicUsize,
    start: AtomicUsize,
    end: AtomicUsize,
    lost: AtomicBool,
}

static TABLE: [Slot; SLOTS] = [const {
    Slot {
        generation: AtomicUsize::new(0),
        start: AtomicUsize::new(0),
        end: AtomicUsize::new(0),
        lost: AtomicBool::new(false),
    }
}; SLOTS];
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

impl Slot {
    /// Returns where its mapping begins and ends; `None` when nobody has it, or not all the time.
    fn range(&self) -> Option<(usize, usize)> {
        let generation = self.generation.load(Ordering::SeqCst);
        let range = (self.start.load(Ordering::SeqCst), self.end.load(Ordering::SeqCst));
        let same = self.generation.load(Ordering::SeqCst) == generation;
        (same && generation % 2 == 1).then_some(range)
    }
}

impl Shared {
    /// Maps `len` bytes of a file from `offset` on, for reading and writing, and enters that.
    ///
    /// # Errors
    /// `InvalidInput` when the file is of huge pages and the range is not of whole ones; when there are too many mappings,
    /// or the host does not let the signal be handled; any other error of the host.
    pub fn of(file: File, offset: u64, len: usize) -> io::Result<Self> {
        let page = page_of(&file)?;
        if !offset.is_multiple_of(page) || !(len as u64).is_multiple_of(page) {
            let what = format!("{len} bytes at {offset} are no whole huge pages, which their file has of {page} bytes");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
        }
        Self::new(MmapRegion::from_file(FileOffset::new(file, offset), len).map_err(io::Error::other)?)
    }

    fn new(map: MmapRegion<()>) -> io::Result<Self> {
        Self::guard(Arc::new(map))
    }

    /// Enters a mapping of small pages that is there already: it may be touched from then on as long as this lives.
    ///
    /// # Errors
    /// When there are too many, or the host does not let the signal be handled.
    pub fn guard(map: Arc<MmapRegion<()>>) -> io::Result<Self> {
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
        TABLE[slot].generation.fetch_add(1, Ordering::SeqCst);
        Ok(Self { map, slot })
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
        TABLE[self.slot].generation.fetch_add(1, Ordering::SeqCst);
        FREE.lock().push(self.slot);
    }
}

/// Tells whether a part of a mapping was touched that was gone, for those who have not what entered it.
#[must_use]
pub fn is_lost(map: &MmapRegion<()>) -> bool {
    let start = map.as_ptr().addr();
    let mut used = TABLE[..USED.load(Ordering::SeqCst).min(SLOTS)].iter();
    used.any(|slot| slot.range() == Some((start, start + map.size())) && slot.lost.load(Ordering::SeqCst))
}

/// Returns the size of the huge pages of a file, or 1 if it has none: any range of it can be replaced then.
fn page_of(file: &File) -> io::Result<u64> {
    let system = rustix::fs::fstatfs(file)?;
    let huge = system.f_type == libc::HUGETLBFS_MAGIC;
    Ok(if huge { u64::try_from(system.f_bsize).map_err(io::Error::other)?.max(1) } else { 1 })
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
        let Some((start, end)) = slot.range() else { continue };
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
    use std::process::Command;

    use rustix::fs::MemfdFlags;
    use vm_memory::Bytes;
    use vm_memory::volatile_memory::VolatileMemory;

    use super::*;
    use crate::sys::pages::{PAGE, Pages};

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

    #[test]
    fn of_huge_pages_only_whole_ones_are_mapped() {
        const HUGE: usize = 2 << 20;
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
        let file = File::from(rustix::fs::memfd_create("huge", flags).unwrap());
        file.set_len(2 * HUGE as u64).unwrap();
        let map = |offset, len| Shared::of(file.try_clone().unwrap(), offset, len);
        for (offset, len) in [(0, HUGE / 2), (0, HUGE + 4096), (4096, HUGE), (HUGE as u64 / 2, HUGE)] {
            assert_eq!(map(offset, len).unwrap_err().kind(), io::ErrorKind::InvalidInput, "{len} at {offset}");
        }
        // Of a file that has none any more, as on a host that has set none aside, a touch is told.
        let shared = map(0, HUGE).unwrap();
        file.set_len(0).unwrap();
        shared.map().as_volatile_slice().write_slice(&[1; 10], HUGE / 2).unwrap();
        assert!(shared.is_lost());
    }

    #[test]
    fn an_entry_that_changes_hands_is_not_taken_for_what_lies_between_the_two() {
        // Two mappings of a page and a page between them, which is in none.
        let mut pages = Pages::new(3 * PAGE).unwrap();
        let start = pages.as_mut_ptr();
        let entered = |page: usize| {
            let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
            // SAFETY: it is a page of `pages`, which outlives the mapping and is not touched meanwhile.
            let map = unsafe { MmapRegion::build_raw(start.wrapping_add(page * PAGE), PAGE, protection, flags) };
            Shared::new(map.unwrap()).unwrap()
        };
        let (between, over) = (start.expose_provenance() + PAGE, AtomicBool::new(false));
        let found = std::thread::scope(|scope| {
            let looking = scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    if replace(between) {
                        return true;
                    }
                }
                false
            });
            for _ in 0..300_000 {
                drop(entered(2));
                drop(entered(0));
            }
            over.store(true, Ordering::Relaxed);
            looking.join().unwrap()
        });
        assert!(!found, "it belongs to nobody");
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
