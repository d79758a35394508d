//! The list of exports that is kept in the pool, and who of them was writing: what a restart brings back.
//!
//! # Rules
//! 1. The file is read when it is first needed. While it cannot be read, whatever needs it fails and nothing else does.
//! 2. A holder that may come back is in the file before its first write, and leaves it when it lets go. What ends only
//!    because the server does stays in it.
//! 3. A holder that does not come back within [`RESERVED`] of the first server after it has lost its claim, however often
//!    servers are started meanwhile: the end of its time is in the file.
//! 4. What may be lost of a holder's writes is in the file until it was told, so that a process that opens the pool in
//!    between and closes it in order does not make it look as if all were well: also when the holder has let go, or its
//!    time is over, and nothing is kept for it any more. After a kill the log of the disk tells it (`store::unflushed`).
//! 5. A number is in the file before it is given out. If it cannot be written, it is only one that no export has.

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

/// Somebody who has not come back yet.
#[derive(Debug)]
struct Awaited {
    until: Instant,
    /// The same as it is in the file.
    until_seconds: u64,
    lost: Option<String>,
}

/// Somebody who writes.
#[derive(Debug, Default)]
struct Writing {
    /// How often it has its lease.
    count: usize,
    lost: Option<String>,
}

#[derive(Debug, Default)]
struct Inner {
    list: Option<ExportList>,
    writing: HashMap<Claim, Writing>,
    awaited: HashMap<Claim, Awaited>,
    /// Who has let go, or not come back in time, and was not told why something may be lost.
    owed: HashMap<Claim, String>,
    /// The last number that was given out, if the file does not know.
    last_id: u64,
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

    /// Returns who writes, who may come back, and who has still to be told of a loss.
    fn claims(&mut self) -> Vec<LeaseRow> {
        let now = clock::now();
        for (claim, late) in self.awaited.extract_if(|_, awaited| awaited.until <= now) {
            self.owed.extend(late.lost.map(|lost| (claim, lost)));
        }
        let writing = self.writing.iter().map(|((disk, holder), writing)| LeaseRow {
            lost: writing.lost.clone(),
            ..LeaseRow::new(*disk, holder.clone())
        });
        let mut leases: Vec<_> = writing.collect();
        for ((disk, holder), Awaited { until_seconds, lost, .. }) in &self.awaited {
            let row = LeaseRow::new(*disk, holder.clone());
            leases.push(LeaseRow { until: Some(*until_seconds), lost: lost.clone(), ..row });
        }
        for ((disk, holder), lost) in &self.owed {
            let row = LeaseRow::new(*disk, holder.clone());
            leases.push(LeaseRow { until: Some(0), lost: Some(lost.clone()), ..row });
        }
        leases.sort_by(|one, other| (one.disk, &one.holder).cmp(&(other.disk, &other.holder)));
        leases
    }

    /// Takes out all that is known of some holders.
    fn drop_claims(&mut self, gone: impl Fn(&Claim) -> bool) {
        self.awaited.retain(|claim, _| !gone(claim));
        self.writing.retain(|claim, _| !gone(claim));
        self.owed.retain(|claim, _| !gone(claim));
    }

    fn save_claims(&mut self, media: &dyn Media) -> Result<()> {
        let leases = self.claims();
        self.change(media, |list| list.leases = leases)
    }
}

/// Returns for how long a row still keeps its disk, and until when that is in seconds since 1970; `None` when it is over.
pub(super) fn time_left(lease: &LeaseRow) -> Option<(Duration, u64)> {
    let now = clock::wall_seconds();
    // A clock that was set back makes nobody wait for longer.
    let most = now + RESERVED.as_secs();
    let until = lease.until.map_or(most, |until| until.min(most));
    let left = Duration::from_secs(until.saturating_sub(now));
    (!left.is_zero()).then_some((left, until))
}

/// Returns what is awaited of a row, while its time lasts.
fn awaited(lease: &LeaseRow) -> Option<(Claim, Awaited)> {
    let (left, until_seconds) = time_left(lease)?;
    let awaited = Awaited { until: clock::now() + left, until_seconds, lost: lease.lost.clone() };
    Some(((lease.disk, lease.holder.clone()), awaited))
}

