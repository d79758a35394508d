//! Receiving into a disk of a pool: all or nothing, on a hidden disk, with one frame at the end.
//!
//! # Rules
//! 1. Everything that can be refused is refused when the header was read, and once more in the frame that ends it.
//! 2. The hidden disk is named after the one it is for (`.receive-<uuid>`, or `.receive-new-<name>`), so there is one; its
//!    note says which stream it is of, how it was begun, and what has safely arrived.
//! 3. The disk is leased while the stream comes in: nobody writes to it, removes or reverts it.

use std::io::Read;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::format::Header;
use super::pace::Pace;
use super::reader::{Part, StreamReader};
use super::token::Token;
use crate::disk::{self, BlockDevice, Disk, Lease, check_disk_name, check_snapshot_name};
use crate::error::{Error, Kind, Result};
use crate::progress::Progress;
use crate::snapshot::incoming::{self, Beginning, Identity, Place};
use crate::store::{Status, Store, Tables};
use crate::units::{DiskId, SnapshotId};

const PREFIX: &str = ".receive-";

/// How to receive.
#[derive(Debug, Clone)]
pub struct ReceiveOptions {
    /// The disk.
    pub disk: String,
    /// Whether what is there may be replaced; it is kept as a snapshot.
    pub force: bool,
    /// Name of the snapshot; as it is called where it comes from when left out.
    pub name: Option<String>,
}

/// What was received.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReceiveReport {
    /// The disk.
    pub disk: String,
    /// The snapshot that the stream has become.
    pub snapshot: String,
    /// Its identity, as where it comes from.
    pub uuid: Uuid,
    /// Identity of the base.
    pub base: Option<Uuid>,
    /// First byte of the disk that was in the stream.
    pub start: u64,
    /// Bytes of data.
    pub data: u64,
    /// Bytes of zeros.
    pub zeros: u64,
    /// The snapshot that keeps what was there.
    pub kept: Option<String>,
}

/// How a hidden disk was begun.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    /// For a disk that does not exist yet.
    New,
    /// On the disk as it was, which must stay so.
    Unchanged,
    /// On the disk as it was, all of which is replaced.
    Replace,
    /// On an older snapshot.
    Older,
}

