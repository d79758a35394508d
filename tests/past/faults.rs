//! Files beside the data that are lost or damaged: seals, records of retired snapshots, backups of the catalog. Each was
//! once "sound" until the day it was needed.

use std::sync::Arc;

use afterimage::disk;
use afterimage::media::{Media, Open};
use afterimage::progress::Silent;
use afterimage::snapshot;
use afterimage::store::rows::{Key, Table};
use afterimage::store::{CheckReport, RecordFault, backup_name, backups, record_path};

use super::{BLOCK, MIB, Pool, data, fill};

fn check(pool: &Pool, repair: bool) -> CheckReport {
    snapshot::check(&pool.store, repair, &Silent).unwrap()
}

/// Returns the one problem that a check finds.
#[track_caller]
fn problem(pool: &Pool, repair: bool) -> (String, bool) {
    let mut problems = check(pool, repair).problems;
    assert_eq!(problems.len(), 1, "{problems:?}");
    let problem = problems.remove(0);
    (problem.what, problem.fixed)
}

fn tidy(pool: &Pool) {
    while pool.store.tidy_step().unwrap() {}
}

fn paths(pool: &Pool, dir: &str, end: &str) -> Vec<String> {
    pool.media.paths().into_iter().filter(|path| path.starts_with(dir) && path.ends_with(end)).collect()
}

fn len(pool: &Pool, path: &str) -> u64 {
    pool.media.open(path, Open::ReadOnly).unwrap().len().unwrap()
}

fn read(pool: &Pool, path: &str) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(len(pool, path)).unwrap()];
    pool.media.open(path, Open::ReadOnly).unwrap().read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

fn put(pool: &Pool, path: &str, bytes: &[u8]) {
    pool.media.open(path, Open::New).unwrap().write_at(bytes, 0).unwrap();
}

/// Damages a file in one of the ways.
fn damage(pool: &Pool, path: &str, how: &str) {
    let end = len(pool, path);
    match how {
        "gone" => pool.media.remove(path).unwrap(),
        "cut" => pool.media.truncate(path, end / 2).unwrap(),
        "flipped" => pool.media.flip_bit(path, end - 30, 3).unwrap(),
        other => panic!("{other}"),
    }
}

/// A pool with a disk of three chunks and a snapshot, sealed.
fn sealed() -> Pool {
    let pool = Pool::new();
    fill(&pool.disk("web", 6 * MIB), 0, 6 * MIB, 1);
    pool.take("web", "a");
    tidy(&pool);
    pool.sound();
    pool
}

#[test]
fn a_lost_or_damaged_seal_is_named_and_sealed_again_when_that_is_asked_for() {
    let pool = sealed();
    let seal = paths(&pool, "segments/", ".seal").remove(0);
    for how in ["gone", "cut", "flipped"] {
        damage(&pool, &seal, how);
        let (what, fixed) = problem(&pool, false);
        assert!(!fixed && what.contains(&seal) && what.contains("web@a"), "{how}: {what}");
        assert!(how != "gone" || what.contains("1536 blocks"), "{what}");
        let scrub = disk::scrub(&pool.store, &Silent).unwrap();
        assert_eq!(scrub.damaged.len(), 1, "{how}: {scrub:?}");
        assert!(scrub.damaged[0].why.contains(&seal), "{how}: {scrub:?}");
        let (what, fixed) = problem(&pool, true);
        assert!(fixed && what.contains("sealed again from the data as it is now"), "{how}: {what}");
        pool.sound();
        let scrub = disk::scrub(&pool.store, &Silent).unwrap();
        assert_eq!((scrub.damaged.len(), scrub.unverified, scrub.blocks), (0, 0, 1536), "{how}");
    }
}

/// Making a seal again must not make damage look right: what is left of the old one is kept, and a block that is known to
/// be bad is not sealed.
#[test]
fn a_seal_that_is_made_again_hides_no_damage_that_the_old_one_shows() {
    let mut pool = sealed();
    let seal = paths(&pool, "segments/", ".seal").remove(0);
    let segment = paths(&pool, "segments/", ".seg").remove(0);
    pool.store.close().unwrap();
    pool.media.flip_bit(&segment, 512 * BLOCK + 5 * BLOCK + 7, 1).unwrap();
    damage(&pool, &seal, "cut");
    pool.store = Pool::open(&pool.media);
    assert!(problem(&pool, true).1);
    let scrub = disk::scrub(&pool.store, &Silent).unwrap();
    let offsets: Vec<_> = scrub.damaged.iter().map(|damage| (damage.snapshot.is_some(), damage.offset)).collect();
    assert_eq!(offsets, [(false, 5 * BLOCK), (true, 5 * BLOCK)]);
    assert_eq!((scrub.blocks, scrub.unverified), (1536, 0));
    // Now it is known, and the seal goes altogether.
    damage(&pool, &seal, "gone");
    let (what, fixed) = problem(&pool, true);
    assert!(!fixed && what.contains("could not be mended") && what.contains("checksum"), "{what}");
    assert!(!problem(&pool, false).1, "it still counts as sealed");
}

