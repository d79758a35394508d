//! Exports: disks and snapshots that a server shows on sockets and ports, beside the mount.
//!
//! ```text
//! Request::Attach -> wish -> ExportRow -+-> nbd::start or vhost_blk::start
//!                                       +-> book (exports.toml), when it is to persist
//! ```
//!
//! # Rules
//! 1. An export is of ids: a disk that is renamed is shown under its new name. While a disk is attached it is not removed.
//!    A snapshot that is removed or retired meanwhile keeps its data until the export ends.
//! 2. Who may write has the lease: a vhost-user device as long as it is attached, an NBD client as long as it is
//!    connected. Attaching a disk that another one has is refused, with its name.
//! 3. What persists is started again before anybody else is let in, and who was writing when the server ended has its
//!    disk reserved for a minute. One that cannot be started is kept and shown with the reason.
//! 4. Nothing is started, stopped or asked for a lease under the lock of the table: all that may wait.
//!
//! # After a crash
//! Sockets stay behind; whoever listens there next removes them. The list of what persists is whole, old or new.

mod book;
mod nbd;
mod wish;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Weak};

use super::answer::Export;
use super::{Request, Target};
use crate::budget::Budget;
use crate::clock;
use crate::disk::{self, Attached, BlockDevice, ReadOnly};
use crate::error::{Error, Result};
use crate::pool::{ExportKind, ExportRow, LeaseRow};
use crate::store::{Change, Store};
use crate::sync::Mutex;
use crate::sys::process::share_of_open_files;
use crate::units::DiskId;
use crate::{snapshot, vhost_blk};
use book::Book;
use wish::What;

/// Digits of the identity of a disk or snapshot that a guest sees as its serial number.
const SERIAL_LEN: usize = 20;

/// What does the work of an export.
#[derive(Debug)]
enum Front {
    Nbd(crate::nbd::Server),
    Vhost(vhost_blk::Server),
    /// It could not be started, for this reason.
    Failed(String),
}

/// An export.
#[derive(Debug)]
struct Running {
    row: ExportRow,
    persist: bool,
    front: Front,
    clients: Arc<AtomicUsize>,
    /// Dropped after the front.
    attached: Vec<Attached>,
}

#[derive(Debug, Default)]
struct Table {
    /// Whether this process serves; otherwise it only looks at the list.
    serves: bool,
    last_id: u64,
    running: BTreeMap<u64, Running>,
}

/// Called whenever an export has ended and no other is left.
type Idle = Box<dyn Fn() + Send + Sync>;

/// The exports of a pool.
pub(super) struct Exports {
    store: Arc<Store>,
    book: Arc<Book>,
    table: Mutex<Table>,
    idle: Mutex<Option<Idle>>,
    /// What the clients of all exports may take together.
    budget: Budget,
}

impl Exports {
    /// Makes them for a process that serves nothing.
    pub(super) fn new(store: &Arc<Store>) -> Arc<Self> {
        Arc::new(Self {
            store: Arc::clone(store),
            book: Arc::new(Book::new(store.media())),
            table: Mutex::default(),
            idle: Mutex::default(),
            budget: Budget::new(share_of_open_files(CLIENTS_SHARE)),
        })
    }

    /// Says what happens when the last export has been detached.
    pub(super) fn on_idle(&self, idle: Idle) {
        *self.idle.lock() = Some(idle);
    }

    /// Begins to serve: starts what persists. Nothing in the list keeps the server from starting; what is wrong is logged.
    pub(super) fn start(self: &Arc<Self>) {
        self.table.lock().serves = true;
        let looker = Arc::downgrade(self);
        self.store.subscribe(Box::new(move |change| {
            if let (Change::Disk { id, resized: true, .. }, Some(exports)) = (change, looker.upgrade()) {
                exports.tell_resized(*id);
            }
        }));
        if let Err(error) = self.restore() {
            tracing::error!("what was attached to stay is not served: {error}");
        }
    }

    /// Starts what the list says, without what is gone.
    fn restore(&self) -> Result<()> {
        let list = self.book.read()?;
        let mut rows = list.exports;
        rows.retain_mut(|row| self.drop_gone(row));
        let mut leases = list.leases;
        leases.retain(|lease| self.reserve(lease));
        let awaited = !leases.is_empty();
        self.book.restore(rows.clone(), leases)?;
        for row in rows {
            let (id, address) = (row.id, row.address());
            self.reserve_device(&row);
            let running = self.begin(&row, true, false).unwrap_or_else(|error| {
                tracing::error!("export {id} ({address}) could not be started again: {error}");
                let (front, attached) = (Front::Failed(error.to_string()), Vec::new());
                Running { row, persist: true, front, clients: Arc::default(), attached }
            });
            let mut table = self.table.lock();
            table.last_id = table.last_id.max(id);
            table.running.insert(id, running);
        }
        if awaited {
            purge_later(&self.book);
        }
        Ok(())
    }

