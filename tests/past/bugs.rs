//! Changes that other systems have missed, or told wrongly.

use std::collections::BTreeSet;
use std::sync::Arc;

use afterimage::disk::{self, BlockDevice};
use afterimage::progress::Silent;
use afterimage::snapshot;

use super::{BLOCK, MIB, Pool, data, fill, zero};

/// ZFS hole_birth (openzfs/zfs#4996, #5030): a file cut and grown again between two snapshots kept its old blocks in the
/// increment, because holes had no time of birth.
#[test]
fn truncate_and_regrow() {
    let pool = Pool::new();
    let disk = pool.disk("d", 8 * MIB);
    fill(&disk, 0, 8 * MIB, 1);
    pool.take("d", "a");
    pool.retire("d", "a");
    disk.resize(3 * MIB, true).unwrap();
    disk.resize(8 * MIB, false).unwrap();
    fill(&disk, 5 * MIB, 6 * MIB, 2);
    assert_eq!(pool.diff("d@a", "d"), [zero(3 * MIB, 2 * MIB), data(5 * MIB, MIB), zero(6 * MIB, 2 * MIB)]);
    pool.take("d", "b");
    assert_eq!(pool.diff("d@a", "d@b").len(), 3);
    // A shrink that goes on in the background hides nothing either.
    disk.resize(MIB, true).unwrap();
    pool.take("d", "c");
    assert_eq!(pool.diff("d@b", "d@c"), []);
    let back = [data(MIB, 2 * MIB), zero(3 * MIB, 2 * MIB), data(5 * MIB, MIB), zero(6 * MIB, 2 * MIB)];
    assert_eq!(pool.diff("d@c", "d@b"), back);
}

/// VMware KB 2090639: a disk that grew past a size at which the tracker's units changed lost changed blocks.
#[test]
fn growth_past_a_size_limit() {
    let pool = Pool::new();
    let disk = pool.disk("d", MIB);
    fill(&disk, 0, MIB, 1);
    pool.take("d", "a");
    pool.retire("d", "a");
    // Past a chunk, a group of the index, a segment's worth of slots, and to the largest disk there is.
    for (n, size) in [3 * MIB, 1025 * MIB, (1 << 40) + MIB, 64 << 40].into_iter().enumerate() {
        disk.resize(size, false).unwrap();
        fill(&disk, size - BLOCK, size, 2);
        fill(&disk, 0, BLOCK, 3);
        let snap = format!("s{n}");
        pool.take("d", &snap);
        let told = pool.diff("d@a", &format!("d@{snap}"));
        assert_eq!(told.first(), Some(&data(0, BLOCK)), "to {size}");
        assert_eq!(told.last(), Some(&data(size - BLOCK, BLOCK)), "to {size}");
        assert_eq!(told.iter().map(|extent| extent.length).sum::<u64>(), size - MIB + BLOCK, "to {size}");
        let back = pool.diff(&format!("d@{snap}"), "d@a");
        assert_eq!(back, [data(0, BLOCK)], "from {size}");
    }
}

/// QEMU, CloudStack (#8907), btrbk (#428): after a revert the base of the next increment was gone, or blocks written
/// before the revert were taken for unchanged.
#[test]
fn revert() {
    let pool = Pool::new();
    let disk = pool.disk("d", 4 * MIB);
    fill(&disk, 0, MIB, 1);
    pool.take("d", "a");
    fill(&disk, 0, 2 * BLOCK, 2);
    fill(&disk, MIB, MIB + BLOCK, 2);
    pool.take("d", "b");
    pool.retire("d", "b");
    fill(&disk, BLOCK, 2 * BLOCK, 3);
    snapshot::revert(&pool.store, "d", "a", None).unwrap();
    let disk = disk::open(&pool.store, "d").unwrap();
    assert_eq!(pool.diff("d@a", "d"), []);
    assert_eq!(pool.diff("d@b", "d"), [data(0, 2 * BLOCK), zero(MIB, BLOCK)]);
    fill(&disk, 3 * BLOCK, 4 * BLOCK, 4);
    pool.take("d", "c");
    assert_eq!(pool.diff("d@b", "d@c"), [data(0, 2 * BLOCK), data(3 * BLOCK, BLOCK), zero(MIB, BLOCK)]);
    assert_eq!(pool.diff("d@c", "d@a"), [data(3 * BLOCK, BLOCK)]);
}

