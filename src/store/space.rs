//! Watches the room on the host file system, so that a full one is met by refusing new data, never by losing any.
//!
//! # Rules
//! 1. New blocks are refused below a low-water mark; metadata, deletes and retires go on below it.
//! 2. The host is asked only every so many bytes: a credit is handed out and used up. It is never more than a quarter of
//!    what was free above the mark, so that several writers cannot overrun it.
//! 3. What a quota is compared with is what the tables count and what was granted since ([`super::Head`]): each new block is
//!    in exactly one of them, from the moment at which it is allowed.
//! 4. A preallocated ballast file is given up when even metadata finds no room, and made again when there is room.

use std::fmt;
use std::sync::atomic::{AtomicI64, Ordering};

use super::Store;
use super::settings::EnospcPolicy;
use crate::error::{Error, Kind, Result};
use crate::media::{Media, Open, Space};
use crate::pool::BALLAST;
use crate::units::{BLOCK_SIZE, DiskId, show_size};

/// Bytes of the ballast.
pub(super) const BALLAST_SIZE: u64 = 16 << 20;
const CREDIT_MAX: u64 = 64 << 20;

/// The room on the host file system, as users of the pool have it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Room {
    /// Bytes of the whole file system.
    pub total: u64,
    /// Bytes that are free.
    pub free: u64,
    /// Of them, bytes that are kept for deleting and for metadata.
    pub kept: u64,
}

impl Room {
    /// Returns the bytes that new data may still take.
    #[must_use]
    pub fn available(&self) -> u64 {
        self.free.saturating_sub(self.kept)
    }

    /// Returns why no new data is taken; `None` while some is.
    #[must_use]
    pub fn full(&self) -> Option<String> {
        (self.available() < BLOCK_SIZE).then(|| {
            format!(
                "the host file system is full: {} are free, and the last {} are kept for deleting and for metadata",
                show_size(self.free),
                show_size(self.kept)
            )
        })
    }
}

/// Why a write failed: so many bytes were not granted.
#[derive(Debug)]
struct NoRoom {
    bytes: u64,
}

impl fmt::Display for NoRoom {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "there is no room for {} bytes", self.bytes)
    }
}

impl std::error::Error for NoRoom {}

/// Credit for new blocks.
#[derive(Debug, Default)]
pub(super) struct SpaceGuard {
    credit: AtomicI64,
}

impl Store {
    /// Returns the room on the host file system.
    ///
    /// # Errors
    /// Any error of the host.
    pub fn space(&self) -> Result<Space> {
        self.media.space().map_err(|e| Error::io("cannot ask the host file system for its room", e))
    }

    /// Returns the room on the host file system, and how much of it is kept back.
    ///
    /// # Errors
    /// Any error of the host.
    pub fn room(&self) -> Result<Room> {
        let space = self.space()?;
        Ok(Room { total: space.total, free: space.free, kept: self.low_water(space) })
    }

    pub(super) fn low_water(&self, space: Space) -> u64 {
        self.options.low_water.unwrap_or_else(|| low_water(space.total))
    }

    /// Takes room for new blocks, or fails.
    ///
    /// # Errors
    /// `NoSpace` when the host is below the low-water mark.
    fn take_room(&self, bytes: u64) -> Result<()> {
        let want = i64::try_from(bytes).expect("a write is bounded");
        if self.space.credit.fetch_sub(want, Ordering::Relaxed) >= want {
            return Ok(());
        }
        let room = self.room()?;
        let above = room.available();
        if above < bytes {
            self.space.credit.store(0, Ordering::Relaxed);
            let why = room.full().unwrap_or_else(|| {
                format!("the host file system has room for {} more, not for {}", show_size(above), show_size(bytes))
            });
            return Err(Error::no_space(why).hint("delete snapshots or make room on the host"));
        }
        let credit = i64::try_from((above / 4).min(CREDIT_MAX)).expect("bounded");
        self.space.credit.store(credit, Ordering::Relaxed);
        Ok(())
    }

