//! The control socket: HTTP/1.1 and JSON for whoever may use the pool.
//!
//! `POST /v1/request` takes a [`Request`] and answers with lines: progress while the work goes on, then the result or
//! the error. A few `GET`s make `curl` pleasant. Handlers do nothing but carry: the work runs on a blocking thread.
//!
//! # Rules
//! 1. The socket has mode 0600 from the moment it exists, and each peer is asked for its user besides.
//! 2. Only the holder of the pool's lock listens ([`Socket`] has the rest).
//! 3. The status of an answer is that of its first line. Once progress was reported it is 200 and the last line counts.
//! 4. A client that goes away cancels its request; so does the end of the server.
//!
//! # After a crash
//! The socket file stays and refuses connections, until rule 2.

use std::fmt;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::thread::JoinHandle;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::connect_info::Connected;
use axum::extract::{ConnectInfo, Path as UrlPath, State};
use axum::http::{StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::Response as HttpResponse;
use axum::routing::{get, post};
use axum::serve::IncomingStream;
use hyper::body::{Bytes, Frame};
use tokio::net::UnixListener;
use tokio::runtime::Runtime;
use tokio::sync::{Notify, mpsc, oneshot};

use super::{Answer, Failure, Line, Request, Response, SOCKET_NAME};
use crate::error::{Error, Kind, Result};
use crate::media::socket::Socket;
use crate::pool::PoolLock;
use crate::progress::Progress;
use crate::sync::Mutex;

/// Most bytes of a request: the longest one names 1024 snapshots of 249 bytes.
pub const BODY_SIZE_MAX: usize = 1 << 20;

/// How often progress is reported at most. A request that ends sooner has a status of its own.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(250);

/// How long the end of the server waits for answers on their way.
const STOP_TIME_MAX: Duration = Duration::from_secs(10);

/// Connections the kernel keeps before they are accepted.
const BACKLOG: i32 = 128;

/// A running server.
pub struct Server {
    stop: oneshot::Sender<()>,
    thread: JoinHandle<()>,
    socket: Socket,
}

impl Server {
    /// Starts to answer on the control socket of `pool`. Whoever calls holds the lock of the pool and shows it.
    ///
    /// # Errors
    /// `Kind::Io` and its like when the socket cannot be made.
    pub fn start(pool: &Path, _lock: &PoolLock, answer: Arc<dyn Answer>) -> Result<Self> {
        let socket = Socket::listen(&pool.join(SOCKET_NAME), BACKLOG)?;
        let copy = || {
            let listener = socket.listener().try_clone()?;
            listener.set_nonblocking(true)?;
            Ok(listener)
        };
        let listener = copy().map_err(|e| Error::io("cannot start the server", e))?;
        // Two threads: one would do, but then a stuck peer check would stop everybody.
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("api")
            .enable_all()
            .build()
            .map_err(|e| Error::io("cannot start the server", e))?;
        let listener = {
            let _inside = runtime.enter();
            UnixListener::from_std(listener).map_err(|e| Error::io("cannot start the server", e))?
        };
        let (stop, stopped) = oneshot::channel();
        let thread = std::thread::Builder::new()
            .name("api-main".into())
            .spawn(move || serve(runtime, listener, answer, stopped))
            .map_err(|e| Error::io("cannot start the server", e))?;
        Ok(Self { stop, thread, socket })
    }

    /// Ends the server: requests under way are cancelled, answers on their way are sent, the socket file is removed.
    pub fn stop(self) {
        // The receiver is gone only when the thread has ended already.
        self.stop.send(()).ok();
        if self.thread.join().is_err() {
            tracing::error!("the thread of the control socket panicked");
        }
        self.socket.remove();
    }
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Server").field("socket", &self.socket).finish_non_exhaustive()
    }
}

#[derive(Clone)]
struct Shared {
    answer: Arc<dyn Answer>,
    stopping: Arc<AtomicBool>,
}

fn serve(runtime: Runtime, listener: UnixListener, answer: Arc<dyn Answer>, stopped: oneshot::Receiver<()>) {
    let stopping = Arc::new(AtomicBool::new(false));
    let router = router(Shared { answer, stopping: Arc::clone(&stopping) });
    let (draining, drained) = oneshot::channel::<()>();
    runtime.block_on(async move {
        let stop = async move {
            // An error means that the server value was dropped: stop as well.
            drop(stopped.await);
            stopping.store(true, Ordering::Release);
            draining.send(()).ok();
        };
        let service = router.into_make_service_with_connect_info::<Peer>();
        let serving = axum::serve(listener, service).with_graceful_shutdown(stop).into_future();
        let late = async move {
            drop(drained.await);
            tokio::time::sleep(STOP_TIME_MAX).await;
        };
        tokio::select! {
            result = serving => if let Err(error) = result {
                tracing::error!("the control socket failed: {error}");
            },
            () = late => tracing::warn!("an answer on the control socket was cut off: its reader is too slow"),
        }
    });
    runtime.shutdown_timeout(STOP_TIME_MAX);
}

