//! How a server ends: every polite way leaves a pool that was closed in order, and a kill one that opens all the same.

use std::fs;
use std::os::unix::fs::FileExt;

use rustix::process::Signal;

use super::{Place, run};
use crate::tree::noise;

/// What the log says when a pool has to be replayed.
const REPLAYED: &str = "not closed in order";

/// Starts a server, writes without a sync, takes a snapshot, and leaves the rest to `end`.
fn lives_until(end: impl FnOnce(&Place, super::Server)) -> Option<Place> {
    let place = Place::new()?;
    let server = place.serve();
    fs::write(place.disk("a"), noise(9_999, 1)).unwrap();
    place.cli.json(&["snapshot", "a@s"]);
    let file = fs::OpenOptions::new().write(true).open(place.disk("a")).unwrap();
    file.write_all_at(b"later", 100).unwrap();
    drop(file);
    place.wait_until_free("a");
    end(&place, server);
    Some(place)
}

fn holds_everything(place: &Place) {
    let _server = place.serve();
    let mut whole = noise(9_999, 1);
    assert!(fs::read(place.snapshot("a", "s")).unwrap() == whole);
    whole[100..105].copy_from_slice(b"later");
    // The size of a disk made by writing ends on a sector.
    assert!(fs::read(place.disk("a")).unwrap()[..9_999] == whole);
}

#[test]
fn signals_and_unmounts_leave_a_pool_closed_in_order() {
    let by_signal = |signal| {
        move |_: &Place, server: super::Server| {
            server.signal(signal);
            assert_eq!(server.wait().code(), Some(0));
        }
    };
    let by_program = |words: &'static [&'static str]| {
        move |place: &Place, server: super::Server| {
            run(words[0], words[1..].iter().map(std::convert::AsRef::as_ref).chain([place.mnt.as_os_str()]));
            assert_eq!(server.wait().code(), Some(0));
        }
    };
    let by_command = |place: &Place, server: super::Server| {
        place.cli.json(&["umount", place.mnt.to_str().unwrap()]);
        assert_eq!(server.wait().code(), Some(0));
    };
    let root = rustix::process::geteuid().is_root();
    let umount: &[&str] = if root { &["umount"] } else { &["fusermount3", "-u"] };
    for place in [
        lives_until(by_signal(Signal::TERM)),
        lives_until(by_signal(Signal::INT)),
        lives_until(by_program(umount)),
        lives_until(by_program(&["fusermount3", "-u"])),
        lives_until(by_command),
    ] {
        let Some(place) = place else { return };
        let told = place.check();
        assert!(!told.contains(REPLAYED), "{told}");
        assert!(!place.cli.pool().join("control.sock").exists());
        holds_everything(&place);
    }
}

#[test]
fn a_stop_under_writers_leaves_nothing_behind() {
    let Some(place) = Place::new() else { return };
    for round in 0..4 {
        let server = place.serve();
        place.cli.json(&["create", &format!("d{round}"), "--size", "1G"]);
        let path = place.disk(&format!("d{round}"));
        let writer = std::thread::spawn(move || {
            let file = fs::OpenOptions::new().write(true).open(path).unwrap();
            let bytes = noise(1 << 16, round);
            (0..1 << 14).take_while(|n| file.write_all_at(&bytes, n << 16).is_ok()).count()
        });
        std::thread::sleep(std::time::Duration::from_millis(300));
        server.signal(Signal::TERM);
        assert_eq!(server.wait().code(), Some(0));
        writer.join().unwrap();
        // It fails for blocks that nothing names.
        let told = place.check();
        assert!(!told.contains(REPLAYED), "{told}");
    }
}

#[test]
fn a_killed_server_leaves_a_pool_that_opens_without_repair() {
    let killed = |place: &Place, server: super::Server| {
        fs::File::open(place.disk("a")).unwrap().sync_all().unwrap();
        server.kill();
    };
    let Some(place) = lives_until(killed) else { return };
    let told = place.check();
    assert!(told.contains(REPLAYED), "{told}");
    assert!(!place.check().contains(REPLAYED), "once");
    holds_everything(&place);
}
