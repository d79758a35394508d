//! `mount`: opens the pool, shows it as files, and serves the control socket until it is unmounted.
//!
//! # Rules
//! 1. Order up: lock, store, socket, mount. Order down: mount, socket, store, lock. The socket answers whenever files do.
//! 2. A signal and a `shutdown` only unmount, and what ends the server is that nothing is mounted any more. Files that are
//!    still open then are cut off; `umount` without --force refuses instead.
//! 3. Nothing is mounted over the pool itself: the server would wait for itself.
//! 4. Extent files that are mounted beside the pool go when the pool is unmounted.
//!
//! # After a crash
//! The mount is dead ("transport endpoint is not connected") until the next `mount` or `umount` there takes it away.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};

use clap::Args;

use super::screen::Screen;
use super::show::Style;
use super::{Global, daemon, host, init, signal};
use crate::api::{Answer, Client, Entry, Request, Response, Server, Service, Target};
use crate::api::{check_is_pool, enter, open_store};
use crate::error::{Error, Kind, Result};
use crate::pool::PoolLock;
use crate::progress::Silent;
use crate::store::{OpenOptions, Store};
use crate::tree::{self, MountOptions};

/// Mount a pool and serve it
///
/// Disks appear as MNT/disks/NAME.raw and snapshots as MNT/snapshots/NAME/SNAPSHOT.raw. Stays in the foreground until it
/// is unmounted (afterimage umount, fusermount3 -u, Ctrl-C) unless --daemon is given. While it runs, other commands on
/// the pool ask it through POOL/control.sock.
///
/// With --export only the extent files of one snapshot are mounted, at a path that stays the same from snapshot to
/// snapshot, for backup programs that go by the path. A server that runs on the pool mounts them too, and the command
/// returns at once; without one it serves them itself, as the whole pool. The snapshot keeps its data until it is
/// unmounted. Beside the extents there is snapshot.json, which names disk, snapshot and size. See afterimage-pool(7).
#[derive(Debug, Args)]
pub(super) struct Mount {
    /// An empty directory
    #[arg(value_name = "MNT")]
    mount: PathBuf,
    /// Make the pool and the directory if they are not there
    #[arg(long)]
    init: bool,
    /// Go to the background once the mount answers; the log goes to POOL/server.log
    #[arg(long)]
    daemon: bool,
    /// Let other users in too; needs user_allow_other in /etc/fuse.conf
    #[arg(long)]
    allow_other: bool,
    /// Mount only the extent files of this snapshot
    #[arg(long, value_name = "DISK@SNAPSHOT", conflicts_with = "init")]
    export: Option<String>,
}

impl Mount {
    pub(super) fn run(self, global: &Global, screen: &Screen) -> Result<u8> {
        let pool = global.pool()?;
        if self.init {
            self.make(pool, screen)?;
        }
        let pool = check_is_pool(pool)?;
        let mount = host::resolve_mount(&self.mount)?;
        check_mount(&pool, &mount, screen)?;
        let show = Show { allow_other: self.allow_other, export: self.export };
        if let Some(snapshot) = &show.export
            && let Some(client) = Client::find(&pool)?
        {
            let (snapshot, path) = (snapshot.clone(), mount.to_string_lossy().into_owned());
            let request = Request::MountExport { snapshot, path, allow_other: show.allow_other };
            screen.answer(&client.ask(&request, &Silent)?, Style::Brief);
            return Ok(0);
        }
        if self.daemon {
            let status = daemon::start(&pool, &mount, &show, global)?;
            screen.answer(&status, Style::Brief);
            return Ok(0);
        }
        if !daemon::is_child() {
            let served = Served::start(take_lock(&pool)?, &pool, &mount, &show)?;
            screen.answer(&served.status()?, Style::Brief);
            screen.note("serving in the foreground; Ctrl-C unmounts");
            return served.wait().map(|()| 0);
        }
        daemon::detach()?;
        let served = daemon::report(screen, || {
            let lock = take_lock(&pool)?;
            daemon::begin_log(&pool, &lock)?;
            let served = Served::start(lock, &pool, &mount, &show)?;
            served.status().map(|status| (served, status))
        })?;
        served.wait().map(|()| 0)
    }

    /// Makes what is missing.
    fn make(&self, pool: &Path, screen: &Screen) -> Result<()> {
        match init::make_pool(pool, false) {
            Ok(uuid) => screen.note(&format!("pool {} ({uuid})", pool.display())),
            Err(error) if error.kind() == Kind::Exists => {}
            Err(error) => return Err(error),
        }
        if !host::is_dead(&self.mount) {
            std::fs::create_dir_all(&self.mount)
                .map_err(|e| Error::io(format!("cannot make the directory {}", self.mount.display()), e))?;
        }
        Ok(())
    }
}

