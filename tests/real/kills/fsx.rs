//! fsx (the crate), which reads, writes, maps, punches, copies, cuts and syncs one file at random and compares it with
//! what it should be.
//!
//! # How it is known what was synced
//! It tells each operation before it does it, and ends at the first error. So an fsync, fdatasync or msync that has
//! something behind it ended well. The same seed makes the same operations: a second fsx on a plain file of the host
//! makes the bytes as they were after any of them.
//!
//! # How it is compared
//! Let S be the last operation that synced and L the last one begun. Every block must be as it was after S or one of the
//! operations up to L, of which L itself may be half done. Where the size changes, or maps are left to be written when
//! the kernel likes, the parts of a block may be of different ages: there it is every byte.

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use super::super::{command, require_programs, run, wait_for};
use super::{BLOCK, Load, Place, kill_under, kills};

const SIZE: usize = 1 << 20;

struct Mode {
    name: &'static str,
    config: &'static str,
    /// The size of the disk stays.
    is_fixed: bool,
    /// Blocks are whole.
    is_whole: bool,
    /// Operations that sync.
    syncs: &'static [&'static str],
}

const MODES: [Mode; 3] = [
    Mode {
        name: "fixed",
        config: "blockmode = true\nnosizechecks = true\nweights = { read = 3, write = 10, mapread = 2, mapwrite = 5, \
                 truncate = 0, invalidate = 1, fsync = 1, fdatasync = 1, punch_hole = 4, sendfile = 1, \
                 posix_fadvise = 1, copy_file_range = 3 }",
        is_fixed: true,
        is_whole: true,
        syncs: &["fsync", "fdatasync", "mapwrite"],
    },
    Mode {
        name: "sized",
        config: "flen = 1048576\nweights = { close_open = 1, read = 3, write = 10, mapread = 2, mapwrite = 5, \
                 truncate = 3, invalidate = 1, fsync = 1, fdatasync = 1, posix_fallocate = 1, punch_hole = 4, \
                 sendfile = 1, posix_fadvise = 1 }",
        is_fixed: false,
        is_whole: false,
        syncs: &["fsync", "fdatasync", "mapwrite"],
    },
    Mode {
        name: "lazy",
        config: "flen = 1048576\nnomsyncafterwrite = true\nweights = { close_open = 1, read = 3, write = 5, \
                 mapread = 2, mapwrite = 10, truncate = 2, fsync = 2, fdatasync = 2, punch_hole = 4 }",
        is_fixed: false,
        is_whole: false,
        syncs: &["fsync", "fdatasync"],
    },
];

struct Fsx {
    dir: PathBuf,
    mode: &'static Mode,
    seed: u64,
    running: Option<Child>,
    /// What the disk held when fsx began.
    before: Vec<u8>,
    /// How many operations were done, how many of them were covered by a sync, and how many losses would have been seen.
    done: u64,
    synced: u64,
    seen: u64,
}

impl Fsx {
    fn new(place: &Place, mode: &'static Mode) -> Self {
        let dir = place.cli.path(&format!("fsx-{}", mode.name));
        fs::create_dir(&dir).unwrap();
        fs::write(dir.join("fsx.toml"), mode.config).unwrap();
        place.cli.json(&["create", mode.name, "--size", &SIZE.to_string()]);
        Self { dir, mode, seed: 0, running: None, before: vec![0; SIZE], done: 0, synced: 0, seen: 0 }
    }

    /// An fsx that does these operations on a file.
    fn command(&self, words: &[String], file: &std::path::Path) -> Command {
        let mut fsx = command("fsx", ["-f", "fsx.toml", "-P", ".", "-S", &self.seed.to_string()]);
        fsx.args(words).arg(file).current_dir(&self.dir);
        fsx
    }

    /// Makes the bytes of the file as they are after a number of operations.
    fn state(&self, step: u64) -> Vec<u8> {
        let twin = self.dir.join("twin");
        let file = File::create(&twin).unwrap();
        if self.mode.is_fixed || step == 0 {
            file.set_len(if self.mode.is_fixed { SIZE as u64 } else { 0 }).unwrap();
        }
        if step > 0 {
            // What is before the last operation is only imagined, and written at once.
            let words = ["-b", &step.to_string(), "-N", &step.to_string()].map(str::to_owned);
            let output = self.command(&words, &twin).output().unwrap();
            assert!(output.status.success(), "fsx: {}", String::from_utf8_lossy(&output.stderr));
        }
        fs::read(&twin).unwrap()
    }

    /// Returns the last operation that was synced and the last one begun, zeros if there is none.
    fn steps(&self) -> (u64, u64) {
        let log = fs::read_to_string(self.dir.join("log")).unwrap();
        // Reads and writes may end short when the server goes away, and only then: the run without kills shows that.
        let is_wrong = ["miscompare", "ize error", "non-zero"].iter().any(|fault| log.contains(fault));
        assert!(!is_wrong, "fsx found a fault: {log}");
        // The kernel answers EIO for the request that the server was just fetching when it was killed.
        let told = log.split_once("panicked").map_or("", |(_, told)| told);
        let is_gone = ["code: 107", "code: 103", "code: 5,", "code: 2,", "ENOTCONN", "ECONNABORTED", "EIO"]
            .iter()
            .any(|e| told.contains(e));
        assert!(told.is_empty() || is_gone, "fsx ended for another reason: {log}");
        let (mut synced, mut last) = (0, (0, ""));
        for line in log.lines().filter_map(|line| line.strip_prefix("[INFO  fsx]")) {
            let mut words = line.split_whitespace();
            let (Some(step), Some(operation)) = (words.next(), words.next()) else { continue };
            if self.mode.syncs.contains(&last.1) {
                synced = last.0;
            }
            last = (step.parse().unwrap(), operation);
        }
        (synced, last.0)
    }

