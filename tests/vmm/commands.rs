//! `vm ...`, as people and programs use it, with the guest that does as it is told.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Output, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use super::toy::{Way, kernel, require_kvm};
use crate::cli::{Afterimage, text};
use crate::real::wait_for;

/// A pool in a directory, and the words that start a guest with orders.
pub(super) struct Place(pub(super) Afterimage);

impl Place {
    pub(super) fn new() -> Option<Self> {
        require_kvm().then(|| Self(Afterimage::with_pool()))
    }

    pub(super) fn command(&self, name: &str, orders: &str, more: &[&str]) -> Command {
        let kernel = kernel(Way::Pvh);
        let words = ["vm", "run", name, "--kernel", kernel.to_str().unwrap(), "--memory", "16M", "--cmdline", orders];
        self.0.command(&[&words, more].concat())
    }

    pub(super) fn run(&self, name: &str, orders: &str, more: &[&str]) -> Output {
        self.command(name, orders, more).output().unwrap()
    }

    fn start(&self, name: &str, orders: &str) {
        let output = self.run(name, orders, &["--detach"]);
        assert!(output.status.success(), "{}", text(&output.stderr));
    }

    pub(super) fn vm(&self, words: &[&str]) -> Value {
        self.0.json(&[&["vm"], words].concat())
    }

    pub(super) fn state(&self, name: &str) -> String {
        self.vm(&["info", name])["vm"]["state"].as_str().unwrap().to_owned()
    }

    fn wait_for_end(&self, name: &str) {
        wait_for(&format!("{name} ends"), || self.state(name) == "ended");
    }

    pub(super) fn file(&self, name: &str, file: &str) -> std::path::PathBuf {
        self.0.pool().join("vms").join(name).join(file)
    }
}

/// Waits for a line of a guest in the foreground.
pub(super) fn hear(child: &mut Child, what: &str) {
    let mut lines = BufReader::new(child.stdout.as_mut().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap().contains(what)), "it never said {what}");
}

#[test]
fn a_guest_in_the_foreground_shows_what_it_says_and_how_it_ended() {
    let Some(place) = Place::new() else { return };
    let output = place.run("toy", "say=hello off", &[]);
    assert_eq!((output.status.code(), text(&output.stdout)), (Some(0), "hello\n"), "{}", text(&output.stderr));
    assert!(text(&output.stderr).contains("switched itself off"));
    assert_eq!(fs::read_to_string(place.file("toy", "console.log")).unwrap(), "hello\n");
    let output = place.run("toy", "say=again crash", &[]);
    assert_eq!((output.status.code(), text(&output.stdout)), (Some(1), "again\n"));
    assert!(text(&output.stderr).contains("the guest crashed"), "{}", text(&output.stderr));
    // What was defined last is what starts.
    let output = place.0.run(&["vm", "start", "toy"]);
    assert_eq!((output.status.code(), text(&output.stdout)), (Some(1), "again\n"));
    assert_eq!(fs::metadata(place.file("toy", "")).unwrap().permissions().mode() & 0o777, 0o700);
}

#[test]
fn a_guest_in_the_background_is_paused_resumed_and_stopped() {
    let Some(place) = Place::new() else { return };
    assert_eq!(place.vm(&["ls"])["vms"].as_array().unwrap().len(), 0);
    place.start("toy", "say=hello button off");
    assert_eq!(place.state("toy"), "running");
    for (word, state) in [("pause", "paused"), ("pause", "paused"), ("resume", "running"), ("resume", "running")] {
        assert_eq!(place.vm(&[word, "toy"])["vm"]["state"], state);
    }
    assert_eq!(place.vm(&["ls"])["vms"][0]["name"], "toy");
    // What runs is neither started nor defined anew nor removed.
    for words in [&["vm", "start", "toy"][..], &["vm", "start", "toy", "--detach"], &["vm", "rm", "toy"]] {
        let (code, error) = place.0.error(words);
        assert_eq!((code, error["kind"].as_str().unwrap()), (4, "busy"), "{words:?}");
    }
    wait_for("it waits for the button", || {
        fs::read_to_string(place.file("toy", "console.log")).unwrap_or_default().contains("waiting")
    });
    assert_eq!(place.vm(&["stop", "toy"])["vm"]["state"], "ended");
    assert!(fs::read_to_string(place.file("toy", "console.log")).unwrap().ends_with("button\n"));
    assert!(!place.file("toy", "api.sock").exists() && !place.file("toy", "serial.sock").exists());
    place.vm(&["rm", "toy"]);
    assert_eq!(place.0.error(&["vm", "info", "toy"]).0, 3);
}

