//! An ordinary Debian kernel as a guest, on a disk of a pool: inside a machine that QEMU emulates, whose KVM is complete.

use std::path::Path;
use std::process::Command;

use crate::real::{require, require_programs, run, scratch, shell};

/// Seconds the whole may take on a machine that is busy.
const PATIENCE: &str = "900";

#[test]
fn a_debian_kernel_lives_on_a_disk_of_a_pool() {
    let kernel = Path::new(concat!(env!("CARGO_TARGET_TMPDIR"), "/../nested"));
    let programs = ["qemu-system-x86_64", "busybox", "cpio", "mke2fs"];
    if !require_programs(&programs) || !require(kernel.join("vmlinuz").is_file(), "a kernel, which tests/run fetches") {
        return;
    }
    let here = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/vmm/nested");
    let dir = scratch();
    let (disk, initrd) = (dir.path().join("disk"), dir.path().join("guest.gz"));
    shell("truncate -s 1G \"$1\"; mke2fs -q -F -t ext4 \"$1\"", &[disk.as_os_str()]);
    let pack = "mkdir -p \"$1\"/bin \"$1\"/dev \"$1\"/proc \"$1\"/sys \"$1\"/mnt \"$1\"/modules
        cp \"$(command -v busybox)\" \"$1/bin/busybox\"; cp \"$2\" \"$1/init\"; chmod +x \"$1/init\"
        cp \"$3\"/modules/*.ko \"$1/modules\"; rm -f \"$1\"/modules/kvm*
        cd \"$1\"; find . | cpio --quiet -o -H newc | gzip -1 > \"$4\"";
    let guest = here.join("guest.sh");
    let tree = dir.path().join("guest.d");
    shell(pack, &[tree.as_os_str(), guest.as_os_str(), kernel.as_os_str(), initrd.as_os_str()]);
    let mke2fs = run("bash", ["-c", "command -v mke2fs"]);
    let output = Command::new(here.join("machine"))
        .args([kernel, &disk])
        .args([PATIENCE, env!("CARGO_BIN_EXE_afterimage"), mke2fs.trim()])
        .arg(format!("{}:/guest.gz", initrd.display()))
        .arg("--")
        .arg(here.join("host.sh"))
        .env("PATH", crate::real::search_path())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout).replace('\r', "");
    assert_eq!(output.status.code(), Some(0), "{said}{}", String::from_utf8_lossy(&output.stderr));
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
        "written after the snapshot",
        "host: the pool is sound",
    ] {
        assert!(said.contains(wanted), "no '{wanted}' in: {said}");
    }
}
