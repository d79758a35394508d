//! Threads for requests that may wait: for the disk, a lock, or room.
//!
//! # Rules
//! 1. There are as many threads as there ever were tasks at a time, up to a limit; more tasks wait in order.
//! 2. The first thread is made at once, so that a task always has one to wait for: a host that has no more threads makes
//!    tasks slower. None is ever run by the thread that brings it, which must not wait.
//! 3. A task that panics takes nothing with it but itself. Nor does a panic beside the tasks end a thread: whoever brings
//!    tasks to threads that are gone would wait for ever.
//!
//! # Why none sleeps on something undone
//! A thread looks for a task under the lock under which one is brought, and sleeps only when there is none. One that was woken
//! and has not come yet counts as idle, and then takes all there are, one after the other.

use std::collections::VecDeque;
use std::io;
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
    spawn: fn(&'static str, Task) -> io::Result<()>,
}

fn spawn(name: &'static str, work: Task) -> io::Result<()> {
    std::thread::Builder::new().name(name.into()).spawn(work).map(drop)
}

impl std::fmt::Debug for Workers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Workers").field("name", &self.name).finish_non_exhaustive()
    }
}

impl Workers {
    /// Makes one, and at most `most`. Each calls `begin` with `number` first.
    ///
    /// # Errors
    /// When the host has no thread.
    pub fn new(name: &'static str, most: usize, begin: fn(u64), number: u64) -> io::Result<Self> {
        Self::spawned_by(spawn, name, most, begin, number)
    }

    fn spawned_by(
        spawn: fn(&'static str, Task) -> io::Result<()>,
        name: &'static str,
        most: usize,
        begin: fn(u64),
        number: u64,
    ) -> io::Result<Self> {
        let workers = Self { state: Arc::default(), most, name, begin, number, spawn };
        workers.state.0.lock().threads = 1;
        workers.start()?;
        Ok(workers)
    }

    /// Runs a task as soon as a thread is free.
    pub fn run(&self, task: impl FnOnce() + Send + 'static) {
        let (state, changed) = &*self.state;
        let mut guard = state.lock();
        guard.tasks.push_back(Box::new(task));
        if guard.tasks.len() > guard.idle && guard.threads < self.most {
            guard.threads += 1;
            drop(guard);
            if let Err(error) = self.start() {
                tracing::warn!("the host has no more threads, so tasks wait for those there are: {error}");
                state.lock().threads -= 1;
                changed.notify_one();
            }
        } else {
            changed.notify_one();
        }
    }

    fn start(&self) -> io::Result<()> {
        let (shared, begin, number) = (Arc::clone(&self.state), self.begin, self.number);
        let work = move || {
            begin(number);
            while catch_unwind(AssertUnwindSafe(|| work(&shared))).is_err() {}
        };
        (self.spawn)(self.name, Box::new(work))
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

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::mpsc::channel;

    use super::*;

    static MADE: AtomicUsize = AtomicUsize::new(0);

    fn only_one(name: &'static str, work: Task) -> io::Result<()> {
        if MADE.fetch_add(1, Ordering::SeqCst) > 0 {
            return Err(io::Error::from_raw_os_error(libc::EAGAIN));
        }
        spawn(name, work)
    }

    #[test]
    fn without_another_thread_tasks_wait_for_the_first_and_never_run_on_the_callers() {
        let workers = Workers::spawned_by(only_one, "one", 8, |_| (), 0).unwrap();
        let caller = std::thread::current().id();
        let (go, wait) = channel::<()>();
        let (done, ended) = channel();
        workers.run(move || wait.recv().unwrap());
        for n in 0..3 {
            let done = done.clone();
            workers.run(move || done.send((n, std::thread::current().id() == caller)).unwrap());
        }
        // The caller is here although the thread there is has not come to any of them.
        ended.try_recv().unwrap_err();
        go.send(()).unwrap();
        assert_eq!([0, 1, 2].map(|_| ended.recv().unwrap()), [(0, false), (1, false), (2, false)]);
        assert!(MADE.load(Ordering::SeqCst) > 1, "the host was asked for more");
        Workers::spawned_by(|_, _| Err(io::ErrorKind::WouldBlock.into()), "none", 8, |_| (), 0).unwrap_err();
    }
}
