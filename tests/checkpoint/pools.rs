//! Checkpoints in a pool: what they hold, what lets go, and what crashes and rebuilds leave of that.

use std::sync::Arc;

use afterimage::checkpoint::{self, Access, Cut, DiskSnapshot, Folder, PageBlock, Place, Reader, Writer};
use afterimage::disk;
use afterimage::error::Kind;
use afterimage::progress::Silent;
use afterimage::snapshot;
use afterimage::store::Store;

use super::{Save, compare, name, open};
use crate::past::{MIB, Pool, fill};

/// A pool with a disk that has a snapshot.
fn pool() -> Pool {
    let pool = Pool::new();
    fill(&pool.disk("d", 4 * MIB), 0, MIB, 1);
    pool.take("d", "s");
    pool
}

fn folder(pool: &Pool) -> Folder {
    Folder::of_pool(pool.store.media())
}

fn snapshot_of(store: &Arc<Store>, disk: &str, snap: &str) -> DiskSnapshot {
    let (info, snapshot) = (store.disk_info(disk).unwrap(), store.snapshot_info(disk, snap).unwrap());
    let (disk_name, snapshot_name) = (disk.to_owned(), snap.to_owned());
    DiskSnapshot { disk: info.uuid, disk_name, snapshot: snapshot.uuid, snapshot_name }
}

/// Saves a checkpoint with a snapshot as a machine does.
fn save(pool: &Pool, text: &str, snap: &str) {
    let (save, disks) = (Save { name: text, ..Save::default() }, vec![snapshot_of(&pool.store, "d", snap)]);
    let writer = Writer::create(&folder(pool), save.plan()).unwrap();
    save.enter(&writer).unwrap();
    checkpoint::hold(&pool.store, &name(text), &disks).unwrap();
    writer.commit(&Cut { created: 1, disks, state_version: 1, state: b"state" }).unwrap();
}

fn holds(pool: &Pool, snap: &str) -> Vec<String> {
    pool.store.snapshot_info("d", snap).unwrap().holds
}

#[test]
fn a_checkpoint_keeps_its_snapshots() {
    let mut pool = pool();
    save(&pool, "vm@a", "s");
    for _ in 0..2 {
        assert_eq!(holds(&pool, "s"), ["checkpoint vm@a"]);
        let target = [("d".to_owned(), "s".to_owned())];
        let errors = [
            snapshot::remove(&pool.store, "d", "s").unwrap_err(),
            snapshot::retire(&pool.store, &target).unwrap_err(),
            disk::remove(&pool.store, "d", true).unwrap_err(),
        ];
        for error in errors {
            assert_eq!(error.kind(), Kind::Busy);
            assert!(error.to_string().contains("checkpoint vm@a"), "{error}");
            assert!(error.next_step().unwrap().contains("checkpoint rm vm@a"), "{error}");
        }
        let keep = snapshot::Keep { last: 1, ..snapshot::Keep::default() };
        pool.take("d", "t");
        snapshot::prune(&pool.store, "d", &keep, false).unwrap();
        snapshot::remove(&pool.store, "d", "t").unwrap();
        // Names may change: what is held is the snapshot.
        snapshot::rename(&pool.store, "d", "s", "other").unwrap();
        snapshot::rename(&pool.store, "d", "other", "s").unwrap();
        snapshot::release(&pool.store, "d", "s", "checkpoint vm@a").unwrap_err();
        snapshot::hold(&pool.store, "d", "s", "checkpoint vm@b").unwrap_err();
        pool.reopen();
        checkpoint::attend(&pool.store);
    }
    checkpoint::remove(&pool.store, &name("vm@a")).unwrap();
    assert_eq!(holds(&pool, "s"), [""; 0]);
    assert!(checkpoint::list(&folder(&pool)).unwrap().is_empty());
    assert_eq!(checkpoint::remove(&pool.store, &name("vm@a")).unwrap_err().kind(), Kind::NotFound);
    pool.retire("d", "s");
}

#[test]
fn a_snapshot_that_is_gone_or_retired_cannot_be_held() {
    let pool = pool();
    let of = snapshot_of(&pool.store, "d", "s");
    pool.take("d", "t");
    let disks = [snapshot_of(&pool.store, "d", "t"), of];
    pool.retire("d", "s");
    let error = checkpoint::hold(&pool.store, &name("vm@a"), &disks).unwrap_err();
    assert!(error.kind() == Kind::NotFound && error.to_string().contains("d@s"), "{error}");
    assert_eq!(holds(&pool, "t"), [""; 0], "all or none");
}

