//! Replies on their way out: as many as there are with one system call, their data from where it was read to.
//!
//! # Rules
//! 1. Sending never waits. What the client does not take stays here, in order; who fills this stops taking requests when
//!    it is full, so a slow client slows itself and nobody else.
//! 2. Blocks of zeros in what was read are told, not sent, to a client that understands it.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::ops::Range;

use super::link::Link;
use super::status::Extents;
use super::wire::{Errno, Reply, chunk};
use crate::disk::Buffers;
use crate::sys::pages::{PAGE, Pages};

/// Parts that one system call is given at most: far fewer than the kernel takes (1024).
const PARTS_MAX: usize = 128;
/// Pieces of one reply at most: with more of them the zeros are sent.
const PIECES_MAX: usize = 32;

/// Heads with the data that follows each.
#[derive(Debug)]
struct Answer {
    heads: Vec<u8>,
    /// Where the heads are cut, and what of the pages comes in between.
    cuts: Vec<(usize, Range<usize>)>,
    pages: Option<Pages>,
    len: usize,
}

/// The replies that are not sent.
#[derive(Debug, Default)]
pub(super) struct Outbox {
    answers: VecDeque<Answer>,
    /// Bytes of the first one that are sent.
    sent: usize,
    /// Bytes of heads; data is on pages.
    heads: usize,
    /// Replies that were sent in whole.
    taken: u64,
}

impl Outbox {
    /// Returns how much memory it has without that of pages.
    pub(super) fn heads(&self) -> usize {
        self.heads
    }

    /// Returns how many replies were sent in whole so far.
    pub(super) fn taken(&self) -> u64 {
        self.taken
    }

    /// Returns how many replies are not sent.
    pub(super) fn len(&self) -> usize {
        self.answers.len()
    }

    fn put(&mut self, heads: Vec<u8>, cuts: Vec<(usize, Range<usize>)>, pages: Option<Pages>) {
        let len = heads.len() + cuts.iter().map(|(_, data)| data.len()).sum::<usize>();
        self.heads += heads.len();
        self.answers.push_back(Answer { heads, cuts, pages, len });
    }

    /// Answers without data, or that nothing more comes.
    pub(super) fn done(&mut self, cookie: u64) {
        let mut heads = Vec::new();
        Reply::Simple { error: 0, cookie }.encode(&mut heads);
        self.put(heads, Vec::new(), None);
    }

    /// Answers with an error; structured if the request has to be answered so.
    pub(super) fn fail(&mut self, cookie: u64, errno: Errno, structured: bool) {
        let mut heads = Vec::new();
        if structured {
            Reply::Chunk { flags: chunk::DONE, kind: chunk::ERROR, cookie, length: 6 }.encode(&mut heads);
            heads.extend_from_slice(&(errno as u32).to_be_bytes());
            heads.extend_from_slice(&[0, 0]);
        } else {
            Reply::Simple { error: errno as u32, cookie }.encode(&mut heads);
        }
        self.put(heads, Vec::new(), None);
    }

    /// Answers a read with the first `len` bytes of the pages.
    pub(super) fn data(&mut self, cookie: u64, pages: Pages, len: usize) {
        let mut heads = Vec::new();
        Reply::Simple { error: 0, cookie }.encode(&mut heads);
        let cuts = vec![(heads.len(), 0..len)];
        self.put(heads, cuts, Some(pages));
    }

    /// As [`Outbox::data`], in chunks; with `whole` in one. What was read lies at `offset` of the export.
    pub(super) fn data_chunks(&mut self, cookie: u64, offset: u64, pages: Pages, len: usize, whole: bool) {
        let pieces = if whole { vec![(0..len, false)] } else { pieces(&pages[..len], offset) };
        let (mut heads, mut cuts) = (Vec::new(), Vec::new());
        let last = pieces.len().saturating_sub(1);
        for (number, (range, zero)) in pieces.into_iter().enumerate() {
            let flags = if number == last { chunk::DONE } else { 0 };
            let at = offset + range.start as u64;
            let size = u32::try_from(range.len()).expect("reads are short");
            if zero {
                Reply::Chunk { flags, kind: chunk::OFFSET_HOLE, cookie, length: 12 }.encode(&mut heads);
                heads.extend_from_slice(&at.to_be_bytes());
                heads.extend_from_slice(&size.to_be_bytes());
            } else {
                Reply::Chunk { flags, kind: chunk::OFFSET_DATA, cookie, length: 8 + size }.encode(&mut heads);
                heads.extend_from_slice(&at.to_be_bytes());
                cuts.push((heads.len(), range));
            }
        }
        self.put(heads, cuts, Some(pages));
    }

    /// Answers a read of nothing.
    pub(super) fn nothing(&mut self, cookie: u64) {
        let mut heads = Vec::new();
        Reply::Chunk { flags: chunk::DONE, kind: chunk::NONE, cookie, length: 0 }.encode(&mut heads);
        self.put(heads, Vec::new(), None);
    }

