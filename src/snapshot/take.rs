//! Taking snapshots.
//!
//! ```text
//! flush every disk, unhindered
//! orders of all disks, by id
//!   gates of all disks, by id --- the stop begins: writes in flight end, new ones wait
//!     every disk switches to a new epoch in memory
//!   gates open                --- the stop ends
//!   sync what was written before it; submit the last changes of the ended epochs; one frame with all snapshots
//! ```
//!
//! The first flush only makes the rest short. Who waits for the stop itself, as a virtual machine that stands still for it
//! does, has flushed before and leaves it out, but for what an earlier process left unsynced ([`take_at_once`]).

use std::sync::Arc;
use std::sync::atomic::Ordering;

use uuid::Uuid;

use crate::clock;
use crate::disk::check_snapshot_name;
use crate::error::{Error, Result};
use crate::store::{Change, Edit, Head, Line, SnapshotInfo, StateKey, StateRow, Status, Store};
use crate::units::{DiskId, Epoch, SnapshotId};

/// One disk of a snapshot.
struct Target {
    head: Arc<Head>,
    name: String,
    status: Status,
}

/// What the switch of one disk left to do.
struct Switched {
    ended: Line,
    next: Line,
}

/// Takes snapshots of several disks as one instant.
///
/// # Errors
/// `NotFound`, `Exists`, `Usage` for a bad name or a disk named twice, `ReadOnly`. None is taken then.
pub fn take(store: &Arc<Store>, targets: &[(String, String)]) -> Result<Vec<SnapshotInfo>> {
    take_named(store, targets, Way::Unhindered, &mut |_, _| Ok(()))
}

/// As [`take`], but the instant comes at once and is told when it has been; the rest takes as long as it takes, and if it
/// fails no snapshot was taken. They are held from the beginning: no crash leaves one that is not.
///
/// # Errors
/// As [`take`].
pub fn take_at_once(
    store: &Arc<Store>,
    targets: &[(String, String)],
    hold: &str,
    instant: &dyn Fn(),
) -> Result<Vec<SnapshotInfo>> {
    take_named(store, targets, Way::AtOnce(instant), &mut |edit, key| {
        edit.change_state(key, |row| row.holds.push(hold.to_owned()));
        Ok(())
    })
}

/// How snapshots are taken.
#[derive(Clone, Copy)]
enum Way<'a> {
    /// What was written is flushed before, so that it takes nobody long.
    Unhindered,
    /// The stop comes first, and is told.
    AtOnce(&'a dyn Fn()),
}

fn take_named(
    store: &Arc<Store>,
    targets: &[(String, String)],
    way: Way<'_>,
    besides: &mut Besides<'_>,
) -> Result<Vec<SnapshotInfo>> {
    let mut list = Vec::new();
    for (disk, name) in targets {
        check_snapshot_name(name)?;
        let id = store.tables.read().disk_id(disk)?;
        list.push(Target { head: store.head(id)?, name: name.clone(), status: Status::Live });
    }
    let ids = take_all(store, list, way, besides)?;
    let infos: Vec<_> = ids.into_iter().map(|id| store.snapshot_info_by_id(id)).collect::<Result<_>>()?;
    for info in &infos {
        let (disk, disk_name) = (info.disk_id, info.disk.clone());
        let (id, name) = (info.id, info.name.clone());
        store.tell(&Change::Snapshot { disk, disk_name, id, name, was: None, gone: false, retired: false });
    }
    // In the order in which they were asked for.
    let place = |info: &SnapshotInfo| targets.iter().position(|t| t.0 == info.disk && t.1 == info.name);
    let mut infos = infos;
    infos.sort_by_key(place);
    Ok(infos)
}

/// Takes a snapshot that is not listed: the program needs one.
///
/// # Errors
/// As [`take`].
pub(super) fn take_hidden(store: &Arc<Store>, disk: DiskId) -> Result<SnapshotId> {
    take_hidden_and(store, disk, &mut |_, _| Ok(()))
}

/// What goes into the frame of a snapshot besides it.
type Besides<'a> = dyn FnMut(&mut Edit<'_>, StateKey) -> Result<()> + 'a;

/// As [`take_hidden`], and in the same frame what `besides` adds.
///
/// # Errors
/// As [`take`], and what `besides` returns, which poisons the pool: it must not fail for any other reason than damage.
pub(super) fn take_hidden_and(store: &Arc<Store>, disk: DiskId, besides: &mut Besides<'_>) -> Result<SnapshotId> {
    let target = Target { head: store.head(disk)?, name: String::new(), status: Status::Hidden };
    Ok(take_all(store, vec![target], Way::Unhindered, besides)?[0])
}

