//! fio, which writes blocks that carry their own checksum.
//!
//! # How it is known what was synced
//! Every run writes each block at most once, filled with the number of the run. The jobs that sync now and then keep a
//! log of what they did, in order; a sync that has something behind it ended well, as a job ends at the first error. The
//! job whose writes are synced each (O_DSYNC) has a log of those that were answered.
//!
//! # How it is compared
//! fio reads everything back and proves each block whole and in its place. Which run wrote a block is seen in its bytes:
//! the newest one if it was synced, the newest or the one before if it was only written, the one before if it was not.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::{Child, Stdio};

use super::super::{command, require_programs, wait_for};
use super::{BLOCK, Load, Place, kill_under, kills};

const REGION_MIB: u64 = 8;
const REGION: u64 = REGION_MIB * 1024 * 1024 / BLOCK as u64;
/// Where the header that fio puts before the filling certainly ends.
const HEADER_MAX: usize = 128;
const TAG: usize = 8;

/// The jobs, each in its own part of the disk: through the kernel's cache, past it in writes of many blocks, and past it
/// with eight writes at once that are synced each.
const JOBS: [(&str, &str); 3] = [
    ("buffered", "ioengine=psync\nbs=4k\nfdatasync=7\nwrite_iolog=buffered.log"),
    ("direct", "ioengine=psync\ndirect=1\nbsrange=4k-64k\nfsync=5\nwrite_iolog=direct.log"),
    ("dsync", "ioengine=libaio\niodepth=8\ndirect=1\nsync=dsync\nbs=4k\nwrite_lat_log=dsync\nlog_offset=1"),
];

/// What a job did in one run, in blocks.
#[derive(Default)]
struct Done {
    tried: BTreeSet<u64>,
    synced: BTreeSet<u64>,
}

fn blocks(offset: &str, len: &str) -> std::ops::Range<u64> {
    let (offset, len): (u64, u64) = (offset.parse().unwrap(), len.parse().unwrap());
    offset / BLOCK as u64..(offset + len) / BLOCK as u64
}

impl Done {
    /// Reads what fio logged in the order in which it did it: `[TIME] FILE ACTION OFFSET LENGTH`.
    fn from_iolog(log: &str) -> Self {
        let mut done = Self::default();
        let (mut unsynced, mut is_syncing) = (Vec::new(), false);
        for line in log.lines() {
            let words: Vec<&str> = line.split_whitespace().collect();
            let [.., action @ ("write" | "sync" | "datasync"), offset, len] = words[..] else { continue };
            if is_syncing {
                done.synced.extend(unsynced.drain(..));
            }
            is_syncing = action != "write";
            if !is_syncing {
                done.tried.extend(blocks(offset, len));
                unsynced.extend(blocks(offset, len));
            }
        }
        done
    }

    /// Reads which writes were handed in, and which were answered: `TIME, LATENCY, DIRECTION, LENGTH, OFFSET, ...`.
    fn from_latencies(handed_in: &str, answered: &str) -> Self {
        let all = |log: &str| {
            let words = log.lines().map(|line| line.split(", ").collect::<Vec<_>>());
            words.flat_map(|words| blocks(words[4], words[3])).collect::<BTreeSet<_>>()
        };
        let (mut tried, synced) = (all(handed_in), all(answered));
        tried.extend(&synced);
        Self { tried, synced }
    }
}

struct Fio {
    dir: PathBuf,
    disk: PathBuf,
    /// The number of the run.
    run: u64,
    running: Option<Child>,
    /// The run that wrote each block.
    known: Vec<u64>,
    /// How many blocks each job has synced.
    synced: [usize; JOBS.len()],
}

impl Fio {
    /// Makes a disk whose every block was written and synced.
    fn new(place: &Place) -> Self {
        let (dir, disk) = (place.cli.path("fio"), place.disk("fio"));
        fs::create_dir(&dir).unwrap();
        let blocks = REGION * JOBS.len() as u64;
        place.cli.json(&["create", "fio", "--size", &(blocks * BLOCK as u64).to_string()]);
        let mut fio =
            Self { dir, disk, run: 0, running: None, known: vec![0; blocks as usize], synced: [0; JOBS.len()] };
        fio.fill();
        fio.verify().unwrap();
        fio.compare_runs(&[]).unwrap();
        fio
    }

    fn log(&self, name: &str) -> String {
        fs::read_to_string(self.dir.join(name)).unwrap_or_default()
    }

    fn start(&mut self) {
        for entry in fs::read_dir(&self.dir).unwrap() {
            fs::remove_file(entry.unwrap().path()).unwrap();
        }
        let mut text = format!(
            "[global]\nfilename={}\nrw=randwrite\nrandseed={}\nsize={REGION_MIB}m\nverify=crc32c\nverify_interval={BLOCK}\n\
             do_verify=0\nverify_pattern=\"r{:07}\"\nper_job_logs=0\n",
            self.disk.display(),
            self.run + 1,
            self.run,
        );
        for (n, (name, options)) in JOBS.iter().enumerate() {
            let offset = n as u64 * REGION_MIB;
            text += &format!("[{name}]\noffset={offset}m\n{options}\nexec_prerun=touch begun.{name}\n");
        }
        fs::write(self.dir.join("jobs.fio"), text).unwrap();
        let said = File::create(self.dir.join("said")).unwrap();
        let mut fio = command("fio", ["jobs.fio"]);
        fio.current_dir(&self.dir).stdout(said.try_clone().unwrap()).stderr(said).stdin(Stdio::null());
        self.running = Some(fio.spawn().unwrap());
    }

