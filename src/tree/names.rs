//! Looking up, listing, making, removing and renaming: what the directories of the tree answer.
//!
//! A file in `disks/` is a disk, one in `snapshots/NAME/` a snapshot, so making, removing and renaming files does that
//! to disks and snapshots. Directories come and go with disks and cannot be made or removed.
//!
//! # Rules
//! 1. Nothing that exists is ever replaced by a rename or a creation.
//! 2. What leaves its kind is refused with EPERM, never EXDEV: `mv` would copy and delete. A snapshot may go to `retired/`
//!    under its name, which retires it.
//! 3. `rm` takes no snapshots with it.

use std::ffi::OsStr;

use super::about::ABOUT;
use super::errno::{Answer, Errno};
use super::extent::{self, Cut};
use super::node::{self, DISK_NAME_MAX, Node, SNAPSHOT_NAME_MAX, Sort};
use super::state::{Attr, Tree};
use crate::disk;
use crate::error::{Error, Kind};
use crate::snapshot;
use crate::units::DiskId;

/// One line of a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// What it is.
    pub node: Node,
    /// Its name.
    pub name: String,
}

/// What a directory has, as of the moment in which it began to be read.
#[derive(Debug, Clone)]
pub enum Listing {
    /// These, the two dots first.
    Names(Vec<Entry>),
    /// The extent files of a snapshot, behind the two dots: a disk has up to 33 million, so they are made one by one.
    Extents(Cut),
}

impl Default for Listing {
    fn default() -> Self {
        Self::Names(Vec::new())
    }
}

/// What a creation did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Created {
    /// The file.
    pub attr: Attr,
    /// False when it was there already.
    pub new: bool,
}

/// What renameat2(2) was asked for beside the names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RenameHow {
    /// RENAME_EXCHANGE or RENAME_WHITEOUT or one not known here.
    pub exotic: bool,
}

impl Tree {
    /// Finds a name in a directory.
    ///
    /// # Errors
    /// ENOENT, ENOTDIR, or ESTALE when the directory itself is gone.
    pub fn lookup(&self, parent: u64, name: &OsStr) -> Answer<Attr> {
        match self.node(parent)? {
            Node::Root => {
                let found = TOP.iter().find(|(_, top)| name == *top).ok_or(Errno::ENOENT)?;
                self.attr(found.0.ino())
            }
            Node::Disks => {
                let name = node::named(name).ok_or(Errno::ENOENT)?;
                Ok(self.disk_attr(&self.store.disk_info(name)?))
            }
            Node::Snapshots => {
                let name = name.to_str().ok_or(Errno::ENOENT)?;
                Ok(self.snapshots_of_attr(&self.store.disk_info(name)?))
            }
            Node::SnapshotsOf(id) => Ok(Self::snapshot_attr(&self.snapshot_named(id, name)?)),
            node if node.is_of_checkpoints() => self.checkpoint_lookup(node, name),
            node => self.export_lookup(node, name),
        }
    }

    /// Lists a directory, `.` and `..` first.
    ///
    /// # Errors
    /// ENOTDIR, or ESTALE when it is gone.
    pub fn list(&self, ino: u64) -> Answer<Listing> {
        let node = self.node(ino)?;
        let (parent, mut entries) = match node {
            Node::Root => {
                let fixed = TOP.iter().map(|(node, name)| Entry { node: *node, name: (*name).into() });
                (Node::Root, fixed.collect::<Vec<_>>())
            }
            Node::Disks => {
                let all = self.store.disks().into_iter();
                (Node::Root, all.map(|d| Entry { node: Node::Disk(d.id), name: node::file_name(&d.name) }).collect())
            }
            Node::Snapshots => {
                let all = self.store.disks().into_iter();
                (Node::Root, all.map(|d| Entry { node: Node::SnapshotsOf(d.id), name: d.name }).collect())
            }
            Node::SnapshotsOf(id) => {
                let all = self.live_snapshots(id)?.into_iter();
                let entries = all.map(|s| Entry { node: Node::Snapshot(s.id), name: node::file_name(&s.name) });
                (Node::Snapshots, entries.collect())
            }
            Node::Extents(id) => return Ok(Listing::Extents(self.cut(id)?)),
            node if node.is_of_checkpoints() => self.checkpoint_list(node)?,
            node => self.export_list(node)?,
        };
        let dots = [Entry { node, name: ".".into() }, Entry { node: parent, name: "..".into() }];
        entries.splice(0..0, dots);
        Ok(Listing::Names(entries))
    }

