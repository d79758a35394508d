//! What is read only and made on the fly: `exports/` with the extent files of snapshots, and `retired/` with records.
//!
//! # Rules
//! 1. `exports/NAME/SNAP/` is there while the snapshot is live. A file that is open in it keeps what it shows.
//! 2. A snapshot that is called `latest` is shown in the place of the link.
//! 3. The record of a snapshot that was retired a moment ago is still being written: its file is there, empty and not kept
//!    by the kernel, and opening it waits until it is whole. A program that asks for the length of what it has opened gets
//!    the right one.

use std::ffi::OsStr;
use std::sync::Arc;
use std::time::Duration;

use super::about::ABOUT;
use super::errno::{Answer, Errno};
use super::extent::{self, Cut, Known, NEVER, Slot};
use super::fixed::Fixed;
use super::names::{Entry, Listing};
use super::node::{self, Node, Sort};
use super::state::{Attr, HOLDER, Tree};
use super::window::Held;
use crate::clock;
use crate::error::{Error, Result};
use crate::media::{File, Open};
use crate::snapshot::record::record_path;
use crate::store::{DiskInfo, Status};
use crate::units::{CHUNK_SIZE, DiskId, Epoch, SnapshotId};

/// The link to the newest live snapshot.
const LATEST: &str = "latest";
/// How long opening a record waits for it to be written.
const RECORD_WAIT: Duration = Duration::from_secs(60);
const RECORD_POLL: Duration = Duration::from_millis(10);

impl Tree {
    /// Returns how a snapshot is cut into extents.
    ///
    /// # Errors
    /// ESTALE when it is gone or retired.
    pub(super) fn cut(&self, id: SnapshotId) -> Answer<Cut> {
        match &self.only {
            Some((_, cut)) if cut.id == id => Ok(*cut),
            Some(_) => Err(Errno::ESTALE),
            None => Cut::live(&self.store.tables.read(), id).map_err(|error| Errno::from(error).stale()),
        }
    }

    /// Returns the directory above that of a snapshot's extents.
    pub(super) fn parent_of(&self, cut: &Cut) -> Node {
        let tables = self.store.tables.read();
        match tables.snapshot_by_id(cut.id) {
            Ok((_, row)) if self.only.is_none() => Node::ExportsOf(row.disk),
            _ => Node::Root,
        }
    }

    /// Returns the node of an extent, and what the map says of it.
    pub(super) fn extent_node(&self, cut: &Cut, slot: Slot) -> Answer<(Node, Known)> {
        let known = self.extents.known(&self.store, cut, slot, self.only.is_some())?;
        let node = if known.epoch == Epoch(0) {
            let chunk = u32::try_from(slot.offset() / CHUNK_SIZE).expect("a disk has 2^25 chunks");
            Node::Untouched { chunk, length: u32::try_from(cut.length(slot)).expect("1 GiB at most") }
        } else {
            Node::Extent { epoch: known.epoch, slot }
        };
        Ok((node, known))
    }

    /// Returns the attributes of an extent file.
    pub(super) fn extent_attr(&self, cut: &Cut, slot: Slot) -> Answer<Attr> {
        let (node, known) = self.extent_node(cut, slot)?;
        let mtime = match node {
            Node::Untouched { .. } => NEVER,
            _ => self.store.tables.read().stamp(known.epoch),
        };
        Ok(fixed_attr(node, cut.length(slot), u64::from(known.blocks) * 8, mtime))
    }

    /// Finds a snapshot that shows an extent, and holds it.
    fn shown(&self, slot: Slot, epoch: Epoch) -> Answer<(Arc<Held>, Cut)> {
        match &self.only {
            Some((held, cut)) if cut.has(slot) => Ok((Arc::clone(held), *cut)),
            Some(_) => Err(Errno::ESTALE),
            None => extent::find(&self.store, &self.extents, slot, epoch),
        }
    }

    /// Returns the attributes of what is in `exports/` and `retired/`.
    pub(super) fn export_attr(&self, node: Node) -> Answer<Attr> {
        let stale = |error: Error| Errno::from(error).stale();
        match node {
            Node::RetiredOf(id) | Node::ExportsOf(id) => {
                let info = self.store.disk_info_by_id(id).map_err(stale)?;
                Ok(self.of_disk_attr(node, &info))
            }
            Node::Extents(id) => {
                let cut = self.cut(id)?;
                let mut attr = self.dir_attr(node, cut.created);
                if self.only.is_some() {
                    attr.ino = Node::Root.ino();
                }
                Ok(attr)
            }
            Node::Untouched { length, .. } => Ok(fixed_attr(node, u64::from(length), 0, NEVER)),
            Node::Extent { epoch, slot } => {
                let (_held, cut) = self.shown(slot, epoch)?;
                let attr = self.extent_attr(&cut, slot)?;
                if attr.ino == node.ino() { Ok(attr) } else { Err(Errno::ESTALE) }
            }
            Node::Latest(id) => {
                let (target, created) = self.latest(id).map_err(Errno::stale)?;
                let (ino, size) = (node.ino(), target.len() as u64);
                Ok(Attr { ino, sort: Sort::Link, size, blocks: 0, mtime: created, perm: 0o777, nlink: 1, keep: false })
            }
            Node::Record(id) => self.record_attr(id).map_err(stale),
            Node::About => self.about_attr(),
            Node::Increment(number) => self.increment_attr(number),
            Node::Member { increment, index } => self.member_attr(increment, index),
            _ => Err(Errno::ESTALE),
        }
    }

