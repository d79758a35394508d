//! Disks of the pool for a guest: through a server that comes and goes.

use std::fs;
use std::process::Output;
use std::time::Duration;

use afterimage::api::{Client, Request, Response};
use afterimage::pool::PoolLock;
use afterimage::progress::Silent;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use super::toy::{Way, kernel, require_kvm};
use crate::cli::{Afterimage, text};
use crate::real::{require, wait_for};

/// A pool with a disk `web`, and no server.
struct Place(Afterimage);

impl Place {
    fn new() -> Option<Self> {
        if !require_kvm() {
            return None;
        }
        let it = Afterimage::with_pool();
        it.json(&["create", "web", "-s", "64M"]);
        Some(Self(it))
    }

    fn run(&self, name: &str, orders: &str, more: &[&str]) -> Output {
        let kernel = kernel(Way::Pvh);
        let words = ["vm", "run", name, "--kernel", kernel.to_str().unwrap(), "--memory", "16M", "--cmdline", orders];
        self.0.run(&[&words, more].concat())
    }

    /// Runs a guest to its end; returns what it said.
    fn guest(&self, orders: &str, disk: &str) -> String {
        let output = self.run("other", orders, &["--disk", disk]);
        assert!(output.status.success(), "{}", text(&output.stderr));
        text(&output.stdout).to_owned()
    }

    fn start(&self, name: &str, orders: &str, disk: &str) {
        let output = self.run(name, orders, &["--disk", disk, "--detach"]);
        assert!(output.status.success(), "{}", text(&output.stderr));
    }

    fn said(&self, name: &str) -> String {
        fs::read_to_string(self.0.pool().join("vms").join(name).join("console.log")).unwrap_or_default()
    }

    fn hear(&self, name: &str, what: &str) {
        wait_for(&format!("{name} says {what}"), || self.said(name).contains(what));
    }

    fn info(&self, name: &str) -> Value {
        self.0.json(&["vm", "info", name])["vm"].clone()
    }

    fn wait_for_end(&self, name: &str) {
        wait_for(&format!("{name} ends"), || self.info(name)["state"] == "ended");
    }

    fn holder(&self) -> Value {
        self.0.json(&["info", "web"])["holder"].clone()
    }

    fn server(&self) -> Option<Pid> {
        let client = Client::find(&self.0.pool()).unwrap()?;
        let Ok(Response::Status(status)) = client.ask(&Request::Status {}, &Silent) else { return None };
        Pid::from_raw(i32::try_from(status.pid).unwrap())
    }

    /// Returns the stewards of the machines of this pool.
    fn stewards(&self) -> Vec<Pid> {
        let pool = self.0.pool();
        let is = |process: &fs::DirEntry| {
            let words = fs::read(process.path().join("cmdline")).unwrap_or_default();
            let words = String::from_utf8_lossy(&words).into_owned();
            words.contains("--steward") && words.contains(pool.to_str().unwrap())
        };
        let processes = fs::read_dir("/proc").unwrap().filter_map(Result::ok).filter(is);
        processes.filter_map(|process| Pid::from_raw(process.file_name().to_str()?.parse().ok()?)).collect()
    }

    fn wait_for_no_server(&self) {
        wait_for("the server ends", || PoolLock::take(&self.0.pool()).is_ok());
    }

    fn kill_server(&self) {
        kill_process(self.server().unwrap(), Signal::KILL).unwrap();
        self.wait_for_no_server();
    }

    fn pid(&self, name: &str) -> Pid {
        Pid::from_raw(i32::try_from(self.info(name)["pid"].as_i64().unwrap()).unwrap()).unwrap()
    }

    fn kill_machine(&self, name: &str) {
        let pid = self.pid(name);
        kill_process(pid, Signal::KILL).unwrap();
        let pid = pid.as_raw_nonzero();
        wait_for("it is gone", || !std::path::Path::new(&format!("/proc/{pid}")).exists());
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        for machine in self.0.json(&["vm", "ls"])["vms"].as_array().unwrap() {
            self.0.run(&["vm", "stop", machine["name"].as_str().unwrap(), "--force"]);
        }
        if let Ok(Some(client)) = Client::find(&self.0.pool()) {
            client.ask(&Request::Shutdown {}, &Silent).ok();
        }
    }
}