/// Blocks of a deleted snapshot that a later one shares have their checksums in a seal that belongs to no snapshot.
#[test]
fn a_damaged_seal_of_a_deleted_snapshot_is_named_and_cut() {
    let pool = sealed();
    let seal = paths(&pool, "segments/", ".seal").remove(0);
    pool.take("web", "b");
    snapshot::remove(&pool.store, "web", "a").unwrap();
    tidy(&pool);
    pool.sound();
    damage(&pool, &seal, "flipped");
    let (what, fixed) = problem(&pool, false);
    assert!(!fixed && what.contains(&seal) && what.contains("deleted snapshot"), "{what}");
    assert!(problem(&pool, true).1);
    pool.sound();
    let scrub = disk::scrub(&pool.store, &Silent).unwrap();
    assert_eq!((scrub.damaged.len(), scrub.blocks + scrub.unverified), (0, 1536));
    assert!(scrub.blocks > 0 && scrub.unverified > 0, "{scrub:?}");
    put(&pool, "hold", b"x");
    damage(&pool, &seal, "gone");
    pool.sound();
}

#[test]
fn a_lost_or_damaged_seal_of_a_state_is_named_and_made_again() {
    let mut pool = sealed();
    fill(&disk::open(&pool.store, "web").unwrap(), 0, BLOCK, 2);
    pool.take("web", "b");
    tidy(&pool);
    for n in 0..2 {
        for how in ["gone", "cut", "flipped"] {
            let seal = paths(&pool, "states/", ".seal").remove(n);
            damage(&pool, &seal, how);
            let problems = check(&pool, false).problems;
            assert!(problems.iter().any(|problem| problem.what.contains(&seal)), "{how}: {problems:?}");
            assert!(problems.iter().all(|problem| !problem.fixed), "{problems:?}");
            let problems = check(&pool, true).problems;
            assert!(!problems.is_empty() && problems.iter().all(|problem| problem.fixed), "{how}: {problems:?}");
            pool.sound();
        }
    }
    pool.reopen();
    pool.sound();
    // And all of it serves a rebuild.
    pool.store.close().unwrap();
    for path in pool.media.list("").unwrap().into_iter().filter(|path| path.starts_with("catalog")) {
        pool.media.remove(&path).unwrap();
    }
    pool.media.flip_bit("journal", 20, 3).unwrap();
    let media: Arc<dyn Media> = Arc::new(pool.media.clone());
    let report = afterimage::store::rebuild(&media, &Silent).unwrap();
    assert_eq!(report.disks[0].snapshots, 2, "{report:?}");
    pool.store = Pool::open(&pool.media);
    tidy(&pool);
    pool.sound();
}

/// As in a pool of a version that made none: nothing is lost, and they are made.
#[test]
fn a_map_that_waits_for_its_seal_is_no_fault() {
    let mut pool = sealed();
    pool.store.close().unwrap();
    damage(&pool, &paths(&pool, "states/", ".seal").remove(0), "gone");
    pool.store = Pool::open(&pool.media);
    let report = check(&pool, false);
    assert_eq!((report.problems.len(), report.notes.len()), (0, 1), "{report:?}");
    assert!(report.notes[0].contains("not sealed yet"), "{report:?}");
    tidy(&pool);
    assert_eq!(paths(&pool, "states/", ".seal").len(), 1);
    assert_eq!(check(&pool, false).notes.len(), 0);
}

