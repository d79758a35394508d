//! What the newest readable catalog and the end of the journal say about names and fates.
//!
//! A catalog that frames are missing after is out of date, so it is believed only where nothing else is known: names,
//! settings, identities. The unbroken line of frames at the end of the journal is how things are: what it says of a row is
//! the last that was said.

use std::collections::{BTreeMap, BTreeSet};

use super::super::journal::Survey;
use super::super::rows::{Key, KeyParts, Meta, Table};
use super::super::states::{DiskRow, StateRow};
use super::source::Source;
use crate::error::Result;
use crate::units::{DiskId, Epoch};

/// Rows of the small tables, as far as they are known.
#[derive(Default)]
pub(super) struct Hints {
    /// The largest ids seen.
    pub(super) meta: Meta,
    /// Disks.
    pub(super) disks: BTreeMap<DiskId, DiskRow>,
    /// Of them, those whose row is in the journal: it is how the disk was in the end.
    pub(super) current: BTreeSet<DiskId>,
    /// Disks that the journal removes.
    pub(super) removed: BTreeSet<DiskId>,
    /// States.
    pub(super) states: BTreeMap<Epoch, StateRow>,
    /// States that the journal deletes.
    pub(super) deleted: BTreeSet<Epoch>,
    /// The newest frame.
    pub(super) lsn: u64,
    /// Frames that were read.
    pub(super) frames: u64,
}

impl Hints {
    pub(super) fn gather(source: Option<&Source>, survey: Option<&Survey>) -> Result<Self> {
        let mut hints = Self::default();
        if let Some(source) = source {
            hints.lsn = source.mark.lsn;
            source.each(&mut |key, value| hints.take(&key, Some(&value), false))?;
        }
        let Some(survey) = survey else { return Ok(hints) };
        let (Some(first), Some(last)) = (survey.first_of_line(), survey.last()) else { return Ok(hints) };
        hints.lsn = hints.lsn.max(last);
        for lsn in first..=last {
            hints.frames += 1;
            for row in survey.rows(lsn)? {
                hints.take(&row.key, row.value.as_deref(), true)?;
            }
        }
        Ok(hints)
    }

    fn take(&mut self, key: &Key, value: Option<&[u8]>, current: bool) -> Result<()> {
        let small = [Table::Meta, Table::Disk, Table::State].iter().any(|table| key.is_of(*table));
        if !small {
            return Ok(());
        }
        match (key.parts()?, value) {
            (KeyParts::Meta, Some(value)) => self.meta = most(&self.meta, &Meta::decode(value)?),
            (KeyParts::Disk(id), Some(value)) => {
                self.disks.insert(id, DiskRow::decode(value)?);
                self.removed.remove(&id);
                if current {
                    self.current.insert(id);
                }
            }
            (KeyParts::Disk(id), None) => {
                self.disks.remove(&id);
                self.removed.insert(id);
            }
            (KeyParts::State(_, epoch), Some(value)) => {
                self.states.insert(epoch, StateRow::decode(value)?);
                self.deleted.remove(&epoch);
            }
            (KeyParts::State(_, epoch), None) => {
                self.states.remove(&epoch);
                self.deleted.insert(epoch);
            }
            _ => {}
        }
        Ok(())
    }
}

/// The larger of each id.
pub(super) fn most(a: &Meta, b: &Meta) -> Meta {
    Meta {
        disk: a.disk.max(b.disk),
        branch: a.branch.max(b.branch),
        epoch: a.epoch.max(b.epoch),
        snapshot: a.snapshot.max(b.snapshot),
        segment: a.segment.max(b.segment),
        openings: a.openings.max(b.openings),
        clean: true,
    }
}
