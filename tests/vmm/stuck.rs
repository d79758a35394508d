//! Guests whose memory cannot be had: the file that it is loses its end while they run.

use std::sync::Arc;
use std::time::Duration;

use afterimage::vmm::{Ending, Machine};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::toy::{MIB, require_kvm, said, settings, start, wait, wait_for};

/// Cuts the memory of a guest, or gives it back, as zeros.
fn set_len(machine: &Machine, len: u64) {
    let region = machine.memory().iter().next().unwrap();
    region.file_offset().unwrap().file().set_len(len).unwrap();
}

fn wait_until_stuck(machine: &Machine) {
    while machine.stuck().is_none() {
        assert_eq!(machine.ending(), None, "{}", said(machine));
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Starts a guest that touches memory that is not there.
fn stuck(order: &str) -> Arc<Machine> {
    let machine = start(&settings(&format!("say=ready echo {order} say=done off")));
    wait_for(&machine, "ready");
    machine.pause();
    set_len(&machine, 16 * MIB);
    machine.resume();
    machine.type_in(b"\n");
    wait_until_stuck(&machine);
    machine
}

#[test]
fn a_guest_whose_memory_cannot_be_had_stands_still_and_can_be_ended() {
    if !require_kvm() {
        return;
    }
    let machine = stuck("peek=20971520");
    let why = machine.stuck().unwrap();
    assert!(machine.state().unwrap_err().message().contains("cannot be saved"));
    machine.pause();
    if !why.for_good {
        // Who only lets it go on, as after a checkpoint that came to nothing, does not make it ask again.
        machine.resume();
        assert!(machine.stuck().is_some());
        // Trying again is of no use while it is not there, and does no harm.
        machine.retry();
        wait_until_stuck(&machine);
    }
    machine.give_up(why.clone());
    assert_eq!(wait(&machine), Ending::MemoryError(why.what));
    assert!(!said(&machine).contains("peek 0"), "what is not there is not answered");
}
