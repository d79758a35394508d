//! `mount`: opens the pool, shows it as files, and serves the control socket until it is unmounted.
//!
//! # Rules
//! 1. What is served, in which order it begins and ends, and what ends it, is the business of [`super::server`].
//! 2. Nothing is mounted over the pool itself: the server would wait for itself. Nor in it, where a copy of the pool would
//!    copy what is mounted, too.
//! 3. With `--init` either both the pool and the directory are there afterwards, or what was made is taken away again.
//! 4. Extent files that are mounted beside the pool go when the pool is unmounted.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use clap::Args;

use super::exports::serve;
use super::new_dirs::NewDirs;
use super::screen::Screen;
use super::server::{Duty, Means, Show};
use super::show::Style;
use super::{Global, daemon, host, init};
use crate::api::{Client, Request, check_is_pool};
use crate::error::{Error, Kind, Result};
use crate::progress::Silent;

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
    #[command(flatten)]
    means: Means,
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
        if let Some(snapshot) = &self.export
            && let Some(client) = Client::find(&pool)?
        {
            let (snapshot, path) = (snapshot.clone(), mount.to_string_lossy().into_owned());
            let request = Request::MountExport { snapshot, path, allow_other: self.allow_other };
            screen.answer(&client.ask(&request, &Silent)?, Style::Brief);
            self.means.not_taken(screen);
            return Ok(0);
        }
        if self.daemon {
            let status = daemon::start(&pool, &self.words(&mount), global)?;
            screen.answer(&status, Style::Brief);
            return Ok(0);
        }
        let show = Show { at: mount, allow_other: self.allow_other, export: self.export };
        serve(&pool, &Duty::Mount(show), self.means, screen, "serving in the foreground; Ctrl-C unmounts")
    }

    /// Returns the words that mount the same.
    fn words(&self, mount: &Path) -> Vec<OsString> {
        let mut words = vec![OsString::from("mount")];
        if self.allow_other {
            words.push("--allow-other".into());
        }
        if let Some(snapshot) = &self.export {
            words.push(format!("--export={snapshot}").into());
        }
        words.extend(self.means.words());
        words.extend(["--".into(), mount.into()]);
        words
    }

    /// Makes what is missing: the directory first, since more can be wrong with it.
    fn make(&self, pool: &Path, screen: &Screen) -> Result<()> {
        let shown = self.mount.display();
        let mut new = None;
        if !host::is_dead(&self.mount) {
            check_place(&host::resolve_new(pool)?, &host::resolve_new(&self.mount)?)?;
            let made = NewDirs::make(&self.mount, 0o777).map_err(|error| {
                if self.mount.exists() {
                    return is_a_file(&self.mount);
                }
                host::explain(Error::io(format!("cannot make the directory {shown}"), error), &self.mount)
            })?;
            new = Some(made);
        }
        match init::make_pool(pool, false) {
            Ok(uuid) => screen.note(&format!("pool {} ({uuid})", pool.display())),
            Err(error) if error.kind() == Kind::Exists => {}
            Err(error) => {
                new.iter().for_each(NewDirs::undo);
                return Err(error);
            }
        }
        Ok(())
    }
}

fn is_a_file(mount: &Path) -> Error {
    Error::usage(format!("{} is a file, and a pool is mounted at a directory", mount.display()))
}

/// Refuses a place that would hide the pool, or lie in it.
fn check_place(pool: &Path, mount: &Path) -> Result<()> {
    let (shown, hint) = (mount.display(), "mount at a directory beside the pool");
    if pool.starts_with(mount) {
        return Err(Error::usage(format!("{shown} holds the pool {} and would hide it", pool.display())).hint(hint));
    }
    if mount.starts_with(pool) {
        return Err(Error::usage(format!("{shown} lies in the pool {}", pool.display())).hint(hint));
    }
    Ok(())
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
        return Err(is_a_file(mount));
    }
    check_place(pool, mount)
}
