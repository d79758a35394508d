//! Requests that wait on purpose: for room on the host or in a quota (`enospc=wait`), or for the limits of a disk.
//!
//! ```text
//!   a request --needs something--> queue of its disk --there it is, cancelled, or the pool closes--> `Go`
//! ```
//!
//! # Rules
//! 1. No thread sleeps for a request. Who has to wait leaves what is to be done then ([`Go`]), which must be short: one thread
//!    calls it for all disks, and there is none while nobody waits.
//! 2. Of one disk, what waits for the same thing goes in the order in which it came. Nobody overtakes what waits for a limit
//!    as long as there is one; a write that finds room when it comes need not wait behind those that found none.
//! 3. Who was told to go may still find that there is no room any more; it comes again then, and waits behind the others.
//! 4. It is looked again when a setting changes, blocks are given back to the host or somebody cancels, and from time to time,
//!    since the host tells nobody that it has room.
//! 5. A request that waits holds nothing: no lock, gate, claim or thread. So nobody waits for it, either.
//! 6. A [`Cancel`] once given holds for good: who comes with it later does not wait.
//! 7. A panic on the thread that attends fails those who wait; it leaves none waiting for a thread that is gone, also none
//!    whose waiting was just over.
//!
//! # After a crash
//! Nothing of it was acknowledged.

use std::collections::{BTreeMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use super::settings::EnospcPolicy;
use super::{Head, Store};
use crate::clock::{self, Instant};
use crate::error::{Error, Kind, Result};
use crate::sync::{Condvar, Mutex};
use crate::units::DiskId;

/// How often it is looked whether the host has room, or who waits has been given up.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// What a request waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// Its turn, by the limits of the disk, to read or write so many bytes. Who is told to go has had it.
    Turn {
        /// Bytes.
        bytes: u64,
    },
    /// Room for so many bytes of new blocks.
    Room {
        /// Bytes.
        bytes: u64,
    },
    /// The server that the disk is on, which is away; of disks that have one.
    Server,
}

/// What is done when the waiting is over: `Ok` when it is worth another attempt, `Cancelled` or `ReadOnly` when it is not.
pub type Go = Box<dyn FnOnce(Result<()>) + Send>;

/// Tells whether nobody will ever take the answer of a request.
type GivenUp = Box<dyn Fn() -> bool + Send + Sync>;

/// Where requests wait.
pub trait Lobby: Send + Sync {
    /// Looks who has been called back, and has them told soon; returns at once.
    fn look(&self);
}

/// Calls back requests that wait: those that were given it, now and later.
#[derive(Default)]
pub struct Cancel {
    asked: AtomicBool,
    given_up: Option<GivenUp>,
    /// Where somebody waits or has waited with it.
    rooms: Mutex<Vec<Weak<dyn Lobby>>>,
}

impl std::fmt::Debug for Cancel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cancel").field("asked", &self.asked).finish_non_exhaustive()
    }
}

impl Cancel {
    /// Makes one that holds from when `given_up` is true, too; that is asked for now and then.
    pub fn when(given_up: impl Fn() -> bool + Send + Sync + 'static) -> Self {
        Self { given_up: Some(Box::new(given_up)), ..Self::default() }
    }

    /// Calls them back. Those that wait are told by another thread, soon.
    pub fn cancel(&self) {
        self.asked.store(true, Ordering::SeqCst);
        let rooms = self.rooms.lock().clone();
        rooms.iter().filter_map(Weak::upgrade).for_each(|room| room.look());
    }

    /// Tells whether it was given; with `ask` whether the request has been given up, too.
    pub fn holds(&self, ask: bool) -> bool {
        self.asked.load(Ordering::SeqCst) || ask && self.given_up.as_ref().is_some_and(|given_up| given_up())
    }

    /// Has it tell a room when it is given. Whoever waits there looks whether it holds after this.
    pub fn enter(&self, room: Weak<dyn Lobby>) {
        let mut rooms = self.rooms.lock();
        if !rooms.iter().any(|known| known.ptr_eq(&room)) {
            rooms.push(room);
        }
    }
}

