//! Unmounting by us and by others, with and without open files, and what a killed server leaves.

use std::ffi::OsStr;
use std::fs;
use std::time::{Duration, Instant};

use afterimage::error::Kind;
use afterimage::tree::{MountOptions, mount};

use super::{Mount, create, run};

fn mounts_at(dir: &std::path::Path) -> usize {
    let table = fs::read_to_string("/proc/self/mounts").unwrap();
    table.lines().filter(|line| line.split(' ').nth(1) == dir.to_str()).count()
}

#[test]
fn it_is_found_by_name_and_gone_after_an_unmount_by_anyone() {
    let Some(mut mount) = Mount::new() else { return };
    let table = fs::read_to_string("/proc/self/mounts").unwrap();
    let line = table.lines().find(|line| line.contains(mount.dir.to_str().unwrap())).unwrap();
    assert!(line.starts_with("afterimage:/") && line.contains(" fuse.afterimage "), "{line}");
    let program = if rustix::process::geteuid().is_root() { "umount" } else { "fusermount3" };
    let arguments =
        if program == "umount" { vec![mount.dir.as_os_str()] } else { vec![OsStr::new("-u"), mount.dir.as_os_str()] };
    run(program, &arguments);
    mount.mounted.take().unwrap().wait().unwrap();
    assert_eq!(mounts_at(&mount.dir), 0);
}

#[test]
fn the_unmounter_ends_the_wait() {
    let Some(mut mount) = Mount::new() else { return };
    let mounted = mount.mounted.take().unwrap();
    let unmount = mounted.unmounter();
    let begun = Instant::now();
    let signal = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(50));
        unmount();
        unmount();
    });
    mounted.wait().unwrap();
    signal.join().unwrap();
    assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
    assert_eq!(mounts_at(&mount.dir), 0);
}

#[test]
fn open_files_delay_a_stop_and_do_not_prevent_it() {
    let Some(mut mount) = Mount::new() else { return };
    let file = create(&mount.make("a", 4096));
    let mounted = mount.mounted.take().unwrap();
    let begun = Instant::now();
    mounted.unmounter()();
    assert_eq!(mounts_at(&mount.dir), 0, "nobody can open more");
    std::os::unix::fs::FileExt::write_all_at(&file, b"last words", 0).unwrap();
    drop(file);
    mounted.wait().unwrap();
    assert!(begun.elapsed() < Duration::from_secs(2), "ends with the last file: {:?}", begun.elapsed());

    let Some(mut mount) = Mount::new() else { return };
    let file = create(&mount.make("a", 4096));
    let mounted = mount.mounted.take().unwrap();
    mounted.unmounter()();
    mounted.wait().unwrap();
    drop(file);
}

#[test]
fn what_cannot_be_mounted_is_told() {
    let Some(mut first) = Mount::new() else { return };
    let options = |name: &str| MountOptions::of_pool(std::path::Path::new(name));
    let missing = first.dir.join("disks/none/here");
    assert_eq!(mount(&first.store, &missing, &options("x")).unwrap_err().kind(), Kind::NotFound);
    let file = tempfile::NamedTempFile::new().unwrap();
    assert_eq!(mount(&first.store, file.path(), &options("x")).unwrap_err().kind(), Kind::Usage);
    let table = fs::read_to_string("/proc/self/mounts").unwrap();
    let source = table.lines().find(|l| l.contains(first.dir.to_str().unwrap())).unwrap().split(' ').next().unwrap();
    let again = options(source.strip_prefix("afterimage:").unwrap());
    assert_eq!(mount(&first.store, &first.dir, &again).unwrap_err().kind(), Kind::Busy);
    first.mounted.take();
    drop(mount(&first.store, &first.dir, &again).unwrap());
    assert_eq!(mounts_at(&first.dir), 0);
}
