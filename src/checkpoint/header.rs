//! What a file begins and ends with: who it is, what it is of, what it holds, and where its parts are.
//!
//! Nothing here reads or writes a file. Every decoder takes bytes from strangers: numbers are compared with their limits, and with
//! the length of the file, before anything is allocated or read because of them.

use uuid::Uuid;

use super::geometry::{Geometry, PAGE, REGIONS_MAX, Region, Sizes, StorageBlock};
use super::table::{self, TRAILER};
use crate::codec::{Reader, Writer, crc32, unseal};
use crate::disk::{check_disk_name, check_snapshot_name};
use crate::error::{Error, Result};

/// First eight bytes; a non-ASCII byte, and CR LF against text transfers.
pub const MAGIC: [u8; 8] = *b"\x89AFTCK\r\n";
/// First eight bytes of the footer.
pub const FOOTER_MAGIC: [u8; 8] = *b"\x89AFTCE\r\n";
/// The version that is written.
pub const VERSION: u32 = 1;
/// Bytes of the fixed part of the header.
pub const HEADER_LEN: usize = 64;
/// Most bytes of the header and its body.
pub const HEADER_MAX: usize = 64 << 10;
/// Bytes of the footer, without the zeros behind it.
pub const FOOTER_LEN: usize = 128;
/// Most disks of a machine.
pub const DISKS_MAX: usize = 64;
/// Most bytes of the name of who made the state of the devices.
pub const MAKER_MAX: usize = 64;
/// Most bytes of the state of the devices.
pub const STATE_MAX: u64 = 64 << 20;

/// A checkpoint that another one is based on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parent {
    /// Its identity.
    pub uuid: Uuid,
    /// The machine it is of.
    pub machine: String,
    /// Its name then.
    pub name: String,
}

/// A snapshot that belongs to a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskSnapshot {
    /// Identity of the disk.
    pub disk: Uuid,
    /// Its name then.
    pub disk_name: String,
    /// Identity of the snapshot.
    pub snapshot: Uuid,
    /// Its name then.
    pub snapshot_name: String,
}

/// What a file begins with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// Identity of the state that is saved.
    pub uuid: Uuid,
    /// Name of the machine.
    pub machine: String,
    /// Name of the checkpoint when it was made.
    pub name: String,
    /// Who made the state of the devices and understands it, such as `afterimage` or `firecracker`.
    pub maker: String,
    /// Seconds since 1970 at the instant that is saved.
    pub created: u64,
    /// What it is based on.
    pub parent: Option<Parent>,
    /// The memory.
    pub geometry: Geometry,
    /// The snapshots of the disks, in the order in which the machine has them.
    pub disks: Vec<DiskSnapshot>,
}

/// The fixed part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Prefix {
    /// Bytes of the header and its body.
    pub(super) length: usize,
    uuid: Uuid,
    sizes: Sizes,
}

impl Prefix {
    fn encode(&self) -> Vec<u8> {
        let mut out = Writer::new();
        let length = u32::try_from(self.length).expect("checked by who encodes a header");
        let Sizes { page_block, storage_block, table_page } = self.sizes;
        out.raw(&MAGIC).u32(VERSION).u32(length).u64(0).raw(self.uuid.as_bytes());
        out.u32(page_block).u32(storage_block).u32(table_page).u64(0);
        let bytes = out.sealed();
        assert_eq!(bytes.len(), HEADER_LEN, "it has a fixed length");
        bytes
    }