#[test]
fn a_parent_is_kept_by_those_that_are_based_on_it() {
    let pool = pool();
    let folder = folder(&pool);
    Save::default().run(&folder).unwrap();
    let inherit = |_| None;
    let save = Save { name: "other@b", parent: Some("vm@a"), seed: &inherit, ..Save::default() };
    // Also while it is being saved, on the host where there are locks: see below. Here when it is there.
    save.run(&folder).unwrap();
    let error = checkpoint::remove(&pool.store, &name("vm@a")).unwrap_err();
    assert!(error.kind() == Kind::Busy && error.to_string().contains("other@b is based on it"), "{error}");
    let list = checkpoint::list(&folder).unwrap();
    let text = |one: &checkpoint::Checkpoint| (one.machine.clone(), one.parent.clone(), one.children.clone());
    assert_eq!(
        list.iter().map(text).collect::<Vec<_>>(),
        [("other".into(), Some("vm@a".into()), vec![]), ("vm".into(), None, vec!["other@b".into()])]
    );
    checkpoint::flatten(&folder, &name("other@b"), &Silent).unwrap();
    checkpoint::remove(&pool.store, &name("vm@a")).unwrap();
    compare(&open(&folder, "other@b").unwrap(), &|_| 1).unwrap();
}

#[test]
fn what_is_read_or_being_based_on_is_not_removed() {
    let dir = tempfile::tempdir().unwrap();
    let media: Arc<dyn afterimage::media::Media> = Arc::new(afterimage::media::HostMedia::new(dir.path()).unwrap());
    let init = afterimage::store::InitOptions { journal: 1 << 20, ballast: 4096, probe: false };
    Store::init(&media, init).unwrap();
    let store = Store::open(Arc::clone(&media), crate::past::options()).unwrap();
    let folder = Folder::of_pool(&media);
    Save::default().run(&folder).unwrap();
    let reader = Reader::open(&folder, &name("vm@a"), Access::Cached).unwrap();
    let busy = || {
        let error = checkpoint::remove(&store, &name("vm@a")).unwrap_err();
        assert!(error.kind() == Kind::Busy && error.to_string().contains("is being read"), "{error}");
    };
    busy();
    drop(reader);
    let inherit = |_| None;
    let save = Save { name: "vm@b", parent: Some("vm@a"), seed: &inherit, ..Save::default() };
    let writer = Writer::create(&folder, save.plan()).unwrap();
    busy();
    drop(writer);
    // What is based on it is itself being removed, which may yet fail: what it says of its parent cannot be read meanwhile.
    let save = Save { name: "vm@b", parent: Some("vm@a"), seed: &inherit, ..Save::default() };
    save.run(&folder).unwrap();
    let child = media.open("checkpoints/vm/b.ckpt", afterimage::media::Open::Existing).unwrap();
    assert!(child.try_lock().unwrap());
    let error = checkpoint::remove(&store, &name("vm@a")).unwrap_err();
    assert!(error.kind() == Kind::Busy && error.to_string().contains("vm@b"), "{error}");
    drop(child);
    checkpoint::remove(&store, &name("vm@b")).unwrap();
    checkpoint::remove(&store, &name("vm@a")).unwrap();
    store.close().unwrap();
}

/// At each I/O of a save with its hold, and of a removal: after the crash a checkpoint that is there holds its snapshot, and
/// nothing else does.
#[test]
fn holds_are_true_after_a_crash() {
    let mut ends = [0, 0];
    for countdown in 1.. {
        let mut all_down = true;
        for seed in 0..3 {
            let mut pool = pool_seeded(seed * 1000 + countdown);
            pool.media.crash_after(countdown);
            let removed = try_save(&pool) && checkpoint::remove(&pool.store, &name("vm@a")).is_ok();
            let down = pool.media.is_down();
            pool.media.crash();
            pool.store = Pool::open(&pool.media);
            checkpoint::attend(&pool.store);
            let there = folder(&pool).exists(&name("vm@a")).unwrap();
            let expected: &[&str] = if there { &["checkpoint vm@a"] } else { &[] };
            assert_eq!(holds(&pool, "s"), expected, "crash after {countdown}, seed {seed}");
            assert!(!(removed && there), "crash after {countdown}, seed {seed}");
            ends[usize::from(there)] += usize::from(down);
            all_down &= down;
            pool.sound();
        }
        if !all_down {
            assert!(ends[0] > 30 && ends[1] > 1, "{ends:?}");
            return;
        }
    }
}

fn pool_seeded(seed: u64) -> Pool {
    let pool = Pool::seeded(seed);
    fill(&pool.disk("d", 4 * MIB), 0, MIB, 1);
    pool.take("d", "s");
    pool
}

fn try_save(pool: &Pool) -> bool {
    let (save, disks) = (Save::default(), vec![snapshot_of(&pool.store, "d", "s")]);
    let Ok(writer) = Writer::create(&folder(pool), save.plan()) else { return false };
    save.enter(&writer).is_ok()
        && checkpoint::hold(&pool.store, &name("vm@a"), &disks).is_ok()
        && writer.commit(&Cut { created: 1, disks, state_version: 1, state: b"state" }).is_ok()
}

