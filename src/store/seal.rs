//! Sealing: after an epoch has ended, the checksums of everything it wrote go to a file beside its segment.
//!
//! # Rules
//! 1. A checksum is noted when a block is written - always whole - under the claim on the block; a failed write drops it.
//! 2. What has no noted checksum when the epoch is sealed is read back. Sealed blocks never change again.
//! 3. Checksums in memory have their own budget; beyond it they are dropped, and read back later.
//! 4. An epoch with a block that is lost is not sealed, and keeps none of the others from it. The next opening tries again.
//! 5. A seal that is there is never made anew from the data: what can be read of it is kept, and only what it lacks is
//!    added. So sealing twice - after a crash, after a rebuild, to mend one - never hides damage that the first seal shows.
//! 6. A state counts as sealed when the seals of its epoch and that of its map ([`super::state_files`]) are durable.
//!
//! # After a crash
//! Seals that were written stay, and the next opening seals what does not count as sealed. Nothing is sealed before the
//! frame that ended its epoch is durable: until then the epoch may yet go on, and its blocks change.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicUsize, Ordering};

use super::Store;
use super::rows::{Key, KeyParts, decode_entry};
use super::seal_file::{SealFile, SealReader, SealedSlab};
use super::states::StateRow;
use super::tables::{Edit, StateKey};
use super::tree::Stretch;
use crate::codec::crc32;
use crate::error::{Error, Kind, Result};
use crate::map::{BlockSet, Entry, Piece, Run};
use crate::media::Media;
use crate::pool::{SEGMENTS_DIR, segment_dir};
use crate::sync::Mutex;
use crate::units::{BLOCK_SIZE, BlockAddress, CHUNK_BLOCKS, ChunkIndex, Epoch, SegmentId, SnapshotId, to_usize};

/// Slabs with noted checksums per disk at most: 2 KiB each.
const SLABS_MAX: usize = 16 * 1024;

#[derive(Debug)]
struct SlabChecksums {
    known: BlockSet,
    crcs: Box<[u32; to_usize(CHUNK_BLOCKS)]>,
}

/// Checksums of blocks that no seal has yet.
#[derive(Debug, Default)]
pub struct Checksums {
    slabs: Mutex<HashMap<BlockAddress, SlabChecksums>>,
    /// Read back for want of a note, for the metrics.
    pub read_back: AtomicUsize,
}

impl Checksums {
    /// Notes the checksums of whole blocks that were written at consecutive addresses from `first`, in one slab.
    pub fn note(&self, first: BlockAddress, fresh: &[u32]) {
        let mut slabs = self.slabs.lock();
        if slabs.len() >= SLABS_MAX && !slabs.contains_key(&first.slab()) {
            return;
        }
        let slab = slabs
            .entry(first.slab())
            .or_insert_with(|| SlabChecksums { known: BlockSet::EMPTY, crcs: Box::new([0; to_usize(CHUNK_BLOCKS)]) });
        for (index, crc) in (first.index()..).zip(fresh.iter().copied()) {
            slab.crcs[index] = crc;
            slab.known.add(index);
        }
    }

    /// Takes over what another disk has noted, whose data becomes that of this one.
    pub fn adopt(&self, other: &Self) {
        let theirs = std::mem::take(&mut *other.slabs.lock());
        let mut slabs = self.slabs.lock();
        for (base, slab) in theirs {
            if slabs.len() < SLABS_MAX {
                slabs.insert(base, slab);
            }
        }
    }

    fn get(&self, address: BlockAddress) -> Option<u32> {
        let slabs = self.slabs.lock();
        let slab = slabs.get(&address.slab())?;
        slab.known.has(address.index()).then(|| slab.crcs[address.index()])
    }

    /// Drops the checksums of a slab.
    pub fn forget(&self, base: BlockAddress) {
        self.slabs.lock().remove(&base);
    }
}

/// What can be read of a seal.
#[derive(Debug, Default)]
struct ReadablePart {
    /// Blocks with checksums, by slab.
    sets: HashMap<BlockAddress, BlockSet>,
    /// It can be read to its end.
    whole: bool,
}

