//! Restores: what is touched is what was saved, and what is written stays.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use afterimage::checkpoint::{Found, PageBlock, Reader, Source, StorageBlock};
use afterimage::error::Kind;
use afterimage::memory::{Event, Touched, save_stopped};
use afterimage::sync::Mutex;

use super::*;

/// Counts what is read, takes its time, and fails when it is told to.
#[derive(Debug, Default)]
pub(super) struct Between {
    pub(super) reads: AtomicU64,
    pub(super) order: Mutex<Vec<StorageBlock>>,
    pub(super) delay: Duration,
    pub(super) broken: AtomicBool,
    pub(super) panics: AtomicBool,
}

#[derive(Debug)]
struct Wrapped(Arc<dyn Source>, Arc<Between>);

impl Source for Wrapped {
    fn read_block(&self, block: StorageBlock, out: &mut [u8]) -> std::io::Result<()> {
        self.1.reads.fetch_add(1, Ordering::SeqCst);
        self.1.order.lock().push(block);
        std::thread::sleep(self.1.delay);
        assert!(!self.1.panics.load(Ordering::SeqCst), "a mistake, for the test");
        if self.1.broken.load(Ordering::SeqCst) {
            return Err(std::io::ErrorKind::BrokenPipe.into());
        }
        self.0.read_block(block, out)
    }
}

pub(super) fn through(mut reader: Reader, between: &Arc<Between>) -> Reader {
    reader.wrap(|_, source| Arc::new(Wrapped(source, Arc::clone(between))));
    reader
}

/// A checkpoint of a memory, and the memory.
pub(super) fn saved(folder: &Folder, seed: u64) -> (Guest, Vec<u8>) {
    let guest = Guest::usual();
    guest.fill(seed);
    let watch = guest.watch();
    let to = writer(folder, "a", &watch, None);
    save_stopped(&watch, &to, &Silent).unwrap();
    to.commit(&cut()).unwrap();
    let twin = guest.content();
    (guest, twin)
}

pub(super) fn only_when_touched() -> RestoreOptions {
    RestoreOptions { background: false, ..RestoreOptions::default() }
}

/// The first byte of a page block that is not zeros, from a page block on.
pub(super) fn something(twin: &[u8], from: usize) -> usize {
    (from..).find(|block| twin[block << 16..][..1 << 16].iter().any(|byte| *byte != 0)).unwrap() << 16
}

#[test]
fn what_the_guest_writes_while_memory_comes_stays() {
    let (_, folder) = media();
    let (like, mut twin) = saved(&folder, 7);
    let guest = empty_like(&like);
    let watch = guest.watch();
    let restorer = Restorer::begin(&watch, open(&folder, "a"), RestoreOptions::default()).unwrap();
    // Each thread has the numbers to itself that it writes.
    let written: Vec<(u64, u64)> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4_u64)
            .map(|number| {
                let guest = &guest;
                scope.spawn(move || {
                    let mut random = Random(number + 5);
                    let mut written = Vec::new();
                    for _ in 0..3000 {
                        let at = (random.below(guest.size() / 32) * 4 + number) * 8;
                        let value = random.next();
                        guest.store(at, value);
                        written.push((at, value));
                    }
                    written
                })
            })
            .collect();
        threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
    });
    for (at, value) in written {
        twin[usize::try_from(at).unwrap()..][..8].copy_from_slice(&value.to_le_bytes());
    }
    restorer.wait_filled().unwrap();
    assert!(matches!(restorer.event(Duration::ZERO), Event::Filled));
    assert_same(&guest.content(), &twin, "after writes");
    let figures = restorer.figures();
    assert!(figures.faults > 0 && figures.waits.count > 0, "{figures:?}");
}

