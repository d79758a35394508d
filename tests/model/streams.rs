//! Sending, exporting, and receiving into the same pool.

use std::sync::Arc;

use afterimage::error::{Error, Kind};
use afterimage::export;
use afterimage::progress::Silent;
use afterimage::snapshot;
use afterimage::snapshot::diff::{Extent, StateName};
use afterimage::store::{SnapshotInfo, SnapshotState, Store};
use afterimage::stream::{self, Part, ReceiveOptions, SendOptions, StreamReader, Token, What};
use uuid::Uuid;

use super::past::{Side, check, says_strangers};
use super::run::Run;
use super::twin::{BLOCK, Frame, Image, Twin, TwinDisk, UNKNOWN, Write};
use crate::export::{Bench, apply_in_memory, shells};

/// A stream and where it is to go.
struct Delivery {
    disk: String,
    bytes: Vec<u8>,
    force: bool,
    /// What it leads to.
    to: Frame,
    /// What it carries.
    carried: Carried,
    /// It is the rest of one that was cut off.
    rest: bool,
}

/// A stream taken apart.
struct Carried {
    base: Option<Uuid>,
    size: u64,
    start: u64,
    extents: Vec<Extent>,
}

/// What must come of a delivery.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    Accepted,
    Refused,
    /// The twin cannot tell whether the disk is as its newest snapshot.
    Either,
}

struct Plan {
    fate: Fate,
    /// What the stream comes on top of.
    base: Frame,
    /// Whether a snapshot keeps what was there.
    kept: bool,
}

/// Takes a stream apart and applies it to what was before.
fn take_apart(mut bytes: &[u8], image: &mut Vec<u8>) -> Carried {
    let mut reader = StreamReader::new(&mut bytes).unwrap();
    let header = reader.header.clone();
    image.resize(header.target.size as usize, 0);
    let mut extents: Vec<Extent> = Vec::new();
    while let Some(part) = reader.next_part().unwrap() {
        let extent = match part {
            Part::Data { offset, bytes } => {
                image[offset as usize..][..bytes.len()].copy_from_slice(bytes);
                Extent { offset, length: bytes.len() as u64, zero: false }
            }
            Part::Zeros { offset, length } => {
                image[offset as usize..][..length as usize].fill(0);
                Extent { offset, length, zero: true }
            }
        };
        join(&mut extents, extent);
    }
    Carried { base: header.base.map(|base| base.uuid), size: header.target.size, start: header.start, extents }
}

/// Data comes in pieces; a diff tells of them as one.
fn join(extents: &mut Vec<Extent>, extent: Extent) {
    match extents.last_mut() {
        Some(last) if last.zero == extent.zero && last.offset + last.length == extent.offset => {
            last.length += extent.length;
        }
        _ => extents.push(extent),
    }
}

fn names(side: &Side) -> Option<(String, String)> {
    match &side.name {
        StateName::Snapshot(disk, name) => Some((disk.clone(), name.clone())),
        _ => None,
    }
}

fn is_failed(error: &Error) -> bool {
    error.kind() == Kind::Failed
}

/// The name of the disk that a hidden disk is for.
fn disks_with_a_rest(store: &Store) -> Vec<String> {
    let tables = store.tables.read();
    let all: Vec<_> = tables.disks().map(|(_, row)| (row.name.clone(), row.uuid.to_string())).collect();
    let target = |rest: &str| match rest.strip_prefix("new-") {
        Some(name) => Some(name.to_owned()),
        None => all.iter().find(|(_, uuid)| uuid == rest).map(|(name, _)| name.clone()),
    };
    all.iter().filter_map(|(name, _)| target(name.strip_prefix(".receive-")?)).collect()
}

impl Run {
    /// A state and a live snapshot that can be compared; sometimes two that cannot.
    fn any_pair(&mut self) -> Option<(Side, Side)> {
        let (disk, snap) = self.any_snapshot()?;
        let twin = &self.twin.disks[&disk];
        let (frame, lineage) = (twin.snapshots[&snap].clone(), Some(twin.lineage));
        let to = Side { name: StateName::Snapshot(disk, snap), frame, lineage };
        let strangers = self.chance(10);
        let mut all = self.sides();
        all.retain(|from| !matches!(from.name, StateName::Disk(_)) && (strangers || from.is_akin(&to)));
        Some((self.any_of(all)?, to))
    }