#[test]
fn a_guest_that_does_not_listen_is_ended_when_asked_twice_or_when_its_time_is_over() {
    let Some(place) = Place::new() else { return };
    for words in [&["--force"][..], &["--patience", "1"], &[]] {
        place.start("toy", "forever");
        let mut asking = words.is_empty().then(|| place.0.command(&["vm", "stop", "toy"]).spawn().unwrap());
        if asking.is_some() {
            wait_for("it was asked", || place.state("toy") == "stopping");
        }
        assert_eq!(place.vm(&[&["stop", "toy"], words].concat())["vm"]["state"], "ended");
        assert_eq!(place.0.error(&["vm", "stop", "toy"]).0, 3);
        if let Some(asking) = &mut asking {
            assert!(asking.wait().unwrap().success());
        }
    }
}

#[test]
fn what_could_not_be_started_is_not_defined() {
    let Some(place) = Place::new() else { return };
    for more in [&[][..], &["--detach"]] {
        let bad = place.run("toy", "off", &[&["--disk", "/no/such/disk"], more].concat());
        assert_eq!(bad.status.code(), Some(3), "{}", text(&bad.stderr));
        assert!(!place.file("toy", "").exists());
        assert_eq!(place.0.error(&["vm", "info", "toy"]).0, 3);
    }
    assert_eq!(place.run("toy", "say=first off", &[]).status.code(), Some(0));
    for more in [&[][..], &["--detach"]] {
        let bad = place.run("toy", "say=second off", &[&["--disk", "/no/such/disk"], more].concat());
        assert_eq!(bad.status.code(), Some(3), "{}", text(&bad.stderr));
        assert_eq!(text(&place.0.run(&["vm", "start", "toy"]).stdout), "first\n", "what was defined before");
    }
}

#[test]
fn a_guest_is_told_that_its_disk_has_grown() {
    let Some(place) = Place::new() else { return };
    let disk = place.0.path("disk.raw");
    fs::write(&disk, [0; 65536]).unwrap();
    let words = ["--disk", disk.to_str().unwrap()];
    let mut child = place.command("toy", "size write=200,1,7 check=200,1,7 off", &words);
    let mut child = child.stdout(Stdio::piped()).spawn().unwrap();
    hear(&mut child, "sectors 128");
    fs::File::options().write(true).open(&disk).unwrap().set_len(1 << 20).unwrap();
    hear(&mut child, "sectors 2048");
    hear(&mut child, "checked");
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

#[test]
fn a_signal_presses_the_button_and_a_second_one_ends_the_guest() {
    let Some(place) = Place::new() else { return };
    let mut child = place.command("toy", "button off", &[]).stdout(Stdio::piped()).spawn().unwrap();
    hear(&mut child, "waiting");
    kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
    let mut rest = String::new();
    child.stdout.take().unwrap().read_to_string(&mut rest).unwrap();
    assert_eq!((child.wait().unwrap().code(), rest.as_str()), (Some(0), "button\n"));

    let mut child = place.command("toy", "say=begun forever", &[]).stdout(Stdio::piped()).spawn().unwrap();
    hear(&mut child, "begun");
    kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
    wait_for("the first signal is heard", || place.state("toy") == "stopping");
    kill_process(Pid::from_child(&child), Signal::INT).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(7), "it did not end of itself");
    // The same from the definition, and when it is asked by another.
    let mut child = place.command("toy", "say=begun forever", &[]).stdout(Stdio::piped()).spawn().unwrap();
    hear(&mut child, "begun");
    place.vm(&["stop", "toy", "--force"]);
    assert_eq!(child.wait().unwrap().code(), Some(7));
    let mut child = place.0.command(&["vm", "start", "toy"]).stdout(Stdio::piped()).spawn().unwrap();
    hear(&mut child, "begun");
    place.vm(&["stop", "toy", "--patience", "1"]);
    assert_eq!(child.wait().unwrap().code(), Some(7));
}

