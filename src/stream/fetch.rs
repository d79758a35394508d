//! Reading the data of a stream: many reads in flight, in the order of addresses, verified, checksummed, compressed.
//!
//! ```text
//! sender --- jobs of a window, sorted by address ---> readers (one read each at a time)
//!   ^                                                     |
//!   +------ results, taken in the order of the disk ------+
//! ```
//!
//! # Rules
//! 1. A job is at most 1 MiB of one chunk. Its buffer is aligned, so that the disk writes into it directly.
//! 2. What bounds memory is the sender: it gives out a few windows at a time.
//! 3. A reader that fails hands over the error in the place of its result; nobody waits for what never comes.

use std::collections::{HashMap, VecDeque};

use super::format::{Codec, DATA_MAX};
use crate::codec::{crc32, crc32_of_blocks};
use crate::error::{Error, Kind, Result};
use crate::map::Run;
use crate::snapshot::SnapshotDevice;
use crate::sync::{Condvar, Mutex};
use crate::sys::pages::Pages;
use crate::units::{BLOCK_SIZE, BlockAddress, ChunkIndex, to_usize};

/// Reads in flight.
const READERS: usize = 16;
/// Bytes of each of the samples that are compressed before a whole job is.
const SAMPLE: usize = 8 << 10;

/// Something to read.
#[derive(Debug)]
pub(super) struct Job {
    /// Its place in the stream.
    pub seq: u64,
    /// The chunk it lies in.
    pub chunk: ChunkIndex,
    /// First byte of the disk; a multiple of 4096.
    pub offset: u64,
    /// Bytes; fewer than the blocks have only at the end of the disk.
    pub length: u64,
    /// Where its blocks are.
    pub runs: Vec<Run>,
    /// Checksums of the blocks, where they are known.
    pub checksums: Vec<Option<u32>>,
}

impl Job {
    fn address(&self) -> Option<BlockAddress> {
        self.runs.iter().find_map(|run| run.address)
    }
}

/// Bytes for the stream.
#[derive(Debug)]
pub(super) struct Fetched {
    pub offset: u64,
    pub length: u64,
    pub codec: Codec,
    /// CRC32 of the plain bytes.
    pub crc: u32,
    bytes: Bytes,
}

#[derive(Debug)]
enum Bytes {
    Plain(Buffer),
    Packed(Vec<u8>),
}

impl Fetched {
    /// Returns the bytes as they go into the stream.
    pub(super) fn stored(&self) -> &[u8] {
        match &self.bytes {
            Bytes::Plain(buffer) => &buffer.bytes()[..to_usize(self.length)],
            Bytes::Packed(bytes) => bytes,
        }
    }
}

/// Memory that begins at a multiple of 4096.
#[derive(Debug)]
enum Buffer {
    /// For a job of full size; half a huge page: in single pages a megabyte is too many pieces for one request to most disks.
    Full(Pages),
    /// For a smaller one.
    Small { memory: Vec<u8>, skip: usize },
}

impl Buffer {
    fn small(bytes: u64) -> Self {
        let memory = vec![0; to_usize(bytes + BLOCK_SIZE)];
        let skip = memory.as_ptr().align_offset(to_usize(BLOCK_SIZE));
        Self::Small { memory, skip }
    }

    /// Makes two.
    fn full() -> Result<[Self; 2]> {
        let cannot = |e| Error::io("the host has no memory for a stream", e);
        let mut first = Pages::huge(to_usize(2 * DATA_MAX)).map_err(cannot)?;
        let second = first.split_off(to_usize(DATA_MAX));
        Ok([Self::Full(first), Self::Full(second)])
    }

    fn bytes(&self) -> &[u8] {
        match self {
            Self::Full(pages) => pages,
            Self::Small { memory, skip } => &memory[*skip..],
        }
    }

    fn blocks(&mut self, from: usize, count: usize) -> &mut [u8] {
        let block = to_usize(BLOCK_SIZE);
        let range = from * block..(from + count) * block;
        match self {
            Self::Full(pages) => &mut pages[range],
            Self::Small { memory, skip } => &mut memory[*skip..][range],
        }
    }
}

