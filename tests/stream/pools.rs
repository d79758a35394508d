//! From pool to pool: what arrives is what was sent, whatever breaks on the way.

use std::io::Read;

use afterimage::disk::{self, BlockDevice};
use afterimage::error::Kind;
use afterimage::progress::Silent;
use afterimage::snapshot;
use afterimage::stream::{self, ReceiveOptions, SendOptions, What};

use super::{Pool, noise, same};

/// A source with the snapshots `a` and `b`, and a copy that has `a`.
pub fn pair() -> (Pool, Pool) {
    let (from, to) = (Pool::new(1), Pool::new(2));
    disk::create(from.store(), "web", (5 << 20) + 512).unwrap();
    from.write("web", 0, &noise(1, 3 << 20));
    from.write("web", 5 << 20, &noise(2, 512));
    from.take("web", "a");
    from.write("web", 4096, &noise(3, 20_000));
    for n in 0..30 {
        from.write("web", (1 << 20) + n * 65_536, &noise(10 + n, 9000));
    }
    from.write("web", (2 << 20) - 4096, &vec![7; 1 << 20]);
    let disk = disk::open(from.store(), "web").unwrap();
    disk.discard(40_960, 81_920).unwrap();
    disk.resize((6 << 20) + 1024, false).unwrap();
    from.write("web", 6 << 20, &noise(4, 1024));
    from.take("web", "b");
    to.receive("copy", &from.send(None, "web@a")).unwrap();
    (from, to)
}

#[test]
fn full_and_increment_arrive() {
    let (from, to) = pair();
    same("a", &to.live("copy"), &from.snapshot("web", "a"));
    let report = to.receive("copy", &from.send(Some("web@a"), "web@b")).unwrap();
    assert_eq!((report.snapshot.as_str(), report.kept), ("b", None));
    same("live", &to.live("copy"), &from.snapshot("web", "b"));
    same("b", &to.snapshot("copy", "b"), &from.snapshot("web", "b"));
    same("a", &to.snapshot("copy", "a"), &from.snapshot("web", "a"));
    for (there, here) in from.store().snapshots("web").unwrap().iter().zip(to.store().snapshots("copy").unwrap()) {
        assert_eq!((there.uuid, &there.name, there.created), (here.uuid, &here.name, here.created));
    }
    to.check();
    to.tidy();
    to.check();
    same("after tidying", &to.live("copy"), &from.snapshot("web", "b"));
    let mut to = to;
    to.reopen();
    to.check();
    same("after a crash", &to.live("copy"), &from.snapshot("web", "b"));
    assert_eq!(to.store().disks().len(), 1, "nothing hidden shows");
    to.write("copy", 0, &[1; 4096]);
    to.take("copy", "own");
    to.check();
}

#[test]
fn compressed_or_not_it_is_the_same() {
    let (from, _) = pair();
    let what = What::States { from: None, to: ("web".into(), "b".into()) };
    let mut raw = Vec::new();
    let report = stream::send(from.store(), &SendOptions { what, compress: false }, &mut raw, &Silent).unwrap();
    let packed = from.send(None, "web@b");
    assert_eq!(report.stream, raw.len() as u64);
    assert!(packed.len() + (900 << 10) < raw.len(), "{} and {}", packed.len(), raw.len());
    let to = Pool::new(3);
    to.receive("raw", &raw).unwrap();
    to.receive("packed", &packed).unwrap();
    same("raw", &to.live("raw"), &from.snapshot("web", "b"));
    same("packed", &to.live("packed"), &from.snapshot("web", "b"));
}

#[test]
fn a_chain_of_increments_goes_on() {
    let (from, to) = pair();
    let mut last = "web@a".to_owned();
    for n in 0..40 {
        from.write("web", n * 36_864, &noise(n, 5000));
        let name = format!("s{n}");
        from.take("web", &name);
        to.receive("copy", &from.send(Some(&last), &format!("web@{name}"))).unwrap();
        same(&name, &to.live("copy"), &from.live("web"));
        last = format!("web@{name}");
        if n % 8 == 3 {
            to.tidy();
            to.check();
        }
    }
    to.check();
    to.tidy();
    to.check();
    same("the end", &to.live("copy"), &from.live("web"));
}

#[test]
fn received_within_one_pool() {
    let (from, _) = pair();
    from.receive("twin", &from.send(None, "web@a")).unwrap();
    from.receive("twin", &from.send(Some("web@a"), "web@b")).unwrap();
    same("twin", &from.live("twin"), &from.snapshot("web", "b"));
    from.check();
}

