//! What changed between two states, found from their addresses; no data is read.
//!
//! An address is handed out once, to one block in one epoch, and what a snapshot can reach is never written again. So a
//! block that has the same address in both states is the same, and every other one may differ.
//!
//! # Rules
//! 1. An address in TO and not in FROM is data; a block mapped in FROM and no longer in TO is zeros.
//! 2. What lies beyond the end of FROM is new: data where it is mapped, zeros elsewhere. From nothing, that is all of it.
//!    To nothing, everything mapped becomes zeros: it counts as an empty disk as large as FROM.
//! 3. More may be told than differs, never less. A base that cannot be trusted is an error that says why.
//! 4. Extents come sorted, disjoint, as long as they can be, and end at the size of TO.
//! 5. Both sides are taken at one instant. The live side of a disk is what was acknowledged by then.
//! 6. States that are relatives are compared in the chunks only that the index names between them.

mod compare;
mod related;
mod verify;

use std::ops::Range;
use std::sync::Arc;

use compare::Joining;
use roaring::RoaringBitmap;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

pub use compare::{Adding, Changed, ChunkPieces, Comparable, Gather, Sizes, compare};
pub use verify::{VerifyReport, verify};

use super::record::{Record, RecordWalk};
use crate::error::{Error, Result};
use crate::map::{Entry, Piece};
use crate::store::{Frozen, Head, Line, MapView, MapWalk, StateKey, StateRow, Store, Stretch, Tables, Unsaved};
use crate::sync::MutexGuard;
use crate::units::{BLOCK_SIZE, BranchId, CHUNK_BLOCKS, ChunkIndex, SnapshotId};

/// A range of bytes that changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Extent {
    /// First byte; a multiple of 4096.
    pub offset: u64,
    /// Bytes; a multiple of 4096 but for the last block of a disk.
    pub length: u64,
    /// Whether it reads as zeros now, all of it; data otherwise.
    pub zero: bool,
}

/// A state by name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StateName {
    /// `-`: nothing, so that everything is a change: from it, all of the other side; to it, zeros for all that is mapped.
    Nothing,
    /// `DISK`: as it is now.
    Disk(String),
    /// `DISK@SNAPSHOT`, live or retired.
    Snapshot(String, String),
    /// A snapshot by its id, also one that the program took for itself.
    Hidden(SnapshotId),
}

impl StateName {
    /// Reads `DISK`, `DISK@SNAPSHOT` or `-`.
    #[must_use]
    pub fn parse(text: &str) -> Self {
        match text.split_once('@') {
            _ if text == "-" => Self::Nothing,
            Some((disk, snapshot)) => Self::Snapshot(disk.to_owned(), snapshot.to_owned()),
            None => Self::Disk(text.to_owned()),
        }
    }
}

impl std::fmt::Display for StateName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Nothing => f.write_str("-"),
            Self::Disk(disk) => f.write_str(disk),
            Self::Snapshot(disk, snapshot) => write!(f, "{disk}@{snapshot}"),
            Self::Hidden(_) => f.write_str("a hidden snapshot"),
        }
    }
}

/// Where the addresses of a side come from.
#[derive(Debug)]
enum Map {
    Nothing,
    View(MapView),
    Record(Box<Record>),
}

/// One side of a diff, fixed.
#[derive(Debug)]
struct Side {
    map: Map,
    size: u64,
    /// Where it is, or was, in the tree.
    node: Option<StateKey>,
    lineage: Option<BranchId>,
    /// Identity of the snapshot.
    uuid: Option<Uuid>,
}

/// Two states, fixed at one instant, to be compared.
#[derive(Debug)]
pub struct Diff {
    from: Side,
    to: Side,
    /// The chunks that may differ, in order; `None` when it can be any, or so many that all are looked at in less time.
    chunks: Option<Vec<ChunkIndex>>,
}

/// Fixes two states at one instant.
///
/// # Errors
/// `NotFound`; `Failed` when the two have nothing in common or a record cannot be trusted; `Corrupt` when one is damaged.
pub fn open(store: &Arc<Store>, from: &StateName, to: &StateName) -> Result<Diff> {
    let mut heads: Vec<Arc<Head>> = Vec::new();
    for name in [from, to] {
        if let StateName::Disk(disk) = name {
            let id = store.tables.read().disk_id(disk)?;
            let head = store.head(id)?;
            // What is unsaved is copied while writers wait: keep it little.
            if store.health().is_none() {
                store.flush(&head)?;
            }
            heads.push(head);
        }
    }
    heads.sort_by_key(|head| head.id);
    heads.dedup_by_key(|head| head.id);
    // Read before anybody has to wait for it; one that is retired in this very moment is read in the next try.
    let mut records = Vec::new();
    for _ in 0..TRIES {
        records.clear();
        for name in [from, to] {
            records.extend(record(store, name)?);
        }
        if let Some((sides, instant)) = fix(store, from, to, &heads, &mut records)? {
            return finish(store, [from, to], sides, &instant);
        }
    }
    Err(Error::busy(format!("'{from}' or '{to}' changes all the time")).hint("try again"))
}

