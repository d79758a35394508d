//! IOPS and bandwidth limits of a disk: two leaky buckets that let a quarter of a second through at once.

use std::time::Duration;

use super::Store;
use crate::clock::{self, Instant};
use crate::sync::Mutex;
use crate::units::DiskId;

/// What may pass at once, as a part of a second.
const BURST: f64 = 0.25;

#[derive(Debug, Default)]
struct Bucket {
    /// When the next unit may pass, if it lies ahead.
    next: Option<Instant>,
}

impl Bucket {
    /// Enters `units` and returns how long to wait for them.
    fn enter(&mut self, units: f64, per_second: f64) -> Duration {
        let now = clock::now();
        let burst = Duration::from_secs_f64(BURST);
        let from =
            self.next.filter(|next| *next + burst > now).unwrap_or_else(|| now.checked_sub(burst).unwrap_or(now));
        let next = from + Duration::from_secs_f64(units / per_second);
        self.next = Some(next);
        next.saturating_duration_since(now)
    }
}

/// The buckets of one disk.
#[derive(Debug, Default)]
pub struct Limits {
    operations: Mutex<Bucket>,
    bytes: Mutex<Bucket>,
}

impl Limits {
    /// Waits until an operation of so many bytes may go on.
    pub fn take(&self, store: &Store, id: DiskId, bytes: u64) {
        let (iops, bandwidth) = {
            let tables = store.tables.read();
            let Ok(row) = tables.disk(id) else { return };
            (row.settings.iops, row.settings.bandwidth)
        };
        let mut wait = Duration::ZERO;
        if let Some(limit) = iops {
            wait = self.operations.lock().enter(1.0, limit as f64);
        }
        if let Some(limit) = bandwidth {
            wait = wait.max(self.bytes.lock().enter(bytes as f64, limit as f64));
        }
        if !wait.is_zero() {
            clock::sleep(wait);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_lets_a_burst_through_and_then_spaces() {
        let mut bucket = Bucket::default();
        let waits: Vec<Duration> = (0..100).map(|_| bucket.enter(1.0, 100.0)).collect();
        assert!(waits[20].is_zero(), "a quarter of a second passes at once");
        let last = waits[99].as_secs_f64();
        assert!((0.6..0.8).contains(&last), "the hundredth waits for what is over the burst: {last}");
    }
}
