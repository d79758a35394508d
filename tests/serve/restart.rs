//! What a server that ends, or is killed, leaves for the next one.

use afterimage::store::unflushed::{LogHeader, log_path};
use afterimage::units::DiskId;

use super::client::Nbd;
use super::{Server, mode};
use crate::real::wait_for;

/// Everything that is attached, without what changes by itself.
fn attached(server: &Server) -> Vec<String> {
    let line = |export: &serde_json::Value| {
        format!("{} {} {} {} {}", export["id"], export["kind"], export["disks"], export["socket"], export["state"])
    };
    server.exports().iter().map(line).collect()
}

#[test]
fn what_persists_comes_back_and_the_rest_does_not() {
    let Some(server) = Server::mounted() else { return };
    server.json("snapshot web@a");
    server.json("create db -s 1M");
    server.json("attach nbd web --socket DIR/one --persist");
    server.json("attach nbd web@a --socket DIR/two");
    server.json("attach vhost-user db --socket DIR/three --queues 2 --persist");
    let before: Vec<String> = attached(&server).into_iter().filter(|line| !line.contains("two")).collect();
    for kill in [false, true] {
        if kill {
            server.kill();
        } else {
            server.end();
        }
        assert_eq!(attached(&server).len(), 2, "without a server they are listed, too");
        assert!(attached(&server).iter().all(|line| line.ends_with("\"off\"")));
        server.mount();
        assert_eq!(attached(&server), before, "after a kill: {kill}");
        assert_eq!(server.exports()[1]["queues"], 2);
        assert_eq!(mode(&server.it.path("one")), 0o600);
        assert_eq!(server.open_to_write("db").unwrap_err().raw_os_error(), Some(libc::EBUSY));
        Nbd::open(&server.it.path("one"), "web").unwrap();
    }
    let four = server.json("attach nbd web@a --socket DIR/four");
    assert_eq!(four["id"], 4);
    server.json("detach db");
    server.json("detach 4");
    server.end();
    server.mount();
    assert_eq!(attached(&server), &before[..1]);
    let five = server.json("attach nbd web@a --socket DIR/five");
    assert_eq!(five["id"], 5, "numbers are not given out again, whatever has become of them");
}

#[test]
fn who_was_writing_finds_its_disk_reserved() {
    let Some(server) = Server::mounted() else { return };
    server.json("attach nbd web --socket SOCK --persist");
    for kill in [true, false] {
        let mut client = Nbd::open(&server.sock(), "web").unwrap();
        assert_eq!(client.write(&[5; 4096], 0).unwrap(), 0);
        assert_eq!(client.flush().unwrap(), 0);
        if kill {
            server.kill();
        } else {
            server.end();
        }
        server.mount();
        let holder = format!("export 1 (nbd {})", server.sock().display());
        assert_eq!(server.json("info web")["reserved"], holder);
        assert_eq!(server.open_to_write("web").unwrap_err().raw_os_error(), Some(libc::EBUSY));
        for words in ["rm web", "resize web 1M --shrink"] {
            assert_eq!(server.error(words).0, 4, "{words}");
        }
        let mut again = Nbd::open(&server.sock(), "web").expect("it has come back");
        assert_eq!(again.read(4096, 0).unwrap(), [5; 4096]);
        assert_eq!(server.json("info web")["reserved"], serde_json::Value::Null);
        drop(again);
        wait_for("it has let go", || server.open_to_write("web").is_ok());
    }
    // Who let go has no claim.
    server.kill();
    server.mount();
    server.open_to_write("web").unwrap();
}

