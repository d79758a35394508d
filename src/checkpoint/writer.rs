//! Writing a checkpoint: storage blocks as they come, from several threads, and everything else at the end.
//!
//! ```text
//! create    NAME.ckpt.new, new and locked
//! set       a page block is zeros, or as in the parent: a cell in memory
//! write     one storage block: one pwrite at a place of its own, then its cells in memory
//! commit    index, contents, state, footer, header; sync; rename; sync of the folder
//! drop      without a commit: NAME.ckpt.new is removed
//! ```
//!
//! # Rules
//! 1. Every page block is entered exactly once, or there is no commit. A page block that is forgotten, or saved twice, is an error
//!    and never a checkpoint.
//! 2. After a write that failed there is no commit: what could not be written is nowhere else.
//! 3. No lock is held while anything is written, so threads write side by side; each has its own [`Staging`].
//! 4. Memory is taken at the beginning: 32 bytes for each page block, of which the host gives what is used.
//!
//! System calls: `write` makes pwrite64 only; `create` and `commit` those of opening, fdatasync, rename and fsync.
//!
//! # After a crash
//! See the format: the old file, the new one, or none, as it was; and perhaps a `NAME.ckpt.new` for [`Folder::sweep`].

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use uuid::Uuid;

use super::folder::{Access, Folder, LOOK_TIME, Name};
use super::geometry::{Geometry, PAGE, PageBlock, StorageBlock};
use super::header::{DISKS_MAX, DiskSnapshot, Footer, Header, Layout, Parent, STATE_MAX, block_at, crc_of, state_crc};
use super::place::{CELL, Place};
use super::reader::{CHAIN_MAX, Reader};
use super::staging::Staging;
use super::table;
use crate::clock;
use crate::error::{Error, Result};
use crate::media::{File, Open};
use crate::sync::Mutex;
use crate::sys::pages::Pages;
use crate::units::to_usize;

/// What is known of a checkpoint before it is saved.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Its name.
    pub name: Name,
    /// Identity of the state that is saved.
    pub uuid: Uuid,
    /// Who makes the state of the devices, such as `afterimage`.
    pub maker: String,
    /// What it is based on, which must be of the same memory.
    pub parent: Option<Name>,
    /// The memory.
    pub geometry: Geometry,
    /// Replaces a checkpoint of that name; otherwise there must be none.
    pub replace: bool,
    /// Writes past the page cache, where the host can do that.
    pub direct: bool,
}

impl Plan {
    /// A new checkpoint with all of the memory in it.
    #[must_use]
    pub fn new(name: Name, maker: &str, geometry: Geometry) -> Self {
        let (uuid, maker) = (Uuid::new_v4(), maker.to_owned());
        Self { name, uuid, maker, parent: None, geometry, replace: false, direct: true }
    }
}

/// What is known of a checkpoint when everything was saved.
#[derive(Debug, Clone)]
pub struct Cut<'a> {
    /// Seconds since 1970 at the instant that is saved.
    pub created: u64,
    /// The snapshots of the disks, in the order in which the machine has them.
    pub disks: Vec<DiskSnapshot>,
    /// Version of the state of the devices, in terms of its maker.
    pub state_version: u32,
    /// The state of the devices.
    pub state: &'a [u8],
}

/// What was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Written {
    /// Storage blocks: so many writes of data.
    pub blocks: u32,
    /// Of them, hot ones.
    pub hot: u32,
    /// Page blocks that are stored.
    pub stored: u64,
    /// Page blocks that are zeros.
    pub zeros: u64,
    /// Page blocks that are as in the parent.
    pub inherited: u64,
    /// Bytes that are stored.
    pub bytes: u64,
}

/// What will be index and contents.
#[derive(Debug)]
struct Cells {
    /// Of each page block; zeros as long as nobody has entered it.
    index: Pages,
    /// Page blocks in the order in which their storage blocks were entered.
    numbers: Vec<u32>,
    /// For each storage block the first of its page blocks in `numbers`, and how many it has.
    blocks: Vec<(u32, u32)>,
    hot: Vec<u32>,
    sum: Written,
}

/// A checkpoint that is being saved.
#[derive(Debug)]
pub struct Writer {
    folder: Folder,
    plan: Plan,
    file: Arc<dyn File>,
    /// What it is based on. While this is open nobody can remove it.
    parent: Option<Reader>,
    next: AtomicU32,
    cells: Mutex<Cells>,
    failed: AtomicBool,
    /// It has its name.
    done: bool,
}

