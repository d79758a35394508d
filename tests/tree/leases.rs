//! One writer to a disk: the mount beside another front end, and what the mount shows of what that one writes.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use afterimage::disk::{self, BlockDevice, Disk, Lease};
use afterimage::error::Kind;
use afterimage::snapshot;
use afterimage::tree::MountOptions;

use super::{Mount, create, errno, noise, open_direct};

const MIB: usize = 1 << 20;
/// A holder that is not the mount.
const GUEST: &str = "a guest";

fn take(mount: &Mount, name: &str) -> (Arc<Disk>, Lease) {
    let disk = disk::open(&mount.store, name).unwrap();
    let lease = disk.lease(GUEST).unwrap();
    (disk, lease)
}

fn open_to_write(mount: &Mount, name: &str) -> std::io::Result<fs::File> {
    fs::OpenOptions::new().read(true).write(true).open(mount.disk(name))
}

#[test]
fn the_second_writer_is_refused_whoever_was_first() {
    let Some(mount) = Mount::new() else { return };
    mount.make("a", MIB as u64);
    let (_, lease) = take(&mount, "a");
    assert_eq!(errno(open_to_write(&mount, "a")), libc::EBUSY);
    let info = mount.store.disk_info("a").unwrap();
    assert_eq!(info.holder.as_deref(), Some(GUEST));
    fs::File::open(mount.disk("a")).unwrap();
    drop(lease);
    let file = open_to_write(&mount, "a").unwrap();
    let second = open_to_write(&mount, "a").unwrap();
    let disk = disk::open(&mount.store, "a").unwrap();
    for open in [file, second] {
        let error = disk.lease(GUEST).unwrap_err();
        assert_eq!((error.kind(), error.message()), (Kind::Busy, "disk 'a' is open for writing by mount"));
        drop(open);
    }
    disk.lease(GUEST).unwrap();
}

/// The kernel sends the release of a file some time after close(2), and that of a process that ends after it is gone.
#[test]
fn a_lease_that_is_about_to_fall_is_waited_for() {
    for ring in [true, false] {
        let Some(mount) = Mount::with(|options| MountOptions { ring, ..options }) else { return };
        let path = mount.make("a", MIB as u64);
        let disk = disk::open(&mount.store, "a").unwrap();
        for round in 0..300 {
            let file = open_to_write(&mount, "a").unwrap();
            file.write_all_at(&noise(4096, round), 0).unwrap();
            drop(file);
            drop(disk.lease(GUEST).unwrap());
        }
        for script in ["exec 3<>\"$1\"; echo x >&3", "exec 3<>\"$1\"; echo x >&3; kill -9 $$"] {
            for _ in 0..10 {
                Command::new("sh").args(["-c", script, "sh"]).arg(&path).status().unwrap();
                drop(disk.lease(GUEST).unwrap());
            }
        }
        let file = open_to_write(&mount, "a").unwrap();
        drop(file.try_clone().unwrap());
        assert_eq!(disk.lease(GUEST).unwrap_err().kind(), Kind::Busy, "only a copy of it was closed");
        drop(file);
        fs::remove_file(&path).unwrap();
    }
}

#[test]
fn under_a_lease_a_disk_grows_and_gets_names_and_is_not_cut_reverted_or_removed() {
    let Some(mount) = Mount::new() else { return };
    let path = mount.make("a", MIB as u64);
    snapshot::take(&mount.store, &[("a".into(), "s".into())]).unwrap();
    let (disk, lease) = take(&mount, "a");
    // truncate(2): opening it for writing is another matter.
    let size = |size: usize| {
        let script =
            "import os,sys\ntry: os.truncate(sys.argv[1],int(sys.argv[2]))\nexcept OSError as e: sys.exit(e.errno)";
        Command::new("python3").args(["-c", script]).arg(&path).arg(size.to_string()).status().unwrap().code().unwrap()
    };
    assert_eq!(size(2 * MIB), 0);
    assert_eq!((disk.size(), fs::metadata(&path).unwrap().len()), (2 * MIB as u64, 2 * MIB as u64));
    assert_eq!(size(MIB), libc::EBUSY);
    fs::rename(&path, mount.disk("b")).unwrap();
    fs::rename(mount.disk("b"), &path).unwrap();
    assert_eq!(snapshot::revert(&mount.store, "a", "s", None).unwrap_err().kind(), Kind::Busy);
    fs::remove_file(mount.snapshot("a", "s")).unwrap();
    assert_eq!(errno(fs::remove_file(&path)), libc::EBUSY);
    drop(lease);
    assert_eq!(size(MIB), 0);
    fs::remove_file(&path).unwrap();
}

