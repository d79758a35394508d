//! How the structs of the core become answers.

use super::{
    Checked, Damage, Disk, Problem, Pruned, Rebuilt, RebuiltDisk, Received, Reverted, Scrubbed, Sent, Settings,
    Snapshot,
};
use crate::disk::ScrubReport;
use crate::snapshot::{PruneLine, RevertReport};
use crate::store::{self, CheckReport, DiskInfo, EnospcPolicy, RebuildReport, SnapshotInfo, SnapshotState};
use crate::stream::{ReceiveReport, SendReport};
use crate::units::BLOCK_SIZE;

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
            origin: info.origin,
            holder: info.holder,
            reserved: info.reserved,
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
            holds: info.holds,
        }
    }
}

impl Reverted {
    pub(in crate::api) fn new(disk: String, snapshot: String, report: RevertReport) -> Self {
        Self { disk, snapshot, dropped: report.dropped, kept: report.kept }
    }
}

impl From<SendReport> for Sent {
    fn from(report: SendReport) -> Self {
        let SendReport { disk, snapshot, uuid, base, start, data, zeros, stream, unverified } = report;
        Self { disk, snapshot, uuid, base, start, data, zeros, stream, unverified }
    }
}

impl From<ReceiveReport> for Received {
    fn from(report: ReceiveReport) -> Self {
        let ReceiveReport { disk, snapshot, uuid, base, start, data, zeros, kept } = report;
        Self { disk, snapshot, uuid, base, start, data, zeros, kept }
    }
}

impl From<PruneLine> for Pruned {
    fn from(line: PruneLine) -> Self {
        Self { name: line.snapshot, kept: line.kept, why: line.why }
    }
}

impl From<CheckReport> for Checked {
    fn from(report: CheckReport) -> Self {
        let problems = report.problems.into_iter().map(|p| Problem { what: p.what, fixed: p.fixed }).collect();
        Self {
            problems,
            disks: report.disks,
            snapshots: report.snapshots,
            segments: report.segments,
            blocks: report.blocks,
            leaked: report.leaked,
            kept: report.kept,
        }
    }
}

impl From<RebuildReport> for Rebuilt {
    fn from(report: RebuildReport) -> Self {
        let disk = |disk: store::RebuiltDisk| RebuiltDisk {
            disk: disk.name,
            snapshots: disk.snapshots,
            referenced: disk.blocks * BLOCK_SIZE,
            live: disk.live,
            lost: disk.lost,
        };
        Self {
            rebuilt: report.rebuilt,
            complete: report.complete,
            source: report.source,
            frames: report.frames,
            kept: report.kept,
            unnamed: report.unnamed,
            disks: report.disks.into_iter().map(disk).collect(),
            notes: report.notes,
        }
    }
}

impl From<ScrubReport> for Scrubbed {
    fn from(report: ScrubReport) -> Self {
        let damage = |d: crate::disk::Damage| Damage {
            disk: d.disk,
            snapshot: d.snapshot,
            offset: d.offset,
            segment: d.segment,
            why: d.why,
        };
        Self {
            blocks: report.blocks,
            bytes: report.bytes,
            unverified: report.unverified,
            damaged: report.damaged.into_iter().map(damage).collect(),
        }
    }
}
