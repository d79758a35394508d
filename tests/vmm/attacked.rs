//! Checkpoints that are damaged where it hurts most, and restores that fail half way: nothing hangs, nothing is left.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use afterimage::checkpoint::{Access, Folder, Name, Reader};
use afterimage::media::{HostMedia, Media};
use afterimage::pool::PoolLock;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use super::checkpoints::{Place, place_of};
use crate::real::{FileSystem, Loop, require, require_loop, require_programs, run, wait_for};

/// How long a command may take that is to fail.
const PATIENCE: Duration = Duration::from_secs(60);

/// Runs a command that must fail, and not hang; returns its exit code and the error.
fn fails(mut command: Command) -> (i32, Value) {
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let until = Instant::now() + PATIENCE;
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if Instant::now() > until {
            child.kill().unwrap();
            child.wait().unwrap();
            panic!("{command:?} hangs");
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    let mut told = String::new();
    child.stderr.take().unwrap().read_to_string(&mut told).unwrap();
    let lines = told.lines().find_map(|line| serde_json::from_str::<Value>(line).ok());
    let error = lines.unwrap_or_else(|| panic!("{command:?} said {told}"))["error"].clone();
    (status.code().unwrap(), error)
}

/// Damages a page block of a checkpoint, and mends it again when it is dropped.
struct Damage {
    file: File,
    at: u64,
    whole: Vec<u8>,
}

impl Damage {
    fn of(place: &Place, name: &str, address: u64) -> Self {
        let path = place.0.pool().join("checkpoints").join(name.replace('@', "/") + ".ckpt");
        let file = File::options().read(true).write(true).open(path).unwrap();
        let (at, len) = place_of(place, name, address);
        let mut whole = vec![0; len as usize];
        file.read_exact_at(&mut whole, at).unwrap();
        file.write_all_at(&vec![0x5a; whole.len()], at).unwrap();
        Self { file, at, whole }
    }
}

impl Drop for Damage {
    fn drop(&mut self) {
        self.file.write_all_at(&self.whole, self.at).unwrap();
    }
}

fn names(place: &Place) -> Vec<String> {
    let disks = place.0.json(&["ls"]);
    disks["disks"].as_array().unwrap().iter().map(|disk| disk["name"].as_str().unwrap().to_owned()).collect()
}

/// What tells the guest that it is another life of itself is written before anybody could be asked what is to be done.
#[test]
fn a_machine_whose_first_page_is_damaged_is_refused_and_leaves_nothing() {
    let Some(place) = Place::new() else { return };
    place.0.json(&["create", "web", "-s", "1M"]);
    place.start("toy", "say=begun echo say=end off", &["--disk", "web"]);
    place.hear("toy", "begun");
    place.checkpoint("toy", "one", &[]);
    place.kill("toy");
    {
        let damage = Damage::of(&place, "toy@one", 0xf_f000);
        for more in [&[][..], &["--as", "other"]] {
            let words = [&["--json", "vm", "restore", "toy@one"], more].concat();
            let (code, error) = fails(place.0.command(&words));
            let told = error["message"].as_str().unwrap();
            assert_eq!((code, error["kind"].as_str().unwrap()), (5, "corrupt"), "{error}");
            let offset = (damage.at >> 20 << 20).to_string();
            let named = told.contains("0xf0000") && told.contains("toy@one");
            assert!(named && (told.contains(&damage.at.to_string()) || told.contains(&offset)), "{told}");
            assert_eq!(names(&place), ["web"], "no clone stays");
            assert!(!place.file("other", "").exists(), "no machine stays");
            assert_eq!(place.info("toy")["state"], "ended");
        }
    }
    place.restore("toy@one", &[]);
    place.type_in("toy", "go\n");
    place.hear("toy", "end");
}

/// A device looks at its queue as soon as the machine goes on, before the guest touches it.
#[test]
fn a_machine_whose_queue_is_damaged_stands_still_and_can_be_ended() {
    let Some(place) = Place::new() else { return };
    place.0.json(&["create", "web", "-s", "1M"]);
    place.start("toy", "write=0,16,1 say=ready echo write=0,16,2 say=done off", &["--disk", "web"]);
    place.hear("toy", "ready");
    place.checkpoint("toy", "one", &[]);
    place.kill("toy");
    let media: Arc<dyn Media> = Arc::new(HostMedia::new(&place.0.pool()).unwrap());
    let name = Name::parse("toy@one").unwrap();
    let reader = Reader::open(&Folder::of_pool(&media), &name, Access::Cached).unwrap();
    let state: Value = serde_json::from_slice(&reader.state().unwrap()).unwrap();
    drop(reader);
    let queue = state["state"]["virtio"][0]["queues"][0]["available"].as_u64().unwrap();
    let damage = Damage::of(&place, "toy@one", queue);
    for words in [&["--force"][..], &[]] {
        place.restore("toy@one", &[]);
        wait_for("its memory cannot be had", || place.info("toy")["state"] == "memory-error");
        let why = place.info("toy")["ending"].as_str().unwrap().to_owned();
        assert!(why.contains("toy@one") && why.contains(&format!("{:#x}", queue >> 16 << 16)), "{why}");
        let begun = Instant::now();
        assert_eq!(place.vm(&[&["stop", "toy"], words].concat())["vm"]["state"], "ended");
        assert!(begun.elapsed() < PATIENCE);
    }
    drop(damage);
    place.restore("toy@one", &[]);
    place.type_in("toy", "go\n");
    place.hear("toy", "done");
}

/// The last thing that can fail is giving up rights; by then the disks are cloned and the machine is defined.
#[test]
fn a_restore_that_fails_at_its_end_leaves_nothing() {
    let root = rustix::process::geteuid().is_root();
    if !require(root, "root") || !require_programs(&["setpriv"]) {
        return;
    }
    let Some(place) = Place::new() else { return };
    place.0.json(&["create", "web", "-s", "1M"]);
    place.start("toy", "say=begun echo say=end off", &["--user", "nobody", "--disk", "web"]);
    place.hear("toy", "begun");
    place.checkpoint("toy", "one", &[]);
    place.kill("toy");
    let defined = fs::read(place.file("toy", "vm.json")).unwrap();
    for more in [&[][..], &["--as", "other"]] {
        let whole = place.0.command(&[&["--json", "vm", "restore", "toy@one"], more].concat());
        let mut command = Command::new("setpriv");
        command.args(["--bounding-set", "-setuid,-setgid", "--"]).arg(whole.get_program()).args(whole.get_args());
        command.env("AFTERIMAGE_POOL", place.0.pool()).stdin(Stdio::null());
        let (_, error) = fails(command);
        assert!(error["message"].as_str().unwrap().contains("cannot become the user"), "{error}");
        assert_eq!(names(&place), ["web"], "no clone stays");
        assert!(!place.file("other", "").exists(), "no machine stays");
        assert!(fs::read(place.file("toy", "vm.json")).unwrap() == defined, "the machine is what it was");
    }
    place.restore("toy@one", &["--as", "other"]);
    place.type_in("other", "go\n");
    place.hear("other", "end");
}

fn kill_machine(place: &Place, name: &str) {
    let pid = i32::try_from(place.info(name)["pid"].as_i64().unwrap()).unwrap();
    kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL).unwrap();
    wait_for("it is gone", || !std::path::Path::new(&format!("/proc/{pid}")).exists());
}