impl Writer {
    /// Begins a checkpoint.
    ///
    /// # Errors
    /// `Exists` when there is one of that name, `Busy` when somebody saves one of that name, what opening the parent runs into, any
    /// error of the host.
    pub fn create(folder: &Folder, plan: Plan) -> Result<Self> {
        let name = &plan.name;
        let fail = |e| Error::io(format!("cannot make the checkpoint {name}"), e);
        let parent = plan.parent.as_ref().map(|parent| open_parent(folder, &plan, parent)).transpose()?;
        folder.make(name.machine())?;
        let file = create_file(folder, &plan)?;
        let count = to_usize(plan.geometry.page_blocks());
        let index = Pages::new((count * CELL).next_multiple_of(PAGE as usize)).map_err(fail)?;
        let cells = Cells {
            index,
            numbers: Vec::with_capacity(count),
            blocks: Vec::with_capacity(count),
            hot: Vec::with_capacity(count),
            sum: Written::default(),
        };
        Ok(Self {
            folder: folder.clone(),
            plan,
            file,
            parent,
            next: AtomicU32::new(0),
            cells: Mutex::new(cells),
            failed: AtomicBool::new(false),
            done: false,
        })
    }

    /// Returns what it is of.
    #[must_use]
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Returns the identity of what it is based on.
    #[must_use]
    pub fn parent(&self) -> Option<Uuid> {
        self.parent.as_ref().map(|parent| parent.header().uuid)
    }

    /// Returns what was written so far.
    #[must_use]
    pub fn written(&self) -> Written {
        self.cells.lock().sum
    }

    /// Enters a page block that takes no room: one of zeros, or one that is as in the parent.
    ///
    /// # Errors
    /// `Failed` when it was entered before, is none, or there is no parent. There is no commit after that.
    pub fn set(&self, number: PageBlock, place: Place) -> Result<()> {
        let mut cells = self.cells.lock();
        let right = match place {
            Place::Zero => true,
            Place::Parent => self.parent.is_some(),
            Place::Stored(_) => false,
        };
        let entered = right && cells.enter(&self.plan.geometry, number, place);
        drop(cells);
        if entered { Ok(()) } else { Err(self.refuse(number)) }
    }

    /// Writes the storage block of a staging buffer with one pwrite. A `hot` one is listed among those to be read first.
    ///
    /// # Errors
    /// Any error of the host; `Failed` when a page block was entered before. There is no commit after that.
    pub fn write(&self, staging: &mut Staging, hot: bool) -> Result<StorageBlock> {
        assert!(!staging.is_empty(), "an empty storage block is not written");
        let block = StorageBlock(self.next.fetch_add(1, Ordering::Relaxed));
        let at = block_at(block, self.plan.geometry.storage_block() as u64);
        if let Err(error) = self.file.write_at(staging.bytes(), at) {
            self.failed.store(true, Ordering::Relaxed);
            return Err(Error::io(format!("cannot write the checkpoint {}", self.plan.name), error));
        }
        let mut cells = self.cells.lock();
        let mut wrong = None;
        let first = u32::try_from(cells.numbers.len()).expect("there are at most 2^30 page blocks");
        let mut count = 0;
        staging.places(block, |number, stored| {
            if cells.enter(&self.plan.geometry, number, Place::Stored(stored)) {
                cells.numbers.push(u32::try_from(number.0).expect("there are at most 2^30 page blocks"));
                count += 1;
            } else {
                wrong = Some(number);
            }
        });
        // Storage blocks that were begun before this one may be entered later.
        let place = block.0 as usize;
        if cells.blocks.len() <= place {
            cells.blocks.resize(place + 1, (0, 0));
        }
        cells.blocks[place] = (first, count);
        cells.sum.blocks += 1;
        if hot {
            cells.hot.push(block.0);
            cells.sum.hot += 1;
        }
        drop(cells);
        if let Some(number) = wrong {
            return Err(self.refuse(number));
        }
        staging.written();
        Ok(block)
    }

    fn refuse(&self, number: PageBlock) -> Error {
        self.failed.store(true, Ordering::Relaxed);
        Error::failed(format!(
            "the checkpoint {} would be wrong: its page block {number} was saved twice, or is none",
            self.plan.name
        ))
    }