/// How many requests of a disk wait.
#[derive(Debug, Default)]
pub struct Waiters {
    turn: AtomicUsize,
    room: AtomicUsize,
}

impl Waiters {
    /// Returns how many writes wait for room.
    pub fn for_room(&self) -> usize {
        self.room.load(Ordering::Acquire)
    }

    /// Tells whether requests wait for the limits of the disk.
    pub(super) fn for_turn(&self) -> bool {
        self.turn.load(Ordering::Acquire) > 0
    }
}

struct Waiter {
    head: Arc<Head>,
    bytes: u64,
    cancel: Arc<Cancel>,
    go: Go,
}

/// Those of one disk.
#[derive(Default)]
struct Queues {
    turn: VecDeque<Waiter>,
    room: VecDeque<Waiter>,
    /// The log says that writes wait.
    told: bool,
}

#[derive(Default)]
struct State {
    disks: BTreeMap<DiskId, Queues>,
    /// There is a thread.
    attended: bool,
    /// Something may have changed since it was last looked.
    look: bool,
    closed: bool,
    /// When it was last asked whether somebody has been given up.
    asked: Option<Instant>,
    /// When the background was last asked to make room.
    woken: Option<Instant>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

/// Those whose waiting is over.
type Over = Vec<(Go, Result<()>)>;

/// Everybody who waits in a pool.
#[derive(Default)]
pub(super) struct WaitingRoom {
    shared: Arc<Shared>,
}

impl WaitingRoom {
    /// Looks again soon whether somebody can go.
    pub(super) fn look(&self) {
        self.shared.look();
    }

    /// Ends all waiting, now and later: the pool is being closed.
    pub(super) fn close(&self) {
        let over = {
            let mut state = self.shared.state.lock();
            state.closed = true;
            state.end_all()
        };
        tell(over);
    }
}

impl Lobby for Shared {
    fn look(&self) {
        let mut state = self.state.lock();
        if !state.disks.is_empty() {
            state.look = true;
            self.changed.notify_all();
        }
    }
}

impl Shared {
    /// Fails everybody who waits: nobody attends to them any more.
    fn fail_all(&self, error: &dyn Fn() -> Error) {
        let over = {
            let mut state = self.state.lock();
            state.attended = false;
            state.end_all()
        };
        tell(over.into_iter().map(|(go, _)| (go, Err(error()))).collect());
    }
}

fn closed() -> Error {
    Error::read_only("the pool is closed")
}

impl Queues {
    /// Takes out those who were called back.
    fn call_back(&mut self, ask: bool, over: &mut Over) {
        for (queue, is_turn) in [(&mut self.turn, true), (&mut self.room, false)] {
            // Asked while they are all in the queue: what is asked is not ours, and may panic.
            let holds: Vec<bool> = queue.iter().map(|waiter| waiter.cancel.holds(ask)).collect();
            let mut holds = holds.into_iter();
            let (gone, left): (VecDeque<_>, VecDeque<_>) =
                std::mem::take(queue).into_iter().partition(|_| holds.next() == Some(true));
            *queue = left;
            for waiter in gone {
                waiter.leave(is_turn, Err(Error::new(Kind::Cancelled, "the request was called back")), over);
            }
        }
    }

    /// Lets those go whose turn it is; returns when that of the next one is.
    fn take_turns(&mut self, store: &Store, over: &mut Over) -> Option<Instant> {
        while let Some(first) = self.turn.front() {
            if let Err(when) = store.take_turn(&first.head, first.bytes) {
                return Some(when);
            }
            self.turn.pop_front().expect("looked at").leave(true, Ok(()), over);
        }
        None
    }

