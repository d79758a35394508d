//! What does not fit is refused with the reason, and nothing has changed then.

use afterimage::disk::{self, BlockDevice};
use afterimage::error::{Error, Kind};
use afterimage::progress::Silent;
use afterimage::snapshot;
use afterimage::stream::{self, ReceiveOptions};

use super::pools::pair;
use super::{Pool, noise, same};

fn says(error: &Error, kind: Kind, words: &[&str]) {
    let all = format!("{} {}", error.message(), error.next_step().unwrap_or(""));
    assert_eq!(error.kind(), kind, "{all}");
    for word in words {
        assert!(all.contains(word), "'{word}' is not in: {all}");
    }
}

#[test]
fn an_increment_without_its_base() {
    let (from, to) = pair();
    let step = from.send(Some("web@a"), "web@b");
    says(&to.receive("other", &step).unwrap_err(), Kind::NotFound, &["other", "full"]);
    disk::create(to.store(), "empty", 1 << 20).unwrap();
    says(&to.receive("empty", &step).unwrap_err(), Kind::Failed, &["no snapshot"]);
    to.write("copy", 0, &[9; 512]);
    says(&to.receive("copy", &step).unwrap_err(), Kind::Failed, &["written", "--force"]);
    to.take("copy", "own");
    says(&to.receive("copy", &step).unwrap_err(), Kind::Failed, &["own", "--force"]);
    to.check();
    assert_eq!(to.store().disks().len(), 2);
}

#[test]
fn everything_that_changes_a_disk_counts() {
    let (from, to) = pair();
    let step = from.send(Some("web@a"), "web@b");
    let changes: [fn(&Pool); 5] = [
        |to| disk::open(to.store(), "copy").unwrap().discard(0, 4096).unwrap(),
        |to| disk::open(to.store(), "copy").unwrap().resize(16 << 20, false).unwrap(),
        |to| disk::open(to.store(), "copy").unwrap().resize(1 << 20, true).unwrap(),
        |to| {
            to.write("copy", 0, &[1; 4096]);
            to.take("copy", "x");
            snapshot::remove(to.store(), "copy", "x").unwrap();
            to.tidy();
        },
        |to| disk::open(to.store(), "copy").unwrap().write_zeroes(8192, 4096).unwrap(),
    ];
    for (n, change) in changes.iter().enumerate() {
        let trial = to.fork(n as u64);
        change(&trial);
        says(&trial.receive("copy", &step).unwrap_err(), Kind::Failed, &["written to", "'a'"]);
    }
    // Back on the base it fits again.
    let trial = to.fork(9);
    trial.write("copy", 0, &[1; 4096]);
    snapshot::revert(trial.store(), "copy", "a", None).unwrap();
    trial.receive("copy", &step).unwrap();
    same("reverted", &trial.live("copy"), &from.snapshot("web", "b"));
    trial.check();
}

#[test]
fn force_goes_back_to_the_base_and_keeps_what_was_there() {
    let (from, to) = pair();
    let step = from.send(Some("web@a"), "web@b");
    to.write("copy", 0, &[9; 4096]);
    to.take("copy", "own");
    to.write("copy", 4096, &[8; 4096]);
    let was = to.live("copy");
    let report = to.force("copy", &step).unwrap();
    let kept = report.kept.unwrap();
    assert!(kept.starts_with("kept-"), "{kept}");
    same("kept", &to.snapshot("copy", &kept), &was);
    same("received", &to.live("copy"), &from.snapshot("web", "b"));
    to.check();
    to.tidy();
    to.check();
    same("kept", &to.snapshot("copy", &kept), &was);
    // The next increment finds its base.
    from.write("web", 0, &noise(5, 8192));
    from.take("web", "c");
    to.receive("copy", &from.send(Some("web@b"), "web@c")).unwrap();
    same("c", &to.live("copy"), &from.snapshot("web", "c"));
}

#[test]
fn force_keeps_nothing_that_is_kept_already() {
    let (from, to) = pair();
    to.take("copy", "own");
    let report = to.force("copy", &from.send(Some("web@a"), "web@b")).unwrap();
    assert_eq!(report.kept, None);
    assert_eq!(to.names("copy"), ["a", "own", "b"]);
    to.check();
}

