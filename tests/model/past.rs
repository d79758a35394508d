//! Retiring, and diffs of any two states.

use afterimage::error::Error;
use afterimage::snapshot;
use afterimage::snapshot::diff::{self, Extent, StateName};
use afterimage::store::SnapshotState;

use super::run::Run;
use super::twin::{BLOCK, Frame, NOTHING, UNKNOWN};

/// A state that a diff can have as a side.
#[derive(Clone)]
pub(super) struct Side {
    pub(super) name: StateName,
    pub(super) frame: Frame,
    pub(super) lineage: Option<u64>,
}

impl Side {
    pub(super) fn nothing() -> Self {
        Self { name: StateName::Nothing, frame: Frame::default(), lineage: None }
    }

    /// Tells whether two states can be compared.
    pub(super) fn is_akin(&self, other: &Self) -> bool {
        self.lineage.is_none() || other.lineage.is_none() || self.lineage == other.lineage
    }
}

/// Tells whether states were refused because they cannot be compared.
pub(super) fn says_strangers(error: &Error) -> bool {
    error.to_string().contains("nothing in common")
}

impl Run {
    pub(super) fn any_snapshot_or_retired(&mut self) -> Option<(String, String)> {
        let all: Vec<_> = self
            .twin
            .disks
            .iter()
            .flat_map(|(disk, twin)| {
                twin.snapshots.keys().chain(twin.retired.keys()).map(move |snap| (disk.clone(), snap.clone()))
            })
            .collect();
        (!all.is_empty()).then(|| all[self.next(all.len() as u64) as usize].clone())
    }

    pub(super) fn retire(&mut self) {
        if self.twin.disks.values().map(|disk| disk.retired.len()).sum::<usize>() >= 12 {
            return self.remove_retired();
        }
        let Some((name, snap)) = self.any_snapshot() else { return };
        let mut after = self.twin.clone();
        let disk = after.disks.get_mut(&name).unwrap();
        let frame = disk.snapshots.remove(&snap).unwrap();
        disk.retired.insert(snap.clone(), frame);
        after.mix_epochs();
        let double = self.same_state_is_retired(&name, &snap);
        let target = vec![(name, snap)];
        // Records are named after the identity: there is one of each.
        let refused = |error: &Error| double && error.to_string().contains("is the same state as");
        if self.attempt_unless(&format!("retire {target:?}"), after, refused, |store| {
            snapshot::retire(store, &target)?;
            assert!(!double, "{target:?}: two snapshots of one identity are retired");
            Ok(())
        }) {
            self.counts.retires += 1;
        }
    }

    /// Tells whether another snapshot with the identity of this one is retired: a stream makes such.
    fn same_state_is_retired(&self, disk: &str, snap: &str) -> bool {
        let own = self.store().snapshot_info(disk, snap).unwrap();
        let mut all = self.twin.disks.keys().flat_map(|disk| self.store().snapshots(disk).unwrap());
        all.any(|info| info.uuid == own.uuid && info.id != own.id && info.state == SnapshotState::Retired)
    }

    fn remove_retired(&mut self) {
        let found =
            self.twin.disks.iter().find_map(|(disk, twin)| Some((disk.clone(), twin.retired.keys().next()?.clone())));
        let Some((name, snap)) = found else { return };
        let mut after = self.twin.clone();
        after.disks.get_mut(&name).unwrap().retired.remove(&snap);
        after.mix_epochs();
        self.attempt(&format!("rm {name}@{snap} (retired)"), after, |store| snapshot::remove(store, &name, &snap));
    }

    /// All states there are.
    pub(super) fn sides(&self) -> Vec<Side> {
        let mut all = vec![Side::nothing()];
        for (disk, twin) in &self.twin.disks {
            let lineage = Some(twin.lineage);
            all.push(Side { name: StateName::Disk(disk.clone()), frame: twin.live.frame(), lineage });
            for (snap, frame) in twin.snapshots.iter().chain(&twin.retired) {
                let name = StateName::Snapshot(disk.clone(), snap.clone());
                all.push(Side { name, frame: frame.clone(), lineage });
            }
        }
        all
    }