    /// Makes the checkpoint whole and durable, and gives it its name.
    ///
    /// # Errors
    /// `Failed` when a page block was not entered or something had failed before; `Usage` for names or a state that are too large;
    /// any error of the host. There is no new checkpoint then.
    pub fn commit(mut self, cut: &Cut<'_>) -> Result<Header> {
        let name = self.plan.name.clone();
        let header = self.header(cut)?;
        let bytes = header.encode()?;
        let fail = |e| Error::io(format!("cannot write the checkpoint {name}"), e);
        self.require_whole()?;
        self.write_rest(cut, &bytes)?;
        self.file.sync().map_err(fail)?;
        let media = self.folder.media();
        let (from, to) = (self.folder.unfinished(&name), self.folder.whole(&name));
        media.rename(&from, &to).map_err(fail)?;
        self.done = true;
        if let Err(error) = media.sync_dir(&self.folder.of_machine(name.machine())) {
            // Nobody may find what was said to have failed. What it replaced is gone, though: then it stays.
            if !self.plan.replace {
                media.remove(&to).map_err(fail)?;
            }
            return Err(fail(error));
        }
        Ok(header)
    }

    fn header(&self, cut: &Cut<'_>) -> Result<Header> {
        if cut.disks.len() > DISKS_MAX || cut.state.len() as u64 > STATE_MAX {
            return Err(Error::usage(format!(
                "a checkpoint takes at most {DISKS_MAX} disks and {STATE_MAX} bytes of state of the devices"
            )));
        }
        let Plan { name, uuid, maker, parent, geometry, .. } = &self.plan;
        let parent = parent.as_ref().zip(self.parent.as_ref()).map(|(name, open)| Parent {
            uuid: open.header().uuid,
            machine: name.machine().to_owned(),
            name: name.name().to_owned(),
        });
        Ok(Header {
            uuid: *uuid,
            machine: name.machine().to_owned(),
            name: name.name().to_owned(),
            maker: maker.clone(),
            created: cut.created,
            parent,
            geometry: geometry.clone(),
            disks: cut.disks.clone(),
        })
    }

    /// Refuses a commit when something is missing.
    fn require_whole(&self) -> Result<()> {
        let sum = self.written();
        let (entered, all) = (sum.stored + sum.zeros + sum.inherited, self.plan.geometry.page_blocks());
        if self.failed.load(Ordering::Relaxed) {
            return Err(Error::failed(format!("the checkpoint {} is not whole: a part of it failed", self.plan.name)));
        }
        if entered != all || sum.blocks != self.next.load(Ordering::Relaxed) {
            return Err(Error::failed(format!(
                "the checkpoint {} is not whole: {entered} of {all} page blocks were saved",
                self.plan.name
            )));
        }
        Ok(())
    }

    /// Writes everything but the storage blocks.
    fn write_rest(&self, cut: &Cut<'_>, header: &[u8]) -> Result<()> {
        let Plan { geometry, name, .. } = &self.plan;
        let fail = |e| Error::io(format!("cannot write the checkpoint {name}"), e);
        let cells = self.cells.lock();
        let Written { blocks, hot, stored, zeros, inherited, bytes } = cells.sum;
        let footer = Footer {
            uuid: self.plan.uuid,
            header: crc_of(header),
            blocks,
            stored,
            zeros,
            inherited,
            bytes,
            hot,
            state_version: cut.state_version,
            state_length: cut.state.len() as u64,
            state_crc: state_crc(cut.state),
        };
        let layout = Layout::of(geometry, &footer);
        let mut page = Pages::new(geometry.sizes().table_page as usize).map_err(fail)?;
        let file = &*self.file;
        let index = |first: u64, out: &mut [u8]| {
            let from = to_usize(first) * CELL;
            out.copy_from_slice(&cells.index[from..from + out.len()]);
        };
        table::write(file, table::INDEX, layout.index, geometry.page_blocks(), &mut page, index).map_err(fail)?;
        let mut all = cells.contents();
        let contents = |_: u64, out: &mut [u8]| {
            for cell in out.chunks_exact_mut(table::CONTENTS.cell) {
                cell.copy_from_slice(&all.next().expect("so many cells as were counted").to_le_bytes());
            }
        };
        table::write(file, table::CONTENTS, layout.contents, footer.cells(), &mut page, contents).map_err(fail)?;
        write_padded(file, cut.state, layout.state).map_err(fail)?;
        write_padded(file, header, 0).map_err(fail)?;
        file.write_at(&footer.encode(geometry), layout.footer).map_err(fail)
    }
}

