//! A pool made by version 1 of the format opens, is sound, and has every byte it had.

use std::sync::Arc;

use afterimage::disk::{self, BlockDevice};
use afterimage::media::{HostMedia, Media, Open, SimMedia};
use afterimage::progress::Silent;
use afterimage::store::{self, Store};
use afterimage::{snapshot, units};

use super::make::{options, pattern};
use super::{archive, fixture_path};

/// Blocks and the tag they were written with; everything else is zeros.
type Blocks = &'static [(u64, u32)];

/// Disk, snapshot (none for the disk itself), size, blocks.
const CONTENTS: [(&str, &str, u64, Blocks); 8] = [
    ("alpha", "one", 8 << 20, &[(0, 1), (1, 1), (2, 1), (3, 1), (4, 1), (5, 1), (600, 1), (601, 1), (602, 1)]),
    ("alpha", "three", 8 << 20, THREE),
    (
        "alpha",
        "kept",
        8 << 20,
        &[
            (0, 1),
            (1, 3),
            (2, 3),
            (3, 1),
            (4, 1),
            (5, 7),
            (10, 4),
            (11, 4),
            (20, 4),
            (22, 4),
            (24, 4),
            (600, 1),
            (602, 1),
        ],
    ),
    ("alpha", "", 8 << 20, &[(0, 1), (1, 1), (2, 1), (3, 1), (4, 8), (5, 1), (600, 1), (601, 1), (602, 1)]),
    ("beta", "two", (1 << 20) + 512, &[(0, 2), (1, 2), (2, 2), (3, 9), (256, 2)]),
    ("beta", "", (1 << 20) + 512, &[(1, 2), (2, 2), (3, 9), (256, 2)]),
    (
        "gamma",
        "",
        16 << 20,
        &[(0, 5), (1, 1), (2, 1), (3, 1), (4, 1), (5, 1), (600, 1), (601, 1), (602, 1), (700, 5), (4000, 10)],
    ),
    ("epsilon", "", 2 << 20, &[(0, 1), (1, 3), (2, 6), (3, 1), (4, 1), (5, 1)]),
];

const THREE: Blocks =
    &[(0, 1), (1, 3), (2, 3), (3, 1), (4, 1), (5, 1), (10, 4), (11, 4), (20, 4), (22, 4), (24, 4), (600, 1), (602, 1)];

fn image(size: u64, blocks: Blocks) -> Vec<u8> {
    let mut image = vec![0; units::to_usize(size.next_multiple_of(4096))];
    for (block, tag) in blocks {
        let at = units::to_usize(block * 4096);
        image[at..at + 4096].copy_from_slice(&pattern(*tag, *block));
    }
    image.truncate(units::to_usize(size));
    image
}

fn sound(store: &Arc<Store>) {
    let report = store::check(store, false, &Silent).unwrap();
    assert!(report.problems.is_empty(), "check found {:#?}", report.problems);
    assert_eq!(report.disks, 4);
    for (name, snap, size, blocks) in CONTENTS {
        let device: Arc<dyn BlockDevice> = match snap {
            "" => disk::open(store, name).unwrap(),
            _ => snapshot::open(store, name, snap).unwrap(),
        };
        assert_eq!(device.size(), size, "{name}@{snap}");
        let mut found = vec![0; units::to_usize(size)];
        device.read(&mut found, 0).unwrap();
        assert!(found == image(size, blocks), "{name}@{snap} reads otherwise");
    }
    let names = |disk| store.snapshots(disk).unwrap().into_iter().map(|info| info.name).collect::<Vec<_>>();
    assert_eq!(names("alpha"), ["one", "three", "kept"]);
    assert_eq!(names("beta"), ["two"]);
    assert_eq!(names("gamma"), [""; 0]);
}

fn opens(media: Arc<dyn Media>) {
    archive::unpack(&fixture_path("pool-v1"), &*media);
    let store = Store::open(Arc::clone(&media), options()).unwrap();
    sound(&store);
    let alpha = store.disk_info("alpha").unwrap();
    assert_eq!((alpha.settings.quota, alpha.settings.iops), (Some(1 << 30), Some(500)));
    assert_eq!(store.disk_info("gamma").unwrap().origin.unwrap().name, "alpha@one");
    assert_eq!(store.snapshot_info("alpha", "three").unwrap().holds, ["backup"]);
    assert!(!store.seals_on_disk().unwrap().is_empty());
    let scrub = disk::scrub(&store, &Silent).unwrap();
    assert!(scrub.damaged.is_empty(), "scrub found {:#?}", scrub.damaged);
    store.reclaim_wait(&Silent).unwrap();
    disk::open(&store, "epsilon").unwrap().write(&pattern(11, 9), 9 * 4096).unwrap();
    disk::open(&store, "epsilon").unwrap().discard(9 * 4096, 4096).unwrap();
    sound(&store);
    store.close().unwrap();
    drop(store);
    let store = Store::open(media, options()).unwrap();
    sound(&store);
    store.close().unwrap();
}

#[test]
fn a_pool_of_version_1_opens() {
    opens(Arc::new(SimMedia::new(1)));
}

#[test]
fn a_pool_of_version_1_opens_on_the_host() {
    let dir = tempfile::tempdir().unwrap();
    opens(Arc::new(HostMedia::new(dir.path()).unwrap()));
}

/// The control: without its frames the pool is the one of the last fold, so the tests above do replay a journal.
#[test]
fn the_journal_of_the_fixture_is_replayed() {
    let media = SimMedia::new(1);
    archive::unpack(&fixture_path("pool-v1"), &media);
    let journal = media.open("journal", Open::Existing).unwrap();
    let len = journal.len().unwrap();
    journal.punch(4096, len - 4096).unwrap();
    let store = Store::open(Arc::new(media), options()).unwrap();
    let names: Vec<_> = store.snapshots("beta").unwrap().into_iter().map(|info| info.name).collect();
    assert_eq!(names, ["one"]);
    store.disk_info("delta").unwrap();
    store.close().unwrap();
}

/// The last blocks written are in the journal, and their segment was never synced: the disk may not have them there.
#[test]
fn blocks_that_only_the_journal_has_are_brought_to_their_segment() {
    let media = SimMedia::new(1);
    archive::unpack(&fixture_path("pool-v1"), &media);
    let block = pattern(10, 4000);
    let mut lost = 0;
    for path in media.paths().into_iter().filter(|path| path.ends_with(".seg")) {
        let file = media.open(&path, Open::Existing).unwrap();
        let mut found = vec![0; 4096];
        for at in (0..file.len().unwrap()).step_by(4096) {
            file.read_at(&mut found, at).unwrap();
            if found == block {
                file.punch(at, 4096).unwrap();
                lost += 1;
            }
        }
    }
    assert_eq!(lost, 1);
    let store = Store::open(Arc::new(media), options()).unwrap();
    sound(&store);
    store.close().unwrap();
}
