//! Machines that say nothing, and machines about which nothing can be said, beside others.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use super::commands::Place;
use crate::cli::text;
use crate::real::wait_for;

/// How long a command may take that asks a process which does not answer, on a machine that is busy.
const PATIENCE: Duration = Duration::from_secs(50);

/// Starts a guest in the background, and returns its process.
fn start(place: &Place, name: &str) -> Pid {
    let output = place.run(name, "forever", &["--detach"]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    Pid::from_raw(place.vm(&["info", name])["vm"]["pid"].as_i64().unwrap().try_into().unwrap()).unwrap()
}

/// Connects without waiting and goes away; tells whether there was room.
fn knock(path: &Path) -> bool {
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::NONBLOCK, None).unwrap();
    match connect(&socket, &SocketAddrUnix::new(path).unwrap()) {
        Ok(()) => true,
        Err(Errno::AGAIN) => false,
        Err(error) => panic!("{error}"),
    }
}

fn states(list: &Value) -> Vec<(&str, &str)> {
    let word = |machine: &Value, what: &str| machine[what].as_str().unwrap().to_owned().leak() as &str;
    list["vms"].as_array().unwrap().iter().map(|machine| (word(machine, "name"), word(machine, "state"))).collect()
}

/// One machine whose process was stopped hid all others, and not even force ended it.
#[test]
fn a_machine_whose_process_was_stopped_is_shown_as_that_and_is_killed() {
    let Some(place) = Place::new() else { return };
    let (stopped, _other) = (start(&place, "deaf"), start(&place, "other"));
    kill_process(stopped, Signal::STOP).unwrap();
    let begun = Instant::now();
    let list = place.vm(&["ls"]);
    assert_eq!(states(&list), [("deaf", "not-answering"), ("other", "running")]);
    assert_eq!(list["vms"][0]["pid"], stopped.as_raw_nonzero().get());
    assert_eq!(place.state("deaf"), "not-answering");
    for words in [&["vm", "pause", "deaf"][..], &["vm", "resume", "deaf"], &["vm", "stop", "deaf"]] {
        let (code, error) = place.0.error(words);
        let (message, hint) = (error["message"].as_str().unwrap(), error["hint"].as_str().unwrap());
        assert!(code == 4 && message.contains("does not answer"), "{words:?} {error}");
        assert!(hint.contains(&format!("kill -CONT {}", stopped.as_raw_nonzero())), "{error}");
    }
    assert_eq!(place.0.error(&["vm", "checkpoint", "deaf", "--as", "one"]).0, 4);
    assert!(begun.elapsed() < PATIENCE, "{:?}", begun.elapsed());
    // It goes on where it was, and is ended in order then.
    kill_process(stopped, Signal::CONT).unwrap();
    wait_for("it answers again", || place.state("deaf") == "running");
    kill_process(stopped, Signal::STOP).unwrap();
    // As many as its socket lets wait, and more.
    let full = (0..100).any(|_| !knock(&place.file("deaf", "api.sock")));
    assert!(full, "it lets a hundred wait");
    assert_eq!(place.state("deaf"), "not-answering");
    assert_eq!(place.vm(&["stop", "deaf", "--force"])["vm"]["state"], "ended");
    wait_for("its process is gone", || !Path::new(&format!("/proc/{}", stopped.as_raw_nonzero())).exists());
    assert_eq!(states(&place.vm(&["ls"])), [("deaf", "ended"), ("other", "running")]);
    let output = place.run("deaf", "say=alive off", &[]);
    assert_eq!((output.status.code(), text(&output.stdout)), (Some(0), "alive\n"));
    place.vm(&["stop", "other", "--force"]);
}

#[test]
fn a_machine_whose_definition_is_damaged_does_not_hide_the_others() {
    let Some(place) = Place::new() else { return };
    for name in ["bad", "good", "newer"] {
        assert_eq!(place.run(name, "off", &[]).status.code(), Some(0));
    }
    fs::write(place.file("bad", "vm.json"), "{").unwrap();
    let output = place.0.run(&["vm", "ls"]);
    assert_eq!(output.status.code(), Some(5), "{}", text(&output.stderr));
    let shown = text(&output.stdout);
    assert!(shown.contains("bad: damaged: ") && shown.contains("vm.json does not describe a machine"), "{shown}");
    assert!(shown.contains("good: stopped, ") && shown.contains("newer: stopped, "), "{shown}");
    let output = place.0.command(&["--json", "vm", "ls"]).output().unwrap();
    let list: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(states(&list), [("bad", "damaged"), ("good", "ended"), ("newer", "ended")]);
    assert_eq!((output.status.code(), &list["vms"][0]["error"]["kind"]), (Some(5), &Value::from("corrupt")));
    // One of a newer program is not damaged.
    fs::write(place.file("newer", "vm.json"), "{\"version\": 2}").unwrap();
    place.vm(&["rm", "bad"]);
    let output = place.0.command(&["--json", "vm", "ls"]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(states(&serde_json::from_slice(&output.stdout).unwrap()), [("good", "ended"), ("newer", "unknown")]);
}
