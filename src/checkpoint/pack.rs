//! Packing: what another program saved of a machine, a flat file of its memory and a file of its state, becomes a checkpoint.
//!
//! ```text
//! open both files -> NAME.ckpt.new -> page blocks, by several threads -> both are as they were -> hold the snapshots -> commit
//! ```
//!
//! # Rules
//! 1. The memory becomes one region that begins at 0: a page block has the address that it had in the file. Where a guest sees it is
//!    known to whoever made the file and to nobody else.
//! 2. Holes are not read, and page blocks of zeros take no room, whether they were holes or written.
//! 3. The state of the devices is kept byte for byte, and is never looked into.
//! 4. With a parent, a page block that is the same there is not stored again. Both are read and compared: no checksum decides.
//! 5. The snapshots are held before there is a checkpoint, and let go of if there is none in the end. They are never removed: whoever
//!    named them took them. So until it is there they are held by another tag than those that were taken for a checkpoint.
//!
//! # After a crash
//! The old file or the new one, as [`super::Writer`] says. A hold without a checkpoint goes at the next opening of the pool.

use std::collections::VecDeque;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::flat::Flat;
use super::folder::{Access, Folder, Name};
use super::geometry::{Geometry, PAGE, PageBlock, Region, Sizes, StorageBlock};
use super::header::{DISKS_MAX, DiskSnapshot, STATE_MAX};
use super::list::{self, Checkpoint};
use super::place::{Place, Stored, is_zero};
use super::reader::{Found, Reader};
use super::remove::{hold, hold_packing, let_go_packing};
use super::staging::{Pushed, Staging};
use super::writer::{Cut, Plan, Writer};
use crate::error::{Error, Kind, Result};
use crate::progress::Progress;
use crate::store::{SnapshotState, Store};
use crate::sync::Mutex;
use crate::sys::pages::Pages;

/// Who made the state of the devices of what is packed, as far as this program knows.
pub const ANOTHER_PROGRAM: &str = "another program";
/// Page blocks that a thread takes at a time: what lies together stays together.
const PIECE: u64 = 64;
/// Threads at most.
const THREADS_MAX: usize = 8;
/// Storage blocks of a parent that a thread keeps: page blocks that lie beside each other are in few of them.
const KEPT_MAX: usize = 8;

/// What is to be packed.
#[derive(Debug, Clone)]
pub struct Packing<'a> {
    /// Name of the checkpoint; there must be none of it.
    pub name: Name,
    /// The file of the memory.
    pub memory: &'a Path,
    /// The file of the state of the devices.
    pub state: &'a Path,
    /// Disks and their snapshots that were taken at the same instant, in the order in which the machine has them.
    pub disks: Vec<(String, String)>,
    /// A checkpoint of which only what differs is stored.
    pub parent: Option<Name>,
}

/// Packs a memory and a state.
///
/// # Errors
/// `Exists`; `NotFound` for a file, a snapshot or the parent; `Usage` for a memory that is not of whole pages, or a state that is too
/// large; `Failed` when a file changes while it is read; `Cancelled`; any error of the host. There is no checkpoint then.
pub fn pack(store: &Arc<Store>, packing: &Packing<'_>, progress: &dyn Progress) -> Result<Checkpoint> {
    let Packing { name, memory, state, disks, parent } = packing;
    store.ledger.writable()?;
    let disks = find(store, disks)?;
    let (memory, state) = (Flat::open(memory, "the memory file")?, Flat::open(state, "the state file")?);
    if state.len() > STATE_MAX {
        return Err(Error::usage(format!("{} has {} bytes, and {STATE_MAX} are possible", state.what(), state.len())));
    }
    let state = state.read_all()?;
    let folder = Folder::of_pool(store.media());
    let parent = parent.as_ref().map(|parent| open_parent(&folder, parent)).transpose()?;
    let sizes = parent.as_ref().map_or(Sizes::USUAL, |(_, reader)| reader.geometry().sizes());
    let plan = Plan {
        parent: parent.as_ref().map(|(name, _)| name.clone()),
        ..Plan::new(name.clone(), ANOTHER_PROGRAM, geometry(&memory, sizes)?)
    };
    let writer = Writer::create(&folder, plan)?;
    let work = Work {
        memory: &memory,
        writer: &writer,
        parent: parent.as_ref().map(|(_, reader)| reader),
        progress,
        next: AtomicU64::new(0),
        over: AtomicBool::new(false),
    };
    work.run_all()?;
    memory.require_same()?;
    let held = Held { store, folder: &folder, name, over: false };
    hold_packing(store, name, &disks)?;
    writer.commit(&Cut { created: memory.written(), disks: disks.clone(), state_version: 0, state: &state })?;
    // It is there, whatever comes now: until the next opening the other tag does as well.
    if let Err(error) = hold(store, name, &disks).and_then(|()| held.end()) {
        tracing::warn!("the snapshots of the checkpoint {name} get its own tag when the pool is opened next: {error}");
    }
    list::info(&folder, name)
}