#[test]
fn a_guest_that_reboots_begins_anew_with_its_disk() {
    let Some(place) = Place::new() else { return };
    let disk = place.0.path("disk.raw");
    fs::write(&disk, [0; 65536]).unwrap();
    let with_disk = format!("{},serial=abc", disk.display());
    let mut child = place
        .command("toy", "id write=3,1,9 flush reboot", &["--disk", &with_disk])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    for _ in 0..3 {
        hear(&mut child, "id abc");
    }
    place.vm(&["stop", "toy", "--force"]);
    child.wait().unwrap();
    assert!(fs::read(&disk).unwrap()[3 * 512..4 * 512].iter().any(|byte| *byte != 0));
}

#[test]
fn the_console_is_for_one_at_a_time_and_shows_the_beginning() {
    let Some(place) = Place::new() else { return };
    place.start("toy", "say=ready echo say=bye button off");
    let socket = place.file("toy", "serial.sock");
    assert_eq!(fs::metadata(&socket).unwrap().permissions().mode() & 0o777, 0o600);
    let mut first = BufReader::new(UnixStream::connect(&socket).unwrap());
    let mut line = String::new();
    first.read_line(&mut line).unwrap();
    assert!(line.starts_with("afterimage-serial 1 boot=") && line.contains(" start=0 end="), "{line}");
    let mut second = String::new();
    UnixStream::connect(&socket).unwrap().read_to_string(&mut second).unwrap();
    assert_eq!(second, "afterimage-serial 1 busy\n");
    first.get_mut().write_all(b"typed\n").unwrap();
    for expected in ["ready\n", "typed\n", "bye\n"] {
        line.clear();
        first.read_line(&mut line).unwrap();
        assert_eq!(line, expected);
    }
    // The place is free from the moment the first has gone, and the beginning still there.
    for _ in 0..20 {
        drop(first);
        first = BufReader::new(UnixStream::connect(&socket).unwrap());
        line.clear();
        first.read_line(&mut line).unwrap();
        assert!(line.starts_with("afterimage-serial 1 boot="), "{line}");
    }
    drop(first);
    let mut child = place.0.command(&["vm", "console", "toy"]);
    let mut child = child.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut shown = BufReader::new(child.stdout.take().unwrap());
    for expected in ["ready\n", "typed\n", "bye\n"] {
        line.clear();
        shown.read_line(&mut line).unwrap();
        assert_eq!(line, expected);
    }
    place.vm(&["stop", "toy"]);
    assert_eq!(child.wait().unwrap().code(), Some(0));
    place.wait_for_end("toy");
}

#[test]
fn a_machine_in_a_deep_folder_has_its_sockets() {
    if !require_kvm() {
        return;
    }
    let place = Place(Afterimage::with_pool());
    let deep = place.0.path(&"d".repeat(120));
    let kernel = kernel(Way::Pvh);
    let vm = |words: &[&str]| {
        let output = place.0.command(&[&["--pool", deep.to_str().unwrap()], words].concat()).output().unwrap();
        assert!(output.status.success(), "{words:?}: {}", text(&output.stderr));
        text(&output.stdout).to_owned()
    };
    vm(&["init", deep.to_str().unwrap()]);
    let orders = ["--memory", "16M", "--cmdline", "say=deep button off", "--detach"];
    vm(&[&["vm", "run", "toy", "--kernel", kernel.to_str().unwrap()], &orders[..]].concat());
    assert!(vm(&["vm", "info", "toy"]).contains("running"));
    let mut child = place.0.command(&["--pool", deep.to_str().unwrap(), "vm", "console", "toy"]);
    let mut child = child.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    hear(&mut child, "waiting");
    vm(&["vm", "stop", "toy"]);
    child.wait().unwrap();
}

