//! Requests under way: each is given to the engine in parts and answered when the last part is done.
//!
//! # Rules
//! 1. A part of a read or write has at most [`PART`] bytes, and of one request few are under way at a time: so a request of
//!    any length is done in memory of a fixed size.
//! 2. The data of a part that is written is copied out of the guest when the part is begun, once; the guest may change it
//!    after. What is read is copied into the guest when it is there.
//! 3. After a part has failed no other of its request is begun.
//! 4. All memory beyond [`OWN`] comes out of a pot that all clients of the process share, also what is only kept for the next
//!    request. A part for which there is none waits until another one of its queue has ended; a queue without any can
//!    always begin one, so none ever waits for other clients. When others wait for the pot ([`crate::budget`]), what is only kept
//!    is given up with the next part that ends, and by who rests ([`Flights::rest`]).
//! 5. A request that was called back while it waited for room or for a limit is not answered: whoever uses the queue next has
//!    to begin it again, all of it ([`Flights::left`]). So it is with one of which parts were not begun when the device is
//!    served no more, also if they only waited for memory.

use std::collections::VecDeque;
use std::sync::Arc;

use super::request::{Request, SERIAL, Status, What};
use super::service::{Memory, Target};
use crate::budget::Share;
use crate::disk::engine::{Done, Op, Request as Part};
use crate::disk::{Buffers, Engine};
use crate::error::{Kind, Result};
use crate::store::Cancel;
use crate::units::to_usize;

/// Bytes of a part at most; the requests of most guests are no longer.
pub(super) const PART: usize = 1 << 20;
/// Parts of one request that are under way at a time.
const PARTS_MAX: usize = 4;
/// Bytes of memory that a queue may always have: those of the longest part.
const OWN: usize = PART;
/// Bytes of the shared memory that a queue keeps although it does not need them now.
const SLACK: usize = 4 << 20;

/// Which part of which request.
#[derive(Debug, Clone, Copy)]
pub(super) struct Tag {
    slot: usize,
    /// Where the part begins in the data of its request.
    from: usize,
}

#[derive(Debug)]
struct Flight {
    head: u16,
    request: Request,
    /// Bytes of data, or spans, that were begun.
    begun: usize,
    /// Parts that are under way.
    left: usize,
    failed: bool,
    /// A part was called back before it was done.
    called_back: bool,
    /// Its next part waits for memory.
    waits: bool,
}

impl Flight {
    /// Returns how many bytes of memory its next part needs; 0 if there is none to be begun, or it needs none.
    fn need(&self) -> usize {
        let over = self.failed || self.called_back || self.left >= PARTS_MAX || !moves(&self.request.what);
        if over { 0 } else { (self.request.data.len() - self.begun).min(PART) }
    }

    /// Tells whether there is a part that was not begun.
    fn has_more(&self) -> bool {
        match &self.request.what {
            What::Read(_) | What::Write(_) => self.begun < self.request.data.len(),
            What::Flush => self.begun == 0,
            What::Discard(spans) | What::WriteZeroes(spans) => self.begun < spans.len(),
            What::Serial | What::Refused(_) => false,
        }
    }
}

/// The requests of one queue that are under way.
pub(super) struct Flights {
    target: Arc<Target>,
    engine: Engine<Tag>,
    buffers: Buffers,
    flights: Vec<Option<Flight>>,
    free: Vec<usize>,
    /// Whether every write is flushed before it is answered.
    durable: bool,
    /// Heads of what is answered, and how many bytes were written.
    answered: Vec<(u16, u32)>,
    /// Heads of what was called back.
    left: Vec<u16>,
    /// Slots of those whose next part waits for memory, in order.
    waiting: VecDeque<usize>,
    /// What they have of the memory that all share.
    share: Share,
}

impl Flights {
    /// Makes none yet; `cancel` calls back what waits on purpose.
    pub(super) fn new(target: Arc<Target>, durable: bool, cancel: Arc<Cancel>) -> Result<Self> {
        Ok(Self {
            engine: Engine::new("disk-work", target.device.threads(), cancel)?,
            share: target.requests.nothing(),
            target,
            buffers: Buffers::default(),
            flights: Vec::new(),
            free: Vec::new(),
            durable,
            answered: Vec::new(),
            left: Vec::new(),
            waiting: VecDeque::new(),
        })
    }

