//! The server of a pool: what `mount` and `serve` start, in the foreground or behind them.
//!
//! # Rules
//! 1. Order up: lock, store, what was attached to stay, socket, then what this server is for: the mount, or an export.
//!    Order down: mount, exports (what is in flight is finished), socket, store, lock. So what persists has its disks
//!    before anybody can ask for them, and nothing is served any more when the store closes.
//! 2. A server that mounts ends when nothing is mounted any more; one that was started to serve ends when nothing is
//!    attached any more, be it to clients or to virtual machines, and no machine is awaited. A signal and a `shutdown` unmount or end it: there is one way down.
//! 3. Files that are still open then are cut off, and clients too; `umount` without --force refuses instead.
//!
//! # After a crash
//! The mount is dead ("transport endpoint is not connected") until the next `mount` or `umount` there takes it away.
//! Clients see their connection closed, and can connect again once a server has started what persists.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};

use clap::Args;

use super::screen::Screen;
use super::signal;
use crate::api::{Answer, Client, Request, Response, Server, Service, Target, open_store};
use crate::error::{Error, Result};
use crate::pool::PoolLock;
use crate::progress::Silent;
use crate::store::{OpenOptions, Store};
use crate::tree::{self, MountOptions};
use crate::units::parse_size;

/// Least bytes of the cache of the block maps.
const MAP_CACHE_MIN: u64 = 1 << 20;

/// What a server is given of the host.
#[derive(Debug, Clone, Copy, Args)]
pub(super) struct Means {
    /// Memory at most for the block maps of what is in use, 512M unless given; a disk written at random takes 4K of it
    /// for each 2M, one written in sequence much less
    #[arg(long, value_name = "SIZE", value_parser = map_cache)]
    map_cache: Option<u64>,
}

fn map_cache(text: &str) -> Result<u64> {
    let bytes = parse_size(text)?;
    if bytes < MAP_CACHE_MIN {
        return Err(Error::usage(format!("a map cache of {text} is too small")).hint("give it 1M or more"));
    }
    Ok(bytes)
}

impl Means {
    /// Returns the words that say the same.
    pub(super) fn words(self) -> Option<OsString> {
        self.map_cache.map(|bytes| format!("--map-cache={bytes}").into())
    }

    fn options(self) -> OpenOptions {
        let usual = OpenOptions::default();
        OpenOptions { cache_bytes: self.map_cache.unwrap_or(usual.cache_bytes), ..usual }
    }

    /// Tells who asked for them that a server runs already, and has its own.
    pub(super) fn not_taken(self, screen: &Screen) {
        if self.map_cache.is_some() {
            screen.note("the server that runs on the pool keeps the map cache it was started with");
        }
    }
}

/// What a server is started for.
#[derive(Debug)]
pub(super) enum Duty {
    /// To mount.
    Mount(Show),
    /// To serve what this request attaches.
    Attach(Request),
    /// To serve what persists, and machines that come back.
    Keep,
}

/// What is mounted, where, and for whom.
#[derive(Debug)]
pub(super) struct Show {
    pub(super) at: PathBuf,
    pub(super) allow_other: bool,
    /// Only the extent files of this snapshot.
    pub(super) export: Option<String>,
}

impl Show {
    fn mount(&self, store: &Arc<Store>, pool: &Path) -> Result<tree::Mounted> {
        let options = MountOptions { allow_other: self.allow_other, ..MountOptions::of_pool(pool) };
        match &self.export {
            None => tree::mount(store, &self.at, &options),
            Some(snapshot) => {
                let (disk, snapshot) = Target::snapshot(snapshot)?;
                let id = store.snapshot_info(&disk, &snapshot)?.id;
                tree::mount_extents(store, id, &self.at, &options)
            }
        }
    }
}

/// What a server waits for.
enum Work {
    Mounted(tree::Mounted),
    /// Until it is asked to end.
    Attached(Receiver<()>),
}

/// A pool that is open and answers, without what it is there for.
struct Opened {
    service: Arc<Service>,
    store: Arc<Store>,
    server: Server,
    pool: PathBuf,
    // Dropped last: it is held until the store is closed.
    lock: PoolLock,
}

impl Opened {
    /// Ends it in the order of rule 1.
    fn close(self) -> Result<()> {
        let Self { service, store, server, pool, lock } = self;
        service.set_mount(None);
        service.end_exports();
        server.stop();
        let closed = store.close();
        match &closed {
            Ok(()) => tracing::info!("the pool {} is closed", pool.display()),
            Err(error) => tracing::error!("the pool {} could not be closed: {error}", pool.display()),
        }
        drop(lock);
        closed
    }
}

