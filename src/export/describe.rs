//! From the names of two snapshots to the description of what leads from one to the other.
//!
//! # Rules
//! 1. Both are snapshots: only a snapshot has an identity that a target can be compared with. The new one is live and held
//!    from before the diff to the end of the reading; the old one may be retired.
//! 2. The identities are those of the states that were compared, also when somebody renames in between: then it is refused.

use std::sync::Arc;

use super::{Increment, Planner, Side};
use crate::error::{Error, Result};
use crate::snapshot::diff::{self, StateName};
use crate::snapshot::{self, SnapshotDevice};
use crate::store::Store;

/// Describes what leads from the snapshot `from` (or from nothing) to the snapshot `to`, each given as disk and snapshot;
/// reads no data. The device is the new state.
///
/// # Errors
/// `NotFound`; `Failed` when the new state is retired or the old one is no usable base; any error of the diff.
pub fn describe(
    store: &Arc<Store>,
    from: Option<(&str, &str)>,
    to: (&str, &str),
) -> Result<(Increment, Arc<SnapshotDevice>)> {
    let device = snapshot::open(store, to.0, to.1)?;
    let (from_side, to_side) = (from.map(|from| side(store, from)).transpose()?, side(store, to)?);
    let name = |(disk, snapshot): (&str, &str)| StateName::Snapshot(disk.to_owned(), snapshot.to_owned());
    let diff = diff::open(store, &from.map_or(StateName::Nothing, name), &name(to))?;
    let mut planner = Planner::default();
    diff.each(&mut |extent| {
        planner.push(extent);
        Ok(())
    })?;
    // The device is of the compared state if the name meant the same one before and after.
    let compared = (diff.from_uuid(), diff.to_uuid());
    let same = store.snapshot_info(to.0, to.1)?.id == device.id();
    if compared != (from_side.as_ref().map(|side| side.uuid), Some(to_side.uuid)) || !same {
        return Err(Error::busy("the snapshots were renamed or replaced meanwhile").hint("try again"));
    }
    Ok((Increment { from: from_side, to: to_side, plan: planner.finish() }, device))
}

fn side(store: &Store, (disk, snapshot): (&str, &str)) -> Result<Side> {
    let (info, disk) = (store.snapshot_info(disk, snapshot)?, store.disk_info(disk)?);
    Ok(Side {
        disk: info.disk,
        disk_uuid: disk.uuid,
        snapshot: info.name,
        uuid: info.uuid,
        size: info.size,
        created: info.created,
    })
}
