//! Makes one file of a chain: a checkpoint that needs no parent any more.
//!
//! # Rules
//! 1. The bytes of page blocks are compared with their checksums and copied as they are stored; nothing is expanded.
//! 2. Each storage block of the chain that has something the checkpoint needs is read once, in the order of the files. What
//!    changed together stays together, and what was hot in the checkpoint stays hot.
//! 3. It keeps its identity: those that are based on it see the same memory. It replaces the old file when it is whole.

use super::folder::{Access, Folder, Name};
use super::geometry::{PageBlock, StorageBlock};
use super::layer::Layer;
use super::list::{self, Checkpoint};
use super::place::Place;
use super::reader::Reader;
use super::staging::{Pushed, Staging};
use super::writer::{Cut, Plan, Writer};
use crate::error::{Error, Kind, Result};
use crate::progress::Progress;
use crate::sys::pages::Pages;
use crate::units::to_usize;

/// Flattens a checkpoint. One without a parent is left as it is.
///
/// # Errors
/// `NotFound`; `Corrupt` when something of it is damaged, which stays as it is then; `Busy` when it is being saved or flattened;
/// `Cancelled`; any error of the host.
pub fn flatten(folder: &Folder, name: &Name, progress: &dyn Progress) -> Result<Checkpoint> {
    let reader = Reader::open(folder, name, Access::Direct)?;
    if reader.layers().len() == 1 {
        return list::info(folder, name);
    }
    let header = reader.header();
    let plan =
        Plan { uuid: header.uuid, replace: true, ..Plan::new(name.clone(), &header.maker, header.geometry.clone()) };
    let state = reader.state()?;
    let cut = Cut {
        created: header.created,
        disks: header.disks.clone(),
        state_version: reader.state_version(),
        state: &state,
    };
    let mut merge = Merge::new(&reader, Writer::create(folder, plan)?, progress)?;
    merge.run()?;
    merge.writer.commit(&cut)?;
    list::info(folder, name)
}

/// A set of page blocks.
struct Set {
    words: Vec<u64>,
}

impl Set {
    fn new(count: u64) -> Self {
        Self { words: vec![0; to_usize(count.div_ceil(64))] }
    }

    fn has(&self, number: PageBlock) -> bool {
        self.words[to_usize(number.0 / 64)] & 1 << (number.0 % 64) != 0
    }

    fn add(&mut self, number: PageBlock) {
        self.words[to_usize(number.0 / 64)] |= 1 << (number.0 % 64);
    }
}

struct Merge<'a> {
    reader: &'a Reader,
    writer: Writer,
    progress: &'a dyn Progress,
    /// Page blocks that a newer layer has.
    done: Set,
    staging: Staging,
    block: Pages,
}

impl<'a> Merge<'a> {
    fn new(reader: &'a Reader, writer: Writer, progress: &'a dyn Progress) -> Result<Self> {
        let memory = |e| Error::io("cannot take memory for storage blocks", e);
        let geometry = reader.geometry();
        let staging = Staging::new(geometry).map_err(memory)?;
        let largest = reader.layers().iter().map(|layer| layer.geometry().storage_block()).max();
        let block = Pages::new(largest.expect("a chain has a file")).map_err(memory)?;
        Ok(Self { reader, writer, progress, done: Set::new(geometry.page_blocks()), staging, block })
    }

    fn run(&mut self) -> Result<()> {
        let blocks = |layer: &Layer| u64::from(layer.footer().blocks) * layer.geometry().storage_block() as u64;
        self.progress.total(self.reader.layers().iter().map(blocks).sum());
        for (number, layer) in self.reader.layers().iter().enumerate() {
            let hot = if number == 0 { layer.hot()? } else { Vec::new() };
            for block in &hot {
                self.copy(layer, *block, true)?;
            }
            if number == 0 {
                self.finish(true)?;
            }
            let mut of_hot = hot;
            of_hot.sort_unstable();
            for block in (0..layer.footer().blocks).map(StorageBlock) {
                if of_hot.binary_search(&block).is_err() {
                    self.copy(layer, block, false)?;
                }
            }
            self.pass(layer)?;
        }
        self.finish(false)
    }

    /// Copies what a storage block has that no newer layer has.
    fn copy(&mut self, layer: &Layer, block: StorageBlock, hot: bool) -> Result<()> {
        if self.progress.cancelled() {
            return Err(Error::new(Kind::Cancelled, "flattening was cancelled; the checkpoint is as it was"));
        }
        let size = layer.geometry().storage_block();
        self.progress.advance(size as u64);
        let mut needed = Vec::new();
        layer.contents(block, |number| {
            if !self.done.has(number) {
                needed.push(number);
            }
            Ok(())
        })?;
        if needed.is_empty() {
            return Ok(());
        }
        layer.read_block(block, &mut self.block[..size])?;
        for number in needed {
            let stored = match layer.place(number)? {
                Place::Stored(stored) if stored.block == block => stored,
                _ => return Err(layer.bad(number, None, "the index has it in another place than the contents")),
            };
            let from = stored.offset as usize;
            let bytes = &self.block[from..from + stored.length as usize];
            stored.verify(bytes).map_err(|why| layer.bad(number, Some((block, stored.offset)), &why))?;
            if self.staging.push_stored(number, stored.codec, bytes) == Pushed::Full {
                self.writer.write(&mut self.staging, hot)?;
            }
        }
        Ok(())
    }

    /// Enters the zeros of a layer, and notes all it has, so that older layers are not asked.
    fn pass(&mut self, layer: &Layer) -> Result<()> {
        let (done, writer) = (&mut self.done, &self.writer);
        layer.places(PageBlock(0), layer.geometry().page_blocks(), |number, place| {
            if place == Place::Parent || done.has(number) {
                return Ok(());
            }
            done.add(number);
            if place == Place::Zero { writer.set(number, Place::Zero) } else { Ok(()) }
        })
    }

    /// Writes what waits.
    fn finish(&mut self, hot: bool) -> Result<()> {
        while !self.staging.is_empty() {
            self.writer.write(&mut self.staging, hot)?;
        }
        Ok(())
    }
}