/// Returns what is owed to the holder of a row, when its time is over.
fn owed(lease: LeaseRow) -> Option<(Claim, String)> {
    let over = time_left(&lease).is_none();
    lease.lost.filter(|_| over).map(|lost| ((lease.disk, lease.holder), lost))
}

impl Book {
    pub(super) fn new(media: &Arc<dyn Media>) -> Self {
        Self { media: Arc::clone(media), inner: Mutex::default() }
    }

    /// Returns the list as it is.
    pub(super) fn read(&self) -> Result<ExportList> {
        self.inner.lock().list(&*self.media).cloned()
    }

    /// Returns a number that no export has had.
    pub(super) fn next_id(&self) -> u64 {
        let mut inner = self.inner.lock();
        let known = inner.list(&*self.media).map_or(0, |list| list.last_id);
        let id = known.max(inner.last_id) + 1;
        inner.last_id = id;
        if let Err(error) = inner.change(&*self.media, |list| list.last_id = id) {
            tracing::warn!("that export {id} was there could not be noted, so its number may be used again: {error}");
        }
        id
    }

    /// Keeps an export.
    pub(super) fn add(&self, row: ExportRow) -> Result<()> {
        self.inner.lock().change(&*self.media, |list| list.exports.push(row))
    }

    /// Keeps exports no longer, nor any claim of their holders: all of them, or none.
    pub(super) fn remove(&self, gone: &[(u64, String)]) -> Result<()> {
        let has = |holder: &str| gone.iter().any(|(_, other)| other == holder);
        let mut inner = self.inner.lock();
        inner.change(&*self.media, |list| {
            list.exports.retain(|row| gone.iter().all(|(id, _)| row.id != *id));
            list.leases.retain(|lease| !has(&lease.holder));
        })?;
        inner.drop_claims(|(_, holder)| has(holder));
        Ok(())
    }

    /// Takes out what is gone, after a restart; who was writing to what is left is awaited from now on.
    pub(super) fn restore(&self, exports: Vec<ExportRow>, leases: Vec<LeaseRow>) -> Result<()> {
        let mut inner = self.inner.lock();
        inner.awaited = leases.iter().filter_map(awaited).collect();
        inner.owed = leases.into_iter().filter_map(owed).collect();
        let leases = inner.claims();
        inner.change(&*self.media, |list| {
            list.exports = exports;
            list.leases = leases;
        })
    }

    /// Waits again for a holder that has come and gone without having been there for its clients.
    pub(super) fn await_again(&self, lease: &LeaseRow) {
        let mut inner = self.inner.lock();
        if let Some((claim, awaited)) = awaited(lease) {
            inner.owed.remove(&claim);
            inner.awaited.insert(claim, awaited);
        }
        told(inner.save_claims(&*self.media));
    }

    /// Writes down what may be lost, for a process in which nobody comes back. All else stays as it is.
    pub(super) fn note_losses(&self, leases: Vec<LeaseRow>) -> Result<()> {
        self.inner.lock().change(&*self.media, |list| list.leases = leases)
    }

    /// Notes that a holder has taken a lease.
    pub(super) fn came(&self, disk: DiskId, holder: &str) {
        let mut inner = self.inner.lock();
        let claim = (disk.0, holder.to_owned());
        let lost = inner.awaited.remove(&claim).and_then(|awaited| awaited.lost);
        let lost = inner.owed.remove(&claim).or(lost);
        let writing = inner.writing.entry(claim).or_default();
        writing.count += 1;
        if writing.count == 1 {
            writing.lost = lost;
            told(inner.save_claims(&*self.media));
        }
    }

    /// Notes that a holder has let go; `owes` when it was not told of what may be lost.
    pub(super) fn went(&self, disk: DiskId, holder: &str, owes: bool) {
        let mut inner = self.inner.lock();
        let claim = (disk.0, holder.to_owned());
        // One that was detached is not there any more.
        let left = inner.writing.get_mut(&claim).map_or(0, |writing| {
            writing.count -= 1;
            writing.count
        });
        if left == 0
            && !inner.ending
            && let Some(writing) = inner.writing.remove(&claim)
        {
            inner.owed.extend(writing.lost.filter(|_| owes).map(|lost| (claim, lost)));
            told(inner.save_claims(&*self.media));
        }
    }

