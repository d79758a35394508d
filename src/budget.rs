//! What all connections of a process may take of it together: memory, and descriptors.
//!
//! A limit for each connection bounds what one client can do, not what many can. So what is large is taken out of a pot that
//! all share, and who finds it empty waits or is refused, while what is small always goes on.
//!
//! # Rules
//! 1. What is taken is given back when its [`Share`] is dropped, whatever ended it.
//! 2. Nobody is passed by: while somebody waits ([`Share::wait`]), a pot gives nothing to who does not, and those who wait
//!    have their turn in order.
//! 3. So waiting is for who has little and will take it at once: everybody else waits for that one.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::clock::Instant;
use crate::sync::{Condvar, Mutex};

/// Memory for the requests of all connections, beyond what each may always have.
const REQUESTS: usize = 512 << 20;
/// Memory for what connections have asked about, such as changed ranges.
const ANSWERS: usize = 256 << 20;

#[derive(Debug)]
struct State {
    left: usize,
    /// Who waits, in order.
    waiting: VecDeque<u64>,
    next: u64,
}

/// A number of units, shared by all who take of them.
#[derive(Debug)]
pub struct Pot {
    state: Mutex<State>,
    changed: Condvar,
    /// How many wait; asked for often, and without the lock.
    wanted: AtomicUsize,
}

/// What somebody has taken of a pot.
#[derive(Debug)]
pub struct Share {
    pot: Arc<Pot>,
    units: usize,
    /// Its place among those who wait.
    turn: Option<u64>,
}

impl Pot {
    /// Makes one of so many units.
    #[must_use]
    pub fn new(units: usize) -> Arc<Self> {
        let state = State { left: units, waiting: VecDeque::new(), next: 0 };
        Arc::new(Self { state: Mutex::new(state), changed: Condvar::new(), wanted: AtomicUsize::new(0) })
    }

    /// Takes so many units, or none if there are not so many.
    #[must_use]
    pub fn take(self: &Arc<Self>, units: usize) -> Option<Share> {
        let mut share = self.nothing();
        share.grow(units).then_some(share)
    }

    /// Returns a share of no units.
    #[must_use]
    pub fn nothing(self: &Arc<Self>) -> Share {
        Share { pot: Arc::clone(self), units: 0, turn: None }
    }

    /// Returns how many units are left.
    #[must_use]
    pub fn left(&self) -> usize {
        self.state.lock().left
    }

    /// Tells whether somebody waits.
    #[must_use]
    pub fn is_wanted(&self) -> bool {
        self.wanted.load(Ordering::Relaxed) > 0
    }
}

impl Share {
    /// Returns how many units there are in it.
    #[must_use]
    pub fn units(&self) -> usize {
        self.units
    }

    /// Takes more, until there are `units` in it; false when there are not so many left, or others wait, and then it takes
    /// none.
    #[must_use]
    pub fn grow(&mut self, units: usize) -> bool {
        if self.units >= units && self.turn.is_none() {
            return true;
        }
        let pot = Arc::clone(&self.pot);
        let mut state = pot.state.lock();
        let others = state.waiting.front().is_some_and(|front| Some(*front) != self.turn);
        if self.units < units && others {
            return false;
        }
        self.take(&mut state, units)
    }

    /// Takes them if they are there, and gives up its turn then.
    fn take(&mut self, state: &mut State, units: usize) -> bool {
        let more = units.saturating_sub(self.units);
        if state.left < more {
            return false;
        }
        state.left -= more;
        self.units += more;
        self.leave(state);
        true
    }

    /// Waits no more.
    fn leave(&mut self, state: &mut State) {
        if let Some(turn) = self.turn.take() {
            state.waiting.retain(|other| *other != turn);
            self.pot.wanted.fetch_sub(1, Ordering::Relaxed);
            // Somebody else is first now.
            self.pot.changed.notify_all();
        }
    }

