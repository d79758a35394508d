//! Restoring all memory before the machine runs: storage block by storage block, in order, by several threads.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::check;
use crate::checkpoint::{PageBlock, Reader, StorageBlock, Stored};
use crate::error::{Error, Kind, Result};
use crate::memory::watch::{Core, Watch};
use crate::progress::Progress;
use crate::sync::Mutex;
use crate::sys::pages::Pages;

/// Brings all memory, which is empty, by so many threads. Nobody may touch it before this returns.
///
/// # Errors
/// As [`super::Restorer::begin`], the first part that cannot be had, and `Cancelled` when `progress` says so.
pub fn restore_all(watch: &Watch, reader: &Reader, workers: usize, progress: &dyn Progress) -> Result<()> {
    let core = watch.core();
    check(core, reader)?;
    let blocks: Vec<u64> = reader.layers().iter().map(|layer| u64::from(layer.footer().blocks)).collect();
    progress.total(blocks.iter().sum());
    let work = Work { core, reader, progress, blocks, next: AtomicU64::new(0), over: AtomicBool::new(false) };
    let error = Mutex::new(None);
    std::thread::scope(|scope| {
        for _ in 0..workers.max(1) {
            scope.spawn(|| {
                if let Err(failed) = work.run() {
                    work.over.store(true, Ordering::Relaxed);
                    error.lock().get_or_insert(failed);
                }
            });
        }
    });
    error.into_inner().map_or(Ok(()), Err)
}

struct Work<'a> {
    core: &'a Core,
    reader: &'a Reader,
    progress: &'a dyn Progress,
    /// Storage blocks of each layer.
    blocks: Vec<u64>,
    next: AtomicU64,
    over: AtomicBool,
}

impl Work<'_> {
    fn run(&self) -> Result<()> {
        let host = |error| Error::io("there is no memory to read a checkpoint into", error);
        let largest = self.reader.layers().iter().map(|layer| layer.geometry().storage_block()).max();
        let mut bytes = Pages::new(largest.expect("a checkpoint is at least one file")).map_err(host)?;
        let mut plain = Pages::new(self.core.geometry.page_block()).map_err(host)?;
        let mut found: Vec<(PageBlock, Stored)> = Vec::new();
        while let Some((layer, block)) = self.turn() {
            if self.progress.cancelled() {
                return Err(Error::new(Kind::Cancelled, "the restore was given up"));
            }
            found.clear();
            self.reader.contents(layer, block, |number, stored| {
                found.push((number, stored));
                Ok(())
            })?;
            if !found.is_empty() {
                let bytes = &mut bytes[..self.reader.layers()[layer].geometry().storage_block()];
                self.reader.read_block(layer, block, bytes)?;
                found.iter().try_for_each(|(number, stored)| self.bring(*number, layer, stored, bytes, &mut plain))?;
            }
            self.progress.advance(1);
        }
        Ok(())
    }

    fn bring(&self, number: PageBlock, layer: usize, stored: &Stored, bytes: &[u8], plain: &mut [u8]) -> Result<()> {
        let span = self.core.span(number);
        let plain = &mut plain[..span.length];
        self.reader.expand(number, layer, stored, bytes, plain)?;
        let written = self.core.regions[span.region].write(plain, span.offset);
        written.map_err(|error| Error::io("the host has no memory for the guest", error))
    }

    fn turn(&self) -> Option<(usize, StorageBlock)> {
        if self.over.load(Ordering::Relaxed) {
            return None;
        }
        let mut turn = self.next.fetch_add(1, Ordering::Relaxed);
        for (layer, blocks) in self.blocks.iter().enumerate() {
            if turn < *blocks {
                return Some((
                    layer,
                    StorageBlock(u32::try_from(turn).expect("a file has at most 2^32 storage blocks")),
                ));
            }
            turn -= blocks;
        }
        None
    }
}