    /// Takes what is gone out of a row; tells whether anything is left.
    fn drop_gone(&self, row: &mut ExportRow) -> bool {
        let before = row.clone();
        let is_there = |what: What| what.name(&self.store).is_ok();
        row.disks.retain(|id| is_there(What::Disk(DiskId(*id))));
        row.snapshots.retain(|id| is_there(What::Snapshot(crate::units::SnapshotId(*id))));
        if *row != before {
            tracing::warn!("of export {} ({}), what was removed is served no longer", row.id, row.address());
        }
        !(row.disks.is_empty() && row.snapshots.is_empty())
    }

    /// Reserves a disk for who was writing to it; tells whether it is still there.
    fn reserve(&self, lease: &LeaseRow) -> bool {
        match disk::open_by_id(&self.store, DiskId(lease.disk)) {
            Ok(disk) => {
                disk.reserve(&lease.holder, book::RESERVED);
                true
            }
            Err(_) => false,
        }
    }

    /// Reserves the disk of a device for the front end that goes on with it. It takes the lease by itself, at once, so this is
    /// only for what it has to be told; and where the host was restarted, so was the front end: they share memory.
    fn reserve_device(&self, row: &ExportRow) {
        if row.kind != ExportKind::VhostUser || row.read_only || self.store.restarted() {
            return;
        }
        for disk in row.disks.iter().filter_map(|id| disk::open_by_id(&self.store, DiskId(*id)).ok()) {
            if self.store.lost_changes(disk.id()).is_some() {
                disk.reserve(&holder(row), book::RESERVED);
            }
        }
    }

    /// Attaches what a request names.
    ///
    /// # Errors
    /// `Usage` for a request that makes no sense, `NotFound`, `Busy` with the name of who has the disk or the address.
    pub(super) fn attach(&self, request: &Request) -> Result<Export> {
        if !self.table.lock().serves {
            return Err(book::no_server());
        }
        let mut row = wish::read(&self.store, request)?;
        let persist = matches!(request, Request::Attach { persist: true, .. });
        if persist {
            // A list that cannot be read is told of before anything is begun.
            self.book.read()?;
        }
        let id = {
            let mut table = self.table.lock();
            table.last_id += 1;
            table.last_id
        };
        row.id = id;
        let running = self.begin(&row, persist, true)?;
        if persist && let Err(error) = self.book.add(row.clone()) {
            running.end();
            return Err(error);
        }
        let mut table = self.table.lock();
        if !table.serves {
            drop(table);
            running.end();
            return Err(Error::busy("the server is ending"));
        }
        let answer = self.show(&running);
        table.running.insert(id, running);
        Ok(answer)
    }

    /// Starts an export; a `fresh` one is refused when somebody else writes now.
    fn begin(&self, row: &ExportRow, persist: bool, fresh: bool) -> Result<Running> {
        let holder = holder(row);
        let mut attached = Vec::new();
        for id in &row.disks {
            let disk = disk::open_by_id(&self.store, DiskId(*id))?;
            attached.push(disk.attach(&holder)?);
            if fresh && !row.read_only {
                disk.refuse_others(&holder)?;
            }
        }
        let clients = Arc::new(AtomicUsize::new(0));
        let front = match row.kind {
            ExportKind::Nbd => Front::Nbd(self.begin_nbd(row, holder, &clients, persist)?),
            ExportKind::VhostUser => Front::Vhost(self.begin_vhost(row, &holder)?),
        };
        tracing::info!("export {} ({} {}) begins", row.id, row.kind.name(), row.address());
        Ok(Running { row: row.clone(), persist, front, clients, attached })
    }

    fn begin_nbd(
        &self,
        row: &ExportRow,
        holder: String,
        clients: &Arc<AtomicUsize>,
        persist: bool,
    ) -> Result<crate::nbd::Server> {
        use crate::nbd::{Limits, Listen, Options, Tls};
        let listen = match (&row.socket, &row.listen) {
            (Some(path), _) => Listen::Unix(path.into()),
            (None, Some(listen)) => Listen::Tcp(wish::parse_listen(listen)?),
            (None, None) => return Err(Error::failed("an export has no address")),
        };
        let tls = match (&row.tls_cert, &row.tls_key) {
            (Some(cert), Some(key)) => {
                Some(Tls::load(cert.as_ref(), key.as_ref(), row.tls_ca.as_ref().map(AsRef::as_ref))?)
            }
            _ => None,
        };
        let shown = nbd::Shown {
            store: Arc::clone(&self.store),
            targets: What::of(row),
            read_only: row.read_only,
            holder,
            clients: Arc::clone(clients),
            book: persist.then(|| Arc::clone(&self.book)),
        };
        let limits = Limits::new(CONNECTIONS_MAX, self.budget.clone());
        crate::nbd::start(Options { listen, tls, limits }, Arc::new(shown))
    }

