//! Disks of the pool for a virtual machine: asked of the server of the pool, which is started if there is none.
//!
//! # Rules
//! 1. The server is asked again whenever it has gone and come back, with the claim that it gave at first: so the machine gets
//!    the disk that it had, or none.
//! 2. When the machine has ended its disks are given back at once; one that is killed is missed by the server. A server that
//!    does not answer is not waited for then.
//! 3. A machine that gives up its rights has a [`Steward`] ask.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::vm_steward::{Steward, StewardDisks};
use super::{Global, daemon};
use crate::api::answer::VmDisk;
use crate::api::instant::PoolDisks;
use crate::api::{Client, Request, Response};
use crate::clock::{self, Instant};
use crate::error::{Error, Kind, Result};
use crate::nbd;
use crate::nbd::client::{Place, Sought};
use crate::progress::{Progress, Silent};
use crate::sync::Mutex;
use crate::vmm;

/// How long a server that ends is waited for, and how often it is looked at.
const ENDING_TIME_MAX: Duration = Duration::from_secs(30);
const INTERVAL: Duration = Duration::from_millis(20);
/// How long a server may take to take disks back: it misses the machine anyway.
const FORGET_TIME_MAX: Duration = Duration::from_secs(5);

/// The disks of a machine; given back when this is dropped.
#[derive(Debug)]
pub(super) struct Disks {
    pool: PathBuf,
    vm: String,
    any: AtomicBool,
    steward: Option<Arc<Steward>>,
}

impl Disks {
    /// For the machine `vm`, which has none yet.
    pub(super) fn new(pool: &Path, vm: &str) -> Self {
        Self { pool: pool.to_owned(), vm: vm.to_owned(), any: AtomicBool::new(false), steward: None }
    }

    /// As [`Disks::new`], for a machine that gives up the rights that this process has now.
    ///
    /// # Errors
    /// Those of the host.
    pub(super) fn with_steward(pool: &Path, vm: &str, global: &Global) -> Result<Self> {
        let mut disks = Self::new(pool, vm);
        disks.steward = Some(Steward::start(pool, vm, global)?);
        Ok(disks)
    }

    /// Opens one with so many connections.
    ///
    /// # Errors
    /// `NotFound`, `Busy` with the name of who has it; why no server can be had.
    pub(super) fn open(&self, disk: &str, read_only: bool, connections: usize, global: &Global) -> Result<nbd::Client> {
        if let Some(steward) = &self.steward {
            return steward.open(disk, read_only, connections);
        }
        let held = Mutex::new(self.hold(disk, read_only, global)?);
        let seek = move |_| match held.lock().seek() {
            Ok(disk) => Sought::At(Place::at(Path::new(&disk.socket), &disk.name)),
            Err((false, error)) => Sought::Later(error),
            Err((true, error)) => Sought::Never(error),
        };
        nbd::Client::open(&format!("disk '{disk}'"), connections, Box::new(seek))
    }

    /// Returns who takes snapshots of them.
    pub(super) fn instants(&self) -> Arc<dyn vmm::Disks> {
        match &self.steward {
            Some(steward) => Arc::new(StewardDisks(Arc::clone(steward))),
            None => Arc::new(PoolDisks::new(&self.pool)),
        }
    }

    /// Says that the guest is about to run, and this process to give up its rights.
    ///
    /// # Errors
    /// When the steward has ended.
    pub(super) fn begin(&self) -> Result<()> {
        self.steward.as_ref().map_or(Ok(()), |steward| steward.begin())
    }

    /// Attaches a disk.
    ///
    /// # Errors
    /// As [`Disks::open`].
    pub(super) fn hold(&self, disk: &str, read_only: bool, global: &Global) -> Result<Held> {
        let request = |claim| Request::AttachVm { vm: self.vm.clone(), disk: disk.to_owned(), read_only, claim };
        let first = self.attach(&request(None), global)?;
        self.any.store(true, Ordering::Relaxed);
        let again = request(Some(first.claim.clone()));
        Ok(Held { pool: self.pool.clone(), again, first: Some(first) })
    }

