//! Random histories that end with a lost catalog: whatever was sealed is there again, byte for byte.
//!
//! The catalog is removed, cut or garbled; a backup of some age is there, or none; the power may go at any I/O of the
//! rebuild. After it `check` and `scrub` must find nothing, and the history goes on beside a twin made of what was found,
//! with crashes and all background work: what a rebuild got wrong about who shares what shows itself there.
//!
//! `AFTERIMAGE_SEED=N cargo test model::rebuild` repeats one; `AFTERIMAGE_SEEDS=1000` runs many.

use std::collections::{BTreeMap, BTreeSet};
use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use afterimage::disk;
use afterimage::media::{Media, Open, SimMedia};
use afterimage::progress::Silent;
use afterimage::snapshot;
use afterimage::store::{self, RebuildReport, SnapshotInfo, SnapshotState, Status, Store};
use uuid::Uuid;

use super::ends::Guests;
use super::number;
use super::run::{Run, options, read_all};
use super::twin::{BLOCK, End, Frame, Image, Twin, TwinDisk, UNKNOWN};

#[derive(Debug, Default, Clone, Copy)]
struct Tally {
    complete: u64,
    from_seals: u64,
    snapshots: u64,
    unsealed: u64,
    crashes: u64,
}

/// A day after any that the background has made a backup of.
const LATER: u64 = 1 << 20;

fn media(run: &Run) -> Arc<dyn Media> {
    Arc::new(run.media.clone())
}

/// A history with backups now and then.
fn history(run: &mut Run) {
    for part in 0..1 + run.next(4) {
        let ops = 30 + run.next(160);
        run.go(ops);
        if run.next(2) == 0 && !run.media.is_down() {
            let made = run.store().back_up_on(LATER + part);
            run.say(|| format!("backup {part}: {made:?}"));
            made.unwrap();
        }
    }
}

/// What is sealed at the end, by identity: its snapshot's name and image.
fn sealed(run: &Run) -> BTreeMap<Uuid, Vec<u8>> {
    let seals: BTreeSet<String> = run.media.list("states").unwrap_or_default().into_iter().collect();
    let mut all = BTreeMap::new();
    let tables = run.store().tables.read();
    for (key, row) in tables.states().filter(|(_, row)| row.status == Status::Live) {
        if seals.contains(&format!("{}.seal", key.1)) {
            let image = run.twin.disks.values().find_map(|disk| disk.snapshots.get(&row.name));
            all.insert(row.uuid, image.expect("the twin has it").bytes.to_vec());
        }
    }
    all
}

fn damage(run: &mut Run) {
    let how = run.next(5);
    run.say(|| format!("damage {how}"));
    match how {
        0 => run.media.remove("catalog.redb").unwrap(),
        1 => run.media.truncate("catalog.redb", 0).unwrap(),
        2 => {
            let len = run.media.open("catalog.redb", Open::ReadOnly).unwrap().len().unwrap();
            run.media.truncate("catalog.redb", len / 2).unwrap();
        }
        _ => {
            let file = run.media.open("catalog.redb", Open::Existing).unwrap();
            let len = file.len().unwrap();
            let mut at = if how == 3 { 0 } else { run.next(8192) };
            while at < len {
                file.write_at(&run.next(u64::MAX / 2).to_le_bytes(), at).unwrap();
                at += 512;
            }
            file.sync().unwrap();
        }
    }
    run.media.sync_dir("").unwrap();
    match run.next(4) {
        0 => {}
        1 => {
            // The newest is damaged too.
            if let Some(last) = store::backups(&run.media).unwrap().last() {
                let name = store::backup_name(*last);
                let len = run.media.open(&name, Open::ReadOnly).unwrap().len().unwrap();
                for _ in 0..200 {
                    let (byte, bit) = (run.next(len), run.next(8) as u8);
                    run.media.flip_bit(&name, byte, bit).unwrap();
                }
            }
        }
        _ => {
            for day in store::backups(&run.media).unwrap() {
                run.media.remove(&store::backup_name(day)).unwrap();
            }
        }
    }
    if run.next(12) == 0 {
        run.media.flip_bit("journal", 20, 3).unwrap();
    }
}