fn router(shared: Shared) -> Router {
    Router::new()
        .route("/v1/request", post(answer_request))
        .route("/v1/status", get(|state| answer_get(state, Request::Status {})))
        .route("/v1/disks", get(|state| answer_get(state, Request::Ls { disk: None })))
        .route("/v1/disks/{name}", get(|state, UrlPath(name)| answer_get(state, Request::Info { name })))
        .route(
            "/v1/disks/{name}/snapshots",
            get(|state, UrlPath(name)| answer_get(state, Request::Ls { disk: Some(name) })),
        )
        .route("/v1/metrics", get(|state| answer_get(state, Request::Metrics {})))
        .fallback(async || failure(StatusCode::NOT_FOUND, &Error::not_found("there is nothing at this address")))
        .method_not_allowed_fallback(async || {
            let error = Error::usage("this address does not take that method").hint("see afterimage-api(5)");
            failure(StatusCode::METHOD_NOT_ALLOWED, &error)
        })
        .layer(middleware::from_fn(admit))
        .with_state(shared)
}

/// The user at the other end.
#[derive(Debug, Clone, Copy)]
struct Peer {
    uid: Option<u32>,
}

impl Connected<IncomingStream<'_, UnixListener>> for Peer {
    fn connect_info(stream: IncomingStream<'_, UnixListener>) -> Self {
        Self { uid: stream.io().peer_cred().ok().map(|cred| cred.uid()) }
    }
}

/// Lets in the user of this process and root.
async fn admit(ConnectInfo(peer): ConnectInfo<Peer>, request: axum::extract::Request, next: Next) -> HttpResponse {
    let own = rustix::process::geteuid().as_raw();
    if peer.uid.is_some_and(|uid| uid == 0 || uid == own) {
        return next.run(request).await;
    }
    let error = Error::new(Kind::Denied, "this pool belongs to another user").hint("ask as that user or as root");
    failure(StatusCode::FORBIDDEN, &error)
}

async fn answer_request(State(shared): State<Shared>, body: Body) -> HttpResponse {
    let Ok(body) = axum::body::to_bytes(body, BODY_SIZE_MAX).await else {
        let error = Error::usage(format!("the request is longer than {BODY_SIZE_MAX} bytes, or was cut off"));
        return failure(StatusCode::PAYLOAD_TOO_LARGE, &error);
    };
    let request = match serde_json::from_slice::<Request>(&body) {
        Ok(request) => request,
        Err(error) => {
            let error = Error::usage(format!("this is not a request: {error}")).hint("see afterimage-api(5)");
            return failure(StatusCode::BAD_REQUEST, &error);
        }
    };
    let mut lines = begin(shared, request);
    let first = lines.recv().await.unwrap_or_else(cut_off);
    let status = match &first {
        Line::Error(failure) => status_of(failure),
        _ => StatusCode::OK,
    };
    http(status, "application/x-ndjson", Body::new(Lines { first: Some(first), rest: lines }))
}

/// Answers a `GET`: the bare answer, without progress.
async fn answer_get(State(shared): State<Shared>, request: Request) -> HttpResponse {
    let mut lines = begin(shared, request);
    loop {
        match lines.recv().await.unwrap_or_else(cut_off) {
            Line::Progress { .. } | Line::Instant {} => {}
            Line::Result(Response::Metrics { text }) => {
                return http(StatusCode::OK, "text/plain; version=0.0.4; charset=utf-8", Body::from(text));
            }
            Line::Result(response) => {
                let mut bytes = serde_json::to_vec(&response).expect("these types hold nothing JSON cannot say");
                bytes.push(b'\n');
                return http(StatusCode::OK, "application/json", Body::from(bytes));
            }
            Line::Error(error) => {
                let status = status_of(&error);
                return http(status, "application/json", Body::from(Line::Error(error).encode()));
            }
        }
    }
}

/// Starts the work; dropping the receiver cancels it.
fn begin(shared: Shared, request: Request) -> mpsc::Receiver<Line> {
    let (lines, reader) = mpsc::channel(16);
    tokio::spawn(drive(shared, request, lines));
    reader
}

