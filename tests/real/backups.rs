//! Backups as a user makes them: a real file system on a disk, changed and snapshotted, copied away in four ways, retired.
//!
//! Each round changes files, takes a snapshot, and brings six copies up to it: four directories by rsync of the extent tree
//! ([`COPIES`]), a disk of a second pool by `send | receive`, and a raw file by `export` and `apply`. Then the snapshot is
//! retired. The copies are byte for byte the snapshot and pass e2fsck; what was moved is what changed; the pool takes the
//! room of what is live.
//!
//! # Rules
//! 1. A step that fails while the server is dead is done again after the server was started again; any other failure is one.
//! 2. What is moved is measured where the user would see it: in the statistics of rsync, in the length of the stream, in the
//!    data files of the increment. It may be 5 % and 64 KiB more than what `diff` tells.
//! 3. Between two directories of one machine rsync copies whole files: those are the extents that `diff` touches, and not one
//!    more. To another machine it sends what differs within them; `--no-whole-file` makes it do so here. The other machine
//!    has blocks of zeros already, and parts of others, so that may be less than what `diff` tells.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use super::{Place, Server, command, require_loop, require_programs, scratch, unmount};
use crate::tree::noise;

const SIZE: &str = "160M";
const KILLS: &str = "AFTERIMAGE_BACKUP_KILLS";

/// Directories that rsync keeps up to date: their names, its options, and whether it copies whole files.
const COPIES: [(&str, &[&str], bool); 4] = [
    ("plain", &["-a"], true),
    ("sparse", &["-aS"], true),
    ("plain-delta", &["-a", "--no-whole-file"], false),
    ("sparse-delta", &["-aS", "--no-whole-file"], false),
];

type Outcome<T = ()> = Result<T, String>;

#[test]
fn backups_are_exact_and_incremental_for_ever() {
    let Some(world) = World::new(None) else { return };
    world.live_on();
}

#[test]
fn backups_in_small_extents_are_exact_and_incremental() {
    let Some(world) = World::new(Some("2M")) else { return };
    world.live_on();
}

#[test]
fn backups_go_on_when_the_server_is_killed_at_any_moment() {
    let kills: u32 = std::env::var(KILLS).map_or(3, |text| text.parse().unwrap());
    let Some(mut world) = World::new(None) else { return };
    let begun = Instant::now();
    world.round("a", false);
    let usual = begun.elapsed();
    let mut round = 0_u64;
    while world.kills < kills {
        round += 1;
        let share = noise(1, round)[0];
        world.arm(usual * u32::from(share) / 255);
        if round.is_multiple_of(4) {
            world.step("revert", |world| world.cli(&["revert", "web@a"]).map(drop));
        }
        world.round(&format!("k{round}"), true);
        world.disarm();
    }
    println!("{} rounds, {} kills", round, world.kills);
    world.end();
}

/// A served pool, a second one, and the copies.
struct World {
    place: Place,
    server: Option<Server>,
    other: Place,
    other_server: Server,
    /// The snapshot that all copies are at.
    base: Option<String>,
    /// Snapshots that are not retired.
    live: Vec<String>,
    extent_size: u64,
    rounds: u64,
    killer: Option<JoinHandle<()>>,
    kills: u32,
    tries: u32,
}

/// What rsync says that it has copied, in bytes.
struct Moved {
    /// Of whole files.
    files: u64,
    /// That the other side did not have.
    literal: u64,
}

/// What `diff` says, in bytes.
struct Change {
    data: u64,
    zero: u64,
    /// Extent files that have any of it, and their bytes.
    extents: BTreeSet<u64>,
    extent_bytes: u64,
}

impl World {
    fn new(extent_size: Option<&str>) -> Option<Self> {
        let programs = ["rsync", "mkfs.ext4", "e2fsck", "losetup", "cmp", "dash"];
        if !require_loop() || !require_programs(&programs) {
            return None;
        }
        let (place, other) = (Place::within(scratch()), Place::within(scratch()));
        let (server, other_server) = (place.serve(), other.serve());
        place.cli.json(&["create", "web", "--size", SIZE]);
        if let Some(size) = extent_size {
            place.cli.json(&["set", "web", &format!("extent-size={size}")]);
        }
        let disk = place.cli.json(&["info", "web"]);
        let extent_size = disk["settings"]["extent-size"].as_u64().unwrap();
        let world = Self {
            place,
            server: Some(server),
            other,
            other_server,
            base: None,
            live: Vec::new(),
            extent_size,
            rounds: 0,
            killer: None,
            kills: 0,
            tries: 0,
        };
        let device = Device::attach(&world.place.disk("web")).unwrap();
        call("mkfs.ext4", ["-q", "-F", &device.0]).unwrap();
        drop(device);
        Some(world)
    }