    pub(super) fn send(&mut self) {
        let Some((from, to)) = self.any_pair() else { return };
        self.send_pair(&from, &to);
    }

    /// Sends, compares what was sent, and returns it; `None` when there is nothing to go on with.
    fn send_pair(&mut self, from: &Side, to: &Side) -> Option<(Vec<u8>, Carried)> {
        if self.media.is_down() {
            return None;
        }
        let what = What::States { from: names(from), to: names(to).expect("a snapshot") };
        let options = SendOptions { what, compress: self.chance(50) };
        let (akin, after) = (from.is_akin(to), self.twin.clone());
        let mut sent = None;
        let done = self.attempt(&format!("send {} {}", from.name, to.name), after, |store| {
            let mut bytes = Vec::new();
            match stream::send(store, &options, &mut bytes, &Silent) {
                Err(error) if !akin && says_strangers(&error) => return Ok(()),
                outcome => outcome?,
            };
            assert!(akin, "a stream from {} to {}, which are strangers", from.name, to.name);
            sent = Some(bytes);
            Ok(())
        });
        let bytes = sent?;
        self.counts.sends += 1;
        let mut image = from.frame.bytes.to_vec();
        let carried = take_apart(&bytes, &mut image);
        assert!(image == *to.frame.bytes, "the stream from {} to {} leads elsewhere", from.name, to.name);
        check("send", from, to, &carried.extents);
        done.then_some((bytes, carried))
    }

    pub(super) fn export(&mut self) {
        let Some((from, to)) = self.any_pair() else { return };
        if self.media.is_down() {
            return;
        }
        let bench = Bench::in_memory();
        let dir = bench.path("next");
        let (akin, after) = (from.is_akin(&to), self.twin.clone());
        let (old, new) = (names(&from), names(&to).expect("a snapshot"));
        let mut made = None;
        self.attempt(&format!("export {} {}", from.name, to.name), after, |store| {
            let old = old.as_ref().map(|(disk, name)| (&**disk, &**name));
            let (increment, device) = match export::describe(store, old, (&new.0, &new.1)) {
                Err(error) if !akin && says_strangers(&error) => return Ok(()),
                outcome => outcome?,
            };
            assert!(akin, "an increment from {} to {}, which are strangers", from.name, to.name);
            export::write(&increment, &device, &dir, &Silent)?;
            made = Some(increment);
            Ok(())
        });
        let Some(increment) = made else { return };
        self.counts.exports += 1;
        let part = |part: &export::Part, zero| Extent { offset: part.offset, length: part.length, zero };
        let mut extents: Vec<_> = increment.plan.files.iter().map(|file| part(file, false)).collect();
        extents.extend(increment.plan.zeros.iter().map(|range| part(range, true)));
        extents.sort_by_key(|extent| extent.offset);
        assert_eq!(increment.plan.joined, 0);
        check("export", &from, &to, &extents);
        let mut image = from.frame.bytes.to_vec();
        apply_in_memory(&dir, &mut image);
        assert!(image == *to.frame.bytes, "the increment from {} to {} leads elsewhere", from.name, to.name);
        // A shell starts a process for each file.
        if increment.plan.files.len() + increment.plan.zeros.len() <= 40 && self.next(8) == 0 {
            self.counts.scripts += 1;
            let target = bench.path("target");
            if from.name != StateName::Nothing {
                std::fs::write(&target, &*from.frame.bytes).unwrap();
            }
            let shells = shells();
            let shell = shells[self.next(shells.len() as u64) as usize];
            bench.applies(shell, "next", &["--force", "target"]);
            assert!(std::fs::read(&target).unwrap() == *to.frame.bytes, "{shell:?}: {} {}", from.name, to.name);
        }
    }

    pub(super) fn receive(&mut self) {
        if self.media.is_down() || self.twin.disks.values().map(|disk| disk.snapshots.len()).sum::<usize>() > 10 {
            return;
        }
        let rests = disks_with_a_rest(self.store());
        if !rests.is_empty() && self.chance(50) {
            let disk = rests[self.next(rests.len() as u64) as usize].clone();
            return if self.chance(25) { self.abort(&disk) } else { self.resume(&disk) };
        }
        let made = match self.next(4) {
            0 if self.twin.disks.len() < 5 => self.onto_new(),
            1 => self.by_force(),
            _ => self.onto_base(),
        };
        let Some((disk, from, to, force)) = made else { return };
        let Some((bytes, carried)) = self.send_pair(&from, &to) else { return };
        self.deliver(Delivery { disk, bytes, force, to: to.frame, carried, rest: false });
    }

