//! Where a page block is: the cell of the index, and how the stored bytes become memory again.

use super::geometry::StorageBlock;
use crate::codec::crc32;

/// Bytes of a cell of the index.
pub(super) const CELL: usize = 16;
/// Offsets have so many bits.
const OFFSET_MAX: u32 = (1 << 24) - 1;

/// How the bytes of a page block are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Codec {
    /// As they are.
    Raw = 3,
    /// One LZ4 block.
    Lz4 = 4,
}

/// Where the bytes of a page block are in a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stored {
    /// The storage block.
    pub block: StorageBlock,
    /// First byte in the storage block.
    pub offset: u32,
    /// Bytes that are stored.
    pub length: u32,
    /// How they are stored.
    pub codec: Codec,
    /// CRC32 of the stored bytes.
    pub crc: u32,
}

/// Where a page block is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// It is zeros.
    Zero,
    /// It is as in the parent.
    Parent,
    /// It is in a storage block.
    Stored(Stored),
}

impl Place {
    /// Returns the cell of the index.
    #[must_use]
    pub fn encode(&self) -> [u8; CELL] {
        let mut cell = [0; CELL];
        match self {
            Self::Zero => cell[0] = 1,
            Self::Parent => cell[0] = 2,
            Self::Stored(stored) => {
                assert!(stored.offset <= OFFSET_MAX, "a storage block has at most 16 MiB");
                cell[..4].copy_from_slice(&(stored.offset << 8 | stored.codec as u32).to_le_bytes());
                cell[4..8].copy_from_slice(&stored.block.0.to_le_bytes());
                cell[8..12].copy_from_slice(&stored.length.to_le_bytes());
                cell[12..].copy_from_slice(&stored.crc.to_le_bytes());
            }
        }
        cell
    }

    /// Takes a cell apart. That it fits the file is checked by who reads one.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn decode(cell: &[u8; CELL]) -> Result<Self, String> {
        let word = |at: usize| u32::from_le_bytes(cell[at..at + 4].try_into().expect("four bytes"));
        let (first, block, length, crc) = (word(0), StorageBlock(word(4)), word(8), word(12));
        let alone = cell[1..] == [0; CELL - 1];
        let stored = |codec| Self::Stored(Stored { block, offset: first >> 8, length, codec, crc });
        match cell[0] {
            0 => Err("nobody saved it".to_owned()),
            1 if alone => Ok(Self::Zero),
            2 if alone => Ok(Self::Parent),
            3 => Ok(stored(Codec::Raw)),
            4 => Ok(stored(Codec::Lz4)),
            1 | 2 => Err("its cell of the index makes no sense".to_owned()),
            kind => Err(format!("it is stored in a way that this program does not know (kind {kind})")),
        }
    }
}

impl Stored {
    /// Checks that it lies inside a storage block, and that its length can be that of a page block of `plain` bytes.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn check(&self, storage_block: usize, plain: usize) -> Result<(), String> {
        let (offset, length) = (self.offset as usize, self.length as usize);
        let fits = match self.codec {
            Codec::Raw => length == plain,
            Codec::Lz4 => length > 0 && length < plain,
        };
        if !fits || offset + length > storage_block {
            return Err(format!("its place (byte {offset}, {length} bytes) cannot be in a storage block"));
        }
        Ok(())
    }

    /// Checks the stored bytes and expands them into `out`, which has the length of the page block.
    ///
    /// # Errors
    /// What is wrong with them; `out` is anything then.
    pub fn expand(&self, stored: &[u8], out: &mut [u8]) -> Result<(), String> {
        self.verify(stored)?;
        match self.codec {
            Codec::Raw if stored.len() == out.len() => out.copy_from_slice(stored),
            Codec::Raw => return Err("it has another length than its page block".to_owned()),
            Codec::Lz4 => match lz4_flex::block::decompress_into(stored, out) {
                Ok(length) if length == out.len() => {}
                _ => return Err("its bytes do not expand to a page block".to_owned()),
            },
        }
        Ok(())
    }

    /// Compares the stored bytes with their checksum.
    ///
    /// # Errors
    /// What is wrong with them.
    pub fn verify(&self, stored: &[u8]) -> Result<(), String> {
        if stored.len() == self.length as usize && crc32(stored) == self.crc {
            return Ok(());
        }
        Err("its bytes do not match their checksum".to_owned())
    }
}

/// Tells whether bytes are all zero.
#[must_use]
pub fn is_zero(bytes: &[u8]) -> bool {
    // In pieces, so that the zeros to compare with stay in the nearest cache, and most of what is not zero costs one piece.
    static ZEROS: [u8; 4096] = [0; 4096];
    bytes.chunks(ZEROS.len()).all(|piece| *piece == ZEROS[..piece.len()])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cells_come_back_and_others_are_refused() {
        let (block, crc) = (StorageBlock(u32::MAX), 0x1234_5678);
        let stored = Stored { block, offset: OFFSET_MAX, length: 77, codec: Codec::Lz4, crc };
        let raw = Stored { codec: Codec::Raw, offset: 0, ..stored };
        for place in [Place::Zero, Place::Parent, Place::Stored(stored), Place::Stored(raw)] {
            assert_eq!(Place::decode(&place.encode()).unwrap(), place);
        }
        for kind in (0..=255).filter(|kind| !(1..=4).contains(kind)) {
            let mut cell = [0; CELL];
            cell[0] = kind;
            Place::decode(&cell).unwrap_err();
        }
        for at in 1..CELL {
            let mut cell = Place::Zero.encode();
            cell[at] = 1;
            Place::decode(&cell).unwrap_err();
        }
    }

    #[test]
    fn zeros_are_told_apart() {
        let mut bytes = vec![0; 5000];
        assert!(is_zero(&bytes) && is_zero(&[]));
        for at in [0, 4095, 4096, 4999] {
            bytes[at] = 1;
            assert!(!is_zero(&bytes));
            bytes[at] = 0;
        }
    }

    #[test]
    fn only_what_fits_is_expanded() {
        let plain: Vec<u8> = (0..4096u32).map(|n| (n / 64).to_le_bytes()[0]).collect();
        let bytes = lz4_flex::block::compress(&plain);
        let length = u32::try_from(bytes.len()).unwrap();
        let stored = Stored { block: StorageBlock(0), offset: 0, length, codec: Codec::Lz4, crc: crc32(&bytes) };
        let mut out = vec![0; 4096];
        stored.expand(&bytes, &mut out).unwrap();
        assert_eq!(out, plain);
        for len in [0, 1, 4095, 4097, 8192] {
            stored.expand(&bytes, &mut vec![0; len]).unwrap_err();
        }
        for bit in 0..bytes.len() * 8 {
            let mut bad = bytes.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            stored.expand(&bad, &mut out).unwrap_err();
        }
        stored.check(8192, 4096).unwrap();
        stored.check(length as usize - 1, 4096).unwrap_err();
        Stored { length: 0, ..stored }.check(8192, 4096).unwrap_err();
        Stored { length: 4096, ..stored }.check(8192, 4096).unwrap_err();
        Stored { codec: Codec::Raw, ..stored }.check(8192, 4096).unwrap_err();
    }
}
