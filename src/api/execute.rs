//! The one function that answers a request: both ways in end here.
//!
//! # Rules
//! 1. Everything a request says is checked here or below, never only in the command line: a program on the socket is
//!    not the command line.
//! 2. Synchronous, one request per call, any number of calls at once. What it must not do during what else is the
//!    business of the store.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::answer::{Exported, Imported, Reverted, Status};
use super::name::absolute;
use super::{Keep, Request, Response, Target};
use crate::disk::{self, BlockDevice as _};
use crate::error::{Error, Result};
use crate::progress::Progress;
use crate::snapshot;
use crate::store::{DiskInfo, SnapshotInfo, Store};

/// Most snapshots one request may take: their disks stop together, so there is a limit.
const SNAPSHOTS_AT_ONCE_MAX: usize = 1024;

/// Answers a request.
///
/// `status` and `metrics` leave out what only a server knows, and `shutdown`, `mount-export` and what is about exports fail,
/// because here there is none; [`super::Service`] adds them.
///
/// # Errors
/// Whatever the request runs into; `Kind::Usage` for one that makes no sense.
pub fn execute(store: &Arc<Store>, request: Request, progress: &dyn Progress) -> Result<Response> {
    match request {
        Request::Create { disk, size } => {
            let disk = Target::disk(&disk)?;
            disk::create(store, &disk, disk::round_size(size)?).map(disk_answer)
        }
        Request::Ls { disk } => list(store, disk.as_deref()),
        Request::Info { name } => info(store, &name),
        Request::Resize { disk, size, shrink } => resize(store, &disk, size, shrink),
        Request::Rename { old, new } => rename(store, &old, &new),
        Request::Rm { name, recursive } => remove(store, name, recursive),
        Request::Snapshot { snapshots } => take(store, &snapshots),
        Request::Clone { snapshot, disk } => {
            let ((from, snapshot), disk) = (Target::snapshot(&snapshot)?, Target::disk(&disk)?);
            snapshot::clone(store, &from, &snapshot, &disk).map(disk_answer)
        }
        Request::Revert { snapshot, keep } => {
            let (disk, snapshot) = Target::snapshot(&snapshot)?;
            let report = snapshot::revert(store, &disk, &snapshot, keep.as_deref())?;
            Ok(Response::Reverted(Reverted::new(disk, snapshot, report)))
        }
        Request::Hold { snapshot, tag } => {
            let (disk, snapshot) = Target::snapshot(&snapshot)?;
            snapshot::hold(store, &disk, &snapshot, &tag)?;
            store.snapshot_info(&disk, &snapshot).map(snapshot_answer)
        }
        Request::Release { snapshot, tag } => {
            let (disk, snapshot) = Target::snapshot(&snapshot)?;
            snapshot::release(store, &disk, &snapshot, &tag)?;
            store.snapshot_info(&disk, &snapshot).map(snapshot_answer)
        }
        Request::Prune { disk, keep, dry_run } => prune(store, &disk, keep, dry_run),
        Request::Set { disk, settings } => set(store, &disk, &settings),
        Request::Get { disk } => {
            let info = store.disk_info(&Target::disk(&disk)?)?;
            Ok(Response::Settings { settings: (&info.settings).into(), disk: info.name })
        }
        Request::Export { from, to, path } => export(store, from, to, &path, progress),
        Request::Import { path, format, disk } => import(store, &path, format.as_deref(), &disk, progress),
        Request::Send { .. }
        | Request::Receive { .. }
        | Request::ReceiveToken { .. }
        | Request::ReceiveAbort { .. } => super::transfer::execute(store, request, progress),
        Request::Retire { .. }
        | Request::Diff { .. }
        | Request::Estimate { .. }
        | Request::VerifyDiff { .. }
        | Request::RecordImport { .. } => super::past::execute(store, request, progress),
        Request::CheckpointLs { .. }
        | Request::CheckpointInfo { .. }
        | Request::CheckpointVerify { .. }
        | Request::CheckpointRm { .. }
        | Request::CheckpointDisks { .. }
        | Request::CheckpointForget { .. }
        | Request::CheckpointSave { .. }
        | Request::CheckpointFlatten { .. } => super::checkpoint::execute(store, request, progress),
        Request::Check { .. }
        | Request::Scrub {}
        | Request::Reclaim { .. }
        | Request::Metrics {}
        | Request::Flush {}
        | Request::MountExport { .. }
        | Request::Attach { .. }
        | Request::AttachVm { .. }
        | Request::DetachVm { .. }
        | Request::Detach { .. }
        | Request::Exports {}
        | Request::Status {}
        | Request::Shutdown {} => execute_on_pool(store, &request, progress),
    }
}

