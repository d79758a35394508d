//! Into raw files: restartable, and what a file holds is known.

use std::sync::Arc;
use std::time::Duration;

use afterimage::error::{Kind, Result};
use afterimage::media::{Media, Open, SimMedia};
use afterimage::progress::Silent;
use afterimage::stream::{self, FileOptions, FileReport, Place, receive_at};
use afterimage::sys::lock;

use super::pools::pair;
use super::same;

fn receive(media: &SimMedia, force: bool, bytes: &[u8]) -> Result<FileReport> {
    let shared: Arc<dyn Media> = Arc::new(media.clone());
    receive_at(&Place::beside(&shared, "disk.raw"), force, &mut &*bytes, &Silent)
}

fn content(media: &SimMedia) -> Vec<u8> {
    let file = media.open("disk.raw", Open::ReadOnly).unwrap();
    let mut bytes = vec![0; file.len().unwrap() as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

#[test]
fn full_and_increment_arrive() {
    let (from, _) = pair();
    let media = SimMedia::new(1);
    receive(&media, false, &from.send(None, "web@a")).unwrap();
    same("a", &content(&media), &from.snapshot("web", "a"));
    let report = receive(&media, false, &from.send(Some("web@a"), "web@b")).unwrap();
    assert_eq!(report.snapshot, "b");
    same("b", &content(&media), &from.snapshot("web", "b"));
    assert_eq!(media.list("").unwrap(), ["disk.raw", "disk.raw.afterimage"]);
}

#[test]
fn what_does_not_fit_is_refused() {
    let (from, _) = pair();
    let media = SimMedia::new(1);
    let (full, step) = (from.send(None, "web@a"), from.send(Some("web@a"), "web@b"));
    assert_eq!(receive(&media, false, &step).unwrap_err().kind(), Kind::NotFound);
    receive(&media, false, &full).unwrap();
    assert_eq!(receive(&media, false, &full).unwrap_err().kind(), Kind::Exists);
    receive(&media, true, &full).unwrap();
    receive(&media, false, &step).unwrap();
    let error = receive(&media, false, &step).unwrap_err();
    assert!(error.message().contains("does not hold the base"), "{error}");
    same("b", &content(&media), &from.snapshot("web", "b"));
    media.remove("disk.raw.afterimage").unwrap();
    let error = receive(&media, false, &step).unwrap_err();
    assert!(error.message().contains("disk.raw.afterimage"), "{error}");
    // The word of the user; here it is true enough, since all of the increment is data or zeros.
    receive(&media, true, &step).unwrap();
    media.flip_bit("disk.raw.afterimage", 30, 1).unwrap();
    assert_eq!(receive(&media, false, &step).unwrap_err().kind(), Kind::Corrupt);
}

#[test]
fn a_file_that_is_half_way_says_so() {
    let (from, _) = pair();
    let media = SimMedia::new(1);
    receive(&media, false, &from.send(None, "web@a")).unwrap();
    let step = from.send(Some("web@a"), "web@b");
    let error = receive(&media, false, &step[..step.len() / 2]).unwrap_err();
    assert_eq!(error.kind(), Kind::Corrupt);
    assert!(error.next_step().unwrap().contains("--resume"), "{error}");
    assert_eq!(media.list("").unwrap(), ["disk.raw", "disk.raw.afterimage-receive"]);
    let other = from.send(None, "web@b");
    let error = receive(&media, false, &other).unwrap_err();
    assert!(error.message().contains("interrupted"), "{error}");
    receive(&media, false, &step).unwrap();
    same("b", &content(&media), &from.snapshot("web", "b"));
}

/// A folder of the host with the first snapshot of `web` in a file.
fn on_the_host(from: &super::Pool) -> (tempfile::TempDir, FileOptions) {
    let dir = tempfile::tempdir().unwrap();
    let options = FileOptions { path: dir.path().join("disk.raw"), state: None, force: false };
    stream::receive_file(&options, &mut &*from.send(None, "web@a"), &Silent).unwrap();
    (dir, options)
}

/// Somebody has booted the copy: it is as long as it was, and holds neither state any more.
#[test]
fn a_file_that_was_written_to_since_is_no_base() {
    let (from, _) = pair();
    let (_dir, options) = on_the_host(&from);
    let file = std::fs::OpenOptions::new().write(true).open(&options.path).unwrap();
    let time = file.metadata().unwrap().modified().unwrap();
    file.set_modified(time + Duration::from_secs(2)).unwrap();
    let step = from.send(Some("web@a"), "web@b");
    let error = stream::receive_file(&options, &mut &*step, &Silent).unwrap_err();
    assert!(error.message().contains("was written to since"), "{error}");
    assert!(error.next_step().unwrap().contains("--force"), "{error}");
    same("a", &std::fs::read(&options.path).unwrap(), &from.snapshot("web", "a"));
    file.set_modified(time).unwrap();
    stream::receive_file(&options, &mut &*step, &Silent).unwrap();
    same("b", &std::fs::read(&options.path).unwrap(), &from.snapshot("web", "b"));
}

#[test]
fn two_do_not_receive_into_one_file() {
    let (from, _) = pair();
    let (dir, options) = on_the_host(&from);
    let step = from.send(Some("web@a"), "web@b");
    let first = std::fs::File::open(&options.path).unwrap();
    assert!(lock::try_exclusive(&first).unwrap());
    let error = stream::receive_file(&options, &mut &*step, &Silent).unwrap_err();
    assert_eq!(error.kind(), Kind::Busy, "{error}");
    assert!(dir.path().join("disk.raw.afterimage").exists(), "nothing was begun");
    drop(first);
    stream::receive_file(&options, &mut &*step, &Silent).unwrap();
}

/// The first release noted no time; what it noted still counts.
#[test]
fn a_note_without_a_time_is_read() {
    let (from, _) = pair();
    let (dir, options) = on_the_host(&from);
    let path = dir.path().join("disk.raw.afterimage");
    let text = std::fs::read_to_string(&path).unwrap();
    let words: Vec<&str> = text.split_ascii_whitespace().collect();
    assert_eq!(words.len(), 5, "{text}");
    let body = format!("{} {}\n{}", words[0], words[1], words[2]);
    std::fs::write(&path, format!("{body} {:08x}\n", afterimage::codec::crc32(body.as_bytes()))).unwrap();
    stream::receive_file(&options, &mut &*from.send(Some("web@a"), "web@b"), &Silent).unwrap();
    std::fs::write(&path, text.replace("afterimage-state 1", "afterimage-state 2")).unwrap();
    let error = stream::receive_file(&options, &mut &*from.send(Some("web@a"), "web@b"), &Silent).unwrap_err();
    assert_eq!(error.kind(), Kind::Corrupt, "{error}");
}

/// Power cuts at every I/O: the file never claims a state it does not hold, and the stream can be sent again.
#[test]
fn a_crash_anywhere_is_recovered_from() {
    let (from, _) = pair();
    let media = SimMedia::new(1);
    receive(&media, false, &from.send(None, "web@a")).unwrap();
    let step = from.send(Some("web@a"), "web@b");
    for n in 1.. {
        let trial = media.fork(n);
        trial.crash_after(n);
        let result = receive(&trial, false, &step);
        let went_down = trial.is_down();
        if !went_down {
            result.unwrap();
        }
        trial.crash();
        let holds = trial.open("disk.raw.afterimage", Open::ReadOnly).is_ok();
        let comes = trial.open("disk.raw.afterimage-receive", Open::ReadOnly).is_ok();
        assert!(holds || comes, "cut {n}: nobody knows what the file holds");
        if holds && receive(&trial.fork(n), false, &step[..step.len() / 2]).unwrap_err().kind() == Kind::Failed {
            same("claimed", &content(&trial), &from.snapshot("web", "b"));
        } else {
            receive(&trial, false, &step).unwrap();
            same("again", &content(&trial), &from.snapshot("web", "b"));
        }
        if !went_down {
            break;
        }
    }
}
