//! The comparison itself: a merge of two lists of chunks with their slabs, and what it adds up to.
//!
//! # Rules
//! 1. A large disk is compared in parts, as many at a time as there are CPUs; what comes out is in order all the same.
//! 2. What is in memory of that are the sets of the chunks that differ, of a few parts: never all of them, never extents.

use std::ops::Range;

use super::{DiffTotal, Extent};
use crate::error::Result;
use crate::map::{BlockSet, Piece};
use crate::parallel;
use crate::units::{BLOCK_SIZE, CHUNK_BLOCKS, ChunkIndex, to_usize};

/// Gives the slabs of one chunk after the other.
pub trait ChunkPieces {
    /// Returns the next chunk with its pieces, in growing order of base; their sets are disjoint. Chunks grow.
    ///
    /// # Errors
    /// Whatever keeps the next chunk from being read.
    fn step(&mut self) -> Result<Option<(ChunkIndex, &[Piece])>>;
}

/// A side of a comparison, or the chunks of it that are to be compared.
pub trait Comparable: Sync {
    /// Walks over a part of the chunks: over those with numbers in the range, or over so many places in a list.
    ///
    /// # Errors
    /// Whatever keeps a walk from beginning.
    fn part(&self, part: Range<u32>) -> Result<Box<dyn ChunkPieces + '_>>;
}

/// Bytes of both sides.
#[derive(Debug, Clone, Copy)]
pub struct Sizes {
    /// Of FROM; 0 for nothing.
    pub from: u64,
    /// Of TO.
    pub to: u64,
}

/// What differs in one chunk. Of new chunks that neither side has entries for nothing is told: all of it is zeros.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Changed {
    /// The chunk.
    pub chunk: ChunkIndex,
    /// Blocks that hold other data now.
    pub data: BlockSet,
    /// Blocks that read as zeros now, and were mapped or did not exist.
    pub zero: BlockSet,
}

/// Takes what differs in a part.
pub trait Gather: Send {
    /// Takes the next chunk that differs.
    fn chunk(&mut self, changed: Changed);
}

impl Gather for Vec<Changed> {
    fn chunk(&mut self, changed: Changed) {
        self.push(changed);
    }
}

/// Compares in parts, each of which is gathered into an `empty` one, and calls `each` with these, in order. `count` is how
/// many chunks there are, `step` how many a part has.
///
/// # Errors
/// Of the sides, and what `each` returns.
pub fn compare<G: Gather + Clone + Sync>(
    from: &dyn Comparable,
    to: &dyn Comparable,
    sizes: Sizes,
    [count, step]: [u32; 2],
    empty: &G,
    each: &mut dyn FnMut(G) -> Result<()>,
) -> Result<()> {
    let limits = Limits::of(sizes);
    let parts = count.div_ceil(step);
    let part = |index: u32| {
        let range = index * step..count.min((index + 1).saturating_mul(step));
        let mut out = empty.clone();
        compare_part(&mut *from.part(range.clone())?, &mut *to.part(range)?, &limits, &mut out)?;
        Ok(out)
    };
    parallel::in_order(parts, part, each)
}

fn compare_part<G: Gather>(
    from: &mut dyn ChunkPieces,
    to: &mut dyn ChunkPieces,
    limits: &Limits,
    out: &mut G,
) -> Result<()> {
    let (mut at_old, mut at_new) = (from.step()?, to.step()?);
    while let Some(chunk) = at_old.iter().chain(&at_new).map(|at| at.0).min() {
        let old = at_old.filter(|at| at.0 == chunk).map(|at| at.1);
        let new = at_new.filter(|at| at.0 == chunk).map(|at| at.1);
        let (theirs, ours) = (old.unwrap_or_default(), new.unwrap_or_default());
        if theirs != ours || limits.is_new(chunk) {
            let changed = limits.changed(chunk, theirs, ours);
            if !(changed.data.is_empty() && changed.zero.is_empty()) {
                out.chunk(changed);
            }
        }
        let (next_old, next_new) = (old.is_some(), new.is_some());
        if next_old {
            at_old = from.step()?;
        }
        if next_new {
            at_new = to.step()?;
        }
    }
    Ok(())
}

