//! The same command said again: by a service that is started anew, by two at once, by one who tries again.

use std::path::Path;

use serde_json::Value;

use super::Server;
use super::client::Nbd;
use crate::real::{require_programs, shell, wait_for};

/// A unit of systemd says the same words at each start. It worked once: the next server restored the export and found its
/// own address taken.
#[test]
fn a_service_that_persists_is_started_again_by_the_command_that_made_it() {
    for kind in ["nbd", "vhost-user"] {
        let server = Server::without();
        let words = format!("serve {kind} web --socket SOCK --persist --daemon");
        let first = server.json(&words);
        for kill in [true, false] {
            if kill {
                server.kill();
            } else {
                server.end();
            }
            let again = server.json(&words);
            assert_eq!((&again["id"], &again["state"], &again["persist"]), (&first["id"], &"on".into(), &true.into()));
            assert_eq!(server.exports().len(), 1);
        }
        // To a server that runs, too.
        assert_eq!(server.json(&words)["id"], first["id"]);
        assert_eq!(server.json(&format!("attach {kind} web --socket SOCK --persist"))["id"], first["id"]);
        for (other, part) in [
            (format!("attach {kind} web --socket SOCK"), "persists"),
            (format!("attach {kind} web --socket SOCK --persist --read-only"), "can be written"),
        ] {
            let (code, message) = server.error(&other);
            assert_eq!((code, message.contains("export 1") && message.contains(part)), (4, true), "{other}: {message}");
        }
        assert_eq!(server.exports().len(), 1);
        server.json("detach web");
        wait_for("the server ends with its last export", || !server.it.pool().join("control.sock").exists());
        server.json("rm web");
    }
}

/// One of them became the server; the other found it, and ended without a word to the command that had started it.
#[test]
fn of_commands_that_start_a_server_at_once_each_gets_its_export() {
    for _ in 0..4 {
        let server = Server::without();
        let start = |n: usize| server.json(&format!("serve nbd web --read-only --socket DIR/{n} --daemon"));
        let answers: Vec<Value> = std::thread::scope(|scope| {
            let started: Vec<_> = (0..4).map(|n| scope.spawn(move || start(n))).collect();
            started.into_iter().map(|answer| answer.join().unwrap()).collect()
        });
        let mut ids: Vec<_> = answers.iter().map(|answer| answer["id"].as_u64().unwrap()).collect();
        ids.sort_unstable();
        assert_eq!(ids, [1, 2, 3, 4]);
        assert_eq!(server.exports().len(), 4);
    }
}

#[test]
fn a_port_that_is_taken_is_busy() {
    let server = Server::without();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let (code, message) = server.error(&format!("serve nbd web --listen {} --daemon", taken.local_addr().unwrap()));
    assert_eq!((code, message.contains("somebody listens")), (4, true), "{message}");
}

fn make_certificate(dir: &Path) {
    let script = "cd \"$1\" && openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes \
                  -keyout key.pem -out cert.pem -days 30 -subj /CN=localhost 2>&1";
    shell(script, &[dir.as_os_str()]);
}

/// It stayed failed until the server ended, and to attach it again was to attach another one.
#[test]
fn what_could_not_be_started_is_attempted_again() {
    if !require_programs(&["openssl"]) {
        return;
    }
    let server = Server::without();
    make_certificate(server.it.dir.path());
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let words = format!(
        "serve nbd web --listen 127.0.0.1:{port} --tls-cert DIR/cert.pem --tls-key DIR/key.pem --persist --daemon"
    );
    let first = server.json(&words);
    server.end();
    let (key, away) = (server.it.path("key.pem"), server.it.path("away.pem"));
    std::fs::rename(&key, &away).unwrap();
    server.json("create db -s 1M");
    server.json("serve nbd db --socket SOCK --daemon");
    assert_eq!(server.exports()[0]["state"], "failed");
    assert_eq!(server.error(&words).0, 3, "the key is still missing");
    assert_eq!(server.exports()[0]["state"], "failed");
    std::fs::rename(&away, &key).unwrap();
    let again = server.json(&words);
    assert_eq!((&again["id"], &again["state"]), (&first["id"], &"on".into()));
    assert_eq!(server.exports().len(), 2);
    Nbd::open(&server.sock(), "db").unwrap();
    server.json("detach web");
    server.json("rm web");
}
