//! Sets of slots in the portable Roaring format, read where they lie: a diff asks for 512 bits at a time, and a whole
//! bitmap container gives them as eight words. (The `roaring` crate, which writes the sets and is the other side of the
//! tests, hides its containers and answers bit by bit; that took ten times as long.)
//!
//! # Rules
//! 1. Everything is checked when a set is opened: keys, cardinalities, order, lengths.
//! 2. After that a set in memory cannot fail. One that was left in its file is read again where it is asked for, 8 KiB at a
//!    time at most; the file is never changed, so only the reading can fail.

use std::borrow::Cow;
use std::sync::Arc;

use crate::codec::Reader;
use crate::error::{Error, Result};
use crate::map::BlockSet;
use crate::media::File;
use crate::units::{CHUNK_BLOCKS, SLOT_BITS, to_usize};

const COOKIE_RUNS: u32 = 12_347;
const COOKIE_PLAIN: u32 = 12_346;
/// With runs, a set of fewer containers than this has no offsets.
const OFFSETS_FROM: usize = 4;
/// An array container has at most so many numbers.
const ARRAY_MAX: usize = 4096;
const BITMAP_BYTES: usize = 8192;
const KEYS: usize = 1 << (SLOT_BITS - 16);
const WINDOW: usize = to_usize(CHUNK_BLOCKS);

#[derive(Debug, Clone, Copy)]
enum Form {
    Array,
    Bitmap,
    Runs,
}

#[derive(Debug, Clone, Copy)]
struct Container {
    form: Form,
    /// Where its bytes begin, behind the number of runs.
    at: usize,
    /// Numbers in an array, runs in runs.
    count: usize,
    cardinality: usize,
}

/// Where the bytes of a set are.
#[derive(Debug)]
enum Bytes {
    Memory(Vec<u8>),
    /// From this byte of a file on.
    File(Arc<dyn File>, u64),
}

/// A set of slots of one segment.
#[derive(Debug)]
pub(super) struct SlotSet {
    bytes: Bytes,
    containers: Vec<Container>,
    /// For each key 1 + the container; 0 when there is none.
    by_key: Box<[u16]>,
    /// Slots in the set.
    pub len: u64,
}

impl SlotSet {
    /// Checks a set and takes it.
    ///
    /// # Errors
    /// `Corrupt`.
    pub(super) fn open(what: &str, bytes: Vec<u8>) -> Result<Self> {
        let mut from = Reader::new(what, &bytes);
        let cookie = from.u32()?;
        let (count, with_runs) = match cookie & 0xffff {
            COOKIE_RUNS => ((cookie >> 16) as usize + 1, true),
            _ if cookie == COOKIE_PLAIN => (from.u32()? as usize, false),
            _ => return Err(from.corrupt("it does not begin like a Roaring bitmap")),
        };
        if count > KEYS {
            return Err(from.corrupt("it has more containers than a segment has slots for"));
        }
        let run_flags = if with_runs { from.raw(count.div_ceil(8))? } else { &[] };
        let mut heads = Vec::with_capacity(count);
        for _ in 0..count {
            heads.push((usize::from(from.u16()?), usize::from(from.u16()?) + 1));
        }
        if heads.windows(2).any(|pair| pair[0].0 >= pair[1].0) || heads.last().is_some_and(|last| last.0 >= KEYS) {
            return Err(from.corrupt("its keys do not grow or are beyond a segment"));
        }
        let has_offsets = !with_runs || count >= OFFSETS_FROM;
        let offsets = if has_offsets { from.raw(count * 4)? } else { &[] };
        let mut containers = Vec::with_capacity(count);
        // No longer than it has to be: there may be many small segments.
        let mut by_key = vec![0; heads.last().map_or(0, |last| last.0 + 1)].into_boxed_slice();
        let mut len = 0;
        for (n, (key, cardinality)) in heads.iter().enumerate() {
            let at = bytes.len() - from.left();
            if let Some(offset) = offsets.get(n * 4..n * 4 + 4)
                && offset != u32::try_from(at).unwrap_or(u32::MAX).to_le_bytes()
            {
                return Err(from.corrupt("a container is not where its offset says"));
            }
            let runs = with_runs && run_flags[n / 8] >> (n % 8) & 1 == 1;
            containers.push(Container::check(&mut from, at, *cardinality, runs)?);
            by_key[*key] = u16::try_from(n + 1).expect("at most 4096");
            len += *cardinality as u64;
        }
        from.end()?;
        Ok(Self { bytes: Bytes::Memory(bytes), containers, by_key, len })
    }

