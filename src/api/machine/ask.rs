//! Asking the process that runs a machine, which may be stopped, or beyond answering.
//!
//! # Rules
//! 1. Nobody waits for a process that does not answer at all: it is given [`TELL_TIME`] to tell about its machine, or
//!    [`STOPPED_TIME`] if it was stopped (SIGSTOP), and who wants more of it asks for that first. What takes time by its nature
//!    is waited for then.
//! 2. One machine does not keep others from being told of.
//! 3. A process is killed only if it has the machine's lock and its socket, so that no other that got its number is.

use std::io;
use std::path::Path;
use std::time::Duration;

use http_body_util::{BodyExt, Full, Limited};
use hyper::Method;
use hyper::body::Bytes;
use hyper_util::rt::TokioIo;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

use super::{NAME, Order};
use crate::api::client::is_stopped;
use crate::api::{Failure, Line};
use crate::error::{Error, Kind, Result};
use crate::media::socket::ShortPath;
use crate::vmm::{self, Home, Info, Saved};

/// How long a machine may take to tell about itself.
const TELL_TIME: Duration = Duration::from_secs(10);
/// After how long it is looked whether its process was stopped.
const STOPPED_TIME: Duration = Duration::from_secs(1);
/// How long it may take to do what does not wait for the guest or its disks, and what does.
const ACT_TIME: Duration = Duration::from_secs(30);
const PAUSE_TIME: Duration = Duration::from_secs(120);
/// How often a machine that went away while it answered is looked at again, and how far apart.
const LOOKS: u32 = 50;
const LOOK_INTERVAL: Duration = Duration::from_millis(20);
/// How long the process of a machine may take to end after its guest has.
const END_TIME_MAX: Duration = Duration::from_secs(60);
/// Bytes of an answer at most.
const ANSWER_MAX: usize = 1 << 20;
/// Machines that are asked at a time when all are listed.
const ASKED_MAX: usize = 16;

/// What can be asked of a machine that runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Act {
    /// Only tell about it.
    Tell,
    /// Stop it where it is.
    Pause,
    /// Let it go on.
    Resume,
    /// Let it read again what of its memory could not be had.
    Retry,
    /// Ask it to switch itself off, and end it after that many seconds.
    Stop(u32),
    /// End it.
    Kill,
}

impl Act {
    fn request(self) -> (Method, String, Duration) {
        match self {
            Self::Tell => (Method::GET, "/v1/vm".to_owned(), TELL_TIME),
            Self::Pause => (Method::POST, "/v1/vm/pause".to_owned(), PAUSE_TIME),
            Self::Resume => (Method::POST, "/v1/vm/resume".to_owned(), ACT_TIME),
            Self::Retry => (Method::POST, "/v1/vm/resume?retry=true".to_owned(), ACT_TIME),
            Self::Stop(seconds) => (Method::POST, format!("/v1/vm/stop?patience={seconds}"), ACT_TIME),
            Self::Kill => (Method::POST, "/v1/vm/kill".to_owned(), ACT_TIME),
        }
    }
}

/// What came of asking.
enum Reached<T> {
    /// Nobody runs the machine.
    Nobody,
    /// A process does, and does not answer. Its number is known as far as the kernel tells.
    Silent(Option<i32>),
    Answered(T),
}

impl<T> Reached<T> {
    fn or_silent(self, home: &Home) -> Result<Option<T>> {
        match self {
            Self::Nobody => Ok(None),
            Self::Silent(pid) => Err(does_not_answer(home, pid)),
            Self::Answered(answer) => Ok(Some(answer)),
        }
    }
}

fn does_not_answer(home: &Home, pid: Option<i32>) -> Error {
    let name = home.name();
    let process = pid.map(|pid| format!(" (process {pid})")).unwrap_or_default();
    let go_on = pid.map(|pid| format!("'kill -CONT {pid}' lets it go on if it was stopped, and ")).unwrap_or_default();
    Error::busy(format!("the virtual machine {name} does not answer{process}"))
        .hint(format!("{go_on}'afterimage vm stop {name} --force' ends it"))
}

/// Asks the process that runs a machine; `None` when none does.
///
/// # Errors
/// What that process says, or that it went away; `Busy` when it does not answer.
pub fn ask_machine(home: &Home, act: Act) -> Result<Option<Info>> {
    if !matches!(act, Act::Tell | Act::Kill) && reach(home, Act::Tell)?.or_silent(home)?.is_none() {
        return Ok(None);
    }
    reach(home, act)?.or_silent(home)
}

