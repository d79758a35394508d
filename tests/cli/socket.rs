//! Client and server over a real socket, in front of something that answers as the test wants.

use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use afterimage::api::server::BODY_SIZE_MAX;
use afterimage::api::{Answer, Client, Request, Response, Server};
use afterimage::error::{Error, Kind, Result};
use afterimage::pool::PoolLock;
use afterimage::progress::{Progress, Silent};
use afterimage::sync::Mutex;

const PATIENCE: Duration = Duration::from_secs(20);

/// Answers `info` with an error, works for ever on `scrub`, panics on `check`, and is done with the rest.
struct Fake {
    cancelled: Mutex<Sender<()>>,
}

impl Answer for Fake {
    fn answer(&self, request: Request, progress: &dyn Progress) -> Result<Response> {
        match request {
            Request::Info { name } => Err(Error::not_found(format!("there is no '{name}'")).hint("look with ls")),
            Request::Resize { .. } => Err(Error::busy("in use")),
            Request::Check { .. } => panic!("as the test wants"),
            Request::Metrics {} => Ok(Response::Metrics { text: "a 1\n".into() }),
            Request::Rm { name, .. } => Ok(Response::Removed { name }),
            Request::Scrub {} => {
                progress.total(1 << 40);
                progress.message("reading");
                while !progress.cancelled() {
                    progress.advance(4096);
                    std::thread::sleep(Duration::from_millis(5));
                }
                self.cancelled.lock().send(()).unwrap();
                Err(Error::failed("cancelled"))
            }
            Request::Reclaim { .. } => {
                progress.total(3);
                progress.advance(3);
                std::thread::sleep(Duration::from_millis(600));
                Ok(Response::Reclaimed { freed: 7, complete: true })
            }
            _ => Ok(Response::Flushed {}),
        }
    }
}

struct Setup {
    _dir: tempfile::TempDir,
    pool: PathBuf,
    _lock: PoolLock,
    server: Option<Server>,
    cancelled: Receiver<()>,
}

impl Setup {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let pool = dir.path().to_owned();
        Self::at(dir, pool)
    }

    fn at(dir: tempfile::TempDir, pool: PathBuf) -> Self {
        let lock = PoolLock::take(&pool).unwrap();
        let (sender, cancelled) = channel();
        let answer = Arc::new(Fake { cancelled: Mutex::new(sender) });
        let server = Some(Server::start(&pool, &lock, answer).unwrap());
        Self { _dir: dir, pool, _lock: lock, server, cancelled }
    }

    fn client(&self) -> Client {
        Client::find(&self.pool).unwrap().expect("it answers")
    }

    fn http(&self, head: &str, body: &[u8]) -> (u16, String) {
        http(&self.pool, head, body)
    }

    fn post(&self, body: &str) -> (u16, String) {
        self.http("POST /v1/request", body.as_bytes())
    }
}

impl Drop for Setup {
    fn drop(&mut self) {
        if let Some(server) = self.server.take() {
            server.stop();
        }
    }
}