/// Faults on one page block are one read of its storage block, and nothing is read that nobody touches.
#[test]
fn what_is_touched_by_many_is_read_once() {
    let (_, folder) = media();
    let (like, twin) = saved(&folder, 8);
    let guest = empty_like(&like);
    let watch = guest.watch();
    let between = Arc::new(Between { delay: Duration::from_millis(50), ..Between::default() });
    let reader = through(open(&folder, "a"), &between);
    let restorer = Restorer::begin(&watch, reader, only_when_touched()).unwrap();
    let at = something(&twin, 3);
    std::thread::scope(|scope| {
        for page in 0..8_u64 {
            let (guest, twin) = (&guest, &twin);
            scope.spawn(move || {
                let at = at as u64 + page * PAGE;
                let wanted = twin[usize::try_from(at).unwrap()..][..8].try_into().unwrap();
                assert_eq!(guest.load(at), u64::from_le_bytes(wanted));
            });
        }
    });
    assert_eq!(between.reads.load(Ordering::SeqCst), 1);
    // What else the storage block holds follows by itself.
    let patience = Instant::now() + Duration::from_secs(10);
    while restorer.figures().page_blocks - restorer.figures().left < 5 {
        assert!(Instant::now() < patience, "{:?}", restorer.figures());
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(between.reads.load(Ordering::SeqCst), 1);
    let figures = restorer.stop();
    assert!(!figures.resident && figures.left > 0, "{figures:?}");
}

#[test]
fn a_slow_source_is_waited_for() {
    let (_, folder) = media();
    let (like, twin) = saved(&folder, 9);
    let guest = empty_like(&like);
    let watch = guest.watch();
    let between = Arc::new(Between { delay: Duration::from_millis(15), ..Between::default() });
    let restorer = Restorer::begin(&watch, through(open(&folder, "a"), &between), RestoreOptions::default()).unwrap();
    let at = something(&twin, 100);
    assert_eq!(guest.load(at as u64), u64::from_le_bytes(twin[at..at + 8].try_into().unwrap()));
    restorer.wait_filled().unwrap();
    assert_same(&guest.content(), &twin, "from a slow source");
    assert!(restorer.figures().stalls > 0);
}

#[test]
fn what_was_touched_is_noted_and_comes_first_the_next_time() {
    let (media, folder) = media();
    let (like, twin) = saved(&folder, 10);
    let touched = {
        let guest = empty_like(&like);
        let watch = guest.watch();
        let restorer = Restorer::begin(&watch, open(&folder, "a"), only_when_touched()).unwrap();
        for block in [200, 40, 300] {
            guest.load(something(&twin, block) as u64);
        }
        let touched = restorer.touched();
        touched.store(&folder, &name("a")).unwrap();
        touched.store(&folder, &name("a")).unwrap();
        touched
    };
    assert_eq!(touched.blocks().len(), 3);
    let reader = open(&folder, "a");
    assert_eq!(Touched::load(&folder, &name("a"), reader.header()), Some(touched.clone()));
    // One that is damaged is none, and so is one of another checkpoint.
    let bytes = touched.encode();
    for bit in 0..bytes.len() * 8 {
        let mut bad = bytes.clone();
        bad[bit / 8] ^= 1 << (bit % 8);
        Touched::decode(&bad, reader.header()).unwrap_err();
    }
    for len in 0..bytes.len() {
        Touched::decode(&bytes[..len], reader.header()).unwrap_err();
    }
    media.flip_bit(&folder.faults(&name("a")), 40, 3).unwrap();
    assert_eq!(Touched::load(&folder, &name("a"), reader.header()), None);

    let guest = empty_like(&like);
    let watch = guest.watch();
    let between = Arc::new(Between::default());
    let of = |block: &PageBlock| match reader.place(*block).unwrap() {
        Found::Stored { stored, .. } => stored.block,
        Found::Zero => panic!("it is zeros"),
    };
    let first: BTreeSet<StorageBlock> = touched.blocks().iter().map(of).collect();
    assert!((first.len() as u32) < reader.layers()[0].footer().blocks, "there is more than was touched");
    let options = RestoreOptions { workers: 1, touched: Some(touched), ..RestoreOptions::default() };
    let restorer = Restorer::begin(&watch, through(reader, &between), options).unwrap();
    restorer.wait_filled().unwrap();
    assert_same(&guest.content(), &twin, "after what was touched");
    let order = between.order.lock();
    assert_eq!(order[..first.len()].iter().copied().collect::<BTreeSet<_>>(), first, "{order:?}");
}

/// Page blocks that are not there yet are taken from where they are; those that were written to are the guest's.
#[test]
fn a_save_while_memory_comes_is_right() {
    for (threads, background, based) in
        [(0, false, false), (2, false, false), (4, true, false), (2, false, true), (4, true, true)]
    {
        let (_, folder) = media();
        let (like, source) = saved(&folder, 11 + threads);
        let guest = empty_like(&like);
        let watch = guest.watch();
        let between = Arc::new(Between { delay: Duration::from_millis(3), ..Between::default() });
        let reader = through(open(&folder, "a"), &between);
        let options = RestoreOptions { background, keep_tracking: based, ..RestoreOptions::default() };
        let restorer = Restorer::begin(&watch, reader, options).unwrap();
        let writers = Writers { reach: 8 << 20, ..Writers::shadowed(&guest, &source) };
        let keep = SaveOptions { keep_tracking: true, ..SaveOptions::default() };
        let twin = writers.during(threads, || {
            let parent = based.then_some("a");
            let (twin, figures) = save_live(&guest, &watch, &writers, writer(&folder, "b", &watch, parent), keep);
            assert!(!based || figures.inherited > 0, "{figures:?}");
            twin
        });
        assert!(background || restorer.figures().left > 0, "{:?}", restorer.figures());
        // The next one is based on that one, and memory may still be coming.
        let next = writer(&folder, "c", &watch, Some("b"));
        let (second, _) = save_live(&guest, &watch, &writers, next, SaveOptions::default());
        assert_restores(&folder, "b", &guest, &twin);
        assert_restores(&folder, "c", &guest, &second);
        if background {
            restorer.wait_filled().unwrap();
            assert_same(&guest.content(), &writers.content(), "the memory itself");
        }
    }
}

/// One that is stopped brings what is not there first.
#[test]
fn a_machine_that_is_stopped_while_memory_comes_is_saved() {
    let (_, folder) = media();
    let (like, twin) = saved(&folder, 13);
    let guest = empty_like(&like);
    let watch = guest.watch();
    let restorer = Restorer::begin(&watch, open(&folder, "a"), only_when_touched()).unwrap();
    let to = writer(&folder, "b", &watch, None);
    save_stopped(&watch, &to, &Silent).unwrap();
    to.commit(&cut()).unwrap();
    restorer.wait_filled().unwrap();
    assert_restores(&folder, "b", &guest, &twin);
}

#[test]
fn memory_that_is_no_place_for_it_is_refused() {
    let (_, folder) = media();
    let (like, _) = saved(&folder, 12);
    let other = Guest::new(1 << 20, 1 << 20);
    let watch = other.watch();
    let begin = |watch: &Watch| Restorer::begin(watch, open(&folder, "a"), only_when_touched()).map(drop);
    assert_eq!(begin(&watch).unwrap_err().kind(), Kind::Usage);
    assert_eq!(restore_all(&watch, &open(&folder, "a"), 1, &Silent).unwrap_err().kind(), Kind::Usage);
    let guest = empty_like(&like);
    guest.store(1 << 20, 1);
    assert_eq!(begin(&guest.watch()).unwrap_err().kind(), Kind::Usage);
}
