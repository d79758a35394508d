//! States that come from elsewhere: data is collected on a hidden branch, and one frame makes it the state of a disk.
//!
//! A hidden disk has a name that begins with `.`, which no user can give: nothing lists, mounts or counts it. It starts as
//! a snapshot that was taken of the disk it is for, so that an increment finds its base there, retired or not. At the end
//! its epoch becomes a snapshot of the disk with the identity it was sent with, and the head of the disk goes on from it,
//! as after a revert.
//!
//! # Rules
//! 1. Until that frame nothing anybody sees has changed; after it everything has.
//! 2. Nothing is lost: a disk that was written meanwhile is refused, or its state becomes a snapshot in the same frame.
//!
//! # After a crash
//! The hidden disk is there with what was flushed, and its origin says how far that is; or the frame was durable.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use uuid::Uuid;

use super::branch::{cloned, fresh_floor, start_branch};
use super::diff::{self, StateName};
use crate::clock;
use crate::disk::{check_disk_name, check_snapshot_name, new_row};
use crate::error::{Error, Kind, Result};
use crate::store::ledger::Ticket;
use crate::store::rows::BranchRow;
use crate::store::{
    Change, DiskRow, Edit, Head, Line, Settings, SnapshotInfo, StateKey, StateRow, Status, Store, Stretch, Tables,
};
use crate::units::{BLOCK_SIZE, BlockAddress, DiskId, Epoch, SnapshotId};

/// What a hidden disk begins as.
#[derive(Debug, Clone, Copy)]
pub enum Beginning {
    /// Nothing, with a size.
    Empty(u64),
    /// A disk as it is now.
    Disk(DiskId),
    /// A snapshot, which must be live.
    Snapshot(SnapshotId),
}

/// Who a received state is.
#[derive(Debug, Clone)]
pub struct Identity {
    /// Name of the snapshot.
    pub name: String,
    /// Its uuid, as where it comes from.
    pub uuid: Uuid,
    /// When it was taken there.
    pub created: u64,
}

/// Makes a hidden disk; `note` is kept with it.
///
/// # Errors
/// `Exists`, `NotFound`, `ReadOnly`; `Failed` for a retired snapshot.
pub fn begin(store: &Arc<Store>, name: &str, note: &str, from: Beginning) -> Result<DiskId> {
    assert!(name.starts_with('.'), "a name that no user can give");
    store.ledger.writable()?;
    if store.tables.read().has_disk(name) {
        return Err(Error::exists(format!("there is a hidden disk '{name}' already")));
    }
    let mut made = DiskId(0);
    let mut add = |edit: &mut Edit<'_>, key: StateKey| {
        made = branch_off(edit, key, name, note)?;
        Ok(())
    };
    match from {
        Beginning::Empty(size) => {
            let mut tables = store.tables.write();
            let mut edit = Edit::new(&mut tables);
            made = begin_empty(&mut edit, size, name, note);
            let ticket = store.ledger.submit(edit.finish())?;
            drop(tables);
            store.ledger.wait(ticket)?;
        }
        Beginning::Disk(disk) => drop(super::take::take_hidden_and(store, disk, &mut add)?),
        Beginning::Snapshot(id) => {
            let mut tables = store.tables.write();
            let (key, row) = tables.snapshot_by_id(id)?;
            if row.status != Status::Live {
                return Err(Error::failed(format!("snapshot '{}' has no data any more", row.name)));
            }
            let mut edit = Edit::new(&mut tables);
            add(&mut edit, key)?;
            let ticket = store.ledger.submit(edit.finish())?;
            drop(tables);
            store.ledger.wait(ticket)?;
        }
    }
    Ok(made)
}

fn begin_empty(edit: &mut Edit<'_>, size: u64, name: &str, note: &str) -> DiskId {
    let meta = edit.meta(|meta| {
        meta.disk = meta.disk.next();
        meta.branch = meta.branch.next();
        meta.epoch = meta.epoch.next();
    });
    edit.put_branch(meta.branch, BranchRow { parent: None, inherits: false, depth: 1, lineage: meta.branch });
    let row = new_row(name, size, meta.branch, meta.epoch, fresh_floor(edit));
    edit.put_disk(meta.disk, DiskRow { origin: Some(note.to_owned()), ..row });
    meta.disk
}

