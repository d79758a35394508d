//! The memory of a machine, saved while it runs and restored while it runs, without a machine: threads of this process write to it.
//!
//! The twin of a save is a copy of the memory made at the cut, while all writers are held. What comes out of the checkpoint is compared
//! with it byte by byte.

mod failures;
mod removals;
mod restores;
mod saves;

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use afterimage::checkpoint::{Access, Cut, Folder, Name, Plan, Reader, Sizes, Writer};
use afterimage::media::{Media, SimMedia};
use afterimage::memory::{RestoreOptions, Restorer, SaveFigures, SaveOptions, Saver, Watch, restore_all};
use afterimage::progress::Silent;
use afterimage::sync::RwLock;
use afterimage::sys::guest::GuestRegion;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

const PAGE: u64 = 4096;
const BLOCK: u64 = 64 << 10;
const HIGH: u64 = 4 << 30;

/// Numbers that look random.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, limit: u64) -> u64 {
        (self.next() >> 20) % limit
    }
}

/// A memory of two regions, of which the first does not end with a page block.
struct Guest {
    memory: GuestMemoryMmap<()>,
    regions: Vec<GuestRegion>,
    low: u64,
    high: u64,
}

impl Guest {
    fn new(low: u64, high: u64) -> Self {
        let memory = memory(&[(0, low), (HIGH, high)]);
        let regions = GuestRegion::all(&memory).unwrap();
        Self { memory, regions, low, high }
    }

    fn usual() -> Self {
        Self::new((20 << 20) + 3 * PAGE, 6 << 20)
    }

    fn size(&self) -> u64 {
        self.low + self.high
    }

    fn watch(&self) -> Watch {
        Watch::new(Watch::open().unwrap(), &self.memory, Sizes::USUAL).unwrap()
    }

    /// Where a byte of the memory is, counted over both regions.
    fn address(&self, byte: u64) -> GuestAddress {
        GuestAddress(if byte < self.low { byte } else { HIGH + byte - self.low })
    }

    /// Writes a number to an address that is a multiple of 8.
    fn store(&self, byte: u64, value: u64) {
        self.memory.write_obj(value, self.address(byte)).unwrap();
    }

    fn load(&self, byte: u64) -> u64 {
        self.memory.read_obj(self.address(byte)).unwrap()
    }

    /// Half zeros; of the rest a third is noise, a third text, and a third has a few numbers.
    fn fill(&self, seed: u64) {
        let mut random = Random(seed | 1);
        let mut block = vec![0_u8; usize::try_from(BLOCK).unwrap()];
        for start in (0..self.size() / BLOCK * BLOCK).step_by(usize::try_from(BLOCK).unwrap()) {
            block.fill(0);
            match random.below(6) {
                0 => block.iter_mut().for_each(|byte| *byte = random.next() as u8),
                1 => block
                    .iter_mut()
                    .enumerate()
                    .for_each(|(n, byte)| *byte = b"the memory of a guest "[(n + n / 300) % 22]),
                2 => (0..40).for_each(|_| block[usize::try_from(random.below(BLOCK)).unwrap()] = random.next() as u8),
                _ => continue,
            }
            // A page block may lie in both regions.
            let first = (self.low.saturating_sub(start)).min(BLOCK);
            let (one, two) = block.split_at(usize::try_from(first).unwrap());
            if !one.is_empty() {
                self.memory.write_slice(one, self.address(start)).unwrap();
            }
            if !two.is_empty() {
                self.memory.write_slice(two, self.address(start + first)).unwrap();
            }
        }
    }

    /// What the files of the memory have, without touching it.
    fn content(&self) -> Vec<u8> {
        let mut all = Vec::new();
        for region in &self.regions {
            let mut bytes = vec![0; usize::try_from(region.len()).unwrap()];
            region.read(&mut bytes, 0).unwrap();
            all.extend(bytes);
        }
        all
    }
}

fn memory(ranges: &[(u64, u64)]) -> GuestMemoryMmap<()> {
    let ranges = ranges.iter().map(|(start, len)| {
        let file = File::from(rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
        file.set_len(*len).unwrap();
        (GuestAddress(*start), usize::try_from(*len).unwrap(), Some(FileOffset::new(file, 0)))
    });
    GuestMemoryMmap::from_ranges_with_files(ranges).unwrap()
}

/// Fails with the first byte that differs.
fn assert_same(found: &[u8], wanted: &[u8], what: &str) {
    assert_eq!(found.len(), wanted.len(), "{what}: other sizes");
    if found != wanted {
        let at = found.iter().zip(wanted).position(|(found, wanted)| found != wanted).unwrap();
        let differ = found.iter().zip(wanted).filter(|(found, wanted)| found != wanted).count();
        panic!("{what}: byte {at:#x} is {} and not {}, and {differ} bytes differ", found[at], wanted[at]);
    }
}

/// Where checkpoints are: in memory.
fn media() -> (SimMedia, Folder) {
    let media = SimMedia::new(1);
    let shared: Arc<dyn Media> = Arc::new(media.clone());
    (media, Folder::at(&shared))
}

fn name(name: &str) -> Name {
    Name::new("vm", name).unwrap()
}

fn cut() -> Cut<'static> {
    Cut { created: 1_795_352_707, disks: Vec::new(), state_version: 1, state: b"the devices" }
}

