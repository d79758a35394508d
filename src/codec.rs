//! Reading and writing bytes of the formats: little-endian fields, variable-length integers, CRC32, bounds checked.
//!
//! # Rules
//! 1. A [`Reader`] never panics on any input: a field beyond the end is `Kind::Corrupt`.
//! 2. Lengths read from bytes are compared with what is there before anything is allocated.
//! 3. Catalog values end with a CRC32 of what precedes ([`seal`] and [`unseal`]).

use std::sync::LazyLock;

use crate::error::{Error, Result};
use crate::units::BLOCK_SIZE;

/// Returns the CRC32 (IEEE, as in zlib and Ethernet) of `bytes`.
#[must_use]
pub fn crc32(bytes: &[u8]) -> u32 {
    crc32fast::hash(bytes)
}

/// Returns the CRC32 of blocks of [`BLOCK_SIZE`] bytes one after the other from the CRC32 of each: a hundredth of the time
/// that the bytes themselves take. (A CRC is linear: that of A and B is that of A with as many zeros behind it as B has
/// bytes, plus that of B. What so many zeros do to a CRC is a matrix, kept as a table for each of its bytes.)
#[must_use]
pub fn crc32_of_blocks(crcs: impl IntoIterator<Item = u32>) -> u32 {
    static ZEROS: LazyLock<Box<[[u32; 256]; 4]>> = LazyLock::new(|| {
        let behind = |crc: u32| {
            let mut hasher = crc32fast::Hasher::new_with_initial_len(crc, 0);
            hasher.combine(&crc32fast::Hasher::new_with_initial_len(0, BLOCK_SIZE));
            hasher.finalize()
        };
        let mut tables = Box::new([[0; 256]; 4]);
        for (place, table) in tables.iter_mut().enumerate() {
            for (byte, entry) in (0..).zip(table.iter_mut()) {
                *entry = behind(byte << (8 * place));
            }
        }
        tables
    });
    let zeros = &**ZEROS;
    let mut crcs = crcs.into_iter();
    let first = crcs.next().unwrap_or(0);
    crcs.fold(first, |all, crc| {
        let bytes = all.to_le_bytes();
        crc ^ (0..4).fold(0, |sum, place| sum ^ zeros[place][usize::from(bytes[place])])
    })
}

/// Appends the CRC32 of `bytes` to them.
#[must_use]
pub fn seal(mut bytes: Vec<u8>) -> Vec<u8> {
    let crc = crc32(&bytes);
    bytes.extend_from_slice(&crc.to_le_bytes());
    bytes
}

/// Checks and removes the CRC32 at the end of `bytes`.
///
/// # Errors
/// `Kind::Corrupt` when `bytes` is shorter than a CRC or the CRC does not match.
pub fn unseal<'a>(what: &str, bytes: &'a [u8]) -> Result<&'a [u8]> {
    let (body, tail) =
        bytes.split_last_chunk::<4>().ok_or_else(|| Error::corrupt(format!("{what} is shorter than its checksum")))?;
    if crc32(body) != u32::from_le_bytes(*tail) {
        return Err(Error::corrupt(format!("{what} does not match its checksum")));
    }
    Ok(body)
}

/// Builds a byte string field by field.
#[derive(Debug, Default)]
pub struct Writer {
    bytes: Vec<u8>,
}

impl Writer {
    /// Makes an empty one.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Appends one byte.
    pub fn u8(&mut self, value: u8) -> &mut Self {
        self.bytes.push(value);
        self
    }

    /// Appends two bytes.
    pub fn u16(&mut self, value: u16) -> &mut Self {
        self.raw(&value.to_le_bytes())
    }

    /// Appends four bytes.
    pub fn u32(&mut self, value: u32) -> &mut Self {
        self.raw(&value.to_le_bytes())
    }

    /// Appends eight bytes.
    pub fn u64(&mut self, value: u64) -> &mut Self {
        self.raw(&value.to_le_bytes())
    }

    /// Appends an unsigned LEB128 integer of one to ten bytes.
    pub fn varint(&mut self, mut value: u64) -> &mut Self {
        while value >= 0x80 {
            self.bytes.push((value & 0x7f) as u8 | 0x80);
            value >>= 7;
        }
        self.bytes.push((value & 0x7f) as u8);
        self
    }

    /// Appends bytes as they are.
    pub fn raw(&mut self, value: &[u8]) -> &mut Self {
        self.bytes.extend_from_slice(value);
        self
    }

    /// Appends a length (varint) and the bytes.
    pub fn bytes(&mut self, value: &[u8]) -> &mut Self {
        self.varint(value.len() as u64).raw(value)
    }

    /// Appends a text as [`Self::bytes`].
    pub fn text(&mut self, value: &str) -> &mut Self {
        self.bytes(value.as_bytes())
    }

    /// Returns the bytes written so far.
    #[must_use]
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Tells whether nothing was written.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Ends with the bytes.
    #[must_use]
    pub fn finish(self) -> Vec<u8> {
        self.bytes
    }

    /// Ends with the bytes and their CRC32.
    #[must_use]
    pub fn sealed(self) -> Vec<u8> {
        seal(self.bytes)
    }
}

