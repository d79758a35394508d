//! The bytes of a stream: header, records, end. Nothing here reads or writes a file.
//!
//! Every decoder takes bytes from strangers: lengths are compared with fixed limits before anything is allocated.

use uuid::Uuid;

use crate::codec::{Reader, Writer, crc32, unseal};
use crate::error::{Error, Result};
use crate::store::Moment;
use crate::units::{BLOCK_SIZE, DISK_SIZE_MAX};

/// First eight bytes; a non-ASCII byte, and CR LF against text transfers.
pub const MAGIC: [u8; 8] = *b"\x89AFTST\r\n";
/// The version that is written.
pub const VERSION: u32 = 1;
/// Bytes of magic, version and length.
pub const PREFIX_LEN: usize = 16;
/// Most bytes of the body of a header.
pub const BODY_MAX: u32 = 4096;
/// Bytes of the header of a record.
pub const RECORD_LEN: usize = 32;
/// Most bytes of data in a record.
pub const DATA_MAX: u64 = 1 << 20;
/// Bytes stored with the end.
pub const TOTALS_LEN: usize = 36;

/// A state at one end of a stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StateId {
    /// Identity of the snapshot.
    pub uuid: Uuid,
    /// Bytes of the disk.
    pub size: u64,
    /// Seconds since 1970 when it was taken.
    pub created: u64,
    /// When it was taken, in terms of its pool.
    pub moment: Moment,
    /// Name of the snapshot.
    pub name: String,
}

impl StateId {
    fn encode(&self, out: &mut Writer) {
        self.encode_identity(out);
        out.text(&self.name);
    }

    fn encode_identity(&self, out: &mut Writer) {
        out.raw(self.uuid.as_bytes()).u64(self.size).u64(self.created).u64(self.moment.opening).u64(self.moment.nonce);
    }

    fn decode(from: &mut Reader<'_>) -> Result<Self> {
        let uuid = read_uuid(from)?;
        let (size, created) = (from.u64()?, from.u64()?);
        let moment = Moment { opening: from.u64()?, nonce: from.u64()? };
        let name = from.text()?;
        if size > DISK_SIZE_MAX {
            return Err(from.corrupt("a disk is larger than 64 TiB"));
        }
        crate::disk::check_snapshot_name(&name).map_err(|_| from.corrupt("a snapshot has an impossible name"))?;
        Ok(Self { uuid, size, created, moment, name })
    }
}

fn read_uuid(from: &mut Reader<'_>) -> Result<Uuid> {
    Ok(Uuid::from_slice(from.raw(16)?).expect("16 bytes"))
}

/// What a stream begins with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// The pool it comes from.
    pub pool: Uuid,
    /// The disk.
    pub disk: Uuid,
    /// Name of the disk there.
    pub disk_name: String,
    /// What the receiver must have; `None` when it needs nothing.
    pub base: Option<StateId>,
    /// What the receiver will have.
    pub target: StateId,
    /// First byte of the disk that is in the stream.
    pub start: u64,
    /// Bytes of data extents.
    pub data: u64,
    /// Bytes of zero extents.
    pub zeros: u64,
}

const WHAT: &str = "the header of the stream";

impl Header {
    /// Returns the bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut body = Writer::new();
        body.raw(self.pool.as_bytes()).raw(self.disk.as_bytes()).text(&self.disk_name);
        body.u8(u8::from(self.base.is_some()));
        if let Some(base) = &self.base {
            base.encode(&mut body);
        }
        self.target.encode(&mut body);
        body.u64(self.start).u64(self.data).u64(self.zeros);
        let body = body.finish();
        let len = u32::try_from(body.len() + 4).expect("names are short");
        assert!(len <= BODY_MAX, "names are short");
        let mut out = Writer::new();
        out.raw(&MAGIC).u32(VERSION).u32(len).raw(&body);
        out.sealed()
    }

    /// Checks the first bytes and returns how many follow.
    ///
    /// # Errors
    /// `Corrupt` when this is no stream, `Unsupported` when it is of a newer version.
    pub fn decode_prefix(prefix: &[u8; PREFIX_LEN]) -> Result<usize> {
        let mut from = Reader::new(WHAT, prefix);
        if from.raw(8)? != MAGIC {
            return Err(Error::corrupt("this is no stream: it does not begin like one")
                .hint("streams are made by `afterimage send`"));
        }
        let version = from.u32()?;
        if version > VERSION {
            return Err(Error::unsupported(format!(
                "the stream has format version {version}, and this program knows up to {VERSION}"
            ))
            .hint("receive it with a newer version of afterimage"));
        }
        let len = from.u32()?;
        if version == 0 || !(4..=BODY_MAX).contains(&len) {
            return Err(from.corrupt("its length makes no sense"));
        }
        Ok(len as usize)
    }

    /// Takes a whole header apart, prefix included.
    ///
    /// # Errors
    /// `Corrupt`.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        let body = unseal(WHAT, bytes)?;
        let mut from = Reader::new(WHAT, body);
        from.raw(PREFIX_LEN)?;
        let (pool, disk) = (read_uuid(&mut from)?, read_uuid(&mut from)?);
        let disk_name = from.text()?;
        let base = if from.flag()? { Some(StateId::decode(&mut from)?) } else { None };
        let target = StateId::decode(&mut from)?;
        let header =
            Self { pool, disk, disk_name, base, target, start: from.u64()?, data: from.u64()?, zeros: from.u64()? };
        let size = header.target.size;
        let sums = header.data.checked_add(header.zeros);
        let whole = header.start.is_multiple_of(BLOCK_SIZE) || header.start == size;
        if header.start > size || !whole || sums.is_none_or(|sum| sum > size - header.start) {
            return Err(from.corrupt("it promises more than the disk has"));
        }
        from.end()?;
        Ok(header)
    }

    /// Returns the checksum of the two states, without names: those may change.
    pub(super) fn states_crc(&self) -> u32 {
        let mut out = Writer::new();
        for state in self.base.iter().chain([&self.target]) {
            state.encode_identity(&mut out);
        }
        crc32(&out.finish())
    }
}