fn writer(folder: &Folder, to: &str, watch: &Watch, based_on: Option<&str>) -> Writer {
    let parent = based_on.map(name);
    Writer::create(folder, Plan { parent, ..Plan::new(name(to), "test", watch.geometry().clone()) }).unwrap()
}

/// Says that it is over when it is dropped, also by a panic: nobody would join the threads otherwise.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Threads that write to random places, and are held when an instant is wanted.
struct Writers<'a> {
    guest: &'a Guest,
    hold: RwLock<()>,
    over: AtomicBool,
    stores: AtomicU64,
    /// Bytes from the beginning that they write to.
    reach: u64,
    /// What memory should have, where that cannot be read: in numbers of 8 bytes.
    shadow: Option<Vec<AtomicU64>>,
}

impl<'a> Writers<'a> {
    fn new(guest: &'a Guest) -> Self {
        let (hold, over, stores) = (RwLock::new(()), AtomicBool::new(false), AtomicU64::new(0));
        Self { guest, hold, over, stores, reach: guest.size(), shadow: None }
    }

    /// Those of a memory that has `content`, even if not yet.
    fn shadowed(guest: &'a Guest, content: &[u8]) -> Self {
        let numbers = content.as_chunks::<8>().0.iter().map(|bytes| AtomicU64::new(u64::from_le_bytes(*bytes)));
        Self { shadow: Some(numbers.collect()), ..Self::new(guest) }
    }

    /// What memory has, or should have; nobody writes.
    fn content(&self) -> Vec<u8> {
        match &self.shadow {
            Some(shadow) => shadow.iter().flat_map(|number| number.load(Ordering::SeqCst).to_le_bytes()).collect(),
            None => self.guest.content(),
        }
    }

    /// Writes until it is over, all over the memory and above all to a part of it. Each thread has numbers to itself.
    fn run(&self, number: u64) {
        let mut random = Random(number * 7919 + 1);
        while !self.over.load(Ordering::Relaxed) {
            let _running = self.hold.read();
            for _ in 0..32 {
                let limit = if random.below(32) == 0 { self.reach } else { 2 << 20 };
                let (at, value) = ((random.below(limit / 64) * 8 + number) * 8, random.next());
                if let Some(shadow) = &self.shadow {
                    shadow[usize::try_from(at / 8).unwrap()].store(value, Ordering::SeqCst);
                }
                self.guest.store(at, value);
            }
            self.stores.fetch_add(32, Ordering::Relaxed);
        }
    }

    /// Runs `work` while so many threads write.
    fn during<T>(&self, threads: u64, work: impl FnOnce() -> T) -> T {
        std::thread::scope(|scope| {
            for number in 0..threads {
                scope.spawn(move || self.run(number));
            }
            while threads > 0 && self.stores.load(Ordering::Relaxed) == 0 {
                std::thread::yield_now();
            }
            let _over = Over(&self.over);
            work()
        })
    }

    /// Cuts while nobody writes, and returns what memory had.
    fn cut(&self, saver: &mut Saver) -> Vec<u8> {
        let _held = self.hold.write();
        let twin = self.content();
        saver.cut().unwrap();
        twin
    }
}

/// Saves while threads write; returns the twin.
fn save_live(
    guest: &Guest,
    watch: &Watch,
    writers: &Writers<'_>,
    writer: Writer,
    options: SaveOptions,
) -> (Vec<u8>, SaveFigures) {
    let mut saver = Saver::begin(watch, writer, options).unwrap();
    saver.settle().unwrap();
    let twin = writers.cut(&mut saver);
    let (header, figures) = saver.commit(&cut()).unwrap();
    assert_eq!(header.geometry.memory(), guest.size());
    assert_eq!((figures.done, figures.page_blocks), (header.geometry.page_blocks(), header.geometry.page_blocks()));
    (twin, figures)
}

/// A guest like another one, with nothing in it.
fn empty_like(guest: &Guest) -> Guest {
    Guest::new(guest.low, guest.high)
}

fn open(folder: &Folder, of: &str) -> Reader {
    Reader::open(folder, &name(of), Access::Cached).unwrap()
}

/// Fails unless a checkpoint is restored to what memory had, at once and by and by.
fn assert_restores(folder: &Folder, of: &str, like: &Guest, twin: &[u8]) {
    let guest = empty_like(like);
    restore_all(&guest.watch(), &open(folder, of), 2, &Silent).unwrap();
    assert_same(&guest.content(), twin, &format!("{of}, all at once"));

    let guest = empty_like(like);
    let watch = guest.watch();
    let restorer = Restorer::begin(&watch, open(folder, of), RestoreOptions::default()).unwrap();
    std::thread::scope(|scope| {
        for number in 0..3_u64 {
            let guest = &guest;
            scope.spawn(move || {
                let mut random = Random(number + 99);
                for _ in 0..200 {
                    let at = random.below(guest.size() / 8) * 8;
                    let wanted = twin[usize::try_from(at).unwrap()..][..8].try_into().unwrap();
                    assert_eq!(guest.load(at), u64::from_le_bytes(wanted), "{of}, byte {at:#x} when it is touched");
                }
            });
        }
    });
    restorer.wait_filled().unwrap();
    assert_same(&guest.content(), twin, &format!("{of}, by and by"));
    let figures = restorer.figures();
    assert!(figures.resident && figures.left == 0 && figures.filled_percent == 100, "{figures:?}");
}
