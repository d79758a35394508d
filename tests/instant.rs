//! A snapshot that is taken under writers is one instant, and survives the loss of power as it was when it was answered.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use afterimage::disk::{self, BlockDevice};
use afterimage::media::{Media, SimMedia};
use afterimage::snapshot;
use afterimage::store::{InitOptions, OpenOptions, Store};

const BLOCK: usize = 4096;
const BLOCKS: usize = 600;

fn open(media: &SimMedia) -> Arc<Store> {
    let options = OpenOptions { background: false, low_water: Some(0), ballast: 4096, ..OpenOptions::default() };
    Store::open(Arc::new(media.clone()), options).unwrap()
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
