//! The journal: a preallocated ring of frames, and the only commit point of the pool.
//!
//! # Rules
//! 1. A frame is durable when the sync after its one write returned; only then may anybody be told.
//! 2. One frame is in flight at a time, so only the last one can be torn.
//! 3. A frame begins right behind its predecessor, or at the start of the ring when it did not fit before its end.
//! 4. Room is given back only by [`Journal::folded`], after the catalog durably holds everything up to that frame.
//!
//! # After a crash
//! Replay starts at the position that the catalog names and ends at the first frame that is not the expected one. A
//! valid frame with a later number further on means that the medium lost a frame it had acknowledged: corruption, not
//! a crash, and the pool refuses to open. Of a process that was killed the last frame may be in the page cache alone; it is
//! written again and synced before another one follows, or a loss of power could keep the second and not the first.

use std::collections::BTreeMap;
use std::sync::Arc;

use uuid::Uuid;

use super::rows::{Key, Row};
use crate::codec::{Reader, Writer, crc32, unseal};
use crate::error::{Error, Result};
use crate::media::File;
use crate::units::to_usize;

const MAGIC: [u8; 8] = *b"\x89AFTJN\r\n";
const FRAME_MAGIC: [u8; 8] = *b"\x89AFTJF\r\n";
const VERSION: u32 = 1;
/// Frames begin and end on this boundary, so that no write touches a sector of an acknowledged frame.
const ALIGN: u64 = 4096;
const HEADER_LEN: usize = 64;
/// The smallest ring that makes sense.
pub const JOURNAL_MIN: u64 = 64 * 1024;

/// Where a fold left off: frames up to `lsn` are in the catalog, the next one begins at `at`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mark {
    /// Number of the last frame that is folded.
    pub lsn: u64,
    /// Byte at which the next frame begins (or at the start of the ring).
    pub at: u64,
}

impl Mark {
    /// The mark of a new pool.
    pub const START: Self = Self { lsn: 0, at: ALIGN };
}

/// The journal file, positioned for the next frame.
#[derive(Debug)]
pub struct Journal {
    file: Arc<dyn File>,
    /// In every frame. Blocks of guests are in the ring too, and a guest must not be able to write a frame.
    salt: Uuid,
    capacity: u64,
    head: Mark,
    tail: u64,
    used: u64,
    /// Number of the last frame that is folded; every frame says it.
    folded: u64,
}

/// What a ring holds, wherever the catalog thinks it begins: for a rebuild.
#[derive(Debug)]
pub(super) struct Survey {
    journal: Journal,
    frames: BTreeMap<u64, (u64, FrameHeader)>,
}

fn fail(what: &str) -> impl Fn(std::io::Error) -> Error + '_ {
    move |e| match e.kind() {
        std::io::ErrorKind::UnexpectedEof => Error::corrupt(format!("cannot {what} the journal: {e}")),
        _ => Error::io(format!("cannot {what} the journal"), e),
    }
}

impl Journal {
    /// Fills the file with zeros and writes its header. Durable when this returns. `salt` is random and kept to the file.
    ///
    /// # Errors
    /// Any error of the host.
    pub fn create(file: &Arc<dyn File>, pool: Uuid, salt: Uuid, capacity: u64) -> Result<()> {
        assert!(capacity >= JOURNAL_MIN && capacity.is_multiple_of(ALIGN), "a journal has a sensible size");
        file.will_be_overwritten();
        let zeros = vec![0; 1 << 20];
        let mut at = 0;
        while at < capacity {
            let len = (capacity - at).min(zeros.len() as u64);
            file.write_at(&zeros[..usize::try_from(len).expect("at most 1 MiB")], at).map_err(fail("make"))?;
            at += len;
        }
        let mut out = Writer::new();
        out.raw(&MAGIC).u32(VERSION).u32(0).raw(pool.as_bytes()).u64(capacity).raw(salt.as_bytes());
        file.write_at(&out.sealed(), 0).map_err(fail("make"))?;
        file.sync().map_err(fail("make"))
    }