    fn onto_new(&mut self) -> Option<(String, Side, Side, bool)> {
        let (_, to) = self.any_pair()?;
        Some((self.fresh("copy"), Side::nothing(), to, false))
    }

    /// A full stream, or one from any of its snapshots, onto any disk.
    fn by_force(&mut self) -> Option<(String, Side, Side, bool)> {
        let disk = self.any_disk()?;
        if self.chance(40) {
            let (_, to) = self.any_pair()?;
            return Some((disk, Side::nothing(), to, true));
        }
        let mut pairs = self.pairs_for(&disk, None);
        let n = self.next(pairs.len().max(1) as u64) as usize;
        (!pairs.is_empty()).then(|| pairs.swap_remove(n)).map(|(from, to)| (disk, from, to, true))
    }

    /// An increment onto a disk that has the base as its newest snapshot.
    fn onto_base(&mut self) -> Option<(String, Side, Side, bool)> {
        let disk = self.any_disk()?;
        let newest = newest(&self.store().snapshots(&disk).unwrap())?.uuid;
        let mut pairs = self.pairs_for(&disk, Some(newest));
        let n = self.next(pairs.len().max(1) as u64) as usize;
        (!pairs.is_empty()).then(|| pairs.swap_remove(n)).map(|(from, to)| (disk, from, to, false))
    }

    /// What can be sent from a state whose identity the disk has: of any of its snapshots, or of one.
    fn pairs_for(&self, disk: &str, only: Option<Uuid>) -> Vec<(Side, Side)> {
        let own: Vec<_> = self.store().snapshots(disk).unwrap().into_iter().map(|info| info.uuid).collect();
        let sides = self.sides();
        let mut pairs = Vec::new();
        for from in &sides {
            let Some((disk, name)) = names(from) else { continue };
            let uuid = self.store().snapshot_info(&disk, &name).unwrap().uuid;
            if !own.contains(&uuid) || only.is_some_and(|only| only != uuid) {
                continue;
            }
            for to in sides.iter().filter(|to| to.lineage == from.lineage) {
                if names(to).is_some_and(|(disk, name)| self.twin.disks[&disk].snapshots.contains_key(&name)) {
                    pairs.push((from.clone(), to.clone()));
                }
            }
        }
        pairs
    }

    fn abort(&mut self, disk: &str) {
        self.leave(disk);
        let after = self.twin.clone();
        self.attempt(&format!("abort {disk}"), after, |store| stream::abort(store, disk));
    }

    /// Sends the rest of what was cut off.
    fn resume(&mut self, disk: &str) {
        let token = stream::token(self.store(), disk).unwrap();
        let options = SendOptions { what: What::Rest(token), compress: true };
        let (after, mut sent) = (self.twin.clone(), None);
        let gone = |error: &Error| is_failed(error) && error.to_string().starts_with("cannot resume");
        let done = self.attempt_unless(&format!("rest for {disk}"), after, gone, |store| {
            let mut bytes = Vec::new();
            stream::send(store, &options, &mut bytes, &Silent)?;
            sent = Some(bytes);
            Ok(())
        });
        // The states of the token may be gone.
        let Some(bytes) = sent.filter(|_| done) else { return };
        let (from, to) = (self.frame_of(token.base), self.frame_of(token.target));
        let (from, to) = (from.expect("it was sent"), to.expect("it was sent"));
        let mut image = from.bytes.to_vec();
        image.resize(to.bytes.len(), 0);
        let start = token.offset as usize;
        image[..start].copy_from_slice(&to.bytes[..start]);
        let carried = take_apart(&bytes, &mut image);
        assert!(image == *to.bytes, "the rest of the stream for {disk} leads elsewhere");
        assert_eq!((carried.start, carried.base), (token.offset, Some(token.base).filter(|base| !base.is_nil())));
        let force = self.was_forced(disk, &token);
        self.deliver(Delivery { disk: disk.to_owned(), bytes, force, to, carried, rest: true });
    }

