//! Disks of the virtual machines of the pool: exports that come and go with a machine.
//!
//! ```text
//!   machine --AttachVm--> export with a socket in the machine's folder <--NBD-- machine
//!           --DetachVm, or all its connections have ended for LINGER--> export ends, lease falls
//! ```
//!
//! # Rules
//! 1. The export has the lease in the name of the machine, which is in the book: after a restart of the server the disk is
//!    kept for it for a minute. The exports themselves are not kept: a machine asks again, and one that has gone does not.
//! 2. A machine that asks for a disk it has begins anew: what its old connections had under way is finished first. One that
//!    runs has a minute to come back when its connections have ended, as after a restart; one that runs no more, [`LINGER`].
//! 3. A machine that comes back, with its claim, gets the very disk it had, and only if nobody else can have changed it.
//!    Otherwise what it knows of the disk may be wrong, and it must not go on.
//! 4. One that has ended is not waited for, in whatever process the pool is opened: nobody has its folder locked then. One that
//!    begins again is told of nothing that its former life may have lost: it begins as after a power cut.
//! 5. What is detached by a person is taken from the machine: it does not come back to it in this life. It is told so before
//!    the server ends for want of other exports, or it would wait for the next one.
//! 6. A claim is of an id: a disk that was renamed meanwhile is found.
//!
//! # After a crash
//! Sockets stay in the folders of the machines; whoever listens there next removes them.

use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, Weak};
use std::time::Duration;

use super::served::{Served, Writer};
use super::wish::What;
use super::{Exports, Front, Running, Table, begin_nbd, book, nbd};
use crate::api::Request;
use crate::api::answer::{Export, VmDisk};
use crate::clock;
use crate::disk;
use crate::error::{Error, Kind, Result};
use crate::pool::{ExportKind, ExportRow};
use crate::units::{DiskId, SnapshotId};
use crate::vmm::Home;

/// How long an export stays when its machine was killed, and how often that is looked at.
const LINGER: Duration = Duration::from_secs(1);

/// How long it may take a machine to ask again for what was taken from it, and how often that is looked at.
const TOLD_TIME: Duration = Duration::from_secs(2);
pub(super) const LOOK: Duration = Duration::from_millis(10);

/// What begins the name of the holder that a machine is; no other holder's begins so.
const HOLDER: &str = "VM ";

/// Returns the name under which a machine takes leases.
pub(in crate::api) fn holder(vm: &str) -> String {
    format!("{HOLDER}{vm}")
}

/// Returns where a machine finds a disk: beside the socket where it found it before, which may still be in use.
fn socket_of(home: &Home, what: What, old: Option<&str>) -> Result<String> {
    let names = ["", "-again"].map(|more| home.path(&format!("{}{more}.sock", what.claim())));
    let free = names.iter().filter_map(|path| path.to_str()).find(|path| old != Some(path));
    free.map(str::to_owned).ok_or_else(|| Error::usage("the path of the pool is not UTF-8"))
}

/// Returns the machine that a holder is, if it is one.
pub(super) fn vm_of(holder: &str) -> Option<&str> {
    holder.strip_prefix(HOLDER)
}

/// The machine that an export is for.
#[derive(Debug)]
pub(super) struct Tenant {
    pub(super) name: String,
    /// Since when it has no client.
    left_at: clock::Instant,
    /// What it writes under, together with its clients.
    writer: Option<Arc<Writer>>,
}

impl What {
    fn claim(self) -> String {
        match self {
            Self::Disk(id) => format!("disk-{}", id.0),
            Self::Snapshot(id) => format!("snapshot-{}", id.0),
        }
    }

    fn of_claim(claim: &str) -> Result<Self> {
        let bad = || Error::usage(format!("'{claim}' was never given to a virtual machine"));
        let (kind, id) = claim.split_once('-').ok_or_else(bad)?;
        let id = id.parse().map_err(|_| bad())?;
        match kind {
            "disk" => Ok(Self::Disk(DiskId(id))),
            "snapshot" => Ok(Self::Snapshot(SnapshotId(id))),
            _ => Err(bad()),
        }
    }
}