    /// Lets those go for whom there is room now.
    fn take_room(&mut self, store: &Store, over: &mut Over) {
        let mut bytes = 0;
        while let Some(first) = self.room.front() {
            bytes += first.bytes;
            let id = first.head.id;
            let settings = store.tables.read().disk(id).map(|row| (row.name.clone(), row.settings.enospc));
            let result = match (store.ledger.writable(), &settings) {
                (Err(error), _) => Err(error),
                // It fails then, and says why.
                (Ok(()), Err(_) | Ok((_, EnospcPolicy::Fail))) => Ok(()),
                (Ok(()), Ok((name, EnospcPolicy::Wait))) => match store.room_for(id, bytes) {
                    Ok(()) => {
                        // It asks for it itself.
                        store.not_used(id, bytes);
                        Ok(())
                    }
                    Err(why) => {
                        if !std::mem::replace(&mut self.told, true) {
                            tracing::warn!("writes of disk '{name}' wait: {why}");
                        }
                        break;
                    }
                },
            };
            self.room.pop_front().expect("looked at").leave(false, result, over);
        }
    }
}

impl Waiter {
    fn counter(&self, is_turn: bool) -> &AtomicUsize {
        if is_turn { &self.head.waiters.turn } else { &self.head.waiters.room }
    }

    fn leave(self, is_turn: bool, result: Result<()>, over: &mut Over) {
        self.counter(is_turn).fetch_sub(1, Ordering::AcqRel);
        over.push((self.go, result));
    }
}

impl State {
    /// Looks who can go; returns until when nothing will change by itself.
    fn step(&mut self, store: &Store, over: &mut Over) -> Option<Instant> {
        let now = clock::now();
        let ask = self.asked.is_none_or(|asked| now >= asked + LOOK_EVERY);
        if ask {
            self.asked = Some(now);
        }
        let mut next = now + LOOK_EVERY;
        let mut wants_room = false;
        for (id, queues) in &mut self.disks {
            queues.call_back(ask, over);
            if let Some(when) = queues.take_turns(store, over) {
                next = next.min(when);
            }
            queues.take_room(store, over);
            wants_room |= !queues.room.is_empty();
            if queues.room.is_empty() && std::mem::take(&mut queues.told) {
                let name = store.tables.read().disk(*id).map(|row| row.name.clone()).unwrap_or_default();
                tracing::info!("no write of disk '{name}' waits any more");
            }
        }
        self.disks.retain(|_, queues| !(queues.turn.is_empty() && queues.room.is_empty()));
        if wants_room && self.woken.is_none_or(|woken| now >= woken + LOOK_EVERY) {
            self.woken = Some(now);
            store.keeper.wake();
        }
        (!self.disks.is_empty()).then_some(next)
    }

