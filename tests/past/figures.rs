//! What was written since the previous snapshot, when snapshots before are deleted or retired.

use afterimage::snapshot;

use super::{BLOCK, MIB, Pool, fill};

fn written(pool: &Pool, disk: &str) -> u64 {
    pool.store.flush_all().unwrap();
    pool.store.disk_info(disk).unwrap().written / BLOCK
}

fn written_in(pool: &Pool, disk: &str, snap: &str) -> u64 {
    pool.store.snapshot_info(disk, snap).unwrap().written / BLOCK
}

/// Returns how many blocks a revert drops, and whether they may be fewer.
fn dropped(pool: &Pool, disk: &str, snap: &str) -> (u64, bool) {
    let report = snapshot::revert(&pool.store, disk, snap, None).unwrap();
    (report.dropped / BLOCK, report.at_most)
}

/// A revert that said "0 bytes were dropped" while the last hour's writes went with it: the snapshot in between had been
/// deleted, and with it the count of its epoch.
#[test]
fn a_revert_tells_what_was_written_before_a_snapshot_that_is_gone() {
    let mut pool = Pool::new();
    let web = pool.disk("web", MIB);
    fill(&web, 0, 8 * BLOCK, 1);
    pool.take("web", "a");
    fill(&web, 0, 4 * BLOCK, 2);
    pool.take("web", "b");
    fill(&web, 10 * BLOCK, 11 * BLOCK, 3);
    assert_eq!(written(&pool, "web"), 1);
    snapshot::remove(&pool.store, "web", "b").unwrap();
    assert_eq!(written(&pool, "web"), 5, "since snapshot a");
    while pool.store.tidy_step().unwrap() {}
    drop(web);
    pool.reopen();
    assert_eq!(written(&pool, "web"), 5);
    assert_eq!(dropped(&pool, "web", "a"), (5, true), "it may be of the same blocks twice");
    assert_eq!((written(&pool, "web"), dropped(&pool, "web", "a")), (0, (0, false)));
    let web = afterimage::disk::open(&pool.store, "web").unwrap();
    fill(&web, 0, 2 * BLOCK, 4);
    assert_eq!(dropped(&pool, "web", "a"), (2, false));
    // One that is gone from before the last one adds nothing.
    pool.take("web", "c");
    fill(&web, 0, BLOCK, 5);
    pool.take("web", "d");
    snapshot::remove(&pool.store, "web", "c").unwrap();
    fill(&web, 0, 3 * BLOCK, 6);
    assert_eq!(dropped(&pool, "web", "a"), (3, false));
}

#[test]
fn a_revert_tells_what_was_written_before_a_retired_snapshot() {
    let pool = Pool::new();
    let web = pool.disk("web", MIB);
    fill(&web, 0, 8 * BLOCK, 1);
    pool.take("web", "a");
    for name in ["b", "c"] {
        fill(&web, 20 * BLOCK, 23 * BLOCK, 2);
        pool.take("web", name);
        pool.retire("web", name);
    }
    fill(&web, 10 * BLOCK, 11 * BLOCK, 3);
    // It is listed, so what was written is told since then; but a revert drops what was written before, too.
    assert_eq!((written(&pool, "web"), written_in(&pool, "web", "c"), written_in(&pool, "web", "b")), (1, 3, 3));
    snapshot::remove(&pool.store, "web", "b").unwrap();
    assert_eq!((written(&pool, "web"), written_in(&pool, "web", "c")), (1, 6), "b passed its count on to c");
    // Of the same three blocks twice: never less than what is dropped, and here one could know better.
    assert_eq!(dropped(&pool, "web", "a"), (7, true));

    fill(&web, 10 * BLOCK, 12 * BLOCK, 4);
    snapshot::remove(&pool.store, "web", "c").unwrap();
    assert_eq!(written(&pool, "web"), 2, "c was on a way that was left");
    // Its record is still to be written.
    pool.take("web", "d");
    snapshot::retire(&pool.store, &[("web".into(), "d".into())]).unwrap();
    fill(&web, 0, BLOCK, 5);
    assert_eq!(dropped(&pool, "web", "a"), (3, true));
}

#[test]
fn the_figure_passes_to_all_who_come_after_and_never_beyond_what_is_mapped() {
    let pool = Pool::new();
    let web = pool.disk("web", MIB);
    fill(&web, 0, 8 * BLOCK, 1);
    pool.take("web", "a");
    fill(&web, 0, 6 * BLOCK, 2);
    pool.take("web", "b");
    snapshot::clone(&pool.store, "web", "b", "copy").unwrap();
    fill(&web, 0, 6 * BLOCK, 3);
    pool.take("web", "c");
    snapshot::remove(&pool.store, "web", "b").unwrap();
    // 6 and 6 again of 8 that are mapped.
    assert_eq!((written_in(&pool, "web", "c"), written(&pool, "copy"), written(&pool, "web")), (8, 6, 0));
    while pool.store.tidy_step().unwrap() {}
    // Through the fork that b has left.
    snapshot::remove(&pool.store, "web", "a").unwrap();
    assert_eq!((written_in(&pool, "web", "c"), written(&pool, "copy")), (8, 8));
    // A disk that goes leaves its counts to its clones.
    fill(&web, 10 * BLOCK, 12 * BLOCK, 4);
    pool.take("web", "e");
    snapshot::clone(&pool.store, "web", "e", "late").unwrap();
    assert_eq!(written(&pool, "late"), 0);
    drop(web);
    afterimage::disk::remove(&pool.store, "web", true).unwrap();
    assert_eq!(written(&pool, "late"), 10);
    pool.sound();
}

/// A clone of a live disk ends its epoch with a snapshot that nobody sees.
#[test]
fn a_clone_of_a_live_disk_leaves_its_figure() {
    let pool = Pool::new();
    let (web, copy) = (pool.disk("web", MIB), pool.disk("copy", MIB));
    fill(&web, 0, 3 * BLOCK, 1);
    assert_eq!(written(&pool, "web"), 3);
    snapshot::clone_into(&pool.store, "web", None, copy.id()).unwrap();
    assert_eq!(written(&pool, "web"), 3);
    pool.take("web", "a");
    assert_eq!((written_in(&pool, "web", "a"), written(&pool, "web")), (3, 0));
}