    /// Tells whether what arrived for a disk was begun by force.
    fn was_forced(&self, disk: &str, token: &Token) -> bool {
        let tables = self.store().tables.read();
        let token = token.to_string();
        let note = |origin: &Option<String>| origin.clone().filter(|note| note.ends_with(&token)).unwrap_or_default();
        let notes: Vec<_> = tables.disks().map(|(_, row)| note(&row.origin)).collect();
        self.twin.disks.contains_key(disk)
            && notes.iter().any(|n| n.starts_with("receive replace") || n.starts_with("receive older"))
    }

    /// What any snapshot of an identity is; nothing for the nil one.
    fn frame_of(&self, uuid: Uuid) -> Option<Frame> {
        if uuid.is_nil() {
            return Some(Frame::default());
        }
        self.twin.disks.iter().find_map(|(disk, twin)| {
            let all = self.store().snapshots(disk).unwrap();
            let info = all.into_iter().find(|info| info.uuid == uuid)?;
            frame_in(twin, &info.name)
        })
    }

    /// Tells what must come of a stream; `None` when the twin does not know enough to tell.
    fn foresee(&self, disk: &str, carried: &Carried, force: bool) -> Option<Plan> {
        let Some(twin) = self.twin.disks.get(disk) else {
            assert!(carried.base.is_none(), "only full streams are for new disks");
            let base = Image::new(carried.size as usize).frame();
            return Some(Plan { fate: Fate::Accepted, base, kept: false });
        };
        let all = self.store().snapshots(disk).unwrap();
        let newest = newest(&all);
        let frame = |info: &SnapshotInfo| frame_in(twin, &info.name).expect("the twin has it");
        let same = newest.map_or(Some(false), |newest| twin.live.is_still(&frame(newest)));
        let kept = if newest.is_some_and(|newest| newest.state == SnapshotState::Live) { same } else { Some(false) };
        let kept = kept.map(|safe| !safe).filter(|kept| *kept || !twin.live.shrunk);
        let live = twin.live.frame();
        let Some(uuid) = carried.base else {
            let fate = if force { Fate::Accepted } else { Fate::Refused };
            return Some(Plan { fate, base: live, kept: kept.filter(|_| force).or((!force).then_some(false))? });
        };
        if newest.is_some_and(|newest| newest.uuid == uuid) {
            match same {
                Some(true) => return Some(Plan { fate: Fate::Accepted, base: live, kept: false }),
                None if force => return None,
                None => return Some(Plan { fate: Fate::Either, base: live, kept: false }),
                Some(false) => {}
            }
        }
        let mut older = all.iter().filter(|info| info.uuid == uuid && info.state == SnapshotState::Live);
        match (older.next(), older.next()) {
            (Some(older), None) if force => Some(Plan { fate: Fate::Accepted, base: frame(older), kept: kept? }),
            // Which of the two it is begun on is not told.
            (Some(_), Some(_)) if force => None,
            _ => Some(Plan { fate: Fate::Refused, base: live, kept: false }),
        }
    }

    /// The twin when a stream was received.
    fn delivered(&mut self, it: &Delivery, plan: &Plan, name: &str, kept: &str) -> Twin {
        let begun = disks_with_a_rest(self.store()).contains(&it.disk);
        let (number, lineage) = (self.number(), self.number());
        let mut after = self.twin.clone();
        let fresh = TwinDisk { lineage, ..TwinDisk::default() };
        let disk = after.disks.entry(it.disk.clone()).or_insert(fresh);
        if plan.kept {
            disk.stop(kept);
        }
        disk.live = arrived(&plan.base, it, number, begun);
        disk.stop(name);
        disk.become_like(disk.snapshots[name].clone());
        after
    }