    /// Gives back what is beyond `units`.
    pub fn shrink(&mut self, units: usize) {
        let less = self.units.saturating_sub(units);
        if less == 0 {
            return;
        }
        self.units = units;
        self.pot.state.lock().left += less;
        self.pot.changed.notify_all();
    }

    /// As [`Share::grow`], and waits for it. When the deadline comes first it keeps its turn, and the next call goes on.
    #[must_use]
    pub fn wait(&mut self, units: usize, deadline: Instant) -> bool {
        let pot = Arc::clone(&self.pot);
        let mut state = pot.state.lock();
        let turn = self.turn.unwrap_or_else(|| {
            let inner = &mut *state;
            inner.next += 1;
            inner.waiting.push_back(inner.next);
            pot.wanted.fetch_add(1, Ordering::Relaxed);
            inner.next
        });
        self.turn = Some(turn);
        let mut late = false;
        loop {
            if state.waiting.front() == Some(&turn) && self.take(&mut state, units) {
                return true;
            }
            if late {
                return false;
            }
            late = pot.changed.wait_until(&mut state, deadline).timed_out();
        }
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let pot = Arc::clone(&self.pot);
        self.leave(&mut pot.state.lock());
        self.shrink(0);
    }
}

/// The pots of a process.
#[derive(Debug, Clone)]
pub struct Budget {
    /// Bytes for requests.
    pub requests: Arc<Pot>,
    /// Bytes for what connections keep of what they have asked about.
    pub answers: Arc<Pot>,
    /// Descriptors.
    pub descriptors: Arc<Pot>,
}

impl Budget {
    /// Makes them for a process whose connections may have so many descriptors.
    #[must_use]
    pub fn new(descriptors: usize) -> Self {
        Self { requests: Pot::new(REQUESTS), answers: Pot::new(ANSWERS), descriptors: Pot::new(descriptors) }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::clock;

    fn soon() -> Instant {
        clock::now() + Duration::from_millis(5)
    }

    fn late() -> Instant {
        clock::now() + Duration::from_secs(60)
    }

    #[test]
    fn what_is_taken_is_missing_until_it_is_given_back() {
        let pot = Pot::new(10);
        let mut first = pot.take(4).unwrap();
        let second = pot.take(6).unwrap();
        assert!(pot.left() == 0 && pot.take(1).is_none() && pot.take(0).is_some());
        assert!(!first.grow(5) && first.grow(3) && first.units() == 4);
        first.shrink(1);
        assert!(first.grow(2) && pot.left() == 2);
        drop(second);
        assert!(first.grow(10) && !first.grow(11) && pot.left() == 0);
        assert!(!pot.nothing().wait(1, soon()) && !pot.is_wanted());
        drop(first);
        assert_eq!(pot.left(), 10);
    }

    #[test]
    fn who_waits_for_much_is_not_passed_by() {
        let pot = Pot::new(10);
        let half = pot.take(5).unwrap();
        std::thread::scope(|scope| {
            let large = scope.spawn(|| pot.nothing().wait(10, late()));
            while !pot.is_wanted() {
                std::thread::yield_now();
            }
            assert!(pot.take(1).is_none(), "there are five, and somebody waits for ten");
            let small = scope.spawn(|| pot.nothing().wait(1, late()));
            std::thread::yield_now();
            drop(half);
            assert!(large.join().unwrap() && small.join().unwrap());
        });
        assert_eq!(pot.left(), 10);
        // Who comes back after its deadline has kept its turn, and who does not come back holds up nobody.
        let all = pot.take(10).unwrap();
        let (mut first, mut second) = (pot.nothing(), pot.nothing());
        assert!(!first.wait(8, soon()) && !second.wait(2, soon()));
        drop(all);
        assert!(!second.grow(2) && first.grow(8) && second.grow(2) && !pot.is_wanted());
        drop((first, second));
        let all = pot.take(10).unwrap();
        let (mut first, mut second) = (pot.nothing(), pot.nothing());
        assert!(!first.wait(8, soon()) && !second.wait(2, soon()));
        drop((all, first));
        assert!(second.wait(2, late()));
    }
}