    /// Forgets who has not come back in time.
    pub(super) fn purge(&self) {
        let mut inner = self.inner.lock();
        if !inner.ending {
            told(inner.save_claims(&*self.media));
        }
    }

    /// Keeps a disk for a holder no longer, whatever it does with it now; also when all ends.
    pub(super) fn forget(&self, disk: DiskId, holder: &str) {
        let mut inner = self.inner.lock();
        let claim = (disk.0, holder.to_owned());
        inner.drop_claims(|other| *other == claim);
        // Nothing was noted where nothing was ever read.
        if inner.list.is_some() {
            told(inner.save_claims(&*self.media));
        }
    }

    /// Returns who is awaited, with what, and for how long.
    pub(super) fn awaited(&self) -> Vec<(DiskId, String, Duration)> {
        let (inner, now) = (self.inner.lock(), clock::now());
        let left = |awaited: &Awaited| awaited.until.saturating_duration_since(now);
        let awaited = inner.awaited.iter().map(|((disk, holder), it)| (DiskId(*disk), holder.clone(), left(it)));
        let mut awaited: Vec<_> = awaited.filter(|(_, _, left)| !left.is_zero()).collect();
        awaited.sort();
        awaited
    }

    /// Leaves the list as it is for the next server.
    pub(super) fn end(&self) {
        self.inner.lock().ending = true;
    }

    /// Notes, when all has ended, who has been told of what was lost: all for whom `owes` does not hold.
    pub(super) fn note_told(&self, owes: impl Fn(DiskId, &str) -> bool) {
        let mut inner = self.inner.lock();
        for ((disk, holder), writing) in &mut inner.writing {
            if !owes(DiskId(*disk), holder) {
                writing.lost = None;
            }
        }
        // Nothing was changed where nothing was ever read.
        if inner.list.is_some() {
            told(inner.save_claims(&*self.media));
        }
    }
}

/// A client is served all the same: it only has no claim after a restart.
fn told(saved: Result<()>) {
    if let Err(error) = saved {
        tracing::warn!("who writes to which disk could not be noted for a restart: {error}");
    }
}

/// Returns the error for a list that a request without a server wants to serve.
pub(super) fn no_server() -> Error {
    Error::failed("no server is running on this pool")
        .hint("'afterimage serve' starts one for a disk, 'afterimage mount' for the whole pool")
}

