//! fsx (the crate) over NBD: it reads, writes, maps, punches, copies and syncs one file at random and compares it with what
//! it should be. The file is the export, shown by a client of its own: libnbd's `nbdfuse`, and QEMU's storage daemon.
//!
//! # What is left out
//! The size of an export stays. `nbdfuse` makes a TRIM of a punched hole, which promises no zeros: no holes there.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};

use afterimage::disk::BlockDevice;

use super::{MIB, Rig, content};
use crate::real::{command, require_programs, run, wait_for};

const OPERATIONS: u32 = 1500;

/// A client that shows the export as a file, until it is dropped.
struct Shown {
    client: Child,
    at: PathBuf,
    file: PathBuf,
}

impl Shown {
    fn begin(mut client: Command, at: PathBuf, file: PathBuf) -> Self {
        let client = client.stdout(Stdio::null()).spawn().unwrap();
        let shown = Self { client, at, file };
        wait_for("the client shows the export", || fs::metadata(&shown.file).is_ok_and(|file| file.len() == MIB));
        shown
    }

    fn by_nbdfuse(rig: &Rig) -> Self {
        let at = rig.file("nbdfuse");
        fs::create_dir(&at).unwrap();
        let file = at.join("nbd");
        Self::begin(command("nbdfuse", [at.to_str().unwrap(), &rig.uri("a")]), at, file)
    }

    fn by_qemu(rig: &Rig) -> Self {
        let file = rig.file("qemu");
        fs::write(&file, []).unwrap();
        let server = format!("server.type=unix,server.path={},export=a", rig.socket().display());
        let device = format!("driver=nbd,node-name=disk,discard=unmap,{server}");
        let export = format!("fuse,id=export,node-name=disk,writable=on,mountpoint={}", file.display());
        let client = command("qemu-storage-daemon", ["--blockdev", &device, "--export", &export]);
        Self::begin(client, file.clone(), file)
    }
}

impl Drop for Shown {
    fn drop(&mut self) {
        // Already gone if the client failed.
        Command::new("fusermount3").arg("-u").arg(&self.at).output().unwrap();
        self.client.kill().ok();
        self.client.wait().ok();
    }
}

/// Runs fsx on a file, with or without holes.
fn fsx(dir: &Path, file: &Path, seed: u32, holes: bool) {
    let config = format!(
        "blockmode = true\nnosizechecks = true\nweights = {{ read = 3, write = 10, mapread = 2, mapwrite = 5, truncate = 0, \
         invalidate = 1, fsync = 1, fdatasync = 1, punch_hole = {}, sendfile = 1, posix_fadvise = 1, \
         copy_file_range = 3 }}",
        if holes { 4 } else { 0 }
    );
    fs::write(dir.join("fsx.toml"), config).unwrap();
    let words = ["-f", "fsx.toml", "-P", ".", "-S", &seed.to_string(), "-N", &OPERATIONS.to_string()];
    let output = command("fsx", words).arg(file).current_dir(dir).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "seed {seed}: {}", said.lines().take(400).collect::<Vec<_>>().join("\n"));
    run("sync", [file]);
}

fn finds_no_fault(holes: bool, show: impl Fn(&Rig) -> Shown) {
    let rig = Rig::new();
    let disk = rig.disk("a", MIB);
    let shown = show(&rig);
    let dir = rig.file("");
    let done = AtomicBool::new(false);
    let taken = std::thread::scope(|scope| {
        let snapshots = scope.spawn(|| {
            let mut taken = Vec::new();
            while !done.load(Ordering::Acquire) || taken.is_empty() {
                let name = format!("s{}", taken.len());
                rig.take("a", &name);
                let snapshot = afterimage::snapshot::open(&rig.store, "a", &name).unwrap();
                taken.push((content(&*snapshot), snapshot));
                std::thread::sleep(std::time::Duration::from_millis(50));
            }
            taken
        });
        for seed in 1..=2 {
            // It takes the file for what it is, and a plain one begins as zeros.
            disk_to_zero(&shown.file);
            fsx(&dir, &shown.file, seed, holes);
            let plain = rig.file("plain");
            fs::write(&plain, vec![0; MIB as usize]).unwrap();
            fsx(&dir, &plain, seed, holes);
            assert!(content(&*disk) == fs::read(&plain).unwrap(), "seed {seed}");
        }
        done.store(true, Ordering::Release);
        snapshots.join().unwrap()
    });
    println!("{} snapshots under fsx", taken.len());
    for (then, snapshot) in taken {
        assert!(content(&*snapshot) == then, "a snapshot stays as it was");
    }
    drop(shown);
    disk.flush().unwrap();
    let report = afterimage::store::check(&rig.store, false, &afterimage::progress::Silent).unwrap();
    assert!(report.problems.is_empty(), "{:?}", report.problems);
}

fn disk_to_zero(file: &Path) {
    let file = fs::OpenOptions::new().write(true).open(file).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &vec![0; MIB as usize], 0).unwrap();
}

#[test]
fn fsx_finds_no_fault_through_libnbd() {
    if require_programs(&["fsx", "nbdfuse"]) && crate::tree::require_fuse() {
        finds_no_fault(false, Shown::by_nbdfuse);
    }
}

#[test]
fn fsx_finds_no_fault_through_qemu() {
    if require_programs(&["fsx", "qemu-storage-daemon"]) && crate::tree::require_fuse() {
        finds_no_fault(true, Shown::by_qemu);
    }
}
