//! Reading ahead for programs that read a file in sequence past the kernel's cache, one large request at a time.
//!
//! While an answer is copied to such a program the host's disk would have nothing to do. So what follows is read then, and
//! given out if it is asked for next.
//!
//! # Rules
//! 1. A stretch is given out only if nothing of the file has changed since before it was looked up: each change of a disk
//!    counts ([`crate::disk::Disk::changes`]), after it took effect and before it is acknowledged.
//! 2. One stretch per handle, and it is let go when anything else is read, or when the handle is released.

use std::collections::HashMap;

use super::fuse_wire::Transfer;
use crate::sys::pages::Pages;

/// Bytes of a request that is worth it.
const SIZE_MIN: u32 = 256 << 10;
/// Handles that are watched at a time.
const HANDLES_MAX: usize = 32;

#[derive(Debug)]
enum State {
    /// Nothing is read ahead.
    Idle,
    /// On its way.
    UnderWay,
    /// On its way, and asked for by this request.
    Asked(u64),
    Ready(Pages),
}

/// How a handle is read.
#[derive(Debug)]
struct Stream {
    /// Where the last request ended.
    end: u64,
    /// The stretch that was read ahead.
    offset: u64,
    size: u32,
    stamp: u64,
    number: u64,
    state: State,
}

/// What is read ahead, by handle.
#[derive(Debug, Default)]
pub(super) struct Ahead {
    streams: HashMap<u64, Stream>,
    numbers: u64,
}

/// What there is for a request.
#[derive(Debug)]
pub(super) enum Found {
    /// The data.
    Ready(Pages),
    /// It will be answered when the data is there.
    UnderWay,
    /// Nothing; whether the request goes on where the last one ended.
    Nothing(bool),
}

/// A request that waited for a stretch.
#[derive(Debug, Clone, Copy)]
pub(super) struct Asked {
    pub(super) unique: u64,
    /// Nothing further was asked for since.
    pub(super) go_on: bool,
}

impl Ahead {
    /// Tells whether a request is large enough.
    pub(super) fn worth_it(transfer: &Transfer) -> bool {
        transfer.size >= SIZE_MIN
    }

    /// Notes a request and looks for its data; `stamp` is that of the file as of now.
    pub(super) fn ask(&mut self, transfer: &Transfer, stamp: u64, unique: u64) -> Found {
        if self.streams.len() >= HANDLES_MAX && !self.streams.contains_key(&transfer.handle) {
            self.streams.retain(|_, stream| matches!(stream.state, State::Asked(_)));
        }
        let (offset, end) = (transfer.offset, transfer.offset.saturating_add(transfer.size.into()));
        let fresh = Stream { end: u64::MAX, offset: 0, size: 0, stamp: 0, number: 0, state: State::Idle };
        let stream = self.streams.entry(transfer.handle).or_insert(fresh);
        let goes_on = stream.end == offset;
        stream.end = end;
        if matches!(stream.state, State::Asked(_)) {
            return Found::Nothing(false);
        }
        let fits = stream.offset == offset && stream.size == transfer.size && stream.stamp == stamp;
        match std::mem::replace(&mut stream.state, State::Idle) {
            State::Ready(pages) if fits => Found::Ready(pages),
            State::UnderWay if fits => {
                stream.state = State::Asked(unique);
                Found::UnderWay
            }
            _ => Found::Nothing(goes_on),
        }
    }

    /// Notes that a stretch is being read ahead of a file that had this stamp before it was looked up; returns its number.
    pub(super) fn begin(&mut self, transfer: &Transfer, stamp: u64) -> u64 {
        self.numbers += 1;
        let (number, state) = (self.numbers, State::UnderWay);
        let stream =
            Stream { end: transfer.offset, offset: transfer.offset, size: transfer.size, stamp, number, state };
        self.streams.insert(transfer.handle, stream);
        number
    }

    /// Notes that a stretch was read: `None` if nobody wants it any more, else who asked for it meanwhile, if anybody.
    pub(super) fn done(&mut self, number: u64, handle: u64) -> Option<Option<Asked>> {
        let stream = self.streams.get_mut(&handle).filter(|stream| stream.number == number)?;
        match std::mem::replace(&mut stream.state, State::Idle) {
            State::UnderWay => Some(None),
            State::Asked(unique) => {
                let go_on = stream.end == stream.offset + u64::from(stream.size);
                Some(Some(Asked { unique, go_on }))
            }
            State::Idle | State::Ready(_) => None,
        }
    }

    /// Keeps the data of a stretch for whoever asks next; gives it back if the handle is gone.
    pub(super) fn keep(&mut self, handle: u64, pages: Pages) -> Option<Pages> {
        match self.streams.get_mut(&handle) {
            Some(stream) => {
                stream.state = State::Ready(pages);
                None
            }
            None => Some(pages),
        }
    }

    /// Forgets a handle that was released.
    pub(super) fn forget(&mut self, handle: u64) {
        // Somebody who waits for an answer gets it from the request's own end; the kernel releases nothing before.
        self.streams.remove(&handle);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(offset: u64) -> Transfer {
        Transfer { handle: 7, offset, size: SIZE_MIN, flags: 0 }
    }

    fn page() -> Pages {
        Pages::new(4096).unwrap()
    }

    #[test]
    fn what_was_read_ahead_is_given_out_once_and_only_if_nothing_changed() {
        let (size, mut ahead) = (u64::from(SIZE_MIN), Ahead::default());
        assert!(matches!(ahead.ask(&at(0), 1, 10), Found::Nothing(false)));
        assert!(matches!(ahead.ask(&at(size), 1, 11), Found::Nothing(true)));
        let number = ahead.begin(&at(2 * size), 1);
        assert!(ahead.done(number, 7).unwrap().is_none());
        assert!(ahead.keep(7, page()).is_none());
        assert!(matches!(ahead.ask(&at(2 * size), 1, 12), Found::Ready(_)));
        assert!(matches!(ahead.ask(&at(2 * size), 1, 13), Found::Nothing(false)));
        let number = ahead.begin(&at(3 * size), 1);
        assert!(ahead.done(number, 7).unwrap().is_none());
        assert!(ahead.keep(7, page()).is_none());
        assert!(matches!(ahead.ask(&at(3 * size), 2, 14), Found::Nothing(true)), "the file changed");
    }

    #[test]
    fn who_asks_too_early_is_answered_when_it_is_there() {
        let (size, mut ahead) = (u64::from(SIZE_MIN), Ahead::default());
        let number = ahead.begin(&at(size), 1);
        assert!(matches!(ahead.ask(&at(size), 1, 10), Found::UnderWay));
        let asked = ahead.done(number, 7).unwrap().unwrap();
        assert_eq!((asked.unique, asked.go_on), (10, true));
        let number = ahead.begin(&at(size), 1);
        assert!(matches!(ahead.ask(&at(size), 1, 11), Found::UnderWay));
        assert!(matches!(ahead.ask(&at(2 * size), 1, 12), Found::Nothing(false)));
        assert!(!ahead.done(number, 7).unwrap().unwrap().go_on);
        let number = ahead.begin(&at(size), 1);
        assert!(matches!(ahead.ask(&at(9 * size), 1, 13), Found::Nothing(false)));
        assert!(ahead.done(number, 7).is_none(), "something else was read meanwhile");
        ahead.forget(7);
        assert!(ahead.keep(7, page()).is_some());
    }
}
