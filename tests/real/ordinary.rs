//! Everything as an ordinary user: pool, command line and mount, without any privilege but fusermount3.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Output;

use crate::cli::text;

/// The user that has nothing.
const NOBODY: &str = "65534";

/// Runs a line of shell as an ordinary user.
fn as_nobody(line: &str, dir: &std::path::Path) -> Output {
    let words = ["--reuid", NOBODY, "--regid", NOBODY, "--clear-groups", "--", "bash", "-euc", line, "bash"];
    let mut command = super::command("setpriv", words.iter().map(OsStr::new).chain([dir.as_os_str()]));
    command.env("AFTERIMAGE_POOL", dir.join("pool")).env("HOME", dir).current_dir(dir).output().unwrap()
}

/// A directory that ordinary users can reach, with the program in it.
fn dir_for_all() -> Option<tempfile::TempDir> {
    let root = rustix::process::geteuid().is_root();
    if !super::require(root, "root, to become somebody else (an ordinary user runs all the other tests instead)")
        || !super::require_programs(&["setpriv"])
    {
        return None;
    }
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o1777)).unwrap();
    fs::copy(env!("CARGO_BIN_EXE_afterimage"), dir.path().join("afterimage")).unwrap();
    Some(dir)
}

#[test]
fn an_ordinary_user_needs_nothing_but_fusermount() {
    let Some(dir) = dir_for_all() else { return };
    let open = fs::metadata("/dev/fuse").is_ok_and(|meta| meta.permissions().mode() & 0o006 == 0o006);
    if !super::require(open, "a /dev/fuse that is open to all (chmod 666 /dev/fuse)") {
        return;
    }
    let output = as_nobody(
        "cd $1; PATH=$PWD:$PATH
        trap 'fusermount3 -q -u -z mnt || true' EXIT
        afterimage init; mkdir mnt
        afterimage mount --daemon mnt
        afterimage create web --size 64M
        head -c 5000000 /dev/urandom > data
        dd if=data of=mnt/disks/web.raw conv=notrunc,fsync bs=64k status=none
        afterimage snapshot web@a
        head -c 5000000 mnt/snapshots/web/a.raw | cmp - data
        cp mnt/snapshots/web/a.raw mnt/disks/copy.raw
        cmp mnt/disks/copy.raw mnt/disks/web.raw
        fallocate -p -o 0 -l 1M mnt/disks/copy.raw
        truncate -s 10M mnt/disks/other.raw
        rm mnt/disks/other.raw
        afterimage umount mnt
        afterimage check; afterimage scrub; afterimage ls",
        dir.path(),
    );
    let (said, told) = (text(&output.stdout), String::from_utf8_lossy(&output.stderr));
    let log = fs::read_to_string(dir.path().join("pool/server.log")).unwrap_or_default();
    assert!(output.status.success() && said.contains("sound") && said.contains("web"), "{said}{told}{log}");
    assert!(!log.contains("panicked"), "{log}");
}

#[test]
fn a_pool_of_somebody_else_is_refused_by_name() {
    let Some(dir) = dir_for_all() else { return };
    let pool = dir.path().join("pool");
    super::run(env!("CARGO_BIN_EXE_afterimage"), [OsStr::new("init"), pool.as_os_str()]);
    for command in ["ls", "check", "mount --daemon mnt", "init", "mount --init --daemon mnt"] {
        let output = as_nobody(&format!("cd $1; mkdir -p mnt; ./afterimage {command}"), dir.path());
        let told = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{command}: {told}");
        assert!(told.contains("ermission denied") && told.contains(pool.to_str().unwrap()), "{command}: {told}");
        let hint = format!(
            "hint: {} belongs to user root (0), group root (0) and has mode 0700; this is user ",
            pool.display()
        );
        assert!(told.contains(&hint) && told.contains("(65534)"), "{command}: {told}");
    }
    // A directory in which nothing may be made.
    let closed = dir.path().join("closed");
    fs::create_dir(&closed).unwrap();
    let output = as_nobody("cd $1; ./afterimage init closed/pool", dir.path());
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.code() == Some(1) && told.contains("closed/pool") && told.contains("ermission"), "{told}");
    assert!(told.contains("/closed belongs to user root (0), group root (0) and has mode 0755"), "{told}");
}
