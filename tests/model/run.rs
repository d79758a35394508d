//! One random history.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use afterimage::disk::{self, BlockDevice};
use afterimage::error::{Error, Kind};
use afterimage::media::{Media, SimMedia, sim::Fault};
use afterimage::progress::Silent;
use afterimage::snapshot;
use afterimage::store::{InitOptions, OpenOptions, Store};

use super::Counts;
use super::ends::Guests;
use super::twin::{BLOCK, Image, Twin, TwinDisk, Write};

const SIZE_MAX: u64 = 5 << 20;

pub struct Run {
    pub media: SimMedia,
    pub counts: Counts,
    pub verbose: bool,
    pub(super) store: Option<Arc<Store>>,
    pub(super) twin: Twin,
    /// Who writes and may come back after a kill.
    pub(super) guests: Guests,
    /// A fault was armed since the pool was opened.
    pub(super) faulty: bool,
    /// There is no room on the host.
    pub(super) full: bool,
    /// The threads in the background run, too.
    pub(super) in_background: bool,
    /// What the snapshot is to be called that keeps the state of a disk which a stream replaces.
    pub(super) kept_as: Option<String>,
    random: u64,
    names: u64,
    writes: Write,
}

pub(super) fn options() -> OpenOptions {
    OpenOptions {
        cache_bytes: 24 << 10,
        catalog_cache_bytes: 1 << 20,
        background: false,
        low_water: Some(0),
        ballast: 4096,
        segment_blocks: 300,
        depth_max: 3,
    }
}

pub(super) fn open(media: Arc<dyn Media>, background: bool) -> Result<Arc<Store>, Error> {
    let store = Store::open(media, OpenOptions { background, ..options() })?;
    snapshot::attend(&store);
    Ok(store)
}

impl Run {
    pub fn new(seed: u64) -> Self {
        Self::of(seed, false)
    }

    /// As [`Run::new`]; with the threads in the background, so that no two runs of a seed are the same.
    pub fn of(seed: u64, in_background: bool) -> Self {
        let media = SimMedia::new(seed);
        let shared: Arc<dyn Media> = Arc::new(media.process());
        let init = InitOptions { journal: 320 << 10, ballast: 4096, probe: false };
        Store::init(&shared, init).unwrap();
        let store = open(shared, in_background).unwrap();
        let random = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        Self {
            media,
            counts: Counts::default(),
            verbose: false,
            store: Some(store),
            twin: Twin::default(),
            kept_as: None,
            guests: Guests::default(),
            faulty: false,
            full: false,
            in_background,
            random,
            names: 0,
            writes: 0,
        }
    }

