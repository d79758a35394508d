//! The other way: every snapshot from its seal.
//!
//! # Steps
//! 1. Read all seals of states; of those that are not gone, every one whose line of bases is whole can be had.
//! 2. Sort their entries by chunk (`scratch`). The entry of a state is that of its own seal, or else that of its base.
//! 3. Leave out states whose blocks are not all inside a segment that is there.
//! 4. Make the small tables (`plan`): states, branches, ghosts, disks.
//! 5. Chunk by chunk, store an entry wherever a state's differs from that of the state above it.
//!
//! Step 5 does not copy the entries of the seals: what a seal is based on and what is above it in the tree need not be the
//! same, and only the tree counts for look-ups.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use roaring::RoaringTreemap;

use super::super::commit::CHUNKS_PER_GROUP;
use super::super::journal::Mark;
use super::super::rows::{BranchRow, Key, REBUILT, Row, SegmentRow, encode_entry, encode_set};
use super::super::state_file::{STATES_DIR, StateSeal, parse_name};
use super::super::tables::StateKey;
use super::hints::Hints;
use super::plan::Plan;
use super::scratch::{Scratch, by_chunk};
use super::source::Source;
use super::whole::{segment_header, segment_ids};
use super::{Output, Work};
use crate::error::{Error, Kind, Result};
use crate::map::{BlockSet, Entry};
use crate::pool::{RETIRED_DIR, segment_path};
use crate::units::{BLOCK_SIZE, BlockAddress, BranchId, CHUNK_SIZE, ChunkIndex, Epoch, SegmentId};

/// A seal that was read.
pub(super) struct Sealed {
    pub(super) seal: StateSeal,
    /// Its blocks may be gone: it only says what others are based on.
    pub(super) gone: bool,
    pub(super) lineage: BranchId,
}

/// A segment file.
struct File {
    row: SegmentRow,
    blocks: u64,
}

/// All that is on disk.
pub(super) struct Found {
    seals: BTreeMap<Epoch, Sealed>,
    files: BTreeMap<SegmentId, File>,
    /// The seals of each lineage, the oldest first.
    lines: BTreeMap<BranchId, Vec<Epoch>>,
}

/// Makes the new catalog from the seals of states.
pub(super) fn write(work: &mut Work<'_>, source: Option<&Source>) -> Result<()> {
    work.report.source = source.map(|source| source.name.clone());
    let hints = Hints::gather(source, work.survey.as_ref())?;
    work.report.frames = hints.frames;
    work.progress.message("reading the seals");
    let mut found = Found { seals: read_seals(work, &hints)?, files: read_segments(work)?, lines: BTreeMap::new() };
    drop_broken_lines(work, &mut found);
    let mut scratch = Scratch::create(&**work.media)?;
    sort_entries(work, &mut found, &mut scratch)?;
    for (epoch, sealed) in &found.seals {
        found.lines.entry(sealed.lineage).or_default().push(*epoch);
    }
    let view = scratch.view()?;
    work.progress.message("comparing with the segments");
    let mut bad: BTreeMap<Epoch, SegmentId> = BTreeMap::new();
    by_chunk(&view, &mut |lineage, _, entries| {
        for (epoch, entry) in found.maps(lineage, &entries) {
            if let Some(segment) = found.outside(entry) {
                bad.insert(epoch, segment);
            }
        }
        Ok(())
    })?;
    for (epoch, segment) in bad {
        let state = found.seals.get_mut(&epoch).expect("its entry was read");
        state.gone = true;
        let what = format!("{}: segment {segment} is not there or too short", name_of(&state.seal));
        work.report.notes.push(what);
    }
    work.progress.message("writing the catalog");
    let plan = Plan::make(&found, &hints, found.files.keys().next_back().copied().unwrap_or_default())?;
    let mut output = Output::create(&**work.media, fresh_mark(hints.lsn)?)?;
    fill(work, &found, plan, &view, &mut output)?;
    output.finish()?;
    set_records_aside(work)
}

