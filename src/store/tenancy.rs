//! Who uses a disk: the one that writes to it, those it is attached to, and whether somebody else has cached some of it.
//!
//! # Rules
//! 1. One holder at a time writes. It may take the lease several times, and lets go when the last of them is dropped.
//! 2. Who wants a lease that another one has waits for it a little: [`GRACE`], for holders of which it is not known
//!    whether they are about to let go, and [`CLOSING_TIME`] once all its parts said that they are being closed.
//! 3. A reserved lease goes only to the holder it is reserved for, until its time is over. In a process in which that one
//!    cannot come, because nothing is served there, it has no end.
//! 4. The mount's pages are kept in step by the kernel only with what is written through the mount. Another holder is
//!    *foreign*: the kernel forgets all pages of the disk before it may write, and after each of its writes if
//!    the mount has read any since ([`Tenancy::note_reader`], [`Tenancy::announce`]).
//! 5. Who comes back, and may have lost what another process had acknowledged to it, is told once: see `unflushed`.
//!
//! # Why nothing is missed
//! A reader sets `watched` before it reads, a foreign writer looks at it after it has written and before it answers; both
//! sequentially consistent. So either the reader sees the new bytes or the writer sees the reader. A reader that was too
//! early to know of the foreign holder has its page locked in the kernel already, and rule 4 drops that one too.
//!
//! # After a crash
//! Nothing of this is stored. Who has to have a lease again after a restart has it reserved by whoever opens the pool.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::clock::{self, Instant};
use crate::error::{Error, Result};
use crate::sync::{Condvar, Mutex};

/// How long one waits for a lease that may or may not be about to fall: processes that end close their files, and peers
/// their connections, a moment after they are gone.
pub const GRACE: Duration = Duration::from_millis(100);

/// How long one waits for a lease whose holder has begun to let go. (The kernel sends the release of a file late.)
pub const CLOSING_TIME: Duration = Duration::from_secs(2);

#[derive(Debug, Default)]
struct State {
    holder: Option<String>,
    /// How many times the holder has the lease.
    parts: usize,
    /// How many of them said that they are being closed, and when the last one did.
    closing: usize,
    closing_since: Option<Instant>,
    /// Whom the lease is kept for, and until when.
    reserved: Option<(String, Option<Instant>)>,
    /// Who has to be told that acknowledged changes may be lost, and why; each once.
    losses: Vec<(String, String)>,
    /// What the disk is attached to.
    attached: Vec<String>,
    /// It is being removed, and is attached to nothing meanwhile.
    removing: bool,
}

/// Who uses a disk.
#[derive(Debug, Default)]
pub struct Tenancy {
    state: Mutex<State>,
    vacated: Condvar,
    /// Held while a foreign holder takes over, until the kernel has forgotten what it had.
    taking_over: Mutex<()>,
    foreign: AtomicBool,
    /// One of `State::losses` is of the holder.
    owes_loss: AtomicBool,
    watched: AtomicBool,
    announcing: AtomicBool,
    announcement: Mutex<()>,
}

/// A disk is being removed, until this is dropped: by then it is marked as gone, or stays.
#[derive(Debug)]
pub struct Removal<'a>(&'a Tenancy);

impl Drop for Removal<'_> {
    fn drop(&mut self) {
        self.0.state.lock().removing = false;
    }
}

/// Why a lease cannot be had.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refusal {
    /// Another one writes.
    Held(String),
    /// It waits for one that has to come back.
    Reserved(String, Duration),
    /// It waits for one that can come back only when a server runs.
    Kept(String),
}

