//! What stands behind a socket: a store, and what only the process around it knows.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{Request, Response, execute};
use crate::error::Result;
use crate::progress::Progress;
use crate::store::Store;
use crate::sync::Mutex;

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
}

impl Service {
    /// Puts a store that lives in the directory `pool` behind the requests.
    #[must_use]
    pub fn new(store: Arc<Store>, pool: &Path) -> Self {
        Self { store, pool: pool.to_owned(), mount: Mutex::new(None), stop: None }
    }

    /// Says what a `shutdown` does; without this it is refused.
    #[must_use]
    pub fn on_shutdown(mut self, stop: Stop) -> Self {
        self.stop = Some(stop);
        self
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
        let mut response = execute(&self.store, request, progress)?;
        if let Response::Status(status) = &mut response {
            status.pool = self.pool.to_string_lossy().into_owned();
            status.mount = self.mount.lock().as_ref().map(|path| path.to_string_lossy().into_owned());
        }
        Ok(response)
    }
}

impl fmt::Debug for Service {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Service").field("pool", &self.pool).finish_non_exhaustive()
    }
}
