//! The catalog: what the journal is folded into. One table of redb, keys and values as in [`super::rows`].
//!
//! # Rules
//! 1. A fold is one transaction: its rows and the mark that says how far it got commit together.
//! 2. The database is never ahead of the journal: whatever it holds came out of a durable frame.
//! 3. Any I/O error makes the handle useless (redb says `PreviousIo` from then on), so the pool stops folding and says so.
//!
//! # Why redb
//! Measured with folds of 20,000 random rows over a million rows of 21-byte keys and 24-byte values, fold p50 / look-up
//! p50 / reopening after a kill: redb with quick repair 410-690 ms / 2.1 us / 9-330 ms; without it the same, and up to
//! 1.5 s to reopen; fjall 154 ms / 18.7 us / 0.5-7 s; LMDB 234 ms / 1.4 us / 0.3 ms but C, a fixed map size, no page
//! checksums and no way to put a simulated disk under it; a file of our own rewritten whole on every fold 72 ms / 1.4 us
//! / 9 ms, at 16 TiB 1.5 s per fold. Folding is in the background and off the commit path, so its time matters least;
//! look-ups, reopening and a storage trait that can crash at every I/O matter most. Page checksums decide against LMDB,
//! the look-ups against fjall. A write cache of at least 128 MiB keeps one fold from spilling.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use redb::{Database, ReadableDatabase, ReadableTableMetadata, StorageBackend, TableDefinition};

use super::journal::Mark;
use super::rows::Key;
use crate::codec::{Reader, Writer, unseal};
use crate::error::{Error, Kind, Result};
use crate::media::File;
use crate::sync::Mutex;

const ROWS: TableDefinition<&[u8], &[u8]> = TableDefinition::new("rows");
const FOLD: TableDefinition<&[u8], &[u8]> = TableDefinition::new("fold");
const FOLD_KEY: &[u8] = b"mark";

/// A host file under redb.
#[derive(Debug)]
struct Backend(Arc<dyn File>);

/// A host file that is only read: what redb writes, as when it opens a database that was not closed, stays in memory.
#[derive(Debug)]
struct Overlay {
    file: Arc<dyn File>,
    state: Mutex<Overlaid>,
}

#[derive(Debug)]
struct Overlaid {
    len: u64,
    pages: BTreeMap<u64, Box<[u8; PAGE]>>,
}

const PAGE: usize = 4096;
/// Bytes of the file that are read ahead at most.
const EXPECTED_MAX: u64 = 1 << 30;
/// Bytes that a row of the map takes in the file, about: a short key and entry, and pages half full.
const ROW_BYTES: u64 = 128;

impl Overlay {
    fn new(file: Arc<dyn File>) -> Result<Self, io::Error> {
        let len = file.len()?;
        Ok(Self { file, state: Mutex::new(Overlaid { len, pages: BTreeMap::new() }) })
    }

    /// Reads a page as the file has it; zeros beyond its end.
    fn page_of_file(&self, index: u64) -> Result<Box<[u8; PAGE]>, io::Error> {
        let mut page = Box::new([0; PAGE]);
        self.file.read_at(&mut page[..], index * PAGE as u64)?;
        Ok(page)
    }

    /// Calls `each` for every page that a range touches: index, bytes in the page, bytes in the range.
    fn pieces(
        offset: u64,
        len: usize,
        mut each: impl FnMut(u64, Range<usize>, Range<usize>) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut done = 0;
        while done < len {
            let at = offset + done as u64;
            let within = usize::try_from(at % PAGE as u64).expect("below a page");
            let here = (PAGE - within).min(len - done);
            each(at / PAGE as u64, within..within + here, done..done + here)?;
            done += here;
        }
        Ok(())
    }
}

impl StorageBackend for Overlay {
    fn len(&self) -> Result<u64, io::Error> {
        Ok(self.state.lock().len)
    }
    fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), io::Error> {
        let state = self.state.lock();
        if offset.checked_add(out.len() as u64).is_none_or(|end| end > state.len) {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the file ends early"));
        }
        Self::pieces(offset, out.len(), |index, page, range| {
            match state.pages.get(&index) {
                Some(kept) => out[range].copy_from_slice(&kept[page]),
                None => out[range].copy_from_slice(&self.page_of_file(index)?[page]),
            }
            Ok(())
        })
    }
    fn set_len(&self, len: u64) -> Result<(), io::Error> {
        self.state.lock().len = len;
        Ok(())
    }
    fn sync_data(&self) -> Result<(), io::Error> {
        Ok(())
    }
    fn write(&self, offset: u64, data: &[u8]) -> Result<(), io::Error> {
        let mut state = self.state.lock();
        Self::pieces(offset, data.len(), |index, page, range| {
            let fresh = if state.pages.contains_key(&index) { None } else { Some(self.page_of_file(index)?) };
            let kept = state.pages.entry(index).or_insert_with(|| fresh.expect("read above"));
            kept[page].copy_from_slice(&data[range]);
            Ok(())
        })?;
        state.len = state.len.max(offset + data.len() as u64);
        Ok(())
    }
}