/// The ABA of every tracker by address: a block is freed, its place is handed out again, and the new content passes for
/// the old one.
#[test]
fn address_reuse() {
    let mut pool = Pool::new();
    let disk = pool.disk("d", 4 * MIB);
    fill(&disk, 0, MIB, 1);
    pool.take("d", "a");
    pool.retire("d", "a");
    drop(disk);
    for round in 0..4 {
        let disk = disk::open(&pool.store, "d").unwrap();
        disk.discard(0, 4 * MIB).unwrap();
        disk.flush().unwrap();
        pool.store.reclaim_wait(&Silent).unwrap();
        fill(&disk, 0, MIB, 2 + round);
        assert_eq!(pool.diff("d@a", "d"), [data(0, MIB)], "round {round}");
        drop(disk);
        if round == 1 {
            pool.reopen();
        }
    }
    // Discarded and written again within one epoch, without anything in between.
    pool.take("d", "b");
    let disk = disk::open(&pool.store, "d").unwrap();
    fill(&disk, 0, BLOCK, 7);
    disk.discard(0, BLOCK).unwrap();
    fill(&disk, 0, BLOCK, 8);
    assert_eq!(pool.diff("d@b", "d"), [data(0, BLOCK)]);
}

/// VMware KB 317933, XenServer: changes made while neighbours were merged or deleted were lost.
#[test]
fn delete_of_neighbours() {
    let pool = Pool::new();
    let disk = pool.disk("d", 4 * MIB);
    for (n, snap) in ["a", "b", "c", "d", "e"].into_iter().enumerate() {
        let at = n as u64 * 16 * BLOCK;
        fill(&disk, at, at + 16 * BLOCK, 1);
        fill(&disk, 3 * MIB, 3 * MIB + BLOCK, u8::try_from(n).unwrap());
        pool.take("d", snap);
    }
    pool.retire("d", "a");
    let expected = |from: u64| vec![data(from * 16 * BLOCK, (5 - from) * 16 * BLOCK), data(3 * MIB, BLOCK)];
    assert_eq!(pool.diff("d@a", "d@e"), expected(1));
    for gone in ["c", "d", "b"] {
        snapshot::remove(&pool.store, "d", gone).unwrap();
        assert_eq!(pool.diff("d@a", "d@e"), expected(1), "before {gone} is freed");
        pool.store.reclaim_wait(&Silent).unwrap();
        assert_eq!(pool.diff("d@a", "d@e"), expected(1), "after {gone} was freed");
        pool.sound();
    }
    pool.retire("d", "e");
    assert_eq!(pool.diff("d@a", "d@e"), expected(1));
    assert_eq!(pool.diff("d@e", "d"), []);
}

/// A fork point of clones that is deleted: states on both sides of it lose the node between them.
#[test]
fn deleted_fork_points_of_clones() {
    let pool = Pool::new();
    let disk = pool.disk("d", 4 * MIB);
    fill(&disk, 0, MIB, 1);
    pool.take("d", "fork");
    let clones: Vec<Arc<disk::Disk>> = ["x", "y"]
        .into_iter()
        .enumerate()
        .map(|(n, name)| {
            snapshot::clone(&pool.store, "d", "fork", name).unwrap();
            let clone = disk::open(&pool.store, name).unwrap();
            let at = (n as u64 + 1) * 8 * BLOCK;
            fill(&clone, at, at + BLOCK, 9);
            pool.take(name, "s");
            clone
        })
        .collect();
    fill(&disk, 0, BLOCK, 5);
    let all = [
        ("x@s", "y@s", vec![data(8 * BLOCK, BLOCK), data(16 * BLOCK, BLOCK)]),
        ("x@s", "d", vec![data(0, BLOCK), data(8 * BLOCK, BLOCK)]),
    ];
    let compare = |when: &str| {
        for (from, to, expected) in &all {
            assert_eq!(pool.diff(from, to), *expected, "{from} {to} {when}");
        }
    };
    compare("before");
    snapshot::remove(&pool.store, "d", "fork").unwrap();
    compare("after the delete");
    pool.store.reclaim_wait(&Silent).unwrap();
    pool.sound();
    compare("after it was freed");
    pool.retire("x", "s");
    compare("after x was retired");
    pool.retire("y", "s");
    compare("after both were retired");
    drop(clones);
    disk::remove(&pool.store, "y", true).unwrap();
    pool.store.reclaim_wait(&Silent).unwrap();
    pool.sound();
    assert_eq!(pool.diff("x@s", "d"), all[1].2);
}