fn branch_off(edit: &mut Edit<'_>, key: StateKey, name: &str, note: &str) -> Result<DiskId> {
    let state = edit.tables.state(key).cloned().ok_or_else(|| Error::not_found("the snapshot was removed"))?;
    let (branch, epoch) = start_branch(edit, key)?;
    let id = edit.meta(|meta| meta.disk = meta.disk.next()).disk;
    let row = cloned(new_row(name, state.size, branch, epoch, fresh_floor(edit)), key, &state, note.to_owned());
    // What it takes counts as if the disk had it already.
    let held = edit.tables.held(state.disk) * BLOCK_SIZE;
    let quota = edit.tables.disk(state.disk).ok().and_then(|disk| disk.settings.quota);
    let settings = Settings { quota: quota.map(|quota| quota.saturating_sub(held).max(1)), ..row.settings };
    edit.put_disk(id, DiskRow { settings, ..row });
    Ok(id)
}

/// Changes the note of a hidden disk durably; what it was written before is flushed first.
///
/// # Errors
/// `ReadOnly`, or any error of the host.
pub fn note(store: &Arc<Store>, hidden: DiskId, note: &str) -> Result<()> {
    store.flush(&*store.head(hidden)?)?;
    let ticket = {
        let mut tables = store.tables.write();
        let mut edit = Edit::new(&mut tables);
        edit.change_disk(hidden, |row| row.origin = Some(note.to_owned()))?;
        store.ledger.submit(edit.finish())?
    };
    store.ledger.wait(ticket)
}

/// Removes a hidden disk and the snapshot that was taken for it.
///
/// # Errors
/// `Busy` while it is being written; `ReadOnly`.
pub fn abandon(store: &Arc<Store>, hidden: DiskId) -> Result<()> {
    store.refuse_leased(&*store.head(hidden)?)?;
    let (name, base) = {
        let tables = store.tables.read();
        let row = tables.disk(hidden)?;
        let own = row.base.and_then(|key| tables.state(key)).filter(|state| state.status == Status::Hidden);
        (row.name.clone(), own.map(|state| state.snapshot))
    };
    // First: without it the hidden disk can still be found and removed.
    if let Some(id) = base {
        super::remove::remove_hidden(store, id)?;
    }
    crate::disk::remove(store, &name, true)
}

/// Returns the newest snapshot of a disk, live or retired: the one that came into being last.
#[must_use]
pub fn newest(tables: &Tables, disk: DiskId) -> Option<(StateKey, &StateRow)> {
    tables.snapshots_of(disk).max_by_key(|(_, row)| row.snapshot)
}

/// Tells whether a disk may differ from one of its snapshots, live or retired.
///
/// What a shrink left beyond the end is unmapped first: if that happened later it would look like a write.
///
/// # Errors
/// `ReadOnly`, or any error of reading the catalog.
pub fn changed_since(store: &Arc<Store>, disk: DiskId, snapshot: SnapshotId) -> Result<bool> {
    let head = store.head(disk)?;
    let shrunk = store.tables.read().disk(disk)?.trim;
    if shrunk {
        store.trim(&head)?;
    }
    store.flush(&head)?;
    Ok(differs(store, &head, snapshot)? && differs_in_blocks(store, disk, snapshot)?)
}

/// As [`changed_since`], by the blocks and not by the index, in which what was unmapped beyond the end counts too.
fn differs_in_blocks(store: &Arc<Store>, disk: DiskId, snapshot: SnapshotId) -> Result<bool> {
    let named = |name: &str| store.tables.read().disk_id(name).is_ok_and(|id| id == disk);
    let name = store.disk_info_by_id(disk)?.name;
    let diff = match diff::open(store, &StateName::Hidden(snapshot), &StateName::Disk(name.clone())) {
        // They have nothing in common, or what is left of a retired one cannot be trusted.
        Err(error) if error.kind() != Kind::Io => return Ok(true),
        diff => diff?,
    };
    Ok(!named(&name) || diff.from_size() != diff.to_size() || diff.total()?.extents > 0)
}

