//! `completions` and `man`: what is generated from the command line itself.

use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use clap::{Args, CommandFactory};
use clap_complete::Shell;
use clap_mangen::roff::{Roff, bold, roman};

use super::Cli;
use super::screen::Screen;
use crate::error::{Error, Result};

/// The pages that are written by hand.
const WRITTEN: [(&str, &str); 3] = [
    ("afterimage-pool.7", include_str!("../../man/afterimage-pool.7")),
    ("afterimage-api.5", include_str!("../../man/afterimage-api.5")),
    ("afterimage-formats.5", include_str!("../../man/afterimage-formats.5")),
];

/// Commands that are about one thing: the page of each names the others.
const RELATED: [&[&str]; 8] = [
    &["init", "mount", "umount", "doctor"],
    &["serve", "attach", "detach", "exports"],
    &["create", "import", "resize", "ls", "info", "rename", "rm", "set", "get"],
    &["snapshot", "clone", "revert", "retire", "hold", "release", "prune"],
    &["diff", "estimate", "verify", "export", "send", "receive", "record"],
    &["check", "scrub", "reclaim", "metrics"],
    &["checkpoint", "vm"],
    &["completions", "man"],
];

/// Commands that write or read a format that has a life of its own.
const OF_FORMATS: [&str; 5] = ["export", "send", "receive", "record", "checkpoint"];

/// Print a completion script for a shell
///
/// For bash: afterimage completions bash > ~/.local/share/bash-completion/completions/afterimage
#[derive(Debug, Args)]
pub(super) struct Completions {
    /// The shell
    shell: Shell,
}

impl Completions {
    pub(super) fn run(self, screen: &Screen) -> Result<u8> {
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut Cli::command(), "afterimage", &mut script);
        screen.bytes(&script);
        Ok(0)
    }
}

/// Write the man pages into a directory
#[derive(Debug, Args)]
pub(super) struct Man {
    /// The directory; made if it is not there
    dir: PathBuf,
}

impl Man {
    pub(super) fn run(self, screen: &Screen) -> Result<u8> {
        let cannot = |path: &Path, e| Error::io(format!("cannot write {}", path.display()), e);
        std::fs::create_dir_all(&self.dir).map_err(|e| cannot(&self.dir, e))?;
        let pages = all();
        for (name, page) in &pages {
            let path = self.dir.join(name);
            std::fs::OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(true)
                .mode(0o644)
                .open(&path)
                .and_then(|mut file| file.write_all(page))
                .map_err(|e| cannot(&path, e))?;
        }
        let names: Vec<&str> = pages.iter().map(|(name, _)| name.as_str()).collect();
        let value = serde_json::json!({ "answer": "pages", "pages": names });
        screen.confirm(&value, &format!("{} pages in {}\n", pages.len(), self.dir.display()));
        Ok(0)
    }
}

/// Returns all pages by file name.
pub(super) fn all() -> Vec<(String, Vec<u8>)> {
    let mut command = Cli::command();
    command.build();
    let mut pages = vec![("afterimage.1".to_owned(), page(command.clone()))];
    for sub in command.get_subcommands().filter(|sub| !sub.is_hide_set()) {
        let name = format!("afterimage-{}", sub.get_name());
        pages.push((format!("{name}.1"), page(sub.clone())));
        for inner in sub.get_subcommands().filter(|inner| inner.get_name() != "help") {
            pages.push((format!("{name}-{}.1", inner.get_name()), page(inner.clone())));
        }
    }
    pages.extend(WRITTEN.map(|(name, text)| (name.to_owned(), text.as_bytes().to_vec())));
    pages.sort();
    pages
}

/// Renders one page of section 1.
fn page(command: clap::Command) -> Vec<u8> {
    let name = command.get_display_name().unwrap_or(command.get_name()).to_owned();
    let source = format!("afterimage {}", env!("CARGO_PKG_VERSION"));
    let others = others(&name, &command);
    let man = clap_mangen::Man::new(command).title(name).manual("Afterimage").source(source);
    let mut bytes = Vec::new();
    man.render(&mut bytes).expect("a vector takes everything");
    let mut roff = Roff::new();
    roff.control("SH", ["SEE ALSO"]);
    let last = others.len() - 1;
    let words = others.into_iter().enumerate().flat_map(|(n, (name, section))| {
        let end = if n < last { ", " } else { "" };
        [bold(name), roman(format!("({section}){end}"))]
    });
    roff.text(words.collect::<Vec<_>>());
    roff.to_writer(&mut bytes).expect("a vector takes everything");
    bytes
}

/// Returns the pages to see beside that of a command: the one above it, those of its kin, and the concepts.
fn others(name: &str, command: &clap::Command) -> Vec<(String, u8)> {
    let own = name.trim_start_matches("afterimage").trim_start_matches('-');
    let mut pages = Vec::new();
    if !own.is_empty() {
        pages.push(("afterimage".to_owned(), 1));
    }
    if let Some((above, _)) = own.split_once('-') {
        pages.push((format!("afterimage-{above}"), 1));
    }
    let inner = command.get_subcommands().filter(|inner| inner.get_name() != "help" && !own.is_empty());
    pages.extend(inner.map(|inner| (format!("afterimage-{own}-{}", inner.get_name()), 1)));
    let kin = RELATED.iter().find(|kin| kin.contains(&own)).copied().unwrap_or_default();
    pages.extend(kin.iter().filter(|other| **other != own).map(|other| (format!("afterimage-{other}"), 1)));
    pages.push(("afterimage-api".to_owned(), 5));
    if own.is_empty() || OF_FORMATS.contains(&own) {
        pages.push(("afterimage-formats".to_owned(), 5));
    }
    pages.push(("afterimage-pool".to_owned(), 7));
    pages
}
