//! How fast the memory of a machine is saved and restored, without a machine: a thread of this process is the guest.
//!
//! The memory is a fixture mix: half zeros, and of the rest a half heap-like structures, a quarter the sources of this project, a
//! sixth machine code (of this program), and noise. The disk is what DIR is on; reads are direct. Each line of stdout is one figure, as
//! JSON.
//!
//!     cargo bench --bench memory -- [DIR] [--memory MIB] [--rounds N] [--parts save,touch,fill,open]

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout, clippy::print_stderr, reason = "a bench")]
#![allow(clippy::disallowed_methods, clippy::cast_possible_truncation, clippy::cast_precision_loss, reason = "a bench")]
#![allow(clippy::cast_lossless, clippy::cast_sign_loss, reason = "a bench")]
#![allow(missing_docs, reason = "a bench")]

use std::fs::{self, File};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use afterimage::checkpoint::{Access, Cut, Folder, Name, PageBlock, Plan, Reader, Sizes, Writer};
use afterimage::media::{HostMedia, Media};
use afterimage::memory::{RestoreOptions, Restorer, SaveOptions, Saver, Watch, restore_all};
use afterimage::progress::Silent;
use afterimage::sync::RwLock;
use afterimage::sys::guest::GuestRegion;
use afterimage::sys::userfaultfd::{How, Message, Messages, Userfault, Watched};
use serde_json::{Value, json};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

const PAGE: u64 = 4096;
const BLOCK: u64 = 64 << 10;
/// Bytes that a guest that writes flat out writes to, and that are touched after a restore.
const WINDOW: u64 = 64 << 20;
const PARTS: [&str; 4] = ["save", "touch", "fill", "open"];

struct Given {
    dir: PathBuf,
    memory: u64,
    rounds: usize,
    parts: Vec<String>,
}

fn given() -> Given {
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| PathBuf::from("target"), PathBuf::from);
    let parts = PARTS.map(str::to_owned).to_vec();
    let mut given = Given { dir: target.join("bench"), memory: 1 << 30, rounds: 5, parts };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        match word.as_str() {
            // Cargo says so to every bench.
            "--bench" => {}
            "--memory" => given.memory = words.next().unwrap().parse::<u64>().unwrap() << 20,
            "--rounds" => given.rounds = words.next().unwrap().parse().unwrap(),
            "--parts" => given.parts = words.next().unwrap().split(',').map(str::to_owned).collect(),
            dir => given.dir = dir.into(),
        }
    }
    given
}

/// Numbers that look random.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
}

struct Guest {
    memory: GuestMemoryMmap<()>,
    size: u64,
}

