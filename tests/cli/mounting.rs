//! Mounting with the real binary: foreground, background, and how it ends.

use std::io::{BufRead, BufReader};
use std::process::Stdio;
use std::time::{Duration, Instant};

use afterimage::api::{Client, Request};
use afterimage::progress::Silent;
use serde_json::json;

use super::{Afterimage, text};

/// Tells whether this host can mount; says loudly when not. Under CI it must.
fn can_mount() -> bool {
    let can = std::fs::OpenOptions::new().read(true).write(true).open("/dev/fuse").is_ok();
    if !can {
        assert!(std::env::var_os("CI").is_none(), "CI must be able to mount");
        eprintln!("SKIPPED: /dev/fuse does not open, so nothing was mounted");
    }
    can
}

/// A mount that is taken away when the test ends, however it ends.
struct Mounted<'a>(&'a Afterimage);

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        let mount = self.0.path("mnt");
        self.0.command(&["umount", "--force"]).arg(&mount).output().unwrap();
        // One that never mounted, or lost its mount, still ends.
        if let Ok(Some(client)) = Client::find(&self.0.pool()) {
            client.ask(&Request::Shutdown {}, &Silent).ok();
        }
    }
}

#[test]
fn the_background_server_answers_until_it_is_unmounted() {
    if !can_mount() {
        return;
    }
    let it = Afterimage::new();
    let mount = it.path("mnt");
    let at = mount.to_str().unwrap();
    let status = it.json(&["mount", "--init", "--daemon", at]);
    let mounted = Mounted(&it);
    let resolved = it.dir.path().canonicalize().unwrap().join("mnt");
    assert_eq!((&status["answer"], &status["mount"]), (&json!("status"), &json!(resolved.to_str().unwrap())));
    it.json(&["create", "web", "-s", "1G"]);
    assert_eq!(std::fs::metadata(mount.join("disks/web.raw")).unwrap().len(), 1 << 30);
    it.json(&["snapshot", "web@a"]);
    assert!(mount.join("snapshots/web/a.raw").exists());
    {
        let _writer = std::fs::OpenOptions::new().write(true).open(mount.join("disks/web.raw")).unwrap();
        let (code, error) = it.error(&["resize", "web", "512M", "--shrink"]);
        assert_eq!(code, 4, "{error}");
        it.json(&["resize", "web", "2G"]);
    }
    // The kernel tells of a closed file a moment later.
    let begun = Instant::now();
    while !it.json(&["info", "web"])["holder"].is_null() {
        assert!(begun.elapsed() < Duration::from_secs(20), "the disk is let go of");
    }
    it.json(&["resize", "web", "1G", "--shrink"]);
    assert_eq!(std::fs::metadata(mount.join("disks/web.raw")).unwrap().len(), 1 << 30);
    let other = it.path("other");
    let other = other.to_str().unwrap();
    assert_eq!(it.error(&["mount", "--daemon", other]).0, 3, "there is no such directory");
    std::fs::create_dir(other).unwrap();
    let log = || std::fs::read_to_string(it.pool().join("server.log")).unwrap();
    let said = log();
    assert!(said.contains(&format!("process {} serves", status["pid"])), "{said}");
    for flag in [&["--daemon"][..], &[]] {
        let words = [&["mount", other], flag].concat();
        let (code, error) = it.error(&words);
        assert_eq!(code, 4, "{error}");
        assert!(error["message"].as_str().unwrap().contains(&status["pid"].to_string()), "{error}");
        assert_eq!(log(), said, "a server that is refused has nothing to say there");
    }
    let open = std::fs::File::open(mount.join("disks/web.raw")).unwrap();
    assert_eq!(it.error(&["umount", at]).0, 4, "a file is open");
    drop(open);
    it.json(&["umount", at]);
    assert!(!it.pool().join("control.sock").exists());
    assert_eq!(it.json(&["ls"])["disks"][0]["name"], "web");
    assert_eq!(it.error(&["umount", at]).0, 3, "nothing is mounted any more");
    drop(mounted);
}