#[test]
fn a_record_that_is_gone_or_damaged_is_told_before_a_diff_needs_it() {
    let mut pool = sealed();
    let web = disk::open(&pool.store, "web").unwrap();
    let uuid = pool.store.snapshot_info("web", "a").unwrap().uuid;
    pool.retire("web", "a");
    fill(&web, 0, BLOCK, 2);
    pool.take("web", "b");
    let other = pool.store.snapshot_info("web", "b").unwrap().uuid;
    pool.retire("web", "b");
    let id = web.id();
    drop(web);
    let path = record_path(uuid);
    let whole = read(&pool, &path);
    let foreign = read(&pool, &record_path(other));
    for how in ["gone", "cut", "flipped", "another's"] {
        match how {
            "another's" => {
                pool.media.remove(&path).unwrap();
                put(&pool, &path, &foreign);
            }
            _ => damage(&pool, &path, how),
        }
        let fault = if how == "gone" { RecordFault::Missing } else { RecordFault::Damaged };
        // One flipped bit deep inside takes reading all of it.
        if how != "flipped" {
            assert_eq!(snapshot::record_faults(&pool.store, id).into_values().collect::<Vec<_>>(), [fault], "{how}");
        }
        let (what, fixed) = problem(&pool, true);
        assert!(!fixed && what.contains("'web@a'") && what.contains(&path), "{how}: {what}");
        assert!(what.contains("record import FILE"), "{how}: {what}");
        assert_eq!(snapshot::record_faults(&pool.store, id).into_values().collect::<Vec<_>>(), [fault], "{how}");
        let said = pool.store.record_damage().unwrap();
        assert!(said.contains("'web@a'"), "{said}");
        let text = pool.store.metrics_text();
        let (missing, damaged) = (u8::from(how == "gone"), u8::from(how != "gone"));
        assert!(text.contains(&format!("\nafterimage_records_missing {missing}\n")), "{text}");
        assert!(text.contains(&format!("\nafterimage_records_damaged {damaged}\n")), "{text}");
        if pool.media.open(&path, Open::ReadOnly).is_ok() {
            pool.media.remove(&path).unwrap();
        }
        put(&pool, "copy", &whole);
        let copy = pool.media.open("copy", Open::ReadOnly).unwrap();
        snapshot::import_record(&pool.store, "copy", &copy).unwrap();
        pool.media.remove("copy").unwrap();
        assert_eq!((pool.store.record_damage(), snapshot::record_faults(&pool.store, id).len()), (None, 0), "{how}");
        pool.sound();
    }
    // A diff that runs into it is remembered, too; and after an opening a missing file is seen at once.
    damage(&pool, &path, "flipped");
    let name = |text: &str| snapshot::diff::StateName::parse(text);
    snapshot::diff::open(&pool.store, &name("web@a"), &name("web")).unwrap_err();
    assert!(pool.store.record_damage().is_some());
    pool.media.remove(&path).unwrap();
    pool.reopen();
    assert!(pool.store.record_damage().unwrap().contains("is missing"));
    snapshot::remove(&pool.store, "web", "a").unwrap();
    assert_eq!(pool.store.record_damage(), None);
    pool.sound();
}

#[test]
fn a_backup_of_the_catalog_that_is_damaged_or_old_is_told() {
    let pool = sealed();
    for path in backups(&pool.media).unwrap() {
        pool.media.remove(&backup_name(path)).unwrap();
    }
    pool.store.fold().unwrap();
    assert!(pool.store.back_up_on(7).unwrap());
    let report = check(&pool, false);
    assert_eq!(report.problems, []);
    assert!(report.notes.len() == 1 && report.notes[0].contains(&backup_name(7)), "{:?}", report.notes);
    let name = backup_name(7);
    let end = len(&pool, &name);
    (0..end / 64).for_each(|n| pool.media.flip_bit(&name, n * 64 + 9, 2).unwrap());
    let (what, fixed) = problem(&pool, false);
    assert!(!fixed && what.contains(&name), "{what}");
    assert!(problem(&pool, true).1);
    let report = check(&pool, false);
    assert_eq!((report.problems, report.notes), (vec![], vec![]));
    assert_eq!(backups(&pool.media).unwrap().len(), 1);
}

/// One snapshot with a lost segment, the first in the catalog, stopped retiring for the whole pool: its epoch cannot be
/// sealed, and it was tried again before all others for ever.
#[test]
fn a_snapshot_with_lost_blocks_is_retired_and_stops_no_other() {
    for how in ["gone", "cut"] {
        let mut pool = Pool::new();
        fill(&pool.disk("one", 2 * MIB), 0, 2 * MIB, 1);
        fill(&pool.disk("two", 2 * MIB), 0, 2 * MIB, 2);
        pool.store.close().unwrap();
        let lost = paths(&pool, "segments/", ".seg").remove(0);
        damage(&pool, &lost, how);
        pool.store = Pool::open(&pool.media);
        snapshot::take(&pool.store, &[("one".into(), "s".into()), ("two".into(), "s".into())]).unwrap();
        let retire = |name: &str| snapshot::retire(&pool.store, &[(name.into(), "s".into())]).unwrap();
        retire("one");
        retire("two");
        snapshot::wait_retired(&pool.store, &Silent).unwrap();
        assert_eq!(paths(&pool, "retired/", ".aimg").len(), 2, "{how}");
        // What is the same in both is still told to be, and what is not is not.
        let disk = disk::open(&pool.store, "one").unwrap();
        fill(&disk, 0, BLOCK, 3);
        assert_eq!(pool.diff("one@s", "one"), [data(0, BLOCK)], "{how}");
        assert_eq!(pool.diff("two@s", "two"), []);
    }
}