#[test]
fn a_full_stream_replaces_only_by_force() {
    let (from, to) = pair();
    let full = from.send(None, "web@b");
    says(&to.receive("copy", &full).unwrap_err(), Kind::Exists, &["copy", "--force"]);
    to.write("copy", 4 << 20, &noise(6, 4096));
    let was = to.live("copy");
    let report = to.force("copy", &full).unwrap();
    same("received", &to.live("copy"), &from.snapshot("web", "b"));
    same("kept", &to.snapshot("copy", &report.kept.unwrap()), &was);
    to.tidy();
    to.check();
}

#[test]
fn a_name_that_is_taken_can_be_another() {
    let (from, to) = pair();
    let step = from.send(Some("web@a"), "web@b");
    snapshot::rename(to.store(), "copy", "a", "b").unwrap();
    says(&to.receive("copy", &step).unwrap_err(), Kind::Exists, &["copy@b", "--as"]);
    let options = ReceiveOptions { disk: "copy".into(), force: false, name: Some("c".into()) };
    let report = stream::receive(to.store(), &options, &mut &*step, &Silent).unwrap();
    assert_eq!(report.snapshot, "c");
    same("c", &to.snapshot("copy", "c"), &from.snapshot("web", "b"));
}

#[test]
fn a_disk_in_use_is_busy() {
    let (from, to) = pair();
    let step = from.send(Some("web@a"), "web@b");
    let disk = disk::open(to.store(), "copy").unwrap();
    let lease = disk.lease("a guest").unwrap();
    says(&to.receive("copy", &step).unwrap_err(), Kind::Busy, &["copy", "a guest"]);
    says(&to.force("copy", &step).unwrap_err(), Kind::Busy, &["a guest"]);
    drop(lease);
    to.receive("copy", &step).unwrap();
}

#[test]
fn damage_anywhere_changes_nothing() {
    let (from, to) = pair();
    let step = from.send(Some("web@a"), "web@b");
    let was = to.live("copy");
    for n in 0..60 {
        let mut bad = step.clone();
        let at = step.len() * n / 60 + n % 7;
        bad[at] ^= 1 << (n % 8);
        let error = to.receive("copy", &bad).unwrap_err();
        assert!(matches!(error.kind(), Kind::Corrupt | Kind::Unsupported), "byte {at}: {error}");
        assert_eq!(to.names("copy"), ["a"]);
    }
    same("the disk", &to.live("copy"), &was);
    to.check();
    to.receive("copy", &step).unwrap();
    same("received", &to.live("copy"), &from.snapshot("web", "b"));
}

#[test]
fn a_token_of_other_states_is_refused() {
    let (from, to) = pair();
    let step = from.send(Some("web@a"), "web@b");
    to.receive("copy", &step[..step.len() / 2]).unwrap_err();
    let token = stream::token(to.store(), "copy").unwrap();
    says(&Pool::new(5).resume(token).unwrap_err(), Kind::Failed, &["another pool"]);
    let moved = stream::Token { states: token.states ^ 1, ..token };
    says(&from.resume(moved).unwrap_err(), Kind::Failed, &["not the same"]);
    // Names may change.
    snapshot::rename(from.store(), "web", "b", "renamed").unwrap();
    disk::rename(from.store(), "web", "www").unwrap();
    let rest = from.resume(token).unwrap();
    snapshot::remove(from.store(), "www", "renamed").unwrap();
    says(&from.resume(token).unwrap_err(), Kind::Failed, &["gone"]);
    to.receive("copy", &rest).unwrap();
    assert_eq!(to.names("copy"), ["a", "renamed"]);
    // A rest without its beginning.
    says(&Pool::new(6).receive("copy", &rest).unwrap_err(), Kind::NotFound, &["full"]);
}

#[test]
fn what_arrived_for_a_disk_that_is_gone_goes_too() {
    let (from, to) = pair();
    let step = from.send(Some("web@a"), "web@b");
    to.receive("copy", &step[..step.len() / 2]).unwrap_err();
    disk::remove(to.store(), "copy", true).unwrap();
    to.tidy();
    to.check();
    to.receive("copy", &from.send(None, "web@a")).unwrap();
    to.receive("copy", &step).unwrap();
    same("received", &to.live("copy"), &from.snapshot("web", "b"));
    to.tidy();
    to.check();
    stream::token(to.store(), "copy").unwrap_err();
}
