//! `send` and `receive` through real pipes and files, with a server on the pool and without.

use std::io::Write;
use std::path::Path;
use std::process::{Output, Stdio};
use std::sync::Arc;

use afterimage::api::{Server, Service, open_store};
use afterimage::disk::{self, BlockDevice};
use afterimage::pool::PoolLock;
use afterimage::store::{OpenOptions, Store};
use serde_json::{Value, json};

use super::{Afterimage, text};

const SIZE: usize = 9 << 20;

/// Content with data, holes and an odd end.
fn content(tag: u8) -> Vec<u8> {
    let mut bytes = vec![0; SIZE + 512];
    let mut x = u64::from(tag) | 0x9e37_79b9_0000_0000;
    for (at, byte) in bytes.iter_mut().enumerate() {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        let part = at >> 20;
        *byte = if part % 3 == 1 {
            0
        } else if part % 3 == 2 {
            tag
        } else {
            x as u8
        };
    }
    bytes
}

/// Opens the pool in this process for a moment.
fn with_store<T>(it: &Afterimage, work: impl FnOnce(&Arc<Store>) -> T) -> T {
    let _lock = PoolLock::take(&it.pool()).unwrap();
    let store = open_store(&it.pool(), OpenOptions { background: false, ..OpenOptions::default() }).unwrap();
    let result = work(&store);
    store.close().unwrap();
    result
}

fn change(store: &Arc<Store>) {
    let disk = disk::open(store, "web").unwrap();
    disk.write(&[0x77; 20_000], 3_000_000).unwrap();
    disk.discard(0, 1 << 20).unwrap();
    disk.flush().unwrap();
}

/// A pool with `web@a` and `web@b`.
fn source() -> Afterimage {
    let it = Afterimage::with_pool();
    std::fs::write(it.path("web.raw"), content(1)).unwrap();
    it.json(&["import", it.path("web.raw").to_str().unwrap(), "web"]);
    it.json(&["snapshot", "web@a"]);
    with_store(&it, change);
    it.json(&["snapshot", "web@b"]);
    it
}

fn send(it: &Afterimage, words: &[&str]) -> Vec<u8> {
    let output = it.run(&[&["send"], words].concat());
    assert!(output.status.success(), "{words:?}: {}", text(&output.stderr));
    output.stdout
}

fn receive(it: &Afterimage, words: &[&str], stream: &[u8]) -> Output {
    let mut command = it.command(&[&["--json", "receive"], words].concat());
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let stream = stream.to_vec();
    // A receiver that refuses closes its end early.
    let feed = std::thread::spawn(move || stdin.write_all(&stream).ok());
    let output = child.wait_with_output().unwrap();
    feed.join().unwrap();
    output
}

