//! An ordinary Debian kernel as a guest, on a disk of a pool: inside a machine that QEMU emulates, whose KVM is complete.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::real::{require, require_programs, run, scratch, shell};

/// How long the whole may take on a machine that is busy.
const PATIENCE: Duration = Duration::from_secs(900);

/// A machine that QEMU emulates, with a disk, and a Debian kernel and an initrd for the guest inside.
pub(super) struct Nested {
    kernel: PathBuf,
    disk: PathBuf,
    initrd: PathBuf,
    pub(super) dir: tempfile::TempDir,
}

impl Nested {
    /// Prepares it; the first process of the guest is a script of this folder.
    pub(super) fn new(guest: &str) -> Option<Self> {
        let kernel = Path::new(concat!(env!("CARGO_TARGET_TMPDIR"), "/../nested")).to_owned();
        let programs = ["qemu-system-x86_64", "busybox", "cpio", "mke2fs", "e2fsck", "strip"];
        let there = kernel.join("vmlinuz").is_file();
        if !require_programs(&programs) || !require(there, "a kernel, which tests/run fetches") {
            return None;
        }
        let dir = scratch();
        let (disk, initrd) = (dir.path().join("disk"), dir.path().join("guest.gz"));
        shell("truncate -s 1G \"$1\"; mke2fs -q -F -t ext4 \"$1\"", &[disk.as_os_str()]);
        let pack = "mkdir -p \"$1\"/bin \"$1\"/dev \"$1\"/proc \"$1\"/sys \"$1\"/mnt \"$1\"/modules
            cp \"$(command -v busybox)\" \"$1/bin/busybox\"; cp \"$2\" \"$1/init\"; chmod +x \"$1/init\"
            cp \"$3\"/modules/*.ko \"$1/modules\"; rm -f \"$1\"/modules/kvm*
            cd \"$1\"; find . | cpio --quiet -o -H newc | gzip -1 > \"$4\"";
        let (script, tree) = (folder().join(guest), dir.path().join("guest.d"));
        shell(pack, &[tree.as_os_str(), script.as_os_str(), kernel.as_os_str(), initrd.as_os_str()]);
        Some(Self { kernel, disk, initrd, dir })
    }

    /// Runs a script of this folder inside, with programs that go in; returns its exit code and what it said.
    pub(super) fn run(&self, script: &str, programs: &[&str]) -> (Option<i32>, String) {
        let output = Command::new(folder().join("machine"))
            .args([&self.kernel, &self.disk])
            .arg(PATIENCE.as_secs().to_string())
            .args(programs)
            .arg(format!("{}:/guest.gz", self.initrd.display()))
            .arg("--")
            .arg(folder().join(script))
            .env("PATH", crate::real::search_path())
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stdout).replace('\r', "");
        (output.status.code(), said + &String::from_utf8_lossy(&output.stderr))
    }
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/vmm/nested")
}

/// Fails for what guests complain of. That they were not run for long is no fault of ours where the machine itself says so,
/// whose processors are emulated by a host that may have other things to do.
pub(super) fn check_complaints(said: &str) {
    let of_time = |line: &&str| line.contains("lockup") || line.contains("tall");
    let stood_still = said.lines().filter(|line| !line.starts_with("guest:")).any(|line| of_time(&line));
    let complaints = said.lines().filter(|line| line.starts_with("guest: complains"));
    let real: Vec<&str> = complaints.filter(|line| !(stood_still && of_time(line))).collect();
    assert!(real.is_empty(), "{real:?} in: {said}");
}

/// Returns the path of a program.
pub(super) fn program(name: &str) -> String {
    run("bash", ["-c", &format!("command -v {name}")]).trim().to_owned()
}

#[test]
fn a_debian_kernel_lives_on_a_disk_of_a_pool() {
    let Some(nested) = Nested::new("guest.sh") else { return };
    let (code, said) = nested.run("host.sh", &[env!("CARGO_BIN_EXE_afterimage"), &program("mke2fs")]);
    assert_eq!(code, Some(0), "{said}");
    for wanted in [
        "web: running, 256.0 MiB of memory, 2 processors",
        "web: paused",
        "guest: reboots",
        "guest: serial web-root processors 2",
        "guest: memory 1",
        "guest: random",
        "guest: heard hello",
        "guest: off",
        "the guest switched itself off",
        "web: stopped",
        "written before the reboot\nwritten before the snapshot\nhost: the snapshot is whole\n",
        "host: what was synced is in the snapshot",
        "written after the snapshot",
        "host: the pool is sound",
    ] {
        assert!(said.contains(wanted), "no '{wanted}' in: {said}");
    }
}

#[test]
fn a_debian_kernel_is_saved_while_it_runs_and_goes_on() {
    let Some(nested) = Nested::new("kept-guest.sh") else { return };
    let programs = [env!("CARGO_BIN_EXE_afterimage"), &program("mke2fs"), &program("e2fsck")];
    let (code, said) = nested.run("kept-host.sh", &programs);
    assert_eq!(code, Some(0), "{said}");
    for (wanted, times) in [
        ("\"pause-us\":", 2),
        ("guest: heard end", 2),
        ("guest: every line is there", 2),
        ("guest: told that it is another 1 times", 2),
        ("guest: off", 2),
        ("host: root is clean", 1),
        ("host: twin-root is clean", 1),
        ("host: the pool is sound", 1),
    ] {
        assert_eq!(said.matches(wanted).count(), times, "'{wanted}' in: {said}");
    }
    check_complaints(&said);
    // What each of them counts goes on from where the checkpoint was made.
    for part in said.split("host: ").filter(|part| part.starts_with("twin\n") || part.starts_with("web\n")) {
        let numbers: Vec<u64> =
            part.lines().filter_map(|line| line.strip_prefix("count ")?.trim().parse().ok()).collect();
        assert!(numbers[0] > 10 && numbers.windows(2).all(|pair| pair[1] == pair[0] + 1), "{numbers:?}");
    }
}
