//! Reading and writing: buffered, direct, mapped, at once, past the end, with holes.

use std::fs;
use std::io::{Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};

use rustix::fs::{FallocateFlags, SeekFrom as Whence, fallocate, seek};

use super::{Mount, create, errno, noise, open_direct, rustix_errno};

const MIB: u64 = 1 << 20;

#[test]
fn a_file_grows_is_cut_and_is_emptied() {
    let Some(mount) = Mount::new() else { return };
    let path = mount.disk("a");
    let mut file = create(&path);
    assert_eq!(file.metadata().unwrap().len(), 0);
    file.write_all(b"hello").unwrap();
    assert_eq!(mount.store.disk_info("a").unwrap().size, 5);
    file.write_all_at(b"far", 10 * MIB + 3).unwrap();
    assert_eq!(file.metadata().unwrap().len(), 10 * MIB + 6);
    file.set_len(3).unwrap();
    file.set_len(8).unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"hel\0\0\0\0\0", "what was cut off does not come back");
    let mut appended = fs::OpenOptions::new().append(true).open(&path).unwrap();
    appended.write_all(b"end").unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"hel\0\0\0\0\0end");
    drop(fs::File::create(&path).unwrap());
    assert_eq!(fs::metadata(&path).unwrap().len(), 0);
    let opened_twice = (create(&path), fs::File::open(&path).unwrap());
    opened_twice.0.write_all_at(&noise(9000, 5), 0).unwrap();
    let mut seen = vec![0; 9000];
    opened_twice.1.read_exact_at(&mut seen, 0).unwrap();
    assert_eq!(seen, noise(9000, 5));
}

#[test]
fn sixty_four_tebibytes_are_the_end() {
    let Some(mount) = Mount::new() else { return };
    let end = 64u64 << 40;
    let file = create(&mount.make("a", end));
    assert_eq!(fs::metadata(mount.disk("a")).unwrap().len(), end);
    assert_eq!(errno(file.set_len(end + 1)), libc::EFBIG);
    assert_eq!(errno(file.write_at(b"x", end)), libc::EFBIG);
    assert_eq!(file.write_at(&[1; 8192], end - 4096).unwrap(), 4096, "as much as there is room for");
    assert_eq!(rustix_errno(fallocate(&file, FallocateFlags::empty(), end, 4096)), libc::EFBIG);
    let mut tail = [0; 4096];
    file.read_exact_at(&mut tail, end - 4096).unwrap();
    assert_eq!(tail, [1; 4096]);
}

#[test]
fn every_way_of_writing_is_seen_by_every_way_of_reading() {
    let Some(mount) = Mount::new() else { return };
    let path = mount.make("a", 8 * MIB);
    let (buffered, direct) = (create(&path), open_direct(&path));
    let read_all = |what: &str, expected: &[u8]| {
        let (mut one, mut two) = (vec![0; expected.len()], vec![0; expected.len()]);
        buffered.read_exact_at(&mut one, 0).unwrap();
        direct.read_exact_at(&mut two, 0).unwrap();
        assert!(one == expected, "buffered read after {what}");
        assert!(two == expected, "direct read after {what}");
        assert!(map(&buffered, expected.len()) == expected, "mapped read after {what}");
    };
    let mut expected = noise(8 << 20, 1);
    buffered.write_all_at(&expected, 0).unwrap();
    read_all("a buffered write", &expected);
    expected[4096..2 << 20].copy_from_slice(&noise((2 << 20) - 4096, 2));
    direct.write_all_at(&expected[4096..2 << 20], 4096).unwrap();
    read_all("a direct write", &expected);
    expected[5000..15_000].copy_from_slice(&noise(10_000, 3));
    buffered.write_all_at(&expected[5000..15_000], 5000).unwrap();
    read_all("an unaligned write", &expected);
    fallocate(&buffered, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, 6000, 100_000).unwrap();
    expected[6000..106_000].fill(0);
    read_all("a punch", &expected);
}

/// Reads through a private mapping made by a program, since this test may have no unsafe code of its own.
fn map(file: &fs::File, len: usize) -> Vec<u8> {
    let path = format!("/proc/{}/fd/{}", std::process::id(), std::os::fd::AsRawFd::as_raw_fd(file));
    let script = "import mmap,sys\nf=open(sys.argv[1],'rb')\nm=mmap.mmap(f.fileno(),int(sys.argv[2]),mmap.MAP_SHARED,mmap.PROT_READ)\nsys.stdout.buffer.write(m[:])";
    python(script, &[&path, &len.to_string()])
}