#[test]
fn the_socket_speaks_http_and_json() {
    let Some(place) = Place::new() else { return };
    place.start("toy", "forever");
    let curl = |words: &[&str]| {
        let socket = place.file("toy", "api.sock");
        let output = Command::new("curl").arg("-sS").arg("--unix-socket").arg(socket).args(words).output().unwrap();
        serde_json::from_slice::<Value>(&output.stdout).unwrap()
    };
    assert_eq!(curl(&["http://vm/v1/vm"])["state"], "running");
    assert_eq!(curl(&["-X", "POST", "http://vm/v1/vm/pause"])["state"], "paused");
    assert_eq!(curl(&["-X", "POST", "http://vm/v1/vm/dance"])["error"]["kind"], "not-found");
    let state = curl(&["-X", "POST", "http://vm/v1/vm/kill"])["state"].clone();
    assert!(state == "stopping" || state == "ended", "{state}");
    place.wait_for_end("toy");
}

#[test]
fn what_cannot_run_is_told_before_anything_starts() {
    let Some(place) = Place::new() else { return };
    let disk = place.0.path("disk.raw");
    fs::write(&disk, [0; 4096]).unwrap();
    let shown = disk.to_str().unwrap();
    let fifo = place.0.path("fifo");
    assert!(Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    let (fifo, fifo_to_read) = (fifo.to_str().unwrap(), format!("{},ro", fifo.display()));
    for (more, code) in [
        (&["--disk", "/no/such/disk"][..], 3),
        (&["--disk", "web"], 3),
        (&["--disk", "/dev/null"], 2),
        (&["--cpus", "255"], 2),
        (&["--memory", "1K"], 2),
        (&["--net", "tap=this-name-is-far-too-long"], 1),
        (&["--net", "tap=nosuch0"], 3),
        (&["--disk", fifo], 2),
        (&["--disk", &fifo_to_read], 2),
        (&["--initrd", fifo], 2),
        (&["--disk", shown, "--disk", shown], 4),
    ] {
        for detach in [&[][..], &["--detach"]] {
            let output = place.run("toy", "off", &[more, detach].concat());
            assert_eq!(output.status.code(), Some(code), "{more:?} {}", text(&output.stderr));
            assert_eq!(text(&output.stdout), "");
        }
    }
    // A FIFO without a writer was waited for.
    let output = place.0.run(&["vm", "run", "toy", "--kernel", fifo]);
    assert_eq!(output.status.code(), Some(2), "{}", text(&output.stderr));
    assert!(text(&output.stderr).contains("is no file"), "{}", text(&output.stderr));
    assert_eq!(place.0.error(&["vm", "start", "other"]).0, 3);
    assert_eq!(place.0.error(&["vm", "pause", "other"]).0, 3);
    assert_eq!(place.0.error(&["vm", "info", "a/b"]).0, 2);
}

#[test]
fn a_process_that_was_killed_leaves_nothing_in_the_way() {
    let Some(place) = Place::new() else { return };
    place.start("toy", "forever");
    let pid = place.vm(&["info", "toy"])["vm"]["pid"].as_i64().unwrap();
    kill_process(Pid::from_raw(pid as i32).unwrap(), Signal::KILL).unwrap();
    place.wait_for_end("toy");
    // Its lock goes with its last descriptor, after its sockets.
    wait_for("the process is gone", || !std::path::Path::new(&format!("/proc/{pid}")).exists());
    let output = place.run("toy", "say=alive off", &[]);
    assert_eq!((output.status.code(), text(&output.stdout)), (Some(0), "alive\n"));
}
