//! What every medium must do, checked on the host and on the simulator alike.
//!
//! A simulator that differs from the real thing proves nothing: what one passes here the other passes too.

use std::io;
use std::sync::Arc;

use super::{File, HostMedia, Media, Open, SimMedia};

const KIB: u64 = 1024;
const MIB: u64 = 1024 * KIB;

/// Runs a check on both media.
fn both(check: impl Fn(&dyn Media)) {
    let dir = tempfile::tempdir().unwrap();
    check(&HostMedia::new(dir.path()).unwrap());
    check(&SimMedia::new(1));
}

fn make(media: &dyn Media, path: &str, data: &[u8]) -> Arc<dyn File> {
    let file = media.open(path, Open::New).unwrap();
    file.write_at(data, 0).unwrap();
    file
}

fn content(file: &dyn File) -> Vec<u8> {
    let mut buf = vec![0xee; usize::try_from(file.len().unwrap()).unwrap()];
    file.read_exact_at(&mut buf, 0).unwrap();
    buf
}

fn errno<T>(result: io::Result<T>) -> i32 {
    result.err().and_then(|error| error.raw_os_error()).expect("an errno")
}

#[test]
fn open_modes() {
    both(|media| {
        assert_eq!(errno(media.open("f", Open::Existing)), libc::ENOENT);
        assert_eq!(errno(media.open("f", Open::ReadOnly)), libc::ENOENT);
        let file = make(media, "f", b"abc");
        assert_eq!(errno(media.open("f", Open::New)), libc::EEXIST);
        let second = media.open("f", Open::Existing).unwrap();
        second.write_at(b"X", 1).unwrap();
        assert_eq!(content(&*file), b"aXc");
        let reader = media.open("f", Open::ReadOnly).unwrap();
        assert_eq!(errno(reader.write_at(b"Y", 1)), libc::EBADF);
        assert!(reader.set_len(0).is_err());
        assert_eq!(errno(reader.punch(0, 4096)), libc::EBADF);
        assert_eq!(content(&*reader), b"aXc");
        reader.sync().unwrap();
        media.make_dir("d").unwrap();
        assert_eq!(errno(media.open("d", Open::Existing)), libc::EISDIR);
        assert_eq!(errno(media.open("d", Open::ReadOnly)), libc::EISDIR);
        assert_eq!(errno(media.open("f/g", Open::New)), libc::ENOTDIR);
        assert_eq!(errno(media.open("none/g", Open::New)), libc::ENOENT);
    });
}

#[test]
fn paths_stay_below_the_root() {
    both(|media| {
        for path in ["", "/f", "../f", "d/../f", "./f", "d//f", "d/"] {
            assert_eq!(errno(media.open(path, Open::New)), libc::EINVAL, "{path}");
        }
        assert_eq!(errno(media.make_dir("/d")), libc::EINVAL);
        assert_eq!(errno(media.remove("..")), libc::EINVAL);
        assert_eq!(errno(media.rename("../a", "a")), libc::EINVAL);
        assert_eq!(errno(media.list("..")), libc::EINVAL);
    });
}

