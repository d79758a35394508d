//! Threads for requests that may wait: for the disk, a lock, or room.
//!
//! # Rules
//! 1. There are as many threads as there ever were tasks at a time, up to a limit; more tasks wait in order.
//! 2. A task that panics takes nothing with it but itself.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use crate::sync::{Condvar, Mutex};

type Task = Box<dyn FnOnce() + Send>;

#[derive(Default)]
struct State {
    tasks: VecDeque<Task>,
    idle: usize,
    threads: usize,
    closed: bool,
}

/// The threads; dropping it lets them end.
pub struct Workers {
    state: Arc<(Mutex<State>, Condvar)>,
    most: usize,
    name: &'static str,
    /// What each thread does first.
    begin: fn(u64),
    number: u64,
}

impl std::fmt::Debug for Workers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Workers").field("name", &self.name).finish_non_exhaustive()
    }
}

impl Workers {
    /// Makes none yet, and at most `most`. Each calls `begin` with `number` first.
    #[must_use]
    pub fn new(name: &'static str, most: usize, begin: fn(u64), number: u64) -> Self {
        Self { state: Arc::default(), most, name, begin, number }
    }

    /// Runs a task as soon as a thread is free.
    pub fn run(&self, task: impl FnOnce() + Send + 'static) {
        let (state, changed) = &*self.state;
        let mut guard = state.lock();
        guard.tasks.push_back(Box::new(task));
        if guard.tasks.len() > guard.idle && guard.threads < self.most {
            guard.threads += 1;
            drop(guard);
            self.start();
        } else {
            changed.notify_one();
        }
    }

    fn start(&self) {
        let (shared, begin, number) = (Arc::clone(&self.state), self.begin, self.number);
        let work = move || {
            begin(number);
            work(&shared);
        };
        if let Err(error) = std::thread::Builder::new().name(self.name.into()).spawn(work) {
            tracing::error!("the host has no more threads: {error}");
            let mut guard = self.state.0.lock();
            guard.threads -= 1;
            // With no thread at all nobody would ever do it.
            let task = if guard.threads == 0 { guard.tasks.pop_front() } else { None };
            drop(guard);
            task.into_iter().for_each(|task| task());
        }
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.state.0.lock().closed = true;
        self.state.1.notify_all();
    }
}

fn work(shared: &(Mutex<State>, Condvar)) {
    let (state, changed) = shared;
    let mut guard = state.lock();
    loop {
        if let Some(task) = guard.tasks.pop_front() {
            drop(guard);
            if catch_unwind(AssertUnwindSafe(task)).is_err() {
                tracing::error!("a request failed on a mistake in this program");
            }
            guard = state.lock();
        } else if guard.closed {
            return;
        } else {
            guard.idle += 1;
            changed.wait(&mut guard);
            guard.idle -= 1;
        }
    }
}