/// Tells whether a disk that was flushed may differ from one of its snapshots, by the index alone.
fn differs(store: &Store, head: &Head, snapshot: SnapshotId) -> Result<bool> {
    let stretches = {
        let tables = store.tables.read();
        let (base, state) = tables.snapshot_by_id(snapshot)?;
        let row = tables.disk(head.id)?;
        if row.size != state.size || head.dirty_chunks() > 0 {
            return Ok(true);
        }
        match stretches_since(&tables, base, (row.branch, row.epoch))? {
            Some(stretches) => stretches,
            None => return Ok(true),
        }
    };
    Ok(!store.indexed_chunks(&stretches)?.is_empty())
}

/// Returns the epochs after `base` up to `node`; `None` when `base` is no ancestor of it.
fn stretches_since(tables: &Tables, base: StateKey, node: StateKey) -> Result<Option<Vec<Stretch>>> {
    let mut out = Vec::new();
    let (mut branch, mut upto) = node;
    loop {
        if branch == base.0 {
            if upto < base.1 {
                return Ok(None);
            }
            out.push(Stretch { branch, after: base.1, upto });
            return Ok(Some(out));
        }
        let Some(parent) = tables.branch(branch)?.parent else { return Ok(None) };
        // Older rows of a branch are copies of what it inherits.
        out.push(Stretch { branch, after: parent.1, upto });
        (branch, upto) = parent;
    }
}

/// What a disk is to become.
#[derive(Debug, Clone, Copy)]
pub enum Place<'a> {
    /// A new disk of this name.
    New(&'a str),
    /// A disk that must be as it was when the hidden disk was begun, with the same newest snapshot.
    Unchanged(DiskId),
    /// A disk whose state is kept as a snapshot, unless it is one already.
    Any(DiskId),
}

/// What [`adopt`] did.
#[derive(Debug, Clone)]
pub struct Adopted {
    /// The received state.
    pub snapshot: SnapshotInfo,
    /// Name of the snapshot that keeps what was there.
    pub kept: Option<String>,
}

/// Makes a hidden disk the state of a disk, in one frame. `holder` is the lease that the caller has on the disk.
///
/// # Errors
/// `Exists` for a name that is taken; `Busy` when somebody writes to the disk; `Failed` when it has changed. Nothing has
/// happened then.
pub fn adopt(store: &Arc<Store>, hidden: DiskId, place: Place<'_>, who: &Identity, holder: &str) -> Result<Adopted> {
    check_snapshot_name(&who.name)?;
    match place {
        Place::New(name) => adopt_as_new(store, hidden, name, who),
        Place::Unchanged(disk) => adopt_into(store, hidden, disk, who, holder, false),
        Place::Any(disk) => adopt_into(store, hidden, disk, who, holder, true),
    }
}

/// Enters the epoch that `row` was writing as a snapshot of `disk`; returns id and stamp.
fn put_snapshot(
    edit: &mut Edit<'_>,
    row: &DiskRow,
    floor: u64,
    disk: DiskId,
    who: &Identity,
) -> Result<(SnapshotId, u64)> {
    let id = edit.meta(|meta| meta.snapshot = meta.snapshot.next()).snapshot;
    let stamp = edit.tables.next_stamp(clock::wall_seconds());
    edit.put_stamp(row.epoch, stamp);
    let state = StateRow {
        status: Status::Live,
        snapshot: id,
        disk,
        name: who.name.clone(),
        uuid: who.uuid,
        size: row.size,
        trim: row.trim,
        created: who.created,
        stamp,
        referenced: row.referenced,
        written: row.written,
        floor,
        sealed: false,
        holds: Vec::new(),
    };
    edit.put_state((row.branch, row.epoch), state);
    Ok((id, stamp))
}

