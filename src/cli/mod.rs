//! The command line: turns words into requests, and answers into words.
//!
//! Most commands are one [`Request`]: their file holds the arguments and how they become it. The others (`init`, `mount`,
//! `umount`, `serve`, `doctor`, `completions`, `man`) do their work here, because they concern this process or this host.
//!
//! # Rules
//! 1. clap, printing and the environment stay in this folder; nothing below it knows that there is a terminal.
//! 2. Results go to stdout, everything else to stderr. A reader of stdout that goes away ends the command quietly.
//! 3. Names and sizes are checked where the request is answered, so a program on the socket gets the same refusal.
//! 4. Every failure is told as what failed, on what, why, and what to do next; its kind decides the exit code.
//!
//! Pages: `man/`, generated from these types; a test holds them current.

mod bar;
mod changes;
mod checkpoint;
mod daemon;
mod disks;
mod doctor;
mod export;
mod exports;
mod extents;
mod host;
mod init;
mod log;
mod mount;
mod new_dirs;
mod pages;
mod prompt;
mod screen;
mod server;
mod show;
mod signal;
mod snapshots;
mod streams;
mod table;
mod uffd;
mod umount;
mod upkeep;
mod vm;
mod vm_checkpoint;
mod vm_disks;
mod vm_parts;
mod vm_steward;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{ArgAction, Args, CommandFactory, Parser, Subcommand};

use crate::api::{Request, Response, Way};
use crate::error::{Error, Result};
use bar::{Bar, Units};
use screen::Screen;
use show::Style;

/// Environment variable that names the pool.
const POOL_VARIABLE: &str = "AFTERIMAGE_POOL";

/// Virtual disks whose snapshots can retire
///
/// Afterimage keeps virtual disks and their snapshots in a pool, which is a directory, and shows them as plain files.
/// With a server running on the pool (see afterimage-mount(1)) commands ask it; without one they open the pool
/// themselves. DISK@SNAPSHOT names a snapshot. Sizes take K, M, G and T (binary).
#[derive(Debug, Parser)]
#[command(name = "afterimage", version, max_term_width = 100, disable_help_subcommand = true)]
#[command(after_help = "Exit codes: 0 done, 1 refused or failed, 2 usage, 3 not found, 4 busy or locked, 5 corrupt, \
                        6 out of space, 7 a guest was ended as by a power cut (vm run, start, restore).\nSee afterimage-pool(7) for the concepts.")]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

/// Options of every command.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Options of every command")]
struct Global {
    /// The pool directory
    #[arg(long, value_name = "DIR", global = true, env = POOL_VARIABLE, hide_env_values = true)]
    pool: Option<PathBuf>,
    /// Print the answer as one line of JSON, see afterimage-api(5)
    #[arg(long, global = true)]
    json: bool,
    /// Print nothing but what was asked for: no confirmations, no progress
    #[arg(short, long, global = true)]
    quiet: bool,
    /// Log more to stderr; twice for even more
    #[arg(short, long, global = true, action = ArgAction::Count, conflicts_with = "quiet")]
    verbose: u8,
}

impl Global {
    /// Returns the directory of the pool that was named.
    fn pool(&self) -> Result<&PathBuf> {
        self.pool.as_ref().ok_or_else(|| {
            Error::usage("no pool is named").hint(format!("give --pool DIR, or set {POOL_VARIABLE} to the directory"))
        })
    }
}

#[derive(Debug, Subcommand)]
enum Command {
    Init(init::Init),
    Mount(mount::Mount),
    Umount(umount::Umount),
    Serve(exports::Serve),
    Attach(exports::Attach),
    Detach(exports::Detach),
    Exports(exports::Exports),
    Create(disks::Create),
    Import(disks::Import),
    Resize(disks::Resize),
    Ls(disks::Ls),
    Info(disks::Info),
    Rename(disks::Rename),
    Rm(disks::Rm),
    Snapshot(snapshots::Snapshot),
    Clone(snapshots::Clone),
    Revert(snapshots::Revert),
    Retire(changes::Retire),
    Diff(changes::Diff),
    Estimate(changes::Estimate),
    Verify(changes::Verify),
    Record(changes::Record),
    Hold(snapshots::Hold),
    Release(snapshots::Release),
    Prune(snapshots::Prune),
    Export(export::Export),
    Send(streams::Send),
    Receive(streams::Receive),
    Set(disks::Set),
    Get(disks::Get),
    Check(upkeep::Check),
    Scrub(upkeep::Scrub),
    Reclaim(upkeep::Reclaim),
    Metrics(upkeep::Metrics),
    Checkpoint(checkpoint::Checkpoint),
    Vm(vm::Vm),
    Doctor(doctor::Doctor),
    Completions(pages::Completions),
    Man(pages::Man),
}