/// Asks, once or, where nothing is done twice by it, again.
fn reach(home: &Home, act: Act) -> Result<Reached<Info>> {
    // One that is being killed takes connections until its memory is given back, and answers none.
    for _ in 0..LOOKS {
        match exchange(home, act) {
            Err(_) if act == Act::Tell => crate::clock::sleep(LOOK_INTERVAL),
            answer => return answer,
        }
    }
    exchange(home, act)
}

/// Tells about a machine, whether it runs, answers or not.
///
/// # Errors
/// What the process says that runs it; that it is not known what it is made of.
pub fn tell_machine(home: &Home) -> Result<Info> {
    match reach(home, Act::Tell)? {
        Reached::Answered(info) => Ok(info),
        Reached::Nobody => Info::of_stopped(home),
        Reached::Silent(pid) => Ok(Info { state: vmm::State::NotAnswering, pid, ..Info::of_stopped(home)? }),
    }
}

/// Has the process that runs a machine make a checkpoint, and returns when that is done; `None` when none runs it.
///
/// # Errors
/// What that process says, or that it went away; `Busy` when it does not answer before it begins.
pub fn checkpoint_machine(home: &Home, order: &Order) -> Result<Option<Saved>> {
    if reach(home, Act::Tell)?.or_silent(home)?.is_none() {
        return Ok(None);
    }
    let body = serde_json::to_vec(order).expect("it holds nothing JSON cannot say");
    // It takes as long as there is memory to write; who is not patient goes away.
    send(home, Method::POST, "/v1/vm/checkpoint", body, None)?.or_silent(home)
}

/// Ends a machine as a power cut does; if its process does not answer, that process. Returns whether there was one.
///
/// # Errors
/// What the process says; `Busy` when it does not answer and cannot be killed.
pub fn kill_machine(home: &Home) -> Result<bool> {
    let pid = match exchange(home, Act::Kill)? {
        Reached::Nobody => return Ok(false),
        Reached::Answered(_) => return Ok(true),
        Reached::Silent(pid) => pid,
    };
    let silent = || does_not_answer(home, pid);
    let number = pid.and_then(Pid::from_raw).ok_or_else(silent)?;
    let process = match pidfd_open(number, PidfdFlags::empty()) {
        // It has ended meanwhile.
        Err(rustix::io::Errno::SRCH) => return Ok(true),
        process => process.map_err(|e| silent().because(e))?,
    };
    // Looked at once more when its number can be no other's any more.
    if !home.is_locked()? || holder(home)? != pid {
        return Ok(true);
    }
    tracing::warn!("the virtual machine {} does not answer; its process {number} is killed", home.name());
    pidfd_send_signal(process, Signal::KILL).map_err(|e| {
        Error::io(format!("cannot kill the process {number} of the virtual machine {}", home.name()), e.into())
    })?;
    Ok(true)
}

fn exchange(home: &Home, act: Act) -> Result<Reached<Info>> {
    let (method, path, limit) = act.request();
    send(home, method, &path, Vec::new(), Some(limit))
}

fn runtime(home: &Home) -> Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(|e| cannot(home, e))
}

fn cannot(home: &Home, error: io::Error) -> Error {
    Error::io(format!("cannot reach the virtual machine {}", home.name()), error)
}

/// Connects to a socket of a machine.
async fn connect(home: &Home, socket: &str) -> io::Result<UnixStream> {
    UnixStream::connect(ShortPath::of(&home.path(socket))?.path()).await
}

/// Returns the number of the process that listens, as far as the kernel tells. A socket at which many have waited in vain
/// lets nobody in any more, and the other one may.
fn holder(home: &Home) -> Result<Option<i32>> {
    Ok(runtime(home)?.block_on(async {
        for socket in [NAME, vmm::SERIAL_SOCKET] {
            if let Ok(stream) = connect(home, socket).await {
                return stream.peer_cred().ok().and_then(|peer| peer.pid());
            }
        }
        None
    }))
}

/// Sends a request to the process that runs a machine, and waits for the answer for so long.
fn send<T: DeserializeOwned>(
    home: &Home,
    method: Method,
    path: &str,
    body: Vec<u8>,
    limit: Option<Duration>,
) -> Result<Reached<T>> {
    let runtime = runtime(home)?;
    let stream = match runtime.block_on(connect(home, NAME)) {
        Ok(stream) => stream,
        Err(error) => {
            return match error.kind() {
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => Ok(Reached::Nobody),
                // As many wait for it to answer as it lets wait.
                io::ErrorKind::WouldBlock => Ok(Reached::Silent(holder(home)?)),
                _ => Err(cannot(home, error)),
            };
        }
    };
    let pid = stream.peer_cred().ok().and_then(|peer| peer.pid());
    let answer = talk(home, stream, method, path, body);
    let answer = runtime.block_on(async {
        match limit {
            Some(limit) => tokio::select! {
                answer = answer => Some(answer),
                () = silence(pid, limit) => None,
            },
            None => Some(answer.await),
        }
    });
    answer.map_or(Ok(Reached::Silent(pid)), |answer| answer.map(Reached::Answered))
}