#[test]
fn a_guest_writes_to_a_disk_of_the_pool_through_a_server_that_comes_and_goes_with_it() {
    let Some(place) = Place::new() else { return };
    let said = place.guest("id zero=0,4 write=8,16,77 flush check=8,16,77 off", "web,serial=abc");
    assert_eq!(said, "id abc\nzeros\nwritten\nflushed\nchecked\n");
    place.wait_for_no_server();
    // The disk is free at once, for the command itself; and it is defined as it was.
    place.0.json(&["snapshot", "web@one"]);
    assert_eq!(place.guest("check=8,16,77 off", "web@one"), "checked\n");
    let output = place.run("other", "write=0,1,1 off", &["--disk", "web@one"]);
    assert_eq!(text(&output.stdout), "FAILED: the disk failed a request\n");
    let info = place.info("other");
    assert_eq!(info["definition"]["disks"][0], serde_json::json!({"disk": "web@one", "read-only": true, "serial": ""}));
    assert_eq!(text(&place.0.run(&["vm", "start", "other"]).stdout), "FAILED: the disk failed a request\n");
    place.0.json(&["vm", "rm", "other"]);
    place.wait_for_no_server();
    place.0.json(&["rm", "web", "--recursive"]);
}

#[test]
fn a_guest_outlives_its_server_and_loses_nothing() {
    let Some(place) = Place::new() else { return };
    place.start("toy", "say=begun write=0,500,5 check=0,500,5 flush say=done button off", "web");
    place.hear("toy", "begun");
    for _ in 0..3 {
        std::thread::sleep(Duration::from_millis(150));
        place.kill_server();
        std::thread::sleep(Duration::from_millis(100));
        place.0.json(&["serve", "--daemon"]);
        wait_for("it has come back", || place.holder() == "VM toy");
    }
    place.hear("toy", "waiting");
    assert_eq!(place.said("toy"), "begun\nwritten\nchecked\nflushed\ndone\nwaiting\n");
    // Also when nothing is under way, and from one that ended in order: it comes back by itself, and nobody else gets the
    // disk meanwhile.
    Client::find(&place.0.pool()).unwrap().unwrap().ask(&Request::Shutdown {}, &Silent).unwrap();
    place.wait_for_no_server();
    place.0.json(&["serve", "--daemon"]);
    let (code, error) = place.0.error(&["attach", "nbd", "web", "--socket", "/tmp/never.sock"]);
    assert!(code == 4 && error["message"].as_str().unwrap().contains("VM toy"), "{error}");
    wait_for("it has come back", || place.holder() == "VM toy");
    place.0.json(&["vm", "stop", "toy"]);
    place.wait_for_end("toy");
    place.wait_for_no_server();
    assert_eq!(place.guest("check=0,500,5 off", "web"), "checked\n");
}

#[test]
fn a_guest_without_a_server_is_paused_goes_on_and_can_be_stopped() {
    let Some(place) = Place::new() else { return };
    place.start("toy", "say=begun write=0,600,5 check=0,600,5 write=0,100000,6", "web");
    place.hear("toy", "begun");
    assert_eq!(place.info("toy")["waits-for-server"], false);
    place.kill_server();
    wait_for("it waits", || place.info("toy")["waits-for-server"] == true);
    let shown = place.0.run(&["vm", "ls"]).stdout;
    assert!(text(&shown).contains("toy: running (a disk waits for the server of the pool), "), "{}", text(&shown));
    place.0.json(&["vm", "pause", "toy"]);
    place.0.json(&["serve", "--daemon"]);
    wait_for("it has come back", || place.holder() == "VM toy");
    assert_eq!(place.info("toy")["state"], "paused");
    place.0.json(&["vm", "resume", "toy"]);
    place.hear("toy", "checked");
    place.kill_server();
    place.0.json(&["vm", "stop", "toy", "--force"]);
    place.wait_for_end("toy");
}

/// The pause waited for room that nobody made, and nothing else was done for the machine meanwhile.
#[test]
fn a_guest_whose_disk_waits_for_room_is_paused_and_goes_on_when_there_is_some() {
    let Some(place) = Place::new() else { return };
    place.0.json(&["set", "web", "quota=64K", "enospc=wait"]);
    place.start("toy", "say=begun write=0,400,5 check=0,400,5 button off", "web");
    wait_for("it waits", || place.0.json(&["info", "web"])["waiting"] != 0);
    for _ in 0..2 {
        place.0.json(&["vm", "pause", "toy"]);
        place.0.json(&["vm", "resume", "toy"]);
    }
    place.0.json(&["vm", "pause", "toy"]);
    place.0.json(&["set", "web", "quota=none"]);
    place.0.json(&["vm", "resume", "toy"]);
    place.hear("toy", "waiting");
    assert_eq!(place.said("toy"), "begun\nwritten\nchecked\nwaiting\n");
}

