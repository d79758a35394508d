//! A token: which stream, and the first byte of the disk that has not safely arrived. Printable, for the other side.

use std::fmt;

use uuid::Uuid;

use super::format::Header;
use crate::codec::{Reader, Writer, unseal};
use crate::error::{Error, Result};

const VERSION: u8 = 1;
/// Bytes behind the hex digits.
const LEN: usize = 81;

/// Where an interrupted stream goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Token {
    /// The pool of the sender.
    pub pool: Uuid,
    /// The disk of the sender.
    pub disk: Uuid,
    /// Snapshot it starts from; nil when there is none.
    pub base: Uuid,
    /// Snapshot it leads to.
    pub target: Uuid,
    /// CRC32 of both states.
    pub states: u32,
    /// First byte that has not safely arrived.
    pub offset: u64,
}

impl Token {
    /// Returns the token of a stream at a position.
    #[must_use]
    pub fn of(header: &Header, offset: u64) -> Self {
        Self {
            pool: header.pool,
            disk: header.disk,
            base: header.base.as_ref().map_or(Uuid::nil(), |base| base.uuid),
            target: header.target.uuid,
            states: header.states_crc(),
            offset,
        }
    }

    /// Tells whether two tokens are of the same two states, wherever they stand.
    #[must_use]
    pub fn same_stream(&self, other: &Self) -> bool {
        *self == Self { offset: self.offset, ..*other }
    }

    /// Parses what [`Token`] prints.
    ///
    /// # Errors
    /// `Usage` when it is none, or was not copied whole.
    pub fn parse(text: &str) -> Result<Self> {
        let bad = || {
            Error::usage("this is no token of a stream, or it was not copied whole")
                .hint("`afterimage receive --token DISK` prints it again")
        };
        let text = text.trim();
        let digits = text.as_bytes();
        if digits.len() != LEN * 2 || !digits.iter().all(u8::is_ascii_hexdigit) {
            return Err(bad());
        }
        let pairs = (0..LEN).map(|at| u8::from_str_radix(&text[at * 2..at * 2 + 2], 16).expect("hex digits"));
        let bytes: Vec<u8> = pairs.collect();
        let body = unseal("the token", &bytes).map_err(|_| bad())?;
        let mut from = Reader::new("the token", body);
        if from.u8().map_err(|_| bad())? != VERSION {
            return Err(bad());
        }
        Self::read(&mut from).map_err(|_| bad())
    }

    fn read(from: &mut Reader<'_>) -> Result<Self> {
        let mut uuid = || Ok::<_, Error>(Uuid::from_slice(from.raw(16)?).expect("16 bytes"));
        let (pool, disk, base, target) = (uuid()?, uuid()?, uuid()?, uuid()?);
        Ok(Self { pool, disk, base, target, states: from.u32()?, offset: from.u64()? })
    }
}

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut out = Writer::new();
        out.u8(VERSION);
        for uuid in [self.pool, self.disk, self.base, self.target] {
            out.raw(uuid.as_bytes());
        }
        out.u32(self.states).u64(self.offset);
        out.sealed().iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_come_back_and_every_changed_digit_is_seen() {
        let token = Token {
            pool: Uuid::from_u128(1),
            disk: Uuid::from_u128(2),
            base: Uuid::nil(),
            target: Uuid::from_u128(4),
            states: 5,
            offset: 1 << 40,
        };
        let text = token.to_string();
        assert_eq!(text.len(), LEN * 2);
        assert_eq!(Token::parse(&format!(" {text}\n")).unwrap(), token);
        for at in 0..text.len() {
            let other = if &text[at..=at] == "0" { "1" } else { "0" };
            Token::parse(&format!("{}{other}{}", &text[..at], &text[at + 1..])).unwrap_err();
            Token::parse(&text[..at]).unwrap_err();
        }
        Token::parse("\u{fc}").unwrap_err();
    }
}