    /// Returns the attributes of a directory that a disk has in `exports/` or `retired/`.
    fn of_disk_attr(&self, node: Node, info: &DiskInfo) -> Attr {
        let newest = self.store.latest(info.id).map_or(info.created, |snapshot| snapshot.created);
        self.dir_attr(node, newest)
    }

    fn record_attr(&self, id: SnapshotId) -> Result<Attr> {
        let created = {
            let tables = self.store.tables.read();
            let (_, row) = tables.snapshot_by_id(id)?;
            if row.status != Status::Retired {
                let name = tables.called_snapshot(row);
                return Err(Error::not_found(format!("snapshot {name} is not retired")));
            }
            row.created
        };
        let length = match self.record_file(id)? {
            Some(file) => Some(file.len().map_err(|error| Error::io("cannot look at a retired record", error))?),
            None => None,
        };
        let size = length.unwrap_or(0);
        Ok(Attr { keep: length.is_some(), ..fixed_attr(Node::Record(id), size, size.div_ceil(512), created) })
    }

    /// Opens the record of a retired snapshot; `None` when it is not written yet.
    fn record_file(&self, id: SnapshotId) -> Result<Option<Arc<dyn File>>> {
        let uuid = {
            let tables = self.store.tables.read();
            match tables.retired(id) {
                Some(row) => row.state.uuid,
                None => {
                    let (_, row) = tables.snapshot_by_id(id)?;
                    if row.status == Status::Retired {
                        return Ok(None);
                    }
                    let name = tables.called_snapshot(row);
                    return Err(Error::not_found(format!("snapshot {name} is not retired")));
                }
            }
        };
        let file = self.store.media().open(&record_path(uuid), Open::ReadOnly);
        file.map(Some).map_err(|error| Error::io("cannot open a retired record", error))
    }

    /// Tells whether opening may wait.
    pub fn open_may_wait(&self, ino: u64) -> bool {
        match self.node(ino) {
            Ok(Node::Record(_) | Node::Member { .. } | Node::CheckpointPart { .. }) => true,
            // For a lease that is about to fall.
            Ok(Node::Disk(id)) => self.store.is_leased_by_other(id, HOLDER),
            _ => false,
        }
    }

    /// Opens a file that never changes; the flag tells whether what the kernel has cached of it holds.
    pub(super) fn open_fixed(&self, node: Node) -> Answer<(Fixed, bool)> {
        match node {
            Node::Untouched { length, .. } => Ok((Fixed::Zeros(u64::from(length)), true)),
            Node::Extent { epoch, slot } => {
                let (held, cut) = self.shown(slot, epoch)?;
                let window = extent::open(&self.store, held, cut, slot, epoch);
                let window = window.map_err(|error| Errno::from(error).stale())?;
                Ok((Fixed::Window(window.verified(&self.verifiers)), true))
            }
            Node::Record(id) => {
                let until = clock::now() + RECORD_WAIT;
                loop {
                    if let Some(file) = self.record_file(id).map_err(|error| Errno::from(error).stale())? {
                        let length = file.len().map_err(|error| Error::io("cannot look at a retired record", error))?;
                        return Ok((Fixed::File(file, length), false));
                    }
                    if clock::now() >= until {
                        return Err(Errno::EAGAIN);
                    }
                    self.store.wake_keeper();
                    clock::sleep(RECORD_POLL);
                }
            }
            Node::Member { increment, index } => Ok((self.open_member(increment, index)?, true)),
            Node::About => Ok((Fixed::Text(self.about_text()?), true)),
            Node::CheckpointPart { number, part } => self.open_checkpoint(number, part),
            node if node.sort() == Sort::Dir => Err(Errno::EISDIR),
            _ => Err(Errno::ESTALE),
        }
    }

    /// Reads a symbolic link.
    ///
    /// # Errors
    /// EINVAL for anything else; ESTALE when it is gone.
    pub fn read_link(&self, ino: u64) -> Answer<String> {
        let Node::Latest(id) = self.node(ino)? else { return Err(Errno::EINVAL) };
        self.latest(id).map(|(target, _)| target).map_err(Errno::stale)
    }

    fn latest(&self, id: DiskId) -> Answer<(String, u64)> {
        self.store.latest(id).map(|info| (info.name, info.created)).ok_or(Errno::ENOENT)
    }