    /// Goes through all that a user does, and a revert.
    fn live_on(mut self) {
        self.round("a", false);
        self.round("b", true);
        self.round("c", true);
        // Back to the one snapshot that is still live. The base of the next increment is retired, and on another branch.
        self.step("revert", |world| world.cli(&["revert", "web@a"]).map(drop));
        self.round("d", true);
        self.round("e", true);
        self.end();
    }

    fn path(&self, name: &str) -> PathBuf {
        self.place.cli.path(name)
    }

    fn cli(&self, words: &[&str]) -> Outcome<Value> {
        let output = self.place.cli.command(&[&["--json"], words].concat()).output().unwrap();
        if !output.status.success() {
            return Err(format!("{words:?}: {}", String::from_utf8_lossy(&output.stderr)));
        }
        serde_json::from_slice(&output.stdout).map_err(|e| format!("{words:?}: {e}"))
    }

    /// Does a step, again if the server was killed meanwhile.
    fn step<T>(&mut self, what: &str, mut work: impl FnMut(&Self) -> Outcome<T>) -> T {
        loop {
            let error = match work(self) {
                Ok(done) => return done,
                Err(error) => error,
            };
            let server = self.server.as_mut().unwrap();
            // A kill takes a moment to be seen.
            std::thread::sleep(Duration::from_millis(100));
            let dead = server.child.try_wait().unwrap().is_some();
            assert!(dead, "{what}: {error}\nlog of the server:\n{}", self.place.log());
            self.recover();
        }
    }

    /// Starts a killed server again.
    fn recover(&mut self) {
        self.killer.take().map(JoinHandle::join).transpose().unwrap();
        self.server.take().unwrap().kill();
        self.kills += 1;
        self.tries += 1;
        self.place.check();
        self.server = Some(self.place.serve());
    }

    /// Kills the server in a while.
    fn arm(&mut self, delay: Duration) {
        let pid = Pid::from_child(&self.server.as_ref().unwrap().child);
        self.killer = Some(std::thread::spawn(move || {
            std::thread::sleep(delay);
            // Its process is not waited for before this thread has ended.
            kill_process(pid, Signal::KILL).unwrap();
        }));
    }

    /// Waits for the kill, if nothing has noticed it yet.
    fn disarm(&mut self) {
        if let Some(killer) = self.killer.take() {
            killer.join().unwrap();
            self.recover();
        }
    }

    fn round(&mut self, name: &str, retire: bool) {
        self.rounds += 1;
        self.tries = 0;
        let seed = self.rounds;
        self.step("changing files", |world| world.change(seed));
        let snapshot = format!("web@{name}");
        self.step("snapshot", |world| match world.cli(&["snapshot", &snapshot]) {
            // It was taken, and the answer was lost with the server.
            Err(error) if error.contains("already") => Ok(()),
            other => other.map(drop),
        });
        let change = self.step("diff", |world| world.diff(&snapshot));
        for (to, options, whole) in COPIES {
            let again = self.tries;
            let moved = self.step("rsync", |world| world.rsync(options, name, to));
            // What an interrupted one had copied already is not moved again.
            if self.tries == again {
                assert_copied(to, &moved, &change, whole);
            }
        }
        let stream = self.step("send", |world| world.send(&snapshot));
        assert_moved("send", stream, change.data);
        self.receive();
        let exported = self.step("export", |world| world.export(&snapshot));
        assert_moved("export", exported, change.data);
        self.step("comparing", |world| world.compare(name));
        call("e2fsck", [OsStr::new("-f"), "-n".as_ref(), self.path("image").as_ref()]).unwrap();
        self.base = Some(snapshot.clone());
        if retire {
            self.step("retire", |world| world.cli(&["retire", "--wait", &snapshot]).map(drop));
        } else {
            self.live.push(snapshot);
        }
        self.step("room", Self::room);
    }

