//! How a run of the program ends, and what the next one must find.
//!
//! # Guests
//! Some disks have a guest: a holder of the lease that outlives the process, as a client of NBD or vhost-user does. What was
//! acknowledged to it is there after a kill, and it comes back as the exports let it: the disk is reserved for it, it takes
//! the lease, goes on, and flushes some time. When power was lost, and with it something it was told was done, that flush
//! must say so, once; and when only the process was killed, it must not.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use afterimage::disk::{self, Lease};
use afterimage::progress::Silent;
use afterimage::snapshot;
use afterimage::store::SnapshotState;
use afterimage::units::DiskId;

use super::run::{Run, open, read_all};
use super::twin::{End, Twin};

const GUEST: &str = "guest";

/// What a guest is told at its next flush.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Loss {
    None,
    MayBe,
    Certain,
}

/// Who has which lease, and what each has to be told.
#[derive(Default)]
pub struct Guests {
    leases: BTreeMap<DiskId, Lease>,
    losses: BTreeMap<DiskId, Loss>,
}

impl Run {
    fn id(&self, name: &str) -> DiskId {
        disk::open(self.store(), name).unwrap().id()
    }

    fn name(&self, id: DiskId) -> Option<String> {
        self.store().disk_info_by_id(id).ok().map(|info| info.name)
    }

    /// The twin after an operation on a disk: if a guest did it, it must survive a kill once it is answered.
    pub(super) fn acknowledged(&self, name: &str) -> Twin {
        let mut after = Twin::clone(&self.twin);
        if self.guests.leases.contains_key(&self.id(name)) {
            after.disks.get_mut(name).unwrap().live.acknowledge();
        }
        after
    }

    /// A guest attaches a disk or lets go of it.
    pub(super) fn come_or_go(&mut self) {
        let Some(name) = self.any_disk() else { return };
        let id = self.id(&name);
        if self.guests.leases.contains_key(&id) {
            if self.chance(30) {
                self.leave(&name);
            }
            return;
        }
        let mut after = self.twin.clone();
        // A pool that refuses writes flushes nothing, and gives the lease all the same.
        if self.store().health().is_none() {
            after.disks.get_mut(&name).unwrap().live.flush();
        }
        let mut lease = None;
        if self.attempt(&format!("a guest comes to {name}"), after, |store| {
            lease = Some(disk::open(store, &name)?.lease(GUEST)?);
            Ok(())
        }) {
            self.guests.leases.extend(lease.map(|lease| (id, lease)));
            self.counts.guests += 1;
        }
    }

    /// The guest of a disk lets go of it, if it has one.
    pub(super) fn leave(&mut self, name: &str) {
        if self.twin.disks.contains_key(name)
            && !self.media.is_down()
            && self.guests.leases.remove(&self.id(name)).is_some()
        {
            self.say(|| format!("the guest of {name} goes"));
        }
    }

    /// A flush of a disk was answered: with what the guest had to be told, or without.
    pub(super) fn hear(&mut self, name: &str, told: bool) {
        let id = self.id(name);
        if !self.guests.leases.contains_key(&id) {
            assert!(!told, "{name} has no guest, and somebody was told that something is lost");
            return;
        }
        match (self.guests.losses.remove(&id).unwrap_or(Loss::None), told) {
            (Loss::None, true) => panic!("the guest of {name} was told of a loss, and nothing was lost"),
            (Loss::Certain, false) => panic!("the guest of {name} was not told of what it has lost"),
            (_, true) => {
                self.counts.told += 1;
                // Its next flush begins the log anew; killed before, it is told again.
                self.guests.losses.insert(id, Loss::MayBe);
            }
            (_, false) => {}
        }
    }

    pub(super) fn end_at_once(&mut self) {
        self.say(|| "the end".into());
        self.recover(None);
    }

    /// Loses power or is killed, opens again, checks, compares.
    pub(super) fn recover(&mut self, or: Option<Twin>) {
        let mut end = if self.next(2) == 0 { End::Power } else { End::Kill };
        // After a failed sync a kill may take as much as a loss of power.
        let failed = self.store().health().is_some() || self.faulty;
        let guests: Vec<DiskId> = std::mem::take(&mut self.guests.leases).into_keys().collect();
        self.faulty = false;
        let mut twice = false;
        self.store = None;
        self.come_to_an(end);
        if self.next(4) == 0 {
            // Again, while recovering.
            let n = 1 + self.next(60);
            self.media.crash_after(n);
            let opened = open(Arc::new(self.media.process()), self.in_background);
            let reclaimed = opened.and_then(|store| store.reclaim_wait(&Silent));
            self.say(|| format!("  the end again while recovering: {reclaimed:?}"));
            let again = if self.next(2) == 0 { End::Power } else { End::Kill };
            self.come_to_an(again);
            end = if again == End::Power { again } else { end };
            twice = true;
        }
        let lost = self.open_and_compare(or, Some(end), if failed { End::Power } else { end });
        let told = match end {
            // Killed again before it had begun a log for who is awaited, it does not know.
            End::Kill if !twice && !failed => Loss::None,
            _ => Loss::MayBe,
        };
        self.come_back(&guests, &lost, told);
    }

    fn come_to_an(&mut self, end: End) {
        self.give_room();
        self.say(|| format!("  {end:?}"));
        match end {
            End::Power => {
                self.counts.crashes += 1;
                self.media.crash();
            }
            End::Kill => {
                self.counts.kills += 1;
                self.media.kill();
            }
        }
    }

