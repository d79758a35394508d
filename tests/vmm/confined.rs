//! What the process of a machine may: nothing but what it takes.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::process::{Command, Stdio};

use afterimage::vmm::Means;

use super::commands::{Place, hear};
use super::toy::{require_kvm, settings};
use crate::cli::text;
use crate::real::{require, wait_for};

/// Says that a test is to confine itself: it is run again in a process of its own for that.
const ROLE: &str = "AFTERIMAGE_TEST_CONFINES_ITSELF";

/// Tells whether this is the process that is to confine itself.
fn is_to_confine_itself() -> bool {
    std::env::var_os(ROLE).is_some()
}

fn confine() {
    let means = Means::open(&settings("off")).unwrap().confined(None).unwrap();
    means.confine().unwrap();
}

/// Runs a test in a process of its own; returns its exit code and what it said.
fn confined(name: &str) -> (Option<i32>, String) {
    let mut again = Command::new(std::env::current_exe().unwrap());
    let name = format!("vmm::confined::{name}");
    let output = again.args(["--exact", &name, "--nocapture"]).env(ROLE, "1").output().unwrap();
    (output.status.code(), text(&output.stderr).to_owned())
}

/// A ring opens files and makes sockets as told in memory, where no filter looks.
#[test]
fn no_file_is_opened_through_a_ring() {
    if !require_kvm() {
        return;
    }
    if is_to_confine_itself() {
        let before = io_uring::IoUring::new(4).unwrap();
        confine();
        let made = io_uring::IoUring::new(4).map(drop).unwrap_err();
        eprintln!("a new ring: {:?}", made.raw_os_error());
        let thread = std::thread::spawn(|| eprintln!("a thread of {}", std::process::id()));
        thread.join().unwrap();
        // Nor does one help that was there before.
        before.submit_and_wait(1).unwrap();
        eprintln!("entered");
        return;
    }
    let (code, said) = confined("no_file_is_opened_through_a_ring");
    assert!(said.contains(&format!("a new ring: Some({})\n", libc::ENOSYS)), "{said}");
    assert!(said.contains("a thread of "), "{said}");
    assert!(said.contains("io_uring_enter (number 426) is not among the system calls"), "{said}");
    assert!(code == Some(1) && !said.contains("entered"), "{said}");
}

#[test]
fn no_process_is_started() {
    if !require_kvm() {
        return;
    }
    if is_to_confine_itself() {
        confine();
        eprintln!("confined");
        eprintln!("started: {}", Command::new("/bin/true").status().is_ok());
        return;
    }
    let (code, said) = confined("no_process_is_started");
    // The C library lets no signal in while it starts a process, so the trap kills it before it can say why.
    assert!(code.is_none() && said.contains("confined\n") && !said.contains("started"), "{code:?} {said}");
}

#[test]
fn a_system_call_that_is_not_needed_ends_the_process_and_is_named() {
    if !require_kvm() {
        return;
    }
    let file = std::env::temp_dir().join("never-made-by-a-confined-process");
    if is_to_confine_itself() {
        confine();
        // What it may still goes on.
        assert!(fs::read("/proc/self/status").unwrap().len() > 100);
        eprintln!("made: {}", fs::File::create(&file).is_ok());
        return;
    }
    let (code, said) = confined("a_system_call_that_is_not_needed_ends_the_process_and_is_named");
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("openat (number 257) is not among the system calls that this thread may make"), "{said}");
    assert!(!said.contains("made") && !file.exists());
}

/// Returns the threads of a process: name, value of a field of its status.
fn threads(pid: i64, field: &str) -> Vec<(String, String)> {
    let mut threads = Vec::new();
    for task in fs::read_dir(format!("/proc/{pid}/task")).unwrap() {
        let status = fs::read_to_string(task.unwrap().path().join("status")).unwrap_or_default();
        let get = |field: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
            line.unwrap_or_default().trim().to_owned()
        };
        threads.push((get("Name"), get(field)));
    }
    threads
}

