//! Reads everything that a checkpoint is, and names all that is damaged.
//!
//! # Rules
//! 1. What could be used in a restore is read and expanded here: index, contents, every page block, the state of the devices, of the
//!    checkpoint and of all it is based on.
//! 2. One fault does not hide the next: it goes on where it can. Only a chain that cannot be opened ends it.

use serde::{Deserialize, Serialize};

use super::folder::{Access, Folder, Name};
use super::geometry::{PageBlock, StorageBlock};
use super::layer::Layer;
use super::place::{Place, Stored};
use super::reader::Reader;
use crate::error::{Error, Kind, Result};
use crate::progress::Progress;
use crate::sys::pages::Pages;

/// Faults that are listed at most.
pub const FAULTS_MAX: usize = 1000;

/// What a verification found.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct VerifyReport {
    /// `MACHINE@NAME`.
    pub checkpoint: String,
    /// Files that were read: it, and all it is based on.
    pub files: u64,
    /// Page blocks whose bytes were read.
    pub stored_blocks: u64,
    /// Bytes of storage blocks that were read.
    pub bytes: u64,
    /// What is damaged, at most a thousand of it.
    pub faults: Vec<Fault>,
    /// How much more is damaged.
    pub more: u64,
}

/// Something that is damaged.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fault {
    /// The file it is in.
    pub file: String,
    /// The page block; `null` when it is another part of the file.
    pub page_block: Option<u64>,
    /// Address of the page block in the memory of the guest.
    pub address: Option<u64>,
    /// The storage block.
    pub storage_block: Option<u32>,
    /// First byte in the storage block.
    pub offset: Option<u32>,
    /// What is wrong.
    pub why: String,
}

impl Fault {
    /// Says it in one sentence.
    #[must_use]
    pub fn sentence(&self) -> String {
        // Errors of the file say which it is.
        let file = if self.why.starts_with(&self.file) { String::new() } else { format!("{}: ", self.file) };
        let page_block = self.page_block.zip(self.address);
        let what = page_block.map(|(number, address)| format!("page block {number} (guest address {address:#x})"));
        let place = self.storage_block.map(|block| match self.offset {
            Some(offset) => format!("storage block {block} at byte {offset}"),
            None => format!("storage block {block}"),
        });
        let parts: Vec<String> = what.into_iter().chain(place).collect();
        let where_ = if parts.is_empty() { String::new() } else { format!("{}: ", parts.join(" in ")) };
        format!("{file}{where_}{}", self.why)
    }
}

impl VerifyReport {
    /// Tells whether nothing is damaged.
    #[must_use]
    pub fn is_sound(&self) -> bool {
        self.faults.is_empty() && self.more == 0
    }

    fn add(&mut self, fault: Fault) {
        if self.faults.len() < FAULTS_MAX {
            self.faults.push(fault);
        } else {
            self.more += 1;
        }
    }

    /// Notes what is wrong with another part of a file than a page block.
    fn note(&mut self, layer: &Layer, block: Option<StorageBlock>, why: impl std::fmt::Display) {
        let (file, storage_block) = (layer.what().to_owned(), block.map(|block| block.0));
        self.add(Fault { file, page_block: None, address: None, storage_block, offset: None, why: why.to_string() });
    }
}

/// Verifies a checkpoint and all it is based on.
///
/// # Errors
/// `NotFound`; `Corrupt` when a file of the chain cannot be opened at all; `Cancelled`.
pub fn verify(folder: &Folder, name: &Name, progress: &dyn Progress) -> Result<VerifyReport> {
    let reader = Reader::open(folder, name, Access::Direct)?;
    verify_chain(&reader, &name.to_string(), progress)
}

/// Verifies what is open.
///
/// # Errors
/// `Cancelled`; when there is no memory.
pub fn verify_chain(reader: &Reader, name: &str, progress: &dyn Progress) -> Result<VerifyReport> {
    let mut report = VerifyReport { checkpoint: name.to_owned(), ..VerifyReport::default() };
    let blocks = |layer: &Layer| u64::from(layer.footer().blocks) * layer.geometry().storage_block() as u64;
    progress.total(reader.layers().iter().map(blocks).sum());
    for layer in reader.layers() {
        report.files += 1;
        if let Err(error) = layer.state() {
            report.note(layer, None, error);
        }
        if let Err(error) = layer.hot() {
            report.note(layer, None, error);
        }
        check_index(layer, &mut report);
        check_blocks(layer, &mut report, progress)?;
    }
    Ok(report)
}

