//! How a restore is going, for its owner: it outlives the restore itself.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::touched::Touched;
use crate::checkpoint::{Geometry, PageBlock};
use crate::clock;
use crate::error::{Error, Result};
use crate::memory::bits::Bits;
use crate::memory::figures::{Times, Waits};
use crate::sync::{Condvar, Mutex};

/// How long one waits for a change before one looks again: changes are told only to those who wait already.
const LOOK: Duration = Duration::from_millis(5);

/// A part of the memory that could not be had.
#[derive(Debug)]
pub struct Failure {
    /// The page block.
    pub block: PageBlock,
    /// The guest address where it begins.
    pub address: u64,
    /// Somebody waits for it: until it is had, or poisoned.
    pub waited_for: bool,
    /// Why, with the file and the place in it.
    pub error: Error,
}

impl Failure {
    fn again(&self) -> Self {
        Self { error: self.error.again(), ..*self }
    }
}

/// What has happened to a restore.
#[derive(Debug)]
pub enum Event {
    /// Somebody waits for memory that could not be had: the machine is to be stopped, until [`super::Restorer::retry`] or the end.
    Failed(Failure),
    /// All memory is there; the checkpoint is closed.
    Filled,
    /// It was stopped by its owner.
    Stopped,
    /// Nobody answers faults any more, because of a mistake in this program.
    Broken(Error),
    /// Nothing, in that time.
    Nothing,
}

/// How a restore is going.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct RestoreFigures {
    /// All memory is there, and the checkpoint is closed.
    pub resident: bool,
    /// Of what there is to bring, so much is in memory, in percent.
    pub filled_percent: u64,
    /// Page blocks that there are to bring: those that are not zeros.
    pub page_blocks: u64,
    /// Page blocks that are not there yet.
    pub left: u64,
    /// Page blocks that could not be had.
    pub failed: u64,
    /// Faults on missing pages.
    pub faults: u64,
    /// How long those waited who touched a page block first.
    pub waits: Waits,
    /// Of them, those that waited for 10 ms or more.
    pub stalls: u64,
}

/// How it ended.
#[derive(Debug, Default)]
enum End {
    #[default]
    None,
    Filled,
    Stopped,
    Broken(Error),
}

#[derive(Debug, Default)]
struct Inner {
    end: End,
    failures: Vec<Failure>,
    /// Those that the owner was told of.
    told: BTreeSet<PageBlock>,
    /// Waited for before they were known to have failed.
    early: BTreeSet<PageBlock>,
}

/// How a restore is going, as its threads share it.
#[derive(Debug)]
pub(in crate::memory) struct Status {
    page_blocks: u64,
    left: AtomicU64,
    faults: AtomicU64,
    stalls: AtomicU64,
    pub(super) waits: Times,
    /// Page blocks that somebody has touched.
    touched: Bits,
    inner: Mutex<Inner>,
    changed: Condvar,
    waiting: AtomicU64,
}

impl Status {
    pub(super) fn new(geometry: &Geometry, page_blocks: u64) -> Self {
        Self {
            page_blocks,
            left: AtomicU64::new(page_blocks),
            faults: AtomicU64::new(0),
            stalls: AtomicU64::new(0),
            waits: Times::default(),
            touched: Bits::new(geometry.page_blocks()),
            inner: Mutex::default(),
            changed: Condvar::new(),
            waiting: AtomicU64::new(0),
        }
    }

    pub(super) fn faulted(&self, block: PageBlock) {
        self.faults.fetch_add(1, Ordering::Relaxed);
        self.touched.insert(block.0);
    }

    /// Counts how long somebody waited for a page.
    pub(super) fn waited(&self, time: Duration) {
        self.waits.add(time);
        if time >= Duration::from_millis(10) {
            self.stalls.fetch_add(1, Ordering::Relaxed);
        }
    }

    pub(super) fn present(&self) {
        if self.left.fetch_sub(1, Ordering::SeqCst) == 1 || self.waiting.load(Ordering::SeqCst) > 0 {
            let _inner = self.inner.lock();
            self.changed.notify_all();
        }
    }

    pub(super) fn left(&self) -> u64 {
        self.left.load(Ordering::SeqCst)
    }

    pub(super) fn failed(&self, mut failure: Failure) {
        let mut inner = self.inner.lock();
        failure.waited_for |= inner.early.remove(&failure.block);
        inner.failures.push(failure);
        self.changed.notify_all();
    }

