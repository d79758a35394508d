//! Exports that were detached and have not let go of their disks yet.
//!
//! # Rules
//! 1. An export that is detached is shown, as "ending", until nothing of it can reach its disks any more.
//! 2. Who detaches waits for that as long as the servers do. What the host does not end within that time keeps its disk, is
//!    shown as long as it does, and whoever asked is told so.
//! 3. A server that was started to serve ends when nothing is attached and nothing is ending any more.
//! 4. A virtual machine does not get a disk again while I/O of its old connections is under way: an old write could come
//!    after a new one.

use std::sync::Arc;
use std::time::Duration;

use super::machines::{LOOK, Tenant};
use super::{Exports, Front, Running, Table, holder};
use crate::api::answer::Export;
use crate::clock;
use crate::disk::Attached;
use crate::error::{Error, Result};
use crate::pool::ExportRow;
use crate::sync::Mutex;

/// An export that is ending.
#[derive(Debug)]
pub(super) struct Leaving {
    /// As it is shown.
    shown: Export,
    /// With what a machine comes back to it, if it is for one.
    claims: Vec<(String, String)>,
}

/// What an export leaves whose I/O the host does not end in time.
pub(super) struct Remains {
    row: ExportRow,
    /// Waits until it has ended.
    rest: Box<dyn FnOnce() + Send>,
    /// Dropped in this order, as in [`Running`].
    machine: Option<Tenant>,
    attached: Vec<Attached>,
}

impl Running {
    /// Finishes what is in flight and stops; returns what does not end for so long.
    pub(super) fn end_within(self, patience: Duration) -> Option<Remains> {
        let Self { row, front, machine, attached, .. } = self;
        let rest = match front {
            Front::Nbd(server) => server.stop_within(patience),
            Front::Vhost(server) => server.stop_within(patience),
            Front::Failed(_) => None,
        };
        let address = row.address();
        if let Some(rest) = rest {
            tracing::warn!("export {} ({} {address}) still has I/O under way", row.id, row.kind.name());
            return Some(Remains { row, rest, machine, attached });
        }
        drop((machine, attached));
        tracing::info!("export {} ({} {address}) has ended", row.id, row.kind.name());
        None
    }
}

/// Ends exports, all at once: the clients of one may take as long as they are given to take their replies.
pub(super) fn end_all(exports: Vec<Running>, patience: Duration) -> Vec<Remains> {
    let remains = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for running in exports {
            let id = running.row.id;
            let running = Arc::new(Mutex::new(Some(running)));
            let end = |running: &Mutex<Option<Running>>| {
                let taken = running.lock().take();
                let left = taken.and_then(|running| running.end_within(patience));
                remains.lock().extend(left);
            };
            let one = Arc::clone(&running);
            if std::thread::Builder::new().name(format!("end-{id}")).spawn_scoped(scope, move || end(&one)).is_err() {
                // Without a thread for it, here.
                end(&running);
            }
        }
    });
    remains.into_inner()
}

fn under_way(exports: &[String]) -> Error {
    let what = exports.join(", ");
    Error::busy(format!(
        "{what}: detached, but I/O is still under way on the host and can reach the disk until it ends"
    ))
    .hint("'afterimage exports' shows it as long as it keeps its disk")
}

impl Table {
    /// Returns what is ending, as it is shown.
    pub(super) fn shown_leaving(&self) -> impl Iterator<Item = &Export> {
        self.leaving.values().map(|leaving| &leaving.shown)
    }

    /// Fails while what a machine comes back to is still ending.
    fn refuse_leaving(&self, key: &(String, String)) -> Result<()> {
        let of = |leaving: &&Leaving| leaving.claims.contains(key);
        let found: Vec<_> =
            self.leaving.values().filter(of).map(|leaving| format!("export {}", leaving.shown.id)).collect();
        if found.is_empty() { Ok(()) } else { Err(under_way(&found)) }
    }

    /// Returns what is ending under a name.
    fn leaving_as(&self, name: &str) -> Vec<Export> {
        let called = |export: &&Export| export.id.to_string() == name || export.disks.iter().any(|disk| disk == name);
        self.shown_leaving().filter(called).cloned().collect()
    }
}

impl Exports {
    /// Notes that exports, which are in the table no more, are ending, and returns them as they were. Always before
    /// [`Self::leave`], under the same lock as what took them out.
    pub(super) fn begin_to_leave(&self, table: &mut Table, gone: &[Running]) -> Vec<Export> {
        let shown: Vec<Export> = gone.iter().map(|running| self.show(running)).collect();
        for (running, export) in gone.iter().zip(&shown) {
            let shown = Export { state: "ending".into(), ..export.clone() };
            table.leaving.insert(export.id, Leaving { shown, claims: running.claims() });
        }
        shown
    }