#[derive(Debug, Default)]
struct State {
    todo: VecDeque<Job>,
    ready: HashMap<u64, Result<Fetched>>,
    free: Vec<Buffer>,
    closed: bool,
}

/// The readers of one stream.
#[derive(Debug)]
pub(super) struct Fetcher<'a> {
    device: &'a SnapshotDevice,
    disk: &'a str,
    compress: bool,
    state: Mutex<State>,
    work: Condvar,
    done: Condvar,
}

/// Lets the readers end, however the sender ends.
struct Closing<'a, 'b>(&'a Fetcher<'b>);

impl Drop for Closing<'_, '_> {
    fn drop(&mut self) {
        let mut state = self.0.state.lock();
        state.closed = true;
        state.todo.clear();
        self.0.work.notify_all();
    }
}

/// Hands over an error if its reader panics.
struct Promise<'a, 'b> {
    fetcher: &'a Fetcher<'b>,
    seq: u64,
    kept: bool,
}

impl Promise<'_, '_> {
    fn keep(mut self, result: Result<Fetched>) {
        self.kept = true;
        self.fetcher.state.lock().ready.insert(self.seq, result);
        self.fetcher.done.notify_all();
    }
}

impl Drop for Promise<'_, '_> {
    fn drop(&mut self) {
        if !self.kept {
            let error = Error::failed("a reader of the stream ended in the middle of its work");
            self.fetcher.state.lock().ready.insert(self.seq, Err(error));
            self.fetcher.done.notify_all();
        }
    }
}

