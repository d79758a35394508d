//! `vm checkpoint` and `vm restore`, as people and programs use them: memory, devices and disks together.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;

use afterimage::checkpoint::{Access, Folder, Found, Layout, Name, Reader};
use afterimage::media::{HostMedia, Media};
use serde_json::Value;

use super::toy::{Way, kernel, require_kvm};
use crate::cli::{Afterimage, text};
use crate::real::{require, wait_for};

/// A pool, and guests in it, which are gone with this.
pub(super) struct Place(pub(super) Afterimage);

impl Drop for Place {
    fn drop(&mut self) {
        let Ok(machines) = fs::read_dir(self.0.pool().join("vms")) else { return };
        for machine in machines.flatten() {
            // Those that do not run say so.
            self.0.run(&["vm", "stop", machine.file_name().to_str().unwrap(), "--force"]);
        }
    }
}

impl Place {
    pub(super) fn new() -> Option<Self> {
        require_kvm().then(|| Self(Afterimage::with_pool()))
    }

    /// Starts a guest in the background.
    pub(super) fn start(&self, name: &str, orders: &str, more: &[&str]) {
        let kernel = kernel(Way::Pvh);
        let words = ["vm", "run", name, "--kernel", kernel.to_str().unwrap(), "--memory", "32M", "--cmdline", orders];
        let output = self.0.run(&[&words, more, &["--detach"]].concat());
        assert!(output.status.success(), "{}", text(&output.stderr));
    }

    pub(super) fn file(&self, name: &str, file: &str) -> PathBuf {
        self.0.pool().join("vms").join(name).join(file)
    }

    pub(super) fn said(&self, name: &str) -> String {
        fs::read_to_string(self.file(name, "console.log")).unwrap_or_default()
    }

    pub(super) fn hear(&self, name: &str, what: &str) {
        wait_for(&format!("{name} says {what}; {}", self.log(name)), || self.said(name).contains(what));
    }

    pub(super) fn log(&self, name: &str) -> String {
        fs::read_to_string(self.file(name, "vmm.log")).unwrap_or_default()
    }

    pub(super) fn vm(&self, words: &[&str]) -> Value {
        self.0.json(&[&["vm"], words].concat())
    }

    pub(super) fn info(&self, name: &str) -> Value {
        self.vm(&["info", name])["vm"].clone()
    }

    pub(super) fn checkpoint(&self, vm: &str, name: &str, more: &[&str]) -> Value {
        self.vm(&[&["checkpoint", vm, "--as", name], more].concat())["checkpoint"].clone()
    }

    pub(super) fn restore(&self, name: &str, more: &[&str]) -> Value {
        self.vm(&[&["restore", name, "--detach"], more].concat())["vm"].clone()
    }

    pub(super) fn kill(&self, name: &str) {
        self.vm(&["stop", name, "--force"]);
    }

    /// Types a line.
    pub(super) fn type_in(&self, name: &str, line: &str) {
        use std::io::{BufRead, BufReader, Write};
        let mut client =
            BufReader::new(std::os::unix::net::UnixStream::connect(self.file(name, "serial.sock")).unwrap());
        let mut first = String::new();
        client.read_line(&mut first).unwrap();
        assert!(first.contains("boot="), "{first}");
        client.get_mut().write_all(line.as_bytes()).unwrap();
    }

    pub(super) fn wait_until_resident(&self, name: &str) {
        wait_for(&format!("{name} is resident"), || self.info(name)["memory"]["resident"] == true);
    }
}

