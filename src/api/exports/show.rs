//! What is told about exports: the list of them, with who is awaited, and counters.
//!
//! # Rules
//! 1. What is ending is shown as it was when that began ([`super::leaving`]).
//! 2. A process that serves nothing tells what the next server will serve, and for whom it keeps disks meanwhile.

use super::served::Served;
use super::wish::What;
use super::{Exports, Front, Running, book, holder, machines};
use crate::api::answer::{Awaited, Export};
use crate::error::Result;
use crate::metrics::{Kind, Text};
use crate::pool::{ExportList, ExportRow};
use crate::units::DiskId;

impl Exports {
    /// Returns what is attached, by number, and who is awaited.
    ///
    /// # Errors
    /// Where nothing is served: when the list cannot be read.
    pub(in crate::api) fn list(&self) -> Result<(Vec<Export>, Vec<Awaited>)> {
        let table = self.table.lock();
        if table.serves {
            let mut exports: Vec<_> = table.running.values().map(|running| self.show(running)).collect();
            exports.extend(table.shown_leaving().cloned());
            drop(table);
            exports.sort_by_key(|export| export.id);
            let awaited = self.book.awaited().into_iter();
            let awaited = awaited.map(|(id, holder, left)| self.show_awaited(id, holder, Some(left.as_secs() + 1)));
            return Ok((exports, awaited.collect()));
        }
        drop(table);
        let ExportList { exports, leases, .. } = self.book.read()?;
        let kept = leases.into_iter().filter_map(|lease| book::time_left(&lease).map(|(left, _)| (lease, left)));
        let awaited = kept.map(|(lease, left)| {
            // It begins with the next server, unless one has been there since.
            let left = lease.until.map(|_| left.as_secs());
            self.show_awaited(DiskId(lease.disk), lease.holder, left)
        });
        Ok((exports.iter().map(|row| self.show_off(row)).collect(), awaited.collect()))
    }

    fn show_awaited(&self, id: DiskId, holder: String, seconds: Option<u64>) -> Awaited {
        let disk = What::Disk(id).name(&self.store).unwrap_or_else(|_| "(removed)".to_owned());
        Awaited { disk, vm: machines::vm_of(&holder).map(str::to_owned), holder, seconds }
    }

    /// Returns the counters as Prometheus text; nothing where nothing is served.
    pub(in crate::api) fn metrics(&self) -> String {
        let table = self.table.lock();
        if !table.serves {
            return String::new();
        }
        let mut text = Text::new();
        let mut family = text.family(Kind::Gauge, "export_clients", "Clients of an export.");
        for (id, running) in &table.running {
            let (id, clients) = (id.to_string(), running.clients() as u64);
            family.value(&[("export", &id), ("kind", running.row.kind.name())], clients);
        }
        text.finish()
    }

    pub(super) fn show(&self, running: &Running) -> Export {
        let (state, error) = match &running.front {
            Front::Failed(why) => ("failed", Some(why.clone())),
            Front::Nbd(_) | Front::Vhost(_) => ("on", None),
        };
        let mut shown = self.show_row(&running.row, &running.served, &running.holder(), state, error);
        shown.persist = running.persist;
        shown.vm = running.machine.as_ref().map(|machine| machine.name.clone());
        shown.clients = running.clients() as u64;
        // A port of 0 became another one.
        if let (Front::Nbd(server), Some(_)) = (&running.front, &running.row.listen) {
            shown.listen = Some(server.address());
        }
        shown
    }

    /// Shows an export that is not served now.
    pub(super) fn show_off(&self, row: &ExportRow) -> Export {
        self.show_row(row, &Served::not_opened(&self.store, row), &holder(row), "off", None)
    }

    fn show_row(&self, row: &ExportRow, served: &[Served], holder: &str, state: &str, error: Option<String>) -> Export {
        let holds = |id: &&u64| {
            self.store.disk_info_by_id(DiskId(**id)).is_ok_and(|info| info.holder.as_deref() == Some(holder))
        };
        let name = |id: &u64| What::Disk(DiskId(*id)).name(&self.store).ok();
        let writing = row.disks.iter().filter(holds).filter_map(name).collect();
        Export {
            id: row.id,
            kind: row.kind.name().to_owned(),
            disks: served.iter().map(|one| one.name(&self.store)).collect(),
            socket: row.socket.clone(),
            listen: row.listen.clone(),
            tls: row.tls_cert.is_some(),
            read_only: row.read_only,
            queues: (row.queues > 0).then_some(row.queues),
            persist: true,
            vm: None,
            clients: 0,
            writing,
            state: state.to_owned(),
            error,
        }
    }
}
