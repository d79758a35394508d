//! A guest of QEMU is saved into a checkpoint, and goes on from the files that the mount shows of it, twice side by side.

use std::fs;
use std::path::Path;

use super::machine::Machine;
use super::parts::Parts;
use crate::real::Place;

const DISK: &str = "guest";
const CHECKPOINT: &str = "guest@instant";
const MEMORY: u64 = 256 << 20;
/// Counts for as long as it lives; what it has come to and who it is stand in the memory of the guest alone.
const COUNTER: &str = "echo $$ > /tmp/who; n=0; while :; do n=$((n + 1)); echo $n > /tmp/new; mv /tmp/new /tmp/count; \
                       usleep 20000; done";

/// What tells one process of one boot from all others: the boot, its number, and when it was started.
fn identity(guest: &mut Machine) -> String {
    guest.run("cat /proc/sys/kernel/random/boot_id; who=$(cat /tmp/who); echo $who; cut -d ' ' -f 22 /proc/$who/stat")
}

fn count(guest: &mut Machine) -> u64 {
    guest.run("cat /tmp/count").parse().unwrap()
}

/// Waits until the program in the guest has counted on.
fn counts_on(guest: &mut Machine, from: u64) {
    guest.run(&format!(
        "for try in $(seq 600); do [ $(cat /tmp/count) -le {from} ] || exit 0; usleep 50000; done; exit 1"
    ));
}

fn drive(disk: &Path) -> Vec<String> {
    let drive = format!("file={},cache=none,format=raw,if=none,id=disk", disk.display());
    ["-drive", &drive, "-device", "virtio-blk-pci,drive=disk"].map(str::to_owned).to_vec()
}

/// Returns how many KiB of what a process has mapped of a file others have mapped as well.
fn shared_kib(process: u32, file: &Path) -> u64 {
    let maps = fs::read_to_string(format!("/proc/{process}/smaps")).unwrap();
    let (mut inside, mut sum) = (false, 0);
    for line in maps.lines() {
        if line.split(' ').next().is_some_and(|word| word.contains('-')) {
            inside = line.ends_with(file.to_str().unwrap());
        } else if inside && let Some(rest) = line.strip_prefix("Shared_Clean:") {
            sum += rest.trim().trim_end_matches(" kB").parse::<u64>().unwrap();
        }
    }
    sum
}

#[test]
fn a_guest_of_qemu_goes_on_from_the_files_of_a_checkpoint() {
    let Some(place) = Place::new() else { return };
    let Some(parts) = Parts::make(&place.cli.path("parts")) else { return };
    let server = place.serve();
    place.cli.json(&["create", DISK, "--size", "256M"]);
    parts.fill(&place.disk(DISK));
    place.wait_until_free(DISK);

    let (memory, devices) = (place.cli.path("memory"), place.cli.path("devices"));
    let mut guest = Machine::boot_in(&parts, &place.cli.path("first"), &memory, &drive(&place.disk(DISK)));
    guest.run(&format!("sh -c '{COUNTER}' < /dev/null > /dev/null 2>&1 &"));
    guest.run("until [ -s /tmp/count ]; do usleep 10000; done; echo before > /file; sync");
    counts_on(&mut guest, 10);
    let who = identity(&mut guest);
    let before = count(&mut guest);
    guest.suspend(&devices, || drop(place.cli.json(&["snapshot", "guest@instant"])));

    let (memory_word, devices_word) = (memory.to_str().unwrap(), devices.to_str().unwrap());
    let words = ["checkpoint", "save", "--memory-file", memory_word, "--state", devices_word];
    place.cli.json(&[&words[..], &["--disk", "guest@instant", "--into", CHECKPOINT]].concat());
    let of = |part: &str| place.mnt().join("checkpoints/guest/instant").join(part);
    assert!(fs::read(of("devices")).unwrap() == fs::read(&devices).unwrap(), "byte for byte");
    let stored = place.number(&["checkpoint", "info", CHECKPOINT], "stored");
    assert!(stored < MEMORY / 3, "{stored} bytes of {MEMORY} are stored");
    // What goes on has nothing but the checkpoint.
    fs::remove_file(&memory).unwrap();
    fs::remove_file(&devices).unwrap();

    let mut twins = Vec::new();
    for twin in ["twin1", "twin2"] {
        place.cli.json(&["clone", "guest@instant", twin]);
        let files = (of("memory"), of("devices"));
        let dir = place.cli.path(twin);
        let mut guest = Machine::resume(&parts, &dir, (&files.0, &files.1), &drive(&place.disk(twin)));
        assert_eq!(identity(&mut guest), who, "{twin}: the same process of the same boot");
        let now = count(&mut guest);
        assert!(now >= before, "{twin}: it was at {before} and is at {now}");
        counts_on(&mut guest, now);
        guest.run(&format!(
            "[ \"$(cat /file)\" = before ]; echo {twin} > /file; sync; echo 3 > /proc/sys/vm/drop_caches"
        ));
        twins.push(guest);
    }
    for (guest, twin) in twins.iter_mut().zip(["twin1", "twin2"]) {
        assert_eq!(guest.run("cat /file"), twin, "each has a disk of its own");
        assert_eq!(identity(guest), who);
    }
    // What neither has written they have from the same pages of the host.
    for guest in &twins {
        let shared = shared_kib(guest.process(), &of("memory"));
        assert!(shared > 4096, "{shared} KiB are shared");
    }
    let (code, error) = place.cli.error(&["checkpoint", "rm", CHECKPOINT]);
    assert!(code == 4 && error["message"].as_str().unwrap().contains(CHECKPOINT), "{error}");
    twins.into_iter().for_each(Machine::kill);
    place.cli.json(&["checkpoint", "rm", CHECKPOINT]);
    server.stop();
    place.check();
}
