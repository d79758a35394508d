//! vmdk images: which of them are read, and of which files they consist.
//!
//! # Rules
//! 1. The descriptor is text from the image and may name any file as an extent. Only the names that VMware and qemu
//!    themselves give are followed: `STEM-s001.vmdk`, `STEM-f001.vmdk`, `STEM-flat.vmdk`, beside the descriptor `STEM.vmdk`, no
//!    symbolic links.
//! 2. qemu never sees that text: it gets a descriptor written here, in memory, that names the opened extents by number.
//!    So it does not matter whether it would read the text in the same way.
//! 3. A sparse file whose header gives no size is a descriptor in disguise, and refused.

use std::fmt::Write as _;
use std::os::unix::fs::FileExt;
use std::path::Path;

use serde_json::json;

use super::qemu::{self, QemuImage};
use super::source::Source;
use crate::error::{Error, Result};

const SPARSE: &[u8] = b"KDMV";
const COWD: &[u8] = b"COWD";
const DESCRIPTOR: &[u8] = b"# Disk DescriptorFile";
const SPARSE_HEADER: usize = 512;
const SECTOR: u64 = 512;
/// Bytes of a descriptor; those of real images have a few hundred.
const DESCRIPTOR_MAX: u64 = 1 << 20;
const EXTENTS_MAX: usize = 4096;

/// One line of the descriptor.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Extent<'a> {
    pub(super) sectors: u64,
    pub(super) flat: bool,
    pub(super) name: &'a str,
    pub(super) offset: u64,
}

/// Tells a vmdk image by its first bytes.
pub(super) fn is_vmdk(head: &[u8]) -> bool {
    [SPARSE, COWD, DESCRIPTOR].iter().any(|magic| head.starts_with(magic))
}

/// Opens the image.
pub(super) fn open(source: Source, path: &Path) -> Result<QemuImage> {
    let head = source.head(SPARSE_HEADER as u64)?;
    if head.starts_with(DESCRIPTOR) {
        return open_descriptor(&source, path);
    }
    check_sparse(&source, &head)?;
    let node = json!({ "driver": "vmdk", "backing": null, "file": qemu::file_node(&source) });
    QemuImage::open(node, vec![source.file])
}

/// Checks the header of a sparse file and the descriptor embedded in it.
fn check_sparse(source: &Source, head: &[u8]) -> Result<()> {
    if head.starts_with(COWD) {
        return Ok(());
    }
    if !head.starts_with(SPARSE) {
        return Err(Error::corrupt("it is not a vmdk image").hint("leave out the format to have it found out"));
    }
    if head.len() < SPARSE_HEADER {
        return Err(Error::corrupt("the file ends inside the vmdk header"));
    }
    let long = |at: usize| u64::from_le_bytes(head[at..at + 8].try_into().expect("8 bytes"));
    let (capacity, offset, sectors) = (long(12), long(28), long(36));
    if capacity == 0 {
        return Err(foreign_files("its header gives no size, so its data is in other files"));
    }
    if offset == 0 || sectors == 0 {
        return Ok(());
    }
    let start = offset.saturating_mul(SECTOR);
    let len = sectors.saturating_mul(SECTOR).min(DESCRIPTOR_MAX).min(source.len.saturating_sub(start));
    let mut text = vec![0; usize::try_from(len).expect("at most 1 MiB")];
    source.read(&mut text, start)?;
    refuse_parent(&String::from_utf8_lossy(&text))
}

fn open_descriptor(source: &Source, path: &Path) -> Result<QemuImage> {
    if source.len > DESCRIPTOR_MAX {
        return Err(Error::corrupt("its descriptor has more than 1 MiB"));
    }
    let text = source.head(DESCRIPTOR_MAX)?;
    let text = String::from_utf8_lossy(&text);
    refuse_parent(&text)?;
    let extents = parse(&text)?;
    let stem = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or_else(|| Path::new("."));
    let mut files = Vec::new();
    let mut ours = String::from(
        "# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\ncreateType=\"twoGbMaxExtentSparse\"\n",
    );
    for extent in &extents {
        if !belongs(stem, extent.name) {
            return Err(foreign_files(&format!("it names the file {:?}, which is not one of its own", extent.name)));
        }
        let context = |error: Error| error.context(format_args!("its extent {:?}", extent.name));
        let file = Source::open_itself(&folder.join(extent.name)).map_err(context)?;
        let (sectors, name) = (extent.sectors, file.proc_path());
        let line = if extent.flat {
            check_flat(extent, &file).map_err(context)?;
            writeln!(ours, "RW {sectors} FLAT \"{name}\" {}", extent.offset)
        } else {
            file.head(SPARSE_HEADER as u64).and_then(|head| check_sparse(&file, &head)).map_err(context)?;
            writeln!(ours, "RW {sectors} SPARSE \"{name}\"")
        };
        line.expect("strings take every line");
        files.push(file.file);
    }
    let descriptor = qemu::memory()?;
    descriptor.write_all_at(ours.as_bytes(), 0).map_err(|error| Error::io("cannot write to memory", error))?;
    let file = json!({ "driver": "file", "filename": super::source::proc_path(&descriptor), "read-only": true });
    files.push(descriptor);
    QemuImage::open(json!({ "driver": "vmdk", "backing": null, "file": file }), files)
}

