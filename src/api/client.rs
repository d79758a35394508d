//! The other end of the control socket.
//!
//! # Rules
//! 1. An error that crossed the socket is the error the server had: kind, sentence and hint.
//! 2. An answer without a last line is an error: nobody knows whether the work was done.
//! 3. Going away cancels, so a caller that gives up only has to drop the connection.
//! 4. A server that says nothing is waited for, however long: it may be at work. But the log says that it is, and who.

use std::cell::Cell;
use std::convert::Infallible;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;

use super::{Line, Request, Response, SOCKET_NAME};
use crate::clock::{self, Instant};
use crate::error::{Error, Result};
use crate::media::socket::ShortPath;
use crate::progress::Progress;

/// Most bytes of one line: 100,000 snapshots have 40 MiB.
const LINE_SIZE_MAX: usize = 256 << 20;

/// How often the caller is asked whether it still wants the answer.
const CANCEL_INTERVAL: Duration = Duration::from_millis(50);

/// How long a server may say nothing before the log tells of it.
const SILENCE: Duration = Duration::from_secs(5);

/// When something was heard of the server last, and which process it is.
#[derive(Debug)]
struct Heard {
    at: Cell<Instant>,
    pid: Cell<Option<i32>>,
}

/// A server that answers.
#[derive(Debug)]
pub struct Client {
    pool: PathBuf,
    socket: ShortPath,
}

impl Client {
    /// Finds the server of a pool; `None` when nobody listens.
    ///
    /// # Errors
    /// `Kind::Denied` and its like when there is a socket that cannot be used.
    pub fn find(pool: &Path) -> Result<Option<Self>> {
        let socket = ShortPath::of(&pool.join(SOCKET_NAME))
            .map_err(|e| Error::io(format!("cannot open {}", pool.display()), e))?;
        match std::os::unix::net::UnixStream::connect(socket.path()) {
            Ok(_) => Ok(Some(Self { pool: pool.to_owned(), socket })),
            Err(error) => match error.kind() {
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => Ok(None),
                _ => Err(Error::io(format!("cannot reach the server of the pool {}", pool.display()), error)),
            },
        }
    }

    /// Asks, tells `progress` how it goes and returns the answer.
    ///
    /// # Errors
    /// What the server says, or that it went away.
    pub fn ask(&self, request: &Request, progress: &dyn Progress) -> Result<Response> {
        let body = serde_json::to_vec(request).expect("these types hold nothing JSON cannot say");
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|e| Error::io("cannot start the client", e))?;
        let heard = Heard { at: Cell::new(clock::now()), pid: Cell::new(None) };
        runtime.block_on(async {
            tokio::select! {
                answer = self.exchange(body, progress, &heard) => answer,
                () = cancelled(progress) => Err(Error::failed("stopped before it was done, as asked")),
                never = self.tell_of_silence(&heard) => match never {},
            }
        })
    }

    async fn tell_of_silence(&self, heard: &Heard) -> Infallible {
        let mut told = None;
        loop {
            tokio::time::sleep(SILENCE.saturating_sub(heard.at.get().elapsed()).max(CANCEL_INTERVAL)).await;
            let at = heard.at.get();
            if at.elapsed() >= SILENCE && told != Some(at) {
                told = Some(at);
                let server = format!("the server of the pool {}", self.pool.display());
                match heard.pid.get() {
                    Some(pid) if is_stopped(pid) => tracing::warn!(
                        "{server}, process {pid}, is stopped; 'kill -CONT {pid}' lets it go on, and this waits for it"
                    ),
                    Some(pid) => tracing::warn!(
                        "{server}, process {pid}, has said nothing for {} s; this goes on waiting for it",
                        SILENCE.as_secs()
                    ),
                    None => tracing::warn!("{server} lets nobody in; this goes on waiting for it"),
                }
            }
        }
    }

    async fn exchange(&self, body: Vec<u8>, progress: &dyn Progress, heard: &Heard) -> Result<Response> {
        let lost = |error: hyper::Error| self.lost().because(error);
        let stream = UnixStream::connect(self.socket.path()).await.map_err(|e| self.lost().because(e))?;
        heard.pid.set(stream.peer_cred().ok().and_then(|peer| peer.pid()));
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(lost)?;
        // Its error also reaches whoever waits for the answer.
        tokio::spawn(async move { drop(connection.await) });
        let request = hyper::Request::post("/v1/request")
            .header(hyper::header::HOST, "afterimage")
            .header(hyper::header::CONTENT_TYPE, "application/json")
            .body(Full::new(Bytes::from(body)))
            .expect("all parts are constants");
        let answer = sender.send_request(request).await.map_err(lost)?;
        self.read(answer.into_body(), progress, heard).await
    }

    async fn read(&self, mut body: Incoming, progress: &dyn Progress, heard: &Heard) -> Result<Response> {
        let mut buffer = Vec::new();
        let mut relay = Relay { progress, done: 0 };
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|e| self.lost().because(e))?;
            heard.at.set(clock::now());
            let Some(data) = frame.data_ref() else { continue };
            // Only the new bytes can hold the end of the line.
            let mut searched = buffer.len();
            buffer.extend_from_slice(data);
            while let Some(at) = buffer[searched..].iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = buffer.drain(..=searched + at).collect();
                searched = 0;
                match serde_json::from_slice(&line).map_err(|e| self.strange().because(e))? {
                    Line::Progress { done, total, message } => relay.report(done, total, &message),
                    Line::Instant {} => progress.instant(),
                    Line::Result(response) => return Ok(response),
                    Line::Error(failure) => return Err(failure.into()),
                }
            }
            if buffer.len() > LINE_SIZE_MAX {
                return Err(self.strange());
            }
        }
        Err(self.lost())
    }

    fn lost(&self) -> Error {
        Error::failed(format!("the server of the pool {} went away before it answered", self.pool.display())).hint(
            format!(
                "whether the work was done is not known; look with 'ls', and at {}/server.log",
                self.pool.display()
            ),
        )
    }

    fn strange(&self) -> Error {
        Error::failed(format!("the server of the pool {} gave an answer that makes no sense", self.pool.display()))
            .hint("is it of another version? 'afterimage doctor' tells")
    }
}

/// Tells whether a process was stopped, by a signal or a debugger.
pub(super) fn is_stopped(pid: i32) -> bool {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The name before it may have blanks and brackets of its own.
    let state = text.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next());
    matches!(state, Some('T' | 't'))
}

async fn cancelled(progress: &dyn Progress) {
    while !progress.cancelled() {
        tokio::time::sleep(CANCEL_INTERVAL).await;
    }
}

/// Turns the totals on the wire into steps.
struct Relay<'a> {
    progress: &'a dyn Progress,
    done: u64,
}

impl Relay<'_> {
    fn report(&mut self, done: u64, total: u64, message: &str) {
        self.progress.total(total);
        if !message.is_empty() {
            self.progress.message(message);
        }
        self.progress.advance(done.saturating_sub(self.done));
        self.done = done;
    }
}