#[test]
fn one_extent_tree_is_mounted_by_the_server_or_without_one() {
    if !can_mount() {
        return;
    }
    let it = Afterimage::new();
    let (mount, alone) = (it.path("mnt"), it.path("alone"));
    let (at, export) = (mount.to_str().unwrap(), alone.to_str().unwrap());
    std::fs::create_dir(&alone).unwrap();
    it.json(&["mount", "--init", "--daemon", at]);
    let mounted = Mounted(&it);
    it.json(&["create", "web", "-s", "10M"]);
    std::fs::write(mount.join("disks/web.raw"), vec![7; 10 << 20]).unwrap();
    it.json(&["snapshot", "web@a"]);
    let answer = it.json(&["mount", "--export", "web@a", export]);
    assert_eq!((&answer["answer"], &answer["snapshot"]), (&json!("mounted"), &json!("web@a")));
    let whole = |dir: &std::path::Path| -> Vec<u8> {
        let mut paths: Vec<_> = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
        paths.sort();
        assert!(paths.pop().unwrap().ends_with("snapshot.json"), "it tells what the extents are of");
        paths.iter().flat_map(|path| std::fs::read(path).unwrap()).collect()
    };
    assert!(whole(&alone) == vec![7; 10 << 20]);
    assert_eq!(it.error(&["mount", "--export", "web@a", export]).0, 4, "something is mounted there");
    it.json(&["umount", export]);
    assert_eq!(std::fs::read_dir(&alone).unwrap().count(), 0);
    assert!(mount.join("disks/web.raw").exists(), "the pool stays mounted");
    assert_eq!(it.error(&["mount", "--export", "web@none", export]).0, 3);
    it.json(&["snapshot", "web@gone"]);
    it.json(&["retire", "web@gone"]);
    let (code, error) = it.error(&["mount", "--export", "web@gone", export]);
    assert!(code == 1 && error["message"].as_str().unwrap().contains("is retired"), "{error}");
    // Somebody reads it: its data stays, and who waits for the space is told.
    it.json(&["snapshot", "web@read"]);
    let reader = std::fs::File::open(mount.join("snapshots/web/read.raw")).unwrap();
    assert_eq!(it.json(&["retire", "--wait", "web@read"])["open"], json!(["web@read"]));
    drop(reader);
    it.json(&["mount", "--export", "web@a", export]);
    it.json(&["umount", at]);
    assert_eq!(std::fs::read_dir(&alone).unwrap().count(), 0, "it went with the pool");
    it.json(&["mount", "--export", "web@a", "--daemon", export]);
    let served = Mounted(&it);
    assert!(whole(&alone) == vec![7; 10 << 20]);
    assert_eq!(it.json(&["ls"])["disks"][0]["name"], "web", "the server answers");
    it.json(&["umount", export]);
    assert!(!it.pool().join("control.sock").exists());
    it.json(&["check"]);
    drop((mounted, served));
}

/// The stream goes straight into the stdout of `send`, which others may hold open: nobody reads, nobody closes it, and the
/// one who asked is gone.
#[test]
fn a_stream_ends_with_the_one_who_asked_for_it() {
    if !can_mount() {
        return;
    }
    let it = Afterimage::new();
    let mount = it.path("mnt");
    let status = it.json(&["mount", "--init", "--daemon", mount.to_str().unwrap()]);
    let mounted = Mounted(&it);
    let tasks = std::path::Path::new("/proc").join(status["pid"].to_string()).join("task");
    let readers = || {
        let names =
            std::fs::read_dir(&tasks).unwrap().map(|task| std::fs::read_to_string(task.unwrap().path().join("comm")));
        names.filter(|name| name.as_ref().is_ok_and(|name| name.starts_with("send-"))).count()
    };
    let wait = |what: &str, until: &dyn Fn() -> bool| {
        let begun = Instant::now();
        while !until() {
            assert!(begun.elapsed() < Duration::from_secs(20), "{what}");
            std::thread::sleep(Duration::from_millis(20));
        }
    };
    std::fs::write(mount.join("disks/web.raw"), vec![7; 64 << 20]).unwrap();
    it.json(&["snapshot", "web@a"]);
    let mut asking = it.command(&["send", "--no-compress", "web@a"]).stdout(Stdio::piped()).spawn().unwrap();
    wait("the stream begins", &|| readers() > 0);
    asking.kill().unwrap();
    asking.wait().unwrap();
    wait("the server goes on with a stream that nobody wants", &|| readers() == 0);
    assert!(asking.stdout.is_some(), "it was open all the time");
    it.json(&["check"]);
    drop(mounted);
}

#[test]
fn the_foreground_server_ends_cleanly_on_a_signal() {
    if !can_mount() {
        return;
    }
    let it = Afterimage::with_pool();
    let mount = it.path("mnt");
    std::fs::create_dir(&mount).unwrap();
    let _mounted = Mounted(&it);
    let mut child = it
        .command(&["mount", mount.to_str().unwrap(), "--json"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert!(line.contains("\"answer\":\"status\""), "{line}");
    assert!(mount.join("disks").is_dir());
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    assert!(!mount.join("disks").exists());
    it.json(&["check"]);
}

/// A command that waits for a server that was stopped looked as if it hung: for ever, and without a word.
#[test]
fn a_server_that_says_nothing_is_named_and_waited_for() {
    if !can_mount() {
        return;
    }
    let it = Afterimage::new();
    let status = it.json(&["mount", "--init", "--daemon", it.path("mnt").to_str().unwrap()]);
    let _mounted = Mounted(&it);
    let number = status["pid"].as_i64().unwrap();
    let pid = rustix::process::Pid::from_raw(i32::try_from(number).unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::STOP).unwrap();
    let mut child =
        it.command(&["create", "web", "-s", "1G"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(child.stderr.take().unwrap()).read_line(&mut line).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::CONT).unwrap();
    let want = format!("process {number}, is stopped; 'kill -CONT {number}'");
    assert!(line.contains(&want) && line.contains(it.pool().to_str().unwrap()), "{line}");
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), text(&output.stdout)), (Some(0), "disk web, 1.0 GiB\n"));
}

