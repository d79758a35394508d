//! How long it is worth looking for something before sleeping.
//!
//! # Rules
//! 1. It is as long as would have been enough lately, and nothing when more than [`MAX`] would have been needed: so who
//!    rests costs nothing.
//! 2. Nobody looks for longer than [`MAX`], whatever comes.
//!
//! # Why
//! To be woken costs both sides more than looking does: the one who wakes has to call an idle processor, which on a virtual
//! machine means leaving it. QEMU's I/O threads do the same.

use std::time::Duration;

use crate::clock;

/// The longest look: what QEMU takes.
const MAX: Duration = Duration::from_micros(32);
/// Looks between two looks at the clock.
const LOOKS: u32 = 16;

/// What one thread has learned.
#[derive(Debug, Default)]
pub(crate) struct Patience(Duration);

impl Patience {
    /// Looks until `found` says so or it is not worth it any more; tells whether it did.
    pub(crate) fn look(&self, mut found: impl FnMut() -> bool) -> bool {
        if self.0.is_zero() {
            return false;
        }
        let until = clock::now() + self.0;
        loop {
            for _ in 0..LOOKS {
                if found() {
                    return true;
                }
                std::hint::spin_loop();
            }
            if clock::now() >= until {
                return false;
            }
        }
    }

    /// Sleeps with `sleep` after having looked in vain, and learns from how long that took.
    pub(crate) fn sleep<R>(&mut self, sleep: impl FnOnce() -> R) -> R {
        let begun = clock::now();
        let result = sleep();
        self.slept(clock::now().duration_since(begun));
        result
    }

    fn slept(&mut self, slept: Duration) {
        let enough = self.0 + slept;
        self.0 = if enough > MAX { Duration::ZERO } else { MAX.min(enough * 2) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_grows_where_that_pays_and_ends_where_it_does_not() {
        let mut patience = Patience::default();
        assert!(!patience.look(|| unreachable!("nothing is known to pay")));
        patience.slept(Duration::from_micros(5));
        assert_eq!(patience.0, Duration::from_micros(10));
        patience.slept(Duration::from_micros(5));
        patience.slept(Duration::from_micros(1));
        assert_eq!(patience.0, MAX);
        let mut looks = 0;
        let third = || {
            looks += 1;
            looks == 3
        };
        assert!(patience.look(third));
        assert!(!patience.look(|| false), "it ends by itself");
        patience.slept(Duration::from_micros(1));
        assert_eq!(patience.0, Duration::ZERO);
    }
}
