//! The NBD server as clients meet it: real ones (libnbd, QEMU, fio), a plain one of ours, and hostile ones.
//!
//! # Rules
//! 1. The server runs in the test, on a pool on the host, and on a socket of its own.
//! 2. A test that needs a program says loudly when it skips, and fails instead under CI.
//! 3. What a hostile client did to a server shows in what a good one gets from it after.

mod bitmaps;
mod client;
mod clients;
mod durable;
mod ends;
mod fsx;
mod hostile;
mod limits;
mod plain;
mod tls;
mod wire;

use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;

use afterimage::budget::Budget;
use afterimage::disk::{self, BlockDevice, Disk};
use afterimage::error::{Error, Result};
use afterimage::nbd::{self, Exported, Exports, Limits, Listen, Options, Server, contexts_of};
use afterimage::snapshot;
use afterimage::store::Store;

use crate::tree::new_pool;

pub(crate) const MIB: u64 = 1 << 20;

/// All disks and snapshots of a pool. The only disk is the default export.
struct Pool(Arc<Store>);

impl Exports for Pool {
    fn names(&self) -> Vec<String> {
        let mut names = Vec::new();
        for disk in self.0.disks() {
            let snapshots = self.0.snapshots(&disk.name).unwrap();
            let live = snapshots.into_iter().filter(|s| s.state == afterimage::store::SnapshotState::Live);
            names.push(disk.name.clone());
            names.extend(live.map(|snapshot| format!("{}@{}", disk.name, snapshot.name)));
        }
        names
    }

    fn open(&self, name: &str) -> Result<nbd::Export> {
        let disks = self.0.disks();
        let name = match (name, &disks[..]) {
            ("", [only]) => only.name.clone(),
            ("", _) => return Err(Error::not_found("there is no default export")),
            _ => name.to_owned(),
        };
        let description = format!("'{name}' of a test");
        let Some((disk, snapshot)) = name.split_once('@') else {
            let device = disk::open(&self.0, &name)?;
            let writer = Arc::clone(&device);
            let enter = Box::new(move || Ok(Box::new(writer.lease("nbd")?) as nbd::Keep));
            let contexts = contexts_of(&self.0, Exported::Disk(device.id()));
            return Ok(nbd::Export { name, description, device, contexts, enter });
        };
        let device = snapshot::open(&self.0, disk, snapshot)?;
        let contexts = contexts_of(&self.0, Exported::Snapshot(device.id()));
        Ok(nbd::Export { name, description, device, contexts, enter: Box::new(|| Ok(Box::new(()))) })
    }
}

/// A pool, its server, and where that listens.
pub(crate) struct Rig {
    pub(crate) store: Arc<Store>,
    server: Option<Server>,
    dir: tempfile::TempDir,
}

impl Rig {
    fn new() -> Self {
        Self::with(16)
    }

    pub(crate) fn with(connections: usize) -> Self {
        Self::within(limits(connections))
    }

    fn within(limits: Limits) -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("out")).unwrap();
        let pool = tempfile::TempDir::new_in(dir.path()).unwrap();
        let store = new_pool(&pool);
        // The directory around it removes it.
        let _ = pool.keep();
        let mut rig = Self { store, server: None, dir };
        rig.serve(limits);
        rig
    }

    fn start(&mut self, connections: usize) {
        self.serve(limits(connections));
    }

    fn serve(&mut self, limits: Limits) {
        let options = Options { listen: Listen::Unix(self.socket()), tls: None, limits };
        self.server = Some(nbd::start(options, Arc::new(Pool(Arc::clone(&self.store)))).unwrap());
    }

    fn part(&self) {
        self.server.as_ref().unwrap().part();
    }

    fn stop(&mut self) {
        self.server.take().unwrap().stop();
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("nbd.sock")
    }

    fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join("out").join(name)
    }

    fn uri(&self, export: &str) -> String {
        format!("nbd+unix:///{}?socket={}", export.replace('@', "%40"), self.socket().display())
    }

    pub(crate) fn disk(&self, name: &str, size: u64) -> Arc<Disk> {
        disk::create(&self.store, name, size).unwrap();
        disk::open(&self.store, name).unwrap()
    }

    pub(crate) fn take(&self, disk: &str, snapshot: &str) {
        snapshot::take(&self.store, &[(disk.to_owned(), snapshot.to_owned())]).unwrap();
    }

    pub(crate) fn connect(&self) -> UnixStream {
        UnixStream::connect(self.socket()).unwrap()
    }

    /// Waits until no client is connected any more: the server sees a client's end a moment after it.
    pub(crate) fn wait_until_quiet(&self) {
        let begun = std::time::Instant::now();
        while self.server.as_ref().unwrap().connections() > 0 {
            assert!(begun.elapsed().as_secs() < 60, "a connection does not end");
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.server = None;
        self.store.close().ok();
    }
}

fn limits(connections: usize) -> Limits {
    Limits::new(connections, Budget::new(4 * 4096))
}

fn content(device: &dyn BlockDevice) -> Vec<u8> {
    let mut bytes = vec![0; device.size() as usize];
    device.read(&mut bytes, 0).unwrap();
    bytes
}
