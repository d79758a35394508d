//! A host file system that runs full: new data is refused or waits, nothing acknowledged is lost, removing works.
//!
//! The host is a small ext4 in a file, so the test decides how much room there is.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::{FileSystem, Loop, Place, require_loop, require_programs, run, scratch};
use crate::tree::noise;

/// Bytes of one write.
const PIECE: usize = 1 << 20;

/// A host file system of its own and a pool on it.
struct Host {
    place: Place,
    filler: PathBuf,
    // In this order: unmounted, detached, removed.
    _mounted: FileSystem,
    _device: Loop,
    _dir: tempfile::TempDir,
}

impl Host {
    fn new() -> Option<Self> {
        if !require_loop() || !require_programs(&["mkfs.ext4", "fallocate"]) {
            return None;
        }
        let dir = scratch();
        let (image, at) = (dir.path().join("host.img"), dir.path().join("host"));
        run("truncate", ["-s".as_ref(), "640M".as_ref(), image.as_os_str()]);
        run("mkfs.ext4", ["-q".as_ref(), "-F".as_ref(), "-m0".as_ref(), image.as_os_str()]);
        let device = Loop::attach(&image, &[]);
        let mounted = FileSystem::mount(&device, &at, "discard");
        // Never removed by itself: that happens by unmounting.
        let inside = tempfile::Builder::new().disable_cleanup(true).tempdir_in(&at).unwrap();
        let place = Place::within(inside);
        Some(Self { place, filler: at.join("filler"), _mounted: mounted, _device: device, _dir: dir })
    }

    /// Takes all the room there is.
    fn fill(&self) {
        let file = fs::OpenOptions::new().append(true).create(true).open(&self.filler).unwrap();
        let mut at = file.metadata().unwrap().len();
        for len in [16 << 20, 1 << 20, 4096] {
            while rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), at, len).is_ok() {
                at += len;
            }
        }
    }
}

fn disk(path: &Path) -> fs::File {
    fs::OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).unwrap()
}

/// Writes and syncs pieces from `first` on until there is no room; returns how many are there now.
fn write_until_full(file: &fs::File, first: u64) -> u64 {
    for number in first..10_000 {
        let wrote = file.write_all_at(&noise(PIECE, number), number * PIECE as u64).and_then(|()| file.sync_data());
        if let Err(error) = wrote {
            assert_eq!(error.kind(), ErrorKind::StorageFull, "{error}");
            return number;
        }
    }
    panic!("it never ran full");
}

fn holds(file: &fs::File, pieces: u64) {
    let mut piece = vec![0; PIECE];
    for number in 0..pieces {
        file.read_exact_at(&mut piece, number * PIECE as u64).unwrap();
        assert!(piece == noise(PIECE, number), "piece {number}");
    }
}

#[test]
fn a_full_host_refuses_new_data_and_loses_none() {
    let Some(host) = Host::new() else { return };
    let place = &host.place;
    let server = place.serve();
    place.cli.json(&["create", "a", "--size", "4G"]);
    let file = disk(&place.disk("a"));
    let pieces = write_until_full(&file, 0);
    assert!(pieces >= 64, "some went in: {pieces}");
    place.cli.json(&["snapshot", "a@s"]);
    // Nothing at all is free any more.
    host.fill();
    assert_eq!(file.write_all_at(&noise(PIECE, 7), 0).unwrap_err().kind(), ErrorKind::StorageFull);
    holds(&file, pieces);
    // Even so metadata may be changed, and removing works.
    place.cli.json(&["snapshot", "a@t"]);
    place.cli.json(&["create", "b", "--size", "1G"]);
    place.cli.json(&["rename", "b", "c"]);
    let (code, error) = place.cli.error(&["import", "/bin/bash", "d"]);
    assert_eq!((code, error["kind"].as_str()), (6, Some("no-space")), "{error}");
    file.sync_all().unwrap();

    // A server that dies now loses nothing either, and another one can start in no room at all.
    drop(file);
    server.kill();
    let server = place.serve();
    let file = disk(&place.disk("a"));
    holds(&file, pieces);
    rustix::fs::fallocate(
        &file,
        rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE,
        0,
        (pieces - 8) * PIECE as u64,
    )
    .unwrap();
    for name in ["a@s", "a@t"] {
        place.cli.json(&["rm", name]);
    }
    place.cli.json(&["reclaim", "--wait"]);
    fs::remove_file(&host.filler).unwrap();
    let room = write_until_full(&file, pieces) - pieces;
    assert!(room + 24 >= pieces - 8, "what was freed can be written again: {room} of {pieces}");
    drop(file);
    server.stop();
    place.check();
}

/// The ballast was given up once, and somebody else has taken its room. Opening folds, for which there is none: it failed, and
/// with it every command that would have made some.
#[test]
fn a_pool_opens_without_a_free_byte_and_makes_room() {
    let Some(host) = Host::new() else { return };
    let place = &host.place;
    let server = place.serve();
    place.cli.json(&["create", "a", "--size", "1G"]);
    let file = disk(&place.disk("a"));
    for (version, name) in [(0, "a@q"), (16, "a@r"), (32, "a@s"), (48, "a@t")] {
        for number in 0..16 {
            file.write_all_at(&noise(PIECE, version + number), number * PIECE as u64).unwrap();
        }
        place.cli.json(&["snapshot", name]);
    }
    for number in 0..16 {
        file.write_all_at(&noise(PIECE, number), number * PIECE as u64).unwrap();
    }
    file.sync_all().unwrap();
    drop(file);
    server.kill();
    fs::remove_file(place.cli.pool().join("ballast")).unwrap();
    host.fill();
    // Each opens the pool by itself, and closes it; none may need what the one before has freed.
    for words in [&["ls"][..], &["info", "a"], &["check"], &["retire", "a@q"], &["ls", "a"]] {
        place.cli.json(words);
        host.fill();
    }
    place.serve().kill();
    host.fill();
    let server = place.serve();
    let file = disk(&place.disk("a"));
    holds(&file, 16);
    file.sync_all().unwrap();
    place.cli.json(&["retire", "a@r"]);
    server.kill();
    host.fill();
    place.cli.json(&["rm", "a@s"]);
    let server = place.serve();
    // What was deleted gives room to the records.
    place.cli.json(&["retire", "--wait", "a@q", "a@r", "a@t"]);
    let free = rustix::fs::statvfs(&host.filler).map(|room| room.f_bavail * room.f_frsize).unwrap();
    assert!(free >= 60 * PIECE as u64, "{free} bytes are free");
    holds(&disk(&place.disk("a")), 16);
    assert_eq!(place.number(&["diff", "a@t", "a"], "data"), 16 * PIECE as u64);
    server.stop();
    place.check();
}

