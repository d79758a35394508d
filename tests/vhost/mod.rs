//! The vhost-user server, with the test as its front end and its guest: the messages go through the `vhost` crate, the
//! rings are made by hand in memory that is shared with the server.

pub(crate) mod guest;
mod hostile;
mod limits;
mod qemu;
mod reconnect;
mod requests;
pub(crate) mod silent;

use std::any::Any;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use afterimage::budget::Budget;
use afterimage::disk::BlockDevice;
use afterimage::error::Result;
use afterimage::vhost_blk::{self, Options, Server};
use parking_lot::{Condvar, Mutex};

pub(crate) use guest::Guest;

/// A disk in memory that can be made to wait and to fail.
#[derive(Debug, Default)]
pub(crate) struct Ram {
    data: Mutex<Vec<u8>>,
    /// Writes and flushes wait while this is set.
    closed: Mutex<bool>,
    opened: Condvar,
    /// What was done, in order.
    pub(crate) log: Mutex<Vec<(&'static str, u64, u64)>>,
    fails: Mutex<bool>,
    /// Says that it is only for reading, and does whatever it is asked to.
    sealed: bool,
}

impl Ram {
    pub(crate) fn new(size: usize) -> Arc<Self> {
        Arc::new(Self { data: Mutex::new(vec![0; size]), ..Self::default() })
    }

    /// As a snapshot that relies on its server to refuse writes.
    pub(crate) fn sealed(size: usize) -> Arc<Self> {
        Arc::new(Self { data: Mutex::new(vec![0; size]), sealed: true, ..Self::default() })
    }

    pub(crate) fn close(&self, closed: bool) {
        *self.closed.lock() = closed;
        self.opened.notify_all();
    }

    pub(crate) fn fail(&self, fails: bool) {
        *self.fails.lock() = fails;
    }

    pub(crate) fn grow(&self, size: usize) {
        self.data.lock().resize(size, 0);
    }

    pub(crate) fn content(&self) -> Vec<u8> {
        self.data.lock().clone()
    }

    fn note(&self, what: &'static str, offset: u64, len: u64) -> Result<()> {
        self.log.lock().push((what, offset, len));
        let mut closed = self.closed.lock();
        while *closed && what != "read" {
            self.opened.wait(&mut closed);
        }
        if *self.fails.lock() { Err(afterimage::error::Error::no_space("the test says so")) } else { Ok(()) }
    }
}

impl BlockDevice for Ram {
    fn size(&self) -> u64 {
        self.data.lock().len() as u64
    }

    fn read(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.note("read", offset, buf.len() as u64)?;
        buf.copy_from_slice(&self.data.lock()[offset as usize..][..buf.len()]);
        Ok(())
    }

    fn write(&self, data: &[u8], offset: u64) -> Result<()> {
        self.note("write", offset, data.len() as u64)?;
        self.data.lock()[offset as usize..][..data.len()].copy_from_slice(data);
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        self.note("flush", 0, 0)
    }

    fn discard(&self, offset: u64, len: u64) -> Result<()> {
        self.note("discard", offset, len)?;
        self.data.lock()[offset as usize..][..len as usize].fill(0);
        Ok(())
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        self.note("zero", offset, len)?;
        self.data.lock()[offset as usize..][..len as usize].fill(0);
        Ok(())
    }

    fn next_data(&self, offset: u64) -> Result<Option<(u64, u64)>> {
        Ok((offset < self.size()).then(|| (offset, self.size())))
    }

    fn mapped(&self) -> u64 {
        self.size()
    }

    fn read_only(&self) -> bool {
        self.sealed
    }
}

/// A server in a directory of its own.
pub(crate) struct Served {
    pub(crate) server: Option<Server>,
    pub(crate) socket: PathBuf,
    _dir: tempfile::TempDir,
}

impl Served {
    pub(crate) fn new(device: Arc<dyn BlockDevice>, queues: usize) -> Self {
        Self::keeping(device, queues, Box::new(()))
    }

    pub(crate) fn keeping(device: Arc<dyn BlockDevice>, queues: usize, keep: Box<dyn Any + Send + Sync>) -> Self {
        Self::within(device, queues, keep, Budget::new(10_000))
    }

    fn within(device: Arc<dyn BlockDevice>, queues: usize, keep: Box<dyn Any + Send + Sync>, budget: Budget) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("disk.sock");
        let options = Options { socket: socket.clone(), queues, serial: "disk-of-the-test".into(), budget };
        let server = Some(vhost_blk::start(options, device, keep).unwrap());
        Self { server, socket, _dir: dir }
    }

    pub(crate) fn guest(&self, queues: usize) -> Guest {
        let mut guest = Guest::new(queues);
        guest.connect(&self.socket);
        guest
    }
}

pub(crate) fn serve(
    socket: &Path,
    device: Arc<dyn BlockDevice>,
    queues: usize,
    keep: Box<dyn Any + Send + Sync>,
) -> Server {
    let budget = Budget::new(10_000);
    let options = Options { socket: socket.to_owned(), queues, serial: "disk-of-the-test".into(), budget };
    vhost_blk::start(options, device, keep).unwrap()
}
