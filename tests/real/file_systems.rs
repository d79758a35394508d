//! File systems that live on a disk, through a loop device: made, filled, snapshotted under load, cloned, trimmed, reverted.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use super::{FileSystem, Loop, Place, require_loop, require_programs, run, shell};
use crate::tree::noise;

struct Kind {
    name: &'static str,
    mkfs: &'static [&'static str],
    fsck: &'static [&'static str],
    /// Options to look at a snapshot without replaying its log.
    look: &'static str,
}

const EXT4: Kind =
    Kind { name: "ext4", mkfs: &["mkfs.ext4", "-q", "-F"], fsck: &["e2fsck", "-f", "-n"], look: "ro,noload" };
const XFS: Kind =
    Kind { name: "xfs", mkfs: &["mkfs.xfs", "-q", "-f"], fsck: &["xfs_repair", "-n"], look: "ro,norecovery,nouuid" };
const BTRFS: Kind = Kind {
    name: "btrfs",
    mkfs: &["mkfs.btrfs", "-q", "-f"],
    fsck: &["btrfs", "check", "--readonly"],
    look: "ro,rescue=nologreplay",
};

#[test]
fn ext4() {
    lives_on_a_disk(&EXT4, &[]);
}

#[test]
fn ext4_past_the_page_cache() {
    lives_on_a_disk(&EXT4, &["--direct-io=on"]);
}

#[test]
fn xfs() {
    lives_on_a_disk(&XFS, &[]);
}

#[test]
fn xfs_past_the_page_cache() {
    lives_on_a_disk(&XFS, &["--direct-io=on"]);
}

#[test]
fn btrfs() {
    lives_on_a_disk(&BTRFS, &[]);
}

#[test]
fn btrfs_past_the_page_cache() {
    lives_on_a_disk(&BTRFS, &["--direct-io=on"]);
}

/// Every file below a directory and the checksum of what is in it.
fn contents(dir: &Path) -> BTreeMap<String, u32> {
    let list = shell("cd \"$1\"; find . -type f -print0", &[dir.as_os_str()]);
    let names = list.split('\0').filter(|name| !name.is_empty());
    names.map(|name| (name.to_owned(), crc32fast::hash(&fs::read(dir.join(name)).unwrap()))).collect()
}

/// Writes files one after the other, each synced before the next, until told to stop.
fn keep_writing(dir: &Path, synced: &AtomicUsize, stop: &AtomicBool) {
    let mut number = 0;
    while !stop.load(Ordering::Relaxed) {
        let mut file = fs::File::create(dir.join(number.to_string())).unwrap();
        file.write_all(&noise(1000 + number % 50 * 997, number as u64)).unwrap();
        file.sync_all().unwrap();
        number += 1;
        synced.store(number, Ordering::Release);
    }
}