    /// Takes the first bytes of a file apart.
    ///
    /// # Errors
    /// `Corrupt` when it is no checkpoint, `Unsupported` when it is of a newer version.
    pub(super) fn decode(what: &str, bytes: &[u8]) -> Result<Self> {
        let mut from = Reader::new(what, bytes);
        if from.raw(8)? != MAGIC {
            return Err(from.corrupt("it does not begin like a checkpoint"));
        }
        let version = from.u32()?;
        if version > VERSION {
            return Err(Error::unsupported(format!(
                "{what} has format version {version}, and this program knows up to {VERSION}"
            ))
            .hint("use a newer version of afterimage"));
        }
        let mut from = Reader::new(what, unseal(what, Reader::new(what, bytes).raw(HEADER_LEN)?)?);
        from.raw(12)?;
        let (length, features) = (from.u32()? as usize, from.u64()?);
        if features != 0 {
            return Err(Error::unsupported(format!(
                "{what} uses features that this program does not know ({features:#x})"
            ))
            .hint("use a newer version of afterimage"));
        }
        let uuid = read_uuid(&mut from)?;
        let sizes = Sizes { page_block: from.u32()?, storage_block: from.u32()?, table_page: from.u32()? };
        let reserved = from.u64()?;
        let fits = (HEADER_LEN..=HEADER_MAX.min(sizes.storage_block as usize)).contains(&length);
        if version == 0 || reserved != 0 || !fits {
            return Err(from.corrupt("its header makes no sense"));
        }
        Ok(Self { length, uuid, sizes })
    }
}

impl Header {
    /// Returns the bytes.
    ///
    /// # Errors
    /// `Usage` when a name, or all of them together, are too long.
    pub fn encode(&self) -> Result<Vec<u8>> {
        check_maker(&self.maker).map_err(Error::usage)?;
        check_disk_name(&self.machine)?;
        check_snapshot_name(&self.name)?;
        let mut body = Writer::new();
        body.text(&self.machine).text(&self.name).text(&self.maker).u64(self.created);
        body.u8(u8::from(self.parent.is_some()));
        if let Some(parent) = &self.parent {
            body.raw(parent.uuid.as_bytes()).text(&parent.machine).text(&parent.name);
        }
        body.varint(self.geometry.regions().len() as u64);
        for region in self.geometry.regions() {
            body.u64(region.address).u64(region.length);
        }
        body.varint(self.disks.len() as u64);
        for disk in &self.disks {
            body.raw(disk.disk.as_bytes()).text(&disk.disk_name);
            body.raw(disk.snapshot.as_bytes()).text(&disk.snapshot_name);
        }
        let sizes = self.geometry.sizes();
        let length = HEADER_LEN + body.len() + 4;
        if length > HEADER_MAX.min(sizes.storage_block as usize) || self.disks.len() > DISKS_MAX {
            return Err(Error::usage("a checkpoint of so many regions and disks has no room for their names")
                .hint(format!("it may have {DISKS_MAX} disks, and {HEADER_MAX} bytes for all of them")));
        }
        let mut out = Writer::new();
        out.raw(&Prefix { length, uuid: self.uuid, sizes }.encode()).raw(&body.finish());
        Ok(out.sealed())
    }

    /// Takes a whole header apart, from its first byte to the checksum of its body.
    ///
    /// # Errors
    /// `Corrupt`, `Unsupported`.
    pub fn decode(what: &str, bytes: &[u8]) -> Result<Self> {
        let prefix = Prefix::decode(what, bytes)?;
        let whole = Reader::new(what, bytes).raw(prefix.length)?;
        let mut from = Reader::new(what, unseal(what, whole)?);
        from.raw(HEADER_LEN)?;
        let (machine, name, maker) = (from.text()?, from.text()?, from.text()?);
        let created = from.u64()?;
        let parent = match from.flag()? {
            true => Some(Parent { uuid: read_uuid(&mut from)?, machine: from.text()?, name: from.text()? }),
            false => None,
        };
        let names = parent.iter().map(|parent| (&parent.machine, &parent.name)).chain([(&machine, &name)]);
        for (machine, name) in names {
            // They become paths.
            check_disk_name(machine).map_err(|_| from.corrupt("a machine has an impossible name"))?;
            check_snapshot_name(name).map_err(|_| from.corrupt("a checkpoint has an impossible name"))?;
        }
        check_maker(&maker).map_err(|why| from.corrupt(&why))?;
        let geometry = read_regions(&mut from, prefix.sizes)?;
        let disks = read_disks(&mut from)?;
        from.end()?;
        Ok(Self { uuid: prefix.uuid, machine, name, maker, created, parent, geometry, disks })
    }
}

