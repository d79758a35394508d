//! An io_uring that owns what it works on: many reads and writes go to the host with one system call.
//!
//! # Rules
//! 1. Memory and files of a job belong to the ring from [`Ring::push`] until [`Ring::finished`] returns the job, so the
//!    kernel never touches memory that somebody else uses.
//! 2. A job is finished when all of its pieces are. How each went is reported as the kernel says it; nothing is retried.
//! 3. A ring is used by the thread that made it.
//!
//! # After a crash
//! What was in flight is written, or not, as with pwrite.

#![expect(unsafe_code, reason = "the submission queue holds raw pointers")]

use std::collections::VecDeque;
use std::fs;
use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

use io_uring::{IoUring, opcode, squeue, types};

use super::pages::Pages;

/// Bytes of a job that is done in the ordinary way at most.
pub const ALONE_MAX: usize = 64 << 10;
/// Bits of the user data that number the piece of a job.
const PIECE_BITS: u32 = 16;
/// The user data of watched descriptors begins here.
const WATCH: u64 = u64::MAX - WATCHED_MAX as u64;
/// Descriptors that can be watched at a time.
pub const WATCHED_MAX: u32 = 8;

/// Consecutive bytes of memory at consecutive bytes of a file.
#[derive(Debug)]
pub struct Piece {
    /// The file.
    pub file: Arc<fs::File>,
    /// Where in the file.
    pub offset: u64,
    /// Where in the memory.
    pub at: usize,
    /// Bytes.
    pub len: usize,
    /// Bytes that were transferred, or a negated errno; set when the job is finished.
    pub result: i32,
}

impl Piece {
    /// Returns how many bytes were transferred, once the job is finished.
    pub fn transferred(&self) -> io::Result<usize> {
        usize::try_from(self.result).map_err(|_| io::Error::from_raw_os_error(-self.result))
    }
}

/// Something to read or write.
#[derive(Debug)]
pub struct Job<T> {
    /// The memory.
    pub pages: Pages,
    /// Write to the files (else read from them).
    pub write: bool,
    /// The parts, at most 65,535 of them.
    pub pieces: Vec<Piece>,
    /// What the owner has to remember.
    pub tag: T,
}

#[derive(Debug)]
struct Flight<T> {
    job: Job<T>,
    left: usize,
}

/// The ring.
pub struct Ring<T> {
    ring: IoUring,
    flights: Vec<Option<Flight<T>>>,
    free: Vec<usize>,
    /// Jobs that the kernel was not told of yet.
    queued: Vec<usize>,
    done: VecDeque<Job<T>>,
    /// Jobs that are not finished.
    pending: usize,
    /// A bit for each number that is watched.
    watching: u32,
    /// A watched descriptor was seen readable since the last [`Ring::wait`].
    woken: bool,
    /// Not `Send`: the kernel insists on one thread.
    here: PhantomData<*const ()>,
}

impl<T> std::fmt::Debug for Ring<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ring").field("in_flight", &self.in_flight()).finish_non_exhaustive()
    }
}

impl<T> Ring<T> {
    /// Makes a ring; fails where the host does not allow it.
    pub fn new(entries: u32) -> io::Result<Self> {
        // Completions are then worked off in our own system calls, not as interruptions of whatever runs, and a flag in
        // memory says when there are some.
        let mut builder = IoUring::builder();
        builder.setup_single_issuer().setup_defer_taskrun().setup_taskrun_flag().setup_submit_all();
        let best = builder.build(entries);
        let ring = best.or_else(|_| IoUring::new(entries))?;
        Ok(Self {
            ring,
            flights: Vec::new(),
            free: Vec::new(),
            queued: Vec::new(),
            done: VecDeque::new(),
            pending: 0,
            watching: 0,
            woken: false,
            here: PhantomData,
        })
    }

