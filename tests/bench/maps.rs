//! How fast diffs are and how small records, over maps of a large disk that are made without its data.
//!
//! The rows are those that a disk writes: slots are handed out, entries captured and submitted as by a flush. Only the data
//! is left out: segments are sparse files of the right length, and an epoch counts as sealed, because nothing could be
//! read back. `tests/bench/diff` runs this and shows the figures; each line of stdout is one, as JSON.
//!
//!     cargo bench --bench maps -- [DIR] [--size GIB] [--parts a,b,...]

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout, clippy::print_stderr, reason = "a bench")]
#![allow(clippy::disallowed_methods, clippy::cast_possible_truncation, missing_docs, reason = "a bench")]

use std::fs;
use std::io::Write as _;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use afterimage::disk;
use afterimage::error::Result;
use afterimage::map::{BlockSet, Entry, Piece};
use afterimage::media::{HostMedia, Media, Open};
use afterimage::pool::segment_path;
use afterimage::progress::Silent;
use afterimage::snapshot;
use afterimage::snapshot::diff::{self, Adding, ChunkPieces, Comparable, Diff, DiffTotal, Sizes, StateName};
use afterimage::snapshot::record::{Record, record_path};
use afterimage::store::{Capture, Edit, Head, InitOptions, MapView, OpenOptions, StateKey, Store};
use afterimage::units::{BLOCK_SIZE, CHUNK_BLOCKS, CHUNK_SIZE, ChunkIndex};

const PARTS: [&str; 4] = ["diff", "ordered", "parallel", "scattered"];
const ROUNDS: usize = 7;
/// Chunks in one submit.
const BATCH: usize = 8192;
const WRITERS: u64 = 16;
/// Chunks of one part of a comparison.
const PART: u32 = 1 << 14;

struct Given {
    dir: PathBuf,
    chunks: u32,
    parts: Vec<String>,
}

fn given() -> Given {
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| PathBuf::from("target"), PathBuf::from);
    let mut given = Given { dir: target.join("bench"), chunks: 1 << 19, parts: PARTS.map(str::to_owned).to_vec() };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        match word.as_str() {
            // Cargo says so to every bench.
            "--bench" => {}
            "--size" => given.chunks = words.next().unwrap().parse::<u32>().unwrap() * 512,
            "--parts" => given.parts = words.next().unwrap().split(',').map(str::to_owned).collect(),
            dir => given.dir = dir.into(),
        }
    }
    given
}

fn main() {
    let given = given();
    fs::create_dir_all(&given.dir).unwrap();
    for part in &given.parts {
        let dir = tempfile::tempdir_in(&given.dir).unwrap();
        let mut pool = Pool::new(dir.path(), given.chunks);
        let begun = Instant::now();
        match part.as_str() {
            "diff" => diffs(pool),
            "ordered" => {
                pool.fill_in_order();
                pool.record_size("record, filled in order");
            }
            "parallel" => {
                pool.fill_in_parallel();
                pool.record_size("record, filled by 16 writers");
            }
            "scattered" => {
                pool.fill_in_order();
                pool.take("full");
                pool.rewrite(pool.blocks() / 10);
                pool.record_size("record, 10 % rewritten at random in one epoch");
            }
            other => panic!("there is no part '{other}'; there are {PARTS:?}"),
        }
        eprintln!("{part}: {:.0} s", begun.elapsed().as_secs_f64());
    }
}

/// Prints a figure.
fn tell(what: &str, value: f64, unit: &str, rounds: &[f64]) {
    let line = serde_json::json!({ "what": what, "value": value, "unit": unit, "rounds": rounds });
    println!("{line}");
    std::io::stdout().flush().unwrap();
}

fn median(times: &[f64]) -> f64 {
    let mut sorted = times.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}

/// Times something several times, in milliseconds.
fn time(what: &str, rounds: usize, mut work: impl FnMut()) {
    let times: Vec<f64> = (0..rounds)
        .map(|_| {
            let begun = Instant::now();
            work();
            begun.elapsed().as_secs_f64() * 1e3
        })
        .collect();
    tell(what, median(&times), "ms", &times);
}

struct Pool {
    dir: PathBuf,
    store: Arc<Store>,
    head: Arc<Head>,
    /// The map as it is, to know what a rewrite replaces.
    entries: Vec<Entry>,
    rows: Vec<Option<StateKey>>,
    random: u64,
}

fn open(dir: &Path) -> Arc<Store> {
    let media: Arc<dyn Media> = Arc::new(HostMedia::new(dir).unwrap());
    let options = OpenOptions { background: false, low_water: Some(0), ..OpenOptions::default() };
    Store::open(media, options).unwrap()
}