    /// Gives the bytes up: from here on they are read where they lie in a file.
    pub(super) fn leave_in(&mut self, file: &Arc<dyn File>, at: u64) {
        self.bytes = Bytes::File(Arc::clone(file), at);
    }

    fn bytes(&self, at: usize, len: usize) -> Result<Cow<'_, [u8]>> {
        match &self.bytes {
            Bytes::Memory(bytes) => Ok(Cow::Borrowed(&bytes[at..at + len])),
            Bytes::File(file, start) => {
                let mut bytes = vec![0; len];
                let read = file.read_exact_at(&mut bytes, start + at as u64);
                read.map_err(|e| Error::io("cannot read the record of a retired snapshot", e))?;
                Ok(Cow::Owned(bytes))
            }
        }
    }

    /// Returns how many slots of a range that begins and ends at multiples of 512 are in the set.
    ///
    /// # Errors
    /// As [`SlotSet::window`].
    pub(super) fn count_between(&self, slots: std::ops::Range<u64>) -> Result<u64> {
        const CONTAINER: u64 = 1 << 16;
        let mut count = 0;
        let mut at = slots.start;
        while at < slots.end {
            let key = to_usize(at / CONTAINER);
            let found = self.by_key.get(key).copied().unwrap_or(0);
            let whole = at.is_multiple_of(CONTAINER) && slots.end - at >= CONTAINER;
            if found == 0 || whole {
                count += found.checked_sub(1).map_or(0, |n| self.containers[usize::from(n)].cardinality as u64);
                at = (at / CONTAINER + 1) * CONTAINER;
            } else {
                count += u64::from(self.window(u32::try_from(at).expect("below 2^28"))?.count());
                at += CHUNK_BLOCKS;
            }
        }
        Ok(count)
    }

    /// Returns which of the 512 slots from `first` on are in the set; `first` is a multiple of 512.
    ///
    /// # Errors
    /// Any error of reading the file that the set was left in.
    pub(super) fn window(&self, first: u32) -> Result<BlockSet> {
        let found = self.by_key.get((first >> 16) as usize).copied().unwrap_or(0);
        let Some(container) = found.checked_sub(1).map(|n| self.containers[usize::from(n)]) else {
            return Ok(BlockSet::EMPTY);
        };
        let low = (first & 0xffff) as usize;
        let (at, len) = match container.form {
            Form::Bitmap => (container.at + low / 8, WINDOW / 8),
            Form::Array => (container.at, 2 * container.count),
            Form::Runs => (container.at, 4 * container.count),
        };
        Ok(container.window(low, &self.bytes(at, len)?))
    }
}

/// Returns the first of `0..count` for which `below` no longer holds.
fn partition(count: usize, below: impl Fn(usize) -> bool) -> usize {
    let (mut low, mut high) = (0, count);
    while low < high {
        let middle = low.midpoint(high);
        if below(middle) { low = middle + 1 } else { high = middle }
    }
    low
}

impl Container {
    /// Returns the 512 numbers from `low` on; `bytes` are those of a bitmap that has them, or of all the rest.
    fn window(&self, low: usize, bytes: &[u8]) -> BlockSet {
        let u16_at = |at: usize| usize::from(u16::from_le_bytes([bytes[at], bytes[at + 1]]));
        match self.form {
            Form::Bitmap => {
                let mut words = [0; WINDOW / 64];
                for (word, bytes) in words.iter_mut().zip(bytes.chunks_exact(8)) {
                    *word = u64::from_le_bytes(bytes.try_into().expect("eight bytes"));
                }
                BlockSet::from_words(words)
            }
            Form::Array => {
                let value = |n: usize| u16_at(2 * n);
                let begin = partition(self.count, |n| value(n) < low);
                let inside = (begin..self.count).map(value).take_while(|value| *value < low + WINDOW);
                inside.map(|value| value - low).collect()
            }
            Form::Runs => {
                let run = |n: usize| {
                    let start = u16_at(4 * n);
                    (start, start + u16_at(4 * n + 2) + 1)
                };
                let begin = partition(self.count, |n| run(n).1 <= low);
                if begin < self.count && run(begin).0 <= low && run(begin).1 >= low + WINDOW {
                    return BlockSet::FULL;
                }
                let mut set = BlockSet::EMPTY;
                for (start, end) in (begin..self.count).map(run).take_while(|run| run.0 < low + WINDOW) {
                    set = set.or(&BlockSet::range(start.max(low) - low, end.min(low + WINDOW) - low));
                }
                set
            }
        }
    }

