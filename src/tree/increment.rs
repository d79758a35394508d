//! Increment directories in the mount: `exports/NAME/OLD..NEW/`, made on the fly from the description of [`crate::export`].
//!
//! # Rules
//! 1. A directory has a number when its name was looked up; it is described when somebody looks into it. The number is
//!    good until one of the two snapshots changes its name or its state: then the directory has another one, since its
//!    texts name both.
//! 2. Few descriptions are kept ([`DESCRIBED_MAX`]): one may have tens of thousands of files.
//! 3. Data is read for the checksums when the first text that has them is opened, never for a listing.
//! 4. The new snapshot is held by open files only. A directory whose snapshot goes while it is read ends with ESTALE.

use std::collections::HashMap;
use std::sync::Arc;

use super::errno::{Answer, Errno};
use super::fixed::Fixed;
use super::names::Entry;
use super::node::{Node, Sort};
use super::state::{Attr, Tree};
use super::window::{Held, Window};
use crate::error::Result;
use crate::export::{self, Increment, Member, Sums};
use crate::snapshot::{self, VerifiedReader};
use crate::store::{Status, Tables};
use crate::sync::Mutex;
use crate::units::{BranchId, DiskId, Epoch, SnapshotId};

/// What stands between the two names.
const BETWEEN: &str = "..";
/// Descriptions kept.
const DESCRIBED_MAX: usize = 4;
/// Directories that have a number at a time.
const NUMBERED_MAX: usize = 1 << 16;

/// From which snapshot to which.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Pair {
    old: SnapshotId,
    new: SnapshotId,
}

/// A description, and what was computed from it.
#[derive(Debug)]
pub(super) struct Described {
    increment: Increment,
    /// Lengths of the texts, in the order of [`Member::TEXTS`].
    lengths: [u64; Member::TEXTS.len()],
    sums: Mutex<Option<Arc<Sums>>>,
}

#[derive(Debug, Default)]
struct Numbers {
    last: u32,
    pairs: HashMap<u32, Pair>,
    numbers: HashMap<Pair, u32>,
    /// The newest is last.
    described: Vec<(u32, Arc<Described>)>,
}

/// The increment directories of a mount.
#[derive(Debug, Default)]
pub(super) struct Increments(Mutex<Numbers>);

impl Increments {
    fn number(&self, pair: Pair) -> Answer<u32> {
        let mut all = self.0.lock();
        if let Some(number) = all.numbers.get(&pair) {
            return Ok(*number);
        }
        if all.pairs.len() >= NUMBERED_MAX {
            let described: Vec<u32> = all.described.iter().map(|(number, _)| *number).collect();
            all.pairs.retain(|number, _| described.contains(number));
            all.numbers.retain(|_, number| described.contains(number));
        }
        all.last = all.last.checked_add(1).ok_or(Errno::EBUSY)?;
        let number = all.last;
        all.pairs.insert(number, pair);
        all.numbers.insert(pair, number);
        Ok(number)
    }

    fn pair(&self, number: u32) -> Answer<Pair> {
        self.0.lock().pairs.get(&number).copied().ok_or(Errno::ESTALE)
    }

    fn described(&self, number: u32) -> Option<Arc<Described>> {
        let mut all = self.0.lock();
        let at = all.described.iter().position(|(known, _)| *known == number)?;
        let found = all.described.remove(at);
        all.described.push(found);
        all.described.last().map(|(_, described)| Arc::clone(described))
    }

    fn keep(&self, number: u32, described: &Arc<Described>) {
        let mut all = self.0.lock();
        if !all.pairs.contains_key(&number) || all.described.iter().any(|(known, _)| *known == number) {
            return;
        }
        if all.described.len() >= DESCRIBED_MAX {
            all.described.remove(0);
        }
        all.described.push((number, Arc::clone(described)));
    }

    /// Forgets the directories that have to do with a snapshot.
    pub(super) fn forget(&self, is_stale: impl Fn(SnapshotId) -> bool) {
        let mut all = self.0.lock();
        let Numbers { pairs, numbers, described, .. } = &mut *all;
        numbers.retain(|pair, _| !is_stale(pair.old) && !is_stale(pair.new));
        pairs.retain(|_, pair| !is_stale(pair.old) && !is_stale(pair.new));
        described.retain(|(number, _)| pairs.contains_key(number));
    }
}