    fn end_all(&mut self) -> Over {
        let mut over = Vec::new();
        for (_, queues) in std::mem::take(&mut self.disks) {
            queues.turn.into_iter().for_each(|waiter| waiter.leave(true, Err(closed()), &mut over));
            queues.room.into_iter().for_each(|waiter| waiter.leave(false, Err(closed()), &mut over));
        }
        over
    }
}

/// Tells everybody whose waiting is over; one who panics over it takes no other with it.
fn tell(over: Over) {
    for (go, result) in over {
        if catch_unwind(AssertUnwindSafe(|| go(result))).is_err() {
            tracing::error!("a request that waited failed on a mistake in this program");
        }
    }
}

/// Attends until nobody waits. After a panic those whose waiting was over are told so, and all others that they failed.
fn attend_all(shared: &Shared, store: &Weak<Store>) {
    let mut over = Over::new();
    if catch_unwind(AssertUnwindSafe(|| attend(shared, store, &mut over))).is_err() {
        tracing::error!("those who wait failed on a mistake in this program");
        tell(over);
        shared.fail_all(&|| Error::failed("the request waited, and failed on a mistake in this program"));
    }
}

/// Lets go who can, until nobody waits. `over` has those who are taken out and not told yet.
fn attend(shared: &Shared, store: &Weak<Store>, over: &mut Over) {
    loop {
        let store = store.upgrade();
        let next = {
            let mut state = shared.state.lock();
            state.look = false;
            let next = match &store {
                Some(store) => state.step(store, over),
                None => {
                    over.extend(state.end_all());
                    None
                }
            };
            state.attended = next.is_some();
            next
        };
        tell(std::mem::take(over));
        // Not while anything is locked: it may be the last one.
        drop(store);
        let Some(next) = next else { return };
        let mut state = shared.state.lock();
        if !state.look && !state.disks.is_empty() {
            let _timeout = shared.changed.wait_until(&mut state, next);
        }
    }
}

impl Store {
    /// Lets a request wait; `go` is called exactly once, from another thread or this one.
    pub fn wait(self: &Arc<Self>, head: &Arc<Head>, need: Need, cancel: &Arc<Cancel>, go: Go) {
        let shared = &self.waiting.shared;
        // Before it is asked whether it holds.
        cancel.enter(Arc::downgrade(shared) as Weak<dyn Lobby>);
        let begin = {
            let mut state = shared.state.lock();
            if state.closed {
                drop(state);
                return go(Err(closed()));
            }
            let (bytes, is_turn) = match need {
                Need::Turn { bytes } => (bytes, true),
                Need::Room { bytes } => (bytes, false),
                Need::Server => {
                    // It is here.
                    drop(state);
                    return go(Ok(()));
                }
            };
            let waiter = Waiter { head: Arc::clone(head), bytes, cancel: Arc::clone(cancel), go };
            waiter.counter(is_turn).fetch_add(1, Ordering::AcqRel);
            let queues = state.disks.entry(head.id).or_default();
            if is_turn {
                queues.turn.push_back(waiter);
            } else {
                queues.room.push_back(waiter);
            }
            state.look = true;
            !std::mem::replace(&mut state.attended, true)
        };
        if !begin {
            shared.changed.notify_all();
            return;
        }
        let (room, store) = (Arc::clone(shared), Arc::downgrade(self));
        let attend = move || attend_all(&room, &store);
        if let Err(error) = std::thread::Builder::new().name("afterimage-wait".into()).spawn(attend) {
            tracing::error!("the host has no thread for requests that wait: {error}");
            shared.fail_all(&|| Error::failed("the host has no thread for requests that wait"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::states::DiskRow;
    use super::super::tables::Edit;
    use super::super::{InitOptions, OpenOptions};
    use super::*;
    use crate::media::{Media, SimMedia};

    fn store() -> Arc<Store> {
        let media: Arc<dyn Media> = Arc::new(SimMedia::new(1));
        Store::init(&media, InitOptions { journal: 1 << 20, ballast: 4096, probe: false }).unwrap();
        let options = OpenOptions { background: false, low_water: Some(0), ballast: 4096, ..OpenOptions::default() };
        Store::open(media, options).unwrap()
    }

    fn head(store: &Arc<Store>, id: DiskId) -> Arc<Head> {
        let row = DiskRow {
            branch: crate::units::BranchId(id.0),
            ..DiskRow::fresh(id.to_string(), uuid::Uuid::nil(), 4096, 0)
        };
        Edit::new(&mut store.tables.write()).put_disk(id, row);
        store.head(id).unwrap()
    }

    /// Those whose waiting was over when it came to the panic, and those beside the one it came over, were never called.
    #[test]
    fn a_panic_while_it_is_looked_who_can_go_leaves_nobody_uncalled() {
        let store = store();
        let shared = Shared::default();
        let told = Arc::new(Mutex::new(Vec::new()));
        let cancels = [Cancel::default(), Cancel::default(), Cancel::when(|| panic!("a mistake")), Cancel::default()];
        for (number, cancel) in cancels.into_iter().enumerate() {
            // The first one can go, and does so before the others are looked at.
            let id = DiskId(if number == 0 { 1 } else { 2 });
            let into = Arc::clone(&told);
            let go: Go = Box::new(move |result| into.lock().push((number, result.map_err(|error| error.kind()))));
            let waiter = Waiter { head: head(&store, id), bytes: 4096, cancel: Arc::new(cancel), go };
            waiter.counter(false).fetch_add(1, Ordering::AcqRel);
            shared.state.lock().disks.entry(id).or_default().room.push_back(waiter);
        }
        attend_all(&shared, &Arc::downgrade(&store));
        let failed = Err(Kind::Failed);
        assert_eq!(*told.lock(), [(0, Ok(())), (1, failed), (2, failed), (3, failed)]);
        for id in [1, 2] {
            assert_eq!(store.head(DiskId(id)).unwrap().waiters.for_room(), 0);
        }
        assert!(!shared.state.lock().attended, "the next who waits begins a thread");
    }
}
