//! Segment files that are gone when the pool is opened, and come back later.

use afterimage::disk::{self, BlockDevice};
use afterimage::error::Kind;
use afterimage::media::{Media, Open};
use afterimage::pool::segment_path;
use afterimage::progress::Silent;
use afterimage::snapshot;

use super::{BLOCK, MIB, Pool, fill};

/// Returns the path of the segment that has the first block of a disk.
fn segment_of(pool: &Pool, name: &str) -> String {
    let id = pool.store.tables.read().disk_id(name).unwrap();
    let tables = pool.store.tables.read();
    let of = tables.segments().filter(|(_, row)| row.disk == id && row.mapped > 0).map(|(id, _)| id);
    segment_path(of.max().unwrap())
}

fn bytes(pool: &Pool, name: &str, offset: u64, len: u64) -> afterimage::error::Result<Vec<u8>> {
    let mut bytes = vec![0; usize::try_from(len).unwrap()];
    disk::open(&pool.store, name).unwrap().read(&mut bytes, offset).map(|()| bytes)
}

fn check(pool: &Pool) -> Vec<String> {
    let report = snapshot::check(&pool.store, false, &Silent).unwrap();
    report.problems.into_iter().map(|problem| problem.what).collect()
}

/// A flushed block may be in the journal alone. Opening without its segment and folding must not drop that copy: the file may
/// come back as the power cut left it.
#[test]
fn what_the_journal_has_for_a_lost_segment_is_kept() {
    for seed in 1..40 {
        let mut pool = Pool::seeded(seed);
        let (web, other) = (pool.disk("web", MIB), pool.disk("other", MIB));
        fill(&other, 0, MIB, 8);
        fill(&web, 0, 4 * BLOCK, 1);
        pool.store.flush_all().unwrap();
        pool.take("web", "a");
        // Few blocks and a flush: they are logged.
        fill(&web, BLOCK, 3 * BLOCK, 2);
        web.flush().unwrap();
        let path = segment_of(&pool, "web");
        drop((web, other));
        pool.media.crash();
        pool.media.rename(&path, "away").unwrap();
        for _ in 0..2 {
            pool.store = Pool::open(&pool.media);
            let error = bytes(&pool, "web", 0, MIB).unwrap_err();
            let said = error.to_string();
            assert_eq!(error.kind(), Kind::Corrupt);
            assert!(said.contains("'web'") && said.contains(&path) && said.contains("bytes 0 to"), "{said}");
            assert!(bytes(&pool, "other", 0, MIB).unwrap().iter().all(|byte| *byte == 8));
            fill(&disk::open(&pool.store, "other").unwrap(), 0, BLOCK, 8);
            pool.store.flush_all().unwrap();
            pool.store.fold().unwrap();
            let problems = check(&pool);
            assert!(problems.len() == 1 && problems[0].contains(&path), "{problems:?}");
            pool.store.close().unwrap();
        }
        pool.media.rename("away", &path).unwrap();
        pool.store = Pool::open(&pool.media);
        let found = bytes(&pool, "web", 0, MIB).unwrap();
        let expected = |block: usize| [1, 2, 2, 1].get(block).copied().unwrap_or(0);
        let wrong = (0..256).find(|block| found[block * 4096..][..4096].iter().any(|byte| *byte != expected(*block)));
        assert_eq!(wrong, None, "seed {seed}");
        pool.store.fold().unwrap();
        pool.reopen();
        assert!(bytes(&pool, "web", BLOCK, 2 * BLOCK).unwrap().iter().all(|byte| *byte == 2));
        pool.sound();
    }
}

/// Blocks of a lost segment that are freed meanwhile are given back to the host once it is there again; what cannot be sealed
/// keeps nothing else from it.
#[test]
fn what_is_freed_of_a_lost_segment_is_swept_later() {
    let mut pool = Pool::new();
    let (web, other) = (pool.disk("web", 4 * MIB), pool.disk("other", MIB));
    fill(&web, 0, 4 * MIB, 1);
    fill(&other, 0, MIB, 8);
    pool.store.flush_all().unwrap();
    let path = segment_of(&pool, "web");
    drop((web, other));
    pool.store.close().unwrap();
    pool.media.rename(&path, "away").unwrap();
    pool.store = Pool::open(&pool.media);
    // The checksums are gone with the last opening: neither epoch of `web` can be sealed.
    pool.take("web", "a");
    disk::open(&pool.store, "web").unwrap().discard(0, 2 * MIB).unwrap();
    pool.take("web", "b");
    pool.take("other", "a");
    while pool.store.tidy_step().unwrap() {}
    let sealed = |pool: &Pool, disk: &str, name: &str| {
        let tables = pool.store.tables.read();
        let id = tables.disk_id(disk).unwrap();
        tables.snapshot(id, name).unwrap().1.sealed
    };
    assert!(!sealed(&pool, "web", "a") && sealed(&pool, "other", "a"));
    snapshot::remove(&pool.store, "web", "a").unwrap();
    while pool.store.tidy_step().unwrap() {}
    assert_eq!(pool.store.queued_blocks().unwrap(), 0, "nothing waits for the file");
    pool.store.close().unwrap();
    pool.media.rename("away", &path).unwrap();
    pool.store = Pool::open(&pool.media);
    while pool.store.tidy_step().unwrap() {}
    pool.sound();
    assert!(sealed(&pool, "web", "b"));
    assert!(bytes(&pool, "web", 2 * MIB, 2 * MIB).unwrap().iter().all(|byte| *byte == 1));
    let file = pool.media.open(&path, Open::ReadOnly).unwrap();
    assert!(file.allocated().unwrap() <= 2 * MIB + 16 * BLOCK, "{}", file.allocated().unwrap());
}

/// A scrub of a large damage is no larger than one of a small one.
#[test]
fn a_scrub_lists_so_many_damaged_blocks_and_counts_the_others() {
    let mut pool = Pool::new();
    let web = pool.disk("web", 8 * MIB);
    fill(&web, 0, 8 * MIB, 1);
    pool.take("web", "a");
    while pool.store.tidy_step().unwrap() {}
    let path = segment_of(&pool, "web");
    drop(web);
    pool.store.close().unwrap();
    let file = pool.media.open(&path, Open::Existing).unwrap();
    file.write_at(&vec![5; usize::try_from(8 * MIB).unwrap()], 512 * BLOCK).unwrap();
    file.sync().unwrap();
    drop(file);
    pool.store = Pool::open(&pool.media);
    let report = disk::scrub(&pool.store, &Silent).unwrap();
    assert_eq!(report.damaged.len(), disk::LISTED_MAX);
    // The disk and its snapshot show every block.
    assert_eq!(report.damaged.len() as u64 + report.more, 2 * 8 * MIB / BLOCK);
    let error = bytes(&pool, "web", 5 * BLOCK, 3 * BLOCK).unwrap_err().to_string();
    assert!(error.contains("disk 'web': bytes 20480 to 24576: "), "{error}");
    pool.media.remove(&path).unwrap();
    pool.disk("other", MIB).write(&[1; 4096], 0).unwrap();
    pool.reopen();
    let report = disk::scrub(&pool.store, &Silent).unwrap();
    assert_eq!((report.damaged.len(), report.more), (1, 0), "{:?}", report.damaged);
    assert!(report.damaged[0].why.contains(&path) && report.damaged[0].disk == "web");
}
