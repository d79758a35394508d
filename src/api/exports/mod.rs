//! Exports: disks and snapshots that a server shows on sockets and ports, beside the mount.
//!
//! ```text
//! Request::Attach -> wish -> ExportRow -+-> served -> nbd::start or vhost_blk::start
//!                                       +-> book (exports.toml), when it is to persist
//! the next process -> back -> what is in the book
//! ```
//!
//! # Rules
//! 1. An export is of ids: a disk that is renamed is shown under its new name. While a disk is attached it is not removed.
//!    A snapshot that is removed or retired meanwhile is served under its last name, to who connects later, too, and keeps
//!    its data until the export ends ([`served`]).
//! 2. Who may write has the lease: a vhost-user device and a virtual machine of ours ([`machines`]) as long as they are
//!    attached, an NBD client from the moment it chose the disk until its connection ends. Attaching a disk that another one
//!    has is refused, with its name.
//! 3. What persists is started again before anybody else is let in, and who was writing when the server ended has its
//!    disk reserved for a minute. One that cannot be started is kept and shown with the reason. A command that opens the
//!    pool itself keeps all this for the next server ([`back`]).
//! 4. Nothing is started, stopped, written or asked for a lease under the lock of the table: all that may wait, and a change
//!    of a disk is noticed under it, on the way of who writes.
//! 5. All exports end at once, and what did not end in order in its time has the lease as long as its I/O is under way, and
//!    is shown as long as it has ([`leaving`]).
//! 6. A wish for an address that an export has is that export if it is the same wish, or refused ([`same`]).
//!
//! # After a crash
//! Sockets stay behind; whoever listens there next removes them. The list of what persists is whole, old or new.

mod back;
mod book;
mod leaving;
mod machines;
mod nbd;
mod same;
mod served;
mod show;
mod wish;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use super::answer::Export;
use super::{Request, Target};
use crate::budget::Budget;
use crate::disk::{self, Attached, BlockDevice, ReadOnly};
use crate::error::{Error, Kind, Result};
use crate::pool::{ExportKind, ExportRow};
use crate::store::{Change, Store};
use crate::sync::Mutex;
use crate::sys::process::share_of_open_files;
use crate::vhost_blk;
use book::Book;
use leaving::{Leaving, end_all};
use machines::Tenant;
pub(super) use machines::holder as machine_holder;
use served::{Served, Writer};
use wish::What;

/// Digits of the identity of a disk or snapshot that a guest sees as its serial number.
const SERIAL_LEN: usize = 20;
/// How long the end of an export waits for its clients, and then for I/O under way.
const PATIENCE: Duration = Duration::from_secs(10);

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
    served: Arc<[Served]>,
    /// The virtual machine it is for. Dropped after the front, as the next.
    machine: Option<Tenant>,
    attached: Vec<Attached>,
}

#[derive(Debug, Default)]
struct Table {
    /// Whether this process serves; otherwise it only looks at the list.
    serves: bool,
    running: BTreeMap<u64, Running>,
    /// What was detached and has not let go of its disks yet.
    leaving: BTreeMap<u64, Leaving>,
    /// How many wait until machines know that something was taken from them ([`Exports::wait_until_told`]).
    telling: usize,
    /// Machines, and the claims by which they do not come back: it was taken from them. Whether they know.
    dismissed: BTreeMap<(String, String), bool>,
}

impl Table {
    /// Takes exports out. The machines they are for may ask for them again before they have ended, and do not get them.
    fn take_away(&mut self, ids: &[u64]) -> Vec<Running> {
        let gone: Vec<Running> = ids.iter().filter_map(|id| self.running.remove(id)).collect();
        self.dismissed.extend(gone.iter().flat_map(Running::claims).map(|key| (key, false)));
        gone
    }

    /// Tells whether nothing is attached, nor has to let go of its disks yet, and all know who have to.
    fn is_empty(&self) -> bool {
        self.running.is_empty() && self.leaving.is_empty() && self.telling == 0
    }
}

/// Called whenever an export has ended and no other is left.
type Idle = Box<dyn Fn() + Send + Sync>;

/// The exports of a pool.
pub(super) struct Exports {
    store: Arc<Store>,
    /// The directory of the pool, where its machines are.
    pool: PathBuf,
    book: Arc<Book>,
    table: Mutex<Table>,
    /// What is held for the next server, by number, where nothing is served.
    kept: Mutex<BTreeMap<u64, Vec<Attached>>>,
    idle: Mutex<Option<Idle>>,
    /// Nothing was attached any more while somebody was awaited.
    was_idle: AtomicBool,
    /// What the clients of all exports may take together.
    budget: Budget,
    patience: Duration,
}