    /// Finds a retired snapshot by the name of its file: the disk's name, its own, its id.
    pub(super) fn retired_named(&self, id: DiskId, file: &OsStr) -> Answer<(String, String, SnapshotId)> {
        let name = node::record_named(file).ok_or(Errno::ENOENT)?;
        let tables = self.store.tables.read();
        let disk = tables.disk(id).map_err(|_| Errno::ESTALE)?.name.clone();
        match tables.snapshot(id, name) {
            Ok((_, row)) if row.status == Status::Retired => Ok((disk, name.to_owned(), row.snapshot)),
            _ => Err(Errno::ENOENT),
        }
    }

    /// Finds a name in a directory of `exports/` or `retired/`.
    pub(super) fn export_lookup(&self, parent: Node, name: &OsStr) -> Answer<Attr> {
        let text = name.to_str().ok_or(Errno::ENOENT);
        match parent {
            Node::Retired => {
                let info = self.store.disk_info(text?)?;
                Ok(self.of_disk_attr(Node::RetiredOf(info.id), &info))
            }
            Node::Exports => {
                let info = self.store.disk_info(text?)?;
                Ok(self.of_disk_attr(Node::ExportsOf(info.id), &info))
            }
            Node::RetiredOf(id) => Ok(self.record_attr(self.retired_named(id, name)?.2)?),
            Node::ExportsOf(id) => self.exported(id, text?),
            Node::Extents(id) => {
                let (cut, text) = (self.cut(id)?, text?);
                match cut.named(text) {
                    Some(slot) => self.extent_attr(&cut, slot),
                    None if text == ABOUT && self.only.is_some() => self.about_attr(),
                    None => Err(Errno::ENOENT),
                }
            }
            Node::Increment(number) => self.member_named(number, text?),
            node if node.sort() == Sort::Dir => Err(Errno::ENOENT),
            _ => Err(Errno::ENOTDIR),
        }
    }

    fn exported(&self, id: DiskId, name: &str) -> Answer<Attr> {
        let snapshot = {
            let tables = self.store.tables.read();
            tables.disk(id).map_err(|_| Errno::ESTALE)?;
            let found = tables.snapshot(id, name).ok().filter(|(_, row)| row.status == Status::Live);
            found.map(|(_, row)| row.snapshot)
        };
        match snapshot {
            Some(snapshot) => self.export_attr(Node::Extents(snapshot)),
            None if name == LATEST => self.export_attr(Node::Latest(id)).map_err(|_| Errno::ENOENT),
            None => self.increment_named(id, name),
        }
    }

    /// Lists a directory of `exports/` or `retired/` but for that of extents; tells what is above it.
    pub(super) fn export_list(&self, node: Node) -> Answer<(Node, Vec<Entry>)> {
        let disks = |of: fn(DiskId) -> Node| {
            self.store.disks().into_iter().map(|d| Entry { node: of(d.id), name: d.name }).collect()
        };
        match node {
            Node::Retired => Ok((Node::Root, disks(Node::RetiredOf))),
            Node::Exports => Ok((Node::Root, disks(Node::ExportsOf))),
            Node::RetiredOf(id) => {
                let tables = self.store.tables.read();
                tables.disk(id).map_err(|_| Errno::ESTALE)?;
                let all = tables.snapshots_of(id).filter(|(_, row)| row.status == Status::Retired);
                let entry = |row: &crate::store::StateRow| Entry {
                    node: Node::Record(row.snapshot),
                    name: node::record_name(&row.name),
                };
                Ok((Node::Retired, all.map(|(_, row)| entry(row)).collect()))
            }
            Node::ExportsOf(id) => {
                let live = self.live_snapshots(id)?;
                let mut entries: Vec<Entry> =
                    live.iter().map(|s| Entry { node: Node::Extents(s.id), name: s.name.clone() }).collect();
                if !live.is_empty() && live.iter().all(|s| s.name != LATEST) {
                    entries.push(Entry { node: Node::Latest(id), name: LATEST.to_owned() });
                }
                entries.extend(self.increments_of(id)?);
                Ok((Node::Exports, entries))
            }
            Node::Increment(number) => self.members(number),
            _ => Err(Errno::ENOTDIR),
        }
    }

    /// Calls `each` with the entries of a listing from a place on, and with the place behind each, until it returns true.
    ///
    /// # Errors
    /// What the first entry runs into; behind others the listing ends there, and the kernel asks again.
    pub fn each_entry(&self, listing: &Listing, from: usize, mut each: impl FnMut(u64, &Entry) -> bool) -> Answer<()> {
        let mut place = from;
        loop {
            match self.entry_at(listing, place) {
                Ok(None) => return Ok(()),
                Ok(Some(entry)) => {
                    place += 1;
                    if each(place as u64, &entry) {
                        return Ok(());
                    }
                }
                Err(errno) if place == from => return Err(errno),
                Err(_) => return Ok(()),
            }
        }
    }
}

/// Returns the attributes of a file that never changes.
pub(super) fn fixed_attr(node: Node, size: u64, blocks: u64, mtime: u64) -> Attr {
    Attr { ino: node.ino(), sort: Sort::File, size, blocks, mtime, perm: 0o400, nlink: 1, keep: true }
}
