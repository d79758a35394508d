//! The devices of a guest, as the guest sees them.

use afterimage::vmm::{Ending, FileDisk};
use std::sync::Arc;

use super::toy::{require_kvm, run, said, settings, start, wait, wait_for, with_disk};
use crate::vhost::Ram;

#[test]
fn a_guest_writes_reads_and_flushes_its_disk() {
    if !require_kvm() {
        return;
    }
    let ram = Ram::new(1 << 20);
    let orders = "id zero=0,4 write=8,16,77 flush check=8,16,77 zero=24,2 off";
    let (said, ending) = run(&with_disk(settings(orders), ram.clone()));
    let expected = "id disk-of-the-test\nzeros\nwritten\nflushed\nchecked\nzeros\n";
    assert_eq!((said.as_str(), ending), (expected, Ending::PowerOff));
    let log = ram.log.lock();
    assert_eq!(log.iter().filter(|(what, ..)| *what == "write").count(), 16);
    let last_write = log.iter().rposition(|(what, ..)| *what == "write").unwrap();
    assert!(log[last_write..].iter().any(|(what, ..)| *what == "flush"));
}

#[test]
fn a_guest_that_sleeps_is_woken_by_interrupts() {
    if !require_kvm() {
        return;
    }
    let (said, ending) = run(&with_disk(settings("many=50 off"), Ram::new(1 << 20)));
    assert_eq!(ending, Ending::PowerOff);
    // Those that come while the guest does not listen are one.
    let count: u32 = said.trim().strip_prefix("interrupts ").unwrap().parse().unwrap();
    assert!((1..=50).contains(&count), "{count}");
}

#[test]
fn what_a_guest_wrote_is_there_for_the_next_one() {
    if !require_kvm() {
        return;
    }
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(1 << 20).unwrap();
    for orders in ["write=100,32,5 flush off", "check=100,32,5 off"] {
        let disk = Arc::new(FileDisk::open(file.path(), false).unwrap());
        assert_eq!(run(&with_disk(settings(orders), disk)).1, Ending::PowerOff);
    }
}

#[test]
fn a_disk_that_fails_fails_the_request() {
    if !require_kvm() {
        return;
    }
    let ram = Ram::new(1 << 20);
    ram.fail(true);
    let (said, _) = run(&with_disk(settings("write=0,1,1 off"), ram));
    assert_eq!(said, "FAILED: the disk failed a request\n");
    let (said, _) = run(&with_disk(settings("check=0,1,1 off"), Ram::new(0)));
    assert_eq!(said, "FAILED: the disk failed a request\n");
}

#[test]
fn a_disk_works_through_pauses() {
    if !require_kvm() {
        return;
    }
    let machine = start(&with_disk(settings("write=0,200,3 check=0,200,3 off"), Ram::new(1 << 20)));
    while machine.ending().is_none() {
        machine.pause();
        machine.resume();
        std::thread::sleep(std::time::Duration::from_micros(200));
    }
    assert_eq!(machine.wait(), Ending::PowerOff);
    assert_eq!(said(&machine), "written\nchecked\n");
}

#[test]
fn a_pause_waits_for_what_the_disk_has_taken() {
    if !require_kvm() {
        return;
    }
    let ram = Ram::new(1 << 20);
    ram.close(true);
    let machine = start(&with_disk(settings("write=0,1,3 off"), ram.clone()));
    while ram.log.lock().is_empty() {
        std::thread::yield_now();
    }
    let pausing = std::thread::spawn({
        let machine = Arc::clone(&machine);
        move || machine.pause()
    });
    std::thread::sleep(std::time::Duration::from_millis(20));
    assert!(!pausing.is_finished(), "the write has not ended");
    ram.close(false);
    pausing.join().unwrap();
    assert!(ram.content()[..512].iter().any(|byte| *byte != 0), "it was done before the pause began");
    machine.resume();
    assert_eq!(wait(&machine), Ending::PowerOff);
}

/// A checkpoint waits a second for the disks, and the guest runs on if they take longer.
#[test]
fn a_disk_that_takes_too_long_to_drain_works_on() {
    if !require_kvm() {
        return;
    }
    let ram = Ram::new(1 << 20);
    let machine =
        start(&with_disk(settings("say=begun write=0,300,3 echo write=0,300,4 check=0,300,4 off"), ram.clone()));
    wait_for(&machine, "begun");
    for _ in 0..5 {
        machine.drain(std::time::Duration::from_secs(20)).unwrap();
        machine.pause();
        machine.resume();
    }
    wait_for(&machine, "written");
    ram.close(true);
    let before = ram.log.lock().len();
    machine.type_in(b"\n");
    while ram.log.lock().len() == before {
        std::thread::yield_now();
    }
    let error = machine.drain(std::time::Duration::from_millis(20)).unwrap_err();
    assert!(error.kind() == afterimage::error::Kind::Busy && error.message().contains("20 ms"), "{error}");
    ram.close(false);
    assert_eq!(wait(&machine), Ending::PowerOff);
    assert!(said(&machine).ends_with("written\nchecked\n"), "{}", said(&machine));
}

#[test]
fn random_numbers_come() {
    if !require_kvm() {
        return;
    }
    assert_eq!(run(&settings("random off")), ("random\n".into(), Ending::PowerOff));
}

#[test]
fn nothing_is_where_no_device_is() {
    if !require_kvm() {
        return;
    }
    assert_eq!(run(&settings("hole off")), ("hole\n".into(), Ending::PowerOff));
}

#[test]
fn the_power_button_reaches_the_guest() {
    if !require_kvm() {
        return;
    }
    let machine = start(&settings("button off"));
    wait_for(&machine, "waiting");
    machine.press_power_button();
    assert_eq!(wait(&machine), Ending::PowerOff);
    assert_eq!(said(&machine), "waiting\nbutton\n");
}

#[test]
fn what_is_typed_comes_back() {
    if !require_kvm() {
        return;
    }
    let machine = start(&settings("say=ready echo off"));
    wait_for(&machine, "ready");
    let line = "0123456789".repeat(30);
    machine.type_in(line.as_bytes());
    machine.type_in(b"\n");
    assert_eq!(wait(&machine), Ending::PowerOff);
    assert_eq!(said(&machine), format!("ready\n{line}\n"));
}
