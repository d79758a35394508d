//! `exports/`: what programs see of extent trees, and what backup programs make of them.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

use afterimage::disk::{self, BlockDevice};
use afterimage::snapshot;
use rustix::fs::SeekFrom;

use super::{Mount, create, errno, noise, run};

/// Returns the files of a directory in order.
fn files(dir: &Path) -> Vec<PathBuf> {
    let mut paths: Vec<_> = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths
}

/// Returns the data extents of an open file, as SEEK_DATA and SEEK_HOLE tell them.
fn extents(file: &fs::File) -> Vec<(u64, u64)> {
    let mut found = Vec::new();
    let mut at = 0;
    loop {
        match rustix::fs::seek(file, SeekFrom::Data(at)) {
            Ok(start) => {
                at = rustix::fs::seek(file, SeekFrom::Hole(start)).unwrap();
                found.push((start, at));
            }
            Err(error) => {
                assert_eq!(error, rustix::io::Errno::NXIO);
                return found;
            }
        }
    }
}

#[test]
fn the_files_in_order_are_the_disk_and_its_holes() {
    let Some(mount) = Mount::new() else { return };
    let path = mount.make("a", (21 << 20) + 1000);
    let file = create(&path);
    for (offset, len) in [(0, 10_000), (4 << 20, 4096), ((8 << 20) - 4096, 8192), (13 << 20, 3 << 20)] {
        file.write_all_at(&noise(len, offset + 1), offset).unwrap();
    }
    file.write_all_at(&noise(1000, 3), 21 << 20).unwrap();
    create(&mount.snapshot("a", "s"));
    file.write_all_at(&noise(20 << 20, 9), 0).unwrap();
    let whole = fs::File::open(mount.snapshot("a", "s")).unwrap();
    let dir = mount.dir.join("exports/a/s");
    let (mut bytes, mut data, mut blocks) = (Vec::new(), Vec::<(u64, u64)>::new(), 0);
    for path in files(&dir) {
        let base = bytes.len() as u64;
        let file = fs::File::open(&path).unwrap();
        for (start, end) in extents(&file) {
            match data.last_mut() {
                Some(last) if last.1 == base + start => last.1 = base + end,
                _ => data.push((base + start, base + end)),
            }
        }
        let meta = file.metadata().unwrap();
        assert_eq!((meta.permissions().mode() & 0o7777, meta.nlink()), (0o400, 1));
        assert_eq!((meta.mtime(), meta.mtime()), (meta.ctime(), meta.atime()));
        blocks += meta.blocks();
        bytes.extend(fs::read(&path).unwrap());
        assert_eq!(meta.len(), bytes.len() as u64 - base);
    }
    assert!(bytes == fs::read(mount.snapshot("a", "s")).unwrap());
    assert_eq!(data, extents(&whole));
    assert_eq!(blocks, whole.metadata().unwrap().blocks());
    let never = fs::metadata(dir.join("0000000001000000.img")).unwrap();
    assert_eq!((never.mtime(), never.blocks(), never.len()), (1, 0, 4 << 20), "nothing ever touched it");
    assert_eq!(fs::metadata(&dir).unwrap().permissions().mode() & 0o7777, 0o555);
}

#[test]
fn a_disk_of_no_size_has_no_extents() {
    let Some(mount) = Mount::new() else { return };
    mount.make("a", 0);
    create(&mount.snapshot("a", "s"));
    assert_eq!(files(&mount.dir.join("exports/a/s")), Vec::<PathBuf>::new());
}