    /// Mounts the file system and writes, rewrites and deletes files.
    fn change(&self, seed: u64) -> Outcome {
        self.place.wait_until_free("web");
        let device = Device::attach(&self.place.disk("web"))?;
        let mounted = Mounted::new(&device, &self.path("fs"))?;
        let io = |result: std::io::Result<()>| result.map_err(|e| format!("on the file system: {e}"));
        for file in 0..10 {
            let name = (seed * 3 + file) % 40;
            let length = [700, 5000, 90_000, 700_000, 2_500_000][((seed + file) % 5) as usize];
            io(fs::write(mounted.at.join(format!("file{name}")), noise(length, seed * 100 + file)))?;
        }
        for file in 0..3 {
            fs::remove_file(mounted.at.join(format!("file{}", (seed * 7 + file * 5) % 40))).ok();
        }
        if seed.is_multiple_of(2) {
            call("fstrim", [&mounted.at])?;
        }
        mounted.close()?;
        device.close()
    }

    fn base(&self) -> &str {
        self.base.as_deref().unwrap_or("-")
    }

    fn diff(&self, snapshot: &str) -> Outcome<Change> {
        let answer = self.cli(&["diff", self.base(), snapshot])?;
        let size = self.cli(&["info", snapshot])?["size"].as_u64().unwrap();
        let total = |what: &str| answer[what].as_u64().unwrap();
        let (data, zero) = (total("data"), total("zero"));
        let mut change = Change { data, zero, extents: BTreeSet::new(), extent_bytes: 0 };
        for extent in answer["extents"].as_array().unwrap() {
            let (offset, length) = (extent["offset"].as_u64().unwrap(), extent["length"].as_u64().unwrap());
            change.extents.extend(offset / self.extent_size..=(offset + length - 1) / self.extent_size);
        }
        let bytes = |extent: &u64| self.extent_size.min(size - extent * self.extent_size);
        change.extent_bytes = change.extents.iter().map(bytes).sum();
        Ok(change)
    }

    fn rsync(&self, options: &[&str], name: &str, to: &str) -> Outcome<Moved> {
        let from = self.place.mnt.join(format!("exports/web/{name}/"));
        let to = self.path(to);
        let words = ["--delete", "--stats", "--no-human-readable"].iter().chain(options).map(OsStr::new);
        let said = call("rsync", words.chain([from.as_os_str(), to.as_os_str()]))?;
        let figure = |what: &str| {
            let line = said.lines().find_map(|line| line.strip_prefix(what)).unwrap_or_else(|| panic!("{what}{said}"));
            line.split_whitespace().next().unwrap().parse().unwrap()
        };
        Ok(Moved { files: figure("Total transferred file size: "), literal: figure("Literal data: ") })
    }

    fn send(&self, snapshot: &str) -> Outcome<u64> {
        let file = fs::File::create(self.path("stream")).unwrap();
        let words = ["send", "--no-compress", "--from", self.base(), snapshot];
        let words = if self.base.is_some() { &words[..] } else { &["send", "--no-compress", snapshot] };
        let output = self.place.cli.command(words).stdout(file).output().unwrap();
        if !output.status.success() {
            return Err(format!("send: {}", String::from_utf8_lossy(&output.stderr)));
        }
        Ok(fs::metadata(self.path("stream")).unwrap().len())
    }

    /// The second pool is never killed: this must work at once.
    fn receive(&self) {
        let file = fs::File::open(self.path("stream")).unwrap();
        let output = self.other.cli.command(&["receive", "web"]).stdin(file).output().unwrap();
        assert!(output.status.success(), "receive: {}", String::from_utf8_lossy(&output.stderr));
    }