    pub(super) fn next(&mut self, below: u64) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random >> 11) % below
    }

    pub(super) fn chance(&mut self, percent: u64) -> bool {
        self.next(100) < percent
    }

    pub(super) fn store(&self) -> &Arc<Store> {
        self.store.as_ref().expect("the store is open between operations")
    }

    /// Now and then chooses an I/O that fails, or is the last one.
    fn arm(&mut self) {
        if self.next(60) == 0 {
            let n = 1 + self.next(40);
            self.media.crash_after(n);
        } else if self.next(250) == 0 {
            let (n, kind) = (1 + self.next(30), self.next(2));
            self.faulty = true;
            self.media.fail_after(n, if kind == 0 { Fault::Eio } else { Fault::Enospc });
        }
    }

    pub fn go(&mut self, ops: u64) {
        for _ in 0..ops {
            self.counts.ops += 1;
            // With the background at work the I/O that fails may be anybody's: ends come between operations only.
            if !self.in_background {
                self.arm();
            }
            self.step();
            if self.in_background {
                self.store().wake_keeper();
            }
        }
        self.reopen();
    }

    pub(super) fn say(&self, what: impl FnOnce() -> String) {
        if self.verbose {
            println!("{:6} {}", self.counts.ops, what());
        }
    }

    pub(super) fn any_disk(&mut self) -> Option<String> {
        let names: Vec<_> = self.twin.disks.keys().cloned().collect();
        (!names.is_empty()).then(|| names[self.next(names.len() as u64) as usize].clone())
    }

    pub(super) fn any_snapshot(&mut self) -> Option<(String, String)> {
        let all: Vec<_> = self
            .twin
            .disks
            .iter()
            .flat_map(|(disk, twin)| twin.snapshots.keys().map(move |snap| (disk.clone(), snap.clone())))
            .collect();
        (!all.is_empty()).then(|| all[self.next(all.len() as u64) as usize].clone())
    }

    pub(super) fn fresh(&mut self, prefix: &str) -> String {
        self.names += 1;
        format!("{prefix}{}", self.names)
    }

    fn step(&mut self) {
        if self.verbose && std::env::var_os("AFTERIMAGE_CHECK").is_some() && !self.media.is_down() {
            let report = snapshot::check(self.store(), false, &Silent).expect("check runs");
            assert!(report.problems.is_empty(), "check found: {:#?}", report.problems);
        }
        match self.next(100) {
            0..=2 => self.create(),
            3..=29 => self.write(),
            30..=33 => self.come_or_go(),
            34 => self.send(),
            35 => self.export(),
            36..=42 => self.unmap(),
            43..=52 => self.flush(),
            53..=60 => self.snapshot(),
            61..=63 => self.clone_disk(),
            64..=66 => self.revert(),
            67..=70 => self.remove_snapshot(),
            71 => self.remove_disk(),
            72..=74 => self.resize(),
            75 => self.rename(),
            76..=78 => self.retire(),
            79..=82 => self.diff(),
            83..=88 => self.tidy(),
            89..=92 => self.receive(),
            93..=96 => self.read(),
            97 if self.chance(50) => self.run_full(),
            97 => self.fold(),
            98 => self.reopen(),
            _ => self.end_at_once(),
        }
    }

    /// Runs an operation. When it fails, the pool is recovered and must be as before it or as after it.
    pub(super) fn attempt(
        &mut self,
        what: &str,
        after: Twin,
        op: impl FnOnce(&Arc<Store>) -> Result<(), Error>,
    ) -> bool {
        self.attempt_unless(what, after, |_| false, op)
    }

    /// As `attempt`; when the pool refuses it with an error that `refused` knows, nothing has happened.
    pub(super) fn attempt_unless(
        &mut self,
        what: &str,
        after: Twin,
        refused: impl Fn(&Error) -> bool,
        op: impl FnOnce(&Arc<Store>) -> Result<(), Error>,
    ) -> bool {
        self.say(|| what.to_owned());
        let store = Arc::clone(self.store());
        let result = std::panic::catch_unwind(AssertUnwindSafe(|| op(&store)));
        let result = match result {
            Ok(result) => result,
            Err(panic) if self.media.is_down() => panic!("'{what}' panicked when the power was lost: {panic:?}"),
            Err(panic) => std::panic::resume_unwind(panic),
        };
        drop(store);
        match result {
            Ok(()) if !self.media.is_down() => {
                self.twin = after;
                true
            }
            Ok(()) => {
                // It was answered before the power went: it holds.
                self.twin = after;
                self.recover(None);
                false
            }
            Err(error) => {
                self.say(|| format!("  failed: {error}"));
                let poisoned = self.store().health().is_some();
                if self.media.is_down() || poisoned || error.kind() == Kind::Io {
                    self.recover(Some(after));
                } else if !refused(&error) && !self.goes_on_full(&after, error.kind()) {
                    assert!(
                        matches!(error.kind(), Kind::NoSpace),
                        "'{what}' was refused, and the twin allows it: {error} ({:?})",
                        error.kind()
                    );
                    self.counts.faults += 1;
                    // A failed write may have changed blocks in part; only a recovery shows what is there.
                    self.recover(Some(after));
                }
                false
            }
        }
    }

    fn create(&mut self) {
        if self.twin.disks.len() >= 4 {
            return;
        }
        let name = self.fresh("disk");
        let size = (1 + self.next(SIZE_MAX / 512)) * 512;
        let mut after = self.twin.clone();
        let lineage = self.number();
        after.disks.insert(
            name.clone(),
            TwinDisk { live: Image::new(size as usize), lineage, since: Some(Arc::default()), ..TwinDisk::default() },
        );
        self.attempt(&format!("create {name} {size}"), after, |store| disk::create(store, &name, size).map(drop));
    }

    /// A number that nothing else has.
    pub(super) fn number(&mut self) -> u64 {
        self.writes += 1;
        self.writes
    }

    /// A range that likes block and chunk borders.
    fn range(&mut self, size: u64) -> (u64, u64) {
        let len = match self.next(6) {
            0 => 4096,
            1 => 512 * (1 + self.next(24)),
            2 => 1 + self.next(9000),
            3 => 4096 * (1 + self.next(16)),
            4 => 4096 * (1 + self.next(700)),
            _ => 4096 * (1 + self.next(4)),
        };
        let hot = self.next(3) > 0;
        let mut offset = if hot { self.next(size.min(300 << 10)) } else { self.next(size) };
        match self.next(4) {
            0 => {}
            1 => offset = offset / (2 << 20) * (2 << 20),
            _ => offset = offset / 4096 * 4096,
        }
        (offset, len.min(size - offset))
    }

    pub(super) fn write(&mut self) {
        let Some(name) = self.any_disk() else { return };
        let size = self.twin.disks[&name].live.now.len() as u64;
        if size == 0 {
            return;
        }
        let (offset, len) = self.range(size);
        let tag = self.next(u64::MAX / 2).to_le_bytes();
        let data: Vec<u8> = (0..len as usize).map(|i| tag[i % 8] ^ (i / 512) as u8).collect();
        // In place: copying the whole twin for every write would be most of the work. Candidates only grow, so a write
        // that failed is explained by either version.
        let number = self.number();
        self.twin.disks.get_mut(&name).unwrap().live.write(offset as usize, &data, number);
        let after = self.acknowledged(&name);
        self.attempt(&format!("write {name} {offset}+{len}"), after, |store| {
            disk::open(store, &name)?.write(&data, offset)
        });
    }

    pub(super) fn unmap(&mut self) {
        let Some(name) = self.any_disk() else { return };
        let size = self.twin.disks[&name].live.now.len() as u64;
        if size == 0 {
            return;
        }
        let (offset, len) = self.range(size);
        let zero = self.chance(50);
        let end = offset + len;
        let (from, upto) = if zero {
            (offset, end)
        } else {
            let last = if end == size { end } else { end / 4096 * 4096 };
            (offset.next_multiple_of(4096), last)
        };
        let number = self.number();
        if from < upto {
            let live = &mut self.twin.disks.get_mut(&name).unwrap().live;
            if zero {
                live.zero(from as usize, upto as usize, number);
            } else {
                live.discard(from as usize, upto as usize);
            }
        }
        let after = self.acknowledged(&name);
        let what = if zero { "zero" } else { "discard" };
        self.attempt(&format!("{what} {name} {offset}+{len}"), after, |store| {
            let disk = disk::open(store, &name)?;
            if zero { disk.write_zeroes(offset, len) } else { disk.discard(offset, len) }
        });
    }

    fn snapshot(&mut self) {
        if self.twin.disks.values().map(|disk| disk.snapshots.len()).sum::<usize>() >= 9 {
            return;
        }
        let mut targets = Vec::new();
        for name in self.twin.disks.keys().cloned().collect::<Vec<_>>() {
            if self.chance(50) {
                targets.push((name, self.fresh("s")));
            }
        }
        let mut after = self.twin.clone();
        for (name, snap) in &targets {
            let disk = after.disks.get_mut(name).unwrap();
            disk.stop(snap);
        }
        // The flush before the stop may be all that happened to some of them: versions stay until it is answered.
        if self.attempt(&format!("snapshot {targets:?}"), after, |store| snapshot::take(store, &targets).map(drop)) {
            self.counts.snapshots += 1;
        }
    }

    fn clone_disk(&mut self) {
        if self.twin.disks.len() >= 5 {
            return;
        }
        let Some((name, snap)) = self.any_snapshot() else { return };
        let new = self.fresh("clone");
        let mut after = self.twin.clone();
        let source = &self.twin.disks[&name];
        let mut disk = TwinDisk { lineage: source.lineage, ..TwinDisk::default() };
        disk.become_like(source.snapshots[&snap].clone());
        after.disks.insert(new.clone(), disk);
        if self.attempt(&format!("clone {name}@{snap} {new}"), after, |store| {
            snapshot::clone(store, &name, &snap, &new).map(drop)
        }) {
            self.counts.clones += 1;
        }
    }

    fn revert(&mut self) {
        let Some((name, snap)) = self.any_snapshot() else { return };
        self.leave(&name);
        let keep = self.chance(30).then(|| self.fresh("k"));
        let mut after = self.twin.clone();
        let disk = after.disks.get_mut(&name).unwrap();
        if let Some(keep) = &keep {
            disk.stop(keep);
        }
        disk.become_like(disk.snapshots[&snap].clone());
        if let Some(keep) = keep.clone() {
            // Two frames: a crash may come between them. The first one alone first.
            let mut between = self.twin.clone();
            let disk = between.disks.get_mut(&name).unwrap();
            disk.stop(&keep);
            let target = vec![(name.clone(), keep)];
            if !self.attempt(&format!("keep {target:?}"), between, |store| snapshot::take(store, &target).map(drop)) {
                return;
            }
        }
        let (least, exact) = self.twin.dropped_by_revert(&name);
        if self.attempt(&format!("revert {name}@{snap}"), after, |store| {
            let dropped = snapshot::revert(store, &name, &snap, None)?.dropped as usize / BLOCK;
            assert!(dropped >= least, "revert {name}@{snap} says that {dropped} blocks were dropped, {least} are gone");
            assert!(exact.is_none_or(|exact| exact == dropped), "{dropped} blocks were dropped instead of {exact:?}");
            Ok(())
        }) {
            self.counts.reverts += 1;
        }
    }

    pub(super) fn remove_snapshot(&mut self) {
        let Some((name, snap)) = self.any_snapshot_or_retired() else { return };
        let mut after = self.twin.clone();
        let disk = after.disks.get_mut(&name).unwrap();
        disk.snapshots.remove(&snap);
        disk.retired.remove(&snap);
        after.mix_epochs();
        self.attempt(&format!("rm {name}@{snap}"), after, |store| snapshot::remove(store, &name, &snap));
    }

    fn remove_disk(&mut self) {
        let Some(name) = self.any_disk() else { return };
        self.leave(&name);
        let mut after = self.twin.clone();
        after.disks.remove(&name);
        after.mix_epochs();
        self.attempt(&format!("rm {name}"), after, |store| disk::remove(store, &name, true));
    }

    fn resize(&mut self) {
        let Some(name) = self.any_disk() else { return };
        let size = (1 + self.next(SIZE_MAX / 512)) * 512;
        if (size as usize) < self.twin.disks[&name].live.now.len() {
            self.leave(&name);
        }
        // Zeros behind a cut end come first: they may be all that is left of a resize that a crash ends.
        self.twin.disks.get_mut(&name).unwrap().live.touch_cut_end(size as usize);
        let mut after = self.twin.clone();
        after.disks.get_mut(&name).unwrap().live.resize(size as usize);
        self.attempt(&format!("resize {name} {size}"), after, |store| disk::open(store, &name)?.resize(size, true));
    }

    pub(super) fn rename(&mut self) {
        let Some(name) = self.any_disk() else { return };
        let new = self.fresh("disk");
        let mut after = self.twin.clone();
        let disk = after.disks.remove(&name).unwrap();
        after.disks.insert(new.clone(), disk);
        self.attempt(&format!("rename {name} {new}"), after, |store| disk::rename(store, &name, &new));
    }

    pub(super) fn tidy(&mut self) {
        let steps = 1 + self.next(6);
        let after = self.twin.clone();
        self.attempt(&format!("tidy {steps}"), after, |store| {
            for _ in 0..steps {
                if !store.tidy_step()? {
                    break;
                }
            }
            Ok(())
        });
    }

    pub(super) fn fold(&mut self) {
        let after = self.twin.clone();
        self.attempt("fold", after, |store| store.fold().map(drop));
    }

    pub(super) fn read(&mut self) {
        if self.media.is_down() {
            return;
        }
        let what = self.any_snapshot().filter(|_| self.random.is_multiple_of(2));
        let (device, image): (Arc<dyn BlockDevice>, &[u8]) = match &what {
            Some((name, snap)) => {
                (snapshot::open(self.store(), name, snap).unwrap(), &self.twin.disks[name].snapshots[snap].bytes)
            }
            None => {
                let Some(name) = self.any_disk() else { return };
                (disk::open(self.store(), &name).unwrap(), &self.twin.disks[&name].live.now)
            }
        };
        let found = read_all(&*device);
        assert!(found == image, "a read of {what:?} differs from the twin");
        self.walk_holes(&*device, &found);
    }

    /// Outside of the extents everything is zero.
    fn walk_holes(&self, device: &dyn BlockDevice, bytes: &[u8]) {
        let mut at = 0;
        while let Some((start, end)) = device.next_data(at).unwrap() {
            assert!(start >= at && end > start && end <= device.size(), "extent {start}..{end} from {at}");
            assert!(bytes[at as usize..start as usize].iter().all(|b| *b == 0), "data in a hole before {start}");
            at = end;
        }
        assert!(bytes[at as usize..].iter().all(|b| *b == 0), "data in the last hole");
    }
}

/// Prints the branches, and what is in them.
pub(super) fn show_tree(store: &Store) {
    let tables = store.tables.read();
    for (id, row) in tables.branches() {
        println!("branch {id}: {row:?}");
    }
    for (key, row) in tables.states() {
        println!("state {}/{}: {:?} {:?} of disk {}", key.0, key.1, row.status, row.name, row.disk);
    }
    for (_, row) in tables.disks() {
        println!("disk {:?}: {}/{} on {:?}", row.name, row.branch, row.epoch, row.base);
    }
    drop(tables);
    let every = store.every_entry(&mut |key, chunk, entry| {
        println!("entry {}/{} chunk {chunk}: {} blocks", key.0, key.1, entry.mapped().count());
        Ok(())
    });
    every.expect("rows are read");
}

pub(super) fn read_all(device: &dyn BlockDevice) -> Vec<u8> {
    let mut bytes = vec![0; device.size() as usize];
    device.read(&mut bytes, 0).expect("every byte can be read");
    bytes
}
