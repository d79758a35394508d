//! The disks of a virtual machine at the instant of a checkpoint: the machine's process asks the server of the pool.
//!
//! # Rules
//! 1. A request waits on a thread of its own: the machine stands still only until the instant has been, and no longer than
//!    [`PATIENCE`] for a server that does not get there.
//! 2. Snapshots that nobody waits for any more are removed when they have been taken after all.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread::JoinHandle;
use std::time::Duration;

use super::{Client, Request, Response};
use crate::error::{Error, Result};
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

    fn client(&self) -> Result<Client> {
        Client::find(&self.pool)?.ok_or_else(|| {
            Error::busy(format!("no server is running on the pool {}", self.pool.display()))
                .hint("start one with 'afterimage serve --daemon' or 'afterimage mount'")
        })
    }

    fn ask(&self, request: &Request) -> Result<Response> {
        self.client()?.ask(request, &Silent)
    }

    /// Reads the answer to the request for snapshots, and asks for what it does not tell.
    fn taken(&self, answer: Response) -> Result<Vec<Taken>> {
        let strange = || Error::failed("the server of the pool gave an answer that makes no sense");
        let Response::Snapshots { snapshots } = answer else { return Err(strange()) };
        let mut taken = Vec::new();
        for snapshot in snapshots {
            let Response::Disk(disk) = self.ask(&Request::Info { name: snapshot.disk.clone() })? else {
                return Err(strange());
            };
            taken.push(Taken { disk: snapshot.disk, disk_uuid: disk.uuid, name: snapshot.name, uuid: snapshot.uuid });
        }
        Ok(taken)
    }
}

impl Disks for PoolDisks {
    fn snapshot(&self, disks: &[String], name: &str) -> Result<Box<dyn Taking>> {
        let (client, asked) = (self.client()?, self.clone());
        let (checkpoint, disks) = (name.to_owned(), disks.to_vec());
        let request = Request::CheckpointDisks { checkpoint: checkpoint.clone(), disks };
        let (told, instant) = mpsc::channel();
        let wanted = Arc::new(Mutex::new(Wanted::Yes));
        let body = {
            let wanted = Arc::clone(&wanted);
            move || {
                let taken = client.ask(&request, &Told(Mutex::new(told))).and_then(|answer| asked.taken(answer));
                let mut wanted = wanted.lock();
                if matches!(*wanted, Wanted::No) && taken.is_ok() {
                    asked.forget(&checkpoint);
                }
                *wanted = Wanted::Done;
                taken
            }
        };
        let thread = std::thread::Builder::new().name("snapshots".into()).spawn(body);
        let thread = Some(thread.map_err(|e| Error::io("no thread to ask for snapshots", e))?);
        Ok(Box::new(Asked { disks: self.clone(), checkpoint: name.to_owned(), instant, wanted, thread }))
    }

    fn forget(&self, checkpoint: &str) {
        if let Err(error) = self.ask(&Request::CheckpointForget { checkpoint: checkpoint.to_owned() }) {
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

/// Snapshots on their way.
#[derive(Debug)]
struct Asked {
    disks: PoolDisks,
    checkpoint: String,
    instant: Receiver<()>,
    wanted: Arc<Mutex<Wanted>>,
    thread: Option<JoinHandle<Result<Vec<Taken>>>>,
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
        thread.join().unwrap_or_else(|_| Err(Error::failed("a mistake in this program")))
    }
}

impl Drop for Asked {
    fn drop(&mut self) {
        if self.thread.is_some()
            && let Wanted::Done = std::mem::replace(&mut *self.wanted.lock(), Wanted::No)
        {
            self.disks.forget(&self.checkpoint);
        }
    }
}
