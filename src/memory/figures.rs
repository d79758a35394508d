//! What is counted while memory is saved and restored: by atomics, so that who counts never waits.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Steps that a doubling is divided into.
const STEPS: u32 = 4;
const BUCKETS: usize = 64 * STEPS as usize;

/// How long things took, to a fifth.
#[derive(Debug)]
pub(super) struct Times {
    buckets: [AtomicU64; BUCKETS],
    longest: AtomicU64,
}

impl Default for Times {
    fn default() -> Self {
        Self { buckets: [const { AtomicU64::new(0) }; BUCKETS], longest: AtomicU64::new(0) }
    }
}

/// The bucket of a number: its highest bit, and the two below.
fn bucket(nanos: u64) -> usize {
    let high = nanos.max(STEPS.into()).ilog2();
    let step = nanos.max(STEPS.into()) >> (high - 2) & u64::from(STEPS - 1);
    (high * STEPS) as usize + usize::try_from(step).expect("two bits")
}

/// The first number that lies beyond a bucket.
fn end(bucket: usize) -> u64 {
    let (high, step) = (bucket / STEPS as usize, bucket % STEPS as usize);
    let quarter = 1_u64 << (high - 2);
    (1_u64 << high).saturating_add(quarter.saturating_mul(step as u64 + 1))
}

impl Times {
    /// Counts one.
    pub(super) fn add(&self, time: Duration) {
        let nanos = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        self.buckets[bucket(nanos)].fetch_add(1, Ordering::Relaxed);
        self.longest.fetch_max(nanos, Ordering::Relaxed);
    }

    /// Returns how many there were.
    pub(super) fn count(&self) -> u64 {
        self.buckets.iter().map(|bucket| bucket.load(Ordering::Relaxed)).sum()
    }

    /// Returns what is told of them.
    pub(super) fn told(&self) -> Waits {
        let longest = self.longest.load(Ordering::Relaxed);
        let (count, mut seen) = (self.count(), 0);
        let among = self.buckets.iter().position(|bucket| {
            seen += bucket.load(Ordering::Relaxed);
            seen * 100 >= count * 99
        });
        let p99 = if count == 0 { 0 } else { among.map_or(longest, end).min(longest) };
        Waits { count, p99_us: p99.div_ceil(1000), max_us: longest.div_ceil(1000) }
    }
}

/// How long those waited who touched memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Waits {
    /// How many waited.
    pub count: u64,
    /// Of a hundred, 99 waited at most so long, in microseconds.
    pub p99_us: u64,
    /// The longest wait, in microseconds.
    pub max_us: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_slowest_of_a_hundred_is_told_to_a_fifth() {
        let times = Times::default();
        assert_eq!(times.told(), Waits::default());
        for n in 1..=1000 {
            times.add(Duration::from_micros(n));
        }
        let told = times.told();
        assert_eq!((told.count, told.max_us), (1000, 1000));
        assert!((990..=1000).contains(&told.p99_us), "{told:?}");
        for nanos in [0, 1, 3, 4, 5, 100, 12_345, 1 << 40, u64::MAX] {
            let of = bucket(nanos);
            assert!(
                of < BUCKETS && end(of) >= nanos && end(of) / 5 * 4 <= nanos.max(8),
                "{nanos}: {of} ends at {}",
                end(of)
            );
        }
    }
}
