//! Making, opening and closing a pool.
//!
//! # Order of opening
//! Superblock; catalog; frames after its mark; check that nothing follows them (unless the pool was closed in order); small
//! tables; segments against the directory; what a killed process had acknowledged (`unflushed`). Nothing is written until the first change; then the opening is numbered and
//! the pool counts as not closed in order.
//!
//! # What a killed process left
//! It is in the page cache, and may not be on the disk: what is found in files and directories counts for nothing until it is
//! synced. The catalog (journal frames it has may be overwritten) and the directories in which files are looked for or made are
//! synced at once; the others where something of them comes to count ([`super::seal`]), the segments with the first flush
//! ([`super::commit`]).
//!
//! # A segment file that is missing
//! It is corruption of the disks and snapshots that have blocks in it, and of no others: the pool opens, every disk takes new
//! data, reads of what was in the file fail, and `check` and `ls` name it. Nothing that is done meanwhile makes the loss
//! greater, should the file be put back: no address is handed out twice, so nothing is ever written in its place; what is freed
//! of it is swept after the opening that finds it again; blocks that the journal has for it are kept. Only a pool of which
//! not one file is there stays closed: that is a file system that is not mounted.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use uuid::Uuid;

use super::catalog::Catalog;
use super::journal::{JOURNAL_MIN, Journal};
use super::ledger::Ledger;
use super::listing::is_hidden;
use super::rows::{Key, Meta, Row};
use super::space::{BALLAST_SIZE, make_ballast};
use super::state_file::STATES_DIR;
use super::states::Status;
use super::tables::{Edit, Tables};
use super::{Counters, Store, keeper, space};
use crate::error::{Error, Kind, Result};
use crate::map::Cache;
use crate::media::{Media, Open};
use crate::pool::{CATALOG, DirectIo, JOURNAL, RETIRED_DIR, SEGMENTS_DIR, SUPERBLOCK, Segments, Superblock, probe};
use crate::sync::{Mutex, RwLock};
use crate::units::{SegmentId, show_size};

/// How a pool is made.
#[derive(Debug, Clone, Copy)]
pub struct InitOptions {
    /// Bytes of the journal, preallocated.
    pub journal: u64,
    /// Bytes of the ballast.
    pub ballast: u64,
    /// Whether to try out the host file system first.
    pub probe: bool,
}

impl Default for InitOptions {
    fn default() -> Self {
        Self { journal: 64 << 20, ballast: BALLAST_SIZE, probe: true }
    }
}

/// How a pool is opened.
#[derive(Debug, Clone, Copy)]
pub struct OpenOptions {
    /// Bytes of the map cache.
    pub cache_bytes: u64,
    /// Bytes of the cache of the catalog.
    pub catalog_cache_bytes: u64,
    /// Whether to run the threads in the background.
    pub background: bool,
    /// Bytes kept free on the host; by default the larger of 256 MiB and 1 %.
    pub low_water: Option<u64>,
    /// Bytes of the ballast.
    pub ballast: u64,
    /// Blocks in a segment at which a snapshot goes on in a new one.
    pub segment_blocks: u64,
    /// Branches a look-up goes through at most before they are cut loose.
    pub depth_max: u32,
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self {
            cache_bytes: 512 << 20,
            catalog_cache_bytes: 128 << 20,
            background: true,
            low_water: None,
            ballast: BALLAST_SIZE,
            segment_blocks: (4 << 30) / crate::units::BLOCK_SIZE,
            depth_max: 32,
        }
    }
}

/// Makes durable what a process that was killed may have left in the page cache.
fn sync_what_is_there(media: &dyn Media) -> Result<()> {
    let catalog = media.open(CATALOG, Open::Existing).and_then(|file| file.sync());
    catalog.map_err(|e| Error::io(format!("cannot sync {CATALOG}"), e))?;
    for dir in ["", SEGMENTS_DIR, STATES_DIR, RETIRED_DIR] {
        match media.sync_dir(dir) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                return Err(Error::io(format!("cannot sync '{dir}' of the pool"), e));
            }
            _ => {}
        }
    }
    Ok(())
}