    /// Opens the journal and returns the rows of all frames after `mark`, in order.
    ///
    /// # Errors
    /// `Corrupt` when header or ring are damaged in a way that no crash explains.
    pub fn open(file: Arc<dyn File>, pool: Uuid, mark: Mark) -> Result<(Self, Vec<Vec<Row>>)> {
        let (salt, capacity) = Self::read_header(&file, pool)?;
        if mark.at < ALIGN || mark.at > capacity || !mark.at.is_multiple_of(ALIGN) {
            return Err(Error::corrupt("the journal is damaged: the place to begin makes no sense"));
        }
        let mut journal = Self { file, salt, capacity, head: mark, tail: mark.at, used: 0, folded: mark.lsn };
        let mut frames = Vec::new();
        let mut last = None;
        while let Some((at, rows)) = journal.replay_one()? {
            frames.push(rows);
            last = Some(at);
        }
        if let Some(at) = last {
            journal.make_durable(at)?;
        }
        Ok((journal, frames))
    }

    /// Writes the last frame, which begins at `at`, once more and syncs. Where a sync of it failed in the process before, the
    /// next one would not say so; what is written again is dirty in any case.
    fn make_durable(&self, at: u64) -> Result<()> {
        let mut bytes = vec![0; to_usize(self.head.at - at)];
        self.file.read_exact_at(&mut bytes, at).map_err(fail("read"))?;
        self.file.write_at(&bytes, at).map_err(fail("write"))?;
        self.file.sync().map_err(fail("sync"))
    }

    /// Returns salt and capacity.
    fn read_header(file: &Arc<dyn File>, pool: Uuid) -> Result<(Uuid, u64)> {
        let mut bytes = [0; 60];
        file.read_exact_at(&mut bytes, 0).map_err(fail("read"))?;
        let mut from = Reader::new("the journal", &bytes);
        if from.raw(8)? != MAGIC {
            return Err(from.corrupt("it does not begin like one"));
        }
        if from.u32()? > VERSION {
            return Err(Error::unsupported("the journal is of a newer version than this program knows"));
        }
        let mut from = Reader::new("the journal", &unseal("the journal", &bytes)?[12..]);
        if from.u32()? != 0 {
            return Err(from.corrupt("reserved bytes are set"));
        }
        if from.raw(16)? != pool.as_bytes() {
            return Err(from.corrupt("it belongs to another pool"));
        }
        let capacity = from.u64()?;
        let salt = Uuid::from_slice(from.raw(16)?).expect("16 bytes");
        let len = file.len().map_err(fail("read"))?;
        if capacity < JOURNAL_MIN || !capacity.is_multiple_of(ALIGN) || capacity > len {
            return Err(from.corrupt("its length makes no sense"));
        }
        Ok((salt, capacity))
    }

    /// Reads the frame after `head`, if it is there, and moves on; returns where it begins, too.
    fn replay_one(&mut self) -> Result<Option<(u64, Vec<Row>)>> {
        let lsn = self.head.lsn + 1;
        for (at, waste) in [(self.head.at, 0), (ALIGN, self.capacity - self.head.at)] {
            let len = self.frame_at(at)?.filter(|frame| frame.lsn == lsn).map(|frame| frame.len());
            let Some(len) = len else { continue };
            if self.used + waste + len > self.capacity - ALIGN {
                continue;
            }
            let Some(rows) = self.read_frame(at)? else { continue };
            self.used += waste + len;
            self.head = Mark { lsn, at: at + len };
            return Ok(Some((at, rows)));
        }
        Ok(None)
    }

    /// Makes sure that no valid frame lies behind the end that [`Journal::open`] found. Reads the whole ring.
    ///
    /// # Errors
    /// `Corrupt` when there is one.
    pub fn check_end(&self) -> Result<()> {
        let mut at = ALIGN;
        while at < self.capacity {
            if let Some(frame) = self.frame_at(at)?
                && frame.lsn > self.head.lsn
                && self.read_frame(at)?.is_some()
            {
                return Err(Error::corrupt(format!(
                    "the journal ends at frame {}, but frame {} is there: an acknowledged frame was lost by the disk",
                    self.head.lsn, frame.lsn
                ))
                .hint("copy the pool directory away before anything else; then run `afterimage check --rebuild`"));
            }
            at += ALIGN;
        }
        Ok(())
    }

    fn frame_at(&self, at: u64) -> Result<Option<FrameHeader>> {
        if at + ALIGN > self.capacity {
            return Ok(None);
        }
        let mut bytes = [0; HEADER_LEN];
        self.file.read_exact_at(&mut bytes, at).map_err(fail("read"))?;
        Ok(FrameHeader::decode(&bytes, self.salt).filter(|frame| at + frame.len() <= self.capacity))
    }