#[test]
fn what_a_disk_is_attached_to_keeps_it_from_being_removed() {
    let Some(mount) = Mount::new() else { return };
    let path = mount.make("a", MIB as u64);
    let disk = disk::open(&mount.store, "a").unwrap();
    let attached = disk.attach("export 1").unwrap();
    let error = disk::remove(&mount.store, "a", true).unwrap_err();
    assert_eq!((error.kind(), error.message()), (Kind::Busy, "disk 'a' is attached as export 1"));
    assert_eq!(errno(fs::remove_file(&path)), libc::EBUSY);
    create(&path).write_all_at(b"others may write", 0).unwrap();
    drop(attached);
    fs::remove_file(&path).unwrap();
    assert_eq!(disk.attach("export 1").unwrap_err().kind(), Kind::NotFound);
}

#[test]
fn what_another_front_end_writes_is_read_through_files_that_were_open_and_through_new_ones() {
    for ring in [true, false] {
        let Some(mount) = Mount::with(|options| MountOptions { ring, ..options }) else { return };
        let path = mount.make("a", MIB as u64);
        create(&path).write_all_at(&noise(MIB, 1), 0).unwrap();
        let before = fs::File::open(&path).unwrap();
        let past = open_direct_to_read(&path);
        let mut seen = vec![0; MIB];
        before.read_exact_at(&mut seen, 0).unwrap();
        let (disk, lease) = take(&mount, "a");
        let during = fs::File::open(&path).unwrap();
        for round in 0..50_u64 {
            let new = noise(MIB, 100 + round);
            match round % 3 {
                0 => disk.write(&new, 0).unwrap(),
                1 => {
                    write_in_halves(&disk, &new);
                }
                _ => {
                    disk.write(&new, 0).unwrap();
                    disk.discard(0, 8192).unwrap();
                    disk.write_zeroes(10_000, 5000).unwrap();
                }
            }
            let mut want = vec![0; MIB];
            disk.read(&mut want, 0).unwrap();
            for (name, file) in [("before", &before), ("during", &during), ("past", &past)] {
                file.read_exact_at(&mut seen, 0).unwrap();
                assert!(seen == want, "round {round}: through the file opened {name}, ring {ring}");
            }
            // Not each time: an open may drop what is cached, and that is not to be relied on.
            if round % 5 == 0 {
                assert!(fs::read(&path).unwrap() == want, "round {round}: through a new open");
            }
        }
        drop(lease);
        create(&path).write_all_at(b"mine", 0).unwrap();
        before.read_exact_at(&mut seen[..4], 0).unwrap();
        assert_eq!(&seen[..4], b"mine");
    }
}

fn open_direct_to_read(path: &std::path::Path) -> fs::File {
    use std::os::unix::fs::OpenOptionsExt;
    fs::OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(path).unwrap()
}

/// Writes as a front end with many writes under way does.
fn write_in_halves(disk: &Disk, data: &[u8]) {
    let Some(writing) = disk.begin_write(data.len(), 0).unwrap() else { return disk.write(data, 0).unwrap() };
    let write = |extent: &afterimage::store::Extent| {
        // The host file is open past its cache, which wants aligned memory.
        let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&*extent.file));
        let file = fs::OpenOptions::new().write(true).open(path).unwrap();
        file.write_all_at(&data[extent.from..extent.from + extent.len], extent.offset).map(|()| extent.len)
    };
    let written: Vec<_> = writing.extents().iter().map(write).collect();
    if disk.end_write(writing, data, &written).unwrap() {
        disk.flush().unwrap();
    }
}

