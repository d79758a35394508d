//! How guests begin, pause, go on and end.

use std::io::Write;

use afterimage::error::Kind;
use afterimage::vmm::{Ending, Machine};
use vm_memory::{Bytes, GuestAddress};

use super::toy::{self, MIB, Way, require_kvm, run, settings, start, wait_for};

#[test]
fn a_guest_is_started_either_way_and_knows_its_memory() {
    if !require_kvm() {
        return;
    }
    for way in [Way::Pvh, Way::Linux] {
        let mut settings = settings("say=hello memory off");
        settings.boot.kernel = toy::kernel(way);
        settings.cpus = 3;
        let (said, ending) = run(&settings);
        assert_eq!((said.as_str(), ending), ("hello\nmemory 32 cpus 3\n", Ending::PowerOff), "{way:?}");
    }
}

#[test]
fn memory_beyond_three_gigabytes_is_there() {
    if !require_kvm() {
        return;
    }
    let mut settings = settings("memory fill=4294971392,8,8,5 sum=4294971392,8,8 off");
    settings.memory = 5 << 30;
    let (said, ending) = run(&settings);
    let sum = 4_294_971_392_u64 + 5;
    assert_eq!((said, ending), (format!("memory 5120 cpus 1\nfilled\nsum {sum}\n"), Ending::PowerOff));
}

#[test]
fn each_way_to_end_is_told_apart() {
    if !require_kvm() {
        return;
    }
    assert_eq!(run(&settings("off")).1, Ending::PowerOff);
    assert_eq!(run(&settings("reboot")).1, Ending::Reboot);
    assert_eq!(run(&settings("keyboard-reboot")).1, Ending::Reboot);
    let (said, ending) = run(&settings("crash"));
    assert!(matches!(ending, Ending::Crashed(_)), "{ending:?} {said}");
}

#[test]
fn a_guest_that_never_ends_is_stopped() {
    if !require_kvm() {
        return;
    }
    let machine = start(&settings("say=begun forever"));
    wait_for(&machine, "begun");
    assert_eq!(machine.ending(), None);
    machine.stop();
    assert_eq!(machine.wait(), Ending::Stopped);
}

#[test]
fn a_guest_can_be_dropped_at_any_time() {
    if !require_kvm() {
        return;
    }
    drop(Machine::new(&settings("forever")).unwrap());
    drop(start(&settings("forever")));
    let paused = start(&settings("forever"));
    paused.pause();
    drop(paused);
}

#[test]
fn a_paused_guest_stands_still_and_goes_on() {
    if !require_kvm() {
        return;
    }
    // It counts in memory, in ring 3, for as long as the test wants.
    let machine = start(&settings("say=begun forever"));
    wait_for(&machine, "begun");
    for _ in 0..200 {
        machine.pause();
        machine.pause();
        machine.resume();
    }
    machine.stop();
    assert_eq!(machine.wait(), Ending::Stopped);

    let machine = start(&settings("fill=16777216,8388608,8,1 sum=16777216,8388608,8 off"));
    while machine.ending().is_none() {
        machine.pause();
        let mut first = [0; 4096];
        machine.memory().read_slice(&mut first, GuestAddress(16 * MIB)).unwrap();
        let mut second = [0; 4096];
        machine.memory().read_slice(&mut second, GuestAddress(16 * MIB)).unwrap();
        assert_eq!(first, second);
        machine.resume();
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    assert_eq!(machine.wait(), Ending::PowerOff);
    let sum: u64 = (16 * MIB..24 * MIB).step_by(8).map(|at| at + 1).sum();
    assert_eq!(toy::said(&machine), format!("filled\nsum {sum}\n"));
}

#[test]
fn a_guest_that_is_paused_at_every_access_misses_none() {
    if !require_kvm() {
        return;
    }
    let text = "x".repeat(500);
    let machine = start(&settings(&format!("say={text} hole say={text} off")));
    while machine.ending().is_none() {
        machine.pause();
        machine.resume();
        // So that it gets into the guest at all.
        std::thread::sleep(std::time::Duration::from_micros(200));
    }
    assert_eq!(machine.wait(), Ending::PowerOff);
    assert_eq!(toy::said(&machine), format!("{text}\nhole\n{text}\n"));
}

#[test]
fn what_cannot_be_started_is_told_by_its_name() {
    if !require_kvm() {
        return;
    }
    let refused = |settings: &afterimage::vmm::Settings| Machine::new(settings).unwrap_err();
    let mut good = settings("off");
    good.memory = 4 * MIB;

    let mut bad = good.clone();
    bad.boot.kernel = "/no/such/kernel".into();
    let error = refused(&bad);
    assert_eq!(error.kind(), Kind::NotFound);
    assert!(error.message().contains("/no/such/kernel"), "{error}");

    let mut file = tempfile::NamedTempFile::new().unwrap();
    for text in [&b""[..], b"#!/bin/sh\n", b"\x7fELF", &[0x7f; 4096], &[0; 70_000]] {
        file.as_file().set_len(0).unwrap();
        file.write_all(text).unwrap();
        bad.boot.kernel = file.path().into();
        let error = refused(&bad);
        assert_eq!(error.kind(), Kind::Usage, "{error}");
        assert!(error.next_step().is_some() && error.message().contains(file.path().to_str().unwrap()), "{error}");
    }

    bad.clone_from(&good);
    file.as_file().set_len(4 * MIB).unwrap();
    bad.boot.initrd = Some(file.path().into());
    let error = refused(&bad);
    assert!(error.kind() == Kind::Usage && error.message().contains("needs"), "{error}");

    bad.clone_from(&good);
    bad.boot.command_line = "x".repeat(2048);
    assert_eq!(refused(&bad).kind(), Kind::Usage);

    for (memory, cpus) in [(0, 1), (4 * MIB + 1, 1), (4 * MIB, 0), (4 * MIB, 255)] {
        (bad, _) = (good.clone(), ());
        (bad.memory, bad.cpus) = (memory, cpus);
        assert_eq!(refused(&bad).kind(), Kind::Usage);
    }
}

#[test]
fn a_damaged_kernel_is_refused_or_runs_and_harms_nobody() {
    if !require_kvm() {
        return;
    }
    let mut seed = 1_u64;
    for way in [Way::Pvh, Way::Linux] {
        let whole = std::fs::read(toy::kernel(way)).unwrap();
        for _ in 0..50 {
            let mut damaged = whole.clone();
            for _ in 0..4 {
                seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                damaged[(seed >> 33) as usize % 1024] = (seed >> 24) as u8;
            }
            let file = tempfile::NamedTempFile::new().unwrap();
            std::fs::write(file.path(), &damaged).unwrap();
            let mut settings = settings("off");
            settings.boot.kernel = file.path().into();
            // It is not run: what a guest does to itself is another matter.
            drop(Machine::new(&settings));
        }
    }
}
