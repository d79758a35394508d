//! `checkpoints/`: what was saved of a machine, as files.

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::PathBuf;

use afterimage::checkpoint::{self, Folder, Geometry, PageBlock, Sizes};
use afterimage::error::Kind;
use afterimage::progress::Silent;
use rustix::fs::{SeekFrom, seek};

use super::{Mount, errno};
use crate::checkpoint::{Save, content, geometry, geometry_of, name};

impl Mount {
    fn folder(&self) -> Folder {
        Folder::of_pool(self.store.media())
    }

    /// Returns the path of a file of a checkpoint.
    fn of_checkpoint(&self, text: &str, file: &str) -> PathBuf {
        let (machine, name) = text.split_once('@').unwrap();
        self.dir.join("checkpoints").join(machine).join(name).join(file)
    }

    fn pool(&self) -> PathBuf {
        self._pool.path().to_owned()
    }
}

/// The memory as it was saved.
fn memory(geometry: &Geometry, seed: &dyn Fn(PageBlock) -> u64) -> Vec<u8> {
    let blocks = (0..geometry.page_blocks()).map(PageBlock);
    blocks.flat_map(|number| content(seed(number), number, geometry.length(number).unwrap())).collect()
}

fn names(dir: &std::path::Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// Reads through a mapping that a program makes, since this test may have no unsafe code of its own.
fn mapped(path: &std::path::Path, how: &str, from: usize, to: usize) -> std::process::Output {
    let script = format!(
        "import mmap,sys\nf=open(sys.argv[1],'rb')\nm=mmap.mmap(f.fileno(),0,mmap.{how},mmap.PROT_READ)\n\
         sys.stdout.buffer.write(m[{from}:{to}])"
    );
    std::process::Command::new("python3").arg("-c").arg(script).arg(path).output().unwrap()
}

const PARTS: [&str; 4] = ["checkpoint.ckpt", "devices", "memory", "state.json"];

#[test]
fn the_files_of_a_checkpoint_are_what_was_saved() {
    let Some(mount) = Mount::new() else { return };
    assert_eq!(names(&mount.dir.join("checkpoints")), [""; 0]);
    Save::default().run(&mount.folder()).unwrap();
    assert_eq!(names(&mount.dir.join("checkpoints")), ["vm"]);
    assert_eq!(names(&mount.dir.join("checkpoints/vm")), ["a"]);
    assert_eq!(names(&mount.dir.join("checkpoints/vm/a")), PARTS);
    let expected = memory(&geometry(), &|_| 1);
    let path = mount.of_checkpoint("vm@a", "memory");
    assert_eq!(fs::metadata(&path).unwrap().len(), expected.len() as u64);
    for how in ["MAP_PRIVATE", "MAP_SHARED"] {
        assert!(mapped(&path, how, 0, expected.len()).stdout == expected, "{how}");
    }
    assert!(fs::read(&path).unwrap() == expected);
    // Past the kernel's cache, in pieces that begin anywhere.
    let direct = fs::OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(&path).unwrap();
    for (offset, len) in [(0, 4096), (4096, 20_480), (8192 * 3, 8192), (155_648 - 4096, 12_288), (0, expected.len())] {
        let mut seen = vec![0xee; len];
        direct.read_exact_at(&mut seen, offset as u64).unwrap();
        assert!(seen == expected[offset..offset + len], "{len} bytes at {offset}");
    }
    assert_eq!(fs::read(mount.of_checkpoint("vm@a", "devices")).unwrap(), b"the state of the devices");
    let host = fs::read(mount.pool().join("checkpoints/vm/a.ckpt")).unwrap();
    assert!(fs::read(mount.of_checkpoint("vm@a", "checkpoint.ckpt")).unwrap() == host);
    let text = fs::read(mount.of_checkpoint("vm@a", "state.json")).unwrap();
    assert_eq!(fs::metadata(mount.of_checkpoint("vm@a", "state.json")).unwrap().len(), text.len() as u64);
    let told: checkpoint::Checkpoint = serde_json::from_slice(&text).unwrap();
    assert_eq!(told, checkpoint::info(&mount.folder(), &name("vm@a")).unwrap());
}

#[test]
fn only_the_owner_may_look_and_nobody_may_change() {
    let Some(mount) = Mount::new() else { return };
    Save::default().run(&mount.folder()).unwrap();
    let mode = |path: PathBuf| fs::metadata(path).unwrap().permissions().mode() & 0o7777;
    for dir in ["checkpoints", "checkpoints/vm", "checkpoints/vm/a"] {
        assert_eq!(mode(mount.dir.join(dir)), 0o700, "{dir}");
        assert_eq!(errno(fs::File::create_new(mount.dir.join(dir).join("new"))), libc::EROFS);
        assert_eq!(errno(fs::create_dir(mount.dir.join(dir).join("new"))), libc::EROFS);
    }
    let root = rustix::process::geteuid().is_root();
    for part in PARTS {
        let path = mount.of_checkpoint("vm@a", part);
        assert_eq!(mode(path.clone()), 0o400, "{part}");
        let refused = if root { libc::EROFS } else { libc::EACCES };
        assert_eq!(errno(fs::OpenOptions::new().write(true).open(&path)), refused);
        assert_eq!(errno(fs::remove_file(&path)), libc::EROFS);
        assert_eq!(errno(fs::rename(&path, mount.dir.join("checkpoints/vm/a/other"))), libc::EROFS);
        assert_eq!(errno(fs::set_permissions(&path, fs::Permissions::from_mode(0o644))), libc::EPERM);
    }
    let (from, to) = (mount.dir.join("checkpoints/vm/a"), mount.dir.join("checkpoints/vm/b"));
    assert_eq!(errno(fs::rename(&from, &to)), libc::EROFS);
    assert_eq!(errno(fs::remove_dir(&from)), libc::EROFS);
}

/// Zeros are holes and nothing else is, of a chain too; what programs are told of them adds up.
#[test]
fn zeros_are_holes() {
    let Some(mount) = Mount::new() else { return };
    Save::default().run(&mount.folder()).unwrap();
    let third = |number: PageBlock| number.0.is_multiple_of(3).then_some(2);
    Save { name: "vm@b", parent: Some("vm@a"), seed: &third, ..Save::default() }.run(&mount.folder()).unwrap();
    let of_chain = |number: PageBlock| if number.0.is_multiple_of(3) { 2 } else { 1 };
    let seeds: [(&str, &dyn Fn(PageBlock) -> u64); 2] = [("vm@a", &|_| 1), ("vm@b", &of_chain)];
    for (text, seed) in seeds {
        let (geometry, expected) = (geometry(), memory(&geometry(), seed));
        let path = mount.of_checkpoint(text, "memory");
        let file = fs::File::open(&path).unwrap();
        let (mut at, mut data, mut holes) = (0, 0, 0);
        let mut start = 0;
        // Page block by page block, what is told is what is there.
        for number in (0..geometry.page_blocks()).map(PageBlock) {
            let length = geometry.length(number).unwrap();
            let zero = expected[start..start + length].iter().all(|byte| *byte == 0);
            let (begin, end) = (start as u64, (start + length) as u64);
            let found = seek(&file, SeekFrom::Data(begin)).ok();
            assert_eq!(found == Some(begin), !zero, "{text}: page block {number}");
            let hole = seek(&file, SeekFrom::Hole(begin)).unwrap();
            assert!(if zero { hole == begin } else { hole >= end }, "{text}: page block {number}");
            data += if zero { 0 } else { length as u64 };
            holes += u64::from(zero);
            start += length;
        }
        assert!(holes > 5);
        assert_eq!(fs::metadata(&path).unwrap().blocks() * 512, data, "{text}");
        // As a copy walks it.
        let mut walked = 0;
        while let Ok(begin) = seek(&file, SeekFrom::Data(at)) {
            at = seek(&file, SeekFrom::Hole(begin)).unwrap();
            walked += at - begin;
        }
        assert_eq!(walked, data, "{text}");
        assert!(fs::read(&path).unwrap() == expected, "{text}");
    }
}

#[test]
fn what_is_made_and_removed_elsewhere_shows_at_once() {
    let Some(mount) = Mount::new() else { return };
    let path = mount.of_checkpoint("vm@a", "memory");
    for round in 1..20 {
        assert_eq!(errno(fs::metadata(&path)), libc::ENOENT, "round {round}");
        Save { seed: &|_| Some(round), ..Save::default() }.run(&mount.folder()).unwrap();
        assert_eq!(names(&mount.dir.join("checkpoints/vm")), ["a"]);
        assert!(fs::read(&path).unwrap() == memory(&geometry(), &|_| round), "round {round}");
        // Another state under the same name.
        Save { seed: &|_| Some(round + 100), replace: true, ..Save::default() }.run(&mount.folder()).unwrap();
        assert!(fs::read(&path).unwrap() == memory(&geometry(), &|_| round + 100), "round {round}");
        // The kernel tells of the close a moment after it.
        checkpoint::remove(&mount.store, &name("vm@a")).unwrap();
        assert_eq!(names(&mount.dir.join("checkpoints")), [""; 0]);
    }
}

#[test]
fn an_open_file_holds_its_checkpoint_and_all_it_is_based_on() {
    let Some(mount) = Mount::new() else { return };
    Save::default().run(&mount.folder()).unwrap();
    Save { name: "vm@b", parent: Some("vm@a"), seed: &|_| None, ..Save::default() }.run(&mount.folder()).unwrap();
    let refused = |text: &str| {
        let error = checkpoint::remove(&mount.store, &name(text)).unwrap_err();
        assert!(error.kind() == Kind::Busy && error.to_string().contains(text), "{error}");
    };
    for part in PARTS {
        let open = fs::File::open(mount.of_checkpoint("vm@b", part)).unwrap();
        refused("vm@b");
        drop(open);
    }
    let open = fs::File::open(mount.of_checkpoint("vm@b", "memory")).unwrap();
    refused("vm@a");
    // It has the same memory after it was flattened, in another file; who has it open reads on.
    checkpoint::flatten(&mount.folder(), &name("vm@b"), &Silent).unwrap();
    let mut seen = vec![0; memory(&geometry(), &|_| 1).len()];
    open.read_exact_at(&mut seen, 0).unwrap();
    assert!(seen == memory(&geometry(), &|_| 1));
    let newer = fs::File::open(mount.of_checkpoint("vm@b", "memory")).unwrap();
    drop(open);
    checkpoint::remove(&mount.store, &name("vm@a")).unwrap();
    refused("vm@b");
    drop(newer);
    // Looking holds nothing.
    for _ in 0..5 {
        assert_eq!(names(&mount.dir.join("checkpoints/vm/b")), PARTS);
        PARTS.iter().for_each(|part| assert!(fs::metadata(mount.of_checkpoint("vm@b", part)).unwrap().is_file()));
    }
    checkpoint::remove(&mount.store, &name("vm@b")).unwrap();
    assert_eq!(names(&mount.dir.join("checkpoints")), [""; 0]);
}

#[test]
fn damage_is_an_error_of_its_page_block_and_never_zeros() {
    let Some(mount) = Mount::new() else { return };
    let geometry = geometry_of(Sizes::USUAL, 64);
    Save { geometry: geometry.clone(), ..Save::default() }.run(&mount.folder()).unwrap();
    let (path, expected) = (mount.of_checkpoint("vm@a", "memory"), memory(&geometry, &|_| 1));
    let host = fs::OpenOptions::new().read(true).write(true).open(mount.pool().join("checkpoints/vm/a.ckpt")).unwrap();
    let mut byte = [0];
    host.read_exact_at(&mut byte, (1 << 20) + 5).unwrap();
    host.write_all_at(&[byte[0] ^ 1], (1 << 20) + 5).unwrap();
    let file = fs::OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(&path).unwrap();
    let (mut start, mut damaged) = (0, None);
    for number in (0..geometry.page_blocks()).map(PageBlock) {
        let length = geometry.length(number).unwrap();
        let mut seen = vec![0; length];
        match file.read_exact_at(&mut seen, start as u64) {
            Ok(()) => assert!(seen == expected[start..start + length], "page block {number}"),
            Err(error) => {
                assert_eq!((error.raw_os_error(), damaged), (Some(libc::EIO), None), "page block {number}");
                damaged = Some((start, length));
            }
        }
        start += length;
    }
    let (start, length) = damaged.expect("one page block is damaged");
    // Through the cache, the kernel reads around it: what is sound comes, what is not ends the program.
    assert!(mapped(&path, "MAP_PRIVATE", start, start + 1).status.code().is_none(), "a signal");
    let sound = (start + length) % expected.len();
    assert!(mapped(&path, "MAP_PRIVATE", sound, sound + 100).stdout == expected[sound..sound + 100]);
    // Once it is mended nothing remembers.
    host.write_all_at(&byte, (1 << 20) + 5).unwrap();
    assert!(fs::read(&path).unwrap() == expected);
    // One that is damaged at its beginning has the two files that help.
    host.write_all_at(&[0], 0).unwrap();
    drop(file);
    assert_eq!(names(&mount.dir.join("checkpoints/vm/a")), ["checkpoint.ckpt", "state.json"]);
    assert_eq!(errno(fs::metadata(&path)), libc::ENOENT);
    let text = fs::read_to_string(mount.of_checkpoint("vm@a", "state.json")).unwrap();
    assert!(text.contains("it does not begin like a checkpoint"), "{text}");
    fs::read(mount.of_checkpoint("vm@a", "checkpoint.ckpt")).unwrap();
}

#[test]
fn a_chain_whose_parent_is_gone_cannot_be_opened_and_says_so() {
    let Some(mount) = Mount::new() else { return };
    Save::default().run(&mount.folder()).unwrap();
    Save { name: "vm@b", parent: Some("vm@a"), seed: &|_| None, ..Save::default() }.run(&mount.folder()).unwrap();
    fs::remove_file(mount.pool().join("checkpoints/vm/a.ckpt")).unwrap();
    let path = mount.of_checkpoint("vm@b", "memory");
    let meta = fs::metadata(&path).unwrap();
    assert_eq!(meta.blocks() * 512, meta.len(), "no hole is known");
    assert_eq!(errno(fs::File::open(&path)), libc::EIO);
    assert_eq!(fs::read(mount.of_checkpoint("vm@b", "devices")).unwrap(), b"the state of the devices");
}

#[test]
fn many_read_at_once_and_all_see_the_same() {
    let Some(mount) = Mount::new() else { return };
    let geometry = geometry_of(Sizes::USUAL, 256);
    Save { geometry: geometry.clone(), ..Save::default() }.run(&mount.folder()).unwrap();
    let (path, expected) = (mount.of_checkpoint("vm@a", "memory"), memory(&geometry, &|_| 1));
    std::thread::scope(|scope| {
        for worker in 0..8_usize {
            let (path, expected) = (&path, &expected);
            scope.spawn(move || {
                let flags = if worker.is_multiple_of(2) { libc::O_DIRECT } else { 0 };
                let file = fs::OpenOptions::new().read(true).custom_flags(flags).open(path).unwrap();
                let pages = expected.len() / 4096;
                for step in 0..400 {
                    let at = (step * 797 + worker * 131) % pages * 4096;
                    let len = (1 + step % 40) * 4096;
                    let end = (at + len).min(expected.len());
                    let mut seen = vec![0; end - at];
                    file.read_exact_at(&mut seen, at as u64).unwrap();
                    assert!(seen == expected[at..end], "{len} bytes at {at}");
                }
            });
        }
    });
}

/// A file keeps its number over a remount, and so do what backup programs know of it.
#[test]
fn numbers_are_the_same_after_a_remount() {
    let Some(mut mount) = Mount::new() else { return };
    Save::default().run(&mount.folder()).unwrap();
    Save { name: "other@a", ..Save::default() }.run(&mount.folder()).unwrap();
    let numbers = |mount: &Mount| -> Vec<u64> {
        let places =
            ["vm", "vm/a", "vm/a/memory", "vm/a/devices", "vm/a/state.json", "vm/a/checkpoint.ckpt", "other/a"];
        places.map(|place| fs::metadata(mount.dir.join("checkpoints").join(place)).unwrap().ino()).to_vec()
    };
    let before = numbers(&mount);
    let options = afterimage::tree::MountOptions::of_pool(&mount.pool());
    let at = mount.dir.clone();
    mount.mounted = None;
    mount.mounted = Some(afterimage::tree::mount(&mount.store, &at, &options).unwrap());
    assert_eq!(numbers(&mount), before);
    let mut unique = before.clone();
    unique.sort_unstable();
    unique.dedup();
    assert_eq!(unique.len(), before.len());
}