/// Calls `send` with readers at its side.
pub(super) fn with_readers<T>(
    device: &SnapshotDevice,
    disk: &str,
    compress: bool,
    send: impl FnOnce(&Fetcher<'_>) -> Result<T>,
) -> Result<T> {
    let (work, done) = (Condvar::new(), Condvar::new());
    let fetcher = Fetcher { device, disk, compress, state: Mutex::default(), work, done };
    std::thread::scope(|scope| {
        let _closing = Closing(&fetcher);
        for n in 0..READERS {
            std::thread::Builder::new()
                .name(format!("send-{n}"))
                .spawn_scoped(scope, || fetcher.read_all())
                .map_err(|e| Error::io("cannot start a reader", e))?;
        }
        send(&fetcher)
    })
}

impl Fetcher<'_> {
    /// Gives out the jobs of a window.
    pub(super) fn submit(&self, mut jobs: Vec<Job>) {
        jobs.sort_by_key(Job::address);
        self.state.lock().todo.extend(jobs);
        self.work.notify_all();
    }

    /// Waits for the result of a job.
    pub(super) fn take(&self, seq: u64) -> Result<Fetched> {
        let mut state = self.state.lock();
        loop {
            if let Some(result) = state.ready.remove(&seq) {
                return result;
            }
            self.done.wait(&mut state);
        }
    }

    /// Gives the memory of a result back.
    pub(super) fn give_back(&self, fetched: Fetched) {
        if let Bytes::Plain(buffer) = fetched.bytes {
            self.keep(buffer);
        }
    }

    fn keep(&self, buffer: Buffer) {
        if matches!(buffer, Buffer::Full(_)) {
            self.state.lock().free.push(buffer);
        }
    }

    /// Returns memory for a job. Small jobs are many: they get no more than they need.
    fn buffer(&self, job: &Job) -> Result<Buffer> {
        if job.length < DATA_MAX {
            return Ok(Buffer::small(job.length.next_multiple_of(BLOCK_SIZE)));
        }
        if let Some(kept) = self.state.lock().free.pop() {
            return Ok(kept);
        }
        let [first, second] = Buffer::full()?;
        self.keep(second);
        Ok(first)
    }

    fn read_all(&self) {
        let mut packer = Packer::default();
        loop {
            let job = {
                let mut state = self.state.lock();
                loop {
                    if state.closed {
                        return;
                    }
                    if let Some(job) = state.todo.pop_front() {
                        break job;
                    }
                    self.work.wait(&mut state);
                }
            };
            let promise = Promise { fetcher: self, seq: job.seq, kept: false };
            promise.keep(self.buffer(&job).and_then(|buffer| self.fetch(&job, buffer, &mut packer)));
        }
    }

    fn fetch(&self, job: &Job, mut buffer: Buffer, packer: &mut Packer) -> Result<Fetched> {
        let store = self.device.store();
        let first = job.runs.first().map_or(0, |run| run.start);
        for run in &job.runs {
            let part = buffer.blocks(run.start - first, run.len);
            let inside = store.fence.enter();
            let read = store.read_run(run, part, 0);
            drop(inside);
            read.map_err(|error| self.name(job, run, &error))?;
        }
        let crcs = self.verify(job, &mut buffer)?;
        let plain = &buffer.bytes()[..to_usize(job.length)];
        let whole = job.length.is_multiple_of(BLOCK_SIZE) && crcs.len() as u64 == job.length / BLOCK_SIZE;
        let crc = if whole { crc32_of_blocks(crcs) } else { crc32(plain) };
        let packed = if self.compress { packer.pack(plain) } else { None };
        let (codec, bytes) = match packed {
            Some(bytes) => {
                self.keep(buffer);
                (Codec::Lz4, Bytes::Packed(bytes))
            }
            None => (Codec::Raw, Bytes::Plain(buffer)),
        };
        Ok(Fetched { offset: job.offset, length: job.length, codec, crc, bytes })
    }

    /// Says where a block lies that cannot be had.
    fn name(&self, job: &Job, run: &Run, error: &Error) -> Error {
        let segment = run.address.map_or(0, |address| address.segment().0);
        let offset = job.chunk.byte() + run.start as u64 * BLOCK_SIZE;
        let disk = self.disk;
        error.again().context(format!("cannot send disk '{disk}': byte {offset}, segment {segment}"))
    }

    /// Compares the blocks whose checksums are known; returns these, as far as there are any from the first block on.
    fn verify(&self, job: &Job, buffer: &mut Buffer) -> Result<Vec<u32>> {
        let first = job.runs.first().map_or(0, |run| run.start);
        let addresses = job.runs.iter().flat_map(|run| (run.start..run.start + run.len).map(move |index| (run, index)));
        for ((run, index), checksum) in addresses.zip(&job.checksums) {
            let Some(checksum) = checksum else { continue };
            if crc32(buffer.blocks(index - first, 1)) == *checksum {
                continue;
            }
            let one = Run { start: index, len: 1, address: run.address };
            let why = Error::new(Kind::Corrupt, "the block does not match the checksum it was sealed with")
                .hint("`afterimage scrub` lists all damaged blocks; restore the disk, or overwrite the block");
            if let Some(address) = run.address {
                self.device.store().mark_bad(address.slab().at(index));
            }
            return Err(self.name(job, &one, &why));
        }
        Ok(job.checksums.iter().map_while(|checksum| *checksum).collect())
    }
}

/// Compresses where it pays; a look at two samples tells cheaply where it does not.
#[derive(Debug, Default)]
struct Packer {
    out: Vec<u8>,
}

impl Packer {
    /// Returns an LZ4 block that saves at least a sixteenth, if there is one.
    fn pack(&mut self, plain: &[u8]) -> Option<Vec<u8>> {
        if plain.len() > SAMPLE * 4 {
            let middle = plain.len() / 2;
            let first = self.squeeze(&plain[..SAMPLE])?;
            let second = self.squeeze(&plain[middle..middle + SAMPLE])?;
            if !pays(first + second, SAMPLE * 2) {
                return None;
            }
        }
        let len = self.squeeze(plain)?;
        pays(len, plain.len()).then(|| self.out[..len].to_vec())
    }

    fn squeeze(&mut self, plain: &[u8]) -> Option<usize> {
        self.out.resize(lz4_flex::block::get_maximum_output_size(plain.len()), 0);
        lz4_flex::block::compress_into(plain, &mut self.out).ok()
    }
}

fn pays(packed: usize, plain: usize) -> bool {
    packed <= plain - plain / 16 && packed < plain
}
