//! A set of blocks of one chunk: 512 bits.
//!
//! Coded as the first of these that fits (tag byte first): full, one range (start, length), list of up to 30 indexes, bitmap;
//! for all but tiny sets that is the shortest.

use crate::codec::{Reader, Writer};
use crate::error::Result;
use crate::units::{CHUNK_BLOCKS, to_usize};

const BITS: usize = to_usize(CHUNK_BLOCKS);
const TAG_FULL: u8 = 0;
const TAG_RANGE: u8 = 1;
const TAG_LIST: u8 = 2;
const TAG_BITMAP: u8 = 3;

/// A set of block indexes 0..512.
#[derive(Debug, Clone, Copy, Eq, Default)]
pub struct BlockSet([u64; BITS / 64]);

/// Word by word: the derived one calls `memcmp`, which takes several times as long for so few.
impl PartialEq for BlockSet {
    fn eq(&self, other: &Self) -> bool {
        self.0.iter().zip(&other.0).fold(0, |differ, (a, b)| differ | (a ^ b)) == 0
    }
}

impl BlockSet {
    /// The set of no blocks.
    pub const EMPTY: Self = Self([0; BITS / 64]);
    /// The set of all blocks of a chunk.
    pub const FULL: Self = Self([u64::MAX; BITS / 64]);

    /// Makes the set of `start..end`.
    #[must_use]
    pub fn range(start: usize, end: usize) -> Self {
        assert!(start <= end && end <= BITS, "a range of blocks lies inside a chunk");
        let mut set = Self::EMPTY;
        for (word, bits) in set.0.iter_mut().enumerate() {
            let low = start.clamp(word * 64, word * 64 + 64) - word * 64;
            let high = end.clamp(word * 64, word * 64 + 64) - word * 64;
            if high > low {
                *bits = (u64::MAX >> (64 - (high - low))) << low;
            }
        }
        set
    }

    /// Tells whether block `index` is in the set.
    #[must_use]
    pub fn has(&self, index: usize) -> bool {
        self.0[index / 64] >> (index % 64) & 1 == 1
    }

    /// Adds block `index`.
    pub fn add(&mut self, index: usize) {
        self.0[index / 64] |= 1 << (index % 64);
    }

    /// Makes a set from its bits, the lowest first.
    #[must_use]
    pub fn from_words(words: [u64; BITS / 64]) -> Self {
        Self(words)
    }

    /// Returns how many blocks are in the set.
    #[must_use]
    pub fn count(&self) -> u32 {
        self.0.iter().map(|w| w.count_ones()).sum()
    }

    /// Tells whether no block is in the set.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.iter().fold(0, |all, word| all | word) == 0
    }

    fn zip(&self, other: &Self, f: impl Fn(u64, u64) -> u64) -> Self {
        let mut out = Self::EMPTY;
        for (i, word) in out.0.iter_mut().enumerate() {
            *word = f(self.0[i], other.0[i]);
        }
        out
    }

    /// Returns the blocks in both.
    #[must_use]
    pub fn and(&self, other: &Self) -> Self {
        self.zip(other, |a, b| a & b)
    }

    /// Returns the blocks in either.
    #[must_use]
    pub fn or(&self, other: &Self) -> Self {
        self.zip(other, |a, b| a | b)
    }

    /// Returns the blocks of `self` that are not in `other`.
    #[must_use]
    pub fn minus(&self, other: &Self) -> Self {
        self.zip(other, |a, b| a & !b)
    }

    /// Tells whether the two have a block in common.
    #[must_use]
    pub fn meets(&self, other: &Self) -> bool {
        self.0.iter().zip(&other.0).any(|(a, b)| a & b != 0)
    }

    /// Returns the first block of the set at or after `from`.
    #[must_use]
    pub fn next(&self, from: usize) -> Option<usize> {
        if from >= BITS {
            return None;
        }
        let mut word = from / 64;
        let mut bits = self.0[word] & (u64::MAX << (from % 64));
        while bits == 0 {
            word += 1;
            bits = *self.0.get(word)?;
        }
        Some(word * 64 + bits.trailing_zeros() as usize)
    }

    /// Returns the last block of the set.
    #[must_use]
    pub fn last(&self) -> Option<usize> {
        let word = self.0.iter().rposition(|bits| *bits != 0)?;
        Some(word * 64 + 63 - self.0[word].leading_zeros() as usize)
    }

    /// Returns the first block at or after `from` that is not in the set; 512 when there is none.
    #[must_use]
    pub fn next_absent(&self, from: usize) -> usize {
        Self::FULL.minus(self).next(from).unwrap_or(BITS)
    }

    /// Iterates over the maximal runs as `(start, end)`, in order.
    pub fn runs(&self) -> impl Iterator<Item = (usize, usize)> + '_ {
        let mut at = 0;
        std::iter::from_fn(move || {
            let start = self.next(at)?;
            at = self.next_absent(start);
            Some((start, at))
        })
    }

    /// Iterates over the blocks in order.
    pub fn iter(&self) -> impl Iterator<Item = usize> + '_ {
        self.runs().flat_map(|(start, end)| start..end)
    }

    /// Appends the shortest coding.
    pub fn encode(&self, out: &mut Writer) {
        let tag = self.tag();
        out.u8(tag);
        match tag {
            TAG_FULL => {}
            TAG_RANGE => {
                let (start, end) = self.runs().next().expect("there is one run");
                out.u16(index16(start)).u16(index16(end - start));
            }
            TAG_LIST => {
                out.u8(u8::try_from(self.count()).expect("at most 30"));
                for index in self.iter() {
                    out.u16(index16(index));
                }
            }
            _ => {
                for word in self.0 {
                    out.u64(word);
                }
            }
        }
    }

    /// Returns the tag of the shortest coding.
    fn tag(&self) -> u8 {
        match self.count_runs() {
            1 if *self == Self::FULL => TAG_FULL,
            1 => TAG_RANGE,
            _ if self.count() < 31 => TAG_LIST,
            _ => TAG_BITMAP,
        }
    }

    /// Returns how many maximal runs there are.
    #[must_use]
    pub fn count_runs(&self) -> u32 {
        let mut before = 0;
        let begins = |word: &u64| {
            let begins = word & !(word << 1 | before);
            before = word >> 63;
            begins.count_ones()
        };
        self.0.iter().map(begins).sum()
    }

    /// Takes a coding apart; refuses forms the encoder would not have chosen.
    ///
    /// # Errors
    /// `Kind::Corrupt` for anything but the output of [`Self::encode`].
    pub fn decode(from: &mut Reader<'_>) -> Result<Self> {
        let mut set = Self::EMPTY;
        let tag = from.u8()?;
        match tag {
            TAG_FULL => set = Self::FULL,
            TAG_RANGE => {
                let (start, len) = (usize::from(from.u16()?), usize::from(from.u16()?));
                if len == 0 || start + len > BITS {
                    return Err(from.corrupt("a range of blocks leaves its chunk"));
                }
                set = Self::range(start, start + len);
            }
            TAG_LIST => {
                for _ in 0..from.u8()? {
                    let index = usize::from(from.u16()?);
                    if index >= BITS || set.next(index).is_some() {
                        return Err(from.corrupt("a list of blocks is not ascending"));
                    }
                    set.add(index);
                }
            }
            TAG_BITMAP => {
                for word in &mut set.0 {
                    *word = from.u64()?;
                }
            }
            _ => return Err(from.corrupt("a set of blocks has an unknown form")),
        }
        if set.tag() != tag {
            return Err(from.corrupt("a set of blocks is not in its shortest form"));
        }
        Ok(set)
    }
}

