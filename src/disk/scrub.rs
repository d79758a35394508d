//! `scrub`: reads every sealed block and compares it with the checksum it was sealed with.
//!
//! Seal files are read one after the other, record by record; the blocks of a batch of records are read in whole runs, on
//! several threads. Only what is found damaged is looked at block by block. A block that is damaged is named by every disk and snapshot
//! that shows it, and reads of it fail from then on. A seal file that is damaged or missing is reported as such, and a segment whose
//! file is missing once, not block by block. So many lines are listed, and the others counted: a segment may have 2^28 blocks.

use std::sync::Arc;

use roaring::RoaringTreemap;
use serde::{Deserialize, Serialize};

use crate::codec::crc32;
use crate::error::{Error, Kind, Result};
use crate::map::{BlockSet, Run};
use crate::parallel;
use crate::pool::segment_path;
use crate::progress::Progress;
use crate::store::seal_file::{SealFile, SealedSlab, seal_path};
use crate::store::{SealDue, SealsDue, Status, Store};
use crate::sys::pages::Pages;
use crate::units::{BLOCK_SIZE, BlockAddress, ChunkIndex, Epoch, SegmentId, to_usize};

/// Records whose blocks are read at a time: up to 64 MiB of the disk.
const BATCH: usize = 32;

/// Lines of damage that a report has at most.
pub const LISTED_MAX: usize = 1000;

/// A block that is not what was sealed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Damage {
    /// The disk that shows it.
    pub disk: String,
    /// The snapshot that shows it; `None` for the live disk.
    pub snapshot: Option<String>,
    /// Byte of the disk.
    pub offset: u64,
    /// Segment id.
    pub segment: u64,
    /// What is wrong.
    pub why: String,
}

/// What a scrub found.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScrubReport {
    /// Blocks read and compared.
    pub blocks: u64,
    /// Bytes read and compared.
    pub bytes: u64,
    /// Blocks that are mapped and not sealed yet: written since the last snapshot.
    pub unverified: u64,
    /// What is damaged: the first [`LISTED_MAX`] of it.
    pub damaged: Vec<Damage>,
    /// How many more there are.
    #[serde(default)]
    pub more: u64,
}

/// Reads and compares every sealed block.
///
/// # Errors
/// Any error of the host but those of reading blocks, which are in the report; `Failed` when cancelled.
pub fn scrub(store: &Arc<Store>, progress: &dyn Progress) -> Result<ScrubReport> {
    store.flush_all()?;
    while store.seal_next()? {}
    let mut mapped = RoaringTreemap::new();
    let (tables, mut due) = (store.tables.read().clone(), SealsDue::default());
    store.every_entry(&mut |row, _, entry| {
        due.note(&tables, row, &entry);
        for piece in entry.pieces() {
            for (start, end) in piece.set.runs() {
                mapped.insert_range(piece.base.at(start).raw()..piece.base.raw() + end as u64);
            }
        }
        Ok(())
    })?;
    progress.total(mapped.len() * BLOCK_SIZE);
    let mut scrub = Scrub { store, progress, mapped, report: ScrubReport::default() };
    let missing = store.missing_segments();
    for segment in &missing {
        let disk = store.tables.read().segment(*segment).and_then(|row| Ok(store.disk_info_by_id(row.disk)?.name));
        let why = format!("its file {} is missing", segment_path(*segment));
        scrub.damage(&disk.unwrap_or_default(), None, 0, *segment, why);
    }
    for (snapshot, why) in store.unsealable() {
        let found = store.snapshot_info_by_id(snapshot);
        let Ok(info) = found else { continue };
        scrub.damage(&info.disk, Some(info.name), 0, SegmentId(0), format!("its epoch cannot be sealed: {why}"));
    }
    let seals = store.seals_on_disk()?;
    for lost in due.missing(&seals).into_iter().filter(|lost| store.is_sealed(lost.state)) {
        scrub.lost_seal(lost)?;
    }
    for (segment, epoch) in seals.into_iter().filter(|(id, _)| !missing.contains(id)) {
        if progress.cancelled() {
            return Err(cancelled());
        }
        if let Err(error) = scrub.seal(segment, epoch) {
            if error.kind() != Kind::Corrupt {
                return Err(error);
            }
            scrub.damage("", None, 0, segment, error.to_string());
        }
    }
    scrub.report.unverified = scrub.mapped.len();
    Ok(scrub.report)
}

fn cancelled() -> Error {
    Error::failed("the scrub was cancelled")
}

/// Blocks of one slab that are to be compared.
struct Due {
    base: BlockAddress,
    chunk: ChunkIndex,
    runs: Vec<Run>,
    /// Of each block of the runs, in order.
    crcs: Vec<u32>,
}

impl Due {
    /// Reads the blocks and returns those that are not as they were sealed, and why.
    fn compare(&self, store: &Store) -> Result<Vec<(usize, String)>> {
        let longest = self.runs.iter().map(|run| run.len).max().unwrap_or(0);
        let pages = Pages::new(longest * to_usize(BLOCK_SIZE));
        let mut pages = pages.map_err(|e| Error::io("cannot get memory to read into", e))?;
        let (mut wrong, mut crcs) = (Vec::new(), &self.crcs[..]);
        let _inside = store.fence.enter();
        for run in &self.runs {
            let (here, rest) = crcs.split_at(run.len);
            crcs = rest;
            let bytes = &mut pages[..run.len * to_usize(BLOCK_SIZE)];
            if store.read_run(run, bytes, 0).is_ok() {
                let blocks = bytes.chunks_exact(to_usize(BLOCK_SIZE)).zip(here).enumerate();
                let differ = blocks.filter(|(_, (block, crc))| crc32(block) != **crc).map(|(n, _)| run.start + n);
                wrong.extend(differ.map(|index| (index, "it does not match its checksum".to_owned())));
                continue;
            }
            // Some of it cannot be read: which?
            let block = &mut bytes[..to_usize(BLOCK_SIZE)];
            for (index, crc) in (run.start..).zip(here) {
                let one = Run { start: index, len: 1, address: Some(self.base.at(index)) };
                match store.read_run(&one, block, 0) {
                    Ok(()) if crc32(block) == *crc => {}
                    Ok(()) => wrong.push((index, "it does not match its checksum".to_owned())),
                    Err(error) => wrong.push((index, error.to_string())),
                }
            }
        }
        Ok(wrong)
    }
}

