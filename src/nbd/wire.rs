//! The bytes of the transmission phase: requests, simple and structured replies, error numbers. No I/O.
//!
//! Everything on the wire is big-endian. Names and numbers are those of the NBD protocol's own page (`doc/proto.md` of
//! the NetworkBlockDevice project).
//!
//! # Rules
//! 1. Taking bytes apart never panics, and trusts no length: who reads a payload compares its length first.
//! 2. Both directions are here, for the server and for a client.

/// Bytes of a request without its payload.
pub const REQUEST: usize = 28;
/// Bytes of a simple reply without its payload.
pub const SIMPLE: usize = 16;
/// Bytes of the header of a chunk of a structured reply.
pub const CHUNK: usize = 20;
/// The longest payload of a read or a write.
pub const PAYLOAD_MAX: u32 = 32 << 20;
/// The longest text on the wire.
pub const TEXT_MAX: usize = 4096;

const REQUEST_MAGIC: u32 = 0x2560_9513;
const SIMPLE_MAGIC: u32 = 0x6744_6698;
const CHUNK_MAGIC: u32 = 0x668e_33ef;

/// What an export can do; sent when it is chosen.
pub mod transmission {
    /// The others mean something.
    pub const HAS_FLAGS: u16 = 1;
    /// Writes are refused.
    pub const READ_ONLY: u16 = 1 << 1;
    /// FLUSH may be sent.
    pub const SEND_FLUSH: u16 = 1 << 2;
    /// The flag FUA may be set.
    pub const SEND_FUA: u16 = 1 << 3;
    /// TRIM may be sent.
    pub const SEND_TRIM: u16 = 1 << 5;
    /// WRITE_ZEROES may be sent.
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    /// The flag DF may be set.
    pub const SEND_DF: u16 = 1 << 7;
    /// A flush on one connection covers what was answered on all.
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
    /// CACHE may be sent.
    pub const SEND_CACHE: u16 = 1 << 10;
    /// The flag FAST_ZERO may be set.
    pub const SEND_FAST_ZERO: u16 = 1 << 11;
}

/// Flags of a request.
pub mod command {
    /// The write is durable when it is answered.
    pub const FUA: u16 = 1;
    /// Zeros are written, nothing is unmapped.
    pub const NO_HOLE: u16 = 1 << 1;
    /// The data of a read comes in one piece.
    pub const DF: u16 = 1 << 2;
    /// One extent for each context.
    pub const REQ_ONE: u16 = 1 << 3;
    /// Fail when it is no faster than a write.
    pub const FAST_ZERO: u16 = 1 << 4;
}

/// What a request asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum Command {
    /// Data.
    Read = 0,
    /// Data follows.
    Write = 1,
    /// The end; there is no answer.
    Disconnect = 2,
    /// What was answered before is to be durable.
    Flush = 3,
    /// The range is not needed any more.
    Trim = 4,
    /// The range will be read soon.
    Cache = 5,
    /// The range is to read as zeros.
    WriteZeroes = 6,
    /// What is known about the range.
    BlockStatus = 7,
}

impl Command {
    /// Every command.
    pub const ALL: [Self; 8] = [
        Self::Read,
        Self::Write,
        Self::Disconnect,
        Self::Flush,
        Self::Trim,
        Self::Cache,
        Self::WriteZeroes,
        Self::BlockStatus,
    ];

    /// Returns the flags it may have. (FUA must be taken with any command, also where it means nothing.)
    #[must_use]
    pub fn flags(self) -> u16 {
        command::FUA
            | match self {
                Self::Read => command::DF,
                Self::WriteZeroes => command::NO_HOLE | command::FAST_ZERO,
                Self::BlockStatus => command::REQ_ONE,
                Self::Write | Self::Trim | Self::Flush | Self::Cache | Self::Disconnect => 0,
            }
    }
}

/// A request, without the payload of a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// Flags.
    pub flags: u16,
    /// The number of a [`Command`], or another one.
    pub kind: u16,
    /// What the client knows it by.
    pub cookie: u64,
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub length: u32,
}

impl Request {
    /// Takes a request apart; `None` when it does not begin as one.
    #[must_use]
    pub fn decode(bytes: &[u8; REQUEST]) -> Option<Self> {
        if number::<4>(bytes, 0) != u64::from(REQUEST_MAGIC) {
            return None;
        }
        Some(Self {
            flags: short(bytes, 4),
            kind: short(bytes, 6),
            cookie: number::<8>(bytes, 8),
            offset: number::<8>(bytes, 16),
            length: word(bytes, 24),
        })
    }

