//! The background half of `mount --daemon`.
//!
//! The program starts itself again in a session of its own, with a pipe as its stdout. The child writes one line there,
//! in the form of the control socket: the status once the mount answers, or the error. The parent passes it on and ends.
//!
//! The child knows what it is by a variable with the number of its parent, which stays true for nobody else who inherits it.
//!
//! # Why not fork
//! Forking a process that has threads is undefined in all but name, and needs unsafe code.

use std::fs::OpenOptions;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::{Command, Stdio};

use super::Global;
use super::mount::Show;
use super::screen::Screen;
use crate::api::{Failure, Line, Response};
use crate::error::{Error, Result};

/// File name of the log in the pool directory.
const LOG_NAME: &str = "server.log";

/// Environment variable that makes the background half; holds the number of the process that started it.
const PARENT_VARIABLE: &str = "AFTERIMAGE_BACKGROUND_OF";

/// Tells whether this process is the background half.
pub(super) fn is_child() -> bool {
    let parent = std::os::unix::process::parent_id().to_string();
    std::env::var(PARENT_VARIABLE).is_ok_and(|value| value == parent)
}

/// Makes a command the background half of this process.
pub(super) fn mark_child(command: &mut Command) {
    command.env(PARENT_VARIABLE, std::process::id().to_string());
}

/// Starts the background half and returns its status once the mount answers.
pub(super) fn start(pool: &Path, mount: &Path, show: &Show, global: &Global) -> Result<Response> {
    let cannot = |e| Error::io("cannot start the server in the background", e);
    let path = pool.join(LOG_NAME);
    let log = OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .open(&path)
        .map_err(|e| Error::io(format!("cannot open the log {}", path.display()), e))?;
    let program = std::env::current_exe().map_err(cannot)?;
    let mut command = Command::new(program);
    command.arg("--pool").arg(pool).arg("mount");
    mark_child(&mut command);
    if show.allow_other {
        command.arg("--allow-other");
    }
    if let Some(snapshot) = &show.export {
        command.arg(format!("--export={snapshot}"));
    }
    // A log that says when the server came and went is the least.
    command.args(std::iter::repeat_n("-v", usize::from(global.verbose.max(1))));
    command.arg("--").arg(mount);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log);
    let mut child = command.spawn().map_err(cannot)?;
    let pipe = child.stdout.take().expect("stdout is piped");
    let mut line = String::new();
    BufReader::new(pipe).read_line(&mut line).map_err(cannot)?;
    let silent = || Error::failed("the server ended before it was ready").hint(format!("{} says more", path.display()));
    match serde_json::from_str(&line).map_err(|e| silent().because(e))? {
        Line::Result(response) => Ok(response),
        Line::Error(failure) => Err(failure.into()),
        Line::Progress { .. } => Err(silent()),
    }
}

/// Leaves the session and the directory of the parent.
pub(super) fn detach() -> Result<()> {
    // It fails only for the leader of a process group, which has what we want already.
    rustix::process::setsid().ok();
    std::env::set_current_dir("/").map_err(|e| Error::io("cannot leave the working directory", e))
}

/// Starts with `begin` and writes the line for the parent.
pub(super) fn report<T>(screen: &Screen, begin: impl FnOnce() -> Result<(T, Response)>) -> Result<T> {
    match begin() {
        Ok((value, response)) => {
            screen.bytes(&Line::Result(response).encode());
            Ok(value)
        }
        Err(error) => {
            screen.bytes(&Line::Error(Failure::from(&error)).encode());
            Err(error)
        }
    }
}