/// A rebuild of the catalog knows of no holds, and a checkpoint file may come back from a copy: opening sets it right.
#[test]
fn opening_gives_a_checkpoint_what_it_needs() {
    let mut pool = pool();
    save(&pool, "vm@a", "s");
    checkpoint::let_go(&pool.store, &name("vm@a")).unwrap();
    assert_eq!(holds(&pool, "s"), [""; 0]);
    pool.reopen();
    checkpoint::attend(&pool.store);
    assert_eq!(holds(&pool, "s"), ["checkpoint vm@a"]);
    // A file that cannot be read keeps what it held: somebody may put a copy back.
    pool.media.flip_bit("checkpoints/vm/a.ckpt", 70, 0).unwrap();
    pool.reopen();
    checkpoint::attend(&pool.store);
    assert_eq!(holds(&pool, "s"), ["checkpoint vm@a"]);
    let list = checkpoint::list(&folder(&pool)).unwrap();
    assert!(list[0].damage.as_ref().unwrap().contains("vm@a"), "{list:?}");
    checkpoint::remove(&pool.store, &name("vm@a")).unwrap();
    assert_eq!(holds(&pool, "s"), [""; 0]);
}

#[test]
fn zeros_alone_are_a_checkpoint() {
    let pool = pool();
    let save = Save { state: b"", ..Save::default() };
    let writer = Writer::create(&folder(&pool), save.plan()).unwrap();
    for number in 0..save.geometry.page_blocks() {
        writer.set(PageBlock(number), Place::Zero).unwrap();
    }
    writer.commit(&Cut { created: 1, disks: Vec::new(), state_version: 0, state: b"" }).unwrap();
    let info = checkpoint::info(&folder(&pool), &name("vm@a")).unwrap();
    assert_eq!((info.stored, info.storage_blocks, info.zero_blocks, info.state_bytes), (0, 0, 40, 0));
    let report = checkpoint::verify(&folder(&pool), &name("vm@a"), &Silent).unwrap();
    assert!(report.is_sound() && report.stored_blocks == 0);
    assert!(open(&folder(&pool), "vm@a").unwrap().state().unwrap().is_empty());
}

/// At each I/O of a save as a machine makes it: after the crash there is the checkpoint with its snapshots, or neither.
#[test]
fn a_save_that_did_not_end_leaves_no_snapshots() {
    let mut ends = [0, 0];
    for countdown in 1.. {
        let mut pool = pool_seeded(countdown);
        pool.media.crash_after(countdown);
        save_with_snapshots(&pool).ok();
        let down = pool.media.is_down();
        pool.media.crash();
        pool.store = Pool::open(&pool.media);
        checkpoint::attend(&pool.store);
        let there = folder(&pool).exists(&name("vm@a")).unwrap();
        let taken = pool.store.snapshot_info("d", "a").ok();
        assert_eq!(taken.is_some(), there, "crash after {countdown}");
        assert!(taken.is_none_or(|info| info.holds == ["checkpoint vm@a"]), "crash after {countdown}");
        assert_eq!(holds(&pool, "s"), [""; 0]);
        ends[usize::from(there)] += usize::from(down);
        // It can be made then, under the same name.
        if !there {
            save_with_snapshots(&pool).unwrap();
        }
        pool.sound();
        if !down {
            break;
        }
    }
    assert!(ends[0] > 10 && ends[1] > 0, "{ends:?}");
}

fn save_with_snapshots(pool: &Pool) -> afterimage::error::Result<()> {
    let save = Save::default();
    let writer = Writer::create(&folder(pool), save.plan())?;
    save.enter(&writer)?;
    let taken = checkpoint::snapshot(&pool.store, &name("vm@a"), &["d".to_owned()], &|| ())?;
    let disks = taken.iter().map(|info| snapshot_of(&pool.store, "d", &info.name)).collect();
    writer.commit(&Cut { created: 1, disks, state_version: 1, state: b"state" }).map(drop)
}

/// The server lives on when a machine is killed: what was taken for its checkpoint goes when the next is made, or with `rm`.
#[test]
fn what_a_killed_machine_has_left_goes_when_somebody_asks() {
    let pool = pool();
    let left = || {
        let writer = Writer::create(&folder(&pool), Save::default().plan()).unwrap();
        checkpoint::snapshot(&pool.store, &name("vm@a"), &["d".to_owned()], &|| ()).unwrap();
        drop(writer);
        // One that is killed undoes nothing.
        pool.store.media().open("checkpoints/vm/a.ckpt.new", afterimage::media::Open::New).unwrap();
    };
    left();
    checkpoint::remove(&pool.store, &name("vm@a")).unwrap();
    assert_eq!(pool.store.snapshot_info("d", "a").unwrap_err().kind(), Kind::NotFound);
    left();
    save_with_snapshots(&pool).unwrap();
    assert_eq!(holds(&pool, "a"), ["checkpoint vm@a"]);
    // A file that is merely not there, as when its folder is not mounted, takes no snapshot with it.
    pool.store.media().remove("checkpoints/vm/a.ckpt").unwrap();
    checkpoint::attend(&pool.store);
    assert_eq!(holds(&pool, "a"), [""; 0]);
}
