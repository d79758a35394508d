//! Instants that are hard to hit: a snapshot under writers, and a loss of power soon after a kill.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use afterimage::disk::{self, BlockDevice};
use afterimage::error::Kind;
use afterimage::media::{Media, SimMedia};
use afterimage::snapshot;
use afterimage::store::{InitOptions, OpenOptions, Store};

const BLOCK: usize = 4096;
const BLOCKS: usize = 600;

fn options() -> OpenOptions {
    OpenOptions { background: false, low_water: Some(0), ballast: 4096, ..OpenOptions::default() }
}

fn open(media: &SimMedia) -> Arc<Store> {
    Store::open(Arc::new(media.clone()), options()).unwrap()
}

fn content(store: &Arc<Store>, snapshot: &str) -> Vec<u8> {
    let mut bytes = vec![0; BLOCKS * BLOCK];
    snapshot::open(store, "a", snapshot).unwrap().read(&mut bytes, 0).unwrap();
    bytes
}

/// What is written after the data was synced, and before the writers are stopped for a moment, is the snapshot's, too.
#[test]
fn a_snapshot_under_a_writer_is_durable_with_all_that_it_has() {
    for seed in 1..=30 {
        let media = SimMedia::new(seed);
        let shared: Arc<dyn Media> = Arc::new(media.clone());
        Store::init(&shared, InitOptions { journal: 4 << 20, ballast: 4096, probe: false }).unwrap();
        let store = open(&media);
        disk::create(&store, "a", (BLOCKS * BLOCK) as u64).unwrap();
        let disk = disk::open(&store, "a").unwrap();
        let (begun, ended) = (AtomicBool::new(false), AtomicBool::new(false));
        let then = std::thread::scope(|scope| {
            scope.spawn(|| {
                for number in 1_usize.. {
                    let at = number * 37 % (BLOCKS - 3);
                    disk.write(&vec![number as u8; 3 * BLOCK], (at * BLOCK) as u64).unwrap();
                    begun.store(number > 50, Ordering::Release);
                    if ended.load(Ordering::Acquire) {
                        return;
                    }
                }
            });
            while !begun.load(Ordering::Acquire) {
                std::thread::yield_now();
            }
            let taken = ["s", "t"].map(|name| {
                snapshot::take(&store, &[("a".into(), name.into())]).unwrap();
                (name, content(&store, name))
            });
            ended.store(true, Ordering::Release);
            taken
        });
        drop((disk, store));
        media.crash();
        let store = open(&media);
        for (name, then) in then {
            let now = content(&store, name);
            let differs = (0..BLOCKS * BLOCK).find(|at| now[*at] != then[*at]);
            assert_eq!(differs, None, "seed {seed}, snapshot {name}: the first byte that differs");
        }
    }
}

/// What a killed process was about to commit may be in the page cache alone, and the next one goes on behind it: a loss of
/// power must not keep what came later without it.
#[test]
fn what_follows_a_frame_that_a_killed_process_had_not_synced_never_outlives_it() {
    let mut unsynced = 0;
    for seed in 1..=200 {
        let media = SimMedia::new(seed);
        let shared: Arc<dyn Media> = Arc::new(media.clone());
        Store::init(&shared, InitOptions { journal: 4 << 20, ballast: 4096, probe: false }).unwrap();
        let store = open(&media);
        // Its frame is written and not synced.
        media.crash_after(2);
        assert_eq!(disk::create(&store, "a", 1 << 20).unwrap_err().kind(), Kind::Io);
        drop(store);
        media.kill();
        let before = media.fork(seed);
        unsynced += usize::from(open(&before).disk_info("a").is_ok());
        // The next process writes its first frame, or more than that.
        media.crash_after(1 + seed % 12);
        drop(Store::open(Arc::new(media.clone()), options()));
        media.crash();
        // It is corrupt where a frame is missing before another one.
        drop(open(&media));
    }
    assert_eq!(unsynced, 200);
}
