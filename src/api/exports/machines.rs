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
//! 2. A machine that asks for a disk it has begins anew: what its old connections had under way is finished first.
//! 3. A machine that comes back, with its claim, gets the very disk it had, and only if nobody else can have changed it.
//!    Otherwise what it knows of the disk may be wrong, and it must not go on.
//! 4. One that has ended is not waited for, in whatever process the pool is opened: nobody has its folder locked then. One that
//!    begins again is told of nothing that its former life may have lost: it begins as after a power cut.
//! 5. What is detached by a person is taken from the machine: it does not come back to it in this life.
//! 6. A claim is of an id: a disk that was renamed meanwhile is found.
//!
//! # After a crash
//! Sockets stay in the folders of the machines; whoever listens there next removes them.

use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, Weak};
use std::time::Duration;

use super::served::{Served, Writer};
use super::wish::What;
use super::{Exports, Front, Running, begin_nbd, book, nbd};
use crate::api::Request;
use crate::api::answer::{Export, VmDisk};
use crate::clock;
use crate::disk;
use crate::error::{Error, Kind, Result};
use crate::pool::{ExportKind, ExportRow};
use crate::units::{DiskId, SnapshotId};
use crate::vmm::Home;

/// How long an export stays without a client: one whose connection broke comes back sooner, and one that was killed is not
/// missed.
const LINGER: Duration = Duration::from_secs(1);

/// What begins the name of the holder that a machine is; no other holder's begins so.
const HOLDER: &str = "VM ";

/// Returns the name under which a machine takes leases.
pub(super) fn holder(vm: &str) -> String {
    format!("{HOLDER}{vm}")
}

/// The machine that an export is for.
#[derive(Debug)]
pub(super) struct Tenant {
    pub(super) name: String,
    /// When its last client had gone.
    left_at: Option<clock::Instant>,
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
    /// `NotFound`, `Busy` with the name of who has the disk; `Denied` when a machine comes back to a disk that was not kept
    /// for it.
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
        let socket = home.path(&format!("{}.sock", what.claim()));
        let socket = socket.to_str().ok_or_else(|| Error::usage("the path of the pool is not UTF-8"))?.to_owned();
        let read_only = *read_only || matches!(what, What::Snapshot(_));
        let key = (vm.clone(), what.claim());
        if claim.is_none() {
            self.table.lock().dismissed.remove(&key);
        }
        // Taken before the old one lets go, so that nobody comes in between.
        let writer = self.lease_for(vm, what, read_only, claim.is_some())?;
        let old = {
            let mut table = self.table.lock();
            let is = |running: &Running| running.is_of(vm) && What::of(&running.row) == [what];
            let id = table.running.iter().find(|(_, running)| is(running)).map(|(id, _)| *id);
            id.and_then(|id| table.running.remove(&id))
        };
        old.into_iter().for_each(Running::end);
        let row = self.row_for(what, socket.clone(), read_only);
        let id = row.id;
        let running = self.begin_for(row, vm, what, writer)?;
        let mut table = self.table.lock();
        let refusal = match (table.serves, table.dismissed.contains(&key)) {
            (false, _) => Some(Error::busy("the server is ending")),
            (true, true) => Some(Error::new(Kind::Denied, format!("'{disk}' was detached from {}", holder(vm)))),
            (true, false) => None,
        };
        if let Some(refusal) = refusal {
            drop(table);
            running.end();
            return Err(refusal);
        }
        table.running.insert(id, running);
        drop(table);
        // A machine that dies before it connects is not waited for.
        self.end_unless_used(id, book::RESERVED);
        Ok(VmDisk { export: id, socket, name: what.name(&self.store)?, claim: what.claim(), read_only })
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
        let machine = Some(Tenant { name: vm.to_owned(), left_at: None, writer });
        Ok(Running { row, persist: false, front, clients, served, machine, attached })
    }

    /// The last client of an export has gone: it may come back, for a moment.
    fn all_left(self: &Arc<Self>, id: u64) {
        if let Some(machine) = self.table.lock().running.get_mut(&id).and_then(|running| running.machine.as_mut()) {
            machine.left_at = Some(clock::now());
            // Who wants the disk now waits that moment, too.
            machine.writer.iter().for_each(|writer| writer.closing());
        }
        self.end_unless_used(id, LINGER);
    }

    /// Ends an export that has no client then, and had none for [`LINGER`].
    fn end_unless_used(self: &Arc<Self>, id: u64, time: Duration) {
        let exports: Weak<Self> = Arc::downgrade(self);
        let end = move || {
            clock::sleep(time);
            if let Some(exports) = exports.upgrade() {
                exports.end_unused(id);
            }
        };
        if let Err(error) = std::thread::Builder::new().name("vm-disk".into()).spawn(end) {
            tracing::warn!("export {id} is not ended with its machine, the host has no thread: {error}");
        }
    }

    fn end_unused(&self, id: u64) {
        let (gone, left) = {
            let mut table = self.table.lock();
            let unused = |running: &Running| {
                let left = running.machine.as_ref().and_then(|machine| machine.left_at);
                running.clients() == 0 && left.is_none_or(|left| left.elapsed() >= LINGER)
            };
            if !table.running.get(&id).is_some_and(unused) {
                return;
            }
            (table.running.remove(&id), table.running.len())
        };
        gone.into_iter().for_each(Running::end);
        if left == 0 {
            self.tell_idle();
        }
    }

    /// Ends all that is served to a machine, and keeps nothing for it.
    ///
    /// # Errors
    /// `Failed` where nothing is served.
    pub(in crate::api) fn detach_vm(&self, vm: &str) -> Result<Vec<Export>> {
        let (gone, left) = {
            let mut table = self.table.lock();
            if !table.serves {
                return Err(book::no_server());
            }
            let ids: Vec<u64> = table.running.iter().filter(|(_, it)| it.is_of(vm)).map(|(id, _)| *id).collect();
            let gone = table.take_away(&ids);
            (gone, table.running.len())
        };
        let answer: Vec<Export> = gone.iter().map(|running| self.show(running)).collect();
        let any = !gone.is_empty();
        gone.into_iter().for_each(Running::end);
        self.keep_nothing_for(vm);
        if any && left == 0 {
            self.tell_idle();
        }
        Ok(answer)
    }

    fn keep_nothing_for(&self, vm: &str) {
        let holder = holder(vm);
        for disk in self.book.awaited(&holder).into_iter().filter_map(|id| disk::open_by_id(&self.store, id).ok()) {
            disk.unreserve(&holder);
        }
        self.book.forget(&holder);
    }

    /// Tells whether a holder is a machine that runs no more: it comes back to nothing. `None` for one that is no machine.
    pub(super) fn has_machine_ended(&self, holder: &str) -> Option<bool> {
        let vm = holder.strip_prefix(HOLDER)?;
        // Whoever runs it has its folder locked. One that cannot be looked at may run.
        Some(match Home::of(&self.pool, vm).and_then(|home| home.is_locked()) {
            Ok(runs) => !runs,
            Err(error) => error.kind() == Kind::NotFound,
        })
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
