//! A guest goes on in another machine where it was in the first.

use std::sync::Arc;
use std::time::Duration;

use afterimage::error::Kind;
use afterimage::vmm::{Ending, Machine, MachineState, Settings};
use vm_memory::{Bytes, GuestAddress};

use super::toy::{MIB, require_kvm, run, said, settings, start, wait, wait_for, with_disk};
use crate::vhost::Ram;

/// Moves a guest to a new machine; the old one is gone then. What it said is added to `heard`.
fn moved(machine: Arc<Machine>, settings: &Settings, heard: &mut String) -> Arc<Machine> {
    machine.pause();
    heard.push_str(&said(&machine));
    let state = MachineState::decode(&machine.state().unwrap().encode().unwrap()).unwrap();
    let mut memory = vec![0; settings.memory as usize];
    machine.memory().read_slice(&mut memory, GuestAddress(0)).unwrap();
    drop(machine);
    let restored = Machine::restore(settings, &state, |there| {
        there.write_slice(&memory, GuestAddress(0)).unwrap();
        Ok(())
    });
    Arc::new(restored.unwrap())
}

#[test]
fn a_guest_that_computes_goes_on_in_another_machine() {
    if !require_kvm() {
        return;
    }
    let settings = settings("say=begun echo fill=16777216,8388608,8,1 sum=16777216,8388608,8 off");
    let mut machine = start(&settings);
    wait_for(&machine, "begun");
    let mut heard = String::new();
    // It waits for the line until then, so that it is moved once at least.
    machine = moved(machine, &settings, &mut heard);
    machine.type_in(b"go\n");
    for _ in 0..5 {
        machine.resume();
        std::thread::sleep(Duration::from_millis(2));
        machine.pause();
        if machine.ending().is_some() {
            break;
        }
        machine = moved(machine, &settings, &mut heard);
    }
    machine.resume();
    assert_eq!(wait(&machine), Ending::PowerOff);
    let sum: u64 = (16 * MIB..24 * MIB).step_by(8).map(|at| at + 1).sum();
    heard.push_str(&said(&machine));
    assert_eq!(heard, format!("begun\ngo\nfilled\nsum {sum}\n"));
}

/// A guest may end while it is about to be paused. What came of it must not go on elsewhere: it would sleep for ever.
#[test]
fn a_guest_that_has_ended_does_not_go_on_elsewhere() {
    if !require_kvm() {
        return;
    }
    let machine = start(&settings("off"));
    assert_eq!(wait(&machine), Ending::PowerOff);
    machine.pause();
    let error = machine.state().unwrap_err();
    assert!(error.kind() == Kind::Failed && error.message().contains("switched itself off"), "{error}");
}

#[test]
fn what_was_typed_and_not_taken_goes_with_the_guest() {
    if !require_kvm() {
        return;
    }
    let settings = settings("say=begun echo off");
    let machine = start(&settings);
    wait_for(&machine, "begun");
    machine.pause();
    let line = "more than the port itself has room for ".repeat(4);
    machine.type_in(line.as_bytes());
    let mut heard = String::new();
    let machine = moved(machine, &settings, &mut heard);
    machine.type_in(b"and the rest\n");
    machine.resume();
    assert_eq!(wait(&machine), Ending::PowerOff);
    heard.push_str(&said(&machine));
    assert_eq!(heard, format!("begun\n{line}and the rest\n"));
}

#[test]
fn an_interrupt_on_its_way_reaches_the_guest_in_another_machine() {
    if !require_kvm() {
        return;
    }
    let settings = settings("key off");
    for _ in 0..10 {
        let machine = start(&settings);
        wait_for(&machine, "listening");
        machine.pause();
        // The kernel delivers it in its own time, which may be after the state was taken.
        machine.type_in(b"x");
        let mut heard = String::new();
        let machine = moved(machine, &settings, &mut heard);
        machine.resume();
        assert_eq!(wait(&machine), Ending::PowerOff);
        heard.push_str(&said(&machine));
        assert_eq!(heard, "listening\nx\n");
    }
}

#[test]
fn a_disk_goes_on_with_its_guest() {
    if !require_kvm() {
        return;
    }
    let ram = Ram::new(1 << 20);
    let settings = with_disk(settings("say=begun write=0,300,3 check=0,300,3 off"), ram);
    let mut machine = start(&settings);
    wait_for(&machine, "begun");
    let mut heard = String::new();
    for _ in 0..5 {
        machine = moved(machine, &settings, &mut heard);
        machine.resume();
    }
    assert_eq!(wait(&machine), Ending::PowerOff);
    heard.push_str(&said(&machine));
    assert_eq!(heard, "begun\nwritten\nchecked\n");
}

#[test]
fn a_guest_that_sleeps_is_woken_in_another_machine() {
    if !require_kvm() {
        return;
    }
    let settings = settings("button off");
    let machine = start(&settings);
    wait_for(&machine, "waiting");
    let mut heard = String::new();
    let machine = moved(machine, &settings, &mut heard);
    machine.resume();
    // It is told that it is another, which it takes for no button.
    assert_eq!(wait(&machine), Ending::PowerOff);
    heard.push_str(&said(&machine));
    assert_eq!(heard, "waiting\nno button\n");
}

#[test]
fn a_state_is_set_only_in_a_machine_of_the_same_parts() {
    if !require_kvm() {
        return;
    }
    let one = settings("forever");
    let machine = start(&one);
    machine.pause();
    let bytes = machine.state().unwrap().encode().unwrap();
    let state = MachineState::decode(&bytes).unwrap();
    let mut two = one.clone();
    two.cpus = 2;
    for other in [two, with_disk(one.clone(), Ram::new(4096))] {
        assert_eq!(Machine::restore(&other, &state, |_| Ok(())).unwrap_err().kind(), Kind::Corrupt);
    }
    // Damaged bytes are refused or make a guest that harms nobody but itself.
    let mut seed = 7_u64;
    for _ in 0..200 {
        let mut damaged = bytes.clone();
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let at = 4 + (seed >> 33) as usize % (damaged.len() - 4);
        damaged[at] = b'0' + (seed >> 24) as u8 % 10;
        if let Ok(state) = MachineState::decode(&damaged) {
            drop(Machine::restore(&one, &state, |_| Ok(())));
        }
    }
    assert_eq!(run(&settings("off")).1, Ending::PowerOff);
}