/// Where the sides end, in blocks.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// Blocks that FROM has; what is mapped beyond counts as unmapped.
    from: u64,
    /// Blocks that TO has.
    to: u64,
    /// Blocks from here on are new, whatever FROM says.
    new: u64,
}

impl Limits {
    fn of(sizes: Sizes) -> Self {
        let to = sizes.to.div_ceil(BLOCK_SIZE);
        // The last block of FROM too, if it was cut by the end.
        let new = if sizes.to > sizes.from { sizes.from / BLOCK_SIZE } else { to };
        Self { from: sizes.from.div_ceil(BLOCK_SIZE), to, new }
    }

    /// Tells whether any block of a chunk lies beyond the end of FROM.
    fn is_new(&self, chunk: ChunkIndex) -> bool {
        (u64::from(chunk.0) + 1) * CHUNK_BLOCKS > self.new
    }

    fn changed(&self, chunk: ChunkIndex, old: &[Piece], new: &[Piece]) -> Changed {
        let (mut data, mut mapped, mut was) = (BlockSet::EMPTY, BlockSet::EMPTY, BlockSet::EMPTY);
        for piece in old {
            was = was.or(&piece.set);
        }
        let mut olds = old.iter().peekable();
        for piece in new {
            mapped = mapped.or(&piece.set);
            while olds.next_if(|old| old.base < piece.base).is_some() {}
            data = data.or(&match olds.peek().filter(|old| old.base == piece.base) {
                Some(same) => piece.set.minus(&same.set),
                None => piece.set,
            });
        }
        let mut zero = was.minus(&mapped);
        let first = u64::from(chunk.0) * CHUNK_BLOCKS;
        let known = self.from.min(self.new);
        if first + CHUNK_BLOCKS > known.min(self.to) {
            let below = |blocks: u64| BlockSet::range(0, to_usize(blocks.saturating_sub(first).min(CHUNK_BLOCKS)));
            let (known, there) = (below(known), below(self.to));
            data = data.or(&mapped.minus(&known)).and(&there);
            zero = was.and(&known).or(&there.minus(&known)).minus(&mapped).and(&there);
        }
        Changed { chunk, data, zero }
    }
}

/// Makes extents of chunks: joins what is next to each other, and puts in the new chunks that nobody tells of.
pub(super) struct Joining<'a> {
    limits: Limits,
    to_size: u64,
    /// Blocks below have been told, if they are new.
    told: u64,
    last: Option<(u64, u64, bool)>,
    each: &'a mut dyn FnMut(Extent) -> Result<()>,
}

impl<'a> Joining<'a> {
    pub(super) fn new(sizes: Sizes, each: &'a mut dyn FnMut(Extent) -> Result<()>) -> Self {
        let limits = Limits::of(sizes);
        Self { limits, to_size: sizes.to, told: limits.new, last: None, each }
    }

    pub(super) fn chunk(&mut self, changed: &Changed) -> Result<()> {
        let first = u64::from(changed.chunk.0) * CHUNK_BLOCKS;
        if self.limits.is_new(changed.chunk) {
            self.fill_upto(first)?;
            self.told = (first + CHUNK_BLOCKS).min(self.limits.to).max(self.told);
        }
        let (mut data, mut zero) = (changed.data.runs().peekable(), changed.zero.runs().peekable());
        loop {
            let is_zero = match (data.peek(), zero.peek()) {
                (Some(data), Some(zero)) => zero < data,
                (data, zero) if data.is_some() || zero.is_some() => data.is_none(),
                _ => return Ok(()),
            };
            let run = if is_zero { zero.next() } else { data.next() };
            let (start, end) = run.expect("it was peeked at");
            self.put(first + start as u64, first + end as u64, is_zero)?;
        }
    }