    /// Ends exports that are in the table no more, and lets go of their disks. If nothing is left then, the machines of
    /// `keys` are to know that their disks were taken from them before the server ends.
    ///
    /// # Errors
    /// `Busy` when some of them keep theirs for longer.
    pub(super) fn leave(self: &Arc<Self>, gone: Vec<Running>, keys: &[(String, String)]) -> Result<()> {
        let rows: Vec<ExportRow> = gone.iter().map(|running| running.row.clone()).collect();
        let claims: Vec<_> = gone.iter().flat_map(Running::claims).collect();
        let remains = end_all(gone, self.patience);
        // Whom a disk was reserved for does not come back.
        rows.iter().for_each(|row| self.keep_no_more(row));
        let names: Vec<String> = remains.iter().map(|remains| holder(&remains.row)).collect();
        let is_over = |row: &&ExportRow| remains.iter().all(|remains| remains.row.id != row.id);
        let over: Vec<u64> = rows.iter().filter(is_over).map(|row| row.id).collect();
        self.has_left(&over, keys);
        remains.into_iter().for_each(|remains| self.wait_for(remains));
        if !names.is_empty() {
            return Err(under_way(&names));
        }
        // What a machine has come back to has ended; what it had before may not have.
        claims.iter().try_for_each(|key| self.wait_until_left(key))
    }

    /// Waits, as whoever detached it does, for what is ending under a name; `None` when nothing is.
    pub(super) fn wait_for_leaving(&self, name: &str) -> Option<Result<Vec<Export>>> {
        let found = self.table.lock().leaving_as(name);
        let until = clock::now() + self.patience;
        loop {
            let left: Vec<_> = {
                let table = self.table.lock();
                let ending = found.iter().filter(|export| table.leaving.contains_key(&export.id));
                ending.map(|export| format!("export {}", export.id)).collect()
            };
            if left.is_empty() {
                return (!found.is_empty()).then_some(Ok(found));
            }
            if clock::now() >= until {
                return Some(Err(under_way(&left)));
            }
            clock::sleep(LOOK);
        }
    }

    /// Waits until nothing that a machine comes back to is ending any more.
    ///
    /// # Errors
    /// `Busy` when that takes too long.
    pub(super) fn wait_until_left(&self, key: &(String, String)) -> Result<()> {
        let until = clock::now() + self.patience;
        loop {
            let left = self.table.lock().refuse_leaving(key);
            if left.is_ok() || clock::now() >= until {
                return left;
            }
            clock::sleep(LOOK);
        }
    }

    /// Has the rest of an export waited for.
    fn wait_for(self: &Arc<Self>, remains: Remains) {
        let (exports, id) = (Arc::downgrade(self), remains.row.id);
        let remains = Arc::new(Mutex::new(Some(remains)));
        let wait = move |remains: &Mutex<Option<Remains>>| {
            let taken = remains.lock().take();
            let Some(Remains { row, rest, machine, attached }) = taken else { return };
            rest();
            drop((machine, attached));
            tracing::info!("export {id} ({} {}) has ended", row.kind.name(), row.address());
            if let Some(exports) = exports.upgrade() {
                // A machine has asked again long since.
                exports.has_left(&[id], &[]);
            }
        };
        let (one, waiting) = (Arc::clone(&remains), wait.clone());
        if std::thread::Builder::new().name(format!("end-{id}")).spawn(move || waiting(&one)).is_err() {
            wait(&remains);
        }
    }

