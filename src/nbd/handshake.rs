//! The handshake of the server: a client asks what there is, and chooses.
//!
//! # Rules
//! 1. Every option is answered, in order; one that is not known or makes no sense is refused and the handshake goes on.
//!    Only what leaves nobody knowing where the next option begins ends the connection.
//! 2. With TLS configured nothing but STARTTLS and ABORT is answered before it has begun, and whatever was agreed before
//!    is forgotten then.
//! 3. A client has [`IDLE`] for each message and [`OPTIONS_MAX`] options in all.
//! 4. An export is opened when the client names it, and let go when it names another one or goes away. It is entered when
//!    the client chooses it, not before: who asks is in nobody's way. What is entered is what was asked about, with the
//!    contexts that were chosen for it, even if it has got another name meanwhile.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::link::Link;
use super::option::{self, Choice, DATA_MAX, FIXED_NEWSTYLE, NO_ZEROES, OPTION, Queries, ZEROES, info, kind, reply};
use super::status::{ALLOCATION, BITMAP, Context};
use super::tls::Tls;
use super::wire::{PAYLOAD_MAX, TEXT_MAX, transmission, word};
use super::{Export, Exports, Keep};
use crate::clock::{self, Instant};
use crate::error::{Error, Kind, Result};
use crate::units::BLOCK_SIZE;

/// How long a client may take for a message.
const IDLE: Duration = Duration::from_secs(30);
/// Options of one handshake at most; a program that lists a thousand exports asks about each.
const OPTIONS_MAX: usize = 10_000;
/// Data of an option that is read past when it is too long to be looked at.
const SKIP_MAX: usize = 1 << 20;
/// Contexts of one connection at most; each may take some memory.
const CONTEXTS_MAX: usize = 8;

/// What was agreed on.
pub(super) struct Terms {
    pub(super) export: Export,
    /// Reads are answered in chunks.
    pub(super) structured: bool,
    /// The contexts, by the numbers that the client knows.
    pub(super) contexts: Vec<(u32, Context)>,
    /// Dropped last.
    pub(super) _keep: Keep,
}

/// The handshake of a connection.
pub(super) struct Handshake<'a> {
    link: &'a mut Link,
    exports: &'a dyn Exports,
    tls: Option<&'a Tls>,
    stopping: &'a AtomicBool,
    zeroes: bool,
    structured: bool,
    opened: Option<(String, Export)>,
    /// Contexts, with the name of the export they were chosen for.
    contexts: Option<(String, Vec<(u32, Context)>)>,
}

/// What comes after an option.
enum Next {
    Option,
    Requests(Terms),
    End,
}

/// The answer to an option: replies, or why it is refused.
type Answer = Result<Vec<u8>, (u32, String)>;

impl<'a> Handshake<'a> {
    pub(super) fn new(
        link: &'a mut Link,
        exports: &'a dyn Exports,
        tls: Option<&'a Tls>,
        stopping: &'a AtomicBool,
    ) -> Self {
        Self { link, exports, tls, stopping, zeroes: true, structured: false, opened: None, contexts: None }
    }

    /// Goes through the handshake; `None` when the client has said goodbye.
    ///
    /// # Errors
    /// When the connection broke, or what came makes no sense.
    pub(super) fn run(mut self) -> io::Result<Option<Terms>> {
        self.link.send_all(&option::greeting(FIXED_NEWSTYLE | NO_ZEROES), deadline())?;
        let mut flags = [0; 4];
        self.link.receive_all(&mut flags, deadline())?;
        let flags = word(&flags, 0);
        if flags & !u32::from(FIXED_NEWSTYLE | NO_ZEROES) != 0 {
            return Err(io::Error::other(format!("the client has flags that nobody offered: {flags:#x}")));
        }
        self.zeroes = flags & u32::from(NO_ZEROES) == 0;
        for _ in 0..OPTIONS_MAX {
            let mut header = [0; OPTION];
            self.link.receive_all(&mut header, deadline())?;
            let (kind, len) =
                option::option_header(&header).ok_or_else(|| io::Error::other("what came is no option"))?;
            match self.take(kind, len as usize)? {
                Next::Option => {}
                Next::Requests(terms) => return Ok(Some(terms)),
                Next::End => return Ok(None),
            }
        }
        Err(io::Error::other("the client asks for ever"))
    }