impl Refusal {
    /// Returns the error for the disk `name`.
    #[must_use]
    pub fn error(self, name: &str) -> Error {
        match self {
            Self::Held(by) => {
                Error::busy(format!("disk '{name}' is open for writing by {by}")).hint("close it there first")
            }
            Self::Reserved(by, left) => Error::busy(format!(
                "disk '{name}' is kept for {by}, which wrote to it before the server was restarted"
            ))
            .hint(format!("it is free in {} s unless that comes back", left.as_secs() + 1)),
            Self::Kept(by) => {
                Error::busy(format!("disk '{name}' is kept for {by}, which the next server serves again"))
                    .hint("end that with 'afterimage detach', or 'vm stop' for a machine, or start the server, which knows who writes")
            }
        }
    }
}

impl State {
    fn refusal(&self, holder: Option<&str>) -> Option<Refusal> {
        match (&self.holder, &self.reserved) {
            (Some(other), _) if Some(other.as_str()) != holder => Some(Refusal::Held(other.clone())),
            (None, Some((other, None))) if Some(other.as_str()) != holder => Some(Refusal::Kept(other.clone())),
            (None, Some((other, Some(until)))) if Some(other.as_str()) != holder => {
                let left = until.saturating_duration_since(clock::now());
                (!left.is_zero()).then(|| Refusal::Reserved(other.clone(), left))
            }
            _ => None,
        }
    }

    /// Finds what a holder has to be told.
    fn loss_of(&self, holder: &str) -> Option<usize> {
        self.losses.iter().position(|(of, _)| of == holder)
    }

    /// Until when it may be that the lease falls, for one who came at `begun`.
    fn hope(&self, begun: Instant) -> Instant {
        let closing = self.closing_since.filter(|_| self.closing >= self.parts).map(|since| since + CLOSING_TIME);
        closing.map_or(begun + GRACE, |until| until.max(begun + GRACE))
    }
}

impl Tenancy {
    /// Returns who writes.
    pub fn holder(&self) -> Option<String> {
        self.state.lock().holder.clone()
    }

    /// Returns whom the lease is kept for.
    pub fn reserved(&self) -> Option<String> {
        let state = self.state.lock();
        let holds = |(_, until): &&(String, Option<Instant>)| until.is_none_or(|until| until > clock::now());
        state.reserved.as_ref().filter(holds).map(|(holder, _)| holder.clone())
    }

    /// Tells whether nobody else can have changed the disk since `holder` had it: it has it, or it is kept for it.
    pub fn remembers(&self, holder: &str) -> bool {
        let state = self.state.lock();
        let kept = state
            .reserved
            .as_ref()
            .is_some_and(|(of, until)| of == holder && until.is_none_or(|until| until > clock::now()));
        match &state.holder {
            Some(has) => has == holder,
            None => kept,
        }
    }

    /// Waits until the lease can be had by `holder`, or by anybody for `None`. It is not taken.
    ///
    /// # Errors
    /// Why it cannot be had.
    pub fn wait_vacant(&self, holder: Option<&str>) -> Result<(), Refusal> {
        self.vacant(&mut self.state.lock(), holder)
    }

    fn vacant(&self, state: &mut crate::sync::MutexGuard<'_, State>, holder: Option<&str>) -> Result<(), Refusal> {
        let begun = clock::now();
        loop {
            let refusal = match state.refusal(holder) {
                None => return Ok(()),
                Some(held @ Refusal::Held(_)) => held,
                Some(reserved) => return Err(reserved),
            };
            let until = state.hope(begun);
            if clock::now() >= until {
                return Err(refusal);
            }
            // Whether it timed out is seen above: `until` may have moved.
            self.vacated.wait_until(state, until);
        }
    }

    /// Tells why `holder` would not get the lease now, without waiting.
    pub fn refusal(&self, holder: Option<&str>) -> Option<Refusal> {
        self.state.lock().refusal(holder)
    }