impl Store {
    /// Seals one epoch or one state, in turn with the work in the background. Returns false when everything is sealed.
    ///
    /// # Errors
    /// As [`Store::seal_one`].
    pub fn seal_next(&self) -> Result<bool> {
        let _turn = self.tidying.lock();
        Ok(self.seal_one()? || self.seal_one_state()?)
    }

    /// Writes the seal files of one ended epoch. Returns false when every epoch is sealed.
    ///
    /// # Errors
    /// Any error of the host.
    pub fn seal_one(&self) -> Result<bool> {
        let next = {
            let tables = self.tables.read();
            let unsealable = self.unsealable.lock();
            let open = |row: &StateRow| !row.sealed && row.status.readable() && !unsealable.contains_key(&row.snapshot);
            tables.states().find(|(_, row)| open(row)).map(|(key, row)| (key, row.snapshot, row.name.clone()))
        };
        let Some((key, id, name)) = next else { return Ok(false) };
        match self.seal_state(key) {
            Err(error) if error.kind() == Kind::Corrupt => self.note_unsealable(id, &name, &error),
            other => other?,
        }
        Ok(true)
    }

    /// Notes that an epoch cannot be sealed in this opening: the others go on, and a scrub tells of it.
    pub fn note_unsealable(&self, id: SnapshotId, name: &str, error: &Error) {
        tracing::error!("the epoch of snapshot '{name}' cannot be sealed: {error}");
        self.unsealable.lock().insert(id, error.to_string());
    }

    /// Returns the snapshots whose epochs could not be sealed since the pool was opened, and why.
    pub fn unsealable(&self) -> BTreeMap<SnapshotId, String> {
        self.unsealable.lock().clone()
    }

    /// Writes the seal files of one ended epoch, unless they are written. The caller has its turn of the background.
    ///
    /// # Errors
    /// As [`Store::seal_one`].
    pub fn seal_state(&self, key: StateKey) -> Result<()> {
        let state = self.tables.read().state(key).filter(|row| !row.sealed && row.status.whole()).cloned();
        let Some(row) = state else { return Ok(()) };
        self.ledger.wait(self.ledger.latest())?;
        // Held open, so that nothing of it is punched while it is read.
        self.hold_open(row.snapshot);
        let result = self.seal_epoch(key, &row).and_then(|()| self.seal_map_of(key));
        self.let_go(row.snapshot);
        match result {
            // Deleted meanwhile: there is nothing to seal any more.
            Err(error) if error.kind() == Kind::NotFound => return Ok(()),
            other => other?,
        }
        let mut tables = self.tables.write();
        let mut edit = Edit::new(&mut tables);
        edit.change_state(key, |row| row.sealed = true);
        let _ticket = self.ledger.submit(edit.finish())?;
        Ok(())
    }

    fn seal_epoch(&self, key: StateKey, row: &StateRow) -> Result<()> {
        let own = Stretch { branch: key.0, after: Epoch(key.1.0 - 1), upto: key.1 };
        let parent = self.tables.read().lookup_path(key.0, Epoch(key.1.0 - 1));
        let mut by_segment: BTreeMap<SegmentId, Vec<(ChunkIndex, Piece)>> = BTreeMap::new();
        let mut unmapped: Vec<SealedSlab> = Vec::new();
        for chunk in self.indexed_chunks(&[own])? {
            let stored = self.ledger.get(&Key::map(key.0, chunk, key.1))?;
            let entry = stored.map_or(Ok(Entry::EMPTY), |value| decode_entry(&value))?;
            for piece in entry.pieces().into_iter().filter(|piece| piece.base.raw() >= row.floor) {
                by_segment.entry(piece.base.segment()).or_default().push((chunk, piece));
            }
            let gone = self.resolve_on(&parent, chunk)?.entry.mapped().minus(&entry.mapped());
            if !gone.is_empty() {
                unmapped.push(SealedSlab::Unmapped { chunk, set: gone });
            }
        }
        // Unmapped blocks go with the first segment of the epoch; an epoch that only unmapped has no seal of its own.
        for (segment, slabs) in by_segment {
            let nonce = self.tables.read().segment(segment)?.nonce;
            let header = SealFile { pool: self.uuid(), segment, nonce, disk: row.disk, branch: key.0, epoch: key.1 };
            let extra = std::mem::take(&mut unmapped);
            let there = self.readable_part(segment, key.1)?;
            let lacks = |piece: &Piece| match there.sets.get(&piece.base) {
                Some(set) => Piece { set: piece.set.minus(set), ..*piece },
                None => *piece,
            };
            let fresh: Vec<_> = slabs.iter().map(|(chunk, piece)| (*chunk, lacks(piece))).collect();
            let fresh = fresh.iter().filter(|(_, piece)| !piece.set.is_empty());
            if there.whole && fresh.clone().next().is_none() {
                // A process that was killed may have put it there without syncing the directory.
                let dir = segment_dir(segment);
                self.media.sync_dir(&dir).map_err(|e| Error::io(format!("cannot sync {dir}"), e))?;
                continue;
            }
            let fresh = fresh.map(|(chunk, piece)| {
                self.still_to_seal(key)?;
                self.sealed_slab(row, *chunk, piece)
            });
            let kept = self.readable_records(segment, key.1)?.filter(|record| match record {
                Ok(SealedSlab::Unmapped { .. }) => false,
                Ok(SealedSlab::Written { .. }) | Err(_) => true,
            });
            header.write(&*self.media, kept.chain(fresh).chain(extra.into_iter().map(Ok)))?;
            if let Ok(head) = self.head(row.disk) {
                slabs.iter().for_each(|(_, piece)| head.crcs.forget(piece.base));
            }
        }
        Ok(())
    }

