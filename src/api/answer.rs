//! What a pool answers, as it stands in JSON: on the socket and behind `--json`.
//!
//! # Rules
//! 1. Every answer says which it is: `{"answer":"disk", ...}`. Names are never changed, fields only added.
//! 2. Sizes and amounts are bytes, times are seconds since 1970 in UTC, what is not known or not set is `null`.
//! 3. These types carry nothing but data. What a disk, a snapshot or a setting is inside is turned into what it is here in
//!    `from_core` and nowhere else. A report (check, rebuild, scrub, streams, verify) is nothing but its fields from the
//!    start: the struct of the module that makes it is the answer, and a test pins how each is written.

mod from_core;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::checkpoint::{Checkpoint, VerifyReport as VerifyCheckpointReport};
use crate::disk::ScrubReport;
use crate::snapshot::diff::{Extent, VerifyReport};
use crate::store::{CheckReport, RebuildReport, RecordFault};
use crate::stream::{ReceiveReport, SendReport};

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
        /// What of it is lost; `null` when nothing is.
        damage: Option<String>,
        /// Why it takes no new data; `null` while there is room.
        full: Option<String>,
        /// Which records of retired snapshots are missing or damaged; `null` when none is known to be.
        #[serde(default)]
        records: Option<String>,
    },
    /// One snapshot.
    Snapshot(Snapshot),
    /// Snapshots: those of a disk, oldest first, or those just taken.
    Snapshots {
        /// The snapshots.
        snapshots: Vec<Snapshot>,
        /// Which of those that were retired somebody still reads: their data is freed when the last one lets go.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        open: Vec<String>,
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
    Checked(CheckReport),
    /// What a rebuild of the catalog brought back.
    Rebuilt(RebuildReport),
    /// What scrub found.
    Scrubbed(ScrubReport),
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
    /// A disk or snapshot waits for a virtual machine.
    VmDisk(VmDisk),
    /// What was served is served no longer.
    Detached {
        /// The exports that ended.
        exports: Vec<Export>,
    },
    /// What is served, by number.
    Exports {
        /// The exports.
        exports: Vec<Export>,
        /// For whom disks are kept.
        #[serde(default)]
        awaited: Vec<Awaited>,
    },
    /// An increment directory was written.
    Exported(Exported),
    /// A stream was written.
    Sent(SendReport),
    /// A stream became a snapshot.
    Received(ReceiveReport),
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
    /// Checkpoints, by machine and name.
    Checkpoints {
        /// The checkpoints.
        checkpoints: Vec<Checkpoint>,
    },
    /// One checkpoint.
    Checkpoint(Box<Checkpoint>),
    /// What reading a checkpoint found.
    CheckpointVerified(VerifyCheckpointReport),
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
    /// Whether that is not there any more.
    #[serde(default)]
    pub origin_gone: bool,
    /// Who has it open for writing.
    pub holder: Option<String>,
    /// Who had it open for writing before a restart, and nobody else gets it for a minute.
    #[serde(default)]
    pub reserved: Option<String>,
    /// Writes that wait for room on the host or in the quota.
    #[serde(default)]
    pub waiting: u64,
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
    /// Why a retired one cannot be the base of a diff, as far as that is known: its record is missing or damaged.
    #[serde(default)]
    pub record: Option<RecordFault>,
    /// Who holds it.
    pub holds: Vec<String>,
}

/// What a revert did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Reverted {
    /// The disk.
    pub disk: String,
    /// The snapshot it is now like.
    pub snapshot: String,
    /// Bytes written since the last snapshot that are gone.
    pub dropped: u64,
    /// It may have been less than that: a snapshot in between was removed or retired.
    #[serde(default)]
    pub at_most: bool,
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
    /// Why it could not be removed: it stays, although no rule says so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
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
    /// The virtual machine it is for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm: Option<String>,
    /// Connections there are now.
    pub clients: u64,
    /// Disks it has open for writing.
    pub writing: Vec<String>,
    /// `on`; `failed` when it could not be started again; `ending` when it was detached and the host has not ended its I/O;
    /// `off` when no server is running.
    pub state: String,
    /// Why it failed.
    pub error: Option<String>,
}

/// Somebody who wrote to a disk when the last server ended, and may come back to it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Awaited {
    /// The disk.
    pub disk: String,
    /// Who.
    pub holder: String,
    /// The virtual machine that this is, if it is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm: Option<String>,
    /// For how long the disk is kept; `None` when that begins with the next server.
    pub seconds: Option<u64>,
}

/// Where a virtual machine finds its disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmDisk {
    /// Number of the export.
    pub export: u64,
    /// Path of its socket, which speaks NBD.
    pub socket: String,
    /// The name of the export there.
    pub name: String,
    /// What to ask for when the machine comes back to a server that was restarted.
    pub claim: String,
    /// Whether nothing can be written.
    pub read_only: bool,
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
    /// What of it is lost; `null` when nothing is.
    pub damage: Option<String>,
    /// Why it takes no new data; `null` while there is room.
    pub full: Option<String>,
    /// Which records of retired snapshots are missing or damaged; `null` when none is known to be.
    #[serde(default)]
    pub records: Option<String>,
    /// Bytes still free on the host file system.
    pub free: u64,
    /// Of them, bytes that new data may take; the rest is kept for deleting and for metadata.
    #[serde(default)]
    pub available: u64,
    /// Size of the host file system.
    pub total: u64,
    /// Whether the server is about to end: what it refuses now, the next one may not.
    #[serde(default)]
    pub ending: bool,
}
