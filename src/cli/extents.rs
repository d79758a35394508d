//! The extents of a diff, however many there are: they come through a pipe, a line each, and are printed as they come.
//!
//! # Rules
//! 1. Few of them are printed as any other answer, in columns as wide as they have to be.
//! 2. More than [`HELD_MAX`] are printed at once and never kept: text in columns that fit any disk, JSON as one object in
//!    which the list comes before the sums.
//! 3. A reader of stdout that has gone has what it wanted: the rest is not asked for.

use std::io::{self, BufRead, BufReader, BufWriter, PipeReader, Write};

use super::changes::show_diff;
use super::screen::Screen;
use super::show::Style;
use super::streams::{make_pipe, path_of};
use super::{Ask, Global, answer};
use crate::api::{Request, Response, answer};
use crate::error::{Error, Kind, Result};
use crate::snapshot::diff::Extent;

/// Extents that are kept until it is known how many there are.
const HELD_MAX: usize = 4096;
/// Digits of the largest offset, and of the largest length.
const WIDTH: usize = 14;

/// Asks for a diff with its extents, and prints it.
pub(super) fn run(global: &Global, screen: &Screen, from: String, to: String) -> Result<u8> {
    let (reader, writer) = make_pipe()?;
    let request = Request::Diff { from, to, summary: false, output: Some(path_of(&writer)) };
    let json = global.json;
    let printer = std::thread::Builder::new()
        .name("extents".into())
        .spawn(move || Printer::new(json).take_all(reader))
        .map_err(|e| Error::io("cannot start a thread", e))?;
    let response = answer(global, screen, Ask::question(request));
    // Our end: the other one is closed by now, so this is the end of the pipe.
    drop(writer);
    let printed = printer.join().unwrap_or_else(|_| Err(Error::failed("the thread that prints extents ended")));
    let printer = match printed {
        Ok(printer) => printer,
        Err(error) if is_gone(&error) => return Ok(0),
        Err(error) => return Err(error),
    };
    let Response::Diff(diff) = response? else { return Err(Error::failed("the server answered something else")) };
    match printer.finish(screen, diff) {
        Err(error) if is_gone(&error) => Ok(0),
        other => other.map(|()| 0),
    }
}

/// Tells whether nobody reads stdout any more.
fn is_gone(error: &Error) -> bool {
    let cause = std::error::Error::source(error).and_then(|cause| cause.downcast_ref::<io::Error>());
    error.kind() == Kind::Io && cause.is_some_and(|cause| cause.kind() == io::ErrorKind::BrokenPipe)
}

fn cannot_print(error: io::Error) -> Error {
    Error::io("cannot write the extents to stdout", error)
}

struct Printer {
    json: bool,
    /// The first ones, until there are too many to keep.
    held: Vec<Extent>,
    /// How many were printed.
    printed: u64,
    out: BufWriter<io::Stdout>,
}

impl Printer {
    fn new(json: bool) -> Self {
        Self { json, held: Vec::new(), printed: 0, out: BufWriter::with_capacity(64 << 10, io::stdout()) }
    }

    fn take_all(mut self, from: PipeReader) -> Result<Self> {
        let mut lines = BufReader::with_capacity(64 << 10, from);
        let mut line = String::new();
        while lines.read_line(&mut line).map_err(|e| Error::io("cannot read the extents", e))? > 0 {
            // A line that was cut off is the end of a diff that failed: the answer says why.
            let Ok(extent) = serde_json::from_str::<Extent>(&line) else { break };
            line.clear();
            if self.printed == 0 && self.held.len() < HELD_MAX {
                self.held.push(extent);
                continue;
            }
            for held in std::mem::take(&mut self.held) {
                self.print(&held).map_err(cannot_print)?;
            }
            self.print(&extent).map_err(cannot_print)?;
        }
        Ok(self)
    }

    fn print(&mut self, extent: &Extent) -> io::Result<()> {
        let first = self.printed == 0;
        self.printed += 1;
        if self.json {
            self.out.write_all(if first { b"{\"answer\":\"diff\",\"extents\":[" } else { b"," })?;
            return Ok(serde_json::to_writer(&mut self.out, extent)?);
        }
        if first {
            writeln!(self.out, "{:>WIDTH$}  {:>WIDTH$}  NOW", "OFFSET", "LENGTH")?;
        }
        let now = if extent.zero { "zeros" } else { "data" };
        writeln!(self.out, "{:>WIDTH$}  {:>WIDTH$}  {now}", extent.offset, extent.length)
    }

    fn finish(mut self, screen: &Screen, diff: answer::Diff) -> Result<()> {
        let seen = self.printed + self.held.len() as u64;
        if seen != diff.count {
            let what = format!("the diff has {} extents, and {seen} of them came through", diff.count);
            return Err(Error::failed(what));
        }
        if self.printed == 0 {
            let diff = answer::Diff { extents: Some(self.held), ..diff };
            screen.answer(&Response::Diff(diff), Style::Full);
            return Ok(());
        }
        let end = if self.json { end_of_json(diff) } else { show_diff(&diff, Style::Brief) };
        self.out.write_all(end.as_bytes()).and_then(|()| self.out.flush()).map_err(cannot_print)
    }
}

/// Returns what follows the last extent.
fn end_of_json(diff: answer::Diff) -> String {
    let mut rest = serde_json::to_value(Response::Diff(diff)).expect("answers hold nothing JSON cannot say");
    if let Some(fields) = rest.as_object_mut() {
        fields.remove("answer");
        fields.remove("extents");
    }
    let rest = rest.to_string();
    format!("],{}\n", rest.strip_prefix('{').unwrap_or(&rest))
}
