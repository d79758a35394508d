//! The ledger: rows as of now, through three layers - submitted, journaled, folded.
//!
//! `submit` puts a change in front of everybody's eyes and in the queue; `wait` makes it durable. Whoever waits first
//! writes one frame with everything queued (group commit), the others find their change in it. `fold` moves what is
//! durable from memory into the catalog and gives the room of the journal back.
//!
//! ```text
//!   submit -> pending -> inflight --frame, sync--> journaled -> folding --fold--> catalog
//! ```
//!
//! # Rules
//! 1. A submit is atomic: all of its rows are in one frame.
//! 2. Data that a row names is synced before the row is submitted (invariant 3); the ledger cannot know that.
//! 3. Look-ups see every submitted row, durable or not. What acts on the outside (punching, answering) waits first.
//! 4. After any failed write or sync nothing more is submitted: the pool is poisoned with the reason.
//!
//! # After a crash
//! Frames after the mark are read into `journaled`; they are folded later.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use super::catalog::{Catalog, View};
use super::journal::{Journal, encode_row};
use super::rows::{Key, KeyParts, Row, Table};
use crate::codec::Writer;
use crate::error::{Error, Kind, Result};
use crate::sync::{Mutex, RwLock};
use crate::units::SegmentId;

/// Rows in memory; `None` deletes. A persistent tree: a copy takes no time, however many rows wait for their fold, and who
/// looks at an instant for long holds nobody up. (A `BTreeMap` is twice as fast to fill, but copying one of a million rows
/// under the lock stopped every writer for 0.2 s.)
pub(super) type Layer = imbl::OrdMap<Key, Option<Arc<[u8]>>>;

/// Syncs segments; returns those that it cannot, whose logged blocks are to be kept.
pub type Settle = Box<dyn Fn(&BTreeSet<SegmentId>) -> Result<BTreeSet<SegmentId>> + Send + Sync>;

/// Gives up room that is kept for it when a fold found none; tells whether there was any.
pub type WhenFull = Box<dyn Fn(&Error) -> bool + Send + Sync>;

/// Folds that are tried before the journal counts as too small for what is queued.
const FOLDS_MAX: usize = 3;

/// Deleted rows of the map and its index at which a fold is worth it. The catalog has them until then, and whoever reads a range
/// passes them: each of thousands of snapshots that are retired or deleted in one go would pass those of all before it.
const DELETED_MAX: usize = 1024;

/// A place in the order of all submits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Ticket(u64);

/// What nobody has written yet.
#[derive(Debug, Default)]
struct Pending {
    layer: Layer,
    body: Writer,
    rows: u32,
    last: Ticket,
}

#[derive(Debug)]
pub(super) struct Layers {
    pending: Pending,
    /// In the frame that is being written; not durable yet, so no fold may take it.
    inflight: Layer,
    journaled: Layer,
    folding: Layer,
    pub(super) view: Arc<View>,
}

impl Layers {
    /// The layers in memory, newest first.
    pub(super) fn newest_first(&self) -> [&Layer; 4] {
        [&self.pending.layer, &self.inflight, &self.journaled, &self.folding]
    }

    /// What memory says of a key: nothing, or its value or deletion.
    pub(super) fn get(&self, key: &Key) -> Option<Option<Arc<[u8]>>> {
        self.newest_first().into_iter().find_map(|layer| layer.get(key)).cloned()
    }
}

/// Rows, with the journal and the catalog behind them.
pub struct Ledger {
    pub(super) layers: Mutex<Layers>,
    writer: Mutex<Writing>,
    pub(super) catalog: Mutex<Option<Catalog>>,
    poison: RwLock<Option<String>>,
    settle: RwLock<Option<Settle>>,
    when_full: RwLock<Option<WhenFull>>,
    when_poisoned: RwLock<Option<Box<dyn Fn() + Send + Sync>>>,
    body_max: usize,
    /// The last ticket that is durable, for who does not want to wait for the frame that is being written.
    durable: AtomicU64,
    /// As [`Journal::room`].
    room: AtomicUsize,
    /// A fold dropped copies of blocks, and no frame says so yet.
    untold: AtomicBool,
    /// Rows of the map and its index that were deleted since the last fold.
    deleted: AtomicUsize,
    /// Frames written and folds done, for the metrics.
    pub counters: LedgerCounters,
}

/// What the ledger did since it was opened.
#[derive(Debug, Default)]
pub struct LedgerCounters {
    /// Frames written.
    pub frames: AtomicU64,
    /// Folds done.
    pub folds: AtomicU64,
}