impl StorageBackend for Backend {
    fn len(&self) -> Result<u64, io::Error> {
        self.0.len()
    }
    fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), io::Error> {
        self.0.read_exact_at(out, offset)
    }
    fn set_len(&self, len: u64) -> Result<(), io::Error> {
        self.0.set_len(len)
    }
    fn sync_data(&self) -> Result<(), io::Error> {
        self.0.sync()
    }
    fn write(&self, offset: u64, data: &[u8]) -> Result<(), io::Error> {
        self.0.write_at(data, offset)
    }
}

/// Turns any error of redb into ours, finding the errno of the host in it.
fn fail(what: &str, error: impl Into<redb::Error>) -> Error {
    let error = error.into();
    let kind = match &error {
        redb::Error::Io(e) => match e.raw_os_error() {
            Some(libc::ENOSPC | libc::EDQUOT) => Kind::NoSpace,
            _ if e.kind() == io::ErrorKind::UnexpectedEof => Kind::Corrupt,
            _ if e.kind() == io::ErrorKind::InvalidData => Kind::Corrupt,
            _ => Kind::Io,
        },
        redb::Error::Corrupted(_) | redb::Error::UpgradeRequired(_) => Kind::Corrupt,
        _ => Kind::Io,
    };
    let ended = matches!(error, redb::Error::DatabaseClosed | redb::Error::PreviousIo);
    let error = Error::new(kind, format!("cannot {what} the catalog: {error}"));
    if ended {
        error.because(Ended).hint(
            "try again: after a write that found no room it is opened anew; after a read that failed the server has to be ended \
             and started again, and its log says more",
        )
    } else {
        error
    }
}

/// Why a view cannot be read: an I/O of somebody else has failed. After a fold without room the database is opened anew.
#[derive(Debug)]
struct Ended;

impl std::fmt::Display for Ended {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("the database was ended by a failure of another one")
    }
}

impl std::error::Error for Ended {}

/// Tells whether an error of a view says so.
pub(super) fn is_ended(error: &Error) -> bool {
    std::error::Error::source(error).is_some_and(|source| source.is::<Ended>())
}

thread_local! {
    static GUARDED: Cell<bool> = const { Cell::new(false) };
}

/// Tells whether a panic of this thread, now, is one that becomes an error: nobody need be told of it as of a bug.
#[must_use]
pub fn panic_is_guarded() -> bool {
    GUARDED.get()
}

/// Reads what may be damaged in ways that the database does not expect; `None` when it panics over it.
pub(super) fn guard<T>(read: impl FnOnce() -> T) -> Option<T> {
    let before = GUARDED.replace(true);
    let result = catch_unwind(AssertUnwindSafe(read));
    GUARDED.set(before);
    result.ok()
}

/// The catalog.
#[derive(Debug)]
pub struct Catalog {
    /// `None` only while [`Catalog::reopen`] runs, and after it failed.
    database: Option<Database>,
    file: Arc<dyn File>,
    cache_bytes: usize,
    overlaid: bool,
}

/// A consistent view of the catalog as of one fold.
pub struct View {
    rows: redb::ReadOnlyTable<&'static [u8], &'static [u8]>,
    mark: Mark,
    file: Arc<dyn File>,
}

impl std::fmt::Debug for View {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("View")
    }
}

/// Rows of the catalog, one after the other.
pub struct Stored(redb::Range<'static, &'static [u8], &'static [u8]>);

/// A value where redb has it.
pub struct StoredValue(redb::AccessGuard<'static, &'static [u8]>);

impl std::fmt::Debug for Stored {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Stored")
    }
}

impl std::fmt::Debug for StoredValue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("StoredValue").field(&self.bytes().len()).finish()
    }
}