    /// Notes that exports are over; says so when there is none any more.
    fn has_left(&self, ids: &[u64], keys: &[(String, String)]) {
        if ids.is_empty() {
            return;
        }
        let tells = {
            let mut table = self.table.lock();
            ids.iter().for_each(|id| drop(table.leaving.remove(id)));
            let tells = !keys.is_empty() && table.running.is_empty();
            table.telling += usize::from(tells);
            tells
        };
        if tells {
            self.wait_until_told(keys);
        }
        let idle = {
            let mut table = self.table.lock();
            table.telling -= usize::from(tells);
            // What is there now, or was attached meanwhile, says so in its turn.
            table.is_empty()
        };
        if idle {
            self.tell_idle();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{self, Read, Write};
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::api::Request;
    use crate::disk;
    use crate::error::Kind;
    use crate::media::{File, HostMedia, Media, Open, Space};
    use crate::store::{InitOptions, OpenOptions, Store};
    use crate::sync::Condvar;
    use crate::vmm::Home;

    const LITTLE: Duration = Duration::from_millis(50);

    /// Whether it is closed.
    type Gate = Arc<(Mutex<bool>, Condvar)>;

    /// A host on which nothing but the list of exports becomes durable while the gate is closed.
    #[derive(Debug)]
    struct Slow {
        inner: HostMedia,
        gate: Gate,
    }

    #[derive(Debug)]
    struct SlowFile {
        inner: Arc<dyn File>,
        gate: Gate,
    }

    impl Media for Slow {
        fn open(&self, path: &str, how: Open) -> io::Result<Arc<dyn File>> {
            let gate = if path.contains("exports") { Arc::default() } else { Arc::clone(&self.gate) };
            Ok(Arc::new(SlowFile { inner: self.inner.open(path, how)?, gate }))
        }
        fn make_dir(&self, path: &str) -> io::Result<()> {
            self.inner.make_dir(path)
        }
        fn remove(&self, path: &str) -> io::Result<()> {
            self.inner.remove(path)
        }
        fn rename(&self, from: &str, to: &str) -> io::Result<()> {
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

    impl File for SlowFile {
        fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
            self.inner.read_at(buf, offset)
        }
        fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
            self.inner.write_at(data, offset)
        }
        fn sync(&self) -> io::Result<()> {
            let mut closed = self.gate.0.lock();
            while *closed {
                self.gate.1.wait(&mut closed);
            }
            drop(closed);
            self.inner.sync()
        }
        fn len(&self) -> io::Result<u64> {
            self.inner.len()
        }
        fn set_len(&self, len: u64) -> io::Result<()> {
            self.inner.set_len(len)
        }
        fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
            self.inner.punch(offset, len)
        }
        fn next_data(&self, offset: u64) -> io::Result<Option<(u64, u64)>> {
            self.inner.next_data(offset)
        }
        fn allocated(&self) -> io::Result<u64> {
            self.inner.allocated()
        }
    }

    /// A request of NBD with so many bytes of payload.
    fn message(command: u16, len: u32) -> Vec<u8> {
        let head = [&0x2560_9513_u32.to_be_bytes()[..], &[0, 0], &command.to_be_bytes()].concat();
        [&head[..], &[0; 16], &len.to_be_bytes(), &vec![7; len as usize]].concat()
    }

    /// Connects in the oldest way, writes a block and waits for the answer.
    fn connect_and_write(path: &std::path::Path) -> UnixStream {
        let mut client = UnixStream::connect(path).unwrap();
        client.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        client.read_exact(&mut [0; 18]).unwrap();
        let name = [&3_u32.to_be_bytes()[..], b"IHAVEOPT", &1_u32.to_be_bytes(), &3_u32.to_be_bytes(), b"web"];
        client.write_all(&name.concat()).unwrap();
        client.read_exact(&mut [0; 10]).unwrap();
        client.write_all(&message(1, 4096)).unwrap();
        client.read_exact(&mut [0; 16]).unwrap();
        client
    }

    fn wait_for(mut is: impl FnMut() -> bool) {
        let begun = clock::now();
        while !is() {
            assert!(begun.elapsed() < Duration::from_secs(60), "in vain");
            clock::sleep(Duration::from_millis(2));
        }
    }

    /// A pool with a disk `web` on such a host, whose exports have so much patience.
    fn slow_pool(dir: &std::path::Path, patience: Duration) -> (Arc<Store>, Arc<Exports>, Gate) {
        let gate: Gate = Arc::default();
        let media: Arc<dyn Media> = Arc::new(Slow { inner: HostMedia::new(dir).unwrap(), gate: Arc::clone(&gate) });
        Store::init(&media, InitOptions { journal: 4 << 20, ballast: 4096, probe: false }).unwrap();
        let store = Store::open(media, OpenOptions { background: false, ..OpenOptions::default() }).unwrap();
        disk::create(&store, "web", 1 << 20).unwrap();
        let mut exports = Exports::new(&store, dir);
        Arc::get_mut(&mut exports).unwrap().patience = patience;
        exports.start();
        (store, exports, gate)
    }

    /// An old write could have come after a new one.
    #[test]
    fn a_machine_does_not_get_a_disk_again_while_its_old_connection_has_io_under_way() {
        let dir = tempfile::tempdir().unwrap();
        let (store, exports, gate) = slow_pool(dir.path(), LITTLE);
        let home = Home::of(dir.path(), "toy").unwrap();
        home.make().unwrap();
        let _runs = home.lock().unwrap();
        let request = |claim: Option<&str>| {
            let (vm, disk, claim) = ("toy".to_owned(), "web".to_owned(), claim.map(str::to_owned));
            Request::AttachVm { vm, disk, read_only: false, claim }
        };
        let first = exports.attach_vm(&request(None)).unwrap();
        let mut client = connect_and_write(first.socket.as_ref());
        *gate.0.lock() = true;
        client.write_all(&message(3, 0)).unwrap();
        clock::sleep(Duration::from_millis(200));
        for _ in 0..2 {
            let error = exports.attach_vm(&request(Some(&first.claim))).unwrap_err();
            assert_eq!((error.kind(), error.message().contains("still under way")), (Kind::Busy, true), "{error}");
            let (shown, _) = exports.list().unwrap();
            assert_eq!((shown[0].id, shown[0].state.as_str(), shown.len()), (first.export, "ending", 2));
        }
        *gate.0.lock() = false;
        gate.1.notify_all();
        wait_for(|| exports.attach_vm(&request(Some(&first.claim))).is_ok());
        // Nor is it free for others.
        let second = exports.attach_vm(&request(Some(&first.claim))).unwrap();
        let mut client = connect_and_write(second.socket.as_ref());
        *gate.0.lock() = true;
        client.write_all(&message(3, 0)).unwrap();
        clock::sleep(Duration::from_millis(200));
        exports.attach_vm(&request(Some(&first.claim))).unwrap_err();
        assert_eq!(exports.detach("web").unwrap_err().kind(), Kind::Busy);
        *gate.0.lock() = false;
        gate.1.notify_all();
        wait_for(|| exports.list().unwrap().0.is_empty());
        exports.end();
        store.close().unwrap();
    }

    /// Detach said that it was over, `exports` showed nothing, and the disk was still open for writing by the export.
    #[test]
    fn an_export_is_shown_until_it_has_let_go_of_its_disk() {
        let dir = tempfile::tempdir().unwrap();
        let (store, exports, gate) = slow_pool(dir.path(), LITTLE);
        let disk = disk::open(&store, "web").unwrap();
        let idle = Arc::new(Mutex::new(0));
        let count = Arc::clone(&idle);
        exports.on_idle(Box::new(move || *count.lock() += 1));
        let socket = dir.path().join("s");
        let request = serde_json::json!({"command": "attach", "kind": "nbd", "disks": ["web"], "socket": socket});
        exports.attach(&serde_json::from_value(request).unwrap()).unwrap();
        let mut client = connect_and_write(&socket);
        *gate.0.lock() = true;
        client.write_all(&message(3, 0)).unwrap();
        // The flush has been taken when the segment is being made durable; before, detaching would just end the connection.
        clock::sleep(Duration::from_millis(200));
        for name in ["web", "1", "web"] {
            let error = exports.detach(name).unwrap_err();
            assert_eq!((error.kind(), error.message().contains("still under way")), (Kind::Busy, true), "{error}");
            let (shown, _) = exports.list().unwrap();
            assert_eq!((shown.len(), shown[0].id, shown[0].state.as_str()), (1, 1, "ending"));
            assert_eq!(disk.lease("another").unwrap_err().kind(), Kind::Busy);
            assert_eq!(*idle.lock(), 0);
        }
        assert_eq!(exports.detach("2").unwrap_err().kind(), Kind::NotFound);
        *gate.0.lock() = false;
        gate.1.notify_all();
        wait_for(|| exports.list().unwrap().0.is_empty());
        wait_for(|| *idle.lock() == 1);
        disk.lease("another").unwrap();
        assert_eq!(exports.detach("web").unwrap_err().kind(), Kind::NotFound);
        exports.end();
        store.close().unwrap();
    }

    /// The later was told that I/O is under way while the earlier still ended what it was about.
    #[test]
    fn who_detaches_what_another_is_detaching_waits_as_that_one_does() {
        let dir = tempfile::tempdir().unwrap();
        let (store, exports, gate) = slow_pool(dir.path(), Duration::from_secs(60));
        let socket = dir.path().join("s");
        let request = serde_json::json!({"command": "attach", "kind": "nbd", "disks": ["web"], "socket": socket});
        exports.attach(&serde_json::from_value(request).unwrap()).unwrap();
        let mut client = connect_and_write(&socket);
        *gate.0.lock() = true;
        client.write_all(&message(3, 0)).unwrap();
        clock::sleep(Duration::from_millis(200));
        std::thread::scope(|scope| {
            let first = scope.spawn(|| exports.detach("web"));
            wait_for(|| exports.list().unwrap().0[0].state == "ending");
            let second = scope.spawn(|| exports.detach("web"));
            clock::sleep(Duration::from_millis(200));
            let waits = !first.is_finished() && !second.is_finished();
            *gate.0.lock() = false;
            gate.1.notify_all();
            let ids = [first, second].map(|one| one.join().unwrap().unwrap()[0].id);
            assert!(waits && ids == [1, 1], "{ids:?}");
        });
        assert_eq!(exports.detach("web").unwrap_err().kind(), Kind::NotFound);
        exports.end();
        store.close().unwrap();
    }
}
