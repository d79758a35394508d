//! Requests as they come off a connection: many with one system call, their payloads on pages of their own.
//!
//! # Rules
//! 1. What is received first goes to a stage; a payload is copied from there as far as it is there already, and the rest
//!    of it goes to its pages at once. So small writes cost no system call each, and large ones no copy.
//! 2. Nothing is allocated for a payload before its length is checked. One that is too long is skipped and its request
//!    refused then, not before: a client that is still sending a request does not expect the reply to it.
//! 3. A request that does not begin as one ends the connection: nobody knows where the next begins.

use std::io::{self, IoSliceMut};

use super::link::Link;
use super::wire::{Command, PAYLOAD_MAX, REQUEST, Request};
use crate::disk::Buffers;
use crate::sys::pages::Pages;

/// Bytes of the stage.
const STAGE: usize = 64 << 10;
/// While a payload comes of which more than this is missing, little is received beyond it.
const LARGE: usize = 32 << 10;
/// Bytes that are received beyond the end of a large payload: some requests.
const BEYOND: usize = 8 * REQUEST;

/// A request that is there in full.
#[derive(Debug)]
pub(super) struct Incoming {
    pub(super) request: Request,
    /// The payload of a write; `None` when it was too long and was skipped.
    pub(super) payload: Option<Pages>,
}

#[derive(Debug)]
struct Partial {
    request: Request,
    pages: Pages,
    have: usize,
    len: usize,
}

/// What was received of a connection.
#[derive(Debug)]
pub(super) struct Receiver {
    stage: Box<[u8]>,
    start: usize,
    end: usize,
    partial: Option<Partial>,
    /// A request with a payload that nobody wants, and how many bytes of that are still to come.
    refused: Option<Request>,
    skip: usize,
}

impl Receiver {
    pub(super) fn new() -> Self {
        Self { stage: vec![0; STAGE].into(), start: 0, end: 0, partial: None, refused: None, skip: 0 }
    }

    /// Receives once; `None` when nothing is there, `Some(false)` at the end.
    ///
    /// # Errors
    /// When the connection broke.
    pub(super) fn fill(&mut self, link: &mut Link, wait: bool) -> io::Result<Option<bool>> {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        } else if self.end == self.stage.len() {
            self.stage.copy_within(self.start.., 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        let (have, got) = match &mut self.partial {
            Some(Partial { pages, have, len, .. }) => {
                let missing = *len - *have;
                let beyond = if missing > LARGE { BEYOND } else { STAGE };
                let mut parts = [IoSliceMut::new(&mut pages[*have..*len]), IoSliceMut::new(&mut self.stage[..beyond])];
                let got = link.receive(&mut parts, wait)?;
                let here = got.unwrap_or(0).min(missing);
                *have += here;
                (here, got)
            }
            None => (0, link.receive(&mut [IoSliceMut::new(&mut self.stage[self.end..])], wait)?),
        };
        let Some(got) = got else { return Ok(None) };
        self.end += got - have;
        self.skip_staged();
        Ok(Some(got > 0))
    }

    fn skip_staged(&mut self) {
        let skipped = self.skip.min(self.end - self.start);
        self.skip -= skipped;
        self.start += skipped;
    }

    /// Returns the request that [`Self::next`] begins to take, if it does; memory is needed for its payload.
    pub(super) fn coming(&self) -> Option<Request> {
        let busy = self.partial.is_some() || self.refused.is_some() || self.skip > 0;
        if busy || self.end - self.start < REQUEST {
            return None;
        }
        Request::decode(self.stage[self.start..self.start + REQUEST].try_into().expect("so many bytes"))
    }

    /// Tells whether a part of a request is there.
    pub(super) fn has_part(&self) -> bool {
        self.partial.is_some() || self.skip > 0 || self.end > self.start
    }

    /// Takes the next request that is there in full.
    ///
    /// # Errors
    /// When what comes is no request, or the host has no memory for a payload.
    pub(super) fn next(&mut self, buffers: &mut Buffers) -> io::Result<Option<Incoming>> {
        if let Some(partial) = self.partial.take_if(|partial| partial.have == partial.len) {
            return Ok(Some(Incoming { request: partial.request, payload: Some(partial.pages) }));
        }
        if self.skip == 0
            && let Some(request) = self.refused.take()
        {
            return Ok(Some(Incoming { request, payload: None }));
        }
        if self.partial.is_some() || self.skip > 0 || self.end - self.start < REQUEST {
            return Ok(None);
        }
        let header = self.stage[self.start..self.start + REQUEST].try_into().expect("so many bytes");
        let request = Request::decode(header).ok_or_else(|| io::Error::other("what came is no request"))?;
        self.start += REQUEST;
        if request.command() != Some(Command::Write) {
            return Ok(Some(Incoming { request, payload: None }));
        }
        let staged = self.end - self.start;
        if request.length > PAYLOAD_MAX {
            (self.refused, self.skip) = (Some(request), request.length as usize);
            self.skip_staged();
            return self.next(buffers);
        }
        let len = request.length as usize;
        let mut pages = buffers.take(len)?;
        let have = staged.min(len);
        pages[..have].copy_from_slice(&self.stage[self.start..self.start + have]);
        self.start += have;
        if have == len {
            return Ok(Some(Incoming { request, payload: Some(pages) }));
        }
        self.partial = Some(Partial { request, pages, have, len });
        Ok(None)
    }
}
