//! The comparison itself: a merge of two lists of chunks with their slabs.

use super::Extent;
use crate::error::Result;
use crate::map::{BlockSet, Piece};
use crate::units::{BLOCK_SIZE, CHUNK_BLOCKS, ChunkIndex};

/// Gives the slabs of one chunk after the other.
pub trait ChunkPieces {
    /// Puts the pieces of the next chunk into `pieces`, in growing order of base; their sets are disjoint. Chunks grow.
    ///
    /// # Errors
    /// Whatever keeps the next chunk from being read.
    fn step(&mut self, pieces: &mut Vec<Piece>) -> Result<Option<ChunkIndex>>;
}

/// Bytes of both sides.
#[derive(Debug, Clone, Copy)]
pub struct Sizes {
    /// Of FROM; 0 for nothing.
    pub from: u64,
    /// Of TO.
    pub to: u64,
}

/// Calls `each` for every extent that differs, in order.
///
/// # Errors
/// Of the sides, and what `each` returns.
pub fn compare(
    from: &mut dyn ChunkPieces,
    to: &mut dyn ChunkPieces,
    sizes: Sizes,
    each: &mut dyn FnMut(Extent) -> Result<()>,
) -> Result<()> {
    let mut out = Joining::new(sizes, each);
    let (mut old, mut new) = (Vec::new(), Vec::new());
    let (mut at_old, mut at_new) = (from.step(&mut old)?, to.step(&mut new)?);
    while let Some(chunk) = at_old.into_iter().chain(at_new).min() {
        let has = |at: Option<ChunkIndex>| at == Some(chunk);
        let none: &[Piece] = &[];
        let (theirs, ours) = (if has(at_old) { &old[..] } else { none }, if has(at_new) { &new[..] } else { none });
        if theirs != ours || out.is_new(chunk) {
            out.chunk(chunk, theirs, ours)?;
        }
        if has(at_old) {
            at_old = from.step(&mut old)?;
        }
        if has(at_new) {
            at_new = to.step(&mut new)?;
        }
    }
    out.finish()
}

/// Joins what is next to each other.
struct Joining<'a> {
    /// Blocks that FROM has; what is mapped beyond counts as unmapped.
    from_blocks: u64,
    /// Blocks that TO has.
    to_blocks: u64,
    to_size: u64,
    /// Blocks from here on are new, whatever FROM says.
    new_from: u64,
    /// Blocks below have been told, if they are new.
    told: u64,
    last: Option<(u64, u64, bool)>,
    each: &'a mut dyn FnMut(Extent) -> Result<()>,
}

impl<'a> Joining<'a> {
    fn new(sizes: Sizes, each: &'a mut dyn FnMut(Extent) -> Result<()>) -> Self {
        let to_blocks = sizes.to.div_ceil(BLOCK_SIZE);
        // The last block of FROM too, if it was cut by the end.
        let new_from = if sizes.to > sizes.from { sizes.from / BLOCK_SIZE } else { to_blocks };
        let from_blocks = sizes.from.div_ceil(BLOCK_SIZE);
        Self { from_blocks, to_blocks, to_size: sizes.to, new_from, told: new_from, last: None, each }
    }

    /// Tells whether any block of a chunk lies beyond the end of FROM.
    fn is_new(&self, chunk: ChunkIndex) -> bool {
        (u64::from(chunk.0) + 1) * CHUNK_BLOCKS > self.new_from
    }

    fn chunk(&mut self, chunk: ChunkIndex, old: &[Piece], new: &[Piece]) -> Result<()> {
        let first = u64::from(chunk.0) * CHUNK_BLOCKS;
        let within =
            |blocks: u64| usize::try_from(blocks.saturating_sub(first).min(CHUNK_BLOCKS)).expect("at most 512");
        let known = BlockSet::range(0, within(self.from_blocks.min(self.new_from)));
        let there = BlockSet::range(0, within(self.to_blocks));
        let mut data = BlockSet::EMPTY;
        let mut mapped = BlockSet::EMPTY;
        for piece in new {
            mapped = mapped.or(&piece.set);
            let same = old.iter().find(|o| o.base == piece.base);
            data = data.or(&same.map_or(piece.set, |same| piece.set.minus(&same.set.and(&known))));
        }
        let was = old.iter().fold(BlockSet::EMPTY, |all, piece| all.or(&piece.set)).and(&known);
        let zero = was.or(&there.minus(&known)).minus(&mapped).and(&there);
        let data = data.and(&there);
        if self.is_new(chunk) {
            self.fill_upto(first.max(self.new_from))?;
            self.told = (first + CHUNK_BLOCKS).min(self.to_blocks).max(self.told);
        }
        self.runs(first, &data, &zero)
    }