impl Exports {
    /// Serves a disk or snapshot to a machine.
    ///
    /// # Errors
    /// `NotFound`, `Busy` with the name of who has the disk, or while I/O of its old connections is under way; `Denied` when
    /// a machine comes back to a disk that was not kept for it.
    pub(in crate::api) fn attach_vm(self: &Arc<Self>, request: &Request) -> Result<VmDisk> {
        let Request::AttachVm { vm, disk, read_only, claim } = request else {
            return Err(Error::failed("this request attaches nothing"));
        };
        if !self.table.lock().serves {
            return Err(book::no_server());
        }
        let home = Home::of(&self.pool, vm)?;
        if !home.path("").is_dir() {
            return Err(Error::not_found(format!("there is no virtual machine {vm}")));
        }
        let what = match claim {
            Some(claim) => What::of_claim(claim)?,
            None => What::find(&self.store, disk)?,
        };
        let read_only = *read_only || matches!(what, What::Snapshot(_));
        let key = (vm.clone(), what.claim());
        if claim.is_none() {
            self.table.lock().dismissed.remove(&key);
        } else {
            // Before it has anything again: what it had may be somebody else's by now.
            self.refuse_dismissed(&key)?;
        }
        self.wait_until_left(&key)?;
        // Taken before the old one lets go, so that nobody comes in between.
        let writer = self.lease_for(vm, what, read_only, claim.is_some())?;
        let old = self.table.lock().of_machine(vm, what).and_then(|running| running.row.socket.clone());
        let socket = socket_of(&home, what, old.as_deref())?;
        let row = self.row_for(what, socket.clone(), read_only);
        let id = row.id;
        let running = self.begin_for(row, vm, what, writer)?;
        let old = {
            let mut table = self.table.lock();
            if !table.serves || table.dismissed.contains_key(&key) {
                drop(table);
                running.end_within(self.patience);
                self.refuse_dismissed(&key)?;
                return Err(book::ending());
            }
            // At once: there is always one to be detached.
            let old = table.of_machine(vm, what).map(|running| running.row.id);
            let old: Vec<_> = old.and_then(|old| table.running.remove(&old)).into_iter().collect();
            self.begin_to_leave(&mut table, &old);
            table.running.insert(id, running);
            old
        };
        // Before the machine knows where to ask.
        let ended = self.leave(old, &[]);
        // One that dies before it connects is not waited for.
        self.end_unless_used(id);
        ended?;
        Ok(VmDisk { export: id, socket, name: what.name(&self.store)?, claim: what.claim(), read_only })
    }

    /// Fails when a disk was taken from a machine, which knows it by then, and sees to it that nothing is kept for it.
    fn refuse_dismissed(&self, key: &(String, String)) -> Result<()> {
        match self.table.lock().dismissed.get_mut(key) {
            None => return Ok(()),
            Some(told) => *told = true,
        }
        let (vm, claim) = key;
        if let Ok(What::Disk(id)) = What::of_claim(claim) {
            // It may have come between the end of its export and now.
            self.book.forget(id, &holder(vm));
        }
        Err(Error::new(Kind::Denied, format!("{claim} was detached from {}", holder(vm)))
            .hint("stop the machine and start it again"))
    }

    /// Waits a little until machines that run know that disks were taken from them.
    pub(super) fn wait_until_told(&self, keys: &[(String, String)]) {
        let until = clock::now() + TOLD_TIME;
        let runs = |vm: &str| self.has_machine_ended(&holder(vm)) == Some(false);
        let waits = |key: &&(String, String)| self.table.lock().dismissed.get(*key) == Some(&false);
        while keys.iter().filter(waits).any(|(vm, _)| runs(vm)) && clock::now() < until {
            clock::sleep(LOOK);
        }
    }

    /// Takes the lease for a machine that writes.
    fn lease_for(&self, vm: &str, what: What, read_only: bool, again: bool) -> Result<Option<Arc<Writer>>> {
        let What::Disk(id) = what else { return Ok(None) };
        let disk = disk::open_by_id(&self.store, id)?;
        if read_only {
            return Ok(None);
        }
        let holder = holder(vm);
        if again && !disk.remembers(&holder) {
            let name = what.name(&self.store)?;
            let why = format!("disk '{name}' was not kept for {holder}: others may have written to it");
            return Err(Error::new(Kind::Denied, why).hint("stop the machine and start it again"));
        }
        if !again {
            // It begins as after a power cut, and what another life of it had not flushed is lost as in one.
            disk.forgive_loss(&holder);
        }
        Writer::begin(&disk, &holder, Some(Arc::clone(&self.book))).map(|writer| Some(Arc::new(writer)))
    }

    fn row_for(&self, what: What, socket: String, read_only: bool) -> ExportRow {
        let (disks, snapshots) = match what {
            What::Disk(id) => (vec![id.0], Vec::new()),
            What::Snapshot(id) => (Vec::new(), vec![id.0]),
        };
        ExportRow {
            id: self.book.next_id(),
            kind: ExportKind::Nbd,
            disks,
            snapshots,
            socket: Some(socket),
            listen: None,
            tls_cert: None,
            tls_key: None,
            tls_ca: None,
            read_only,
            queues: 0,
        }
    }