    /// New blocks below `block` that no side has are zeros.
    fn fill_upto(&mut self, block: u64) -> Result<()> {
        let end = block.min(self.limits.to);
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

    pub(super) fn finish(mut self) -> Result<()> {
        self.fill_upto(self.limits.to)?;
        self.last.take().map_or(Ok(()), |last| self.tell(last))
    }
}

/// Adds chunks up without making extents: a fraction of the time where single blocks changed all over a disk.
#[derive(Debug, Clone)]
pub struct Adding {
    limits: Limits,
    total: DiffTotal,
    /// The first chunk, with whether its first block is data, or zeros.
    first: Option<(ChunkIndex, [bool; 2])>,
    /// Blocks below have been told, if they are new.
    told: u64,
    /// Where data and zeros ended last, to see what goes on from one chunk to the next.
    ends: [u64; 2],
}

impl Adding {
    /// Begins with nothing.
    #[must_use]
    pub fn new(sizes: Sizes) -> Self {
        let limits = Limits::of(sizes);
        let total = DiffTotal { from_size: sizes.from, to_size: sizes.to, ..DiffTotal::default() };
        Self { limits, total, first: None, told: limits.new, ends: [u64::MAX; 2] }
    }

    /// Adds what comes after it.
    pub fn append(&mut self, next: &Self) {
        let Some((chunk, begins)) = next.first else { return };
        let first = u64::from(chunk.0) * CHUNK_BLOCKS;
        if self.limits.is_new(chunk) {
            self.fill_upto(first);
        }
        for ((own, theirs), begins) in self.ends.iter_mut().zip(next.ends).zip(begins) {
            self.total.extents -= u64::from(begins && *own == first);
            if theirs != u64::MAX {
                *own = theirs;
            }
        }
        self.total.extents += next.total.extents;
        self.total.data += next.total.data;
        self.total.zero += next.total.zero;
        self.told = self.told.max(next.told);
        self.first = self.first.or(next.first);
    }

    /// New blocks below `block` that no side has are zeros.
    fn fill_upto(&mut self, block: u64) {
        let end = block.min(self.limits.to);
        if self.told < end {
            self.total.extents += u64::from(self.ends[1] != self.told);
            self.total.zero += (end * BLOCK_SIZE).min(self.total.to_size) - self.told * BLOCK_SIZE;
            (self.told, self.ends[1]) = (end, end);
        }
    }

    /// Ends with the sum.
    #[must_use]
    pub fn finish(mut self) -> DiffTotal {
        self.fill_upto(self.limits.to);
        self.total
    }
}

impl Gather for Adding {
    fn chunk(&mut self, changed: Changed) {
        let first = u64::from(changed.chunk.0) * CHUNK_BLOCKS;
        let is_new = self.limits.is_new(changed.chunk);
        if self.first.is_none() {
            self.first = Some((changed.chunk, [changed.data.has(0), changed.zero.has(0)]));
        } else if is_new {
            self.fill_upto(first);
        }
        if is_new {
            self.told = (first + CHUNK_BLOCKS).min(self.limits.to).max(self.told);
        }
        let total = &mut self.total;
        let sums = [&mut total.data, &mut total.zero];
        for ((set, end), sum) in [&changed.data, &changed.zero].into_iter().zip(&mut self.ends).zip(sums) {
            if set.is_empty() {
                continue;
            }
            let goes_on = *end == first && set.has(0);
            total.extents += u64::from(set.count_runs()) - u64::from(goes_on);
            *sum += u64::from(set.count()) * BLOCK_SIZE;
            if set.has(to_usize(CHUNK_BLOCKS) - 1) {
                *end = first + CHUNK_BLOCKS;
            } else if first + CHUNK_BLOCKS > self.limits.to {
                *end = first + set.last().expect("not empty") as u64 + 1;
            }
            if *end == self.limits.to {
                *sum -= *end * BLOCK_SIZE - total.to_size;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;
    use crate::map::Entry;
    use crate::units::{BlockAddress, SegmentId};

    struct List(Vec<(u32, Vec<Piece>)>);
    struct ListWalk<'a>(std::slice::Iter<'a, (u32, Vec<Piece>)>);

    impl Comparable for List {
        fn part(&self, part: Range<u32>) -> Result<Box<dyn ChunkPieces + '_>> {
            let first = self.0.partition_point(|(chunk, _)| *chunk < part.start);
            let end = self.0.partition_point(|(chunk, _)| *chunk < part.end);
            Ok(Box::new(ListWalk(self.0[first..end].iter())))
        }
    }

    impl ChunkPieces for ListWalk<'_> {
        fn step(&mut self) -> Result<Option<(ChunkIndex, &[Piece])>> {
            Ok(self.0.next().map(|(chunk, list)| (ChunkIndex(*chunk), &list[..])))
        }
    }