#[test]
fn a_guest_goes_on_from_its_checkpoints_again_and_again() {
    let Some(place) = Place::new() else { return };
    place.start("toy", "say=begun fill=8388608,1048576,8,1 echo sum=8388608,1048576,8 button off", &[]);
    place.hear("toy", "filled");
    let saved = place.checkpoint("toy", "one", &[]);
    assert!(saved["pause-us"].as_u64().unwrap() > 0 && saved["parent"].is_null(), "{saved}");
    let again = place.0.error(&["vm", "checkpoint", "toy", "--as", "one"]);
    assert_eq!((again.0, again.1["kind"].as_str().unwrap()), (1, "exists"));
    // It runs on, and the second has little that is not in the first.
    place.type_in("toy", "first\n");
    place.hear("toy", "waiting");
    let next = place.checkpoint("toy", "two", &["--incremental"]);
    assert_eq!(next["parent"], "one");
    assert!(next["memory"]["inherited"].as_u64().unwrap() > 0, "{next}");
    assert!(next["memory"]["bytes"].as_u64().unwrap() <= saved["memory"]["bytes"].as_u64().unwrap(), "{saved} {next}");
    let busy = place.0.error(&["vm", "restore", "toy@one"]);
    assert_eq!((busy.0, busy.1["kind"].as_str().unwrap()), (4, "busy"), "it runs");
    place.kill("toy");

    let sum: u64 = (8 << 20..9 << 20).step_by(8).map(|at| at + 1).sum();
    for more in [&[][..], &["--eager"]] {
        assert_eq!(place.restore("toy@one", more)["state"], "running");
        place.type_in("toy", "second\n");
        place.hear("toy", "waiting");
        assert_eq!(place.said("toy"), format!("second\nsum {sum}\nwaiting\n"));
        if more.is_empty() {
            assert_eq!(place.info("toy")["memory"]["checkpoint"], "toy@one");
            place.wait_until_resident("toy");
        }
        place.kill("toy");
    }
    // The second is of a guest that waits for its button; it is told that it is another, which it takes for no button.
    place.restore("toy@two", &[]);
    place.hear("toy", "no button");
    wait_for("it is off", || place.info("toy")["state"] == "ended");
    let missing = place.0.error(&["vm", "restore", "toy@three"]);
    assert_eq!((missing.0, missing.1["kind"].as_str().unwrap()), (3, "not-found"));
}

#[test]
fn machines_go_on_from_one_checkpoint_side_by_side() {
    let Some(place) = Place::new() else { return };
    place.start("toy", "say=begun echo button off", &[]);
    place.hear("toy", "begun");
    place.checkpoint("toy", "one", &[]);
    for name in ["a", "b"] {
        place.restore("toy@one", &["--as", name]);
    }
    for name in ["toy", "a", "b"] {
        place.type_in(name, &format!("I am {name}\n"));
        place.hear(name, &format!("I am {name}\nwaiting"));
    }
    let there = place.0.error(&["vm", "restore", "toy@one", "--as", "a"]);
    assert_eq!(there.1["kind"], "exists");
    // A checkpoint of one that went on from another's is its own.
    place.wait_until_resident("a");
    place.checkpoint("a", "one", &[]);
    for name in ["toy", "a", "b"] {
        place.kill(name);
    }
    place.restore("a@one", &[]);
    place.hear("a", "no button");
}