/// Takes a byte string apart field by field; `what` names it in errors.
#[derive(Debug, Clone)]
pub struct Reader<'a> {
    what: &'a str,
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    /// Starts at the beginning of `bytes`.
    #[must_use]
    pub fn new(what: &'a str, bytes: &'a [u8]) -> Self {
        Self { what, rest: bytes }
    }

    /// Returns how many bytes are left.
    #[must_use]
    pub fn left(&self) -> usize {
        self.rest.len()
    }

    /// Makes the error for a field that is wrong.
    #[must_use]
    pub fn corrupt(&self, why: &str) -> Error {
        Error::corrupt(format!("{} is damaged: {why}", self.what))
    }

    /// Takes `len` bytes.
    pub fn raw(&mut self, len: usize) -> Result<&'a [u8]> {
        if len > self.rest.len() {
            return Err(self.corrupt("it ends early"));
        }
        let (head, rest) = self.rest.split_at(len);
        self.rest = rest;
        Ok(head)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        Ok(self.raw(N)?.try_into().expect("raw returned N bytes"))
    }

    /// Takes one byte.
    pub fn u8(&mut self) -> Result<u8> {
        Ok(self.array::<1>()?[0])
    }

    /// Takes two bytes.
    pub fn u16(&mut self) -> Result<u16> {
        Ok(u16::from_le_bytes(self.array()?))
    }

    /// Takes four bytes.
    pub fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    /// Takes eight bytes.
    pub fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// Takes an unsigned LEB128 integer; refuses more than 64 bits and padded forms.
    pub fn varint(&mut self) -> Result<u64> {
        let mut value = 0u64;
        for shift in (0..70).step_by(7) {
            let byte = self.u8()?;
            let bits = u64::from(byte & 0x7f);
            if shift == 63 && bits > 1 {
                return Err(self.corrupt("an integer is too large"));
            }
            value |= bits << shift;
            if byte & 0x80 == 0 {
                if byte == 0 && shift > 0 {
                    return Err(self.corrupt("an integer is padded"));
                }
                return Ok(value);
            }
        }
        Err(self.corrupt("an integer is too long"))
    }

    /// Takes a length and that many bytes.
    pub fn bytes(&mut self) -> Result<&'a [u8]> {
        let len = usize::try_from(self.varint()?).map_err(|_| self.corrupt("a length is too large"))?;
        self.raw(len)
    }

    /// Takes a length and that many bytes of UTF-8.
    pub fn text(&mut self) -> Result<String> {
        let bytes = self.bytes()?;
        String::from_utf8(bytes.to_vec()).map_err(|_| self.corrupt("a text is not UTF-8"))
    }

    /// Takes one byte that must be 0 or 1.
    pub fn flag(&mut self) -> Result<bool> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(self.corrupt("a flag is neither 0 nor 1")),
        }
    }

    /// Checks that nothing is left.
    pub fn end(self) -> Result<()> {
        if self.rest.is_empty() { Ok(()) } else { Err(self.corrupt("bytes follow its end")) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_come_back() {
        let mut w = Writer::new();
        w.u8(1).u16(2).u32(3).u64(4).varint(300).text("disk").bytes(&[9, 9]);
        let bytes = w.sealed();
        let body = unseal("test", &bytes).unwrap();
        let mut r = Reader::new("test", body);
        assert_eq!((r.u8().unwrap(), r.u16().unwrap(), r.u32().unwrap(), r.u64().unwrap()), (1, 2, 3, 4));
        assert_eq!(r.varint().unwrap(), 300);
        assert_eq!(r.text().unwrap(), "disk");
        assert_eq!(r.bytes().unwrap(), [9, 9]);
        r.end().unwrap();
    }

    #[test]
    fn the_crc_of_blocks_is_that_of_their_bytes() {
        let bytes: Vec<u8> = (0..9 * 4096u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        for blocks in 0..=9 {
            let part = &bytes[..blocks * 4096];
            assert_eq!(crc32_of_blocks(part.chunks(4096).map(crc32)), crc32(part));
        }
    }

    #[test]
    fn every_flipped_bit_is_seen() {
        let bytes = seal(b"a value of the catalog".to_vec());
        for bit in 0..bytes.len() * 8 {
            let mut bad = bytes.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            unseal("test", &bad).unwrap_err();
        }
    }

    #[test]
    fn varints_are_canonical_and_bounded() {
        for value in [0, 1, 127, 128, 1 << 35, u64::MAX] {
            let mut w = Writer::new();
            w.varint(value);
            let bytes = w.finish();
            let mut r = Reader::new("test", &bytes);
            assert_eq!(r.varint().unwrap(), value);
        }
        for bad in [&[0x80][..], &[0x80, 0], &[0xff; 11], &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2]] {
            assert!(Reader::new("test", bad).varint().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_long_length_allocates_nothing() {
        let mut w = Writer::new();
        w.varint(u64::MAX);
        let bytes = w.finish();
        Reader::new("test", &bytes).bytes().unwrap_err();
    }
}
