//! What the program logs, and where to: stderr, whatever has become of it.
//!
//! # Rules
//! 1. A line that cannot be written is lost, and nothing else is: the log of a server may lie on a file system that is full,
//!    or be a pipe of which the reader has gone. The next line that can be written is preceded by how many were lost.
//! 2. No thread waits for whoever reads the log, but for a moment ([`Prompt`]): a terminal that was told to hold, or a pager
//!    that was stopped, held a virtual machine that was to end.
//! 3. A panic is logged like everything else, unless it becomes an ordinary error ([`crate::store::panic_is_guarded`]).
//!
//! # Why not stderr itself
//! When writing fails, `tracing_subscriber` says so with `eprintln!`, which panics when that fails too. A server on a full
//! host lost one thread after the other to its own warnings.

use std::io::{self, IsTerminal, StderrLock, Write};
use std::sync::atomic::{AtomicU64, Ordering};

use tracing_subscriber::EnvFilter;

use super::Global;
use super::prompt::Prompt;

/// Environment variable that sets what is logged, in the words of `tracing`.
const LOG_VARIABLE: &str = "AFTERIMAGE_LOG";

/// Lines that could not be written since the last one that could.
static LOST: AtomicU64 = AtomicU64::new(0);

/// Sends what the program logs to stderr.
pub(super) fn begin(global: &Global) {
    let level = match (global.quiet, global.verbose) {
        (true, _) => "error",
        (false, 0) => "warn",
        (false, 1) => "info",
        (false, 2) => "debug",
        (false, _) => "trace",
    };
    // With --json an error is all there is on stderr, so nobody is told there that a server takes its time.
    let client = if global.json { ",afterimage::api::client=error" } else { "" };
    let usual = || EnvFilter::new(format!("{level}{client}"));
    let filter = EnvFilter::try_from_env(LOG_VARIABLE).unwrap_or_else(|_| usual());
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(stderr)
        .log_internal_errors(false)
        .with_ansi(io::stderr().is_terminal())
        .with_target(false)
        .init();
    std::panic::set_hook(Box::new(|panic| {
        if !crate::store::panic_is_guarded() {
            let thread = std::thread::current();
            let trace = std::backtrace::Backtrace::capture();
            let text = format!("thread '{}' {panic}\n{trace}\n", thread.name().unwrap_or("without a name"));
            stderr().write_all(text.as_bytes()).ok();
        }
    }));
}

/// Returns what writes lines to stderr; they do not mix with those of other threads.
fn stderr() -> Lines<'static, Prompt<StderrLock<'static>>> {
    Lines { to: Prompt::new(io::stderr().lock()), lost: &LOST }
}

/// Writes whole lines; never fails.
struct Lines<'a, W> {
    to: W,
    lost: &'a AtomicU64,
}

impl<W: Write> Write for Lines<'_, W> {
    /// Takes a whole line, which is how `tracing_subscriber` brings them.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let lost = self.lost.swap(0, Ordering::Relaxed);
        let gap = match lost {
            0 => Ok(()),
            1 => self.to.write_all(b"(a line of the log is missing here: it could not be written)\n"),
            n => self
                .to
                .write_all(format!("({n} lines of the log are missing here: they could not be written)\n").as_bytes()),
        };
        if gap.and_then(|()| self.to.write_all(line)).is_err() {
            self.lost.fetch_add(lost + 1, Ordering::Relaxed);
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.flush().ok();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A place that has room for so many bytes.
    struct Small<'a>(&'a mut Vec<u8>, usize);

    impl Write for Small<'_> {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let room = self.1.saturating_sub(self.0.len()).min(bytes.len());
            if room == 0 {
                return Err(io::ErrorKind::StorageFull.into());
            }
            self.0.extend_from_slice(&bytes[..room]);
            Ok(room)
        }

        fn flush(&mut self) -> io::Result<()> {
            Err(io::ErrorKind::StorageFull.into())
        }
    }

    #[test]
    fn what_cannot_be_written_is_lost_and_told_of_once_there_is_room() {
        let (lost, mut text) = (AtomicU64::new(0), Vec::new());
        let mut say = |room, line: &str| {
            let mut lines = Lines { to: Small(&mut text, room), lost: &lost };
            lines.write_all(line.as_bytes()).unwrap();
            lines.flush().unwrap();
        };
        say(4, "one\n");
        say(4, "two\n");
        say(4, "three\n");
        say(1000, "four\n");
        say(1000, "five\n");
        let said = String::from_utf8(text).unwrap();
        assert_eq!(said, "one\n(2 lines of the log are missing here: they could not be written)\nfour\nfive\n");
    }
}
