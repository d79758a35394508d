//! How the structs of the core become answers.

use super::{Disk, Pruned, Reverted, Settings, Snapshot};
use crate::snapshot::{PruneLine, RevertReport};
use crate::store::{self, DiskInfo, EnospcPolicy, SnapshotInfo, SnapshotState};

impl From<&store::Settings> for Settings {
    fn from(settings: &store::Settings) -> Self {
        let enospc = match settings.enospc {
            EnospcPolicy::Fail => "fail",
            EnospcPolicy::Wait => "wait",
        };
        Self {
            enospc: enospc.to_owned(),
            quota: settings.quota,
            iops: settings.iops,
            bandwidth: settings.bandwidth,
            extent_size: settings.extent_size,
        }
    }
}

impl From<DiskInfo> for Disk {
    fn from(info: DiskInfo) -> Self {
        Self {
            id: info.id.0,
            settings: Settings::from(&info.settings),
            name: info.name,
            uuid: info.uuid,
            size: info.size,
            referenced: info.referenced,
            written: info.written,
            unique: None,
            created: info.created,
            modified: info.modified,
            snapshots: info.snapshots as u64,
            origin_gone: info.origin.as_ref().is_some_and(|origin| origin.gone),
            origin: info.origin.map(|origin| origin.name),
            holder: info.holder,
            reserved: info.reserved,
            waiting: info.waiting as u64,
        }
    }
}

impl From<SnapshotInfo> for Snapshot {
    fn from(info: SnapshotInfo) -> Self {
        let state = match info.state {
            SnapshotState::Live => "live",
            SnapshotState::Retired => "retired",
        };
        Self {
            id: info.id.0,
            disk: info.disk,
            disk_id: info.disk_id.0,
            name: info.name,
            uuid: info.uuid,
            size: info.size,
            referenced: info.referenced,
            written: info.written,
            unique: None,
            created: info.created,
            state: state.to_owned(),
            record: None,
            holds: info.holds,
        }
    }
}

impl Reverted {
    pub(in crate::api) fn new(disk: String, snapshot: String, report: RevertReport) -> Self {
        Self { disk, snapshot, dropped: report.dropped, at_most: report.at_most, kept: report.kept }
    }
}

impl From<PruneLine> for Pruned {
    fn from(line: PruneLine) -> Self {
        Self { name: line.snapshot, kept: line.kept, why: line.why, error: line.error }
    }
}