fn index16(index: usize) -> u16 {
    u16::try_from(index).expect("block indexes end at 512")
}

impl FromIterator<usize> for BlockSet {
    fn from_iter<T: IntoIterator<Item = usize>>(iter: T) -> Self {
        let mut set = Self::EMPTY;
        iter.into_iter().for_each(|index| set.add(index));
        set
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn round(set: &BlockSet) -> Vec<u8> {
        let mut w = Writer::new();
        set.encode(&mut w);
        let bytes = w.finish();
        let mut r = Reader::new("set", &bytes);
        assert_eq!(BlockSet::decode(&mut r).unwrap(), *set);
        r.end().unwrap();
        bytes
    }

    #[test]
    fn forms_are_the_shortest() {
        assert_eq!(round(&BlockSet::FULL).len(), 1);
        assert_eq!(round(&BlockSet::range(5, 400)).len(), 5);
        assert_eq!(round(&[1, 3].into_iter().collect()).len(), 6);
        assert_eq!(round(&(0..512).step_by(2).collect()).len(), 65);
        assert_eq!(round(&BlockSet::EMPTY).len(), 2);
    }

    proptest! {
        #[test]
        fn behaves_like_a_vector_of_bools(a in prop::collection::vec(any::<bool>(), 512), b in prop::collection::vec(any::<bool>(), 512)) {
            let pick = |v: &[bool]| (0..512).filter(|i| v[*i]).collect::<BlockSet>();
            let (x, y) = (pick(&a), pick(&b));
            round(&x);
            for i in 0..512 {
                prop_assert_eq!(x.has(i), a[i]);
                prop_assert_eq!(x.and(&y).has(i), a[i] && b[i]);
                prop_assert_eq!(x.or(&y).has(i), a[i] || b[i]);
                prop_assert_eq!(x.minus(&y).has(i), a[i] && !b[i]);
            }
            prop_assert_eq!(x.count() as usize, a.iter().filter(|v| **v).count());
            prop_assert_eq!(x.iter().collect::<Vec<_>>(), (0..512).filter(|i| a[*i]).collect::<Vec<_>>());
        }

        #[test]
        fn ranges_are_what_they_say(start in 0usize..=512, len in 0usize..=512) {
            let end = (start + len).min(512);
            let set = BlockSet::range(start, end);
            prop_assert_eq!(set.iter().collect::<Vec<_>>(), (start..end).collect::<Vec<_>>());
        }

        #[test]
        fn garbage_is_refused_or_canonical(bytes in prop::collection::vec(any::<u8>(), 0..80)) {
            let mut r = Reader::new("set", &bytes);
            if let Ok(set) = BlockSet::decode(&mut r) {
                let mut w = Writer::new();
                set.encode(&mut w);
                prop_assert_eq!(&w.finish()[..], &bytes[..bytes.len() - r.left()]);
            }
        }
    }
}
