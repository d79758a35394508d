//! Commands that open the pool themselves: what the next server will serve again is kept for it, as a server would.

use std::process::Stdio;

use serde_json::Value;

use super::Server;
use super::client::Nbd;

/// Runs a command that must be refused because of who is in the way.
#[track_caller]
fn refused(server: &Server, words: &str, holder: &str) {
    let words = server.words(words);
    let mut command = server.it.command(&["--json"]);
    if words[0] == "receive" {
        command.stdin(std::fs::File::open(server.it.path("stream")).unwrap());
    }
    let output = command.args(&words).output().unwrap();
    let error: Value = serde_json::from_slice(&output.stderr)
        .unwrap_or_else(|e| panic!("{words:?}: {e}: {}", String::from_utf8_lossy(&output.stderr)));
    let (message, hint) = (&error["error"]["message"], error["error"]["hint"].as_str().unwrap_or_default());
    assert_eq!(output.status.code(), Some(4), "{words:?}: {error}");
    assert!(message.as_str().unwrap().contains(holder), "{words:?}: {error}");
    assert!(hint.contains("afterimage detach"), "{words:?}: {error}");
}

/// A disk of two snapshots, and a stream that fits it.
fn prepared() -> Server {
    let server = Server::without();
    server.json("snapshot web@a");
    let stream = std::fs::File::create(server.it.path("stream")).unwrap();
    let sent = server.it.command(&["send", "web@a"]).stdout(stream).stderr(Stdio::null()).status().unwrap();
    assert!(sent.success());
    server
}

const DISTURBING: [&str; 5] =
    ["revert web@a", "resize web 4M --shrink", "rm web", "rm web --recursive", "receive web --force --as b"];

#[test]
fn what_the_next_server_serves_again_is_kept_for_it() {
    let server = prepared();
    server.json("serve nbd web --socket SOCK --persist --daemon");
    let holder = format!("export 1 (nbd {})", server.sock().display());
    server.end();
    for words in DISTURBING {
        refused(&server, words, &holder);
    }
    // What is missing is missing, whoever is in the way; and nobody minds what does no harm.
    assert_eq!(server.error("revert web@none").0, 3);
    assert_eq!(server.json("info web")["reserved"], holder);
    for words in ["snapshot web@c", "rename web www", "rename www web", "resize web 16M", "clone web@a copy"] {
        server.json(words);
    }
    server.json("rm web@c");
    server.json("detach web");
    assert_eq!(server.json("info web")["reserved"], Value::Null);
    server.json("revert web@a");
    server.json("rm web --recursive");
    server.json("check");
}

#[test]
fn what_is_only_read_is_kept_from_being_removed() {
    let server = prepared();
    server.json("serve nbd web --read-only --socket SOCK --persist --daemon");
    let holder = format!("export 1 (nbd {})", server.sock().display());
    server.end();
    refused(&server, "rm web --recursive", &holder);
    server.json("resize web 4M --shrink");
    server.json("revert web@a");
    server.json("detach 1");
    server.json("rm web --recursive");
}

#[test]
fn who_was_writing_when_a_server_was_killed_is_awaited_without_one() {
    let server = prepared();
    server.json("serve nbd web --socket SOCK --persist --daemon");
    server.json("create db -s 8M");
    server.json("attach vhost-user db --socket DIR/db --persist");
    let mut client = Nbd::open(&server.sock(), "web").unwrap();
    assert_eq!(client.write(&[5; 4096], 0).unwrap(), 0);
    server.kill();
    let holder = format!("export 1 (nbd {})", server.sock().display());
    let guest = format!("export 2 (vhost-user {})", server.it.path("db").display());
    for words in DISTURBING {
        refused(&server, words, &holder);
    }
    refused(&server, "resize db 1M --shrink", &guest);
    // And after that the next server still knows.
    server.json("serve nbd web --read-only --socket DIR/other --daemon");
    assert_eq!(server.json("info web")["reserved"], holder);
    assert_eq!(server.json("info db")["holder"], guest);
    let mut again = Nbd::open(&server.sock(), "web").expect("it has come back");
    assert_eq!(again.read(4096, 0).unwrap(), [5; 4096]);
    assert_eq!(again.flush().unwrap(), 0, "nothing was lost");
}

#[test]
fn detaching_without_a_server_ends_every_claim() {
    let server = prepared();
    server.json("serve nbd web --socket SOCK --persist --daemon");
    let _client = Nbd::open(&server.sock(), "web").unwrap();
    server.kill();
    server.json("detach 1");
    let list = std::fs::read_to_string(server.it.pool().join("exports.toml")).unwrap();
    assert!(!list.contains("[[export]]") && !list.contains("[[lease]]"), "{list}");
    server.json("serve nbd web --read-only --socket DIR/other --daemon");
    assert_eq!(server.json("info web")["reserved"], Value::Null);
    server.json("resize web 4M --shrink");
}
