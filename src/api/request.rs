//! What can be asked of a pool.
//!
//! # Rules
//! 1. One variant per command, tagged by `command` in JSON: `{"command":"create","disk":"web","size":10737418240}`.
//! 2. Sizes are bytes. Names are written as on the command line (`DISK`, `DISK@SNAPSHOT`).
//! 3. Every variant has braces, empty ones too: only then does serde refuse unknown fields in it.
//! 4. A field that has a default may be left out, and is left out when it has it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::pool::ExportKind;

fn is_false(value: &bool) -> bool {
    !*value
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes references")]
fn is_zero(value: &u32) -> bool {
    *value == 0
}

fn user() -> String {
    "user".to_owned()
}

/// A request; see the module for how it is written in JSON.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// Makes a disk; answered with the disk.
    Create {
        /// Name of the new disk.
        disk: String,
        /// Size in bytes, rounded up to 512.
        size: u64,
    },
    /// Lists the disks, or the snapshots of one.
    Ls {
        /// The disk whose snapshots are wanted.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        disk: Option<String>,
    },
    /// Tells everything about a disk or a snapshot, also what it alone holds.
    Info {
        /// `DISK` or `DISK@SNAPSHOT`.
        name: String,
    },
    /// Changes the size of a disk.
    Resize {
        /// The disk.
        disk: String,
        /// New size in bytes, rounded up to 512.
        size: u64,
        /// Allows the disk to lose its tail.
        #[serde(default, skip_serializing_if = "is_false")]
        shrink: bool,
    },
    /// Renames a disk or a snapshot.
    Rename {
        /// `DISK` or `DISK@SNAPSHOT`.
        old: String,
        /// The new name, of the same sort; a snapshot stays with its disk.
        new: String,
    },
    /// Removes a disk or a snapshot.
    Rm {
        /// `DISK` or `DISK@SNAPSHOT`.
        name: String,
        /// Removes a disk together with its snapshots.
        #[serde(default, skip_serializing_if = "is_false")]
        recursive: bool,
    },
    /// Takes snapshots, all at one instant or none.
    Snapshot {
        /// `DISK@SNAPSHOT`, each disk once.
        snapshots: Vec<String>,
    },
    /// Makes a disk that begins as a snapshot.
    Clone {
        /// `DISK@SNAPSHOT`.
        snapshot: String,
        /// Name of the new disk.
        disk: String,
    },
    /// Takes a disk back to one of its snapshots.
    Revert {
        /// `DISK@SNAPSHOT`.
        snapshot: String,
        /// Keeps what was written since the last snapshot as a snapshot of this name.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        keep: Option<String>,
    },
    /// Frees the data of snapshots and keeps what a diff needs of them; all or none.
    Retire {
        /// `DISK@SNAPSHOT`.
        snapshots: Vec<String>,
        /// Answers only when the records are durable and the data is freed.
        #[serde(default, skip_serializing_if = "is_false")]
        wait: bool,
    },
    /// Tells what changed between two states. No data is read.
    Diff {
        /// `DISK`, `DISK@SNAPSHOT` (live or retired) or `-`.
        from: String,
        /// `DISK`, `DISK@SNAPSHOT` or `-`.
        to: String,
        /// Leaves out the extents.
        #[serde(default, skip_serializing_if = "is_false")]
        summary: bool,
        /// Absolute path of a pipe, or of a file that is empty or not there, into which the extents are written, however
        /// many there are: one JSON object a line. The answer has none then.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        output: Option<String>,
    },
    /// Tells how many bytes the next increment of a disk would carry.
    Estimate {
        /// The disk.
        disk: String,
        /// The base; the newest snapshot, live or retired, when left out.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        from: Option<String>,
    },
    /// Compares the data of two states with their diff.
    VerifyDiff {
        /// `DISK`, `DISK@SNAPSHOT` or `-`.
        from: String,
        /// `DISK` or `DISK@SNAPSHOT`.
        to: String,
    },
    /// Brings the record of a retired snapshot back that the pool has lost.
    RecordImport {
        /// Absolute path of the record, as the server sees it.
        path: String,
    },
    /// Keeps a snapshot from being removed.
    Hold {
        /// `DISK@SNAPSHOT`.
        snapshot: String,
        /// Who holds it.
        #[serde(default = "user")]
        tag: String,
    },
    /// Lets go of a held snapshot.
    Release {
        /// `DISK@SNAPSHOT`.
        snapshot: String,
        /// Who held it.
        #[serde(default = "user")]
        tag: String,
    },
    /// Removes the snapshots of a disk that no rule keeps.
    Prune {
        /// The disk.
        disk: String,
        /// How many to keep.
        keep: Keep,
        /// Only tells what would be removed.
        #[serde(default, skip_serializing_if = "is_false")]
        dry_run: bool,
    },
    /// Changes settings of a disk.
    Set {
        /// The disk.
        disk: String,
        /// Values by key, as on the command line.
        settings: BTreeMap<String, String>,
    },
    /// Tells the settings of a disk.
    Get {
        /// The disk.
        disk: String,
    },
    /// Proves what can be proven about the metadata.
    Check {
        /// Mends leaks.
        #[serde(default, skip_serializing_if = "is_false")]
        repair: bool,
        /// Makes the map again from the seal files.
        #[serde(default, skip_serializing_if = "is_false")]
        rebuild: bool,
    },
    /// Reads every sealed block and compares its checksum.
    Scrub {},
    /// Gives freed space back to the host.
    Reclaim {
        /// Answers only when all of it is back.
        #[serde(default, skip_serializing_if = "is_false")]
        wait: bool,
    },
    /// Tells the counters, as Prometheus text.
    Metrics {},
    /// Makes everything acknowledged durable.
    Flush {},
    /// Makes a disk from an image file.
    Import {
        /// Absolute path of the image, as the server sees it.
        path: String,
        /// `raw`, `qcow2` or `vmdk`; found out when left out.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        format: Option<String>,
        /// Name of the new disk.
        disk: String,
    },
    /// Mounts the extent files of a snapshot by themselves.
    MountExport {
        /// `DISK@SNAPSHOT`.
        snapshot: String,
        /// Absolute path of the directory to mount at, as the server sees it.
        path: String,
        /// Lets other users in too.
        #[serde(default, skip_serializing_if = "is_false")]
        allow_other: bool,
    },
    /// Serves disks and snapshots over NBD, or one of them to a guest over vhost-user.
    Attach {
        /// `nbd` or `vhost-user`.
        kind: ExportKind,
        /// `DISK` or `DISK@SNAPSHOT`; one for vhost-user.
        disks: Vec<String>,
        /// Absolute path of the Unix socket to listen on.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        socket: Option<String>,
        /// Address and port to listen on instead; `nbd` only.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        listen: Option<String>,
        /// Absolute path of the certificate (PEM); clients must use TLS then.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        tls_cert: Option<String>,
        /// Absolute path of its key (PEM).
        #[serde(default, skip_serializing_if = "Option::is_none")]
        tls_key: Option<String>,
        /// Absolute path of the roots (PEM) that certificates of clients must lead to.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        tls_ca: Option<String>,
        /// Serves clients on other hosts without asking who they are.
        #[serde(default, skip_serializing_if = "is_false")]
        unprotected: bool,
        /// Lets nobody write, and takes no lease.
        #[serde(default, skip_serializing_if = "is_false")]
        read_only: bool,
        /// Queues of a vhost-user device; 1 when left out.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        queues: Option<u16>,
        /// Serves it again after a restart.
        #[serde(default, skip_serializing_if = "is_false")]
        persist: bool,
    },
    /// Serves a disk or snapshot to a virtual machine of this pool, over NBD on a socket of its own. It ends when the machine
    /// has gone.
    AttachVm {
        /// Name of the machine.
        vm: String,
        /// `DISK` or `DISK@SNAPSHOT`.
        disk: String,
        /// Lets it not write, and takes no lease.
        #[serde(default, skip_serializing_if = "is_false")]
        read_only: bool,
        /// What the machine was given for this disk before: it gets the same one, or an error if somebody else may have
        /// changed it since.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        claim: Option<String>,
    },
    /// Ends everything that is served to a virtual machine; its disks are not kept for it.
    DetachVm {
        /// Name of the machine.
        vm: String,
    },
    /// Ends an export: what is in flight is finished, clients are cut off.
    Detach {
        /// Number of the export, or the `DISK` or `DISK@SNAPSHOT` it serves.
        name: String,
    },
    /// Lists what is attached.
    Exports {},
    /// Writes what changed between two snapshots as a directory of plain files.
    Export {
        /// `DISK@SNAPSHOT` it begins at, live or retired; the whole disk when left out.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        from: Option<String>,
        /// `DISK@SNAPSHOT` it leads to.
        to: String,
        /// Absolute path of the directory, new or empty, as the server sees it.
        path: String,
    },
    /// Writes a stream: the changes from one snapshot to another, or the rest of a stream that was cut off.
    Send {
        /// `DISK@SNAPSHOT` the stream leads to; left out only with `resume`.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        snapshot: Option<String>,
        /// `DISK@SNAPSHOT` it starts from, live or retired; nothing when left out.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        from: Option<String>,
        /// Token of a stream that was cut off.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        resume: Option<String>,
        /// Leaves everything uncompressed.
        #[serde(default, skip_serializing_if = "is_false")]
        no_compress: bool,
        /// Absolute path of a pipe, or of a file that is not there yet, as the server sees it.
        output: String,
    },
    /// Makes a stream the newest snapshot of a disk.
    Receive {
        /// The disk; made when it is not there and the stream is a full one.
        disk: String,
        /// Name of the snapshot; as the sender calls it when left out.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        name: Option<String>,
        /// Replaces what the disk is, and keeps it as a snapshot.
        #[serde(default, skip_serializing_if = "is_false")]
        force: bool,
        /// Absolute path of a pipe or file with the stream, as the server sees it.
        input: String,
    },
    /// Tells where the interrupted stream of a disk goes on.
    ReceiveToken {
        /// The disk.
        disk: String,
    },
    /// Drops what arrived of an interrupted stream.
    ReceiveAbort {
        /// The disk.
        disk: String,
    },
    /// Lists the checkpoints of all machines, or of one.
    CheckpointLs {
        /// The machine whose checkpoints are wanted.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        machine: Option<String>,
    },
    /// Tells everything about a checkpoint.
    CheckpointInfo {
        /// `MACHINE@CHECKPOINT`.
        checkpoint: String,
    },
    /// Reads all of a checkpoint, and of those it is based on, and compares checksums.
    CheckpointVerify {
        /// `MACHINE@CHECKPOINT`.
        checkpoint: String,
    },
    /// Removes a checkpoint; what it needed can be removed after that.
    CheckpointRm {
        /// `MACHINE@CHECKPOINT`.
        checkpoint: String,
    },
    /// Takes snapshots of disks for a checkpoint that is being made, under its name, and keeps them for it. The disks are not
    /// flushed first, and it is told when the instant has been (`{"instant":{}}`): the virtual machine stands still meanwhile.
    /// The answer comes when they are durable.
    CheckpointDisks {
        /// `MACHINE@CHECKPOINT`.
        checkpoint: String,
        /// The disks, each once.
        disks: Vec<String>,
    },
    /// Removes the snapshots that were taken for a checkpoint that came to nothing.
    CheckpointForget {
        /// `MACHINE@CHECKPOINT`.
        checkpoint: String,
    },
    /// Makes a checkpoint of what another program saved of a virtual machine.
    CheckpointSave {
        /// `MACHINE@CHECKPOINT`; there must be none of that name.
        checkpoint: String,
        /// Absolute path of the memory: a flat file, whose holes are zeros.
        memory: String,
        /// Absolute path of the state of the devices, which is kept as it is.
        state: String,
        /// `DISK@SNAPSHOT` of the disks at that instant, in the order in which the machine has them; they are kept for it.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        disks: Vec<String>,
        /// `MACHINE@CHECKPOINT` it is based on: only what differs is stored.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        parent: Option<String>,
    },
    /// Makes a checkpoint that is based on others one that is not.
    CheckpointFlatten {
        /// `MACHINE@CHECKPOINT`.
        checkpoint: String,
    },
    /// Tells who answers, and how the pool is.
    Status {},
    /// Unmounts, closes the pool and ends the server.
    Shutdown {},
}

/// How many snapshots to keep of each sort; zero keeps none for that reason.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Keep {
    /// The newest.
    #[serde(skip_serializing_if = "is_zero")]
    pub last: u32,
    /// The newest of an hour.
    #[serde(skip_serializing_if = "is_zero")]
    pub hourly: u32,
    /// The newest of a day.
    #[serde(skip_serializing_if = "is_zero")]
    pub daily: u32,
    /// The newest of a week.
    #[serde(skip_serializing_if = "is_zero")]
    pub weekly: u32,
    /// The newest of a month.
    #[serde(skip_serializing_if = "is_zero")]
    pub monthly: u32,
    /// The newest of a year.
    #[serde(skip_serializing_if = "is_zero")]
    pub yearly: u32,
}