/// Answers what is asked of the pool as a whole.
fn execute_on_pool(store: &Arc<Store>, request: &Request, progress: &dyn Progress) -> Result<Response> {
    match request {
        Request::Check { rebuild: true, .. } => Err(Error::busy("a pool that is in use cannot be rebuilt")
            .hint("end the server with 'afterimage umount', then run 'afterimage check --rebuild'")),
        Request::Check { repair, .. } => Ok(Response::Checked(snapshot::check(store, *repair, progress)?)),
        Request::Scrub {} => Ok(Response::Scrubbed(disk::scrub(store, progress)?)),
        Request::Reclaim { wait: true } => {
            Ok(Response::Reclaimed { freed: store.reclaim_wait(progress)?.freed, complete: true })
        }
        Request::Reclaim { wait: false } => Ok(Response::Reclaimed { freed: 0, complete: false }),
        Request::Metrics {} => Ok(Response::Metrics { text: store.metrics_text() }),
        Request::Flush {} => store.flush_all().map(|()| Response::Flushed {}),
        Request::Status {} => status(store),
        Request::MountExport { .. } => {
            Err(Error::failed("no server is running on this pool").hint("'afterimage mount --export' starts one"))
        }
        _ => Err(Error::failed("no server is running on this pool").hint("there is nothing to stop")),
    }
}

/// Tells why the pool takes no new data. A host that cannot be asked is no reason not to list the disks.
fn full(store: &Arc<Store>) -> Option<String> {
    store.room().ok()?.full()
}

fn disk_answer(info: DiskInfo) -> Response {
    Response::Disk(info.into())
}

fn snapshot_answer(info: SnapshotInfo) -> Response {
    Response::Snapshot(info.into())
}

fn snapshots_answer(infos: Vec<SnapshotInfo>) -> Response {
    Response::Snapshots { snapshots: infos.into_iter().map(Into::into).collect(), open: Vec::new() }
}

fn list(store: &Arc<Store>, disk: Option<&str>) -> Result<Response> {
    let Some(disk) = disk else {
        let disks = store.disks().into_iter().map(Into::into).collect();
        let (health, damage, records) = (store.health(), store.damage(), store.record_damage());
        return Ok(Response::Disks { disks, health, damage, full: full(store), records });
    };
    let infos = store.snapshots(&Target::disk(disk)?)?;
    let faults = infos.first().map(|info| snapshot::record_faults(store, info.disk_id)).unwrap_or_default();
    let answer = |info: SnapshotInfo| {
        let record = faults.get(&info.id).copied();
        super::answer::Snapshot { record, ..info.into() }
    };
    Ok(Response::Snapshots { snapshots: infos.into_iter().map(answer).collect(), open: Vec::new() })
}

fn resize(store: &Arc<Store>, disk: &str, size: u64, shrink: bool) -> Result<Response> {
    let (name, size) = (Target::disk(disk)?, disk::round_size(size)?);
    let disk = disk::open(store, &name)?;
    // Whoever writes to it would lose what it does not expect to lose.
    let _lease = if shrink && size < disk.size() { Some(disk.lease("resize --shrink")?) } else { None };
    disk.resize(size, shrink)?;
    store.disk_info(&name).map(disk_answer)
}

fn info(store: &Arc<Store>, name: &str) -> Result<Response> {
    match Target::parse(name)? {
        Target::Disk(disk) => {
            let mut answer = super::answer::Disk::from(store.disk_info(&disk)?);
            answer.unique = Some(disk::unique(store, &disk)?);
            Ok(Response::Disk(answer))
        }
        Target::Snapshot(disk, snapshot) => {
            let info = store.snapshot_info(&disk, &snapshot)?;
            let record = snapshot::record_faults(store, info.disk_id).remove(&info.id);
            let mut answer = super::answer::Snapshot { record, ..info.into() };
            answer.unique = Some(snapshot::unique(store, &disk, &snapshot)?);
            Ok(Response::Snapshot(answer))
        }
    }
}

fn rename(store: &Arc<Store>, old: &str, new: &str) -> Result<Response> {
    match (Target::parse(old)?, Target::parse(new)?) {
        (Target::Disk(old), Target::Disk(new)) => {
            disk::rename(store, &old, &new)?;
            store.disk_info(&new).map(disk_answer)
        }
        (Target::Snapshot(disk, old), Target::Snapshot(new_disk, new)) if disk == new_disk => {
            snapshot::rename(store, &disk, &old, &new)?;
            store.snapshot_info(&disk, &new).map(snapshot_answer)
        }
        (Target::Snapshot(disk, _), _) => Err(Error::usage(format!("'{new}' is no new name for the snapshot '{old}'"))
            .hint(format!("a snapshot stays with its disk: write {disk}@NEW"))),
        (Target::Disk(_), Target::Snapshot(..)) => {
            Err(Error::usage(format!("'{new}' is no new name for the disk '{old}'"))
                .hint("to take a snapshot use 'afterimage snapshot DISK@SNAPSHOT'"))
        }
    }
}