    fn begin_for(
        self: &Arc<Self>,
        row: ExportRow,
        vm: &str,
        what: What,
        writer: Option<Arc<Writer>>,
    ) -> Result<Running> {
        let holder = holder(vm);
        let attached = match what {
            What::Disk(id) => vec![disk::open_by_id(&self.store, id)?.attach(&format!("a disk of {holder}"))?],
            What::Snapshot(_) => Vec::new(),
        };
        let served: Arc<[Served]> = Served::open(&self.store, &row)?.into();
        let (clients, id, exports) = (Arc::new(AtomicUsize::new(0)), row.id, Arc::downgrade(self));
        let left = move || {
            if let Some(exports) = exports.upgrade() {
                exports.all_left(id);
            }
        };
        let shown = nbd::Shown {
            store: Arc::clone(&self.store),
            served: Arc::clone(&served),
            read_only: row.read_only,
            holder: holder.clone(),
            writer: writer.clone(),
            clients: Arc::clone(&clients),
            left: Some(Arc::new(left)),
            book: None,
        };
        let front = Front::Nbd(begin_nbd(&row, shown, &self.budget)?);
        tracing::info!("export {id}: {} for {holder}", what.claim());
        let machine = Some(Tenant { name: vm.to_owned(), left_at: clock::now(), writer });
        Ok(Running { row, persist: false, front, clients, served, machine, attached })
    }

    /// The last client of an export has gone: it may come back.
    fn all_left(self: &Arc<Self>, id: u64) {
        if let Some(machine) = self.table.lock().running.get_mut(&id).and_then(|running| running.machine.as_mut()) {
            machine.left_at = clock::now();
            // Who wants the disk now waits a moment, too.
            machine.writer.iter().for_each(|writer| writer.closing());
        }
        self.end_unless_used(id);
    }

    /// Ends an export whose machine does not come to it.
    fn end_unless_used(self: &Arc<Self>, id: u64) {
        let exports: Weak<Self> = Arc::downgrade(self);
        let end = move || {
            loop {
                clock::sleep(LINGER);
                let Some(exports) = exports.upgrade() else { return };
                if !exports.awaits_machine(id) {
                    return;
                }
            }
        };
        if let Err(error) = std::thread::Builder::new().name("vm-disk".into()).spawn(end) {
            tracing::warn!("export {id} is not ended with its machine, the host has no thread: {error}");
        }
    }

    /// Ends an export that has had no client for too long; tells whether one is still awaited.
    fn awaits_machine(self: &Arc<Self>, id: u64) -> bool {
        let unused = |running: &Running| {
            let since = running.machine.as_ref().map(|machine| machine.left_at);
            since.filter(|since| running.clients() == 0 && since.elapsed() >= LINGER)
        };
        let found = self.table.lock().running.get(&id).and_then(|running| Some((unused(running)?, running.holder())));
        let Some((since, holder)) = found else {
            // It is used, or was left a moment ago: somebody else looks at that.
            return false;
        };
        if self.has_machine_ended(&holder) == Some(false) && since.elapsed() < book::RESERVED {
            return true;
        }
        let gone = {
            let mut table = self.table.lock();
            if table.running.get(&id).and_then(unused).is_none() {
                return false;
            }
            let gone: Vec<_> = table.running.remove(&id).into_iter().collect();
            self.begin_to_leave(&mut table, &gone);
            gone
        };
        if let Err(error) = self.leave(gone, &[]) {
            tracing::warn!("{holder} has gone: {error}");
        }
        false
    }

    /// Ends all that is served to a machine, and keeps nothing for it.
    ///
    /// # Errors
    /// `Failed` where nothing is served; `Busy` when it is detached and I/O of the machine is still under way.
    pub(in crate::api) fn detach_vm(self: &Arc<Self>, vm: &str) -> Result<Vec<Export>> {
        let (gone, answer) = {
            let mut table = self.table.lock();
            if !table.serves {
                return Err(book::no_server());
            }
            let ids: Vec<u64> = table.running.iter().filter(|(_, it)| it.is_of(vm)).map(|(id, _)| *id).collect();
            let gone = table.take_away(&ids);
            let answer = self.begin_to_leave(&mut table, &gone);
            (gone, answer)
        };
        // First: with who is awaited the server does not end.
        self.keep_nothing_for(vm);
        // Who asks for this is not told of it in another way.
        self.leave(gone, &[])?;
        Ok(answer)
    }

    fn keep_nothing_for(&self, vm: &str) {
        let holder = holder(vm);
        for (id, _, _) in self.book.awaited().into_iter().filter(|(_, awaited, _)| *awaited == holder) {
            self.keep_disk_no_more(id, &holder);
        }
    }

    fn keep_disk_no_more(&self, id: DiskId, holder: &str) {
        if let Ok(disk) = disk::open_by_id(&self.store, id) {
            disk.unreserve(holder);
        }
        self.book.forget(id, holder);
    }