    /// Says what a disk lacks that may be as after any of these operations.
    fn lost(&self, found: &[u8], states: &[Vec<u8>]) -> Result<(), String> {
        // A copy that extends the file does so in steps.
        let sizes = || states.iter().map(Vec::len);
        let (least, most) = (sizes().min().unwrap(), sizes().max().unwrap());
        if !(least..=most).contains(&found.len()) {
            return Err(format!("{} bytes long, not {least} to {most}", found.len()));
        }
        // What is beyond the end is zero, as it would be after growing.
        let byte = |bytes: &[u8], at: usize| bytes.get(at).copied().unwrap_or(0);
        let is_of = |states: &[Vec<u8>], at| states.iter().any(|state| byte(state, at) == byte(found, at));
        for at in (0..SIZE).step_by(BLOCK) {
            let mut block = at..at + BLOCK;
            let is_like = |state: &Vec<u8>| block.clone().all(|at| byte(state, at) == byte(found, at));
            if states.iter().any(is_like) {
                continue;
            }
            let half_done = &states[if self.mode.is_whole { states.len().saturating_sub(2) } else { 0 }..];
            if let Some(at) = block.find(|at| !is_of(half_done, *at)) {
                return Err(format!("byte {at} is {}, which is none of {} states", byte(found, at), states.len()));
            }
        }
        Ok(())
    }
}

impl Load for Fsx {
    fn begin(&mut self, place: &Place, round: u64) {
        self.seed = round + 1;
        let log = self.dir.join("log");
        let mut fsx = self.command(&["-v".to_owned()], &place.disk(self.mode.name));
        fsx.stdout(Stdio::null()).stderr(File::create(&log).unwrap());
        self.running = Some(fsx.spawn().unwrap());
        wait_for("fsx begins", || fs::metadata(&log).unwrap().len() > 0);
    }

    fn end(&mut self) {
        // Without a server it can write nothing more. When its sendfile fails, it waits for the rest for ever.
        let mut fsx = self.running.take().unwrap();
        fsx.kill().unwrap();
        assert!(!fsx.wait().unwrap().success(), "fsx had no end of its own");
    }

    fn compare(&mut self, place: &Place, _: u64) -> Result<(), String> {
        let (synced, last) = self.steps();
        let mut states: Vec<_> = (synced..=last).map(|step| self.state(step)).collect();
        if synced == 0 {
            states.insert(0, std::mem::take(&mut self.before));
        }
        let found = fs::read(place.disk(self.mode.name)).unwrap();
        self.lost(&found, &states).map_err(|lost| format!("{}: after {synced} to {last}: {lost}", self.mode.name))?;
        // What the disk would be if the syncs had done nothing for some time.
        self.seen += u64::from(synced > 1 && self.lost(&self.state(synced / 2), &states).is_err());
        self.before = found;
        self.synced += synced;
        self.done += last;
        Ok(())
    }
}

fn is_there() -> bool {
    require_programs(&["fsx"])
}

fn is_killed_under(mode: &'static Mode) {
    let Some(place) = is_there().then(Place::new).flatten() else { return };
    let server = place.serve();
    let mut fsx = Fsx::new(&place, mode);
    let kills = kills(3);
    let server = kill_under(&place, server, mode.name, &mut fsx, kills);
    let Fsx { done, synced, seen, .. } = fsx;
    println!(
        "fsx {}: {kills} kills, {done} operations, {synced} of them synced, {seen} losses would be seen",
        mode.name
    );
    assert!(seen > 0, "a loss is seen");
    server.stop();
    place.check();
}

#[test]
fn fsx_finds_all_that_it_synced_on_a_disk_of_one_size() {
    is_killed_under(&MODES[0]);
}

#[test]
fn fsx_finds_all_that_it_synced_on_a_disk_that_grows_and_shrinks() {
    is_killed_under(&MODES[1]);
}

#[test]
fn fsx_finds_all_that_it_synced_of_what_it_mapped() {
    is_killed_under(&MODES[2]);
}

#[test]
fn fsx_finds_no_fault_and_what_is_synced_after_it_is_all_there() {
    let Some(place) = is_there().then(Place::new).flatten() else { return };
    let mut server = place.serve();
    for mode in &MODES {
        let mut fsx = Fsx::new(&place, mode);
        let disk = place.disk(mode.name);
        for seed in 1..=2 {
            fsx.seed = seed;
            let operations = 1000;
            let output = fsx.command(&["-N".to_owned(), operations.to_string()], &disk).output().unwrap();
            assert!(output.status.success(), "fsx {}: {}", mode.name, String::from_utf8_lossy(&output.stderr));
            run("sync", [&disk]);
            server.kill();
            server = place.serve();
            fsx.lost(&fs::read(&disk).unwrap(), &[fsx.state(operations)]).unwrap();
        }
    }
    server.stop();
    place.check();
}