    fn read_frame(&self, at: u64) -> Result<Option<Vec<Row>>> {
        let Some(frame) = self.frame_at(at)? else { return Ok(None) };
        let mut body = vec![0; frame.body_len as usize];
        self.file.read_exact_at(&mut body, at + HEADER_LEN as u64).map_err(fail("read"))?;
        if crc32(&body) != frame.body_crc {
            return Ok(None);
        }
        decode_rows(&body, frame.rows).map(Some)
    }

    /// Returns where the next frame goes and how many bytes are given up before the end of the ring.
    fn place(&self, len: u64) -> (u64, u64) {
        if self.head.at + len <= self.capacity { (self.head.at, 0) } else { (ALIGN, self.capacity - self.head.at) }
    }

    /// Tells whether a body of this length fits now; if not, a fold makes room.
    #[must_use]
    pub fn has_room(&self, body_len: usize) -> bool {
        let len = frame_len(body_len as u64);
        let (_, waste) = self.place(len);
        // Strictly less: a full ring would look like an empty one.
        self.used + waste + len < self.capacity - ALIGN
    }

    /// Returns the length of a body that fits now wherever its frame begins. There may be room for a longer one.
    #[must_use]
    pub fn room(&self) -> usize {
        let free = (self.capacity - ALIGN - self.used).saturating_sub(1);
        usize::try_from(free / 2 / ALIGN * ALIGN).unwrap_or(usize::MAX).saturating_sub(HEADER_LEN)
    }

    /// Returns the largest body that fits into an empty ring whatever its position.
    #[must_use]
    pub fn body_max(&self) -> usize {
        usize::try_from((self.capacity - ALIGN) / 2).unwrap_or(usize::MAX) - 2 * HEADER_LEN
    }

    /// Writes one frame and syncs. Durable when this returns.
    ///
    /// # Errors
    /// Any error of the host; the pool must stop writing then, since the frame may or may not be there.
    pub fn append(&mut self, body: &[u8], rows: u32) -> Result<()> {
        assert!(self.has_room(body.len()), "room is made before a frame is written");
        let frame = FrameHeader {
            lsn: self.head.lsn + 1,
            folded: self.folded,
            body_len: u32::try_from(body.len()).expect("bodies are bounded by the ring"),
            rows,
            body_crc: crc32(body),
        };
        let len = frame.len();
        let (at, waste) = self.place(len);
        let mut bytes = frame.encode(self.salt);
        bytes.extend_from_slice(body);
        bytes.resize(usize::try_from(len).expect("bounded"), 0);
        self.file.write_at(&bytes, at).map_err(fail("write"))?;
        self.file.sync().map_err(fail("sync"))?;
        self.used += waste + len;
        self.head = Mark { lsn: frame.lsn, at: at + len };
        Ok(())
    }

    /// Returns the mark to fold up to: every frame so far.
    #[must_use]
    pub fn mark(&self) -> Mark {
        self.head
    }

    /// Gives back the room of all frames up to a mark that the catalog holds.
    pub fn folded(&mut self, mark: Mark) {
        let span = if mark.at >= self.tail { mark.at - self.tail } else { self.capacity - self.tail + mark.at - ALIGN };
        // A frame that wrapped leaves the tail at the end of the ring: same distance, one way or the other.
        self.used = self.used.checked_sub(span).expect("frames are folded in order");
        self.tail = mark.at;
        self.folded = mark.lsn;
    }

    /// Returns how full the ring is, from 0 to 100.
    #[must_use]
    pub fn percent_used(&self) -> u64 {
        self.used * 100 / (self.capacity - ALIGN)
    }
}

impl Survey {
    /// Looks at every place where a frame could be.
    ///
    /// # Errors
    /// `Corrupt` when the header is damaged or not that of the pool; any error of the host.
    pub(super) fn of(file: Arc<dyn File>, pool: Uuid) -> Result<Self> {
        let (salt, capacity) = Journal::read_header(&file, pool)?;
        let journal = Journal { file, salt, capacity, head: Mark::START, tail: ALIGN, used: 0, folded: 0 };
        let mut frames = BTreeMap::new();
        let mut at = ALIGN;
        while at < capacity {
            let frame = journal.frame_at(at)?;
            // A body of nonsense in a whole frame comes from no crash; for a rebuild it is just not there.
            if let Some(frame) = frame
                && matches!(journal.read_frame(at), Ok(Some(_)))
            {
                frames.insert(frame.lsn, (at, frame));
            }
            at += ALIGN;
        }
        Ok(Self { journal, frames })
    }

