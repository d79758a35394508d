//! Receiving into a raw file or a block device.
//!
//! Two small files say what is in it: `FILE.afterimage` which state it holds, `FILE.afterimage-receive` which stream is on
//! its way and how far it is. For a device they are in a folder that the user names.
//!
//! # Rules
//! 1. The file changes in place, so it is no state at all while a stream is on its way: `FILE.afterimage` goes first and
//!    comes back, with the new identity, after the end of the stream was read and the data is durable.
//! 2. An increment needs `FILE.afterimage` with its base. `--force` takes the word of the user instead.
//! 3. Progress is written after the data it speaks of was synced.
//!
//! # After a crash
//! The stream goes on at the noted place, or from its beginning.

use std::cell::Cell;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use uuid::Uuid;

use super::format::Header;
use super::pace::Pace;
use super::reader::{Part, StreamReader};
use super::receive::with_token;
use super::token::Token;
use crate::codec::crc32;
use crate::error::{Error, Result};
use crate::media::device::{is_device, open_device};
use crate::media::{File, HostMedia, Media, Open};
use crate::progress::Progress;

/// Most bytes of one of the small files.
const SIDE_MAX: usize = 512;
const HOLDS: (&str, &str) = ("afterimage", "afterimage-state 1");
const COMES: (&str, &str) = ("afterimage-receive", "afterimage-receive 1");

/// How to receive into a file.
#[derive(Debug, Clone)]
pub struct FileOptions {
    /// The raw file or block device.
    pub path: PathBuf,
    /// Folder for the two small files; where the file is when left out. A device needs one.
    pub state: Option<PathBuf>,
    /// Whether to overwrite a file that is there, or one whose state is not known.
    pub force: bool,
}

/// What was received into a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileReport {
    /// The snapshot the file holds now.
    pub snapshot: String,
    /// Its identity.
    pub uuid: Uuid,
    /// Identity of the base.
    pub base: Option<Uuid>,
    /// First byte that was in the stream.
    pub start: u64,
    /// Bytes of data.
    pub data: u64,
    /// Bytes of zeros.
    pub zeros: u64,
}

/// A file to receive into, and where the small files are.
#[derive(Debug)]
pub struct Place {
    /// Folder of the file; `None` for a device, which is open already.
    media: Option<Arc<dyn Media>>,
    device: Option<Arc<dyn File>>,
    name: String,
    /// Folder of the small files, and what they begin with.
    side: Arc<dyn Media>,
    stem: String,
}

impl Place {
    /// A regular file of a folder, with its small files beside it.
    pub fn beside(media: &Arc<dyn Media>, name: &str) -> Self {
        let (media, side) = (Some(Arc::clone(media)), Arc::clone(media));
        Self { media, device: None, name: name.to_owned(), side, stem: name.to_owned() }
    }