impl Described {
    fn new(increment: Increment) -> Self {
        let lengths = Member::TEXTS.map(|text| increment.len(text));
        Self { increment, lengths, sums: Mutex::default() }
    }

    fn count(&self) -> usize {
        self.increment.plan.files.len() + Member::TEXTS.len()
    }

    fn member(&self, index: usize) -> Option<Member> {
        let files = &self.increment.plan.files;
        match index.checked_sub(files.len()) {
            None => files.get(index).map(|part| Member::Data(*part)),
            Some(text) => Member::TEXTS.get(text).copied(),
        }
    }

    fn index(&self, member: Member) -> Option<usize> {
        let files = &self.increment.plan.files;
        match member {
            Member::Data(part) => files.binary_search_by_key(&part.offset, |file| file.offset).ok(),
            text => Member::TEXTS.iter().position(|other| *other == text).map(|at| files.len() + at),
        }
    }

    fn length(&self, index: usize) -> Option<u64> {
        let files = &self.increment.plan.files;
        match index.checked_sub(files.len()) {
            None => files.get(index).map(|part| part.length),
            Some(text) => self.lengths.get(text).copied(),
        }
    }
}

/// Returns the named snapshot of a disk that is next above another one in the tree.
fn parent_snapshot(tables: &Tables, disk: DiskId, of: (BranchId, Epoch)) -> Option<SnapshotId> {
    let (mut branch, mut upto) = (of.0, Epoch(of.1.0.saturating_sub(1)));
    loop {
        let here = tables.snapshots_of(disk).filter(|((at, epoch), _)| *at == branch && *epoch <= upto);
        if let Some((_, row)) = here.max_by_key(|(key, _)| key.1) {
            return Some(row.snapshot);
        }
        (branch, upto) = tables.branch(branch).ok()?.parent?;
    }
}

impl Tree {
    /// Finds an increment directory by its name.
    pub(super) fn increment_named(&self, disk: DiskId, name: &str) -> Answer<Attr> {
        let pair = {
            let tables = self.store.tables.read();
            let find = |name: &str| tables.snapshot(disk, name).map(|(_, row)| row).ok();
            // `v1...v2`: a name may end in a dot, and then it is not the first two that stand between.
            let splits = (0..name.len()).filter(|at| name.as_bytes()[*at..].starts_with(BETWEEN.as_bytes()));
            let pairs = splits.filter_map(|at| Some((find(&name[..at])?, find(&name[at + BETWEEN.len()..])?)));
            let (old, new) = pairs
                .filter(|(_, new)| new.status == Status::Live)
                .find(|(old, _)| matches!(old.status, Status::Live | Status::Retired))
                .ok_or(Errno::ENOENT)?;
            Pair { old: old.snapshot, new: new.snapshot }
        };
        self.increment_attr(self.increments.number(pair)?)
    }

    /// Lists the increments between neighbours: to each live snapshot from the one before it.
    pub(super) fn increments_of(&self, disk: DiskId) -> Answer<Vec<Entry>> {
        let pairs: Vec<(Pair, String)> = {
            let tables = self.store.tables.read();
            let live = tables.snapshots_of(disk).filter(|(_, row)| row.status == Status::Live);
            let before = |(key, row): (_, &crate::store::StateRow)| {
                let old = parent_snapshot(&tables, disk, key)?;
                let (_, old_row) = tables.snapshot_by_id(old).ok()?;
                let name = format!("{}{BETWEEN}{}", old_row.name, row.name);
                Some((Pair { old, new: row.snapshot }, name))
            };
            live.filter_map(before).collect()
        };
        let entry = |(pair, name)| Ok(Entry { node: Node::Increment(self.increments.number(pair)?), name });
        pairs.into_iter().map(entry).collect()
    }

    /// Returns the attributes of an increment directory.
    pub(super) fn increment_attr(&self, number: u32) -> Answer<Attr> {
        let pair = self.increments.pair(number)?;
        let created = self.cut(pair.new)?.created;
        let perm = 0o555;
        let ino = Node::Increment(number).ino();
        Ok(Attr { ino, sort: Sort::Dir, size: 0, blocks: 0, mtime: created, perm, nlink: 2, keep: true })
    }

