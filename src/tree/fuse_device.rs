//! The device behind a mount, read and answered without fuser, and the buffers for that.
//!
//! # Rules
//! 1. A request is read so that the data of a write begins on a page, and the data of a read is put there, with room for
//!    the header of the answer before it. So direct I/O needs no copy, and an answer is one write.
//! 2. An answer that the kernel no longer wants (the program was killed) is no error.

use std::fs;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use rustix::fs::OFlags;

use super::fuse_wire as wire;
use crate::sync::Mutex;
use crate::sys::pages::{PAGE, Pages};

/// Where the data of a request or an answer begins.
pub(super) const DATA: usize = PAGE;
/// Where a request is read to.
const START: usize = DATA - wire::TRANSFER;
/// Buffers that are kept for later; more are given back.
const SPARE_MAX: usize = 64;
/// Buffers in huge pages, for few and large requests; many at a time are small.
const HUGE_MAX: usize = 4;

/// The device, with its buffers.
#[derive(Debug)]
pub(super) struct Device {
    file: fs::File,
    request_max: usize,
    /// Whether reading waits.
    waits: AtomicBool,
    spare: Mutex<Vec<Pages>>,
    made: AtomicUsize,
}

impl Device {
    /// Takes a descriptor of a mount whose requests have `request_max` bytes of data at most. Reading never waits.
    pub(super) fn new(file: fs::File, request_max: usize) -> io::Result<Arc<Self>> {
        rustix::fs::fcntl_setfl(&file, rustix::fs::fcntl_getfl(&file)? | OFlags::NONBLOCK)?;
        Ok(Arc::new(Self {
            file,
            request_max,
            waits: AtomicBool::new(false),
            spare: Mutex::default(),
            made: AtomicUsize::new(0),
        }))
    }

    pub(super) fn file(&self) -> &fs::File {
        &self.file
    }

    /// Returns a buffer for a request.
    pub(super) fn buffer(&self) -> io::Result<Pages> {
        if let Some(pages) = self.spare.lock().pop() {
            return Ok(pages);
        }
        let len = DATA + self.request_max;
        if self.made.fetch_add(1, Ordering::Relaxed) < HUGE_MAX { Pages::huge(len) } else { Pages::new(len) }
    }

    /// Takes a buffer back.
    pub(super) fn give_back(&self, pages: Pages) {
        let mut spare = self.spare.lock();
        // What was given back last is used first; the huge ones, which came first, stay on top with few requests.
        if spare.len() < SPARE_MAX {
            spare.push(pages);
        }
    }

    /// Reads a request into a buffer and returns its length; 0 when there is none.
    ///
    /// # Errors
    /// ENODEV when the file system was unmounted.
    pub(super) fn receive(&self, pages: &mut Pages) -> io::Result<usize> {
        self.read(pages, false)
    }

    /// As [`Device::receive`], but waits for one: a system call less than to be told that there is one, and a wake-up of
    /// less work.
    ///
    /// # Errors
    /// ENODEV when the file system was unmounted.
    pub(super) fn wait(&self, pages: &mut Pages) -> io::Result<usize> {
        self.read(pages, true)
    }

    fn read(&self, pages: &mut Pages, waits: bool) -> io::Result<usize> {
        // The flag is of the open file. One thread reads it; whoever answers does not care.
        if self.waits.swap(waits, Ordering::Relaxed) != waits {
            let flags = rustix::fs::fcntl_getfl(&self.file)?;
            rustix::fs::fcntl_setfl(
                &self.file,
                if waits { flags - OFlags::NONBLOCK } else { flags | OFlags::NONBLOCK },
            )?;
        }
        loop {
            match rustix::io::read(&self.file, &mut pages[START..]) {
                Ok(len) => return Ok(len),
                Err(rustix::io::Errno::AGAIN) => return Ok(0),
                // NOENT: the program that asked was killed meanwhile.
                Err(rustix::io::Errno::INTR | rustix::io::Errno::NOENT) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Returns the request in a buffer.
    pub(super) fn message(pages: &Pages, len: usize) -> &[u8] {
        &pages[START..START + len]
    }

    /// Sends an answer, or what fuser made of one.
    pub(super) fn send(&self, answer: &[u8]) {
        match rustix::io::write(&self.file, answer) {
            Ok(_) | Err(rustix::io::Errno::NOENT) => {}
            Err(error) => tracing::debug!("the kernel refuses an answer: {error}"),
        }
    }

    /// Answers with an errno, or with nothing (0).
    pub(super) fn fail(&self, unique: u64, errno: i32) {
        self.send(&wire::answer(unique, errno, 0));
    }

    /// Answers a read with the first `len` bytes of data in a buffer.
    pub(super) fn send_data(&self, unique: u64, pages: &mut Pages, len: usize) {
        let begin = DATA - wire::ANSWER;
        pages[begin..DATA].copy_from_slice(&wire::answer(unique, 0, len));
        self.send(&pages[begin..DATA + len]);
    }
}