    /// Answers an option with `len` bytes of data.
    fn take(&mut self, kind: u32, len: usize) -> io::Result<Next> {
        let name_max = if kind == kind::EXPORT_NAME { TEXT_MAX } else { DATA_MAX };
        if len > name_max {
            if len > SKIP_MAX || kind == kind::EXPORT_NAME {
                return Err(io::Error::other(format!("option {kind} has {len} bytes")));
            }
            self.link.receive_all(&mut vec![0; len], deadline())?;
            return self.answer(kind, Err((reply::ERR_TOO_BIG, format!("{len} bytes are too many"))));
        }
        let mut data = vec![0; len];
        self.link.receive_all(&mut data, deadline())?;
        if self.stopping.load(Ordering::Acquire) && kind != kind::ABORT {
            self.answer(kind, Err((reply::ERR_SHUTDOWN, "the server ends".into())))?;
            return Ok(Next::End);
        }
        if self.tls.is_some() && !self.link.is_secret() && !matches!(kind, kind::STARTTLS | kind::ABORT) {
            if kind == kind::EXPORT_NAME {
                return Err(io::Error::other("the client does not want TLS"));
            }
            return self.answer(kind, Err((reply::ERR_TLS_REQD, "begin with STARTTLS".into())));
        }
        match kind {
            kind::EXPORT_NAME => return self.enter_by_name(data),
            kind::ABORT => {
                // It may have gone already.
                self.answer(kind, Ok(acknowledged(kind))).ok();
                return Ok(Next::End);
            }
            kind::STARTTLS => return self.start_tls(&data),
            kind::GO => return self.go(&data),
            _ => {}
        }
        let answer = match kind {
            kind::LIST => self.list(&data),
            kind::INFO => self.describe(kind, &data),
            kind::STRUCTURED_REPLY if data.is_empty() => {
                self.structured = true;
                Ok(acknowledged(kind))
            }
            kind::STRUCTURED_REPLY => Err((reply::ERR_INVALID, "this option has no data".into())),
            kind::LIST_META_CONTEXT => self.list_contexts(&data),
            kind::SET_META_CONTEXT => self.set_contexts(&data),
            _ => Err((reply::ERR_UNSUP, format!("option {kind} is not known here"))),
        };
        self.answer(kind, answer)
    }

    fn answer(&mut self, kind: u32, answer: Answer) -> io::Result<Next> {
        let bytes = answer.unwrap_or_else(|(error, text)| {
            tracing::debug!("NBD option {kind} is refused: {text}");
            option::option_reply(kind, error, shortened(&text).as_bytes())
        });
        self.link.send_all(&bytes, deadline())?;
        Ok(Next::Option)
    }

    fn start_tls(&mut self, data: &[u8]) -> io::Result<Next> {
        let kind = kind::STARTTLS;
        let refuse = |error, text: &str| Err((error, text.to_owned()));
        match self.tls {
            _ if !data.is_empty() => self.answer(kind, refuse(reply::ERR_INVALID, "this option has no data")),
            _ if self.link.is_secret() => self.answer(kind, refuse(reply::ERR_INVALID, "TLS has begun already")),
            None => self.answer(kind, refuse(reply::ERR_POLICY, "this server has no certificate")),
            Some(tls) => {
                self.answer(kind, Ok(acknowledged(kind)))?;
                self.link.start_tls(tls, deadline())?;
                (self.structured, self.opened, self.contexts) = (false, None, None);
                Ok(Next::Option)
            }
        }
    }

    fn list(&self, data: &[u8]) -> Answer {
        if !data.is_empty() {
            return Err((reply::ERR_INVALID, "this option has no data".into()));
        }
        let mut bytes = Vec::new();
        for name in self.exports.names() {
            bytes.extend(option::option_reply(kind::LIST, reply::SERVER, &option::named(&name)));
        }
        bytes.extend(acknowledged(kind::LIST));
        Ok(bytes)
    }