    pub(super) fn any_of(&mut self, mut sides: Vec<Side>) -> Option<Side> {
        (!sides.is_empty()).then(|| sides.swap_remove(self.next(sides.len() as u64) as usize))
    }

    pub(super) fn diff(&mut self) {
        let (from, to) = (self.sides(), self.sides());
        let (Some(from), Some(mut to)) = (self.any_of(from), self.any_of(to)) else { return };
        if self.media.is_down() {
            return;
        }
        if to.name == StateName::Nothing {
            // It counts as an empty disk as large as the other side.
            let size = from.frame.bytes.len();
            to.frame = Frame::new(vec![0; size], vec![NOTHING; size.div_ceil(BLOCK)]);
        }
        let after = self.twin.clone();
        let akin = from.is_akin(&to);
        let mut found = None;
        let done = self.attempt(&format!("diff {} {}", from.name, to.name), after, |store| {
            match diff::open(store, &from.name, &to.name) {
                Err(error) if !akin && says_strangers(&error) => Ok(()),
                Err(error) => Err(error),
                Ok(diff) => {
                    assert!(akin, "a diff of {} and {}, which are strangers", from.name, to.name);
                    found = Some(diff.extents()?);
                    Ok(())
                }
            }
        });
        if let Some(extents) = found.filter(|_| done) {
            self.counts.diffs += 1;
            check("diff", &from, &to, &extents);
        }
    }
}

/// Compares the extents with the twin, block by block.
pub(super) fn check(what: &str, from: &Side, to: &Side, extents: &[Extent]) {
    let what = format!("{what} {} {}", from.name, to.name);
    let size = to.frame.bytes.len();
    let mut told = vec![None; size.div_ceil(BLOCK)];
    let mut end = 0;
    let mut last: Option<bool> = None;
    for extent in extents {
        let (start, length) = (extent.offset as usize, extent.length as usize);
        assert!(start >= end && length > 0 && start + length <= size, "{what}: {extent:?} after {end} of {size}");
        assert!(start > end || last != Some(extent.zero), "{what}: {extent:?} could have been joined");
        assert!(start % BLOCK == 0 && (length % BLOCK == 0 || start + length == size), "{what}: {extent:?}");
        told[start / BLOCK..(start + length).div_ceil(BLOCK)].fill(Some(extent.zero));
        (end, last) = (start + length, Some(extent.zero));
    }
    let new_from = if from.frame.bytes.len() < size { from.frame.bytes.len() / BLOCK } else { usize::MAX };
    for (block, told) in told.into_iter().enumerate() {
        let bytes = |frame: &Frame| -> Vec<u8> {
            let end = ((block + 1) * BLOCK).min(size);
            (block * BLOCK..end).map(|at| frame.bytes.get(at).copied().unwrap_or(0)).collect()
        };
        let (old, new) = (bytes(&from.frame), bytes(&to.frame));
        assert!(told.is_some() || old == new, "{what}: block {block} differs and is not told");
        assert!(told != Some(true) || new.iter().all(|byte| *byte == 0), "{what}: block {block} is not zeros");
        let was = if block >= new_from { UNKNOWN } else { from.frame.writes.get(block).copied().unwrap_or(NOTHING) };
        let is = to.frame.writes[block];
        let expected = match (was, is) {
            _ if block >= new_from && is == NOTHING => Some(true),
            _ if block >= new_from && is != UNKNOWN => Some(false),
            (UNKNOWN, _) | (_, UNKNOWN) => continue,
            (was, is) if was == is => None,
            (_, NOTHING) => Some(true),
            _ => Some(false),
        };
        assert_eq!(told, expected, "{what}: block {block} had write {was} and has {is}");
    }
}