    /// Counts bytes as granted, also where there is no quota yet; or fails, and counts nothing.
    fn take_quota(&self, id: DiskId, bytes: u64) -> Result<()> {
        let head = self.head(id)?;
        let tables = self.tables.read();
        let quota = tables.disk(id)?.settings.quota;
        head.settle(0, bytes);
        // Both at one moment: what a flush moves from the one to the other, it moves under the lock of the tables.
        let granted = u64::try_from(head.granted.load(Ordering::Acquire)).unwrap_or(0);
        let held = tables.held(id) * BLOCK_SIZE + granted.saturating_sub(bytes);
        let Some(quota) = quota.filter(|quota| held + bytes > *quota) else { return Ok(()) };
        head.settle(bytes, 0);
        Err(Error::no_space(format!(
            "the disk and its snapshots hold {}, which is the quota of {}",
            show_size(held),
            show_size(quota)
        ))
        .hint("delete snapshots of the disk, or raise it with `afterimage set DISK quota=SIZE`"))
    }

    /// Takes back what [`Store::room_for`] allowed and was not used.
    pub fn not_used(&self, id: DiskId, bytes: u64) {
        if let Ok(head) = self.head(id) {
            head.settle(bytes, 0);
        }
    }

    /// Takes room for new blocks of a disk. Never waits: whoever may, asks [`Store::lacks_room`] about the failure. Whoever is
    /// allowed it settles with [`super::Head::settle`] what it really wrote.
    ///
    /// # Errors
    /// `NoSpace` when the host is full or the quota of the disk used up.
    pub fn room_for(&self, id: DiskId, bytes: u64) -> Result<()> {
        let room =
            self.take_quota(id, bytes).and_then(|()| self.take_room(bytes).inspect_err(|_| self.not_used(id, bytes)));
        room.map_err(|error| if error.kind() == Kind::NoSpace { error.because(NoRoom { bytes }) } else { error })
    }

    /// Returns for how much room a write that failed is to wait, if it failed for want of room and the disk says so.
    pub fn lacks_room(&self, id: DiskId, error: &Error) -> Option<u64> {
        let bytes = std::error::Error::source(error)?.downcast_ref::<NoRoom>()?.bytes;
        let waits = self.tables.read().disk(id).is_ok_and(|row| row.settings.enospc == EnospcPolicy::Wait);
        waits.then_some(bytes)
    }

    /// Folds, giving up the ballast if the catalog finds no room.
    ///
    /// # Errors
    /// `NoSpace` when that was not enough; other errors have poisoned the pool.
    pub fn fold(&self) -> Result<bool> {
        self.ledger.fold()
    }

    /// Removes the ballast, for something that found no room. Returns false when it is gone already.
    pub fn give_up_ballast(&self, error: &Error) -> bool {
        let removed = self.media.remove(BALLAST).is_ok();
        if removed {
            tracing::warn!("the host file system is full; the ballast is given up: {error}");
        }
        removed
    }

    /// Makes the ballast again when there is plenty of room.
    pub fn restore_ballast(&self) {
        let plenty = self.space().is_ok_and(|space| space.free > 2 * self.low_water(space) + BALLAST_SIZE);
        if plenty && self.media.open(BALLAST, Open::ReadOnly).is_err() {
            // Best effort: without it the pool works, only less room is kept for a full host.
            if let Err(error) = make_ballast(&*self.media, self.options.ballast) {
                tracing::debug!("the ballast could not be made: {error}");
            }
        }
    }
}

/// Returns how much of a file system of `total` bytes is kept free of new data.
pub(super) fn low_water(total: u64) -> u64 {
    (256u64 << 20).max(total / 100)
}

/// Writes the ballast file.
///
/// # Errors
/// Any error of the host; what was written of it is removed.
pub(super) fn make_ballast(media: &dyn Media, bytes: u64) -> std::io::Result<()> {
    let file = media.open(BALLAST, Open::New)?;
    let zeros = vec![0u8; 1 << 20];
    let mut at = 0;
    while at < bytes {
        let part = &zeros[..usize::try_from((bytes - at).min(1 << 20)).expect("at most 1 MiB")];
        if let Err(error) = file.write_at(part, at) {
            media.remove(BALLAST)?;
            return Err(error);
        }
        at += part.len() as u64;
    }
    file.sync()
}