    /// Returns how many requests are under way.
    pub(super) fn count(&self) -> usize {
        self.flights.len() - self.free.len()
    }

    /// Returns how much memory they have.
    pub(super) fn bytes(&self) -> usize {
        self.buffers.lent()
    }

    /// Tells whether one of them waits for memory.
    pub(super) fn wait_for_memory(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Gives up all memory that is only kept.
    pub(super) fn rest(&mut self) {
        self.buffers.trim();
        self.share.shrink(self.shared(0));
    }

    /// Returns how much of the shared memory is needed for all there is and `more` bytes.
    fn shared(&self, more: usize) -> usize {
        (self.buffers.total() + more).saturating_sub(OWN)
    }

    /// Sees to it that there is memory for a part of so many bytes; false when it has to wait for another part to end.
    fn make_room(&mut self, len: usize) -> bool {
        if len == 0 {
            return true;
        }
        self.buffers.save(false);
        if self.share.grow(self.shared(self.buffers.cost(len))) {
            return true;
        }
        self.buffers.trim();
        self.buffers.save(true);
        let there = self.share.grow(self.shared(self.buffers.cost(len)));
        assert!(there || self.buffers.lent() > 0, "a part fits into what a queue may always have");
        there
    }

    /// Gives back what is not needed.
    fn settle(&mut self) {
        let wanted = self.share.units() > 0 && self.target.requests.is_wanted();
        if wanted {
            self.buffers.trim();
        }
        let needed = self.shared(0);
        if self.share.units() > needed + if wanted { 0 } else { SLACK } {
            self.share.shrink(needed);
        }
    }

    pub(super) fn engine(&mut self) -> &mut Engine<Tag> {
        &mut self.engine
    }

    /// Returns what is answered and was not asked for yet.
    pub(super) fn answered(&mut self) -> &mut Vec<(u16, u32)> {
        &mut self.answered
    }

    /// Returns how many those are.
    pub(super) fn answered_len(&self) -> usize {
        self.answered.len()
    }

    /// Returns the heads of what was called back and is not answered.
    pub(super) fn left(&mut self) -> Vec<u16> {
        std::mem::take(&mut self.left)
    }

    /// Begins a request. It goes to the host when the engine is next asked to submit or wait.
    pub(super) fn begin(&mut self, memory: &dyn Memory, head: u16, request: Request) {
        match request.what {
            What::Refused(status) => return self.answer(memory, head, &request, status, 0),
            What::Serial => {
                let len = request.data.len().min(SERIAL);
                let told = request.data.copy_in(memory.map(), 0, &self.target.serial()[..len]);
                let (status, len) = if told { (Status::Ok, len) } else { (Status::Failed, 0) };
                return self.answer(memory, head, &request, status, len);
            }
            _ => {}
        }
        let flight = Flight { head, request, begun: 0, left: 0, failed: false, called_back: false, waits: false };
        let slot = self.free.pop().unwrap_or(self.flights.len());
        if slot == self.flights.len() {
            self.flights.push(None);
        }
        self.go_on(memory, slot, flight);
    }

    /// Begins as many parts as may be under way and have memory; answers the request if there is none.
    fn go_on(&mut self, memory: &dyn Memory, slot: usize, mut flight: Flight) {
        while flight.left < PARTS_MAX && !flight.failed && !flight.called_back {
            if self.target.has_ended() && flight.has_more() {
                flight.called_back = true;
                break;
            }
            if !self.make_room(flight.need()) {
                flight.waits = true;
                self.waiting.push_back(slot);
                break;
            }
            let Some(part) = self.next_part(memory, slot, &mut flight) else { break };
            flight.left += 1;
            self.engine.begin(part);
        }
        if flight.left > 0 || flight.waits {
            self.flights[slot] = Some(flight);
            return;
        }
        self.free.push(slot);
        let Flight { head, request, failed, called_back, .. } = flight;
        if called_back && !failed {
            return self.left.push(head);
        }
        let status = if failed { Status::Failed } else { Status::Ok };
        let read = if matches!(request.what, What::Read(_)) && !failed { request.data.len() } else { 0 };
        self.answer(memory, head, &request, status, read);
    }

    /// Makes the next part of a request; `None` when there is none, or it has failed.
    fn next_part(&mut self, memory: &dyn Memory, slot: usize, flight: &mut Flight) -> Option<Part<Tag>> {
        let durable = self.durable;
        let from = flight.begun;
        let left = flight.request.data.len() - if moves(&flight.request.what) { from } else { 0 };
        let (op, offset, len) = match &flight.request.what {
            What::Read(offset) if left > 0 => (Op::Read, offset + from as u64, left.min(PART) as u64),
            What::Write(offset) if left > 0 => (Op::Write { durable }, offset + from as u64, left.min(PART) as u64),
            What::Flush if from == 0 => (Op::Flush, 0, 0),
            What::Discard(spans) => spans.get(from).map(|span| (Op::Discard, span.offset, span.len))?,
            What::WriteZeroes(spans) => {
                spans.get(from).map(|span| (Op::WriteZeroes { durable }, span.offset, span.len))?
            }
            _ => return None,
        };
        let mut pages = None;
        if moves(&flight.request.what) {
            let len = to_usize(len);
            let Ok(mut memory_of_part) = self.buffers.take(len) else {
                tracing::error!("the host has no memory for a request of a guest");
                flight.failed = true;
                return None;
            };
            let write = matches!(op, Op::Write { .. });
            // What a front end has taken away meanwhile is not what the guest wrote.
            let copied = |into: &mut [u8]| flight.request.data.copy_out(memory.map(), from, into) && !memory.is_lost();
            if write && !copied(&mut memory_of_part[..len]) {
                self.buffers.give_back(memory_of_part);
                flight.failed = true;
                return None;
            }
            flight.begun += len;
            pages = Some(memory_of_part);
        } else {
            flight.begun += 1;
        }
        let device = Arc::clone(&self.target.device);
        Some(Part { op, device, offset, len, pages, at: 0, tag: Tag { slot, from } })
    }

    /// Takes what the engine has finished and goes on with it; tells whether there was anything.
    pub(super) fn collect(&mut self, memory: &dyn Memory) -> bool {
        let mut any = false;
        while let Some(Done { request: part, result }) = self.engine.finished() {
            any = true;
            let Tag { slot, from } = part.tag;
            let mut flight = self.flights[slot].take().expect("a part belongs to a request under way");
            flight.left -= 1;
            if result.as_ref().is_err_and(|error| error.kind() == Kind::Cancelled) {
                flight.called_back = true;
            } else if let Err(error) = result {
                self.target.failed(&error);
                flight.failed = true;
            }
            if let Some(pages) = part.pages {
                if part.op == Op::Read && !flight.failed && !flight.called_back {
                    flight.failed = !flight.request.data.copy_in(memory.map(), from, &pages[..to_usize(part.len)]);
                }
                self.buffers.give_back(pages);
            }
            if flight.waits {
                self.flights[slot] = Some(flight);
            } else {
                self.go_on(memory, slot, flight);
            }
        }
        self.go_on_with_waiting(memory);
        self.settle();
        any
    }

    /// Goes on with what waits for memory, in order, as far as there is some. None of it waits when the device is served no
    /// more.
    fn go_on_with_waiting(&mut self, memory: &dyn Memory) {
        while let Some(slot) = self.waiting.front().copied() {
            let flight = self.flights[slot].as_ref().expect("who waits is under way");
            if !self.target.has_ended() && !self.make_room(flight.need()) {
                return;
            }
            self.waiting.pop_front();
            let mut flight = self.flights[slot].take().expect("it was there just now");
            flight.waits = false;
            self.go_on(memory, slot, flight);
        }
    }

    fn answer(&mut self, memory: &dyn Memory, head: u16, request: &Request, status: Status, read: usize) {
        self.answered.push((head, request.answer(memory.map(), status, read)));
    }
}

/// Tells whether a request has data of its own.
fn moves(what: &What) -> bool {
    matches!(what, What::Read(_) | What::Write(_))
}