/// A server in the background, which dies with the test at the latest.
struct Background<'a>(&'a Place, rustix::process::Pid);

impl Drop for Background<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            // Whoever waits for it, in this process too, is let go.
            rustix::process::kill_process(self.1, rustix::process::Signal::KILL).ok();
            super::command("fusermount3", ["-u", "-z", self.0.mnt.to_str().unwrap()]).output().ok();
        }
    }
}

/// The log of the server lies on the file system that runs full. A line that could not be written ended the thread it came
/// from: first the background, then those that answer, until a sync waited for ever.
#[test]
fn a_log_that_finds_no_room_ends_nothing() {
    let Some(host) = Host::new() else { return };
    let place = &host.place;
    let at = place.mnt.to_str().unwrap();
    let status = place.cli.json(&["mount", "--daemon", at]);
    let pid = i32::try_from(status["pid"].as_i64().unwrap()).unwrap();
    let server = Background(place, rustix::process::Pid::from_raw(pid).unwrap());
    place.cli.json(&["create", "a", "--size", "1G"]);
    let file = disk(&place.disk("a"));
    file.write_all_at(&noise(PIECE, 0), 0).unwrap();
    place.cli.json(&["snapshot", "a@s"]);
    host.fill();
    let writing = std::thread::spawn(move || {
        for n in 0..100 {
            // Each is told of in the log.
            let refused = file.write_all_at(&noise(PIECE, n), n * PIECE as u64).unwrap_err();
            assert_eq!(refused.kind(), ErrorKind::StorageFull, "{n}: {refused}");
        }
        file.sync_all().unwrap();
        file
    });
    super::wait_for("the writes are answered", || writing.is_finished());
    let file = writing.join().unwrap();
    place.cli.json(&["ls"]);
    place.cli.json(&["rm", "a@s"]);
    fs::remove_file(&host.filler).unwrap();
    super::wait_for("there is room", || file.write_all_at(&noise(PIECE, 1), PIECE as u64).is_ok());
    file.sync_all().unwrap();
    assert!(fs::remove_file(place.disk("a")).is_err(), "it is open for writing");
    holds(&file, 2);
    drop(file);
    place.wait_until_free("a");
    place.cli.json(&["umount", at]);
    let log = fs::read_to_string(place.cli.pool().join("server.log")).unwrap();
    assert!(log.contains("of the log are missing here"), "the log found no room: {log}");
    assert!(!log.contains("panicked"), "{log}");
    drop(server);
    place.check();
}

#[test]
fn a_disk_that_waits_goes_on_when_there_is_room() {
    let Some(host) = Host::new() else { return };
    let place = &host.place;
    let server = place.serve();
    let other = disk(&place.disk("other"));
    for number in 0..64 {
        other.write_all_at(&noise(PIECE, number), number * PIECE as u64).unwrap();
    }
    other.sync_all().unwrap();
    place.cli.json(&["create", "a", "--size", "4G"]);
    let file = disk(&place.disk("a"));
    let pieces = write_until_full(&file, 0);
    place.cli.json(&["set", "a", "enospc=wait"]);
    let waiting = std::thread::spawn(move || {
        file.write_all_at(&noise(PIECE, pieces), pieces * PIECE as u64).unwrap();
        file.sync_all().unwrap();
        file
    });
    std::thread::sleep(Duration::from_secs(1));
    assert!(!waiting.is_finished(), "it waits");
    // Nobody else does, and what is there can be read and overwritten.
    assert_eq!(other.write_all_at(&[1; PIECE], 100 * PIECE as u64).unwrap_err().kind(), ErrorKind::StorageFull);
    other.write_all_at(&noise(PIECE, 5), 0).unwrap();
    other.sync_all().unwrap();
    holds(&fs::File::open(place.disk("a")).unwrap(), 4);
    place.cli.json(&["ls"]);
    drop(other);
    place.wait_until_free("other");
    place.cli.json(&["rm", "other"]);
    super::wait_for("the write goes on", || waiting.is_finished());
    let file = waiting.join().unwrap();
    holds(&file, pieces + 1);
    drop(file);
    server.stop();
    place.check();
}

#[test]
fn a_server_that_waits_can_be_stopped() {
    let Some(host) = Host::new() else { return };
    let place = &host.place;
    let server = place.serve();
    place.cli.json(&["create", "a", "--size", "4G"]);
    place.cli.json(&["set", "a", "enospc=wait"]);
    host.fill();
    let file = disk(&place.disk("a"));
    let waiting = std::thread::spawn(move || file.write_all_at(&[1; PIECE], 0));
    std::thread::sleep(Duration::from_millis(500));
    assert!(!waiting.is_finished(), "it waits");
    server.stop();
    assert!(waiting.join().unwrap().is_err(), "it was never acknowledged");
    place.check();
}