    /// Opens an export, unless it is the one that was named last.
    fn open(&mut self, name: &str) -> Result<&Export, (u32, String)> {
        if self.opened.as_ref().is_none_or(|(opened, _)| opened != name) {
            self.opened = None;
            let export = self.exports.open(name).map_err(|error| (refusal(&error), said(&error)))?;
            self.opened = Some((name.to_owned(), export));
        }
        Ok(self.opened.as_ref().map(|(_, export)| export).expect("it was just opened"))
    }

    /// Answers INFO, or GO before its end.
    fn describe(&mut self, kind: u32, data: &[u8]) -> Answer {
        let Some(choice) = Choice::decode(data) else { return Err(senseless()) };
        let structured = self.structured;
        let export = self.open(&choice.name)?;
        let mut bytes = Vec::new();
        let mut tell = |data: &[u8]| bytes.extend(option::option_reply(kind, reply::INFO, data));
        tell(&option::export_info(export.device.size(), flags_of(export, structured)));
        if choice.infos.contains(&info::NAME) {
            tell(&option::text_info(info::NAME, &export.name));
        }
        if choice.infos.contains(&info::DESCRIPTION) && !export.description.is_empty() {
            tell(&option::text_info(info::DESCRIPTION, shortened(&export.description)));
        }
        let preferred = u32::try_from(BLOCK_SIZE).expect("a block is small");
        tell(&option::block_size_info(1, preferred, PAYLOAD_MAX));
        bytes.extend(acknowledged(kind));
        Ok(bytes)
    }

    fn go(&mut self, data: &[u8]) -> io::Result<Next> {
        // Described after: its size may change as long as nobody has it.
        let entered = match Choice::decode(data) {
            Some(choice) => self.enter(&choice.name),
            None => Err(senseless()),
        };
        let (answer, keep) = match entered {
            Ok(keep) => (self.describe(kind::GO, data), Some(keep)),
            Err(refused) => (Err(refused), None),
        };
        let keep = keep.filter(|_| answer.is_ok());
        self.answer(kind::GO, answer)?;
        Ok(keep.map_or(Next::Option, |keep| self.agree(keep)))
    }

    /// Enters an export.
    fn enter(&mut self, name: &str) -> Result<Keep, (u32, String)> {
        let export = self.open(name)?;
        (export.enter)().map_err(|error| (refusal(&error), said(&error)))
    }

    /// Takes the export that was opened last, with the contexts if they were chosen for it.
    fn agree(&mut self, keep: Keep) -> Next {
        let (name, export) = self.opened.take().expect("it was opened to be entered");
        let contexts = self.contexts.take().filter(|(chosen_for, _)| *chosen_for == name);
        let contexts = contexts.map(|(_, contexts)| contexts).unwrap_or_default();
        Next::Requests(Terms { export, structured: self.structured, contexts, _keep: keep })
    }

    /// Answers EXPORT_NAME, which cannot be refused.
    fn enter_by_name(&mut self, data: Vec<u8>) -> io::Result<Next> {
        let name = String::from_utf8(data).map_err(io::Error::other)?;
        let structured = self.structured;
        let keep = self.enter(&name).map_err(|(_, text)| io::Error::other(text))?;
        let export = self.open(&name).map_err(|(_, text)| io::Error::other(text))?;
        let mut bytes = export.device.size().to_be_bytes().to_vec();
        bytes.extend_from_slice(&flags_of(export, structured).to_be_bytes());
        if self.zeroes {
            bytes.extend_from_slice(&[0; ZEROES]);
        }
        self.link.send_all(&bytes, deadline())?;
        Ok(self.agree(keep))
    }

    fn queries(&self, data: &[u8]) -> Result<Queries, (u32, String)> {
        if !self.structured {
            return Err((reply::ERR_INVALID, "contexts need structured replies".into()));
        }
        Queries::decode(data).ok_or_else(senseless)
    }

