//! What stands behind a socket: a store, and what only the process around it knows.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::exports::Exports;
use super::{Request, Response, Target, execute};
use crate::error::{Error, Result};
use crate::progress::Progress;
use crate::store::Store;
use crate::sync::Mutex;
use crate::tree::{self, MountOptions, Mounted};

/// Something that answers requests.
pub trait Answer: Send + Sync {
    /// Answers one; called from many threads at once.
    ///
    /// # Errors
    /// Whatever the request runs into.
    fn answer(&self, request: Request, progress: &dyn Progress) -> Result<Response>;
}

/// Called once for each `shutdown`; returns at once.
type Stop = Box<dyn Fn() + Send + Sync>;

/// An open pool that answers.
pub struct Service {
    store: Arc<Store>,
    pool: PathBuf,
    mount: Mutex<Option<PathBuf>>,
    stop: Option<Stop>,
    /// Extent files that are mounted by themselves; `None` once no more are.
    mounts: Mutex<Option<Vec<Mounted>>>,
    exports: Arc<Exports>,
}

impl Service {
    /// Puts a store that lives in the directory `pool` behind the requests.
    #[must_use]
    pub fn new(store: Arc<Store>, pool: &Path) -> Self {
        let exports = Exports::new(&store, pool);
        let (mount, mounts) = (Mutex::new(None), Mutex::new(None));
        Self { store, pool: pool.to_owned(), mount, stop: None, mounts, exports }
    }

    /// Says what a `shutdown` does; without this it is refused.
    #[must_use]
    pub fn on_shutdown(mut self, stop: Stop) -> Self {
        self.stop = Some(stop);
        *self.mounts.lock() = Some(Vec::new());
        self
    }

    /// Begins to serve what is attached: what persists at once, and more as it is asked for.
    pub fn start_exports(&self) {
        self.exports.start();
    }

    /// Keeps what a server of this pool would serve, in a process that serves nothing.
    ///
    /// # Errors
    /// When it cannot be found out what that is.
    pub fn keep_exports(&self) -> Result<()> {
        self.exports.keep()
    }

    /// Says what happens when the last of the attached is detached.
    pub fn on_idle(&self, idle: Stop) {
        self.exports.on_idle(idle);
    }

    /// Ends all that is served beside the pool's own mount, and serves no more: unmounts the extent files that were mounted
    /// by themselves, and detaches everything.
    pub fn end_exports(&self) {
        let mounts = self.mounts.lock().take().unwrap_or_default();
        mounts.iter().for_each(|mounted| mounted.unmounter()());
        self.exports.end();
        for mounted in mounts {
            let at = mounted.mountpoint().display().to_string();
            if let Err(error) = mounted.wait() {
                tracing::warn!("{at}: {error}");
            }
        }
    }

    /// Mounts the extent files of a snapshot.
    fn mount_export(&self, snapshot: &str, path: &str, allow_other: bool) -> Result<Response> {
        let (disk, name) = Target::snapshot(snapshot)?;
        let path = Path::new(path);
        if !path.is_absolute() {
            return Err(Error::usage(format!("the path '{}' is not absolute", path.display()))
                .hint("the server has a working directory of its own: give the whole path"));
        }
        let id = self.store.snapshot_info(&disk, &name)?.id;
        let mut mounts = self.mounts.lock();
        let Some(mounts) = mounts.as_mut() else { return Err(Error::busy("the server is ending")) };
        mounts.retain(|mounted| !mounted.ended());
        let options = MountOptions { allow_other, ..MountOptions::of_pool(&self.pool) };
        let mounted = tree::mount_extents(&self.store, id, path, &options)?;
        let mount = mounted.mountpoint().to_string_lossy().into_owned();
        mounts.push(mounted);
        Ok(Response::Mounted { snapshot: snapshot.to_owned(), mount })
    }

    /// Tells where the pool is mounted now.
    pub fn set_mount(&self, mount: Option<PathBuf>) {
        *self.mount.lock() = mount;
    }

    /// Returns the store.
    #[must_use]
    pub fn store(&self) -> &Arc<Store> {
        &self.store
    }
}

impl Answer for Service {
    fn answer(&self, request: Request, progress: &dyn Progress) -> Result<Response> {
        if let (Request::Shutdown {}, Some(stop)) = (&request, &self.stop) {
            stop();
            return Ok(Response::Stopping { pid: std::process::id() });
        }
        if let (Request::MountExport { snapshot, path, allow_other }, Some(_)) = (&request, &self.stop) {
            return self.mount_export(snapshot, path, *allow_other);
        }
        match &request {
            Request::Attach { .. } => return self.exports.attach(&request).map(Response::Attached),
            Request::AttachVm { .. } => return self.exports.attach_vm(&request).map(Response::VmDisk),
            Request::DetachVm { vm } => return Ok(Response::Detached { exports: self.exports.detach_vm(vm)? }),
            Request::Detach { name } => return Ok(Response::Detached { exports: self.exports.detach(name)? }),
            Request::Exports {} => {
                let (exports, awaited) = self.exports.list()?;
                return Ok(Response::Exports { exports, awaited });
            }
            _ => {}
        }
        let mut response = execute(&self.store, request, progress)?;
        match &mut response {
            Response::Status(status) => {
                status.pool = self.pool.to_string_lossy().into_owned();
                status.mount = self.mount.lock().as_ref().map(|path| path.to_string_lossy().into_owned());
                status.ending = self.stop.is_some() && !self.exports.serves();
            }
            Response::Metrics { text } => text.push_str(&self.exports.metrics()),
            _ => {}
        }
        Ok(response)
    }
}

impl fmt::Debug for Service {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Service").field("pool", &self.pool).finish_non_exhaustive()
    }
}