impl Stored {
    /// Returns the next row.
    ///
    /// # Errors
    /// Any error of the host; `Corrupt` when a key is damaged.
    pub fn step(&mut self) -> Result<Option<(Key, StoredValue)>> {
        let Some(row) = self.0.next() else { return Ok(None) };
        let (key, value) = row.map_err(|e| fail("read", e))?;
        Ok(Some((Key::from_bytes(key.value())?, StoredValue(value))))
    }
}

impl StoredValue {
    /// Returns the bytes.
    pub fn bytes(&self) -> &[u8] {
        self.0.value()
    }
}

impl Catalog {
    /// Makes an empty catalog in an empty file.
    ///
    /// # Errors
    /// Any error of the host.
    pub fn create(file: Arc<dyn File>, cache_bytes: usize) -> Result<Self> {
        let catalog = Self::open(file, cache_bytes)?;
        catalog.fold(&mut std::iter::empty(), Mark::START)?;
        Ok(catalog)
    }

    /// Opens a catalog, repairing what a crash left.
    ///
    /// # Errors
    /// `Corrupt` when it cannot be repaired; any error of the host.
    pub fn open(file: Arc<dyn File>, cache_bytes: usize) -> Result<Self> {
        let mut catalog = Self { database: None, file, cache_bytes, overlaid: false };
        catalog.reopen()?;
        Ok(catalog)
    }

    /// Opens a catalog without changing a byte of its file, whatever state it is in.
    ///
    /// # Errors
    /// As [`Catalog::open`].
    pub fn look_at(file: Arc<dyn File>, cache_bytes: usize) -> Result<Self> {
        let mut catalog = Self { database: None, file, cache_bytes, overlaid: true };
        catalog.reopen()?;
        Ok(catalog)
    }

    /// Opens the file anew after an error made the handle useless; the last fold that committed is there.
    ///
    /// # Errors
    /// As [`Catalog::open`].
    pub fn reopen(&mut self) -> Result<()> {
        drop(self.database.take());
        let mut builder = Database::builder();
        builder.set_cache_size(self.cache_bytes);
        let file = Arc::clone(&self.file);
        let overlay = match self.overlaid {
            true => Some(Overlay::new(Arc::clone(&file)).map_err(|e| Error::io("cannot read the catalog", e))?),
            false => None,
        };
        // The database checks what it reads, but trusts some of it when it opens: damage there is a panic.
        let opened = guard(move || match overlay {
            Some(overlay) => builder.create_with_backend(overlay),
            None => builder.create_with_backend(Backend(file)),
        });
        let damaged = || Err(Error::corrupt("cannot open the catalog: it is damaged beyond what the database expects"));
        let opened = opened.map_or_else(damaged, |opened| opened.map_err(|e| fail("open", e)));
        self.database = Some(opened?);
        Ok(())
    }

    fn database(&self) -> Result<&Database> {
        self.database.as_ref().ok_or_else(|| Error::read_only("the catalog could not be opened again after an error"))
    }

    /// Returns how far the journal is folded.
    ///
    /// # Errors
    /// `Corrupt` when the mark is missing or damaged.
    pub fn mark(&self) -> Result<Mark> {
        Self::mark_in(&self.database()?.begin_read().map_err(|e| fail("read", e))?)
    }

    fn mark_in(read: &redb::ReadTransaction) -> Result<Mark> {
        let damaged = || Error::corrupt("the catalog has no mark of the journal: it is damaged or not a catalog");
        let table = read.open_table(FOLD).map_err(|_| damaged())?;
        let value = table.get(FOLD_KEY).map_err(|e| fail("read", e))?.ok_or_else(damaged)?;
        let what = "the mark of the catalog";
        let mut from = Reader::new(what, unseal(what, value.value())?);
        let mark = Mark { lsn: from.u64()?, at: from.u64()? };
        from.end()?;
        Ok(mark)
    }

    /// Applies rows in one transaction that commits the mark with them.
    ///
    /// # Errors
    /// Any error of the host; nothing of the fold is there then, and the handle is useless.
    pub fn fold(&self, rows: &mut dyn Iterator<Item = (Key, Option<&[u8]>)>, mark: Mark) -> Result<()> {
        let mut write = self.database()?.begin_write().map_err(|e| fail("write", e))?;
        write.set_quick_repair(true);
        {
            let mut table = write.open_table(ROWS).map_err(|e| fail("write", e))?;
            for (key, value) in rows {
                match value {
                    Some(value) => drop(table.insert(key.as_bytes(), value).map_err(|e| fail("write", e))?),
                    None => drop(table.remove(key.as_bytes()).map_err(|e| fail("write", e))?),
                }
            }
            let mut fold = write.open_table(FOLD).map_err(|e| fail("write", e))?;
            let mut out = Writer::new();
            out.u64(mark.lsn).u64(mark.at);
            drop(fold.insert(FOLD_KEY, &out.sealed()[..]).map_err(|e| fail("write", e))?);
        }
        write.commit().map_err(|e| fail("commit", e))
    }

