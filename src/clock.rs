//! The one place that asks what time it is.
//!
//! Wall-clock seconds stamp snapshots and logs; the monotonic clock measures waits. Nothing that must be correct
//! depends on either: stamps are made unique per pool by whoever stores them, and the clock of a guest that goes on is as
//! right as that of its host.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

pub use std::time::Instant;

/// Returns seconds since 1970 in UTC.
#[must_use]
#[expect(clippy::disallowed_methods, reason = "this module is the seam")]
pub fn wall_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

/// Returns the time since 1970 in UTC.
#[must_use]
#[expect(clippy::disallowed_methods, reason = "this module is the seam")]
pub fn wall() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// Returns the monotonic clock.
#[must_use]
#[expect(clippy::disallowed_methods, reason = "this module is the seam")]
pub fn now() -> Instant {
    Instant::now()
}

/// Formats seconds since 1970 as `2026-11-22 13:05:07` (UTC).
#[must_use]
pub fn show(seconds: u64) -> String {
    // Days to a civil date after Howard Hinnant, "chrono-compatible low-level date algorithms".
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    let z = days + 719_468;
    let (era, doe) = (z / 146_097, z % 146_097);
    let yoe = (doe - doe / 1460 + doe / 36_524 - doe / 146_096) / 365;
    let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    let mp = (5 * doy + 2) / 153;
    let (day, month) = (doy - (153 * mp + 2) / 5 + 1, if mp < 10 { mp + 3 } else { mp - 9 });
    let year = yoe + era * 400 + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02} {:02}:{:02}:{:02}", rest / 3600, rest / 60 % 60, rest % 60)
}

/// Sleeps.
pub fn sleep(time: Duration) {
    std::thread::sleep(time);
}

#[cfg(test)]
mod tests {
    #[test]
    fn dates_are_civil() {
        assert_eq!(super::show(0), "1970-01-01 00:00:00");
        assert_eq!(super::show(951_782_400), "2000-02-29 00:00:00");
        assert_eq!(super::show(1_795_352_707), "2026-11-22 13:05:07");
    }
}