fn rebuild(run: &mut Run, tally: &mut Tally) -> RebuildReport {
    while run.next(3) == 0 {
        // The power goes somewhere on the way.
        let n = 1 + run.next(120);
        run.media.crash_after(n);
        let result = std::panic::catch_unwind(AssertUnwindSafe(|| store::rebuild(&media(run), &Silent)));
        assert!(result.is_ok(), "a rebuild panicked when the power was lost");
        tally.crashes += u64::from(run.media.is_down());
        run.media.crash();
    }
    store::rebuild(&media(run), &Silent).expect("the pool is rebuilt")
}

fn image_of(store: &Arc<Store>, disk: &str, snapshot: &str) -> Vec<u8> {
    read_all(&*snapshot::open(store, disk, snapshot).unwrap())
}

/// Bytes of which it is not known any more which writes they come from.
fn frame(bytes: Vec<u8>) -> Frame {
    let writes = vec![UNKNOWN; bytes.len().div_ceil(BLOCK)];
    Frame::new(bytes, writes)
}

/// Makes a twin of what is there; retired snapshots are what they were.
fn twin_of(store: &Arc<Store>, before: &Twin) -> Twin {
    let mut twin = Twin::default();
    for info in store.disks() {
        let mut disk = TwinDisk { lineage: lineage_of(store, &info.name), ..TwinDisk::default() };
        disk.live = Image::of(frame(read_all(&*disk::open(store, &info.name).unwrap())));
        for snap in store.snapshots(&info.name).unwrap() {
            if snap.state == SnapshotState::Retired {
                let was = before.disks.values().find_map(|disk| disk.retired.get(&snap.name));
                disk.retired.insert(snap.name, was.expect("a rebuild retires nothing").clone());
            } else {
                let image = frame(image_of(store, &info.name, &snap.name));
                disk.snapshots.insert(snap.name, image);
            }
        }
        twin.disks.insert(info.name, disk);
    }
    twin
}

/// A number that disks share if they stem from one; no number of the twin's own is as large.
fn lineage_of(store: &Arc<Store>, disk: &str) -> u64 {
    let tables = store.tables.read();
    let branch = tables.disk(tables.disk_id(disk).unwrap()).unwrap().branch;
    (1 << 40) + tables.branch(branch).unwrap().lineage.0
}