impl std::fmt::Debug for Ledger {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ledger").field("poison", &self.poison).finish_non_exhaustive()
    }
}

#[derive(Debug)]
struct Writing {
    journal: Journal,
    durable: Ticket,
}

impl Ledger {
    /// Puts the ledger together from an opened catalog and the frames that follow it.
    ///
    /// # Errors
    /// When the catalog cannot be read.
    pub fn new(catalog: Catalog, journal: Journal, frames: Vec<Vec<Row>>) -> Result<Self> {
        let mut journaled = Layer::new();
        for row in frames.into_iter().flatten() {
            journaled.insert(row.key, row.value.map(Arc::from));
        }
        let view = Arc::new(catalog.view()?);
        let body_max = journal.body_max();
        let room = AtomicUsize::new(journal.room());
        let layers =
            Layers { pending: Pending::default(), inflight: Layer::new(), journaled, folding: Layer::new(), view };
        Ok(Self {
            layers: Mutex::new(layers),
            writer: Mutex::new(Writing { journal, durable: Ticket(0) }),
            catalog: Mutex::new(Some(catalog)),
            poison: RwLock::new(None),
            settle: RwLock::new(None),
            when_full: RwLock::new(None),
            when_poisoned: RwLock::new(None),
            body_max,
            durable: AtomicU64::new(0),
            room,
            untold: AtomicBool::new(false),
            deleted: AtomicUsize::new(0),
            counters: LedgerCounters::default(),
        })
    }

    /// Returns why writes are refused, if they are.
    pub fn poisoned(&self) -> Option<String> {
        self.poison.read().clone()
    }

    /// Refuses every write from now on.
    pub fn poison(&self, error: &Error) {
        let mut poison = self.poison.write();
        if poison.is_some() {
            return;
        }
        tracing::error!("the pool refuses writes from now on: {error}");
        *poison = Some(error.to_string());
        drop(poison);
        if let Some(told) = &*self.when_poisoned.read() {
            told();
        }
    }

    /// Says what happens when the pool is poisoned; it must take no lock that is held where that may happen.
    pub fn on_poison(&self, told: Box<dyn Fn() + Send + Sync>) {
        *self.when_poisoned.write() = Some(told);
    }

    /// Refuses every write from now on, in order.
    pub fn shut(&self) {
        self.poison.write().get_or_insert_with(|| "the pool is closed".into());
    }

    /// Fails when writes are refused.
    ///
    /// # Errors
    /// `ReadOnly` with the reason.
    pub fn writable(&self) -> Result<()> {
        match &*self.poison.read() {
            None => Ok(()),
            Some(why) => Err(Error::read_only(format!("the pool refuses writes after a failure: {why}"))
                .hint("see to the host's disk, then close the pool and open it again")),
        }
    }

    /// Returns the most bytes of rows that one submit may carry.
    pub fn submit_max(&self) -> usize {
        self.body_max
    }

    /// Queues a change. Everybody sees it at once; it is durable after [`Ledger::wait`].
    ///
    /// # Errors
    /// `ReadOnly` when the pool refuses writes; `Failed` when the rows are more than the journal could ever take.
    pub fn submit(&self, rows: Vec<Row>) -> Result<Ticket> {
        self.writable()?;
        let size: usize = rows.iter().map(row_size).sum();
        if size > self.body_max {
            return Err(Error::failed(format!("a change of {size} bytes is too large for the journal")));
        }
        let mut layers = self.layers.lock();
        while layers.pending.body.len() + size > self.body_max {
            let last = layers.pending.last;
            drop(layers);
            self.wait(last)?;
            layers = self.layers.lock();
        }
        let pending = &mut layers.pending;
        for row in rows {
            if row.value.is_none() && matches!(row.key.parts(), Ok(KeyParts::Map(..) | KeyParts::Index(..))) {
                self.deleted.fetch_add(1, Ordering::Relaxed);
            }
            encode_row(&row, &mut pending.body);
            pending.rows += 1;
            pending.layer.insert(row.key, row.value.map(Arc::from));
        }
        pending.last.0 += 1;
        Ok(pending.last)
    }

    /// Tells whether all that was submitted is durable.
    pub fn is_durable(&self) -> bool {
        self.durable.load(Ordering::Acquire) >= self.latest().0
    }

    /// Returns the ticket of the latest submit.
    pub fn latest(&self) -> Ticket {
        self.layers.lock().pending.last
    }

