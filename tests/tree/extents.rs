//! Extent files: their numbers and times change when and only when their content does, over random histories.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use afterimage::disk::{self, BlockDevice};
use afterimage::progress::Silent;
use afterimage::snapshot;

use super::{Mount, create, noise};

const EXTENT: u64 = 2 << 20;

/// What stat(2) tells of a file that must not change with its content unchanged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stat {
    ino: u64,
    size: u64,
    mtime: i64,
    ctime: i64,
}

impl Stat {
    fn of(path: &Path) -> Self {
        let meta = fs::symlink_metadata(path).unwrap();
        assert_eq!((meta.mtime_nsec(), meta.ctime_nsec()), (0, 0), "whole seconds");
        Self { ino: meta.ino(), size: meta.len(), mtime: meta.mtime(), ctime: meta.ctime() }
    }
}

/// An extent of the twin: its bytes, and a number that grows whenever anything touches them.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Piece {
    bytes: Vec<u8>,
    version: u64,
}

/// A disk in memory.
#[derive(Debug, Clone, Default)]
struct Twin {
    size: u64,
    pieces: Vec<Piece>,
}

struct Game {
    mount: Mount,
    state: u64,
    version: u64,
    disks: BTreeMap<String, Twin>,
    snapshots: BTreeMap<(String, String), Twin>,
    taken: u32,
}

impl Game {
    fn below(&mut self, end: u64) -> u64 {
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        self.state % end
    }

    fn touch(&mut self, disk: &str, from: u64, upto: u64, bytes: Option<&[u8]>) {
        self.version += 1;
        let twin = self.disks.get_mut(disk).unwrap();
        for (index, piece) in twin.pieces.iter_mut().enumerate() {
            let start = index as u64 * EXTENT;
            let (a, b) = (from.max(start), upto.min(start + piece.bytes.len() as u64));
            if a < b {
                piece.version = self.version;
                let range = usize::try_from(a - start).unwrap()..usize::try_from(b - start).unwrap();
                match bytes {
                    Some(bytes) => piece.bytes[range].copy_from_slice(
                        &bytes[usize::try_from(a - from).unwrap()..usize::try_from(b - from).unwrap()],
                    ),
                    None => piece.bytes[range].fill(0),
                }
            }
        }
    }

    fn resize(&mut self, disk: &str, size: u64) {
        self.version += 1;
        let version = self.version;
        let twin = self.disks.get_mut(disk).unwrap();
        let count = usize::try_from(size.div_ceil(EXTENT)).unwrap();
        twin.pieces.resize(count, Piece { bytes: Vec::new(), version: 0 });
        for (index, piece) in twin.pieces.iter_mut().enumerate() {
            let length = usize::try_from((size - index as u64 * EXTENT).min(EXTENT)).unwrap();
            if piece.bytes.len() != length {
                piece.bytes.resize(length, 0);
                piece.version = version;
            }
        }
        twin.size = size;
        disk::open(&self.mount.store, disk).unwrap().resize(size, true).unwrap();
    }

