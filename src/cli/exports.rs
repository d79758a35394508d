//! `serve`, `attach`, `detach` and `exports`: disks on sockets and ports.
//!
//! `attach` needs a server. `serve` asks the one that runs on the pool, as `attach` does; without one it becomes the server
//! itself ([`super::server`]).

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use clap::{ArgGroup, Args, ValueEnum};

use super::screen::Screen;
use super::server::{Duty, Means, PoolServer, already_served};
use super::show::Style;
use super::table::{Head, Table};
use super::{Ask, Global, daemon, vm_steward};
use crate::api::answer::{Awaited, Export};
use crate::api::{Client, Entry, Request, Response, check_is_pool, enter};
use crate::error::{Error, Result};
use crate::pool::ExportKind;
use crate::progress::Silent;

/// What to speak.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Kind {
    /// Network block device: for QEMU, libnbd and the kernel, on this host and others
    Nbd,
    /// vhost-user-blk: a virtio disk for a guest on this host, without a copy through the VMM
    VhostUser,
}

/// What to attach, and where.
#[derive(Debug, Args)]
#[command(group = ArgGroup::new("address").required(true).args(["socket", "listen"]))]
struct How {
    /// What to speak
    kind: Kind,
    /// Disks to serve for writing, and snapshots (DISK@SNAPSHOT) to serve for reading; one for vhost-user
    #[arg(required = true, value_name = "DISK")]
    disks: Vec<String>,
    /// Listen on a Unix socket, which only the user of the server can open
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Listen on a TCP port, such as 127.0.0.1:10809; nbd only
    #[arg(long, value_name = "ADDRESS:PORT")]
    listen: Option<String>,
    /// Certificate for TLS (PEM); clients must use TLS then
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    tls_cert: Option<PathBuf>,
    /// Key of the certificate (PEM)
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,
    /// Ask clients for certificates that these roots (PEM) vouch for
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_ca: Option<PathBuf>,
    /// Listen beyond this host without asking clients who they are
    #[arg(long)]
    unprotected: bool,
    /// Let nobody write; others may write meanwhile
    #[arg(long)]
    read_only: bool,
    /// Queues of a vhost-user device, best as many as the guest has processors
    #[arg(long, value_name = "N")]
    queues: Option<u16>,
    /// Serve it again whenever a server is started on the pool, until it is detached
    #[arg(long)]
    persist: bool,
}

impl How {
    fn request(&self) -> Result<Request> {
        let path = |path: &Option<PathBuf>| path.as_deref().map(absolute).transpose();
        Ok(Request::Attach {
            kind: match self.kind {
                Kind::Nbd => ExportKind::Nbd,
                Kind::VhostUser => ExportKind::VhostUser,
            },
            disks: self.disks.clone(),
            socket: path(&self.socket)?,
            listen: self.listen.clone(),
            tls_cert: path(&self.tls_cert)?,
            tls_key: path(&self.tls_key)?,
            tls_ca: path(&self.tls_ca)?,
            unprotected: self.unprotected,
            read_only: self.read_only,
            queues: self.queues,
            persist: self.persist,
        })
    }

    /// Returns the words that say the same.
    fn words(&self) -> Result<Vec<OsString>> {
        let mut words: Vec<OsString> = Vec::new();
        let paths = [
            ("--socket", &self.socket),
            ("--tls-cert", &self.tls_cert),
            ("--tls-key", &self.tls_key),
            ("--tls-ca", &self.tls_ca),
        ];
        for (name, path) in paths {
            if let Some(path) = path {
                words.push(format!("{name}={}", absolute(path)?).into());
            }
        }
        let listen = self.listen.as_ref().map(|listen| format!("--listen={listen}"));
        let queues = self.queues.map(|queues| format!("--queues={queues}"));
        words.extend(listen.into_iter().chain(queues).map(OsString::from));
        let flags = [("--unprotected", self.unprotected), ("--read-only", self.read_only), ("--persist", self.persist)];
        words.extend(flags.iter().filter(|(_, set)| *set).map(|(name, _)| OsString::from(name)));
        let kind = self.kind.to_possible_value().expect("every kind has a word").get_name().to_owned();
        words.extend(["--".into(), kind.into()]);
        words.extend(self.disks.iter().map(OsString::from));
        Ok(words)
    }
}

