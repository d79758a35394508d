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
//! 4. Who receives has the file locked (flock; a device is opened exclusively), so that two cannot mix.
//! 5. `FILE.afterimage` is believed while size and time of the file are those that were noted with it: an increment over what
//!    somebody has written to since would be neither state. The time counts in seconds, so that copies which keep it are good.
//!    Of a device there is no such time, and while a stream is on its way nobody else is to write to the file at all: all
//!    that the stream tells of is written again then, the rest is what the base had.
//!
//! # After a crash
//! The stream goes on at the noted place, or from its beginning.

use std::cell::Cell;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use uuid::Uuid;

use super::format::{Header, StateId};
use super::pace::Pace;
use super::reader::{Part, StreamReader};
use super::receive::with_token;
use super::token::Token;
use crate::clock;
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
        if path.is_dir() {
            return Err(Error::usage(format!("{shown} is a directory, and what is received is a file"))
                .hint("name a file in it, or a block device"));
        }
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

    /// Keeps everybody else who receives out.
    fn lock(&self, file: &dyn File) -> Result<()> {
        if file.try_lock().map_err(|e| self.fail("lock", e))? {
            return Ok(());
        }
        Err(Error::busy(format!("another process receives into {}", self.name)).hint("wait for it, or end it"))
    }

    fn fail(&self, what: &str, error: io::Error) -> Error {
        Error::io(format!("cannot {what} {}", self.name), error)
    }

    /// Reads one of the small files; one that is damaged is an error.
    fn read_side(&self, kind: (&str, &str)) -> Result<Option<Note>> {
        let path = format!("{}.{}", self.stem, kind.0);
        let file = match self.side.open(&path, Open::ReadOnly) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Error::io(format!("cannot open {path}"), error)),
        };
        let mut bytes = vec![0; SIDE_MAX];
        let got = file.read_at(&mut bytes, 0).map_err(|e| Error::io(format!("cannot read {path}"), e))?;
        let parsed = std::str::from_utf8(&bytes[..got]).ok().and_then(|text| Note::parse(kind.1, text));
        parsed.map(Some).ok_or_else(|| {
            Error::corrupt(format!("{path} is damaged, so what is in {} is not known", self.name))
                .hint("remove it, and receive a full stream with --force")
        })
    }

    fn write_side(&self, kind: (&str, &str), note: &Note) -> Result<()> {
        let (path, new) = (format!("{}.{}", self.stem, kind.0), format!("{}.{}.new", self.stem, kind.0));
        let fail = |e| Error::io(format!("cannot write {path}"), e);
        match self.side.remove(&new) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(fail(error)),
            _ => {}
        }
        let file = self.side.open(&new, Open::New).map_err(fail)?;
        file.write_at(note.show(kind.1).as_bytes(), 0).map_err(fail)?;
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

/// What one of the small files says.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Note {
    token: Token,
    /// When the file was last written to, if it holds a state.
    modified: Option<u64>,
}

impl Note {
    fn coming(token: Token) -> Self {
        Self { token, modified: None }
    }

    fn show(&self, title: &str) -> String {
        let modified = self.modified.map(|time| format!(" {time}")).unwrap_or_default();
        let body = format!("{title}\n{}{modified}", self.token);
        format!("{body} {:08x}\n", crc32(body.as_bytes()))
    }

    fn parse(title: &str, text: &str) -> Option<Self> {
        let (body, _) = text.strip_suffix('\n')?.rsplit_once(' ')?;
        let (token, modified) = match body.split_once('\n')?.1.split_once(' ') {
            Some((token, modified)) => (token, Some(modified.parse().ok()?)),
            None => (body.split_once('\n')?.1, None),
        };
        let note = Self { token: Token::parse(token).ok()?, modified };
        // Compared as a whole, so that there is one spelling of everything, title and checksum included.
        (note.show(title) == text).then_some(note)
    }
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
    let modified = file.modified().map_err(|e| place.fail("look at", e))?;
    place.write_side(HOLDS, &Note { token: Token::of(&header, header.target.size), modified })?;
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
    let open = comes.filter(|comes| holds.is_none_or(|holds| !holds.token.same_stream(&comes.token)));
    open.map(|note| note.token)
        .ok_or_else(|| Error::not_found(format!("no stream into {} was interrupted", place.name)))
}

/// Checks that the stream fits, and notes that it is on its way.
fn enter(place: &Place, force: bool, header: &Header) -> Result<Arc<dyn File>> {
    let fresh = Token::of(header, 0);
    let there = place.open()?;
    if let Some(file) = &there {
        place.lock(&**file)?;
    }
    let (holds, comes) = (place.read_side(HOLDS)?, place.read_side(COMES)?.map(|note| note.token));
    // Ended, but for its removal.
    let comes = comes.filter(|comes| holds.as_ref().is_none_or(|holds| !holds.token.same_stream(comes)));
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
        (Some(base), Some(len)) if !force => {
            let modified =
                there.as_ref().map(|file| file.modified()).transpose().map_err(|e| place.fail("look at", e))?;
            check_base(place, base, holds.as_ref(), (len, modified.flatten()))?;
        }
        (None, Some(len)) if !force && (len > 0 || place.device.is_some()) => {
            return Err(Error::exists(format!("{name} is there already, and the stream is a full one"))
                .hint("--force overwrites it"));
        }
        _ => {}
    }
    let file = match there {
        Some(file) => file,
        None => {
            let file = place.make()?;
            place.lock(&*file)?;
            file
        }
    };
    if place.device.is_some() && len.is_some_and(|len| len < header.target.size) {
        return Err(Error::no_space(format!("{name} is smaller than the disk in the stream")));
    }
    place.write_side(COMES, &Note::coming(fresh))?;
    place.remove_side(HOLDS)?;
    Ok(file)
}

fn check_base(place: &Place, base: &StateId, holds: Option<&Note>, now: (u64, Option<u64>)) -> Result<()> {
    let name = &place.name;
    let why = match holds {
        None => format!("there is no {}.{} that says which state it holds", place.stem, HOLDS.0),
        Some(holds) if holds.token.target != base.uuid => {
            format!("it does not hold the base '{}' of the stream", base.name)
        }
        Some(_) if place.device.is_none() && now.0 != base.size => "its size has changed".to_owned(),
        Some(Note { modified: Some(noted), .. }) if now.1.is_some_and(|time| time != *noted) => {
            format!("it was written to since it got its state, at {}", clock::show(now.1.unwrap_or_default()))
        }
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
            place.write_side(COMES, &Note::coming(Token::of(&header, reader.position())))?;
        }
    }
    file.sync().map_err(fail)
}

/// Makes what arrived safe, as far as that is possible, and says how to go on.
fn stop(place: &Place, file: &dyn File, reader: &StreamReader<'_>, error: Error) -> Error {
    let token = Token::of(&reader.header, reader.applied());
    let safe =
        file.sync().map_err(|e| place.fail("write", e)).and_then(|()| place.write_side(COMES, &Note::coming(token)));
    match safe {
        Ok(()) => with_token(error, &token, "--force"),
        Err(_) => error,
    }
}
