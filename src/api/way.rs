//! The way to a pool: through its server when one answers, otherwise by opening it.
//!
//! # Rules
//! 1. Who opens a pool holds its lock, and keeps it until the store is closed.
//! 2. A lock that is held while no socket answers is a server that starts or ends: both are tried again for
//!    two seconds, then the holder is named.
//! 3. Nothing is made in a directory that is no pool, not even the lock file.
//! 4. A process that opens a pool for a command keeps the disks of what the next server will serve as that one would. Where
//!    the list of that is damaged, what it would have kept from is done, with a warning.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use super::{Answer, Client, Request, Response, Service};
use crate::checkpoint;
use crate::clock::{self, Instant};
use crate::error::{Error, Kind, Result};
use crate::media::Media;
use crate::media::host::HostMedia;
use crate::pool::PoolLock;
use crate::progress::Progress;
use crate::snapshot;
use crate::store::{self, OpenOptions, Store};

/// How long a lock without a socket is waited for.
const LOCK_TIME_MAX: Duration = Duration::from_secs(2);

/// How often it is tried.
const RETRY_INTERVAL: Duration = Duration::from_millis(50);

/// How long a command that opened the pool itself goes on freeing what it removed. A server frees the rest.
const RECLAIM_TIME_MAX: Duration = Duration::from_secs(2);

/// How long a command that took a snapshot goes on sealing. A server, or the next command, seals the rest.
const SEAL_TIME_MAX: Duration = Duration::from_secs(2);

/// A way to a pool.
#[derive(Debug)]
pub enum Way {
    /// Its server.
    Server(Client),
    /// This process has it open.
    Direct(Box<Direct>),
}

/// A pool this process opened for one command.
pub struct Direct {
    service: Service,
    frees: bool,
    makes: bool,
    /// Why it is not known what the next server will serve.
    unknown: Option<Error>,
    // Dropped last: see rule 1.
    _lock: PoolLock,
}

impl Way {
    /// Finds the way to the pool in the directory `pool`.
    ///
    /// # Errors
    /// `Kind::NotFound` when there is no pool, `Kind::Busy` when it is locked and nobody answers.
    pub fn find(pool: &Path) -> Result<Self> {
        check_is_pool(pool)?;
        match enter(pool)? {
            Entry::Server(client) => Ok(Self::Server(client)),
            Entry::Lock(lock) => Self::open(pool, lock),
        }
    }

    fn open(pool: &Path, lock: PoolLock) -> Result<Self> {
        let options = OpenOptions { background: false, ..OpenOptions::default() };
        let store = open_store(pool, options)?;
        let service = Service::new(store, pool);
        let unknown = service.keep_exports().err();
        Ok(Self::Direct(Box::new(Direct { service, frees: false, makes: false, unknown, _lock: lock })))
    }

    /// Asks for something.
    ///
    /// # Errors
    /// Whatever the request runs into.
    pub fn ask(&mut self, request: Request, progress: &dyn Progress) -> Result<Response> {
        match self {
            Self::Server(client) => client.ask(&request, progress),
            Self::Direct(direct) => {
                direct.frees |= frees(&request);
                direct.makes |= makes(&request);
                if let Some(error) = direct.unknown.take_if(|_| frees(&request)) {
                    tracing::warn!("whoever had the disk attached is not waited for: {error}");
                }
                // Here is no background in which it could go on.
                let request =
                    if let Request::Reclaim { .. } = request { Request::Reclaim { wait: true } } else { request };
                direct.service.answer(request, progress)
            }
        }
    }

    /// Ends it; a pool that this process opened is closed cleanly.
    ///
    /// # Errors
    /// When what was written cannot be made durable.
    pub fn close(self) -> Result<()> {
        let Self::Direct(direct) = self else { return Ok(()) };
        let store = direct.service.store();
        if direct.frees {
            // What is left over is found again by whoever opens the pool next; the command itself is done.
            if let Err(error) = store.reclaim_wait(&Until { end: clock::now() + RECLAIM_TIME_MAX }) {
                tracing::debug!("space is given back later: {error}");
            }
        }
        if direct.makes {
            let end = clock::now() + SEAL_TIME_MAX;
            store.prepare_for_the_worst(|| clock::now() < end);
        }
        store.close()
    }
}

impl fmt::Debug for Direct {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Direct").field("service", &self.service).finish_non_exhaustive()
    }
}

/// What stands at the door of a pool.
#[derive(Debug)]
pub enum Entry {
    /// A server that answers.
    Server(Client),
    /// Nobody; the lock is taken.
    Lock(PoolLock),
}

