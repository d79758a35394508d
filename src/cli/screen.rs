//! The one place that prints.
//!
//! # Rules
//! 1. stdout takes results, stderr everything else.
//! 2. A reader that goes away is no error: `afterimage ls | head -1` ends quietly.

use std::io::{self, IsTerminal, Write};

use serde::Serialize;

use super::prompt::Prompt;
use super::show::{Style, show};
use crate::api::{Failure, Line, Response};
use crate::error::Error;

/// Where results and messages go.
#[derive(Debug, Clone, Copy)]
pub(super) struct Screen {
    json: bool,
    quiet: bool,
}

impl Screen {
    pub(super) fn new(json: bool, quiet: bool) -> Self {
        Self { json, quiet }
    }

    /// Tells whether a progress bar may be drawn.
    pub(super) fn shows_progress(self) -> bool {
        !self.quiet && io::stderr().is_terminal()
    }

    /// Prints an answer; with `-q`, nothing that only confirms.
    pub(super) fn answer(self, response: &Response, style: Style) {
        if !self.json && self.quiet && style == Style::Brief {
            return;
        }
        self.text(response, &show(response, style));
    }

    /// Prints `text`, or `value` with `--json`.
    pub(super) fn text(self, value: &impl Serialize, text: &str) {
        if self.json {
            let line = serde_json::to_string(value).expect("answers hold nothing JSON cannot say");
            write(&mut io::stdout(), &format!("{line}\n"));
        } else {
            write(&mut io::stdout(), text);
        }
    }

    /// Prints `value` with `--json`, and otherwise `text` unless it was told to be quiet.
    pub(super) fn confirm(self, value: &impl Serialize, text: &str) {
        if self.json || !self.quiet {
            self.text(value, text);
        }
    }

    /// Prints an answer to stderr, because stdout has the result itself.
    pub(super) fn aside(self, response: &Response) {
        if self.json {
            let line = serde_json::to_string(response).expect("answers hold nothing JSON cannot say");
            write(&mut io::stderr(), &format!("{line}\n"));
        } else if !self.quiet {
            write(&mut io::stderr(), &show(response, Style::Brief));
        }
    }

    /// Prints bytes as they are.
    #[expect(clippy::unused_self, reason = "printing goes through the screen")]
    pub(super) fn bytes(self, bytes: &[u8]) {
        // A reader that has gone has what it wanted. A guest's prompt is no whole line, and is to be seen all the same.
        let mut stdout = io::stdout();
        stdout.write_all(bytes).and_then(|()| stdout.flush()).ok();
    }

    /// Tells something beside the result.
    pub(super) fn note(self, text: &str) {
        if !self.quiet {
            write(&mut io::stderr(), &format!("{text}\n"));
        }
    }

    /// As [`Self::note`], for who cannot wait: it does not stay for a screen that takes nothing.
    pub(super) fn brief_note(self, text: &str) {
        if !self.quiet {
            write(&mut Prompt::new(io::stderr().lock()), &format!("{text}\n"));
        }
    }

    /// Tells an error; its causes too if asked for.
    pub(super) fn error(self, error: &Error, causes: bool) {
        if self.json {
            // Nobody is left to tell when stderr is gone.
            io::stderr().write_all(&Line::Error(Failure::from(error)).encode()).ok();
            return;
        }
        let mut text = format!("afterimage: {}\n", error.message());
        if let Some(hint) = error.next_step() {
            text.push_str(&format!("  hint: {hint}\n"));
        }
        let mut cause = std::error::Error::source(error).filter(|_| causes);
        while let Some(next) = cause {
            text.push_str(&format!("  cause: {next}\n"));
            cause = next.source();
        }
        write(&mut io::stderr(), &text);
    }
}

fn write(to: &mut impl Write, text: &str) {
    // Nobody is left to tell when this fails; the exit code still says how the work went.
    to.write_all(text.as_bytes()).and_then(|()| to.flush()).ok();
}
