//! Looking up, listing, making, removing and renaming: what the directories of the tree answer.
//!
//! A file in `disks/` is a disk, one in `snapshots/NAME/` a snapshot, so making, removing and renaming files does that
//! to disks and snapshots. Directories come and go with disks and cannot be made or removed.
//!
//! # Rules
//! 1. Nothing that exists is ever replaced by a rename or a creation.
//! 2. What leaves its kind is refused with EPERM, never EXDEV: `mv` would copy and delete.
//! 3. `rm` takes no snapshots with it.
//!
//! # Why removal may wait a moment
//! The kernel sends the release of a file after close(2) has returned, so `dd of=disk; rm disk` would sometimes find
//! the disk in use by nobody.

use std::ffi::OsStr;
use std::time::Duration;

use super::errno::{Answer, Errno};
use super::node::{self, DISK_NAME_MAX, Node, SNAPSHOT_NAME_MAX};
use super::state::{Attr, HOLDER, Tree};
use crate::clock;
use crate::disk;
use crate::error::{Error, Kind};
use crate::snapshot;
use crate::units::DiskId;

/// How long a removal waits for the release of a file that was closed a moment ago.
const RELEASE_WAIT: Duration = Duration::from_millis(300);

/// One line of a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// What it is.
    pub node: Node,
    /// Its name.
    pub name: String,
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
        match Self::node(parent)? {
            Node::Root => match name.to_str() {
                Some("disks") => self.attr(Node::Disks.ino()),
                Some("snapshots") => self.attr(Node::Snapshots.ino()),
                _ => Err(Errno::ENOENT),
            },
            Node::Disks => {
                let name = node::named(name).ok_or(Errno::ENOENT)?;
                Ok(self.disk_attr(&self.store.disk_info(name)?))
            }
            Node::Snapshots => {
                let name = name.to_str().ok_or(Errno::ENOENT)?;
                Ok(self.snapshots_of_attr(&self.store.disk_info(name)?))
            }
            Node::SnapshotsOf(id) => Ok(Self::snapshot_attr(&self.snapshot_named(id, name)?)),
            Node::Disk(_) | Node::Snapshot(_) => Err(Errno::ENOTDIR),
        }
    }

    /// Lists a directory, `.` and `..` first.
    ///
    /// # Errors
    /// ENOTDIR, or ESTALE when it is gone.
    pub fn list(&self, ino: u64) -> Answer<Vec<Entry>> {
        let node = Self::node(ino)?;
        let (parent, mut entries) = match node {
            Node::Root => {
                let fixed = [(Node::Disks, "disks"), (Node::Snapshots, "snapshots")];
                (Node::Root, fixed.map(|(node, name)| Entry { node, name: name.into() }).to_vec())
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
            Node::Disk(_) | Node::Snapshot(_) => return Err(Errno::ENOTDIR),
        };
        let dots = [Entry { node, name: ".".into() }, Entry { node: parent, name: "..".into() }];
        entries.splice(0..0, dots);
        Ok(entries)
    }

    /// Returns the attributes of a listed entry, or `None` if the name stands for something else by now.
    #[must_use]
    pub fn listed(&self, entry: &Entry) -> Option<Attr> {
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
            node => self.attr(node.ino()).ok(),
        }
    }

    /// Makes a disk of 0 bytes, or takes a snapshot; with `exclusive`, only if there is none of that name.
    ///
    /// # Errors
    /// EEXIST, EINVAL or ENAMETOOLONG for the name, EPERM where no files are made, and what the store says.
    pub fn create(&self, parent: u64, name: &OsStr, exclusive: bool) -> Answer<Created> {
        let made = match Self::node(parent)? {
            Node::Disks => {
                disk::create_empty(&self.store, node::new_name(name, DISK_NAME_MAX)?).map(|d| self.disk_attr(&d))
            }
            Node::SnapshotsOf(id) => self.take(id, node::new_name(name, SNAPSHOT_NAME_MAX)?),
            Node::Root | Node::Snapshots => return Err(Errno::EPERM),
            Node::Disk(_) | Node::Snapshot(_) => return Err(Errno::ENOTDIR),
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
        match Self::node(parent)? {
            Node::Disks => self.remove_disk(node::named(name).ok_or(Errno::ENOENT)?),
            Node::SnapshotsOf(id) => {
                let info = self.snapshot_named(id, name)?;
                Ok(snapshot::remove(&self.store, &info.disk, &info.name)?)
            }
            Node::Root | Node::Snapshots => Err(Errno::EPERM),
            Node::Disk(_) | Node::Snapshot(_) => Err(Errno::ENOTDIR),
        }
    }

    fn remove_disk(&self, name: &str) -> Answer<()> {
        let until = clock::now() + RELEASE_WAIT;
        loop {
            let seen = self.releases();
            let error = match disk::remove(&self.store, name, false) {
                Ok(()) => return Ok(()),
                Err(error) => error,
            };
            let info = self.store.disk_info(name)?;
            let ours = info.holder.as_deref() == Some(HOLDER) || info.holder.is_none();
            let passing = error.kind() == Kind::Busy && info.snapshots == 0 && ours;
            if !passing || !self.wait_release(seen, until) {
                return Err(error.into());
            }
        }
    }

    /// Renames a disk or a snapshot within its directory.
    ///
    /// # Errors
    /// EEXIST when the new name is taken, EPERM for any other move, EINVAL for an exchange.
    pub fn rename(&self, from: (u64, &OsStr), to: (u64, &OsStr), how: RenameHow) -> Answer<()> {
        if how.exotic {
            return Err(Errno::EINVAL);
        }
        let (parent, target) = (Self::node(from.0)?, Self::node(to.0)?);
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
            _ => Err(Errno::EPERM),
        }
    }
}