#[test]
fn reading_past_the_end_and_in_holes() {
    both(|media| {
        let file = make(media, "f", b"0123456789");
        let mut buf = [7; 8];
        assert_eq!(file.read_at(&mut buf, 6).unwrap(), 4);
        assert_eq!(&buf, b"6789\x07\x07\x07\x07", "the rest of the buffer is left alone");
        assert_eq!(file.read_at(&mut buf, 10).unwrap(), 0);
        assert_eq!(file.read_at(&mut buf, MIB).unwrap(), 0);
        assert_eq!(file.read_exact_at(&mut buf, 6).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        file.write_at(b"", MIB).unwrap();
        assert_eq!(file.len().unwrap(), 10, "writing nothing grows nothing");
        file.write_at(b"end", 20_000).unwrap();
        assert_eq!(file.len().unwrap(), 20_003);
        let bytes = content(&*file);
        assert!(bytes[10..20_000].iter().all(|&byte| byte == 0));
        assert_eq!(&bytes[20_000..], b"end");
        assert!(file.write_at(b"x", u64::MAX).is_err());
    });
}

#[test]
fn writes_across_pages() {
    both(|media| {
        let data: Vec<u8> = (0..20_000_u32).map(|i| u8::try_from(i % 251).unwrap()).collect();
        let file = make(media, "f", &data);
        file.write_at(&[0xaa; 5000], 4000).unwrap();
        let bytes = content(&*file);
        assert_eq!(bytes[..4000], data[..4000]);
        assert!(bytes[4000..9000].iter().all(|&byte| byte == 0xaa));
        assert_eq!(bytes[9000..], data[9000..]);
        file.sync().unwrap();
        assert_eq!(content(&*file), bytes);
    });
}

#[test]
fn cutting_and_growing() {
    both(|media| {
        let file = make(media, "f", &[1; 10_000]);
        file.set_len(5000).unwrap();
        file.sync().unwrap();
        assert_eq!(content(&*file), [1; 5000]);
        file.set_len(9000).unwrap();
        let bytes = content(&*file);
        assert_eq!(bytes[..5000], [1; 5000]);
        assert!(bytes[5000..].iter().all(|&byte| byte == 0), "what was cut off does not come back");
        file.set_len(0).unwrap();
        assert_eq!((file.len().unwrap(), file.next_data(0).unwrap()), (0, None));
    });
}

#[test]
fn punching() {
    both(|media| {
        let file = make(media, "f", &[1; 64 * 1024]);
        file.sync().unwrap();
        let before = file.allocated().unwrap();
        assert!(before >= 64 * KIB);
        file.punch(8192, 16_384).unwrap();
        file.punch(40_000, 100).unwrap();
        file.punch(0, 0).unwrap();
        assert!(file.allocated().unwrap() <= before - 16_384);
        assert_eq!(file.len().unwrap(), 64 * KIB);
        for (at, byte) in content(&*file).into_iter().enumerate() {
            let zero = (8192..24_576).contains(&at) || (40_000..40_100).contains(&at);
            assert_eq!(byte, u8::from(!zero), "at {at}");
        }
        file.punch(60_000, MIB).unwrap();
        assert_eq!(file.len().unwrap(), 64 * KIB, "punching past the end does not grow the file");
        file.punch(10 * MIB, MIB).unwrap();
        let bytes = content(&*file);
        assert!(bytes[60_000..].iter().all(|&byte| byte == 0));
        assert_eq!(bytes[59_999], 1);
        file.punch(0, 64 * KIB).unwrap();
        assert_eq!(file.allocated().unwrap(), 0);
    });
}

#[test]
fn data_between_holes() {
    both(|media| {
        let file = make(media, "f", b"");
        assert_eq!(file.next_data(0).unwrap(), None);
        file.write_at(&[1; 4096], MIB).unwrap();
        file.write_at(&[2; 8192], 3 * MIB).unwrap();
        file.set_len(5 * MIB).unwrap();
        // A file system may allocate, and so report, more around the data than was written; half a MiB is plenty.
        let near = |found: Option<(u64, u64)>, start: u64, end: u64| {
            let (from, to) = found.expect("data");
            assert!(from <= start && start - from <= MIB / 2, "{from} {start}");
            assert!(to >= end && to - end <= MIB / 2, "{to} {end}");
        };
        near(file.next_data(0).unwrap(), MIB, MIB + 4096);
        assert_eq!(file.next_data(MIB + 100).unwrap().unwrap().0, MIB + 100, "inside data it starts where asked");
        near(file.next_data(2 * MIB).unwrap(), 3 * MIB, 3 * MIB + 8192);
        assert_eq!(file.next_data(4 * MIB).unwrap(), None);
        assert_eq!(file.next_data(5 * MIB).unwrap(), None);
        assert_eq!(file.next_data(6 * MIB).unwrap(), None);
        file.punch(3 * MIB, 8192).unwrap();
        assert_eq!(file.next_data(2 * MIB).unwrap(), None);
        file.set_len(MIB + 10).unwrap();
        assert_eq!(file.next_data(MIB).unwrap(), Some((MIB, MIB + 10)), "data ends where the file does");
    });
}

#[test]
fn renaming() {
    both(|media| {
        let old = make(media, "old", b"old");
        make(media, "new", b"new");
        media.make_dir("d").unwrap();
        media.rename("new", "old").unwrap();
        assert_eq!(media.list("").unwrap(), ["d", "old"]);
        assert_eq!(content(&*media.open("old", Open::ReadOnly).unwrap()), b"new");
        assert_eq!(content(&*old), b"old", "the replaced file lives while it is open");
        media.rename("old", "d/moved").unwrap();
        media.rename("d/moved", "d/moved").unwrap();
        assert_eq!(media.list("d").unwrap(), ["moved"]);
        assert_eq!(errno(media.rename("none", "x")), libc::ENOENT);
        make(media, "f", b"");
        assert_eq!(errno(media.rename("f", "d")), libc::EISDIR);
        media.sync_dir("d").unwrap();
        media.sync_dir("").unwrap();
        assert_eq!(content(&*old), b"old");
        old.write_at(b"x", 0).unwrap();
        old.sync().unwrap();
    });
}

#[test]
fn names() {
    both(|media| {
        media.make_dir("d").unwrap();
        assert_eq!(media.make_dir("d").unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(errno(media.make_dir("x/y")), libc::ENOENT);
        for name in ["c", "a", "b", "B", "10", "9"] {
            make(media, &format!("d/{name}"), b"");
        }
        assert_eq!(media.list("d").unwrap(), ["10", "9", "B", "a", "b", "c"]);
        assert_eq!(media.list("").unwrap(), ["d"]);
        media.remove("d/a").unwrap();
        assert_eq!(errno(media.remove("d/a")), libc::ENOENT);
        assert_eq!(errno(media.remove("d")), libc::EISDIR);
        assert_eq!(media.list("d").unwrap(), ["10", "9", "B", "b", "c"]);
        assert_eq!(errno(media.list("none")), libc::ENOENT);
        assert_eq!(errno(media.list("d/b")), libc::ENOTDIR);
        assert_eq!(errno(media.sync_dir("none")), libc::ENOENT);
        media.sync_dir("d").unwrap();
    });
}

#[test]
fn room() {
    both(|media| {
        assert_eq!(media.boot().unwrap(), media.boot().unwrap());
        let space = media.space().unwrap();
        assert!(space.free > 0 && space.free <= space.total);
    });
}
