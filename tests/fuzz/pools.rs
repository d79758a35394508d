//! A whole pool with something wrong in one of its files, and what comes into a pool from outside.

use std::sync::Arc;

use afterimage::disk::{self, BlockDevice};
use afterimage::error::Result;
use afterimage::media::{Media, Open, SimMedia};
use afterimage::progress::Silent;
use afterimage::snapshot;
use afterimage::store::{self, InitOptions, OpenOptions, SnapshotState, Store};
use afterimage::stream::{self, ReceiveOptions, SendOptions, What};

use super::files::file_of;
use super::fuzz;

/// Bytes at the beginning of a file that are changed; the files of this pool are not much longer.
const PREFIX: u64 = 4096;

fn open(media: &SimMedia) -> Result<Arc<Store>> {
    let options = OpenOptions {
        background: false,
        low_water: Some(0),
        ballast: 4096,
        catalog_cache_bytes: 1 << 20,
        ..OpenOptions::default()
    };
    let store = Store::open(Arc::new(media.clone()), options)?;
    snapshot::attend(&store);
    Ok(store)
}

fn write(store: &Arc<Store>, name: &str, seed: u64, offset: u64, len: usize) {
    disk::open(store, name).unwrap().write(&crate::tree::noise(len, seed), offset).unwrap();
}

fn take(store: &Arc<Store>, name: &str) {
    snapshot::take(store, &[("web".into(), name.into())]).unwrap();
}

/// A pool with some of everything.
fn pool() -> (SimMedia, Arc<Store>) {
    let media = SimMedia::new(5);
    let shared: Arc<dyn Media> = Arc::new(media.clone());
    Store::init(&shared, InitOptions { journal: 320 << 10, ballast: 4096, probe: false }).unwrap();
    let store = open(&media).unwrap();
    disk::create(&store, "web", 6 << 20).unwrap();
    write(&store, "web", 1, 0, 60_000);
    take(&store, "old");
    write(&store, "web", 2, 8192, 4096);
    take(&store, "a");
    write(&store, "web", 3, 3 << 20, 9000);
    disk::open(&store, "web").unwrap().discard(16_384, 8192).unwrap();
    take(&store, "b");
    snapshot::clone(&store, "web", "b", "copy").unwrap();
    write(&store, "copy", 4, 0, 5000);
    snapshot::retire(&store, &[("web".into(), "old".into())]).unwrap();
    while store.tidy_step().unwrap() {}
    (media, store)
}

fn all_of(device: &dyn BlockDevice) -> Result<()> {
    device.read(&mut vec![0; device.size() as usize], 0)
}

/// Does with a pool what a user would; returns the first error.
fn use_it(media: &SimMedia) -> Result<String> {
    let store = open(media)?;
    let report = store::check(&store, false, &Silent)?;
    for info in store.disks() {
        all_of(&*disk::open(&store, &info.name)?)?;
        for snapshot in store.snapshots(&info.name)? {
            if snapshot.state == SnapshotState::Live {
                all_of(&*snapshot::open(&store, &info.name, &snapshot.name)?)?;
            }
        }
        let disk = disk::open(&store, &info.name)?;
        disk.reserve("guest", std::time::Duration::from_secs(60));
        let _lease = disk.lease("guest")?;
        disk.write(&[7; 4096], 0)?;
        disk.flush()?;
        snapshot::take(&store, &[(info.name.clone(), "last".into())])?;
    }
    while store.tidy_step()? {}
    store.close()?;
    Ok(format!("{:?}", report.problems.first()))
}