/// A pool that is served.
pub(super) struct PoolServer {
    opened: Opened,
    work: Work,
    /// What the pool answers to who started it.
    answer: Response,
}

impl PoolServer {
    /// Opens the pool, whose lock this is, and begins.
    pub(super) fn start(lock: PoolLock, pool: &Path, duty: &Duty, means: Means) -> Result<Self> {
        if let Err(error) = crate::sys::process::raise_open_files() {
            tracing::debug!("the limit of open files stays as it is: {error}");
        }
        let store = open_store(pool, means.options())?;
        let (ask, asked) = channel();
        // The receiver lives as long as the one who waits for it, which is as long as the process.
        let asker = || {
            let ask = ask.clone();
            Box::new(move || {
                ask.send(()).ok();
            })
        };
        let service = Arc::new(Service::new(Arc::clone(&store), pool).on_shutdown(asker()));
        service.start_exports();
        let server = match Server::start(pool, &lock, Arc::clone(&service) as Arc<dyn Answer>) {
            Ok(server) => server,
            Err(error) => {
                service.end_exports();
                if let Err(error) = store.close() {
                    tracing::error!("the pool {} could not be closed: {error}", pool.display());
                }
                return Err(error);
            }
        };
        let opened = Opened { service, store, server, pool: pool.to_owned(), lock };
        let begun = match duty {
            Duty::Mount(show) => opened.mount(show, asked),
            Duty::Keep => {
                opened.service.on_idle(asker());
                opened.service.answer(Request::Status {}, &Silent).map(|answer| (Work::Attached(asked), answer))
            }
            Duty::Attach(request) => {
                opened.service.on_idle(asker());
                let attached = opened.service.answer(request.clone(), &Silent);
                attached.map(|answer| (Work::Attached(asked), answer))
            }
        };
        let (work, answer) = match begun {
            Ok(begun) => begun,
            Err(error) => {
                // What could not be closed is in the log; what could not be begun is the reason.
                opened.close().ok();
                return Err(error);
            }
        };
        let stop = asker();
        signal::watch(move |signal| {
            tracing::info!("{signal:?}: ending");
            stop();
        })?;
        tracing::info!("process {} serves {}", std::process::id(), pool.display());
        Ok(Self { opened, work, answer })
    }

    /// Returns what to tell whoever started it.
    pub(super) fn answer(&self) -> Response {
        self.answer.clone()
    }

    /// Serves until it is unmounted or asked to end, then closes the pool.
    pub(super) fn wait(self) -> Result<()> {
        let Self { opened, work, .. } = self;
        let served = match work {
            Work::Mounted(mounted) => mounted.wait(),
            // An error means that nobody is left to ask.
            Work::Attached(asked) => {
                asked.recv().ok();
                Ok(())
            }
        };
        served.and(opened.close())
    }
}

impl Opened {
    fn mount(&self, show: &Show, asked: Receiver<()>) -> Result<(Work, Response)> {
        let mounted = show.mount(&self.store, &self.pool)?;
        self.service.set_mount(Some(show.at.clone()));
        spawn_unmounter(asked, mounted.unmounter())?;
        let status = self.service.answer(Request::Status {}, &Silent)?;
        Ok((Work::Mounted(mounted), status))
    }
}

/// Unmounts whenever asked; again if asked again, since open files may have been in the way.
fn spawn_unmounter(asked: Receiver<()>, unmount: Box<dyn Fn() + Send + Sync>) -> Result<()> {
    let body = move || {
        while asked.recv().is_ok() {
            unmount();
        }
    };
    std::thread::Builder::new()
        .name("unmounter".into())
        .spawn(body)
        .map_err(|e| Error::io("cannot start a thread", e))?;
    Ok(())
}

/// Returns the error for a pool that has a server, where another one is wanted.
pub(super) fn already_served(pool: &Path, client: &Client) -> Error {
    let shown = pool.display();
    let Ok(Response::Status(status)) = client.ask(&Request::Status {}, &Silent) else {
        return Error::busy(format!("the pool {shown} is served by another process"));
    };
    let (at, hint) = match status.mount {
        Some(at) => (format!(" at {at}"), "use it there, or 'afterimage umount' it first".to_owned()),
        None => (String::new(), format!("it ends with the last 'afterimage detach', or with 'kill {}'", status.pid)),
    };
    Error::busy(format!("the pool {shown} is served by process {}{at} already", status.pid)).hint(hint)
}