fn adopt_as_new(store: &Arc<Store>, hidden: DiskId, name: &str, who: &Identity) -> Result<Adopted> {
    check_disk_name(name)?;
    let head = store.head(hidden)?;
    let mut order = head.order();
    store.flush_ordered(&head, &mut order)?;
    let gate = head.gate.write();
    let line = head.line();
    let (id, ticket) = {
        let mut tables = store.tables.write();
        if tables.has_disk(name) {
            return Err(Error::exists(format!("there is a disk '{name}' already")));
        }
        if head.dirty_chunks() > 0 {
            return Err(Error::busy("the received data is still being written"));
        }
        store.ledger.writable()?;
        let old = tables.disk(hidden)?.clone();
        let mut edit = Edit::new(&mut tables);
        let (id, stamp) = put_snapshot(&mut edit, &old, line.floor, hidden, who)?;
        let epoch = edit.meta(|meta| meta.epoch = meta.epoch.next()).epoch;
        let floor = fresh_floor(&edit);
        let base = Some((line.branch, line.epoch));
        let row = DiskRow {
            name: name.to_owned(),
            epoch,
            floor,
            base,
            written: 0,
            stamp,
            origin: None,
            touched: true,
            ..old
        };
        edit.put_disk(hidden, row);
        let ticket = store.ledger.submit(edit.finish())?;
        drop(head.switch(Line { epoch, floor, ..line }));
        head.thawed();
        head.forget_segment();
        (id, ticket)
    };
    drop(gate);
    drop(order);
    store.ledger.wait(ticket)?;
    let name = name.to_owned();
    store.tell(&Change::Disk { id: hidden, name, was: None, gone: false, resized: false, data: false });
    finish(store, id, None)
}

fn finish(store: &Arc<Store>, id: SnapshotId, kept: Option<SnapshotId>) -> Result<Adopted> {
    let tell = |id: SnapshotId| {
        let info = store.snapshot_info_by_id(id)?;
        let (disk, disk_name, name) = (info.disk_id, info.disk.clone(), info.name.clone());
        store.tell(&Change::Snapshot { disk, disk_name, id, name, was: None, gone: false, retired: false });
        Ok::<_, Error>(info)
    };
    let kept = kept.map(tell).transpose()?.map(|info| info.name);
    let snapshot = tell(id)?;
    store.wake_keeper();
    Ok(Adopted { snapshot, kept })
}

/// The two disks of an adoption: the hidden one, and the one it becomes the state of.
struct Pair<'a> {
    source: &'a Head,
    target: &'a Head,
    /// As the tables had them.
    from: DiskRow,
    old: DiskRow,
}

fn adopt_into(
    store: &Arc<Store>,
    hidden: DiskId,
    disk: DiskId,
    who: &Identity,
    holder: &str,
    keep: bool,
) -> Result<Adopted> {
    let (source, target) = (store.head(hidden)?, store.head(disk)?);
    // By id, as everywhere.
    let (first, second) = if hidden < disk { (&source, &target) } else { (&target, &source) };
    let mut orders = (first.order(), second.order());
    let gates = store.flush_and_stop_all([(first, &mut orders.0), (second, &mut orders.1)])?;
    let ended = target.line();
    let own = Stretch { branch: ended.branch, after: Epoch(ended.epoch.0 - 1), upto: ended.epoch };
    let unwritten = store.indexed_chunks(&[own])?.is_empty();
    let newest = newest(&store.tables.read(), disk).map(|(_, row)| (row.snapshot, row.status));
    let safe = match newest {
        Some((id, Status::Live)) => !differs(store, &target, id)?,
        _ => false,
    };
    let (id, kept, ticket) = {
        refuse_foreign(&target, holder)?;
        if source.dirty_chunks() + target.dirty_chunks() > 0 {
            return Err(Error::busy("the disk is being written to"));
        }
        let mut tables = store.tables.write();
        store.ledger.writable()?;
        let pair = Pair {
            source: &source,
            target: &target,
            from: tables.disk(hidden)?.clone(),
            old: tables.disk(disk)?.clone(),
        };
        if tables.snapshot(disk, &who.name).is_ok() {
            let (disk, name) = (&pair.old.name, &who.name);
            return Err(Error::exists(format!("there is a snapshot '{disk}@{name}' already")));
        }
        let (from, old) = (&pair.from, &pair.old);
        let same = unwritten && old.base == from.base && base_size(&tables, from) == Some(old.size);
        if !(keep || same) {
            return Err(Error::failed(format!("disk '{}' was changed while the stream came in", pair.old.name)));
        }
        commit(store, &mut tables, &pair, who, keep && !safe)?
    };
    drop(gates);
    drop(orders);
    store.ledger.wait(ticket)?;
    store.cache.forget(ended.owner);
    store.forget_head(hidden);
    let name = store.disk_info_by_id(disk)?.name;
    store.tell(&Change::Disk { id: disk, name, was: None, gone: false, resized: true, data: true });
    finish(store, id, kept)
}

