//! IOPS and bandwidth limits of a disk: two leaky buckets that let a quarter of a second through at once.
//!
//! Nothing is entered for a request that has to wait: it asks again when its turn may have come ([`super::waiting`]). So one
//! that is called back owes nothing, and a limit that is lifted holds nobody up. A request to a disk without limits looks at
//! one flag.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::{Head, Settings, Store};
use crate::clock::{self, Instant};
use crate::sync::Mutex;
use crate::units::DiskId;

/// What may pass at once, as a part of a second.
const BURST: Duration = Duration::from_millis(250);
/// A request takes no longer than that, however large it is and small the limit.
const LONGEST: Duration = Duration::from_secs(3600);

#[derive(Debug, Default)]
struct Bucket {
    /// When it is empty, if it is not.
    empty: Option<Instant>,
    /// What it was filled by.
    per_second: u64,
}

impl Bucket {
    /// Returns when the next request may pass, if that is not now. Another limit than before begins anew.
    fn full_until(&mut self, now: Instant, per_second: Option<u64>) -> Option<Instant> {
        let per_second = per_second.unwrap_or(0);
        if self.per_second != per_second {
            *self = Self { empty: None, per_second };
        }
        self.empty.and_then(|empty| empty.checked_sub(BURST)).filter(|until| *until > now)
    }

    /// Enters what passes now.
    fn enter(&mut self, now: Instant, units: u64) {
        if self.per_second == 0 {
            return;
        }
        let from = self.empty.map_or(now, |empty| empty.max(now));
        let time = Duration::try_from_secs_f64(units as f64 / self.per_second as f64).unwrap_or(LONGEST);
        self.empty = Some(from + time.min(LONGEST));
    }
}

/// The buckets of one disk: operations and bytes.
#[derive(Debug)]
pub(super) struct Limits {
    /// There are any.
    any: AtomicBool,
    buckets: Mutex<(Bucket, Bucket)>,
}

impl Limits {
    /// Makes those of a disk with such settings; the caller has the tables locked, here and in [`Limits::follow`].
    pub(super) fn new(settings: &Settings) -> Self {
        let it = Self { any: AtomicBool::new(false), buckets: Mutex::default() };
        it.follow(settings);
        it
    }

    /// Notes whether there are any now.
    fn follow(&self, settings: &Settings) {
        self.any.store(settings.iops.is_some() || settings.bandwidth.is_some(), Ordering::Relaxed);
    }

    /// Lets an operation of so many bytes pass, or says when to ask again.
    fn take(&self, now: Instant, settings: &Settings, bytes: u64) -> Result<(), Instant> {
        let mut buckets = self.buckets.lock();
        let (operations, data) = &mut *buckets;
        let until = operations.full_until(now, settings.iops).max(data.full_until(now, settings.bandwidth));
        if let Some(until) = until {
            return Err(until);
        }
        operations.enter(now, 1);
        data.enter(now, bytes);
        Ok(())
    }
}

impl Store {
    /// Lets a read or write of so many bytes pass by the limits of its disk, or says when to ask again.
    pub(super) fn take_turn(&self, head: &Head, bytes: u64) -> Result<(), Instant> {
        let tables = self.tables.read();
        // It was removed: it finds that out by itself.
        let Ok(row) = tables.disk(head.id) else { return Ok(()) };
        let settings = &row.settings;
        if settings.iops.is_none() && settings.bandwidth.is_none() {
            return Ok(());
        }
        head.limits.take(clock::now(), settings, bytes)
    }

    /// As `Store::take_turn`, for who has just come: others may wait already. Tells whether it passes.
    pub fn has_turn(&self, head: &Head, bytes: u64) -> bool {
        !head.limits.any.load(Ordering::Relaxed) || !head.waiters.for_turn() && self.take_turn(head, bytes).is_ok()
    }

    /// Called when the settings of a disk have changed.
    pub fn settings_changed(&self, id: DiskId) {
        {
            // A live side that is made meanwhile has them already, for that locks the tables, too.
            let tables = self.tables.read();
            if let (Ok(row), Some(head)) = (tables.disk(id), self.heads.lock().get(&id)) {
                head.limits.follow(&row.settings);
            }
        }
        // Who waits because of the old ones may go.
        self.waiting.look();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limited(iops: Option<u64>, bandwidth: Option<u64>) -> Settings {
        Settings { iops, bandwidth, ..Settings::default() }
    }

    #[test]
    fn a_bucket_lets_a_burst_through_and_then_spaces() {
        let (limits, settings, begun) = (Limits::new(&Settings::default()), limited(Some(100), None), clock::now());
        let mut now = begun;
        let mut at_once = 0;
        for _ in 0..100 {
            match limits.take(now, &settings, 4096) {
                Ok(()) => at_once += usize::from(now == begun),
                Err(when) => {
                    assert!(when > now);
                    now = when;
                    limits.take(now, &settings, 4096).unwrap();
                }
            }
        }
        assert!((25..=27).contains(&at_once), "a quarter of a second passes at once: {at_once}");
        let last = now.duration_since(begun).as_secs_f64();
        assert!((0.7..0.8).contains(&last), "the hundredth waits for what is over the burst: {last}");
    }

    #[test]
    fn both_limits_hold_and_another_one_begins_anew() {
        let (limits, now) = (Limits::new(&Settings::default()), clock::now());
        let settings = limited(Some(1_000_000), Some(4096));
        limits.take(now, &settings, 1 << 20).unwrap();
        let until = limits.take(now, &settings, 1).unwrap_err();
        assert!(until > now + Duration::from_secs(200), "256 seconds' worth has passed");
        limits.take(now, &limited(Some(1_000_000), Some(8192)), 1).unwrap();
        limits.take(now, &limited(None, None), 1 << 40).unwrap();
        limits.take(now, &limited(Some(1), None), u64::MAX).unwrap();
    }
}