/// Puts records that the new catalog does not name where the next opening does not take them for leftovers.
fn set_records_aside(work: &mut Work<'_>) -> Result<()> {
    let media = &**work.media;
    let records = match media.list(RETIRED_DIR) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        other => other.map_err(|e| Error::io(format!("cannot list {RETIRED_DIR}"), e))?,
    };
    if records.is_empty() {
        return Ok(());
    }
    let names = work.names()?;
    let aside = (1..).map(|n| format!("{RETIRED_DIR}.damaged-{n}")).find(|name| !names.contains(name));
    let aside = aside.expect("numbers do not end");
    let fail = |e| Error::io(format!("cannot move the records of retired snapshots to {aside}"), e);
    media.make_dir(&aside).map_err(fail)?;
    media.sync_dir("").map_err(fail)?;
    for name in &records {
        media.rename(&format!("{RETIRED_DIR}/{name}"), &format!("{aside}/{name}")).map_err(fail)?;
    }
    media.sync_dir(&aside).map_err(fail)?;
    media.sync_dir(RETIRED_DIR).map_err(fail)?;
    work.report.notes.push(format!(
        "retired snapshots are not there any more, and the next backup of each disk is a full one; their records ({}) are \
         in {aside} now",
        records.len()
    ));
    Ok(())
}

pub(super) fn name_of(seal: &StateSeal) -> String {
    let name = if seal.row.name.is_empty() { format!("epoch {}", seal.epoch) } else { seal.row.name.clone() };
    format!("snapshot '{}@{name}' is lost", seal.disk_name)
}

fn read_seals(work: &mut Work<'_>, hints: &Hints) -> Result<BTreeMap<Epoch, Sealed>> {
    let names = match work.media.list(STATES_DIR) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Vec::new(),
        other => other.map_err(|e| Error::io(format!("cannot list {STATES_DIR}"), e))?,
    };
    let mut seals: BTreeMap<Epoch, Sealed> = BTreeMap::new();
    for (epoch, gone) in names.iter().filter_map(|name| parse_name(name)) {
        let opened = StateSeal::open(&**work.media, epoch, gone).map(|(seal, _)| seal);
        let seal = match opened {
            Ok(seal) if seal.pool == work.pool => seal,
            Ok(_) => {
                work.report.notes.push(format!("the seal of epoch {epoch} belongs to another pool"));
                continue;
            }
            Err(error) if error.kind() == Kind::Corrupt => {
                work.report.notes.push(format!("the snapshot of epoch {epoch} is lost: {error}"));
                continue;
            }
            Err(error) => return Err(error),
        };
        let fate = hints.states.get(&epoch);
        let dead = hints.deleted.contains(&epoch) || fate.is_some_and(|row| !row.status.readable());
        let lineage = seal.branches.last().expect("a seal has branches").0;
        let sealed = Sealed { gone: gone || dead, lineage, seal };
        // Both names: a rename that was not durable. Gone is gone.
        if seals.get(&epoch).is_none_or(|other| !other.gone) {
            seals.insert(epoch, sealed);
        }
    }
    Ok(seals)
}

/// Reads the headers of all segments. A file whose header is damaged gets another name: the next opening would take it for
/// the leftover of a crash and remove it.
fn read_segments(work: &mut Work<'_>) -> Result<BTreeMap<SegmentId, File>> {
    let mut files = BTreeMap::new();
    for id in segment_ids(&**work.media)? {
        let path = segment_path(id);
        match segment_header(&**work.media, id) {
            Ok((header, len)) if header.pool == work.pool && header.id == id => {
                let (disk, nonce) = (header.disk, header.nonce);
                let row = SegmentRow { disk, nonce, opening: REBUILT, mapped: 0, swept: true, removed: false };
                files.insert(id, File { row, blocks: len / BLOCK_SIZE });
            }
            Err(error) if !matches!(error.kind(), Kind::Corrupt | Kind::Unsupported) => return Err(error),
            _ => {
                let aside = format!("{path}.damaged");
                let fail = |e| Error::io(format!("cannot rename {path}"), e);
                work.media.rename(&path, &aside).map_err(fail)?;
                work.media.sync_dir(&crate::pool::segment_dir(id)).map_err(fail)?;
                work.report.notes.push(format!("segment {id} has a damaged header; its file is {aside} now"));
            }
        }
    }
    Ok(files)
}