#[test]
fn a_guest_is_told_when_its_disk_grows_and_goes_on_meanwhile() {
    let Some(place) = Place::new() else { return };
    place.start("toy", "size write=140000,1000,7 check=140000,1000,7 button off", "web");
    place.hear("toy", "sectors 131072\n");
    place.0.json(&["resize", "web", "128M"]);
    place.hear("toy", "waiting");
    assert_eq!(place.said("toy"), "sectors 131072\nsectors 262144\nwritten\nchecked\nwaiting\n");
    assert_eq!(place.holder(), "VM toy");
}

/// Only root reaches the server of this pool, and the machine is nobody's by then.
#[test]
fn a_machine_of_another_user_comes_back_to_its_disks_and_to_no_others() {
    if !require(rustix::process::geteuid().is_root(), "root") {
        return;
    }
    let Some(place) = Place::new() else { return };
    let words = ["--disk", "web", "--user", "nobody", "--detach"];
    let output = place.run("toy", "say=begun write=0,500,5 check=0,500,5 flush button off", &words);
    assert!(output.status.success(), "{}", text(&output.stderr));
    for _ in 0..3 {
        place.hear("toy", "begun");
        std::thread::sleep(Duration::from_millis(150));
        place.kill_server();
        std::thread::sleep(Duration::from_millis(100));
        place.0.json(&["serve", "--daemon"]);
        wait_for("it has come back", || place.holder() == "VM toy");
    }
    place.hear("toy", "waiting");
    assert_eq!(place.said("toy"), "begun\nwritten\nchecked\nflushed\nwaiting\n");
    let status = fs::read_to_string(format!("/proc/{}/status", place.info("toy")["pid"])).unwrap();
    assert!(status.contains("\nUid:\t") && !status.contains("\nUid:\t0"), "{status}");
    // Ended in order, its disk is free when it has ended; killed, a little later. No steward stays behind.
    place.0.json(&["vm", "stop", "toy"]);
    place.wait_for_no_server();
    place.0.json(&["snapshot", "web@one"]);
    place.0.json(&["vm", "start", "toy", "--detach"]);
    assert_eq!(place.holder(), "VM toy");
    place.kill_machine("toy");
    place.wait_for_no_server();
    wait_for("its steward has ended", || place.stewards().is_empty());
    assert_eq!(place.guest("check=0,500,5 off", "web"), "checked\n");
}

#[test]
fn a_command_without_a_server_keeps_the_disk_for_a_machine_that_runs_and_for_none_that_has_ended() {
    let Some(place) = Place::new() else { return };
    place.start("toy", "say=begun button off", "web");
    place.hear("toy", "begun");
    place.kill_server();
    for words in [&["rm", "web"][..], &["resize", "web", "32M", "--shrink"]] {
        let (code, error) = place.0.error(words);
        assert!(code == 4 && error["message"].as_str().unwrap().contains("VM toy"), "{error}");
    }
    let exports = place.0.json(&["exports"]);
    let kept = serde_json::json!({"disk": "web", "holder": "VM toy", "vm": "toy", "seconds": null});
    assert_eq!((&exports["exports"], &exports["awaited"][0]), (&serde_json::json!([]), &kept));
    let shown = place.0.run(&["exports"]).stdout;
    assert!(text(&shown).contains("disk 'web' is kept for VM toy until a minute after"), "{}", text(&shown));
    // The machine has gone on waiting, and what it has is still its own.
    place.0.json(&["serve", "--daemon"]);
    wait_for("it has come back", || place.holder() == "VM toy");
    place.kill_server();
    place.kill_machine("toy");
    place.0.json(&["rm", "web"]);
}

