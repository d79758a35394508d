//! An ordinary Debian kernel goes on in another process, on another machine of KVM, while its programs run: they count, write
//! to its disk and compute, and notice nothing but that time went by.
//!
//! The test runs itself again inside the machine that QEMU emulates, once for each process the guest lives in.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use afterimage::vmm::{Boot, DiskSettings, Ending, FileDisk, Machine, MachineState, Settings};
use uuid::Uuid;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use super::nested::{Nested, check_complaints, program};
use super::toy::{MIB, said, wait};
use crate::real::run;

/// Says which part of the life of the guest this process is.
const PART: &str = "AFTERIMAGE_TEST_PART";
/// Where the parts leave things for each other, inside.
const DIR: &str = "/mnt";
/// Lines of the counter in each part.
const COUNTS: u64 = 15;
/// Seconds that a clock may be behind on processors that are emulated, from when its kernel began; less than nobody runs the
/// guest between two parts.
const CLOCK_BEHIND_MAX: u64 = 6;
const PAGE: usize = 4096;

#[test]
fn a_debian_kernel_goes_on_in_another_process() {
    if let Some(part) = std::env::var_os(PART) {
        return live(part.to_str().unwrap());
    }
    let Some(nested) = Nested::new("moved-guest.sh") else { return };
    let here = nested.dir.path().join("tests");
    run("strip", [Path::new("-o"), &here, &std::env::current_exe().unwrap()]);
    let (code, said) = nested.run("moved-host.sh", &[here.to_str().unwrap(), &program("mke2fs"), &program("e2fsck")]);
    assert_eq!(code, Some(0), "{said}");
    for wanted in [
        "guest: begun",
        "guest: heard end",
        "guest: every line is there",
        "guest: kinds of sums 1\n",
        "guest: processor 0 lives\nguest: processor 1 lives\nguest: slept\nguest: random 512\n",
        "guest: told that it is another 3 times",
        "guest: off",
        "host: the disk is clean",
    ] {
        assert!(said.contains(wanted), "no '{wanted}' in: {said}");
    }
    check_complaints(&said);
}

fn settings() -> Settings {
    let command_line = "console=ttyS0 panic=-1 quiet".into();
    Settings {
        boot: Boot { kernel: "/vmlinuz".into(), initrd: Some("/guest.gz".into()), command_line },
        memory: 256 * MIB,
        cpus: 2,
        disks: vec![DiskSettings {
            device: Arc::new(FileDisk::open(Path::new("/mnt/root.raw"), false).unwrap()),
            read_only: false,
            serial: "root".into(),
        }],
        nets: Vec::new(),
        generation: Uuid::new_v4(),
    }
}

/// One part of the life of the guest.
fn live(part: &str) {
    let settings = settings();
    let machine = Arc::new(if part == "begin" {
        Machine::new(&settings).unwrap()
    } else {
        let state = MachineState::decode(&fs::read(format!("{DIR}/state")).unwrap()).unwrap();
        Machine::restore(&settings, &state, read_memory).unwrap()
    });
    let before = fs::read_to_string(format!("{DIR}/said")).unwrap_or_default();
    let begun = host_seconds();
    machine.resume();
    let end = listen(&machine, &before, begun);
    if part == "end" {
        machine.type_in(b"end\n");
        assert_eq!(wait(&machine), Ending::PowerOff);
        println!("{before}{}", said(&machine));
        return check_counts(&format!("{before}{}", said(&machine)), end);
    }
    machine.pause();
    fs::write(format!("{DIR}/state"), machine.state().unwrap().encode().unwrap()).unwrap();
    write_memory(machine.memory());
    fs::write(format!("{DIR}/said"), format!("{before}{}", said(&machine))).unwrap();
}

/// Listens until the guest has counted on for a while, and its clock is right: what it says for a line lies between two looks
/// at the clock of the host, one when the line before the last was not there yet, and one when the line is. So it does not
/// count how long a line takes from the guest to here. Returns where it is then.
fn listen(machine: &Machine, before: &str, begun: u64) -> u64 {
    let log = machine.console();
    let (mut text, mut next) = (before.to_owned(), 0);
    let first = counts(&text).last().map_or(0, |(n, _)| *n);
    // For each line from `first + 1` on, when it was not whole yet.
    let (mut missing, mut looked) = (Vec::new(), begun);
    loop {
        let looks = host_seconds();
        let part = log.part(next).unwrap_or_else(|| panic!("it ended: {text}"));
        next = part.start + part.bytes.len() as u64;
        text.push_str(&String::from_utf8_lossy(&part.bytes));
        let counts = counts(&text);
        let now = host_seconds();
        for (n, time) in counts.iter().filter(|(n, _)| *n > first + missing.len() as u64).copied().collect::<Vec<_>>() {
            missing.push(looked);
            // The first line may have been made before the guest was stopped. Whole seconds are up to one apart.
            let earliest = missing.len().checked_sub(3).map_or(begun, |at| missing[at]) - CLOCK_BEHIND_MAX;
            let is_right = n <= first + 1 || (earliest..=now + 1).contains(&time);
            assert!(is_right, "at {n} it is {earliest} to {now}, and the guest says {time}: {text}");
        }
        looked = looks;
        if let Some((last, _)) = counts.last().filter(|(last, _)| *last >= first + COUNTS) {
            return *last;
        }
    }
}

fn host_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()
}

/// Returns what the counter said in whole lines.
fn counts(text: &str) -> Vec<(u64, u64)> {
    let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
    let number = |line: &str| {
        let (n, time) = line.trim_end().strip_prefix("count ")?.split_once(' ')?;
        Some((n.parse().ok()?, time.parse().ok()?))
    };
    whole.lines().filter_map(number).collect()
}

/// Checks that the counter left out no number, and said none twice.
fn check_counts(text: &str, at_least: u64) {
    let numbers: Vec<u64> = counts(text).iter().map(|(n, _)| *n).collect();
    assert!(numbers.len() as u64 >= at_least, "{numbers:?}");
    assert!(numbers.iter().copied().eq(1..=numbers.len() as u64), "{numbers:?}");
    assert!(text.contains(&format!("guest: counted {}", numbers.len())), "{text}");
}

/// Writes all memory that is not zeros to a file.
fn write_memory(memory: &GuestMemoryMmap<()>) {
    let path = format!("{DIR}/memory");
    fs::remove_file(&path).ok();
    let file = fs::File::create(path).unwrap();
    let mut page = [0; PAGE];
    for region in memory.iter() {
        for at in (region.start_addr().raw_value()..).step_by(PAGE).take(region.len() as usize / PAGE) {
            memory.read_slice(&mut page, GuestAddress(at)).unwrap();
            if page != [0; PAGE] {
                file.write_all_at(&page, at).unwrap();
            }
        }
    }
}

fn read_memory(memory: &GuestMemoryMmap<()>) -> afterimage::error::Result<()> {
    let whole = fs::read(format!("{DIR}/memory")).unwrap();
    for (n, page) in whole.chunks(PAGE).enumerate().filter(|(_, page)| **page != [0; PAGE][..page.len()]) {
        memory.write_slice(page, GuestAddress((n * PAGE) as u64)).unwrap();
    }
    Ok(())
}