    /// Answers with the extents of contexts.
    pub(super) fn extents(&mut self, cookie: u64, contexts: &[(u32, Extents)]) {
        let mut heads = Vec::new();
        let last = contexts.len().saturating_sub(1);
        for (number, (context, extents)) in contexts.iter().enumerate() {
            let length = u32::try_from(4 + extents.len() * 8).expect("their number is limited");
            let flags = if number == last { chunk::DONE } else { 0 };
            Reply::Chunk { flags, kind: chunk::BLOCK_STATUS, cookie, length }.encode(&mut heads);
            heads.extend_from_slice(&context.to_be_bytes());
            for (length, flags) in extents {
                heads.extend_from_slice(&length.to_be_bytes());
                heads.extend_from_slice(&flags.to_be_bytes());
            }
        }
        self.put(heads, Vec::new(), None);
    }

    /// Sends what goes without waiting; tells whether that was all.
    ///
    /// # Errors
    /// When the connection broke.
    pub(super) fn send(&mut self, link: &mut Link, buffers: &mut Buffers) -> io::Result<bool> {
        loop {
            let mut parts = Vec::with_capacity(2 * self.answers.len().min(PARTS_MAX));
            let mut skip = self.sent;
            for answer in &self.answers {
                answer.parts(&mut skip, &mut parts);
                if parts.len() >= PARTS_MAX {
                    break;
                }
            }
            if parts.is_empty() && !link.must_send() {
                return Ok(true);
            }
            let size = parts.iter().map(|part| part.len()).sum::<usize>();
            let sent = link.send(&parts)?;
            drop(parts);
            self.advance(sent, buffers);
            if sent < size || self.answers.is_empty() {
                return Ok(self.answers.is_empty() && !link.must_send());
            }
        }
    }

    fn advance(&mut self, sent: usize, buffers: &mut Buffers) {
        self.sent += sent;
        while self.answers.front().is_some_and(|first| first.len <= self.sent) {
            let Some(first) = self.answers.pop_front() else { return };
            self.sent -= first.len;
            self.heads -= first.heads.len();
            self.taken += 1;
            first.pages.into_iter().for_each(|pages| buffers.give_back(pages));
        }
    }
}

impl Answer {
    /// Appends what has to be sent, but for the first `skip` bytes.
    fn parts<'a>(&'a self, skip: &mut usize, parts: &mut Vec<IoSlice<'a>>) {
        let mut put = |bytes: &'a [u8]| {
            let skipped = bytes.len().min(*skip);
            *skip -= skipped;
            if skipped < bytes.len() {
                parts.push(IoSlice::new(&bytes[skipped..]));
            }
        };
        let mut from = 0;
        for (upto, data) in &self.cuts {
            put(&self.heads[from..*upto]);
            put(self.pages.as_ref().map_or(&[], |pages| &pages[data.clone()]));
            from = *upto;
        }
        put(&self.heads[from..]);
    }
}

/// Cuts data at blocks of zeros; the data lies at `offset`, and blocks are those of the export.
fn pieces(data: &[u8], offset: u64) -> Vec<(Range<usize>, bool)> {
    let mut pieces: Vec<(Range<usize>, bool)> = Vec::new();
    let page = PAGE as u64;
    let mut at = 0;
    while at < data.len() {
        let begin = offset + at as u64;
        let upto = usize::try_from(begin / page * page + page - begin).expect("a page at most");
        let end = (at + upto).min(data.len());
        let zero = end - at == PAGE && is_zero(&data[at..end]);
        let count = pieces.len();
        match pieces.last_mut() {
            Some((range, is)) if *is == zero => range.end = end,
            _ if count == PIECES_MAX => return vec![(0..data.len(), false)],
            _ => pieces.push((at..end, zero)),
        }
        at = end;
    }
    pieces
}

fn is_zero(page: &[u8]) -> bool {
    // Most that are not zero show it at once; the compiler makes wide instructions of the rest.
    page.chunks(256).all(|part| part.iter().fold(0, |all, byte| all | byte) == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeros_are_told_by_the_block_and_not_too_often() {
        let mut data = vec![0; 5 * PAGE];
        data[PAGE] = 1;
        assert_eq!(pieces(&data, 0), [(0..PAGE, true), (PAGE..2 * PAGE, false), (2 * PAGE..5 * PAGE, true)]);
        // Blocks are those of the export; the part of one is data.
        let cut = PAGE - 100;
        assert_eq!(pieces(&data[..2 * PAGE], 100), [(0..2 * PAGE, false)]);
        assert_eq!(
            pieces(&data[2 * PAGE..], 100),
            [(0..cut, false), (cut..cut + 2 * PAGE, true), (cut + 2 * PAGE..3 * PAGE, false)]
        );
        let mut many = vec![0; 200 * PAGE];
        (0..200).step_by(2).for_each(|page| many[page * PAGE + 7] = 1);
        assert_eq!(pieces(&many, 0), [(0..200 * PAGE, false)]);
        assert!(pieces(&[], 9).is_empty());
    }
}