/// From one in so many chunks on, walking over all of them takes less time than looking each up.
const WALK_FROM: u32 = 8;
/// Chunks of one part of a comparison of all: 2 MiB of what differs at most.
const PART_OF_ALL: u32 = 1 << 14;
/// Chunks of one part of a comparison of some, each of which is looked up.
const PART_OF_FEW: u32 = 1 << 8;

/// How often a state that is retired while it is looked at is looked at again.
const TRIES: usize = 5;

/// Reads the record of a state that has one.
fn record(store: &Store, name: &StateName) -> Result<Option<(SnapshotId, Record)>> {
    let retired = {
        let tables = store.tables.read();
        let (_, row) = match name {
            StateName::Snapshot(disk, name) => tables.snapshot(tables.disk_id(disk)?, name)?,
            StateName::Hidden(id) => tables.snapshot_by_id(*id)?,
            StateName::Nothing | StateName::Disk(_) => return Ok(None),
        };
        tables.retired(row.snapshot).map(|retired| (row.snapshot, retired.state.uuid))
    };
    let Some((id, uuid)) = retired else { return Ok(None) };
    Record::open(&**store.media(), uuid).map(|record| Some((id, record)))
}

/// Fixes both sides; `None` when a record is wanted that was not read.
fn fix(
    store: &Arc<Store>,
    from: &StateName,
    to: &StateName,
    heads: &[Arc<Head>],
    records: &mut Vec<(SnapshotId, Record)>,
) -> Result<Option<([Side; 2], Instant)>> {
    let orders: Vec<MutexGuard<'_, _>> = heads.iter().map(|head| head.order()).collect();
    let live: Vec<(Arc<Head>, Line, Unsaved)> = heads
        .iter()
        .map(|head| store.unsaved_of(head).map(|(line, unsaved)| (Arc::clone(head), line, unsaved)))
        .collect::<Result<_>>()?;
    // Rows of the map are submitted under the lock of the tables, so the two are of one instant.
    let tables = store.tables.read();
    let frozen = Arc::new(store.ledger.frozen());
    let mut fixing = Fixing { tables: &tables, frozen: Arc::clone(&frozen), live, records };
    let (Some(from), Some(mut to)) = (fixing.side(from)?, fixing.side(to)?) else { return Ok(None) };
    if matches!(to.map, Map::Nothing) {
        to.size = from.size;
    }
    let stretches = related::between(&tables, &from, &to);
    drop((tables, orders));
    Ok(Some(([from, to], Instant { frozen, stretches })))
}

/// What was fixed besides the sides.
struct Instant {
    frozen: Arc<Frozen>,
    stretches: Option<Vec<Stretch>>,
}

/// Checks that the sides can be compared, and finds where.
fn finish(store: &Store, names: [&StateName; 2], sides: [Side; 2], instant: &Instant) -> Result<Diff> {
    let [from, to] = sides;
    if from.lineage.is_some() && to.lineage.is_some() && from.lineage != to.lineage {
        let [from, to] = names;
        return Err(Error::failed(format!("'{from}' and '{to}' have nothing in common: neither stems from the other"))
            .hint(format!("compare with nothing instead: `afterimage diff - {to}`")));
    }
    for side in [&from, &to] {
        if let Map::Record(record) = &side.map {
            record.require_trust(store)?;
        }
    }
    let chunks = match &instant.stretches {
        Some(stretches) => Some(related::chunks(&instant.frozen, stretches, &from, &to)?),
        None => None,
    };
    let span = |found: &RoaringBitmap| found.max().unwrap_or(0) / WALK_FROM;
    let few = chunks.filter(|found| found.len() < u64::from(span(found)).max(PART_OF_FEW.into()));
    let chunks = few.map(|found| found.into_iter().map(ChunkIndex).collect());
    let diff = Diff { from, to, chunks };
    if diff.chunks.is_none() {
        instant.frozen.expect(u64::from(diff.count_chunks()));
    }
    Ok(diff)
}

