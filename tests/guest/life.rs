//! The life of a guest, from its first boot to its end, over each way to attach a disk.

use std::fs;
use std::path::Path;

use serde_json::json;

use super::machine::{Machine, PROCESSORS};
use super::parts::Parts;
use crate::real::{FileSystem, Loop, Place, Server, command, run, wait_for};

const DISK: &str = "guest";
const SIZE: u64 = 256 << 20;
const GROWN: u64 = 320 << 20;
/// Each is a process in the guest that writes files.
const LOADS: [&str; 2] = ["a", "b"];
/// Files that each load has synced between two snapshots, at least.
const FILES: u64 = 6;

/// How QEMU comes to the disk.
#[derive(Clone, Copy, PartialEq)]
enum Way {
    /// The file in the mount, past the host's page cache.
    File,
    /// An NBD server on a Unix socket, with QEMU as its client.
    Nbd,
    /// The guest's queues in its memory, which QEMU shares with the server.
    VhostUser,
}

impl Way {
    /// Serves the disk, if it has to be, also again after a restart.
    fn attach(self, place: &Place) {
        let socket = socket(place);
        let queues = PROCESSORS.to_string();
        match self {
            Self::File => return,
            Self::Nbd => place.cli.json(&["attach", "nbd", DISK, "--socket", &socket, "--persist"]),
            Self::VhostUser => {
                let words = ["attach", "vhost-user", DISK, "--socket", &socket, "--queues", &queues, "--persist"];
                place.cli.json(&words)
            }
        };
    }

    fn detach(self, place: &Place) {
        if self != Self::File {
            place.cli.json(&["detach", DISK]);
        }
    }

    /// What QEMU is told to have the disk. When the server is gone, it waits for it to come back.
    fn arguments(self, place: &Place) -> Vec<String> {
        let drive = match self {
            Self::File => format!("file={},cache=none", place.disk(DISK).display()),
            Self::Nbd => format!("file=nbd+unix:///{DISK}?socket={},file.reconnect-delay=60", socket(place)),
            Self::VhostUser => {
                let socket = format!("socket,id=disk,path={},reconnect-ms=50", socket(place));
                let device = format!("vhost-user-blk-pci,chardev=disk,num-queues={PROCESSORS}");
                return ["-chardev", &socket, "-device", &device].map(str::to_owned).to_vec();
            }
        };
        let drive = format!("{drive},format=raw,discard=unmap,if=none,id=disk");
        let device = format!("virtio-blk-pci,drive=disk,num-queues={PROCESSORS}");
        ["-drive", &drive, "-device", &device].map(str::to_owned).to_vec()
    }
}

fn socket(place: &Place) -> String {
    place.cli.path("disk.sock").to_str().unwrap().to_owned()
}

#[test]
fn a_guest_lives_on_a_file_in_the_mount() {
    live(Way::File);
}

#[test]
fn a_guest_lives_on_a_disk_over_nbd() {
    live(Way::Nbd);
}

#[test]
fn a_guest_lives_on_a_disk_over_vhost_user() {
    live(Way::VhostUser);
}

#[test]
fn a_guest_that_is_killed_loses_nothing_it_had_synced_to_a_file_in_the_mount() {
    die(Way::File);
}

#[test]
fn a_guest_that_is_killed_loses_nothing_it_had_synced_over_nbd() {
    die(Way::Nbd);
}

#[test]
fn a_guest_that_is_killed_loses_nothing_it_had_synced_over_vhost_user() {
    die(Way::VhostUser);
}

#[test]
fn a_guest_waits_for_its_nbd_server_to_come_back_and_misses_nothing() {
    outlive(Way::Nbd);
}

#[test]
fn a_guest_waits_for_its_vhost_user_server_to_come_back_and_misses_nothing() {
    outlive(Way::VhostUser);
}

/// A pool that is served, with a disk to run from, and what else a guest is made of.
struct Stage {
    place: Place,
    parts: Parts,
    server: Server,
    way: Way,
}

impl Stage {
    /// `None`, said loudly, where guests cannot run.
    fn set(way: Way) -> Option<Self> {
        let place = Place::new()?;
        let parts = Parts::make(&place.cli.path("parts"))?;
        let server = place.serve();
        place.cli.json(&["create", DISK, "--size", &SIZE.to_string()]);
        parts.fill(&place.disk(DISK));
        place.wait_until_free(DISK);
        way.attach(&place);
        Some(Self { place, parts, server, way })
    }