/// More single blocks than one batch of the queue has, all in one opening and with no fold in between: what was punched
/// stands in memory as deleted then, and must not hide the rest.
#[test]
fn scattered_blocks_are_all_given_back() {
    let pool = Pool::new();
    let disk = pool.disk("d", 8 * MIB);
    fill(&disk, 0, 8 * MIB, 1);
    pool.take("d", "a");
    pool.retire("d", "a");
    (0..1024).for_each(|n| fill(&disk, 2 * n * BLOCK, (2 * n + 1) * BLOCK, 2));
    disk.flush().unwrap();
    pool.store.reclaim_wait(&afterimage::progress::Silent).unwrap();
    let punched = pool.store.counters.punched_blocks.load(std::sync::atomic::Ordering::Relaxed);
    assert_eq!(punched, 1024);
}

/// LVM, QEMU: cost and correctness that depend on how often one has gone back. Long lines of branches are cut loose.
#[test]
fn many_reverts() {
    let pool = Pool::new();
    let disk = pool.disk("d", 4 * MIB);
    fill(&disk, 0, MIB, 1);
    pool.take("d", "base");
    fill(&disk, MIB, 2 * MIB, 1);
    pool.take("d", "old");
    pool.retire("d", "old");
    drop(disk);
    let reverts = std::env::var("AFTERIMAGE_REVERTS").map_or(10_000, |text| text.parse().expect("a number"));
    for n in 0..reverts {
        let disk = disk::open(&pool.store, "d").unwrap();
        fill(&disk, (n % 64) * BLOCK, (n % 64 + 1) * BLOCK, 7);
        if n % 10 == 9 {
            // Deeper and deeper: the next revert goes to a snapshot of the branch that this one began.
            let snap = format!("s{n}");
            pool.take("d", &snap);
            snapshot::revert(&pool.store, "d", &snap, None).unwrap();
        } else {
            snapshot::revert(&pool.store, "d", "base", None).unwrap();
        }
        while pool.store.tidy_step().unwrap() {}
        if n % 500 == 0 {
            pool.sound();
        }
    }
    snapshot::revert(&pool.store, "d", "base", None).unwrap();
    assert_eq!(pool.diff("d@base", "d"), []);
    assert_eq!(pool.diff("d@old", "d"), [zero(MIB, MIB)]);
    assert_eq!(pool.diff("d", "d@old"), [data(MIB, MIB)]);
    pool.sound();
}

/// veeam/blksnap#105: a discard that ran while a snapshot was taken was in the snapshot, or in neither side of the
/// increment.
#[test]
fn discard_racing_a_snapshot() {
    let pool = Pool::new();
    let disk = pool.disk("d", 8 * MIB);
    fill(&disk, 0, 8 * MIB, 1);
    pool.take("d", "s0");
    let blocks = 8 * MIB / BLOCK;
    std::thread::scope(|scope| {
        let racer = scope.spawn(|| {
            for n in 0..blocks {
                disk.discard(n * 7 % blocks * BLOCK, BLOCK).unwrap();
            }
        });
        let mut n = 0;
        while !racer.is_finished() {
            n += 1;
            pool.take("d", &format!("s{n}"));
        }
        n += 1;
        pool.take("d", &format!("s{n}"));
        let mut gone = vec![false; usize::try_from(blocks).unwrap()];
        for at in 1..=n {
            let (from, to) = (format!("d@s{}", at - 1), format!("d@s{at}"));
            for extent in pool.diff(&from, &to) {
                assert!(extent.zero, "{from} {to}: {extent:?}");
                for block in extent.offset / BLOCK..(extent.offset + extent.length) / BLOCK {
                    let was = std::mem::replace(&mut gone[usize::try_from(block).unwrap()], true);
                    assert!(!was, "block {block} is told twice");
                }
            }
            let snap = snapshot::open(&pool.store, "d", &format!("s{at}")).unwrap();
            let mut bytes = vec![0; usize::try_from(8 * MIB).unwrap()];
            snap.read(&mut bytes, 0).unwrap();
            for (block, gone) in gone.iter().enumerate() {
                assert_eq!(bytes[block * 4096], u8::from(!gone), "block {block} of s{at}");
            }
        }
        assert!(gone.iter().all(|gone| *gone), "every discard is told once");
    });
}