fn check_maker(maker: &str) -> Result<(), String> {
    if maker.is_empty() || maker.len() > MAKER_MAX || maker.chars().any(char::is_control) {
        return Err(format!("the maker of the state of its devices is no text of 1 to {MAKER_MAX} bytes"));
    }
    Ok(())
}

fn read_uuid(from: &mut Reader<'_>) -> Result<Uuid> {
    Ok(Uuid::from_slice(from.raw(16)?).expect("16 bytes"))
}

/// Reads how many of something follow.
fn read_count(from: &mut Reader<'_>, most: usize) -> Result<usize> {
    match usize::try_from(from.varint()?) {
        Ok(count) if count <= most => Ok(count),
        _ => Err(from.corrupt("a number of parts is too large")),
    }
}

fn read_regions(from: &mut Reader<'_>, sizes: Sizes) -> Result<Geometry> {
    let count = read_count(from, REGIONS_MAX)?;
    let read = |_| Ok(Region { address: from.u64()?, length: from.u64()? });
    let regions = (0..count).map(read).collect::<Result<Vec<_>>>()?;
    Geometry::checked(sizes, &regions).map_err(|why| from.corrupt(&why))
}

fn read_disks(from: &mut Reader<'_>) -> Result<Vec<DiskSnapshot>> {
    let count = read_count(from, DISKS_MAX)?;
    let read = |_| {
        let (disk, disk_name) = (read_uuid(from)?, from.text()?);
        let (snapshot, snapshot_name) = (read_uuid(from)?, from.text()?);
        Ok(DiskSnapshot { disk, disk_name, snapshot, snapshot_name })
    };
    (0..count).map(read).collect()
}

/// What a file ends with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Footer {
    /// Identity, as in the header.
    pub uuid: Uuid,
    /// The checksum at the end of the header's body.
    pub header: u32,
    /// Storage blocks.
    pub blocks: u32,
    /// Page blocks that are stored here.
    pub stored: u64,
    /// Page blocks that are zeros.
    pub zeros: u64,
    /// Page blocks that are as in the parent.
    pub inherited: u64,
    /// Bytes that are stored.
    pub bytes: u64,
    /// Hot storage blocks.
    pub hot: u32,
    /// Version of the state of the devices, in terms of its maker.
    pub state_version: u32,
    /// Bytes of it.
    pub state_length: u64,
    /// CRC32 of it.
    pub state_crc: u32,
}

impl Footer {
    /// Returns the last [`PAGE`] bytes of the file.
    #[must_use]
    pub fn encode(&self, geometry: &Geometry) -> Vec<u8> {
        let mut out = Writer::new();
        out.raw(&FOOTER_MAGIC).raw(self.uuid.as_bytes()).u32(self.header).u32(self.blocks);
        out.u64(self.stored).u64(self.zeros).u64(self.inherited).u64(self.bytes);
        out.u32(self.hot).u32(self.state_version).u64(self.state_length).u32(self.state_crc);
        out.u64(Layout::of(geometry, self).length).raw(&[0; 32]);
        let mut bytes = out.sealed();
        assert_eq!(bytes.len(), FOOTER_LEN, "it has a fixed length");
        bytes.resize(PAGE as usize, 0);
        bytes
    }

    /// Takes the last [`PAGE`] bytes of a file of `length` bytes apart, whose header is known.
    ///
    /// # Errors
    /// `Corrupt`.
    pub fn decode(what: &str, bytes: &[u8], header: &Header, header_crc: u32, length: u64) -> Result<Self> {
        let mut whole = Reader::new(what, bytes);
        let (fixed, rest) = (whole.raw(FOOTER_LEN)?, whole);
        if !fixed.starts_with(&FOOTER_MAGIC) {
            return Err(rest.corrupt("it does not end like a checkpoint; it may have been cut off"));
        }
        let mut from = Reader::new(what, unseal(what, fixed)?);
        from.raw(8)?;
        let uuid = read_uuid(&mut from)?;
        let (crc, blocks) = (from.u32()?, from.u32()?);
        let (stored, zeros, inherited, bytes) = (from.u64()?, from.u64()?, from.u64()?, from.u64()?);
        let (hot, state_version, state_length, state_crc) = (from.u32()?, from.u32()?, from.u64()?, from.u32()?);
        let footer = Self {
            uuid,
            header: crc,
            blocks,
            stored,
            zeros,
            inherited,
            bytes,
            hot,
            state_version,
            state_length,
            state_crc,
        };
        let told = from.u64()?;
        let rest = rest.clone().raw(rest.left())?;
        let reserved = from.raw(32)?.iter().chain(rest).all(|byte| *byte == 0);
        if uuid != header.uuid || crc != header_crc {
            return Err(from.corrupt("its end belongs to another header"));
        }
        if !reserved || !footer.is_possible(header) {
            return Err(from.corrupt("its footer makes no sense"));
        }
        let layout = Layout::of(&header.geometry, &footer);
        if told != layout.length || length != layout.length {
            return Err(from.corrupt("its parts do not fit its length; it may have been cut off"));
        }
        Ok(footer)
    }