#[test]
fn a_pool_with_any_of_its_files_wrong() {
    let (media, store) = pool();
    let guest = disk::open(&store, "web").unwrap();
    let lease = guest.lease("guest").unwrap();
    write(&store, "web", 5, 40_960, 20_000);
    guest.discard(0, 4096).unwrap();
    drop((lease, guest, store));
    media.kill();
    let mut paths: Vec<String> = media.paths().into_iter().filter(|path| !path.ends_with("ballast")).collect();
    paths.sort();
    let prefix = |path: &str| {
        let file = media.open(path, Open::ReadOnly).unwrap();
        let mut bytes = vec![0; file.len().unwrap().min(PREFIX) as usize];
        file.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    };
    let corpus = paths.iter().enumerate().map(|(n, path)| [vec![n as u8], prefix(path)].concat()).collect();
    fuzz("pool", corpus, 500, |bytes| {
        let Some((n, content)) = bytes.split_first() else { return String::new() };
        let fork = media.fork(1);
        let path = &paths[usize::from(*n) % paths.len()];
        let file = fork.open(path, Open::Existing).unwrap();
        let had = file.len().unwrap();
        if had <= PREFIX {
            file.set_len(0).unwrap();
        }
        file.write_at(content, 0).unwrap();
        use_it(&fork).unwrap_or_else(|error| format!("{:?} {error}", error.kind()))
    });
}

fn sent(store: &Arc<Store>, from: Option<&str>, to: &str, compress: bool) -> Vec<u8> {
    let name = |snapshot: &str| ("web".to_owned(), snapshot.to_owned());
    let what = What::States { from: from.map(name), to: name(to) };
    let mut bytes = Vec::new();
    stream::send(store, &SendOptions { what, compress }, &mut bytes, &Silent).unwrap();
    bytes
}

fn problems(store: &Arc<Store>) -> usize {
    let report = store::check(store, false, &Silent).unwrap();
    assert!(report.problems.is_empty(), "{:?}", report.problems);
    report.problems.len()
}

#[test]
fn streams_into_a_pool_and_into_a_file() {
    let (media, store) = pool();
    let mut corpus = Vec::new();
    for compress in [false, true] {
        corpus.push(sent(&store, Some("a"), "b", compress));
        corpus.push(sent(&store, None, "a", compress));
    }
    disk::create(&store, "small", 64 << 10).unwrap();
    write(&store, "small", 9, 0, 1000);
    store.close().unwrap();
    drop(store);
    media.kill();
    fuzz("receive", corpus, 300, |bytes| {
        let store = open(&media.fork(1)).unwrap();
        let options = ReceiveOptions { disk: "web".into(), force: bytes.len().is_multiple_of(2), name: None };
        let one = stream::receive(&store, &options, &mut &*bytes, &Silent);
        let options = ReceiveOptions { disk: "fresh".into(), force: false, name: None };
        let two = stream::receive(&store, &options, &mut &*bytes, &Silent);
        problems(&store);
        let told = |result: Result<stream::ReceiveReport>| result.map_or_else(|e| e.to_string(), |_| "good".into());
        format!("{} {}", told(one), told(two))
    });
}

#[test]
fn records_into_a_pool() {
    let (media, store) = pool();
    let path = media.paths().into_iter().find(|path| path.ends_with(".aimg")).unwrap();
    let file = media.open(&path, Open::ReadOnly).unwrap();
    let mut record = vec![0; file.len().unwrap() as usize];
    file.read_exact_at(&mut record, 0).unwrap();
    snapshot::remove(&store, "web", "old").unwrap();
    store.close().unwrap();
    drop(store);
    media.kill();
    fuzz("import", vec![record], 300, |bytes| {
        let store = open(&media.fork(1)).unwrap();
        let imported = snapshot::import_record(&store, "the record", &file_of(bytes));
        problems(&store);
        let Ok(info) = imported else { return imported.unwrap_err().to_string() };
        let what = What::States { from: Some(("web".into(), info.name)), to: ("web".into(), "b".into()) };
        let mut out = Vec::new();
        let sent = stream::send(&store, &SendOptions { what, compress: false }, &mut out, &Silent);
        sent.map_or_else(|error| error.to_string(), |_| "good".into())
    });
}
