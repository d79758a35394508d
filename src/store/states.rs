//! The rows that have names: disks, and the ended epochs of their trees (snapshots, ghosts, the dying).

use uuid::Uuid;

use super::rows::{checked_size, checked_stamp, read_uuid};
use super::settings::Settings;
use crate::codec::{Reader, Writer, unseal};
use crate::error::{Error, Result};
use crate::units::{BlockAddress, BranchId, DiskId, Epoch, SnapshotId};

/// A disk, and where its live state stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskRow {
    /// Its name.
    pub name: String,
    /// Its identity, kept over renames.
    pub uuid: Uuid,
    /// Bytes.
    pub size: u64,
    /// Whether blocks beyond the size may still be mapped, after a shrink.
    pub trim: bool,
    /// The branch that is being written.
    pub branch: BranchId,
    /// The epoch that is being written.
    pub epoch: Epoch,
    /// The state the epoch began as; `None` for a disk that began empty.
    pub base: Option<(BranchId, Epoch)>,
    /// Addresses below were born in earlier epochs and must not be overwritten; 0 when none are.
    pub floor: u64,
    /// Seconds since 1970 when it was made.
    pub created: u64,
    /// Seconds since 1970 of the last frame that changed its map.
    pub modified: u64,
    /// The last stamp that an epoch of the lineage got, as this disk knows it; stamps grow, in the whole pool.
    pub stamp: u64,
    /// Blocks mapped.
    pub referenced: u64,
    /// At most so many of them are born in the current epoch, or in earlier ones of snapshots that were deleted since: see `heirs`.
    pub written: u64,
    /// What it was cloned from, for people.
    pub origin: Option<String>,
    /// Whether anything was ever written, discarded or cloned into it.
    pub touched: bool,
    /// What the user set.
    pub settings: Settings,
}

impl DiskRow {
    /// Makes the row of a disk that was never written, at the beginning of a branch.
    #[must_use]
    pub fn fresh(name: String, uuid: Uuid, size: u64, created: u64) -> Self {
        Self {
            name,
            uuid,
            size,
            trim: false,
            branch: BranchId::default(),
            epoch: Epoch::default(),
            base: None,
            floor: 0,
            created,
            modified: created,
            stamp: 0,
            referenced: 0,
            written: 0,
            origin: None,
            touched: false,
            settings: Settings::default(),
        }
    }

    /// Returns the stored value.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Writer::new();
        let base = self.base.unwrap_or_default();
        out.text(&self.name).raw(self.uuid.as_bytes()).u64(self.size).u8(u8::from(self.trim));
        out.u64(self.branch.0).u64(self.epoch.0);
        out.u8(u8::from(self.base.is_some())).u64(base.0.0).u64(base.1.0).u64(self.floor);
        out.u64(self.created).u64(self.modified).u64(self.stamp).u64(self.referenced).u64(self.written);
        out.text(self.origin.as_deref().unwrap_or("")).u8(u8::from(self.touched));
        self.settings.encode(&mut out);
        out.sealed()
    }

    /// Takes a stored value apart.
    ///
    /// # Errors
    /// `Corrupt`.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        let what = "a disk row of the catalog";
        let mut from = Reader::new(what, unseal(what, bytes)?);
        let name = from.text()?;
        let uuid = read_uuid(&mut from)?;
        let (size, trim) = (checked_size(from.u64()?)?, from.flag()?);
        let (branch, epoch) = (BranchId(from.u64()?), Epoch(from.u64()?));
        let has_base = from.flag()?;
        let base = (BranchId(from.u64()?), Epoch(from.u64()?));
        let row = Self {
            name,
            uuid,
            size,
            trim,
            branch,
            epoch,
            base: has_base.then_some(base),
            floor: from.u64()?,
            created: from.u64()?,
            modified: from.u64()?,
            stamp: from.u64()?,
            referenced: from.u64()?,
            written: from.u64()?,
            origin: Some(from.text()?).filter(|o| !o.is_empty()),
            touched: from.flag()?,
            settings: Settings::decode(&mut from)?,
        };
        from.end()?;
        if !has_base && base != <(BranchId, Epoch)>::default() {
            return Err(Error::corrupt(format!("{what} has a base and says that it has none")));
        }
        Ok(row)
    }

    /// Tells whether an address was born in the current epoch, so that it may be overwritten in place.
    #[must_use]
    pub fn owns(&self, address: BlockAddress) -> bool {
        address.raw() >= self.floor
    }
}

