//! The disks of a virtual machine at the instant of a checkpoint: the machine's process asks the server of the pool.
//!
//! # Rules
//! 1. A request waits on a thread of its own: the machine stands still only until the instant has been, and no longer than
//!    a second for a server that does not get there.
//! 2. Snapshots that nobody waits for any more are removed when they have been taken after all.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread::JoinHandle;
use std::time::Duration;

use super::exports::machine_holder;
use super::{Client, Request, Response};
use crate::error::{Error, Kind, Result};
use crate::progress::{Progress, Silent};
use crate::sync::Mutex;
use crate::vmm::{Disks, Taken, Taking};

/// How long a machine stands still for its disks at most.
const PATIENCE: Duration = Duration::from_secs(1);

/// The disks of the pool, as its server has them.
#[derive(Debug, Clone)]
pub struct PoolDisks {
    pool: PathBuf,
}

impl PoolDisks {
    /// Those of a pool, whose server is looked for when it is needed.
    #[must_use]
    pub fn new(pool: &Path) -> Self {
        Self { pool: pool.to_owned() }
    }

    /// Takes snapshots; `told` is called when the instant has been.
    ///
    /// # Errors
    /// Why there are none.
    pub fn take(&self, disks: &[String], checkpoint: &str, told: &Sender<()>) -> Result<Vec<Taken>> {
        let request = Request::CheckpointDisks { checkpoint: checkpoint.to_owned(), disks: disks.to_vec() };
        let renamed = "was it renamed? start the machine with the new name first";
        let answer =
            self.client()?.ask(&request, &Told(Mutex::new(told.clone()))).map_err(|error| match error.kind() {
                Kind::NotFound => error.hint(renamed),
                _ => error,
            })?;
        let strange = || Error::failed("the server of the pool gave an answer that makes no sense");
        let machine = checkpoint.split('@').next().unwrap_or_default();
        let Response::Snapshots { snapshots, .. } = answer else { return Err(strange()) };
        let mut taken = Vec::new();
        for snapshot in snapshots {
            let request = Request::Info { name: snapshot.disk.clone() };
            let Response::Disk(disk) = self.client()?.ask(&request, &Silent)? else { return Err(strange()) };
            // A machine knows its disks by the names they had: another disk may be called so by now.
            if disk.holder != Some(machine_holder(machine)) {
                let what = format!("the disk '{}' is not one of the virtual machine '{machine}' any more", disk.name);
                return Err(Error::failed(what).hint(renamed));
            }
            taken.push(Taken { disk: snapshot.disk, disk_uuid: disk.uuid, name: snapshot.name, uuid: snapshot.uuid });
        }
        Ok(taken)
    }

    fn client(&self) -> Result<Client> {
        Client::find(&self.pool)?.ok_or_else(|| {
            Error::busy(format!("no server is running on the pool {}", self.pool.display()))
                .hint("start one with 'afterimage serve --daemon' or 'afterimage mount'")
        })
    }
}

impl Disks for PoolDisks {
    fn snapshot(&self, disks: &[String], checkpoint: &str) -> Result<Box<dyn Taking>> {
        let (asked, these, checkpoint) = (self.clone(), disks.to_vec(), checkpoint.to_owned());
        let taking = checkpoint.clone();
        let forgetting = self.clone();
        let forget = move || forgetting.forget(&checkpoint);
        Asked::begin(move |told| asked.take(&these, &taking, told), Arc::new(forget))
    }

    fn forget(&self, checkpoint: &str) {
        let request = Request::CheckpointForget { checkpoint: checkpoint.to_owned() };
        if let Err(error) = self.client().and_then(|client| client.ask(&request, &Silent)) {
            tracing::warn!("snapshots of the checkpoint {checkpoint}, which came to nothing, stay: {error}");
        }
    }
}

/// Tells when the instant has been.
struct Told(Mutex<Sender<()>>);

impl Progress for Told {
    fn total(&self, _units: u64) {}

    fn advance(&self, _done: u64) {}

    fn message(&self, _text: &str) {}

    fn instant(&self) {
        // Nobody waits any more: then nobody wants to know.
        self.0.lock().send(()).ok();
    }
}

/// Whether somebody still waits for snapshots.
#[derive(Debug)]
enum Wanted {
    Yes,
    No,
    /// They have been taken, or cannot be.
    Done,
}

/// Snapshots on their way, asked for by a thread.
pub struct Asked {
    forget: Arc<dyn Fn() + Send + Sync>,
    instant: Receiver<()>,
    wanted: Arc<Mutex<Wanted>>,
    thread: Option<JoinHandle<Result<Vec<Taken>>>>,
}

impl std::fmt::Debug for Asked {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Asked").field("wanted", &self.wanted).finish_non_exhaustive()
    }
}

impl Asked {
    /// Begins to take snapshots with `take`, which says when the instant has been. If nobody wants them any more they are
    /// removed with `forget`.
    ///
    /// # Errors
    /// When the host has no thread.
    pub fn begin(
        take: impl FnOnce(&Sender<()>) -> Result<Vec<Taken>> + Send + 'static,
        forget: Arc<dyn Fn() + Send + Sync>,
    ) -> Result<Box<dyn Taking>> {
        let (told, instant) = mpsc::channel();
        let wanted = Arc::new(Mutex::new(Wanted::Yes));
        let (theirs, no_more) = (Arc::clone(&wanted), Arc::clone(&forget));
        let body = move || {
            let taken = take(&told);
            let mut wanted = theirs.lock();
            // Also after a failure: some may be there, and it removes nothing else.
            if matches!(*wanted, Wanted::No) {
                no_more();
            }
            *wanted = Wanted::Done;
            taken
        };
        let thread = std::thread::Builder::new().name("snapshots".into()).spawn(body);
        let thread = Some(thread.map_err(|e| Error::io("no thread to ask for snapshots", e))?);
        Ok(Box::new(Self { forget, instant, wanted, thread }))
    }
}

impl Taking for Asked {
    fn instant(&mut self) -> Result<()> {
        match self.instant.recv_timeout(PATIENCE) {
            // The other end is gone when the answer is there: all is done, or it is an error, which is told in the end.
            Ok(()) | Err(RecvTimeoutError::Disconnected) => Ok(()),
            Err(RecvTimeoutError::Timeout) => {
                let what = format!("the server of the pool takes no snapshot within {} ms", PATIENCE.as_millis());
                Err(Error::busy(what).hint("try again when the host has less to do"))
            }
        }
    }

    fn durable(mut self: Box<Self>) -> Result<Vec<Taken>> {
        let thread = self.thread.take().expect("it is waited for once");
        let taken = thread.join().unwrap_or_else(|_| Err(Error::failed("a mistake in this program")));
        // They may have been taken, and only the answer not be had.
        taken.inspect_err(|_| (self.forget)())
    }
}

impl Drop for Asked {
    fn drop(&mut self) {
        if self.thread.is_some()
            && let Wanted::Done = std::mem::replace(&mut *self.wanted.lock(), Wanted::No)
        {
            (self.forget)();
        }
    }
}