    /// Hears that somebody waits for a page block that could not be had, or just cannot be.
    pub(super) fn is_waited_for(&self, block: PageBlock) {
        let mut inner = self.inner.lock();
        match inner.failures.iter_mut().find(|failure| failure.block == block) {
            Some(failure) => failure.waited_for = true,
            None => {
                inner.early.insert(block);
            }
        }
        self.changed.notify_all();
    }

    /// Returns why a page block could not be had; nothing until that is known.
    pub(super) fn why(&self, block: PageBlock) -> Option<Error> {
        let inner = self.inner.lock();
        inner.failures.iter().find(|failure| failure.block == block).map(|failure| failure.error.again())
    }

    /// Drops the failure of a page block of which nothing is left to bring.
    pub(super) fn forget(&self, block: PageBlock) {
        self.inner.lock().failures.retain(|failure| failure.block != block);
    }

    pub(super) fn take_failures(&self) -> Vec<Failure> {
        let mut inner = self.inner.lock();
        inner.told.clear();
        std::mem::take(&mut inner.failures)
    }

    fn end(&self, end: End) {
        let mut inner = self.inner.lock();
        if matches!(inner.end, End::None) {
            inner.end = end;
        }
        self.changed.notify_all();
    }

    pub(super) fn filled(&self) {
        self.end(End::Filled);
    }

    pub(super) fn stop(&self) {
        self.end(End::Stopped);
    }

    pub(super) fn break_down(&self, error: Error) {
        self.end(End::Broken(error));
    }

    /// Waits until `done` returns something.
    pub(super) fn wait_for<T>(&self, mut done: impl FnMut() -> Option<T>) -> T {
        self.waiting.fetch_add(1, Ordering::SeqCst);
        let result = loop {
            if let Some(result) = done() {
                break result;
            }
            self.changed.wait_for(&mut self.inner.lock(), LOOK);
        };
        self.waiting.fetch_sub(1, Ordering::SeqCst);
        result
    }

    /// Waits for something that the owner is to know, which is told once; but how it ended every time.
    pub(super) fn event(&self, time: Duration) -> Event {
        let until = clock::now().checked_add(time);
        let mut inner = self.inner.lock();
        loop {
            let Inner { failures, told, end, .. } = &mut *inner;
            if let Some(failure) = failures.iter().find(|it| it.waited_for && !told.contains(&it.block)) {
                told.insert(failure.block);
                return Event::Failed(failure.again());
            }
            match end {
                End::Filled => return Event::Filled,
                End::Stopped => return Event::Stopped,
                End::Broken(error) => return Event::Broken(error.again()),
                End::None => {}
            }
            let ended = match until {
                Some(until) => self.changed.wait_until(&mut inner, until).timed_out(),
                None => {
                    self.changed.wait(&mut inner);
                    false
                }
            };
            if ended {
                return Event::Nothing;
            }
        }
    }

    /// Returns all that could not be had.
    pub(super) fn failures(&self) -> Vec<Failure> {
        self.inner.lock().failures.iter().map(Failure::again).collect()
    }

    /// Waits until all memory is there.
    ///
    /// # Errors
    /// The first part that could not be had, when nothing else is left; what ended it before.
    pub(super) fn wait_filled(&self) -> Result<()> {
        self.wait_for(|| {
            let inner = self.inner.lock();
            match &inner.end {
                End::Filled => Some(Ok(())),
                End::Stopped => Some(Err(Error::failed("the restore was stopped before all memory was there"))),
                End::Broken(error) => Some(Err(error.again())),
                End::None if !inner.failures.is_empty() && inner.failures.len() as u64 == self.left() => {
                    Some(Err(inner.failures[0].error.again()))
                }
                End::None => None,
            }
        })
    }

    pub(super) fn figures(&self) -> RestoreFigures {
        let inner = self.inner.lock();
        let left = self.left();
        RestoreFigures {
            resident: matches!(inner.end, End::Filled),
            filled_percent: ((self.page_blocks - left) * 100).checked_div(self.page_blocks).unwrap_or(100),
            page_blocks: self.page_blocks,
            left,
            failed: inner.failures.len() as u64,
            faults: self.faults.load(Ordering::Relaxed),
            waits: self.waits.told(),
            stalls: self.stalls.load(Ordering::Relaxed),
        }
    }

    /// Returns what was touched so far, of which each is made of so many page blocks of the checkpoint.
    pub(super) fn touched(&self, checkpoint: uuid::Uuid, parts: u64) -> Touched {
        let mut blocks = Vec::new();
        let mut next = 0;
        while let Some(number) = self.touched.next(next) {
            blocks.extend((number * parts..(number + 1) * parts).map(PageBlock));
            next = number + 1;
        }
        Touched::new(checkpoint, blocks)
    }
}