    /// Returns an entry of a listing by its place; `None` behind the last.
    ///
    /// # Errors
    /// EIO when the map cannot be read, ESTALE when the snapshot has gone.
    pub fn entry_at(&self, listing: &Listing, place: usize) -> Answer<Option<Entry>> {
        match (listing, place) {
            (Listing::Names(entries), place) => Ok(entries.get(place).cloned()),
            (Listing::Extents(cut), 0) => Ok(Some(Entry { node: Node::Extents(cut.id), name: ".".into() })),
            (Listing::Extents(cut), 1) => Ok(Some(Entry { node: self.parent_of(cut), name: "..".into() })),
            (Listing::Extents(cut), place) => {
                let Some(slot) = cut.slot(place as u64 - 2) else {
                    let about = self.only.is_some() && (place == 2 || cut.slot(place as u64 - 3).is_some());
                    return Ok(about.then(|| Entry { node: Node::About, name: ABOUT.into() }));
                };
                let node = self.extent_node(cut, slot)?.0;
                Ok(Some(Entry { node, name: extent::name(slot) }))
            }
        }
    }

    /// Returns the attributes of an entry of a listing, or `None` if the name stands for something else by now.
    #[must_use]
    pub fn listed(&self, listing: &Listing, entry: &Entry) -> Option<Attr> {
        if let Listing::Extents(cut) = listing
            && let Some(slot) = cut.named(&entry.name)
        {
            return self.extent_attr(cut, slot).ok();
        }
        match entry.node {
            Node::Disk(id) => {
                let info = self.store.disk_info_by_id(id).ok()?;
                (node::named(OsStr::new(&entry.name)) == Some(&info.name)).then(|| self.disk_attr(&info))
            }
            Node::SnapshotsOf(id) if entry.name != "." => {
                let info = self.store.disk_info_by_id(id).ok()?;
                (entry.name == info.name).then(|| self.snapshots_of_attr(&info))
            }
            Node::Snapshot(id) => {
                let info = self.store.snapshot_info_by_id(id).ok()?;
                (node::named(OsStr::new(&entry.name)) == Some(&info.name)).then(|| Self::snapshot_attr(&info))
            }
            // A tree of nothing but extents has its root in the place of their directory.
            Node::Extents(_) if self.only.is_some() => self.attr(Node::Root.ino()).ok(),
            node => self.attr(node.ino()).ok(),
        }
    }

    /// Makes a disk of 0 bytes, or takes a snapshot; with `exclusive`, only if there is none of that name.
    ///
    /// # Errors
    /// EEXIST, EINVAL or ENAMETOOLONG for the name, EPERM where no files are made, and what the store says.
    pub fn create(&self, parent: u64, name: &OsStr, exclusive: bool) -> Answer<Created> {
        let made = match self.node(parent)? {
            Node::Disks => {
                disk::create_empty(&self.store, node::new_name(name, DISK_NAME_MAX)?).map(|d| self.disk_attr(&d))
            }
            Node::SnapshotsOf(id) => self.take(id, node::new_name(name, SNAPSHOT_NAME_MAX)?),
            node => return Err(refused(node)),
        };
        match made {
            Ok(attr) => Ok(Created { attr, new: true }),
            Err(error) if error.kind() == Kind::Exists && !exclusive => {
                Ok(Created { attr: self.lookup(parent, name)?, new: false })
            }
            Err(error) => Err(error.into()),
        }
    }

    fn take(&self, id: DiskId, name: &str) -> Result<Attr, Error> {
        let disk = self.store.disk_info_by_id(id)?.name;
        if let Some(file) = self.opened(id) {
            file.settle()?;
        }
        let taken = snapshot::take(&self.store, &[(disk, name.to_owned())])?;
        let info =
            taken.first().ok_or_else(|| Error::failed(format!("snapshot '{name}' was taken and is not there")))?;
        Ok(Self::snapshot_attr(info))
    }

