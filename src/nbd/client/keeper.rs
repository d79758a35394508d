//! The thread that sees that the server has gone, and finds it again.
//!
//! # Rules
//! 1. It looks again and again, at longer and longer intervals up to [`REST_MAX`], for as long as the client lives.
//! 2. One that is there and makes no sense [`SENSELESS_MAX`] times one after the other, in its answers or in the handshake, is
//!    not asked any more.
//! 3. The log tells that the server has gone, unless it is back at once, again each minute, and that it is back.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};

use super::session::Session;
use super::{CALL_TIME, Now, Place, Shared, Sought};
use crate::clock::{self, Instant};
use crate::error::{Error, Kind, Result};
use crate::nbd::wire::transmission;

/// How long it rests at first, when the server is not there.
const REST: Duration = Duration::from_millis(10);
/// How long it rests at most: a server keeps a disk for a minute.
const REST_MAX: Duration = Duration::from_millis(500);
/// A session that was shorter is followed by a rest: some server parts again and again.
const SHORT: Duration = Duration::from_millis(50);
/// After so long without a server the log tells of it again.
const LONG: Duration = Duration::from_secs(60);
/// Sessions and handshakes one after the other that end on what makes no sense, at most.
const SENSELESS_MAX: u32 = 5;

/// Keeps the client connected until it ends.
pub(super) fn keep(shared: &Shared) {
    let mut senseless = 0;
    loop {
        let session = match &*shared.now.lock() {
            Now::Connected(session) => Arc::clone(session),
            Now::Waiting | Now::Ended(_) => return,
        };
        let begun = clock::now();
        if !watch(shared, &session) {
            return;
        }
        if begun.elapsed() < SHORT {
            rest(shared, REST);
        }
        session.end();
        let (why, strange) = session.reason();
        drop(session);
        {
            let mut now = shared.now.lock();
            if let Now::Ended(_) = *now {
                return;
            }
            *now = Now::Waiting;
        }
        senseless = if strange { senseless + 1 } else { 0 };
        if senseless == SENSELESS_MAX {
            let error = Error::corrupt(format!("{}: the server makes no sense: {why}", shared.title));
            tracing::error!("{error}; it is not asked any more");
            return shared.end(error);
        }
        match find(shared, &why, &mut senseless) {
            Some(Ok(session)) => {
                shared.size.store(session.terms().size, Ordering::Release);
                let mut now = shared.now.lock();
                if let Now::Ended(_) = *now {
                    return;
                }
                *now = Now::Connected(Arc::new(session));
                drop(now);
                shared.release();
            }
            Some(Err(error)) => {
                tracing::error!("{}: {error}; every request fails from now on", shared.title);
                return shared.end(error);
            }
            None => return,
        }
    }
}

/// Waits until the session is over, or (`false`) the client.
fn watch(shared: &Shared, session: &Session) -> bool {
    let mut called: Option<Instant> = None;
    loop {
        if let Now::Ended(_) = *shared.now.lock() {
            return false;
        }
        if session.is_broken() {
            return true;
        }
        called = if shared.is_called() { Some(called.unwrap_or_else(clock::now)) } else { None };
        let left = called.map(|since| CALL_TIME.saturating_sub(since.elapsed()));
        if left.is_some_and(|left| left.is_zero()) {
            tracing::debug!("{}: what the server has not answered is called back", shared.title);
            return true;
        }
        let mut fds = vec![PollFd::new(&shared.bell, PollFlags::IN)];
        fds.extend(session.sockets().map(|socket| PollFd::from_borrowed_fd(socket, PollFlags::RDHUP)));
        let time = left.map(|left| Timespec::try_from(left).expect("less than a second"));
        match rustix::event::poll(&mut fds, time.as_ref()) {
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => {
                tracing::error!("{}: it cannot be seen whether the server is there: {error}", shared.title);
                clock::sleep(REST_MAX);
            }
            Ok(_) if fds[1..].iter().any(|fd| !fd.revents().is_empty()) => return true,
            Ok(_) => quiet(shared),
        }
    }
}

/// Takes what the bell has been rung.
fn quiet(shared: &Shared) {
    // Empty is as good.
    rustix::io::read(&shared.bell, &mut [0_u8; 8]).ok();
}

/// Finds the server again, which has gone, and why; `None` when the client has ended. `senseless` counts on.
fn find(shared: &Shared, why: &str, senseless: &mut u32) -> Option<Result<Session>> {
    let (begun, mut time) = (clock::now(), REST);
    let mut told: Option<Instant> = None;
    loop {
        // In this order: who drops the client looks the other way round.
        shared.seeking.store(true, Ordering::SeqCst);
        if let Now::Ended(_) = *shared.now.lock() {
            return None;
        }
        let failed = match (shared.seek)(true) {
            Sought::At(place) => open(shared, &place).inspect_err(|error| {
                *senseless = if error.kind() == Kind::Corrupt { *senseless + 1 } else { 0 };
            }),
            Sought::Later(error) => Err(error),
            Sought::Never(error) => return Some(Err(error)),
        };
        shared.seeking.store(false, Ordering::SeqCst);
        let failed = match failed {
            Err(error) if error.kind() != Kind::Unsupported && *senseless < SENSELESS_MAX => error,
            // What it is like, or that it makes no sense, is another thing than that it cannot be reached.
            found => {
                if told.is_some() {
                    tracing::info!("{}: the server is back", shared.title);
                }
                return Some(found);
            }
        };
        // One that is back at once has only begun anew, for instance because the disk has grown.
        let title = &shared.title;
        match told {
            None => {
                tracing::warn!("{title}: the server has gone ({why}); requests wait until it is back");
                told = Some(begun);
            }
            Some(then) if then.elapsed() >= LONG => {
                tracing::warn!("{title}: the server is not back yet: {failed}");
                told = Some(clock::now());
            }
            Some(_) => {}
        }
        rest(shared, time);
        time = (time * 2).min(REST_MAX);
    }
}

/// Rests, or less when it is rung: whoever rests looks at the state again.
fn rest(shared: &Shared, time: Duration) {
    let time = Timespec::try_from(time).expect("less than a second");
    rustix::event::poll(&mut [PollFd::new(&shared.bell, PollFlags::IN)], Some(&time)).ok();
    quiet(shared);
}

/// Connects to a server, which has to be as the one before.
fn open(shared: &Shared, place: &Place) -> Result<Session> {
    let session = Session::open(place, shared.connections)?;
    let used = transmission::READ_ONLY
        | transmission::SEND_FLUSH
        | transmission::SEND_FUA
        | transmission::SEND_TRIM
        | transmission::SEND_WRITE_ZEROES;
    if (session.terms().flags ^ shared.flags) & used != 0 {
        return Err(Error::unsupported("the disk came back with other abilities"));
    }
    Ok(session)
}
