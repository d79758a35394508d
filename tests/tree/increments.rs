//! Increment directories in the mount: applied with nothing but a shell they lead from one snapshot to the other.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::PathBuf;
use std::sync::atomic::Ordering;

use afterimage::disk::{self, BlockDevice};
use afterimage::media::Open;
use afterimage::pool::segment_path;
use afterimage::snapshot;
use afterimage::units::ChunkIndex;

use super::{Mount, create, errno, noise, run};

impl Mount {
    fn export(&self, disk: &str, name: &str) -> PathBuf {
        self.dir.join("exports").join(disk).join(name)
    }
}

/// Names of a directory that are increments.
fn increments(mount: &Mount, disk: &str) -> Vec<String> {
    let all = fs::read_dir(mount.dir.join("exports").join(disk)).unwrap();
    let mut names: Vec<String> = all.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.retain(|name| name.contains(".."));
    names.sort();
    names
}

fn change(mount: &Mount, seed: u64) {
    let disk = disk::open(&mount.store, "a").unwrap();
    disk.write(&noise(70_000, seed), seed * 300_000).unwrap();
    disk.discard(5 << 20, 8192).unwrap();
    disk.flush().unwrap();
}

#[test]
fn applied_in_turn_they_lead_from_state_to_state() {
    let Some(mount) = Mount::new() else { return };
    let path = mount.make("a", 9 << 20);
    create(&path).write_all_at(&noise(9 << 20, 1), 0).unwrap();
    create(&mount.snapshot("a", "s1"));
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image");
    fs::write(&image, fs::read(mount.snapshot("a", "s1")).unwrap()).unwrap();
    for round in 2..5 {
        let (old, new) = (format!("s{}", round - 1), format!("s{round}"));
        change(&mount, round);
        if round == 3 {
            mount.wait_until_free("a");
            disk::open(&mount.store, "a").unwrap().resize(11 << 20, false).unwrap();
        }
        create(&mount.snapshot("a", &new));
        if round == 4 {
            fs::rename(mount.snapshot("a", &old), mount.dir.join(format!("retired/a/{old}.aimg"))).unwrap();
        }
        let name = format!("{old}..{new}");
        assert!(increments(&mount, "a").contains(&name), "neighbours are listed");
        let copy = dir.path().join(&name);
        let export = mount.export("a", &name);
        let reads = mount.store.counters.reads.load(Ordering::Relaxed);
        for entry in fs::read_dir(&export).unwrap() {
            entry.unwrap().metadata().unwrap();
        }
        assert_eq!(mount.store.counters.reads.load(Ordering::Relaxed), reads, "listing reads no data");
        run("cp", &[OsStr::new("-a"), export.as_os_str(), copy.as_os_str()]);
        for entry in fs::read_dir(&copy).unwrap() {
            let name = entry.unwrap().file_name();
            let (here, there) = (fs::metadata(copy.join(&name)).unwrap(), fs::metadata(export.join(&name)).unwrap());
            assert_eq!(here.len(), there.len(), "{name:?}");
            assert_eq!(here.permissions().mode() & 0o100 != 0, name == "apply", "{name:?}");
        }
        let force: &[&OsStr] = if round == 2 { &[OsStr::new("--force")] } else { &[] };
        let script = copy.join("apply");
        let words = [&[OsStr::new("sh"), script.as_os_str()][..], force, &[image.as_os_str()]].concat();
        run("env", &words);
        assert!(fs::read(&image).unwrap() == fs::read(mount.snapshot("a", &new)).unwrap(), "{name}");
    }
}