/// The instant, while it is fixed.
struct Fixing<'a> {
    tables: &'a Tables,
    frozen: Arc<Frozen>,
    live: Vec<(Arc<Head>, Line, Unsaved)>,
    records: &'a mut Vec<(SnapshotId, Record)>,
}

impl Fixing<'_> {
    /// Fixes one side; `None` when its record was not read.
    fn side(&mut self, name: &StateName) -> Result<Option<Side>> {
        match name {
            StateName::Nothing => Ok(Some(Side { map: Map::Nothing, size: 0, node: None, lineage: None, uuid: None })),
            StateName::Disk(disk) => self.head(disk).map(Some),
            StateName::Snapshot(disk, name) => {
                let (key, row) = self.tables.snapshot(self.tables.disk_id(disk)?, name)?;
                self.state(key, row)
            }
            StateName::Hidden(id) => {
                let (key, row) = self.tables.snapshot_by_id(*id)?;
                self.state(key, row)
            }
        }
    }

    fn head(&self, disk: &str) -> Result<Side> {
        let id = self.tables.disk_id(disk)?;
        let found = self.live.iter().find(|(head, _, _)| head.id == id);
        let (_, line, unsaved) = found.ok_or_else(|| Error::not_found(format!("disk '{disk}' was replaced")))?;
        let node = (line.branch, line.epoch);
        let view = MapView::of_head(Arc::clone(&self.frozen), self.tables, node, unsaved.clone());
        let lineage = Some(self.tables.branch(line.branch)?.lineage);
        Ok(Side { map: Map::View(view), size: line.size, node: Some(node), lineage, uuid: None })
    }

    fn state(&mut self, key: StateKey, row: &StateRow) -> Result<Option<Side>> {
        let (map, lineage) = match self.tables.retired(row.snapshot) {
            Some(retired) => {
                let read = self.records.iter().position(|(id, _)| *id == row.snapshot);
                let Some(read) = read else { return Ok(None) };
                (Map::Record(Box::new(self.records.swap_remove(read).1)), retired.lineage)
            }
            None => {
                let view = MapView::of_state(Arc::clone(&self.frozen), self.tables, key);
                (Map::View(view), self.tables.branch(key.0)?.lineage)
            }
        };
        Ok(Some(Side { map, size: row.size, node: Some(key), lineage: Some(lineage), uuid: Some(row.uuid) }))
    }
}

impl Diff {
    /// Returns the bytes of FROM; 0 for nothing.
    #[must_use]
    pub fn from_size(&self) -> u64 {
        self.from.size
    }

    /// Returns the bytes of TO; those of FROM for nothing.
    #[must_use]
    pub fn to_size(&self) -> u64 {
        self.to.size
    }

    /// Returns the identity of FROM, if it is a snapshot.
    #[must_use]
    pub fn from_uuid(&self) -> Option<Uuid> {
        self.from.uuid
    }

    /// Returns the identity of TO, if it is a snapshot.
    #[must_use]
    pub fn to_uuid(&self) -> Option<Uuid> {
        self.to.uuid
    }

    /// Calls `each` for every extent, in order.
    ///
    /// # Errors
    /// `Corrupt` when rows are damaged; any error of reading the catalog; what `each` returns.
    pub fn each(&self, each: &mut dyn FnMut(Extent) -> Result<()>) -> Result<()> {
        let mut joining = Joining::new(self.sizes(), each);
        let each = &mut |part: Vec<Changed>| part.iter().try_for_each(|changed| joining.chunk(changed));
        self.compare(&Vec::new(), each)?;
        joining.finish()
    }

    fn sizes(&self) -> Sizes {
        Sizes { from: self.from.size, to: self.to.size }
    }

    /// Returns the chunks of the larger side.
    fn count_chunks(&self) -> u32 {
        let count = self.from.size.max(self.to.size).div_ceil(BLOCK_SIZE).div_ceil(CHUNK_BLOCKS);
        u32::try_from(count).expect("a size is checked")
    }

    fn compare<G: Gather + Clone + Sync>(&self, empty: &G, each: &mut dyn FnMut(G) -> Result<()>) -> Result<()> {
        match &self.chunks {
            None => compare(&self.from, &self.to, self.sizes(), [self.count_chunks(), PART_OF_ALL], empty, each),
            Some(chunks) => {
                let count = u32::try_from(chunks.len()).expect("chunks have numbers of 32 bits");
                let [from, to] = [&self.from, &self.to].map(|side| Picked { side, chunks });
                compare(&from, &to, self.sizes(), [count, PART_OF_FEW], empty, each)
            }
        }
    }