    /// Opens the seal of an epoch in a segment, if it is one of this segment and its header can be read.
    fn own_seal(&self, segment: SegmentId, epoch: Epoch) -> Result<Option<(SealFile, SealReader)>> {
        let nonce = self.tables.read().segment(segment)?.nonce;
        let opened = SealFile::open(&*self.media, segment, epoch);
        match opened.and_then(|seal| seal.0.require_owner(self.uuid(), nonce).map(|()| seal)) {
            Ok(seal) => Ok(Some(seal)),
            Err(error) if matches!(error.kind(), Kind::NotFound | Kind::Corrupt) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Returns the records of a seal up to where it is damaged; none when there is no seal.
    fn readable_records(
        &self,
        segment: SegmentId,
        epoch: Epoch,
    ) -> Result<impl Iterator<Item = Result<SealedSlab>> + use<>> {
        let records = self.own_seal(segment, epoch)?.map(|(_, records)| records);
        let damaged = |record: &Result<_>| record.as_ref().is_err_and(|error| error.kind() == Kind::Corrupt);
        Ok(records.into_iter().flatten().take_while(move |record| !damaged(record)))
    }

    /// Reads of which blocks a seal has checksums, and whether it can be read to its end.
    fn readable_part(&self, segment: SegmentId, epoch: Epoch) -> Result<ReadablePart> {
        let mut part = ReadablePart::default();
        let Some((_, records)) = self.own_seal(segment, epoch)? else { return Ok(part) };
        for record in records {
            match record {
                Ok(SealedSlab::Written { base, set, .. }) => {
                    let known = part.sets.entry(base).or_insert(BlockSet::EMPTY);
                    *known = known.or(&set);
                }
                Ok(SealedSlab::Unmapped { .. }) => {}
                Err(error) if error.kind() == Kind::Corrupt => return Ok(part),
                Err(error) => return Err(error),
            }
        }
        part.whole = true;
        Ok(part)
    }

    /// Seals the epoch of a state again that counts as sealed and lost a seal; what cannot be had keeps it as it was.
    ///
    /// # Errors
    /// As [`Store::seal_one`]; `Corrupt` when the data is known to be damaged.
    pub(super) fn seal_again(&self, key: StateKey) -> Result<()> {
        let _turn = self.tidying.lock();
        let count_as = |sealed| -> Result<()> {
            let mut tables = self.tables.write();
            let mut edit = Edit::new(&mut tables);
            edit.change_state(key, |row| row.sealed = sealed);
            let _ticket = self.ledger.submit(edit.finish())?;
            Ok(())
        };
        count_as(false)?;
        let sealed = self.seal_state(key);
        if sealed.is_err() {
            count_as(true)?;
        }
        sealed
    }

    /// Leaves of a damaged seal what can be read of it.
    ///
    /// # Errors
    /// Any error of the host.
    pub(super) fn cut_seal(&self, segment: SegmentId, epoch: Epoch) -> Result<()> {
        let _turn = self.tidying.lock();
        let kept = self.readable_records(segment, epoch)?;
        if let Some((header, _)) = self.own_seal(segment, epoch)? {
            return header.write(&*self.media, kept);
        }
        let path = super::seal_file::seal_path(segment, epoch);
        self.media.remove(&path).map_err(|e| Error::io(format!("cannot remove {path}"), e))
    }

    /// Breaks the sealing of a large epoch off when its snapshot is deleted, whose space somebody waits for, or when the
    /// pool is closed.
    fn still_to_seal(&self, key: StateKey) -> Result<()> {
        if self.keeper.stopping() {
            return Err(Error::failed("the pool is being closed; the epoch is sealed after the next opening"));
        }
        let there = self.tables.read().state(key).is_some_and(|row| row.status.whole());
        if there { Ok(()) } else { Err(Error::not_found("the snapshot was deleted")) }
    }

    fn sealed_slab(&self, row: &StateRow, chunk: ChunkIndex, piece: &Piece) -> Result<SealedSlab> {
        let head = self.heads.lock().get(&row.disk).cloned();
        let mut missing = BlockSet::EMPTY;
        let noted = piece.set.iter().map(|index| {
            let noted = head.as_ref().and_then(|head| head.crcs.get(piece.base.at(index)));
            noted.unwrap_or_else(|| {
                missing.add(index);
                0
            })
        });
        let mut crcs: Vec<u32> = noted.collect();
        if let Some(head) = &head {
            head.crcs.read_back.fetch_add(missing.count() as usize, Ordering::Relaxed);
        }
        let mut bytes = Vec::new();
        for (start, end) in missing.runs() {
            bytes.resize((end - start) * to_usize(BLOCK_SIZE), 0);
            let address = Some(piece.base.at(start));
            self.read_run(&Run { start, len: end - start, address }, &mut bytes, 0)?;
            let first = piece.set.and(&BlockSet::range(0, start)).count() as usize;
            for (crc, block) in crcs[first..].iter_mut().zip(bytes.chunks_exact(to_usize(BLOCK_SIZE))) {
                *crc = crc32(block);
            }
        }
        Ok(SealedSlab::Written { base: piece.base, chunk, set: piece.set, crcs })
    }

    /// Returns the `(segment, epoch)` of every seal file there is.
    ///
    /// # Errors
    /// Any error of the host.
    pub fn seals_on_disk(&self) -> Result<Vec<(SegmentId, Epoch)>> {
        seals_in(&*self.media)
    }

    /// Calls `each` for every piece of every stored map entry, with the row it is in.
    ///
    /// # Errors
    /// When rows are damaged, or what `each` returns.
    pub fn every_entry(&self, each: &mut dyn FnMut(StateKey, ChunkIndex, Entry) -> Result<()>) -> Result<()> {
        let (low, high) = (Key::first_of(super::rows::Table::Map), Key::beyond(super::rows::Table::Map));
        self.ledger.scan(&low, &high, &mut |key, value| match key.parts()? {
            KeyParts::Map(branch, chunk, epoch) => each((branch, epoch), chunk, decode_entry(&value)?),
            _ => Err(Error::corrupt("a map key of the catalog is damaged")),
        })
    }
}

/// Returns the `(segment, epoch)` of every seal of a segment there is.
pub(super) fn seals_in(media: &dyn Media) -> Result<Vec<(SegmentId, Epoch)>> {
    let fail = |e| Error::io(format!("cannot list {SEGMENTS_DIR}"), e);
    let mut out = Vec::new();
    for dir in media.list(SEGMENTS_DIR).map_err(fail)? {
        for name in media.list(&format!("{SEGMENTS_DIR}/{dir}")).map_err(fail)? {
            let parts = name.strip_suffix(".seal").and_then(|stem| stem.split_once('-'));
            if let Some((Ok(segment), Ok(epoch))) = parts.map(|(s, e)| (s.parse(), e.parse())) {
                out.push((SegmentId(segment), Epoch(epoch)));
            }
        }
    }
    out.sort_unstable();
    Ok(out)
}