    /// Tells whether a holder is a machine that runs no more: it comes back to nothing. `None` for one that is no machine.
    pub(super) fn has_machine_ended(&self, holder: &str) -> Option<bool> {
        let vm = vm_of(holder)?;
        // Whoever runs it has its folder locked. One that cannot be looked at may run.
        Some(match Home::of(&self.pool, vm).and_then(|home| home.is_locked()) {
            Ok(runs) => !runs,
            Err(error) => error.kind() == Kind::NotFound,
        })
    }
}

impl Table {
    /// Finds what is served to a machine.
    fn of_machine(&self, vm: &str, what: What) -> Option<&Running> {
        self.running.values().find(|running| running.is_of(vm) && What::of(&running.row) == [what])
    }
}

impl Running {
    /// Returns with what a machine comes back to this, if it is for one.
    pub(super) fn claims(&self) -> Vec<(String, String)> {
        let claims = |machine: &Tenant| -> Vec<_> {
            self.served.iter().map(|one| (machine.name.clone(), one.what.claim())).collect()
        };
        self.machine.as_ref().map(claims).unwrap_or_default()
    }

    fn is_of(&self, vm: &str) -> bool {
        self.machine.as_ref().is_some_and(|machine| machine.name == vm)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::media::{HostMedia, Media};
    use crate::pool::ExportList;
    use crate::store::{InitOptions, OpenOptions, Store};

    /// A pool with a disk `web` and a machine `toy`, which is served.
    struct Pool {
        dir: tempfile::TempDir,
        store: Arc<Store>,
        exports: Arc<Exports>,
    }

    impl Pool {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let media: Arc<dyn Media> = Arc::new(HostMedia::new(dir.path()).unwrap());
            Store::init(&media, InitOptions { journal: 4 << 20, ballast: 4096, probe: false }).unwrap();
            let store = Store::open(media, OpenOptions { background: false, ..OpenOptions::default() }).unwrap();
            drop(disk::create(&store, "web", 1 << 20).unwrap());
            let exports = Exports::new(&store, dir.path());
            exports.start();
            let pool = Self { dir, store, exports };
            pool.home().make().unwrap();
            pool
        }

        fn home(&self) -> Home {
            Home::of(self.dir.path(), "toy").unwrap()
        }
    }

    fn request(claim: Option<&str>) -> Request {
        let (vm, disk, claim) = ("toy".to_owned(), "web".to_owned(), claim.map(str::to_owned));
        Request::AttachVm { vm, disk, read_only: false, claim }
    }

    /// It took the lease again while its export ended, and was refused only then. If the server ended for want of exports
    /// meanwhile, the note that it writes stayed, and the disk was kept for it for ever.
    #[test]
    fn what_was_detached_is_not_kept_for_a_machine_that_comes_back_meanwhile() {
        for round in 0..20 {
            let pool = Pool::new();
            let (exports, home) = (&pool.exports, pool.home());
            let _runs = home.lock().unwrap();
            let claim = exports.attach_vm(&request(None)).unwrap().claim;
            std::thread::scope(|scope| {
                let machine = scope.spawn(|| {
                    loop {
                        match exports.attach_vm(&request(Some(&claim))) {
                            Err(error) if error.kind() != Kind::Busy => break error.kind(),
                            _ => {}
                        }
                    }
                });
                clock::sleep(Duration::from_millis(round));
                assert_eq!(exports.detach("web").unwrap().len(), 1);
                exports.end();
                assert_eq!(machine.join().unwrap(), Kind::Denied);
            });
            assert_eq!(ExportList::read(&**pool.store.media()).unwrap().leases, [], "round {round}");
            pool.store.close().unwrap();
        }
    }

    /// A second was all it had, and a host that is busy takes longer: the disk was another one's then, and failed for good.
    #[test]
    fn a_machine_that_runs_is_awaited_and_one_that_runs_no_more_is_not() {
        let pool = Pool::new();
        let exports = &pool.exports;
        let runs = pool.home().lock().unwrap();
        exports.attach_vm(&request(None)).unwrap();
        let (told, idle) = std::sync::mpsc::channel();
        exports.on_idle(Box::new(move || told.send(()).unwrap()));
        idle.recv_timeout(LINGER * 5 / 2).unwrap_err();
        let (list, _) = exports.list().unwrap();
        assert_eq!((list.len(), &list[0].writing[..]), (1, &["web".to_owned()][..]));
        drop(runs);
        idle.recv_timeout(LINGER * 10).unwrap();
        assert_eq!(exports.list().unwrap(), (Vec::new(), Vec::new()));
        exports.end();
        pool.store.close().unwrap();
    }
}