    fn begin_vhost(&self, row: &ExportRow, holder: &str) -> Result<vhost_blk::Server> {
        let Some(socket) = &row.socket else { return Err(Error::failed("an export has no address")) };
        let (device, keep, uuid): (Arc<dyn BlockDevice>, Box<dyn std::any::Any + Send + Sync>, _) =
            match What::of(row).first() {
                Some(What::Disk(id)) => {
                    let disk = disk::open_by_id(&self.store, *id)?;
                    let uuid = self.store.disk_info_by_id(*id)?.uuid;
                    if row.read_only {
                        (Arc::new(ReadOnly::new(disk)), Box::new(()), uuid)
                    } else {
                        let lease = disk.lease(holder)?;
                        (disk, Box::new(lease), uuid)
                    }
                }
                Some(What::Snapshot(id)) => {
                    let uuid = self.store.snapshot_info_by_id(*id)?.uuid;
                    (snapshot::open_by_id(&self.store, *id)?, Box::new(()), uuid)
                }
                None => return Err(Error::failed("an export is of nothing")),
            };
        let serial = uuid.simple().to_string()[..SERIAL_LEN].to_owned();
        let options = vhost_blk::Options { socket: socket.into(), queues: usize::from(row.queues), serial };
        vhost_blk::start(options, device, keep)
    }

    /// Detaches by number or by what is served; returns what was detached.
    ///
    /// # Errors
    /// `NotFound`; `Failed` when the name stands for several things, or for a part of an export.
    pub(super) fn detach(&self, name: &str) -> Result<Vec<Export>> {
        if !self.table.lock().serves {
            return self.forget(name);
        }
        let (gone, left) = {
            let mut table = self.table.lock();
            let rows: Vec<&ExportRow> = table.running.values().map(|running| &running.row).collect();
            let ids = self.named(&rows, name)?;
            for id in ids.iter().filter(|id| table.running[id].persist) {
                self.book.remove(*id)?;
            }
            let gone: Vec<Running> = ids.iter().filter_map(|id| table.running.remove(id)).collect();
            (gone, table.running.len())
        };
        let answer = gone.iter().map(|running| self.show(running)).collect();
        gone.into_iter().for_each(Running::end);
        if left == 0
            && let Some(idle) = &*self.idle.lock()
        {
            idle();
        }
        Ok(answer)
    }

    /// Detaches where nothing is served: the next server does not start it.
    fn forget(&self, name: &str) -> Result<Vec<Export>> {
        let rows = self.book.read()?.exports;
        let ids = self.named(&rows.iter().collect::<Vec<_>>(), name)?;
        ids.iter().try_for_each(|id| self.book.remove(*id))?;
        Ok(rows.into_iter().filter(|row| ids.contains(&row.id)).map(|row| self.show_row(&row, "off", None)).collect())
    }

    /// Finds the numbers of the exports that a name stands for.
    fn named(&self, rows: &[&ExportRow], name: &str) -> Result<Vec<u64>> {
        let by_id = rows.iter().find(|row| row.id.to_string() == name).map(|row| row.id);
        let shows =
            |row: &&&ExportRow| What::of(row).iter().any(|what| what.name(&self.store).is_ok_and(|is| is == name));
        let by_name: Vec<&&ExportRow> = rows.iter().filter(shows).collect();
        match (by_id, by_name.as_slice()) {
            (Some(id), []) => Ok(vec![id]),
            (Some(id), of) if of.iter().any(|row| row.id != id) => {
                Err(Error::failed(format!("'{name}' is the number of an export and the name of a disk in another one"))
                    .hint("name the number of the other one, or another disk of this one"))
            }
            (Some(id), _) => Ok(vec![id]),
            (None, []) => {
                Target::parse(name)?;
                Err(Error::not_found(format!("'{name}' is not attached")).hint("'afterimage exports' lists what is"))
            }
            (None, of) => match of.iter().find(|row| row.disks.len() + row.snapshots.len() > 1) {
                Some(row) => Err(Error::failed(format!("export {} serves '{name}' together with others", row.id))
                    .hint(format!("'afterimage detach {}' detaches all of them", row.id))),
                None => Ok(of.iter().map(|row| row.id).collect()),
            },
        }
    }