    fn of(options: &FileOptions) -> Result<Self> {
        let shown = options.path.display();
        let path = match options.path.canonicalize() {
            Ok(path) => path,
            // Not there yet.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                std::path::absolute(&options.path).map_err(|e| Error::io(format!("cannot find {shown}"), e))?
            }
            Err(error) => return Err(Error::io(format!("cannot find {shown}"), error)),
        };
        let name = path.file_name().and_then(|name| name.to_str());
        let (Some(name), Some(parent)) = (name, path.parent()) else {
            return Err(Error::usage(format!(
                "{shown} cannot be received into: its name is not UTF-8 or it is a folder"
            )));
        };
        let folder = |dir: &Path| -> Result<Arc<dyn Media>> {
            let media = HostMedia::new(dir).map_err(|e| Error::io(format!("cannot open {}", dir.display()), e))?;
            Ok(Arc::new(media))
        };
        if is_device(&path) {
            let Some(state) = &options.state else {
                return Err(Error::usage(format!("{shown} is a device, and what it holds must be noted somewhere"))
                    .hint("name a folder that lasts with --state DIR"));
            };
            let device = open_device(&path).map_err(|e| Error::io(format!("cannot open {shown}"), e))?;
            let stem = path.to_string_lossy().trim_start_matches('/').replace('/', "-");
            return Ok(Self { media: None, device: Some(device), name: name.to_owned(), side: folder(state)?, stem });
        }
        let side = folder(options.state.as_deref().unwrap_or(parent))?;
        Ok(Self { media: Some(folder(parent)?), device: None, name: name.to_owned(), side, stem: name.to_owned() })
    }

    /// Opens the file, if it is there.
    fn open(&self) -> Result<Option<Arc<dyn File>>> {
        let Some(media) = &self.media else { return Ok(self.device.clone()) };
        match media.open(&self.name, Open::Existing) {
            Ok(file) => Ok(Some(file)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(self.fail("open", error)),
        }
    }

    fn make(&self) -> Result<Arc<dyn File>> {
        let media = self.media.as_ref().ok_or_else(|| Error::failed("a device is not made"))?;
        let file = media.open(&self.name, Open::New).map_err(|e| self.fail("make", e))?;
        media.sync_dir("").map_err(|e| self.fail("make", e))?;
        Ok(file)
    }

    fn fail(&self, what: &str, error: io::Error) -> Error {
        Error::io(format!("cannot {what} {}", self.name), error)
    }

    /// Reads one of the small files; one that is damaged is an error.
    fn read_side(&self, kind: (&str, &str)) -> Result<Option<Token>> {
        let path = format!("{}.{}", self.stem, kind.0);
        let file = match self.side.open(&path, Open::ReadOnly) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Error::io(format!("cannot open {path}"), error)),
        };
        let mut bytes = vec![0; SIDE_MAX];
        let got = file.read_at(&mut bytes, 0).map_err(|e| Error::io(format!("cannot read {path}"), e))?;
        let parsed = std::str::from_utf8(&bytes[..got]).ok().and_then(|text| parse_side(kind.1, text));
        parsed.map(Some).ok_or_else(|| {
            Error::corrupt(format!("{path} is damaged, so what is in {} is not known", self.name))
                .hint("remove it, and receive a full stream with --force")
        })
    }

    fn write_side(&self, kind: (&str, &str), token: &Token) -> Result<()> {
        let (path, new) = (format!("{}.{}", self.stem, kind.0), format!("{}.{}.new", self.stem, kind.0));
        let fail = |e| Error::io(format!("cannot write {path}"), e);
        match self.side.remove(&new) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(fail(error)),
            _ => {}
        }
        let file = self.side.open(&new, Open::New).map_err(fail)?;
        file.write_at(show_side(kind.1, token).as_bytes(), 0).map_err(fail)?;
        file.sync().map_err(fail)?;
        self.side.rename(&new, &path).map_err(fail)?;
        self.side.sync_dir("").map_err(fail)
    }

    fn remove_side(&self, kind: (&str, &str)) -> Result<()> {
        let path = format!("{}.{}", self.stem, kind.0);
        match self.side.remove(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(Error::io(format!("cannot remove {path}"), error));
            }
            _ => {}
        }
        self.side.sync_dir("").map_err(|e| Error::io(format!("cannot remove {path}"), e))
    }
}

fn show_side(title: &str, token: &Token) -> String {
    let body = format!("{title}\n{token}");
    format!("{body} {:08x}\n", crc32(body.as_bytes()))
}

fn parse_side(title: &str, text: &str) -> Option<Token> {
    let (body, crc) = text.strip_suffix('\n')?.rsplit_once(' ')?;
    let (first, token) = body.split_once('\n')?;
    let token = (first == title).then(|| Token::parse(token).ok())??;
    // Compared as a whole, so that there is one spelling of everything.
    (format!("{:08x}", crc32(body.as_bytes())) == crc && show_side(title, &token) == text).then_some(token)
}

/// Receives a stream into a raw file or a block device.
///
/// # Errors
/// As [`super::receive()`]. The file may have changed when the stream breaks off; that it holds no state is on record then.
pub fn receive_file(options: &FileOptions, input: &mut dyn Read, progress: &dyn Progress) -> Result<FileReport> {
    receive_at(&Place::of(options)?, options.force, input, progress)
}

/// As [`receive_file`], at a place.
///
/// # Errors
/// As [`receive_file`].
pub fn receive_at(place: &Place, force: bool, input: &mut dyn Read, progress: &dyn Progress) -> Result<FileReport> {
    let mut reader = StreamReader::new(input)?;
    let header = reader.header.clone();
    let file = enter(place, force, &header)?;
    progress.total(header.data);
    progress.message("receiving");
    let lost = Cell::new(false);
    if let Err(error) = fill(place, &*file, &mut reader, &lost, progress) {
        return Err(if lost.get() { error } else { stop(place, &*file, &reader, error) });
    }
    // In this order: with both of them there, the state is the true one.
    place.write_side(HOLDS, &Token::of(&header, header.target.size))?;
    place.remove_side(COMES)?;
    Ok(FileReport {
        snapshot: header.target.name,
        uuid: header.target.uuid,
        base: header.base.map(|base| base.uuid),
        start: header.start,
        data: header.data,
        zeros: header.zeros,
    })
}

/// Returns where an interrupted stream into a file goes on.
///
/// # Errors
/// `NotFound` when there is none.
pub fn file_token(options: &FileOptions) -> Result<Token> {
    let place = Place::of(options)?;
    let (comes, holds) = (place.read_side(COMES)?, place.read_side(HOLDS)?);
    let open = comes.filter(|comes| holds.is_none_or(|holds| !holds.same_stream(comes)));
    open.ok_or_else(|| Error::not_found(format!("no stream into {} was interrupted", place.name)))
}

