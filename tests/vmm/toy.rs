//! The guest that does as it is told: made from source, started, listened to.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use afterimage::disk::BlockDevice;
use afterimage::vmm::{Boot, DiskSettings, Ending, Machine, Settings};
use uuid::Uuid;

use crate::real::require;

pub(crate) const MIB: u64 = 1 << 20;

/// How a kernel is started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    Pvh,
    Linux,
}

/// Tells whether there is a KVM to test with.
pub(crate) fn require_kvm() -> bool {
    let there = std::fs::File::options().read(true).write(true).open("/dev/kvm").is_ok();
    require(there, "/dev/kvm, for reading and writing")
}

/// Returns the guest, made from source the first time.
pub(crate) fn kernel(way: Way) -> PathBuf {
    static MADE: OnceLock<PathBuf> = OnceLock::new();
    let dir = MADE.get_or_init(make);
    dir.join(match way {
        Way::Pvh => "toy.elf",
        Way::Linux => "toy.bz",
    })
}

fn make() -> PathBuf {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/toy-guest");
    // One directory per process: test binaries may run beside each other.
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("toy-guest-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    let flags = "-O2 -Wall -Werror -ffreestanding -nostdlib -static -no-pie -fno-pic -fno-stack-protector \
                 -mno-red-zone -mgeneral-regs-only -fcf-protection=none -Wa,--noexecstack";
    let link = ["-Wl,--build-id=none,--no-warn-rwx-segments", "-T"];
    let run = |program: &str, words: &[&str]| {
        let output = Command::new(program).current_dir(&dir).args(words).output().unwrap();
        assert!(output.status.success(), "{program} {words:?}: {}", String::from_utf8_lossy(&output.stderr));
    };
    let file = |name: &str| source.join(name).to_str().unwrap().to_owned();
    let (start, guest, virtio, script) = (file("start.S"), file("guest.c"), file("virtio.c"), file("link.ld"));
    let flags: Vec<&str> = flags.split_whitespace().collect();
    let elf = [&flags[..], &link, &[&script, "-o", "toy.elf", &start, &guest, &virtio]].concat();
    run("cc", &elf);
    run("objcopy", &["-O", "binary", "toy.elf", "toy.bin"]);
    run("cc", &["-c", &file("header.S"), "-o", "header.o"]);
    run("objcopy", &["-O", "binary", "-j", ".start", "header.o", "header.bin"]);
    let parts = ["header.bin", "toy.bin"].map(|name| std::fs::read(dir.join(name)).unwrap());
    std::fs::write(dir.join("toy.bz"), parts.concat()).unwrap();
    dir
}

/// Returns settings for a guest with orders.
pub(crate) fn settings(orders: &str) -> Settings {
    Settings {
        boot: Boot { kernel: kernel(Way::Pvh), initrd: None, command_line: orders.into() },
        memory: 32 * MIB,
        cpus: 1,
        disks: Vec::new(),
        nets: Vec::new(),
        generation: Uuid::new_v4(),
    }
}

/// Adds a disk.
pub(crate) fn with_disk(mut settings: Settings, device: Arc<dyn BlockDevice>) -> Settings {
    settings.disks.push(DiskSettings { device, read_only: false, serial: "disk-of-the-test".into() });
    settings
}

/// Starts a guest.
pub(crate) fn start(settings: &Settings) -> Arc<Machine> {
    let machine = Arc::new(Machine::new(settings).unwrap());
    machine.resume();
    machine
}

/// Runs a guest to its end; returns what it said, and how it ended.
pub(crate) fn run(settings: &Settings) -> (String, Ending) {
    let machine = start(settings);
    let ending = wait(&machine);
    (said(&machine), ending)
}

/// Waits for the end of a guest, which is stopped with what it said if that does not come.
pub(crate) fn wait(machine: &Arc<Machine>) -> Ending {
    let watched = Arc::clone(machine);
    let (done, wait) = std::sync::mpsc::channel::<()>();
    let watch = std::thread::spawn(move || {
        if wait.recv_timeout(Duration::from_secs(60)) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
            watched.stop();
            panic!("the guest does not end; it said: {}", said(&watched));
        }
    });
    let ending = machine.wait();
    drop(done);
    watch.join().unwrap();
    ending
}

/// Returns what a guest has said so far.
pub(crate) fn said(machine: &Machine) -> String {
    let log = machine.console();
    if log.range() == (0, 0) {
        return String::new();
    }
    String::from_utf8_lossy(&log.part(0).unwrap().bytes).into_owned()
}

/// Waits until a guest has said something.
pub(crate) fn wait_for(machine: &Machine, what: &str) {
    let log = machine.console();
    let mut all = String::new();
    while !all.contains(what) {
        let part = log.part(all.len() as u64).unwrap_or_else(|| panic!("it never said {what:?}, but: {all}"));
        all.push_str(&String::from_utf8_lossy(&part.bytes));
    }
}