/// Runs one request to its end, whether or not anybody is still listening.
async fn drive(shared: Shared, request: Request, lines: mpsc::Sender<Line>) {
    let tracker = Arc::new(Tracker::default());
    let mut work = tokio::task::spawn_blocking({
        let tracker = Arc::clone(&tracker);
        move || shared.answer.answer(request, &*tracker)
    });
    let mut tick = tokio::time::interval_at(tokio::time::Instant::now() + PROGRESS_INTERVAL, PROGRESS_INTERVAL);
    let mut listening = true;
    loop {
        tokio::select! {
            biased;
            outcome = &mut work => {
                let line = match outcome {
                    Ok(Ok(response)) => Line::Result(response),
                    Ok(Err(error)) => Line::Error(Failure::from(&error)),
                    Err(_) => Line::Error(Failure::from(&Error::failed("the server made a mistake in this request")
                        .hint("its log says more; the pool is as safe as after a crash"))),
                };
                // Nobody listens any more: nobody wants to know.
                drop(lines.send(line).await);
                return;
            }
            () = lines.closed(), if listening => {
                listening = false;
                tracker.cancelled.store(true, Ordering::Release);
            }
            () = tracker.instant.notified() => {
                // Whoever waits for it stands still: it is not left out, as a report may be.
                drop(lines.send(Line::Instant {}).await);
            }
            _ = tick.tick() => {
                if shared.stopping.load(Ordering::Acquire) {
                    tracker.cancelled.store(true, Ordering::Release);
                }
                if let Some(line) = tracker.news() {
                    // A reader that lags misses a report, and the work does not wait for it.
                    drop(lines.try_send(line));
                }
            }
        }
    }
}

fn cut_off() -> Line {
    Line::Error(Failure::from(&Error::failed("the server ends and did not finish this request")))
}

/// How far the work is; written by it, read at each tick.
#[derive(Debug, Default)]
struct Tracker {
    state: Mutex<Track>,
    cancelled: AtomicBool,
    instant: Notify,
}

#[derive(Debug, Default)]
struct Track {
    done: u64,
    total: u64,
    message: String,
    news: bool,
}

impl Tracker {
    fn news(&self) -> Option<Line> {
        let mut track = self.state.lock();
        if !std::mem::take(&mut track.news) {
            return None;
        }
        Some(Line::Progress { done: track.done, total: track.total, message: track.message.clone() })
    }

    fn update(&self, change: impl FnOnce(&mut Track)) {
        let mut track = self.state.lock();
        change(&mut track);
        track.news = true;
    }
}

impl Progress for Tracker {
    fn total(&self, units: u64) {
        self.update(|track| track.total = units);
    }

    fn advance(&self, done: u64) {
        self.update(|track| track.done = track.done.saturating_add(done));
    }

    fn message(&self, text: &str) {
        self.update(|track| text.clone_into(&mut track.message));
    }

    fn instant(&self) {
        self.instant.notify_one();
    }

    fn cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Acquire)
    }
}

/// The lines as the body of an answer.
struct Lines {
    first: Option<Line>,
    rest: mpsc::Receiver<Line>,
}

impl hyper::body::Body for Lines {
    type Data = Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        let frame = |line: Line| Ok(Frame::data(Bytes::from(line.encode())));
        match self.first.take() {
            Some(line) => Poll::Ready(Some(frame(line))),
            None => self.rest.poll_recv(cx).map(|line| line.map(frame)),
        }
    }
}

fn http(status: StatusCode, kind: &'static str, body: Body) -> HttpResponse {
    let mut response = HttpResponse::new(body);
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static(kind));
    response
}

fn failure(status: StatusCode, error: &Error) -> HttpResponse {
    http(status, "application/json", Body::from(Line::Error(Failure::from(error)).encode()))
}

/// Turns the kind of an error into the status of an answer.
fn status_of(failure: &Failure) -> StatusCode {
    match Kind::by_name(&failure.kind) {
        Some(Kind::Usage) => StatusCode::BAD_REQUEST,
        Some(Kind::NotFound) => StatusCode::NOT_FOUND,
        Some(Kind::Exists) => StatusCode::CONFLICT,
        Some(Kind::Busy) => StatusCode::LOCKED,
        Some(Kind::NoSpace) => StatusCode::INSUFFICIENT_STORAGE,
        Some(Kind::ReadOnly) => StatusCode::SERVICE_UNAVAILABLE,
        Some(Kind::Unsupported) => StatusCode::NOT_IMPLEMENTED,
        Some(Kind::Denied) => StatusCode::FORBIDDEN,
        Some(Kind::Failed) => StatusCode::UNPROCESSABLE_ENTITY,
        _ => StatusCode::INTERNAL_SERVER_ERROR,
    }
}