    /// Returns the number of the newest frame.
    pub(super) fn last(&self) -> Option<u64> {
        self.frames.keys().next_back().copied()
    }

    /// Returns the number of the first of the unbroken line of frames that ends with the newest.
    pub(super) fn first_of_line(&self) -> Option<u64> {
        let mut first = self.last()?;
        while first > 1 && self.frames.contains_key(&(first - 1)) {
            first -= 1;
        }
        Some(first)
    }

    /// Returns the number of the last frame that is known to have been folded.
    pub(super) fn folded(&self) -> u64 {
        self.frames.values().map(|(_, frame)| frame.folded).max().unwrap_or(0)
    }

    /// Returns the mark behind a frame.
    pub(super) fn mark_behind(&self, lsn: u64) -> Option<Mark> {
        self.frames.get(&lsn).map(|(at, frame)| Mark { lsn, at: at + frame.len() })
    }

    /// Returns the rows of a frame.
    ///
    /// # Errors
    /// `Corrupt` when it is not there; any error of the host.
    pub(super) fn rows(&self, lsn: u64) -> Result<Vec<Row>> {
        let gone = || Error::corrupt(format!("frame {lsn} is not in the journal"));
        let (at, _) = self.frames.get(&lsn).ok_or_else(gone)?;
        self.journal.read_frame(*at)?.ok_or_else(gone)
    }
}

#[derive(Debug, Clone, Copy)]
struct FrameHeader {
    lsn: u64,
    folded: u64,
    body_len: u32,
    rows: u32,
    body_crc: u32,
}

fn frame_len(body_len: u64) -> u64 {
    (HEADER_LEN as u64 + body_len).next_multiple_of(ALIGN)
}

impl FrameHeader {
    fn len(&self) -> u64 {
        frame_len(u64::from(self.body_len))
    }

    fn encode(&self, salt: Uuid) -> Vec<u8> {
        let mut out = Writer::new();
        out.raw(&FRAME_MAGIC).raw(salt.as_bytes()).u64(self.lsn).u32(self.body_len).u32(self.rows);
        out.u32(self.body_crc).u64(self.folded).raw(&[0; 8]);
        let bytes = out.sealed();
        assert_eq!(bytes.len(), HEADER_LEN, "the header has a fixed length");
        bytes
    }

    /// Anything that is not a whole header of this pool is no frame: old bytes of the ring look like that.
    fn decode(bytes: &[u8], salt: Uuid) -> Option<Self> {
        let body = unseal("a frame", bytes).ok()?;
        let mut from = Reader::new("a frame", body);
        let ours = from.raw(8).ok()? == FRAME_MAGIC && from.raw(16).ok()? == salt.as_bytes();
        let frame = Self {
            lsn: from.u64().ok()?,
            body_len: from.u32().ok()?,
            rows: from.u32().ok()?,
            body_crc: from.u32().ok()?,
            folded: from.u64().ok()?,
        };
        ours.then_some(frame)
    }
}

/// Appends a row to a frame body.
pub fn encode_row(row: &Row, out: &mut Writer) {
    let key = row.key.as_bytes();
    out.u8(u8::try_from(key.len()).expect("keys are short")).raw(key);
    match &row.value {
        Some(value) => out.varint(value.len() as u64 + 1).raw(value),
        None => out.varint(0),
    };
}

fn decode_rows(body: &[u8], count: u32) -> Result<Vec<Row>> {
    let mut from = Reader::new("a frame of the journal", body);
    let mut rows = Vec::new();
    for _ in 0..count {
        let key_len = from.u8()?;
        let key = Key::from_bytes(from.raw(usize::from(key_len))?)?;
        let value = match from.varint()? {
            0 => None,
            len => {
                let len = usize::try_from(len - 1).map_err(|_| from.corrupt("a value is too long"))?;
                Some(from.raw(len)?.to_vec())
            }
        };
        rows.push(Row { key, value });
    }
    from.end()?;
    Ok(rows)
}