    /// Runs all jobs to their end.
    fn fill(&mut self) {
        self.start();
        let status = self.running.take().unwrap().wait().unwrap();
        assert!(status.success(), "fio: {}", self.log("said"));
        // What came after the last sync of a job is not synced yet.
        File::open(&self.disk).unwrap().sync_all().unwrap();
    }

    /// Lets fio read everything and check it.
    fn verify(&self) -> Result<(), String> {
        let file = format!("--filename={}", self.disk.display());
        let words = ["--name=verify", &file, "--rw=read", "--bs=64k", "--verify=crc32c", "--verify_fatal=1"];
        let interval = format!("--verify_interval={BLOCK}");
        let output = command("fio", words.into_iter().chain([&*interval])).current_dir(&self.dir).output().unwrap();
        let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        if output.status.success() { Ok(()) } else { Err(format!("fio does not find what it wrote: {said}")) }
    }

    /// Finds out what the jobs did in the last run.
    fn done(&self) -> [Done; JOBS.len()] {
        [
            Done::from_iolog(&self.log("buffered.log")),
            Done::from_iolog(&self.log("direct.log")),
            Done::from_latencies(&self.log("dsync_slat.log"), &self.log("dsync_clat.log")),
        ]
    }

    /// Compares the runs that the blocks are of with what the jobs did, and takes what is found for what is known.
    fn compare_runs(&mut self, done: &[Done]) -> Result<(), String> {
        let bytes = fs::read(&self.disk).unwrap();
        for (n, block) in bytes.chunks(BLOCK).enumerate() {
            let tag = &block[BLOCK - TAG..];
            let run = std::str::from_utf8(tag).ok().and_then(|tag| tag.strip_prefix('r')?.parse::<u64>().ok());
            let Some(run) = run.filter(|_| block[HEADER_MAX..].chunks(TAG).all(|part| part == tag)) else {
                return Err(format!("block {n} is torn"));
            };
            let (before, at) = (self.known[n], n as u64);
            let is_synced = done.iter().any(|done| done.synced.contains(&at));
            let is_tried = done.iter().any(|done| done.tried.contains(&at));
            let right = run == self.run && is_tried || run == before && !is_synced;
            if !right {
                let now = self.run;
                return Err(format!("block {n} is of run {run}: {before} before {now}, {is_tried} {is_synced}"));
            }
            self.known[n] = run;
        }
        Ok(())
    }
}

impl Load for Fio {
    fn begin(&mut self, _: &Place, round: u64) {
        self.run = round + 1;
        self.start();
        for (name, _) in JOBS {
            let begun = self.dir.join(format!("begun.{name}"));
            wait_for("fio begins", || begun.exists());
        }
    }

    fn end(&mut self) {
        // It ends with an error, or well when it was faster than the kill.
        self.running.take().unwrap().wait().unwrap();
    }

    fn compare(&mut self, _: &Place, _: u64) -> Result<(), String> {
        self.verify()?;
        let done = self.done();
        for (synced, done) in self.synced.iter_mut().zip(&done) {
            *synced += done.synced.len();
        }
        self.compare_runs(&done)
    }
}

#[test]
fn fio_finds_all_that_it_synced() {
    if !require_programs(&["fio"]) {
        return;
    }
    let Some(place) = Place::new() else { return };
    let server = place.serve();
    let mut fio = Fio::new(&place);
    let kills = kills(5);
    let server = kill_under(&place, server, "fio", &mut fio, kills);
    for ((name, _), synced) in JOBS.iter().zip(fio.synced) {
        println!("fio: {kills} kills, {synced} blocks synced by job {name}");
        assert!(synced > 0, "{name} has synced");
    }

    // A block that goes back to what it was, whole, is a loss, of which the checksums cannot know.
    let file = OpenOptions::new().read(true).write(true).open(&fio.disk).unwrap();
    for n in 0..JOBS.len() as u64 {
        let at = (n * REGION + REGION / 2) * BLOCK as u64;
        let (mut before, mut after) = (vec![0; BLOCK], vec![0; BLOCK]);
        file.read_exact_at(&mut before, at).unwrap();
        fio.run += 1;
        fio.fill();
        let done = fio.done();
        fio.compare_runs(&done).unwrap();
        file.read_exact_at(&mut after, at).unwrap();
        file.write_all_at(&before, at).unwrap();
        fio.verify().unwrap();
        assert!(fio.compare_runs(&done).is_err(), "{n}: a loss is seen");
        file.write_all_at(&after, at).unwrap();
    }
    // So is a byte that is another one.
    file.write_all_at(b"x", 5 * BLOCK as u64 + 3000).unwrap();
    assert!(fio.verify().is_err_and(|said| said.contains("verify")), "damage is seen");
    drop(file);
    server.stop();
    place.check();
}