/// Returns the error for what comes too late.
pub(super) fn ending() -> Error {
    Error::busy("the server is ending").hint("the next one can be asked")
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

    fn rows(media: &Arc<dyn Media>) -> Vec<LeaseRow> {
        ExportList::read(&**media).unwrap().leases
    }

    fn claims(media: &Arc<dyn Media>) -> Vec<(u64, String)> {
        rows(media).into_iter().map(|row| (row.disk, row.holder)).collect()
    }

    /// What the next process makes of what this one left.
    fn restored(media: &Arc<dyn Media>) -> Book {
        let book = Book::new(media);
        let list = book.read().unwrap();
        book.restore(list.exports, list.leases).unwrap();
        book
    }

    #[test]
    fn a_holder_is_noted_while_it_writes_and_when_the_server_ends_first() {
        let (media, book) = book();
        let a = || (7, "a".to_owned());
        book.came(DiskId(7), "a");
        book.came(DiskId(7), "a");
        assert_eq!(claims(&media), [a()]);
        book.went(DiskId(7), "a", false);
        assert_eq!(claims(&media), [a()]);
        book.went(DiskId(7), "a", false);
        assert_eq!(claims(&media), []);
        book.came(DiskId(7), "a");
        book.end();
        book.went(DiskId(7), "a", false);
        assert_eq!(claims(&media), [a()]);
    }

    #[test]
    fn who_does_not_come_back_in_time_is_forgotten() {
        let (media, first) = book();
        first.came(DiskId(7), "a");
        first.came(DiskId(8), "b");
        first.end();
        let book = restored(&media);
        book.came(DiskId(8), "b");
        book.purge();
        assert_eq!(claims(&media).len(), 2, "its minute is not over");
        for awaited in book.inner.lock().awaited.values_mut() {
            awaited.until = clock::now();
        }
        book.purge();
        assert_eq!(claims(&media), [(8, "b".to_owned())]);
    }

    #[test]
    fn a_minute_is_the_same_one_after_another_restart() {
        let (media, first) = book();
        first.came(DiskId(7), "a");
        assert_eq!(rows(&media)[0].until, None, "it writes");
        let until = restored(&media).read().unwrap().leases[0].until;
        assert!(until.is_some());
        let mut list = restored(&media).read().unwrap();
        assert_eq!(list.leases[0].until, until);
        list.leases[0].until = Some(clock::wall_seconds());
        list.write(&*media).unwrap();
        restored(&media);
        assert_eq!(rows(&media), []);
    }

    #[test]
    fn a_loss_is_noted_until_it_is_told() {
        let (media, first) = book();
        first.came(DiskId(7), "a");
        let lost = |book: &Book| book.read().unwrap().leases[0].lost.clone();
        let book = Book::new(&media);
        let mut list = book.read().unwrap();
        list.leases[0].lost = Some("a kill".into());
        book.note_losses(list.leases).unwrap();
        let book = restored(&media);
        assert_eq!(lost(&book).as_deref(), Some("a kill"));
        book.came(DiskId(7), "a");
        assert_eq!(lost(&book).as_deref(), Some("a kill"), "it has come and was not told");
        book.note_told(|_, _| true);
        assert_eq!(lost(&book).as_deref(), Some("a kill"));
        book.note_told(|_, _| false);
        assert_eq!(lost(&book), None);
    }

    /// The note was dropped when its holder let go or its minute was over, and a process that closed the pool in order then
    /// made it look as if all were well.
    #[test]
    fn a_loss_is_not_forgotten_when_its_holder_lets_go_or_comes_too_late() {
        let (media, first) = book();
        let lost = Some("a kill".to_owned());
        let leases = ["a", "b"].map(|holder| LeaseRow { lost: lost.clone(), ..LeaseRow::new(7, holder.into()) });
        first.restore(Vec::new(), leases.into()).unwrap();
        first.came(DiskId(7), "a");
        first.went(DiskId(7), "a", true);
        first.inner.lock().awaited.values_mut().for_each(|awaited| awaited.until = clock::now());
        first.purge();
        for _ in 0..2 {
            let book = restored(&media);
            assert_eq!(book.awaited(), [], "nothing is kept for them");
            let rows = book.read().unwrap().leases;
            assert!(rows.len() == 2 && rows.iter().all(|row| row.lost == lost && time_left(row).is_none()), "{rows:?}");
        }
        let book = restored(&media);
        for holder in ["a", "b"] {
            book.came(DiskId(7), holder);
        }
        assert!(rows(&media).iter().all(|row| row.lost == lost && row.until.is_none()), "they were not told yet");
        book.went(DiskId(7), "a", false);
        assert_eq!(claims(&media), [(7, "b".to_owned())]);
        book.went(DiskId(7), "b", true);
        book.forget(DiskId(7), "b");
        assert_eq!(claims(&media), []);
    }

    #[test]
    fn who_is_forgotten_has_no_claim_although_the_server_ends() {
        let (media, book) = book();
        book.came(DiskId(7), "a");
        book.came(DiskId(8), "a");
        book.end();
        book.forget(DiskId(7), "a");
        book.went(DiskId(7), "a", false);
        book.went(DiskId(8), "a", false);
        assert_eq!(claims(&media), [(8, "a".to_owned())]);
    }

    #[test]
    fn a_number_is_given_out_once_and_detaching_ends_every_claim() {
        let (media, first) = book();
        assert_eq!((first.next_id(), first.next_id()), (1, 2));
        first.came(DiskId(7), "a");
        first.came(DiskId(8), "b");
        let book = restored(&media);
        assert_eq!(book.next_id(), 3);
        book.came(DiskId(8), "b");
        book.remove(&[(1, "a".to_owned()), (2, "b".to_owned())]).unwrap();
        assert_eq!(claims(&media), []);
        book.went(DiskId(8), "b", false);
        book.purge();
        assert_eq!(claims(&media), []);
    }
}
