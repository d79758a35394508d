//! The bytes of the handshake: greeting, options and their replies. No I/O.
//!
//! ```text
//!   server: "NBDMAGIC" "IHAVEOPT" flags      client: flags
//!   client: "IHAVEOPT" option length data    server: magic option kind length data   (many times)
//!   GO or EXPORT_NAME end it; what follows are requests.
//! ```
//!
//! # Rules
//! 1. Lengths inside of the data of an option are compared with what is there; a byte too many is as wrong as one too few.
//! 2. Texts are UTF-8 and no longer than the protocol allows.

use super::wire::{TEXT_MAX, number, short, word};

/// Bytes of the greeting.
pub const GREETING: usize = 18;
/// Bytes of the header of an option.
pub const OPTION: usize = 16;
/// Bytes of the header of a reply to an option.
pub const OPTION_REPLY: usize = 20;
/// The longest data of an option that is looked at.
pub const DATA_MAX: usize = 64 << 10;

const NBD_MAGIC: u64 = 0x4e42_444d_4147_4943;
const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
const REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;

/// The server's flag: options are answered. Also the client's, of the same value.
pub const FIXED_NEWSTYLE: u16 = 1;
/// The flag of both: EXPORT_NAME is answered without 124 zeros.
pub const NO_ZEROES: u16 = 1 << 1;
/// Zeros behind the answer to EXPORT_NAME.
pub const ZEROES: usize = 124;

/// Options.
pub mod kind {
    /// Choose an export and go on; cannot be refused.
    pub const EXPORT_NAME: u32 = 1;
    /// The end.
    pub const ABORT: u32 = 2;
    /// Names of exports.
    pub const LIST: u32 = 3;
    /// TLS from here on.
    pub const STARTTLS: u32 = 5;
    /// What an export is like.
    pub const INFO: u32 = 6;
    /// Choose an export and go on.
    pub const GO: u32 = 7;
    /// Replies are structured.
    pub const STRUCTURED_REPLY: u32 = 8;
    /// Contexts that can be chosen.
    pub const LIST_META_CONTEXT: u32 = 9;
    /// Choose contexts.
    pub const SET_META_CONTEXT: u32 = 10;
}

/// Kinds of replies to an option.
pub mod reply {
    /// Done.
    pub const ACK: u32 = 1;
    /// The name of an export.
    pub const SERVER: u32 = 2;
    /// Something about an export, see [`super::info`].
    pub const INFO: u32 = 3;
    /// A context.
    pub const META_CONTEXT: u32 = 4;
    /// This kind of option is not known.
    pub const ERR_UNSUP: u32 = ERROR | 1;
    /// Refused.
    pub const ERR_POLICY: u32 = ERROR | 2;
    /// The option makes no sense.
    pub const ERR_INVALID: u32 = ERROR | 3;
    /// Not on this host.
    pub const ERR_PLATFORM: u32 = ERROR | 4;
    /// Only after STARTTLS.
    pub const ERR_TLS_REQD: u32 = ERROR | 5;
    /// There is no such export.
    pub const ERR_UNKNOWN: u32 = ERROR | 6;
    /// The server ends.
    pub const ERR_SHUTDOWN: u32 = ERROR | 7;
    /// More than the server wants to look at.
    pub const ERR_TOO_BIG: u32 = ERROR | 9;
    /// The bit of all errors.
    pub const ERROR: u32 = 1 << 31;
}

/// Kinds of information about an export.
pub mod info {
    /// Size and transmission flags.
    pub const EXPORT: u16 = 0;
    /// The name.
    pub const NAME: u16 = 1;
    /// A description for people.
    pub const DESCRIPTION: u16 = 2;
    /// Smallest, preferred and largest request.
    pub const BLOCK_SIZE: u16 = 3;
}

/// Returns the greeting of the server.
#[must_use]
pub fn greeting(flags: u16) -> [u8; GREETING] {
    let mut bytes = [0; GREETING];
    bytes[..8].copy_from_slice(&NBD_MAGIC.to_be_bytes());
    bytes[8..16].copy_from_slice(&OPTION_MAGIC.to_be_bytes());
    bytes[16..].copy_from_slice(&flags.to_be_bytes());
    bytes
}

/// Takes the greeting of a server apart and returns its flags; `None` when it is none of this style.
#[must_use]
pub fn flags_of(greeting: &[u8; GREETING]) -> Option<u16> {
    let known = number::<8>(greeting, 0) == NBD_MAGIC && number::<8>(greeting, 8) == OPTION_MAGIC;
    known.then(|| short(greeting, 16))
}

/// Returns an option with its data.
///
/// # Panics
/// When the data has 4 GiB or more.
#[must_use]
pub fn option(kind: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(OPTION + data.len());
    bytes.extend_from_slice(&OPTION_MAGIC.to_be_bytes());
    bytes.extend_from_slice(&kind.to_be_bytes());
    bytes.extend_from_slice(&length(data).to_be_bytes());
    bytes.extend_from_slice(data);
    bytes
}

/// Takes the header of an option apart: its kind, and the bytes of data that follow. `None` when it is none.
#[must_use]
pub fn option_header(bytes: &[u8; OPTION]) -> Option<(u32, u32)> {
    (number::<8>(bytes, 0) == OPTION_MAGIC).then(|| (word(bytes, 8), word(bytes, 12)))
}