/// Reads the whole index and compares what it says with the footer.
fn check_index(layer: &Layer, report: &mut VerifyReport) {
    let (geometry, footer) = (layer.geometry(), layer.footer());
    let (mut stored, mut zeros, mut inherited, mut bytes, mut whole) = (0, 0, 0, 0, true);
    for number in (0..geometry.page_blocks()).map(PageBlock) {
        match layer.place(number) {
            Ok(Place::Zero) => zeros += 1,
            Ok(Place::Parent) => inherited += 1,
            Ok(Place::Stored(place)) => (stored, bytes) = (stored + 1, bytes + u64::from(place.length)),
            Err(error) => {
                whole = false;
                let (file, address) = (layer.what().to_owned(), geometry.span(number).map(|span| span.address));
                let page_block = Some(number.0);
                report.add(Fault {
                    file,
                    page_block,
                    address,
                    storage_block: None,
                    offset: None,
                    why: error.to_string(),
                });
            }
        }
    }
    let told = (footer.stored, footer.zeros, footer.inherited, footer.bytes);
    if whole && (stored, zeros, inherited, bytes) != told {
        report.note(layer, None, "its index and its footer do not agree on how much is stored");
    }
}

/// Reads all storage blocks and expands all that is in them.
fn check_blocks(layer: &Layer, report: &mut VerifyReport, progress: &dyn Progress) -> Result<()> {
    let geometry = layer.geometry();
    let memory = |len: usize| Pages::new(len).map_err(|e| Error::io("cannot take memory for a storage block", e));
    let (mut block, mut out) = (memory(geometry.storage_block())?, memory(geometry.page_block())?);
    let mut seen = 0;
    for number in (0..layer.footer().blocks).map(StorageBlock) {
        if progress.cancelled() {
            return Err(Error::new(Kind::Cancelled, "the verification was cancelled"));
        }
        progress.advance(block.len() as u64);
        report.bytes += block.len() as u64;
        if let Err(error) = layer.read_block(number, &mut block) {
            report.note(layer, Some(number), error);
            continue;
        }
        let mut end = Some(0);
        let walked = layer.contents(number, |page_block| {
            seen += 1;
            match check_page_block(layer, page_block, number, &mut end, &block, &mut out) {
                Ok(()) => report.stored_blocks += 1,
                Err((offset, why)) => report.add(Fault {
                    file: layer.what().to_owned(),
                    page_block: Some(page_block.0),
                    address: geometry.span(page_block).map(|span| span.address),
                    storage_block: Some(number.0),
                    offset,
                    why,
                }),
            }
            Ok(())
        });
        if let Err(error) = walked {
            report.note(layer, Some(number), error);
        }
    }
    // Each of the contents is in its place, so as many as are stored are all of them.
    if seen != layer.footer().stored && report.faults.is_empty() {
        report.note(layer, None, "its contents do not have all that is stored");
    }
    Ok(())
}

/// Checks one page block that the contents have next; `end` is where the one before it ends, if that is known.
fn check_page_block(
    layer: &Layer,
    number: PageBlock,
    block: StorageBlock,
    end: &mut Option<u32>,
    bytes: &[u8],
    out: &mut [u8],
) -> Result<(), (Option<u32>, String)> {
    let begin = end.take();
    let stored = match layer.place(number) {
        Ok(Place::Stored(stored)) if stored.block == block && begin.is_none_or(|begin| begin == stored.offset) => {
            stored
        }
        Ok(_) => return Err((None, "the index has it in another place than the contents".to_owned())),
        Err(error) => return Err((None, error.to_string())),
    };
    let Stored { offset, length, .. } = stored;
    *end = Some(offset + length);
    let plain = layer.geometry().length(number).expect("contents are checked");
    let bytes = &bytes[offset as usize..(offset + length) as usize];
    stored.expand(bytes, &mut out[..plain]).map_err(|why| (Some(offset), why))
}
