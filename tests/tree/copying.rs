//! `cp` and copy_file_range(2): whole copies are clones, pieces are pieces.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use afterimage::units::BLOCK_SIZE;
use rustix::fs::copy_file_range;

use super::{Mount, create, noise, run};

/// A disk of 64 MiB with data here and there, a snapshot of it, and what it holds.
fn source(mount: &Mount) -> Vec<u8> {
    let file = create(&mount.make("a", 64 << 20));
    let mut whole = vec![0; 64 << 20];
    for (offset, len) in [(4096, 4096), (1 << 20, 3 << 20), (40 << 20, 12_345)] {
        let data = noise(len, offset as u64);
        file.write_all_at(&data, offset as u64).unwrap();
        whole[offset..offset + len].copy_from_slice(&data);
    }
    create(&mount.snapshot("a", "s"));
    whole
}

fn cp(arguments: &[&str], from: &Path, to: &Path) {
    let mut all: Vec<&OsStr> = arguments.iter().map(OsStr::new).collect();
    all.extend([from.as_os_str(), to.as_os_str()]);
    run("cp", &all);
}

#[test]
fn cp_of_a_snapshot_or_disk_is_whole_whatever_cp_does_about_holes() {
    let Some(mount) = Mount::new() else { return };
    let whole = source(&mount);
    for (n, arguments) in [&[][..], &["--sparse=never"], &["--sparse=always"], &["--reflink=never"]].iter().enumerate()
    {
        for (kind, from) in [("s", mount.snapshot("a", "s")), ("d", mount.disk("a"))] {
            let to = mount.disk(&format!("copy-{kind}-{n}"));
            cp(arguments, &from, &to);
            assert!(fs::read(&to).unwrap() == whole, "cp {arguments:?} of {kind}");
        }
    }
}

#[test]
fn cp_clones_and_the_copy_goes_its_own_way() {
    let Some(mount) = Mount::new() else { return };
    let whole = source(&mount);
    let to = mount.disk("b");
    cp(&[], &mount.snapshot("a", "s"), &to);
    let file = create(&to);
    file.write_all_at(&noise(10_000, 99), 1 << 20).unwrap();
    file.set_len(128 << 20).unwrap();
    let held = fs::read(&to).unwrap();
    assert_eq!(held.len(), 128 << 20);
    assert!(held[..1 << 20] == whole[..1 << 20] && held[(1 << 20) + 10_000..64 << 20] == whole[(1 << 20) + 10_000..]);
    assert_eq!(held[1 << 20..(1 << 20) + 10_000], noise(10_000, 99));
    assert!(fs::read(mount.snapshot("a", "s")).unwrap() == whole);
    assert!(fs::read(mount.disk("a")).unwrap() == whole);
}

#[test]
fn a_copy_that_stops_half_way_is_half_long() {
    let Some(mount) = Mount::new() else { return };
    let whole = source(&mount);
    let from = fs::File::open(mount.snapshot("a", "s")).unwrap();
    let to = create(&mount.disk("b"));
    let (mut off_in, mut off_out) = (0, 0);
    let one = copy_file_range(&from, Some(&mut off_in), &to, Some(&mut off_out), 1 << 20).unwrap();
    assert_eq!((one, to.metadata().unwrap().len()), (1 << 20, 1 << 20));
    let two = copy_file_range(&from, Some(&mut off_in), &to, Some(&mut off_out), 1 << 20).unwrap();
    assert_eq!((two, to.metadata().unwrap().len()), (1 << 20, 2 << 20));
    assert!(fs::read(mount.disk("b")).unwrap() == whole[..2 << 20], "read while the copy is under way");
    to.write_all_at(b"end", 2 << 20).unwrap();
    drop(to);
    let held = fs::read(mount.disk("b")).unwrap();
    assert!(held[..2 << 20] == whole[..2 << 20] && &held[2 << 20..] == b"end", "{}", held.len());
    let to = create(&mount.disk("c"));
    copy_file_range(&from, Some(&mut 0), &to, Some(&mut 0), 5000).unwrap();
    drop(to);
    let held = fs::read(mount.disk("c")).unwrap();
    assert!(held == whole[..5000], "{}", held.len());
    create(&mount.disk("c")).set_len(1 << 20).unwrap();
    assert!(
        fs::read(mount.disk("c")).unwrap()[5000..].iter().all(|byte| *byte == 0),
        "what was not copied is not there"
    );
}