fn refuse_foreign(head: &Head, holder: &str) -> Result<()> {
    match head.tenancy.holder() {
        Some(other) if other != holder => Err(Error::busy(format!("the disk is open for writing by {other}"))),
        _ => Ok(()),
    }
}

/// Size of the state that a disk began as.
fn base_size(tables: &Tables, row: &DiskRow) -> Option<u64> {
    row.base.and_then(|key| tables.state(key)).map(|state| state.size)
}

/// The frame of an adoption; nothing is written while it is made up.
fn commit(
    store: &Store,
    tables: &mut Tables,
    pair: &Pair<'_>,
    who: &Identity,
    keep: bool,
) -> Result<(SnapshotId, Option<SnapshotId>, Ticket)> {
    let (hidden, disk) = (pair.source.id, pair.target.id);
    let (from, ended) = (pair.source.line(), pair.target.line());
    let name = keep.then(|| free_name(tables, disk));
    let hidden_base = |key| Some((key, tables.state(key).filter(|row| row.status == Status::Hidden)?.snapshot));
    let own = pair.from.base.and_then(hidden_base);
    let segments: Vec<_> = tables.segments().filter(|(_, row)| row.disk == hidden).map(|(id, _)| id).collect();
    let mut edit = Edit::new(tables);
    let mut kept = None;
    match name {
        Some(name) => {
            let who = Identity { name, uuid: Uuid::new_v4(), created: clock::wall_seconds() };
            kept = Some(put_snapshot(&mut edit, &pair.old, ended.floor, disk, &who)?.0);
        }
        None => Store::abandon_head(&mut edit, &ended, disk, &pair.old),
    }
    let (id, stamp) = put_snapshot(&mut edit, &pair.from, from.floor, disk, who)?;
    if let Some((key, snapshot)) = own {
        edit.pass_on_written(snapshot)?;
        edit.change_state(key, |row| row.status = Status::Dying);
    }
    let epoch = edit.meta(|meta| meta.epoch = meta.epoch.next()).epoch;
    // Its next block begins a segment of its own, above every address there is.
    let floor = BlockAddress::new(edit.tables.meta.segment.next(), 0).raw();
    edit.delete_disk(hidden);
    let row = DiskRow {
        branch: from.branch,
        epoch,
        floor,
        base: Some((from.branch, from.epoch)),
        size: pair.from.size,
        trim: pair.from.trim,
        modified: pair.from.modified,
        stamp,
        referenced: pair.from.referenced,
        written: 0,
        touched: true,
        ..pair.old.clone()
    };
    edit.put_disk(disk, row);
    for segment in segments {
        edit.change_segment(segment, |row| row.disk = disk)?;
    }
    let ticket = store.ledger.submit(edit.finish())?;
    pair.source.set_gone();
    pair.target.crcs.adopt(&pair.source.crcs);
    let line = Line { owner: store.new_owner(), branch: from.branch, epoch, floor, size: pair.from.size };
    drop(pair.target.switch(line));
    pair.target.thawed();
    pair.target.forget_segment();
    pair.target.referenced.store(i64::try_from(pair.from.referenced).unwrap_or(i64::MAX), Ordering::Relaxed);
    Ok((id, kept, ticket))
}

/// Returns a name for the snapshot that keeps what was there.
fn free_name(tables: &Tables, disk: DiskId) -> String {
    let time = clock::show(clock::wall_seconds()).replace(['-', ':'], "").replace(' ', "-");
    let names = (1..).map(|n| if n == 1 { format!("kept-{time}") } else { format!("kept-{time}-{n}") });
    names.into_iter().find(|name| tables.snapshot(disk, name).is_err()).expect("numbers do not run out")
}