fn received(it: &Afterimage, words: &[&str], stream: &[u8]) -> Value {
    let output = receive(it, words, stream);
    assert!(output.status.success(), "{words:?}: {}", text(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn refused(it: &Afterimage, words: &[&str], stream: &[u8]) -> (i32, Value) {
    let output = receive(it, words, stream);
    assert_eq!(text(&output.stdout), "");
    let error: Value = serde_json::from_slice(&output.stderr).unwrap();
    (output.status.code().unwrap(), error["error"].clone())
}

/// What a snapshot is, as a raw file.
fn as_file(it: &Afterimage, snapshot: &str, path: &Path) -> Vec<u8> {
    received(it, &["--file", path.to_str().unwrap()], &send(it, &[snapshot]));
    std::fs::read(path).unwrap()
}

#[test]
fn a_pool_is_copied_through_a_pipe() {
    let (from, to) = (source(), Afterimage::with_pool());
    let output = from.command(&["--json", "send", "web@a"]).output().unwrap();
    let report: Value = serde_json::from_slice(&output.stderr).unwrap();
    assert_eq!((&report["answer"], &report["snapshot"], &report["base"]), (&json!("sent"), &json!("a"), &Value::Null));
    assert_eq!(report["stream"], output.stdout.len());
    assert!(output.stdout.len() < SIZE / 2, "what is alike is compressed");
    let answer = received(&to, &["copy"], &output.stdout);
    assert_eq!((&answer["answer"], &answer["uuid"]), (&json!("received"), &report["uuid"]));
    let step = send(&from, &["--from", "web@a", "web@b"]);
    assert!(step.len() < 200_000, "{}", step.len());
    assert_eq!(received(&to, &["copy"], &step)["base"], report["uuid"]);
    let list = to.json(&["ls", "copy"]);
    let names: Vec<_> = list["snapshots"].as_array().unwrap().iter().map(|s| s["name"].clone()).collect();
    assert_eq!(names, ["a", "b"]);
    let (one, other) = (as_file(&from, "web@b", &from.path("b.raw")), as_file(&to, "copy@b", &to.path("b.raw")));
    assert!(one == other && one != content(1) && one.len() == SIZE + 512);
    assert_eq!(as_file(&to, "copy@a", &to.path("a.raw")), content(1));
    let (code, error) = refused(&to, &["copy"], &step);
    assert_eq!((code, error["kind"].as_str()), (1, Some("exists")));
    assert_eq!(to.json(&["check"])["problems"], json!([]));
}

#[test]
fn an_interrupted_stream_goes_on() {
    let (from, to) = (source(), Afterimage::with_pool());
    let whole = send(&from, &["web@b", "--no-compress"]);
    let (code, error) = refused(&to, &["copy"], &whole[..whole.len() / 2]);
    assert_eq!(code, 5, "{error}");
    assert_eq!(to.json(&["ls"])["disks"], json!([]));
    let token = to.json(&["receive", "--token", "copy"]);
    let token = token["token"].as_str().unwrap();
    assert!(error["hint"].as_str().unwrap().contains(token));
    let rest = send(&from, &["--resume", token, "--no-compress"]);
    assert!(rest.len() < whole.len() * 3 / 4);
    received(&to, &["copy"], &rest);
    assert_eq!(as_file(&to, "copy@b", &to.path("b.raw")), as_file(&from, "web@b", &from.path("b.raw")));
    assert_eq!(to.error(&["receive", "--token", "copy"]).0, 3);
    refused(&to, &["other"], &whole[..whole.len() / 2]);
    assert_eq!(to.json(&["receive", "--abort", "other"]), json!({ "answer": "aborted", "disk": "other" }));
    assert_eq!(to.json(&["check"])["problems"], json!([]));
}

#[test]
fn into_a_raw_file() {
    let from = source();
    let path = from.path("disk.raw");
    let file = path.to_str().unwrap();
    let answer = received(&from, &["--file", file], &send(&from, &["web@a"]));
    assert_eq!((&answer["answer"], &answer["snapshot"]), (&json!("received-file"), &json!("a")));
    assert_eq!(std::fs::read(&path).unwrap(), content(1));
    let step = send(&from, &["--from", "web@a", "web@b"]);
    let (code, error) = refused(&from, &["--file", file], &step[..step.len() / 2]);
    assert_eq!(code, 5, "{error}");
    let token = from.json(&["receive", "--file", file, "--token"])["token"].as_str().unwrap().to_owned();
    received(&from, &["--file", file], &send(&from, &["--resume", &token]));
    assert_eq!(std::fs::read(&path).unwrap(), as_file(&from, "web@b", &from.path("b.raw")));
    let (code, error) = refused(&from, &["--file", file], &step);
    assert_eq!((code, error["kind"].as_str()), (1, Some("failed")), "{error}");
}

#[test]
fn a_server_is_asked_when_there_is_one() {
    let (from, to) = (source(), Afterimage::with_pool());
    let serve = |it: &Afterimage| {
        let lock = PoolLock::take(&it.pool()).unwrap();
        let store = open_store(&it.pool(), OpenOptions::default()).unwrap();
        let server = Server::start(&it.pool(), &lock, Arc::new(Service::new(Arc::clone(&store), &it.pool()))).unwrap();
        (lock, store, server)
    };
    let (one, other) = (serve(&from), serve(&to));
    received(&to, &["copy"], &send(&from, &["web@a"]));
    received(&to, &["copy"], &send(&from, &["--from", "web@a", "web@b"]));
    let (code, error) = refused(&to, &["copy", "--as", "c"], &send(&from, &["--from", "web@a", "web@b"]));
    assert_eq!(code, 1, "{error}");
    assert!(error["message"].as_str().unwrap().contains("not the base") || error["hint"].is_string(), "{error}");
    assert_eq!(from.error(&["send", "web@none"]).0, 3);
    assert!(as_file(&to, "copy@b", &to.path("b.raw")) == as_file(&from, "web@b", &from.path("b.raw")));
    for (lock, store, server) in [one, other] {
        server.stop();
        store.close().unwrap();
        drop(lock);
    }
}

#[test]
fn what_makes_no_sense_is_refused() {
    let it = source();
    assert_eq!(it.error(&["send", "web"]).0, 2);
    assert_eq!(it.error(&["send", "web@none"]).0, 3);
    assert_eq!(it.error(&["send", "--resume", "00"]).0, 2);
    assert_eq!(it.error(&["send", "--from", "web@none", "web@a"]).0, 3);
    assert_eq!(refused(&it, &["copy"], b"nothing of the kind").0, 5);
    assert_eq!(refused(&it, &["copy"], b"").0, 5);
    assert_eq!(refused(&it, &["a/b"], &send(&it, &["web@a"])).0, 2);
    let mut newer = send(&it, &["web@a"]);
    newer[8] = 9;
    let (code, error) = refused(&it, &["copy"], &newer);
    assert_eq!((code, error["kind"].as_str()), (1, Some("unsupported")));
    assert_eq!(it.json(&["ls"])["disks"].as_array().unwrap().len(), 1);
}

/// More than a million extents could not be told of; some thousands are not kept in memory any more.
#[test]
fn a_diff_of_many_extents_is_printed_as_it_comes() {
    const EVERY: usize = 6000;
    let it = Afterimage::with_pool();
    it.json(&["create", "web", "--size", "64M"]);
    with_store(&it, |store| {
        let disk = disk::open(store, "web").unwrap();
        (0..EVERY).for_each(|n| disk.write(&[1; 4096], n as u64 * 8192).unwrap());
        disk.flush().unwrap();
    });
    it.json(&["snapshot", "web@a"]);
    for served in [false, true] {
        let lock = served.then(|| PoolLock::take(&it.pool()).unwrap());
        let server = lock.as_ref().map(|lock| {
            let options = OpenOptions { background: false, ..OpenOptions::default() };
            let store = open_store(&it.pool(), options).unwrap();
            let service = Arc::new(Service::new(Arc::clone(&store), &it.pool()));
            (Server::start(&it.pool(), lock, service).unwrap(), store)
        });
        let diff = it.json(&["diff", "-", "web@a"]);
        let extents = diff["extents"].as_array().unwrap();
        assert_eq!((diff["answer"].as_str(), diff["count"].as_u64()), (Some("diff"), Some(EVERY as u64 * 2)));
        assert_eq!(extents.len(), EVERY * 2);
        for (n, extent) in extents.iter().enumerate().take(EVERY * 2 - 1) {
            assert_eq!(*extent, json!({ "offset": n * 4096, "length": 4096, "zero": n % 2 == 1 }), "{served}");
        }
        let diff = it.json(&["diff", "web@a", "web"]);
        assert_eq!((&diff["extents"], &diff["to-size"]), (&json!([]), &json!(64 << 20)));
        let output = it.run(&["diff", "-", "web@a"]);
        let told = text(&output.stdout);
        assert!(output.status.success() && text(&output.stderr).is_empty(), "{}", text(&output.stderr));
        assert_eq!(told.lines().count(), EVERY * 2 + 2);
        assert!(told.lines().nth(2).unwrap().ends_with("4096            4096  zeros"), "{told:.200}");
        // What fails before the first extent prints none.
        assert_eq!(it.error(&["diff", "-", "web@nope"]).0, 3);
        // A reader that goes away has what it wanted.
        let mut child = it.command(&["diff", "-", "web@a"]).stdout(Stdio::piped()).spawn().unwrap();
        drop(child.stdout.take());
        assert!(child.wait().unwrap().success());
        if let Some((server, store)) = server {
            server.stop();
            store.close().unwrap();
        }
    }
}

/// A pipe in the place of a file was waited for, with the pool locked.
#[test]
fn what_is_no_file_is_refused_at_once() {
    let it = Afterimage::with_pool();
    let pipe = it.path("pipe");
    assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let (code, error) = it.error(&["record", "import", pipe.to_str().unwrap()]);
    assert!(code == 1 && error["message"].as_str().unwrap().contains("no regular file"), "{error}");
    let folder = it.dir.path();
    let output = it.command(&["receive", "web"]).stdin(std::fs::File::open(folder).unwrap()).output().unwrap();
    assert!(text(&output.stderr).contains("stdin is a directory"), "{}", text(&output.stderr));
    let output = it.command(&["receive", "--file", folder.to_str().unwrap()]).stdin(Stdio::null()).output().unwrap();
    let said = text(&output.stderr);
    assert!(said.contains(&format!("{} is a directory", folder.display())), "{said}");
}