    /// Returns the bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; REQUEST] {
        let mut bytes = [0; REQUEST];
        bytes[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
        bytes[4..6].copy_from_slice(&self.flags.to_be_bytes());
        bytes[6..8].copy_from_slice(&self.kind.to_be_bytes());
        bytes[8..16].copy_from_slice(&self.cookie.to_be_bytes());
        bytes[16..24].copy_from_slice(&self.offset.to_be_bytes());
        bytes[24..].copy_from_slice(&self.length.to_be_bytes());
        bytes
    }

    /// Returns the command, if it is one.
    #[must_use]
    pub fn command(&self) -> Option<Command> {
        Command::ALL.into_iter().find(|command| *command as u16 == self.kind)
    }
}

/// Kinds of chunks.
pub mod chunk {
    /// Nothing, at the end.
    pub const NONE: u16 = 0;
    /// An offset, and data.
    pub const OFFSET_DATA: u16 = 1;
    /// An offset and a length of zeros.
    pub const OFFSET_HOLE: u16 = 2;
    /// The number of a context, and extents.
    pub const BLOCK_STATUS: u16 = 5;
    /// An error number and a text.
    pub const ERROR: u16 = 1 << 15 | 1;
    /// As [`ERROR`], with the offset.
    pub const ERROR_OFFSET: u16 = 1 << 15 | 2;
    /// The flag of the last chunk of a reply.
    pub const DONE: u16 = 1;
}

/// The beginning of a reply of either form.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reply {
    /// Followed by the data of a read, if there is no error.
    Simple {
        /// An error number, or 0.
        error: u32,
        /// That of the request.
        cookie: u64,
    },
    /// Followed by `length` bytes.
    Chunk {
        /// [`chunk::DONE`], or 0.
        flags: u16,
        /// See [`chunk`].
        kind: u16,
        /// That of the request.
        cookie: u64,
        /// Bytes that follow.
        length: u32,
    },
}

impl Reply {
    /// Takes a header apart; `None` when it is none, or when bytes are missing.
    #[must_use]
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let magic = u32::try_from(number::<4>(bytes.get(..4)?, 0)).expect("four bytes");
        match magic {
            SIMPLE_MAGIC if bytes.len() >= SIMPLE => {
                Some(Self::Simple { error: word(bytes, 4), cookie: number::<8>(bytes, 8) })
            }
            CHUNK_MAGIC if bytes.len() >= CHUNK => Some(Self::Chunk {
                flags: short(bytes, 4),
                kind: short(bytes, 6),
                cookie: number::<8>(bytes, 8),
                length: word(bytes, 16),
            }),
            _ => None,
        }
    }

    /// Tells whether the header of a chunk begins here.
    #[must_use]
    pub fn begins_chunk(bytes: &[u8]) -> bool {
        bytes.starts_with(&CHUNK_MAGIC.to_be_bytes())
    }

    /// Appends the bytes.
    pub fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Self::Simple { error, cookie } => {
                out.extend_from_slice(&SIMPLE_MAGIC.to_be_bytes());
                out.extend_from_slice(&error.to_be_bytes());
                out.extend_from_slice(&cookie.to_be_bytes());
            }
            Self::Chunk { flags, kind, cookie, length } => {
                out.extend_from_slice(&CHUNK_MAGIC.to_be_bytes());
                out.extend_from_slice(&flags.to_be_bytes());
                out.extend_from_slice(&kind.to_be_bytes());
                out.extend_from_slice(&cookie.to_be_bytes());
                out.extend_from_slice(&length.to_be_bytes());
            }
        }
    }
}

/// An error number of the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Errno {
    /// Writes are refused.
    Perm = 1,
    /// The data cannot be had.
    Io = 5,
    /// The server has no memory.
    NoMem = 12,
    /// The request makes no sense.
    Inval = 22,
    /// No room, or a write beyond the end.
    NoSpc = 28,
    /// It does not fit into one piece.
    Overflow = 75,
    /// It cannot be done that way.
    NotSup = 95,
    /// The server ends.
    Shutdown = 108,
}

impl Errno {
    /// Every number.
    pub const ALL: [Self; 8] =
        [Self::Perm, Self::Io, Self::NoMem, Self::Inval, Self::NoSpc, Self::Overflow, Self::NotSup, Self::Shutdown];

    /// Finds the error by its number; those that no server should send are [`Errno::Inval`], as the protocol says.
    #[must_use]
    pub fn by_number(number: u32) -> Self {
        Self::ALL.into_iter().find(|errno| *errno as u32 == number).unwrap_or(Self::Inval)
    }
}

/// Returns `N` bytes at `at` as a number.
pub(super) fn number<const N: usize>(bytes: &[u8], at: usize) -> u64 {
    bytes[at..at + N].iter().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

/// Returns four bytes as a number.
pub(super) fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

/// Returns two bytes as a number.
pub(super) fn short(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}