/// The base may be retired on either side, or on both.
#[test]
fn a_retired_base_serves_as_well() {
    let (from, to) = pair();
    let name = |disk: &str| vec![(disk.to_owned(), "a".to_owned())];
    snapshot::retire(from.store(), &name("web")).unwrap();
    snapshot::wait_retired(from.store(), &Silent).unwrap();
    snapshot::retire(to.store(), &name("copy")).unwrap();
    let early = to.fork(7);
    snapshot::wait_retired(to.store(), &Silent).unwrap();
    let step = from.send(Some("web@a"), "web@b");
    for to in [early, to] {
        // Not yet and already freed.
        to.receive("copy", &step[..step.len() / 2]).unwrap_err();
        let token = stream::token(to.store(), "copy").unwrap();
        to.receive("copy", &from.resume(token).unwrap()).unwrap();
        same("b", &to.live("copy"), &from.snapshot("web", "b"));
        to.check();
        to.tidy();
        to.check();
        same("b", &to.snapshot("copy", "b"), &from.snapshot("web", "b"));
        to.write("copy", 0, &[1; 4096]);
        to.receive("copy", &step).unwrap_err();
    }
}

/// Copies of one state in one pool share its identity, and a record is named after that.
#[test]
fn only_one_of_two_copies_of_a_state_is_retired() {
    let (from, _) = pair();
    from.receive("twin", &from.send(None, "web@a")).unwrap();
    let name = |disk: &str| (disk.to_owned(), "a".to_owned());
    let error = snapshot::retire(from.store(), &[name("web"), name("twin")]).unwrap_err();
    assert!(error.message().contains("same state"), "{error}");
    snapshot::retire(from.store(), &[name("web")]).unwrap();
    snapshot::retire(from.store(), &[name("twin")]).unwrap_err();
    snapshot::wait_retired(from.store(), &Silent).unwrap();
    let error = snapshot::retire(from.store(), &[name("twin")]).unwrap_err();
    assert!(error.message().contains("web@a"), "{error}");
    from.check();
}

/// What was there before a stream, and may be there after a failed one.
fn unchanged(to: &Pool, from: &Pool) {
    assert_eq!(to.names("copy"), ["a"]);
    same("the disk", &to.live("copy"), &from.snapshot("web", "a"));
    same("the snapshot", &to.snapshot("copy", "a"), &from.snapshot("web", "a"));
}

#[test]
fn a_stream_cut_anywhere_changes_nothing_and_goes_on() {
    let (from, to) = pair();
    let whole = from.send(Some("web@a"), "web@b");
    let mut resumed = 0;
    for n in 0..24 {
        let cut = whole.len() * n / 24;
        let error = to.receive("copy", &whole[..cut]).unwrap_err();
        assert_eq!(error.kind(), Kind::Corrupt, "cut at {cut}: {error}");
        unchanged(&to, &from);
        to.check();
        match stream::token(to.store(), "copy") {
            Ok(token) => {
                resumed += 1;
                let hint = error.next_step().unwrap();
                assert!(hint.contains(&token.to_string()), "{hint}");
                let trial = to.fork(n as u64);
                let rest = from.resume(token).unwrap();
                trial.receive("copy", &rest).unwrap();
                same("resumed", &trial.live("copy"), &from.snapshot("web", "b"));
                trial.check();
                // Or all of it again.
                let trial = to.fork(n as u64);
                trial.receive("copy", &whole).unwrap();
                same("again", &trial.live("copy"), &from.snapshot("web", "b"));
                stream::abort(to.store(), "copy").unwrap();
                stream::token(to.store(), "copy").unwrap_err();
                to.tidy();
                to.check();
            }
            Err(error) => assert_eq!(error.kind(), Kind::NotFound),
        }
    }
    assert!(resumed > 10, "{resumed}");
    to.receive("copy", &whole).unwrap();
    same("at last", &to.live("copy"), &from.snapshot("web", "b"));
}

/// What arrived for a disk that was to be made is not lost sight of when somebody else makes one of that name.
#[test]
fn what_arrived_for_a_name_that_is_taken_since_can_be_dropped() {
    let (from, to) = pair();
    let whole = from.send(None, "web@a");
    to.receive("new", &whole[..whole.len() / 2]).unwrap_err();
    let token = stream::token(to.store(), "new").unwrap();
    disk::create(to.store(), "new", 4 << 20).unwrap();
    let error = stream::token(to.store(), "new").unwrap_err();
    assert_eq!(error.kind(), Kind::Exists, "{error}");
    disk::rename(to.store(), "new", "other").unwrap();
    assert_eq!(stream::token(to.store(), "new").unwrap(), token);
    disk::rename(to.store(), "other", "new").unwrap();
    stream::abort(to.store(), "new").unwrap();
    assert_eq!(stream::token(to.store(), "new").unwrap_err().kind(), Kind::NotFound);
    to.check();
}

