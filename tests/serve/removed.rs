//! Snapshots that are removed or retired while they are served.

use super::Server;
use super::client::{Nbd, list};
use crate::real::{require_programs, run};
use crate::vhost::Guest;

/// A disk with snapshots `a` (7 in blocks 0 and 1) and `b` (8 in block 1).
fn with_snapshots() -> Server {
    let server = Server::without();
    server.json("serve nbd web --socket DIR/live --daemon");
    let mut writer = Nbd::open(&server.it.path("live"), "web").unwrap();
    assert_eq!(writer.write(&[7; 8192], 0).unwrap(), 0);
    server.json("snapshot web@a");
    assert_eq!(writer.write(&[8; 4096], 4096).unwrap(), 0);
    server.json("snapshot web@b");
    // So that the data is the snapshots' alone.
    assert_eq!(writer.write(&[9; 8192], 0).unwrap(), 0);
    server
}

#[test]
fn a_removed_snapshot_is_served_to_who_connects_later_until_it_is_detached() {
    let server = with_snapshots();
    server.json("attach nbd web@a web@b --socket SOCK");
    let mut early = Nbd::open(&server.sock(), "web@a").unwrap();
    server.json("rename web@b web@c");
    server.json("rm web@a");
    server.json("retire web@c");
    server.json("reclaim --wait");
    let names = ["web@a", "web@c"];
    assert_eq!(list(&server.sock()), names);
    assert_eq!(server.exports()[1]["disks"], serde_json::json!(names));
    assert_eq!(early.read(8192, 0).unwrap(), [7; 8192]);
    let mut late = Nbd::open(&server.sock(), "web@a").expect("a second connection");
    assert_eq!(late.read(8192, 0).unwrap(), [7; 8192]);
    let mut late = Nbd::open(&server.sock(), "web@c").expect("it was retired, and is held");
    assert_eq!(late.read(8192, 0).unwrap(), [[7; 4096], [8; 4096]].concat());
    if require_programs(&["nbdinfo"]) {
        let map = |name: &str, base: &str| {
            let uri = format!("nbd+unix:///{}?socket={}", name.replace('@', "%40"), server.sock().display());
            run("nbdinfo", [&format!("--map=qemu:dirty-bitmap:{base}"), &uri])
        };
        server.json("snapshot web@d");
        let map = map("web@a", "d");
        let first: Vec<&str> = map.lines().next().unwrap().split_whitespace().collect();
        assert_eq!(first[..3], ["0", "8192", "1"], "{map}");
    }
    // A new one of the name is another one.
    server.json("snapshot web@a");
    assert_eq!(Nbd::open(&server.sock(), "web@a").unwrap().read(4096, 0).unwrap(), [7; 4096]);
    let gone = server.json("detach 2");
    assert_eq!(gone["exports"][0]["disks"], serde_json::json!(names));
    server.json("reclaim --wait");
    server.json("check");
}

#[test]
fn a_removed_snapshot_is_served_to_a_front_end_that_connects_again() {
    let server = with_snapshots();
    server.json("attach vhost-user web@a --socket SOCK");
    server.json("rm web@a");
    server.json("reclaim --wait");
    for _ in 0..2 {
        let mut guest = Guest::new(1);
        guest.connect(&server.sock());
        assert_eq!(guest.read(0, 0, 8192), [7; 8192]);
        guest.disconnect();
    }
    assert_eq!(server.exports()[1]["disks"], serde_json::json!(["web@a"]));
    server.json("detach web@a");
}

#[test]
fn what_was_removed_or_retired_while_it_was_served_is_not_served_again() {
    let server = with_snapshots();
    server.json("attach nbd web web@a web@b --socket SOCK --persist");
    server.json("rm web@a");
    server.json("retire web@b");
    server.end();
    server.json("serve nbd web --read-only --socket DIR/live --daemon");
    let exports = server.exports();
    assert_eq!(
        (&exports[0]["disks"], &exports[0]["state"]),
        (&serde_json::json!(["web"]), &"on".into()),
        "{exports:?}"
    );
}