/// Another machine started the server and ended with it, and the first one waited on with its time running out.
#[test]
fn a_server_waits_for_a_machine_that_runs_although_nothing_is_attached() {
    let Some(place) = Place::new() else { return };
    place.0.json(&["create", "db", "-s", "1M"]);
    place.start("toy", "say=begun button off", "web");
    place.hear("toy", "begun");
    let machine = place.pid("toy");
    kill_process(machine, Signal::STOP).unwrap();
    place.kill_server();
    assert_eq!(place.guest("zero=0,1 off", "db"), "zeros\n");
    std::thread::sleep(Duration::from_millis(300));
    assert!(place.server().is_some());
    let awaited = place.0.json(&["exports"])["awaited"].clone();
    assert!(awaited[0]["vm"] == "toy" && awaited[0]["seconds"].as_u64().unwrap() <= 60, "{awaited}");
    kill_process(machine, Signal::CONT).unwrap();
    wait_for("it has come back", || place.holder() == "VM toy");
    place.0.json(&["vm", "stop", "toy"]);
    place.wait_for_no_server();
}

#[test]
fn a_machine_ends_although_its_server_does_not_answer() {
    let Some(place) = Place::new() else { return };
    place.start("toy", "say=begun write=0,100000,5 off", "web");
    place.hear("toy", "begun");
    let server = place.server().unwrap();
    kill_process(server, Signal::STOP).unwrap();
    place.0.json(&["vm", "pause", "toy"]);
    place.0.json(&["vm", "resume", "toy"]);
    place.0.json(&["vm", "stop", "toy", "--force"]);
    kill_process(server, Signal::CONT).unwrap();
    place.wait_for_no_server();
    assert_eq!(place.holder(), Value::Null);
}

#[test]
fn a_machine_without_its_steward_goes_on_and_fails_when_the_server_goes() {
    if !require(rustix::process::geteuid().is_root(), "root") {
        return;
    }
    let Some(place) = Place::new() else { return };
    let words = ["--disk", "web", "--user", "nobody", "--detach"];
    let output = place.run("toy", "say=begun write=0,100000,5 off", &words);
    assert!(output.status.success(), "{}", text(&output.stderr));
    place.hear("toy", "begun");
    let steward = place.stewards();
    assert_eq!(steward.len(), 1);
    kill_process(steward[0], Signal::KILL).unwrap();
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!((place.info("toy")["state"].as_str(), place.said("toy").as_str()), (Some("running"), "begun\n"));
    place.kill_server();
    place.wait_for_end("toy");
    assert_eq!(place.said("toy"), "begun\nFAILED: the disk failed a request\n");
}

#[test]
fn a_machine_that_is_killed_lets_go_of_its_disk_and_what_was_flushed_is_there() {
    let Some(place) = Place::new() else { return };
    place.start("toy", "write=0,64,5 flush say=safe write=64,100000,6 off", "web");
    place.hear("toy", "safe");
    assert_eq!(place.holder(), "VM toy");
    place.kill_machine("toy");
    assert_eq!(place.guest("check=0,64,5 off", "web"), "checked\n");
    place.wait_for_no_server();
    assert_eq!(place.holder(), Value::Null);
}

#[test]
fn a_disk_in_use_is_refused_with_the_name_of_who_has_it() {
    let Some(place) = Place::new() else { return };
    place.start("toy", "say=begun button off", "web");
    place.hear("toy", "begun");
    for detach in [&[][..], &["--detach"]] {
        let output = place.run("other", "off", &[&["--disk", "web"], detach].concat());
        assert_eq!(output.status.code(), Some(4));
        assert!(text(&output.stderr).contains("disk 'web' is open for writing by VM toy"), "{}", text(&output.stderr));
    }
    let (code, error) = place.0.error(&["rm", "web"]);
    assert!(code == 4 && error["message"].as_str().unwrap().contains("VM toy"), "{error}");
    // Reading beside it is allowed.
    assert_eq!(place.guest("zero=0,1 off", "web,ro"), "zeros\n");
    let exports = place.0.json(&["exports"])["exports"].clone();
    assert_eq!((&exports[0]["vm"], &exports[0]["writing"]), (&"toy".into(), &serde_json::json!(["web"])), "{exports}");
    // What a person detaches is taken away from the guest, for good: the disk is free at once, and a server that comes next
    // does not give it back.
    place.0.json(&["detach", "web"]);
    place.wait_for_no_server();
    assert_eq!(place.0.json(&["exports"])["awaited"], serde_json::json!([]));
    place.0.json(&["snapshot", "web@one"]);
    place.0.json(&["revert", "web@one"]);
    place.0.json(&["rm", "web", "--recursive"]);
    assert_eq!(place.info("toy")["state"], "running");
}