    fn deliver(&mut self, mut it: Delivery) {
        self.leave(&it.disk);
        let Some(Plan { mut fate, base, kept }) = self.foresee(&it.disk, &it.carried, it.force) else { return };
        if it.rest && self.twin.disks.contains_key(&it.disk) && fate == Fate::Accepted {
            // What it was begun on may be another state than what it would be begun on now.
            fate = Fate::Either;
        }
        let (name, kept_as) = (self.fresh("r"), self.fresh("k"));
        let whole = self.delivered(&it, &Plan { fate, base, kept }, &name, &kept_as);
        let cut = self.next(4) == 0;
        if cut {
            let len = self.next(it.bytes.len() as u64) as usize;
            it.bytes.truncate(len);
        }
        let after = if cut || fate == Fate::Refused { self.twin.clone() } else { whole };
        // With the background at work the I/O that fails may be anybody's.
        if self.next(4) == 0 && !self.in_background {
            let n = 1 + self.next(60);
            self.media.crash_after(n);
        }
        self.kept_as = Some(kept_as.clone());
        let (disk, force) = (it.disk.clone(), it.force);
        let options = ReceiveOptions { disk: disk.clone(), force, name: Some(name.clone()) };
        let mut answered = false;
        let what = format!("receive {disk}@{name}, force {force}, cut {cut}, kept {kept}: {fate:?}");
        let either = |error: &Error| fate == Fate::Either && is_failed(error);
        let done = self.attempt_unless(&what, after, either, |store| {
            match stream::receive(store, &options, &mut &*it.bytes, &Silent) {
                Err(error) if cut && error.kind() == Kind::Corrupt => return Ok(()),
                Err(error) if fate == Fate::Refused && matches!(error.kind(), Kind::Failed | Kind::Exists) => {
                    return Ok(());
                }
                outcome => {
                    let report = outcome?;
                    assert!(!cut, "a stream that was cut off was received");
                    assert!(fate != Fate::Refused, "a stream was received onto what is not its base");
                    assert_eq!((&report.disk, &report.snapshot), (&disk, &name));
                    assert_eq!(report.kept.is_some(), kept, "{report:?}");
                    if let Some(kept) = report.kept {
                        snapshot::rename(store, &disk, &kept, &kept_as)?;
                    }
                }
            }
            answered = true;
            Ok(())
        });
        self.kept_as = None;
        if !done {
            return;
        }
        match (answered, cut) {
            (true, _) => {
                self.counts.received += 1;
                self.counts.onto += u64::from(it.carried.base.is_some());
                self.counts.forced += u64::from(force);
                self.counts.resumed += u64::from(it.rest);
                self.seen(&disk, &name);
            }
            (false, true) => self.counts.cut += 1,
            (false, false) => self.counts.refused += 1,
        }
    }

    /// Compares what was received at once: the next crash may be far.
    fn seen(&self, disk: &str, name: &str) {
        if self.media.is_down() {
            return;
        }
        let found = super::run::read_all(&*snapshot::open(self.store(), disk, name).unwrap());
        assert!(found == *self.twin.disks[disk].snapshots[name].bytes, "{disk}@{name} is not what was sent");
        let found = super::run::read_all(&*afterimage::disk::open(self.store(), disk).unwrap());
        assert!(found == *self.twin.disks[disk].live.now, "{disk} is not what was sent");
    }

    /// Gives the snapshot that keeps what a stream replaced the name that the twin knows, if the power went before that.
    pub(super) fn name_kept(&mut self) {
        let Some(kept_as) = self.kept_as.take() else { return };
        let store = Arc::clone(self.store());
        for info in store.disks() {
            for snap in store.snapshots(&info.name).unwrap() {
                if snap.name.starts_with("kept-") {
                    snapshot::rename(&store, &info.name, &snap.name, &kept_as).unwrap();
                }
            }
        }
    }
}

fn newest(all: &[SnapshotInfo]) -> Option<&SnapshotInfo> {
    all.iter().max_by_key(|info| info.id)
}

fn frame_in(twin: &TwinDisk, name: &str) -> Option<Frame> {
    twin.snapshots.get(name).or_else(|| twin.retired.get(name)).cloned()
}

/// What comes of a stream on top of a state. If some of it had been there before, blocks that are not carried may have been
/// written too.
fn arrived(base: &Frame, it: &Delivery, number: Write, begun: bool) -> Image {
    let mut image = Image::of(base.clone());
    let size = it.carried.size as usize;
    if image.now.len() != size {
        image.resize(size);
    }
    if it.carried.start > 0 {
        let start = it.carried.start as usize;
        image.write(0, &it.to.bytes[..start], UNKNOWN);
    }
    let mut told = vec![false; size.div_ceil(BLOCK)];
    for extent in &it.carried.extents {
        let (from, upto) = (extent.offset as usize, (extent.offset + extent.length) as usize);
        if extent.zero {
            image.zero(from, upto, number);
        } else {
            image.write(from, &it.to.bytes[from..upto], number);
        }
        let whole = if extent.zero && begun { upto / BLOCK } else { upto.div_ceil(BLOCK) };
        told[from / BLOCK..whole].fill(true);
    }
    if begun {
        for block in (0..told.len()).filter(|block| !told[*block]) {
            image.settle_on(block..block + 1, UNKNOWN);
        }
    }
    image
}
