//! Disks of the pool for a virtual machine: asked of the server of the pool, which is started if there is none.
//!
//! # Rules
//! 1. The server is asked again whenever it has gone and come back, with the claim that it gave at first: so the machine gets
//!    the disk that it had, or none.
//! 2. When the machine has ended its disks are given back at once; one that is killed is missed by the server.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::{Global, daemon};
use crate::api::answer::VmDisk;
use crate::api::{Client, Request, Response};
use crate::error::{Error, Kind, Result};
use crate::nbd;
use crate::nbd::client::{Place, Sought};
use crate::progress::Silent;
use crate::sync::Mutex;

/// The disks of a machine; given back when this is dropped.
#[derive(Debug)]
pub(super) struct Disks {
    pool: PathBuf,
    vm: String,
    any: AtomicBool,
}

impl Disks {
    /// For the machine `vm`, which has none yet.
    pub(super) fn new(pool: &Path, vm: &str) -> Self {
        Self { pool: pool.to_owned(), vm: vm.to_owned(), any: AtomicBool::new(false) }
    }

    /// Opens one with so many connections.
    ///
    /// # Errors
    /// `NotFound`, `Busy` with the name of who has it; why no server can be had.
    pub(super) fn open(&self, disk: &str, read_only: bool, connections: usize, global: &Global) -> Result<nbd::Client> {
        let request = |claim| Request::AttachVm { vm: self.vm.clone(), disk: disk.to_owned(), read_only, claim };
        let first = self.attach(&request(None), global)?;
        self.any.store(true, Ordering::Relaxed);
        let again = request(Some(first.claim.clone()));
        let (pool, first) = (self.pool.clone(), Arc::new(Mutex::new(Some(first))));
        let seek = move |_| {
            let found = first.lock().take();
            found.map_or_else(|| seek(&pool, &again), |disk| Sought::At(place(disk)))
        };
        nbd::Client::open(&format!("disk '{disk}'"), connections, Box::new(seek))
    }

    /// Asks the server, or starts one that begins with this.
    fn attach(&self, request: &Request, global: &Global) -> Result<VmDisk> {
        let answer = match Client::find(&self.pool)? {
            Some(client) => match client.ask(request, &Silent) {
                // It was about to end.
                Err(_) if Client::find(&self.pool)?.is_none() => self.start(request, global),
                answer => answer,
            },
            None => self.start(request, global),
        };
        vm_disk(answer?)
    }

    fn start(&self, request: &Request, global: &Global) -> Result<Response> {
        let text = serde_json::to_string(request).expect("these types hold nothing JSON cannot say");
        let words = [OsString::from("serve"), format!("--request={text}").into()];
        daemon::start(&self.pool, &words, global)
    }

    /// Gives back what a machine has, if there is a server.
    pub(super) fn forget(pool: &Path, vm: &str) {
        let told = Client::find(pool).and_then(|client| {
            client.map_or(Ok(()), |client| client.ask(&Request::DetachVm { vm: vm.to_owned() }, &Silent).map(drop))
        });
        if let Err(error) = told {
            tracing::warn!("the disks of the virtual machine {vm} are given back a little later: {error}");
        }
    }
}

impl Drop for Disks {
    fn drop(&mut self) {
        if self.any.load(Ordering::Relaxed) {
            Self::forget(&self.pool, &self.vm);
        }
    }
}

fn vm_disk(response: Response) -> Result<VmDisk> {
    match response {
        Response::VmDisk(disk) => Ok(disk),
        _ => Err(Error::failed("the server of the pool gave an answer that makes no sense")),
    }
}

fn place(disk: VmDisk) -> Place {
    Place { path: disk.socket.into(), name: disk.name }
}

/// Looks for the server, once.
fn seek(pool: &Path, again: &Request) -> Sought {
    let client = match Client::find(pool) {
        Ok(Some(client)) => client,
        Ok(None) => {
            let error = Error::not_found(format!("no server is running on the pool {}", pool.display()));
            return Sought::Later(error.hint("start one with 'afterimage serve --daemon' or 'afterimage mount'"));
        }
        Err(error) => return Sought::Later(error),
    };
    match client.ask(again, &Silent).and_then(vm_disk) {
        Ok(disk) => Sought::At(place(disk)),
        // What is gone, or was not kept, stays so; a server that ends, or went away before it answered, does not.
        Err(error) if matches!(error.kind(), Kind::NotFound | Kind::Denied) => Sought::Never(error),
        Err(error) => Sought::Later(error),
    }
}
