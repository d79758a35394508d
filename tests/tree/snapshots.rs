//! Snapshots as files: touching one takes it, and nothing writes it.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};

use super::{Mount, create, errno, noise, open_direct, run};

#[test]
fn touch_takes_a_snapshot_and_the_disk_goes_on() {
    let Some(mount) = Mount::new() else { return };
    let a = mount.make("a", 1 << 20);
    let file = create(&a);
    file.write_all_at(&noise(8192, 1), 0).unwrap();
    let s = mount.snapshot("a", "s");
    run("touch", &[s.as_os_str()]);
    file.write_all_at(&noise(8192, 2), 0).unwrap();
    let meta = fs::metadata(&s).unwrap();
    assert_eq!((meta.len(), meta.blocks() * 512, meta.permissions().mode() & 0o7777), (1 << 20, 8192, 0o400));
    let held = fs::read(&s).unwrap();
    assert_eq!(held[..8192], noise(8192, 1));
    assert!(held[8192..].iter().all(|byte| *byte == 0));
    assert_eq!(fs::read(&a).unwrap()[..8192], noise(8192, 2));
    assert_eq!(mount.store.snapshots("a").unwrap().len(), 1);
}

#[test]
fn a_snapshot_is_never_written_or_replaced() {
    let Some(mount) = Mount::new() else { return };
    mount.make("a", 4096);
    let s = mount.snapshot("a", "s");
    let fresh = fs::File::create_new(&s).unwrap();
    assert_eq!(errno(fresh.write_all_at(b"x", 0)), libc::EROFS, "also through the handle that made it");
    assert_eq!(errno(fresh.set_len(0)), libc::EROFS);
    drop(fresh);
    let refused = if rustix::process::geteuid().is_root() { libc::EROFS } else { libc::EACCES };
    assert_eq!(errno(fs::File::create(&s)), refused);
    assert_eq!(errno(fs::OpenOptions::new().append(true).open(&s)), refused);
    assert_eq!(errno(fs::File::create_new(&s)), libc::EEXIST);
    run("touch", &[OsStr::new("-c"), OsStr::new("-a"), s.as_os_str()]);
    assert_eq!(fs::metadata(&s).unwrap().len(), 4096);
    assert_eq!(errno(fs::File::create(mount.dir.join("snapshots/a/b@c.raw"))), libc::EINVAL);
}

#[test]
fn snapshots_are_renamed_and_removed_as_files() {
    let Some(mount) = Mount::new() else { return };
    mount.make("a", 4096);
    create(&mount.snapshot("a", "s"));
    create(&mount.snapshot("a", "t"));
    let ino = fs::metadata(mount.snapshot("a", "s")).unwrap().ino();
    assert_eq!(errno(fs::rename(mount.snapshot("a", "s"), mount.snapshot("a", "t"))), libc::EEXIST);
    fs::rename(mount.snapshot("a", "s"), mount.snapshot("a", "u")).unwrap();
    assert_eq!(fs::metadata(mount.snapshot("a", "u")).unwrap().ino(), ino);
    fs::remove_file(mount.snapshot("a", "t")).unwrap();
    let left: Vec<_> = fs::read_dir(mount.dir.join("snapshots/a")).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left, ["u.raw"]);
}

#[test]
fn a_snapshot_reads_directly_and_through_the_cache() {
    let Some(mount) = Mount::new() else { return };
    let a = mount.make("a", 3 << 20);
    create(&a).write_all_at(&noise(3 << 20, 7), 0).unwrap();
    create(&mount.snapshot("a", "s"));
    create(&a).write_all_at(&[0; 100_000], 50_000).unwrap();
    let s = mount.snapshot("a", "s");
    assert_eq!(fs::read(&s).unwrap(), noise(3 << 20, 7));
    let direct = fs::OpenOptions::new().read(true).open(&s).unwrap();
    drop(direct);
    let mut buf = vec![0; 1 << 20];
    use std::os::unix::fs::OpenOptionsExt;
    let direct = fs::OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(&s).unwrap();
    direct.read_exact_at(&mut buf, 1 << 20).unwrap();
    assert_eq!(buf, noise(3 << 20, 7)[1 << 20..2 << 20]);
    drop(open_direct(&a));
}