    fn check(from: &mut Reader<'_>, at: usize, cardinality: usize, runs: bool) -> Result<Self> {
        if runs {
            let count = usize::from(from.u16()?);
            let (mut end, mut total) = (0, 0);
            for n in 0..count {
                let (start, len) = (usize::from(from.u16()?), usize::from(from.u16()?) + 1);
                if (n > 0 && start < end) || start + len > 1 << 16 {
                    return Err(from.corrupt("its runs are not in order"));
                }
                (end, total) = (start + len, total + len);
            }
            if total != cardinality {
                return Err(from.corrupt("a container of runs has another cardinality"));
            }
            return Ok(Self { form: Form::Runs, at: at + 2, count, cardinality });
        }
        if cardinality <= ARRAY_MAX {
            let values = from.raw(cardinality * 2)?;
            let values = values.chunks_exact(2).map(|pair| u16::from_le_bytes([pair[0], pair[1]]));
            if !values.is_sorted_by(|a, b| a < b) {
                return Err(from.corrupt("an array is not in order"));
            }
            return Ok(Self { form: Form::Array, at, count: cardinality, cardinality });
        }
        let words = from.raw(BITMAP_BYTES)?.chunks_exact(8);
        let ones: u32 = words.map(|w| u64::from_le_bytes(w.try_into().expect("eight bytes")).count_ones()).sum();
        if ones as usize != cardinality {
            return Err(from.corrupt("a bitmap has another cardinality"));
        }
        Ok(Self { form: Form::Bitmap, at, count: cardinality, cardinality })
    }
}

#[cfg(test)]
mod tests {
    use roaring::RoaringBitmap;

    use super::*;

    fn open(set: &RoaringBitmap) -> SlotSet {
        let mut bytes = Vec::new();
        set.serialize_into(&mut bytes).unwrap();
        SlotSet::open("a set", bytes).unwrap()
    }

    fn compare(mut set: RoaringBitmap) {
        for optimized in [false, true] {
            if optimized {
                set.optimize();
            }
            let read = open(&set);
            assert_eq!(read.len, set.len());
            for first in (0..1 << 20).step_by(512) {
                let expected: BlockSet = set.range(first..first + 512).map(|slot| (slot - first) as usize).collect();
                assert!(read.window(first).unwrap() == expected, "window at {first}");
            }
        }
    }

    #[test]
    fn windows_are_those_of_the_crate() {
        compare(RoaringBitmap::new());
        compare((512..1024).collect());
        compare((0..1 << 20).filter(|n| n % 3 == 0).collect());
        compare((0..1 << 20).filter(|n| n % 97 == 0).collect());
        compare((0..1 << 20).filter(|n| n / 1000 % 2 == 0).collect());
        compare([0, 511, 512, 65_535, 65_536, 200_000, (1 << 20) - 1].into_iter().collect());
    }

    #[test]
    fn damage_is_seen_or_harmless() {
        let mut set: RoaringBitmap = (1000..9000).chain((70_000..90_000).step_by(2)).chain([200_000]).collect();
        set.optimize();
        let mut bytes = Vec::new();
        set.serialize_into(&mut bytes).unwrap();
        for cut in 0..bytes.len() {
            SlotSet::open("cut", bytes[..cut].to_vec()).unwrap_err();
        }
        for bit in 0..bytes.len() * 8 {
            let mut bad = bytes.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            if let Ok(read) = SlotSet::open("flipped", bad) {
                assert!((0..1 << 19).step_by(512).all(|first| read.window(first).unwrap().count() <= 512));
            }
        }
        SlotSet::open("plain", COOKIE_PLAIN.to_le_bytes().into_iter().chain(u32::MAX.to_le_bytes()).collect())
            .unwrap_err();
    }
}