impl Mode {
    const ALL: [(Self, &'static str); 4] =
        [(Self::New, "new"), (Self::Unchanged, "unchanged"), (Self::Replace, "replace"), (Self::Older, "older")];

    fn name(self) -> &'static str {
        Self::ALL.into_iter().find(|(mode, _)| *mode == self).map_or("", |(_, name)| name)
    }

    fn note(self, token: &Token) -> String {
        format!("receive {} {token}", self.name())
    }
}

/// Takes the note of a hidden disk apart; one that makes no sense is of no stream.
fn read_note(note: &str) -> Option<(Mode, Token)> {
    let (mode, token) = note.strip_prefix("receive ")?.split_once(' ')?;
    let mode = Mode::ALL.into_iter().find(|(_, name)| *name == mode)?.0;
    Some((mode, Token::parse(token).ok()?))
}

/// Where a stream goes.
struct Plan {
    target: Option<DiskId>,
    mode: Mode,
    beginning: Beginning,
    hidden_name: String,
}

/// Receives a stream.
///
/// # Errors
/// `Corrupt` for a stream that is cut off or damaged, `Unsupported` for one of a newer version; `Failed` when the base does not
/// match, `Exists`, `NotFound`, `Busy`; any error of the host. The disk is as it was then.
pub fn receive(
    store: &Arc<Store>,
    options: &ReceiveOptions,
    input: &mut dyn Read,
    progress: &dyn Progress,
) -> Result<ReceiveReport> {
    check_disk_name(&options.disk)?;
    store.ledger.writable()?;
    let mut reader = StreamReader::new(input)?;
    let header = reader.header.clone();
    let name = options.name.clone().unwrap_or_else(|| header.target.name.clone());
    check_snapshot_name(&name)?;
    remove_orphans(store);
    let holder = format!("a receive ({})", &Uuid::new_v4().simple().to_string()[..8]);
    let lease = lease_existing(store, &options.disk, &holder)?;
    let plan = plan(store, options, &header, &name)?;
    let taken = |error| come_in_already(error, &options.disk);
    let hidden = enter(store, &plan, &header).map_err(taken)?;
    let arriving = disk::open_by_id(store, hidden)?;
    let own = arriving.lease(&holder).map_err(taken)?;
    progress.total(header.data);
    progress.message("receiving");
    if let Err(error) = fill(store, &arriving, plan.mode, &mut reader, progress) {
        drop(own);
        return Err(stop(store, hidden, plan.mode, &reader, error, &options.disk));
    }
    let who = Identity { name, uuid: header.target.uuid, created: header.target.created };
    let place = match (plan.target, plan.mode) {
        (None, _) => Place::New(&options.disk),
        (Some(id), Mode::Unchanged) => Place::Unchanged(id),
        (Some(id), _) => Place::Any(id),
    };
    let adopted = incoming::adopt(store, hidden, place, &who, &holder);
    drop((own, lease));
    let adopted = adopted.map_err(|error| stop(store, hidden, plan.mode, &reader, error, &options.disk))?;
    Ok(ReceiveReport {
        disk: adopted.snapshot.disk,
        snapshot: adopted.snapshot.name,
        uuid: header.target.uuid,
        base: header.base.as_ref().map(|base| base.uuid),
        start: header.start,
        data: header.data,
        zeros: header.zeros,
        kept: adopted.kept,
    })
}

fn lease_existing(store: &Arc<Store>, name: &str, holder: &str) -> Result<Option<Lease>> {
    if !store.tables.read().has_disk(name) {
        return Ok(None);
    }
    disk::open(store, name)?.lease(holder).map(Some)
}

/// Decides where a stream goes, or why it cannot.
fn plan(store: &Arc<Store>, options: &ReceiveOptions, header: &Header, name: &str) -> Result<Plan> {
    let disk = &options.disk;
    let Ok(id) = store.tables.read().disk_id(disk) else {
        if let Some(base) = &header.base {
            return Err(Error::not_found(format!(
                "there is no disk '{disk}' that could have the base '{}'",
                base.name
            ))
            .hint("the stream is an increment: receive a full one first (`afterimage send` without --from)"));
        }
        let beginning = Beginning::Empty(header.target.size);
        return Ok(Plan { target: None, mode: Mode::New, beginning, hidden_name: format!("{PREFIX}new-{disk}") });
    };
    let hidden_name = {
        let tables = store.tables.read();
        if tables.snapshot(id, name).is_ok() {
            return Err(Error::exists(format!("there is a snapshot '{disk}@{name}' already"))
                .hint("give the received one another name with --as NAME"));
        }
        format!("{PREFIX}{}", tables.disk(id)?.uuid)
    };
    let (mode, beginning) = match &header.base {
        None if options.force => (Mode::Replace, Beginning::Disk(id)),
        None => {
            return Err(Error::exists(format!("there is a disk '{disk}' already, and the stream is a full one"))
                .hint("receive it under another name; --force replaces what the disk is and keeps it as a snapshot"));
        }
        Some(base) => match match_base(store, id, base.uuid)? {
            Base::Newest => (Mode::Unchanged, Beginning::Disk(id)),
            Base::Older(snapshot, _) if options.force => (Mode::Older, Beginning::Snapshot(snapshot)),
            Base::Older(_, why) => {
                return Err(Error::failed(format!("the stream does not fit disk '{disk}': {why}"))
                    .hint("--force goes back to the base and keeps what is there as a snapshot"));
            }
            Base::Missing(why) => {
                let name = &base.name;
                return Err(Error::failed(format!("the stream does not fit disk '{disk}': {why}"))
                    .hint(format!("the stream starts from '{name}' ({}); send a full one", base.uuid)));
            }
        },
    };
    Ok(Plan { target: Some(id), mode, beginning, hidden_name })
}

/// What a disk has of a base.
enum Base {
    /// It is the base.
    Newest,
    /// It has the base as a live snapshot.
    Older(SnapshotId, String),
    /// It has not.
    Missing(String),
}

fn match_base(store: &Arc<Store>, id: DiskId, uuid: Uuid) -> Result<Base> {
    let (newest, live) = {
        let tables = store.tables.read();
        let newest = incoming::newest(&tables, id).map(|(_, row)| (row.snapshot, row.name.clone(), row.uuid == uuid));
        let mut same = tables.snapshots_of(id).filter(|(_, row)| row.uuid == uuid && row.status == Status::Live);
        (newest, same.next().map(|(_, row)| row.snapshot))
    };
    let why = match newest {
        Some((snapshot, name, true)) => {
            if !incoming::changed_since(store, id, snapshot)? {
                return Ok(Base::Newest);
            }
            format!("it was written to after its newest snapshot '{name}'")
        }
        Some((_, name, false)) if live.is_some() => format!("'{name}' is newer than the base"),
        Some((_, name, false)) => format!("its newest snapshot '{name}' is not the base, and it has no other that is"),
        None => "it has no snapshot".to_owned(),
    };
    Ok(match live {
        Some(snapshot) => Base::Older(snapshot, why),
        None => Base::Missing(why),
    })
}

/// Finds the hidden disk that has the beginning of this stream, or makes one.
fn enter(store: &Arc<Store>, plan: &Plan, header: &Header) -> Result<DiskId> {
    let fresh = Token::of(header, 0);
    if let Some((hidden, note)) = find_hidden(&store.tables.read(), &plan.hidden_name) {
        let fits = read_note(&note).filter(|(mode, token)| *mode == plan.mode && token.same_stream(&fresh));
        if fits.is_some_and(|(_, token)| header.start <= token.offset) && is_begun_on(store, hidden, plan)? {
            return Ok(hidden);
        }
    }
    if header.start > 0 {
        return Err(Error::failed("the stream begins in the middle, and what came before it is not here")
            .hint("send it from its beginning: without --resume"));
    }
    let old = find_hidden(&store.tables.read(), &plan.hidden_name);
    if let Some((hidden, _)) = old {
        incoming::abandon(store, hidden)?;
    }
    incoming::begin(store, &plan.hidden_name, &plan.mode.note(&fresh), plan.beginning)
}

/// Tells whether a hidden disk was begun on its disk as it is now. One that was written to and brought back to its base
/// since is not: the frame at the end would refuse it.
fn is_begun_on(store: &Store, hidden: DiskId, plan: &Plan) -> Result<bool> {
    let tables = store.tables.read();
    Ok(match plan.target {
        Some(disk) if plan.mode == Mode::Unchanged => tables.disk(hidden)?.base == tables.disk(disk)?.base,
        _ => true,
    })
}

fn find_hidden(tables: &Tables, name: &str) -> Option<(DiskId, String)> {
    let id = tables.disk_id(name).ok()?;
    let note = tables.disk(id).ok()?.origin.clone().unwrap_or_default();
    Some((id, note))
}

/// Writes the stream to the hidden disk; everything is durable when this returns.
fn fill(
    store: &Arc<Store>,
    arriving: &Disk,
    mode: Mode,
    reader: &mut StreamReader<'_>,
    progress: &dyn Progress,
) -> Result<()> {
    let header = reader.header.clone();
    let size = arriving.size();
    if size != header.target.size {
        arriving.resize(header.target.size, true)?;
    }
    if size > header.target.size {
        // Now, and not some time after it became a snapshot: the next increment would find the disk changed.
        arriving.trim()?;
    }
    let mut pace = Pace::new();
    loop {
        if progress.cancelled() {
            return Err(Error::failed("the receive was cancelled"));
        }
        let arrived = match reader.next_part()? {
            Some(Part::Data { offset, bytes }) => {
                arriving.write(bytes, offset)?;
                progress.advance(bytes.len() as u64);
                bytes.len() as u64
            }
            Some(Part::Zeros { offset, length }) => {
                arriving.write_zeroes(offset, length)?;
                0
            }
            None => break,
        };
        if pace.arrived(arrived) {
            incoming::note(store, arriving.id(), &mode.note(&Token::of(&header, reader.position())))?;
        }
    }
    arriving.flush()
}

/// Keeps what arrived, as far as that is possible, and says how to go on.
fn stop(store: &Arc<Store>, hidden: DiskId, mode: Mode, reader: &StreamReader<'_>, error: Error, disk: &str) -> Error {
    let arrived = reader.applied();
    if arrived == 0 && reader.header.start == 0 {
        if let Err(error) = incoming::abandon(store, hidden) {
            tracing::warn!("a hidden disk could not be removed: {error}");
        }
        return error;
    }
    let token = Token::of(&reader.header, arrived);
    match incoming::note(store, hidden, &mode.note(&token)) {
        Ok(()) => with_token(error, &token, &format!("afterimage receive --abort {disk}")),
        Err(_) => error.hint(format!("`afterimage receive --token {disk}` tells where the stream can go on")),
    }
}

/// Adds how an interrupted stream goes on.
pub(super) fn with_token(error: Error, token: &Token, drop_it: &str) -> Error {
    let before = error.next_step().map(|step| format!("{step}; ")).unwrap_or_default();
    error.hint(format!(
        "{before}what arrived is kept: go on with `afterimage send --resume {token}`, or drop it with `{drop_it}`"
    ))
}

/// Nobody but a stream has a hidden disk open: says so of the disk that people know.
fn come_in_already(error: Error, disk: &str) -> Error {
    if error.kind() != Kind::Busy {
        return error;
    }
    Error::busy(format!("another stream for disk '{disk}' comes in")).hint("wait until it has ended")
}

/// Finds what is kept of a stream for a disk, or for one of that name that was not there when it came.
fn hidden_of(store: &Store, disk: &str) -> Result<(DiskId, String)> {
    check_disk_name(disk)?;
    let tables = store.tables.read();
    let there = tables.disk_id(disk).and_then(|id| tables.disk(id)).ok();
    let name = there.map(|row| format!("{PREFIX}{}", row.uuid));
    name.and_then(|name| find_hidden(&tables, &name))
        .or_else(|| find_hidden(&tables, &format!("{PREFIX}new-{disk}")))
        .ok_or_else(|| Error::not_found(format!("no stream for disk '{disk}' was interrupted: nothing is kept of one")))
}

/// Returns where the interrupted stream of a disk goes on.
///
/// # Errors
/// `NotFound` when there is none.
pub fn token(store: &Store, disk: &str) -> Result<Token> {
    let (_, note) = hidden_of(store, disk)?;
    let (mode, token) = read_note(&note).ok_or_else(|| {
        Error::corrupt(format!("what is kept of the stream for disk '{disk}' makes no sense"))
            .hint("drop it with `afterimage receive --abort`")
    })?;
    if mode == Mode::New && store.tables.read().disk_id(disk).is_ok() {
        let error =
            Error::exists(format!("what is kept of a stream was to become disk '{disk}', and there is one now"));
        return Err(error.hint("rename that one to go on, or drop what arrived with `afterimage receive --abort`"));
    }
    Ok(token)
}

/// Drops what arrived of an interrupted stream.
///
/// # Errors
/// `NotFound` when there is none, `Busy` while it comes in.
pub fn abort(store: &Arc<Store>, disk: &str) -> Result<()> {
    remove_orphans(store);
    let (hidden, _) = hidden_of(store, disk)?;
    incoming::abandon(store, hidden).map_err(|error| come_in_already(error, disk))
}

/// Removes what arrived for disks that are gone.
fn remove_orphans(store: &Arc<Store>) {
    let orphans: Vec<_> = {
        let tables = store.tables.read();
        let there: Vec<String> = tables.disks().map(|(_, row)| format!("{PREFIX}{}", row.uuid)).collect();
        let gone = |name: &str| {
            name.strip_prefix(PREFIX).is_some_and(|rest| !rest.starts_with("new-")) && !there.iter().any(|n| n == name)
        };
        tables.disks().filter(|(_, row)| gone(&row.name)).map(|(id, _)| id).collect()
    };
    for id in orphans {
        match incoming::abandon(store, id) {
            Err(error) if error.kind() != Kind::Busy => tracing::warn!("a hidden disk could not be removed: {error}"),
            _ => {}
        }
    }
}