    /// Returns all extents; for callers that know them to be few.
    ///
    /// # Errors
    /// As [`Diff::each`].
    pub fn extents(&self) -> Result<Vec<Extent>> {
        let mut all = Vec::new();
        self.each(&mut |extent| {
            all.push(extent);
            Ok(())
        })?;
        Ok(all)
    }

    /// Adds up the extents.
    ///
    /// # Errors
    /// As [`Diff::each`].
    pub fn total(&self) -> Result<DiffTotal> {
        let empty = Adding::new(self.sizes());
        let mut all = empty.clone();
        let each = &mut |part: Adding| {
            all.append(&part);
            Ok(())
        };
        self.compare(&empty, each)?;
        Ok(all.finish())
    }
}

/// What the extents of a diff add up to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct DiffTotal {
    /// Bytes of FROM; 0 for nothing.
    pub from_size: u64,
    /// Bytes of TO.
    pub to_size: u64,
    /// Bytes of data.
    pub data: u64,
    /// Bytes that are zeros now.
    pub zero: u64,
    /// Extents.
    pub extents: u64,
}

impl DiffTotal {
    /// Counts one more.
    pub fn add(&mut self, extent: &Extent) {
        self.extents += 1;
        *(if extent.zero { &mut self.zero } else { &mut self.data }) += extent.length;
    }
}

impl Comparable for Side {
    fn part(&self, part: Range<u32>) -> Result<Box<dyn ChunkPieces + '_>> {
        Ok(match &self.map {
            Map::Nothing => Box::new(NoPieces),
            Map::View(view) => {
                let walk = view.walk_between(ChunkIndex(part.start), ChunkIndex(part.end))?;
                Box::new(ViewPieces { walk, pieces: Vec::new() })
            }
            Map::Record(record) => return record.part(part),
        })
    }
}

impl Comparable for Record {
    fn part(&self, part: Range<u32>) -> Result<Box<dyn ChunkPieces + '_>> {
        Ok(Box::new(self.walk_between(part)?))
    }
}

struct NoPieces;

impl ChunkPieces for NoPieces {
    fn step(&mut self) -> Result<Option<(ChunkIndex, &[Piece])>> {
        Ok(None)
    }
}

struct ViewPieces<'a> {
    walk: MapWalk<'a>,
    pieces: Vec<Piece>,
}

impl ChunkPieces for ViewPieces<'_> {
    fn step(&mut self) -> Result<Option<(ChunkIndex, &[Piece])>> {
        let Some(found) = self.walk.step()? else { return Ok(None) };
        self.pieces = sorted(found.entry);
        Ok(Some((found.chunk, &self.pieces)))
    }
}

fn sorted(entry: Entry) -> Vec<Piece> {
    let mut pieces = entry.into_pieces();
    if !pieces.is_sorted_by_key(|piece| piece.base) {
        pieces.sort_unstable_by_key(|piece| piece.base);
    }
    pieces
}

impl ChunkPieces for RecordWalk<'_> {
    fn step(&mut self) -> Result<Option<(ChunkIndex, &[Piece])>> {
        RecordWalk::step(self)
    }
}

/// Some chunks of a side.
struct Picked<'a> {
    side: &'a Side,
    chunks: &'a [ChunkIndex],
}

struct PickedWalk<'a> {
    map: &'a Map,
    record: Option<RecordWalk<'a>>,
    chunks: std::slice::Iter<'a, ChunkIndex>,
    pieces: Vec<Piece>,
}

impl Comparable for Picked<'_> {
    fn part(&self, part: Range<u32>) -> Result<Box<dyn ChunkPieces + '_>> {
        let chunks = &self.chunks[part.start as usize..part.end as usize];
        let (map, first) = (&self.side.map, chunks.first().map_or(0, |chunk| chunk.0));
        let record = match map {
            Map::Record(record) => Some(record.walk_between(first..u32::MAX)?),
            _ => None,
        };
        Ok(Box::new(PickedWalk { map, record, chunks: chunks.iter(), pieces: Vec::new() }))
    }
}

impl ChunkPieces for PickedWalk<'_> {
    fn step(&mut self) -> Result<Option<(ChunkIndex, &[Piece])>> {
        let Some(chunk) = self.chunks.next() else { return Ok(None) };
        if let Some(record) = &mut self.record {
            return Ok(Some((*chunk, record.pick(*chunk)?)));
        }
        if let Map::View(view) = self.map {
            self.pieces = sorted(view.entry(*chunk)?);
        }
        Ok(Some((*chunk, &self.pieces)))
    }
}
