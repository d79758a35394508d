//! One entry of the block map: where the blocks of one chunk are.
//!
//! Two forms in memory, chosen by size: a list of pieces while there are few, and the plain list of 512 addresses once
//! the chunk is scattered over more than [`PIECES_MAX`] slabs, so that an entry never takes more than 4 KiB whatever
//! the number of snapshots. Both answer the same questions; equality is by content.

use super::BlockSet;
use crate::codec::{Reader, Writer};
use crate::error::Result;
use crate::units::{BlockAddress, CHUNK_BLOCKS, to_usize};

const BLOCKS: usize = to_usize(CHUNK_BLOCKS);
/// More pieces than this take more memory than the flat form.
const PIECES_MAX: usize = 56;
const TAG_PIECES: u8 = 1;
const TAG_FLAT: u8 = 2;
/// Bytes of the flat coding: tag and 512 addresses.
const FLAT_LEN: usize = 1 + BLOCKS * 8;

/// Blocks of a chunk that live in one slab.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// Address of slot 0 of the slab; block `i` lives at `base.at(i)`.
    pub base: BlockAddress,
    /// Which blocks; never empty.
    pub set: BlockSet,
}

/// Consecutive blocks that are unmapped or lie at consecutive addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// Index of the first block in the chunk.
    pub start: usize,
    /// Blocks.
    pub len: usize,
    /// Address of the first block; `None` when the run is unmapped.
    pub address: Option<BlockAddress>,
}

/// The addresses of one chunk.
#[derive(Debug, Clone)]
pub struct Entry(Form);

#[derive(Debug, Clone)]
enum Form {
    Pieces(Vec<Piece>),
    Flat(Box<[u64; BLOCKS]>),
}

impl Default for Entry {
    fn default() -> Self {
        Self::EMPTY
    }
}

impl PartialEq for Entry {
    fn eq(&self, other: &Self) -> bool {
        self.sorted_pieces() == other.sorted_pieces()
    }
}

impl Eq for Entry {}

impl Entry {
    /// The entry that maps nothing.
    pub const EMPTY: Self = Self(Form::Pieces(Vec::new()));

    /// Returns the address of block `index`.
    #[must_use]
    pub fn get(&self, index: usize) -> Option<BlockAddress> {
        match &self.0 {
            Form::Pieces(pieces) => pieces.iter().find(|p| p.set.has(index)).map(|p| p.base.at(index)),
            Form::Flat(list) => BlockAddress::from_raw(list[index]),
        }
    }

