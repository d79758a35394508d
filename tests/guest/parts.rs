//! What a test guest is made of: a kernel of the distribution, an initrd, and the files of its disk.
//!
//! # Where it comes from
//! `tests/run` fetches the kernel package and lays the kernel and its drivers into `guest` in the build directory,
//! untouched. The initrd and the tree for the disk are made here, of a static busybox and the scripts beside this file.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use crate::real::{command, is_installed, require, require_loop, require_programs, run, search_path, shell};

const INITRD: &str = include_str!("initrd.sh");
const AGENT: &str = include_str!("agent.sh");
const LOAD: &str = include_str!("load.sh");

/// The pieces, as files.
pub(super) struct Parts {
    pub(super) kernel: PathBuf,
    pub(super) initrd: PathBuf,
    /// What the file system of the disk is made of.
    root: PathBuf,
}

impl Parts {
    /// Makes the pieces in a directory. `None`, said loudly, where something is missing.
    pub(super) fn make(dir: &Path) -> Option<Self> {
        let programs = ["qemu-system-x86_64", "busybox", "cpio", "mke2fs", "e2fsck", "losetup", "fsx", "ldd"];
        let from = Path::new(concat!(env!("CARGO_TARGET_TMPDIR"), "/../guest"));
        let kernel = from.join("vmlinuz");
        let there = require_loop()
            && require_programs(&programs)
            && require(busybox_is_static(), "a busybox that needs no libraries (busybox-static)")
            && require(kernel.is_file(), "a kernel for guests, which tests/run fetches");
        there.then(|| {
            let initrd = dir.join("initrd");
            make_initrd(&dir.join("initrd.d"), &from.join("modules"), &initrd);
            let root = dir.join("root.d");
            lay_out(&root, &[("agent", AGENT), ("bin/load", LOAD)]);
            add_with_libraries(&root, "fsx");
            Self { kernel, initrd, root }
        })
    }

    /// Makes the file system that guests run from on a disk.
    pub(super) fn fill(&self, disk: &Path) {
        let words = ["-q", "-F", "-t", "ext4", "-d"].map(std::ffi::OsStr::new);
        run("mke2fs", words.into_iter().chain([self.root.as_os_str(), disk.as_os_str()]));
    }
}

/// Makes a tree with busybox, the mount points of a system and these programs.
fn lay_out(dir: &Path, programs: &[(&str, &str)]) {
    for name in ["bin", "dev", "proc", "sys", "tmp", "root"] {
        fs::create_dir_all(dir.join(name)).unwrap();
    }
    fs::copy(busybox(), dir.join("bin/busybox")).unwrap();
    let names = run("busybox", ["--list"]);
    for name in names.lines().filter(|name| *name != "busybox") {
        std::os::unix::fs::symlink("busybox", dir.join("bin").join(name)).unwrap();
    }
    for (name, text) in programs {
        fs::write(dir.join(name), text).unwrap();
        fs::set_permissions(dir.join(name), fs::Permissions::from_mode(0o755)).unwrap();
    }
}

fn make_initrd(dir: &Path, modules: &Path, file: &Path) {
    lay_out(dir, &[("init", INITRD)]);
    shell("cp -r \"$1\" \"$2\"", &[modules.as_os_str(), dir.join("modules").as_os_str()]);
    let pack = "cd \"$1\"; find . | cpio --quiet -o -H newc > \"$2\"";
    shell(pack, &[dir.as_os_str(), file.as_os_str()]);
}

/// Puts a program of the host into a tree, with the libraries it needs where it looks for them.
fn add_with_libraries(dir: &Path, program: &str) {
    let from = find(program);
    fs::copy(&from, dir.join("bin").join(program)).unwrap();
    let said = run("ldd", [&from]);
    for library in said.split_whitespace().filter(|word| word.starts_with('/')) {
        let at = dir.join(library.trim_start_matches('/'));
        fs::create_dir_all(at.parent().unwrap()).unwrap();
        fs::copy(library, at).unwrap();
    }
}

fn find(program: &str) -> PathBuf {
    let path = search_path();
    std::env::split_paths(&path).map(|dir| dir.join(program)).find(|file| file.is_file()).unwrap_or_default()
}

fn busybox() -> PathBuf {
    find("busybox")
}

fn busybox_is_static() -> bool {
    is_installed("ldd") && !command("ldd", [busybox()]).output().unwrap().status.success()
}

pub(super) fn base64(text: &str) -> String {
    pipe_through("base64 -w 0", text)
}

pub(super) fn unbase64(text: &str) -> String {
    pipe_through("base64 -d", text)
}

/// Runs a filter of coreutils on a text.
fn pipe_through(filter: &str, text: &str) -> String {
    shell(&format!("printf %s \"$1\" | {filter}"), &[text.as_ref()])
}