/// A client of a Unix socket ends with its host; where only the log is damaged it may still be there.
#[test]
fn after_a_restart_of_the_host_a_fresh_guest_on_a_socket_hears_of_no_loss() {
    for restarted in [false, true] {
        let Some(server) = Server::mounted() else { return };
        server.json("attach nbd web --socket SOCK --persist");
        let mut client = Nbd::open(&server.sock(), "web").unwrap();
        assert_eq!(client.write(&[5; 65536], 0).unwrap(), 0);
        assert_eq!(client.flush().unwrap(), 0);
        server.kill();
        for which in 0..2 {
            let log = server.it.pool().join(log_path(DiskId(1), which));
            let mut header = LogHeader::decode("log", &std::fs::read(&log).unwrap()).unwrap();
            header.boot = uuid::Uuid::from_u128(77);
            std::fs::write(&log, if restarted { header.encode() } else { Vec::new() }).unwrap();
        }
        server.mount();
        assert_eq!(server.json("info web")["reserved"].is_null(), restarted);
        let mut fresh = Nbd::open(&server.sock(), "web").unwrap();
        assert_eq!(fresh.read(4096, 0).unwrap(), [5; 4096]);
        assert_eq!(fresh.write(&[6; 4096], 0).unwrap(), 0);
        assert_eq!(fresh.flush().unwrap(), if restarted { 0 } else { 5 }, "restarted: {restarted}");
        assert_eq!(fresh.flush().unwrap(), 0);
    }
}

/// The note was dropped when the client left before its first flush, and a server that ended in order then left nothing from
/// which the next one could know.
#[test]
fn a_client_that_left_before_it_was_told_of_a_loss_is_told_by_a_later_server() {
    let Some(server) = Server::mounted() else { return };
    server.json("attach nbd web --socket SOCK --persist");
    let mut client = Nbd::open(&server.sock(), "web").unwrap();
    assert_eq!(client.write(&[5; 65536], 0).unwrap(), 0);
    server.kill();
    for which in 0..2 {
        std::fs::write(server.it.pool().join(log_path(DiskId(1), which)), []).unwrap();
    }
    server.mount();
    drop(Nbd::open(&server.sock(), "web").unwrap());
    wait_for("it has let go", || server.holder("web").is_none());
    for kill in [false, false, true] {
        if kill {
            server.kill();
        } else {
            server.end();
        }
        // A command that opens the pool in between does not change it.
        server.json("create other -s 1M");
        server.json("rm other");
        server.mount();
        assert_eq!(server.json("info web")["reserved"], serde_json::Value::Null, "nothing is kept for it");
        server.open_to_write("web").unwrap();
    }
    wait_for("the mount has let go", || server.holder("web").is_none());
    let mut again = Nbd::open(&server.sock(), "web").unwrap();
    assert_eq!((again.flush().unwrap(), again.flush().unwrap()), (5, 0));
    drop(again);
    server.end();
    server.mount();
    assert_eq!(Nbd::open(&server.sock(), "web").unwrap().flush().unwrap(), 0, "it was told once");
}

#[test]
fn a_device_that_cannot_be_served_again_has_its_disk_reserved_all_the_same() {
    let server = Server::without();
    server.json("serve vhost-user web --socket SOCK --persist --daemon");
    let holder = format!("export 1 (vhost-user {})", server.sock().display());
    server.kill();
    std::fs::remove_file(server.sock()).unwrap();
    std::fs::write(server.sock(), "in the way").unwrap();
    server.json("create db -s 1M");
    server.json("serve nbd db --socket DIR/db --daemon");
    assert_eq!(server.exports()[0]["state"], "failed");
    assert_eq!(server.json("info web")["reserved"], holder);
    for words in ["resize web 1M --shrink", "rm web"] {
        let (code, message) = server.error(words);
        assert_eq!((code, message.contains(&holder)), (4, true), "{words}: {message}");
    }
    server.json("detach 1");
    server.json("rm web");
}