    /// Checks the numbers against each other; with that no sum of [`Layout`] is too large.
    fn is_possible(&self, header: &Header) -> bool {
        let all = header.geometry.page_blocks();
        let sum = self.stored.checked_add(self.zeros).and_then(|sum| sum.checked_add(self.inherited));
        sum == Some(all)
            && u64::from(self.blocks) <= self.stored
            && (self.blocks == 0) == (self.stored == 0)
            && self.hot <= self.blocks
            && self.state_length <= STATE_MAX
            && (self.inherited == 0 || header.parent.is_some())
    }
}

/// Where the parts of a file are; all of it follows from the geometry and the footer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    storage_block: u64,
    /// First byte of the index.
    pub index: u64,
    /// First byte of the contents.
    pub contents: u64,
    /// First byte of the state of the devices.
    pub state: u64,
    /// First byte of the footer.
    pub footer: u64,
    /// Bytes of the file.
    pub length: u64,
}

impl Layout {
    /// Works them out.
    #[must_use]
    pub fn of(geometry: &Geometry, footer: &Footer) -> Self {
        let (storage_block, page) = (geometry.storage_block() as u64, geometry.sizes().table_page as usize);
        let index = (u64::from(footer.blocks) + 1) * storage_block;
        let contents = index + table::length(geometry.page_blocks(), table::INDEX.cell, page);
        let state = contents + table::length(footer.cells(), table::CONTENTS.cell, page);
        let end = state + footer.state_length.next_multiple_of(u64::from(PAGE));
        Self { storage_block, index, contents, state, footer: end, length: end + u64::from(PAGE) }
    }

    /// Returns the first byte of a storage block.
    #[must_use]
    pub fn block(&self, block: StorageBlock) -> u64 {
        block_at(block, self.storage_block)
    }
}

/// Returns the first byte of a storage block of a file with storage blocks of `size` bytes.
pub(super) fn block_at(block: StorageBlock, size: u64) -> u64 {
    (u64::from(block.0) + 1) * size
}

impl Footer {
    /// Returns the number of cells of the contents.
    #[must_use]
    pub fn cells(&self) -> u64 {
        u64::from(self.blocks) + 1 + self.stored + u64::from(self.hot)
    }

    /// Returns the cell of the contents in which the numbers of page blocks begin.
    #[must_use]
    pub fn numbers(&self) -> u64 {
        u64::from(self.blocks) + 1
    }

    /// Returns the cell of the contents in which the numbers of the hot storage blocks begin.
    #[must_use]
    pub fn hot_cells(&self) -> u64 {
        self.numbers() + self.stored
    }
}

/// Returns the CRC32 that a sealed header ends with.
pub(super) fn crc_of(header: &[u8]) -> u32 {
    let tail = header.last_chunk().expect("a header has more than four bytes");
    u32::from_le_bytes(*tail)
}

/// Returns the CRC32 of a state.
pub(super) fn state_crc(state: &[u8]) -> u32 {
    crc32(state)
}

const _: () = assert!(TRAILER < PAGE as usize, "a page of a table has cells");
const _: () = assert!(FOOTER_LEN < PAGE as usize, "it is the beginning of the last page");
