//! A machine whose screen takes nothing: a pager that was stopped, a terminal that was told to hold.

use std::fs;
use std::process::{Child, Command, Stdio};

use rustix::fs::{OFlags, fcntl_setfl};
use rustix::process::{Pid, Signal, kill_process};

use super::commands::Place;
use crate::real::wait_for;

/// A pipe without room, of which the reader is kept.
fn full_pipe() -> (std::os::fd::OwnedFd, fs::File) {
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    fcntl_setfl(&writer, OFlags::NONBLOCK).unwrap();
    while rustix::io::write(&writer, &[b'x'; 4096]).is_ok() {}
    while rustix::io::write(&writer, b"x").is_ok() {}
    fcntl_setfl(&writer, OFlags::empty()).unwrap();
    (reader, fs::File::from(writer))
}

/// Starts a command whose stdout, and stderr if that is wanted, have no room.
fn start(mut command: Command, stderr: bool) -> (std::os::fd::OwnedFd, Child) {
    let (reader, writer) = full_pipe();
    if stderr {
        command.arg("-vv").stderr(Stdio::from(writer.try_clone().unwrap()));
    }
    (reader, command.stdout(Stdio::from(writer)).spawn().unwrap())
}

fn wait_for_end(child: &mut Child) -> Option<i32> {
    wait_for("it ends", || child.try_wait().unwrap().is_some());
    child.wait().unwrap().code()
}

/// The guest's lifetime waited for the screen: nothing ended it, and its disks stayed taken.
#[test]
fn a_guest_whose_screen_takes_nothing_is_stopped_and_all_it_said_is_in_the_log() {
    let Some(place) = Place::new() else { return };
    for (name, stderr) in [("half", false), ("deaf", true)] {
        let (reader, mut child) = start(place.command(name, "say=begun button say=over off", &[]), stderr);
        let said = || fs::read_to_string(place.file(name, "console.log")).unwrap_or_default();
        wait_for("it waits for the button", || said().contains("waiting"));
        assert_eq!(place.vm(&["stop", name])["vm"]["state"], "ended");
        assert_eq!(wait_for_end(&mut child), Some(0));
        assert_eq!(said(), "begun\nwaiting\nbutton\nover\n");
        drop(reader);
    }
}

#[test]
fn a_guest_whose_screen_takes_nothing_is_ended_by_force_and_by_two_signals() {
    let Some(place) = Place::new() else { return };
    for (name, stderr) in [("half", false), ("deaf", true)] {
        let (_reader, mut child) = start(place.command(name, "say=begun forever", &[]), stderr);
        wait_for("it runs", || place.0.run(&["vm", "info", name]).status.success() && place.state(name) == "running");
        assert_eq!(place.vm(&["stop", name, "--force"])["vm"]["state"], "ended");
        assert_eq!(wait_for_end(&mut child), Some(7));
    }
    let (_reader, mut child) = start(place.command("toy", "say=begun forever", &[]), true);
    wait_for("it runs", || place.0.run(&["vm", "info", "toy"]).status.success() && place.state("toy") == "running");
    kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
    wait_for("the first signal is heard", || place.state("toy") == "stopping");
    kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
    assert_eq!(wait_for_end(&mut child), Some(7));
}
