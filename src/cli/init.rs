//! `init`: makes a pool.
//!
//! # Rules
//! 1. What it takes is asked first: a host file system that can never take a block is refused before anything is made.
//! 2. Of two that make a pool in one directory, one does, and the other finds it there.
//! 3. A failure leaves what was there before, and nothing else. A crash leaves files that the next try replaces.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use uuid::Uuid;

use super::new_dirs::NewDirs;
use super::screen::Screen;
use super::{Global, host};
use crate::clock;
use crate::error::{Error, Kind, Result};
use crate::media::Media;
use crate::media::host::HostMedia;
use crate::pool::SEGMENTS_DIR;
use crate::store::{InitOptions, Store};
use crate::sys::lock::try_exclusive;

/// How long another one that makes a pool in the directory is waited for, and how often is looked.
const LOCK_TIME_MAX: Duration = Duration::from_secs(10);
const RETRY_INTERVAL: Duration = Duration::from_millis(50);

/// Make a pool
///
/// The directory is made if it is not there, and must be empty otherwise. It should lie on a local file system with room
/// for everything the disks will hold.
#[derive(Debug, Args)]
pub(super) struct Init {
    /// The directory; the one of --pool when left out
    dir: Option<PathBuf>,
    /// Allow a network file system, which may lose what it said was durable
    #[arg(long)]
    allow_network: bool,
}

impl Init {
    pub(super) fn run(self, global: &Global, screen: &Screen) -> Result<u8> {
        let pool = match &self.dir {
            Some(dir) => dir,
            None => global.pool()?,
        };
        let uuid = make_pool(pool, self.allow_network)?;
        let shown = pool.canonicalize().unwrap_or_else(|_| pool.clone());
        let value = serde_json::json!({ "answer": "pool", "pool": shown.to_string_lossy(), "uuid": uuid });
        screen.confirm(&value, &format!("pool {} ({uuid})\n", shown.display()));
        Ok(0)
    }
}

/// Makes a pool in a directory that is empty or not there yet. When it fails, what was made is taken away again.
pub(super) fn make_pool(pool: &Path, allow_network: bool) -> Result<Uuid> {
    let what = || format!("cannot make the pool {}", pool.display());
    let cannot = |e| advise(Error::io(what(), e), pool);
    let new = NewDirs::make(pool, 0o700).map_err(|e| {
        if pool.exists() {
            return Error::usage(format!("{} is a file, and a pool is a directory", pool.display()));
        }
        cannot(e)
    })?;
    let dir = HostMedia::new(pool).map_err(cannot)?;
    lock(&dir, pool)?;
    let segments = pool.join(SEGMENTS_DIR);
    let had_segments = segments.exists();
    let made = fill(&dir, pool, allow_network).map_err(|e| e.context(what()));
    made.map_err(|error| {
        if error.kind() != Kind::Exists {
            if !had_segments {
                // It is empty, if it is there.
                std::fs::remove_dir(&segments).ok();
            }
            new.undo();
        }
        advise(error, pool)
    })
}

/// Adds what to do about a host that lets nobody write here, or not this user.
fn advise(error: Error, pool: &Path) -> Error {
    match error.kind() {
        Kind::ReadOnly => error.hint("put the pool on a file system that can be written"),
        _ => host::explain(error, pool),
    }
}

/// Locks the directory, so that of two who make a pool in it only one does. Only whoever has it takes anything away.
fn lock(dir: &HostMedia, pool: &Path) -> Result<()> {
    let begun = clock::now();
    loop {
        match try_exclusive(dir) {
            Ok(true) => return Ok(()),
            Ok(false) if begun.elapsed() < LOCK_TIME_MAX => clock::sleep(RETRY_INTERVAL),
            Ok(false) => {
                let error = Error::busy(format!("another process is making a pool in {}", pool.display()));
                return Err(error.hint("wait for it to end"));
            }
            Err(error) => return Err(Error::io(format!("cannot lock {}", pool.display()), error)),
        }
    }
}

fn fill(dir: &HostMedia, pool: &Path, allow_network: bool) -> Result<Uuid> {
    let network = host::network_file_system(pool).map_err(|e| Error::io("cannot look at the file system", e))?;
    if let (Some(name), false) = (network, allow_network) {
        return Err(Error::unsupported(format!("it lies on a network file system ({name})"))
            .hint("use a local file system; --allow-network insists, at your own risk"));
    }
    let media: Arc<dyn Media> = Arc::new(dir.clone());
    Store::init(&media, InitOptions::default())
}