/// Killed at any moment of a save: the checkpoint before is what it was, and of the new one there is all or nothing.
#[test]
fn a_machine_that_is_killed_while_it_is_saved_leaves_the_old_or_the_new() {
    let Some(place) = Place::new() else { return };
    place.0.json(&["create", "web", "-s", "1M"]);
    place.start("toy", "write=0,16,1 fill=8388608,16777216,8,1 echo check=0,16,1 say=end off", &["--disk", "web"]);
    place.hear("toy", "filled");
    place.checkpoint("toy", "one", &[]);
    let (mut made, mut none) = (0, 0);
    for round in 0..14_u64 {
        let mut saving = place.0.command(&["vm", "checkpoint", "toy", "--as", "two"]);
        let mut saving = saving.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        match round {
            13 => drop(saving.wait().unwrap()),
            _ => std::thread::sleep(Duration::from_millis(4 + round * 12)),
        }
        kill_machine(&place, "toy");
        saving.wait().unwrap();
        // With a server that lives on, and with one that begins again.
        if round % 2 == 0 {
            wait_for("the server ends", || PoolLock::take(&place.0.pool()).is_ok());
        }
        place.0.json(&["check"]);
        place.0.json(&["checkpoint", "verify", "toy@one"]);
        let there = place.0.run(&["checkpoint", "info", "toy@two"]).status.success();
        if there {
            place.0.json(&["checkpoint", "verify", "toy@two"]);
            place.0.json(&["checkpoint", "rm", "toy@two"]);
            place.0.json(&["rm", "web@two"]);
            made += 1;
        } else {
            none += 1;
        }
        place.restore("toy@one", &[]);
        // Nothing of the one that was killed is in the way of one of that name.
        if !there && round % 3 == 0 {
            place.checkpoint("toy", "two", &[]);
            place.kill("toy");
            place.0.json(&["checkpoint", "rm", "toy@two"]);
            place.0.json(&["rm", "web@two"]);
            place.restore("toy@one", &[]);
        }
        let folder = fs::read_dir(place.0.pool().join("checkpoints/toy")).unwrap();
        let files: Vec<_> = folder.map(|file| file.unwrap().file_name().into_string().unwrap()).collect();
        assert!(files.iter().all(|file| !file.ends_with(".new")), "{files:?}");
        let snapshots = place.0.json(&["ls", "web"])["snapshots"].clone();
        let names: Vec<_> = snapshots.as_array().unwrap().iter().map(|it| it["name"].as_str().unwrap()).collect();
        assert_eq!(names, ["one"], "round {round}");
    }
    place.type_in("toy", "go\n");
    place.hear("toy", "end");
    assert!(place.said("toy").contains("checked"), "{}", place.said("toy"));
    assert!(made > 0 && none > 0, "{made} were made, {none} were not");
}

