//! `send` and `receive`: streams on stdout and stdin.
//!
//! A stream goes straight into stdout where that is a pipe or a device: whoever answers opens it by its path below /proc. Else
//! it goes through a pipe of this process, as what is received does, and a thread moves the bytes between that pipe and stdin
//! or stdout; the kernel does the moving, no byte is copied here.

use std::fs::{File, OpenOptions};
use std::io::{self, BufReader, IsTerminal, PipeReader, PipeWriter};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::thread::JoinHandle;

use clap::Args;
use rustix::fs::FileType;

use super::bar::{Bar, Units};
use super::screen::Screen;
use super::{Ask, Global, answer};
use crate::api::{Request, Response};
use crate::error::{Error, Result};
use crate::stream::{self, FileOptions, FileReport};
use crate::sys::pipe;
use crate::units::show_size;

/// Bytes in the pipe.
const PIPE_SIZE: usize = 1 << 20;

/// Write a snapshot, or the changes between two, to stdout
///
/// The stream goes to a file or through a pipe to 'afterimage receive'. Without --from it has the whole disk. What was sent is
/// told on stderr.
#[derive(Debug, Args)]
pub(super) struct Send {
    /// The snapshot the stream leads to, as DISK@SNAPSHOT
    #[arg(required_unless_present = "resume")]
    snapshot: Option<String>,
    /// The snapshot it starts from, live or retired, as DISK@SNAPSHOT; '-' is nothing
    #[arg(long, value_name = "DISK@OLD")]
    from: Option<String>,
    /// Go on where a stream was cut off; the receiver prints the token
    #[arg(long, value_name = "TOKEN", conflicts_with_all = ["snapshot", "from"])]
    resume: Option<String>,
    /// Leave everything uncompressed
    #[arg(long)]
    no_compress: bool,
}

impl Send {
    pub(super) fn run(self, global: &Global, screen: &Screen) -> Result<u8> {
        if io::stdout().is_terminal() {
            return Err(Error::usage("a stream is nothing for a terminal")
                .hint("send it to a file ('> FILE') or to a command ('| ssh HOST afterimage receive DISK')"));
        }
        let Self { snapshot, from, resume, no_compress } = self;
        let ask = |output| Ask::change(Request::Send { snapshot, from, resume, no_compress, output }).in_bytes();
        let stdout = io::stdout();
        if can_be_opened(&stdout) {
            pipe::widen(&stdout, PIPE_SIZE).ok();
            let response = answer(global, screen, ask(path_of(&stdout)))?;
            screen.aside(&response);
            return Ok(0);
        }
        let (reader, writer) = make_pipe()?;
        let stdout = stdout.as_fd().try_clone_to_owned().map_err(|e| Error::io("cannot use stdout", e))?;
        let relay = relay(OwnedFd::from(reader), stdout)?;
        let response = answer(global, screen, ask(path_of(&writer)));
        // Our end: the other one is closed by now, so this is the end of the pipe.
        drop(writer);
        let relayed = relay.join().unwrap_or_else(|_| Err(io::Error::other("the thread that moves the bytes ended")));
        relayed.map_err(|e| Error::io("cannot write the stream to stdout", e))?;
        screen.aside(&response?);
        Ok(0)
    }
}

/// Make a stream from stdin the newest snapshot of a disk
///
/// All or nothing: the disk changes when the stream has ended, and keeps everything it had. An increment goes only onto a disk
/// whose newest snapshot is its base and which was not written to since. With --file the stream goes into a raw file or a
/// block device instead, which change while it comes in. Where there is no room it ends, also for a disk whose writes wait then
/// (enospc=wait): what arrived is kept, and goes on with the token.
#[derive(Debug, Args)]
pub(super) struct Receive {
    /// The disk; made when it is not there and the stream is a full one
    #[arg(required_unless_present = "file")]
    disk: Option<String>,
    /// Replace what the disk is and keep it as a snapshot; with --file, overwrite what is there
    #[arg(short, long)]
    force: bool,
    /// Name of the snapshot, if not the one the sender has
    #[arg(long = "as", value_name = "NAME", conflicts_with = "file")]
    name: Option<String>,
    /// Receive into a raw file or a block device
    #[arg(long, value_name = "PATH", conflicts_with = "disk")]
    file: Option<PathBuf>,
    /// Where --file notes what is in the file; beside it when left out
    #[arg(long, value_name = "DIR", requires = "file")]
    state: Option<PathBuf>,
    /// Receive nothing; print the token with which an interrupted stream goes on
    #[arg(long, conflicts_with_all = ["force", "name", "abort"])]
    token: bool,
    /// Receive nothing; drop what arrived of an interrupted stream
    #[arg(long, conflicts_with_all = ["force", "name", "file"])]
    abort: bool,
}

