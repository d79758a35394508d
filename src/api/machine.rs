//! The socket of a virtual machine that runs: HTTP/1.1 and JSON, one address for each thing that can be asked.
//!
//! ```text
//!   GET  /v1/vm               tells about it
//!   POST /v1/vm/pause         stops it where it is
//!   POST /v1/vm/resume        lets it go on
//!   POST /v1/vm/checkpoint    makes a checkpoint
//!   POST /v1/vm/stop          asks the guest to switch itself off, and ends it after a minute; asked again, ends it
//!   POST /v1/vm/kill          ends it as a power cut does
//! ```
//!
//! Each answer is that of the first, after it was done, but for that about a checkpoint; an error is what the control socket
//! says.
//!
//! # Rules
//! 1. The socket has mode 0600 and is in a folder of mode 0700: whoever can reach it may use it.
//! 2. What takes time is done on a thread that may wait.
//!
//! Who asks is in `ask`.

mod ask;

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{Path as UrlPath, State};
use axum::http::{StatusCode, Uri, header};
use axum::response::Response as HttpResponse;
use axum::routing::{get, post};
use serde::{Deserialize, Serialize};
use tokio::net::UnixListener;
use tokio::sync::oneshot;
use tokio::task::JoinError;

use super::{Failure, Line};
use crate::error::{Error, Kind, Result};
use crate::media::socket::Socket;
use crate::vmm::{Home, PATIENCE, Runner};
pub use ask::{Act, Listed, ask_machine, checkpoint_machine, kill_machine, list_machines, tell_machine, wait_for_end};

/// File name of the socket in the folder of the machine.
const NAME: &str = "api.sock";
/// Bytes of an order for a checkpoint at most.
const ORDER_MAX: usize = 4096;
/// Connections the kernel keeps before they are accepted.
const BACKLOG: i32 = 16;

/// The socket, until this is dropped.
#[derive(Debug)]
pub struct MachineServer {
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
    /// Its name goes with it.
    _socket: Socket,
}

impl MachineServer {
    /// Starts to answer. The caller holds the lock of the folder, so a socket that is there is nobody's.
    ///
    /// # Errors
    /// When the socket cannot be made.
    pub fn start(home: &Home, runner: Arc<Runner>) -> Result<Self> {
        let cannot = |e| Error::io(format!("cannot make the socket {}", home.path(NAME).display()), e);
        let socket = Socket::listen(&home.path(NAME), BACKLOG)?;
        let copy = socket.listener().try_clone().map_err(cannot)?;
        copy.set_nonblocking(true).map_err(cannot)?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(cannot)?;
        let listener = {
            let _inside = runtime.enter();
            UnixListener::from_std(copy).map_err(cannot)?
        };
        let (stop, stopped) = oneshot::channel::<()>();
        let router = axum::Router::new()
            .route("/v1/vm", get(tell))
            .route("/v1/vm/checkpoint", post(checkpoint))
            .route("/v1/vm/{what}", post(act))
            .fallback(async || failure(&Error::not_found("there is nothing at this address")))
            .with_state(runner);
        let body = move || {
            runtime.block_on(async move {
                let serving = axum::serve(listener, router).with_graceful_shutdown(async {
                    drop(stopped.await);
                });
                if let Err(error) = serving.await {
                    tracing::error!("the socket of the virtual machine failed: {error}");
                }
            });
        };
        let thread = std::thread::Builder::new().name("vm-api".into()).spawn(body).map_err(cannot)?;
        Ok(Self { stop: Some(stop), thread: Some(thread), _socket: socket })
    }
}

impl Drop for MachineServer {
    fn drop(&mut self) {
        // The thread has ended already if nobody takes it.
        self.stop.take().map(|stop| stop.send(()).ok());
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the socket of the virtual machine failed on a mistake in this program");
        }
    }
}

async fn tell(State(runner): State<Arc<Runner>>) -> HttpResponse {
    answer(runner, |_| Ok(())).await
}

/// Reads how long a guest may take: `patience=SECONDS`.
fn patience(query: Option<&str>) -> Result<Duration> {
    let Some(query) = query else { return Ok(PATIENCE) };
    let seconds = query.strip_prefix("patience=").and_then(|seconds| seconds.parse::<u32>().ok());
    seconds
        .map(|seconds| Duration::from_secs(seconds.into()))
        .ok_or_else(|| Error::usage(format!("'{query}' is not understood")).hint("give ?patience=SECONDS"))
}

async fn act(State(runner): State<Arc<Runner>>, UrlPath(what): UrlPath<String>, uri: Uri) -> HttpResponse {
    match what.as_str() {
        "pause" => answer(runner, Runner::pause).await,
        "resume" => match uri.query() {
            None => answer(runner, |runner| runner.resume(false)).await,
            Some("retry=true") => answer(runner, |runner| runner.resume(true)).await,
            Some(query) => failure(&Error::usage(format!("'{query}' is not understood")).hint("give ?retry=true")),
        },
        "stop" => match patience(uri.query()) {
            Ok(patience) => answer(runner, move |runner| runner.stop(patience)).await,
            Err(error) => failure(&error),
        },
        "kill" => answer(runner, |runner| runner.stop(Duration::ZERO)).await,
        _ => failure(&Error::not_found("there is nothing at this address")),
    }
}

/// What is wanted of a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Order {
    /// Its name, without the machine.
    pub name: String,
    /// It has what was written since the last one, and needs that.
    #[serde(default)]
    pub incremental: bool,
}

async fn checkpoint(State(runner): State<Arc<Runner>>, body: Body) -> HttpResponse {
    let bytes = axum::body::to_bytes(body, ORDER_MAX).await;
    let order = bytes.ok().and_then(|bytes| serde_json::from_slice::<Order>(&bytes).ok());
    let Some(Order { name, incremental }) = order else {
        let error = Error::usage("this does not say what checkpoint is wanted");
        return failure(&error.hint("give {\"name\": NAME, \"incremental\": true or false}"));
    };
    tell_done(tokio::task::spawn_blocking(move || runner.checkpoint(&name, incremental)).await)
}

/// Does something and tells about the machine.
async fn answer(runner: Arc<Runner>, act: impl FnOnce(&Runner) -> Result<()> + Send + 'static) -> HttpResponse {
    tell_done(tokio::task::spawn_blocking(move || act(&runner).map(|()| runner.info())).await)
}

fn tell_done<T: Serialize>(done: Result<Result<T>, JoinError>) -> HttpResponse {
    match done {
        Ok(Ok(answer)) => {
            let bytes = serde_json::to_vec(&answer).expect("it holds nothing JSON cannot say");
            http(StatusCode::OK, Body::from(bytes))
        }
        Ok(Err(error)) => failure(&error),
        Err(_) => failure(&Error::failed("a mistake in this program")),
    }
}

fn failure(error: &Error) -> HttpResponse {
    let status = match error.kind() {
        Kind::NotFound => StatusCode::NOT_FOUND,
        Kind::Busy => StatusCode::LOCKED,
        _ => StatusCode::UNPROCESSABLE_ENTITY,
    };
    http(status, Body::from(Line::Error(Failure::from(error)).encode()))
}

fn http(status: StatusCode, body: Body) -> HttpResponse {
    let mut response = HttpResponse::new(body);
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static("application/json"));
    response
}
