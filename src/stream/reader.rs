//! Takes a stream apart and checks all of it: each record, how they follow each other, and that none is missing.
//!
//! A record is returned only when its bytes are whole and right. Memory is one record.

use std::io::Read;

use super::format::{Codec, DATA_MAX, Header, PREFIX_LEN, RECORD_LEN, Record, TOTALS_LEN, Totals};
use crate::codec::crc32;
use crate::error::{Error, Result};
use crate::units::{BLOCK_SIZE, to_usize};

/// A part of the disk.
#[derive(Debug, PartialEq, Eq)]
pub enum Part<'a> {
    /// Bytes.
    Data {
        /// First byte of the disk.
        offset: u64,
        /// The plain bytes.
        bytes: &'a [u8],
    },
    /// Zeros.
    Zeros {
        /// First byte of the disk.
        offset: u64,
        /// How many.
        length: u64,
    },
}

/// A stream being read.
pub struct StreamReader<'a> {
    input: &'a mut dyn Read,
    /// What the stream is.
    pub header: Header,
    headers: crc32fast::Hasher,
    totals: Totals,
    /// Where the next extent begins at the earliest.
    at: u64,
    /// What was returned before ends here.
    applied: u64,
    stored: Vec<u8>,
    plain: Vec<u8>,
}

impl std::fmt::Debug for StreamReader<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StreamReader").field("header", &self.header).field("at", &self.at).finish_non_exhaustive()
    }
}

/// Fills `buf`; an early end is a stream that was cut off.
fn fill(input: &mut dyn Read, buf: &mut [u8]) -> Result<()> {
    input.read_exact(buf).map_err(|error| match error.kind() {
        std::io::ErrorKind::UnexpectedEof => Error::corrupt("the stream ends before its end: it was cut off"),
        _ => Error::io("cannot read the stream", error),
    })
}

impl<'a> StreamReader<'a> {
    /// Reads and checks the header.
    ///
    /// # Errors
    /// `Corrupt` when it is no stream or damaged, `Unsupported` when it is of a newer version.
    pub fn new(input: &'a mut dyn Read) -> Result<Self> {
        let mut prefix = [0; PREFIX_LEN];
        fill(input, &mut prefix)?;
        let len = Header::decode_prefix(&prefix)?;
        let mut bytes = prefix.to_vec();
        bytes.resize(PREFIX_LEN + len, 0);
        fill(input, &mut bytes[PREFIX_LEN..])?;
        let header = Header::decode(&bytes)?;
        let mut headers = crc32fast::Hasher::new();
        headers.update(&bytes);
        let at = header.start;
        let (stored, plain) = (Vec::new(), Vec::new());
        Ok(Self { input, header, headers, totals: Totals::default(), at, applied: at, stored, plain })
    }

    /// Returns the next part; `None` when the stream is whole.
    ///
    /// # Errors
    /// `Corrupt` for anything that is not as it was sent.
    pub fn next_part(&mut self) -> Result<Option<Part<'_>>> {
        self.applied = self.at;
        let mut bytes = [0; RECORD_LEN];
        fill(self.input, &mut bytes)?;
        let record = Record::decode(&bytes)?;
        match record {
            Record::Data { offset, length, codec, stored, crc } => {
                self.follow(offset, length)?;
                self.headers.update(&bytes);
                self.totals.data_records += 1;
                self.totals.data += length;
                self.take_data(offset, length, codec, stored as usize, crc)?;
                Ok(Some(Part::Data { offset, bytes: &self.plain }))
            }
            Record::Zeros { offset, length } => {
                self.follow(offset, length)?;
                self.headers.update(&bytes);
                self.totals.zero_records += 1;
                self.totals.zeros += length;
                Ok(Some(Part::Zeros { offset, length }))
            }
            Record::End { crc } => self.end(crc).map(|()| None),
        }
    }

    /// Checks that an extent fits the ones before it and the disk.
    fn follow(&mut self, offset: u64, length: u64) -> Result<()> {
        let size = self.header.target.size;
        let end = offset + length;
        let whole = end.is_multiple_of(BLOCK_SIZE) || end == size;
        let gap = self.header.base.is_none() && offset != self.at;
        if offset < self.at || end > size || !whole || gap {
            return Err(Error::corrupt(format!("the stream is damaged: {length} bytes at {offset} do not fit in it")));
        }
        self.at = end;
        Ok(())
    }

    fn take_data(&mut self, offset: u64, length: u64, codec: Codec, stored: usize, crc: u32) -> Result<()> {
        let damaged =
            || Error::corrupt(format!("the stream is damaged: its data for byte {offset} is not what was sent"));
        let length = to_usize(length);
        assert!(length as u64 <= DATA_MAX && stored as u64 <= DATA_MAX, "checked by the decoder");
        self.plain.resize(length, 0);
        match codec {
            Codec::Raw => fill(self.input, &mut self.plain)?,
            Codec::Lz4 => {
                self.stored.resize(stored, 0);
                fill(self.input, &mut self.stored)?;
                self.headers.update(&self.stored);
                let got = lz4_flex::block::decompress_into(&self.stored, &mut self.plain).map_err(|_| damaged())?;
                if got != length {
                    return Err(damaged());
                }
            }
        }
        if crc32(&self.plain) == crc { Ok(()) } else { Err(damaged()) }
    }

    fn end(&mut self, crc: u32) -> Result<()> {
        let mut bytes = [0; TOTALS_LEN];
        fill(self.input, &mut bytes)?;
        let found = Totals { headers: self.headers.clone().finalize(), ..self.totals };
        let told = Totals::decode(&bytes)?;
        let promised = (self.header.data, self.header.zeros) == (found.data, found.zeros);
        let covered = self.header.base.is_some() || self.at == self.header.target.size;
        if crc32(&bytes) != crc || told != found || !promised || !covered {
            return Err(Error::corrupt("the stream is damaged: its end does not match what came before it"));
        }
        let mut more = [0];
        match self.input.read_exact(&mut more) {
            Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => Ok(()),
            Ok(()) => Err(Error::corrupt("bytes follow the end of the stream")),
            Err(error) => Err(Error::io("cannot read the stream", error)),
        }
    }

    /// Returns the first byte of the disk behind everything that was returned.
    #[must_use]
    pub fn position(&self) -> u64 {
        self.at
    }

    /// Returns the same for what was returned before the last call of [`StreamReader::next_part`]: it was used by now.
    #[must_use]
    pub fn applied(&self) -> u64 {
        self.applied
    }
}
