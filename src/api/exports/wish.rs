//! What a request to attach asks for, checked: kind, disks, address, keys.
//!
//! # Rules
//! 1. Whatever can be refused without trying is refused here, before anything was begun.
//! 2. Disks and snapshots become ids here, and are names again only where they are shown.
//! 3. An address beyond this host is served only to clients that prove who they are, or if the request says `unprotected`.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use crate::api::{Request, Target};
use crate::error::{Error, Result};
use crate::pool::{ExportKind, ExportRow};
use crate::store::{SnapshotState, Store};
use crate::units::{DiskId, SnapshotId};

/// Most disks and snapshots of one export.
const TARGETS_MAX: usize = 1024;
/// Queues of a vhost-user device at most.
const QUEUES_MAX: u16 = 64;

/// A disk or snapshot that is served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum What {
    Disk(DiskId),
    Snapshot(SnapshotId),
}

impl What {
    /// Finds what a name stands for.
    pub(super) fn find(store: &Arc<Store>, name: &str) -> Result<Self> {
        match Target::parse(name)? {
            Target::Disk(disk) => Ok(Self::Disk(store.disk_info(&disk)?.id)),
            Target::Snapshot(disk, snapshot) => {
                let info = store.snapshot_info(&disk, &snapshot)?;
                if info.state == SnapshotState::Retired {
                    return Err(Error::failed(format!("snapshot '{name}' is retired: its data is gone"))
                        .hint("it can still be the base of a diff"));
                }
                Ok(Self::Snapshot(info.id))
            }
        }
    }

    /// Returns its name as of now.
    ///
    /// # Errors
    /// `NotFound` when it is gone.
    pub(super) fn name(self, store: &Store) -> Result<String> {
        match self {
            Self::Disk(id) => Ok(store.disk_info_by_id(id)?.name),
            Self::Snapshot(id) => {
                let info = store.snapshot_info_by_id(id)?;
                // One that was removed and is held has its row still, without a name.
                if info.name.is_empty() {
                    return Err(Error::not_found(format!("a snapshot of disk {} was removed", info.disk)));
                }
                Ok(format!("{}@{}", info.disk, info.name))
            }
        }
    }

    /// Tells whether it is there and has its data.
    pub(super) fn is_readable(self, store: &Store) -> bool {
        match self {
            Self::Disk(id) => store.disk_info_by_id(id).is_ok(),
            Self::Snapshot(id) => {
                let info = store.snapshot_info_by_id(id);
                info.is_ok_and(|info| info.state == SnapshotState::Live && !info.name.is_empty())
            }
        }
    }

    /// Returns what a row of the list shows, disks first.
    pub(super) fn of(row: &ExportRow) -> Vec<Self> {
        let disks = row.disks.iter().map(|id| Self::Disk(DiskId(*id)));
        disks.chain(row.snapshots.iter().map(|id| Self::Snapshot(SnapshotId(*id)))).collect()
    }
}

/// Reads a request to attach as the row of an export, which has no number yet; `persist` is not in it.
pub(super) fn read(store: &Arc<Store>, request: &Request) -> Result<ExportRow> {
    let Request::Attach { kind, disks, socket, listen, tls_cert, tls_key, tls_ca, read_only, queues, .. } = request
    else {
        return Err(Error::failed("this request attaches nothing"));
    };
    let mut row = ExportRow {
        id: 0,
        kind: *kind,
        disks: Vec::new(),
        snapshots: Vec::new(),
        socket: socket.clone(),
        listen: listen.clone(),
        tls_cert: tls_cert.clone(),
        tls_key: tls_key.clone(),
        tls_ca: tls_ca.clone(),
        read_only: *read_only,
        queues: queues.unwrap_or(u16::from(*kind == ExportKind::VhostUser)),
    };
    check_address(&row, request)?;
    if disks.is_empty() || disks.len() > TARGETS_MAX {
        return Err(Error::usage(format!("{} disks cannot be attached at once", disks.len()))
            .hint(format!("name 1 to {TARGETS_MAX} disks or snapshots")));
    }
    for name in disks {
        let (ids, new) = match What::find(store, name)? {
            What::Disk(id) => (&mut row.disks, id.0),
            What::Snapshot(id) => (&mut row.snapshots, id.0),
        };
        if ids.contains(&new) {
            return Err(Error::usage(format!("'{name}' is named twice")).hint("one name is enough"));
        }
        ids.push(new);
    }
    // A snapshot is never written, and an export of nothing else says so.
    row.read_only |= row.disks.is_empty();
    check_kind(&row)?;
    Ok(row)
}

fn check_kind(row: &ExportRow) -> Result<()> {
    if row.kind == ExportKind::Nbd {
        return if row.queues == 0 {
            Ok(())
        } else {
            Err(Error::usage("NBD has no queues").hint("leave --queues out; clients open more connections instead"))
        };
    }
    if row.disks.len() + row.snapshots.len() != 1 {
        return Err(Error::usage("a vhost-user device is one disk").hint("attach each to a socket of its own"));
    }
    if !(1..=QUEUES_MAX).contains(&row.queues) {
        return Err(Error::usage(format!("{} queues cannot be: a device has 1 to {QUEUES_MAX}", row.queues)));
    }
    if row.listen.is_some() || row.tls_key.is_some() {
        return Err(Error::usage("vhost-user shares memory, which works on this host only")
            .hint("give --socket; for other hosts there is nbd"));
    }
    Ok(())
}

fn check_address(row: &ExportRow, request: &Request) -> Result<()> {
    for path in [&row.socket, &row.tls_cert, &row.tls_key, &row.tls_ca].into_iter().flatten() {
        if !Path::new(path).is_absolute() {
            return Err(Error::usage(format!("the path '{path}' is not absolute"))
                .hint("the server has a working directory of its own: give the whole path"));
        }
    }
    if row.tls_cert.is_some() != row.tls_key.is_some() || (row.tls_ca.is_some() && row.tls_cert.is_none()) {
        return Err(Error::usage("TLS needs a certificate and its key").hint("give both --tls-cert and --tls-key"));
    }
    match (&row.socket, &row.listen) {
        (Some(_), None) if row.tls_cert.is_some() => {
            Err(Error::usage("TLS is for --listen").hint("who opens the socket is decided by its mode and owner"))
        }
        (Some(_), None) => Ok(()),
        (None, Some(listen)) => check_listen(listen, row, request),
        _ => Err(Error::usage("an export has one address").hint("give either --socket PATH or --listen ADDRESS:PORT")),
    }
}

fn check_listen(listen: &str, row: &ExportRow, request: &Request) -> Result<()> {
    let address = parse_listen(listen)?;
    if address.port() == 0 && matches!(request, Request::Attach { persist: true, .. }) {
        return Err(Error::usage("port 0 is another port at each start, and clients would not find it again")
            .hint("name the port of an export that persists"));
    }
    if address.ip().is_loopback()
        || row.tls_ca.is_some()
        || matches!(request, Request::Attach { unprotected: true, .. })
    {
        return Ok(());
    }
    Err(Error::usage(format!("whoever reaches {address} could read and write what is served there"))
        .hint("ask clients for certificates with --tls-ca, or say --unprotected if only friends can reach it"))
}

/// Parses `ADDRESS:PORT`.
pub(super) fn parse_listen(text: &str) -> Result<SocketAddr> {
    text.parse().map_err(|_| {
        Error::usage(format!("'{text}' is no address and port"))
            .hint("write them like 127.0.0.1:10809 or [::1]:10809; names are not looked up")
    })
}