/// Power cuts of the receiver at every I/O: the old state or the new one, and it can be gone on with.
#[test]
fn a_receiver_that_crashes_has_all_or_nothing() {
    let (from, to) = pair();
    let whole = from.send(Some("web@a"), "web@b");
    let (mut before, mut after) = (0, 0);
    for n in 1.. {
        let mut trial = to.fork(n);
        trial.media.crash_after(n);
        let result = trial.receive("copy", &whole);
        let went_down = trial.media.is_down();
        trial.reopen();
        trial.check();
        if trial.names("copy") == ["a", "b"] {
            after += 1;
            same("after", &trial.live("copy"), &from.snapshot("web", "b"));
        } else {
            assert!(result.is_err(), "it was acknowledged and is gone");
            before += 1;
            unchanged(&trial, &from);
            let stream = match stream::token(trial.store(), "copy") {
                Ok(token) if n % 2 == 0 => from.resume(token).unwrap(),
                _ => whole.clone(),
            };
            trial.receive("copy", &stream).unwrap();
            same("again", &trial.live("copy"), &from.snapshot("web", "b"));
        }
        trial.tidy();
        trial.check();
        if !went_down {
            break;
        }
    }
    assert!(before > 5 && after > 0, "{before} and {after}");
}

/// The same for a disk that is not there before.
#[test]
fn a_new_disk_is_there_whole_or_not_at_all() {
    let (from, _) = pair();
    let to = Pool::new(9);
    let whole = from.send(None, "web@b");
    for n in 1.. {
        let mut trial = to.fork(n);
        trial.media.crash_after(n);
        let result = trial.receive("copy", &whole);
        let went_down = trial.media.is_down();
        trial.reopen();
        trial.check();
        if trial.store().disks().is_empty() {
            result.unwrap_err();
            trial.receive("copy", &whole).unwrap();
        }
        same("whole", &trial.live("copy"), &from.snapshot("web", "b"));
        same("whole", &trial.snapshot("copy", "b"), &from.snapshot("web", "b"));
        trial.check();
        if !went_down {
            break;
        }
    }
}

/// A block that is not what was sealed is never sent.
#[test]
fn a_damaged_block_is_not_sent() {
    let (from, _) = pair();
    while from.store().seal_next().unwrap() {}
    let what = || What::States { from: None, to: ("web".into(), "b".into()) };
    let mut sink = std::io::sink();
    let report = stream::send(from.store(), &SendOptions { what: what(), compress: true }, &mut sink, &Silent).unwrap();
    assert_eq!(report.unverified, 0, "everything is sealed");
    let segment = from.media.paths().into_iter().find(|path| path.ends_with(".seg")).unwrap();
    // Somewhere in the first slab: block 300 of the disk.
    from.media.flip_bit(&segment, (2 << 20) + 300 * 4096 + 5, 3).unwrap();
    let error =
        stream::send(from.store(), &SendOptions { what: what(), compress: true }, &mut sink, &Silent).unwrap_err();
    assert_eq!(error.kind(), Kind::Corrupt);
    let text = error.message();
    assert!(text.contains("'web'") && text.contains("byte 1228800") && text.contains("segment 1"), "{text}");
}

/// A reader that fails in the middle, as a pipe from a machine that is switched off.
struct Broken<'a>(&'a [u8]);

impl Read for Broken<'_> {
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        if self.0.is_empty() {
            return Err(std::io::Error::from_raw_os_error(5));
        }
        self.0.read(buf)
    }
}

#[test]
fn a_pipe_that_fails_keeps_what_arrived() {
    let (from, to) = pair();
    let whole = from.send(Some("web@a"), "web@b");
    let options = ReceiveOptions { disk: "copy".into(), force: false, name: None };
    let cut = whole.len() * 3 / 4;
    let error = stream::receive(to.store(), &options, &mut Broken(&whole[..cut]), &Silent).unwrap_err();
    assert_eq!(error.kind(), Kind::Io);
    let token = stream::token(to.store(), "copy").unwrap();
    assert!(token.offset > 0);
    to.receive("copy", &from.resume(token).unwrap()).unwrap();
    same("resumed", &to.live("copy"), &from.snapshot("web", "b"));
}