    /// Tells whether nothing is mapped.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        match &self.0 {
            Form::Pieces(pieces) => pieces.is_empty(),
            Form::Flat(list) => list.iter().all(|raw| *raw == 0),
        }
    }

    /// Returns the blocks that are mapped.
    #[must_use]
    pub fn mapped(&self) -> BlockSet {
        match &self.0 {
            Form::Pieces(pieces) => pieces.iter().fold(BlockSet::EMPTY, |all, p| all.or(&p.set)),
            Form::Flat(list) => (0..BLOCKS).filter(|i| list[*i] != 0).collect(),
        }
    }

    /// Returns the pieces, in no particular order.
    #[must_use]
    pub fn pieces(&self) -> Vec<Piece> {
        match &self.0 {
            Form::Pieces(pieces) => pieces.clone(),
            Form::Flat(list) => gather(list.iter().filter_map(|raw| BlockAddress::from_raw(*raw))),
        }
    }

    /// Ends with the pieces, in no particular order.
    #[must_use]
    pub fn into_pieces(self) -> Vec<Piece> {
        match self.0 {
            Form::Pieces(pieces) => pieces,
            Form::Flat(_) => self.pieces(),
        }
    }

    fn sorted_pieces(&self) -> Vec<Piece> {
        let mut pieces = self.pieces();
        pieces.sort_by_key(|p| p.base);
        pieces
    }

    /// Maps the blocks of `set` to the slab at `base`; returns what they were mapped to before.
    pub fn assign(&mut self, base: BlockAddress, set: &BlockSet) -> Vec<Piece> {
        assert_eq!(base.index(), 0, "a slab begins at a multiple of 512 slots");
        let mut lost = self.remove(set);
        match &mut self.0 {
            Form::Pieces(pieces) => {
                if let Some(piece) = pieces.iter_mut().find(|p| p.base == base) {
                    piece.set = piece.set.or(set);
                } else if !set.is_empty() {
                    pieces.push(Piece { base, set: *set });
                }
            }
            Form::Flat(list) => set.iter().for_each(|index| list[index] = base.at(index).raw()),
        }
        self.flatten_if_scattered();
        lost.retain(|piece| piece.base != base);
        lost
    }

    /// Unmaps the blocks of `set`; returns what they were mapped to.
    pub fn remove(&mut self, set: &BlockSet) -> Vec<Piece> {
        match &mut self.0 {
            Form::Pieces(pieces) => {
                let mut lost = Vec::new();
                pieces.retain_mut(|piece| {
                    let gone = piece.set.and(set);
                    if !gone.is_empty() {
                        lost.push(Piece { base: piece.base, set: gone });
                        piece.set = piece.set.minus(set);
                    }
                    !piece.set.is_empty()
                });
                lost
            }
            Form::Flat(list) => {
                let lost = gather(set.iter().filter_map(|i| BlockAddress::from_raw(list[i])));
                set.iter().for_each(|i| list[i] = 0);
                lost
            }
        }
    }

    fn flatten_if_scattered(&mut self) {
        if let Form::Pieces(pieces) = &self.0
            && pieces.len() > PIECES_MAX
        {
            let mut list = Box::new([0; BLOCKS]);
            for piece in pieces {
                piece.set.iter().for_each(|i| list[i] = piece.base.at(i).raw());
            }
            self.0 = Form::Flat(list);
        }
    }

    /// Returns the addresses of `self` that `other` does not have.
    #[must_use]
    pub fn minus(&self, other: &Self) -> Vec<Piece> {
        let theirs = other.pieces();
        let mut rest = self.pieces();
        rest.retain_mut(|piece| {
            for their in theirs.iter().filter(|t| t.base == piece.base) {
                piece.set = piece.set.minus(&their.set);
            }
            !piece.set.is_empty()
        });
        rest
    }

    /// Splits blocks `start..end` into runs: unmapped, or at consecutive addresses. In order, covering all of them.
    #[must_use]
    pub fn runs(&self, start: usize, end: usize) -> Vec<Run> {
        let mut out: Vec<Run> = Vec::new();
        let mut at = start;
        while at < end {
            let address = self.get(at);
            let stop = self.run_end(at, address).min(end);
            out.push(Run { start: at, len: stop - at, address });
            at = stop;
        }
        out
    }

    fn run_end(&self, at: usize, address: Option<BlockAddress>) -> usize {
        match (&self.0, address) {
            (Form::Pieces(pieces), Some(address)) => pieces
                .iter()
                .find(|p| p.base == address.slab() && p.set.has(at))
                .map_or(at + 1, |p| p.set.next_absent(at)),
            (Form::Pieces(pieces), None) => pieces.iter().filter_map(|p| p.set.next(at)).min().unwrap_or(BLOCKS),
            (Form::Flat(list), Some(address)) => {
                (at..BLOCKS).find(|i| list[*i] != address.raw() + (*i - at) as u64).unwrap_or(BLOCKS)
            }
            (Form::Flat(list), None) => (at..BLOCKS).find(|i| list[*i] != 0).unwrap_or(BLOCKS),
        }
    }

    /// Returns the bytes of memory behind the entry.
    #[must_use]
    pub fn weight(&self) -> usize {
        match &self.0 {
            Form::Pieces(pieces) => pieces.capacity() * size_of::<Piece>(),
            Form::Flat(_) => BLOCKS * 8,
        }
    }

    /// Returns the canonical coding.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let pieces = self.sorted_pieces();
        let mut out = Writer::new();
        out.u8(TAG_PIECES).varint(pieces.len() as u64);
        for piece in &pieces {
            out.u64(piece.base.raw());
            piece.set.encode(&mut out);
        }
        if out.len() <= FLAT_LEN {
            return out.finish();
        }
        let mut out = Writer::new();
        out.u8(TAG_FLAT);
        for index in 0..BLOCKS {
            out.u64(self.get(index).map_or(0, BlockAddress::raw));
        }
        out.finish()
    }

    /// Takes a coding apart, checking every rule of the map.
    ///
    /// # Errors
    /// `Kind::Corrupt` when a piece is empty, unaligned, out of order or overlaps another.
    pub fn decode(what: &str, bytes: &[u8]) -> Result<Self> {
        let mut from = Reader::new(what, bytes);
        let mut entry = match from.u8()? {
            TAG_PIECES => Self(Form::Pieces(decode_pieces(&mut from)?)),
            TAG_FLAT => {
                let mut list = Box::new([0; BLOCKS]);
                for (index, raw) in list.iter_mut().enumerate() {
                    *raw = from.u64()?;
                    if *raw != 0 && BlockAddress::from_raw(*raw).is_none_or(|a| a.index() != index) {
                        return Err(from.corrupt("an address does not fit its block"));
                    }
                }
                Self(Form::Flat(list))
            }
            _ => return Err(from.corrupt("an entry has an unknown form")),
        };
        from.end()?;
        entry.flatten_if_scattered();
        Ok(entry)
    }
}

