//! The bytes that come from a server, on one connection.
//!
//! # Rules
//! 1. What is small comes with what is beside it, in one system call; what is large goes where it belongs at once.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::net::RecvFlags;

use crate::nbd::wire::{CHUNK, Reply, SIMPLE};

/// Bytes that are received ahead.
const STAGE: usize = 64 << 10;

/// Why a connection is of no use any more.
#[derive(Debug)]
pub(super) struct Broken {
    pub(super) why: String,
    /// What came made no sense.
    pub(super) senseless: bool,
}

impl Broken {
    pub(super) fn senseless(why: &str) -> Self {
        Self { why: why.to_owned(), senseless: true }
    }

    pub(super) fn io(error: &io::Error) -> Self {
        Self { why: error.to_string(), senseless: false }
    }
}

/// The reader.
#[derive(Debug)]
pub(super) struct Reader {
    socket: Arc<OwnedFd>,
    stage: Vec<u8>,
    /// What of the stage is not taken yet.
    start: usize,
    end: usize,
}

impl Reader {
    pub(super) fn new(socket: Arc<OwnedFd>) -> Self {
        Self { socket, stage: vec![0; STAGE], start: 0, end: 0 }
    }

    /// Waits for bytes and puts them into `buf`; at least one.
    fn some(socket: &OwnedFd, buf: &mut [u8]) -> Result<usize, Broken> {
        let got = rustix::io::retry_on_intr(|| rustix::net::recv(socket, &mut *buf, RecvFlags::empty()));
        match got {
            Ok((0, _)) => Err(Broken { why: "the server closed the connection".to_owned(), senseless: false }),
            Ok((got, _)) => Ok(got),
            Err(error) => Err(Broken::io(&error.into())),
        }
    }

    /// Has at least so many bytes in the stage.
    fn need(&mut self, len: usize) -> Result<(), Broken> {
        if self.start + len > self.stage.len() {
            self.stage.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        while self.end - self.start < len {
            self.end += Self::some(&self.socket, &mut self.stage[self.end..])?;
        }
        Ok(())
    }

    /// Waits for the header of the next reply.
    pub(super) fn header(&mut self) -> Result<Reply, Broken> {
        self.need(SIMPLE)?;
        let senseless = || Broken::senseless("what came is no reply");
        let (reply, len) = match Reply::decode(&self.stage[self.start..self.start + SIMPLE]) {
            Some(reply) => (reply, SIMPLE),
            None => {
                // The other form is longer; a server that begins neither sends what is thrown away with the connection.
                if !Reply::begins_chunk(&self.stage[self.start..self.end]) {
                    return Err(senseless());
                }
                self.need(CHUNK)?;
                (Reply::decode(&self.stage[self.start..self.start + CHUNK]).ok_or_else(senseless)?, CHUNK)
            }
        };
        self.start += len;
        Ok(reply)
    }

    /// Fills `buf` with what comes next.
    pub(super) fn receive(&mut self, mut buf: &mut [u8]) -> Result<(), Broken> {
        let staged = buf.len().min(self.end - self.start);
        buf[..staged].copy_from_slice(&self.stage[self.start..self.start + staged]);
        self.start += staged;
        buf = &mut buf[staged..];
        if buf.len() >= STAGE {
            while !buf.is_empty() {
                let got = Self::some(&self.socket, buf)?;
                buf = &mut buf[got..];
            }
        } else if !buf.is_empty() {
            let len = buf.len();
            self.need(len)?;
            buf.copy_from_slice(&self.stage[self.start..self.start + len]);
            self.start += len;
        }
        Ok(())
    }
}
