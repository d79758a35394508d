//! Seals of states and backups of the catalog in the long run: few files, whatever comes and goes, and all of it enough.

use std::sync::Arc;

use afterimage::disk::{self, BlockDevice};
use afterimage::error::Kind;
use afterimage::media::{Media, Open, SimMedia};
use afterimage::progress::Silent;
use afterimage::snapshot;
use afterimage::store::{self, InitOptions, OpenOptions, Store};

use super::run::{options, read_all};

fn pool(options: OpenOptions) -> (SimMedia, Arc<Store>) {
    let media = SimMedia::new(1);
    let shared: Arc<dyn Media> = Arc::new(media.clone());
    Store::init(&shared, InitOptions { journal: 320 << 10, ballast: 4096, probe: false }).unwrap();
    let store = Store::open(shared, options).unwrap();
    disk::create(&store, "d", 8 << 20).unwrap();
    (media, store)
}

fn take(store: &Arc<Store>, name: &str) {
    snapshot::take(store, &[("d".into(), name.into())]).unwrap();
}

fn tidy(store: &Arc<Store>) {
    while store.tidy_step().unwrap() {}
}

#[test]
fn a_rolling_chain_of_snapshots_leaves_few_files() {
    const KEPT: u64 = 5;
    let (media, store) = pool(options());
    let device = disk::open(&store, "d").unwrap();
    device.write(&vec![1; 8 << 20], 0).unwrap();
    let mut images = Vec::new();
    for n in 0..80u64 {
        device.write(&[n as u8; 4096], n * 7 % 2048 * 4096).unwrap();
        if n % 3 == 0 {
            device.discard(n * 13 % 2048 * 4096, 8192).unwrap();
        }
        take(&store, &format!("s{n}"));
        images.push(read_all(&*device));
        if n >= KEPT {
            snapshot::remove(&store, "d", &format!("s{}", n - KEPT)).unwrap();
        }
        tidy(&store);
    }
    let files = media.list("states").unwrap();
    assert!(files.len() as u64 <= KEPT + 4, "{files:?}");
    drop(device);
    drop(store);
    media.crash();
    for name in media.list("").unwrap() {
        if name.starts_with("catalog") || name == "journal" {
            media.remove(&name).unwrap();
        }
    }
    media.sync_dir("").unwrap();
    let shared: Arc<dyn Media> = Arc::new(media.clone());
    let report = store::rebuild(&shared, &Silent).unwrap();
    assert_eq!((report.complete, report.disks[0].snapshots), (false, KEPT), "{report:#?}");
    let store = Store::open(shared, options()).unwrap();
    for n in 80 - KEPT..80 {
        let found = read_all(&*snapshot::open(&store, "d", &format!("s{n}")).unwrap());
        assert!(found == images[n as usize], "s{n}");
    }
    assert!(read_all(&*disk::open(&store, "d").unwrap()) == images[79]);
    assert_eq!(store::check(&store, true, &Silent).unwrap().problems, []);
}

/// An epoch that only unmapped, and one that changed nothing, are told apart from nothing at all.
#[test]
fn what_was_only_discarded_stays_discarded() {
    let (media, store) = pool(options());
    let device = disk::open(&store, "d").unwrap();
    device.write(&vec![9; 1 << 20], 0).unwrap();
    take(&store, "full");
    device.discard(4096, 8192).unwrap();
    take(&store, "holes");
    take(&store, "same");
    device.write(&[3; 4096], 1 << 20).unwrap();
    take(&store, "more");
    let more = read_all(&*device);
    tidy(&store);
    // The unmapping is in no state that is left but this one.
    snapshot::remove(&store, "d", "holes").unwrap();
    snapshot::remove(&store, "d", "same").unwrap();
    tidy(&store);
    drop(device);
    drop(store);
    media.crash();
    for name in media.list("").unwrap() {
        if name.starts_with("catalog") {
            media.truncate(&name, 100).unwrap();
        }
    }
    media.flip_bit("journal", 20, 3).unwrap();
    let shared: Arc<dyn Media> = Arc::new(media.clone());
    let report = store::rebuild(&shared, &Silent).unwrap();
    assert_eq!(report.disks[0].snapshots, 2, "{report:#?}");
    let store = Store::open(shared, options()).unwrap();
    assert!(read_all(&*snapshot::open(&store, "d", "more").unwrap()) == more);
    assert!(read_all(&*disk::open(&store, "d").unwrap()) == more);
}

#[test]
fn three_backups_are_kept_and_a_full_host_is_left_alone() {
    let (media, store) = pool(OpenOptions { low_water: Some(64 << 20), ..options() });
    let day = 1 << 20;
    media.open("catalog.backup-7.redb.new", Open::New).unwrap();
    for n in 0..6 {
        take(&store, &format!("s{n}"));
        store.fold().unwrap();
        assert!(store.back_up_on(day + n).unwrap());
        assert!(!store.back_up_on(day + n).unwrap(), "one a day");
    }
    assert!(!store.back_up_on(day + 9).unwrap(), "nothing was folded since");
    assert_eq!(store::backups(&media).unwrap(), [day + 3, day + 4, day + 5]);
    take(&store, "more");
    store.fold().unwrap();
    media.set_space(Some(66 << 20));
    assert_eq!(store.back_up_on(day + 10).unwrap_err().kind(), Kind::NoSpace);
    assert!(!media.paths().iter().any(|path| path.ends_with(".new")), "{:?}", media.paths());
    assert!(store.health().is_none());
    media.set_space(None);
    assert!(store.back_up_on(day + 10).unwrap());
}

/// A branch that is flattened after its first snapshot became a ghost: what only the ghost would look up is not copied.
#[test]
fn a_ghost_needs_no_copies_when_look_ups_are_shortened() {
    let (media, store) = pool(OpenOptions { depth_max: 8, ..options() });
    let write = |disk: &str, block: u64| {
        let disk = disk::open(&store, disk).unwrap();
        disk.write(&[block as u8; 4096], block * 4096).unwrap();
        disk.flush().unwrap();
    };
    let snap = |disk: &str| snapshot::take(&store, &[(disk.into(), "s".into())]).unwrap();
    let clone = |disk: &str, new: &str| snapshot::clone(&store, disk, "s", new).unwrap();
    // `e` lies four deep, and its first snapshot changed nothing.
    for (disk, new) in [("d", "b"), ("b", "c"), ("c", "e")] {
        write(disk, disk.as_bytes()[0].into());
        snap(disk);
        clone(disk, new);
    }
    snap("e");
    clone("e", "f");
    write("e", 1);
    write("f", 2);
    snapshot::remove(&store, "e", "s").unwrap();
    tidy(&store);
    let images = ["d", "b", "c", "e", "f"].map(|name| (name, read_all(&*disk::open(&store, name).unwrap())));
    store.close().unwrap();
    drop(store);
    let store = Store::open(Arc::new(media.clone()), options()).unwrap();
    tidy(&store);
    assert_eq!(store::check(&store, false, &Silent).unwrap().problems, []);
    for (name, image) in images {
        assert!(read_all(&*disk::open(&store, name).unwrap()) == image, "{name}");
    }
}