impl Receive {
    pub(super) fn run(self, global: &Global, screen: &Screen) -> Result<u8> {
        let Self { disk, force, name, file, state, token, abort } = self;
        if let Some(path) = file {
            return into_file(&FileOptions { path, state, force }, token, screen);
        }
        let disk = disk.ok_or_else(|| Error::usage("no disk is named"))?;
        let request = match (token, abort) {
            (true, _) => Request::ReceiveToken { disk },
            (_, true) => Request::ReceiveAbort { disk },
            _ => {
                let (reader, writer) = make_pipe()?;
                refuse_terminal()?;
                let stdin = io::stdin().as_fd().try_clone_to_owned().map_err(|e| Error::io("cannot use stdin", e))?;
                // Not waited for: when the stream is refused it may never end.
                drop(relay(stdin, OwnedFd::from(writer))?);
                let input = path_of(&reader);
                let request = Request::Receive { disk, name, force, input };
                let response = answer(global, screen, Ask::change(request).in_bytes())?;
                drop(reader);
                screen.answer(&response, super::Style::Brief);
                return Ok(0);
            }
        };
        super::ask(global, screen, Ask::change(request))
    }
}

fn into_file(options: &FileOptions, token: bool, screen: &Screen) -> Result<u8> {
    if token {
        let token = stream::file_token(options)?;
        let response = Response::Token { token: token.to_string(), offset: token.offset };
        screen.answer(&response, super::Style::Full);
        return Ok(0);
    }
    refuse_terminal()?;
    let bar = Bar::new(Units::Bytes, screen.shows_progress());
    bar.stop_on_signals(*screen)?;
    let mut input = BufReader::with_capacity(PIPE_SIZE / 4, io::stdin().lock());
    let report = stream::receive_file(options, &mut input, &bar);
    bar.finish();
    let FileReport { snapshot, uuid, base, start, data, zeros } = report?;
    let path = options.path.display().to_string();
    let text =
        format!("received {snapshot} into {path}: {} of data and {} of zeros\n", show_size(data), show_size(zeros));
    let value = serde_json::json!({
        "answer": "received-file", "file": path, "snapshot": snapshot, "uuid": uuid, "base": base,
        "start": start, "data": data, "zeros": zeros,
    });
    screen.confirm(&value, &text);
    Ok(0)
}

fn refuse_terminal() -> Result<()> {
    if io::stdin().is_terminal() {
        return Err(Error::usage("a stream does not come from a terminal")
            .hint("give it one: '< FILE', or 'afterimage send DISK@SNAPSHOT | afterimage receive DISK'"));
    }
    if rustix::fs::fstat(io::stdin()).is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Directory) {
        return Err(Error::failed("stdin is a directory, and a stream is a file").hint("give it the file: '< FILE'"));
    }
    Ok(())
}

pub(super) fn make_pipe() -> Result<(PipeReader, PipeWriter)> {
    let (reader, writer) = io::pipe().map_err(|e| Error::io("cannot make a pipe", e))?;
    // A smaller one serves as well, if more slowly.
    pipe::widen(&writer, PIPE_SIZE).ok();
    Ok((reader, writer))
}

/// Tells whether a process of this user can open stdout by its path and write the same as this one would: it is a pipe or a
/// device. A file has a position, which opening does not give; a socket cannot be opened, and not a pipe of another user.
fn can_be_opened(stdout: &io::Stdout) -> bool {
    let Ok(stat) = rustix::fs::fstat(stdout) else { return false };
    let kind = FileType::from_raw_mode(stat.st_mode);
    let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
    matches!(kind, FileType::Fifo | FileType::CharacterDevice)
        && OpenOptions::new().write(true).custom_flags(flags).open(path_of(stdout)).is_ok()
}

/// Returns the path under which a process of this user opens the same end of a pipe.
pub(super) fn path_of(end: &impl AsRawFd) -> String {
    format!("/proc/{}/fd/{}", std::process::id(), end.as_raw_fd())
}

/// Moves bytes until their end.
fn relay(from: OwnedFd, to: OwnedFd) -> Result<JoinHandle<io::Result<()>>> {
    let (mut from, mut to) = (File::from(from), File::from(to));
    let work = move || io::copy(&mut from, &mut to).map(drop);
    std::thread::Builder::new().name("relay".into()).spawn(work).map_err(|e| Error::io("cannot start a thread", e))
}