/// Finds the server of a pool or takes its lock, whichever is there within two seconds.
///
/// # Errors
/// `Kind::Busy`, naming the holder, when the pool is locked and nobody answers.
pub fn enter(pool: &Path) -> Result<Entry> {
    let begun = clock::now();
    loop {
        if let Some(client) = Client::find(pool)? {
            return Ok(Entry::Server(client));
        }
        match PoolLock::take(pool) {
            Ok(lock) => return Ok(Entry::Lock(lock)),
            Err(error) if error.kind() == Kind::Busy && begun.elapsed() < LOCK_TIME_MAX => {
                clock::sleep(RETRY_INTERVAL);
            }
            Err(error) => return Err(error),
        }
    }
}

/// Opens the store in `pool`; whoever calls holds the lock.
///
/// # Errors
/// Whatever keeps the store from opening.
pub fn open_store(pool: &Path, options: OpenOptions) -> Result<Arc<Store>> {
    let media = HostMedia::new(pool).map_err(|e| Error::io(format!("cannot open {}", pool.display()), e))?;
    let store = Store::open(Arc::new(media), options)
        .map_err(|e| e.context(format!("cannot open the pool {}", pool.display())))?;
    snapshot::attend(&store);
    checkpoint::attend(&store);
    Ok(store)
}

/// Makes the catalog of the pool in the directory `pool` again.
///
/// # Errors
/// `Kind::NotFound` when there is no pool, `Kind::Busy` while somebody has it open; any error of the host.
pub fn rebuild(pool: &Path, progress: &dyn Progress) -> Result<Response> {
    check_is_pool(pool)?;
    let lock = match enter(pool)? {
        Entry::Lock(lock) => lock,
        Entry::Server(_) => {
            return Err(Error::busy(format!("the pool {} is served, and cannot be rebuilt meanwhile", pool.display()))
                .hint("end the server with 'afterimage umount', then run 'afterimage check --rebuild'"));
        }
    };
    let media = HostMedia::new(pool).map_err(|e| Error::io(format!("cannot open {}", pool.display()), e))?;
    let media: Arc<dyn Media> = Arc::new(media);
    let report = store::rebuild(&media, progress)?;
    drop(lock);
    Ok(Response::Rebuilt(report))
}

/// Makes sure that there is a pool in the directory `pool`, and returns its path without links.
///
/// # Errors
/// `Kind::NotFound` when there is none, `Kind::Usage` when it is not even a directory.
pub fn check_is_pool(pool: &Path) -> Result<PathBuf> {
    let shown = pool.display();
    let hint = format!("make one with 'afterimage init {shown}', or name another with --pool");
    let meta = match std::fs::metadata(pool) {
        Ok(meta) => meta,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Err(Error::not_found(format!("there is no pool at {shown}: no such directory")).hint(hint));
        }
        Err(error) => return Err(Error::io(format!("cannot look at the pool {shown}"), error)),
    };
    if !meta.is_dir() {
        return Err(Error::usage(format!("{shown} is a file, and a pool is a directory"))
            .hint("name the directory of a pool with --pool"));
    }
    match std::fs::metadata(pool.join("afterimage.toml")) {
        Ok(_) => {}
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Err(Error::not_found(format!("{shown} is no pool: it has no afterimage.toml")).hint(hint));
        }
        Err(error) => return Err(Error::io(format!("cannot look into the pool {shown}"), error)),
    }
    pool.canonicalize().map_err(|e| Error::io(format!("cannot look at the pool {shown}"), e))
}

/// Tells whether a request can leave space to give back.
fn frees(request: &Request) -> bool {
    matches!(
        request,
        Request::Rm { .. }
            | Request::Prune { .. }
            | Request::Revert { .. }
            | Request::Release { .. }
            | Request::Receive { .. }
            | Request::ReceiveAbort { .. }
            | Request::Resize { shrink: true, .. }
    )
}

/// Tells whether a request makes something that a rebuild would want to know.
fn makes(request: &Request) -> bool {
    matches!(
        request,
        Request::Create { .. }
            | Request::Import { .. }
            | Request::Snapshot { .. }
            | Request::Clone { .. }
            | Request::Revert { .. }
            | Request::Rename { .. }
    )
}

/// Progress that is called off at a moment.
struct Until {
    end: Instant,
}

impl Progress for Until {
    fn total(&self, _units: u64) {}

    fn advance(&self, _done: u64) {}

    fn message(&self, _text: &str) {}

    fn cancelled(&self) -> bool {
        clock::now() >= self.end
    }
}
