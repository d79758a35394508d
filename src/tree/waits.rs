//! Operations that may have to wait on purpose, for room or for a limit of their disk: attempted until they need not, then
//! answered.
//!
//! # Rules
//! 1. An operation that waits has no thread, and holds nothing that another one needs: it fails, is undone, and is attempted
//!    again when it is worth it ([`crate::store::Need`]).
//! 2. The kernel says when a signal has come for whoever asked (INTERRUPT), of reads and writes as of fallocate(2) and
//!    copy_file_range(2): what waits then is answered with EINTR, also when it begins to wait after that. What does not wait
//!    is done as if nothing had happened.
//! 3. Of asynchronous I/O the kernel does not say it, and fuser does not pass it on: a process that is ending is found out
//!    now and then, a few times a second. Which one it is is noted when the waiting begins, also for what the thread asks
//!    later: a killed program leaves requests in the kernel that come when their thread has ended. Where a thread has ended
//!    before anything of it waited, its process is not known, and the request waits for what it needs or for the end of the
//!    mount.
//! 4. When the mount ends nothing waits any more.
//! 5. An operation that panics is answered with EIO and takes nothing else with it.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use super::errno::{Answer, Errno};
use super::file::Handle;
use super::state::Tree;
use crate::disk::{BlockDevice, Disk};
use crate::error::Error;
use crate::store::{Cancel, Need};
use crate::sync::Mutex;
use crate::workers::Workers;

/// Set in the flags of a thread that is ending (PF_EXITING).
const EXITING: u64 = 4;
/// SIGKILL, among the signals that a thread has to take yet; the kernel makes one of whatever ends a program.
const KILL: u64 = 1 << 8;
/// Threads of which the process is remembered; then it begins anew.
const THREADS_MAX: usize = 1024;

/// Why an operation has not been done.
#[derive(Debug)]
pub enum Halt {
    /// It cannot be.
    Failed(Errno),
    /// It has to wait for something of this disk first; nothing was done.
    Waits(Arc<Disk>, Need),
}

impl From<Errno> for Halt {
    fn from(errno: Errno) -> Self {
        Self::Failed(errno)
    }
}

impl From<Error> for Halt {
    fn from(error: Error) -> Self {
        Self::Failed(error.into())
    }
}

impl Halt {
    /// Returns what a failure of a disk means.
    pub(super) fn of(disk: &Arc<Disk>, error: Error) -> Self {
        match disk.waits_for(&error) {
            Some(need) => Self::Waits(Arc::clone(disk), need),
            None => Self::Failed(Errno::from(error).stale()),
        }
    }
}

impl Handle {
    /// Takes the turn of a read or write of so many bytes, by the limits of the disk.
    ///
    /// # Errors
    /// `Waits` when it has to be waited for; whoever has waited must not take it again.
    pub(super) fn take_turn(&self, bytes: u64) -> Result<(), Halt> {
        let Self::Disk(handle) = self else { return Ok(()) };
        let disk = handle.file.disk();
        match disk.take_turn(bytes) {
            Some(need) => Err(Halt::Waits(Arc::clone(disk), need)),
            None => Ok(()),
        }
    }
}

/// Who asks for something.
#[derive(Debug, Clone, Copy)]
pub(super) struct Asker {
    /// The number of the request.
    pub(super) unique: u64,
    /// The thread; 0 when it cannot be seen from here.
    pub(super) thread: u32,
}

/// Something to do and to answer.
pub(super) trait Errand: Send + 'static {
    /// What it comes to.
    type Done;
    /// Attempts it; with `had_turn` it has waited, and takes no turn.
    fn attempt(&mut self, tree: &Tree, had_turn: bool) -> Result<Self::Done, Halt>;
    /// Answers it; short, and waits for nothing.
    fn answer(self, answer: Answer<Self::Done>);
}

/// An errand made of two functions.
pub(super) struct Ask<W, A> {
    pub(super) work: W,
    pub(super) answer: A,
}

impl<T, W, A> Errand for Ask<W, A>
where
    W: FnMut(&Tree, bool) -> Result<T, Halt> + Send + 'static,
    A: FnOnce(Answer<T>) + Send + 'static,
{
    type Done = T;

    fn attempt(&mut self, tree: &Tree, had_turn: bool) -> Result<T, Halt> {
        (self.work)(tree, had_turn)
    }

    fn answer(self, answer: Answer<T>) {
        (self.answer)(answer);
    }
}

