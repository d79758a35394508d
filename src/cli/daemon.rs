//! The background half of `mount --daemon` and `serve --daemon`.
//!
//! The program starts itself again in a session of its own, with a pipe as its stdout. The child writes one line there,
//! in the form of the control socket: its answer once it serves, or the error. The parent passes it on and ends.
//!
//! The child knows what it is by a variable with the number of its parent, which stays true for nobody else who inherits it.
//! It writes to the log from the moment it has the lock of the pool: before that the log may be another server's.
//!
//! # Why not fork
//! Forking a process that has threads is undefined in all but name, and needs unsafe code.

use std::ffi::OsString;
use std::fs::OpenOptions;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::{Command, Stdio};

use super::Global;
use super::screen::Screen;
use crate::api::{Failure, Line, Response};
use crate::error::{Error, Result};
use crate::pool::PoolLock;

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

/// Starts the background half with a command of these words, and returns its answer once it serves.
pub(super) fn start(pool: &Path, words: &[OsString], global: &Global) -> Result<Response> {
    let cannot = |e| Error::io("cannot start the server in the background", e);
    let program = std::env::current_exe().map_err(cannot)?;
    let mut command = Command::new(program);
    command.arg("--pool").arg(pool);
    mark_child(&mut command);
    // A log that says when the server came and went is the least.
    command.args(std::iter::repeat_n("-v", usize::from(global.verbose.max(1))));
    command.args(words);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = command.spawn().map_err(cannot)?;
    let pipe = child.stdout.take().expect("stdout is piped");
    let mut line = String::new();
    BufReader::new(pipe).read_line(&mut line).map_err(cannot)?;
    let log = pool.join(LOG_NAME);
    let silent =
        || Error::failed("the server ended before it was ready").hint(format!("{} may say more", log.display()));
    match serde_json::from_str(&line).map_err(|e| silent().because(e))? {
        Line::Result(response) => Ok(response),
        Line::Error(failure) => Err(failure.into()),
        Line::Progress { .. } | Line::Instant {} => Err(silent()),
    }
}

/// Sends what this process says to the log of the pool, whose lock `_lock` is.
pub(super) fn begin_log(pool: &Path, _lock: &PoolLock) -> Result<()> {
    let path = pool.join(LOG_NAME);
    let cannot = |e| Error::io(format!("cannot open the log {}", path.display()), e);
    let log = OpenOptions::new().append(true).create(true).mode(0o600).open(&path).map_err(cannot)?;
    rustix::stdio::dup2_stderr(&log).map_err(|e| cannot(e.into()))
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