/// The end of a file is cached, too, and so is what was read of its last page.
#[test]
fn what_another_front_end_grows_is_read_to_its_new_end_through_a_file_that_was_open() {
    for ring in [true, false] {
        let Some(mount) = Mount::with(|options| MountOptions { ring, ..options }) else { return };
        let (mut size, step) = (MIB + 512, MIB);
        let path = mount.make("a", size as u64);
        create(&path).write_all_at(&noise(size, 1), 0).unwrap();
        let before = fs::File::open(&path).unwrap();
        let mut seen = vec![0; step];
        before.read_exact_at(&mut seen, (size - step) as u64).unwrap();
        let (disk, lease) = take(&mount, "a");
        for round in 1..6 {
            let old = size;
            size += step;
            disk.resize(size as u64, false).unwrap();
            let new = noise(step, 10 + round);
            disk.write(&new, old as u64).unwrap();
            assert_eq!(before.metadata().unwrap().len(), size as u64);
            before.read_exact_at(&mut seen, old as u64).unwrap();
            assert!(seen == new, "round {round}, ring {ring}");
        }
        drop(lease);
    }
}

#[test]
fn what_another_front_end_writes_shows_in_mapped_memory() {
    let Some(mount) = Mount::new() else { return };
    let path = mount.make("a", MIB as u64);
    create(&path).write_all_at(&[7; MIB], 0).unwrap();
    let script = "import mmap,sys\n\
        f=open(sys.argv[1],'rb')\n\
        maps=[mmap.mmap(f.fileno(),1<<20,how,mmap.PROT_READ) for how in (mmap.MAP_SHARED,mmap.MAP_PRIVATE)]\n\
        for line in sys.stdin:\n \x20print([m[70000] for m in maps],flush=True)\n";
    let mut child = Command::new("python3")
        .args(["-c", script])
        .arg(&path)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let (mut ask, mut answers) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
    let mut look = || {
        ask.write_all(b"?\n").unwrap();
        let mut line = String::new();
        answers.read_line(&mut line).unwrap();
        line.trim().to_owned()
    };
    assert_eq!(look(), "[7, 7]");
    let (disk, lease) = take(&mount, "a");
    for byte in 10..60_u8 {
        disk.write(&[byte; 4096], 69_632).unwrap();
        assert_eq!(look(), format!("[{byte}, {byte}]"));
    }
    drop(lease);
    assert_eq!(look(), "[59, 59]");
    drop(ask);
    child.wait().unwrap();
}

/// Readers read without a pause, and the writer looks each time at what it was told is there before it goes on.
#[test]
fn no_reader_ever_sees_less_than_was_acknowledged_before_it_asked() {
    let Some(mount) = Mount::new() else { return };
    let path = mount.make("a", 16 * MIB as u64);
    let open = fs::File::open(&path).unwrap();
    let (disk, lease) = take(&mount, "a");
    let (acknowledged, done) = (AtomicU64::new(0), AtomicBool::new(false));
    std::thread::scope(|scope| {
        for reader in 0..3_u64 {
            let (open, acknowledged, done) = (&open, &acknowledged, &done);
            scope.spawn(move || {
                let mut turn = reader;
                while !done.load(Ordering::SeqCst) {
                    turn += 1;
                    let at = turn % 8;
                    let floor = acknowledged.load(Ordering::SeqCst).saturating_sub(8);
                    let mut number = [0; 8];
                    open.read_exact_at(&mut number, at * 65_536).unwrap();
                    let number = u64::from_le_bytes(number);
                    assert!(number >= floor, "place {at}: {number} where {floor} was acknowledged");
                }
            });
        }
        for number in 1..3000_u64 {
            disk.write(&number.to_le_bytes(), number % 8 * 65_536).unwrap();
            acknowledged.store(number, Ordering::SeqCst);
        }
        done.store(true, Ordering::SeqCst);
    });
    drop(lease);
}

#[test]
fn a_reserved_disk_waits_for_its_holder() {
    let Some(mount) = Mount::new() else { return };
    mount.make("a", MIB as u64);
    mount.wait_until_free("a");
    let disk = disk::open(&mount.store, "a").unwrap();
    disk.reserve(GUEST, Duration::from_secs(60));
    assert_eq!(errno(open_to_write(&mount, "a")), libc::EBUSY);
    assert_eq!(errno(fs::remove_file(mount.disk("a"))), libc::EBUSY);
    drop(disk.lease(GUEST).unwrap());
    drop(open_direct(&mount.disk("a")));
}
