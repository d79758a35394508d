//! What a pool answers, as it stands in JSON: on the socket and behind `--json`.
//!
//! # Rules
//! 1. Every answer says which it is: `{"answer":"disk", ...}`. Names are never changed, fields only added.
//! 2. Sizes and amounts are bytes, times are seconds since 1970 in UTC, what is not known or not set is `null`.
//! 3. These types carry nothing but data; the core's own structs are turned into them here and nowhere else.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::disk::ScrubReport;
use crate::snapshot::diff::{Extent, VerifyReport};
use crate::snapshot::{PruneLine, RevertReport};
use crate::store::{self, CheckReport, DiskInfo, EnospcPolicy, RebuildReport, SnapshotInfo, SnapshotState};
use crate::stream::{ReceiveReport, SendReport};
use crate::units::BLOCK_SIZE;

/// An answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "kebab-case")]
pub enum Response {
    /// One disk.
    Disk(Disk),
    /// All disks, by name.
    Disks {
        /// The disks.
        disks: Vec<Disk>,
        /// Why the pool refuses writes; `null` when it does not.
        health: Option<String>,
    },
    /// One snapshot.
    Snapshot(Snapshot),
    /// Snapshots: those of a disk, oldest first, or those just taken.
    Snapshots {
        /// The snapshots.
        snapshots: Vec<Snapshot>,
    },
    /// A disk or snapshot is gone.
    Removed {
        /// What it was called.
        name: String,
    },
    /// A disk is what its snapshot was.
    Reverted(Reverted),
    /// What changed between two states.
    Diff(Diff),
    /// What the next increment would carry.
    Estimate(Diff),
    /// How data and diff compare.
    Verified(Verified),
    /// What prune kept and removed.
    Pruned {
        /// Whether this only tells what would happen.
        dry_run: bool,
        /// Each snapshot, oldest first.
        snapshots: Vec<Pruned>,
    },
    /// The settings of a disk.
    Settings {
        /// The disk.
        disk: String,
        /// Its settings.
        settings: Settings,
    },
    /// What check found.
    Checked(Checked),
    /// What a rebuild of the catalog brought back.
    Rebuilt(Rebuilt),
    /// What scrub found.
    Scrubbed(Scrubbed),
    /// Space was given back.
    Reclaimed {
        /// Bytes given back while this waited.
        freed: u64,
        /// Whether all of it is back; otherwise the rest follows in the background.
        complete: bool,
    },
    /// The counters.
    Metrics {
        /// Prometheus text.
        text: String,
    },
    /// Everything acknowledged is durable.
    Flushed {},
    /// An image became a disk.
    Imported(Imported),
    /// The extent files of a snapshot are mounted.
    Mounted {
        /// `DISK@SNAPSHOT`.
        snapshot: String,
        /// Where.
        mount: String,
    },
    /// A disk or snapshot is served.
    Attached(Export),
    /// What was served is served no longer.
    Detached {
        /// The exports that ended.
        exports: Vec<Export>,
    },
    /// What is served, by number.
    Exports {
        /// The exports.
        exports: Vec<Export>,
    },
    /// An increment directory was written.
    Exported(Exported),
    /// A stream was written.
    Sent(Sent),
    /// A stream became a snapshot.
    Received(Received),
    /// Where an interrupted stream goes on.
    Token {
        /// What `send` takes to resume.
        token: String,
        /// First byte of the disk that has not safely arrived.
        offset: u64,
    },
    /// What arrived of a stream was dropped.
    Aborted {
        /// The disk it was for.
        disk: String,
    },
    /// Who answers, and how the pool is.
    Status(Status),
    /// The server is about to unmount and end.
    Stopping {
        /// Its process.
        pid: u32,
    },
}

/// A disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    /// Number in this pool; never reused.
    pub id: u64,
    /// Name.
    pub name: String,
    /// Identity in the world.
    pub uuid: Uuid,
    /// What a guest sees.
    pub size: u64,
    /// Bytes that are mapped.
    pub referenced: u64,
    /// Bytes written since the newest snapshot.
    pub written: u64,
    /// Bytes nothing else holds; only `info` computes it.
    pub unique: Option<u64>,
    /// When it was made.
    pub created: u64,
    /// When its content last changed.
    pub modified: u64,
    /// How many snapshots it has.
    pub snapshots: u64,
    /// `DISK@SNAPSHOT` it was cloned from.
    pub origin: Option<String>,
    /// Who has it open for writing.
    pub holder: Option<String>,
    /// Who had it open for writing before a restart, and nobody else gets it for a minute.
    #[serde(default)]
    pub reserved: Option<String>,
    /// Its settings.
    pub settings: Settings,
}

