//! Streams in and out, and long lists of extents: they go through a pipe or file that the request names, not through the
//! socket.
//!
//! The command line names its stdout, or its end of a pipe that it makes (`/proc/PID/fd/N`), so the same request serves a
//! server and a process that opened the pool itself, and the bytes are copied by nobody in between. A program with other
//! means names a file or a named pipe.
//!
//! # Rules
//! 1. A file that has something in it is not overwritten.
//! 2. Who goes away closes its end: the stream breaks off, and nothing half-received is ever shown.
//! 3. Who asked may go away while somebody else holds the other end and neither reads nor writes: so nothing is waited for
//!    at a pipe, be it room, bytes or the other end itself, any longer than the answer is waited for.

use std::fs::{File, OpenOptions};
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::name::absolute;
use super::{Request, Response, Target};
use crate::clock;
use crate::error::{Error, Result};
use crate::progress::Progress;
use crate::store::Store;
use crate::stream::{self, ReceiveOptions, SendOptions, Token, What};

/// How long something is waited for before it is looked whether anybody still wants it.
const PATIENCE: Duration = Duration::from_millis(100);
/// Small records are gathered up to this.
const BUFFER: usize = 256 << 10;

/// Answers a request about streams.
pub(super) fn execute(store: &Arc<Store>, request: Request, progress: &dyn Progress) -> Result<Response> {
    match request {
        Request::Send { snapshot, from, resume, no_compress, output } => {
            let what = what(snapshot.as_deref(), from.as_deref(), resume.as_deref())?;
            send(store, &SendOptions { what, compress: !no_compress }, &output, progress)
        }
        Request::Receive { disk, name, force, input } => {
            let options = ReceiveOptions { disk: Target::disk(&disk)?, force, name };
            let file = open_input(&input)?;
            let mut input = BufReader::with_capacity(BUFFER, Input { file: &file, progress });
            Ok(Response::Received(stream::receive(store, &options, &mut input, progress)?))
        }
        Request::ReceiveToken { disk } => {
            let token = stream::token(store, &Target::disk(&disk)?)?;
            Ok(Response::Token { token: token.to_string(), offset: token.offset })
        }
        Request::ReceiveAbort { disk } => {
            let disk = Target::disk(&disk)?;
            stream::abort(store, &disk)?;
            Ok(Response::Aborted { disk })
        }
        _ => Err(Error::failed("this request is about no stream")),
    }
}

fn what(snapshot: Option<&str>, from: Option<&str>, resume: Option<&str>) -> Result<What> {
    match (snapshot, from, resume) {
        (None, None, Some(token)) => Ok(What::Rest(Token::parse(token)?)),
        (_, _, Some(_)) => Err(Error::usage("a token says itself which snapshots the stream is of")
            .hint("give either the token or the snapshots")),
        (None, _, None) => Err(Error::usage("no snapshot to send is named")
            .hint("name it as DISK@SNAPSHOT, or give the token of a stream")),
        (Some(to), from, None) => {
            let from = from.filter(|from| *from != "-").map(Target::snapshot).transpose()?;
            Ok(What::States { from, to: Target::snapshot(to)? })
        }
    }
}

fn send(store: &Arc<Store>, options: &SendOptions, output: &str, progress: &dyn Progress) -> Result<Response> {
    let report = write_out(output, progress, |out| stream::send(store, options, out, progress))?;
    Ok(Response::Sent(report))
}

/// Opens `output` as a stream is written to, lets `write` write into it, and sees that it arrives.
pub(super) fn write_out<T>(
    output: &str,
    progress: &dyn Progress,
    write: impl FnOnce(&mut dyn Write) -> Result<T>,
) -> Result<T> {
    let file = open_output(output, progress)?;
    let mut out = BufWriter::with_capacity(BUFFER, Output { file: &file, progress });
    let done = write(&mut out)?;
    let fail = |e| Error::io(format!("cannot write {output}"), e);
    out.flush().map_err(fail)?;
    drop(out);
    if file.metadata().is_ok_and(|meta| meta.is_file()) {
        file.sync_all().map_err(fail)?;
    }
    Ok(done)
}

fn open_input(path: &str) -> Result<File> {
    let cannot = |e| Error::io(format!("cannot open the stream {path}"), e);
    // Else a named pipe would be waited for until somebody writes into it.
    let flags = libc::O_NOCTTY | libc::O_NONBLOCK;
    OpenOptions::new().read(true).custom_flags(flags).open(absolute(path)?).map_err(cannot)
}

/// Waits a moment until there are bytes or room; tells whether there are.
fn is_ready(file: &File, flags: PollFlags) -> io::Result<bool> {
    let patience = Timespec::try_from(PATIENCE).expect("it is short");
    Ok(poll(&mut [PollFd::new(file, flags)], Some(&patience))? > 0)
}

/// Where a stream comes from; opened so that a read never waits.
struct Input<'a> {
    file: &'a File,
    progress: &'a dyn Progress,
}

impl Read for Input<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        loop {
            // Asked first: reading says of a pipe into which nobody writes yet that this is its end.
            if is_ready(self.file, PollFlags::IN)? {
                match self.file.read(buf) {
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    done => return done,
                }
            }
            if self.progress.cancelled() {
                return Err(io::Error::new(io::ErrorKind::TimedOut, "nobody waits for it any longer"));
            }
        }
    }
}

/// Where a stream goes; opened so that a write never waits.
struct Output<'a> {
    file: &'a File,
    progress: &'a dyn Progress,
}

impl Write for Output<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            match self.file.write(bytes) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock && !self.progress.cancelled() => {
                    is_ready(self.file, PollFlags::OUT)?;
                }
                done => return done,
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

fn open_output(path: &str, progress: &dyn Progress) -> Result<File> {
    let cannot = |e| Error::io(format!("cannot open {path} for the stream"), e);
    let place = absolute(path)?;
    let open = || OpenOptions::new().write(true).custom_flags(libc::O_NOCTTY | libc::O_NONBLOCK).open(place);
    let mut opened = open();
    let nobody_reads = |opened: &io::Result<File>| {
        opened.as_ref().is_err_and(|error| error.raw_os_error() == Some(libc::ENXIO)) && may_be_opened_later(place)
    };
    while nobody_reads(&opened) && !progress.cancelled() {
        clock::sleep(PATIENCE);
        opened = open();
    }
    match opened {
        Ok(file) => {
            let meta = file.metadata().map_err(cannot)?;
            if meta.is_file() && meta.len() > 0 {
                return Err(Error::exists(format!("{path} is there already, and has something in it"))
                    .hint("name a file that is not there yet"));
            }
            Ok(file)
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            OpenOptions::new().write(true).create_new(true).mode(0o600).open(place).map_err(cannot)
        }
        Err(error) => Err(cannot(error)),
    }
}

/// Tells whether somebody may come to read what cannot be opened for writing now: it is a named pipe (a socket says the same
/// and stays so), and not one that whoever asks has open already, of which the reader is gone.
fn may_be_opened_later(place: &Path) -> bool {
    !place.starts_with("/proc") && std::fs::metadata(place).is_ok_and(|meta| meta.file_type().is_fifo())
}