/// Finds the snapshots of the disks, which must have their data.
fn find(store: &Arc<Store>, names: &[(String, String)]) -> Result<Vec<DiskSnapshot>> {
    if names.len() > DISKS_MAX {
        return Err(Error::usage(format!("a checkpoint has at most {DISKS_MAX} disks, and not {}", names.len())));
    }
    let mut disks: Vec<DiskSnapshot> = Vec::new();
    for (disk, snapshot) in names {
        let of = store.disk_info(disk)?;
        let info = store.snapshot_info(disk, snapshot)?;
        if info.state != SnapshotState::Live {
            return Err(Error::failed(format!("the snapshot {disk}@{snapshot} is retired: its data is gone"))
                .hint("a checkpoint needs snapshots that have their data"));
        }
        if disks.iter().any(|known| known.disk == of.uuid) {
            return Err(Error::usage(format!("the disk '{disk}' is named twice"))
                .hint("one instant has one snapshot of a disk"));
        }
        let (disk_name, snapshot_name) = (disk.clone(), snapshot.clone());
        disks.push(DiskSnapshot { disk: of.uuid, disk_name, snapshot: info.uuid, snapshot_name });
    }
    Ok(disks)
}

fn open_parent(folder: &Folder, name: &Name) -> Result<(Name, Reader)> {
    Ok((name.clone(), Reader::open(folder, name, Access::Cached)?))
}

/// Cuts up the memory of a file.
fn geometry(memory: &Flat, sizes: Sizes) -> Result<Geometry> {
    let length = memory.len();
    if length == 0 || !length.is_multiple_of(u64::from(PAGE)) {
        return Err(Error::usage(format!("{} has {length} bytes, which is no memory", memory.what()))
            .hint(format!("a memory has whole pages of {PAGE} bytes; was the file written to the end?")));
    }
    Geometry::new(sizes, &[Region { address: 0, length }])
}

/// Snapshots that are let go of unless there is a checkpoint, also when something panics.
struct Held<'a> {
    store: &'a Arc<Store>,
    folder: &'a Folder,
    name: &'a Name,
    over: bool,
}

impl Held<'_> {
    /// Ends it when the checkpoint is there and holds them itself.
    fn end(mut self) -> Result<()> {
        self.over = true;
        let_go_packing(self.store, self.name)
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        // Not if the file has its name all the same: a hold too many is mended at the next opening, and one too few never is.
        if !self.over
            && let Err(error) = self.folder.exists(self.name).and_then(|there| match there {
                true => Ok(()),
                false => let_go_packing(self.store, self.name),
            })
        {
            tracing::warn!("snapshots stay held for {}, which is not there, until the pool opens: {error}", self.name);
        }
    }
}

/// What the threads share.
struct Work<'a> {
    memory: &'a Flat,
    writer: &'a Writer,
    parent: Option<&'a Reader>,
    progress: &'a dyn Progress,
    /// The first page block that nobody has taken.
    next: AtomicU64,
    /// One of them has failed.
    over: AtomicBool,
}

impl Work<'_> {
    fn run_all(&self) -> Result<()> {
        let geometry = &self.writer.plan().geometry;
        self.memory.will_be_read_in_order();
        self.progress.total(geometry.memory());
        let pieces = usize::try_from(geometry.page_blocks().div_ceil(PIECE)).unwrap_or(usize::MAX);
        let threads = std::thread::available_parallelism().map_or(1, usize::from).min(THREADS_MAX).min(pieces);
        let error = Mutex::new(None);
        let run = || {
            if let Err(failed) = Thread::new(self).and_then(|mut thread| thread.run()) {
                self.over.store(true, Ordering::Relaxed);
                error.lock().get_or_insert(failed);
            }
        };
        std::thread::scope(|scope| {
            for _ in 1..threads {
                scope.spawn(run);
            }
            run();
        });
        error.into_inner().map_or(Ok(()), Err)
    }
}