    /// Returns the description of a directory, made if it is not kept.
    fn described(&self, number: u32) -> Answer<Arc<Described>> {
        if let Some(known) = self.increments.described(number) {
            return Ok(known);
        }
        let pair = self.increments.pair(number)?;
        let name = |id: SnapshotId| -> Result<(String, String)> {
            let info = self.store.snapshot_info_by_id(id)?;
            Ok((info.disk, info.name))
        };
        let stale = |error| Errno::from(error).stale();
        let (old, new) = (name(pair.old).map_err(stale)?, name(pair.new).map_err(stale)?);
        let (increment, device) =
            export::describe(&self.store, Some((&old.0, &old.1)), (&new.0, &new.1)).map_err(stale)?;
        if device.id() != pair.new {
            return Err(Errno::ESTALE);
        }
        let described = Arc::new(Described::new(increment));
        self.increments.keep(number, &described);
        Ok(described)
    }

    fn member_attr_of(&self, number: u32, described: &Described, index: usize) -> Answer<Attr> {
        let size = described.length(index).ok_or(Errno::ESTALE)?;
        let created = described.increment.to.created;
        let node = Node::Member { increment: number, index: u32::try_from(index).map_err(|_| Errno::ESTALE)? };
        let perm = if described.member(index) == Some(Member::Apply) { 0o500 } else { 0o400 };
        let blocks = size.div_ceil(4096) * 8;
        Ok(Attr { ino: node.ino(), sort: Sort::File, size, blocks, mtime: created, perm, nlink: 1, keep: true })
    }

    /// Returns the attributes of a file of an increment directory.
    pub(super) fn member_attr(&self, number: u32, index: u32) -> Answer<Attr> {
        self.member_attr_of(number, &*self.described(number)?, index as usize)
    }

    /// Finds a file of an increment directory.
    pub(super) fn member_named(&self, number: u32, name: &str) -> Answer<Attr> {
        let described = self.described(number)?;
        let found = described.increment.member(name).and_then(|member| described.index(member));
        self.member_attr_of(number, &described, found.ok_or(Errno::ENOENT)?)
    }

    /// Lists the files of an increment directory; tells what is above it.
    pub(super) fn members(&self, number: u32) -> Answer<(Node, Vec<Entry>)> {
        let described = self.described(number)?;
        let disk = {
            let tables = self.store.tables.read();
            let pair = self.increments.pair(number)?;
            tables.snapshot_by_id(pair.new).map_err(|_| Errno::ESTALE)?.1.disk
        };
        let entry = |(index, member): (usize, Member)| {
            let index = u32::try_from(index).expect("65,536 files and a few");
            Entry { node: Node::Member { increment: number, index }, name: member.name() }
        };
        let names = (0..described.count()).filter_map(|index| Some((index, described.member(index)?)));
        Ok((Node::ExportsOf(disk), names.map(entry).collect()))
    }

    /// Opens a file of an increment directory; reads all its data if it has checksums in it.
    pub(super) fn open_member(&self, number: u32, index: u32) -> Answer<Fixed> {
        let described = self.described(number)?;
        let member = described.member(index as usize).ok_or(Errno::ESTALE)?;
        let increment = &described.increment;
        let text = match member {
            Member::Data(part) => {
                let pair = self.increments.pair(number)?;
                let (held, cut) = Held::new(&self.store, pair.new).map_err(|error| Errno::from(error).stale())?;
                let window = Window::new(&self.store, held, cut, part.offset, part.length);
                return Ok(Fixed::Window(window.verified(&self.verifiers)));
            }
            Member::Zeros => increment.zeros_text(),
            Member::Apply => increment.apply_text(),
            Member::Manifest => increment.manifest_text(&*self.sums(number, &described)?),
            Member::Cksums => increment.cksums_text(&*self.sums(number, &described)?),
        };
        Ok(Fixed::Text(text.into_bytes().into()))
    }

    fn sums(&self, number: u32, described: &Described) -> Answer<Arc<Sums>> {
        // Held while they are computed: who asks meanwhile waits for them.
        let mut sums = described.sums.lock();
        if let Some(known) = &*sums {
            return Ok(Arc::clone(known));
        }
        let pair = self.increments.pair(number)?;
        let device = snapshot::open_by_id(&self.store, pair.new).map_err(|error| Errno::from(error).stale())?;
        let mut reader = VerifiedReader::new(&device)?;
        let made = Arc::new(described.increment.sums(|buf, at| reader.read(buf, at))?);
        *sums = Some(Arc::clone(&made));
        Ok(made)
    }
}
