//! The thread that sees that the server has gone, and finds it again.
//!
//! # Rules
//! 1. It looks again and again, at longer and longer intervals up to [`REST_MAX`], for as long as the client lives.
//! 2. The log tells once that the server has gone, once more after a minute, and that it is back.

use std::sync::Arc;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};

use super::session::Session;
use super::{Now, Place, Shared, Sought};
use crate::clock;
use crate::error::{Error, Kind, Result};
use crate::nbd::wire::transmission;

/// How long it rests at first, when the server is not there.
const REST: Duration = Duration::from_millis(10);
/// How long it rests at most: a server keeps a disk for a minute.
const REST_MAX: Duration = Duration::from_millis(500);
/// After so long without a server the log tells of it again.
const LONG: Duration = Duration::from_secs(60);
/// Sessions one after the other that end on what makes no sense, at most.
const SENSELESS_MAX: u32 = 5;

/// Keeps the client connected until it ends.
pub(super) fn keep(shared: &Shared) {
    let mut senseless = 0;
    loop {
        let session = match &*shared.now.lock() {
            Now::Connected(session) => Arc::clone(session),
            Now::Waiting | Now::Ended(_) => return,
        };
        if !watch(shared, &session) {
            return;
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
        tracing::warn!("{}: the server has gone ({why}); requests wait until it is back", shared.title);
        match find(shared) {
            Some(Ok(session)) => {
                shared.size.store(session.terms().size, std::sync::atomic::Ordering::Release);
                let mut now = shared.now.lock();
                if let Now::Ended(_) = *now {
                    return;
                }
                *now = Now::Connected(Arc::new(session));
                drop(now);
                shared.changed.notify_all();
                tracing::info!("{}: the server is back", shared.title);
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
    loop {
        if let Now::Ended(_) = *shared.now.lock() {
            return false;
        }
        if session.is_broken() {
            return true;
        }
        let mut fds = vec![PollFd::new(&shared.bell, PollFlags::IN)];
        fds.extend(session.sockets().map(|socket| PollFd::from_borrowed_fd(socket, PollFlags::RDHUP)));
        match rustix::event::poll(&mut fds, None) {
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

/// Finds the server again; `None` when the client has ended.
fn find(shared: &Shared) -> Option<Result<Session>> {
    let (begun, mut rest, mut told) = (clock::now(), REST, false);
    loop {
        if let Now::Ended(_) = *shared.now.lock() {
            return None;
        }
        let failed = match (shared.seek)(true) {
            Sought::At(place) => match open(shared, &place) {
                Ok(session) => return Some(Ok(session)),
                // What it is like is another thing than that it cannot be reached.
                Err(error) if error.kind() == Kind::Unsupported => return Some(Err(error)),
                Err(error) => error,
            },
            Sought::Later(error) => error,
            Sought::Never(error) => return Some(Err(error)),
        };
        if !told && begun.elapsed() >= LONG {
            told = true;
            tracing::warn!("{}: the server is not back yet: {failed}", shared.title);
        }
        let time = Timespec::try_from(rest).expect("less than a second");
        // Rung or not: it is looked at the state above.
        rustix::event::poll(&mut [PollFd::new(&shared.bell, PollFlags::IN)], Some(&time)).ok();
        quiet(shared);
        rest = (rest * 2).min(REST_MAX);
    }
}

/// Connects to a server, which has to be as the one before.
fn open(shared: &Shared, place: &Place) -> Result<Session> {
    let session = Session::open(&place.path, &place.name, shared.connections)?;
    let used = transmission::READ_ONLY
        | transmission::SEND_FLUSH
        | transmission::SEND_FUA
        | transmission::SEND_TRIM
        | transmission::SEND_WRITE_ZEROES;
    if (session.terms().flags ^ shared.flags) & used != 0 {
        return Err(Error::failed("the disk came back with other abilities"));
    }
    Ok(session)
}