impl Store {
    /// Makes a pool in an empty directory and returns its identity.
    ///
    /// # Errors
    /// `Exists` when there is one; `Failed` when the directory has other things in it; `Unsupported` when the host file
    /// system lacks something; any error of the host.
    pub fn init(media: &Arc<dyn Media>, options: InitOptions) -> Result<Uuid> {
        let names = media.list("").map_err(|e| Error::io("cannot list the directory", e))?;
        if names.iter().any(|name| name == SUPERBLOCK) {
            return Err(Error::exists("there is a pool in this directory already"));
        }
        if let Some(name) = names.iter().find(|name| !LEFTOVERS.contains(&name.as_str())) {
            return Err(Error::failed(format!("the directory is not empty: '{name}' is in it"))
                .hint("make the pool in an empty directory"));
        }
        if options.probe {
            require_room(&**media, &options)?;
            let host = probe(&**media)?;
            host.require()?;
            if host.direct == DirectIo::Missing {
                tracing::warn!(
                    "the host file system has no direct I/O: disks take memory of the host for its page cache, and are slower"
                );
            }
        }
        Self::make_files(media, options).inspect_err(|_| {
            // What was made is taken away again, as far as the host lets us: the error is what counts.
            for name in [SUPERBLOCK, SUPERBLOCK_NEW, crate::pool::BALLAST, CATALOG, JOURNAL] {
                media.remove(name).ok();
            }
        })
    }

    fn make_files(media: &Arc<dyn Media>, options: InitOptions) -> Result<Uuid> {
        let superblock = Superblock::new();
        let journal = fresh(&**media, JOURNAL)?;
        Journal::create(&journal, superblock.uuid, Uuid::new_v4(), options.journal.max(JOURNAL_MIN))?;
        match media.make_dir(SEGMENTS_DIR) {
            Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => {
                return Err(Error::io(format!("cannot make {SEGMENTS_DIR}"), e));
            }
            _ => {}
        }
        let catalog = Catalog::create(fresh(&**media, CATALOG)?, 1 << 20)?;
        let meta = Meta { clean: true, ..Meta::default() }.encode();
        catalog.fold(&mut std::iter::once((Key::meta(), Some(&meta[..]))), super::Mark::START)?;
        catalog.close()?;
        drop(fresh(&**media, crate::pool::BALLAST)?);
        media.remove(crate::pool::BALLAST).map_err(|e| Error::io("cannot make the ballast", e))?;
        make_ballast(&**media, options.ballast).map_err(|e| Error::io("cannot make the ballast", e))?;
        media.sync_dir("").map_err(|e| Error::io("cannot sync the directory", e))?;
        superblock.write(&**media)?;
        Ok(superblock.uuid)
    }

    /// Opens a pool. The caller holds its lock.
    ///
    /// # Errors
    /// `NotFound` when there is none, `Corrupt` when it is damaged, `Unsupported` for a newer format.
    pub fn open(media: Arc<dyn Media>, options: OpenOptions) -> Result<Arc<Self>> {
        Self::open_whole(media, options).map_err(|error| match error.kind() {
            Kind::Corrupt if error.next_step().is_none() => error.hint(
                "copy the pool directory away if you can; then `afterimage check --rebuild` makes the catalog again",
            ),
            _ => error,
        })
    }