/// A host that is full in the middle of a save: the guest runs on, and nothing is left.
#[test]
fn a_full_file_system_ends_a_save_and_not_the_guest() {
    let root = rustix::process::geteuid().is_root();
    if !require(root, "root") || !require_loop() || !require_programs(&["mkfs.ext4", "mount"]) {
        return;
    }
    let Some(place) = Place::new() else { return };
    place.0.json(&["create", "web", "-s", "1M"]);
    let image = place.0.path("image");
    File::create(&image).unwrap().set_len(6 << 20).unwrap();
    run("mkfs.ext4", [OsStr::new("-q"), OsStr::new("-O"), OsStr::new("^has_journal"), image.as_os_str()]);
    let device = Loop::attach(&image, &[]);
    let folder = place.0.pool().join("checkpoints/toy");
    let _small = FileSystem::mount(&device, &folder, "rw");
    let orders = "write=0,16,1 say=begun echo fill=8388608,20971520,8,1 echo check=0,16,1 say=end off";
    place.start("toy", orders, &["--disk", "web"]);
    place.hear("toy", "begun");
    place.checkpoint("toy", "one", &[]);
    place.type_in("toy", "more\n");
    place.hear("toy", "filled");
    for more in [&["--incremental"][..], &[]] {
        let words = [&["vm", "checkpoint", "toy", "--as", "two"], more].concat();
        let (code, error) = place.0.error(&words);
        assert_eq!((code, error["kind"].as_str().unwrap()), (6, "no-space"), "{error}");
    }
    assert_eq!(place.info("toy")["state"], "running", "{}", place.log("toy"));
    assert!(!folder.join("two.ckpt.new").exists() && !folder.join("two.ckpt").exists());
    let snapshots = place.0.json(&["ls", "web"])["snapshots"].clone();
    assert_eq!(snapshots.as_array().unwrap().len(), 1, "{snapshots}");
    place.type_in("toy", "go\n");
    place.hear("toy", "end");
    wait_for("it is off", || place.info("toy")["state"] == "ended");
    place.restore("toy@one", &[]);
    place.wait_until_resident("toy");
    let pid = place.info("toy")["pid"].as_i64().unwrap();
    place.kill("toy");
    wait_for("nobody uses the small file system", || !std::path::Path::new(&format!("/proc/{pid}")).exists());
}

/// The same in ring 0, with interrupts off: the guest waits for its page, and is read again or ended.
#[test]
fn a_kernel_whose_page_is_damaged_waits_is_read_again_and_can_be_ended() {
    let Some(place) = Place::new() else { return };
    place.start("toy", "fill=8388608,1048576,8,1 echo peek=9437176 say=end off", &[]);
    place.hear("toy", "filled");
    place.checkpoint("toy", "one", &[]);
    place.kill("toy");
    let damaged = || {
        let damage = Damage::of(&place, "toy@one", 9_437_176);
        place.restore("toy@one", &[]);
        place.type_in("toy", "go\n");
        wait_for("its memory cannot be had", || place.info("toy")["state"] == "memory-error");
        let why = place.info("toy")["ending"].as_str().unwrap().to_owned();
        assert!(why.contains("toy@one") && why.contains("0x8f0000"), "{why}");
        damage
    };
    for words in [&["--force"][..], &[]] {
        let _damage = damaged();
        assert_eq!(place.vm(&[&["stop", "toy"], words].concat())["vm"]["state"], "ended");
        assert!(!place.said("toy").contains("peek 0"), "what is not there is not answered");
    }
    let damage = damaged();
    place.vm(&["resume", "toy", "--retry"]);
    wait_for("it is as damaged as before", || place.info("toy")["state"] == "memory-error");
    drop(damage);
    place.vm(&["resume", "toy", "--retry"]);
    place.hear("toy", "end");
    assert!(place.said("toy").contains("peek 9437177"), "{}", place.said("toy"));
    wait_for("it is off", || place.info("toy")["state"] == "ended");
}
