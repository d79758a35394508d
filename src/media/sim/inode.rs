//! One simulated file: what a reader sees, what the disk holds, and the changes in between.
//!
//! # Rules
//! 1. The durable image plus all pending changes, in order, is the volatile image. The one exception follows a failed
//!    sync: its changes are neither pending nor durable, while readers still see them (Linux keeps such pages as clean).
//! 2. A sync costs as much as there are pending changes, never as much as the file is long.
//! 3. A crash keeps any subset of the pending changes, each whole or torn at 512-byte sectors; a sector is atomic. What
//!    survives is applied in program order, and the length covers every surviving byte.

use std::sync::Arc;

use super::image::{Image, PAGE, split};
use super::rng::Rng;

/// Bytes that a disk writes whole or not at all.
const SECTOR: u64 = 512;

/// A change that no sync has made durable yet.
#[derive(Debug, Clone)]
enum Change {
    Write { offset: u64, data: Arc<[u8]> },
    Punch { offset: u64, len: u64 },
    SetLen(u64),
}

impl Change {
    fn apply(&self, image: &mut Image) {
        match self {
            Self::Write { offset, data } => image.write(data, *offset),
            Self::Punch { offset, len } => image.punch(*offset, *len),
            Self::SetLen(len) => image.set_len(*len),
        }
    }

    /// Applies the part of it that the dice let through.
    fn tear(&self, image: &mut Image, rng: &mut Rng) {
        match self {
            Self::Write { offset, data } => {
                let mut survived = false;
                for (at, piece) in split(*offset, data.len(), SECTOR) {
                    if rng.coin() {
                        image.write(&data[piece], at);
                        survived = true;
                    }
                }
                // The new length may be on disk while its last sectors are not: they read as zeros.
                let end = offset + data.len() as u64;
                if survived && rng.coin() && end > image.len() {
                    image.set_len(end);
                }
            }
            Self::Punch { offset, len } => {
                // File systems free a long range in several transactions, from the front.
                let end = (offset + len).min(image.len().next_multiple_of(PAGE));
                let pages = end.saturating_sub(*offset) / PAGE;
                let freed = rng.below(pages + 1) * PAGE;
                image.punch(*offset, freed);
            }
            Self::SetLen(len) => {
                if rng.coin() {
                    image.set_len(*len);
                }
            }
        }
    }
}

/// A file without its name.
#[derive(Debug, Clone, Default)]
pub(super) struct Inode {
    volatile: Image,
    durable: Image,
    pending: Vec<Change>,
    /// A sync failed, and readers see what will never be on the disk.
    failed: bool,
    /// Cloned into each open handle, so that a file without a name lives as long as somebody has it open.
    pub(super) held: Arc<()>,
    /// Has a volatile name, so its pages count.
    pub(super) named: bool,
}

impl Inode {
    /// Makes an empty file that has just got its name.
    pub(super) fn named() -> Self {
        Self { named: true, ..Self::default() }
    }

    /// Returns what readers see.
    pub(super) fn image(&self) -> &Image {
        &self.volatile
    }

    /// Writes; what may survive is whole sectors, as the page cache has them: a disk never gets a part of one.
    pub(super) fn write(&mut self, data: &[u8], offset: u64) {
        self.volatile.write(data, offset);
        let start = offset / SECTOR * SECTOR;
        let end = (offset + data.len() as u64).next_multiple_of(SECTOR).min(self.volatile.len());
        let mut sectors = vec![0; usize::try_from(end.saturating_sub(start)).expect("in memory")];
        self.volatile.read(&mut sectors, start);
        self.pending.push(Change::Write { offset: start, data: sectors.into() });
    }

    pub(super) fn punch(&mut self, offset: u64, len: u64) {
        self.change(Change::Punch { offset, len });
    }

    pub(super) fn set_len(&mut self, len: u64) {
        self.change(Change::SetLen(len));
    }

    fn change(&mut self, change: Change) {
        change.apply(&mut self.volatile);
        self.pending.push(change);
    }

    /// Makes every pending change durable.
    pub(super) fn sync(&mut self) {
        let mut touched = Vec::new();
        for change in self.pending.drain(..) {
            match change {
                Change::Write { offset, data } if !data.is_empty() => {
                    touched.extend(offset / PAGE..=(offset + data.len() as u64 - 1) / PAGE);
                }
                Change::Write { .. } => {}
                Change::Punch { offset, len } => {
                    self.durable.forget(offset / PAGE, (offset + len).div_ceil(PAGE));
                    touched.extend([offset / PAGE, (offset + len) / PAGE]);
                }
                Change::SetLen(len) => {
                    self.durable.forget(len / PAGE, u64::MAX);
                    touched.push(len / PAGE);
                }
            }
        }
        self.durable.set_len(self.volatile.len());
        // A page that no change touched is the same on both sides; one that a change dropped and none brought back is
        // in neither. So the touched pages are all there is to do.
        for index in touched {
            self.durable.share_page(index, &self.volatile);
        }
    }

    /// Fails a sync: the changes will never reach the disk, but readers keep seeing them until the crash.
    pub(super) fn lose_pending(&mut self) {
        self.pending.clear();
        self.failed = true;
    }

    /// Whoever opens the file next finds what is on the disk in place of what a failed sync has lost, because opening it
    /// drops what the cache has as clean; what waits for a sync stays.
    pub(super) fn reopen(&mut self) {
        if std::mem::take(&mut self.failed) {
            self.volatile = self.durable.clone();
            self.pending.iter().for_each(|change| change.apply(&mut self.volatile));
        }
    }

    /// Loses power: what the dice let through becomes both the durable and the volatile image.
    pub(super) fn crash(&mut self, rng: &mut Rng) {
        let changes = std::mem::take(&mut self.pending);
        let image = &mut self.durable;
        match rng.below(4) {
            0 => {}
            1 => changes.iter().for_each(|change| change.apply(image)),
            2 => {
                let (whole, rest) = changes.split_at(rng.up_to(changes.len()));
                whole.iter().for_each(|change| change.apply(image));
                if let Some(torn) = rest.first() {
                    torn.tear(image, rng);
                }
            }
            _ => {
                for change in &changes {
                    match rng.below(3) {
                        0 => {}
                        1 => change.apply(image),
                        _ => change.tear(image, rng),
                    }
                }
            }
        }
        self.volatile = self.durable.clone();
        self.held = Arc::default();
    }

    /// Damages both images alike.
    pub(super) fn damage(&mut self, harm: impl Fn(&mut Image)) {
        harm(&mut self.volatile);
        harm(&mut self.durable);
    }
}
