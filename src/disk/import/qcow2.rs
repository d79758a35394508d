//! qcow2 images: what the header may say, whether all of the image is there, and reading it with `imago`.
//!
//! # Rules
//! 1. The header is judged before any reader sees the image; `imago` then opens nothing but the descriptor it is given
//!    ([`DenyImplicitOpenGate`]), and for `qemu-img` the backing file is switched off.
//! 2. Every table and cluster must lie inside the file: readers take what is missing for zeros. The last cluster may be cut
//!    short, as qemu leaves it.
//! 3. A panic of `imago` over a damaged image is a damaged image.
//!
//! The format: docs/interop/qcow2.rst of qemu.

use std::panic::{AssertUnwindSafe, catch_unwind};

use imago::file::File as ImagoFile;
use imago::qcow2::Qcow2;
use imago::{DenyImplicitOpenGate, FormatAccess, FormatDriverBuilder, Mapping};
use serde_json::json;

use super::source::{Image, Source};
use super::{go_on, qemu};
use crate::error::{Error, Result};
use crate::progress::Progress;
use crate::units::DISK_SIZE_MAX;

/// The first bytes.
pub(super) const MAGIC: &[u8] = b"QFI\xfb";

const HEADER_V2: usize = 72;
const HEADER_V3: usize = 104;
/// The limit of qemu: 32 MiB.
const L1_ENTRIES_MAX: u64 = (32 << 20) / 8;
const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
const COMPRESSED: u64 = 1 << 62;
const ZERO: u64 = 1;
const SECTOR: u64 = 512;
/// Bytes of a table read at once.
const PIECE: u64 = 64 << 10;

const DIRTY: u64 = 1;
const MARKED_CORRUPT: u64 = 1 << 1;
const DATA_FILE: u64 = 1 << 2;
const COMPRESSION_TYPE: u64 = 1 << 3;
const EXTENDED_L2: u64 = 1 << 4;

/// What is needed of the header.
#[derive(Debug)]
struct Header {
    cluster_bits: u32,
    size: u64,
    l1_entries: u64,
    l1_offset: u64,
    features: u64,
}

/// Opens the image with the reader that knows its features.
pub(super) fn open(source: Source, progress: &dyn Progress) -> Result<Box<dyn Image>> {
    let header = Header::parse(&source.head(HEADER_V3 as u64)?)?;
    header.check_tables(&source, progress)?;
    if header.features == 0 {
        return Ok(Box::new(ImagoImage::open(source)?));
    }
    let node = json!({ "driver": "qcow2", "backing": null, "file": qemu::file_node(&source) });
    Ok(Box::new(qemu::QemuImage::open(node, vec![source.file])?))
}

impl Header {
    fn parse(head: &[u8]) -> Result<Self> {
        if !head.starts_with(MAGIC) || head.len() < HEADER_V2 {
            return Err(Error::corrupt("it is not a qcow2 image").hint("leave out the format to have it found out"));
        }
        let word = |at: usize| u32::from_be_bytes(head[at..at + 4].try_into().expect("4 bytes"));
        let long = |at: usize| u64::from_be_bytes(head[at..at + 8].try_into().expect("8 bytes"));
        let version = word(4);
        if !(2..=3).contains(&version) {
            return Err(Error::unsupported(format!("version {version} of qcow2 is not known")));
        }
        if version == 3 && head.len() < HEADER_V3 {
            return Err(Error::corrupt("the file ends inside the qcow2 header"));
        }
        let features = if version == 3 { long(72) } else { 0 };
        refuse(long(8), word(32), features)?;
        let header =
            Self { cluster_bits: word(20), size: long(24), l1_entries: word(36).into(), l1_offset: long(40), features };
        if !(9..=21).contains(&header.cluster_bits) {
            return Err(Error::corrupt(format!("the qcow2 header gives clusters of 2^{} bytes", header.cluster_bits)));
        }
        Ok(header)
    }

    /// Walks the tables, as far as the size reaches: everything they point to must be in the file.
    fn check_tables(&self, source: &Source, progress: &dyn Progress) -> Result<()> {
        let cluster = 1 << self.cluster_bits;
        let stride = if self.features & EXTENDED_L2 == 0 { 8 } else { 16 };
        let covered = cluster / stride * cluster;
        let needed = self.size.div_ceil(covered);
        if self.size > DISK_SIZE_MAX {
            return Err(Error::failed(format!("its disk has {} bytes; the largest possible has 64 TiB", self.size)));
        }
        if needed > self.l1_entries || self.l1_entries > L1_ENTRIES_MAX {
            let (entries, size) = (self.l1_entries, self.size);
            return Err(Error::corrupt(format!("{entries} entries in the L1 table do not fit a disk of {size} bytes")));
        }
        each_entry(source, self.l1_offset, needed, 8, &mut |entry| {
            go_on(progress)?;
            let table = entry & OFFSET_MASK;
            if table == 0 {
                return Ok(());
            }
            each_entry(source, table, cluster / stride, stride, &mut |entry| self.check_cluster(entry, source.len))
        })
    }