impl Pool {
    fn new(dir: &Path, chunks: u32) -> Self {
        let media: Arc<dyn Media> = Arc::new(HostMedia::new(dir).unwrap());
        Store::init(&media, InitOptions { ballast: 0, ..InitOptions::default() }).unwrap();
        let store = open(dir);
        let info = disk::create(&store, "big", u64::from(chunks) * CHUNK_SIZE).unwrap();
        let head = store.head(info.id).unwrap();
        let entries = vec![Entry::EMPTY; chunks as usize];
        Self { dir: dir.to_owned(), store, head, entries, rows: vec![None; chunks as usize], random: 0x5eed }
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random >> 11) % limit
    }

    fn blocks(&self) -> u64 {
        self.entries.len() as u64 * CHUNK_BLOCKS
    }

    /// Writes blocks of chunks in this order: hands out slots and puts the new entries where a flush would.
    fn write(&mut self, writes: &[(u32, BlockSet)]) {
        let line = self.head.line();
        for batch in writes.chunks(BATCH) {
            let mut captures = Vec::with_capacity(batch.len());
            for (chunk, set) in batch {
                let (at, chunk) = (*chunk as usize, ChunkIndex(*chunk));
                let saved = self.entries[at].clone();
                for (slab, part) in self.head.hand_out(&self.store, chunk, set).unwrap() {
                    self.entries[at].assign(slab.base, &part);
                }
                let entry = self.entries[at].clone();
                let fresh = entry.mapped().minus(&saved.mapped()).count();
                self.head.count(i64::from(fresh));
                let row = self.rows[at].replace((line.branch, line.epoch));
                captures.push(Capture {
                    chunk,
                    epoch: line.epoch,
                    entry,
                    saved,
                    row,
                    dropped: Vec::new(),
                    fresh: 0,
                    marked: false,
                });
            }
            let ticket = self.store.submit_captures(self.head.id, &line, captures).unwrap();
            self.store.ledger.wait(ticket).unwrap();
        }
        self.stretch();
    }

    /// Makes the segments as long as if the data were in them.
    fn stretch(&self) {
        let mut ends = std::collections::BTreeMap::new();
        for piece in self.entries.iter().flat_map(Entry::pieces) {
            let end: &mut u64 = ends.entry(piece.base.segment()).or_default();
            *end = (*end).max(piece.base.byte() + CHUNK_SIZE);
        }
        for (segment, end) in ends {
            let file = self.store.media().open(&segment_path(segment), Open::Existing).unwrap();
            if file.len().unwrap() < end {
                file.set_len(end).unwrap();
            }
        }
    }

    fn fill_in_order(&mut self) {
        let all: Vec<_> = (0..self.entries.len() as u32).map(|chunk| (chunk, BlockSet::FULL)).collect();
        self.write(&all);
    }

    /// Every writer fills a part of the disk in order; who is next is a matter of chance.
    fn fill_in_parallel(&mut self) {
        let share = self.entries.len() as u64 / WRITERS;
        let mut next: Vec<u64> = (0..WRITERS).map(|writer| writer * share).collect();
        let mut all = Vec::new();
        while all.len() < self.entries.len() {
            let writer = self.below(WRITERS);
            let at = next[writer as usize];
            if at < (writer + 1) * share {
                all.push((at as u32, BlockSet::FULL));
                next[writer as usize] += 1;
            }
        }
        self.write(&all);
    }

    /// Rewrites so many blocks, picked at random.
    fn rewrite(&mut self, blocks: u64) {
        let mut sets = vec![BlockSet::EMPTY; self.entries.len()];
        let mut left = blocks;
        while left > 0 {
            let block = self.below(self.blocks());
            let (chunk, index) = ((block / CHUNK_BLOCKS) as usize, (block % CHUNK_BLOCKS) as usize);
            if !sets[chunk].has(index) {
                sets[chunk].add(index);
                left -= 1;
            }
        }
        let all: Vec<_> = (0..).zip(sets).filter(|(_, set)| !set.is_empty()).collect();
        self.write(&all);
    }

    /// Takes a snapshot whose epoch counts as sealed.
    fn take(&mut self, name: &str) {
        let taken = snapshot::take(&self.store, &[("big".to_owned(), name.to_owned())]).unwrap();
        let ticket = {
            let mut tables = self.store.tables.write();
            let mut edit = Edit::new(&mut tables);
            edit.change_snapshot(taken[0].id, |row| row.sealed = true);
            self.store.ledger.submit(edit.finish()).unwrap()
        };
        self.store.ledger.wait(ticket).unwrap();
    }

    /// Takes a snapshot, retires it, and tells the size of its record.
    fn record_size(mut self, what: &str) {
        self.take("last");
        let begun = Instant::now();
        let record = self.retire("last");
        let took = begun.elapsed().as_secs_f64();
        tell(what, fs::metadata(record).unwrap().len() as f64 / 1024.0, "KiB", &[]);
        tell(&format!("{what}: writing it"), took * 1e3, "ms", &[]);
        drop(self.head);
        self.store.close().unwrap();
    }

    /// Retires a snapshot, keeps its blocks, and returns the path of its record.
    fn retire(&self, name: &str) -> PathBuf {
        let info = self.store.snapshot_info("big", name).unwrap();
        self.store.hold_open(info.id);
        snapshot::retire(&self.store, &[("big".to_owned(), name.to_owned())]).unwrap();
        snapshot::wait_retired(&self.store, &Silent).unwrap();
        self.dir.join(record_path(info.uuid))
    }
}