#[test]
fn any_pair_opens_and_names_follow_the_snapshots() {
    let Some(mount) = Mount::new() else { return };
    let path = mount.make("a", 9 << 20);
    create(&path).write_all_at(&noise(9 << 20, 1), 0).unwrap();
    for round in 1..4 {
        create(&mount.snapshot("a", &format!("s{round}")));
        mount.wait_until_free("a");
        change(&mount, round);
    }
    assert_eq!(increments(&mount, "a"), ["s1..s2", "s2..s3"]);
    for name in ["s3..s1", "s1..s3", "s1..s1"] {
        let manifest = fs::read_to_string(mount.export("a", name).join("manifest.json")).unwrap();
        let manifest: serde_json::Value = serde_json::from_str(&manifest).unwrap();
        let (old, new) = name.split_once("..").unwrap();
        assert_eq!((&manifest["from"]["snapshot"], &manifest["to"]["snapshot"]), (&old.into(), &new.into()));
    }
    for none in ["s1..s9", "s9..s1", "..s1", "s1..", "s1...s2", ".."] {
        let there = fs::metadata(mount.export("a", none).join("manifest.json"));
        assert_eq!(errno(there), libc::ENOENT, "{none}");
    }
    let data = fs::read_dir(mount.export("a", "s1..s2")).unwrap().find_map(|entry| {
        let path = entry.unwrap().path();
        path.extension().is_some_and(|end| end == "bin").then_some(path)
    });
    let data = data.unwrap();
    let open = fs::File::open(&data).unwrap();
    snapshot::rename(&mount.store, "a", "s2", "new").unwrap();
    assert_eq!(errno(fs::metadata(&data)), libc::ENOENT);
    assert_eq!(increments(&mount, "a"), ["new..s3", "s1..new"]);
    let renamed = fs::read_to_string(mount.export("a", "s1..new").join("manifest.json")).unwrap();
    assert!(renamed.contains("\"new\""), "{renamed}");
    snapshot::retire(&mount.store, &[("a".into(), "new".into())]).unwrap();
    assert_eq!(errno(fs::metadata(mount.export("a", "s1..new"))), libc::ENOENT, "it has no data any more");
    assert_eq!(increments(&mount, "a"), ["new..s3"]);
    let mut first = [0; 4096];
    open.read_exact_at(&mut first, 0).unwrap();
    let root = rustix::process::geteuid().is_root();
    let refused = errno(fs::File::create_new(mount.export("a", "new..s3").join("x")));
    assert_eq!(refused, if root { libc::EROFS } else { libc::EACCES });
}

/// The first two dots were taken for those between the names.
#[test]
fn a_name_may_end_in_a_dot() {
    let Some(mount) = Mount::new() else { return };
    let path = mount.make("a", 1 << 20);
    create(&path).write_all_at(&noise(8192, 1), 0).unwrap();
    create(&mount.snapshot("a", "v1."));
    create(&path).write_all_at(&noise(8192, 2), 65_536).unwrap();
    create(&mount.snapshot("a", "v2"));
    assert_eq!(increments(&mount, "a"), ["v1...v2"]);
    let manifest = fs::read_to_string(mount.export("a", "v1...v2").join("manifest.json")).unwrap();
    assert!(manifest.contains("\"v1.\"") && manifest.contains("\"v2\""), "{manifest}");
    assert_eq!(errno(fs::metadata(mount.export("a", "v1....v2"))), libc::ENOENT);
    assert_eq!(errno(fs::metadata(mount.export("a", "v1..v2"))), libc::ENOENT);
}

/// A block that has rotted since it was sealed was handed to backups as data.
#[test]
fn what_is_read_of_exports_is_compared_with_its_seal() {
    let Some(mount) = Mount::new() else { return };
    let path = mount.make("a", 8 << 20);
    let content = noise(8 << 20, 1);
    create(&path).write_all_at(&content, 0).unwrap();
    create(&mount.snapshot("a", "s"));
    while mount.store.seal_next().unwrap() {}
    let address = {
        let runs = snapshot::open(&mount.store, "a", "s").unwrap().runs(ChunkIndex(2), 476, 477).unwrap();
        runs[0].address.unwrap()
    };
    let segment = mount.store.media().open(&segment_path(address.segment()), Open::Existing).unwrap();
    segment.write_at(b"ROT!", u64::from(address.slot()) * 4096).unwrap();
    // Backwards, and in pieces that end inside of blocks.
    let (one, two) = (mount.export("a", "s/0000000000400000.img"), mount.export("a", "s/0000000000000000.img"));
    assert_eq!(fs::read(&two).unwrap(), content[..4 << 20]);
    assert_eq!(errno(fs::read(&one)), libc::EIO);
    assert_eq!(fs::read(&two).unwrap(), content[..4 << 20]);
    let file = fs::File::open(&one).unwrap();
    let mut bytes = vec![0; 100_000];
    file.read_exact_at(&mut bytes, 777).unwrap();
    assert_eq!(bytes, content[(4 << 20) + 777..][..100_000]);
}