    /// Sees to it that rows of so many bytes can be submitted and written down, before anything is changed that would have to
    /// be taken back. Others may take the room before.
    ///
    /// # Errors
    /// `NoSpace` when the journal is full and cannot be folded on a full host; `ReadOnly` when the pool refuses writes.
    pub fn make_room(&self, bytes: usize) -> Result<()> {
        let bytes = bytes.min(self.body_max);
        for _ in 0..FOLDS_MAX {
            let queued = self.layers.lock().pending.body.len();
            if self.room.load(Ordering::Acquire) >= bytes + queued {
                return Ok(());
            }
            self.wait(self.latest())?;
            if self.writer.lock().journal.has_room(bytes) {
                return Ok(());
            }
            self.fold()?;
        }
        Ok(())
    }

    /// Returns when everything up to the ticket is durable.
    ///
    /// # Errors
    /// `ReadOnly` when the journal could not be written; the pool is poisoned then. `NoSpace` when it is full and cannot be
    /// folded on a full host: what was submitted stays queued, and whoever wants to know whether it became durable waits for
    /// the same ticket again.
    pub fn wait(&self, ticket: Ticket) -> Result<()> {
        if self.durable.load(Ordering::Acquire) >= ticket.0 {
            return Ok(());
        }
        let mut folded = 0;
        loop {
            let mut writer = self.writer.lock();
            if writer.durable >= ticket {
                return Ok(());
            }
            self.writable()?;
            if self.write_frame(&mut writer)? {
                continue;
            }
            // The ring is full. The lock is given up: a fold needs it twice.
            drop(writer);
            if folded == FOLDS_MAX {
                return Err(Error::failed("the journal has no room even after a fold"));
            }
            folded += 1;
            self.fold()?;
        }
    }

    /// Submits and waits.
    ///
    /// # Errors
    /// As [`Ledger::submit`] and [`Ledger::wait`].
    pub fn commit(&self, rows: Vec<Row>) -> Result<()> {
        let ticket = self.submit(rows)?;
        self.wait(ticket)
    }

    /// Writes everything queued as one frame. Returns false, having done nothing, when the ring has no room.
    fn write_frame(&self, writer: &mut Writing) -> Result<bool> {
        let (body, rows, last) = {
            let mut layers = self.layers.lock();
            if !writer.journal.has_room(layers.pending.body.len()) {
                return Ok(false);
            }
            let pending = std::mem::take(&mut layers.pending);
            layers.pending.last = pending.last;
            layers.inflight = pending.layer;
            (pending.body.finish(), pending.rows, pending.last)
        };
        if let Err(error) = writer.journal.append(&body, rows) {
            self.poison(&error);
            return Err(error);
        }
        let mut layers = self.layers.lock();
        let durable = std::mem::take(&mut layers.inflight);
        layers.journaled.extend(durable);
        writer.durable = last;
        self.durable.store(last.0, Ordering::Release);
        self.room.store(writer.journal.room(), Ordering::Release);
        self.untold.store(false, Ordering::Release);
        self.counters.frames.fetch_add(1, Ordering::Relaxed);
        Ok(true)
    }

    /// Moves everything durable into the catalog. Returns whether there was anything.
    ///
    /// # Errors
    /// `NoSpace` when the host has no room, also after [`Ledger::on_full`]: the rows stay in memory and in the journal, and a
    /// later fold may succeed. Any other error poisons the pool.
    pub fn fold(&self) -> Result<bool> {
        match self.fold_once() {
            Err(error) if error.kind() == Kind::NoSpace => {
                let gave = self.when_full.read().as_ref().is_some_and(|give| give(&error));
                if gave { self.fold_once() } else { Err(error) }
            }
            other => other,
        }
    }

