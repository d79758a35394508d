//! The handshake of the client: structured replies if the server has them, and one export.
//!
//! # Rules
//! 1. Each message has a deadline, its length is bounded, and what it says is compared with what may be said then.
//! 2. A server that cannot make writes durable, or takes only aligned requests, is refused: a guest counts on both.

use std::io;
use std::time::Duration;

use crate::clock::{self, Instant};
use crate::error::{Error, Kind, Result};
use crate::nbd::link::Link;
use crate::nbd::option::{
    self, Choice, DATA_MAX, FIXED_NEWSTYLE, GREETING, NO_ZEROES, OPTION_REPLY, OptionReply, info, kind, reply,
};
use crate::nbd::wire::{number, short, transmission, word};

/// How long the server may take for a message.
const PATIENCE: Duration = Duration::from_secs(30);
/// Replies to one option at most.
const REPLIES_MAX: usize = 64;
/// No server takes less than this in one request.
const LARGEST_MIN: u32 = 4096;

/// What was agreed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Terms {
    /// Bytes of the export.
    pub(super) size: u64,
    /// See [`transmission`].
    pub(super) flags: u16,
    /// Reads are answered in chunks.
    pub(super) structured: bool,
    /// Bytes of a read or write at most.
    pub(super) largest: u32,
}

impl Terms {
    /// Tells whether the export can do something.
    pub(super) fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }
}

/// Goes through the handshake, and chooses `name`.
///
/// # Errors
/// What the server says against it; `Corrupt` for what makes no sense, `Io` for a connection that broke.
pub(super) fn greet(link: &mut Link, name: &str) -> Result<Terms> {
    let mut greeting = [0; GREETING];
    receive(link, &mut greeting)?;
    let flags = option::flags_of(&greeting).ok_or_else(|| senseless("its greeting is none"))?;
    if flags & FIXED_NEWSTYLE == 0 {
        return Err(Error::unsupported("the server does not answer options"));
    }
    send(link, &u32::from(FIXED_NEWSTYLE | flags & NO_ZEROES).to_be_bytes())?;
    send(link, &option::option(kind::STRUCTURED_REPLY, &[]))?;
    let structured = match next(link, kind::STRUCTURED_REPLY)? {
        (reply::ACK, _) => true,
        (reply::ERR_UNSUP, _) => false,
        (other, text) => return Err(refused(other, &text)),
    };
    let choice = Choice { name: name.to_owned(), infos: vec![info::BLOCK_SIZE] };
    send(link, &option::option(kind::GO, &choice.encode()))?;
    let mut found = Found::default();
    for _ in 0..REPLIES_MAX {
        match next(link, kind::GO)? {
            (reply::INFO, data) => found.take(&data)?,
            (reply::ACK, data) if data.is_empty() => return found.terms(structured),
            (other, text) => return Err(refused(other, &text)),
        }
    }
    Err(senseless("it does not stop telling about the export"))
}

/// What was told of the export.
#[derive(Debug, Default)]
struct Found {
    export: Option<(u64, u16)>,
    largest: Option<u32>,
}

impl Found {
    fn take(&mut self, data: &[u8]) -> Result<()> {
        if data.len() < 2 {
            return Err(senseless("it tells nothing about the export"));
        }
        match (short(data, 0), data.len()) {
            (info::EXPORT, 12) => self.export = Some((number::<8>(data, 2), short(data, 10))),
            (info::BLOCK_SIZE, 14) => {
                let (smallest, largest) = (word(data, 2), word(data, 10));
                if smallest != 1 {
                    return Err(Error::unsupported(format!("the server takes no request below {smallest} bytes")));
                }
                if largest < LARGEST_MIN {
                    return Err(senseless("it takes requests that are far too small"));
                }
                self.largest = Some(largest);
            }
            (info::EXPORT | info::BLOCK_SIZE, _) => return Err(senseless("what it tells of the export is cut")),
            _ => {}
        }
        Ok(())
    }

    fn terms(&self, structured: bool) -> Result<Terms> {
        let (size, flags) = self.export.ok_or_else(|| senseless("it does not tell the size of the export"))?;
        if flags & transmission::HAS_FLAGS == 0 {
            return Err(senseless("the flags of the export are none"));
        }
        if i64::try_from(size).is_err() {
            return Err(senseless("the export is larger than any file"));
        }
        if flags & (transmission::READ_ONLY | transmission::SEND_FLUSH) == 0 {
            return Err(Error::unsupported("the server cannot make writes durable"));
        }
        Ok(Terms { size, flags, structured, largest: self.largest.unwrap_or(u32::MAX) })
    }
}

/// Receives a reply to an option: its kind and data.
fn next(link: &mut Link, option: u32) -> Result<(u32, Vec<u8>)> {
    let mut header = [0; OPTION_REPLY];
    receive(link, &mut header)?;
    let header = OptionReply::decode(&header).ok_or_else(|| senseless("a reply of it is none"))?;
    if header.option != option {
        return Err(senseless("it answers what was not asked"));
    }
    let len = header.length as usize;
    if len > DATA_MAX {
        return Err(senseless("a reply of it is far too long"));
    }
    let mut data = vec![0; len];
    receive(link, &mut data)?;
    Ok((header.kind, data))
}

fn deadline() -> Instant {
    clock::now() + PATIENCE
}

fn receive(link: &mut Link, buf: &mut [u8]) -> Result<()> {
    link.receive_all(buf, deadline()).map_err(broke)
}

fn send(link: &mut Link, bytes: &[u8]) -> Result<()> {
    link.send_all(bytes, deadline()).map_err(broke)
}

fn broke(error: io::Error) -> Error {
    Error::new(Kind::Io, format!("the handshake with the server broke: {error}"))
}

/// Returns the error for bytes that no server should send.
pub(super) fn senseless(what: &str) -> Error {
    Error::corrupt(format!("the server makes no sense: {what}"))
}

fn refused(kind: u32, text: &[u8]) -> Error {
    let text: String = String::from_utf8_lossy(text).chars().filter(|c| !c.is_control()).collect();
    let what = if text.is_empty() { format!("the server refuses (error {kind:#x})") } else { text };
    let kind = match kind {
        reply::ERR_UNKNOWN => Kind::NotFound,
        reply::ERR_SHUTDOWN => Kind::Busy,
        reply::ERR_PLATFORM | reply::ERR_UNSUP | reply::ERR_TLS_REQD => Kind::Unsupported,
        kind if kind & reply::ERROR != 0 => Kind::Failed,
        _ => return senseless("it answers with something else"),
    };
    Error::new(kind, what)
}