    fn boot(&self) -> Machine {
        Machine::boot(&self.parts, &self.place.cli.path("machine"), &self.way.arguments(&self.place))
    }

    /// Kills the server and starts it again, beside the running guest.
    fn kill_server(self) -> Self {
        let Self { place, parts, server, way } = self;
        server.kill();
        let server = place.serve();
        Self { place, parts, server, way }
    }

    /// Proves, when the guest is gone, that what it had synced is there, and that the pool is sound.
    fn leave(self, synced: &[u64; 2]) {
        let Self { place, server, way, .. } = self;
        way.detach(&place);
        place.wait_until_free(DISK);
        replay(&place.disk(DISK));
        files_are_there(&place, DISK, synced);
        server.stop();
        place.check();
    }
}

fn live(way: Way) {
    let Some(stage) = Stage::set(way) else { return };
    let place = &stage.place;
    let mut guest = stage.boot();
    assert_eq!(guest.run("sed -n 's,^/dev/vda / \\([^ ]*\\) .*,\\1,p' /proc/mounts"), "ext4");
    assert_eq!(guest.run("ls /sys/block/vda/mq | wc -l"), PROCESSORS.to_string(), "each processor has a queue");

    let synced = write_under_snapshots(place, &mut guest);
    find_no_fault(&mut guest);
    guest.reboot();
    files_are_there_inside(&mut guest, &synced);
    let mut guest = grow(&stage, guest);
    trim(place, &mut guest);
    guest.power_off();
    // It has unmounted its disk, so that nothing is left to be mended.
    stage.way.detach(place);
    place.wait_until_free(DISK);
    run("e2fsck", ["-f".as_ref(), "-n".as_ref(), place.disk(DISK).as_os_str()]);
    stage.way.attach(place);
    stage.leave(&synced);
}

fn die(way: Way) {
    let Some(stage) = Stage::set(way) else { return };
    let mut guest = stage.boot();
    start_loads(&mut guest);
    let synced = wait_for_files(&guest, [0; 2]);
    guest.kill();
    stage.leave(&synced);
}

/// Kills the server between a write that was answered and the flush that is to make it durable.
///
/// The guest does not learn that the server was another one; so the flush must hold for what the first one had answered.
fn overwrite_under_a_kill(mut stage: Stage, guest: &mut Machine) -> Stage {
    guest.run("yes old | dd of=/file bs=64k count=16 iflag=fullblock conv=fsync");
    guest.run("yes new | dd of=/tmp/new bs=64k count=16 iflag=fullblock");
    // From now on each block gets a new place when it is written.
    stage.place.cli.json(&["snapshot", &format!("{DISK}@old")]);
    let is_new =
        "dd if=/file bs=64k iflag=direct of=/tmp/seen; cmp /tmp/seen /tmp/new || { head -n 1 /tmp/seen; exit 1; }";
    guest.run(&format!("dd if=/tmp/new of=/file bs=64k oflag=direct conv=notrunc; {is_new}"));
    stage = stage.kill_server();
    guest.run(&format!("sync; {is_new}"));
    stage
}

fn outlive(way: Way) {
    let Some(mut stage) = Stage::set(way) else { return };
    let mut guest = stage.boot();
    start_loads(&mut guest);
    let mut synced = [0; 2];
    for _ in 0..3 {
        synced = wait_for_files(&guest, synced);
        stage = stage.kill_server();
    }
    wait_for_files(&guest, synced);
    let synced = stop_loads(&mut guest);
    stage = overwrite_under_a_kill(stage, &mut guest);
    files_are_there_inside(&mut guest, &synced);
    let said = guest.run("dmesg | grep -iE 'error|abort' || true");
    assert_eq!(said, "", "the guest noticed nothing");
    guest.power_off();
    stage.leave(&synced);
}

/// Settings of fsx in the guest.
const FSX: &str = "flen = 1048576
weights = { close_open = 1, read = 3, write = 10, mapread = 2, mapwrite = 5, truncate = 3, invalidate = 1, fsync = 1,\
 fdatasync = 1, posix_fallocate = 1, punch_hole = 4, sendfile = 1 }
";