/// What a command wants to be asked, and how its answer is to look.
struct Ask {
    request: Request,
    style: Style,
    units: Units,
}

impl Ask {
    /// A change, answered with one line.
    fn change(request: Request) -> Self {
        Self { request, style: Style::Brief, units: Units::Items }
    }

    /// A question, answered in full.
    fn question(request: Request) -> Self {
        Self { request, style: Style::Full, units: Units::Items }
    }

    /// Says that its progress counts bytes.
    fn in_bytes(mut self) -> Self {
        self.units = Units::Bytes;
        self
    }
}

/// Runs the command line and returns the exit code.
#[must_use]
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version go to stdout, and a reader that has gone has what it wanted.
            error.print().ok();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
        }
    };
    log::begin(&cli.global);
    let screen = Screen::new(cli.global.json, cli.global.quiet);
    match run(cli.command, &cli.global, &screen) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            let error = match &cli.global.pool {
                Some(pool) => host::explain(error, pool),
                None => error,
            };
            screen.error(&error, cli.global.verbose > 0);
            ExitCode::from(error.kind().exit_code())
        }
    }
}

/// Returns the whole command line as clap sees it, for the man pages, the completions and the tests of both.
#[must_use]
pub fn command() -> clap::Command {
    Cli::command()
}

/// Returns the man pages by file name, the generated and the hand-written ones.
#[must_use]
pub fn man_pages() -> Vec<(String, Vec<u8>)> {
    pages::all()
}

/// Parses a command line as far as clap goes; the error is the exit code clap would give.
///
/// # Errors
/// The exit code, when clap refuses it or answers it itself.
pub fn parse<I, T>(words: I) -> Result<(), i32>
where
    I: IntoIterator<Item = T>,
    T: Into<std::ffi::OsString> + Clone,
{
    Cli::try_parse_from(words).map(|_| ()).map_err(|error| error.exit_code())
}

fn run(command: Command, global: &Global, screen: &Screen) -> Result<u8> {
    match command {
        Command::Init(command) => command.run(global, screen),
        Command::Mount(command) => command.run(global, screen),
        Command::Umount(command) => command.run(screen),
        Command::Serve(command) => command.run(global, screen),
        Command::Attach(command) => ask(global, screen, command.ask()?),
        Command::Detach(command) => ask(global, screen, command.ask()),
        Command::Exports(command) => ask(global, screen, command.ask()),
        Command::Doctor(command) => command.run(global, screen),
        Command::Completions(command) => command.run(screen),
        Command::Man(command) => command.run(screen),
        Command::Get(command) => command.run(global, screen),
        Command::Vm(command) => command.run(global, screen),
        Command::Send(command) => command.run(global, screen),
        Command::Receive(command) => command.run(global, screen),
        Command::Create(command) => ask(global, screen, command.ask()?),
        Command::Import(command) => ask(global, screen, command.ask()?),
        Command::Resize(command) => ask(global, screen, command.ask()?),
        Command::Ls(command) => ask(global, screen, command.ask()),
        Command::Info(command) => ask(global, screen, command.ask()),
        Command::Rename(command) => ask(global, screen, command.ask()),
        Command::Rm(command) => ask(global, screen, command.ask()),
        Command::Snapshot(command) => ask(global, screen, command.ask()),
        Command::Clone(command) => ask(global, screen, command.ask()),
        Command::Revert(command) => ask(global, screen, command.ask()),
        Command::Retire(command) => ask(global, screen, command.ask()),
        Command::Diff(command) => command.run(global, screen),
        Command::Estimate(command) => ask(global, screen, command.ask()),
        Command::Verify(command) => ask(global, screen, command.ask()),
        Command::Record(command) => ask(global, screen, command.ask()?),
        Command::Hold(command) => ask(global, screen, command.ask()),
        Command::Release(command) => ask(global, screen, command.ask()),
        Command::Prune(command) => ask(global, screen, command.ask()),
        Command::Export(command) => ask(global, screen, command.ask()?),
        Command::Set(command) => ask(global, screen, command.ask()?),
        Command::Check(command) if command.rebuilds() => rebuild(global, screen),
        Command::Check(command) => ask(global, screen, command.ask()),
        Command::Scrub(command) => ask(global, screen, command.ask()),
        Command::Reclaim(command) => ask(global, screen, command.ask()),
        Command::Metrics(command) => ask(global, screen, command.ask()),
        Command::Checkpoint(command) => command.run(global, screen),
    }
}

