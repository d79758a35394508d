//! A worker of a restore: first what somebody waits for, then the rest of storage blocks that were read, then everything else.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::cache::Key;
use super::filling::{Demand, Filling, Rest, Where};
use super::order::{Next, Order};
use super::touched::Touched;
use crate::checkpoint::{Found, PageBlock};
use crate::clock::Instant;
use crate::error::Result;
use crate::memory::watch::Core;
use crate::sys::pages::Pages;

/// Storage blocks at most of which the rest is remembered: what is forgotten comes up again in order.
const RESTS_MAX: usize = 16;

/// What a worker does next.
enum Job {
    Demand(Demand),
    Rest(Rest),
    Next(Next),
    /// All is there, or it was stopped.
    End,
}

/// Works until all memory is there, or it is stopped. The first worker is given what the last machine touched, and says what comes first.
pub(super) fn run(core: &Arc<Core>, filling: &Arc<Filling>, plan: Option<Option<Touched>>) {
    let worked = catch_unwind(AssertUnwindSafe(|| {
        if let Some(touched) = plan {
            let first = Order::plan(&filling.reader, touched.as_ref()).unwrap_or_else(|error| {
                tracing::warn!("memory is filled in no particular order: {error}");
                Vec::new()
            });
            filling.queue.lock().order.planned(first);
            filling.changed.notify_all();
        }
        let buffer = Pages::new(core.geometry.page_block());
        match buffer.map(|buffer| Worker { core, filling, buffer }) {
            Ok(mut worker) => worker.work(),
            Err(error) => {
                filling.break_down(core, &format!("the host has no memory to restore the memory of a guest: {error}"));
            }
        }
    }));
    if worked.is_err() {
        filling.break_down(core, "a mistake in this program ended a thread that fills the memory of a guest");
    }
}

struct Worker<'a> {
    core: &'a Arc<Core>,
    filling: &'a Arc<Filling>,
    buffer: Pages,
}

impl Worker<'_> {
    fn work(&mut self) {
        loop {
            match self.job() {
                Job::Demand(demand) => self.demand(demand),
                Job::Rest(rest) => self.rest(rest),
                Job::Next(next) => self.begin(next),
                Job::End => break,
            }
        }
        if self.filling.status.left() == 0 {
            self.filling.finish(self.core);
        }
    }

    fn job(&self) -> Job {
        let filling = self.filling;
        let mut queue = filling.queue.lock();
        loop {
            if queue.stop || filling.status.left() == 0 {
                // The others are to see it as well.
                filling.changed.notify_all();
                return Job::End;
            }
            if let Some(demand) = queue.demands.pop_front() {
                filling.demanded.fetch_sub(1, Ordering::SeqCst);
                return Job::Demand(demand);
            }
            if let Some(rest) = queue.rests.pop_front() {
                return Job::Rest(rest);
            }
            if filling.background
                && let Some(next) = queue.order.next(|from| filling.absent(from))
            {
                return Job::Next(next);
            }
            filling.changed.wait(&mut queue);
        }
    }

    fn demand(&mut self, Demand { block, page }: Demand) {
        if let Some(key) = self.bring(block, page) {
            self.rest_of(key, block);
        }
    }

    /// Brings a page block, if nobody else does; returns the last storage block that it was in.
    fn bring(&mut self, block: PageBlock, page: Option<(u64, Instant)>) -> Option<Key> {
        let filling = self.filling;
        if !filling.win(block) {
            return None;
        }
        let data = &mut self.buffer[..self.core.span(block).length];
        match filling.fetch(block, data) {
            Ok(key) => {
                filling.put(self.core, block, data, page);
                key
            }
            Err(error) => {
                filling.failed(self.core, block, error);
                None
            }
        }
    }

    /// Notes what else is in a storage block that somebody wanted a page block of.
    fn rest_of(&self, key: Key, wanted: PageBlock) {
        match self.contents(key) {
            Ok(blocks) if !blocks.is_empty() => self.later(Rest { blocks: blocks.into(), next: 0 }),
            Ok(_) => {}
            Err(error) => tracing::warn!("what else is beside page block {wanted} is not known: {error}"),
        }
    }

    /// Returns the page blocks of a storage block that are not there.
    fn contents(&self, (layer, block): Key) -> Result<Vec<PageBlock>> {
        let mut blocks = Vec::new();
        self.filling.reader.contents(layer, block, |part, _| {
            let number = self.filling.whole_of(part);
            if self.filling.at(number) == Where::Absent && blocks.last() != Some(&number) {
                blocks.push(number);
            }
            Ok(())
        })?;
        Ok(blocks)
    }

    fn later(&self, rest: Rest) {
        let mut queue = self.filling.queue.lock();
        queue.rests.push_front(rest);
        if queue.rests.len() > RESTS_MAX {
            queue.rests.pop_back();
            queue.order.again();
        }
        drop(queue);
        self.filling.changed.notify_one();
    }

    /// Goes on with a storage block until somebody waits for something.
    fn rest(&mut self, mut rest: Rest) {
        while rest.next < rest.blocks.len() {
            if self.filling.is_urgent() {
                return self.later(rest);
            }
            let block = rest.blocks[rest.next];
            rest.next += 1;
            self.bring(block, None);
        }
    }

    fn begin(&mut self, next: Next) {
        let found = match next {
            Next::These(parts) => Ok(parts.into_iter().map(|part| self.filling.whole_of(part)).collect()),
            Next::All(key) => self.contents(key),
            Next::With(block) => Ok(self.beside(block)),
        };
        match found {
            Ok(blocks) => self.rest(Rest { blocks: blocks.into(), next: 0 }),
            Err(error) => tracing::warn!("memory is filled in another order than it should: {error}"),
        }
    }

    /// Returns a page block, and what else is in the storage block of it if that is known.
    fn beside(&self, block: PageBlock) -> Vec<PageBlock> {
        let filling = self.filling;
        let stored = filling.parts(block).find_map(|part| match filling.reader.place(part) {
            Ok(Found::Stored { layer, stored }) => Some((layer, stored.block)),
            // One that is damaged is told when it is brought.
            Ok(Found::Zero) | Err(_) => None,
        });
        let mut blocks = stored.and_then(|key| self.contents(key).ok()).unwrap_or_default();
        if !blocks.contains(&block) {
            blocks.push(block);
        }
        blocks
    }
}