#[test]
fn disks_go_back_with_the_memory_and_are_cloned_for_others() {
    let Some(place) = Place::new() else { return };
    place.0.json(&["create", "web", "-s", "64M"]);
    let orders = "write=0,16,1 say=ready echo check=0,16,1 write=0,16,2 flush say=done echo off";
    place.start("toy", orders, &["--disk", "web"]);
    place.hear("toy", "ready");
    let saved = place.checkpoint("toy", "one", &[]);
    assert_eq!(saved["disks"], serde_json::json!(["web@one"]));
    place.type_in("toy", "go\n");
    place.hear("toy", "done");
    // The snapshot cannot be removed before the checkpoint, and a clone has nothing to do with the first.
    assert_eq!(place.0.error(&["rm", "web@one"]).1["kind"], "busy");
    place.restore("toy@one", &["--as", "other"]);
    place.type_in("other", "go\n");
    place.hear("other", "done");
    assert_eq!(place.info("other")["definition"]["disks"][0]["disk"], "other-web");
    place.kill("other");
    place.kill("toy");
    place.restore("toy@one", &["--keep", "after"]);
    place.type_in("toy", "go\n");
    place.hear("toy", "done");
    assert!(place.said("toy").contains("checked"), "{}", place.said("toy"));
    place.kill("toy");
    let snapshots = place.0.json(&["ls", "web"]);
    let names: Vec<&str> =
        snapshots["snapshots"].as_array().unwrap().iter().map(|s| s["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["one", "after"]);
}

/// A machine knows its disks by the names that they had when it began.
#[test]
fn a_checkpoint_takes_no_other_disk_that_has_the_name_now() {
    let Some(place) = Place::new() else { return };
    place.0.json(&["create", "web", "-s", "1M"]);
    place.start("toy", "say=ready echo off", &["--disk", "web"]);
    place.hear("toy", "ready");
    place.0.json(&["rename", "web", "www"]);
    place.0.json(&["create", "web", "-s", "1M"]);
    let (_, error) = place.0.error(&["vm", "checkpoint", "toy", "--as", "one"]);
    assert!(error["message"].as_str().unwrap().contains("'web' is not one of the virtual machine 'toy'"), "{error}");
    for disk in ["web", "www"] {
        assert_eq!(place.0.json(&["ls", disk])["snapshots"], serde_json::json!([]), "none stays");
    }
    assert_eq!(place.info("toy")["state"], "running", "{}", place.log("toy"));
    place.kill("toy");
}

/// Where a page block of a checkpoint lies in its file, by the guest address that it has.
pub(super) fn place_of(place: &Place, name: &str, address: u64) -> (u64, u64) {
    let media: Arc<dyn Media> = Arc::new(HostMedia::new(&place.0.pool()).unwrap());
    let reader = Reader::open(&Folder::of_pool(&media), &Name::parse(name).unwrap(), Access::Cached).unwrap();
    let layer = &reader.layers()[0];
    let Found::Stored { stored, .. } = reader.place(reader.geometry().at(address).unwrap()).unwrap() else {
        panic!("there are zeros at {address:#x}");
    };
    let at = Layout::of(layer.geometry(), layer.footer()).block(stored.block);
    (at + u64::from(stored.offset), u64::from(stored.length))
}

#[test]
fn a_page_that_is_damaged_is_told_and_read_again() {
    let Some(place) = Place::new() else { return };
    place.start("toy", "say=begun fill=8388608,4194304,4096,1 echo sum=8388608,4194304,4096 say=end echo off", &[]);
    place.hear("toy", "filled");
    place.checkpoint("toy", "one", &[]);
    place.kill("toy");
    let path = place.0.pool().join("checkpoints/toy/one.ckpt");
    let file = fs::File::options().read(true).write(true).open(&path).unwrap();
    let (at, len) = place_of(&place, "toy@one", 10 << 20);
    let mut whole = vec![0; len as usize];
    file.read_exact_at(&mut whole, at).unwrap();
    let stuck = || place.info("toy")["state"] == "memory-error";
    let damaged = || {
        file.write_all_at(&vec![0x5a; len as usize], at).unwrap();
        place.restore("toy@one", &[]);
        place.type_in("toy", "go\n");
        wait_for("its memory cannot be had", stuck);
        let told = place.info("toy")["ending"].as_str().unwrap().to_owned();
        assert!(told.contains("toy@one") && told.contains("0xa00000"), "{told}");
        let (code, error) = place.0.error(&["vm", "resume", "toy"]);
        assert_eq!((code, error["kind"].as_str().unwrap()), (5, "corrupt"));
        assert_eq!(place.0.error(&["vm", "checkpoint", "toy", "--as", "two"]).1["kind"], "corrupt");
        place.hear("toy", "sum ");
        assert_eq!(place.said("toy"), "go\nsum ", "what is not there is not answered");
    };
    // It can always be ended, asked nicely as well.
    for words in [&["--force"][..], &[]] {
        damaged();
        assert_eq!(place.vm(&[&["stop", "toy"], words].concat())["vm"]["state"], "ended");
    }
    // Read again it is as damaged as before, until it is mended.
    damaged();
    place.vm(&["resume", "toy", "--retry"]);
    wait_for("it is as damaged as before", stuck);
    file.write_all_at(&whole, at).unwrap();
    place.vm(&["resume", "toy", "--retry"]);
    place.hear("toy", "end");
    let sum: u64 = (8 << 20..12 << 20).step_by(4096).map(|at| at + 1).sum();
    assert!(place.said("toy").ends_with(&format!("go\nsum {sum}\nend\n")), "{}", place.said("toy"));
    place.wait_until_resident("toy");
    place.kill("toy");
}

#[test]
fn a_machine_of_another_user_makes_checkpoints_and_goes_on() {
    let root = rustix::process::geteuid().is_root();
    if !require(root, "root") {
        return;
    }
    let Some(place) = Place::new() else { return };
    place.0.json(&["create", "web", "-s", "1M"]);
    let orders = "write=0,16,1 say=begun echo check=0,16,1 write=0,16,2 button off";
    place.start("toy", orders, &["--user", "nobody", "--disk", "web"]);
    place.hear("toy", "begun");
    place.checkpoint("toy", "one", &[]);
    assert_eq!(place.checkpoint("toy", "two", &["--incremental"])["disks"], serde_json::json!(["web@two"]));
    place.type_in("toy", "typed\n");
    place.hear("toy", "waiting");
    place.kill("toy");
    place.restore("toy@two", &[]);
    place.wait_until_resident("toy");
    place.type_in("toy", "typed\n");
    place.hear("toy", "waiting");
    place.checkpoint("toy", "three", &[]);
    place.kill("toy");
}
