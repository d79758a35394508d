//! Requests under way: each is given to the engine in parts and answered when the last part is done.
//!
//! # Rules
//! 1. A part of a read or write has at most [`PART`] bytes, and of one request few are under way at a time: so a request of
//!    any length is done in memory of a fixed size.
//! 2. The data of a part that is written is copied out of the guest when the part is begun, once; the guest may change it
//!    after. What is read is copied into the guest when it is there.
//! 3. After a part has failed no other of its request is begun.
//! 4. A request that was called back while it waited for room or for a limit is not answered: whoever uses the queue next has
//!    to begin it again, all of it ([`Flights::left`]).

use std::sync::Arc;

use super::request::{Request, SERIAL, Status, What};
use super::service::{Memory, Target};
use crate::disk::engine::{Done, Op, Request as Part};
use crate::disk::{Buffers, Engine};
use crate::error::{Kind, Result};
use crate::store::Cancel;
use crate::units::to_usize;

/// Bytes of a part at most; the requests of most guests are no longer.
pub(super) const PART: usize = 1 << 20;
/// Parts of one request that are under way at a time.
const PARTS_MAX: usize = 4;
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
    /// Bytes of memory that parts under way have.
    bytes: usize,
}

impl Flights {
    /// Makes none yet; `cancel` calls back what waits on purpose.
    pub(super) fn new(target: Arc<Target>, durable: bool, cancel: Arc<Cancel>) -> Result<Self> {
        Ok(Self {
            engine: Engine::new("disk-work", target.device.threads(), cancel)?,
            target,
            buffers: Buffers::default(),
            flights: Vec::new(),
            free: Vec::new(),
            durable,
            answered: Vec::new(),
            left: Vec::new(),
            bytes: 0,
        })
    }

    /// Returns how many requests are under way.
    pub(super) fn count(&self) -> usize {
        self.flights.len() - self.free.len()
    }

    /// Returns how much memory they have.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
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
        let flight = Flight { head, request, begun: 0, left: 0, failed: false, called_back: false };
        let slot = self.free.pop().unwrap_or(self.flights.len());
        if slot == self.flights.len() {
            self.flights.push(None);
        }
        self.go_on(memory, slot, flight);
    }

    /// Begins as many parts as may be under way; answers the request if there is none.
    fn go_on(&mut self, memory: &dyn Memory, slot: usize, mut flight: Flight) {
        while flight.left < PARTS_MAX && !flight.failed && !flight.called_back {
            let Some(part) = self.next_part(memory, slot, &mut flight) else { break };
            flight.left += 1;
            self.engine.begin(part);
        }
        if flight.left > 0 {
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
            self.bytes += memory_of_part.len();
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
                self.bytes -= pages.len();
                self.buffers.give_back(pages);
            }
            self.go_on(memory, slot, flight);
        }
        any
    }

    fn answer(&mut self, memory: &dyn Memory, head: u16, request: &Request, status: Status, read: usize) {
        self.answered.push((head, request.answer(memory.map(), status, read)));
    }
}

/// Tells whether a request has data of its own.
fn moves(what: &What) -> bool {
    matches!(what, What::Read(_) | What::Write(_))
}