#[test]
fn who_is_detached_has_no_claim_any_more() {
    let server = Server::without();
    server.json("serve nbd web --socket SOCK --persist --daemon");
    let _client = Nbd::open(&server.sock(), "web").unwrap();
    server.kill();
    server.json("serve nbd web --read-only --socket DIR/other --daemon");
    assert_ne!(server.json("info web")["reserved"], serde_json::Value::Null);
    server.json("detach 1");
    assert_eq!(server.json("info web")["reserved"], serde_json::Value::Null);
    server.json("resize web 4M --shrink");
    let list = std::fs::read_to_string(server.it.pool().join("exports.toml")).unwrap();
    assert!(!list.contains("[["), "{list}");
}

#[test]
fn a_claim_ends_a_minute_after_the_first_restart_not_after_the_last() {
    let server = Server::without();
    let list = server.it.pool().join("exports.toml");
    server.json("serve nbd web --socket SOCK --persist --daemon");
    let _client = Nbd::open(&server.sock(), "web").unwrap();
    server.kill();
    let restart = || {
        server.json("serve nbd web --read-only --socket DIR/other --daemon");
        server.json("info web")["reserved"].clone()
    };
    assert_ne!(restart(), serde_json::Value::Null);
    server.end();
    let text = std::fs::read_to_string(&list).unwrap();
    let until = |line: &&str| line.starts_with("until = ");
    let line = text.lines().find(until).unwrap_or_else(|| panic!("{text}"));
    assert_ne!(restart(), serde_json::Value::Null, "its minute is not over");
    server.end();
    let again = std::fs::read_to_string(&list).unwrap();
    assert_eq!(again.lines().find(until), Some(line), "it is the same minute");
    std::fs::write(&list, again.replace(line, "until = 1000000000")).unwrap();
    assert_eq!(restart(), serde_json::Value::Null);
    server.end();
    assert!(!std::fs::read_to_string(&list).unwrap().contains("[[lease]]"));
}

#[test]
fn what_is_gone_is_dropped_and_what_cannot_start_is_kept() {
    let server = Server::without();
    server.json("create db -s 1M");
    server.json("snapshot web@a");
    server.json("serve nbd web web@a --socket DIR/one --persist --daemon");
    server.json("attach nbd db --socket DIR/two --persist");
    server.json("attach nbd web@a --socket DIR/three --persist");
    server.end();
    server.json("rm web@a");
    server.json("rename web www");
    std::fs::write(server.it.path("two"), "in the way").unwrap();
    server.json("serve nbd www --read-only --socket SOCK --daemon");
    let exports = server.exports();
    assert_eq!(exports.len(), 3, "{exports:?}");
    assert_eq!(exports[0]["disks"], serde_json::json!(["www"]), "without the snapshot, under the new name");
    assert_eq!((&exports[1]["id"], &exports[1]["state"]), (&2.into(), &"failed".into()));
    assert!(exports[1]["error"].as_str().unwrap().contains("two"), "{}", exports[1]);
    assert_eq!(exports[2]["id"], 4, "the number of what is gone is not given out again");
    std::fs::remove_file(server.it.path("two")).unwrap();
    server.end();
    server.json("serve nbd www --read-only --socket SOCK --daemon");
    assert_eq!(server.exports()[1]["state"], "on", "it was only in the way for a while");
    let log = std::fs::read_to_string(server.it.pool().join("server.log")).unwrap();
    assert!(log.contains("export 3"), "{log}");
}

#[test]
fn a_damaged_list_keeps_nobody_from_the_disks() {
    let server = Server::without();
    server.json("serve nbd web --socket SOCK --persist --daemon");
    server.end();
    let list = server.it.pool().join("exports.toml");
    let good = std::fs::read_to_string(&list).unwrap();
    std::fs::write(&list, good.replace("kind", "kin")).unwrap();
    assert_eq!(server.error("exports").0, 5);
    server.json("ls");
    server.json("serve nbd web --socket SOCK --daemon");
    Nbd::open(&server.sock(), "web").unwrap();
    assert_eq!(server.error("attach nbd web --read-only --socket DIR/b --persist").0, 5);
    server.end();
    std::fs::write(&list, good).unwrap();
    server.json("detach web");
    assert_eq!(server.exports(), [""; 0]);
}