/// Checks that the stream fits, and notes that it is on its way.
fn enter(place: &Place, force: bool, header: &Header) -> Result<Arc<dyn File>> {
    let fresh = Token::of(header, 0);
    let (there, holds, comes) = (place.open()?, place.read_side(HOLDS)?, place.read_side(COMES)?);
    // Ended, but for its removal.
    let comes = comes.filter(|comes| holds.is_none_or(|holds| !holds.same_stream(comes)));
    if let (Some(file), Some(comes)) = (&there, &comes)
        && comes.same_stream(&fresh)
        && header.start <= comes.offset
    {
        return Ok(Arc::clone(file));
    }
    if header.start > 0 {
        return Err(Error::failed("the stream begins in the middle, and what came before it is not here")
            .hint("send it from its beginning: without --resume"));
    }
    let name = &place.name;
    let len = there.as_ref().map(|file| file.len()).transpose().map_err(|e| place.fail("look at", e))?;
    if let (Some(other), false) = (&comes, force) {
        return Err(with_token(Error::failed(format!("another stream into {name} was interrupted")), other, "--force"));
    }
    match (&header.base, len) {
        (Some(base), None) => {
            return Err(Error::not_found(format!("there is no file {name} that could hold the base '{}'", base.name))
                .hint("the stream is an increment: receive a full one first (`afterimage send` without --from)"));
        }
        (Some(base), Some(_)) if !force => check_base(place, base, holds.as_ref(), len)?,
        (None, Some(len)) if !force && (len > 0 || place.device.is_some()) => {
            return Err(Error::exists(format!("{name} is there already, and the stream is a full one"))
                .hint("--force overwrites it"));
        }
        _ => {}
    }
    let file = match there {
        Some(file) => file,
        None => place.make()?,
    };
    if place.device.is_some() && len.is_some_and(|len| len < header.target.size) {
        return Err(Error::no_space(format!("{name} is smaller than the disk in the stream")));
    }
    place.write_side(COMES, &fresh)?;
    place.remove_side(HOLDS)?;
    Ok(file)
}

fn check_base(place: &Place, base: &super::format::StateId, holds: Option<&Token>, len: Option<u64>) -> Result<()> {
    let name = &place.name;
    let why = match holds {
        None => format!("there is no {}.{} that says which state it holds", place.stem, HOLDS.0),
        Some(holds) if holds.target != base.uuid => format!("it does not hold the base '{}' of the stream", base.name),
        Some(_) if place.device.is_none() && len != Some(base.size) => "its size has changed".to_owned(),
        Some(_) => return Ok(()),
    };
    Err(Error::failed(format!("the stream does not fit {name}: {why}"))
        .hint("send a full stream; or --force, if it holds exactly the base"))
}

/// Writes the stream to the file; `lost` is set when the file failed, so that nothing is known of what was not yet safe.
fn fill(
    place: &Place,
    file: &dyn File,
    reader: &mut StreamReader<'_>,
    lost: &Cell<bool>,
    progress: &dyn Progress,
) -> Result<()> {
    let header = reader.header.clone();
    let fail = |e| {
        lost.set(true);
        place.fail("write", e)
    };
    if place.device.is_none() && file.len().map_err(fail)? != header.target.size {
        file.set_len(header.target.size).map_err(fail)?;
    }
    let mut pace = Pace::new();
    loop {
        if progress.cancelled() {
            return Err(Error::failed("the receive was cancelled"));
        }
        let arrived = match reader.next_part()? {
            Some(Part::Data { offset, bytes }) => {
                file.write_at(bytes, offset).map_err(fail)?;
                progress.advance(bytes.len() as u64);
                bytes.len() as u64
            }
            Some(Part::Zeros { offset, length }) => {
                file.punch(offset, length).map_err(fail)?;
                0
            }
            None => break,
        };
        if pace.arrived(arrived) {
            file.sync().map_err(fail)?;
            place.write_side(COMES, &Token::of(&header, reader.position()))?;
        }
    }
    file.sync().map_err(fail)
}

/// Makes what arrived safe, as far as that is possible, and says how to go on.
fn stop(place: &Place, file: &dyn File, reader: &StreamReader<'_>, error: Error) -> Error {
    let token = Token::of(&reader.header, reader.applied());
    let safe = file.sync().map_err(|e| place.fail("write", e)).and_then(|()| place.write_side(COMES, &token));
    match safe {
        Ok(()) => with_token(error, &token, "--force"),
        Err(_) => error,
    }
}