/// Asks the pool and prints the answer; returns the exit code.
fn ask(global: &Global, screen: &Screen, ask: Ask) -> Result<u8> {
    let style = ask.style;
    let response = answer(global, screen, ask)?;
    let code = verdict(&response);
    // What failed is told, however quiet it was asked to be.
    screen.answer(&response, if code == 0 { style } else { Style::Full });
    Ok(code)
}

/// Asks the pool, in whichever way there is.
fn answer(global: &Global, screen: &Screen, ask: Ask) -> Result<Response> {
    let mut way = Way::find(global.pool()?)?;
    let bar = Bar::new(ask.units, screen.shows_progress());
    bar.stop_on_signals(*screen)?;
    let response = way.ask(ask.request, &bar);
    bar.finish();
    let closed = way.close();
    let response = response?;
    closed?;
    Ok(response)
}

/// Makes the catalog again: the one thing that is done to a pool without opening it.
fn rebuild(global: &Global, screen: &Screen) -> Result<u8> {
    let bar = Bar::new(Units::Items, screen.shows_progress());
    let response = crate::api::rebuild(global.pool()?, &bar);
    bar.finish();
    screen.answer(&response?, Style::Full);
    Ok(0)
}

/// An answer that says "this pool is damaged" or "some of it failed" is no success.
fn verdict(response: &Response) -> u8 {
    if let Response::Pruned { snapshots, .. } = response {
        let failed = snapshots.iter().any(|snapshot| snapshot.error.is_some());
        return if failed { crate::error::Kind::Failed.exit_code() } else { 0 };
    }
    let sound = match response {
        Response::Checked(report) => report.open() == 0,
        Response::Scrubbed(report) => report.damaged.is_empty(),
        Response::Verified(verified) => verified.report.first_wrong.is_none(),
        Response::CheckpointVerified(report) => report.is_sound(),
        _ => true,
    };
    if sound { 0 } else { crate::error::Kind::Corrupt.exit_code() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{CheckReport, LISTED_MAX};

    /// A check that mended a thousand leaks said "sound" while what came after them was not mended.
    #[test]
    fn one_fault_that_is_not_mended_behind_a_thousand_that_are_is_told() {
        let mut report = CheckReport::default();
        for n in 0..LISTED_MAX + 5 {
            report.add(format!("leak {n}"), true);
        }
        assert_eq!(verdict(&Response::Checked(report.clone())), 0);
        let text = show::show(&Response::Checked(report.clone()), Style::Full);
        assert!(text.contains("\nand 5 more\n") && text.ends_with("; sound\n"), "{text}");

        report.wrong("the index lacks chunk 7".to_owned());
        report.add("one more leak".to_owned(), true);
        assert_eq!(report.problems.len(), LISTED_MAX);
        assert_eq!((report.found, report.unmended, report.more()), (LISTED_MAX as u64 + 7, 1, 7));
        let text = show::show(&Response::Checked(report.clone()), Style::Full);
        assert!(text.contains("problem: the index lacks chunk 7\n") && text.contains("\nand 7 more\n"), "{text}");
        assert!(text.ends_with("; 1 problem\n"), "{text}");
        assert_eq!(verdict(&Response::Checked(report.clone())), crate::error::Kind::Corrupt.exit_code());

        // What an older server says has no counts.
        report.unmended = 0;
        assert_ne!(verdict(&Response::Checked(report.clone())), 0);
        // No more than is listed, also when nothing of it is mended.
        (0..LISTED_MAX * 2).for_each(|n| report.wrong(format!("fault {n}")));
        assert!(report.problems.len() == LISTED_MAX && report.problems.iter().all(|problem| !problem.fixed));
    }

    #[test]
    fn a_snapshot_that_could_not_be_pruned_is_told_of_and_fails_the_command() {
        let line = |name: &str, error: Option<&str>| crate::api::answer::Pruned {
            name: name.into(),
            kept: error.is_some(),
            why: "no rule keeps it".into(),
            error: error.map(Into::into),
        };
        let all_gone = Response::Pruned { dry_run: false, snapshots: vec![line("a", None)] };
        assert_eq!(verdict(&all_gone), 0);
        let one_stays =
            Response::Pruned { dry_run: false, snapshots: vec![line("a", Some("it is held")), line("b", None)] };
        assert_eq!(verdict(&one_stays), 1);
        let text = show::show(&one_stays, Style::Full);
        assert!(text.contains("not removed  it is held") && text.contains("removed      no rule"), "{text}");
    }
}