/// Leaves out seals whose base is not there, and then those based on them.
fn drop_broken_lines(work: &mut Work<'_>, found: &mut Found) {
    let mut broken = Vec::new();
    let mut whole: BTreeSet<Epoch> = BTreeSet::new();
    for (epoch, sealed) in &found.seals {
        // Bases are older, so they were looked at.
        match sealed.seal.base {
            Some(base) if !whole.contains(&base) => broken.push(*epoch),
            _ => drop(whole.insert(*epoch)),
        }
    }
    for epoch in broken {
        let Some(sealed) = found.seals.remove(&epoch).filter(|sealed| !sealed.gone) else { continue };
        let base = sealed.seal.base.expect("its line is broken");
        work.report
            .notes
            .push(format!("{}: the seal of epoch {base}, which its own needs, is not", name_of(&sealed.seal)));
    }
}

/// Sorts all entries by chunk. A seal that turns out to be damaged goes, with those based on it.
fn sort_entries(work: &mut Work<'_>, found: &mut Found, scratch: &mut Scratch) -> Result<()> {
    let all: Vec<(Epoch, Option<Epoch>)> =
        found.seals.iter().map(|(epoch, sealed)| (*epoch, sealed.seal.base)).collect();
    let mut lost: BTreeSet<Epoch> = BTreeSet::new();
    for (epoch, base) in all {
        let lineage = found.seals[&epoch].lineage;
        let read = if base.is_some_and(|base| lost.contains(&base)) {
            Err(Error::corrupt("a seal that its own needs is damaged"))
        } else {
            sort_seal(work, epoch, lineage, scratch)
        };
        match read {
            Ok(()) => {}
            Err(error) if error.kind() == Kind::Corrupt => {
                lost.insert(epoch);
                let sealed = found.seals.remove(&epoch).expect("listed above");
                if !sealed.gone {
                    work.report.notes.push(format!("{}: {error}", name_of(&sealed.seal)));
                }
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn sort_seal(work: &Work<'_>, epoch: Epoch, lineage: BranchId, scratch: &mut Scratch) -> Result<()> {
    let opened = StateSeal::open(&**work.media, epoch, false);
    let (_, entries) = match opened {
        Err(error) if error.kind() == Kind::NotFound => StateSeal::open(&**work.media, epoch, true)?,
        other => other?,
    };
    for entry in entries {
        let (chunk, entry) = entry?;
        scratch.put(lineage, chunk, epoch, &entry)?;
    }
    Ok(())
}

impl Found {
    /// All seals.
    pub(super) fn all(&self) -> impl Iterator<Item = &Sealed> {
        self.seals.values()
    }

    /// Those of states that are to be there again, the oldest first.
    pub(super) fn live(&self) -> impl Iterator<Item = &Sealed> {
        self.seals.values().filter(|sealed| !sealed.gone)
    }

    /// Returns the entry that each state that is not gone has for a chunk, of those that have one.
    fn maps<'a>(&self, lineage: BranchId, entries: &'a BTreeMap<Epoch, Entry>) -> BTreeMap<Epoch, &'a Entry> {
        let mut known: BTreeMap<Epoch, &'a Entry> = BTreeMap::new();
        for epoch in self.lines.get(&lineage).into_iter().flatten() {
            let own = entries.get(epoch).or_else(|| known.get(&self.seals[epoch].seal.base?).copied());
            if let Some(entry) = own {
                known.insert(*epoch, entry);
            }
        }
        known.retain(|epoch, _| !self.seals[epoch].gone);
        known
    }

    /// Returns a segment that an entry names and that is not there, or ends before the block.
    fn outside(&self, entry: &Entry) -> Option<SegmentId> {
        entry.pieces().iter().find_map(|piece| {
            let end = piece.set.runs().last().map_or(0, |(_, end)| end as u64);
            let id = piece.base.segment();
            let whole = self.files.get(&id).is_some_and(|file| u64::from(piece.base.slot()) + end <= file.blocks);
            (!whole).then_some(id)
        })
    }
}

/// Chunks of the current group that have entries, by state.
#[derive(Default)]
struct Index {
    group: Option<(BranchId, u32)>,
    sets: BTreeMap<StateKey, BlockSet>,
}

impl Index {
    fn enter(&mut self, lineage: BranchId, chunk: ChunkIndex, output: &mut Output) -> Result<()> {
        let group = (lineage, chunk.0 / CHUNKS_PER_GROUP);
        if self.group != Some(group) {
            self.flush(output)?;
            self.group = Some(group);
        }
        Ok(())
    }

    fn flush(&mut self, output: &mut Output) -> Result<()> {
        let Some((_, group)) = self.group else { return Ok(()) };
        for ((branch, epoch), set) in std::mem::take(&mut self.sets) {
            output.put_value(Key::index(branch, epoch, group), encode_set(&set))?;
        }
        Ok(())
    }
}

/// Writes all rows.
fn fill(
    work: &mut Work<'_>,
    found: &Found,
    plan: Plan,
    view: &super::super::catalog::View,
    output: &mut Output,
) -> Result<()> {
    let mut mapped = RoaringTreemap::new();
    let mut referenced: HashMap<Epoch, u64> = HashMap::new();
    let mut index = Index::default();
    let nothing = Entry::EMPTY;
    by_chunk(view, &mut |lineage, chunk, entries| {
        index.enter(lineage, chunk, output)?;
        let maps = found.maps(lineage, &entries);
        for (epoch, entry) in &maps {
            *referenced.entry(*epoch).or_default() += u64::from(entry.mapped().count());
            for piece in entry.pieces() {
                for (start, end) in piece.set.runs() {
                    mapped.insert_range(piece.base.at(start).raw()..piece.base.raw() + end as u64);
                }
            }
        }
        for (key, above) in plan.nodes(lineage) {
            let own = maps.get(&key.1).copied().unwrap_or(&nothing);
            let seen = above.and_then(|above| maps.get(&above).copied()).unwrap_or(&nothing);
            if own != seen {
                output.put_value(Key::map(key.0, chunk, key.1), encode_entry(own))?;
                index.sets.entry(*key).or_default().add((chunk.0 % CHUNKS_PER_GROUP) as usize);
            }
        }
        Ok(())
    })?;
    index.flush(output)?;
    let (rows, disks) = plan.finish(&referenced)?;
    for row in rows {
        output.put(row)?;
    }
    work.report.disks = disks;
    let slots = |id: SegmentId| {
        let (first, last) = (BlockAddress::new(id, 0).raw(), BlockAddress::new(id, (1 << 28) - 1).raw());
        mapped.range_cardinality(first..=last)
    };
    for (id, file) in &found.files {
        let row = SegmentRow { mapped: slots(*id), ..file.row };
        work.report.unnamed += unnamed(work, *id, &mapped)?;
        output.put(Row::put(Key::segment(*id), row.encode()))?;
    }
    Ok(())
}

/// Returns the bytes of data in a segment that no map names.
fn unnamed(work: &Work<'_>, id: SegmentId, mapped: &RoaringTreemap) -> Result<u64> {
    let path = segment_path(id);
    let fail = |e| Error::io(format!("cannot look at {path}"), e);
    let file = work.media.open(&path, crate::media::Open::ReadOnly).map_err(fail)?;
    let mut blocks = 0;
    let mut at = CHUNK_SIZE;
    while let Some((start, end)) = file.next_data(at).map_err(fail)? {
        let (first, last) = (start.max(CHUNK_SIZE) / BLOCK_SIZE, end.div_ceil(BLOCK_SIZE));
        let base = BlockAddress::new(id, 0).raw();
        blocks += (last - first) - mapped.range_cardinality(base + first..base + last);
        at = end;
    }
    Ok(blocks * BLOCK_SIZE)
}

/// Where the journal goes on: with numbers that no catalog made before, and no frame, can be followed by. Otherwise a later
/// rebuild could take a backup of today and frames of tomorrow for one course of events.
fn fresh_mark(lsn: u64) -> Result<Mark> {
    let random = getrandom::u64().map_err(|e| Error::failed(format!("the host gives no random numbers: {e}")))?;
    Ok(Mark { lsn: lsn + (1 << 32) + (random >> 12), at: Mark::START.at })
}

/// A branch that begins at a state.
pub(super) fn branch_at(key: StateKey, depth: u32, lineage: BranchId) -> BranchRow {
    BranchRow { parent: Some(key), inherits: true, depth, lineage }
}
