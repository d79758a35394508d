//! Bases that can be trusted, and those that cannot: lost and imported records, other pools, pools taken back.

use std::sync::Arc;

use afterimage::disk::{self, BlockDevice};
use afterimage::error::Kind;
use afterimage::media::{HostMedia, Media, Open};
use afterimage::progress::Silent;
use afterimage::snapshot;
use afterimage::snapshot::diff::{self, StateName};
use afterimage::snapshot::record::record_path;
use afterimage::store::{InitOptions, SnapshotState, Store};

use super::{BLOCK, MIB, Pool, data, fill, options, zero};

#[test]
fn a_retired_snapshot_is_listed_renamed_held_and_deleted_and_nothing_else() {
    let mut pool = Pool::new();
    let disk = pool.disk("d", 4 * MIB);
    fill(&disk, 0, MIB, 1);
    pool.take("d", "a");
    drop(disk);
    snapshot::hold(&pool.store, "d", "a", "backup").unwrap();
    let target = [("d".to_owned(), "a".to_owned())];
    let error = snapshot::retire(&pool.store, &target).unwrap_err();
    assert_eq!(error.kind(), Kind::Busy, "{error}");
    snapshot::release(&pool.store, "d", "a", "backup").unwrap();
    let uuid = pool.store.snapshot_info("d", "a").unwrap().uuid;
    for waited in [false, true] {
        if waited {
            pool.retire("d", "a");
        } else {
            snapshot::retire(&pool.store, &target).unwrap();
        }
        for result in [
            snapshot::open(&pool.store, "d", "a").map(drop),
            snapshot::clone(&pool.store, "d", "a", "x").map(drop),
            snapshot::revert(&pool.store, "d", "a", None).map(drop),
        ] {
            let error = result.unwrap_err();
            assert!(error.to_string().contains("retired"), "{error}");
        }
        let error = snapshot::take(&pool.store, &target).unwrap_err();
        assert_eq!(error.kind(), Kind::Exists, "the name stays taken: {error}");
    }
    snapshot::retire(&pool.store, &target).unwrap();
    snapshot::rename(&pool.store, "d", "a", "b").unwrap();
    snapshot::hold(&pool.store, "d", "b", "target").unwrap();
    pool.reopen();
    let list = pool.store.snapshots("d").unwrap();
    assert_eq!((list.len(), list[0].name.as_str(), list[0].uuid), (1, "b", uuid));
    assert_eq!((list[0].state, list[0].holds.len()), (SnapshotState::Retired, 1));
    assert_eq!(pool.store.disk_info("d").unwrap().snapshots, 1);
    let error = snapshot::remove(&pool.store, "d", "b").unwrap_err();
    assert_eq!(error.kind(), Kind::Busy, "{error}");
    snapshot::release(&pool.store, "d", "b", "target").unwrap();
    drop(pool.media.open(&record_path(uuid), Open::ReadOnly).unwrap());
    snapshot::remove(&pool.store, "d", "b").unwrap();
    assert!(pool.media.open(&record_path(uuid), Open::ReadOnly).is_err(), "its record went with it");
    assert!(pool.store.snapshots("d").unwrap().is_empty());
    pool.sound();
}

#[test]
fn retiring_gives_the_space_back_and_so_does_overwriting_later() {
    let pool = Pool::new();
    let disk = pool.disk("d", 4 * MIB);
    fill(&disk, 0, 4 * MIB, 1);
    pool.take("d", "a");
    fill(&disk, 0, 2 * MIB, 2);
    assert!(pool.allocated() >= 6 * MIB / BLOCK);
    pool.retire("d", "a");
    let blocks = 4 * MIB / BLOCK;
    assert!((blocks..blocks + 32).contains(&pool.allocated()), "{} blocks", pool.allocated());
    fill(&disk, 2 * MIB, 3 * MIB, 3);
    pool.take("d", "b");
    pool.store.reclaim_wait(&Silent).unwrap();
    assert!((blocks..blocks + 32).contains(&pool.allocated()), "{} blocks", pool.allocated());
    assert_eq!(pool.diff("d@a", "d@b"), [data(0, 3 * MIB)]);
}