/// Speaks HTTP by hand and returns status and body, chunks and all.
fn http(pool: &Path, head: &str, body: &[u8]) -> (u16, String) {
    let mut stream = UnixStream::connect(pool.join("control.sock")).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let length = body.len();
    let head = format!("{head} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n");
    stream.write_all(head.as_bytes()).unwrap();
    // The server may refuse before it has read all of it.
    stream.write_all(body).ok();
    let mut answer = Vec::new();
    if let Err(error) = stream.read_to_end(&mut answer) {
        assert!(!answer.is_empty(), "{error}");
    }
    let answer = String::from_utf8(answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
}

/// Progress that counts, and stops when told.
#[derive(Default)]
struct Seen {
    total: AtomicU64,
    done: AtomicU64,
    stop_at_first: bool,
    stop: AtomicBool,
}

impl Progress for Seen {
    fn total(&self, units: u64) {
        self.total.store(units, Ordering::SeqCst);
    }

    fn advance(&self, done: u64) {
        self.done.fetch_add(done, Ordering::SeqCst);
        self.stop.store(self.stop_at_first, Ordering::SeqCst);
    }

    fn message(&self, _text: &str) {}

    fn cancelled(&self) -> bool {
        self.stop.load(Ordering::SeqCst)
    }
}

#[test]
fn answers_and_errors_cross_whole() {
    let it = Setup::new();
    let client = it.client();
    assert_eq!(client.ask(&Request::Flush {}, &Silent).unwrap(), Response::Flushed {});
    let name = "\u{fc}ber/all \"quoted\"\n".to_owned();
    let removed = client.ask(&Request::Rm { name: name.clone(), recursive: false }, &Silent).unwrap();
    assert_eq!(removed, Response::Removed { name });
    let error = client.ask(&Request::Info { name: "web".into() }, &Silent).unwrap_err();
    assert_eq!((error.kind(), error.message()), (Kind::NotFound, "there is no 'web'"));
    assert_eq!(error.next_step(), Some("look with ls"));
}

#[test]
fn errors_have_a_status_and_lines_end() {
    let it = Setup::new();
    let (status, body) = it.post(r#"{"command":"info","name":"web"}"#);
    assert_eq!(status, 404);
    let want = r#"{"error":{"kind":"not-found","message":"there is no 'web'","hint":"look with ls"}}"#;
    assert!(body.contains(want), "{body}");
    assert_eq!(it.post(r#"{"command":"resize","disk":"d","size":1}"#).0, 423);
    let (status, body) = it.post(r#"{"command":"flush"}"#);
    assert_eq!(status, 200);
    assert!(body.contains("{\"result\":{\"answer\":\"flushed\"}}\n"), "{body}");
}

#[test]
fn nonsense_is_refused_as_json() {
    let it = Setup::new();
    for body in ["", "{}", "[]", "null", "{\"command\":\"flush\"", "{\"command\":\"nonsense\"}", "\u{0}\u{1}"] {
        let (status, answer) = it.post(body);
        assert_eq!(status, 400, "{body:?}");
        assert!(answer.contains("\"kind\":\"usage\""), "{answer}");
    }
    let (status, answer) = it.post(r#"{"command":"rm","name":"a","recusrive":true}"#);
    assert_eq!(status, 400);
    assert!(answer.contains("recusrive"), "{answer}");
    assert_eq!(it.http("POST /v1/request", &[0xff; 9]).0, 400);
    assert_eq!(it.http("GET /v1/request", b"").0, 405);
    assert_eq!(it.http("GET /nowhere", b"").0, 404);
    assert_eq!(it.http("GET /v1/disks/%ff", b"").0, 400);
}

#[test]
fn a_body_that_is_too_long_is_not_read() {
    let it = Setup::new();
    let long = vec![b' '; BODY_SIZE_MAX + 1];
    let (status, answer) = it.http("POST /v1/request", &long);
    assert_eq!(status, 413);
    assert!(answer.contains("\"kind\":\"usage\""), "{answer}");
    let mut fits = br#"{"command":"flush"}"#.to_vec();
    fits.resize(BODY_SIZE_MAX, b' ');
    assert_eq!(it.http("POST /v1/request", &fits).0, 200);
}

#[test]
fn curl_is_welcome() {
    let it = Setup::new();
    assert_eq!(it.http("GET /v1/metrics", b""), (200, "a 1\n".to_owned()));
    assert_eq!(it.http("GET /v1/status", b""), (200, "{\"answer\":\"flushed\"}\n".to_owned()));
    assert_eq!(it.http("GET /v1/disks", b"").0, 200);
    assert_eq!(it.http("GET /v1/disks/web/snapshots", b"").0, 200);
    let (status, body) = it.http("GET /v1/disks/a%40b", b"");
    assert_eq!(status, 404);
    assert!(body.contains("there is no 'a@b'"), "{body}");
}

#[test]
fn progress_crosses() {
    let it = Setup::new();
    let seen = Seen::default();
    let answer = it.client().ask(&Request::Reclaim { wait: true }, &seen).unwrap();
    assert_eq!(answer, Response::Reclaimed { freed: 7, complete: true });
    assert_eq!((seen.total.load(Ordering::SeqCst), seen.done.load(Ordering::SeqCst)), (3, 3));
    let (status, body) = it.post(r#"{"command":"reclaim","wait":true}"#);
    assert_eq!(status, 200);
    let progress = body.find(r#"{"progress":{"done":3,"total":3,"message":""}}"#).unwrap();
    assert!(progress < body.find(r#"{"result":"#).unwrap(), "{body}");
}

#[test]
fn a_caller_that_stops_cancels_the_work() {
    let it = Setup::new();
    let seen = Seen { stop_at_first: true, ..Seen::default() };
    let error = it.client().ask(&Request::Scrub {}, &seen).unwrap_err();
    assert_eq!(error.kind(), Kind::Failed);
    it.cancelled.recv_timeout(PATIENCE).expect("the server noticed");
}

#[test]
fn a_client_that_goes_away_cancels_the_work() {
    let it = Setup::new();
    let mut stream = UnixStream::connect(it.pool.join("control.sock")).unwrap();
    let body = r#"{"command":"scrub"}"#;
    let head = format!("POST /v1/request HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n", body.len());
    stream.write_all(head.as_bytes()).unwrap();
    stream.write_all(body.as_bytes()).unwrap();
    std::thread::sleep(Duration::from_millis(50));
    drop(stream);
    it.cancelled.recv_timeout(PATIENCE).expect("the server noticed");
}

#[test]
fn the_end_of_the_server_cancels_the_work_and_tells_the_client() {
    let mut it = Setup::new();
    let client = it.client();
    let asking = std::thread::spawn(move || client.ask(&Request::Scrub {}, &Silent));
    std::thread::sleep(Duration::from_millis(400));
    it.server.take().unwrap().stop();
    assert_eq!(asking.join().unwrap().unwrap_err().message(), "cancelled");
    assert!(!it.pool.join("control.sock").exists());
    assert!(Client::find(&it.pool).unwrap().is_none());
}

#[test]
fn a_mistake_in_one_request_is_not_the_end() {
    let it = Setup::new();
    let error = it.client().ask(&Request::Check { repair: false, rebuild: false }, &Silent).unwrap_err();
    assert!(error.message().contains("mistake"), "{error}");
    it.client().ask(&Request::Flush {}, &Silent).unwrap();
}

#[test]
fn many_at_once_are_answered() {
    let it = Setup::new();
    let client = &it.client();
    std::thread::scope(|scope| {
        for _ in 0..64 {
            scope.spawn(move || client.ask(&Request::Flush {}, &Silent).unwrap());
        }
    });
}

#[test]
fn the_socket_is_private_and_a_stale_one_is_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let pool = dir.path().to_owned();
    drop(std::os::unix::net::UnixListener::bind(pool.join("control.sock")).unwrap());
    assert!(Client::find(&pool).unwrap().is_none(), "nobody listens");
    let it = Setup::at(dir, pool);
    let mode = std::fs::metadata(it.pool.join("control.sock")).unwrap().permissions().mode();
    assert_eq!(mode & 0o7777, 0o600);
    it.client().ask(&Request::Flush {}, &Silent).unwrap();
}

#[test]
fn a_file_that_is_no_socket_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("control.sock"), "precious").unwrap();
    let lock = PoolLock::take(dir.path()).unwrap();
    let (sender, _receiver) = channel();
    Server::start(dir.path(), &lock, Arc::new(Fake { cancelled: Mutex::new(sender) })).unwrap_err();
    assert_eq!(std::fs::read(dir.path().join("control.sock")).unwrap(), b"precious");
}

#[test]
fn a_pool_may_lie_deep() {
    let dir = tempfile::tempdir().unwrap();
    let pool = dir.path().join("d".repeat(120)).join("e".repeat(120));
    std::fs::create_dir_all(&pool).unwrap();
    let it = Setup::at(dir, pool);
    it.client().ask(&Request::Flush {}, &Silent).unwrap();
    assert!(it.pool.join("control.sock").exists());
}