    fn export(&self, snapshot: &str) -> Outcome<u64> {
        let dir = self.path("increment");
        fs::remove_dir_all(&dir).ok();
        let words = ["export", snapshot, dir.to_str().unwrap(), "--from", self.base()];
        let answer = self.cli(if self.base.is_some() { &words } else { &words[..3] })?;
        let apply = dir.join("apply");
        call("dash", [apply.as_os_str(), self.path("image").as_os_str()])?;
        let files = fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap());
        let data = files.filter(|entry| entry.file_name().to_str().unwrap().ends_with(".bin"));
        let bytes = data.map(|entry| entry.metadata().unwrap().len()).sum();
        assert_eq!(answer["data"], bytes);
        Ok(bytes)
    }

    /// Compares every copy with the snapshot.
    fn compare(&self, name: &str) -> Outcome {
        let snapshot = self.place.snapshot("web", name);
        for (copy, ..) in COPIES {
            let words = ["-euc".as_ref(), "cat \"$1\"/*.img | cmp - \"$2\"".as_ref(), "sh".as_ref()];
            call("sh", words.into_iter().chain([self.path(copy).as_os_str(), snapshot.as_os_str()]))?;
        }
        for copy in [self.other.snapshot("web", name), self.path("image")] {
            call("cmp", [&copy, &snapshot])?;
        }
        Ok(())
    }

    /// The segments take the room of what the disk and its live snapshots hold, and no more.
    fn room(&self) -> Outcome {
        self.cli(&["reclaim", "--wait"])?;
        let mut live = 0;
        let mut before = "-";
        for state in self.live.iter().map(String::as_str).chain(["web"]) {
            live += self.cli(&["diff", before, state])?["data"].as_u64().unwrap();
            before = state;
        }
        let mut taken = 0;
        let mut slack = 64 << 10;
        for folder in fs::read_dir(self.place.cli.pool().join("segments")).unwrap() {
            for file in fs::read_dir(folder.unwrap().path()).unwrap() {
                let file = file.unwrap();
                if file.file_name().to_str().unwrap().ends_with(".seg") {
                    taken += file.metadata().unwrap().blocks() * 512;
                    // Its header, and what the host needs to map it.
                    slack += 16 << 10;
                }
            }
        }
        assert!(taken <= live + slack, "{taken} bytes are taken, {live} are live");
        Ok(())
    }

    fn end(mut self) {
        self.server.take().unwrap().stop();
        self.other_server.stop();
        self.place.check();
        self.other.check();
    }
}

#[track_caller]
fn assert_moved(how: &str, moved: u64, changed: u64) {
    assert!(moved <= changed + changed / 20 + (64 << 10), "{how}: {moved} bytes were moved, {changed} changed");
    assert!(moved >= changed, "{how}: only {moved} bytes were moved, {changed} changed");
}

/// Of a whole copy all extents are moved, zeros too.
#[track_caller]
fn assert_copied(how: &str, moved: &Moved, change: &Change, whole: bool) {
    assert_eq!(moved.files, change.extent_bytes, "{how}: other extents than those that changed were copied");
    if whole {
        assert_eq!(moved.literal, change.extent_bytes, "{how}: it copies whole files");
        return;
    }
    let (data, zero) = (change.data, change.zero);
    println!("{how}: {} bytes were moved; {data} bytes of data and {zero} of zeros changed", moved.literal);
    let slack = |bytes: u64| bytes / 20 + (64 << 10);
    let most = data + zero + slack(data + zero);
    assert!(moved.literal <= most, "{how}: {} bytes were moved, {} changed", moved.literal, data + zero);
    let least = data.saturating_sub(slack(data));
    assert!(moved.literal >= least, "{how}: only {} bytes were moved, {data} changed", moved.literal);
}

/// Runs a program that may fail.
fn call<S: AsRef<OsStr>>(program: &str, words: impl IntoIterator<Item = S>) -> Outcome<String> {
    let mut command = command(program, words);
    let output = command.output().unwrap_or_else(|e| panic!("{program}: {e}"));
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    if output.status.success() {
        return Ok(said);
    }
    Err(format!("{command:?}: {}: {said}{}", output.status, String::from_utf8_lossy(&output.stderr)))
}

/// A loop device over a file whose server may die.
struct Device(String);

impl Device {
    fn attach(file: &Path) -> Outcome<Self> {
        let said = call("losetup", ["-f".as_ref(), "--show".as_ref(), file.as_os_str()])?;
        Ok(Self(said.trim().to_owned()))
    }

    /// Detaches it, and makes sure that all of it was written.
    fn close(self) -> Outcome {
        call("blockdev", ["--flushbufs", &self.0]).map(drop)
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        call("losetup", ["-d", &self.0]).ok();
    }
}

/// A mounted file system whose device may die.
struct Mounted {
    at: PathBuf,
    open: bool,
}

impl Mounted {
    fn new(device: &Device, at: &Path) -> Outcome<Self> {
        fs::create_dir_all(at).unwrap();
        call("mount", [device.0.as_ref(), at.as_os_str()])?;
        Ok(Self { at: at.to_owned(), open: true })
    }

    fn close(mut self) -> Outcome {
        call("sync", ["-f".as_ref(), self.at.as_os_str()])?;
        unmount(&self.at)?;
        self.open = false;
        Ok(())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if self.open {
            call("umount", ["-l".as_ref(), self.at.as_os_str()]).ok();
        }
    }
}
