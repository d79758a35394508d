//! Unmounting by us and by others, with and without open files, and what a killed server leaves.

use std::ffi::OsStr;
use std::fs;
use std::time::{Duration, Instant};

use afterimage::error::Kind;
use afterimage::tree::{MountOptions, mount};

use super::{Mount, create, errno, require_fuse, run};

/// What the root of a mount has.
const ENTRIES: usize = 5;

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

/// Not a test: the server that [`a_killed_server_leaves_a_mount_the_next_one_takes_away`] kills.
#[test]
#[ignore = "a helper of another test"]
fn serves_until_killed() {
    let Some(at) = std::env::var_os("AFTERIMAGE_TEST_MOUNTPOINT") else { return };
    let store = super::new_pool(&tempfile::tempdir().unwrap());
    let mounted =
        mount(&store, std::path::Path::new(&at), &MountOptions::of_pool("/killed, and back".as_ref())).unwrap();
    mounted.wait().unwrap();
}

#[test]
fn a_killed_server_leaves_a_mount_the_next_one_takes_away() {
    if !require_fuse() {
        return;
    }
    let at = tempfile::tempdir().unwrap();
    let mut server = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "tree::stopping::serves_until_killed"])
        .env("AFTERIMAGE_TEST_MOUNTPOINT", at.path())
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let begun = Instant::now();
    while mounts_at(at.path()) == 0 || fs::read_dir(at.path()).unwrap().count() != ENTRIES {
        assert!(begun.elapsed() < Duration::from_secs(20), "the helper does not mount");
        std::thread::sleep(Duration::from_millis(20));
    }
    server.kill().unwrap();
    server.wait().unwrap();
    // The ring of a dead process lets go of the device a moment later: what was asked before that is aborted.
    assert!([libc::ENOTCONN, libc::ECONNABORTED].contains(&errno(fs::read_dir(at.path()))));
    let store = super::new_pool(&tempfile::tempdir().unwrap());
    let other = MountOptions::of_pool("/another pool".as_ref());
    let refused = mount(&store, at.path(), &other).unwrap_err();
    assert_eq!(refused.kind(), Kind::Busy, "{refused}");
    let mounted = mount(&store, at.path(), &MountOptions::of_pool("/killed, and back".as_ref())).unwrap();
    assert_eq!(fs::read_dir(at.path()).unwrap().count(), ENTRIES);
    drop(mounted);
    assert_eq!(mounts_at(at.path()), 0);
}

#[test]
fn an_ordinary_user_can_mount() {
    if !require_fuse() || !rustix::process::geteuid().is_root() {
        return; // An ordinary user already: then all the other tests are this one.
    }
    let open_to_all = {
        use std::os::unix::fs::PermissionsExt;
        fs::metadata("/dev/fuse").unwrap().permissions().mode() & 0o006 == 0o006
    };
    if !open_to_all {
        assert!(std::env::var_os("CI").is_none(), "/dev/fuse must be open to all under CI: chmod 666 /dev/fuse");
        eprintln!("SKIPPED: /dev/fuse is closed to ordinary users (chmod 666 /dev/fuse)");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    run("chmod", &[OsStr::new("1777"), dir.path().as_os_str()]);
    let program = dir.path().join("tests");
    fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
    let output = std::process::Command::new("setpriv")
        .args(["--reuid", "65534", "--regid", "65534", "--clear-groups", "--"])
        .arg(&program)
        .args(["--test-threads", "2", "tree::names::", "tree::snapshots::", "tree::stopping::it_is_found"])
        .env("TMPDIR", dir.path())
        .output()
        .unwrap();
    let told = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && told.contains(" passed"), "{told}");
}