#[test]
fn a_lost_record_is_named_and_comes_back_from_a_copy() {
    let pool = Pool::new();
    let disk = pool.disk("d", 4 * MIB);
    fill(&disk, 0, MIB, 1);
    pool.take("d", "a");
    fill(&disk, 0, BLOCK, 2);
    pool.retire("d", "a");
    let path = record_path(pool.store.snapshot_info("d", "a").unwrap().uuid);
    let names = [StateName::parse("d@a"), StateName::parse("d")];
    let copy = pool.media.open("copy", Open::New).unwrap();
    let file = pool.media.open(&path, Open::ReadOnly).unwrap();
    let mut bytes = vec![0; usize::try_from(file.len().unwrap()).unwrap()];
    file.read_exact_at(&mut bytes, 0).unwrap();
    copy.write_at(&bytes, 0).unwrap();
    pool.media.remove(&path).unwrap();
    let error = diff::open(&pool.store, &names[0], &names[1]).unwrap_err();
    assert_eq!(error.kind(), Kind::NotFound, "{error}");
    assert!(error.next_step().is_some_and(|hint| hint.contains("record import")));
    snapshot::import_record(&pool.store, "copy", &copy).unwrap();
    assert_eq!(pool.diff("d@a", "d"), [data(0, BLOCK)]);
    // Also one that was deleted: it is a base again.
    snapshot::remove(&pool.store, "d", "a").unwrap();
    snapshot::import_record(&pool.store, "copy", &copy).unwrap();
    assert_eq!(pool.diff("d@a", "d"), [data(0, BLOCK)]);
    pool.sound();
    // Damage is an error, not a smaller diff.
    bytes[200] ^= 1;
    pool.media.remove("copy").unwrap();
    let copy = pool.media.open("copy", Open::New).unwrap();
    copy.write_at(&bytes, 0).unwrap();
    let error = snapshot::import_record(&pool.store, "copy", &copy).unwrap_err();
    assert_eq!(error.kind(), Kind::Corrupt, "{error}");
}

/// A pool directory that is taken back to an older copy goes on with the same ids, and with in-place writes of the epoch
/// that the lost course of events had ended. Nothing of the other course may pass for unchanged.
#[test]
fn pool_directory_rolled_back_to_an_older_copy() {
    let dir = tempfile::tempdir().unwrap();
    let (pool, older) = (dir.path().join("pool"), dir.path().join("older"));
    std::fs::create_dir(&pool).unwrap();
    let open = || {
        let media: Arc<dyn Media> = Arc::new(HostMedia::new(&pool).unwrap());
        let store = Store::open(media, options()).unwrap();
        snapshot::attend(&store);
        store
    };
    let media: Arc<dyn Media> = Arc::new(HostMedia::new(&pool).unwrap());
    Store::init(&media, InitOptions { journal: 1 << 20, ballast: 4096, probe: false }).unwrap();
    let store = open();
    disk::create(&store, "d", 4 * MIB).unwrap();
    fill(&disk::open(&store, "d").unwrap(), 0, MIB, 1);
    store.flush_all().unwrap();
    // A copy in the middle of an opening, as a snapshot of the host's file system would be.
    let cp = |from: &std::path::Path, to: &std::path::Path| {
        let done = std::process::Command::new("cp").arg("-a").arg(from).arg(to).status().unwrap();
        assert!(done.success());
    };
    cp(&pool, &older);
    fill(&disk::open(&store, "d").unwrap(), 0, BLOCK, 2);
    snapshot::take(&store, &[("d".into(), "a".into())]).unwrap();
    snapshot::retire(&store, &[("d".into(), "a".into())]).unwrap();
    snapshot::wait_retired(&store, &Silent).unwrap();
    let record = record_path(store.snapshot_info("d", "a").unwrap().uuid);
    let saved = dir.path().join("saved.aimg");
    std::fs::copy(pool.join(record), &saved).unwrap();
    store.close().unwrap();
    drop((store, media));
    std::fs::remove_dir_all(&pool).unwrap();
    cp(&older, &pool);
    let store = open();
    // In place, in the epoch that the other course of events ended with its snapshot.
    fill(&disk::open(&store, "d").unwrap(), BLOCK, 2 * BLOCK, 3);
    let folder = HostMedia::new(dir.path()).unwrap();
    let file = folder.open("saved.aimg", Open::ReadOnly).unwrap();
    let error = snapshot::import_record(&store, "saved.aimg", &file).unwrap_err();
    assert!(error.to_string().contains("taken back to an earlier day"), "{error}");
    // Also once the new course has used the same numbers itself.
    snapshot::take(&store, &[("d".into(), "other".into())]).unwrap();
    let error = snapshot::import_record(&store, "saved.aimg", &file).unwrap_err();
    assert!(error.to_string().contains("taken back to an earlier day"), "{error}");
    // Its own retired snapshots are good, over openings too.
    snapshot::retire(&store, &[("d".into(), "other".into())]).unwrap();
    snapshot::wait_retired(&store, &Silent).unwrap();
    store.close().unwrap();
    drop(store);
    let store = open();
    fill(&disk::open(&store, "d").unwrap(), 8 * BLOCK, 9 * BLOCK, 3);
    let diff = diff::open(&store, &StateName::parse("d@other"), &StateName::parse("d")).unwrap();
    assert_eq!(diff.extents().unwrap(), [data(8 * BLOCK, BLOCK)]);
    store.close().unwrap();
}