/// A reader that found an address before its snapshot was retired, and reads it after: it must get the data, not a hole.
#[test]
fn reader_racing_a_punch() {
    let pool = Pool::new();
    let disk = pool.disk("d", 4 * MIB);
    fill(&disk, 0, 4 * MIB, 1);
    pool.take("d", "a");
    disk.discard(0, 4 * MIB).unwrap();
    disk.flush().unwrap();
    let reader = snapshot::open(&pool.store, "d", "a").unwrap();
    snapshot::retire(&pool.store, &[("d".into(), "a".into())]).unwrap();
    assert!(snapshot::open(&pool.store, "d", "a").is_err(), "a retired snapshot is not opened any more");
    snapshot::wait_retired(&pool.store, &Silent).unwrap();
    let held = pool.allocated();
    let mut bytes = vec![0; usize::try_from(4 * MIB).unwrap()];
    reader.read(&mut bytes, 0).unwrap();
    assert!(bytes.iter().all(|byte| *byte == 1), "who reads keeps the data");
    assert_eq!(pool.diff("d@a", "d"), [zero(0, 4 * MIB)]);
    drop(reader);
    pool.store.reclaim_wait(&Silent).unwrap();
    pool.sound();
    assert!(pool.allocated() + 4 * MIB / BLOCK <= held, "the last reader lets the data go");
    assert_eq!(pool.diff("d@a", "d"), [zero(0, 4 * MIB)]);
}

/// rsync misses what has changed where size and time are the same: of two disks in one snapshot, and of any that came to
/// the same name one after the other. So no two epochs of a pool have the same time.
#[test]
fn no_two_snapshots_of_a_pool_have_the_same_time() {
    let mut pool = Pool::new();
    let mut seen = BTreeSet::new();
    let mut look = |pool: &Pool| {
        let tables = pool.store.tables.read();
        let stamps: Vec<u64> = tables.states().map(|(key, _)| tables.stamp(key.1)).collect();
        let all: BTreeSet<u64> = stamps.iter().copied().collect();
        assert_eq!(stamps.len(), all.len(), "two have the same time");
        let last = seen.last().copied().unwrap_or(0);
        let new: Vec<u64> = all.difference(&seen).copied().collect();
        assert!(new.iter().all(|stamp| *stamp > last), "{new:?} after {last}");
        seen.extend(new);
    };
    for name in ["a", "b", "c"] {
        fill(&pool.disk(name, MIB), 0, MIB, 1);
    }
    let all = ["a", "b", "c"].map(|disk| (disk.to_owned(), "one".to_owned()));
    snapshot::take(&pool.store, &all).unwrap();
    look(&pool);
    pool.take("a", "two");
    look(&pool);
    snapshot::clone(&pool.store, "a", "one", "d").unwrap();
    pool.take("d", "one");
    look(&pool);
    // The one with the last time of all goes, and nobody of its lineage is left to remember it.
    pool.take("c", "last");
    look(&pool);
    disk::remove(&pool.store, "c", true).unwrap();
    snapshot::wait_retired(&pool.store, &Silent).unwrap();
    pool.reopen();
    pool.disk("c", MIB);
    pool.take("c", "first");
    pool.take("b", "two");
    look(&pool);
}