    /// Takes the lease for `holder`, waiting as rule 2 says. `before_writes` is called before a foreign holder that did not
    /// have it may write.
    ///
    /// # Errors
    /// Why it cannot be had.
    pub fn take(&self, holder: &str, foreign: bool, before_writes: impl FnOnce()) -> Result<(), Refusal> {
        // So that a second part of the same holder, too, writes only after that.
        let _turn = foreign.then(|| self.taking_over.lock());
        let first = {
            let mut state = self.state.lock();
            self.vacant(&mut state, Some(holder))?;
            state.parts += 1;
            state.reserved = None;
            let first = state.holder.is_none();
            state.holder = Some(holder.to_owned());
            self.foreign.store(foreign, Ordering::SeqCst);
            self.owes_loss.store(state.loss_of(holder).is_some(), Ordering::SeqCst);
            first
        };
        if foreign && first {
            before_writes();
        }
        Ok(())
    }

    /// Ends one part of the lease; `closing` when it had said that it is being closed.
    pub fn let_go(&self, closing: bool) {
        let mut state = self.state.lock();
        state.parts -= 1;
        state.closing -= usize::from(closing);
        if state.parts == 0 {
            state.holder = None;
            state.closing_since = None;
            self.foreign.store(false, Ordering::SeqCst);
            self.owes_loss.store(false, Ordering::SeqCst);
            self.watched.store(false, Ordering::SeqCst);
        }
        drop(state);
        self.vacated.notify_all();
    }

    /// Notes that a part of the lease is being closed; `first` when it had not said so before.
    pub fn closing(&self, first: bool) {
        let mut state = self.state.lock();
        state.closing += usize::from(first);
        state.closing_since = Some(clock::now());
        drop(state);
        self.vacated.notify_all();
    }

    /// Keeps the lease for `holder`, which has had it before, for so long; without end for `None`. Nothing when somebody
    /// has it.
    pub fn reserve(&self, holder: &str, time: Option<Duration>) {
        let mut state = self.state.lock();
        if state.holder.is_none() {
            state.reserved = Some((holder.to_owned(), time.map(|time| clock::now() + time)));
        }
    }

    /// Ends what [`Tenancy::reserve`] began.
    pub fn unreserve(&self, holder: &str) {
        let mut state = self.state.lock();
        state.reserved = state.reserved.take().filter(|(other, _)| other != holder);
    }

    /// Tells whether another one than the mount writes.
    pub fn is_foreign(&self) -> bool {
        self.foreign.load(Ordering::SeqCst)
    }

    /// Notes that `holder`, if it comes back, has to be told that something it had written may be lost, and why.
    pub fn note_loss(&self, holder: &str, why: String) {
        let mut state = self.state.lock();
        state.losses.retain(|(of, _)| of != holder);
        state.losses.push((holder.to_owned(), why));
    }

    /// Tells whether anybody has still to be told of a loss, whether it has the lease, is awaited or has let go.
    pub fn owes_loss(&self) -> bool {
        !self.state.lock().losses.is_empty()
    }

    /// Tells whether `holder` has still to be told of a loss.
    pub fn owes_loss_to(&self, holder: &str) -> bool {
        self.state.lock().loss_of(holder).is_some()
    }

    /// Ends what [`Tenancy::note_loss`] began, for a holder that begins anew.
    pub fn forgive_loss(&self, holder: &str) {
        let mut state = self.state.lock();
        state.losses.retain(|(of, _)| of != holder);
        if state.holder.as_deref() == Some(holder) {
            self.owes_loss.store(false, Ordering::SeqCst);
        }
    }

    /// Returns what the holder has to be told, once.
    pub fn tell_loss(&self) -> Option<String> {
        if !self.owes_loss.load(Ordering::SeqCst) {
            return None;
        }
        let mut state = self.state.lock();
        let own = state.holder.as_ref().and_then(|holder| state.loss_of(holder))?;
        self.owes_loss.store(false, Ordering::SeqCst);
        Some(state.losses.swap_remove(own).1)
    }