/// Makes the file, which is new and locked, and whose name nobody else has.
fn create_file(folder: &Folder, plan: &Plan) -> Result<Arc<dyn File>> {
    let name = &plan.name;
    let fail = |e| Error::io(format!("cannot make the checkpoint {name}"), e);
    let path = folder.unfinished(name);
    let open = || match plan.direct {
        true => folder.media().open_direct(&path, Open::New),
        false => folder.media().open(&path, Open::New),
    };
    let begun = clock::now();
    loop {
        folder.remove_leftover(name)?;
        match folder.take(&path, open, |file| file.try_lock()) {
            // Only now: one that was being saved may just have got its name.
            Ok(Some(file)) if plan.replace || !folder.exists(name)? => {
                // Durably: whose snapshots are found later is known by it.
                folder.media().sync_dir(&folder.of_machine(name.machine())).map_err(fail)?;
                return Ok(file);
            }
            Ok(Some(_file)) => {
                folder.remove_file(&path)?;
                return Err(Error::exists(format!("there is a checkpoint {name} already"))
                    .hint("choose another name, or remove it with 'afterimage checkpoint rm'"));
            }
            // Somebody looks whether it is being saved, or takes it for a leftover, and is not long about it.
            Ok(None) => {}
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {}
            Err(e) => return Err(fail(e)),
        }
        if begun.elapsed() >= LOOK_TIME {
            return Err(Error::busy(format!("a checkpoint {name} is being saved already")));
        }
        clock::sleep(LOOK_TIME / 10);
    }
}

/// Opens what a checkpoint is to be based on, with all that is based on.
fn open_parent(folder: &Folder, plan: &Plan, parent: &Name) -> Result<Reader> {
    let reader = Reader::open(folder, parent, Access::Cached)?;
    let why = if reader.layers().len() >= CHAIN_MAX {
        format!("that is based on {} others already, the most there can be", CHAIN_MAX - 1)
    } else if !plan.geometry.fits(reader.geometry()) {
        "that is of other memory".to_owned()
    } else {
        return Ok(reader);
    };
    Err(Error::failed(format!("{} cannot be based on the checkpoint {parent}: {why}", plan.name))
        .hint("save it whole, or flatten the other one first with 'afterimage checkpoint flatten'"))
}

impl Drop for Writer {
    fn drop(&mut self) {
        if self.done {
            return;
        }
        let path = self.folder.unfinished(&self.plan.name);
        if let Err(error) = self.folder.remove_file(&path) {
            // The next opening of the pool removes it.
            tracing::debug!("{error}");
        }
    }
}

impl Cells {
    /// Enters a page block; false when it is there, or beyond the last one.
    fn enter(&mut self, geometry: &Geometry, number: PageBlock, place: Place) -> bool {
        if number.0 >= geometry.page_blocks() {
            return false;
        }
        let at = to_usize(number.0) * CELL;
        let cell = &mut self.index[at..at + CELL];
        if *cell != [0; CELL] {
            return false;
        }
        cell.copy_from_slice(&place.encode());
        match place {
            Place::Zero => self.sum.zeros += 1,
            Place::Parent => self.sum.inherited += 1,
            Place::Stored(stored) => {
                self.sum.stored += 1;
                self.sum.bytes += u64::from(stored.length);
            }
        }
        true
    }

    /// Returns the cells of the contents, in order.
    fn contents(&self) -> impl Iterator<Item = u32> {
        let starts = self.blocks.iter().scan(0, |next, (_, count)| {
            let start = *next;
            *next += count;
            Some(start)
        });
        let end = u32::try_from(self.numbers.len()).expect("there are at most 2^30 page blocks");
        let of_block = |(first, count): &(u32, u32)| &self.numbers[*first as usize..(*first + *count) as usize];
        let numbers = self.blocks.iter().flat_map(of_block);
        starts.chain([end]).chain(numbers.copied()).chain(self.hot.iter().copied())
    }
}

/// Writes bytes with zeros up to a multiple of [`PAGE`] behind them.
fn write_padded(file: &dyn File, bytes: &[u8], offset: u64) -> std::io::Result<()> {
    if bytes.is_empty() {
        return Ok(());
    }
    let mut padded = Pages::new(bytes.len().next_multiple_of(PAGE as usize))?;
    padded[..bytes.len()].copy_from_slice(bytes);
    file.write_at(&padded, offset)
}
