//! Exports of a pool: whatever happened to a disk, a chain of increments brings a raw file from snapshot to snapshot.

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::Arc;

use afterimage::disk::{self, BlockDevice};
use afterimage::error::Kind;
use afterimage::export::{self, FILES_MAX, Increment};
use afterimage::media::{HostMedia, Media};
use afterimage::progress::{Progress, Silent};
use afterimage::snapshot;
use afterimage::store::{InitOptions, OpenOptions, Store};

use super::{BLOCK, Bench, Random, apply_in_memory, shells};

fn pool(bench: &Bench) -> Arc<Store> {
    fs::create_dir(bench.path("pool")).unwrap();
    let media: Arc<dyn Media> = Arc::new(HostMedia::new(&bench.path("pool")).unwrap());
    Store::init(&media, InitOptions { ballast: 0, probe: false, ..InitOptions::default() }).unwrap();
    let options = OpenOptions { background: false, low_water: Some(0), ballast: 0, ..OpenOptions::default() };
    Store::open(media, options).unwrap()
}

fn take(store: &Arc<Store>, name: &str) {
    snapshot::take(store, &[("web".to_owned(), name.to_owned())]).unwrap();
}

fn retire(store: &Arc<Store>, name: &str) {
    snapshot::retire(store, &[("web".to_owned(), name.to_owned())]).unwrap();
}

fn content(device: &dyn BlockDevice) -> Vec<u8> {
    let mut bytes = vec![0; device.size() as usize];
    device.read(&mut bytes, 0).unwrap();
    bytes
}

fn export(store: &Arc<Store>, from: Option<&str>, to: &str, dir: &Path) -> Increment {
    let (increment, device) = export::describe(store, from.map(|from| ("web", from)), ("web", to)).unwrap();
    export::write(&increment, &device, dir, &Silent).unwrap();
    increment
}

/// One thing that happens to a disk.
fn happen(store: &Arc<Store>, random: &mut Random, live: &[String]) {
    let disk = disk::open(store, "web").unwrap();
    let size = disk.size();
    let at = random.below(size);
    let most = [BLOCK as u64, 600_000][random.below(2) as usize];
    let len = (1 + random.below(most)).min(size - at);
    match random.below(10) {
        0..5 => {
            let bytes = random.bytes(97);
            let data: Vec<u8> = bytes.iter().copied().cycle().take(len as usize).collect();
            disk.write(&data, at).unwrap();
        }
        5 | 6 => disk.discard(at, len).unwrap(),
        7 => disk.write_zeroes(at, len).unwrap(),
        8 => disk.resize((1 + random.below(10_000)) * 512, true).unwrap(),
        _ if !live.is_empty() => {
            drop(disk);
            snapshot::revert(store, "web", &live[random.below(live.len() as u64) as usize], None).unwrap();
        }
        _ => {}
    }
}

#[test]
fn a_chain_of_increments_is_the_snapshot() {
    let shells = shells();
    for seed in 1..=6 {
        let bench = Bench::new();
        let store = pool(&bench);
        let mut random = Random(seed * 0x9e37_79b9);
        disk::create(&store, "web", 4 << 20).unwrap();
        let mut live: Vec<String> = Vec::new();
        let mut last: Option<String> = None;
        for step in 0..8 {
            for _ in 0..random.below(12) {
                happen(&store, &mut random, &live);
            }
            let name = format!("s{step}");
            take(&store, &name);
            let dir = format!("step-{step}");
            export(&store, last.as_deref(), &name, &bench.path(&dir));
            bench.applies(shells[step % shells.len()], &dir, &["target"]);
            let want = content(&*snapshot::open(&store, "web", &name).unwrap());
            assert!(fs::read(bench.path("target")).unwrap() == want, "seed {seed}, step {step}");
            if random.below(2) == 0 {
                retire(&store, &name);
                if random.below(2) == 0 {
                    store.reclaim_wait(&Silent).unwrap();
                }
            } else {
                live.push(name.clone());
            }
            last = Some(name);
        }
        store.close().unwrap();
    }
}

#[test]
fn what_cannot_be_exported_says_why() {
    let bench = Bench::new();
    let store = pool(&bench);
    disk::create(&store, "web", 1 << 20).unwrap();
    disk::create(&store, "db", 1 << 20).unwrap();
    disk::open(&store, "web").unwrap().write(&[1; BLOCK], 0).unwrap();
    take(&store, "a");
    take(&store, "b");
    snapshot::take(&store, &[("db".to_owned(), "a".to_owned())]).unwrap();
    retire(&store, "a");
    let refused = |from, to| export::describe(&store, from, to).map(drop).unwrap_err();
    assert!(refused(None, ("web", "a")).message().contains("retired"));
    assert_eq!(refused(None, ("web", "none")).kind(), Kind::NotFound);
    assert_eq!(refused(Some(("db", "none")), ("web", "b")).kind(), Kind::NotFound);
    assert_eq!(refused(Some(("db", "a")), ("web", "b")).kind(), Kind::Failed);

    let (increment, device) = export::describe(&store, None, ("web", "b")).unwrap();
    let write = |name: &str, progress: &dyn Progress| export::write(&increment, &device, &bench.path(name), progress);
    fs::create_dir(bench.path("taken")).unwrap();
    fs::write(bench.path("taken/it"), "").unwrap();
    assert_eq!(write("taken", &Silent).unwrap_err().kind(), Kind::Exists);
    write("taken/it", &Silent).unwrap_err();
    assert_eq!(write("no/where", &Silent).unwrap_err().kind(), Kind::NotFound);
    assert!(write("cancelled", &Cancelled).unwrap_err().message().contains("cancelled"));
    fs::create_dir(bench.path("empty")).unwrap();
    std::os::unix::fs::symlink("empty", bench.path("link")).unwrap();
    assert_eq!(write("link", &Silent).unwrap(), bench.path("empty").canonicalize().unwrap());
    // The script can be started as what it is, by nobody but the owner.
    let mode = |name: &str| fs::metadata(bench.path(name)).unwrap().mode() & 0o777;
    assert_eq!((mode("empty"), mode("empty/apply"), mode("empty/manifest.json")), (0o700, 0o700, 0o600));
    let started = std::process::Command::new(bench.path("empty/apply")).arg(bench.path("image")).output().unwrap();
    assert!(started.status.success(), "{started:?}");
    for name in ["image", "image.afterimage"] {
        fs::remove_file(bench.path(name)).unwrap();
    }
    let mut names: Vec<_> = fs::read_dir(bench.dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["empty", "link", "pool", "taken"], "nothing half-made is left");
    drop(device);
    store.close().unwrap();
}