    /// Tells the runs of two disjoint sets in order.
    fn runs(&mut self, first: u64, data: &BlockSet, zero: &BlockSet) -> Result<()> {
        let mut at = 0;
        loop {
            let (next_data, next_zero) = (data.next(at), zero.next(at));
            let Some(start) = next_data.into_iter().chain(next_zero).min() else { return Ok(()) };
            let is_zero = next_data != Some(start);
            let end = if is_zero { zero.next_absent(start) } else { data.next_absent(start) };
            self.put(first + start as u64, first + end as u64, is_zero)?;
            at = end;
        }
    }

    /// New blocks below `block` that no side has are zeros.
    fn fill_upto(&mut self, block: u64) -> Result<()> {
        let end = block.min(self.to_blocks);
        if self.told < end {
            self.put(self.told, end, true)?;
            self.told = end;
        }
        Ok(())
    }

    fn put(&mut self, start: u64, end: u64, zero: bool) -> Result<()> {
        match &mut self.last {
            Some(last) if last.1 == start && last.2 == zero => last.1 = end,
            _ => {
                if let Some(done) = self.last.replace((start, end, zero)) {
                    self.tell(done)?;
                }
            }
        }
        Ok(())
    }

    fn tell(&mut self, (start, end, zero): (u64, u64, bool)) -> Result<()> {
        let offset = start * BLOCK_SIZE;
        let length = (end * BLOCK_SIZE).min(self.to_size) - offset;
        (self.each)(Extent { offset, length, zero })
    }

    fn finish(mut self) -> Result<()> {
        self.fill_upto(self.to_blocks)?;
        self.last.take().map_or(Ok(()), |last| self.tell(last))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::{BlockAddress, SegmentId};

    struct List(std::vec::IntoIter<(u32, Vec<Piece>)>);

    impl ChunkPieces for List {
        fn step(&mut self, pieces: &mut Vec<Piece>) -> Result<Option<ChunkIndex>> {
            pieces.clear();
            Ok(self.0.next().map(|(chunk, list)| {
                pieces.extend(list);
                ChunkIndex(chunk)
            }))
        }
    }

    fn piece(slab: u32, start: usize, end: usize) -> Piece {
        Piece { base: BlockAddress::new(SegmentId(1), slab * 512), set: BlockSet::range(start, end) }
    }

    fn run(from: Vec<(u32, Vec<Piece>)>, to: Vec<(u32, Vec<Piece>)>, sizes: Sizes) -> Vec<(u64, u64, bool)> {
        let mut out = Vec::new();
        compare(&mut List(from.into_iter()), &mut List(to.into_iter()), sizes, &mut |extent| {
            out.push((extent.offset, extent.length, extent.zero));
            Ok(())
        })
        .unwrap();
        out
    }

    const CHUNK: u64 = 2 << 20;

    #[test]
    fn data_zeros_and_what_is_the_same() {
        let old = vec![(0, vec![piece(1, 0, 512)]), (1, vec![piece(2, 0, 10)]), (5, vec![piece(3, 0, 512)])];
        let new = vec![(0, vec![piece(1, 0, 500), piece(4, 500, 512)]), (1, vec![piece(2, 5, 10)])];
        let sizes = Sizes { from: 8 * CHUNK, to: 8 * CHUNK };
        let expected = [(500 * 4096, 12 * 4096, false), (CHUNK, 5 * 4096, true), (5 * CHUNK, CHUNK, true)];
        assert_eq!(run(old, new, sizes), expected);
    }

    #[test]
    fn beyond_the_end_of_the_old_one_everything_is_new() {
        let new = vec![(0, vec![piece(1, 0, 512)]), (3, vec![piece(2, 0, 1)])];
        let sizes = Sizes { from: 0, to: 4 * CHUNK - 3584 };
        let expected = [
            (0, CHUNK, false),
            (CHUNK, 2 * CHUNK, true),
            (3 * CHUNK, 4096, false),
            (3 * CHUNK + 4096, CHUNK - 4096 - 3584, true),
        ];
        assert_eq!(run(Vec::new(), new.clone(), sizes), expected);
        // A block cut by the old end is new, and what was mapped beyond it does not count.
        let sizes = Sizes { from: 4096 + 512, to: CHUNK };
        assert_eq!(run(new[..1].to_vec(), new[..1].to_vec(), sizes), [(4096, CHUNK - 4096, false)]);
    }

    #[test]
    fn what_lies_beyond_the_end_of_the_new_one_is_not_told() {
        let old = vec![(0, vec![piece(1, 0, 512)]), (9, vec![piece(2, 0, 9)])];
        let sizes = Sizes { from: 20 * CHUNK, to: 4096 * 3 - 512 };
        assert_eq!(run(old, Vec::new(), sizes), [(0, 4096 * 3 - 512, true)]);
    }
}