fn lives_on_a_disk(kind: &Kind, options: &[&str]) {
    if !require_loop() || !require_programs(&[kind.mkfs[0], kind.fsck[0], "losetup", "fstrim"]) {
        return;
    }
    if !super::require(can_mount(kind.name), &format!("a kernel that knows {}", kind.name)) {
        return;
    }
    let Some(place) = Place::new() else { return };
    let server = place.serve();
    let (disk, at) = (place.disk("fs"), place.cli.path("at"));
    run("truncate", ["-s".as_ref(), "1G".as_ref(), disk.as_os_str()]);
    let device = Loop::attach(&disk, options);
    run(kind.mkfs[0], kind.mkfs[1..].iter().chain([&&*device.0]));
    let mounted = FileSystem::mount(&device, &at, "defaults");
    fill(&at);
    run("sync", ["-f".as_ref(), at.as_os_str()]);
    let before = contents(&at);

    // The snapshot is taken while somebody writes.
    let (synced, stop) = (AtomicUsize::new(0), AtomicBool::new(false));
    let busy = at.join("busy");
    fs::create_dir(&busy).unwrap();
    let certain = std::thread::scope(|scope| {
        scope.spawn(|| keep_writing(&busy, &synced, &stop));
        super::wait_for("some files are written", || synced.load(Ordering::Acquire) >= 10);
        let certain = synced.load(Ordering::Acquire);
        place.cli.json(&["snapshot", "fs@busy"]);
        let then = synced.load(Ordering::Acquire);
        super::wait_for("writing goes on", || synced.load(Ordering::Acquire) > then);
        stop.store(true, Ordering::Relaxed);
        certain
    });
    let after = contents(&at);
    drop(mounted);
    drop(device);
    fsck(kind, &disk);

    snapshot_is_read_only(&place, kind);
    // What a clone of the snapshot holds after its log was replayed.
    place.cli.json(&["clone", "fs@busy", "twin"]);
    let in_clone = with_file_system(&place, "twin", options, contents);
    for (name, crc) in &before {
        assert_eq!(in_clone.get(name), Some(crc), "{name} was synced before the snapshot");
    }
    for number in 0..certain {
        let name = format!("./busy/{number}");
        assert_eq!(in_clone.get(&name), after.get(&name), "{name} was synced before the snapshot");
    }
    fsck(kind, &place.disk("twin"));

    let full = place.number(&["info", "fs"], "referenced");
    with_file_system(&place, "fs", options, |at| {
        assert_eq!(contents(at), after, "as it was left");
        fs::remove_dir_all(at.join("noise")).unwrap();
        run("sync", ["-f".as_ref(), at.as_os_str()]);
        run("fstrim", [at]);
    });
    let trimmed = place.number(&["info", "fs"], "referenced");
    assert!(trimmed + (20 << 20) < full, "fstrim gives space back: {full}, then {trimmed}");
    fsck(kind, &disk);

    place.cli.json(&["revert", "fs@busy"]);
    let reverted = with_file_system(&place, "fs", options, contents);
    assert_eq!(reverted, in_clone, "the disk is the snapshot again, as the clone was");
    fsck(kind, &disk);
    place.check();
    let scrubbed = place.cli.json(&["scrub"]);
    assert!(
        scrubbed["damaged"].as_array().unwrap().is_empty() && scrubbed["blocks"].as_u64() > Some(1000),
        "{scrubbed}"
    );
    server.stop();
    assert!(!place.check().contains("not closed in order"));
}

/// A snapshot is a device that reads, mounts without its log, and takes no writes.
fn snapshot_is_read_only(place: &Place, kind: &Kind) {
    let snapshot = place.snapshot("fs", "busy");
    let device = Loop::attach(&snapshot, &["--read-only"]);
    run("cmp", [Path::new(&device.0), &snapshot]);
    let mounted = FileSystem::mount(&device, &place.cli.path("at"), kind.look);
    // What is in it depends on how much of the log was written back; see the clone for what must be.
    fs::read_dir(&mounted.0).unwrap();
    drop(mounted);
    let wrote = fs::OpenOptions::new().write(true).open(&device.0).and_then(|mut file| {
        file.write_all(&[1; 4096])?;
        file.sync_all()
    });
    assert!(wrote.is_err(), "the device takes no writes");
}

/// Tells whether the kernel has, or can load, a file system.
fn can_mount(name: &str) -> bool {
    super::command("modprobe", ["-q", name]).output().ok();
    fs::read_to_string("/proc/filesystems").unwrap().split_whitespace().any(|word| word == name)
}

/// Real files and directories: these sources, some programs, and 32 MiB that nothing compresses.
fn fill(at: &Path) {
    let sources = Path::new(env!("CARGO_MANIFEST_DIR"));
    for part in ["src", "tests", "man"] {
        run("cp", ["-a".as_ref(), sources.join(part).as_os_str(), at.as_os_str()]);
    }
    fs::create_dir(at.join("programs")).unwrap();
    shell(
        "find /usr/bin -type f -size -400k | sort | head -n 150 | xargs cp -t \"$1\"",
        &[at.join("programs").as_os_str()],
    );
    fs::create_dir(at.join("noise")).unwrap();
    for number in 0..32 {
        fs::write(at.join(format!("noise/{number}")), noise(1 << 20, number)).unwrap();
    }
}

fn with_file_system<T>(place: &Place, disk: &str, options: &[&str], work: impl FnOnce(&Path) -> T) -> T {
    let at = place.cli.path("at");
    place.wait_until_free(disk);
    let result = {
        let device = Loop::attach(&place.disk(disk), options);
        let _mounted = FileSystem::mount(&device, &at, "defaults");
        work(&at)
    };
    place.wait_until_free(disk);
    result
}

#[track_caller]
fn fsck(kind: &Kind, disk: &Path) {
    run(kind.fsck[0], kind.fsck[1..].iter().map(std::ffi::OsStr::new).chain([disk.as_os_str()]));
}