/// What changed between two states.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Diff {
    /// The older side, as it was asked for.
    pub from: String,
    /// The newer side.
    pub to: String,
    /// Bytes of the older side; 0 for nothing.
    pub from_size: u64,
    /// Bytes of the newer side.
    pub to_size: u64,
    /// Bytes of changed data.
    pub data: u64,
    /// Bytes that read as zeros now.
    pub zero: u64,
    /// How many extents there are.
    pub count: u64,
    /// The extents, in order; `null` when only the sums were asked for.
    pub extents: Option<Vec<Extent>>,
}

/// How the data of two states compares with their diff.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Verified {
    /// The older side, as it was asked for.
    pub from: String,
    /// The newer side.
    pub to: String,
    /// What was found.
    #[serde(flatten)]
    pub report: VerifyReport,
}

/// The settings of a disk, keys as on the command line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Settings {
    /// What happens to writes when there is no room: `fail` or `wait`.
    pub enospc: String,
    /// Most bytes it may hold.
    pub quota: Option<u64>,
    /// Most operations a second.
    pub iops: Option<u64>,
    /// Most bytes a second.
    pub bandwidth: Option<u64>,
    /// Bytes of a file of the extent tree.
    pub extent_size: u64,
}

/// A snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    /// Number in this pool; never reused.
    pub id: u64,
    /// The disk.
    pub disk: String,
    /// Number of the disk.
    pub disk_id: u64,
    /// Name, without the disk.
    pub name: String,
    /// Identity in the world.
    pub uuid: Uuid,
    /// Size of the disk at the time.
    pub size: u64,
    /// Bytes that are mapped.
    pub referenced: u64,
    /// Bytes written since the snapshot before it.
    pub written: u64,
    /// Bytes that only this one holds; only `info` computes it.
    pub unique: Option<u64>,
    /// When it was taken.
    pub created: u64,
    /// `live` or `retired`.
    pub state: String,
    /// Who holds it.
    pub holds: Vec<String>,
}

/// What a revert did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reverted {
    /// The disk.
    pub disk: String,
    /// The snapshot it is now like.
    pub snapshot: String,
    /// Bytes written since the last snapshot that are gone.
    pub dropped: u64,
    /// The snapshot that keeps them instead.
    pub kept: Option<String>,
}

/// What prune decided about a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pruned {
    /// Its name, without the disk.
    pub name: String,
    /// Whether it stays.
    pub kept: bool,
    /// Which rule said so.
    pub why: String,
}

/// What check found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Checked {
    /// What is wrong; empty when nothing is.
    pub problems: Vec<Problem>,
    /// Disks looked at.
    pub disks: u64,
    /// Snapshots looked at.
    pub snapshots: u64,
    /// Segments looked at.
    pub segments: u64,
    /// Blocks that are mapped.
    pub blocks: u64,
    /// Bytes that nothing names.
    pub leaked: u64,
    /// Of them, bytes that a rebuild left and that stay until `--repair`.
    #[serde(default)]
    pub kept: u64,
}

/// What a rebuild of the catalog brought back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rebuilt {
    /// Whether there is a new catalog; otherwise the old one is sound and nothing was touched.
    pub rebuilt: bool,
    /// Whether everything that was ever acknowledged is there.
    pub complete: bool,
    /// The catalog or backup it was made from; `null` when there was none.
    pub source: Option<String>,
    /// Frames of the journal that were used.
    pub frames: u64,
    /// What the old catalog is called now.
    pub kept: Option<String>,
    /// Bytes in segments that nothing names; they stay until `check --repair`.
    pub unnamed: u64,
    /// Each disk.
    pub disks: Vec<RebuiltDisk>,
    /// What else there is to say, in sentences.
    pub notes: Vec<String>,
}

/// A disk that a rebuild brought back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RebuiltDisk {
    /// Its name.
    pub disk: String,
    /// How many snapshots it has.
    pub snapshots: u64,
    /// Bytes that are mapped in it.
    pub referenced: u64,
    /// The snapshot it is like now; `null` when it is as it was, or empty.
    pub live: Option<String>,
    /// What it lost, in sentences.
    pub lost: Vec<String>,
}

