//! The tree without a kernel before it: any number where an inode, handle, offset or length is expected gets an errno.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

use afterimage::tree::errno::Errno;
use afterimage::tree::names::RenameHow;
use afterimage::tree::state::{Owner, Tree};

use super::new_pool;

/// A small generator with a liking for edges.
struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    fn number(&mut self) -> u64 {
        let edges = [0, 1, 4095, 4096, 1 << 20, (64 << 40) - 1, 64 << 40, (64 << 40) + 1, u64::MAX - 1, u64::MAX];
        match self.below(3) {
            0 => edges[usize::try_from(self.below(edges.len() as u64)).unwrap()],
            1 => self.below(1 << 21),
            _ => self.next(),
        }
    }

    fn ino(&mut self) -> u64 {
        match self.below(10) {
            0 => self.next(),
            1 => self.below(16) << 60 | self.below(4),
            2..=4 => self.below(4),
            5 => (4 + self.below(6)) << 60 | self.next() >> 4,
            6 => (4 + self.below(6)) << 60 | self.below(3) << 56 | self.below(6),
            7 => 4 << 60 | self.below(9) << 26 | 1 << 24 | self.below(3),
            _ => (1 + self.below(3)) << 60 | self.below(6),
        }
    }

    fn name(&mut self) -> Vec<u8> {
        let names: [&[u8]; 14] = [
            b"a.raw",
            b"b.raw",
            b"a",
            b"disks",
            b".raw",
            b"\xff\xfe.raw",
            b"",
            b"../x.raw",
            b"exports",
            b"a..b",
            b"latest",
            b"a.aimg",
            b"0000000000000000.img",
            b"manifest.json",
        ];
        names[usize::try_from(self.below(14)).unwrap()].to_vec()
    }
}

#[test]
fn any_numbers_get_an_answer() {
    for seed in 1..=8 {
        let dir = tempfile::tempdir().unwrap();
        let tree = Tree::new(new_pool(&dir), Owner { uid: 0, gid: 0 });
        let mut dice = Dice(seed * 0x9e37_79b9);
        let mut buf = vec![0; 100_000];
        let mut done = 0;
        for _ in 0..5000 {
            done += u32::from(step(&tree, &mut dice, &mut buf));
        }
        assert!(done > 100, "only {done} operations did anything");
        tree.release_all();
    }
}

/// Reads a directory as the kernel does.
fn list(tree: &Tree, ino: u64, offset: u64) -> Result<(), Errno> {
    let dir = tree.open_dir(ino)?;
    let listing = tree.listing(ino, dir, offset)?;
    let mut left = 100;
    tree.each_entry(&listing, usize::try_from(offset).unwrap(), |_, entry| {
        tree.listed(&listing, entry).inspect(|attr| assert!(attr.ino > 0));
        left -= 1;
        left == 0
    })
}

/// Does something; tells whether it was done.
fn step(tree: &Tree, dice: &mut Dice, buf: &mut [u8]) -> bool {
    let (ino, handle, offset, len) = (dice.ino(), dice.below(40), dice.number(), dice.number());
    let (name, other) = (dice.name(), dice.name());
    let (name, other) = (OsStr::from_bytes(&name), OsStr::from_bytes(&other));
    let part = usize::try_from(len % (buf.len() as u64 + 1)).unwrap();
    let signed = offset.cast_signed();
    let word = i32::try_from(len % (1 << 20)).unwrap();
    match dice.below(19) {
        0 => tree.attr(ino).is_ok(),
        1 => tree.lookup(ino, name).is_ok(),
        2 => tree.list(ino).is_ok(),
        3 | 4 => tree.create(ino, name, len.is_multiple_of(2)).is_ok(),
        5 => tree.unlink(ino, name).is_ok(),
        6 => tree.rename((ino, name), (dice.ino(), other), RenameHow { exotic: len.is_multiple_of(4) }).is_ok(),
        7 | 8 => tree.open(ino, word % 4, len.is_multiple_of(3)).is_ok(),
        9 => tree.read(handle, &mut buf[..part], offset).is_ok(),
        10 | 11 => tree.write(handle, &buf[..part], offset, word).is_ok(),
        12 => tree.seek(handle, signed, word % 6).is_ok(),
        13 => tree.fallocate(handle, offset, len, word % 128).is_ok(),
        14 => tree.copy((handle, offset), (dice.below(40), dice.number()), len, false).is_ok(),
        15 => tree.set_attr(ino, None, None, None, Some(offset)).is_ok(),
        16 => list(tree, ino, offset).is_ok(),
        17 => tree.read_link(ino).is_ok(),
        _ => {
            let done = tree.sync(handle).is_ok();
            tree.release(handle);
            done
        }
    }
}
