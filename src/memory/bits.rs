//! Sets of page blocks and pages that several threads change at once.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::units::to_usize;

/// A set of numbers below a limit. All accesses are sequentially consistent: there are few, and each stands for a system call.
#[derive(Debug)]
pub(super) struct Bits {
    words: Box<[AtomicU64]>,
    len: u64,
}

impl Bits {
    /// Makes an empty set of numbers below `len`.
    pub(super) fn new(len: u64) -> Self {
        Self { words: (0..len.div_ceil(64)).map(|_| AtomicU64::new(0)).collect(), len }
    }

    fn place(&self, number: u64) -> (&AtomicU64, u64) {
        assert!(number < self.len, "{number} is not below {}", self.len);
        (&self.words[to_usize(number / 64)], 1 << (number % 64))
    }

    /// Puts a number in; tells whether it was in.
    pub(super) fn insert(&self, number: u64) -> bool {
        let (word, bit) = self.place(number);
        word.fetch_or(bit, Ordering::SeqCst) & bit != 0
    }

    /// Takes a number out; tells whether it was in.
    pub(super) fn remove(&self, number: u64) -> bool {
        let (word, bit) = self.place(number);
        word.fetch_and(!bit, Ordering::SeqCst) & bit != 0
    }

    /// Tells whether a number is in.
    pub(super) fn contains(&self, number: u64) -> bool {
        let (word, bit) = self.place(number);
        word.load(Ordering::SeqCst) & bit != 0
    }

    /// Takes all out.
    pub(super) fn clear(&self) {
        self.words.iter().for_each(|word| word.store(0, Ordering::SeqCst));
    }

    /// Returns how many are in.
    pub(super) fn count(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.load(Ordering::SeqCst).count_ones())).sum()
    }

    /// Returns the first number from `from` on that is in.
    pub(super) fn next(&self, from: u64) -> Option<u64> {
        if from >= self.len {
            return None;
        }
        let mut mask = u64::MAX << (from % 64);
        for index in from / 64..self.len.div_ceil(64) {
            let word = self.words[to_usize(index)].load(Ordering::SeqCst) & mask;
            if word != 0 {
                return Some(index * 64 + u64::from(word.trailing_zeros()));
            }
            mask = u64::MAX;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_go_in_and_out() {
        let bits = Bits::new(200);
        assert_eq!((bits.next(0), bits.count()), (None, 0));
        for number in [0, 63, 64, 130, 199] {
            assert!(!bits.insert(number) && bits.insert(number) && bits.contains(number));
        }
        assert_eq!(
            (bits.next(0), bits.next(1), bits.next(64), bits.next(65)),
            (Some(0), Some(63), Some(64), Some(130))
        );
        assert_eq!((bits.next(131), bits.next(200), bits.count()), (Some(199), None, 5));
        assert!(bits.remove(130) && !bits.remove(130) && !bits.contains(130));
        bits.clear();
        assert_eq!(bits.count(), 0);
    }
}