/// A storage block of a layer of the parent.
type Key = (usize, StorageBlock);

/// What each thread has to itself.
struct Thread<'a> {
    work: &'a Work<'a>,
    geometry: &'a Geometry,
    staging: Staging,
    plain: Pages,
    /// The same page block of the parent.
    other: Pages,
    kept: VecDeque<(Key, Pages)>,
    /// The data that was found last.
    data: Option<(u64, u64)>,
}

impl<'a> Thread<'a> {
    fn new(work: &'a Work<'a>) -> Result<Self> {
        let geometry = &work.writer.plan().geometry;
        let pages = || Pages::new(geometry.page_block()).map_err(no_memory);
        let staging = Staging::new(geometry).map_err(no_memory)?;
        let (plain, other) = (pages()?, pages()?);
        Ok(Self { work, geometry, staging, plain, other, kept: VecDeque::new(), data: Some((0, 0)) })
    }

    fn run(&mut self) -> Result<()> {
        loop {
            let first = self.work.next.fetch_add(PIECE, Ordering::Relaxed);
            if first >= self.geometry.page_blocks() || self.work.over.load(Ordering::Relaxed) {
                break;
            }
            if self.work.progress.cancelled() {
                return Err(Error::new(Kind::Cancelled, "the save was cancelled; there is no checkpoint"));
            }
            for number in first..(first + PIECE).min(self.geometry.page_blocks()) {
                let length = self.take(PageBlock(number))?;
                self.work.progress.advance(length);
            }
        }
        while !self.staging.is_empty() {
            self.work.writer.write(&mut self.staging, false)?;
        }
        Ok(())
    }

    /// Enters a page block, and returns its length.
    fn take(&mut self, number: PageBlock) -> Result<u64> {
        let span = self.geometry.span(number).expect("it is one of the memory");
        let (writer, end) = (self.work.writer, span.offset + span.length as u64);
        // A thread goes forward only, so what was found last says all about what lies before its end.
        if self.data.is_some_and(|(_, data)| data <= span.offset) {
            self.data = self.work.memory.next_data(span.offset)?;
        }
        if self.data.is_none_or(|(start, _)| start >= end) {
            writer.set(number, Place::Zero)?;
            return Ok(span.length as u64);
        }
        self.work.memory.read(&mut self.plain[..span.length], span.offset)?;
        if is_zero(&self.plain[..span.length]) {
            writer.set(number, Place::Zero)?;
        } else if self.is_as_in_parent(number, span.length)? {
            writer.set(number, Place::Parent)?;
        } else if self.staging.push(number, &self.plain[..span.length]) == Pushed::Full {
            writer.write(&mut self.staging, false)?;
        }
        Ok(span.length as u64)
    }

    fn is_as_in_parent(&mut self, number: PageBlock, length: usize) -> Result<bool> {
        let Some(parent) = self.work.parent else { return Ok(false) };
        let Found::Stored { layer, stored } = parent.place(number)? else { return Ok(false) };
        self.expand(parent, number, layer, &stored, length)?;
        Ok(self.other[..length] == self.plain[..length])
    }

    fn expand(
        &mut self,
        parent: &Reader,
        number: PageBlock,
        layer: usize,
        stored: &Stored,
        length: usize,
    ) -> Result<()> {
        let key = (layer, stored.block);
        let at = match self.kept.iter().position(|(of, _)| *of == key) {
            Some(at) => at,
            None => {
                let size = parent.layers()[layer].geometry().storage_block();
                let oldest = if self.kept.len() < KEPT_MAX { None } else { self.kept.pop_front() };
                let mut bytes = match oldest.filter(|(_, bytes)| bytes.len() == size) {
                    Some((_, bytes)) => bytes,
                    None => Pages::new(size).map_err(no_memory)?,
                };
                parent.read_block(layer, stored.block, &mut bytes)?;
                self.kept.push_back((key, bytes));
                self.kept.len() - 1
            }
        };
        parent.expand(number, layer, stored, &self.kept[at].1, &mut self.other[..length])
    }
}

fn no_memory(error: std::io::Error) -> Error {
    Error::io("cannot take memory for page blocks", error)
}