    /// Returns how many jobs were pushed and not yet taken with [`Self::finished`].
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.pending + self.done.len()
    }

    /// Returns how many of them are not finished.
    #[must_use]
    pub fn pending(&self) -> usize {
        self.pending
    }

    /// Queues a job of at least one piece; it goes to the kernel with [`Self::submit`] or [`Self::wait`]. Returns its
    /// number.
    ///
    /// # Panics
    /// When a piece lies outside of the memory.
    pub fn push(&mut self, job: Job<T>) -> usize {
        assert!(!job.pieces.is_empty() && job.pieces.len() < 1 << PIECE_BITS, "a job has pieces, and not too many");
        let slot = self.free.pop().unwrap_or(self.flights.len());
        if slot == self.flights.len() {
            self.flights.push(None);
        }
        for piece in &job.pieces {
            let end = piece.at.checked_add(piece.len).expect("lengths are small");
            assert!(end <= job.pages.len(), "a piece lies inside the memory");
        }
        let left = job.pieces.len();
        self.flights[slot] = Some(Flight { job, left });
        self.queued.push(slot);
        self.pending += 1;
        slot
    }

    /// Does the one job there is, if it is small, in the ordinary way: the kernel is slower with a job for a ring than with
    /// pread and pwrite, and only makes up for it when it gets several. Tells whether there was such a job; it is finished
    /// then.
    pub fn run_alone(&mut self) -> bool {
        use std::os::unix::fs::FileExt;
        if self.pending != 1 || self.queued.len() != 1 {
            return false;
        }
        let slot = self.queued[0];
        let flight = self.flights[slot].as_mut().expect("queued jobs are in flight");
        let job = &mut flight.job;
        let [piece] = &mut job.pieces[..] else { return false };
        if piece.len > ALONE_MAX {
            return false;
        }
        let memory = piece.at..piece.at + piece.len;
        let result = if job.write {
            piece.file.write_at(&job.pages[memory], piece.offset)
        } else {
            piece.file.read_at(&mut job.pages[memory], piece.offset)
        };
        piece.result = match result {
            Ok(len) => i32::try_from(len).expect("requests are small"),
            Err(error) => -error.raw_os_error().unwrap_or(libc::EIO),
        };
        self.queued.clear();
        self.finish(slot);
        true
    }

    fn finish(&mut self, slot: usize) {
        let flight = self.flights[slot].take().expect("a job that is finished was in flight");
        self.free.push(slot);
        self.pending -= 1;
        self.done.push_back(flight.job);
    }

    /// Puts what is queued where the kernel finds it.
    fn enqueue_jobs(&mut self) -> io::Result<()> {
        for slot in std::mem::take(&mut self.queued) {
            let flight = self.flights[slot].as_mut().expect("queued jobs are in flight");
            let memory = flight.job.pages.as_mut_ptr();
            let mut entries = Vec::with_capacity(flight.left);
            for (number, piece) in flight.job.pieces.iter().enumerate() {
                let len = u32::try_from(piece.len).expect("requests are small");
                let file = types::Fd(piece.file.as_raw_fd());
                let at = memory.wrapping_add(piece.at);
                let entry = if flight.job.write {
                    opcode::Write::new(file, at, len).offset(piece.offset).build()
                } else {
                    opcode::Read::new(file, at, len).offset(piece.offset).build()
                };
                entries.push(entry.user_data((slot as u64) << PIECE_BITS | number as u64));
            }
            for entry in &entries {
                self.enqueue(entry)?;
            }
        }
        Ok(())
    }

    fn enqueue(&mut self, entry: &squeue::Entry) -> io::Result<()> {
        loop {
            // SAFETY: memory and file of the entry stay in `flights` until its completion was seen, also when the ring
            // is dropped; an entry that only watches a descriptor has no memory.
            if unsafe { self.ring.submission().push(entry) }.is_ok() {
                return Ok(());
            }
            self.enter(0)?;
        }
    }

    /// Returns the tag and the memory of a job that writes, while it is in flight.
    pub fn written(&mut self, job: usize) -> Option<(&mut T, &[u8])> {
        let job = &mut self.flights.get_mut(job)?.as_mut()?.job;
        // The kernel only reads the memory, as the caller does.
        if job.write { Some((&mut job.tag, &job.pages)) } else { None }
    }

    /// Makes the next [`Self::wait`] return when a descriptor is readable, too. It is watched until it was, also beyond
    /// that call; as long as it is, another one with the same number (below [`WATCHED_MAX`]) is not.
    pub fn watch(&mut self, number: u32, fd: BorrowedFd<'_>) -> io::Result<()> {
        assert!(number < WATCHED_MAX, "there are so many numbers");
        if self.watching & 1 << number != 0 {
            return Ok(());
        }
        let flags = u32::from(libc::POLLIN.unsigned_abs());
        let entry = opcode::PollAdd::new(types::Fd(fd.as_raw_fd()), flags).build();
        self.enqueue(&entry.user_data(WATCH + u64::from(number)))?;
        self.watching |= 1 << number;
        Ok(())
    }

    /// Gives the kernel what is queued, and takes what it has finished.
    pub fn submit(&mut self) -> io::Result<()> {
        self.enqueue_jobs()?;
        self.enter(0)?;
        self.reap();
        Ok(())
    }

    /// Tells whether [`Self::wait`] would not wait now. Costs no system call.
    #[must_use]
    pub fn is_ready(&mut self) -> bool {
        self.woken || self.has_completions()
    }

    /// Tells whether the kernel has finished something. Costs no system call.
    #[must_use]
    pub fn has_completions(&mut self) -> bool {
        !self.done.is_empty() || self.ring.submission().taskrun() || !self.ring.completion().is_empty()
    }

    /// Gives the kernel what is queued and waits for a completion or the watched descriptor.
    pub fn wait(&mut self) -> io::Result<()> {
        self.enqueue_jobs()?;
        self.reap();
        // What was seen readable is not watched any more: to wait for it now would be to wait for ever.
        self.enter(usize::from(self.done.is_empty() && !self.woken))?;
        self.reap();
        self.woken = false;
        Ok(())
    }

    /// Gives the kernel what is queued, and waits for `want` completions; also with 0 it does what it has deferred.
    fn enter(&mut self, want: usize) -> io::Result<()> {
        // The kernel does deferred work only when it is asked for events (IORING_ENTER_GETEVENTS). The crate sees to that
        // when the flag in memory says that there is some, from version 0.7.16 on: an older one never would with 0, and
        // what is finished would stay unseen until somebody waits.
        match self.ring.submit_and_wait(want) {
            Ok(_) => Ok(()),
            Err(error) if matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::EBUSY)) => {
                self.reap();
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    fn reap(&mut self) {
        let mut finished = Vec::new();
        for entry in self.ring.completion() {
            if let Some(number) = entry.user_data().checked_sub(WATCH) {
                self.watching &= !(1 << number);
                self.woken = true;
                continue;
            }
            let slot = usize::try_from(entry.user_data() >> PIECE_BITS).expect("an index");
            let number = usize::try_from(entry.user_data() & ((1 << PIECE_BITS) - 1)).expect("an index");
            let flight = self.flights[slot].as_mut().expect("a completion belongs to a job in flight");
            flight.job.pieces[number].result = entry.result();
            flight.left -= 1;
            if flight.left == 0 {
                finished.push(slot);
            }
        }
        finished.into_iter().for_each(|slot| self.finish(slot));
    }

    /// Returns a job that is finished.
    pub fn finished(&mut self) -> Option<Job<T>> {
        self.done.pop_front()
    }
}