fn absolute(path: &Path) -> Result<String> {
    let shown = path.display();
    let whole = std::path::absolute(path).map_err(|e| Error::io(format!("cannot find {shown}"), e))?;
    whole.into_os_string().into_string().map_err(|_| Error::usage(format!("the path {shown} is not UTF-8")))
}

/// Serve disks over NBD, or one to a guest over vhost-user
///
/// With a server running on the pool it is told to, and the command returns at once. Without one the pool is opened and
/// served in the foreground until Ctrl-C, or until the last disk is detached. A disk that is open for writing elsewhere is
/// refused: one writer at a time, be it the mount, an NBD client or a guest. Snapshots can be read by any number.
///
/// With --persist the same command can be said again, as a service does when it is started: what is served already is
/// answered with, and what could not be started is attempted again. Another command for the same address is refused.
///
/// A server that was started here ends with the last 'afterimage detach', which also ends what was to persist. To end the
/// server and keep that, send SIGTERM to it; 'afterimage doctor' tells the number of its process.
///
/// Without a disk it serves what is attached to stay (--persist), and the virtual machines of the pool, which come back to
/// their disks by themselves.
#[derive(Debug, Args)]
#[command(
    mut_group("address", |group| group.required(false)),
    mut_arg("kind", |kind| kind.required(false).requires_all(["disks", "address"])),
    mut_arg("disks", |disks| disks.required(false)),
)]
pub(super) struct Serve {
    #[command(flatten)]
    how: Option<How>,
    /// What the background half attaches, in the form of the control socket
    #[arg(long, hide = true, value_name = "JSON", conflicts_with = "kind")]
    request: Option<String>,
    /// Reach the server for this virtual machine, which is at the other end of stdin
    #[arg(long, hide = true, value_name = "VM", conflicts_with_all = ["kind", "request"])]
    steward: Option<String>,
    /// Without a server, go to the background once the disk is served; the log goes to POOL/server.log
    #[arg(long)]
    daemon: bool,
    #[command(flatten)]
    means: Means,
}

impl Serve {
    pub(super) fn run(self, global: &Global, screen: &Screen) -> Result<u8> {
        if let Some(vm) = &self.steward {
            return vm_steward::serve(vm, global);
        }
        let pool = check_is_pool(global.pool()?)?;
        let note = "serving in the foreground; Ctrl-C ends it";
        let request = match (&self.how, &self.request) {
            (Some(how), _) => Some(how.request()?),
            (None, Some(text)) => {
                Some(serde_json::from_str(text).map_err(|e| Error::usage(format!("--request is none: {e}")))?)
            }
            (None, None) => None,
        };
        // The background half answers in its own way, below.
        if !daemon::is_child()
            && let Some(request) = &request
            && let Some(client) = Client::find(&pool)?
        {
            screen.answer(&client.ask(request, &Silent)?, Style::Brief);
            self.means.not_taken(screen);
            return Ok(0);
        }
        if self.daemon {
            let how = self.how.as_ref().map_or(Ok(Vec::new()), How::words)?;
            let means = self.means.words().into_iter().collect();
            let words = [vec!["serve".into()], means, how].concat();
            screen.answer(&daemon::start(&pool, &words, global)?, Style::Brief);
            return Ok(0);
        }
        serve(&pool, &request.map_or(Duty::Keep, Duty::Attach), self.means, screen, note)
    }
}

/// Becomes the server of a pool, in the foreground or as the background half of a command. Where somebody else has become it a
/// moment before, that one is asked to attach.
pub(super) fn serve(pool: &Path, duty: &Duty, means: Means, screen: &Screen, note: &str) -> Result<u8> {
    let child = daemon::is_child();
    if child {
        daemon::detach()?;
    }
    let begin = || -> Result<(Option<PoolServer>, Response)> {
        let lock = match (enter(pool)?, duty) {
            (Entry::Lock(lock), _) => lock,
            (Entry::Server(client), Duty::Attach(request)) => return Ok((None, client.ask(request, &Silent)?)),
            (Entry::Server(client), Duty::Mount(_) | Duty::Keep) => return Err(already_served(pool, &client)),
        };
        if child {
            daemon::begin_log(pool, &lock)?;
        }
        let server = PoolServer::start(lock, pool, duty, means)?;
        let answer = server.answer();
        Ok((Some(server), answer))
    };
    let server = if child {
        daemon::report(screen, begin)?
    } else {
        let (server, answer) = begin()?;
        screen.answer(&answer, Style::Brief);
        server
    };
    let Some(server) = server else {
        means.not_taken(screen);
        return Ok(0);
    };
    if !child {
        screen.note(note);
    }
    server.wait().map(|()| 0)
}

