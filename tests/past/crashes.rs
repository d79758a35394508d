//! A power cut at every I/O of a retire, and a retire on a full host.

use afterimage::disk::{self, BlockDevice};
use afterimage::error::Kind;
use afterimage::progress::Silent;
use afterimage::snapshot;
use afterimage::snapshot::diff::{self, StateName};
use afterimage::store::SnapshotState;

use super::{BLOCK, MIB, Pool, data, fill};

/// XO (#10098): data purged though the list of its blocks was not safe, and the next backup was full without a word. At any
/// moment there is the live snapshot or the retired one, and what a diff needs is there before the first block goes.
#[test]
fn crash_between_record_and_free() {
    let mut states = [0, 0];
    for (seed, countdown) in (1..400).flat_map(|countdown| (1..=4).map(move |seed| (seed, countdown))) {
        let mut pool = Pool::seeded(seed * 1000 + countdown);
        let disk = pool.disk("d", 4 * MIB);
        fill(&disk, 0, 2 * MIB, 1);
        pool.take("d", "a");
        fill(&disk, 0, MIB, 2);
        disk.flush().unwrap();
        drop(disk);
        pool.media.crash_after(countdown);
        let target = [("d".to_owned(), "a".to_owned())];
        let retired = snapshot::retire(&pool.store, &target).is_ok();
        let waited = retired && snapshot::wait_retired(&pool.store, &Silent).is_ok();
        let done = waited && !pool.media.is_down();
        pool.media.crash();
        pool.store = Pool::open(&pool.media);
        pool.sound();
        let info = pool.store.snapshot_info("d", "a").expect("never neither");
        let live = info.state == SnapshotState::Live;
        assert!(!(live && retired), "what was answered holds (crash after {countdown})");
        states[usize::from(live)] += 1;
        assert_eq!(pool.diff("d@a", "d"), [data(0, MIB)], "crash after {countdown}");
        if live {
            let mut bytes = vec![0; usize::try_from(2 * MIB).unwrap()];
            snapshot::open(&pool.store, "d", "a").unwrap().read(&mut bytes, 0).unwrap();
            assert!(bytes.iter().all(|byte| *byte == 1));
        }
        snapshot::retire(&pool.store, &target).unwrap();
        snapshot::wait_retired(&pool.store, &Silent).unwrap();
        pool.sound();
        assert_eq!(pool.diff("d@a", "d"), [data(0, MIB)]);
        assert!(pool.allocated() <= 2 * MIB / BLOCK + 16, "{} blocks", pool.allocated());
        if done {
            assert!(states[0] > 0 && states[1] > 0, "crashes before and after the commit: {states:?}");
            return;
        }
    }
    panic!("400 operations were not enough to retire a snapshot");
}

/// What is taken of a live disk for a moment, to look at it or to clone it, holds no data after a crash.
#[test]
fn a_crash_leaves_no_snapshot_that_nobody_asked_for() {
    let verify = |pool: &Pool| {
        let names = ["d@a", "d"].map(StateName::parse);
        diff::verify(&pool.store, &names[0], &names[1], &Silent).is_ok()
    };
    let clone = |pool: &Pool| {
        let target = disk::open(&pool.store, "e").unwrap().id();
        snapshot::clone_into(&pool.store, "d", None, target).is_ok()
    };
    for (what, work) in [("verify", &verify as &dyn Fn(&Pool) -> bool), ("clone", &clone)] {
        let mut countdown = 0;
        loop {
            countdown += 1;
            let mut pool = Pool::seeded(countdown);
            let disk = pool.disk("d", 2 * MIB);
            fill(&disk, 0, 2 * MIB, 1);
            pool.take("d", "a");
            fill(&disk, 0, MIB, 2);
            disk.flush().unwrap();
            drop(disk);
            drop(pool.disk("e", 2 * MIB));
            pool.media.crash_after(countdown);
            let done = work(&pool) && !pool.media.is_down();
            pool.media.crash();
            pool.store = Pool::open(&pool.media);
            pool.sound();
            let id = disk::open(&pool.store, "d").unwrap().id();
            let written = pool.store.tables.read().written_since(id).unwrap() * BLOCK;
            assert!(written >= MIB, "{what} {countdown}: what was written since counts: {written}");
            disk::remove(&pool.store, "e", true).unwrap();
            snapshot::remove(&pool.store, "d", "a").unwrap();
            fill(&disk::open(&pool.store, "d").unwrap(), 0, 2 * MIB, 3);
            pool.store.flush_all().unwrap();
            pool.store.reclaim_wait(&Silent).unwrap();
            pool.sound();
            let blocks = pool.allocated();
            assert!(blocks <= 2 * MIB / BLOCK + 16, "{what}, crash after {countdown}: {blocks} blocks");
            if done {
                break;
            }
        }
        assert!(countdown > 4, "{what} has a beginning and an end");
    }
}

/// longhorn#2777: freeing itself needed room. Nothing but the ballast is free here.
#[test]
fn a_full_host_can_still_retire() {
    let pool = Pool::new();
    let disk = pool.disk("d", 4 * MIB);
    fill(&disk, 0, 2 * MIB, 1);
    pool.take("d", "a");
    fill(&disk, 0, 2 * MIB, 2);
    disk.flush().unwrap();
    // The journal is preallocated. A record needs a block, and only giving up the ballast frees one.
    pool.media.set_space(Some(0));
    let error = disk.write(&vec![3; 4096], 3 * MIB).unwrap_err();
    assert_eq!(error.kind(), Kind::NoSpace, "{error}");
    pool.retire("d", "a");
    assert_eq!(pool.diff("d@a", "d"), [data(0, 2 * MIB)]);
    assert!(pool.allocated() <= 2 * MIB / BLOCK + 16, "{} blocks", pool.allocated());
    disk.write(&vec![3; 4096], 3 * MIB).unwrap();
    disk.flush().unwrap();
    pool.sound();
}