    fn piece(slab: u32, start: usize, end: usize) -> Piece {
        Piece { base: BlockAddress::new(SegmentId(1), slab * 512), set: BlockSet::range(start, end) }
    }

    /// Compares in one part and in many; the sum must be that of the extents.
    fn run(from: Vec<(u32, Vec<Piece>)>, to: Vec<(u32, Vec<Piece>)>, sizes: Sizes) -> Vec<(u64, u64, bool)> {
        let (from, to) = (List(from), List(to));
        let mut all = Vec::new();
        for step in [64, 1, 3] {
            let mut out = Vec::new();
            let mut sum = DiffTotal { from_size: sizes.from, to_size: sizes.to, ..DiffTotal::default() };
            let each = &mut |extent: Extent| {
                sum.add(&extent);
                out.push((extent.offset, extent.length, extent.zero));
                Ok(())
            };
            let mut joining = Joining::new(sizes, each);
            let each = &mut |part: Vec<Changed>| part.iter().try_for_each(|changed| joining.chunk(changed));
            compare(&from, &to, sizes, [64, step], &Vec::new(), each).unwrap();
            joining.finish().unwrap();
            assert_eq!(added(&from, &to, sizes, [64, step]), sum);
            all.push(out);
        }
        assert!(all.windows(2).all(|pair| pair[0] == pair[1]));
        all.remove(0)
    }

    fn added(from: &List, to: &List, sizes: Sizes, parts: [u32; 2]) -> DiffTotal {
        let empty = Adding::new(sizes);
        let mut all = empty.clone();
        let each = &mut |part: Adding| {
            all.append(&part);
            Ok(())
        };
        compare(from, to, sizes, parts, &empty, each).unwrap();
        all.finish()
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

    proptest! {
        #[test]
        fn the_sum_is_that_of_the_extents(
            old in prop::collection::vec((0u32..10, 0usize..512, 1usize..512, 0u32..3), 0..12),
            new in prop::collection::vec((0u32..10, 0usize..512, 1usize..512, 0u32..3), 0..12),
            from in 0u64..10 * 512 * 8,
            to in 1u64..10 * 512 * 8,
        ) {
            let list = |pieces: Vec<(u32, usize, usize, u32)>| {
                let mut chunks: BTreeMap<u32, Entry> = BTreeMap::new();
                for (chunk, start, len, slab) in pieces {
                    let base = BlockAddress::new(SegmentId(1), (chunk * 3 + slab + 1) * 512);
                    let set = BlockSet::range(start, (start + len).min(512));
                    chunks.entry(chunk).or_default().assign(base, &set);
                }
                let sorted = |entry: Entry| {
                    let mut pieces = entry.into_pieces();
                    pieces.sort_by_key(|piece| piece.base);
                    pieces
                };
                chunks.into_iter().map(|(chunk, entry)| (chunk, sorted(entry))).collect()
            };
            run(list(old), list(new), Sizes { from: from * 512, to: to * 512 });
        }
    }
}
