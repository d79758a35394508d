//! Directories: making, listing, renaming and removing, and what is refused.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};

use afterimage::api::answer::Status;
use afterimage::api::{self, Request, Response};
use afterimage::progress::Silent;
use afterimage::store::OpenOptions;
use rustix::fs::{CWD, FallocateFlags, FileType, Mode, RenameFlags, fallocate, mknodat, renameat_with};

use super::{Mount, create, errno, run, rustix_errno};

fn names(dir: &std::path::Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn disks_are_made_listed_renamed_and_removed_as_files() {
    let Some(mount) = Mount::new() else { return };
    assert_eq!(names(&mount.dir), ["checkpoints", "disks", "exports", "retired", "snapshots"]);
    let path = mount.disk("a");
    run("truncate", &[OsStr::new("-s"), OsStr::new("10G"), path.as_os_str()]);
    let meta = fs::metadata(&path).unwrap();
    assert_eq!((meta.len(), meta.blocks(), meta.blksize(), meta.nlink()), (10 << 30, 0, 4096, 1));
    assert_eq!(meta.permissions().mode() & 0o7777, 0o600);
    assert_eq!((meta.uid(), meta.gid()), (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw()));
    assert_eq!(names(&mount.dir.join("disks")), ["a.raw"]);
    assert_eq!(names(&mount.dir.join("snapshots")), ["a"]);

    let ino = meta.ino();
    fs::rename(&path, mount.disk("b")).unwrap();
    assert_eq!(fs::metadata(mount.disk("b")).unwrap().ino(), ino, "a disk keeps its inode");
    assert_eq!(errno(fs::metadata(&path)), libc::ENOENT);
    assert_eq!(names(&mount.dir.join("snapshots")), ["b"]);
    assert_eq!(errno(fs::metadata(mount.dir.join("snapshots/a"))), libc::ENOENT, "the other directory follows");

    fs::remove_file(mount.disk("b")).unwrap();
    assert_eq!(names(&mount.dir.join("disks")), Vec::<String>::new());
    assert_eq!(errno(fs::metadata(mount.dir.join("snapshots/b"))), libc::ENOENT);
}

#[test]
fn odd_names_are_names_and_bad_ones_are_refused() {
    let Some(mount) = Mount::new() else { return };
    let long = "x".repeat(128);
    for name in ["a.raw", "with space", "\u{e4}\u{f6}\u{1f4be}", "a:b*?\\'\"$%,=", &long] {
        mount.make(name, 4096);
        assert_eq!(mount.store.disk_info(name).unwrap().size, 4096);
        fs::metadata(mount.disk(name)).unwrap();
        fs::metadata(mount.dir.join("snapshots").join(name)).unwrap();
    }
    assert_eq!(names(&mount.dir.join("disks")).len(), 5);
    let try_make = |file: &OsStr| fs::File::create_new(mount.dir.join("disks").join(file));
    for bad in ["noending", ".raw", ".hidden.raw", "-dash.raw", "a@b.raw", "a#b.raw", "a..b.raw", "a\nb.raw"] {
        assert_eq!(errno(try_make(OsStr::new(bad))), libc::EINVAL, "{bad:?}");
    }
    assert_eq!(errno(try_make(OsStr::from_bytes(b"\xff.raw"))), libc::EINVAL);
    assert_eq!(errno(try_make(OsStr::new(&format!("{long}x.raw")))), libc::ENAMETOOLONG);
    assert_eq!(errno(try_make(OsStr::new(&"x".repeat(300)))), libc::ENAMETOOLONG);
}

#[test]
fn nothing_that_exists_is_replaced() {
    let Some(mount) = Mount::new() else { return };
    let (a, b) = (mount.make("a", 4096), mount.make("b", 8192));
    assert_eq!(errno(fs::rename(&a, &b)), libc::EEXIST);
    let with = |flags| rustix_errno(renameat_with(CWD, &a, CWD, &b, flags));
    assert_eq!(with(RenameFlags::NOREPLACE), libc::EEXIST);
    assert_eq!(with(RenameFlags::EXCHANGE), libc::EINVAL);
    renameat_with(CWD, &a, CWD, mount.disk("c"), RenameFlags::NOREPLACE).unwrap();
    assert_eq!(errno(fs::File::create_new(&b)), libc::EEXIST);
    assert_eq!(errno(fs::rename(&b, mount.dir.join("disks/b"))), libc::EINVAL, "the ending is part of the name");
    assert_eq!(fs::metadata(&b).unwrap().len(), 8192);
}

#[test]
fn what_leaves_its_kind_is_refused_and_never_copied() {
    let Some(mount) = Mount::new() else { return };
    let a = mount.make("a", 4096);
    mount.make("b", 4096);
    create(&mount.snapshot("a", "s"));
    let into = |to: std::path::PathBuf| errno(fs::rename(&a, to));
    assert_eq!(into(mount.snapshot("a", "t")), libc::EPERM);
    assert_eq!(into(mount.dir.join("a.raw")), libc::EPERM);
    assert_eq!(errno(fs::rename(mount.snapshot("a", "s"), mount.snapshot("b", "s"))), libc::EPERM);
    assert_eq!(errno(fs::rename(mount.snapshot("a", "s"), mount.disk("s"))), libc::EPERM);
    assert_eq!(errno(fs::rename(mount.dir.join("disks"), mount.dir.join("d"))), libc::EPERM);
    assert_eq!(errno(fs::rename(mount.dir.join("snapshots/a"), mount.dir.join("snapshots/c"))), libc::EPERM);
}

#[test]
fn other_kinds_of_files_are_refused() {
    let Some(mount) = Mount::new() else { return };
    let disks = mount.dir.join("disks");
    let a = mount.make("a", 4096);
    assert_eq!(errno(fs::create_dir(disks.join("x"))), libc::EPERM);
    assert_eq!(errno(fs::create_dir(mount.dir.join("snapshots/x"))), libc::EPERM);
    assert_eq!(errno(fs::remove_dir(mount.dir.join("snapshots/a"))), libc::EPERM);
    assert_eq!(errno(fs::remove_dir(&disks)), libc::EPERM);
    assert_eq!(errno(fs::hard_link(&a, mount.disk("b"))), libc::EPERM);
    assert_eq!(errno(symlink(&a, mount.disk("b"))), libc::EPERM);
    assert_eq!(errno(fs::File::create(mount.dir.join("x.raw"))), libc::EPERM);
    assert_eq!(errno(fs::File::create(mount.dir.join("snapshots/x.raw"))), libc::EPERM);
    let node = |name, kind| mknodat(CWD, mount.disk(name), kind, Mode::RUSR, 0);
    assert_eq!(rustix_errno(node("fifo", FileType::Fifo)), libc::EPERM);
    node("plain", FileType::RegularFile).unwrap();
    assert_eq!(mount.store.disk_info("plain").unwrap().size, 0);
    assert_eq!(rustix_errno(node("plain", FileType::RegularFile)), libc::EEXIST);
}

#[test]
fn mode_and_owner_stay_and_times_are_ignored() {
    let Some(mount) = Mount::new() else { return };
    let a = mount.make("a", 4096);
    let chmod = |mode| fs::set_permissions(&a, fs::Permissions::from_mode(mode));
    assert_eq!(errno(chmod(0o644)), libc::EPERM);
    chmod(0o600).unwrap();
    assert_eq!(errno(std::os::unix::fs::chown(&a, Some(12345), None)), libc::EPERM);
    let before = fs::metadata(&a).unwrap().mtime();
    run("touch", &[OsStr::new("-d"), OsStr::new("2001-01-01"), a.as_os_str()]);
    assert_eq!(fs::metadata(&a).unwrap().mtime(), before);
    let name = c"user.x";
    assert_eq!(rustix_errno(rustix::fs::setxattr(&a, name, b"1", rustix::fs::XattrFlags::empty())), libc::EOPNOTSUPP);
    assert_eq!(rustix_errno(rustix::fs::getxattr(&a, name, &mut [0u8; 8][..])), libc::EOPNOTSUPP);
}

#[test]
fn removal_is_refused_with_snapshots_or_a_writer_and_waits_for_a_closed_one() {
    let Some(mount) = Mount::new() else { return };
    let a = mount.make("a", 4096);
    create(&mount.snapshot("a", "s"));
    assert_eq!(errno(fs::remove_file(&a)), libc::EBUSY);
    fs::remove_file(mount.snapshot("a", "s")).unwrap();
    let writer = create(&a);
    assert_eq!(errno(fs::remove_file(&a)), libc::EBUSY);
    drop(writer);
    fs::remove_file(&a).unwrap();
    for round in 0..50 {
        let path = mount.disk("b");
        fs::write(&path, vec![1; 10_000]).unwrap();
        fs::remove_file(&path).unwrap_or_else(|error| panic!("round {round}: {error}"));
    }
    assert_eq!(errno(fs::remove_file(mount.dir.join("disks"))), libc::EISDIR);
}

#[test]
fn a_thousand_names_are_listed_whole() {
    let Some(mount) = Mount::new() else { return };
    for n in 0..1000 {
        afterimage::disk::create(&mount.store, &format!("disk-{n:04}"), 4096).unwrap();
    }
    let listed = names(&mount.dir.join("disks"));
    assert_eq!(listed.len(), 1000);
    assert_eq!((listed[0].as_str(), listed[999].as_str()), ("disk-0000.raw", "disk-0999.raw"));
    let out = run("ls", &[OsStr::new("-l"), mount.dir.join("disks").as_os_str()]).stdout;
    assert_eq!(out.iter().filter(|byte| **byte == b'\n').count(), 1001);
}

#[test]
fn statfs_shows_the_room_of_the_host() {
    let Some(mount) = Mount::new() else { return };
    let space = mount.store.space().unwrap();
    let stat = rustix::fs::statvfs(&mount.dir).unwrap();
    assert_eq!((stat.f_frsize, stat.f_bsize, stat.f_namemax), (4096, 4096, 242));
    assert_eq!(stat.f_blocks, space.total / 4096);
    assert!(stat.f_bavail > 0);
}

/// Returns why no new data is taken, as the list of disks says it, and the status.
fn told(mount: &Mount) -> (Option<String>, Status) {
    let ask = |request| api::execute(&mount.store, request, &Silent).unwrap();
    match (ask(Request::Ls { disk: None }), ask(Request::Status {})) {
        (Response::Disks { full, .. }, Response::Status(status)) => (full, status),
        other => panic!("{other:?}"),
    }
}

/// What `df` calls available once was all that is free: most of it on a host that ran full, where every write was refused.
#[test]
fn statfs_promises_nothing_that_a_write_is_refused() {
    let mark = 16 << 20;
    let kept = |mark| OpenOptions { low_water: Some(mark), ..OpenOptions::default() };
    let Some(mount) = Mount::opened(kept(mark), |options| options) else { return };
    let stat = rustix::fs::statvfs(&mount.dir).unwrap();
    assert_eq!((stat.f_bfree - stat.f_bavail) * 4096, mark, "kept for deleting and for metadata");
    let (full, status) = told(&mount);
    assert_eq!((full, status.full, status.free - status.available), (None, None, mark));
    drop(mount);

    let mount = Mount::opened(kept(1 << 60), |options| options).unwrap();
    let stat = rustix::fs::statvfs(&mount.dir).unwrap();
    assert_eq!(stat.f_bavail, 0);
    assert!(stat.f_bfree > 0);
    let file = create(&mount.make("a", 1 << 20));
    assert_eq!(errno(file.write_all_at(&[1; 4096], 0)), libc::ENOSPC);
    assert_eq!(rustix_errno(fallocate(&file, FallocateFlags::empty(), 0, 4096)), libc::ENOSPC, "nor this");
    let (full, status) = told(&mount);
    let why = full.unwrap();
    assert!(why.starts_with("the host file system is full: "), "{why}");
    assert_eq!((status.full, status.available, status.health), (Some(why), 0, None));
}
