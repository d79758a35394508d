//! `init`: makes a pool.

use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;
use uuid::Uuid;

use super::screen::Screen;
use super::{Global, host};
use crate::error::{Error, Result};
use crate::media::Media;
use crate::media::host::HostMedia;
use crate::store::{InitOptions, Store};

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

/// Makes a pool in a directory that is empty or not there yet.
pub(super) fn make_pool(pool: &Path, allow_network: bool) -> Result<Uuid> {
    let cannot = |e| Error::io(format!("cannot make the pool {}", pool.display()), e);
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(pool).map_err(|e| {
        if pool.exists() {
            return Error::usage(format!("{} is a file, and a pool is a directory", pool.display()));
        }
        cannot(e)
    })?;
    let network = host::network_file_system(pool).map_err(cannot)?;
    if let (Some(name), false) = (network, allow_network) {
        return Err(Error::unsupported(format!("{} lies on a network file system ({name})", pool.display()))
            .hint("use a local file system; --allow-network insists, at your own risk"));
    }
    let media: Arc<dyn Media> = Arc::new(HostMedia::new(pool).map_err(cannot)?);
    Store::init(&media, InitOptions::default())
        .map_err(|e| e.context(format!("cannot make the pool {}", pool.display())))
}