    /// Those who were writing come back to their disks, or not.
    fn come_back(&mut self, guests: &[DiskId], lost: &[String], told: Loss) {
        let old = std::mem::take(&mut self.guests.losses);
        for id in guests {
            let Some(name) = self.name(*id) else { continue };
            if self.chance(20) {
                continue;
            }
            let loss = if lost.contains(&name) { Loss::Certain } else { told };
            let disk = disk::open(self.store(), &name).unwrap();
            disk.reserve(GUEST, Duration::from_secs(60));
            let lease = disk.lease(GUEST).expect("it is reserved");
            // Taking the lease flushes.
            self.twin.disks.get_mut(&name).unwrap().live.flush();
            self.guests.leases.insert(*id, lease);
            let loss = loss.max(old.get(id).copied().unwrap_or(Loss::None));
            self.say(|| format!("  the guest of {name} comes back, lost: {loss:?}"));
            self.guests.losses.insert(*id, loss);
            self.counts.back += 1;
        }
    }

    pub(super) fn reopen(&mut self) {
        self.say(|| "reopen".into());
        self.counts.reopens += 1;
        self.guests = Guests::default();
        self.faulty = false;
        let store = self.store.take().expect("open");
        // A fault that hit work in the background: the pool refuses writes, and closing it makes nothing durable.
        let poisoned = store.health().is_some();
        let closed = store.close();
        drop(store);
        if poisoned || closed.is_err() || self.media.is_down() {
            self.media.crash();
            self.open_and_compare(None, Some(End::Power), End::Power);
            return;
        }
        // Whatever was armed is not meant for the comparison.
        self.media.crash();
        for disk in self.twin.disks.values_mut() {
            disk.live.flush();
        }
        self.open_and_compare(None, None, End::Power);
    }

    /// Opens, checks and compares; `end` is `None` after a close, and `how` says what may be lost. Returns the disks that lack
    /// something which a guest was told is done.
    fn open_and_compare(&mut self, or: Option<Twin>, end: Option<End>, how: End) -> Vec<String> {
        let store = open(Arc::new(self.media.process()), self.in_background).expect("the pool opens after a crash");
        let report = snapshot::check(&store, false, &Silent).expect("check runs");
        if self.verbose && !report.problems.is_empty() {
            super::run::show_tree(&store);
        }
        assert!(report.problems.is_empty(), "check found: {:#?}", report.problems);
        self.store = Some(store);
        self.name_kept();
        let first = self.compare(&self.twin, how);
        if self.verbose && first.is_err() {
            super::run::show_tree(self.store());
        }
        let second = or.as_ref().map(|twin| self.compare(twin, how));
        // Whatever was under way: what explains a kill has lost nothing.
        let kept = |twin: &Twin, name: &str, found: &[u8]| {
            twin.disks.get(name).is_none_or(|disk| disk.live.explain(found, End::Kill).is_ok())
        };
        let (before, after) = (self.twin.clone(), or.clone());
        match (first, second) {
            (Ok(()), _) => {}
            (Err(_), Some(Ok(()))) => self.twin = or.expect("compared"),
            (Err(why), None) => panic!("not what the twin has ({end:?}): {why}"),
            (Err(why), Some(Err(also))) => panic!("({end:?}) neither as before: {why}\nnor as after: {also}"),
        }
        // From here on what was found is what is there.
        let names: Vec<_> = self.twin.disks.keys().cloned().collect();
        let mut lost = Vec::new();
        for name in names {
            let found = read_all(&*disk::open(self.store(), &name).unwrap());
            if !kept(&before, &name, &found) && after.as_ref().is_none_or(|after| !kept(after, &name, &found)) {
                lost.push(name.clone());
            }
            let live = &mut self.twin.disks.get_mut(&name).unwrap().live;
            *live = if end == Some(End::Kill) { live.found_by_the_next(found) } else { live.found(found) };
        }
        lost
    }

    pub(super) fn compare(&self, twin: &Twin, end: End) -> Result<(), String> {
        let names: Vec<_> = self.store().disks().into_iter().map(|info| info.name).collect();
        let expected: Vec<_> = twin.disks.keys().cloned().collect();
        if names != expected {
            return Err(format!("disks {names:?} instead of {expected:?}"));
        }
        for (name, disk) in &twin.disks {
            let snapshots = self.store().snapshots(name).unwrap();
            for (state, expected) in [(SnapshotState::Live, &disk.snapshots), (SnapshotState::Retired, &disk.retired)] {
                let mut found: Vec<_> = snapshots.iter().filter(|s| s.state == state).map(|s| s.name.clone()).collect();
                found.sort();
                if found != expected.keys().cloned().collect::<Vec<_>>() {
                    return Err(format!("{state:?} snapshots of {name}: {found:?}"));
                }
            }
            let found = read_all(&*disk::open(self.store(), name).unwrap());
            disk.live.explain(&found, end).map_err(|why| format!("disk {name}: {why}"))?;
            for (snap, frame) in &disk.snapshots {
                let image = &frame.bytes;
                let found = read_all(&*snapshot::open(self.store(), name, snap).unwrap());
                if found == **image {
                    continue;
                }
                if let Some(at) = (0..image.len().max(found.len())).find(|i| image.get(*i) != found.get(*i)) {
                    return Err(format!(
                        "snapshot {name}@{snap} differs at byte {at} (block {}): {:?} found, {:?} expected",
                        at / 4096,
                        found.get(at),
                        image.get(at)
                    ));
                }
            }
        }
        Ok(())
    }
}