    fn list_contexts(&mut self, data: &[u8]) -> Answer {
        let Queries { name, queries } = self.queries(data)?;
        let export = self.open(&name)?;
        let mut names = vec![ALLOCATION.to_owned()];
        names.extend(export.contexts.names().into_iter().map(|name| format!("{BITMAP}{name}")));
        let listed = |name: &String| {
            let is = |query: &String| {
                query == name || matches!(&query[..], "base:" | "qemu:" | BITMAP) && name.starts_with(query)
            };
            queries.is_empty() || queries.iter().any(is)
        };
        let mut bytes = Vec::new();
        for name in names.iter().filter(|name| listed(name)) {
            let data = option::context(0, name);
            bytes.extend(option::option_reply(kind::LIST_META_CONTEXT, reply::META_CONTEXT, &data));
        }
        bytes.extend(acknowledged(kind::LIST_META_CONTEXT));
        Ok(bytes)
    }

    fn set_contexts(&mut self, data: &[u8]) -> Answer {
        self.contexts = None;
        let Queries { name, queries } = self.queries(data)?;
        let export = self.open(&name)?;
        let mut chosen: Vec<(String, Context)> = Vec::new();
        for query in queries {
            // First: what a name stands for may take long to find out.
            if chosen.iter().any(|(name, _)| *name == query) {
                continue;
            }
            let context = match query.strip_prefix(BITMAP) {
                _ if query == ALLOCATION => Context::Allocation,
                Some(base) if !base.is_empty() => match export.contexts.dirty(base) {
                    Ok(dirty) => Context::Dirty(dirty),
                    // One that is not known is just not chosen.
                    Err(error) if error.kind() == Kind::NotFound => continue,
                    Err(error) => return Err((reply::ERR_INVALID, said(&error))),
                },
                _ => continue,
            };
            if chosen.len() == CONTEXTS_MAX {
                return Err((reply::ERR_TOO_BIG, format!("more than {CONTEXTS_MAX} contexts at a time")));
            }
            chosen.push((query, context));
        }
        let mut bytes = Vec::new();
        for (id, (name, _)) in (1..).zip(&chosen) {
            let data = option::context(id, name);
            bytes.extend(option::option_reply(kind::SET_META_CONTEXT, reply::META_CONTEXT, &data));
        }
        bytes.extend(acknowledged(kind::SET_META_CONTEXT));
        self.contexts = Some((name, (1..).zip(chosen.into_iter().map(|(_, context)| context)).collect()));
        Ok(bytes)
    }
}

fn deadline() -> Instant {
    clock::now() + IDLE
}

fn acknowledged(kind: u32) -> Vec<u8> {
    option::option_reply(kind, reply::ACK, &[])
}

fn senseless() -> (u32, String) {
    (reply::ERR_INVALID, "the data of the option makes no sense".into())
}

/// Returns as much of a text as the wire takes.
fn shortened(text: &str) -> &str {
    let mut end = text.len().min(TEXT_MAX);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

/// Returns the message and what to do next.
fn said(error: &Error) -> String {
    match error.next_step() {
        Some(hint) => format!("{error}; {hint}"),
        None => error.to_string(),
    }
}

/// Returns the kind of reply for an export that cannot be opened.
fn refusal(error: &Error) -> u32 {
    match error.kind() {
        Kind::NotFound => reply::ERR_UNKNOWN,
        Kind::Unsupported => reply::ERR_PLATFORM,
        Kind::Usage => reply::ERR_INVALID,
        _ => reply::ERR_POLICY,
    }
}

/// Returns what an export can do.
fn flags_of(export: &Export, structured: bool) -> u16 {
    use transmission::{
        CAN_MULTI_CONN, HAS_FLAGS, READ_ONLY, SEND_CACHE, SEND_DF, SEND_FAST_ZERO, SEND_FLUSH, SEND_FUA, SEND_TRIM,
        SEND_WRITE_ZEROES,
    };
    let mut flags = HAS_FLAGS | SEND_FLUSH | SEND_FUA | CAN_MULTI_CONN | SEND_CACHE;
    flags |= if export.device.read_only() { READ_ONLY } else { SEND_TRIM | SEND_WRITE_ZEROES | SEND_FAST_ZERO };
    flags | if structured { SEND_DF } else { 0 }
}