/// Runs it; a panic is EIO.
pub(super) fn guarded<T>(work: impl FnOnce() -> Result<T, Halt>) -> Result<T, Halt> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_| {
        tracing::error!("the operation failed on a mistake in this program; it was answered with EIO");
        Err(Halt::Failed(Errno::EIO))
    })
}

/// A request that is not answered.
struct Asked {
    cancel: Arc<Cancel>,
    thread: u32,
    /// The process of the thread, when it is known.
    process: Arc<OnceLock<u64>>,
}

/// What waits, or may come to wait, in one mount.
pub(super) struct Waits {
    tree: Arc<Tree>,
    pub(super) workers: Workers,
    /// What can be called back, by the numbers of the requests.
    asked: Mutex<HashMap<u64, Asked>>,
    /// The processes of threads that had something waiting.
    processes: Mutex<HashMap<u32, u64>>,
    ended: AtomicBool,
}

impl std::fmt::Debug for Waits {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Waits").field("workers", &self.workers).finish_non_exhaustive()
    }
}

impl Waits {
    pub(super) fn new(tree: Arc<Tree>, workers: Workers) -> Arc<Self> {
        let (asked, processes) = (Mutex::default(), Mutex::default());
        Arc::new(Self { tree, workers, asked, processes, ended: AtomicBool::new(false) })
    }

    /// Attempts it on this thread.
    pub(super) fn here(self: &Arc<Self>, asker: Asker, errand: impl Errand) {
        let cancel = self.enter(asker);
        self.attempt(asker.unique, cancel, errand, false);
    }

    /// Attempts it on another thread.
    pub(super) fn aside(self: &Arc<Self>, asker: Asker, errand: impl Errand) {
        let cancel = self.enter(asker);
        self.go(asker.unique, cancel, errand, false);
    }

    /// Attempts it when it has had its turn.
    pub(super) fn after(self: &Arc<Self>, asker: Asker, (disk, need): (Arc<Disk>, Need), errand: impl Errand) {
        let cancel = self.enter(asker);
        self.wait(asker.unique, cancel, errand, &disk, need);
    }

    /// Calls a request back, if it waits or may come to wait.
    pub(super) fn interrupt(&self, unique: u64) {
        let cancel = self.asked.lock().get(&unique).map(|asked| Arc::clone(&asked.cancel));
        cancel.iter().for_each(|cancel| cancel.cancel());
    }

    /// Calls everything back, for good.
    pub(super) fn end(&self) {
        self.ended.store(true, Ordering::SeqCst);
        let all: Vec<_> = self.asked.lock().values().map(|asked| Arc::clone(&asked.cancel)).collect();
        all.iter().for_each(|cancel| cancel.cancel());
    }

    fn enter(&self, asker: Asker) -> Arc<Cancel> {
        let process = Arc::new(OnceLock::new());
        let of = Arc::clone(&process);
        let cancel = Arc::new(Cancel::when(move || of.get().is_some_and(|process| given_up(*process))));
        let asked = Asked { cancel: Arc::clone(&cancel), thread: asker.thread, process };
        self.asked.lock().insert(asker.unique, asked);
        if self.ended.load(Ordering::SeqCst) {
            cancel.cancel();
        }
        cancel
    }

    fn go(self: &Arc<Self>, unique: u64, cancel: Arc<Cancel>, errand: impl Errand, had_turn: bool) {
        let waits = Arc::clone(self);
        self.workers.run(move || waits.attempt(unique, cancel, errand, had_turn));
    }

    fn attempt<E: Errand>(self: &Arc<Self>, unique: u64, cancel: Arc<Cancel>, mut errand: E, had_turn: bool) {
        match guarded(|| errand.attempt(&self.tree, had_turn)) {
            Ok(done) => self.answer(unique, errand, Ok(done)),
            Err(Halt::Failed(errno)) => self.answer(unique, errand, Err(errno)),
            Err(Halt::Waits(disk, need)) => self.wait(unique, cancel, errand, &disk, need),
        }
    }

