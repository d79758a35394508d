//! The two states of a stream, found by name or by token.

use std::sync::Arc;

use super::format::{Header, StateId};
use super::token::Token;
use crate::error::{Error, Kind, Result};
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
        let (bases, targets) = {
            let tables = store.tables.read();
            let named = |uuid, fits: &dyn Fn(&StateRow) -> bool| {
                let all = tables.disks().flat_map(|(id, _)| tables.snapshots_of(id));
                let fitting = all.filter(|(_, row)| row.uuid == uuid && fits(row));
                let named = fitting.map(|(_, row)| Ok((tables.disk(row.disk)?.name.clone(), row.name.clone())));
                named.collect::<Result<Vec<_>>>()
            };
            let sent = |row: &StateRow| tables.disk(row.disk).is_ok_and(|disk| disk.uuid == token.disk);
            (named(token.base, &|_| true)?, named(token.target, &|row| row.status == Status::Live && sent(row))?)
        };
        if targets.is_empty() {
            return Err(gone("the snapshot it leads to is gone or retired"));
        }
        if bases.is_empty() && !token.base.is_nil() {
            return Err(gone("the snapshot it starts from is gone"));
        }
        // Several may have one identity where a pool has received its own streams.
        let bases: Vec<_> = if token.base.is_nil() { vec![None] } else { bases.iter().map(Some).collect() };
        let mut pairs = targets.iter().flat_map(|to| bases.iter().map(move |from| (*from, to)));
        let found = pairs.find_map(|(from, to)| match Self::open(store, from, to) {
            Ok(it) if Token::of(&it.header, 0).same_stream(token) && token.offset <= it.header.target.size => {
                Some(Ok(it))
            }
            Ok(_) => None,
            // A stranger of the same identity, or one whose record cannot be trusted.
            Err(error) if error.kind() == Kind::Failed => None,
            Err(error) => Some(Err(error)),
        });
        let mut it = found.unwrap_or_else(|| Err(gone("the states are not the same any more")))?;
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
