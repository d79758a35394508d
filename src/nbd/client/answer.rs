//! The answer to one request, as it comes in: in one reply, or in chunks of any order.
//!
//! # Rules
//! 1. A read is answered when each byte was told exactly once: chunks lie inside of what was asked for and do not overlap.
//! 2. No length of the server is an allocation: what is read from the socket fits the request or a small limit.
//! 3. An error anywhere in a reply makes all of it an error, also if data came before.

use std::ops::Range;

use super::reader::{Broken, Reader};
use crate::nbd::wire::{Errno, Reply, TEXT_MAX, chunk, number, word};

/// Chunks of one reply at most.
const CHUNKS_MAX: usize = 4096;
/// Bytes of an error chunk at most: number, length, text, offset.
const ERROR_MAX: usize = 4 + 2 + TEXT_MAX + 8;

/// What comes of a request.
#[derive(Debug)]
pub(super) struct Answer {
    /// First byte that was asked for.
    offset: u64,
    /// What was read; empty for other requests.
    data: Vec<u8>,
    /// Replies come in chunks.
    structured: bool,
    reads: bool,
    /// What was told of the data, relative to its beginning.
    told: Vec<Range<usize>>,
    chunks: usize,
    failed: Option<Errno>,
    done: bool,
}

impl Answer {
    /// Waits for the answer to a read, or (`len` is `None`) to another request.
    pub(super) fn new(offset: u64, len: Option<usize>, structured: bool) -> Self {
        Self {
            offset,
            data: vec![0; len.unwrap_or(0)],
            structured,
            reads: len.is_some(),
            told: Vec::new(),
            chunks: 0,
            failed: None,
            done: false,
        }
    }

    /// Tells whether it is complete.
    pub(super) fn is_done(&self) -> bool {
        self.done
    }

    /// Returns what was read, or why not.
    pub(super) fn finish(self) -> Result<Vec<u8>, Errno> {
        match self.failed {
            Some(errno) => Err(errno),
            None => Ok(self.data),
        }
    }

    /// Takes in what follows the header of a reply to this request.
    pub(super) fn take(&mut self, reply: Reply, reader: &mut Reader) -> Result<(), Broken> {
        match reply {
            Reply::Simple { error, .. } => {
                if self.reads && self.structured {
                    return Err(Broken::senseless("a read is not answered in chunks"));
                }
                if error != 0 {
                    self.failed = Some(Errno::by_number(error));
                } else if self.reads {
                    reader.receive(&mut self.data)?;
                }
                self.done = true;
                Ok(())
            }
            Reply::Chunk { flags, kind, length, .. } => {
                if !self.structured {
                    return Err(Broken::senseless("chunks were not agreed on"));
                }
                self.chunks += 1;
                if self.chunks > CHUNKS_MAX {
                    return Err(Broken::senseless("a reply has too many chunks"));
                }
                self.take_chunk(kind, length as usize, reader)?;
                if flags & chunk::DONE != 0 {
                    self.end()?;
                }
                Ok(())
            }
        }
    }

    fn take_chunk(&mut self, kind: u16, length: usize, reader: &mut Reader) -> Result<(), Broken> {
        match kind {
            chunk::NONE if length == 0 => Ok(()),
            chunk::OFFSET_DATA if self.reads && length > 8 => {
                let mut head = [0; 8];
                reader.receive(&mut head)?;
                let range = self.tell(u64::from_be_bytes(head), length - 8)?;
                reader.receive(&mut self.data[range])
            }
            chunk::OFFSET_HOLE if self.reads && length == 12 => {
                let mut body = [0; 12];
                reader.receive(&mut body)?;
                let range = self.tell(number::<8>(&body, 0), word(&body, 8) as usize)?;
                self.data[range].fill(0);
                Ok(())
            }
            kind if kind >> 15 == 1 && (4..=ERROR_MAX).contains(&length) => {
                let mut body = vec![0; length];
                reader.receive(&mut body)?;
                self.failed = Some(Errno::by_number(word(&body, 0)));
                Ok(())
            }
            _ => Err(Broken::senseless("a chunk is of no kind that could be")),
        }
    }

    /// Notes that bytes are told, and returns where they are in the data.
    fn tell(&mut self, offset: u64, len: usize) -> Result<Range<usize>, Broken> {
        let outside = || Broken::senseless("a chunk lies beside what was read");
        let start = offset.checked_sub(self.offset).and_then(|at| usize::try_from(at).ok()).ok_or_else(outside)?;
        let end = start.checked_add(len).filter(|end| *end <= self.data.len()).ok_or_else(outside)?;
        if len == 0 || self.told.iter().any(|told| told.start < end && start < told.end) {
            return Err(Broken::senseless("chunks overlap"));
        }
        match self.told.last_mut() {
            // They come in order, mostly.
            Some(last) if last.end == start => last.end = end,
            _ => self.told.push(start..end),
        }
        Ok(start..end)
    }

    fn end(&mut self) -> Result<(), Broken> {
        let told: usize = self.told.iter().map(ExactSizeIterator::len).sum();
        if self.failed.is_none() && told != self.data.len() {
            return Err(Broken::senseless("a reply ends before all was read"));
        }
        self.done = true;
        Ok(())
    }
}