#[test]
fn a_guest_whose_disk_was_taken_gets_errors_and_does_not_wait() {
    let Some(place) = Place::new() else { return };
    place.start("toy", "say=begun write=0,100000,5 off", "web");
    place.hear("toy", "begun");
    place.0.json(&["detach", "web"]);
    place.wait_for_end("toy");
    assert_eq!(place.said("toy"), "begun\nFAILED: the disk failed a request\n");
    // In another life it has it again.
    assert_eq!(place.guest("write=0,1,5 check=0,1,5 off", "web"), "written\nchecked\n");
}

#[test]
fn a_snapshot_holds_what_the_guest_had_flushed_while_it_writes_on() {
    let Some(place) = Place::new() else { return };
    place.start("toy", "write=0,64,5 flush say=safe write=64,100000,6 off", "web");
    place.hear("toy", "safe");
    place.0.json(&["snapshot", "web@one"]);
    assert_eq!(place.info("toy")["state"], "running");
    assert_eq!(place.guest("check=0,64,5 off", "web@one"), "checked\n");
}

#[test]
fn what_a_disk_of_the_pool_cannot_be_is_told_before_anything_starts() {
    let Some(place) = Place::new() else { return };
    for (disk, code, why) in [
        ("db", 3, "there is no disk 'db'"),
        ("web@never", 3, "never"),
        ("a@b@c", 2, "b@c"),
        ("web,rw", 2, "'rw' is not understood"),
    ] {
        for detach in [&[][..], &["--detach"]] {
            let output = place.run("toy", "off", &[&["--disk", disk], detach].concat());
            assert_eq!(output.status.code(), Some(code), "{disk} {}", text(&output.stderr));
            assert!(text(&output.stderr).contains(why), "{disk} {}", text(&output.stderr));
        }
    }
    let output = place.run("toy", "off", &["--disk", "web", "--disk", "web"]);
    assert_eq!(output.status.code(), Some(2), "{}", text(&output.stderr));
    place.wait_for_no_server();
    // Somebody has the pool, and does not answer.
    let lock = PoolLock::take(&place.0.pool()).unwrap();
    let output = place.run("toy", "off", &["--disk", "web"]);
    assert_eq!(output.status.code(), Some(4), "{}", text(&output.stderr));
    drop(lock);
}

#[test]
fn a_machine_gets_back_only_what_was_kept_for_it() {
    let Some(place) = Place::new() else { return };
    place.start("toy", "say=begun button off", "web");
    let client = Client::find(&place.0.pool()).unwrap().unwrap();
    let ask_to = |vm: &str, claim: Option<&str>, read_only| {
        let (vm, disk, claim) = (vm.to_owned(), "web".to_owned(), claim.map(str::to_owned));
        client.ask(&Request::AttachVm { vm, disk, read_only, claim }, &Silent)
    };
    let ask = |vm: &str, claim: Option<&str>| ask_to(vm, claim, false);
    fs::create_dir(place.0.pool().join("vms/other")).unwrap();
    let kind = |vm: &str, claim: &str| ask(vm, Some(claim)).unwrap_err().kind().name();
    assert_eq!(
        (kind("other", "disk-1"), kind("toy", "nonsense"), kind("toy", "disk-99")),
        ("denied", "usage", "not-found")
    );
    assert_eq!(ask("../x", None).unwrap_err().kind().name(), "usage");
    assert_eq!(ask("none", None).unwrap_err().kind().name(), "not-found");
    // Who has it may ask again, also under a new name of the disk.
    place.0.json(&["rename", "web", "www"]);
    let Response::VmDisk(disk) = ask("toy", Some("disk-1")).unwrap() else { panic!() };
    assert_eq!((disk.name.as_str(), disk.claim.as_str()), ("www", "disk-1"));
    // What was detached is not had again with the claim, and is in another life.
    place.0.json(&["create", "db", "-s", "1M"]);
    place.0.json(&["attach", "nbd", "db", "--socket", place.0.pool().join("db.sock").to_str().unwrap()]);
    place.0.json(&["detach", "www"]);
    let refused = |read_only| ask_to("toy", Some("disk-1"), read_only).unwrap_err().kind().name();
    assert_eq!((refused(false), refused(true)), ("denied", "denied"));
    place.0.json(&["rename", "www", "web"]);
    assert!(matches!(ask("toy", None), Ok(Response::VmDisk(_))));
    assert!(matches!(ask("toy", Some("disk-1")), Ok(Response::VmDisk(_))));
}
