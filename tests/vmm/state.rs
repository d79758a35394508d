//! A guest goes on in another machine where it was in the first.

use std::sync::Arc;
use std::time::Duration;

use afterimage::error::Kind;
use afterimage::vmm::{Ending, Machine, MachineState, Settings};
use serde_json::Value;
use uuid::Uuid;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

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
    let (mut two, mut less) = (one.clone(), one.clone());
    (two.cpus, less.memory) = (2, 16 * MIB);
    let disk = with_disk(one.clone(), Ram::new(4096));
    for (other, named) in [
        (two, "processors: the guest had 1, and would have 2"),
        (less, "memory: the guest had 32.0 MiB, and would have 16.0 MiB"),
        (disk, "disks: the guest had 0, and would have 1"),
    ] {
        let error = Machine::restore(&other, &state, |_| panic!("it was filled")).unwrap_err();
        assert!(error.kind() == Kind::Unsupported && error.message().contains(named), "{error}");
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

/// Reads a state as JSON, behind its version.
pub(super) fn json(machine: &Machine) -> Value {
    serde_json::from_slice(&machine.state().unwrap().encode().unwrap()[4..]).unwrap()
}

pub(super) fn state_of(json: &Value) -> MachineState {
    MachineState::decode(&[&1_u32.to_le_bytes()[..], &serde_json::to_vec(json).unwrap()].concat()).unwrap()
}

/// Returns what a state says of registers, without what goes on while nobody runs: clocks, and timers that follow them; and
/// without the call that tells the guest that it is another.
pub(super) fn registers(mut state: Value) -> Value {
    let zero = |bytes: &mut Value, range: std::ops::Range<usize>| {
        bytes.as_array_mut().unwrap()[range].iter_mut().for_each(|byte| *byte = 0.into());
    };
    state["events"].take();
    let chips = &mut state["chips"];
    chips["clock"].take();
    chips["read-at"].take();
    // Of three channels of the timer, when their counts were loaded.
    (0..3).for_each(|channel| zero(&mut chips["timer"], 24 * channel + 16..24 * channel + 24));
    // Inputs of the IO-APIC that are high.
    zero(&mut chips["interrupts"][2], 24..28);
    for cpu in state["cpus"].as_array_mut().unwrap() {
        let clocks = [0x10, 0x6e0];
        cpu["model"].as_array_mut().unwrap().retain(|pair| !clocks.contains(&pair[0].as_u64().unwrap()));
        // Of the local APIC what counts down, and the calls that wait.
        zero(&mut cpu["interrupts"], 0x390..0x394);
        zero(&mut cpu["interrupts"], 0x200..0x280);
        // An exception that is about to come reads as one that comes and as one that waits, and is set as one that comes.
        zero(&mut cpu["events"], 3..4);
    }
    state
}

/// Says where two values differ first.
pub(super) fn differs(one: &Value, two: &Value) -> Option<String> {
    let below = |key: String, one: &Value, two: &Value| differs(one, two).map(|rest| format!("{key}/{rest}"));
    match (one, two) {
        (Value::Object(these), Value::Object(_)) => {
            these.iter().find_map(|(key, value)| below(key.clone(), value, &two[key]))
        }
        (Value::Array(these), Value::Array(those)) if these.len() == those.len() => {
            (0..these.len()).find_map(|n| below(n.to_string(), &these[n], &those[n]))
        }
        _ => (one != two).then(|| format!(" {one} {two}")),
    }
}

#[test]
fn every_register_and_every_byte_is_the_same() {
    if !require_kvm() {
        return;
    }
    for cpus in [1, 2] {
        for orders in ["say=begun forever", "say=begun button off", "say=begun fill=16777216,8388608,8,1 forever"] {
            let mut settings = with_disk(settings(orders), Ram::new(1 << 20));
            settings.cpus = cpus;
            let machine = start(&settings);
            wait_for(&machine, "begun");
            std::thread::sleep(Duration::from_millis(5));
            machine.pause();
            let state = json(&machine);
            let mut memory = vec![0; settings.memory as usize];
            machine.memory().read_slice(&mut memory, GuestAddress(0)).unwrap();
            drop(machine);
            settings.generation = Uuid::new_v4();
            let fill = |there: &GuestMemoryMmap<()>| {
                there.write_slice(&memory, GuestAddress(0)).unwrap();
                Ok(())
            };
            let restored = Machine::restore(&settings, &state_of(&state), fill).unwrap();
            let (was, is) = (registers(state), registers(json(&restored)));
            let path = differs(&was, &is).unwrap_or_default();
            assert!(was == is, "{path} of {orders} with {cpus} processors");
            let mut there = vec![0; settings.memory as usize];
            restored.memory().read_slice(&mut there, GuestAddress(0)).unwrap();
            // The generation is another one, as it should.
            let generation = 0xf_f000..0xf_f010;
            assert_ne!(memory[generation.clone()], there[generation.clone()]);
            there[generation.clone()].copy_from_slice(&memory[generation]);
            let differs = memory.iter().zip(&there).position(|(was, is)| was != is);
            assert_eq!(differs, None, "{orders} with {cpus} processors");
        }
    }
}

#[test]
fn what_a_host_lacks_of_what_a_guest_uses_is_named() {
    if !require_kvm() {
        return;
    }
    let settings = settings("forever");
    let machine = start(&settings);
    machine.pause();
    let good = json(&machine);
    drop(machine);
    let refused = |state: &Value| {
        let error = Machine::restore(&settings, &state_of(state), |_| panic!("it was filled")).unwrap_err();
        assert_eq!(error.kind(), Kind::Unsupported, "{error}");
        error.message().to_owned()
    };
    let mut bad = good.clone();
    bad["cpus"][0]["model"].as_array_mut().unwrap().push(serde_json::json!([0xdead, 7]));
    let said = refused(&bad);
    assert!(said.contains("no register 0xdead, which holds 0x7"), "{said}");

    let mut bad = good.clone();
    // Entries of 40 bytes: leaf, part, flags, and the four registers.
    let entries = bad["cpus"][0]["cpuid"][1].as_array_mut().unwrap();
    for entry in entries {
        let entry = entry.as_array_mut().unwrap();
        match (entry[0].as_u64().unwrap(), entry[4].as_u64().unwrap()) {
            (0, _) => entry[16] = b'?'.into(),
            (7, 0) => entry[4 * 5 + 3] = 0xff.into(),
            _ => {}
        }
    }
    let said = refused(&bad);
    assert!(said.contains("processors are of ?") && said.contains("in leaf 0x7.0 of CPUID"), "{said}");
}

#[test]
fn the_clock_of_a_processor_goes_on_while_nobody_runs_it() {
    if !require_kvm() {
        return;
    }
    let settings = settings("say=begun forever");
    let machine = start(&settings);
    wait_for(&machine, "begun");
    machine.pause();
    let state = json(&machine);
    drop(machine);
    std::thread::sleep(Duration::from_millis(200));
    let restored = Machine::restore(&settings, &state_of(&state), |_| Ok(())).unwrap();
    let clock = |state: &Value| {
        let model = state["cpus"][0]["model"].as_array().unwrap();
        model.iter().find(|pair| pair[0] == 0x10).unwrap()[1].as_u64().unwrap()
    };
    let ticks = clock(&json(&restored)) - clock(&state);
    let khz = state["cpus"][0]["clock-khz"].as_u64().unwrap();
    assert!((200 * khz..2000 * khz).contains(&ticks), "{ticks} ticks at {khz} kHz");
}