fn one(seed: u64, verbose: bool) -> Tally {
    let mut tally = Tally::default();
    let mut run = Run::new(seed);
    run.verbose = verbose;
    for round in 0..2 {
        history(&mut run);
        // Often with everything sealed, as it is a second after a snapshot; sometimes in the middle of that.
        if run.next(4) > 0 {
            while run.store().tidy_step().unwrap() {}
        }
        let expected = sealed(&run);
        run.store = None;
        run.guests = Guests::default();
        run.media.crash();
        damage(&mut run);
        let report = rebuild(&mut run, &mut tally);
        run.say(|| format!("round {round}: {report:#?}"));
        assert!(report.rebuilt || report.complete);
        let store = Store::open(media(&run), options()).expect("the rebuilt pool opens");
        snapshot::attend(&store);
        let mut found = snapshot::check(&store, false, &Silent).unwrap();
        if found.problems.iter().any(|problem| problem.what.contains("backup")) {
            // It was damaged with the catalog, and a rebuild deletes nothing.
            let newest = *store::backups(&run.media).unwrap().last().unwrap();
            assert!(found.problems[0].what.contains(&store::backup_name(newest)), "{:?}", found.problems);
            run.media.remove(&store::backup_name(newest)).unwrap();
            run.media.sync_dir("").unwrap();
            found = snapshot::check(&store, false, &Silent).unwrap();
        }
        assert!(found.problems.is_empty(), "check found {:#?}\n{report:#?}", found.problems);
        let scrub = disk::scrub(&store, &Silent).unwrap();
        assert!(scrub.damaged.is_empty(), "scrub found {:#?}\n{report:#?}", scrub.damaged);
        run.store = Some(store);
        let mut missing = expected.clone();
        for info in run.store().disks() {
            let live = |snap: &SnapshotInfo| snap.state == SnapshotState::Live;
            for snap in run.store().snapshots(&info.name).unwrap().into_iter().filter(live) {
                tally.snapshots += 1;
                match missing.remove(&snap.uuid) {
                    Some(image) => {
                        let found = image_of(run.store(), &info.name, &snap.name);
                        assert!(found == image, "{}@{} is not what it was\n{report:#?}", info.name, snap.name);
                    }
                    None => tally.unsealed += 1,
                }
            }
        }
        assert!(missing.is_empty(), "{} sealed snapshots are not there\n{report:#?}", missing.len());
        if report.complete {
            tally.complete += 1;
            run.compare(&run.twin, End::Power).expect("a complete rebuild is as after a power cut");
        } else {
            tally.from_seals += 1;
        }
        run.twin = twin_of(run.store(), &run.twin);
        if run.next(3) == 0 {
            snapshot::check(run.store(), true, &Silent).unwrap();
        }
        let ops = 60 + run.next(200);
        run.go(ops);
    }
    tally
}

#[test]
fn rebuilds() {
    if let Ok(seed) = std::env::var("AFTERIMAGE_SEED") {
        println!("{:?}", one(seed.parse().expect("a number"), true));
        return;
    }
    let mut total = Tally::default();
    for seed in 1..=number("AFTERIMAGE_SEEDS", 40) {
        let Ok(tally) = std::panic::catch_unwind(|| one(seed, false)) else {
            panic!("repeat it with: AFTERIMAGE_SEED={seed} cargo test model::rebuild");
        };
        total.complete += tally.complete;
        total.from_seals += tally.from_seals;
        total.snapshots += tally.snapshots;
        total.unsealed += tally.unsealed;
        total.crashes += tally.crashes;
    }
    println!("rebuilds: {total:?}");
    assert!(total.complete > 0 && total.from_seals > 0 && total.snapshots > 0 && total.crashes > 0, "{total:?}");
}

/// Every I/O of one rebuild in turn is the last before the power goes.
#[test]
fn a_crash_at_any_io_of_a_rebuild_leaves_the_old_pool_or_the_new_one() {
    let mut run = Run::new(7);
    run.go(400);
    while run.store().tidy_step().unwrap() {}
    let expected = sealed(&run);
    assert!(!expected.is_empty());
    run.store = None;
    run.media.crash();
    for day in store::backups(&run.media).unwrap() {
        run.media.remove(&store::backup_name(day)).unwrap();
    }
    run.media.truncate("catalog.redb", 5000).unwrap();
    run.media.flip_bit("journal", 20, 3).unwrap();
    run.media.sync_dir("").unwrap();
    for n in 1.. {
        let media: SimMedia = run.media.fork(n);
        media.crash_after(n);
        let shared: Arc<dyn Media> = Arc::new(media.clone());
        let done = store::rebuild(&shared, &Silent).is_ok();
        let whole = !media.is_down();
        media.crash();
        if !done && Store::open(Arc::clone(&shared), options()).is_err() {
            store::rebuild(&shared, &Silent).unwrap();
        }
        let store = Store::open(shared, options()).unwrap();
        let mut missing = expected.clone();
        for info in store.disks() {
            for snap in store.snapshots(&info.name).unwrap() {
                if let Some(image) = missing.remove(&snap.uuid) {
                    assert!(image_of(&store, &info.name, &snap.name) == image, "cut at {n}");
                }
            }
        }
        assert!(missing.is_empty(), "cut at {n}: {} are missing", missing.len());
        if whole {
            return;
        }
    }
}