/// A record that cannot be written is passed by and named, and its snapshot keeps its data.
#[test]
fn a_record_that_cannot_be_written_is_named_and_stops_no_other() {
    let pool = Pool::new();
    for name in ["one", "two"] {
        fill(&pool.disk(name, 2 * MIB), 0, 2 * MIB, 1);
        pool.take(name, "s");
    }
    tidy(&pool);
    for name in ["one", "two"] {
        snapshot::retire(&pool.store, &[(name.into(), "s".into())]).unwrap();
    }
    // A folder in the way of the file that the first one is written as.
    let uuid = pool.store.snapshot_info("one", "s").unwrap().uuid;
    let way = format!("{}.new", record_path(uuid));
    drop(pool.media.make_dir("retired"));
    pool.media.make_dir(&way).unwrap();
    while pool.store.tidy_step().unwrap() {}
    assert_eq!(paths(&pool, "retired/", ".aimg").len(), 1);
    let said = pool.store.record_damage().unwrap();
    assert!(said.contains("'one@s' cannot be written"), "{said}");
    let (what, fixed) = problem(&pool, false);
    assert!(what.contains("'one@s' cannot be written") && !fixed, "{what}");
    pool.store.reclaim_wait(&Silent).unwrap();
    snapshot::wait_retired(&pool.store, &Silent).unwrap();
    assert_eq!(pool.store.unrecorded().len(), 1);

    snapshot::remove(&pool.store, "one", "s").unwrap();
    snapshot::wait_retired(&pool.store, &Silent).unwrap();
    assert_eq!(paths(&pool, "retired/", ".aimg").len(), 1);
    assert!(pool.store.unrecorded().is_empty() && pool.store.record_damage().is_none());
    pool.sound();
}

/// They stayed until the next opening.
#[test]
fn the_records_of_a_disk_go_with_it() {
    let pool = Pool::new();
    fill(&pool.disk("one", 2 * MIB), 0, 2 * MIB, 1);
    pool.disk("two", MIB);
    for name in ["one", "two"] {
        pool.take(name, "s");
        pool.retire(name, "s");
    }
    disk::remove(&pool.store, "one", true).unwrap();
    let left = paths(&pool, "retired/", ".aimg");
    assert_eq!(left, [record_path(pool.store.snapshot_info("two", "s").unwrap().uuid)]);
}

/// A fold that finds no room ends the database, which is opened anew: who looks something up meanwhile does not notice, and
/// who still has a view from before holds nobody up.
#[test]
fn a_full_host_disturbs_no_reader() {
    let mut pool = Pool::new();
    let disk = pool.disk("d", MIB);
    for n in 0..300 {
        disk::create(&pool.store, &format!("other{n}"), MIB).unwrap();
    }
    pool.store.fold().unwrap();
    let view = pool.store.ledger.view();
    let ended = std::sync::atomic::AtomicBool::new(false);
    let failed = std::thread::scope(|threads| {
        let reader = threads.spawn(|| {
            let mut looked = 0;
            while !ended.load(std::sync::atomic::Ordering::Relaxed) || looked == 0 {
                pool.store.ledger.scan(&Key::first_of(Table::Disk), &Key::beyond(Table::Disk), &mut |_, _| Ok(()))?;
                looked += 1;
            }
            Ok::<_, afterimage::error::Error>(looked)
        });
        let mut failed = 0;
        for n in 0..60 {
            pool.media.set_space(None);
            disk::set(&pool.store, "d", "quota", "none").unwrap();
            disk::create(&pool.store, &format!("more{n}"), MIB).unwrap();
            pool.media.set_space(Some(0));
            failed += u32::from(pool.store.fold().is_err());
        }
        ended.store(true, std::sync::atomic::Ordering::Relaxed);
        assert!(reader.join().unwrap().unwrap() > 0);
        failed
    });
    assert!(failed > 30, "{failed} folds found no room");
    pool.media.set_space(None);
    assert!(pool.store.fold().unwrap(), "nobody holds it up");
    drop((view, disk));
    pool.reopen();
    assert_eq!(pool.store.disks().len(), 361);
    pool.sound();
}