impl Exports {
    /// Makes them for a process that serves nothing.
    pub(super) fn new(store: &Arc<Store>, pool: &Path) -> Arc<Self> {
        Arc::new(Self {
            store: Arc::clone(store),
            pool: pool.to_owned(),
            book: Arc::new(Book::new(store.media())),
            table: Mutex::default(),
            kept: Mutex::default(),
            idle: Mutex::default(),
            was_idle: AtomicBool::new(false),
            budget: Budget::new(share_of_open_files(CLIENTS_SHARE)),
            patience: PATIENCE,
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
            if let Some(exports) = looker.upgrade() {
                exports.notice(change);
            }
        }));
        if let Err(error) = self.restore() {
            tracing::error!("what was attached to stay is not served: {error}");
        }
    }

    /// Tells whether it serves: it does not yet, does no more, or is for one command.
    pub(super) fn serves(&self) -> bool {
        self.table.lock().serves
    }

    /// Attaches what a request names, or finds it attached: the same wish as an export that persists is that export.
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
        if let Some(same) = self.find_same(&row, persist)? {
            return Ok(same);
        }
        row.id = self.book.next_id();
        let running = self.begin(&row, persist, true)?;
        if persist && let Err(error) = self.book.add(row.clone()) {
            running.end_within(self.patience);
            return Err(error);
        }
        let mut table = self.table.lock();
        if !table.serves {
            drop(table);
            running.end_within(self.patience);
            if persist {
                self.book.remove(&[(row.id, holder(&row))])?;
            }
            return Err(book::ending());
        }
        let answer = self.show(&running);
        table.running.insert(row.id, running);
        Ok(answer)
    }

    /// Starts an export; a `fresh` one is refused when somebody else writes now.
    fn begin(&self, row: &ExportRow, persist: bool, fresh: bool) -> Result<Running> {
        let holder = holder(row);
        let attached = self.hold_disks(row)?;
        if fresh && !row.read_only {
            self.disks_of(row).try_for_each(|disk| disk.refuse_others(&holder))?;
        }
        let served: Arc<[Served]> = Served::open(&self.store, row)?.into();
        let clients = Arc::new(AtomicUsize::new(0));
        let book = persist.then(|| Arc::clone(&self.book));
        let front = match row.kind {
            ExportKind::Nbd => {
                let (store, served, clients) = (Arc::clone(&self.store), Arc::clone(&served), Arc::clone(&clients));
                let (writer, left, read_only) = (None, None, row.read_only);
                let shown = nbd::Shown { store, served, read_only, holder, writer, clients, left, book };
                Front::Nbd(begin_nbd(row, shown, &self.budget)?)
            }
            ExportKind::VhostUser => Front::Vhost(self.begin_vhost(row, &served, &holder, book)?),
        };
        tracing::info!("export {} ({} {}) begins", row.id, row.kind.name(), row.address());
        Ok(Running { row: row.clone(), persist, front, clients, served, machine: None, attached })
    }

    fn begin_vhost(
        &self,
        row: &ExportRow,
        served: &[Served],
        holder: &str,
        book: Option<Arc<Book>>,
    ) -> Result<vhost_blk::Server> {
        let (Some(socket), [only]) = (&row.socket, served) else {
            return Err(Error::failed("a device is one disk at a socket"));
        };
        let (device, keep, uuid): (Arc<dyn BlockDevice>, Box<dyn std::any::Any + Send + Sync>, _) =
            match (only.what, &only.snapshot) {
                (What::Disk(id), _) => {
                    let disk = disk::open_by_id(&self.store, id)?;
                    let uuid = self.store.disk_info_by_id(id)?.uuid;
                    if row.read_only {
                        (Arc::new(ReadOnly::new(disk)), Box::new(()), uuid)
                    } else {
                        let writer = Writer::begin(&disk, holder, book)?;
                        (disk, Box::new(writer), uuid)
                    }
                }
                (What::Snapshot(id), Some(device)) => {
                    (Arc::clone(device) as Arc<dyn BlockDevice>, Box::new(()), self.store.snapshot_info_by_id(id)?.uuid)
                }
                (What::Snapshot(_), None) => return Err(Error::failed("the snapshot is not open")),
            };
        let serial = uuid.simple().to_string()[..SERIAL_LEN].to_owned();
        let (queues, budget) = (usize::from(row.queues), self.budget.clone());
        let options = vhost_blk::Options { socket: socket.into(), queues, serial, budget };
        vhost_blk::start(options, device, keep)
    }

    /// Detaches by number or by what is served; returns what was detached.
    ///
    /// # Errors
    /// `NotFound`; `Failed` when the name stands for several things, or for a part of an export; `Busy` when it is detached
    /// and I/O of its clients is still under way.
    pub(super) fn detach(self: &Arc<Self>, name: &str) -> Result<Vec<Export>> {
        if !self.table.lock().serves {
            return self.forget(name);
        }
        let named = |table: &Table| {
            let names =
                |running: &Running| -> Vec<String> { running.served.iter().map(|one| one.name(&self.store)).collect() };
            named(&table.running.values().map(|running| (running.row.id, names(running))).collect::<Vec<_>>(), name)
        };
        let found = named(&self.table.lock());
        if let Err(error) = &found
            && error.kind() == Kind::NotFound
            && let Some(ended) = self.wait_for_leaving(name)
        {
            return ended;
        }
        let mut ids = found?;
        let kept: Vec<_> = {
            let table = self.table.lock();
            let kept = ids.iter().filter_map(|id| table.running.get(id)).filter(|running| running.persist);
            kept.map(|running| (running.row.id, holder(&running.row))).collect()
        };
        if !kept.is_empty() {
            self.book.remove(&kept)?;
        }
        let (gone, answer) = {
            let mut table = self.table.lock();
            // A machine that has come back meanwhile has another number.
            let again = named(&table).unwrap_or_default();
            ids.extend(again.into_iter().filter(|id| table.running[id].machine.is_some()));
            let gone = table.take_away(&ids);
            let answer = self.begin_to_leave(&mut table, &gone);
            (gone, answer)
        };
        if gone.is_empty() {
            // Somebody else was faster, or the server has ended.
            return self.wait_for_leaving(name).unwrap_or_else(|| Err(not_attached(name)));
        }
        let keys: Vec<_> = gone.iter().flat_map(Running::claims).collect();
        self.leave(gone, &keys)?;
        Ok(answer)
    }

    /// Says that nothing is attached any more, unless a machine that runs is about to come back: what it waits for would end.
    fn tell_idle(&self) {
        let runs = |(_, holder, _): &(_, String, _)| self.has_machine_ended(holder) == Some(false);
        if self.book.awaited().iter().any(runs) {
            self.was_idle.store(true, Ordering::SeqCst);
            return;
        }
        if let Some(idle) = &*self.idle.lock() {
            idle();
        }
    }

    /// Detaches where nothing is served: the next server does not start it.
    fn forget(&self, name: &str) -> Result<Vec<Export>> {
        let rows = self.book.read()?.exports;
        let names = |row: &ExportRow| -> Vec<String> {
            Served::not_opened(&self.store, row).iter().map(|one| one.name(&self.store)).collect()
        };
        let ids = named(&rows.iter().map(|row| (row.id, names(row))).collect::<Vec<_>>(), name)?;
        let gone: Vec<ExportRow> = rows.into_iter().filter(|row| ids.contains(&row.id)).collect();
        self.book.remove(&gone.iter().map(|row| (row.id, holder(row))).collect::<Vec<_>>())?;
        gone.iter().for_each(|row| self.keep_no_more(row));
        Ok(gone.iter().map(|row| self.show_off(row)).collect())
    }

    /// Ends all exports, and attaches no more. What is in flight is finished.
    pub(super) fn end(&self) {
        // First: who is refused because it ends does not lose its claim.
        self.book.end();
        let running = {
            let mut table = self.table.lock();
            table.serves = false;
            std::mem::take(&mut table.running)
        };
        // What does not end keeps its disks until it does; the log says so.
        end_all(running.into_values().collect(), self.patience);
        self.book
            .note_told(|disk, holder| disk::open_by_id(&self.store, disk).is_ok_and(|disk| disk.owes_loss_to(holder)));
    }

    /// Takes notice of a change that clients have to be told of, or that ends a name.
    fn notice(&self, change: &Change) {
        for running in self.table.lock().running.values() {
            running.served.iter().for_each(|one| one.notice(&self.store, change));
            let Change::Disk { id, resized: true, .. } = change else { continue };
            match &running.front {
                Front::Vhost(server) if running.row.disks.contains(&id.0) => server.resized(),
                // A machine comes back at once, and finds the new size.
                Front::Nbd(server) if running.machine.is_some() && running.row.disks.contains(&id.0) => server.part(),
                _ => {}
            }
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

/// Serves over NBD.
fn begin_nbd(row: &ExportRow, shown: nbd::Shown, budget: &Budget) -> Result<crate::nbd::Server> {
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
    let limits = Limits::new(CONNECTIONS_MAX, budget.clone());
    crate::nbd::start(Options { listen, tls, limits }, Arc::new(shown))
}

fn not_attached(name: &str) -> Error {
    Error::not_found(format!("'{name}' is not attached")).hint("'afterimage exports' lists what is")
}

/// Finds the numbers of the exports that a name stands for, among all with what they serve.
fn named(rows: &[(u64, Vec<String>)], name: &str) -> Result<Vec<u64>> {
    let by_id = rows.iter().map(|(id, _)| *id).find(|id| id.to_string() == name);
    let by_name: Vec<_> = rows.iter().filter(|(_, names)| names.iter().any(|is| is == name)).collect();
    match (by_id, by_name.as_slice()) {
        (Some(id), of) if of.iter().any(|(other, _)| *other != id) => {
            Err(Error::failed(format!("'{name}' is the number of an export and the name of a disk in another one"))
                .hint("name the number of the other one, or another disk of this one"))
        }
        (Some(id), _) => Ok(vec![id]),
        (None, []) => {
            Target::parse(name)?;
            Err(not_attached(name))
        }
        (None, of) => match of.iter().find(|(_, names)| names.len() > 1) {
            Some((id, _)) => Err(Error::failed(format!("export {id} serves '{name}' together with others"))
                .hint(format!("'afterimage detach {id}' detaches all of them"))),
            None => Ok(of.iter().map(|(id, _)| *id).collect()),
        },
    }
}

impl Running {
    /// The name under which it takes leases.
    fn holder(&self) -> String {
        self.machine.as_ref().map_or_else(|| holder(&self.row), |machine| machine_holder(&machine.name))
    }

    fn clients(&self) -> usize {
        match &self.front {
            Front::Vhost(server) => usize::from(server.connected()),
            Front::Nbd(_) | Front::Failed(_) => self.clients.load(Ordering::Acquire),
        }
    }
}

impl std::fmt::Debug for Exports {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Exports").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::Weak;

    use super::*;
    use crate::media::{File, HostMedia, Media, Open, Space};
    use crate::store::{InitOptions, OpenOptions};

    /// Files of the host; looks whether the table is locked when the list is written.
    #[derive(Debug)]
    struct Watched {
        inner: HostMedia,
        exports: Mutex<Weak<Exports>>,
        free: Mutex<Vec<bool>>,
    }

    impl Media for Watched {
        fn open(&self, path: &str, how: Open) -> io::Result<Arc<dyn File>> {
            self.inner.open(path, how)
        }
        fn make_dir(&self, path: &str) -> io::Result<()> {
            self.inner.make_dir(path)
        }
        fn remove(&self, path: &str) -> io::Result<()> {
            self.inner.remove(path)
        }
        fn rename(&self, from: &str, to: &str) -> io::Result<()> {
            if let Some(exports) = self.exports.lock().upgrade().filter(|_| to.contains("exports")) {
                self.free.lock().push(exports.table.try_lock().is_some());
            }
            self.inner.rename(from, to)
        }
        fn list(&self, path: &str) -> io::Result<Vec<String>> {
            self.inner.list(path)
        }
        fn sync_dir(&self, path: &str) -> io::Result<()> {
            self.inner.sync_dir(path)
        }
        fn space(&self) -> io::Result<Space> {
            self.inner.space()
        }
        fn boot(&self) -> io::Result<u128> {
            self.inner.boot()
        }
    }

    /// Who writes to a disk waited for the list to be written, and so for the host.
    #[test]
    fn the_list_is_written_once_and_not_under_the_lock_of_the_table() {
        let dir = tempfile::tempdir().unwrap();
        let inner = HostMedia::new(dir.path()).unwrap();
        let watched = Arc::new(Watched { inner, exports: Mutex::new(Weak::new()), free: Mutex::default() });
        let media: Arc<dyn Media> = Arc::clone(&watched) as _;
        Store::init(&media, InitOptions { journal: 4 << 20, ballast: 4096, probe: false }).unwrap();
        let store = Store::open(media, OpenOptions { background: false, ..OpenOptions::default() }).unwrap();
        drop(disk::create(&store, "web", 1 << 20).unwrap());
        let exports = Exports::new(&store, dir.path());
        *watched.exports.lock() = Arc::downgrade(&exports);
        exports.start();
        for n in 0..2 {
            let socket = dir.path().join(format!("{n}.sock"));
            let request = serde_json::json!({
                "command": "attach", "kind": "nbd", "disks": ["web"], "socket": socket, "read_only": true, "persist": true
            });
            exports.attach(&serde_json::from_value(request).unwrap()).unwrap();
        }
        watched.free.lock().clear();
        assert_eq!(exports.detach("web").unwrap().len(), 2);
        assert_eq!(*watched.free.lock(), [true]);
        assert_eq!(exports.detach("web").unwrap_err().kind(), crate::error::Kind::NotFound);
        exports.end();
        store.close().unwrap();
    }
}
