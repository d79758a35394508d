//! `umount`: unmounts, and waits until the server has closed the pool.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;

use super::host;
use super::screen::Screen;
use crate::api::{Client, Request, Response};
use crate::clock;
use crate::error::{Error, Kind, Result};
use crate::pool::PoolLock;
use crate::progress::Silent;

/// How long the server may take to write everything down and close the pool.
const CLOSE_TIME_MAX: Duration = Duration::from_secs(120);

/// How often it is looked at.
const INTERVAL: Duration = Duration::from_millis(50);

/// Unmount a pool and end its server
///
/// Returns when the pool is closed and everything in it durable. Refused while files below MNT are open, or guests and
/// other clients use disks that the server has attached.
#[derive(Debug, Args)]
pub(super) struct Umount {
    /// Unmount although files are open or disks are used; whoever uses them gets errors from then on
    #[arg(short, long)]
    force: bool,
    /// Where the pool is mounted
    #[arg(value_name = "MNT")]
    mount: PathBuf,
}

impl Umount {
    pub(super) fn run(self, screen: &Screen) -> Result<u8> {
        let mount = host::resolve_mount(&self.mount)?;
        let Some(pool) = host::pool_at(&mount)? else {
            return Err(Error::not_found(format!("no pool is mounted at {}", mount.display()))
                .hint("'grep afterimage: /proc/mounts' lists the ones that are"));
        };
        let server = server_of(&pool, &mount)?;
        if let (Some(server), false) = (&server, self.force) {
            server.refuse_used()?;
        }
        match (&server, host::fusermount(&mount)) {
            (_, Ok(())) => {}
            // The server detaches the mount, whether or not there is a tool for it here.
            (Some(server), Err(error)) if self.force || error.kind() == Kind::NotFound => server.stop()?,
            (_, Err(error)) => return Err(error),
        }
        if let Some(server) = server {
            server.wait(&pool, &mount)?;
        }
        let value = serde_json::json!({ "answer": "unmounted", "mount": mount.to_string_lossy() });
        screen.confirm(&value, &format!("unmounted {}\n", mount.display()));
        Ok(0)
    }
}

/// The server of the mount.
struct Served {
    client: Client,
    pid: u32,
}

/// Finds the server that has the pool mounted here. One that is mounted elsewhere has nothing to do with this mount: it
/// is what a killed server left.
fn server_of(pool: &Path, mount: &Path) -> Result<Option<Served>> {
    if !pool.is_dir() {
        return Ok(None);
    }
    let Some(client) = Client::find(pool)? else { return Ok(None) };
    let Response::Status(status) = client.ask(&Request::Status {}, &Silent)? else { return Ok(None) };
    let here = status.mount.is_some_and(|at| at == mount.to_string_lossy());
    Ok(here.then_some(Served { client, pid: status.pid }))
}

impl Served {
    /// Fails while somebody uses what the server has attached: it would end with the mount.
    fn refuse_used(&self) -> Result<()> {
        let Response::Exports { exports, .. } = self.client.ask(&Request::Exports {}, &Silent)? else { return Ok(()) };
        let Some(used) = exports.iter().find(|export| export.clients > 0) else {
            return Ok(());
        };
        let (id, disks, kind) = (used.id, used.disks.join(", "), &used.kind);
        Err(Error::busy(format!(
            "export {id} ({disks} over {kind}) is in use, and the server would end with the mount"
        ))
        .hint(format!("end what uses it and 'afterimage detach {id}', or unmount with --force")))
    }

    fn stop(&self) -> Result<()> {
        self.client.ask(&Request::Shutdown {}, &Silent).map(|_| ())
    }

    /// Waits until nothing is mounted and the pool is closed.
    fn wait(&self, pool: &Path, mount: &Path) -> Result<()> {
        let begun = clock::now();
        let process = PathBuf::from(format!("/proc/{}", self.pid));
        while host::pool_at(mount)?.is_some_and(|still| still == pool)
            || (process.exists() && PoolLock::take(pool).is_err())
        {
            if begun.elapsed() >= CLOSE_TIME_MAX {
                return Err(Error::busy(format!("process {} is still closing the pool {}", self.pid, pool.display()))
                    .hint(format!("wait, and look at {}/server.log", pool.display())));
            }
            clock::sleep(INTERVAL);
        }
        Ok(())
    }
}
