//! Guests that are saved while they write, and go on from what was saved: every byte and register is the one of the instant.

use std::sync::Arc;
use std::time::Duration;

use afterimage::checkpoint::{Access, Cut, Folder, Name, Plan, Reader, Sizes, Writer};
use afterimage::media::{Media, SimMedia};
use afterimage::memory::{RestoreOptions, Restorer, SaveFigures, SaveOptions, Saver, Watch, restore_all};
use afterimage::progress::Silent;
use afterimage::vmm::{Ending, Machine, MachineState, Settings};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::state::{differs, json, registers, state_of};
use super::toy::{MIB, require_kvm, said, settings, start, wait, wait_for};

/// Where the guest writes, and how far apart.
const AT: u64 = 8 * MIB;
const LEN: u64 = 4 * MIB;
const STEP: u64 = 1024;

/// A folder of checkpoints that is gone with this.
struct Place {
    folder: Folder,
}

/// What a guest was at an instant.
struct Twin {
    memory: Vec<u8>,
    state: serde_json::Value,
}

impl Place {
    fn new() -> Self {
        let media: Arc<dyn Media> = Arc::new(SimMedia::new(1));
        Self { folder: Folder::at(&media) }
    }

    /// Saves a guest that runs, and returns what it was at the instant.
    fn save(&self, machine: &Arc<Machine>, watch: &Watch, name: &str, parent: Option<&str>) -> (Twin, SaveFigures) {
        let full = |name: &str| Name::new("toy", name).unwrap();
        let mut plan = Plan::new(full(name), "test", watch.geometry().clone());
        plan.parent = parent.map(full);
        let writer = Writer::create(&self.folder, plan).unwrap();
        let options = SaveOptions { keep_tracking: true, ..SaveOptions::default() };
        let mut saver = Saver::begin(watch, writer, options).unwrap();
        saver.settle().unwrap();
        machine.pause();
        saver.cut().unwrap();
        let state = json(machine);
        let mut memory = vec![0; machine.memory().iter().map(|region| region.len() as usize).sum()];
        machine.memory().read_slice(&mut memory, GuestAddress(0)).unwrap();
        machine.resume();
        let bytes = serde_json::to_vec(&state).unwrap();
        let cut = Cut { created: 1, disks: Vec::new(), state_version: 1, state: &bytes };
        let (_, figures) = saver.commit(&cut).unwrap();
        (Twin { memory, state }, figures)
    }

    fn open(&self, name: &str) -> Reader {
        Reader::open(&self.folder, &Name::new("toy", name).unwrap(), Access::Cached).unwrap()
    }

    /// Makes a machine that goes on from a checkpoint, and lets go of it when `then` is done.
    fn restore(
        &self,
        settings: &Settings,
        name: &str,
        eager: bool,
        then: impl FnOnce(&Arc<Machine>, Option<&Restorer>),
    ) {
        let reader = self.open(name);
        let state: MachineState = state_of(&serde_json::from_slice(&reader.state().unwrap()).unwrap());
        let (mut watch, mut restorer) = (None, None);
        let fill = |memory: &_| {
            let watch = watch.insert(Watch::new(Watch::open()?, memory, Sizes::USUAL)?);
            if eager {
                return restore_all(watch, &reader, 2, &Silent);
            }
            restorer = Some(Restorer::begin(watch, reader, RestoreOptions::default())?);
            Ok(())
        };
        let machine = Arc::new(Machine::restore(settings, &state, fill).unwrap());
        then(&machine, restorer.as_ref());
        machine.stop();
        drop(machine);
        drop(restorer);
        drop(watch);
    }
}

/// Checks that what a guest that churns has written is of one instant: it counts places up in order, so that there is one
/// place before which all are ahead by one.
fn check_instant(memory: &[u8]) {
    let at = |n: u64| {
        let place = (AT + n * STEP) as usize;
        u64::from_le_bytes(memory[place..place + 8].try_into().unwrap())
    };
    let values: Vec<u64> = (0..LEN / STEP).map(at).collect();
    let (first, last) = (values[0], *values.last().unwrap());
    assert!(first > 0 && first - last <= 1, "{first} {last}");
    assert!(values.windows(2).all(|pair| pair[0] >= pair[1]), "a place is ahead of one before it");
}