/// One thing check found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// A sentence.
    pub what: String,
    /// Whether it was mended.
    pub fixed: bool,
}

/// What scrub found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Scrubbed {
    /// Blocks whose checksum was compared.
    pub blocks: u64,
    /// Bytes read.
    pub bytes: u64,
    /// Blocks that have no checksum yet.
    pub unverified: u64,
    /// Blocks that are not what was written.
    pub damaged: Vec<Damage>,
}

/// A block that is not what was written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Damage {
    /// The disk that shows it.
    pub disk: String,
    /// The snapshot that shows it; `null` for the disk itself.
    pub snapshot: Option<String>,
    /// Byte offset in the disk.
    pub offset: u64,
    /// The segment file.
    pub segment: u64,
    /// A sentence.
    pub why: String,
}

/// What an import did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Imported {
    /// The new disk.
    pub disk: Disk,
    /// What the image was.
    pub format: String,
    /// Bytes read from it.
    pub bytes_read: u64,
    /// Bytes written to the disk; holes are not.
    pub bytes_written: u64,
}

/// Something that is served on a socket or a port.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Export {
    /// Its number; kept over restarts if it persists.
    pub id: u64,
    /// `nbd` or `vhost-user`.
    pub kind: String,
    /// `DISK` or `DISK@SNAPSHOT`, as they are called now.
    pub disks: Vec<String>,
    /// Path of its Unix socket.
    pub socket: Option<String>,
    /// Address and port it listens on instead.
    pub listen: Option<String>,
    /// Whether clients must use TLS.
    pub tls: bool,
    /// Whether nobody can write through it.
    pub read_only: bool,
    /// Queues of a vhost-user device.
    pub queues: Option<u16>,
    /// Whether it is served again after a restart.
    pub persist: bool,
    /// Connections there are now.
    pub clients: u64,
    /// Disks it has open for writing.
    pub writing: Vec<String>,
    /// `on`; `failed` when it could not be started again; `off` when no server is running.
    pub state: String,
    /// Why it failed.
    pub error: Option<String>,
}

/// What an increment directory holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exported {
    /// The directory.
    pub path: String,
    /// `DISK@SNAPSHOT` it begins at; `null` when it carries the whole disk.
    pub from: Option<String>,
    /// `DISK@SNAPSHOT` it leads to.
    pub to: String,
    /// Data files.
    pub files: u64,
    /// Bytes in them.
    pub data: u64,
    /// Of them, bytes that are there only because files were joined.
    pub joined: u64,
    /// Bytes that become zeros.
    pub zeros: u64,
}

/// A stream that was written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sent {
    /// The disk.
    pub disk: String,
    /// The snapshot the stream leads to, without the disk.
    pub snapshot: String,
    /// Its identity.
    pub uuid: Uuid,
    /// Identity of the base; `null` when it starts from nothing.
    pub base: Option<Uuid>,
    /// First byte of the disk that was sent; 0 unless it was resumed.
    pub start: u64,
    /// Bytes of data.
    pub data: u64,
    /// Bytes of zeros.
    pub zeros: u64,
    /// Bytes of the stream.
    pub stream: u64,
    /// Bytes of data that have no checksum yet to compare with.
    pub unverified: u64,
}

/// A stream that became a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Received {
    /// The disk.
    pub disk: String,
    /// The snapshot, without the disk.
    pub snapshot: String,
    /// Its identity, as the sender has it.
    pub uuid: Uuid,
    /// Identity of the base; `null` when the stream starts from nothing.
    pub base: Option<Uuid>,
    /// First byte of the disk that was in the stream; 0 unless it was resumed.
    pub start: u64,
    /// Bytes of data.
    pub data: u64,
    /// Bytes of zeros.
    pub zeros: u64,
    /// The snapshot that keeps what was there.
    pub kept: Option<String>,
}

/// Who answers, and how the pool is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// The process.
    pub pid: u32,
    /// Version of the program.
    pub version: String,
    /// The pool directory.
    pub pool: String,
    /// Identity of the pool.
    pub uuid: Uuid,
    /// Where it is mounted.
    pub mount: Option<String>,
    /// Why the pool refuses writes; `null` when it does not.
    pub health: Option<String>,
    /// Bytes still free on the host file system.
    pub free: u64,
    /// Size of the host file system.
    pub total: u64,
}

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
    pub(super) fn new(disk: String, snapshot: String, report: RevertReport) -> Self {
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