/// qemu takes what is missing at the end of a flat extent for zeros.
fn check_flat(extent: &Extent<'_>, file: &Source) -> Result<()> {
    let end = extent.sectors.checked_add(extent.offset).and_then(|end| end.checked_mul(SECTOR));
    match end {
        Some(end) if end <= file.len => Ok(()),
        _ => Err(Error::corrupt(format!("it should have {} sectors and has {} bytes", extent.sectors, file.len))),
    }
}

fn foreign_files(why: &str) -> Error {
    Error::failed(format!("{why}; an image does not choose which files are read"))
        .hint("make it one file first: `qemu-img convert -f vmdk -O qcow2 IMAGE WHOLE`")
}

/// Returns the value of a `key=value` line.
fn value<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    text.lines().find_map(|line| {
        let (name, value) = line.split_once('=')?;
        name.trim().eq_ignore_ascii_case(key).then(|| value.trim_matches(|c: char| c.is_whitespace() || c == '\0'))
    })
}

/// Refuses images that show only what changed since another one, and encrypted ones.
fn refuse_parent(text: &str) -> Result<()> {
    if value(text, "parentCID").is_some_and(|parent| !parent.eq_ignore_ascii_case("ffffffff")) {
        return Err(Error::failed(
            "it has a parent image (a backing file), and an image does not choose which files are read",
        )
        .hint("make it whole first: `qemu-img convert -f vmdk -O qcow2 IMAGE WHOLE`"));
    }
    if value(text, "encryption.keySafe").is_some() {
        return Err(Error::failed("it is encrypted").hint("decrypt it first, with the product that made it"));
    }
    Ok(())
}

/// Returns the extents of a descriptor.
pub(super) fn parse(text: &str) -> Result<Vec<Extent<'_>>> {
    let mut extents = Vec::new();
    for line in text.lines().map(str::trim) {
        let access = line.split_whitespace().next().unwrap_or_default();
        if ["RW", "RDONLY", "NOACCESS"].contains(&access) {
            extents.push(parse_extent(line)?);
        }
        if extents.len() > EXTENTS_MAX {
            return Err(Error::failed(format!("it has more than {EXTENTS_MAX} extents")));
        }
    }
    if extents.is_empty() {
        return Err(Error::corrupt("its descriptor names no extents"));
    }
    Ok(extents)
}

/// Parses `RW 4192256 SPARSE "disk-s001.vmdk"` and `RW 4192256 FLAT "disk-flat.vmdk" 0`.
fn parse_extent(line: &str) -> Result<Extent<'_>> {
    let bad = || Error::corrupt(format!("its descriptor has a line that is not understood: {line:?}"));
    let mut quoted = line.splitn(3, '"');
    let mut words = quoted.next().ok_or_else(bad)?.split_whitespace();
    let (access, sectors, kind) = (words.next(), words.next(), words.next());
    let sectors = sectors.and_then(|text| text.parse().ok()).ok_or_else(bad)?;
    let flat = match kind {
        Some("FLAT" | "VMFS") => true,
        Some("SPARSE" | "VMFSSPARSE") => false,
        Some(other) => {
            return Err(Error::unsupported(format!("it has an extent of type {other:?}, which is not read")));
        }
        None => return Err(bad()),
    };
    if access == Some("NOACCESS") {
        return Err(Error::unsupported("it has an extent that may not be read"));
    }
    let name = quoted.next().ok_or_else(bad)?;
    let rest = quoted.next().ok_or_else(bad)?.trim();
    let offset = if rest.is_empty() { 0 } else { rest.parse().map_err(|_| bad())? };
    Ok(Extent { sectors, flat, name, offset })
}

/// Tells whether a file name is one that the image `STEM.vmdk` has its extents in.
pub(super) fn belongs(stem: &str, name: &str) -> bool {
    let Some(part) = name.strip_prefix(stem).and_then(|rest| rest.strip_prefix('-')?.strip_suffix(".vmdk")) else {
        return false;
    };
    let numbered = part.strip_prefix(['s', 'f']).is_some_and(|n| n.len() >= 3 && n.bytes().all(|b| b.is_ascii_digit()));
    !stem.is_empty() && (part == "flat" || numbered)
}