#[test]
fn what_a_killed_server_left_is_taken_away() {
    if !can_mount() {
        return;
    }
    let it = Afterimage::new();
    let mount = it.path("mnt");
    let at = mount.to_str().unwrap();
    let status = it.json(&["mount", "--init", "--daemon", at]);
    let _mounted = Mounted(&it);
    it.json(&["create", "web", "-s", "1G"]);
    // Somebody has a file open, and goes on to have it.
    let _held = std::fs::File::open(mount.join("disks/web.raw")).unwrap();
    let pid = i32::try_from(status["pid"].as_i64().unwrap()).unwrap();
    let pid = rustix::process::Pid::from_raw(pid).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    // The kernel lets go of the lock, the socket and the mount some time after the signal.
    let begun = Instant::now();
    let state = || std::fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).ok();
    while state().is_some_and(|stat| !stat.contains(") Z ")) {
        assert!(begun.elapsed() < Duration::from_secs(60), "it dies");
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(it.json(&["ls"])["disks"][0]["name"], "web", "opens without repair");
    it.json(&["mount", "--daemon", at]);
    assert!(mount.join("disks/web.raw").exists());
    it.json(&["umount", at]);
}

/// A line of the log that nobody took ended the thread that wrote it: `rm` of a disk with snapshots was EIO, then nothing
/// was answered any more.
#[test]
fn a_server_whose_stderr_is_closed_goes_on() {
    if !can_mount() {
        return;
    }
    let it = Afterimage::with_pool();
    let mount = it.path("mnt");
    std::fs::create_dir(&mount).unwrap();
    let (reader, stderr) = std::io::pipe().unwrap();
    drop(reader);
    let words = ["-v", "--json", "mount", mount.to_str().unwrap()];
    let mut server = it.command(&words).stdout(Stdio::piped()).stderr(stderr).spawn().unwrap();
    let mounted = Mounted(&it);
    let mut line = String::new();
    BufReader::new(server.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert!(line.contains("\"answer\":\"status\""), "{line}");
    it.json(&["create", "web", "-s", "1M"]);
    it.json(&["snapshot", "web@a"]);
    for n in 0..20 {
        // Each is told of in the log.
        let refused = std::fs::remove_file(mount.join("disks/web.raw")).unwrap_err();
        assert_eq!(refused.kind(), std::io::ErrorKind::ResourceBusy, "{n}: {refused}");
    }
    it.json(&["rm", "web", "--recursive"]);
    it.json(&["umount", mount.to_str().unwrap()]);
    assert_eq!(server.wait().unwrap().code(), Some(0));
    drop(mounted);
}

#[test]
fn the_background_server_has_the_map_cache_it_was_given() {
    if !can_mount() {
        return;
    }
    let it = Afterimage::new();
    let mount = it.path("mnt");
    let at = mount.to_str().unwrap();
    let status = it.json(&["mount", "--init", "--daemon", "--map-cache", "64M", at]);
    let mounted = Mounted(&it);
    let words = std::fs::read_to_string(format!("/proc/{}/cmdline", status["pid"])).unwrap();
    assert!(words.split('\0').any(|word| word == "--map-cache=67108864"), "{words:?}");
    it.json(&["umount", at]);
    drop(mounted);
}

#[test]
fn a_place_that_cannot_be_mounted_at_is_refused_before_a_pool_is_made() {
    let it = Afterimage::new();
    std::fs::write(it.path("file"), "").unwrap();
    for at in ["file", "file/below", ".", "pool", "pool/mnt", "pool/deep/mnt"] {
        let (code, error) = it.error(&["mount", "--init", "--daemon", it.path(at).to_str().unwrap()]);
        assert!(code == 2 || at == "file/below" && code == 1, "{at}: {error}");
        let shown = it.path(at).to_str().unwrap().trim_end_matches("/.").to_owned();
        assert!(error["message"].as_str().unwrap().contains(&shown), "{at}: {error}");
        let left: Vec<_> = std::fs::read_dir(it.dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left, ["file"], "{at}");
    }
    // The other way round: no pool can be made, and the directory goes again.
    std::fs::create_dir(it.pool()).unwrap();
    std::fs::write(it.pool().join("precious"), "").unwrap();
    let (code, error) = it.error(&["mount", "--init", "--daemon", it.path("new/mnt").to_str().unwrap()]);
    assert_eq!(code, 1, "{error}");
    assert!(!it.path("new").exists());
}

#[test]
fn a_mount_that_cannot_be_is_refused_with_a_reason() {
    let it = Afterimage::with_pool();
    let pool = it.pool();
    for (at, code) in [("nowhere", 3), ("file", 2), (".", 2), ("pool", 2), ("pool/segments", 2)] {
        std::fs::write(it.path("file"), "").unwrap();
        let path = it.path(at);
        for flag in [&["--daemon"][..], &[]] {
            let words = [&["mount", path.to_str().unwrap()], flag].concat();
            let (was, error) = it.error(&words);
            assert_eq!(was, code, "{at} {error}");
        }
    }
    assert!(!pool.join("server.log").exists(), "refused before anything was started");
}
