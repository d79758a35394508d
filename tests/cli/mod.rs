//! The command line and the control socket, as people and programs meet them.

#![allow(clippy::unwrap_used, clippy::disallowed_methods, clippy::print_stderr, reason = "tests")]

mod arguments;
mod commands;
mod man;
mod memory;
mod mounting;
mod rebuild;
mod requests;
mod socket;
mod streams;

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;

/// The binary, pointed at a pool of its own.
pub(crate) struct Afterimage {
    pub(crate) dir: tempfile::TempDir,
}

impl Afterimage {
    /// Makes a directory for a pool, but no pool.
    pub(crate) fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    /// Makes a pool.
    pub(crate) fn with_pool() -> Self {
        let it = Self::new();
        it.json(&["init"]);
        it
    }

    pub(crate) fn pool(&self) -> PathBuf {
        self.dir.path().join("pool")
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Returns a command with the pool in the environment.
    pub(crate) fn command(&self, words: &[&str]) -> Command {
        let mut command = program();
        command.env("AFTERIMAGE_POOL", self.pool()).args(words);
        command
    }

    pub(crate) fn run(&self, words: &[&str]) -> Output {
        self.command(words).output().unwrap()
    }

    /// Runs a command that must succeed and returns its answer.
    pub(crate) fn json(&self, words: &[&str]) -> Value {
        let output = self.command(&[&["--json"], words].concat()).output().unwrap();
        assert!(output.status.success(), "{words:?}: {}", text(&output.stderr));
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// Runs a command that must fail and returns its exit code and the error.
    pub(crate) fn error(&self, words: &[&str]) -> (i32, Value) {
        let output = self.command(&[&["--json"], words].concat()).output().unwrap();
        assert_eq!(text(&output.stdout), "", "{words:?}");
        let error: Value = serde_json::from_slice(&output.stderr)
            .unwrap_or_else(|e| panic!("{words:?}: {e}: {}", text(&output.stderr)));
        (output.status.code().unwrap(), error["error"].clone())
    }

    /// Runs a command that must print `want` and nothing else on stdout.
    fn prints(&self, words: &[&str], want: &str) {
        let output = self.run(words);
        assert_eq!((output.status.code(), text(&output.stdout)), (Some(0), want), "{}", text(&output.stderr));
    }
}

pub(crate) fn program() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_afterimage"));
    command.env_remove("AFTERIMAGE_POOL").env_remove("AFTERIMAGE_LOG").stdin(Stdio::null());
    command
}

pub(crate) fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

/// Returns the names of all commands.
fn commands() -> Vec<String> {
    afterimage::cli::command().get_subcommands().map(|sub| sub.get_name().to_owned()).collect()
}

fn man_dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("man")
}