fn check_twin(machine: &Machine, twin: &Twin) {
    let (was, is) = (registers(twin.state.clone()), registers(json(machine)));
    assert!(was == is, "{}", differs(&was, &is).unwrap_or_default());
    let mut there = vec![0; twin.memory.len()];
    machine.memory().read_slice(&mut there, GuestAddress(0)).unwrap();
    // The generation is another one, as it should.
    let generation = 0xf_f000..0xf_f010;
    there[generation.clone()].copy_from_slice(&twin.memory[generation]);
    let first = twin.memory.iter().zip(&there).position(|(was, is)| was != is);
    assert_eq!(first, None);
}

#[test]
fn every_byte_and_register_of_a_guest_that_writes_is_that_of_the_instant() {
    if !require_kvm() {
        return;
    }
    for cpus in [1, 2] {
        let mut settings = settings(&format!("say=begun churn={AT},{LEN},{STEP} echo off"));
        settings.cpus = cpus;
        let machine = start(&settings);
        wait_for(&machine, "churning");
        std::thread::sleep(Duration::from_millis(50));
        let place = Place::new();
        let watch = Watch::new(Watch::open().unwrap(), machine.memory(), Sizes::USUAL).unwrap();
        let mut twins = Vec::new();
        for (name, parent) in [("one", None), ("two", Some("one")), ("three", Some("two"))] {
            let (twin, figures) = place.save(&machine, &watch, name, parent);
            check_instant(&twin.memory);
            assert_eq!(parent.is_some(), figures.inherited > 0, "{figures:?}");
            twins.push((name, twin));
            std::thread::sleep(Duration::from_millis(20));
        }
        machine.stop();
        assert_eq!(wait(&machine), Ending::Stopped);
        drop(machine);
        drop(watch);
        for (name, twin) in &twins {
            for eager in [true, false] {
                place.restore(&settings, name, eager, |machine, restorer| {
                    check_twin(machine, twin);
                    if let Some(restorer) = restorer {
                        restorer.wait_filled().unwrap();
                        assert!(restorer.figures().resident);
                    }
                    machine.resume();
                    machine.type_in(b"x\n");
                    assert_eq!(wait(machine), Ending::PowerOff);
                    assert_eq!(said(machine), "churned\nx\n", "{name}");
                    let mut memory = vec![0; twin.memory.len()];
                    machine.memory().read_slice(&mut memory, GuestAddress(0)).unwrap();
                    check_instant(&memory);
                });
            }
        }
    }
}

#[test]
fn a_guest_that_is_not_there_yet_is_saved_again() {
    if !require_kvm() {
        return;
    }
    let settings = settings(&format!("say=begun churn={AT},{LEN},{STEP} echo off"));
    let machine = start(&settings);
    wait_for(&machine, "churning");
    let place = Place::new();
    let watch = Watch::new(Watch::open().unwrap(), machine.memory(), Sizes::USUAL).unwrap();
    place.save(&machine, &watch, "one", None);
    machine.stop();
    drop(machine);
    drop(watch);
    // Most of its memory has not been brought when the second is made.
    let reader = place.open("one");
    let state = state_of(&serde_json::from_slice(&reader.state().unwrap()).unwrap());
    let (mut watch, mut restorer) = (None, None);
    let options = RestoreOptions { background: false, ..RestoreOptions::default() };
    let fill = |memory: &_| {
        let watch = watch.insert(Watch::new(Watch::open()?, memory, Sizes::USUAL)?);
        restorer = Some(Restorer::begin(watch, reader, options)?);
        Ok(())
    };
    let machine = Arc::new(Machine::restore(&settings, &state, fill).unwrap());
    machine.resume();
    std::thread::sleep(Duration::from_millis(20));
    let (watch, restorer) = (watch.unwrap(), restorer.unwrap());
    let (twin, _) = place.save(&machine, &watch, "two", None);
    check_instant(&twin.memory);
    machine.stop();
    drop((machine, restorer, watch));
    place.restore(&settings, "two", false, |machine, _| check_twin(machine, &twin));
}
