//! Sending: the changes between two states, data read in the order of addresses inside a window, written in that of the disk.

use std::collections::VecDeque;
use std::io::Write;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::fetch::{Fetcher, Job, with_readers};
use super::format::DATA_MAX;
use super::source::Source;
use super::token::Token;
use super::writer::StreamWriter;
use crate::error::{Error, Result};
use crate::progress::Progress;
use crate::snapshot::Verifier;
use crate::snapshot::diff::Extent;
use crate::store::Store;
use crate::units::{BLOCK_SIZE, CHUNK_SIZE, ChunkIndex, to_usize};

/// Bytes of data in a window.
const WINDOW: u64 = 8 << 20;
/// Windows that are being read; what is written is in memory too. With fewer and larger ones the readers run out of work
/// whenever the slowest of a window is waited for.
const AHEAD: usize = 3;
/// Extents in a window.
const ITEMS_MAX: usize = 2048;

/// What to send.
#[derive(Debug, Clone)]
pub enum What {
    /// The changes from one snapshot (disk, name) to another.
    States {
        /// The base, live or retired; `None` for nothing.
        from: Option<(String, String)>,
        /// What it leads to; live.
        to: (String, String),
    },
    /// The rest of a stream that was cut off.
    Rest(Token),
}

/// How to send.
#[derive(Debug, Clone)]
pub struct SendOptions {
    /// What.
    pub what: What,
    /// Whether to compress where it pays.
    pub compress: bool,
}

/// What was sent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SendReport {
    /// The disk.
    pub disk: String,
    /// The snapshot.
    pub snapshot: String,
    /// Its identity.
    pub uuid: Uuid,
    /// Identity of the base.
    pub base: Option<Uuid>,
    /// First byte of the disk that was sent.
    pub start: u64,
    /// Bytes of data.
    pub data: u64,
    /// Bytes of zeros.
    pub zeros: u64,
    /// Bytes of the stream.
    pub stream: u64,
    /// Bytes of data that no seal covers yet, so that nothing could be compared.
    pub unverified: u64,
}

/// Sends.
///
/// # Errors
/// `NotFound`; `Failed` when the snapshot is retired, or the states of a token are not the same any more; `Corrupt` when a
/// block does not match its seal, with disk, byte and segment; any error of the host or of `out`.
pub fn send(
    store: &Arc<Store>,
    options: &SendOptions,
    out: &mut dyn Write,
    progress: &dyn Progress,
) -> Result<SendReport> {
    let mut source = match &options.what {
        What::States { from, to } => Source::open(store, from.as_ref(), to)?,
        What::Rest(token) => Source::resume(store, token)?,
    };
    let (mut data, mut zeros) = (0, 0);
    source.each(&mut |extent| {
        *(if extent.zero { &mut zeros } else { &mut data }) += extent.length;
        Ok(())
    })?;
    (source.header.data, source.header.zeros) = (data, zeros);
    progress.total(data);
    progress.message("sending");
    let verifier = Verifier::new(store, source.device.epoch())?;
    let mut writer = StreamWriter::new(out, &source.header)?;
    let unverified = with_readers(&source.device, &source.disk_name, options.compress, |fetcher| {
        let mut sender = Sender::new(&source, verifier, fetcher, &mut writer, progress);
        source.each(&mut |extent| sender.extent(extent))?;
        sender.finish()
    })?;
    let header = &source.header;
    Ok(SendReport {
        disk: source.disk_name.clone(),
        snapshot: header.target.name.clone(),
        uuid: header.target.uuid,
        base: header.base.as_ref().map(|base| base.uuid),
        start: header.start,
        data,
        zeros,
        stream: writer.end()?,
        unverified,
    })
}

/// A part of the stream that is on its way.
#[derive(Debug, Clone, Copy)]
enum Item {
    Zeros(u64, u64),
    /// A job by number, with its bytes.
    Data(u64, u64),
}