/// What an ended epoch is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Status {
    /// A snapshot that can be read.
    Live = 1,
    /// A snapshot the program took for itself: read like a live one, not listed.
    Hidden = 2,
    /// A retired snapshot whose record is still to be written: its entries are the record. It is not read any more.
    Retired = 3,
    /// Deleted; its data is being given back.
    Dying = 4,
    /// Deleted, with two or more children: no data of its own, but it ties the tree together.
    Ghost = 5,
}

impl Status {
    fn from_u8(value: u8) -> Option<Self> {
        [Self::Live, Self::Hidden, Self::Retired, Self::Dying, Self::Ghost].into_iter().find(|s| *s as u8 == value)
    }

    /// Tells whether the state can be read.
    #[must_use]
    pub fn readable(self) -> bool {
        matches!(self, Self::Live | Self::Hidden)
    }

    /// Tells whether the state has all its data: also while its record is not written yet.
    #[must_use]
    pub fn whole(self) -> bool {
        matches!(self, Self::Live | Self::Hidden | Self::Retired)
    }
}

/// An ended epoch that is a node of its lineage's tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StateRow {
    /// What it is.
    pub status: Status,
    /// Id of the snapshot.
    pub snapshot: SnapshotId,
    /// The disk it belongs to.
    pub disk: DiskId,
    /// Its name; empty when it has none any more.
    pub name: String,
    /// Its identity, kept over renames and transfers.
    pub uuid: Uuid,
    /// Bytes of the disk when it was taken.
    pub size: u64,
    /// As [`DiskRow::trim`] then.
    pub trim: bool,
    /// Seconds since 1970 when it was taken.
    pub created: u64,
    /// Stamp of the epoch it ended: whole seconds, unique in the lineage.
    pub stamp: u64,
    /// Blocks mapped.
    pub referenced: u64,
    /// At most so many of them are born in the epoch it ended, or in earlier ones of snapshots that were deleted since: see `heirs`.
    pub written: u64,
    /// Addresses below were born in earlier epochs.
    pub floor: u64,
    /// Whether the seal files of its epoch are written.
    pub sealed: bool,
    /// Why it must not be deleted or retired; tags set by people and by the program.
    pub holds: Vec<String>,
}

impl StateRow {
    /// Returns the stored value.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Writer::new();
        self.write(&mut out);
        out.sealed()
    }

    pub(super) fn write(&self, out: &mut Writer) {
        out.u8(self.status as u8).u64(self.snapshot.0).u64(self.disk.0).text(&self.name).raw(self.uuid.as_bytes());
        self.write_figures(out);
        out.u8(u8::from(self.sealed)).varint(self.holds.len() as u64);
        self.holds.iter().for_each(|tag| {
            out.text(tag);
        });
    }

    /// Writes what a state measures: the fields that rows and retired records have alike.
    pub fn write_figures(&self, out: &mut Writer) {
        out.u64(self.size).u8(u8::from(self.trim)).u64(self.created).u64(self.stamp);
        out.u64(self.referenced).u64(self.written).u64(self.floor);
    }

    /// Reads the fields that [`StateRow::write_figures`] puts, of a state that is known: retired, sealed, without holds.
    ///
    /// # Errors
    /// `Corrupt`.
    pub fn read_figures(
        from: &mut Reader<'_>,
        snapshot: SnapshotId,
        disk: DiskId,
        name: String,
        uuid: Uuid,
    ) -> Result<Self> {
        Ok(Self {
            status: Status::Retired,
            snapshot,
            disk,
            name,
            uuid,
            size: checked_size(from.u64()?)?,
            trim: from.flag()?,
            created: from.u64()?,
            stamp: checked_stamp(from.u64()?)?,
            referenced: from.u64()?,
            written: from.u64()?,
            floor: from.u64()?,
            sealed: true,
            holds: Vec::new(),
        })
    }

    /// Takes a stored value apart.
    ///
    /// # Errors
    /// `Corrupt`.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        let what = "a state row of the catalog";
        let mut from = Reader::new(what, unseal(what, bytes)?);
        let row = Self::read(what, &mut from)?;
        from.end()?;
        Ok(row)
    }

    /// Reads the fields, as [`StateRow::write`] puts them.
    pub(super) fn read(what: &str, from: &mut Reader<'_>) -> Result<Self> {
        let status =
            Status::from_u8(from.u8()?).ok_or_else(|| Error::corrupt(format!("{what} has an unknown status")))?;
        let (snapshot, disk) = (SnapshotId(from.u64()?), DiskId(from.u64()?));
        let (name, uuid) = (from.text()?, read_uuid(from)?);
        let mut row = Self { status, ..Self::read_figures(from, snapshot, disk, name, uuid)? };
        row.sealed = from.flag()?;
        for _ in 0..from.varint()? {
            row.holds.push(from.text()?);
        }
        Ok(row)
    }
}