    /// Asks the server, or starts one that begins with this. One that is about to end makes way for the next.
    fn attach(&self, request: &Request, global: &Global) -> Result<VmDisk> {
        let until = clock::now() + ENDING_TIME_MAX;
        let mut ends = false;
        loop {
            let answer = match Client::find(&self.pool)? {
                Some(client) => client.ask(request, &Silent).inspect_err(|_| ends = is_ending(&client)),
                // The one before may have the lock of the pool a little longer.
                None => self.start(request, global).inspect_err(|error| ends &= error.kind() == Kind::Busy),
            };
            match answer {
                Err(_) if ends && clock::now() < until => clock::sleep(INTERVAL),
                answer => return vm_disk(answer?),
            }
        }
    }

    fn start(&self, request: &Request, global: &Global) -> Result<Response> {
        let text = serde_json::to_string(request).expect("these types hold nothing JSON cannot say");
        let words = [OsString::from("serve"), format!("--request={text}").into()];
        daemon::start(&self.pool, &words, global)
    }

    /// Gives back what a machine has, if there is a server.
    pub(super) fn forget(pool: &Path, vm: &str) {
        let request = Request::DetachVm { vm: vm.to_owned() };
        let patience = Until(clock::now() + FORGET_TIME_MAX);
        let told = Client::find(pool)
            .and_then(|client| client.map_or(Ok(()), |client| client.ask(&request, &patience).map(drop)));
        if let Err(error) = told {
            tracing::warn!("the disks of the virtual machine {vm} are given back a little later: {error}");
        }
    }
}

impl Drop for Disks {
    fn drop(&mut self) {
        if let Some(steward) = &self.steward {
            steward.end();
        } else if self.any.load(Ordering::Relaxed) {
            Self::forget(&self.pool, &self.vm);
        }
    }
}

/// A disk that was attached, and is looked for again when its server has gone.
#[derive(Debug)]
pub(super) struct Held {
    pool: PathBuf,
    /// What the server is asked when it is back.
    again: Request,
    /// What it answered at first, until that was used.
    first: Option<VmDisk>,
}

impl Held {
    /// Looks where it is; says of an error whether it is for good.
    pub(super) fn seek(&mut self) -> Result<VmDisk, (bool, Error)> {
        if let Some(first) = self.first.take() {
            return Ok(first);
        }
        let Some(client) = Client::find(&self.pool).map_err(|error| (false, error))? else {
            let error = Error::not_found(format!("no server is running on the pool {}", self.pool.display()))
                .hint("start one with 'afterimage serve --daemon' or 'afterimage mount'");
            return Err((false, error));
        };
        // What is gone, or was not kept, stays so; a server that ends, or went away before it answered, does not.
        let answer = client.ask(&self.again, &Silent).and_then(vm_disk);
        answer.map_err(|error| (matches!(error.kind(), Kind::NotFound | Kind::Denied), error))
    }
}

/// Progress that is called off at a moment.
struct Until(Instant);

impl Progress for Until {
    fn total(&self, _units: u64) {}
    fn advance(&self, _done: u64) {}
    fn message(&self, _text: &str) {}
    fn cancelled(&self) -> bool {
        clock::now() >= self.0
    }
}

/// Tells whether a server ends, or has.
fn is_ending(server: &Client) -> bool {
    match server.ask(&Request::Status {}, &Silent) {
        Ok(Response::Status(status)) => status.ending,
        Ok(_) => false,
        Err(_) => true,
    }
}

fn vm_disk(response: Response) -> Result<VmDisk> {
    match response {
        Response::VmDisk(disk) => Ok(disk),
        _ => Err(Error::failed("the server of the pool gave an answer that makes no sense")),
    }
}