    /// Returns the rows as of the last fold.
    ///
    /// # Errors
    /// Any error of the host.
    pub fn view(&self) -> Result<View> {
        let read = self.database()?.begin_read().map_err(|e| fail("read", e))?;
        let rows = read.open_table(ROWS).map_err(|e| fail("read", e))?;
        Ok(View { mark: Self::mark_in(&read)?, rows, file: Arc::clone(&self.file) })
    }

    /// Closes the database in order.
    ///
    /// # Errors
    /// Any error of the host.
    pub fn close(mut self) -> Result<()> {
        self.database.take().map_or(Ok(()), |open| open.close().map_err(|e| fail("close", e)))
    }

    /// Reads every page and compares its checksum.
    ///
    /// # Errors
    /// `Corrupt` when one does not match.
    pub fn verify(&mut self) -> Result<()> {
        let Some(database) = self.database.as_mut() else { return self.database().map(drop) };
        match database.check_integrity() {
            Ok(true) => Ok(()),
            Ok(false) => Err(Error::corrupt("the catalog was damaged and has been repaired by its own means")),
            Err(e) => Err(fail("verify", e)),
        }
    }
}

impl View {
    /// Returns how far the journal was folded.
    #[must_use]
    pub fn mark(&self) -> Mark {
        self.mark
    }

    /// Returns the value of a key.
    ///
    /// # Errors
    /// Any error of the host.
    pub fn get(&self, key: &Key) -> Result<Option<Vec<u8>>> {
        let found = self.rows.get(key.as_bytes()).map_err(|e| fail("read", e))?;
        Ok(found.map(|value| value.value().to_vec()))
    }

    /// Returns the last row from `low` to `high`, both included.
    ///
    /// # Errors
    /// Any error of the host; `Corrupt` when a key is damaged.
    pub fn last_in(&self, low: &Key, high: &Key) -> Result<Option<(Key, StoredValue)>> {
        let mut range = self.rows.range::<&[u8]>(low.as_bytes()..=high.as_bytes()).map_err(|e| fail("read", e))?;
        match range.next_back() {
            None => Ok(None),
            Some(row) => {
                let (key, value) = row.map_err(|e| fail("read", e))?;
                Ok(Some((Key::from_bytes(key.value())?, StoredValue(value))))
            }
        }
    }

    /// Tells the host that so many rows are about to be read, in an order that it cannot guess; it only matters where that
    /// is a good part of the file.
    pub fn expect(&self, rows: u64) {
        if self.file.len().is_ok_and(|len| rows.saturating_mul(ROW_BYTES) >= len / 4) {
            self.file.will_be_read(EXPECTED_MAX);
        }
    }

    /// Returns up to `most` rows from `low` to `high`, both included, in order.
    ///
    /// # Errors
    /// Any error of the host; `Corrupt` when a key is damaged.
    pub fn page(&self, low: &Key, high: &Key, most: usize) -> Result<Vec<(Key, Vec<u8>)>> {
        let range = self.rows.range::<&[u8]>(low.as_bytes()..=high.as_bytes()).map_err(|e| fail("read", e))?;
        let mut out = Vec::new();
        for row in range.take(most) {
            let (key, value) = row.map_err(|e| fail("read", e))?;
            out.push((Key::from_bytes(key.value())?, value.value().to_vec()));
        }
        Ok(out)
    }

    /// Returns the rows from `low` to `high`, both included, in order, one after the other.
    ///
    /// # Errors
    /// Any error of the host.
    pub fn walk(&self, low: &Key, high: &Key) -> Result<Stored> {
        let range = self.rows.range::<&[u8]>(low.as_bytes()..=high.as_bytes()).map_err(|e| fail("read", e))?;
        Ok(Stored(range))
    }

    /// Returns how many rows there are.
    ///
    /// # Errors
    /// Any error of the host.
    pub fn len(&self) -> Result<u64> {
        self.rows.len().map_err(|e| fail("read", e))
    }

    /// Tells whether there are no rows.
    ///
    /// # Errors
    /// Any error of the host.
    pub fn is_empty(&self) -> Result<bool> {
        Ok(self.len()? == 0)
    }
}