#[test]
fn nothing_in_it_is_ever_written() {
    let Some(mount) = Mount::new() else { return };
    let path = mount.make("a", 5 << 20);
    create(&path).write_all_at(b"x", 0).unwrap();
    create(&mount.snapshot("a", "s"));
    let root = rustix::process::geteuid().is_root();
    let refused = |error: i32| assert_eq!(error, if root { libc::EROFS } else { libc::EACCES });
    for dir in ["exports", "exports/a", "exports/a/s"].map(|dir| mount.dir.join(dir)) {
        refused(errno(fs::File::create_new(dir.join("new"))));
        refused(errno(fs::create_dir(dir.join("new"))));
        refused(errno(std::os::unix::fs::symlink("x", dir.join("new"))));
        let first = files(&dir)[0].clone();
        refused(errno(fs::rename(&first, dir.join("new"))));
        let sort = fs::symlink_metadata(&first).unwrap().file_type();
        if !sort.is_dir() {
            refused(errno(fs::remove_file(&first)));
        }
        if sort.is_file() {
            refused(errno(fs::OpenOptions::new().write(true).open(&first)));
            refused(errno(fs::OpenOptions::new().append(true).open(&first)));
            refused(errno(fs::File::create(&first)));
        }
        if sort.is_dir() {
            refused(errno(fs::remove_dir(&first)));
        }
    }
    refused(errno(fs::remove_file(mount.dir.join("exports/a/latest"))));
    refused(errno(fs::rename(mount.snapshot("a", "s"), mount.dir.join("exports/a/t"))));
}

#[test]
fn the_link_leads_to_the_newest_live_snapshot() {
    let Some(mount) = Mount::new() else { return };
    mount.make("a", 5 << 20);
    let link = mount.dir.join("exports/a/latest");
    assert_eq!(errno(fs::symlink_metadata(&link)), libc::ENOENT);
    for name in ["s1", "s2", "a longer name"] {
        snapshot::take(&mount.store, &[("a".into(), name.into())]).unwrap();
        assert_eq!(fs::read_link(&link).unwrap(), Path::new(name));
        assert_eq!(fs::symlink_metadata(&link).unwrap().len(), name.len() as u64);
        assert_eq!(fs::read_dir(&link).unwrap().count(), 2);
    }
    snapshot::remove(&mount.store, "a", "a longer name").unwrap();
    assert_eq!(fs::read_link(&link).unwrap(), Path::new("s2"));
    snapshot::rename(&mount.store, "a", "s2", "latest").unwrap();
    assert!(fs::symlink_metadata(&link).unwrap().is_dir(), "a snapshot of that name is shown instead");
}

#[test]
fn names_come_and_go_with_snapshots_made_elsewhere() {
    let Some(mount) = Mount::new() else { return };
    mount.make("a", 5 << 20);
    let store = &mount.store;
    let dir = |name: &str| mount.dir.join("exports/a").join(name);
    for _ in 0..30 {
        snapshot::take(store, &[("a".into(), "s".into())]).unwrap();
        assert_eq!(files(&dir("s")).len(), 2);
        let inside = dir("s").join("0000000000000000.img");
        fs::metadata(&inside).unwrap();
        snapshot::rename(store, "a", "s", "t").unwrap();
        assert_eq!(errno(fs::metadata(dir("s"))), libc::ENOENT);
        assert_eq!(errno(fs::metadata(&inside)), libc::ENOENT);
        fs::read(dir("t").join("0000000000000000.img")).unwrap();
        snapshot::remove(store, "a", "t").unwrap();
        assert_eq!(errno(fs::metadata(dir("t"))), libc::ENOENT);
    }
}