fn remove(store: &Arc<Store>, name: String, recursive: bool) -> Result<Response> {
    match Target::parse(&name)? {
        Target::Disk(disk) => disk::remove(store, &disk, recursive)?,
        Target::Snapshot(..) if recursive => {
            return Err(
                Error::usage(format!("'{name}' is a snapshot; it has nothing below it")).hint("leave --recursive out")
            );
        }
        Target::Snapshot(disk, snapshot) => snapshot::remove(store, &disk, &snapshot)?,
    }
    Ok(Response::Removed { name })
}

fn take(store: &Arc<Store>, names: &[String]) -> Result<Response> {
    if names.is_empty() || names.len() > SNAPSHOTS_AT_ONCE_MAX {
        return Err(Error::usage(format!("cannot take {} snapshots at once", names.len()))
            .hint(format!("name 1 to {SNAPSHOTS_AT_ONCE_MAX} of them as DISK@SNAPSHOT")));
    }
    let targets = names.iter().map(|name| Target::snapshot(name)).collect::<Result<Vec<_>>>()?;
    let mut disks: Vec<&str> = targets.iter().map(|(disk, _)| disk.as_str()).collect();
    disks.sort_unstable();
    if let Some(twice) = disks.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(Error::usage(format!("the disk '{}' is named twice", twice[0]))
            .hint("one instant has one snapshot of a disk"));
    }
    snapshot::take(store, &targets).map(snapshots_answer)
}

fn prune(store: &Arc<Store>, disk: &str, keep: Keep, dry_run: bool) -> Result<Response> {
    if keep == Keep::default() {
        return Err(Error::usage("no rule keeps anything, so every snapshot would go")
            .hint("give at least one of --keep-last, --keep-hourly, --keep-daily, ..."));
    }
    let Keep { last, hourly, daily, weekly, monthly, yearly } = keep;
    let keep = snapshot::Keep { last, hourly, daily, weekly, monthly, yearly };
    let lines = snapshot::prune(store, &Target::disk(disk)?, &keep, dry_run)?;
    Ok(Response::Pruned { dry_run, snapshots: lines.into_iter().map(Into::into).collect() })
}

fn set(store: &Arc<Store>, disk: &str, settings: &BTreeMap<String, String>) -> Result<Response> {
    let disk = Target::disk(disk)?;
    let changes = settings.iter().map(|(key, value)| (key.as_str(), value.as_str()));
    let now = disk::set_all(store, &disk, changes)?;
    Ok(Response::Settings { disk, settings: (&now).into() })
}

fn import(
    store: &Arc<Store>,
    path: &str,
    format: Option<&str>,
    name: &str,
    progress: &dyn Progress,
) -> Result<Response> {
    let (path, name) = (absolute(path)?, Target::disk(name)?);
    let report = disk::import::import(store, path, format, &name, progress)?;
    Ok(Response::Imported(Imported {
        disk: store.disk_info(&name)?.into(),
        format: report.format,
        bytes_read: report.bytes_read,
        bytes_written: report.bytes_written,
    }))
}

fn export(
    store: &Arc<Store>,
    from: Option<String>,
    to: String,
    path: &str,
    progress: &dyn Progress,
) -> Result<Response> {
    let dir = absolute(path)?;
    let from = from.filter(|from| from != "-");
    let base = from.as_deref().map(Target::snapshot).transpose()?;
    let (disk, snapshot) = Target::snapshot(&to)?;
    let base = base.as_ref().map(|(disk, snapshot)| (disk.as_str(), snapshot.as_str()));
    let (increment, device) = crate::export::describe(store, base, (&disk, &snapshot))?;
    let dir = crate::export::write(&increment, &device, dir, progress)?;
    Ok(Response::Exported(Exported {
        path: dir.display().to_string(),
        from,
        to,
        files: increment.plan.files.len() as u64,
        data: increment.data(),
        joined: increment.plan.joined,
        zeros: increment.zeros(),
    }))
}

fn status(store: &Arc<Store>) -> Result<Response> {
    let room = store.room()?;
    Ok(Response::Status(Status {
        pid: std::process::id(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        pool: String::new(),
        uuid: store.uuid(),
        mount: None,
        health: store.health(),
        damage: store.damage(),
        full: room.full(),
        records: store.record_damage(),
        free: room.free,
        available: room.available(),
        total: room.total,
        ending: false,
    }))
}
