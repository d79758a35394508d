//! Streams in and out: their bytes go through a pipe or file that the request names, not through the socket.
//!
//! The command line makes a pipe and names its own end of it (`/proc/PID/fd/N`), so the same request serves a server and a
//! process that opened the pool itself, and the bytes are copied by nobody in between. A program with other means names a
//! file or a named pipe.
//!
//! # Rules
//! 1. A file that has something in it is not overwritten.
//! 2. Who goes away closes its end: the stream breaks off, and nothing half-received is ever shown.

use std::fs::{File, OpenOptions};
use std::io::{self, BufReader, BufWriter, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;

use super::{Request, Response, Target};
use crate::error::{Error, Result};
use crate::progress::Progress;
use crate::store::Store;
use crate::stream::{self, ReceiveOptions, SendOptions, Token, What};

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
            let mut input = BufReader::with_capacity(BUFFER, open_input(&input)?);
            Ok(Response::Received(stream::receive(store, &options, &mut input, progress)?.into()))
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
    let file = open_output(output)?;
    let mut out = BufWriter::with_capacity(BUFFER, &file);
    let report = stream::send(store, options, &mut out, progress)?;
    let fail = |e| Error::io(format!("cannot write {output}"), e);
    out.flush().map_err(fail)?;
    drop(out);
    if file.metadata().is_ok_and(|meta| meta.is_file()) {
        file.sync_all().map_err(fail)?;
    }
    Ok(Response::Sent(report.into()))
}

fn absolute(path: &str) -> Result<&Path> {
    let path = Path::new(path);
    if path.is_absolute() {
        return Ok(path);
    }
    Err(Error::usage(format!("the path '{}' is not absolute", path.display()))
        .hint("the server has a working directory of its own: give the whole path"))
}

fn open_input(path: &str) -> Result<File> {
    let cannot = |e| Error::io(format!("cannot open the stream {path}"), e);
    OpenOptions::new().read(true).custom_flags(libc::O_NOCTTY).open(absolute(path)?).map_err(cannot)
}

fn open_output(path: &str) -> Result<File> {
    let cannot = |e| Error::io(format!("cannot open {path} for the stream"), e);
    let place = absolute(path)?;
    match OpenOptions::new().write(true).custom_flags(libc::O_NOCTTY).open(place) {
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