    /// Returns what is attached, by number.
    ///
    /// # Errors
    /// Where nothing is served: when the list cannot be read.
    pub(super) fn list(&self) -> Result<Vec<Export>> {
        let table = self.table.lock();
        if table.serves {
            return Ok(table.running.values().map(|running| self.show(running)).collect());
        }
        drop(table);
        let rows = self.book.read()?.exports;
        Ok(rows.iter().map(|row| self.show_row(row, "off", None)).collect())
    }

    /// Returns the counters as Prometheus text; nothing where nothing is served.
    pub(super) fn metrics(&self) -> String {
        let table = self.table.lock();
        if !table.serves {
            return String::new();
        }
        let mut text =
            "# HELP afterimage_export_clients Clients of an export.\n# TYPE afterimage_export_clients gauge\n"
                .to_owned();
        for (id, running) in &table.running {
            let (kind, clients) = (running.row.kind.name(), running.clients());
            text.push_str(&format!("afterimage_export_clients{{export=\"{id}\",kind=\"{kind}\"}} {clients}\n"));
        }
        text
    }

    /// Ends all exports, and attaches no more. What is in flight is finished.
    pub(super) fn end(&self) {
        let running = {
            let mut table = self.table.lock();
            table.serves = false;
            std::mem::take(&mut table.running)
        };
        self.book.end();
        running.into_values().for_each(Running::end);
    }

    fn tell_resized(&self, id: DiskId) {
        for running in self.table.lock().running.values().filter(|running| running.row.disks.contains(&id.0)) {
            if let Front::Vhost(server) = &running.front {
                server.resized();
            }
        }
    }

    fn show(&self, running: &Running) -> Export {
        let (state, error) = match &running.front {
            Front::Failed(why) => ("failed", Some(why.clone())),
            Front::Nbd(_) | Front::Vhost(_) => ("on", None),
        };
        let mut shown = self.show_row(&running.row, state, error);
        shown.persist = running.persist;
        shown.clients = running.clients() as u64;
        // A port of 0 became another one.
        if let (Front::Nbd(server), Some(_)) = (&running.front, &running.row.listen) {
            shown.listen = Some(server.address());
        }
        shown
    }

    fn show_row(&self, row: &ExportRow, state: &str, error: Option<String>) -> Export {
        let targets = What::of(row);
        let name = |what: &What| what.name(&self.store).unwrap_or_else(|_| "(removed)".to_owned());
        let holder = holder(row);
        let holds = |id: &&u64| {
            self.store.disk_info_by_id(DiskId(**id)).is_ok_and(|info| info.holder.as_deref() == Some(holder.as_str()))
        };
        let writing = row.disks.iter().filter(holds).map(|id| name(&What::Disk(DiskId(*id)))).collect();
        Export {
            id: row.id,
            kind: row.kind.name().to_owned(),
            disks: targets.iter().map(name).collect(),
            socket: row.socket.clone(),
            listen: row.listen.clone(),
            tls: row.tls_cert.is_some(),
            read_only: row.read_only,
            queues: (row.queues > 0).then_some(row.queues),
            persist: true,
            clients: 0,
            writing,
            state: state.to_owned(),
            error,
        }
    }
}

/// Connections of one NBD export at most.
const CONNECTIONS_MAX: usize = 256;
/// Connections of all of them get one part in so many of the files that may be open: the segments need as many.
const CLIENTS_SHARE: usize = 4;

/// The name under which an export takes leases and is told of; the same after a restart.
fn holder(row: &ExportRow) -> String {
    format!("export {} ({} {})", row.id, row.kind.name(), row.address())
}

/// Forgets in a minute who has not come back by then.
fn purge_later(book: &Arc<Book>) {
    let book: Weak<Book> = Arc::downgrade(book);
    let purge = move || {
        clock::sleep(book::RESERVED);
        if let Some(book) = book.upgrade() {
            book.purge();
        }
    };
    if let Err(error) = std::thread::Builder::new().name("exports".into()).spawn(purge) {
        tracing::warn!("the host has no thread to forget who does not come back: {error}");
    }
}

impl Running {
    fn clients(&self) -> usize {
        match &self.front {
            Front::Vhost(server) => usize::from(server.connected()),
            Front::Nbd(_) | Front::Failed(_) => self.clients.load(Ordering::Acquire),
        }
    }

    /// Finishes what is in flight and stops.
    fn end(self) {
        let Self { row, front, attached, .. } = self;
        match front {
            Front::Nbd(server) => server.stop(),
            Front::Vhost(server) => server.stop(),
            Front::Failed(_) => {}
        }
        drop(attached);
        tracing::info!("export {} ({} {}) has ended", row.id, row.kind.name(), row.address());
    }
}

impl std::fmt::Debug for Exports {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Exports").finish_non_exhaustive()
    }
}