#[test]
fn skipped_pieces_are_holes_and_not_the_source() {
    let Some(mount) = Mount::new() else { return };
    let whole = source(&mount);
    let from = fs::File::open(mount.snapshot("a", "s")).unwrap();
    let to = create(&mount.disk("b"));
    copy_file_range(&from, Some(&mut 0), &to, Some(&mut 0), 1 << 20).unwrap();
    let at = 2 << 20;
    let rest = (64 << 20) - at;
    let mut done = 0;
    while done < rest {
        let (mut off_in, mut off_out) = (at + done, at + done);
        done +=
            copy_file_range(&from, Some(&mut off_in), &to, Some(&mut off_out), usize::try_from(rest - done).unwrap())
                .unwrap() as u64;
    }
    let held = fs::read(mount.disk("b")).unwrap();
    assert_eq!(held.len(), 64 << 20);
    assert!(held[..1 << 20] == whole[..1 << 20]);
    assert!(held[1 << 20..2 << 20].iter().all(|byte| *byte == 0));
    assert!(held[2 << 20..] == whole[2 << 20..]);
}

#[test]
fn ranges_that_are_no_clone_are_copied_with_their_holes() {
    let Some(mount) = Mount::new() else { return };
    let whole = source(&mount);
    let from = fs::File::open(mount.disk("a")).unwrap();
    let to = create(&mount.disk("b"));
    to.write_all_at(&vec![0xee; 8 << 20], 0).unwrap();
    let copied = copy_file_range(&from, Some(&mut 512), &to, Some(&mut 1000), 6 << 20).unwrap();
    assert_eq!(copied, 6 << 20);
    let held = fs::read(mount.disk("b")).unwrap();
    assert!(held[..1000].iter().chain(&held[1000 + (6 << 20)..]).all(|byte| *byte == 0xee));
    assert!(held[1000..1000 + (6 << 20)] == whole[512..512 + (6 << 20)]);
    // Within one disk, and past the end of the target.
    let far = 100 << 20;
    let copied = copy_file_range(&to, Some(&mut 0), &to, Some(&mut { far }), 8 << 20).unwrap();
    assert_eq!(copied, 8 << 20);
    let grown = fs::read(mount.disk("b")).unwrap();
    assert_eq!(grown.len(), 108 << 20);
    assert!(grown[100 << 20..] == held[..]);
    let blocks = to.metadata().unwrap().blocks() * 512;
    assert!(blocks < 17 << 20, "holes stay holes: {blocks} bytes are mapped");
    assert_eq!(copy_file_range(&from, Some(&mut (64 << 20)), &to, Some(&mut 0), 4096).unwrap(), 0);
}

#[test]
fn files_come_in_and_go_out() {
    let Some(mount) = Mount::new() else { return };
    let outside = tempfile::tempdir().unwrap();
    let image = outside.path().join("image");
    let data = noise((5 << 20) + 777, 3);
    fs::write(&image, &data).unwrap();
    create(&image).set_len(20 << 20).unwrap();
    cp(&[], &image, &mount.disk("a"));
    cp(&["--sparse=always"], &mount.disk("a"), &outside.path().join("back"));
    assert!(fs::read(&image).unwrap() == fs::read(outside.path().join("back")).unwrap());
    let mapped = fs::metadata(mount.disk("a")).unwrap().blocks() * 512;
    assert!(mapped <= (6 << 20) + BLOCK_SIZE, "{mapped}");
    let mut of = std::ffi::OsString::from("of=");
    of.push(mount.disk("b"));
    let mut input = std::ffi::OsString::from("if=");
    input.push(&image);
    run(
        "dd",
        &[
            &input,
            &of,
            OsStr::new("bs=1M"),
            OsStr::new("oflag=direct"),
            OsStr::new("conv=fsync"),
            OsStr::new("status=none"),
        ],
    );
    assert!(fs::read(mount.disk("b")).unwrap() == fs::read(&image).unwrap());
    // O_TRUNC empties before it fills.
    fs::write(mount.disk("b"), b"short").unwrap();
    assert_eq!(fs::read(mount.disk("b")).unwrap(), b"short");
}