    fn open_whole(media: Arc<dyn Media>, options: OpenOptions) -> Result<Arc<Self>> {
        let superblock = Superblock::read(&*media).map_err(|error| match error.kind() {
            Kind::Corrupt => {
                error.hint("put a copy of the file back; it is a short text, the same for as long as the pool lives")
            }
            _ => error,
        })?;
        let existing = |name: &str| {
            media.open(name, Open::Existing).map_err(|e| match e.kind() {
                std::io::ErrorKind::NotFound => Error::corrupt(format!("the pool has lost its file '{name}'")),
                _ => Error::io(format!("cannot open {name}"), e),
            })
        };
        let cache = usize::try_from(options.catalog_cache_bytes).unwrap_or(usize::MAX);
        let catalog = Catalog::open(existing(CATALOG)?, cache)?;
        let (journal, frames) = Journal::open(existing(JOURNAL)?, superblock.uuid, catalog.mark()?)?;
        let clean = frames.is_empty() && {
            let meta = catalog.view()?.get(&Key::meta())?;
            meta.map_or(Ok(Meta::default()), |value| Meta::decode(&value))?.clean
        };
        if !clean {
            sync_what_is_there(&*media)?;
            tracing::info!("the pool was not closed in order; {} frames of its journal are replayed", frames.len());
            journal.check_end()?;
        }
        let ledger = Ledger::new(catalog, journal, frames)?;
        let tables = Tables::load(&ledger)?;
        let opening = tables.meta.openings + 1;
        let store = Arc::new(Self {
            segments: Segments::new(Arc::clone(&media), superblock.uuid),
            media,
            superblock,
            options,
            ledger,
            tables: RwLock::new(tables),
            cache: Cache::new(usize::try_from(options.cache_bytes).unwrap_or(usize::MAX)),
            fence: Arc::default(),
            heads: Mutex::default(),
            owners: AtomicU64::new(1),
            tidying: Mutex::default(),
            reclaim: Mutex::default(),
            punched: Mutex::default(),
            holders: Mutex::default(),
            bad: RwLock::default(),
            unsealable: Mutex::default(),
            record_faults: Mutex::default(),
            unrecorded: Mutex::default(),
            space: space::SpaceGuard::default(),
            waiting: super::waiting::WaitingRoom::default(),
            opening,
            unclean: !clean,
            recovery: Mutex::default(),
            logs: Arc::default(),
            hooks: RwLock::default(),
            recorder: RwLock::default(),
            stamps_needed: std::sync::atomic::AtomicUsize::new(0),
            changes: AtomicU64::new(0),
            keeper: keeper::Keeper::default(),
            state_files: super::state_files::StateFiles::default(),
            backups: super::backup::BackupKeeper::default(),
            counters: Counters::default(),
        });
        store.compare_segments()?;
        store.begin_opening(clean)?;
        if options.background {
            store.keeper.start(&store).map_err(|e| Error::io("cannot start the background threads", e))?;
        }
        Ok(store)
    }

    /// Compares the segments of the catalog with the files: a missing one is corruption, an unlisted one an orphan of a
    /// crash.
    fn compare_segments(&self) -> Result<()> {
        let on_disk = self.segments.on_disk()?;
        let tables = self.tables.read();
        let missing: Vec<_> = tables
            .segments()
            .filter(|(id, row)| !row.removed && on_disk.binary_search(id).is_err())
            .map(|(id, row)| (id, row.mapped))
            .collect();
        let blocks: u64 = missing.iter().map(|(_, mapped)| mapped).sum();
        if blocks > 0 && on_disk.is_empty() {
            return Err(Error::corrupt(format!(
                "not one segment file is there; {blocks} blocks of disks and snapshots were in {} of them",
                missing.len()
            ))
            .hint(format!(
                "see whether a file system is to be mounted at '{SEGMENTS_DIR}', or put the files back from a copy of the \
                 pool; until then it stays closed"
            )));
        }
        for (id, mapped) in missing.iter().filter(|(_, mapped)| *mapped > 0) {
            let path = crate::pool::segment_path(*id);
            tracing::error!("segment file {path} is missing; {mapped} blocks of disks or snapshots were in it");
        }
        self.segments.set_lost(missing.into_iter().map(|(id, _)| id).collect());
        let listed: Vec<SegmentId> = tables.segments().map(|(id, _)| id).collect();
        drop(tables);
        for id in on_disk.into_iter().filter(|id| listed.binary_search(id).is_err()) {
            tracing::info!("segment {id} was made and never used before a crash; it is removed");
            self.segments.remove(id)?;
        }
        Ok(())
    }