#[test]
fn each_thread_of_a_machine_has_the_filter_of_its_kind() {
    let Some(place) = Place::new() else { return };
    let disk = place.0.path("disk.raw");
    fs::write(&disk, [0; 65536]).unwrap();
    let disk = disk.to_str().unwrap();
    let mut child =
        place.command("toy", "id say=begun forever", &["--disk", disk]).stdout(Stdio::piped()).spawn().unwrap();
    hear(&mut child, "begun");
    let pid = i64::from(child.id());
    let filters = threads(pid, "Seccomp_filters");
    for (name, wanted) in [("cpu-0", "3"), ("disk-0", "3"), ("afterimage", "2"), ("vm-api", "2"), ("serial", "2")] {
        let found = filters.iter().find(|(thread, _)| thread == name);
        assert_eq!(found.map(|(_, filters)| filters.as_str()), Some(wanted), "{name} in {filters:?}");
    }
    assert!(threads(pid, "NoNewPrivs").iter().all(|(_, set)| set == "1"));
    place.vm(&["stop", "toy", "--force"]);
    assert_eq!(child.wait().unwrap().code(), Some(7), "ended without its consent");
}

#[test]
fn a_machine_of_another_user_runs_reboots_and_keeps_its_disk() {
    let root = rustix::process::geteuid().is_root();
    if !require(root, "root") {
        return;
    }
    let Some(place) = Place::new() else { return };
    let disk = place.0.path("disk.raw");
    fs::write(&disk, [0; 65536]).unwrap();
    fs::set_permissions(&disk, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    let nobody = fs::read_to_string("/etc/passwd").unwrap();
    let nobody = nobody.lines().find(|line| line.starts_with("nobody:")).unwrap().split(':').nth(2).unwrap().to_owned();
    let words = ["--disk", disk.to_str().unwrap(), "--user", "nobody"];
    let mut child = place.command("toy", "write=3,1,9 flush check=3,1,9 reboot", &words);
    let mut child = child.stdout(Stdio::piped()).spawn().unwrap();
    for _ in 0..3 {
        hear(&mut child, "checked");
    }
    let pid = i64::from(child.id());
    for (thread, numbers) in threads(pid, "Uid").into_iter().chain(threads(pid, "Gid")) {
        assert!(numbers.split_whitespace().all(|number| number != "0"), "{thread} {numbers}");
    }
    let uids = threads(pid, "Uid");
    assert!(uids.iter().all(|(_, numbers)| numbers.split_whitespace().all(|number| *number == nobody)), "{uids:?}");
    assert!(threads(pid, "Groups").iter().all(|(_, groups)| groups.is_empty()));
    assert!(threads(pid, "CapEff").iter().all(|(_, set)| set.chars().all(|digit| digit == '0')));
    // Who owns the pool speaks to it as ever, and what it is made of is not the guest's to change.
    assert_eq!(place.vm(&["pause", "toy"])["vm"]["state"], "paused");
    assert_eq!(place.vm(&["resume", "toy"])["vm"]["definition"]["user"], "nobody");
    assert_eq!(fs::metadata(place.file("toy", "vm.json")).unwrap().uid(), 0);
    place.vm(&["stop", "toy", "--force"]);
    // It may just have ended itself, to begin anew.
    assert!(matches!(child.wait().unwrap().code(), Some(0 | 7)));
    assert!(fs::read(&disk).unwrap()[3 * 512..4 * 512].iter().any(|byte| *byte != 0));
    // Sockets that it could not remove are in nobody's way.
    let output = place.0.command(&["vm", "start", "toy", "--detach"]).output().unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
    wait_for("it runs again", || place.state("toy") == "running");
    place.vm(&["stop", "toy", "--force"]);
    let output = place.run("toy", "off", &["--user", "no-such-user-here"]);
    assert_eq!(output.status.code(), Some(3), "{}", text(&output.stderr));
}