impl Guest {
    fn new(size: u64) -> Self {
        let file = File::from(rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
        file.set_len(size).unwrap();
        let range = (GuestAddress(0), size as usize, Some(FileOffset::new(file, 0)));
        Self { memory: GuestMemoryMmap::from_ranges_with_files([range]).unwrap(), size }
    }

    fn watch(&self) -> Watch {
        Watch::new(Watch::open().unwrap(), &self.memory, Sizes::USUAL).unwrap()
    }

    /// Fills it with the mix, in runs of 256 KiB.
    fn fill(&self) {
        let code = fs::read(std::env::current_exe().unwrap()).unwrap();
        let text = sources();
        let mut random = Random(0x9e37_79b9_7f4a_7c15);
        let mut bytes = vec![0; 4 * BLOCK as usize];
        for (run, at) in (0..self.size).step_by(bytes.len()).enumerate() {
            match run % 24 {
                0..12 => continue,
                12..18 => heap(&mut bytes, &mut random),
                18..21 => piece(&mut bytes, &text, &mut random),
                21 | 22 => piece(&mut bytes, &code, &mut random),
                _ => bytes.iter_mut().for_each(|byte| *byte = random.next() as u8),
            }
            // Not all zeros in one place.
            let place = (at / bytes.len() as u64 * 7919 % (self.size / bytes.len() as u64)) * bytes.len() as u64;
            self.memory.write_slice(&bytes, GuestAddress(place)).unwrap();
        }
    }

    fn touch(&self, page: u64) -> u64 {
        self.memory.read_obj(GuestAddress(page * PAGE)).unwrap()
    }
}

/// Lists and small numbers: pointers into one another, lengths, and some letters.
fn heap(bytes: &mut [u8], random: &mut Random) {
    let base = 0x7f3a_0000_0000 + (random.next() & 0xfff_f000);
    for object in bytes.chunks_exact_mut(64) {
        let words = [base + (random.next() & 0x3_ffc0), base + (random.next() & 0x3_ffc0), 2, random.next() % 64, 0, 1];
        for (to, word) in object.chunks_exact_mut(8).zip(words) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        object[48..64].copy_from_slice(format!("name-{:011}", random.next() % 100_000).as_bytes());
    }
}

fn piece(bytes: &mut [u8], of: &[u8], random: &mut Random) {
    let from = random.next() as usize % (of.len() - bytes.len());
    bytes.copy_from_slice(&of[from..from + bytes.len()]);
}

fn sources() -> Vec<u8> {
    let mut all = Vec::new();
    let mut dirs = vec![PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("src")];
    while let Some(dir) = dirs.pop() {
        let mut entries: Vec<_> = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
        entries.sort();
        for path in entries {
            if path.is_dir() { dirs.push(path) } else { all.extend(fs::read(path).unwrap()) }
        }
    }
    all
}

fn main() {
    let given = given();
    fs::create_dir_all(&given.dir).unwrap();
    let dir = tempfile::tempdir_in(&given.dir).unwrap();
    let media: Arc<dyn Media> = Arc::new(HostMedia::new(dir.path()).unwrap());
    let folder = Folder::at(&media);
    for part in &given.parts {
        let begun = Instant::now();
        match part.as_str() {
            "save" => saves(&given, &folder),
            "touch" => touches(&given, &folder, dir.path()),
            "fill" => fills(&given, &folder),
            "open" => opens(&given, &folder),
            other => panic!("there is no part '{other}'; there are {PARTS:?}"),
        }
        eprintln!("{part}: {:.0} s", begun.elapsed().as_secs_f64());
    }
}

fn tell(what: &str, unit: &str, mut rounds: Vec<f64>, more: Value) {
    let all = rounds.clone();
    rounds.sort_by(f64::total_cmp);
    let (value, max) = (rounds[rounds.len() / 2], rounds[rounds.len() - 1]);
    println!("{}", json!({ "what": what, "value": value, "unit": unit, "max": max, "rounds": all, "more": more }));
}

fn name() -> Name {
    Name::new("vm", "bench").unwrap()
}

fn save(folder: &Folder, watch: &Watch, hold: &RwLock<()>) -> Value {
    let plan = Plan { replace: true, ..Plan::new(name(), "bench", watch.geometry().clone()) };
    let writer = Writer::create(folder, plan).unwrap();
    let mut saver = Saver::begin(watch, writer, SaveOptions::default()).unwrap();
    saver.settle().unwrap();
    {
        let _held = hold.write();
        saver.cut().unwrap();
    }
    let cut = Cut { created: 0, disks: Vec::new(), state_version: 1, state: b"state" };
    serde_json::to_value(saver.commit(&cut).unwrap().1).unwrap()
}

/// Saves under a guest that writes to so many new pages a second.
fn saves(given: &Given, folder: &Folder) {
    let guest = Guest::new(given.memory);
    guest.fill();
    let watch = guest.watch();
    for rate in [Some(0), Some(1000), Some(10_000), None] {
        let (hold, over, stores) = (RwLock::new(()), AtomicBool::new(false), AtomicU64::new(0));
        let figures: Vec<(Value, f64, f64)> = std::thread::scope(|scope| {
            scope.spawn(|| write(&guest, rate, &hold, &over, &stores));
            let figures = (0..given.rounds)
                .map(|_| {
                    let per_second =
                        |from: u64, time: Duration| (stores.load(Ordering::Relaxed) - from) as f64 / time.as_secs_f64();
                    let (from, begun) = (stores.load(Ordering::Relaxed), Instant::now());
                    std::thread::sleep(Duration::from_millis(500));
                    let before = per_second(from, begun.elapsed());
                    let (from, begun) = (stores.load(Ordering::Relaxed), Instant::now());
                    let figures = save(folder, &watch, &hold);
                    (figures, begun.elapsed().as_secs_f64(), per_second(from, begun.elapsed()) / before.max(1.0))
                })
                .collect();
            over.store(true, Ordering::Relaxed);
            figures
        });
        let who = rate.map_or("a guest that writes flat out to 64 MiB".to_owned(), |rate| format!("{rate} pages/s"));
        let of = |key: &str, by: f64| figures.iter().map(|(it, ..)| it[key].as_u64().unwrap() as f64 / by).collect();
        let last = figures[figures.len() - 1].0.clone();
        tell(&format!("save, {who}"), "s", figures.iter().map(|it| it.1).collect(), last);
        tell(&format!("protecting everything while it runs, {who}"), "ms", of("arming-us", 1e3), Value::Null);
        tell(&format!("cut, {who}"), "ms", of("cut-us", 1e3), Value::Null);
        tell(&format!("stall of a store, p99, {who}"), "us", waits(&figures, "p99-us"), Value::Null);
        tell(&format!("stall of a store, longest, {who}"), "us", waits(&figures, "max-us"), Value::Null);
        tell(
            &format!("rate of the guest during a save, {who}"),
            "of before",
            figures.iter().map(|it| it.2).collect(),
            Value::Null,
        );
        let ratio = |it: &Value| it["bytes"].as_u64().unwrap() as f64 / given.memory as f64;
        tell(
            &format!("bytes stored, {who}"),
            "of memory",
            figures.iter().map(|it| ratio(&it.0)).collect(),
            Value::Null,
        );
        let excess = |it: &Value| {
            let allowed = it["bytes"].as_u64().unwrap() as f64 / (1 << 20) as f64 * 1.07 + 4.0;
            it["writes"].as_u64().unwrap() as f64 / allowed
        };
        tell(
            &format!("writes of data, {who}"),
            "of allowed",
            figures.iter().map(|it| excess(&it.0)).collect(),
            Value::Null,
        );
    }
}

fn waits(figures: &[(Value, f64, f64)], key: &str) -> Vec<f64> {
    figures.iter().map(|(it, ..)| it["waits"][key].as_u64().unwrap() as f64).collect()
}

/// Writes to pages: each another one, or all of a window as fast as it goes.
fn write(guest: &Guest, rate: Option<u64>, hold: &RwLock<()>, over: &AtomicBool, stores: &AtomicU64) {
    let mut random = Random(77);
    let begun = Instant::now();
    let mut page = 0;
    while !over.load(Ordering::Relaxed) {
        let _running = hold.read();
        match rate {
            Some(rate) if stores.load(Ordering::Relaxed) >= (begun.elapsed().as_secs_f64() * rate as f64) as u64 => {
                drop(_running);
                std::thread::sleep(Duration::from_micros(100));
                continue;
            }
            Some(_) => page = random.next() % (guest.size / PAGE),
            None => page = (page + 1) % (WINDOW / PAGE),
        }
        guest.memory.write_obj(stores.load(Ordering::Relaxed), GuestAddress(page * PAGE + 64)).unwrap();
        stores.fetch_add(1, Ordering::Relaxed);
    }
}

/// Makes the checkpoint that is restored, and returns how much of it is not zeros.
fn prepare(given: &Given, folder: &Folder) -> u64 {
    let guest = Guest::new(given.memory);
    guest.fill();
    let figures = save(folder, &guest.watch(), &RwLock::new(()));
    (figures["page-blocks"].as_u64().unwrap() - figures["zeros"].as_u64().unwrap()) * BLOCK
}

fn open(folder: &Folder) -> Reader {
    Reader::open(folder, &name(), Access::Direct).unwrap()
}

/// Restores from the file, cold: nothing else, by one thread.
fn fills(given: &Given, folder: &Folder) {
    let data = prepare(given, folder) as f64 / (1 << 30) as f64;
    let all = given.memory as f64 / (1 << 30) as f64;
    let (mut lazy, mut eager, mut first) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..given.rounds {
        let guest = Guest::new(given.memory);
        let watch = guest.watch();
        let begun = Instant::now();
        let options = RestoreOptions { workers: 1, ..RestoreOptions::default() };
        let restorer = Restorer::begin(&watch, open(folder), options).unwrap();
        first.push(begun.elapsed().as_secs_f64() * 1e3);
        restorer.wait_filled().unwrap();
        lazy.push(begun.elapsed().as_secs_f64());
        let guest = Guest::new(given.memory);
        let begun = Instant::now();
        restore_all(&guest.watch(), &open(folder), 1, &Silent).unwrap();
        eager.push(begun.elapsed().as_secs_f64());
    }
    let rate = |of: f64, times: &[f64]| times.iter().map(|time| of / time).collect();
    tell("restore, until memory can be touched", "ms", first, Value::Null);
    tell("background fill, one thread, of memory", "GiB/s", rate(all, &lazy), Value::Null);
    tell("background fill, one thread, of what is not zeros", "GiB/s", rate(data, &lazy), Value::Null);
    tell("all before it runs, one thread, of memory", "GiB/s", rate(all, &eager), Value::Null);
}

/// The pages of a working set: 64 MiB in 16 places, none of it zeros.
fn working_set(given: &Given, reader: &Reader) -> Vec<u64> {
    let blocks = given.memory / BLOCK;
    let stored =
        |block: u64| matches!(reader.place(PageBlock(block)).unwrap(), afterimage::checkpoint::Found::Stored { .. });
    let mut pages = Vec::new();
    for place in 0..16 {
        let some = (place * blocks / 16..blocks).filter(|block| stored(*block)).take((WINDOW / BLOCK / 16) as usize);
        pages.extend(some.flat_map(|block| (0..BLOCK / PAGE).map(move |page| block * (BLOCK / PAGE) + page)));
    }
    pages.dedup();
    // As programs touch memory: runs of a few pages, here and there.
    let mut runs: Vec<&[u64]> = pages.chunks(4).collect();
    let mut random = Random(5);
    for last in (1..runs.len()).rev() {
        runs.swap(last, random.next() as usize % (last + 1));
    }
    runs.concat()
}

/// Touches a working set right after a restore, in the ways there are.
fn touches(given: &Given, folder: &Folder, dir: &std::path::Path) {
    prepare(given, folder);
    let pages = working_set(given, &open(folder));
    let (mut resident, mut plain, mut noted, mut straw, mut reads) = (vec![], vec![], vec![], vec![], vec![]);
    for _ in 0..given.rounds {
        let guest = Guest::new(given.memory);
        restore_all(&guest.watch(), &open(folder), 2, &Silent).unwrap();
        resident.push(touch_all(&guest, &pages));
        straw.push(page_at_a_time(&guest, &pages, dir));
        drop(guest);
        reads.push(read_stored(&open(folder), &pages));
        let (time, touched) = touch_lazily(given, folder, &pages, None);
        plain.push(time);
        noted.push(touch_lazily(given, folder, &pages, Some(touched)).0);
    }
    let ideal: Vec<f64> = resident.iter().zip(&reads).map(|(one, two)| one + two).collect();
    let of = |times: &[f64]| times.iter().zip(&ideal).map(|(time, ideal)| time / ideal).collect();
    tell(
        "working set of 64 MiB, cold",
        "of resident touches + raw read",
        of(&plain),
        json!({ "s": plain, "ideal": ideal }),
    );
    tell(
        "working set of 64 MiB, cold, with what was touched last",
        "of resident touches + raw read",
        of(&noted),
        json!({ "s": noted }),
    );
    let faster = straw.iter().zip(&plain).map(|(straw, ours)| straw / ours).collect();
    tell("working set of 64 MiB, page at a time", "times ours", faster, json!({ "s": straw }));
}

fn touch_all(guest: &Guest, pages: &[u64]) -> f64 {
    let begun = Instant::now();
    let sum = pages.iter().fold(0_u64, |sum, page| sum.wrapping_add(guest.touch(*page)));
    std::hint::black_box(sum);
    begun.elapsed().as_secs_f64()
}

fn touch_lazily(
    given: &Given,
    folder: &Folder,
    pages: &[u64],
    touched: Option<afterimage::memory::Touched>,
) -> (f64, afterimage::memory::Touched) {
    let guest = Guest::new(given.memory);
    let watch = guest.watch();
    let begun = Instant::now();
    let options = RestoreOptions { touched, ..RestoreOptions::default() };
    let restorer = Restorer::begin(&watch, open(folder), options).unwrap();
    touch_all(&guest, pages);
    let time = begun.elapsed().as_secs_f64();
    (time, restorer.touched())
}

/// Reads the storage blocks that have the working set, and nothing else.
fn read_stored(reader: &Reader, pages: &[u64]) -> f64 {
    let mut blocks = std::collections::BTreeSet::new();
    for page in pages {
        if let afterimage::checkpoint::Found::Stored { stored, .. } = reader.place(PageBlock(page / 16)).unwrap() {
            blocks.insert(stored.block);
        }
    }
    let mut bytes = afterimage::sys::pages::Pages::new(reader.geometry().storage_block()).unwrap();
    let begun = Instant::now();
    for block in blocks {
        reader.read_block(0, block, &mut bytes).unwrap();
    }
    begun.elapsed().as_secs_f64()
}

/// What an example handler does: one page for each fault, out of a flat file.
fn page_at_a_time(full: &Guest, pages: &[u64], dir: &std::path::Path) -> f64 {
    use std::os::unix::fs::FileExt;
    let path = dir.join("flat");
    let flat = File::options().read(true).write(true).create(true).truncate(true).open(&path).unwrap();
    flat.set_len(full.size).unwrap();
    let region = GuestRegion::all(&full.memory).unwrap().remove(0);
    let mut bytes = vec![0; 1 << 20];
    for at in (0..full.size).step_by(bytes.len()) {
        region.read(&mut bytes, at).unwrap();
        if bytes.iter().any(|byte| *byte != 0) {
            flat.write_all_at(&bytes, at).unwrap();
        }
    }
    flat.sync_all().unwrap();
    rustix::fs::fadvise(&flat, 0, None, rustix::fs::Advice::DontNeed).unwrap();
    rustix::fs::fadvise(&flat, 0, None, rustix::fs::Advice::Random).unwrap();
    let guest = Guest::new(full.size);
    let region = GuestRegion::all(&guest.memory).unwrap().remove(0);
    let faults = Userfault::new().unwrap();
    faults.register(&region, 0, region.len(), Watched { missing: true, protected: false }).unwrap();
    let over = AtomicBool::new(false);
    let time = std::thread::scope(|scope| {
        scope.spawn(|| {
            let (mut messages, mut page) = (Messages::new(16), vec![0; PAGE as usize]);
            while !over.load(Ordering::Relaxed) {
                let mut fds = [rustix::event::PollFd::new(&faults, rustix::event::PollFlags::IN)];
                let short = rustix::event::Timespec { tv_sec: 0, tv_nsec: 10_000_000 };
                rustix::event::poll(&mut fds, Some(&short)).unwrap();
                if !faults.read(&mut messages).unwrap() {
                    continue;
                }
                for message in messages.iter() {
                    let Message::Missing(address) = message else { continue };
                    let at = region.offset_of(address).unwrap() / PAGE * PAGE;
                    flat.read_exact_at(&mut page, at).unwrap();
                    let copied = faults.copy(&region, at, &page, How { wake: true, protect: false });
                    assert!(copied.stopped.is_none());
                }
            }
        });
        let time = touch_all(&guest, pages);
        over.store(true, Ordering::Relaxed);
        time
    });
    fs::remove_file(path).unwrap();
    time
}

/// What an index of a large memory costs before it can be touched.
fn opens(given: &Given, folder: &Folder) {
    for gigabytes in [1_u64, 4, 64] {
        let guest = Guest::new(gigabytes << 30);
        guest.memory.write_obj(1_u64, GuestAddress(5 << 20)).unwrap();
        let watch = guest.watch();
        let plan = Plan { replace: true, ..Plan::new(name(), "bench", watch.geometry().clone()) };
        let writer = Writer::create(folder, plan).unwrap();
        afterimage::memory::save_stopped(&watch, &writer, &Silent).unwrap();
        writer.commit(&Cut { created: 0, disks: Vec::new(), state_version: 1, state: b"state" }).unwrap();
        let (mut opening, mut beginning) = (Vec::new(), Vec::new());
        for _ in 0..given.rounds {
            let guest = Guest::new(gigabytes << 30);
            let watch = guest.watch();
            let begun = Instant::now();
            let reader = open(folder);
            opening.push(begun.elapsed().as_secs_f64() * 1e3);
            let begun = Instant::now();
            let restorer = Restorer::begin(&watch, reader, RestoreOptions::default()).unwrap();
            beginning.push(begun.elapsed().as_secs_f64() * 1e3);
            restorer.wait_filled().unwrap();
        }
        tell(&format!("opening a checkpoint of {gigabytes} GiB"), "ms", opening, Value::Null);
        tell(&format!("from there until memory can be touched, {gigabytes} GiB"), "ms", beginning, Value::Null);
    }
}