fn decode_pieces(from: &mut Reader<'_>) -> Result<Vec<Piece>> {
    let count = from.varint()?;
    if count > CHUNK_BLOCKS {
        return Err(from.corrupt("an entry has more pieces than blocks"));
    }
    let mut pieces: Vec<Piece> = Vec::new();
    let mut all = BlockSet::EMPTY;
    for _ in 0..count {
        let base = BlockAddress::from_raw(from.u64()?).filter(|a| a.index() == 0);
        let base = base.ok_or_else(|| from.corrupt("a slab base is not aligned"))?;
        let set = BlockSet::decode(from)?;
        if set.is_empty() || set.meets(&all) {
            return Err(from.corrupt("two pieces share a block, or one is empty"));
        }
        if pieces.last().is_some_and(|last| last.base >= base) {
            return Err(from.corrupt("pieces are not in order"));
        }
        all = all.or(&set);
        pieces.push(Piece { base, set });
    }
    Ok(pieces)
}

/// Groups addresses by slab.
fn gather(addresses: impl Iterator<Item = BlockAddress>) -> Vec<Piece> {
    let mut pieces: Vec<Piece> = Vec::new();
    for address in addresses {
        let base = address.slab();
        let at = pieces.binary_search_by_key(&base, |p| p.base).unwrap_or_else(|at| {
            pieces.insert(at, Piece { base, set: BlockSet::EMPTY });
            at
        });
        pieces[at].set.add(address.index());
    }
    pieces
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;
    use crate::units::SegmentId;

    fn slab(n: u32) -> BlockAddress {
        BlockAddress::new(SegmentId(3), n * 512)
    }

    #[test]
    fn a_sequential_chunk_is_short() {
        let mut entry = Entry::EMPTY;
        entry.assign(slab(1), &BlockSet::FULL);
        assert!(crate::codec::seal(entry.encode()).len() < 24);
    }

    #[test]
    fn a_scattered_chunk_never_exceeds_the_flat_form() {
        let mut entry = Entry::EMPTY;
        for i in 0..512u32 {
            entry.assign(slab(i + 1), &BlockSet::range(i as usize, i as usize + 1));
        }
        assert_eq!(entry.encode().len(), 4097);
        assert_eq!(Entry::decode("entry", &entry.encode()).unwrap(), entry);
        assert!(entry.weight() <= 4096);
    }

    proptest! {
        #[test]
        fn behaves_like_a_map(ops in prop::collection::vec((1u32..90, 0usize..512, 1usize..40, any::<bool>()), 1..120)) {
            let mut entry = Entry::EMPTY;
            let mut twin: BTreeMap<usize, BlockAddress> = BTreeMap::new();
            for (base, start, len, assign) in ops {
                let end = (start + len).min(512);
                let set = BlockSet::range(start, end);
                let before = entry.clone();
                let lost = if assign { entry.assign(slab(base), &set) } else { entry.remove(&set) };
                for i in start..end {
                    if assign { twin.insert(i, slab(base).at(i)); } else { twin.remove(&i); }
                }
                let lost: u32 = lost.iter().map(|p| p.set.count()).sum();
                let gone: u32 = before.minus(&entry).iter().map(|p| p.set.count()).sum();
                prop_assert_eq!(lost, gone);
            }
            for i in 0..512 {
                prop_assert_eq!(entry.get(i), twin.get(&i).copied());
            }
            let bytes = entry.encode();
            prop_assert!(bytes.len() <= FLAT_LEN);
            prop_assert_eq!(&Entry::decode("entry", &bytes).unwrap(), &entry);
            let mut at = 0;
            for run in entry.runs(0, 512) {
                prop_assert_eq!(run.start, at);
                for i in 0..run.len {
                    prop_assert_eq!(twin.get(&(at + i)).map(|a| a.raw()), run.address.map(|a| a.raw() + i as u64));
                }
                at += run.len;
            }
            prop_assert_eq!(at, 512);
        }

        #[test]
        fn damage_is_refused_or_canonical(bytes in prop::collection::vec(any::<u8>(), 0..60)) {
            if let Ok(entry) = Entry::decode("entry", &bytes) {
                prop_assert_eq!(entry.encode(), bytes);
            }
        }
    }
}