/// Waits for as long as a process may say nothing.
async fn silence(pid: Option<i32>, limit: Duration) {
    tokio::time::sleep(STOPPED_TIME).await;
    if !pid.is_some_and(is_stopped) {
        tokio::time::sleep(limit.saturating_sub(STOPPED_TIME)).await;
    }
}

async fn talk<T: DeserializeOwned>(
    home: &Home,
    stream: UnixStream,
    method: Method,
    path: &str,
    body: Vec<u8>,
) -> Result<T> {
    let gone = || Error::failed(format!("the virtual machine {} ended before it answered", home.name()));
    let lost = |e: hyper::Error| gone().because(e);
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(lost)?;
    // Its error also reaches whoever waits for the answer.
    tokio::spawn(async move { drop(connection.await) });
    let request = hyper::Request::builder()
        .method(method)
        .uri(path)
        .header(hyper::header::HOST, "afterimage")
        .body(Full::new(Bytes::from(body)))
        .expect("all parts are constants");
    let response = sender.send_request(request).await.map_err(lost)?;
    let good = response.status().is_success();
    let body = Limited::new(response.into_body(), ANSWER_MAX).collect().await.map_err(|_| gone())?.to_bytes();
    let strange = |e: serde_json::Error| Error::failed("the virtual machine gave a strange answer").because(e);
    if good {
        return serde_json::from_slice(&body).map_err(strange);
    }
    match serde_json::from_slice(&body).map_err(strange)? {
        Line::Error(failure) => Err(failure.into()),
        _ => Err(gone()),
    }
}

/// Waits until nobody runs a machine any more, and tells about it then.
///
/// # Errors
/// Those of [`ask_machine`]; `Busy` when it takes longer than that many seconds and some.
pub fn wait_for_end(home: &Home, seconds: u32) -> Result<Info> {
    let until = crate::clock::now() + Duration::from_secs(seconds.into()) + END_TIME_MAX;
    while runs(home)? || home.is_locked()? {
        if crate::clock::now() >= until {
            return Err(Error::busy(format!("the virtual machine {} does not end", home.name()))
                .hint("a request to one of its disks may not have been answered; vmm.log in its folder may say more"));
        }
        crate::clock::sleep(LOOK_INTERVAL);
    }
    Info::of_stopped(home)
}

fn runs(home: &Home) -> Result<bool> {
    Ok(match reach(home, Act::Tell)? {
        Reached::Nobody => false,
        // It may be about to end.
        Reached::Silent(_) => true,
        Reached::Answered(info) => info.state != vmm::State::Ended,
    })
}

/// A machine of a pool, in the list of all.
#[derive(Debug, Serialize)]
#[serde(untagged)]
pub enum Listed {
    /// It can be told about.
    Known(Box<Info>),
    /// It cannot.
    Unknown {
        /// Its name.
        name: String,
        /// `damaged` when its definition makes no sense, else `unknown`.
        state: &'static str,
        /// Why.
        error: Failure,
    },
}

impl Listed {
    fn of(home: &Home) -> Option<Self> {
        match tell_machine(home) {
            Ok(info) => Some(Self::Known(Box::new(info))),
            // Removed meanwhile.
            Err(_) if !home.exists() => None,
            Err(error) => {
                let state = if error.kind() == Kind::Corrupt { "damaged" } else { "unknown" };
                Some(Self::Unknown { name: home.name().to_owned(), state, error: Failure::from(&error) })
            }
        }
    }
}

/// Tells about every machine of a pool, whether it runs or not.
///
/// # Errors
/// Those of the host with the folder of all machines.
pub fn list_machines(pool: &Path) -> Result<Vec<Listed>> {
    let homes = Home::list(pool)?;
    let mut machines = Vec::with_capacity(homes.len());
    for homes in homes.chunks(ASKED_MAX) {
        std::thread::scope(|scope| {
            let asked: Vec<_> = homes.iter().map(|home| scope.spawn(|| Listed::of(home))).collect();
            for one in asked {
                machines.extend(one.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
            }
        });
    }
    Ok(machines)
}