fn python(script: &str, arguments: &[&str]) -> Vec<u8> {
    let output = std::process::Command::new("python3").arg("-c").arg(script).args(arguments).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

#[test]
fn a_mapped_store_is_there_after_msync() {
    let Some(mount) = Mount::new() else { return };
    let path = mount.make("a", MIB);
    let script = "import mmap,sys,os\nfd=os.open(sys.argv[1],os.O_RDWR|int(sys.argv[2]))\nm=mmap.mmap(fd,1<<20)\nm[5000:5005]=b'there'\nm.flush()\nos.close(fd)";
    for flags in [0, libc::O_DIRECT] {
        create(&path).write_all_at(&[0; 9000], 0).unwrap();
        python(script, &[path.to_str().unwrap(), &flags.to_string()]);
        let mut seen = vec![0; 5];
        let disk = afterimage::disk::open(&mount.store, "a").unwrap();
        afterimage::disk::BlockDevice::read(disk.as_ref(), &mut seen, 5000).unwrap();
        assert_eq!(seen, b"there");
        assert_eq!(fs::read(&path).unwrap()[5000..5005], *b"there");
    }
}

#[test]
fn holes_and_data_are_where_they_are() {
    let Some(mount) = Mount::new() else { return };
    let path = mount.make("a", 10 * MIB);
    let file = create(&path);
    assert_eq!(rustix_errno(seek(&file, Whence::Data(0))), libc::ENXIO);
    assert_eq!(seek(&file, Whence::Hole(0)).unwrap(), 0);
    for (offset, len) in [(4096, 8192), (2 * MIB - 4096, 8192), (9 * MIB, 100)] {
        file.write_all_at(&vec![1; len], offset).unwrap();
    }
    let mut walk = Vec::new();
    let mut at = 0;
    while let Ok(data) = seek(&file, Whence::Data(at)) {
        let hole = seek(&file, Whence::Hole(data)).unwrap();
        walk.push((data, hole));
        at = hole;
    }
    assert_eq!(walk, [(4096, 12_288), (2 * MIB - 4096, 2 * MIB + 4096), (9 * MIB, 9 * MIB + 4096)]);
    assert_eq!(file.metadata().unwrap().blocks() * 512, 5 * 4096);
    assert_eq!(seek(&file, Whence::Data(5000)).unwrap(), 5000, "inside data it is the offset asked for");
    assert_eq!(seek(&file, Whence::Hole(5000)).unwrap(), 12_288);
    assert_eq!(seek(&file, Whence::Hole(10 * MIB - 1)).unwrap(), 10 * MIB - 1);
    for beyond in [10 * MIB, 11 * MIB] {
        assert_eq!(rustix_errno(seek(&file, Whence::Data(beyond))), libc::ENXIO);
        assert_eq!(rustix_errno(seek(&file, Whence::Hole(beyond))), libc::ENXIO);
    }
    file.set_len(9 * MIB + 50).unwrap();
    assert_eq!(seek(&file, Whence::Hole(9 * MIB)).unwrap(), 9 * MIB + 50, "the end is a hole");
    assert_eq!((&file).seek(SeekFrom::End(0)).unwrap(), 9 * MIB + 50);
}

#[test]
fn fallocate_punches_zeroes_and_reserves_nothing() {
    let Some(mount) = Mount::new() else { return };
    let path = mount.make("a", MIB);
    let file = create(&path);
    file.write_all_at(&vec![7; 1 << 20], 0).unwrap();
    let mapped = || file.metadata().unwrap().blocks() * 512;
    let len = || file.metadata().unwrap().len();
    fallocate(&file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, 4096 + 100, 4 * 4096).unwrap();
    assert_eq!((mapped(), len()), (MIB - 3 * 4096, MIB));
    let held = fs::read(&path).unwrap();
    assert!(held[..4196].iter().all(|b| *b == 7) && held[4196..20_580].iter().all(|b| *b == 0) && held[20_580] == 7);
    fallocate(&file, FallocateFlags::ZERO_RANGE, MIB - 4096, 3 * 4096).unwrap();
    assert_eq!(len(), MIB + 2 * 4096);
    assert_eq!(fs::read(&path).unwrap()[(1 << 20) - 4096..], [0; 3 * 4096]);
    fallocate(&file, FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE, 2 * MIB, MIB).unwrap();
    assert_eq!(len(), MIB + 2 * 4096);
    let before = mapped();
    fallocate(&file, FallocateFlags::KEEP_SIZE, 0, 4 * MIB).unwrap();
    assert_eq!(len(), MIB + 2 * 4096);
    fallocate(&file, FallocateFlags::empty(), 0, 4 * MIB).unwrap();
    assert_eq!((len(), mapped()), (4 * MIB, before));
    assert_eq!(rustix_errno(fallocate(&file, FallocateFlags::empty(), 0, 60 << 40)), libc::ENOSPC);
    for refused in [FallocateFlags::COLLAPSE_RANGE, FallocateFlags::INSERT_RANGE] {
        assert_eq!(rustix_errno(fallocate(&file, refused, 0, 4096)), libc::EOPNOTSUPP);
    }
    assert_eq!(len(), 4 * MIB);
}

#[test]
fn writers_at_once_do_not_lose_each_others_blocks() {
    let Some(mount) = Mount::new() else { return };
    let path = mount.make("a", 8 * MIB);
    std::thread::scope(|scope| {
        for writer in 0..8u64 {
            let path = &path;
            scope.spawn(move || {
                let options = if writer % 2 == 0 { 0 } else { libc::O_DIRECT };
                let file = fs::OpenOptions::new().write(true).custom_flags(options).open(path).unwrap();
                for n in 0..64 {
                    // Every eighth block is this writer's; neighbours are written by the others at the same time.
                    file.write_all_at(&noise(4096, writer * 1000 + n), (n * 8 + writer) * 4096).unwrap();
                }
            });
        }
    });
    let held = fs::read(&path).unwrap();
    for writer in 0..8usize {
        for n in 0..64usize {
            let at = (n * 8 + writer) * 4096;
            assert!(held[at..at + 4096] == noise(4096, (writer * 1000 + n) as u64), "writer {writer} block {n}");
        }
    }
}

#[test]
fn appenders_past_the_end_at_once_keep_every_byte() {
    let Some(mount) = Mount::new() else { return };
    let path = mount.disk("a");
    drop(create(&path));
    std::thread::scope(|scope| {
        for writer in 0..4u8 {
            let path = &path;
            scope.spawn(move || {
                let mut file = fs::OpenOptions::new().append(true).open(path).unwrap();
                for _ in 0..100 {
                    file.write_all(&[writer + 1; 777]).unwrap();
                }
            });
        }
    });
    let held = fs::read(&path).unwrap();
    assert_eq!(held.len(), 4 * 100 * 777);
    for chunk in held.chunks(777) {
        assert!(chunk.iter().all(|byte| *byte == chunk[0] && *byte != 0));
    }
}

#[test]
fn another_holder_of_the_disk_keeps_writers_out() {
    let Some(mount) = Mount::new() else { return };
    let path = mount.make("a", MIB);
    let disk = afterimage::disk::open(&mount.store, "a").unwrap();
    mount.wait_until_free("a");
    let lease = disk.lease("nbd").unwrap();
    assert_eq!(errno(fs::OpenOptions::new().write(true).open(&path)), libc::EBUSY);
    assert_eq!(errno(fs::File::create(&path)), libc::EBUSY);
    let reader = fs::File::open(&path).unwrap();
    // What the other one writes is seen by whoever opened meanwhile: nothing is cached.
    for round in 1..4u8 {
        afterimage::disk::BlockDevice::write(disk.as_ref(), &[round; 4096], 0).unwrap();
        let mut seen = [0; 4096];
        reader.read_exact_at(&mut seen, 0).unwrap();
        assert_eq!(seen, [round; 4096]);
    }
    drop(lease);
    let writer = create(&path);
    assert_eq!(disk.lease("nbd").err().map(|e| e.kind()), Some(afterimage::error::Kind::Busy));
    let second = create(&path);
    drop((writer, second));
}

#[test]
fn direct_writes_leave_no_older_bytes_in_the_cache() {
    let Some(mount) = Mount::new() else { return };
    let path = mount.make("a", MIB);
    for round in 0..30u64 {
        let done = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    let file = fs::File::open(&path).unwrap();
                    let mut buf = vec![0; 1 << 20];
                    while !done.load(std::sync::atomic::Ordering::Relaxed) {
                        file.read_exact_at(&mut buf, 0).unwrap();
                    }
                });
            }
            let direct = open_direct(&path);
            for n in 0..200 {
                direct.write_all_at(&noise(4096, round * 1000 + n), n % 256 * 4096).unwrap();
            }
            done.store(true, std::sync::atomic::Ordering::Relaxed);
        });
        let held = fs::read(&path).unwrap();
        for n in 0..200usize {
            assert!(held[n * 4096..][..4096] == noise(4096, round * 1000 + n as u64), "round {round} block {n}");
        }
    }
}