/// A disk that was written to and brought back to the base takes an increment of which a part had come before.
#[test]
fn what_was_left_of_a_stream_does_not_stand_in_the_way_of_it() {
    let (from, to) = (Pool::new(1), Pool::new(2));
    disk::create(from.store(), "web", 4 << 20).unwrap();
    from.write("web", 0, &noise(1, 1 << 20));
    from.take("web", "a");
    from.write("web", 4096, &noise(2, 2 << 20));
    from.take("web", "b");
    to.receive("copy", &from.send(None, "web@a")).unwrap();
    let next = from.send(Some("web@a"), "web@b");
    to.receive("copy", &next[..next.len() * 2 / 3]).unwrap_err();
    let token = stream::token(to.store(), "copy").unwrap();
    to.write("copy", 0, &[7; 4096]);
    snapshot::revert(to.store(), "copy", "a", None).unwrap();
    // What had arrived is for the disk as it was: the rest does not fit it, all of it does.
    if token.offset > 0 {
        to.receive("copy", &from.resume(token).unwrap()).unwrap_err();
        same("live", &to.live("copy"), &from.snapshot("web", "a"));
    }
    to.receive("copy", &next).unwrap();
    same("b", &to.snapshot("copy", "b"), &from.snapshot("web", "b"));
    stream::token(to.store(), "copy").unwrap_err();
    to.check();
}

/// What a shrink left beyond the end is unmapped some time later, which is no change of the disk.
#[test]
fn a_copy_of_a_disk_that_was_shrunk_takes_the_next_increment() {
    let (from, to) = (Pool::new(1), Pool::new(2));
    disk::create(from.store(), "web", 9 << 20).unwrap();
    from.write("web", 0, &noise(1, 9 << 20));
    from.take("web", "a");
    disk::open(from.store(), "web").unwrap().resize((3 << 20) + 512, true).unwrap();
    from.take("web", "b");
    from.tidy();
    from.write("web", 0, &noise(2, 9000));
    from.take("web", "c");
    to.receive("copy", &from.send(None, "web@a")).unwrap();
    to.receive("copy", &from.send(Some("web@a"), "web@b")).unwrap();
    to.tidy();
    to.receive("copy", &from.send(Some("web@b"), "web@c")).unwrap();
    same("c", &to.snapshot("copy", "c"), &from.snapshot("web", "c"));
    // And one that was shrunk here.
    disk::open(to.store(), "copy").unwrap().resize(1 << 20, true).unwrap();
    to.take("copy", "small");
    to.tidy();
    let small = to.store().snapshot_info("copy", "small").unwrap();
    to.write("copy", 0, &[1; 4096]);
    to.take("copy", "more");
    let next = to.send(Some("copy@small"), "copy@more");
    snapshot::remove(to.store(), "copy", "more").unwrap();
    snapshot::revert(to.store(), "copy", "small", None).unwrap();
    snapshot::retire(to.store(), &[("copy".into(), "small".into())]).unwrap();
    to.tidy();
    assert_eq!(to.receive("copy", &next).unwrap().base, Some(small.uuid));
    to.check();
}

/// A pool that received its own stream has two snapshots of one identity, and that of the other lineage is no base.
#[test]
fn what_was_cut_off_goes_on_where_the_pool_has_its_base_twice() {
    let pool = Pool::new(1);
    // Made first, and so looked at first.
    disk::create(pool.store(), "copy", 4 << 20).unwrap();
    disk::create(pool.store(), "web", 4 << 20).unwrap();
    pool.write("web", 0, &noise(1, 1 << 20));
    pool.take("web", "a");
    pool.force("copy", &pool.send(None, "web@a")).unwrap();
    snapshot::clone(pool.store(), "web", "a", "clone").unwrap();
    pool.write("clone", 4096, &noise(2, 2 << 20));
    pool.take("clone", "b");
    let next = pool.send(Some("web@a"), "clone@b");
    pool.receive("copy", &next[..next.len() * 2 / 3]).unwrap_err();
    let token = stream::token(pool.store(), "copy").unwrap();
    pool.receive("copy", &pool.resume(token).unwrap()).unwrap();
    same("copy", &pool.snapshot("copy", "b"), &pool.snapshot("clone", "b"));
    pool.check();
}

/// What came with a stream counts for the disk that it became the state of, and goes with it.
#[test]
fn what_was_received_is_held_by_its_disk() {
    let (from, to) = (Pool::new(1), Pool::new(2));
    disk::create(from.store(), "web", 4 << 20).unwrap();
    from.write("web", 0, &[1; 4096]);
    from.take("web", "a");
    from.write("web", 4096, &noise(1, 3 << 20));
    from.take("web", "b");
    to.receive("copy", &from.send(None, "web@a")).unwrap();
    to.receive("copy", &from.send(Some("web@a"), "web@b")).unwrap();
    let held = |pool: &Pool| {
        let tables = pool.store().tables.read();
        tables.held(tables.disk_id("copy").unwrap())
    };
    assert_eq!(held(&to), 1 + (3 << 20) / 4096);
    let copy = disk::open(to.store(), "copy").unwrap();
    copy.discard(0, 4 << 20).unwrap();
    copy.flush().unwrap();
    snapshot::remove(to.store(), "copy", "b").unwrap();
    to.tidy();
    assert_eq!(held(&to), 1);
    to.check();
}