    fn wait(self: &Arc<Self>, unique: u64, cancel: Arc<Cancel>, errand: impl Errand, disk: &Arc<Disk>, need: Need) {
        self.note_process(unique);
        let (waits, again) = (Arc::clone(self), Arc::clone(&cancel));
        let go = move |turn: Result<(), Error>| match turn {
            Ok(()) => waits.go(unique, again, errand, true),
            Err(error) => waits.answer(unique, errand, Err(error.into())),
        };
        disk.wait(need, &cancel, Box::new(go));
    }

    /// Notes whose request it is. Now: a thread that has asked for asynchronous I/O may end before its process does, and
    /// then nobody can be asked.
    fn note_process(&self, unique: u64) {
        let asked = self.asked.lock().get(&unique).map(|asked| (asked.thread, Arc::clone(&asked.process)));
        if let Some((thread, known)) = asked
            && known.get().is_none()
            && let Some(process) = self.process_of(thread)
        {
            // Nobody else notes it: an errand is in one place at a time.
            known.get_or_init(|| process);
        }
    }

    /// Returns the process of a thread, as it is or, for one that has ended, as it was.
    fn process_of(&self, thread: u32) -> Option<u64> {
        let found = process_of(thread);
        let mut processes = self.processes.lock();
        let Some(process) = found else { return processes.get(&thread).copied() };
        if processes.len() >= THREADS_MAX {
            processes.clear();
        }
        processes.insert(thread, process);
        found
    }

    fn answer<E: Errand>(&self, unique: u64, errand: E, answer: Answer<E::Done>) {
        // Before it is answered: the number may then be used again.
        self.asked.lock().remove(&unique);
        errand.answer(answer);
    }
}

/// Tells whether a process is ending, all of it: nobody is left to whom the answer matters.
fn given_up(process: u64) -> bool {
    match fs::read_dir(format!("/proc/{process}/task")) {
        Ok(mut threads) => {
            threads.all(|thread| thread.map_or_else(|error| is_gone(&error), |thread| is_ending(&thread.path())))
        }
        Err(error) => is_gone(&error),
    }
}

/// Tells whether an error says that the process or thread is not there: one that cannot be looked at, for want of a
/// descriptor for instance, may live.
fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH)
}

/// Returns the number of the process a thread belongs to; `None` for one that has ended or cannot be seen from here.
fn process_of(thread: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{thread}/status")).ok()?;
    status.lines().find_map(|line| line.strip_prefix("Tgid:"))?.trim().parse().ok()
}

fn is_ending(thread: &Path) -> bool {
    let stat = match fs::read_to_string(thread.join("stat")) {
        Ok(stat) => stat,
        Err(error) => return is_gone(&error),
    };
    // The name may contain anything; the ninth field is the seventh behind it.
    let flags = stat.rsplit_once(')').and_then(|(_, fields)| fields.split_whitespace().nth(6));
    if flags.and_then(|flags| flags.parse::<u64>().ok()).is_some_and(|flags| flags & EXITING != 0) {
        return true;
    }
    // A thread that waits for us takes no signal before it has its answer.
    let status = match fs::read_to_string(thread.join("status")) {
        Ok(status) => status,
        Err(error) => return is_gone(&error),
    };
    let pending = status.lines().find_map(|line| line.strip_prefix("SigPnd:"));
    pending.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).is_some_and(|mask| mask & KILL != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_that_lives_has_given_nothing_up() {
        let me = u64::from(std::process::id());
        assert_eq!(process_of(0), None, "it cannot be seen");
        assert_eq!(process_of(std::process::id()), Some(me));
        let number = || rustix::thread::gettid().as_raw_nonzero().get().cast_unsigned();
        let (thread, of) = std::thread::spawn(move || (number(), process_of(number()))).join().unwrap();
        assert_eq!(of, Some(me), "{thread}");
        // A thread that has ended says nothing about its process.
        assert!(!given_up(me));
        // A zombie is ending in all its threads.
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let id = u64::from(child.id());
        while !given_up(id) {
            std::thread::yield_now();
        }
        child.wait().unwrap();
        assert!(given_up(id), "it is gone");
    }
}