    fn step(&mut self) {
        let names: Vec<String> = self.disks.keys().cloned().collect();
        let disk = names[usize::try_from(self.below(names.len() as u64)).unwrap()].clone();
        let size = self.disks[&disk].size;
        let store = self.mount.store.clone();
        match self.below(12) {
            0..=3 if size > 0 => {
                let from = self.below(size);
                let len = (1 + self.below(20_000)).min(size - from);
                let bytes = noise(usize::try_from(len).unwrap(), self.below(u64::MAX));
                disk::open(&store, &disk).unwrap().write(&bytes, from).unwrap();
                self.touch(&disk, from, from + len, Some(&bytes));
            }
            4 | 5 if size > 0 => {
                let from = self.below(size);
                let len = (1 + self.below(3 << 20)).min(size - from);
                disk::open(&store, &disk).unwrap().write_zeroes(from, len).unwrap();
                self.touch(&disk, from, from + len, None);
            }
            6 => {
                let size = match self.below(3) {
                    0 => self.below(6) * EXTENT,
                    _ => self.below(10 << 20),
                };
                self.resize(&disk, size);
            }
            7 | 8 => self.take(&disk),
            9 => {
                let own: Vec<_> = self.snapshots.keys().filter(|key| key.0 == disk).cloned().collect();
                if own.len() > 4 {
                    let key = &own[usize::try_from(self.below(own.len() as u64)).unwrap()];
                    if self.below(2) == 0 {
                        snapshot::remove(&store, &key.0, &key.1).unwrap();
                    } else {
                        snapshot::retire(&store, &[(key.0.clone(), key.1.clone())]).unwrap();
                    }
                    self.snapshots.remove(key);
                }
            }
            10 => {
                let own: Vec<_> = self.snapshots.keys().filter(|key| key.0 == disk).cloned().collect();
                if let Some(key) = own.get(usize::try_from(self.below(8)).unwrap()) {
                    snapshot::revert(&store, &key.0, &key.1, None).unwrap();
                    self.disks.insert(disk, self.snapshots[key].clone());
                }
            }
            11 if self.disks.len() < 3 => {
                let own: Vec<_> = self.snapshots.keys().cloned().collect();
                if let Some(key) = own.get(usize::try_from(self.below(8)).unwrap()) {
                    let new = format!("clone{}", self.disks.len());
                    snapshot::clone(&store, &key.0, &key.1, &new).unwrap();
                    self.disks.insert(new, self.snapshots[key].clone());
                }
            }
            _ => store.reclaim_wait(&Silent).map(drop).unwrap(),
        }
    }

    fn take(&mut self, disk: &str) {
        self.taken += 1;
        let name = format!("s{}", self.taken);
        snapshot::take(&self.mount.store, &[(disk.to_owned(), name.clone())]).unwrap();
        self.snapshots.insert((disk.to_owned(), name), self.disks[disk].clone());
    }

    /// Compares everything that is shown with the twin, and all snapshots with each other.
    fn check(&self) {
        let mut seen: Vec<(Vec<Stat>, &Twin)> = Vec::new();
        for ((disk, name), twin) in &self.snapshots {
            let dir = self.mount.dir.join("exports").join(disk).join(name);
            let mut names: Vec<_> = fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().file_name()).collect();
            names.sort();
            assert_eq!(names.len(), twin.pieces.len(), "{disk}@{name}");
            let stats: Vec<Stat> = names.iter().map(|name| Stat::of(&dir.join(name))).collect();
            for (index, file) in names.iter().enumerate() {
                assert_eq!(file.to_str().unwrap(), format!("{:016x}.img", index as u64 * EXTENT));
                assert!(fs::read(dir.join(file)).unwrap() == twin.pieces[index].bytes, "{disk}@{name} {index}");
            }
            seen.push((stats, twin));
        }
        for (at, (mine, twin)) in seen.iter().enumerate() {
            for (theirs, other) in &seen[..at] {
                for index in 0..mine.len().min(theirs.len()) {
                    let (a, b) = (&twin.pieces[index], &other.pieces[index]);
                    if a.version == b.version {
                        assert_eq!(mine[index], theirs[index], "extent {index} is the same in both");
                    }
                    if a.bytes != b.bytes {
                        assert_ne!(mine[index].mtime, theirs[index].mtime, "extent {index} differs");
                        assert_ne!(mine[index].ino, theirs[index].ino, "extent {index} differs");
                    }
                }
            }
        }
    }
}

#[test]
fn numbers_and_times_tell_what_changed_over_random_histories() {
    for seed in 1..=6 {
        let Some(mount) = Mount::new() else { return };
        disk::create_empty(&mount.store, "a").unwrap();
        disk::set(&mount.store, "a", "extent-size", "2M").unwrap();
        let disks = BTreeMap::from([("a".to_owned(), Twin::default())]);
        let state = 0x9e37_79b9_7f4a_7c15_u64.wrapping_mul(seed);
        let mut game = Game { mount, state, version: 0, disks, snapshots: BTreeMap::new(), taken: 0 };
        game.resize("a", 7 << 20);
        for _ in 0..12 {
            for _ in 0..10 {
                game.step();
            }
            game.check();
        }
        let report = afterimage::store::check(&game.mount.store, false, &Silent).unwrap();
        assert!(report.problems.is_empty(), "seed {seed}: {:?}", report.problems);
    }
}