struct Cancelled;

impl Progress for Cancelled {
    fn total(&self, _units: u64) {}
    fn advance(&self, _done: u64) {}
    fn message(&self, _text: &str) {}
    fn cancelled(&self) -> bool {
        true
    }
}

#[test]
fn a_snapshot_stays_whole_while_it_is_exported() {
    let bench = Bench::new();
    let store = pool(&bench);
    disk::create(&store, "web", 8 << 20).unwrap();
    let disk = disk::open(&store, "web").unwrap();
    let data = Random(3).bytes(8 << 20);
    disk.write(&data, 0).unwrap();
    take(&store, "a");
    let (increment, device) = export::describe(&store, None, ("web", "a")).unwrap();
    retire(&store, "a");
    disk.write(&vec![0xee; 8 << 20], 0).unwrap();
    disk.flush().unwrap();
    store.reclaim_wait(&Silent).unwrap();
    export::write(&increment, &device, &bench.path("full"), &Silent).unwrap();
    bench.applies(shells()[0], "full", &["target"]);
    assert!(fs::read(bench.path("target")).unwrap() == data);
    drop((device, disk));
    store.close().unwrap();
}

#[test]
fn more_extents_than_files() {
    let bench = Bench::in_memory();
    let store = pool(&bench);
    disk::create(&store, "web", 1 << 30).unwrap();
    take(&store, "a");
    let disk = disk::open(&store, "web").unwrap();
    for block in 0..70_000_u64 {
        disk.write(&[1 + (block % 250) as u8; BLOCK], (3 * block + u64::from(block % 2 == 1)) * BLOCK as u64).unwrap();
    }
    take(&store, "b");
    let increment = export(&store, Some("a"), "b", &bench.path("next"));
    // Gaps are three blocks and one, by turns: it is the small ones that are joined.
    assert_eq!(increment.plan.files.len(), FILES_MAX);
    assert_eq!(increment.plan.joined, (70_000 - FILES_MAX as u64) * BLOCK as u64);
    let manifest = fs::read(bench.path("next/manifest.json")).unwrap();
    let manifest: serde_json::Value = serde_json::from_slice(&manifest).unwrap();
    assert_eq!(manifest["joined"], increment.plan.joined);
    assert_eq!(manifest["files"].as_array().unwrap().len(), FILES_MAX);
    let mut image = vec![0; 1 << 30];
    apply_in_memory(&bench.path("next"), &mut image);
    assert!(image == content(&*snapshot::open(&store, "web", "b").unwrap()));
    drop(disk);
    store.close().unwrap();
}

/// A block that has rotted since it was sealed went into the directory with a fresh checksum.
#[test]
fn a_damaged_block_is_not_exported() {
    let bench = Bench::new();
    let store = pool(&bench);
    disk::create(&store, "web", 3 << 20).unwrap();
    let disk = disk::open(&store, "web").unwrap();
    disk.write(&Random(5).bytes(3 << 20), 0).unwrap();
    take(&store, "a");
    while store.seal_next().unwrap() {}
    let (increment, device) = export::describe(&store, None, ("web", "a")).unwrap();
    export::write(&increment, &device, &bench.path("whole"), &Silent).unwrap();

    // Block 700 of the disk: behind the 2 MiB before the first slot.
    let segment = bench.path("pool/segments/01/1.seg");
    let file = fs::OpenOptions::new().write(true).open(segment).unwrap();
    file.write_all_at(b"ROT!", (512 + 700) * BLOCK as u64 + 9).unwrap();
    let error = export::write(&increment, &device, &bench.path("dir"), &Silent).unwrap_err();
    assert_eq!(error.kind(), Kind::Corrupt, "{error}");
    assert!(error.message().contains("'web@a'") && error.message().contains("bytes 2867200 to 2871296"), "{error}");
    assert!(!bench.path("dir").exists());
    // And reads of it fail from now on.
    let mut block = vec![0; BLOCK];
    assert_eq!(device.read(&mut block, 700 * BLOCK as u64).unwrap_err().kind(), Kind::Corrupt);
}