/// Runs fsx in the guest, on a file of its file system, and reads from the disk what it left.
fn find_no_fault(guest: &mut Machine) {
    guest.run(&format!("mkdir -p /x; cat > /x/fsx.toml << 'END'\n{FSX}END"));
    for seed in 1..=2 {
        guest.run(&format!(
            "cd /x; rm -f file; fsx -f fsx.toml -P . -S {seed} -N 300 file > said 2>&1 || {{ tail -n 60 said; exit 1; }}\n\
             cp file /tmp/file; sync; echo 3 > /proc/sys/vm/drop_caches; cmp file /tmp/file"
        ));
    }
}

/// Waits until each load has synced so many files more than before, and returns how many that are.
fn wait_for_files(guest: &Machine, before: [u64; 2]) -> [u64; 2] {
    wait_for("the guest writes on", || LOADS.iter().zip(before).all(|(load, n)| guest.synced(load) >= n + FILES));
    LOADS.map(|load| guest.synced(load))
}

/// Ends the writing and returns how many files are synced.
fn stop_loads(guest: &mut Machine) -> [u64; 2] {
    guest.run("touch /tmp/stop");
    wait_for("the loads stop", || LOADS.iter().all(|load| guest.console().contains(&format!("stopped {load}"))));
    LOADS.map(|load| guest.synced(load))
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
        certain = wait_for_files(guest, certain);
        place.cli.json(&["snapshot", &format!("{DISK}@{name}")]);
        snapshots.push((name, certain));
        snapshot_is_sound(place, name, &certain);
    }
    let synced = stop_loads(guest);
    // What was written since is none of the snapshots'.
    for (name, certain) in snapshots {
        snapshot_is_sound(place, name, &certain);
    }
    synced
}

/// Proves that a snapshot is a disk as a power cut would have left it, with everything that was synced before.
fn snapshot_is_sound(place: &Place, name: &str, certain: &[u64; 2]) {
    snapshot_can_be_mounted(place, name);
    place.cli.json(&["clone", &format!("{DISK}@{name}"), "twin"]);
    let twin = place.disk("twin");
    replay(&twin);
    files_are_there(place, "twin", certain);
    place.wait_until_free("twin");
    place.cli.json(&["rm", "twin"]);
}

/// Proves that a snapshot can be looked at as it is, without a copy to which its journal could be played back: it mounts
/// read-only, and what a mount without the journal shows can be read.
///
/// What the guest has synced may be in the journal alone (that is how ext4 makes it durable), and e2fsck counts what is there as
/// errors then. So that every file is there and nothing is wrong is for the copy to show, and here that e2fsck can do its work.
fn snapshot_can_be_mounted(place: &Place, name: &str) {
    let path = place.snapshot(DISK, name);
    let output = command("e2fsck", ["-f".as_ref(), "-n".as_ref(), path.as_os_str()]).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(matches!(output.status.code(), Some(0 | 4)), "{name}: {:?}: {said}", output.status);
    let device = Loop::attach(&path, &["-r"]);
    let at = place.cli.path("at");
    let mounted = FileSystem::mount(&device, &at, "ro,noload");
    // A directory that is in the journal alone is not to be seen yet.
    for load in LOADS.iter().filter(|load| at.join(load).exists()) {
        for file in fs::read_dir(at.join(load)).unwrap() {
            fs::read(file.unwrap().path()).unwrap();
        }
    }
    drop(mounted);
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
            let want = content(load, number);
            let same = bytes.iter().zip(&want).take_while(|(a, b)| a == b).count();
            let zeros = bytes[same..].iter().take_while(|byte| **byte == 0).count();
            let (had, wants) = (bytes.len(), want.len());
            assert!(
                bytes == want,
                "{disk}: {load} {number} of {upto}: {had} bytes, wanted {wants}; same up to {same}, then {zeros} zeros"
            );
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
///
/// NBD tells the size when a client comes, so QEMU is started anew there.
fn grow(stage: &Stage, mut guest: Machine) -> Machine {
    let place = &stage.place;
    if stage.way == Way::Nbd {
        guest.power_off();
        place.cli.json(&["resize", DISK, &GROWN.to_string()]);
        guest = stage.boot();
    } else {
        place.cli.json(&["resize", DISK, &GROWN.to_string()]);
    }
    if stage.way == Way::File {
        guest.control("block_resize", &json!({ "device": "disk", "size": GROWN }));
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
    guest
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