#[test]
fn snapshots_of_one_second_have_different_times() {
    let Some(mount) = Mount::new() else { return };
    let path = mount.make("a", 3 << 20);
    let file = create(&path);
    let mut times = Vec::new();
    for round in 0..20_u8 {
        file.write_all_at(&[round + 1], 5).unwrap();
        let name = format!("s{round}");
        create(&mount.snapshot("a", &name));
        times.push(Stat::of(&mount.dir.join("exports/a").join(&name).join("0000000000000000.img")).mtime);
    }
    assert!(times.windows(2).all(|pair| pair[0] < pair[1]), "{times:?}");
}

#[test]
fn a_changed_length_alone_is_another_time() {
    let Some(mount) = Mount::new() else { return };
    mount.make("a", 9 << 20);
    let store = &mount.store;
    let mut seen: BTreeMap<(String, i64), u64> = BTreeMap::new();
    for (round, size) in [9_u64, 10, 100, 9, 50, 11, 8, 12].into_iter().enumerate() {
        disk::open(store, "a").unwrap().resize(size << 20, true).unwrap();
        let name = format!("s{round}");
        snapshot::take(store, &[("a".into(), name.clone())]).unwrap();
        for entry in fs::read_dir(mount.dir.join("exports/a").join(&name)).unwrap() {
            let entry = entry.unwrap();
            let stat = Stat::of(&entry.path());
            let known = seen.entry((entry.file_name().into_string().unwrap(), stat.mtime)).or_insert(stat.size);
            assert_eq!(*known, stat.size, "{name} {entry:?}");
        }
    }
    assert_eq!(afterimage::store::check(store, false, &Silent).unwrap().problems, []);
}

#[test]
fn numbers_and_times_are_the_same_after_a_remount() {
    let Some(mut mount) = Mount::new() else { return };
    let path = mount.make("a", 30 << 20);
    create(&path).write_all_at(&noise(100_000, 1), 9 << 20).unwrap();
    create(&mount.snapshot("a", "s"));
    let dir = mount.dir.join("exports/a/s");
    let look = || -> Vec<Stat> {
        let mut paths: Vec<_> = fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().path()).collect();
        paths.sort();
        paths.iter().map(|path| Stat::of(path)).collect()
    };
    let before = look();
    assert_eq!(before.len(), 8);
    mount.mounted = None;
    let options = afterimage::tree::MountOptions::of_pool(&mount.dir);
    mount.mounted = Some(afterimage::tree::mount(&mount.store, &mount.dir, &options).unwrap());
    assert_eq!(look(), before);
}

#[test]
fn the_extent_size_is_fixed_by_the_first_snapshot() {
    let Some(mount) = Mount::new() else { return };
    let path = mount.make("a", 30 << 20);
    disk::set(&mount.store, "a", "extent-size", "8M").unwrap();
    create(&path).write_all_at(&noise(8192, 1), 0).unwrap();
    create(&mount.snapshot("a", "s"));
    assert_eq!(fs::read_dir(mount.dir.join("exports/a/s")).unwrap().count(), 4);
    let error = disk::set(&mount.store, "a", "extent-size", "16M").unwrap_err();
    assert!(error.to_string().contains("first snapshot"), "{error}");
    disk::set(&mount.store, "a", "extent-size", "8M").unwrap();
    // A disk that becomes a clone shares blocks, so it is cut like its source.
    let copy = disk::create_empty(&mount.store, "b").unwrap();
    snapshot::clone_into(&mount.store, "a", Some("s"), copy.id).unwrap();
    create(&mount.snapshot("b", "s"));
    assert_eq!(fs::read_dir(mount.dir.join("exports/b/s")).unwrap().count(), 4);
}