    /// Brings logged blocks to their segments, replays what a killed process had not flushed, and numbers the opening, durably:
    /// from here on the pool counts as not closed in order.
    fn begin_opening(self: &Arc<Self>, clean: bool) -> Result<()> {
        let weak = Arc::downgrade(self);
        self.ledger.on_fold(Box::new(move |segments| match weak.upgrade() {
            Some(store) => store.settle_segments(segments),
            None => Err(Error::read_only("the pool is closed")),
        }));
        let weak = Arc::downgrade(self);
        let give = move |error: &Error| weak.upgrade().is_some_and(|store| store.give_up_ballast(error));
        self.ledger.on_full(Box::new(give));
        let ours = Arc::clone(&self.logs);
        self.ledger.on_poison(Box::new(move || ours.spoil()));
        let logs = self.read_logs(clean);
        let (mut logged, touched) = self.replay_logged(&logs.overwritten())?;
        self.replay_logs(logs)?;
        let nonce = getrandom::u64().map_err(|e| Error::failed(format!("the host gives no random numbers: {e}")))?;
        let ticket = {
            let mut tables = self.tables.write();
            let mut edit = Edit::new(&mut tables);
            let opening = self.opening;
            edit.meta(|meta| {
                meta.openings = opening;
                meta.clean = false;
            });
            let snapshot = edit.tables.meta.snapshot;
            edit.put_opening(opening, super::past::OpeningRow { nonce, snapshot, begun: crate::clock::wall_seconds() });
            for id in touched {
                edit.change_segment(id, |row| row.swept = false)?;
            }
            let_go_of_hidden(&mut edit)?;
            logged.extend(edit.finish());
            // Nothing is written to the segments before the last of these is durable.
            for part in logged.chunks(1024) {
                self.ledger.submit(part.to_vec())?;
            }
            self.ledger.latest()
        };
        self.ledger.wait(ticket)?;
        // So that the catalog itself says "not closed in order" before anything is acknowledged: if the disk then loses
        // the first frames, the next opening looks for later ones.
        match self.fold() {
            // The frame says it as well, and deleting, which gives room, needs an open pool.
            Err(error) if error.kind() == Kind::NoSpace => {
                tracing::warn!("the journal is folded when there is room again: {error}");
            }
            other => drop(other?),
        }
        self.remove_logs();
        Ok(())
    }

