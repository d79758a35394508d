//! The two states of a stream, found by name or by token.

use std::sync::Arc;

use super::format::{Header, StateId};
use super::token::Token;
use crate::error::{Error, Result};
use crate::snapshot::diff::{self, Diff, Extent, StateName};
use crate::snapshot::{self, SnapshotDevice};
use crate::store::{StateRow, Status, Store, Tables};

/// What is sent.
#[derive(Debug)]
pub(super) struct Source {
    pub(super) device: Arc<SnapshotDevice>,
    pub(super) disk_name: String,
    diff: Diff,
    /// The header; `data` and `zeros` are filled in later.
    pub(super) header: Header,
}

fn state_id(tables: &Tables, row: &StateRow) -> StateId {
    let moment = tables.moment_of(row.snapshot);
    StateId { uuid: row.uuid, size: row.size, created: row.created, moment, name: row.name.clone() }
}

impl Source {
    /// Opens the states by name; they are kept whole until this is dropped.
    pub(super) fn open(store: &Arc<Store>, from: Option<&(String, String)>, to: &(String, String)) -> Result<Self> {
        let device = snapshot::open(store, &to.0, &to.1)?;
        let name = |(disk, name): &(String, String)| StateName::Snapshot(disk.clone(), name.clone());
        let diff = diff::open(store, &from.map_or(StateName::Nothing, name), &name(to))?;
        let tables = store.tables.read();
        let find = |disk: &str, name: &str| Ok::<_, Error>(tables.snapshot(tables.disk_id(disk)?, name)?.1);
        let target = find(&to.0, &to.1)?;
        let disk = tables.disk(target.disk)?;
        let header = Header {
            pool: store.uuid(),
            disk: disk.uuid,
            disk_name: disk.name.clone(),
            base: from.map(|(disk, name)| find(disk, name).map(|row| state_id(&tables, row))).transpose()?,
            target: state_id(&tables, target),
            start: 0,
            data: 0,
            zeros: 0,
        };
        let disk_name = disk.name.clone();
        drop(tables);
        let base = header.base.as_ref().map(|base| base.uuid);
        if (diff.from_uuid(), diff.to_uuid()) != (base, Some(header.target.uuid)) {
            return Err(Error::busy("the snapshots were renamed just now").hint("try again"));
        }
        Ok(Self { device, disk_name, diff, header })
    }

    /// Opens the states that a token names.
    pub(super) fn resume(store: &Arc<Store>, token: &Token) -> Result<Self> {
        let gone = |what: &str| {
            Error::failed(format!("cannot resume the stream: {what}"))
                .hint("drop what arrived with `afterimage receive --abort` and send anew")
        };
        if token.pool != store.uuid() {
            return Err(gone("it came from another pool"));
        }
        let (from, to) = {
            let tables = store.tables.read();
            let find = |uuid, status: &dyn Fn(Status) -> bool| {
                let mut all: Vec<_> = tables.disks().flat_map(|(id, _)| tables.snapshots_of(id)).collect();
                // The disk that was sent, if another one has the same state.
                all.sort_by_key(|(_, row)| tables.disk(row.disk).map_or(true, |disk| disk.uuid != token.disk));
                let mut fits = all.into_iter().filter(|(_, row)| row.uuid == uuid && status(row.status));
                fits.next().map(|(_, row)| (tables.disk(row.disk).map(|disk| disk.name.clone()), row.name.clone()))
            };
            let to = find(token.target, &|status| status == Status::Live)
                .ok_or_else(|| gone("the snapshot it leads to is gone or retired"))?;
            let from = if token.base.is_nil() {
                None
            } else {
                let from = find(token.base, &|_| true).ok_or_else(|| gone("the snapshot it starts from is gone"))?;
                Some((from.0?, from.1))
            };
            (from, (to.0?, to.1))
        };
        let mut it = Self::open(store, from.as_ref(), &to)?;
        if !Token::of(&it.header, 0).same_stream(token) || token.offset > it.header.target.size {
            return Err(gone("the states are not the same any more"));
        }
        it.header.start = token.offset;
        Ok(it)
    }

    /// Calls `each` for every changed extent from the start on, in order.
    pub(super) fn each(&self, each: &mut dyn FnMut(Extent) -> Result<()>) -> Result<()> {
        let start = self.header.start;
        self.diff.each(&mut |extent| {
            let end = extent.offset + extent.length;
            let offset = extent.offset.max(start);
            if offset < end { each(Extent { offset, length: end - offset, ..extent }) } else { Ok(()) }
        })
    }
}