#[test]
fn an_open_file_outlives_its_snapshot_and_its_sharers() {
    let Some(mount) = Mount::new() else { return };
    let path = mount.make("a", 8 << 20);
    create(&path).write_all_at(&noise(8 << 20, 1), 0).unwrap();
    for name in ["s", "t"] {
        create(&mount.snapshot("a", name));
    }
    let (s, t) = (mount.dir.join("exports/a/s"), mount.dir.join("exports/a/t"));
    let first = s.join("0000000000000000.img");
    let ino = fs::metadata(&first).unwrap().ino();
    assert_eq!(ino, fs::metadata(t.join("0000000000000000.img")).unwrap().ino(), "the same content");
    let (open, shared) = (fs::File::open(&first).unwrap(), fs::File::open(t.join("0000000000400000.img")).unwrap());
    create(&path).write_all_at(&noise(8 << 20, 2), 0).unwrap();
    fs::remove_file(mount.snapshot("a", "s")).unwrap();
    assert_eq!(errno(fs::metadata(&s)), libc::ENOENT);
    // The other snapshot still shows the inode that was found through the one that is gone.
    assert!(fs::read(t.join("0000000000000000.img")).unwrap() == noise(8 << 20, 1)[..4 << 20]);
    snapshot::retire(&mount.store, &[("a".into(), "t".into())]).unwrap();
    assert_eq!(errno(fs::metadata(&t)), libc::ENOENT);
    for round in 3..6 {
        create(&path).write_all_at(&noise(8 << 20, round), 0).unwrap();
        mount.store.reclaim_wait(&afterimage::progress::Silent).unwrap();
    }
    rustix::fs::fadvise(&open, 0, None, rustix::fs::Advice::DontNeed).unwrap();
    let mut buf = vec![0; 4 << 20];
    open.read_exact_at(&mut buf, 0).unwrap();
    assert!(buf == noise(8 << 20, 1)[..4 << 20]);
    shared.read_exact_at(&mut buf, 0).unwrap();
    assert!(buf == noise(8 << 20, 1)[4 << 20..]);
    let used = |store: &afterimage::store::Store| store.tables.read().held(disk::open(&mount.store, "a").unwrap().id());
    assert_eq!(used(&mount.store), 4096, "held by the open files and the disk");
    drop((open, shared));
    for _ in 0..1000 {
        mount.store.reclaim_wait(&afterimage::progress::Silent).unwrap();
        if used(&mount.store) == 2048 {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    panic!("the data of the retired snapshot stayed: {}", used(&mount.store));
}

/// Copies with rsync and returns the names of what it transferred.
fn rsync(flags: &[&str], from: &Path, to: &Path) -> Vec<String> {
    let mut words: Vec<&OsStr> = flags.iter().map(OsStr::new).collect();
    words.extend(["--delete", "--out-format=%n"].map(OsStr::new));
    let from = format!("{}/", from.display());
    words.extend([OsStr::new(&from), to.as_os_str()]);
    let output = run("rsync", &words);
    let said = String::from_utf8(output.stdout).unwrap();
    said.lines().filter(|line| line.ends_with(".img")).map(str::to_owned).collect()
}

#[test]
fn rsync_carries_what_changed_and_nothing_else() {
    let Some(mount) = Mount::new() else { return };
    if std::process::Command::new("rsync").arg("--version").output().is_err() {
        assert!(std::env::var_os("CI").is_none(), "CI must have rsync");
        eprintln!("SKIPPED: there is no rsync");
        return;
    }
    let path = mount.make("a", 41 << 20);
    let file = create(&path);
    file.write_all_at(&noise(10 << 20, 1), 3 << 20).unwrap();
    create(&mount.snapshot("a", "s0"));
    let copies = tempfile::tempdir().unwrap();
    let kinds = [("plain", &["-a"][..]), ("sparse", &["-aS"])];
    for (kind, flags) in kinds {
        assert_eq!(rsync(flags, &mount.dir.join("exports/a/s0"), &copies.path().join(kind)).len(), 11);
    }
    let rounds: [(&str, u64, &[&str]); 4] = [
        ("s1", 5 << 20, &["0000000000400000.img"]),
        ("s2", 40 << 20, &["0000000002800000.img"]),
        ("s3", (8 << 20) - 1, &["0000000000400000.img", "0000000000800000.img"]),
        ("s4", 0, &["0000000000000000.img"]),
    ];
    for (name, offset, changed) in rounds {
        file.write_all_at(&noise(2, offset + 7), offset).unwrap();
        create(&mount.snapshot("a", name));
        snapshot::retire(&mount.store, &[("a".into(), format!("s{}", name[1..].parse::<u32>().unwrap() - 1))]).unwrap();
        for (kind, flags) in kinds {
            let (from, to) = (mount.dir.join("exports/a").join(name), copies.path().join(kind));
            assert_eq!(rsync(flags, &from, &to), changed, "{kind} {name}");
            let reads = mount.store.counters.reads.load(Ordering::Relaxed);
            assert_eq!(rsync(flags, &from, &to), Vec::<String>::new(), "{kind} {name} again");
            assert_eq!(mount.store.counters.reads.load(Ordering::Relaxed), reads, "nothing changed, nothing is read");
            let bytes: Vec<u8> = files(&to).iter().flat_map(|path| fs::read(path).unwrap()).collect();
            assert!(bytes == fs::read(mount.snapshot("a", name)).unwrap(), "{kind} {name}");
        }
    }
    let allocated: u64 = files(&copies.path().join("sparse")).iter().map(|p| fs::metadata(p).unwrap().blocks()).sum();
    assert!(allocated * 512 < 13 << 20, "holes stay holes: {allocated}");
}

#[test]
fn a_large_thin_disk_is_listed_without_reading_it() {
    let Some(mount) = Mount::new() else { return };
    disk::create(&mount.store, "a", 64 << 30).unwrap();
    let disk = disk::open(&mount.store, "a").unwrap();
    for part in 0..64 {
        disk.write(&noise(5000, part + 1), (part << 30) + 12_345).unwrap();
    }
    snapshot::take(&mount.store, &[("a".into(), "s".into())]).unwrap();
    let reads = mount.store.counters.reads.load(Ordering::Relaxed);
    let begun = std::time::Instant::now();
    let mut touched = 0;
    let paths = files(&mount.dir.join("exports/a/s"));
    for path in &paths {
        let meta = fs::symlink_metadata(path).unwrap();
        assert_eq!(meta.len(), 4 << 20);
        touched += usize::from(meta.blocks() > 0);
    }
    assert_eq!((paths.len(), touched), (16_384, 64));
    assert_eq!(mount.store.counters.reads.load(Ordering::Relaxed), reads);
    eprintln!("16,384 extents listed in {:?}", begun.elapsed());
    assert!(begun.elapsed() < std::time::Duration::from_secs(20));
}

#[test]
fn one_tree_at_a_path_of_its_own_stays_until_it_is_unmounted() {
    let Some(mount) = Mount::new() else { return };
    let path = mount.make("a", 9 << 20);
    create(&path).write_all_at(&noise(9 << 20, 1), 0).unwrap();
    create(&mount.snapshot("a", "s"));
    let id = mount.store.snapshot_info("a", "s").unwrap().id;
    let at = tempfile::tempdir().unwrap();
    let options = afterimage::tree::MountOptions::of_pool(&mount.dir);
    let alone = afterimage::tree::mount_extents(&mount.store, id, at.path(), &options).unwrap();
    let mut names: Vec<_> = files(at.path());
    assert_eq!(names.len(), 4);
    let about = names.pop().unwrap();
    assert_eq!(about.file_name().unwrap(), "snapshot.json");
    let told: serde_json::Value = serde_json::from_slice(&fs::read(&about).unwrap()).unwrap();
    assert_eq!((&told["disk"], &told["snapshot"], &told["size"]), (&"a".into(), &"s".into(), &(9 << 20).into()));
    // Newer than every extent, so that borg trusts what it knows of them.
    let newest = names.iter().map(|path| fs::metadata(path).unwrap().mtime()).max().unwrap();
    assert!(fs::metadata(&about).unwrap().mtime() > newest);
    for path in &names {
        let (here, there) =
            (fs::metadata(path).unwrap(), fs::metadata(mount.dir.join("exports/a/s").join(path.file_name().unwrap())));
        let there = there.unwrap();
        assert_eq!((here.ino(), here.mtime(), here.len()), (there.ino(), there.mtime(), there.len()));
    }
    snapshot::retire(&mount.store, &[("a".into(), "s".into())]).unwrap();
    create(&path).write_all_at(&noise(9 << 20, 2), 0).unwrap();
    mount.store.reclaim_wait(&afterimage::progress::Silent).unwrap();
    let bytes: Vec<u8> = names.iter().flat_map(|path| fs::read(path).unwrap()).collect();
    assert!(bytes == noise(9 << 20, 1));
    assert_eq!(errno(fs::metadata(at.path().join("disks"))), libc::ENOENT);
    drop(alone);
    assert_eq!(files(at.path()), Vec::<PathBuf>::new());
}
