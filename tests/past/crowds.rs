//! What one of many relatives costs.

use std::sync::atomic::Ordering;

use afterimage::disk::{self, BlockDevice};
use afterimage::progress::Silent;
use afterimage::snapshot;

use super::{BLOCK, MIB, Pool, fill};

/// What a write or a delete costs does not depend on how many clones there are, also when their base is gone: then every one of
/// them may have what another one loses, and the first that is asked mostly has.
#[test]
fn the_clones_of_a_base_that_is_gone_cost_each_other_nothing() {
    const CLONES: u64 = 300;
    let pool = Pool::new();
    let golden = pool.disk("golden", 4 * MIB);
    fill(&golden, 0, 4 * MIB, 1);
    golden.flush().unwrap();
    drop(golden);
    pool.take("golden", "s");
    for n in 0..CLONES {
        snapshot::clone(&pool.store, "golden", "s", &format!("c{n}")).unwrap();
    }
    let looks = || pool.store.counters.looks_around.load(Ordering::Relaxed);
    disk::remove(&pool.store, "golden", true).unwrap();
    pool.store.reclaim_wait(&Silent).unwrap();
    assert!(looks() <= 8, "{} were asked to remove their base", looks());
    let open = |n: u64| disk::open(&pool.store, &format!("c{n}")).unwrap();

    let before = looks();
    let disk = open(CLONES / 2);
    fill(&disk, 0, BLOCK, 2);
    disk.flush().unwrap();
    assert!(looks() - before <= 2, "{} clones were asked for one write", looks() - before);

    // All change the same block, one after the other: who still has the old one gets rarer.
    let before = looks();
    for n in (0..CLONES).filter(|n| *n != CLONES / 2) {
        fill(&open(n), 0, BLOCK, 3);
        pool.store.flush_all().unwrap();
    }
    assert!(looks() - before <= CLONES * 20, "{} were asked for {CLONES} writes", looks() - before);
    pool.store.reclaim_wait(&Silent).unwrap();
    let blocks = pool.allocated();
    assert!(blocks <= 4 * MIB / BLOCK + 2 * CLONES, "the block that nobody has is free: {blocks}");

    let before = looks();
    for n in 1..CLONES {
        disk::remove(&pool.store, &format!("c{n}"), true).unwrap();
    }
    pool.store.reclaim_wait(&Silent).unwrap();
    assert!(looks() - before <= CLONES * 20, "{} were asked to remove {CLONES} clones", looks() - before);
    assert!(pool.allocated() <= 4 * MIB / BLOCK + 16, "{} blocks", pool.allocated());
    pool.sound();
}
