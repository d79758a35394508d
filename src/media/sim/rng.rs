//! The dice of the simulator: the same seed throws the same on every machine and in every release.
//!
//! splitmix64 (Steele, Lea, Flood 2014): one word of state, passes BigCrush, and any seed is a good one.

/// A deterministic stream of numbers.
#[derive(Debug, Clone)]
pub(super) struct Rng(u64);

impl Rng {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Returns a number below `end`, which must not be zero. The bias of the remainder does not matter here.
    pub(super) fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    /// Returns a number from 0 to `end` inclusive.
    pub(super) fn up_to(&mut self, end: usize) -> usize {
        usize::try_from(self.below(end as u64 + 1)).expect("at most `end`, which is a usize")
    }

    pub(super) fn coin(&mut self) -> bool {
        self.next() & 1 == 1
    }
}