    /// Notes what the disk is attached to; tells whether it is, which it is not while it is being removed.
    #[must_use]
    pub fn attach(&self, what: &str) -> bool {
        let mut state = self.state.lock();
        if !state.removing {
            state.attached.push(what.to_owned());
        }
        !state.removing
    }

    /// Lets nothing be attached until the answer is dropped.
    ///
    /// # Errors
    /// What the disk is attached to.
    pub fn begin_removal(&self) -> Result<Removal<'_>, String> {
        let mut state = self.state.lock();
        match state.attached.first() {
            Some(what) => Err(what.clone()),
            None => {
                state.removing = true;
                Ok(Removal(self))
            }
        }
    }

    /// Ends what [`Tenancy::attach`] began.
    pub fn detach(&self, what: &str) {
        let mut state = self.state.lock();
        if let Some(at) = state.attached.iter().position(|other| other == what) {
            state.attached.swap_remove(at);
        }
    }

    /// Returns something that the disk is attached to.
    pub fn attached(&self) -> Option<String> {
        self.state.lock().attached.first().cloned()
    }

    /// Called before bytes are read that may be cached by a mount.
    pub fn note_reader(&self) {
        if self.foreign.load(Ordering::SeqCst) {
            self.watched.store(true, Ordering::SeqCst);
        }
    }

    /// Tells whether [`Tenancy::announce`] would call anything.
    pub fn is_watched(&self) -> bool {
        self.watched.load(Ordering::SeqCst) || self.announcing.load(Ordering::SeqCst)
    }

    /// Called after a change and before it is acknowledged, without any lock: calls `tell` if a reader was noted since
    /// the last time, and returns when no such call is under way any more.
    pub fn announce(&self, tell: impl FnOnce()) {
        if !self.is_watched() {
            return;
        }
        let _turn = self.announcement.lock();
        // First, so that another writer that finds `watched` gone waits here until the kernel was told.
        self.announcing.store(true, Ordering::SeqCst);
        if self.watched.swap(false, Ordering::SeqCst) {
            tell();
        }
        self.announcing.store(false, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::AtomicUsize;

    use super::*;

    fn held(by: &str) -> Refusal {
        Refusal::Held(by.to_owned())
    }

    #[test]
    fn one_holder_has_it_as_often_as_it_likes_and_another_one_after_the_last() {
        let tenancy = Tenancy::default();
        tenancy.take("a", false, || {}).unwrap();
        tenancy.take("a", false, || {}).unwrap();
        assert_eq!(tenancy.take("b", true, || {}), Err(held("a")));
        tenancy.let_go(false);
        assert_eq!(tenancy.wait_vacant(None), Err(held("a")));
        tenancy.let_go(false);
        tenancy.take("b", true, || {}).unwrap();
        assert_eq!(tenancy.holder().as_deref(), Some("b"));
    }

    #[test]
    fn a_lease_that_is_being_closed_is_waited_for() {
        let tenancy = Arc::new(Tenancy::default());
        tenancy.take("a", false, || {}).unwrap();
        tenancy.closing(true);
        let closer = std::thread::spawn({
            let tenancy = Arc::clone(&tenancy);
            move || {
                std::thread::sleep(GRACE * 3);
                tenancy.let_go(true);
            }
        });
        tenancy.take("b", true, || {}).unwrap();
        closer.join().unwrap();
    }

    #[test]
    fn one_part_that_stays_open_makes_the_others_not_worth_waiting_for() {
        let tenancy = Tenancy::default();
        tenancy.take("a", false, || {}).unwrap();
        tenancy.take("a", false, || {}).unwrap();
        tenancy.closing(true);
        let begun = clock::now();
        assert_eq!(tenancy.state.lock().hope(begun), begun + GRACE);
        tenancy.closing(true);
        assert!(tenancy.state.lock().hope(begun) >= begun + CLOSING_TIME);
    }

    #[test]
    fn a_reserved_lease_goes_to_its_holder_alone_until_its_time_is_over() {
        let tenancy = Tenancy::default();
        tenancy.reserve("a", Some(Duration::from_secs(60)));
        assert!(matches!(tenancy.take("b", true, || {}), Err(Refusal::Reserved(by, _)) if by == "a"));
        assert!(tenancy.wait_vacant(None).is_err());
        assert_eq!(tenancy.reserved().as_deref(), Some("a"));
        assert!(tenancy.remembers("a") && !tenancy.remembers("b"));
        tenancy.take("a", true, || {}).unwrap();
        assert!(tenancy.remembers("a"));
        tenancy.let_go(false);
        assert!(!tenancy.remembers("a"), "it has let go");
        tenancy.take("b", true, || {}).unwrap();
        tenancy.reserve("a", Some(Duration::from_secs(60)));
        assert_eq!(tenancy.reserved(), None, "somebody has it");
        tenancy.let_go(false);
        tenancy.reserve("a", Some(Duration::ZERO));
        tenancy.take("b", true, || {}).unwrap();
        tenancy.let_go(false);
        tenancy.reserve("a", Some(Duration::from_secs(60)));
        tenancy.unreserve("b");
        assert!(tenancy.reserved().is_some());
        tenancy.unreserve("a");
        tenancy.take("b", true, || {}).unwrap();
        tenancy.let_go(false);
        tenancy.reserve("a", None);
        assert_eq!(tenancy.take("b", true, || {}), Err(Refusal::Kept("a".to_owned())));
        assert_eq!(tenancy.reserved().as_deref(), Some("a"));
        tenancy.take("a", true, || {}).unwrap();
    }

    /// Who attached between the look of a removal and its mark was served a disk that was gone.
    #[test]
    fn a_disk_is_attached_or_removed_and_never_both() {
        let tenancy = Tenancy::default();
        assert!(tenancy.attach("a"));
        assert_eq!(tenancy.begin_removal().unwrap_err(), "a");
        tenancy.detach("a");
        let removal = tenancy.begin_removal().unwrap();
        assert!(!tenancy.attach("b"));
        assert_eq!(tenancy.attached(), None);
        drop(removal);
        assert!(tenancy.attach("b"));
    }

    #[test]
    fn who_begins_anew_is_told_of_no_loss_and_who_comes_back_is() {
        let tenancy = Tenancy::default();
        tenancy.note_loss("a", "a kill".into());
        tenancy.forgive_loss("b");
        tenancy.take("a", true, || {}).unwrap();
        assert_eq!(tenancy.tell_loss().as_deref(), Some("a kill"));
        tenancy.note_loss("a", "a kill".into());
        tenancy.note_loss("c", "another".into());
        tenancy.forgive_loss("a");
        assert!(tenancy.owes_loss_to("c"), "that of another one stays");
        tenancy.forgive_loss("c");
        assert!(!tenancy.owes_loss_to("a") && !tenancy.owes_loss());
        assert_eq!(tenancy.tell_loss(), None);
    }

    #[test]
    fn a_foreign_writer_tells_once_for_all_that_was_read_before() {
        let tenancy = Tenancy::default();
        let told = AtomicUsize::new(0);
        let tell = || {
            told.fetch_add(1, Ordering::SeqCst);
        };
        tenancy.note_reader();
        tenancy.announce(tell);
        assert_eq!(told.load(Ordering::SeqCst), 0, "nobody foreign writes");
        tenancy.take("nbd", true, tell).unwrap();
        tenancy.take("nbd", true, tell).unwrap();
        assert_eq!(told.load(Ordering::SeqCst), 1, "when it took over");
        tenancy.announce(tell);
        assert_eq!(told.load(Ordering::SeqCst), 1, "nobody has read since");
        tenancy.note_reader();
        tenancy.note_reader();
        tenancy.announce(tell);
        tenancy.announce(tell);
        assert_eq!(told.load(Ordering::SeqCst), 2);
    }
}
