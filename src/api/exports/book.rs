//! The list of exports that is kept in the pool, and who of them was writing: what a restart brings back.
//!
//! # Rules
//! 1. The file is read when it is first needed. While it cannot be read, whatever needs it fails and nothing else does.
//! 2. A holder that may come back is in the file before its first write, and leaves it when it lets go. What ends only
//!    because the server does stays in it.
//! 3. A holder that does not come back within [`RESERVED`] has lost its claim.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use crate::clock::{self, Instant};
use crate::error::{Error, Result};
use crate::media::Media;
use crate::pool::{ExportList, ExportRow, LeaseRow};
use crate::sync::Mutex;
use crate::units::DiskId;

/// How long a disk stays reserved after a restart for the holder it had.
pub(super) const RESERVED: Duration = Duration::from_secs(60);

/// Who writes to which disk.
type Claim = (u64, String);

#[derive(Debug, Default)]
struct Inner {
    list: Option<ExportList>,
    /// How often each holder has its lease.
    writing: HashMap<Claim, usize>,
    /// Who has not come back yet, and until when it may.
    awaited: HashMap<Claim, Instant>,
    ending: bool,
}

/// The list.
#[derive(Debug)]
pub(super) struct Book {
    media: Arc<dyn Media>,
    inner: Mutex<Inner>,
}

impl Inner {
    fn list(&mut self, media: &dyn Media) -> Result<&mut ExportList> {
        if self.list.is_none() {
            self.list = Some(ExportList::read(media)?);
        }
        Ok(self.list.as_mut().expect("read above"))
    }

    /// Changes the list and writes it; on an error it is as before.
    fn change(&mut self, media: &dyn Media, change: impl FnOnce(&mut ExportList)) -> Result<()> {
        let list = self.list(media)?;
        let mut next = list.clone();
        change(&mut next);
        if next != *list {
            next.write(media)?;
            *list = next;
        }
        Ok(())
    }

    /// Writes down who writes, and who may come back.
    fn save_claims(&mut self, media: &dyn Media) -> Result<()> {
        let now = clock::now();
        self.awaited.retain(|_, until| *until > now);
        let mut claims: Vec<_> = self.writing.keys().chain(self.awaited.keys()).cloned().collect();
        claims.sort();
        claims.dedup();
        let leases = claims.into_iter().map(|(disk, holder)| LeaseRow { disk, holder }).collect();
        self.change(media, |list| list.leases = leases)
    }
}

impl Book {
    pub(super) fn new(media: &Arc<dyn Media>) -> Self {
        Self { media: Arc::clone(media), inner: Mutex::default() }
    }

    /// Returns the list as it is.
    pub(super) fn read(&self) -> Result<ExportList> {
        self.inner.lock().list(&*self.media).cloned()
    }

    /// Keeps an export.
    pub(super) fn add(&self, row: ExportRow) -> Result<()> {
        self.inner.lock().change(&*self.media, |list| list.exports.push(row))
    }

    /// Keeps an export no longer.
    pub(super) fn remove(&self, id: u64) -> Result<()> {
        self.inner.lock().change(&*self.media, |list| list.exports.retain(|row| row.id != id))
    }

    /// Takes out what is gone, after a restart; who was writing to what is left is awaited from now on.
    pub(super) fn restore(&self, exports: Vec<ExportRow>, leases: Vec<LeaseRow>) -> Result<()> {
        let mut inner = self.inner.lock();
        let until = clock::now() + RESERVED;
        inner.awaited = leases.iter().map(|row| ((row.disk, row.holder.clone()), until)).collect();
        inner.change(&*self.media, |list| {
            list.exports = exports;
            list.leases = leases;
        })
    }

    /// Notes that a holder has taken a lease.
    pub(super) fn came(&self, disk: DiskId, holder: &str) {
        let mut inner = self.inner.lock();
        let claim = (disk.0, holder.to_owned());
        inner.awaited.remove(&claim);
        let count = inner.writing.entry(claim).or_default();
        *count += 1;
        if *count == 1 {
            self.told(inner.save_claims(&*self.media));
        }
    }

    /// Notes that a holder has let go.
    pub(super) fn went(&self, disk: DiskId, holder: &str) {
        let mut inner = self.inner.lock();
        let claim = (disk.0, holder.to_owned());
        let left = inner.writing.get_mut(&claim).map_or(0, |count| {
            *count -= 1;
            *count
        });
        if left == 0 && !inner.ending {
            inner.writing.remove(&claim);
            self.told(inner.save_claims(&*self.media));
        }
    }

    /// Forgets who has not come back in time.
    pub(super) fn purge(&self) {
        let mut inner = self.inner.lock();
        if !inner.ending {
            self.told(inner.save_claims(&*self.media));
        }
    }

    /// Leaves the list as it is for the next server.
    pub(super) fn end(&self) {
        self.inner.lock().ending = true;
    }

    /// A client is served all the same: it only has no claim after a restart.
    #[expect(clippy::unused_self, reason = "it stands for the file")]
    fn told(&self, saved: Result<()>) {
        if let Err(error) = saved {
            tracing::warn!("who writes to which disk could not be noted for a restart: {error}");
        }
    }
}

/// Returns the error for a list that a request without a server wants to serve.
pub(super) fn no_server() -> Error {
    Error::failed("no server is running on this pool")
        .hint("'afterimage serve' starts one for a disk, 'afterimage mount' for the whole pool")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::media::SimMedia;

    fn book() -> (Arc<dyn Media>, Book) {
        let media: Arc<dyn Media> = Arc::new(SimMedia::new(1));
        let book = Book::new(&media);
        (media, book)
    }

    fn claims(media: &Arc<dyn Media>) -> Vec<(u64, String)> {
        let leases = ExportList::read(&**media).unwrap().leases;
        leases.into_iter().map(|row| (row.disk, row.holder)).collect()
    }

    #[test]
    fn a_holder_is_noted_while_it_writes_and_when_the_server_ends_first() {
        let (media, book) = book();
        let a = || (7, "a".to_owned());
        book.came(DiskId(7), "a");
        book.came(DiskId(7), "a");
        assert_eq!(claims(&media), [a()]);
        book.went(DiskId(7), "a");
        assert_eq!(claims(&media), [a()]);
        book.went(DiskId(7), "a");
        assert_eq!(claims(&media), []);
        book.came(DiskId(7), "a");
        book.end();
        book.went(DiskId(7), "a");
        assert_eq!(claims(&media), [a()]);
    }

    #[test]
    fn who_does_not_come_back_in_time_is_forgotten() {
        let (media, first) = book();
        first.came(DiskId(7), "a");
        first.came(DiskId(8), "b");
        first.end();
        let book = Book::new(&media);
        let list = book.read().unwrap();
        book.restore(list.exports, list.leases).unwrap();
        book.came(DiskId(8), "b");
        book.purge();
        assert_eq!(claims(&media).len(), 2, "its minute is not over");
        for until in book.inner.lock().awaited.values_mut() {
            *until = clock::now();
        }
        book.purge();
        assert_eq!(claims(&media), [(8, "b".to_owned())]);
    }
}
