//! The life of a guest, from its first boot to its end, over each way to attach a disk.

use std::fs;
use std::path::Path;

use serde_json::json;

use super::machine::{Machine, PROCESSORS};
use super::parts::Parts;
use crate::real::{FileSystem, Loop, Place, command, run, wait_for};

const DISK: &str = "guest";
const SIZE: u64 = 256 << 20;
const GROWN: u64 = 320 << 20;
/// Each is a process in the guest that writes files.
const LOADS: [&str; 2] = ["a", "b"];
/// Files that each load has synced between two snapshots, at least.
const FILES: u64 = 6;

/// How QEMU comes to the disk.
#[derive(Clone, Copy)]
enum Way {
    /// The file in the mount, past the host's page cache.
    File,
}

impl Way {
    fn arguments(self, place: &Place) -> Vec<String> {
        let drive = match self {
            Self::File => format!("file={},format=raw,cache=none,discard=unmap", place.disk(DISK).display()),
        };
        let device = format!("virtio-blk-pci,drive=disk,num-queues={PROCESSORS}");
        vec!["-drive".into(), format!("{drive},if=none,id=disk"), "-device".into(), device]
    }
}

#[test]
fn a_guest_lives_on_a_file_in_the_mount() {
    live(Way::File);
}

#[test]
fn a_guest_that_is_killed_loses_nothing_it_had_synced_to_a_file_in_the_mount() {
    die(Way::File);
}

fn live(way: Way) {
    let Some(place) = Place::new() else { return };
    let Some(parts) = Parts::make(&place.cli.path("parts")) else { return };
    let server = place.serve();
    place.cli.json(&["create", DISK, "--size", &SIZE.to_string()]);
    parts.fill(&place.disk(DISK));
    place.wait_until_free(DISK);

    let mut guest = Machine::boot(&parts, &place.cli.path("machine"), &way.arguments(&place));
    assert_eq!(guest.run("sed -n 's,^/dev/vda / \\([^ ]*\\) .*,\\1,p' /proc/mounts"), "ext4");
    assert_eq!(guest.run("ls /sys/block/vda/mq | wc -l"), PROCESSORS.to_string(), "each processor has a queue");

    let synced = write_under_snapshots(&place, &mut guest);
    guest.reboot();
    files_are_there_inside(&mut guest, &synced);
    grow(way, &place, &mut guest);
    trim(&place, &mut guest);
    guest.power_off();

    place.wait_until_free(DISK);
    run("e2fsck", ["-f".as_ref(), "-n".as_ref(), place.disk(DISK).as_os_str()]);
    files_are_there(&place, DISK, &synced);
    server.stop();
    place.check();
}

fn die(way: Way) {
    let Some(place) = Place::new() else { return };
    let Some(parts) = Parts::make(&place.cli.path("parts")) else { return };
    let server = place.serve();
    place.cli.json(&["create", DISK, "--size", &SIZE.to_string()]);
    parts.fill(&place.disk(DISK));
    place.wait_until_free(DISK);

    let mut guest = Machine::boot(&parts, &place.cli.path("machine"), &way.arguments(&place));
    start_loads(&mut guest);
    wait_for("the guest writes", || LOADS.iter().all(|load| guest.synced(load) >= FILES));
    let synced = LOADS.map(|load| guest.synced(load));
    guest.kill();
    place.wait_until_free(DISK);
    replay(&place.disk(DISK));
    files_are_there(&place, DISK, &synced);
    server.stop();
    place.check();
}

fn start_loads(guest: &mut Machine) {
    for load in LOADS {
        guest.run(&format!("load {load} < /dev/null > /dev/console 2>&1 &"));
    }
}

/// Takes snapshots while the guest writes, proves what they must hold, and returns what the guest has synced in the end.
fn write_under_snapshots(place: &Place, guest: &mut Machine) -> [u64; 2] {
    start_loads(guest);
    let mut snapshots = Vec::new();
    let mut certain = [0; 2];
    for name in ["s1", "s2", "s3"] {
        let before = certain;
        wait_for("the guest writes on", || LOADS.iter().zip(before).all(|(load, n)| guest.synced(load) >= n + FILES));
        certain = LOADS.map(|load| guest.synced(load));
        place.cli.json(&["snapshot", &format!("{DISK}@{name}")]);
        snapshots.push((name, certain));
        // What the guest writes on into is none of the snapshot's.
        snapshot_is_sound(place, name, &certain);
    }
    guest.run("touch /tmp/stop");
    wait_for("the loads stop", || LOADS.iter().all(|load| guest.console().contains(&format!("stopped {load}"))));
    for (name, certain) in snapshots {
        snapshot_is_sound(place, name, &certain);
    }
    LOADS.map(|load| guest.synced(load))
}

/// Proves that a snapshot is a disk as a power cut would have left it, with everything that was synced before.
fn snapshot_is_sound(place: &Place, name: &str, certain: &[u64; 2]) {
    place.cli.json(&["clone", &format!("{DISK}@{name}"), "twin"]);
    let twin = place.disk("twin");
    replay(&twin);
    files_are_there(place, "twin", certain);
    place.wait_until_free("twin");
    place.cli.json(&["rm", "twin"]);
}

