//! Commands about what changed, and about snapshots whose data is gone.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::screen::Screen;
use super::show::Style;
use super::table::{Head, Table};
use super::{Ask, Global};
use crate::api::Request;
use crate::api::answer;
use crate::error::{Error, Result};
use crate::units::show_size;

/// Free the data of snapshots, and keep what later increments need of them
///
/// A retired snapshot is still listed and can be renamed, removed, and compared with any other state of its disk: the next
/// backup is an increment, though the data of the last one is gone. It cannot be read, cloned or reverted to any more.
#[derive(Debug, Args)]
pub(super) struct Retire {
    /// The snapshots, all or none of them
    #[arg(value_name = "DISK@SNAPSHOT", required = true)]
    snapshots: Vec<String>,
    /// Return only when the records are durable and the space is back, but for what somebody still reads
    #[arg(long)]
    wait: bool,
}

impl Retire {
    pub(super) fn ask(self) -> Ask {
        Ask::change(Request::Retire { snapshots: self.snapshots, wait: self.wait }).in_bytes()
    }
}

/// Tell what changed between two states
///
/// Any two of a disk, its snapshots (live or retired), and those of its clones, in either order. No data is read. Both sides
/// are taken at one instant, and extents are printed as they are found, however many there are.
#[derive(Debug, Args)]
pub(super) struct Diff {
    /// The older side: DISK, DISK@SNAPSHOT, or - for nothing
    #[arg(value_name = "FROM", allow_hyphen_values = true)]
    from: String,
    /// The newer side: DISK, DISK@SNAPSHOT, or - for nothing, so that all that FROM has is told of as zeros
    #[arg(value_name = "TO", allow_hyphen_values = true)]
    to: String,
    /// Only the sums, not the extents
    #[arg(long)]
    summary: bool,
}

impl Diff {
    pub(super) fn run(self, global: &Global, screen: &Screen) -> Result<u8> {
        let Self { from, to, summary } = self;
        if !summary {
            return super::extents::run(global, screen, from, to);
        }
        let request = Request::Diff { from, to, summary, output: None };
        super::ask(global, screen, Ask { style: Style::Brief, ..Ask::question(request) })
    }
}

/// Tell how many bytes the next increment of a disk would carry
#[derive(Debug, Args)]
pub(super) struct Estimate {
    /// The disk
    disk: String,
    /// The base: DISK@SNAPSHOT or - for nothing; the newest snapshot when left out
    #[arg(value_name = "FROM", allow_hyphen_values = true)]
    from: Option<String>,
}

impl Estimate {
    pub(super) fn ask(self) -> Ask {
        Ask::question(Request::Estimate { disk: self.disk, from: self.from })
    }
}

/// Compare the data of two states with what diff says of them
///
/// Reads both whole. Exits with 5 if a byte differs that the diff does not tell of.
#[derive(Debug, Args)]
pub(super) struct Verify {
    /// The two states, both with their data
    #[arg(long, num_args = 2, value_names = ["FROM", "TO"], allow_hyphen_values = true, required = true)]
    diff: Vec<String>,
}

impl Verify {
    pub(super) fn ask(self) -> Ask {
        let mut sides = self.diff.into_iter();
        let mut next = || sides.next().unwrap_or_default();
        Ask::question(Request::VerifyDiff { from: next(), to: next() }).in_bytes()
    }
}

/// Bring back the record of a retired snapshot
#[derive(Debug, Args)]
pub(super) struct Record {
    #[command(subcommand)]
    what: RecordCommand,
}

#[derive(Debug, Subcommand)]
enum RecordCommand {
    /// Put a copy of a record in the place of one that the pool has lost
    Import {
        /// The copy: a file that was in retired/ of the pool or of the mount
        file: PathBuf,
    },
}

impl Record {
    pub(super) fn ask(self) -> Result<Ask> {
        let RecordCommand::Import { file } = self.what;
        let path = std::fs::canonicalize(&file).map_err(|e| Error::io(format!("cannot open {}", file.display()), e))?;
        let path = path.to_str().ok_or_else(|| Error::usage("the path of the record is not UTF-8"))?.to_owned();
        Ok(Ask::change(Request::RecordImport { path }))
    }
}

/// Returns a diff for people.
pub(super) fn show_diff(diff: &answer::Diff, style: Style) -> String {
    let mut text = String::new();
    if let Some(extents) = diff.extents.as_ref().filter(|list| style == Style::Full && !list.is_empty()) {
        let mut table = Table::new(&[Head::Right("OFFSET"), Head::Right("LENGTH"), Head::Left("NOW")]);
        for extent in extents {
            let now = if extent.zero { "zeros" } else { "data" };
            table.row([extent.offset.to_string(), extent.length.to_string(), now.to_owned()]);
        }
        text = table.render();
    }
    text + &format!(
        "{} -> {}: {} of data and {} of zeros in {}\n",
        diff.from,
        diff.to,
        show_size(diff.data),
        show_size(diff.zero),
        super::show::count(diff.count, "extent")
    )
}

/// Returns an estimate for people.
pub(super) fn show_estimate(diff: &answer::Diff) -> String {
    format!(
        "{} since {}: {} of data ({} bytes), {} of zeros\n",
        diff.to,
        if diff.from == "-" { "ever" } else { &diff.from },
        show_size(diff.data),
        diff.data,
        show_size(diff.zero)
    )
}

/// Returns what a comparison found.
pub(super) fn show_verified(verified: &answer::Verified) -> String {
    let report = &verified.report;
    let sum = format!(
        "{} -> {}: compared {}; the diff tells of {}, {} of it the same on both sides",
        verified.from,
        verified.to,
        show_size(report.compared),
        show_size(report.told),
        show_size(report.same)
    );
    match report.first_wrong {
        None => sum + "; sound\n",
        Some(at) => format!(
            "{sum}\nWRONG: {} bytes differ and are not told, {} are called zeros and are not; the first at byte {at}\n",
            report.missed, report.not_zero
        ),
    }
}
