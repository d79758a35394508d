//! Makes the fixtures. They are only ever added to: one that is there and would change is an error of who changed the code.

use std::path::Path;
use std::sync::Arc;

use afterimage::disk::{self, BlockDevice};
use afterimage::media::{Media, SimMedia};
use afterimage::snapshot;
use afterimage::store::{InitOptions, OpenOptions, Store};

use super::{archive, files, fixture_path, samples, to_hex, unflushed};

/// `AFTERIMAGE_MAKE_FIXTURES=1 cargo test format::make`
#[test]
fn make() {
    if std::env::var_os("AFTERIMAGE_MAKE_FIXTURES").is_none() {
        return;
    }
    let mut golden: Vec<(&str, Vec<u8>)> = vec![
        ("superblock", files::superblock()),
        ("journal", files::journal()),
        ("seal", files::seal()),
        ("unflushed", unflushed::golden()),
    ];
    golden.push(("stream", crate::stream::format::golden()));
    golden.extend(super::checkpoint::golden());
    golden.push(("record", super::record::record_of(&super::record::RECIPE)));
    golden.extend(samples::all().into_iter().map(|sample| (sample.name, sample.bytes)));
    for (name, bytes) in golden {
        keep(&fixture_path(&format!("format/v1/{name}.hex")), to_hex(name, 1, &bytes).as_bytes());
    }
    let bytes = files::state_seal_bytes();
    keep(&fixture_path("format/v2/state-seal.hex"), to_hex("state-seal", 2, &bytes).as_bytes());
    keep(&fixture_path("format/v2/exports.hex"), to_hex("exports", 2, &files::exports()).as_bytes());
    let pool = fixture_path("pool-v1");
    if pool.join("files.txt").exists() {
        // Identities and times differ from run to run, and so does the database: the first one made stays.
        println!("{} stays as it is", pool.display());
        return;
    }
    let (list, pages) = archive::pack(&make_pool());
    keep(&pool.join("pages.bin"), &pages);
    keep(&pool.join("files.txt"), list.as_bytes());
}

fn keep(path: &Path, bytes: &[u8]) {
    match std::fs::read(path) {
        Ok(found) => assert!(
            found == bytes,
            "{} would change: a format that was released stays readable. Make a new version of the format beside it",
            path.display()
        ),
        Err(_) => {
            std::fs::create_dir_all(path.parent().expect("fixtures are in a folder")).unwrap();
            std::fs::write(path, bytes).unwrap();
            println!("made {}", path.display());
        }
    }
}

pub fn options() -> OpenOptions {
    OpenOptions {
        cache_bytes: 1 << 20,
        catalog_cache_bytes: 1 << 20,
        background: false,
        low_water: Some(0),
        ballast: 4096,
        segment_blocks: 12,
        depth_max: 32,
    }
}

/// What block `block` holds after a write with `tag`: no two alike. Half of it is zeros, so that the fixture is small.
pub fn pattern(tag: u32, block: u64) -> Vec<u8> {
    let block = u32::try_from(block).expect("small disks").to_le_bytes();
    let line = |line: u32| [tag.to_le_bytes(), block, line.to_le_bytes(), (!line).to_le_bytes()].concat();
    let mut bytes: Vec<u8> = (0..128).flat_map(line).collect();
    bytes.resize(4096, 0);
    bytes
}

fn write(store: &Arc<Store>, name: &str, blocks: impl IntoIterator<Item = u64>, tag: u32) {
    let disk = disk::open(store, name).unwrap();
    for block in blocks {
        disk.write(&pattern(tag, block), block * 4096).unwrap();
    }
}

fn take(store: &Arc<Store>, names: &[(&str, &str)]) {
    let names: Vec<_> = names.iter().map(|(disk, name)| ((*disk).to_owned(), (*name).to_owned())).collect();
    snapshot::take(store, &names).unwrap();
}

/// The history of the fixture; what must come out of it is in `pool.rs`.
fn make_pool() -> SimMedia {
    let media = SimMedia::new(1);
    let shared: Arc<dyn Media> = Arc::new(media.clone());
    Store::init(&shared, InitOptions { journal: 512 << 10, ballast: 4096, probe: false }).unwrap();
    let store = Store::open(Arc::clone(&shared), options()).unwrap();
    disk::create(&store, "alpha", 8 << 20).unwrap();
    disk::create(&store, "beta", (1 << 20) + 512).unwrap();
    for (name, key, value) in [("alpha", "quota", "1G"), ("alpha", "iops", "500"), ("beta", "enospc", "wait")] {
        disk::set(&store, name, key, value).unwrap();
    }
    write(&store, "alpha", (0..6).chain(600..603), 1);
    write(&store, "beta", 0..4, 2);
    disk::open(&store, "beta").unwrap().write(&pattern(2, 256)[..512], 1 << 20).unwrap();
    take(&store, &[("alpha", "one"), ("beta", "one")]);
    write(&store, "alpha", 1..3, 3);
    disk::open(&store, "alpha").unwrap().discard(601 * 4096, 4096).unwrap();
    take(&store, &[("alpha", "two")]);
    write(&store, "alpha", [10, 11, 20, 22, 24], 4);
    take(&store, &[("alpha", "three")]);
    snapshot::clone(&store, "alpha", "one", "gamma").unwrap();
    write(&store, "gamma", [0, 700], 5);
    snapshot::clone(&store, "alpha", "two", "delta").unwrap();
    write(&store, "delta", [2], 6);
    // A ghost: "three" and "delta" began as it.
    snapshot::remove(&store, "alpha", "two").unwrap();
    write(&store, "alpha", [5], 7);
    snapshot::revert(&store, "alpha", "one", Some("kept")).unwrap();
    write(&store, "alpha", [4], 8);
    snapshot::hold(&store, "alpha", "three", "backup").unwrap();
    store.flush_all().unwrap();
    while store.seal_one().unwrap() {}
    // Another opening of the same pool, and then only the journal.
    store.close().unwrap();
    drop(store);
    let store = Store::open(shared, options()).unwrap();
    store.fold().unwrap();
    write(&store, "beta", [3], 9);
    take(&store, &[("beta", "two")]);
    disk::open(&store, "beta").unwrap().discard(0, 4096).unwrap();
    disk::open(&store, "gamma").unwrap().resize(16 << 20, false).unwrap();
    write(&store, "gamma", [4000], 10);
    disk::open(&store, "delta").unwrap().resize(2 << 20, true).unwrap();
    snapshot::remove(&store, "beta", "one").unwrap();
    disk::rename(&store, "delta", "epsilon").unwrap();
    store.flush_all().unwrap();
    media
}
