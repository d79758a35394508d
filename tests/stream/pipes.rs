//! Requests about streams whose other end is a pipe that nobody reads, nobody writes, or nobody can open: each ends.

use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use afterimage::api::{Request, execute};
use afterimage::disk;
use afterimage::error::{Kind, Result};
use afterimage::progress::Progress;
use afterimage::store::Store;

use super::{Pool, noise};

const PATIENCE: Duration = Duration::from_secs(20);

/// Somebody who asked, and may have gone away since.
#[derive(Default)]
struct Asker {
    gone: AtomicBool,
}

impl Progress for Asker {
    fn total(&self, _: u64) {}
    fn advance(&self, _: u64) {}
    fn message(&self, _: &str) {}
    fn cancelled(&self) -> bool {
        self.gone.load(Ordering::Acquire)
    }
}

/// Answers a request on a thread of its own, which must end. `before` is run when it has waited a while for nothing.
fn answer(store: &Arc<Store>, request: Request, before: impl FnOnce(&Asker)) -> Result<()> {
    let (asker, store) = (Arc::new(Asker::default()), Arc::clone(store));
    let (sender, receiver) = channel();
    let work = {
        let asker = Arc::clone(&asker);
        std::thread::spawn(move || sender.send(execute(&store, request, &*asker).map(drop)).unwrap())
    };
    let answer = match receiver.recv_timeout(Duration::from_millis(300)) {
        Err(RecvTimeoutError::Timeout) => {
            before(&asker);
            receiver.recv_timeout(PATIENCE)
        }
        answer => answer,
    };
    let answer = answer.expect("it ends");
    work.join().unwrap();
    answer
}

fn go_away(asker: &Asker) {
    asker.gone.store(true, Ordering::Release);
}

fn stay(_: &Asker) {}

fn pool() -> Pool {
    let pool = Pool::new(1);
    disk::create(pool.store(), "web", 4 << 20).unwrap();
    pool.write("web", 0, &noise(1, 4 << 20));
    pool.take("web", "a");
    pool
}

fn send(output: String) -> Request {
    Request::Send { snapshot: Some("web@a".into()), from: None, resume: None, no_compress: true, output }
}

fn receive(input: &Path) -> Request {
    let input = input.to_str().unwrap().to_owned();
    Request::Receive { disk: "copy".into(), name: None, force: false, input }
}

fn make_pipe(path: &Path) {
    let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
    rustix::fs::mknodat(rustix::fs::CWD, path, rustix::fs::FileType::Fifo, mode, 0).unwrap();
}

fn of_this_process(end: &impl AsRawFd) -> String {
    format!("/proc/self/fd/{}", end.as_raw_fd())
}

#[test]
fn a_named_pipe_is_waited_for_as_long_as_the_answer_is() {
    let (pool, dir) = (pool(), tempfile::tempdir().unwrap());
    let pipe = dir.path().join("pipe");
    make_pipe(&pipe);
    let name = pipe.to_str().unwrap();
    answer(pool.store(), send(name.into()), go_away).unwrap_err();
    answer(pool.store(), receive(&pipe), go_away).unwrap_err();
    // Somebody holds the other end and does nothing with it.
    let idle = OpenOptions::new().read(true).write(true).open(&pipe).unwrap();
    answer(pool.store(), send(name.into()), go_away).unwrap_err();
    drop(idle);
    let idle = OpenOptions::new().read(true).write(true).open(&pipe).unwrap();
    answer(pool.store(), receive(&pipe), go_away).unwrap_err();
    drop(idle);
    assert_eq!(pool.names("web"), ["a"]);
    assert!(pool.store().disk_info("copy").is_err(), "nothing came");
    // One that comes late is as good as one that was there.
    let late = || {
        let pipe = pipe.clone();
        std::thread::spawn(move || std::fs::read(pipe).unwrap())
    };
    let mut reader = None;
    answer(pool.store(), send(name.into()), |_| reader = Some(late())).unwrap();
    let stream = reader.expect("it was waited for").join().unwrap();
    let mut writer = None;
    let write = || {
        let pipe = pipe.clone();
        std::thread::spawn(move || std::fs::write(pipe, stream).unwrap())
    };
    answer(pool.store(), receive(&pipe), |_| writer = Some(write())).unwrap();
    writer.expect("it was waited for").join().unwrap();
    super::same("copy", &pool.snapshot("copy", "a"), &pool.snapshot("web", "a"));
}

#[test]
fn what_nobody_can_ever_read_is_not_waited_for() {
    let (pool, dir) = (pool(), tempfile::tempdir().unwrap());
    let (socket, _other) = std::os::unix::net::UnixStream::pair().unwrap();
    let error = answer(pool.store(), send(of_this_process(&socket)), stay).unwrap_err();
    assert!(error.to_string().contains("cannot open"), "{error}");
    // The stdout of a command whose reader has gone away: nobody can find this pipe by its name any more.
    let path = dir.path().join("pipe");
    make_pipe(&path);
    let reader = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(&path).unwrap();
    let stdout = File::create(&path).unwrap();
    drop(reader);
    let error = answer(pool.store(), send(of_this_process(&stdout)), stay).unwrap_err();
    assert_eq!(error.kind(), Kind::Io, "{error}");
    let (reader, stdout) = std::io::pipe().unwrap();
    drop(reader);
    let error = answer(pool.store(), send(of_this_process(&stdout)), stay).unwrap_err();
    assert_eq!(error.kind(), Kind::Io, "{error}");
}
