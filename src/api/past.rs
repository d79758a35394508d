//! Answers what is asked of retired snapshots and of changes.

use std::io;
use std::path::Path;
use std::sync::Arc;

use super::answer::{Diff, Verified};
use super::{Request, Response, Target};
use crate::error::{Error, Result};
use crate::media::{HostMedia, Media, Open};
use crate::progress::Progress;
use crate::snapshot;
use crate::snapshot::diff::{self, DiffTotal, Extent, StateName};
use crate::store::{SnapshotInfo, Store};

/// Extents that one answer lists at most. They are one line of JSON, of 70 bytes each or so, which the server has whole before
/// it sends it, and the client before it reads it. However many there are, they can be written into a pipe or file.
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
        Request::Diff { summary: true, output: Some(_), .. } => {
            Err(Error::usage("the sums alone have no extents to write").hint("leave out 'summary' or 'output'"))
        }
        Request::Diff { from, to, output: Some(output), .. } => super::transfer::write_out(&output, progress, |out| {
            let cannot = |e: io::Error| Error::io(format!("cannot write {output}"), e);
            diff_answer(store, from, to, &mut |_, extent| {
                serde_json::to_writer(&mut *out, extent).map_err(|e| cannot(e.into()))?;
                out.write_all(b"\n").map_err(cannot)
            })
        })
        .map(Response::Diff),
        Request::Diff { from, to, summary: true, .. } => diff_sums(store, from, to).map(Response::Diff),
        Request::Diff { from, to, .. } => diff_whole(store, from, to).map(Response::Diff),
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
    let mut open = Vec::new();
    if wait {
        snapshot::wait_retired(store, progress)?;
        refuse_unrecorded(store, &infos)?;
        let read = infos.iter().filter(|info| store.is_held_open(info.id));
        open = read.map(|info| format!("{}@{}", info.disk, info.name)).collect();
    }
    Ok(Response::Snapshots { snapshots: infos.into_iter().map(Into::into).collect(), open })
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

/// Answers with all extents, if they are not too many.
fn diff_whole(store: &Arc<Store>, from: String, to: String) -> Result<Diff> {
    let mut extents = Vec::new();
    let names = format!("'{from}' and '{to}'");
    let diff = diff_answer(store, from, to, &mut |count, extent| {
        if count > EXTENTS_MAX {
            return Err(Error::failed(format!(
                "{names} differ in more than {EXTENTS_MAX} extents, too many for one answer"
            ))
            .hint("have them written into a file or pipe with 'output', or ask for the sums alone with 'summary'"));
        }
        extents.push(*extent);
        Ok(())
    })?;
    Ok(Diff { extents: Some(extents), ..diff })
}

/// Compares two states, calls `each` with every extent and its number, from 1 on, and answers without them.
fn diff_answer(
    store: &Arc<Store>,
    from: String,
    to: String,
    each: &mut dyn FnMut(u64, &Extent) -> Result<()>,
) -> Result<Diff> {
    let found = diff::open(store, &state(&from)?, &state(&to)?)?;
    let (from_size, to_size) = (found.from_size(), found.to_size());
    let mut total = DiffTotal { from_size, to_size, ..DiffTotal::default() };
    found.each(&mut |extent| {
        total.add(&extent);
        each(total.extents, &extent)
    })?;
    Ok(without_extents(from, to, &total))
}

/// Compares two states and answers with the sums alone, which take less time than the extents.
fn diff_sums(store: &Arc<Store>, from: String, to: String) -> Result<Diff> {
    let total = diff::open(store, &state(&from)?, &state(&to)?)?.total()?;
    Ok(without_extents(from, to, &total))
}

fn without_extents(from: String, to: String, total: &DiffTotal) -> Diff {
    let DiffTotal { from_size, to_size, data, zero, extents: count } = *total;
    Diff { from, to, from_size, to_size, data, zero, count, extents: None }
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
    diff_sums(store, from, disk).map(Response::Estimate)
}

fn import(store: &Arc<Store>, path: &str) -> Result<Response> {
    let path = Path::new(path);
    let (Some(folder), Some(name)) = (path.parent().filter(|_| path.is_absolute()), path.file_name()) else {
        return Err(Error::usage(format!("'{}' is not the absolute path of a file", path.display())));
    };
    let fail = |e| Error::io(format!("cannot open {}", path.display()), e);
    if !std::fs::metadata(path).map_err(fail)?.is_file() {
        return Err(Error::failed(format!("{} is no regular file, so it is no record", path.display()))
            .hint("name a file that was in retired/ of the pool or of the mount"));
    }
    let media = HostMedia::new(folder).map_err(fail)?;
    let name = name.to_str().ok_or_else(|| Error::usage("the name of the record is not UTF-8"))?;
    let file = media.open(name, Open::ReadOnly).map_err(fail)?;
    snapshot::import_record(store, &path.display().to_string(), &file).map(|info| Response::Snapshot(info.into()))
}