    fn fold_once(&self) -> Result<bool> {
        // After a failed sync it is not known what the host has: the copies in the journal must not go.
        self.writable()?;
        let mut catalog = self.catalog.lock();
        let Some(open) = catalog.as_mut() else { return Err(Error::read_only("the pool is closed")) };
        let (folding, mark) = {
            let writer = self.writer.lock();
            let mut layers = self.layers.lock();
            if layers.journaled.is_empty() {
                return Ok(false);
            }
            layers.folding = std::mem::take(&mut layers.journaled);
            (layers.folding.clone(), writer.journal.mark())
        };
        let fold = |kept: BTreeSet<SegmentId>| {
            let rows = folding.iter().filter(|(key, value)| match key.parts() {
                // Deletions go on to where kept copies may be.
                Ok(KeyParts::Data(address)) => value.is_none() || kept.contains(&address.segment()),
                _ => true,
            });
            open.fold(&mut rows.map(|(key, value)| (*key, value.as_deref())), mark)?;
            open.view()
        };
        let folded = self.settle(&folding).and_then(fold);
        match folded {
            Ok(view) => {
                let mut writer = self.writer.lock();
                let mut layers = self.layers.lock();
                let copies = Key::first_of(Table::Data)..=Key::beyond(Table::Data);
                if layers.folding.range(copies).any(|(_, value)| value.is_some()) {
                    self.untold.store(true, Ordering::Release);
                }
                layers.view = Arc::new(view);
                layers.folding = Layer::new();
                writer.journal.folded(mark);
                self.room.store(writer.journal.room(), Ordering::Release);
                // Those of meanwhile count late: it is about how many there are, not about each.
                self.deleted.store(0, Ordering::Relaxed);
                self.counters.folds.fetch_add(1, Ordering::Relaxed);
                Ok(true)
            }
            Err(error) => Err(self.unfold(open, error)),
        }
    }

    /// Syncs the segments of the logged blocks that a fold drops; returns those whose blocks it is to keep.
    fn settle(&self, folding: &Layer) -> Result<BTreeSet<SegmentId>> {
        let low = Key::first_of(Table::Data);
        let mut segments = BTreeSet::new();
        for key in folding.range(low..=Key::beyond(Table::Data)).map(|(key, _)| key) {
            if let KeyParts::Data(address) = key.parts()? {
                segments.insert(address.segment());
            }
        }
        match &*self.settle.read() {
            Some(settle) if !segments.is_empty() => settle(&segments),
            _ if segments.is_empty() => Ok(segments),
            _ => Err(Error::failed("logged blocks cannot be folded before the pool is open")),
        }
    }

    /// After a failed fold: its rows count as journaled again, and the catalog is opened anew.
    fn unfold(&self, catalog: &mut Catalog, error: Error) -> Error {
        {
            let mut layers = self.layers.lock();
            let back = std::mem::take(&mut layers.folding);
            let newer = std::mem::replace(&mut layers.journaled, back);
            layers.journaled.extend(newer);
        }
        let reopened = if error.kind() == Kind::NoSpace { self.reopen(catalog) } else { Err(error.again()) };
        if let Err(worse) = reopened {
            self.poison(&worse);
        }
        error
    }

    fn reopen(&self, catalog: &mut Catalog) -> Result<()> {
        catalog.reopen()?;
        let fresh = Arc::new(catalog.view()?);
        // Who still has the view before cannot read from it any more: its database is closed. See `lookups`.
        self.layers.lock().view = fresh;
        Ok(())
    }

    /// Returns the catalog as of the last fold.
    pub fn view(&self) -> Arc<View> {
        Arc::clone(&self.layers.lock().view)
    }

    /// Tells whether so many rows wait to be deleted that those who walk over the map pass them again and again.
    pub fn is_littered(&self) -> bool {
        self.deleted.load(Ordering::Relaxed) >= DELETED_MAX
    }

    /// Returns how full the journal is, from 0 to 100.
    pub fn journal_percent(&self) -> u64 {
        self.writer.lock().journal.percent_used()
    }

    /// Tells whether a reader of the journal alone may take the copy of a block in it for the newest: memory has it, so no
    /// fold has dealt with it, or no frame since that fold tells of it.
    pub fn copy_counts(&self, key: &Key) -> bool {
        self.untold.load(Ordering::Acquire) || self.layers.lock().get(key).is_some_and(|value| value.is_some())
    }

    /// Sets what gives room to a fold that found none; it takes no lock that is held where something is folded.
    pub fn on_full(&self, give: WhenFull) {
        *self.when_full.write() = Some(give);
    }

    /// Sets what a fold does first with the segments of logged blocks: sync them.
    pub fn on_fold(&self, settle: Settle) {
        *self.settle.write() = Some(settle);
    }

    /// Makes everything queued durable, folds it, and closes the catalog.
    ///
    /// # Errors
    /// Any error of the host.
    pub fn close(&self) -> Result<()> {
        self.wait(self.latest())?;
        self.fold()?;
        match self.catalog.lock().take() {
            Some(open) => open.close(),
            None => Ok(()),
        }
    }
}

/// Returns an upper bound of the bytes a row takes in a frame.
pub fn row_size(row: &Row) -> usize {
    row.value.as_ref().map_or(0, Vec::len) + 32
}
