//! Images that only qemu can read, through `qemu-img`.
//!
//! # Rules
//! 1. qemu is given a whole description of the image: the driver, no backing file, and a descriptor of this process by its
//!    `/proc` path. It never guesses a format and never resolves a name from the image.
//! 2. The map is read as a stream while the child makes it. Content comes one window at a time: a `raw` node that shows
//!    a part of the disk, converted into anonymous memory, where holes stay holes.
//! 3. No child outlives its owner, and none gets a terminal.

use std::fs;
use std::io::{self, BufRead, BufReader, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::process::{Child, ChildStdout, Command, Output, Stdio};

use rustix::fs::MemfdFlags;
use serde::Deserialize;
use serde_json::{Value, json};

use super::source::{Image, Source, proc_path};
use crate::error::{Error, Kind, Result};

/// Bytes converted at once: enough to make the start of a process cheap.
const WINDOW: u64 = 32 << 20;
/// Bytes kept of what a child says on stderr.
const COMPLAINT_MAX: usize = 400;

/// An image behind `qemu-img`.
#[derive(Debug)]
pub(super) struct QemuImage {
    node: Value,
    size: u64,
    /// Length of the file, where the offsets in the map are those of one file.
    len: Option<u64>,
    map: Map,
    window: Window,
    /// The node names them by number.
    _files: Vec<fs::File>,
}

/// The part of the disk that is in memory.
#[derive(Debug)]
struct Window {
    memory: fs::File,
    start: u64,
    end: u64,
}

#[derive(Debug)]
struct Map {
    child: Child,
    lines: BufReader<ChildStdout>,
    complaints: fs::File,
    last: Extent,
}

#[derive(Debug, Default, Clone, Copy, Deserialize)]
struct Extent {
    start: u64,
    length: u64,
    zero: bool,
    data: bool,
    /// Where it is in the file, as it is.
    offset: Option<u64>,
}

#[derive(Deserialize)]
struct Info {
    #[serde(rename = "virtual-size")]
    virtual_size: u64,
}

/// Returns the node of a file.
pub(super) fn file_node(source: &Source) -> Value {
    let driver = if source.device { "host_device" } else { "file" };
    json!({ "driver": driver, "filename": source.proc_path(), "read-only": true })
}

/// Makes a file in memory.
pub(super) fn memory() -> Result<fs::File> {
    let fd = rustix::fs::memfd_create("afterimage-import", MemfdFlags::CLOEXEC)
        .map_err(|error| Error::io("cannot make a file in memory", error.into()))?;
    Ok(fd.into())
}

/// Has the metadata of an image checked.
pub(super) fn check(node: &Value) -> Result<()> {
    run(&["check", "--output=json", &image_name(node)]).map(drop)
}

impl QemuImage {
    /// Opens the image. `files` are those that the node names; `len` is the length of the one
    /// that has the data, if every byte of that must be there.
    pub(super) fn open(node: Value, files: Vec<fs::File>, len: Option<u64>) -> Result<Self> {
        let name = image_name(&node);
        let output = run(&["info", "--output=json", &name])?;
        let info: Info = serde_json::from_slice(&output.stdout).map_err(|error| not_understood(&error))?;
        let map = Map::start(&name)?;
        let window = Window { memory: memory()?, start: 0, end: 0 };
        Ok(Self { node, size: info.virtual_size, len, map, window, _files: files })
    }

    fn fill_window(&mut self, at: u64) -> Result<()> {
        let start = at / WINDOW * WINDOW;
        let end = self.size.min(start + WINDOW);
        self.window = Window { memory: memory()?, start, end };
        let part = json!({
            "driver": "raw", "offset": start, "size": end - start, "read-only": true, "file": self.node.clone()
        });
        run(&["convert", "-q", "-O", "raw", "-S", "4k", &image_name(&part), &proc_path(&self.window.memory)])?;
        let got = self.window.memory.metadata().map_err(|error| Error::io("cannot read memory", error))?.len();
        if got != end - start {
            return Err(Error::failed(format!("qemu-img gave {got} bytes for {start}..{end}")));
        }
        Ok(())
    }
}

impl Image for QemuImage {
    fn size(&self) -> u64 {
        self.size
    }

    fn extent(&mut self, at: u64) -> Result<(u64, bool)> {
        let extent = self.map.at(at)?;
        if let (Some(offset), Some(len)) = (extent.offset, self.len)
            && offset.saturating_add(extent.length) > len
        {
            return Err(Error::corrupt(format!("data from byte {offset} of the file is missing; it has {len} bytes"))
                .hint("copy the image again"));
        }
        Ok((extent.start.saturating_add(extent.length), extent.data && !extent.zero))
    }

    fn read(&mut self, buf: &mut [u8], at: u64) -> Result<()> {
        let mut done = 0;
        while done < buf.len() {
            let from = at + done as u64;
            if !(self.window.start..self.window.end).contains(&from) {
                self.fill_window(from)?;
            }
            let here = usize::try_from(self.window.end - from).expect("at most a window").min(buf.len() - done);
            self.window
                .memory
                .read_exact_at(&mut buf[done..done + here], from - self.window.start)
                .map_err(|error| Error::io("cannot read memory", error))?;
            done += here;
        }
        Ok(())
    }
}

impl Map {
    fn start(name: &str) -> Result<Self> {
        let complaints = memory()?;
        let stderr = complaints.try_clone().map_err(|error| Error::io("cannot start qemu-img", error))?;
        let mut child = command(&["map", "--output=json", name])
            .stdout(Stdio::piped())
            .stderr(stderr)
            .spawn()
            .map_err(not_started)?;
        let lines = BufReader::new(child.stdout.take().expect("it is piped"));
        Ok(Self { child, lines, complaints, last: Extent::default() })
    }

    /// Returns the extent that holds `at`, clipped to begin there.
    fn at(&mut self, at: u64) -> Result<Extent> {
        while self.last.start.saturating_add(self.last.length) <= at {
            let before = self.last.start + self.last.length;
            let next = self.next()?;
            if next.start != before || next.length == 0 || next.start.checked_add(next.length).is_none() {
                return Err(Error::failed("qemu-img gave a map that is not one run of extents"));
            }
            self.last = next;
        }
        let skip = at - self.last.start;
        let offset = self.last.offset.map(|offset| offset.saturating_add(skip));
        Ok(Extent { start: at, length: self.last.length - skip, offset, ..self.last })
    }

    fn next(&mut self) -> Result<Extent> {
        let mut line = String::new();
        self.lines.read_line(&mut line).map_err(|error| Error::io("cannot read from qemu-img", error))?;
        // One object per line of an array.
        let object = line.trim().trim_start_matches('[').trim_end_matches([',', ']']);
        if object.is_empty() {
            return Err(self.ended_early());
        }
        serde_json::from_str(object).map_err(|error| not_understood(&error))
    }

    fn ended_early(&mut self) -> Error {
        match self.child.wait() {
            Ok(status) if status.success() => Error::failed("qemu-img gave a map that ends before the disk"),
            Ok(_) => {
                let mut text = Vec::new();
                let read = self.complaints.seek(SeekFrom::Start(0));
                match read.and_then(|_| io::copy(&mut self.complaints, &mut text)) {
                    Ok(_) => complaint(&text),
                    Err(error) => Error::io("cannot read from qemu-img", error),
                }
            }
            Err(error) => Error::io("cannot wait for qemu-img", error),
        }
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        // Both fail only when it has ended and been waited for.
        if let Err(error) = self.child.kill().and_then(|()| self.child.wait()) {
            tracing::debug!("qemu-img map: {error}");
        }
    }
}

fn image_name(node: &Value) -> String {
    format!("json:{node}")
}

fn command(args: &[&str]) -> Command {
    let mut command = Command::new("qemu-img");
    command.args(args).env("LC_ALL", "C").stdin(Stdio::null());
    command
}

fn run(args: &[&str]) -> Result<Output> {
    let output = command(args).output().map_err(not_started)?;
    // `check` ends with 3 when clusters are lost to nobody, which harms no reader.
    if output.status.success() || args[0] == "check" && output.status.code() == Some(3) {
        return Ok(output);
    }
    if args[0] == "check" && output.status.code() == Some(63) {
        // Flat images have no metadata to check.
        return Ok(output);
    }
    let mut text = output.stderr;
    if text.trim_ascii().is_empty() {
        text = output.stdout;
    }
    Err(complaint(&text))
}

fn not_started(error: io::Error) -> Error {
    if error.kind() == io::ErrorKind::NotFound {
        return Error::unsupported("only qemu-img reads this image, and there is none on this host")
            .hint("install qemu-utils (Debian, Ubuntu) or qemu-img (Fedora, RHEL, SUSE)");
    }
    Error::io("cannot start qemu-img", error)
}

fn not_understood(error: &serde_json::Error) -> Error {
    Error::failed(format!("qemu-img gave an answer that is not understood: {error}"))
}

/// Makes an error of what qemu-img said, without the description of the image that it repeats.
fn complaint(text: &[u8]) -> Error {
    let text = String::from_utf8_lossy(text);
    let line = text.lines().map(str::trim).find(|line| !line.is_empty()).unwrap_or("it failed without a word");
    let line = line.rsplit("}': ").next().unwrap_or(line).trim_start_matches("qemu-img: ");
    let shown: String = line.chars().filter(|c| !c.is_control()).take(COMPLAINT_MAX).collect();
    let kind = if shown.contains(" lock") {
        Kind::Busy
    } else if shown.contains("Permission denied") {
        Kind::Denied
    } else if shown.contains("Cannot allocate memory") {
        Kind::Failed
    } else {
        Kind::Corrupt
    };
    let error = Error::new(kind, format!("qemu-img: {shown}"));
    if kind == Kind::Busy { error.hint("close the image first, such as by stopping its guest") } else { error }
}
