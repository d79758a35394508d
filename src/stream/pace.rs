//! When what arrived of a stream is made safe: after so many bytes or so much time, whatever comes first, so that neither a
//! fast nor a slow line loses much to a crash. It is asked when something arrives: a crash while a line stands still may cost the
//! last so many bytes.

use std::time::{Duration, Instant};

use crate::clock;

const BYTES: u64 = 256 << 20;
const TIME: Duration = Duration::from_secs(2);

/// What is not safe yet.
#[derive(Debug)]
pub(super) struct Pace {
    bytes: u64,
    since: Instant,
}

impl Pace {
    pub(super) fn new() -> Self {
        Self { bytes: 0, since: clock::now() }
    }

    /// Counts what arrived; tells whether it is time.
    pub(super) fn arrived(&mut self, bytes: u64) -> bool {
        self.bytes += bytes;
        let due = self.bytes >= BYTES || (self.bytes > 0 && self.since.elapsed() >= TIME);
        if due {
            *self = Self::new();
        }
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_time_after_many_bytes_or_some_time() {
        let mut pace = Pace::new();
        assert!(!pace.arrived(0) && !pace.arrived(BYTES - 1));
        assert!(pace.arrived(1), "so many bytes");
        assert!(!pace.arrived(1), "and they count anew");
        pace.since = clock::now().checked_sub(TIME).unwrap();
        assert!(pace.arrived(0), "so much time");
        pace.since = clock::now().checked_sub(TIME).unwrap();
        assert!(!pace.arrived(0), "nothing has arrived that could be lost");
    }
}