    /// Makes everything durable, folds the journal, and marks the pool as closed in order. Later changes are refused.
    /// A pool that refuses writes is only let go of, and one on a host without room for the fold opens by replay. Whoever
    /// still writes is refused before the last flush: what came after it would be blocks that no entry names, in segments that
    /// count as swept.
    ///
    /// # Errors
    /// Any error of the host; the pool then opens by replay.
    pub fn close(&self) -> Result<()> {
        self.waiting.close();
        self.keeper.stop();
        if self.ledger.writable().is_err() {
            return Ok(());
        }
        self.settle_earlier()?;
        let mut quiet = true;
        for head in self.open_heads() {
            quiet &= head.shut();
        }
        self.flush_all()?;
        if !quiet {
            tracing::warn!("a write did not end while the pool was closed; the next opening looks after it");
            self.ledger.shut();
            return Ok(());
        }
        self.mark_swept()?;
        {
            let mut tables = self.tables.write();
            let mut edit = Edit::new(&mut tables);
            edit.meta(|meta| meta.clean = true);
            let _ticket = self.ledger.submit(edit.finish())?;
        }
        let durable = self.ledger.wait(self.ledger.latest());
        let folded = durable.and_then(|()| self.fold().map(drop)).and_then(|()| self.ledger.close());
        self.ledger.shut();
        match folded {
            Ok(()) => self.remove_logs(),
            // All of it is in the journal.
            Err(error) if error.kind() == Kind::NoSpace && self.ledger.is_durable() => {
                tracing::warn!("the next opening folds the journal: {error}");
            }
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// Opens every disk after an unclean opening, so that the last flush syncs what an earlier process left: who opens the
    /// pool next finds it closed in order and does not look.
    fn settle_earlier(&self) -> Result<()> {
        if self.unclean {
            let ids: Vec<_> = self.tables.read().disks().map(|(id, _)| id).collect();
            for id in ids {
                self.head(id)?;
            }
        }
        Ok(())
    }

    /// After everything is flushed nothing of this opening was written and left unmapped, except what is queued.
    fn mark_swept(&self) -> Result<()> {
        let mut tables = self.tables.write();
        let mine: Vec<SegmentId> =
            tables.segments().filter(|(_, row)| row.opening == self.opening && !row.swept).map(|(id, _)| id).collect();
        let mut edit = Edit::new(&mut tables);
        for id in mine {
            edit.change_segment(id, |row| row.swept = true)?;
        }
        let rows: Vec<Row> = edit.finish();
        let _ticket = self.ledger.submit(rows)?;
        Ok(())
    }
}

/// What the superblock is called while it is written.
const SUPERBLOCK_NEW: &str = "afterimage.toml.new";

/// Bytes that must be free for data in a new pool: a first segment and its rows.
const DATA_MIN: u64 = 4 << 20;

/// Refuses a host file system on which a new pool could not take a block.
fn require_room(media: &dyn Media, options: &InitOptions) -> Result<()> {
    let space = media.space().map_err(|e| Error::io("cannot ask the host file system for its room", e))?;
    let (own, kept) = (options.journal.max(JOURNAL_MIN) + options.ballast, space::low_water(space.total));
    let need = own + kept + DATA_MIN;
    if space.free >= need {
        return Ok(());
    }
    let takes = format!("a pool takes {} for itself and keeps {} free", show_size(own), show_size(kept));
    Err(match space.total < need {
        true => Error::no_space(format!("the host file system of {} is too small: {takes}", show_size(space.total)))
            .hint("put the pool on a larger one"),
        false => Error::no_space(format!(
            "the host file system is too full: {takes}, and {} are free",
            show_size(space.free)
        ))
        .hint(format!("make room for {} on the host", show_size(need))),
    })
}

/// What an interrupted `init` may have left, and what the command line puts there before.
const LEFTOVERS: [&str; 8] =
    ["lock", JOURNAL, CATALOG, SEGMENTS_DIR, crate::pool::BALLAST, SUPERBLOCK_NEW, "probe.tmp", "lost+found"];

/// Makes an empty file, replacing what an interrupted `init` left.
fn fresh(media: &dyn Media, name: &str) -> Result<Arc<dyn crate::media::File>> {
    let fail = |e| Error::io(format!("cannot make {name}"), e);
    match media.remove(name) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(fail(e)),
        _ => {}
    }
    media.open(name, Open::New).map_err(fail)
}

/// Deletes the snapshots that the program had taken for itself when it was killed: to look at a live disk, or to clone one.
/// Nobody else knows of them. Those that a stream goes on upon stay with the hidden disk that it is made in.
fn let_go_of_hidden(edit: &mut Edit<'_>) -> Result<()> {
    let needed = |key| edit.tables.disks().any(|(_, row)| row.base == Some(key) && is_hidden(&row.name));
    let hidden = edit.tables.states().filter(|(_, row)| row.status == Status::Hidden);
    let left: Vec<_> = hidden.filter(|(key, _)| !needed(*key)).map(|(key, row)| (key, row.snapshot)).collect();
    for (key, snapshot) in left {
        edit.pass_on_written(snapshot)?;
        edit.change_state(key, |row| row.status = Status::Dying);
    }
    Ok(())
}