impl<T> Drop for Ring<T> {
    fn drop(&mut self) {
        // What the kernel was never told of is just dropped.
        for slot in std::mem::take(&mut self.queued) {
            self.flights[slot] = None;
            self.pending -= 1;
        }
        while self.pending > 0 {
            if self.enter(1).is_err() {
                // The kernel may still write into the memory: it is given up, not freed.
                Vec::leak(std::mem::take(&mut self.flights));
                return;
            }
            self.reap();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_is_read_back_and_a_pipe_wakes() {
        let Ok(mut ring) = Ring::new(4) else {
            println!("skipped: this host allows no io_uring");
            return;
        };
        let file = Arc::new(tempfile::tempfile().unwrap());
        let piece = |at: usize| Piece { file: Arc::clone(&file), offset: 100 + at as u64, at, len: 1000, result: 0 };
        let mut pages = Pages::new(16_000).unwrap();
        pages.fill(7);
        let job = Job { pages, write: true, pieces: (0..16).map(|i| piece(i * 1000)).collect(), tag: "w" };
        let number = ring.push(job);
        assert_eq!(ring.written(number).unwrap().1[15_999], 7);
        let wait = |ring: &mut Ring<&'static str>| loop {
            if let Some(job) = ring.finished() {
                return job;
            }
            ring.wait().unwrap();
        };
        let done = wait(&mut ring);
        assert!(done.pieces.iter().all(|piece| piece.result == 1000));
        let pieces = vec![piece(0), Piece { len: 2000, ..piece(15_000) }];
        let mut number = ring.push(Job { pages: Pages::new(17_000).unwrap(), write: false, pieces, tag: "r" });
        assert!(ring.written(number).is_none());
        let done = wait(&mut ring);
        assert_eq!((done.pieces[0].result, done.pieces[1].result), (1000, 1000), "the file ends there");
        assert_eq!((done.pages[999], done.pages[1000], done.pages[15_999]), (7, 0, 7));
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        ring.watch(3, std::os::fd::AsFd::as_fd(&reader)).unwrap();
        ring.submit().unwrap();
        rustix::io::write(&writer, b"x").unwrap();
        // Whoever looks first must not make the one who waits miss it.
        ring.submit().unwrap();
        ring.reap();
        ring.wait().unwrap();
        assert!(ring.watching == 0 && ring.finished().is_none());
        number = ring.push(Job { pages: done.pages, write: false, pieces: vec![piece(0)], tag: "dropped" });
        assert_eq!(number, 0);
    }

    #[test]
    fn a_job_is_in_flight_until_it_is_taken() {
        let Ok(mut ring) = Ring::new(4) else {
            println!("skipped: this host allows no io_uring");
            return;
        };
        let file = tempfile::tempfile().unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, &[7; 4096], 0).unwrap();
        let pieces = vec![Piece { file: Arc::new(file), offset: 0, at: 0, len: 4096, result: 0 }];
        ring.push(Job { pages: Pages::new(4096).unwrap(), write: false, pieces, tag: () });
        // The page is in the cache: the kernel may be done with it at once.
        while ring.pending() > 0 {
            assert_eq!(ring.in_flight(), 1);
            ring.submit().unwrap();
        }
        assert_eq!(ring.in_flight(), 1, "nobody was told of it yet");
        assert_eq!(ring.finished().unwrap().pieces[0].result, 4096);
        assert_eq!(ring.in_flight(), 0);
    }

    #[test]
    fn what_the_kernel_has_finished_is_taken_up_without_waiting() {
        let Ok(mut ring) = Ring::new(4) else {
            println!("skipped: this host allows no io_uring");
            return;
        };
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        let file = Arc::new(fs::File::from(reader));
        for n in 0..10 {
            let pieces = vec![Piece { file: Arc::clone(&file), offset: u64::MAX, at: 0, len: 1, result: 0 }];
            ring.push(Job { pages: Pages::new(4096).unwrap(), write: false, pieces, tag: n });
            ring.submit().unwrap();
            assert!(ring.finished().is_none() && !ring.has_completions(), "there is nothing to read");
            rustix::io::write(&writer, &[n]).unwrap();
            // The work is deferred now, and the flag says so: nobody is there to do it but this thread.
            while !ring.has_completions() {
                std::thread::yield_now();
            }
            ring.submit().unwrap();
            let done = ring.finished().expect("it is finished, and was asked for");
            assert_eq!((done.pages[0], done.pieces[0].result, done.tag), (n, 1, n));
        }
    }
}