struct Sender<'a, 'b> {
    source: &'a Source,
    verifier: Verifier,
    fetcher: &'a Fetcher<'a>,
    writer: &'a mut StreamWriter<'b>,
    progress: &'a dyn Progress,
    /// The window that is being put together.
    items: Vec<Item>,
    jobs: Vec<Job>,
    bytes: u64,
    /// Those that are being read.
    reading: VecDeque<Vec<Item>>,
    seq: u64,
    unverified: u64,
}

impl<'a, 'b> Sender<'a, 'b> {
    fn new(
        source: &'a Source,
        verifier: Verifier,
        fetcher: &'a Fetcher<'a>,
        writer: &'a mut StreamWriter<'b>,
        progress: &'a dyn Progress,
    ) -> Self {
        let (items, jobs, reading) = (Vec::new(), Vec::new(), VecDeque::new());
        Self { source, verifier, fetcher, writer, progress, items, jobs, bytes: 0, reading, seq: 0, unverified: 0 }
    }

    fn extent(&mut self, extent: Extent) -> Result<()> {
        if extent.zero {
            self.items.push(Item::Zeros(extent.offset, extent.length));
            return self.turn_if_full();
        }
        let (mut at, end) = (extent.offset, extent.offset + extent.length);
        while at < end {
            // Never across the border of a chunk: DATA_MAX divides it.
            let upto = end.min((at / DATA_MAX + 1) * DATA_MAX);
            self.piece(at, upto - at)?;
            at = upto;
            self.turn_if_full()?;
        }
        Ok(())
    }

    fn piece(&mut self, offset: u64, length: u64) -> Result<()> {
        let chunk = ChunkIndex::of_byte(offset);
        let first = to_usize((offset - chunk.byte()) / BLOCK_SIZE);
        let last = to_usize((offset + length - chunk.byte()).div_ceil(BLOCK_SIZE));
        let runs = self.source.device.runs(chunk, first, last)?;
        let checksums = self.verifier.checksums(chunk, &runs)?;
        let unknown = checksums.iter().filter(|checksum| checksum.is_none()).count();
        self.unverified += unknown as u64 * BLOCK_SIZE;
        self.items.push(Item::Data(self.seq, length));
        self.jobs.push(Job { seq: self.seq, chunk, offset, length, runs, checksums });
        self.seq += 1;
        self.bytes += length;
        Ok(())
    }

    fn turn_if_full(&mut self) -> Result<()> {
        if self.bytes >= WINDOW || self.items.len() >= ITEMS_MAX { self.turn() } else { Ok(()) }
    }

    /// Has the window read that was put together, and writes the oldest one if there are enough.
    fn turn(&mut self) -> Result<()> {
        self.fetcher.submit(std::mem::take(&mut self.jobs));
        self.bytes = 0;
        self.reading.push_back(std::mem::take(&mut self.items));
        if self.reading.len() > AHEAD { self.write_oldest() } else { Ok(()) }
    }

    fn write_oldest(&mut self) -> Result<()> {
        for item in self.reading.pop_front().unwrap_or_default() {
            if self.progress.cancelled() {
                return Err(Error::failed("the send was cancelled"));
            }
            match item {
                Item::Zeros(offset, length) => self.writer.zeros(offset, length)?,
                Item::Data(seq, length) => {
                    let fetched = self.fetcher.take(seq)?;
                    let (offset, length, codec) = (fetched.offset, length, fetched.codec);
                    self.writer.data(offset, length, codec, fetched.stored(), fetched.crc)?;
                    self.fetcher.give_back(fetched);
                    self.progress.advance(length);
                }
            }
        }
        Ok(())
    }

    /// Writes what is left and returns how many bytes could not be verified.
    fn finish(mut self) -> Result<u64> {
        self.turn()?;
        while !self.reading.is_empty() {
            self.write_oldest()?;
        }
        Ok(self.unverified)
    }
}

const _: () = assert!(CHUNK_SIZE.is_multiple_of(DATA_MAX), "a piece lies in one chunk");