/// How the bytes of a data record are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Codec {
    /// As they are.
    Raw = 0,
    /// One LZ4 block.
    Lz4 = 1,
}

/// The header of a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Record {
    /// Data follows.
    Data {
        /// First byte of the disk.
        offset: u64,
        /// Bytes of the disk.
        length: u64,
        /// How they are stored.
        codec: Codec,
        /// Bytes that follow.
        stored: u32,
        /// CRC32 of the plain bytes.
        crc: u32,
    },
    /// Zeros.
    Zeros {
        /// First byte of the disk.
        offset: u64,
        /// Bytes of the disk.
        length: u64,
    },
    /// The totals follow, and nothing after them.
    End {
        /// CRC32 of the totals.
        crc: u32,
    },
}

impl Record {
    /// Returns the 32 bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let (kind, codec, stored, offset, length, crc) = match *self {
            Self::Data { offset, length, codec, stored, crc } => (1, codec as u8, stored, offset, length, crc),
            Self::Zeros { offset, length } => (2, 0, 0, offset, length, 0),
            Self::End { crc } => (3, 0, u32::try_from(TOTALS_LEN).expect("36"), 0, 0, crc),
        };
        let mut out = Writer::new();
        out.u8(kind).u8(codec).u16(0).u32(stored).u64(offset).u64(length).u32(crc);
        let bytes = out.sealed();
        assert_eq!(bytes.len(), RECORD_LEN, "record headers have a fixed length");
        bytes
    }

    /// Takes the 32 bytes apart. That it fits the records before is checked by who reads the stream.
    ///
    /// # Errors
    /// `Corrupt`.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        let what = "a record of the stream";
        let mut from = Reader::new(what, unseal(what, bytes)?);
        let (kind, codec, reserved, stored) = (from.u8()?, from.u8()?, from.u16()?, from.u32()?);
        let (offset, length, crc) = (from.u64()?, from.u64()?, from.u32()?);
        let wrong = from.corrupt("its fields make no sense");
        from.end()?;
        let ends = offset.checked_add(length).is_some_and(|end| end <= DISK_SIZE_MAX);
        if reserved != 0 || !offset.is_multiple_of(BLOCK_SIZE) || !ends {
            return Err(wrong);
        }
        match (kind, codec) {
            (1, 0) if (1..=DATA_MAX).contains(&length) && u64::from(stored) == length => {
                Ok(Self::Data { offset, length, codec: Codec::Raw, stored, crc })
            }
            (1, 1) if (1..=DATA_MAX).contains(&length) && stored > 0 && u64::from(stored) < length => {
                Ok(Self::Data { offset, length, codec: Codec::Lz4, stored, crc })
            }
            (2, 0) if length > 0 && stored == 0 && crc == 0 => Ok(Self::Zeros { offset, length }),
            (3, 0) if length == 0 && offset == 0 && stored as usize == TOTALS_LEN => Ok(Self::End { crc }),
            _ => Err(wrong),
        }
    }
}

/// What the end says of everything before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Totals {
    /// Data records.
    pub data_records: u64,
    /// Zero records.
    pub zero_records: u64,
    /// Bytes of data.
    pub data: u64,
    /// Bytes of zeros.
    pub zeros: u64,
    /// CRC32 of the header of the stream, of all record headers, and of what is stored as LZ4.
    pub headers: u32,
}

impl Totals {
    /// Returns the 36 bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Writer::new();
        out.u64(self.data_records).u64(self.zero_records).u64(self.data).u64(self.zeros).u32(self.headers);
        out.finish()
    }

    /// Takes the 36 bytes apart.
    ///
    /// # Errors
    /// `Corrupt`.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        let mut from = Reader::new("the end of the stream", bytes);
        let totals = Self {
            data_records: from.u64()?,
            zero_records: from.u64()?,
            data: from.u64()?,
            zeros: from.u64()?,
            headers: from.u32()?,
        };
        from.end()?;
        Ok(totals)
    }
}