/// Have the server of a pool serve disks over NBD, or one over vhost-user
///
/// As serve, but there must be a server (see afterimage-mount(1) and afterimage-serve(1)).
#[derive(Debug, Args)]
pub(super) struct Attach {
    #[command(flatten)]
    how: How,
}

impl Attach {
    pub(super) fn ask(self) -> Result<Ask> {
        Ok(Ask::change(self.how.request()?))
    }
}

/// End what attach or serve began
///
/// What is in flight is finished, of a request that takes long only the part that has begun; clients that are connected are cut
/// off. What was attached with --persist is not served again, and no disk is kept for it any longer; for that no server has to
/// run.
///
/// When the command returns, nobody can reach the disk through the export any more. If the host does not end I/O in time, it
/// fails with exit code 4 and says so, and the export is listed as "ending" until then.
#[derive(Debug, Args)]
pub(super) struct Detach {
    /// Number of the export, or the disk or snapshot that is served
    #[arg(value_name = "ID|DISK")]
    name: String,
}

impl Detach {
    pub(super) fn ask(self) -> Ask {
        Ask::change(Request::Detach { name: self.name })
    }
}

/// List what is attached
///
/// Without a server it lists what will be served again when one is started. Below it tells for whom disks are kept: who was
/// writing when the last server ended has a minute to come back, a virtual machine as well as the client of an export.
///
/// What failed to start is attempted again when the command that attached it is said again.
#[derive(Debug, Args)]
pub(super) struct Exports {}

impl Exports {
    #[expect(clippy::unused_self, reason = "like all commands")]
    pub(super) fn ask(self) -> Ask {
        Ask::question(Request::Exports {})
    }
}

fn address(export: &Export) -> String {
    export.socket.clone().or_else(|| export.listen.clone()).unwrap_or_default()
}

/// Returns a line that tells what an export is.
pub(super) fn show_export(export: &Export, verb: &str) -> String {
    let Export { id, kind, disks, .. } = export;
    format!("export {id}: {} {verb} {} over {kind}\n", disks.join(", "), address(export))
}

/// Returns a table of exports, and who is awaited.
pub(super) fn show_exports(exports: &[Export], awaited: &[Awaited]) -> String {
    let mut table = Table::new(&[
        Head::Right("ID"),
        Head::Left("KIND"),
        Head::Left("DISK"),
        Head::Left("ADDRESS"),
        Head::Right("CLIENTS"),
        Head::Left("ACCESS"),
        Head::Left("PERSISTS"),
        Head::Left("STATE"),
    ]);
    let mut reasons = String::new();
    for export in exports {
        let access = match (export.read_only, export.writing.is_empty()) {
            (true, _) => "read-only",
            (false, true) => "read-write",
            (false, false) => "writing",
        };
        table.row([
            export.id.to_string(),
            export.kind.clone(),
            export.disks.join(","),
            address(export) + if export.tls { " (TLS)" } else { "" },
            export.clients.to_string(),
            access.to_owned(),
            if export.persist { "yes" } else { "no" }.to_owned(),
            export.state.clone(),
        ]);
        if let Some(error) = &export.error {
            reasons.push_str(&format!("export {}: {error}\n", export.id));
        }
    }
    for Awaited { disk, holder, seconds, .. } in awaited {
        let time = seconds.map_or_else(
            || "until a minute after the next server has begun".to_owned(),
            |seconds| format!("for {seconds} s more"),
        );
        reasons.push_str(&format!("disk '{disk}' is kept for {holder} {time}\n"));
    }
    table.render() + &reasons
}