    fn check_cluster(&self, entry: u64, len: u64) -> Result<()> {
        let cluster = 1_u64 << self.cluster_bits;
        let (end, limit) = if entry & COMPRESSED != 0 {
            let shift = 62 - (self.cluster_bits - 8);
            let offset = entry & ((1 << shift) - 1);
            let sectors = (entry & (COMPRESSED - 1)) >> shift;
            (offset / SECTOR * SECTOR + (sectors + 1) * SECTOR, len.next_multiple_of(SECTOR))
        } else if entry & OFFSET_MASK == 0 || entry & ZERO != 0 && self.features & EXTENDED_L2 == 0 {
            return Ok(());
        } else {
            ((entry & OFFSET_MASK) + cluster, len.next_multiple_of(cluster))
        };
        if end > limit {
            return Err(Error::corrupt(format!("data up to byte {end} of the file is missing; it has {len} bytes"))
                .hint("copy the image again, or look at it with `qemu-img check`"));
        }
        Ok(())
    }
}

/// Refuses what needs another file or a key, and what is not known.
fn refuse(backing: u64, encryption: u32, features: u64) -> Result<()> {
    if backing != 0 {
        return Err(Error::failed("it has a backing file, and an image does not choose which files are read")
            .hint("make it whole first: `qemu-img convert -O qcow2 IMAGE WHOLE`, or `qemu-img rebase -b '' IMAGE`"));
    }
    if features & DATA_FILE != 0 {
        return Err(Error::failed(
            "its data is in an external file, and an image does not choose which files are read",
        )
        .hint("make it whole first: `qemu-img convert -O qcow2 IMAGE WHOLE`"));
    }
    if encryption != 0 {
        return Err(Error::failed("it is encrypted")
            .hint("decrypt it first with `qemu-img convert --object secret,... -O qcow2 IMAGE PLAIN`"));
    }
    if features & MARKED_CORRUPT != 0 {
        return Err(Error::corrupt("it is marked as corrupt").hint("repair a copy of it with `qemu-img check -r all`"));
    }
    let unknown = features & !(DIRTY | COMPRESSION_TYPE | EXTENDED_L2);
    if unknown != 0 {
        return Err(Error::unsupported(format!("it needs features of qcow2 that are not known (bits {unknown:#x})")));
    }
    Ok(())
}

/// Calls `f` with the first word of each of the `count` entries of a table.
fn each_entry(
    source: &Source,
    offset: u64,
    count: u64,
    stride: u64,
    f: &mut dyn FnMut(u64) -> Result<()>,
) -> Result<()> {
    let end = offset
        .checked_add(count * stride)
        .filter(|end| *end <= source.len)
        .ok_or_else(|| Error::corrupt(format!("the table at byte {offset} lies beyond the end of the file")))?;
    let mut at = offset;
    let mut buffer = vec![0; usize::try_from(PIECE.min(count * stride)).expect("64 KiB")];
    while at < end {
        let part = &mut buffer[..usize::try_from(PIECE.min(end - at)).expect("64 KiB")];
        source.read(part, at)?;
        at += part.len() as u64;
        for entry in part.chunks_exact(usize::try_from(stride).expect("8 or 16")) {
            f(u64::from_be_bytes(entry[..8].try_into().expect("8 bytes")))?;
        }
    }
    Ok(())
}

/// A qcow2 image read in this process.
#[derive(Debug)]
struct ImagoImage {
    access: FormatAccess<ImagoFile>,
    size: u64,
}

impl ImagoImage {
    fn open(source: Source) -> Result<Self> {
        let access = guarded("cannot open it as qcow2", || {
            let storage = ImagoFile::try_from(source.file)?;
            Ok(FormatAccess::new(Qcow2::<ImagoFile>::builder(storage).open(DenyImplicitOpenGate::default())?))
        })?;
        Ok(Self { size: access.size(), access })
    }
}

/// Turns an error of `imago` into ours: one without an errno is about the bytes of the image.
fn guarded<T>(what: &str, f: impl FnOnce() -> std::io::Result<T>) -> Result<T> {
    match catch_unwind(AssertUnwindSafe(f)) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) if error.raw_os_error().is_some() => Err(Error::io(what, error)),
        Ok(Err(error)) => Err(Error::corrupt(format!("{what}: {error}")).because(error)),
        Err(_) => Err(Error::corrupt(format!("{what}: its metadata contradicts itself"))),
    }
}

impl Image for ImagoImage {
    fn size(&self) -> u64 {
        self.size
    }

    fn extent(&mut self, at: u64) -> Result<(u64, bool)> {
        guarded("cannot read the map", || {
            let (mapping, len) = self.access.get_mapping(at, self.size - at)?;
            Ok((at.saturating_add(len), !matches!(mapping, Mapping::Zero { .. })))
        })
    }

    fn read(&mut self, buf: &mut [u8], at: u64) -> Result<()> {
        guarded(&format!("cannot read the disk at {at}"), || self.access.read(buf, at))
    }
}