/// Returns a reply to an option.
///
/// # Panics
/// When the data has 4 GiB or more.
#[must_use]
pub fn option_reply(option: u32, kind: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(OPTION_REPLY + data.len());
    bytes.extend_from_slice(&REPLY_MAGIC.to_be_bytes());
    bytes.extend_from_slice(&option.to_be_bytes());
    bytes.extend_from_slice(&kind.to_be_bytes());
    bytes.extend_from_slice(&length(data).to_be_bytes());
    bytes.extend_from_slice(data);
    bytes
}

/// The header of a reply to an option.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OptionReply {
    /// The option that is answered.
    pub option: u32,
    /// See [`reply`].
    pub kind: u32,
    /// Bytes of data that follow.
    pub length: u32,
}

impl OptionReply {
    /// Takes a header apart; `None` when it is none.
    #[must_use]
    pub fn decode(bytes: &[u8; OPTION_REPLY]) -> Option<Self> {
        let known = number::<8>(bytes, 0) == REPLY_MAGIC;
        known.then(|| Self { option: word(bytes, 8), kind: word(bytes, 12), length: word(bytes, 16) })
    }
}

fn length(data: &[u8]) -> u32 {
    u32::try_from(data.len()).expect("data of an option is short")
}

/// The data of INFO and GO.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Choice {
    /// Name of the export; empty for the default one.
    pub name: String,
    /// What is to be told of it, see [`info`].
    pub infos: Vec<u16>,
}

impl Choice {
    /// Takes it apart; `None` when it makes no sense.
    #[must_use]
    pub fn decode(data: &[u8]) -> Option<Self> {
        let mut rest = data;
        let name = text(&mut rest)?;
        let count = take(&mut rest, 2).map(|bytes| usize::from(short(bytes, 0)))?;
        if rest.len() != count * 2 {
            return None;
        }
        Some(Self { name, infos: rest.chunks_exact(2).map(|bytes| short(bytes, 0)).collect() })
    }

    /// Returns the bytes.
    ///
    /// # Panics
    /// When it has more than 65,535 kinds of information.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        put_text(&mut bytes, &self.name);
        bytes.extend_from_slice(&u16::try_from(self.infos.len()).expect("a few").to_be_bytes());
        self.infos.iter().for_each(|info| bytes.extend_from_slice(&info.to_be_bytes()));
        bytes
    }
}

/// The data of LIST_META_CONTEXT and SET_META_CONTEXT.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Queries {
    /// Name of the export.
    pub name: String,
    /// Names of contexts; for a list also beginnings of names.
    pub queries: Vec<String>,
}

impl Queries {
    /// Takes it apart; `None` when it makes no sense.
    #[must_use]
    pub fn decode(data: &[u8]) -> Option<Self> {
        let mut rest = data;
        let name = text(&mut rest)?;
        let count = take(&mut rest, 4).map(|bytes| word(bytes, 0))?;
        let mut queries = Vec::new();
        for _ in 0..count {
            queries.push(text(&mut rest)?);
        }
        rest.is_empty().then_some(Self { name, queries })
    }

    /// Returns the bytes.
    ///
    /// # Panics
    /// When it is longer than any message can be.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        put_text(&mut bytes, &self.name);
        bytes.extend_from_slice(&u32::try_from(self.queries.len()).expect("a few").to_be_bytes());
        self.queries.iter().for_each(|query| put_text(&mut bytes, query));
        bytes
    }
}

/// Returns the data of a SERVER reply, or of a text with its length in front.
///
/// # Panics
/// When the text has 4 GiB or more.
#[must_use]
pub fn named(name: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    put_text(&mut bytes, name);
    bytes
}

/// Returns the data of a META_CONTEXT reply.
#[must_use]
pub fn context(id: u32, name: &str) -> Vec<u8> {
    [&id.to_be_bytes()[..], name.as_bytes()].concat()
}

/// Returns the data of an INFO reply that tells size and flags.
#[must_use]
pub fn export_info(size: u64, flags: u16) -> Vec<u8> {
    [&info::EXPORT.to_be_bytes()[..], &size.to_be_bytes(), &flags.to_be_bytes()].concat()
}

/// Returns the data of an INFO reply that tells the sizes of requests.
#[must_use]
pub fn block_size_info(smallest: u32, preferred: u32, largest: u32) -> Vec<u8> {
    let sizes = [smallest, preferred, largest].map(u32::to_be_bytes);
    [&info::BLOCK_SIZE.to_be_bytes()[..], &sizes.concat()].concat()
}

/// Returns the data of an INFO reply that is a text.
#[must_use]
pub fn text_info(kind: u16, text: &str) -> Vec<u8> {
    [&kind.to_be_bytes()[..], text.as_bytes()].concat()
}

fn take<'a>(rest: &mut &'a [u8], len: usize) -> Option<&'a [u8]> {
    let (head, tail) = rest.split_at_checked(len)?;
    *rest = tail;
    Some(head)
}

fn text(rest: &mut &[u8]) -> Option<String> {
    let len = usize::try_from(word(take(rest, 4)?, 0)).ok()?;
    if len > TEXT_MAX {
        return None;
    }
    String::from_utf8(take(rest, len)?.to_vec()).ok()
}

fn put_text(bytes: &mut Vec<u8>, text: &str) {
    bytes.extend_from_slice(&length(text.as_bytes()).to_be_bytes());
    bytes.extend_from_slice(text.as_bytes());
}
