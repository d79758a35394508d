//! Files of the mount that were opened to be durable, or written so: what was answered survives that the server is killed.

use std::fs::File;
use std::io::IoSlice;
use std::os::unix::fs::{FileExt, OpenOptionsExt};

use afterimage::sys::pages::Pages;
use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::ReadWriteFlags;

use super::Server;

const BLOCK: usize = 4096;

/// Memory that direct I/O can use.
fn blocks(byte: u8, count: usize) -> Pages {
    let mut pages = Pages::new(count * BLOCK).unwrap();
    pages.fill(byte);
    pages
}

type Change = fn(&File);

fn write(file: &File) {
    file.write_all_at(&blocks(9, 1), 8 * BLOCK as u64).unwrap();
}

/// So much that its data goes past the page cache of the host, and many at a time.
fn write_much(file: &File) {
    file.write_all_at(&blocks(9, 64), 8 * BLOCK as u64).unwrap();
}

fn write_with(file: &File, flags: ReadWriteFlags) {
    let written = rustix::io::pwritev2(file, &[IoSlice::new(&blocks(9, 1))], 8 * BLOCK as u64, flags).unwrap();
    assert_eq!(written, BLOCK);
}

fn punch(file: &File) {
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    fallocate(file, flags, 8 * BLOCK as u64, BLOCK as u64).unwrap();
}

/// Changes block 8, which has fives, of a file opened with these flags, and kills the server. Returns what is there then. If
/// `warm`, its neighbour was written since the last snapshot, and the way to the disk is a shorter one.
fn after_a_kill(server: &Server, flags: i32, change: Change, warm: bool) -> u8 {
    let path = server.disk("web");
    // What the kernel has nothing of may go the shortest way.
    let direct = File::options().write(true).custom_flags(libc::O_DIRECT).clone();
    let file = direct.open(&path).unwrap();
    file.write_all_at(&blocks(5, 1), 8 * BLOCK as u64).unwrap();
    file.sync_all().unwrap();
    drop(file);
    // What is written next gets a new place, which only a flush makes known.
    server.json("snapshot web@s");
    if warm {
        let file = direct.open(&path).unwrap();
        file.write_all_at(&blocks(6, 1), 9 * BLOCK as u64).unwrap();
        file.sync_all().unwrap();
    }
    let file = File::options().read(true).write(true).custom_flags(flags).open(&path).unwrap();
    change(&file);
    server.kill();
    drop(file);
    server.mount();
    let mut found = [1; BLOCK];
    File::open(&path).unwrap().read_exact_at(&mut found, 8 * BLOCK as u64).unwrap();
    server.json("rm web@s");
    assert!(found.iter().all(|byte| *byte == found[0]), "it is torn");
    found[0]
}

#[test]
fn what_is_written_to_be_durable_survives_a_kill_of_the_server() {
    let Some(server) = Server::mounted() else { return };
    let direct = libc::O_DIRECT;
    let ways: [(&str, i32, Change, u8); 14] = [
        ("O_DSYNC", libc::O_DSYNC, write, 9),
        ("O_SYNC", libc::O_SYNC, write, 9),
        ("O_DSYNC, direct", libc::O_DSYNC | direct, write, 9),
        ("O_SYNC, direct", libc::O_SYNC | direct, write, 9),
        ("much, O_DSYNC, direct", libc::O_DSYNC | direct, write_much, 9),
        ("much, O_SYNC, direct", libc::O_SYNC | direct, write_much, 9),
        ("RWF_DSYNC", 0, |file| write_with(file, ReadWriteFlags::DSYNC), 9),
        ("RWF_SYNC", 0, |file| write_with(file, ReadWriteFlags::SYNC), 9),
        ("RWF_DSYNC, direct", direct, |file| write_with(file, ReadWriteFlags::DSYNC), 9),
        ("RWF_SYNC, direct", direct, |file| write_with(file, ReadWriteFlags::SYNC), 9),
        (
            "part of a block",
            libc::O_DSYNC,
            |file| {
                (0..8).for_each(|n| {
                    file.write_all_at(&[9; BLOCK / 8], (8 * BLOCK + n * BLOCK / 8) as u64).unwrap();
                });
            },
            9,
        ),
        ("punched, O_DSYNC", libc::O_DSYNC, punch, 0),
        ("punched, O_SYNC", libc::O_SYNC, punch, 0),
        ("punched, direct", libc::O_SYNC | direct, punch, 0),
    ];
    for (what, flags, change, expected) in ways {
        for warm in [false, true] {
            assert_eq!(after_a_kill(&server, flags, change, warm), expected, "{what}, warm: {warm}");
        }
    }
    // The proof that this can fail. Something else may have flushed in between, but not always.
    let ways: [(&str, i32, Change); 4] =
        [("write", 0, write), ("direct", direct, write), ("much, direct", direct, write_much), ("punched", 0, punch)];
    for (what, flags, change) in ways {
        for warm in [false, true] {
            assert!((0..5).any(|_| after_a_kill(&server, flags, change, warm) == 5), "{what}, warm: {warm}");
        }
    }
}