    /// Removes a disk without snapshots, or a snapshot.
    ///
    /// # Errors
    /// EBUSY for a disk with snapshots or an open writer and for a snapshot that is held, EPERM for anything else.
    pub fn unlink(&self, parent: u64, name: &OsStr) -> Answer<()> {
        match self.node(parent)? {
            Node::Disks => Ok(disk::remove(&self.store, node::named(name).ok_or(Errno::ENOENT)?, false)?),
            Node::SnapshotsOf(id) => {
                let info = self.snapshot_named(id, name)?;
                Ok(snapshot::remove(&self.store, &info.disk, &info.name)?)
            }
            Node::RetiredOf(id) => {
                let (disk, name, _) = self.retired_named(id, name)?;
                Ok(snapshot::remove(&self.store, &disk, &name)?)
            }
            node => Err(refused(node)),
        }
    }

    /// Tells whether a removal may wait: for a file that was closed a moment ago and is not released yet.
    pub fn unlink_may_wait(&self, parent: u64, name: &OsStr) -> bool {
        let (Ok(Node::Disks), Some(name)) = (self.node(parent), node::named(name)) else { return false };
        let id = self.store.tables.read().disk_id(name);
        id.is_ok_and(|id| self.store.is_leased(id))
    }

    /// Renames a disk or a snapshot within its directory, or retires a snapshot: from `snapshots/NAME/SNAP.raw` to
    /// `retired/NAME/SNAP.aimg`.
    ///
    /// # Errors
    /// EEXIST when the new name is taken, EPERM for any other move, EINVAL for an exchange.
    pub fn rename(&self, from: (u64, &OsStr), to: (u64, &OsStr), how: RenameHow) -> Answer<()> {
        if how.exotic {
            return Err(Errno::EINVAL);
        }
        let (parent, target) = (self.node(from.0)?, self.node(to.0)?);
        if let (Node::SnapshotsOf(disk), Node::RetiredOf(of)) = (parent, target)
            && disk == of
        {
            return self.retire(disk, from.1, to.1);
        }
        if parent.is_exported() || target.is_exported() {
            return Err(Errno::EROFS);
        }
        if parent != target {
            return Err(Errno::EPERM);
        }
        match parent {
            Node::Disks => {
                let old = node::named(from.1).ok_or(Errno::ENOENT)?;
                Ok(disk::rename(&self.store, old, node::new_name(to.1, DISK_NAME_MAX)?)?)
            }
            Node::SnapshotsOf(id) => {
                let info = self.snapshot_named(id, from.1)?;
                Ok(snapshot::rename(&self.store, &info.disk, &info.name, node::new_name(to.1, SNAPSHOT_NAME_MAX)?)?)
            }
            Node::RetiredOf(id) => {
                let (disk, old, _) = self.retired_named(id, from.1)?;
                let new = node::record_named(to.1).ok_or(Errno::EINVAL)?;
                Ok(snapshot::rename(&self.store, &disk, &old, new)?)
            }
            _ => Err(Errno::EPERM),
        }
    }

    /// Retires a snapshot under the name it has.
    fn retire(&self, id: DiskId, from: &OsStr, to: &OsStr) -> Answer<()> {
        let info = self.snapshot_named(id, from)?;
        if node::record_named(to) != Some(&info.name) {
            tracing::warn!("{}@{} can only be retired as {}", info.disk, info.name, node::record_name(&info.name));
            return Err(Errno::EPERM);
        }
        snapshot::retire(&self.store, &[(info.disk, info.name)])?;
        Ok(())
    }
}

/// The directories of the mount point.
const TOP: [(Node, &str); 5] = [
    (Node::Disks, "disks"),
    (Node::Snapshots, "snapshots"),
    (Node::Retired, "retired"),
    (Node::Exports, "exports"),
    (Node::Checkpoints, "checkpoints"),
];

/// Why nothing is made or removed in a directory.
fn refused(node: Node) -> Errno {
    match node.sort() {
        Sort::Dir if node.is_exported() => Errno::EROFS,
        Sort::Dir => Errno::EPERM,
        _ => Errno::ENOTDIR,
    }
}