/// Chunks that are decoded: for each where its pieces end.
struct Decoded {
    chunks: Vec<(ChunkIndex, usize)>,
    pieces: Vec<Piece>,
}

impl Comparable for Decoded {
    fn part(&self, part: Range<u32>) -> Result<Box<dyn ChunkPieces + '_>> {
        let at = |end: u32| self.chunks.partition_point(|(chunk, _)| chunk.0 < end);
        let begin = at(part.start).checked_sub(1).map_or(0, |before| self.chunks[before].1);
        let chunks = self.chunks[at(part.start)..at(part.end)].iter();
        Ok(Box::new(DecodedWalk { pieces: &self.pieces, chunks, begin }))
    }
}

struct DecodedWalk<'a> {
    pieces: &'a [Piece],
    chunks: std::slice::Iter<'a, (ChunkIndex, usize)>,
    begin: usize,
}

impl ChunkPieces for DecodedWalk<'_> {
    fn step(&mut self) -> Result<Option<(ChunkIndex, &[Piece])>> {
        let Some((chunk, end)) = self.chunks.next() else { return Ok(None) };
        let begin = std::mem::replace(&mut self.begin, *end);
        Ok(Some((*chunk, &self.pieces[begin..*end])))
    }
}

fn decode(view: &MapView) -> Decoded {
    let mut walk = view.walk(ChunkIndex(0)).unwrap();
    let mut all = Decoded { chunks: Vec::new(), pieces: Vec::new() };
    while let Some(found) = walk.step().unwrap() {
        let mut pieces = found.entry.pieces();
        pieces.sort_unstable_by_key(|piece| piece.base);
        all.pieces.extend(pieces);
        all.chunks.push((found.chunk, all.pieces.len()));
    }
    all
}

fn between(store: &Arc<Store>, from: &str, to: &str) -> DiffTotal {
    let diff: Diff = diff::open(store, &StateName::parse(from), &StateName::parse(to)).unwrap();
    // Extent by extent, as `diff`, `send` and `export` go over them: the sums alone take less.
    let mut total = DiffTotal { from_size: diff.from_size(), to_size: diff.to_size(), ..DiffTotal::default() };
    diff.each(&mut |extent| {
        total.add(&extent);
        Ok(())
    })
    .unwrap();
    total
}

/// A full disk, a retired snapshot of it, and 1 % written since; then 1,000 blocks more.
fn diffs(mut pool: Pool) {
    let blocks = pool.blocks();
    pool.fill_in_order();
    pool.take("full");
    pool.rewrite(blocks / 100);
    pool.take("changed");
    pool.rewrite(1000);
    pool.take("little");
    let record = pool.retire("full");
    tell("record of the retired base", fs::metadata(record).unwrap().len() as f64 / 1024.0, "KiB", &[]);

    let store = Arc::clone(&pool.store);
    let uuid = store.snapshot_info("big", "full").unwrap().uuid;
    let node = {
        let tables = store.tables.read();
        tables.snapshot(pool.head.id, "changed").unwrap().0
    };
    let want = |total: DiffTotal, changed: u64| assert_eq!((total.data, total.zero), (changed * BLOCK_SIZE, 0));
    let pool_chunks = pool.entries.len() as u32;
    let base = Record::open(&**store.media(), uuid).unwrap();
    let decoded = decode(&store.map_of(node));
    let sizes = Sizes { from: blocks * BLOCK_SIZE, to: blocks * BLOCK_SIZE };
    time("1 % changed, both sides decoded in memory", ROUNDS, || {
        let empty = Adding::new(sizes);
        let mut all = empty.clone();
        let each = &mut |part: Adding| {
            all.append(&part);
            Ok(())
        };
        diff::compare(&base, &decoded, sizes, [pool_chunks, PART], &empty, each).unwrap();
        want(all.finish(), blocks / 100);
    });
    drop((base, decoded));
    time("1 % changed, from a cached catalog", ROUNDS, || {
        want(between(&store, "big@full", "big@changed"), blocks / 100);
    });
    time("1,000 blocks changed, against the ancestor", ROUNDS, || {
        want(between(&store, "big@changed", "big@little"), 1000);
    });
    let dir = pool.dir.clone();
    drop(pool);
    let mut store = store;
    let mut times = Vec::new();
    for _ in 0..3 {
        store.close().unwrap();
        drop(store);
        store = open(&dir);
        rustix::fs::sync();
        if fs::write("/proc/sys/vm/drop_caches", "3\n").is_err() {
            eprintln!("not root: nothing is cold");
        }
        let begun = Instant::now();
        want(between(&store, "big@full", "big@changed"), blocks / 100);
        times.push(begun.elapsed().as_secs_f64() * 1e3);
    }
    tell("1 % changed, cold", median(&times), "ms", &times);
    store.close().unwrap();
}
