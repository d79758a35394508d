//! Answers what is asked of retired snapshots and of changes.

use std::path::Path;
use std::sync::Arc;

use super::answer::{Diff, Verified};
use super::{Request, Response, Target};
use crate::error::{Error, Result};
use crate::media::{HostMedia, Media, Open};
use crate::progress::Progress;
use crate::snapshot;
use crate::snapshot::diff::{self, StateName};
use crate::store::{SnapshotInfo, Store};

/// Extents that one answer lists at most. They are one line of JSON, of 70 bytes each or so, which the server has whole before
/// it sends it, and the client before it reads it.
const EXTENTS_MAX: u64 = 1 << 20;
/// Most snapshots that are retired in one request.
const RETIRE_MAX: usize = 1024;

/// Answers a request of this kind.
///
/// # Errors
/// As [`super::execute`].
pub(super) fn execute(store: &Arc<Store>, request: Request, progress: &dyn Progress) -> Result<Response> {
    match request {
        Request::Retire { snapshots, wait } => retire(store, &snapshots, wait, progress),
        Request::Diff { from, to, summary } => diff_answer(store, from, to, summary).map(Response::Diff),
        Request::Estimate { disk, from } => estimate(store, disk, from),
        Request::VerifyDiff { from, to } => {
            let report = diff::verify(store, &state(&from)?, &state(&to)?, progress)?;
            Ok(Response::Verified(Verified { from, to, report }))
        }
        Request::RecordImport { path } => import(store, &path),
        _ => Err(Error::usage("not a request about the past")),
    }
}

/// Reads the name of a state, and checks the names in it.
fn state(text: &str) -> Result<StateName> {
    if text != "-" {
        Target::parse(text)?;
    }
    Ok(StateName::parse(text))
}

fn retire(store: &Arc<Store>, names: &[String], wait: bool, progress: &dyn Progress) -> Result<Response> {
    if names.is_empty() || names.len() > RETIRE_MAX {
        return Err(Error::usage(format!("from 1 to {RETIRE_MAX} snapshots are retired at once")));
    }
    let targets = names.iter().map(|name| Target::snapshot(name)).collect::<Result<Vec<_>>>()?;
    let infos = snapshot::retire(store, &targets)?;
    if wait {
        snapshot::wait_retired(store, progress)?;
        refuse_unrecorded(store, &infos)?;
    }
    Ok(Response::Snapshots { snapshots: infos.into_iter().map(Into::into).collect() })
}

/// Fails when the record of one of some snapshots could not be written: whoever waits for it has to know.
fn refuse_unrecorded(store: &Store, infos: &[SnapshotInfo]) -> Result<()> {
    let unrecorded = store.unrecorded();
    let found = infos.iter().find_map(|info| Some((info, unrecorded.get(&info.id)?)));
    let Some((info, why)) = found else { return Ok(()) };
    let (disk, name) = (&info.disk, &info.name);
    Err(Error::corrupt(format!("'{disk}@{name}' is retired, but its record cannot be written: {why}"))
        .hint("it keeps its data until the record is written, which is tried again; see `afterimage check`"))
}

fn diff_answer(store: &Arc<Store>, from: String, to: String, summary: bool) -> Result<Diff> {
    let found = diff::open(store, &state(&from)?, &state(&to)?)?;
    let mut total = diff::DiffTotal { from_size: found.from_size(), to_size: found.to_size(), ..Default::default() };
    let mut extents = Vec::new();
    found.each(&mut |extent| {
        total.add(&extent);
        if !summary {
            if total.extents > EXTENTS_MAX {
                return Err(Error::failed(format!("'{from}' and '{to}' differ in more than {EXTENTS_MAX} extents"))
                    .hint("ask for the sums with --summary, or write them out with `afterimage export` or `send`"));
            }
            extents.push(extent);
        }
        Ok(())
    })?;
    let (from_size, to_size) = (total.from_size, total.to_size);
    let (data, zero, count) = (total.data, total.zero, total.extents);
    let extents = (!summary).then_some(extents);
    Ok(Diff { from, to, from_size, to_size, data, zero, count, extents })
}

fn estimate(store: &Arc<Store>, disk: String, from: Option<String>) -> Result<Response> {
    Target::disk(&disk)?;
    let from = match from {
        Some(from) => from,
        None => match store.snapshots(&disk)?.last() {
            Some(newest) => format!("{disk}@{}", newest.name),
            None => "-".to_owned(),
        },
    };
    diff_answer(store, from, disk, true).map(Response::Estimate)
}

fn import(store: &Arc<Store>, path: &str) -> Result<Response> {
    let path = Path::new(path);
    let (Some(folder), Some(name)) = (path.parent().filter(|_| path.is_absolute()), path.file_name()) else {
        return Err(Error::usage(format!("'{}' is not the absolute path of a file", path.display())));
    };
    let fail = |e| Error::io(format!("cannot open {}", path.display()), e);
    let media = HostMedia::new(folder).map_err(fail)?;
    let name = name.to_str().ok_or_else(|| Error::usage("the name of the record is not UTF-8"))?;
    let file = media.open(name, Open::ReadOnly).map_err(fail)?;
    snapshot::import_record(store, &path.display().to_string(), &file).map(|info| Response::Snapshot(info.into()))
}