struct Scrub<'a> {
    store: &'a Arc<Store>,
    progress: &'a dyn Progress,
    /// Mapped and not compared yet.
    mapped: RoaringTreemap,
    report: ScrubReport,
}

impl Scrub<'_> {
    fn damage(&mut self, disk: &str, snapshot: Option<String>, offset: u64, segment: SegmentId, why: String) {
        if self.report.damaged.len() >= LISTED_MAX {
            self.report.more += 1;
            return;
        }
        let of = snapshot.as_ref().map(|name| format!("@{name}")).unwrap_or_default();
        tracing::error!("damaged: disk '{disk}{of}' byte {offset}, segment {segment}: {why}");
        self.report.damaged.push(Damage { disk: disk.to_owned(), snapshot, offset, segment: segment.0, why });
    }

    /// Names a seal that is missing, once.
    fn lost_seal(&mut self, lost: SealDue) -> Result<()> {
        let (disk, snapshot) = {
            let tables = self.store.tables.read();
            let Some(row) = tables.state(lost.state) else { return Ok(()) };
            let disk = tables.disk(row.disk).map(|disk| disk.name.clone());
            (disk.unwrap_or_default(), Some(row.name.clone()).filter(|name| !name.is_empty()))
        };
        let (path, blocks) = (seal_path(lost.segment, lost.state.1), lost.blocks);
        let why = format!(
            "the seal {path} is missing, so {blocks} blocks cannot be compared; 'afterimage check --repair' seals them \
             again from the data as it is now"
        );
        self.damage(&disk, snapshot, 0, lost.segment, why);
        Ok(())
    }

    fn seal(&mut self, segment: SegmentId, epoch: Epoch) -> Result<()> {
        if self.store.tables.read().segment(segment).is_err() {
            return Ok(());
        }
        let (header, records) = SealFile::open(&**self.store.media(), segment, epoch)?;
        header.require_owner(self.store.uuid(), self.store.tables.read().segment(segment)?.nonce)?;
        let mut batch = Vec::with_capacity(BATCH);
        for record in records {
            if let SealedSlab::Written { base, chunk, set, crcs } = record? {
                batch.extend(self.due(base, chunk, &set, &crcs));
            }
            if batch.len() == BATCH {
                self.compare(&std::mem::take(&mut batch))?;
            }
            if self.progress.cancelled() {
                return Err(cancelled());
            }
        }
        self.compare(&batch)
    }

    /// Returns what of a slab is to be compared, if anything is: not what was freed since, nor what was compared already (a
    /// copy of a seal says the same).
    fn due(&mut self, base: BlockAddress, chunk: ChunkIndex, set: &BlockSet, crcs: &[u32]) -> Option<Due> {
        let mut due = Due { base, chunk, runs: Vec::new(), crcs: Vec::with_capacity(crcs.len()) };
        for (index, crc) in set.iter().zip(crcs) {
            if !self.mapped.remove(base.at(index).raw()) {
                continue;
            }
            due.crcs.push(*crc);
            match due.runs.last_mut() {
                Some(run) if run.start + run.len == index => run.len += 1,
                _ => due.runs.push(Run { start: index, len: 1, address: Some(base.at(index)) }),
            }
        }
        (!due.runs.is_empty()).then_some(due)
    }

    /// Reads and compares the blocks of a batch.
    fn compare(&mut self, batch: &[Due]) -> Result<()> {
        let store = self.store;
        let work = |n: u32| batch[n as usize].compare(store).map(|wrong| (n, wrong));
        let parts = u32::try_from(batch.len()).expect("a batch is short");
        parallel::in_order(parts, work, &mut |(n, wrong)| {
            let due = &batch[n as usize];
            let blocks = due.crcs.len() as u64;
            self.report.blocks += blocks;
            self.report.bytes += blocks * BLOCK_SIZE;
            self.progress.advance(blocks * BLOCK_SIZE);
            wrong.into_iter().try_for_each(|(index, why)| self.name_damage(due.base.at(index), due.chunk, &why))
        })
    }

    /// Finds every disk and snapshot that shows an address. If none does, it was freed meanwhile.
    fn name_damage(&mut self, address: BlockAddress, chunk: ChunkIndex, why: &str) -> Result<()> {
        let shows: Vec<_> = {
            let tables = self.store.tables.read();
            let name = |id| tables.disk(id).map(|row| row.name.clone()).unwrap_or_default();
            let live = tables.disks().map(|(_, row)| ((row.branch, row.epoch), row.name.clone(), None));
            let states = tables.states().filter(|(_, row)| row.status == Status::Live);
            live.chain(states.map(|(key, row)| (key, name(row.disk), Some(row.name.clone())))).collect()
        };
        let offset = chunk.byte() + address.index() as u64 * BLOCK_SIZE;
        for (node, disk, snapshot) in shows {
            if self.store.resolve(node, chunk)?.entry.get(address.index()) == Some(address) {
                self.store.mark_bad(address);
                self.damage(&disk, snapshot, offset, address.segment(), why.to_owned());
            }
        }
        Ok(())
    }
}