fn take_all(
    store: &Arc<Store>,
    mut targets: Vec<Target>,
    way: Way<'_>,
    besides: &mut Besides<'_>,
) -> Result<Vec<SnapshotId>> {
    store.ledger.writable()?;
    targets.sort_by_key(|target| target.head.id);
    if let Some(pair) = targets.windows(2).find(|pair| pair[0].head.id == pair[1].head.id) {
        return Err(Error::usage(format!("the same disk is named twice ('{}' and '{}')", pair[0].name, pair[1].name)));
    }
    refuse_taken(store, &targets)?;
    for target in &targets {
        match way {
            Way::Unhindered => store.flush(&target.head)?,
            // What a killed process left has to be synced all the same, and cannot be once the epochs are switched.
            Way::AtOnce(_) => store.sync_earlier(&target.head)?,
        }
    }
    // The orders keep flushes of the new epochs behind the frame of the snapshot.
    let orders: Vec<_> = targets.iter().map(|target| target.head.order()).collect();
    refuse_taken(store, &targets)?;
    let (switched, slabs) = stop_and_switch(store, &targets)?;
    if let Way::AtOnce(instant) = way {
        instant();
    }
    drop(slabs);
    let result = complete(store, &targets, &switched, besides);
    if let Err(error) = &result {
        // The epochs have been switched in memory and no frame says so: only a replay gets that right again.
        store.ledger.poison(error);
    }
    for target in &targets {
        target.head.thawed();
    }
    drop(orders);
    store.counters.snapshots.fetch_add(targets.len() as u64, Ordering::Relaxed);
    store.wake_keeper();
    result
}

fn refuse_taken(store: &Store, targets: &[Target]) -> Result<()> {
    let tables = store.tables.read();
    for target in targets.iter().filter(|target| !target.name.is_empty()) {
        let disk = tables.disk(target.head.id)?;
        if tables.snapshot(target.head.id, &target.name).is_ok() {
            return Err(Error::exists(format!("there is a snapshot '{}@{}' already", disk.name, target.name)));
        }
    }
    Ok(())
}

type Slabs = Vec<std::collections::HashMap<crate::units::ChunkIndex, crate::store::Slab>>;

/// The stop. Nothing here waits for a disk.
fn stop_and_switch(store: &Store, targets: &[Target]) -> Result<(Vec<Switched>, Slabs)> {
    let begun = clock::now();
    let gates: Vec<_> = targets.iter().map(|target| target.head.gate.write()).collect();
    let first = {
        let mut tables = store.tables.write();
        for target in targets {
            tables.disk(target.head.id)?;
        }
        let first = tables.meta.epoch;
        tables.meta.epoch = Epoch(first.0 + targets.len() as u64);
        first
    };
    let mut switched = Vec::with_capacity(targets.len());
    let mut slabs = Vec::with_capacity(targets.len());
    for (n, target) in targets.iter().enumerate() {
        let ended = target.head.line();
        let floor = target.head.next_address(store);
        let next = Line { epoch: Epoch(first.0 + 1 + n as u64), floor, ..ended };
        slabs.push(target.head.switch(next));
        switched.push(Switched { ended, next });
    }
    drop(gates);
    let stop = u64::try_from(begun.elapsed().as_nanos()).unwrap_or(u64::MAX);
    store.counters.snapshot_stop_ns.store(stop, Ordering::Relaxed);
    store.counters.snapshot_stop_ns_max.fetch_max(stop, Ordering::Relaxed);
    Ok((switched, slabs))
}

/// Makes the ended epochs durable and commits the snapshots in one frame.
fn complete(
    store: &Arc<Store>,
    targets: &[Target],
    switched: &[Switched],
    besides: &mut Besides<'_>,
) -> Result<Vec<SnapshotId>> {
    for (target, switched) in targets.iter().zip(switched) {
        let captures = target.head.take_frozen(store, &switched.ended, switched.ended.epoch);
        store.sync_and_settle(&target.head)?;
        store.submit_captures(target.head.id, &switched.ended, captures)?;
    }
    let now = clock::wall_seconds();
    let (ids, ticket) = {
        let mut tables = store.tables.write();
        let mut edit = Edit::new(&mut tables);
        let mut ids = Vec::new();
        for (target, switched) in targets.iter().zip(switched) {
            let id = edit.meta(|meta| meta.snapshot = meta.snapshot.next()).snapshot;
            ids.push(id);
            let disk = edit.tables.disk(target.head.id)?.clone();
            let key = (switched.ended.branch, switched.ended.epoch);
            // Whole seconds, no two alike in the pool: extent files have them as their time.
            let stamp = edit.tables.next_stamp(now);
            edit.put_stamp(key.1, stamp);
            let state = StateRow {
                status: target.status,
                snapshot: id,
                disk: target.head.id,
                name: target.name.clone(),
                uuid: Uuid::new_v4(),
                size: switched.ended.size,
                trim: disk.trim,
                created: now,
                stamp,
                referenced: disk.referenced,
                written: disk.written,
                floor: switched.ended.floor,
                sealed: false,
                holds: Vec::new(),
            };
            edit.put_state(key, state);
            edit.change_disk(target.head.id, |row| {
                row.epoch = switched.next.epoch;
                row.floor = switched.next.floor;
                row.base = Some(key);
                row.written = 0;
                row.stamp = stamp;
            })?;
            besides(&mut edit, key)?;
        }
        (ids, store.ledger.submit(edit.finish())?)
    };
    store.ledger.wait(ticket)?;
    for target in targets {
        target.head.roll_segment_if_full(store);
    }
    Ok(ids)
}