/// Makes sure that the pool can be mounted at `mount`, after taking away what a killed server left there.
fn check_mount(pool: &Path, mount: &Path, screen: &Screen) -> Result<()> {
    let shown = mount.display();
    if host::pool_at(mount)?.is_some() && host::is_dead(mount) {
        host::fusermount(mount)?;
        screen.note(&format!("took away what a server that died had mounted at {shown}"));
    }
    if let Some(there) = host::pool_at(mount)? {
        return Err(Error::busy(format!("the pool {} is mounted at {shown} already", there.display()))
            .hint(format!("'afterimage umount {shown}' unmounts it")));
    }
    let meta = match std::fs::metadata(mount) {
        Ok(meta) => meta,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Err(Error::not_found(format!("there is no directory {shown} to mount at"))
                .hint(format!("make it with 'mkdir {shown}'")));
        }
        Err(error) => return Err(Error::io(format!("cannot mount at {shown}"), error)),
    };
    if !meta.is_dir() {
        return Err(Error::usage(format!("{shown} is a file, and a pool is mounted at a directory")));
    }
    if pool.starts_with(mount) {
        return Err(Error::usage(format!("{shown} holds the pool {} and would hide it", pool.display()))
            .hint("mount at a directory beside the pool"));
    }
    Ok(())
}

/// What is mounted, and for whom.
#[derive(Debug)]
pub(super) struct Show {
    pub(super) allow_other: bool,
    /// Only the extent files of this snapshot.
    pub(super) export: Option<String>,
}

impl Show {
    fn mount(&self, store: &Arc<Store>, pool: &Path, mount: &Path) -> Result<tree::Mounted> {
        let options = MountOptions { allow_other: self.allow_other, ..MountOptions::of_pool(pool) };
        match &self.export {
            None => tree::mount(store, mount, &options),
            Some(snapshot) => {
                let (disk, snapshot) = Target::snapshot(snapshot)?;
                let id = store.snapshot_info(&disk, &snapshot)?.id;
                tree::mount_extents(store, id, mount, &options)
            }
        }
    }
}

/// A pool that is mounted and answers.
struct Served {
    service: Arc<Service>,
    store: Arc<Store>,
    server: Server,
    mounted: tree::Mounted,
    pool: PathBuf,
    // Dropped last: it is held until the store is closed.
    lock: PoolLock,
}

impl Served {
    fn start(lock: PoolLock, pool: &Path, mount: &Path, show: &Show) -> Result<Self> {
        if let Err(error) = crate::sys::process::raise_open_files() {
            tracing::debug!("the limit of open files stays as it is: {error}");
        }
        let store = open_store(pool, OpenOptions::default())?;
        let (ask, asked) = channel();
        let stop = ask.clone();
        // The receiver lives as long as the thread that unmounts, which is as long as the process.
        let on_shutdown = Box::new(move || {
            stop.send(()).ok();
        });
        let service = Arc::new(Service::new(Arc::clone(&store), pool).on_shutdown(on_shutdown));
        let server = Server::start(pool, &lock, Arc::clone(&service) as Arc<dyn Answer>)?;
        let mounted = match show.mount(&store, pool, mount) {
            Ok(mounted) => mounted,
            Err(error) => {
                server.stop();
                if let Err(error) = store.close() {
                    tracing::error!("the pool {} could not be closed: {error}", pool.display());
                }
                return Err(error);
            }
        };
        service.set_mount(Some(mount.to_owned()));
        let unmount = mounted.unmounter();
        spawn_unmounter(asked, unmount)?;
        signal::watch(move |signal| {
            tracing::info!("{signal:?}: unmounting");
            ask.send(()).ok();
        })?;
        tracing::info!("process {} serves {} at {}", std::process::id(), pool.display(), mount.display());
        Ok(Self { service, store, server, mounted, pool: pool.to_owned(), lock })
    }

    fn status(&self) -> Result<Response> {
        self.service.answer(Request::Status {}, &Silent)
    }

    /// Serves until it is unmounted, then closes the pool.
    fn wait(self) -> Result<()> {
        let Self { service, store, server, mounted, pool, lock } = self;
        let served = mounted.wait();
        service.set_mount(None);
        service.end_exports();
        server.stop();
        let closed = store.close();
        match &closed {
            Ok(()) => tracing::info!("the pool {} is closed", pool.display()),
            Err(error) => tracing::error!("the pool {} could not be closed: {error}", pool.display()),
        }
        drop(lock);
        served.and(closed)
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

fn take_lock(pool: &Path) -> Result<PoolLock> {
    match enter(pool)? {
        Entry::Lock(lock) => Ok(lock),
        Entry::Server(client) => Err(already_served(pool, &client)),
    }
}

fn already_served(pool: &Path, client: &Client) -> Error {
    let shown = pool.display();
    let Ok(Response::Status(status)) = client.ask(&Request::Status {}, &Silent) else {
        return Error::busy(format!("the pool {shown} is served by another process"));
    };
    let at = status.mount.map(|at| format!(" at {at}")).unwrap_or_default();
    Error::busy(format!("the pool {shown} is served by process {}{at} already", status.pid))
        .hint("use it there, or 'afterimage umount' it first")
}