#[test]
fn strangers_have_no_diff() {
    let pool = Pool::new();
    for name in ["d", "e"] {
        let disk = pool.disk(name, 4 * MIB);
        fill(&disk, 0, MIB, 1);
        pool.take(name, "a");
    }
    for names in [["d@a", "e@a"], ["d", "e"], ["d@a", "e"]] {
        let [from, to] = names.map(StateName::parse);
        let error = diff::open(&pool.store, &from, &to).unwrap_err();
        assert!(error.to_string().contains("nothing in common"), "{error}");
    }
    pool.retire("d", "a");
    let error = diff::open(&pool.store, &StateName::parse("d@a"), &StateName::parse("e")).unwrap_err();
    assert!(error.to_string().contains("nothing in common"), "{error}");
}

#[test]
fn the_proof_on_demand_finds_nothing_wrong() {
    let pool = Pool::new();
    let disk = pool.disk("d", 4 * MIB - 512);
    fill(&disk, 0, MIB, 1);
    pool.take("d", "a");
    fill(&disk, BLOCK, 2 * BLOCK, 2);
    fill(&disk, 4 * BLOCK, 5 * BLOCK, 1);
    pool.take("d", "b");
    let verify = |from: &str, to: &str| {
        diff::verify(&pool.store, &StateName::parse(from), &StateName::parse(to), &Silent).unwrap()
    };
    let report = verify("d@a", "d@b");
    assert_eq!((report.missed, report.not_zero, report.told, report.same), (0, 0, 2 * BLOCK, BLOCK));
    disk.resize(6 * MIB, false).unwrap();
    let report = verify("d@a", "d");
    assert_eq!((report.missed, report.not_zero, report.first_wrong), (0, 0, None));
    assert_eq!(verify("-", "d").compared, 6 * MIB);
    assert_eq!(pool.store.snapshots("d").unwrap().len(), 2, "the snapshot taken for it is gone");
    pool.sound();
}

/// Everything that a state has is told of when it is compared with nothing, from a live disk, a snapshot or a record.
#[test]
fn to_nothing_everything_is_zeros() {
    let pool = Pool::new();
    let disk = pool.disk("d", 8 * MIB + 512);
    fill(&disk, MIB, 3 * MIB, 1);
    pool.take("d", "a");
    fill(&disk, 8 * MIB, 8 * MIB + 512, 2);
    disk.flush().unwrap();
    let whole = [zero(MIB, 2 * MIB), zero(8 * MIB, 512)];
    assert_eq!(pool.diff("d", "-"), whole);
    assert_eq!(pool.diff("d@a", "-"), whole[..1]);
    pool.retire("d", "a");
    assert_eq!(pool.diff("d@a", "-"), whole[..1]);
    let diff = diff::open(&pool.store, &StateName::parse("d"), &StateName::Nothing).unwrap();
    assert_eq!((diff.from_size(), diff.to_size()), (8 * MIB + 512, 8 * MIB + 512));
    let total = diff.total().unwrap();
    assert_eq!((total.data, total.zero, total.extents), (0, 2 * MIB + 512, 2));
    assert_eq!(pool.diff("-", "-"), []);
    let report = diff::verify(&pool.store, &StateName::parse("d"), &StateName::Nothing, &Silent).unwrap();
    assert_eq!((report.missed, report.not_zero, report.first_wrong), (0, 0, None));
    assert_eq!(report.told, 2 * MIB + 512);
}