/// Plays the journal of an ext4 back, which must be all there is to mend.
///
/// But for the two sums in the superblock: a kernel writes them when it unmounts and not before.
fn replay(disk: &Path) {
    let words = ["-f".as_ref(), "-y".as_ref(), disk.as_os_str()];
    let output = command("e2fsck", words).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let usual = ["Pass ", "Free blocks count wrong (", "Free inodes count wrong (", "Fix? yes"];
    let name = disk.to_str().unwrap();
    let odd: Vec<&str> = said
        .lines()
        .filter(|line| {
            !line.is_empty() && !line.starts_with(name) && !usual.iter().any(|usual| line.starts_with(usual))
        })
        .collect();
    assert!(odd.is_empty() && matches!(output.status.code(), Some(0 | 1)), "{odd:?}: {said}");
    run("e2fsck", ["-f".as_ref(), "-n".as_ref(), disk.as_os_str()]);
}

/// Proves on the host that a disk has the files up to these numbers as they were written.
fn files_are_there(place: &Place, disk: &str, upto: &[u64; 2]) {
    let device = Loop::attach(&place.disk(disk), &[]);
    let at = place.cli.path("at");
    let mounted = FileSystem::mount(&device, &at, "ro");
    for (load, upto) in LOADS.iter().zip(upto) {
        assert!(*upto >= FILES, "there is something to look for");
        for number in 1..=*upto {
            let file = at.join(load).join(number.to_string());
            let bytes = fs::read(&file).unwrap_or_else(|e| panic!("{disk}: {load} {number} of {upto}: {e}"));
            assert!(bytes == content(load, number), "{disk}: {load} {number} of {upto} has other bytes");
        }
        let last = fs::read_to_string(at.join(load).join("last")).unwrap();
        assert!(last.trim().parse::<u64>().unwrap() >= *upto, "{disk}: {load} was at {last} and not yet at {upto}");
    }
    drop(mounted);
}

/// What `load.sh` writes into a file.
fn content(load: &str, number: u64) -> Vec<u8> {
    let size = usize::try_from(1000 + number % 50 * 997).unwrap();
    format!("file {number} of {load}\n").into_bytes().into_iter().cycle().take(size).collect()
}

/// The same from inside.
fn files_are_there_inside(guest: &mut Machine, upto: &[u64; 2]) {
    for (load, upto) in LOADS.iter().zip(upto) {
        let same = format!("yes \"file $n of {load}\" | head -c $((1000 + n % 50 * 997)) | cmp - /{load}/$n");
        guest.run(&format!("for n in $(seq 1 {upto}); do {same}; done"));
    }
}

/// Grows the disk under the running guest, which writes at its new end.
fn grow(way: Way, place: &Place, guest: &mut Machine) {
    place.cli.json(&["resize", DISK, &GROWN.to_string()]);
    match way {
        Way::File => {
            guest.control("block_resize", &json!({ "device": "disk", "size": GROWN }));
        }
    }
    let sectors = (GROWN / 512).to_string();
    wait_for("the guest sees the new size", || guest.run("cat /sys/block/vda/size") == sectors);
    let last = (GROWN >> 20) - 1;
    guest.run(&format!("yes 'the new end' | dd of=/dev/vda bs=1M count=1 seek={last} iflag=fullblock conv=fsync"));
    place.cli.json(&["snapshot", &format!("{DISK}@grown")]);
    let grown = fs::read(place.snapshot(DISK, "grown")).unwrap();
    assert_eq!(grown.len() as u64, GROWN);
    let end = &grown[grown.len() - (1 << 20)..];
    assert!(end.iter().eq(b"the new end\n".iter().cycle().take(1 << 20)), "what the guest wrote at the new end");
}

/// Bytes that the segments of the pool take on the host.
fn on_host(place: &Place) -> u64 {
    let said = run("du", ["-s".as_ref(), "-B1".as_ref(), place.cli.pool().join("segments").as_os_str()]);
    said.split_whitespace().next().unwrap().parse().unwrap()
}

/// Deletes a file in the guest and trims: the space comes back, of the disk and on the host.
fn trim(place: &Place, guest: &mut Machine) {
    let referenced = || place.number(&["info", DISK], "referenced");
    guest.run("dd if=/dev/urandom of=/big bs=1M count=48 conv=fsync 2>/dev/null");
    let (full, full_on_host) = (referenced(), on_host(place));
    guest.run("rm /big; sync; fstrim /");
    let trimmed = referenced();
    assert!(trimmed + (40 << 20) < full, "fstrim gives space back: {full}, then {trimmed}");
    place.cli.json(&["reclaim", "--wait"]);
    let trimmed = on_host(place);
    assert!(trimmed + (40 << 20) < full_on_host, "and so does the pool: {full_on_host}, then {trimmed}");
}
