//! What cannot be attached, and how that is told.

use super::Server;

#[test]
fn requests_that_make_no_sense_are_refused_before_anything_begins() {
    let server = Server::without();
    server.json("create db -s 1M");
    server.json("snapshot web@old");
    server.json("retire web@old --wait");
    server.json("serve nbd web --read-only --socket SOCK --daemon");
    let file = server.it.path("file");
    std::fs::write(&file, "x").unwrap();
    let cases = [
        ("attach nbd none --socket DIR/b", 3, "none"),
        ("attach nbd web@none --socket DIR/b", 3, "none"),
        ("attach nbd web@old --socket DIR/b", 1, "retired"),
        ("attach nbd we/b --socket DIR/b", 2, "we/b"),
        ("attach nbd web web --socket DIR/b", 2, "twice"),
        ("attach vhost-user web db --socket DIR/b", 2, "one disk"),
        ("attach vhost-user web --listen 127.0.0.1:0", 2, "this host"),
        ("attach vhost-user web --socket DIR/b --queues 0", 2, "0 queues"),
        ("attach vhost-user web --socket DIR/b --queues 65", 2, "65 queues"),
        ("attach nbd web --socket DIR/b --queues 2", 2, "no queues"),
        ("attach nbd web --listen 0.0.0.0:0", 2, "whoever reaches 0.0.0.0:0"),
        ("attach nbd web --listen [::]:0", 2, "whoever reaches [::]:0"),
        ("attach nbd web --read-only --listen 127.0.0.1:0 --persist", 2, "another port"),
        ("attach nbd web --listen localhost:10809", 2, "no address"),
        ("attach nbd web --listen 127.0.0.1", 2, "no address"),
        ("attach nbd web --listen 127.0.0.1:0 --tls-cert DIR/none --tls-key DIR/file", 3, "none"),
        ("attach nbd web --socket DIR/b --tls-cert DIR/file --tls-key DIR/file", 2, "--listen"),
        ("attach nbd web --socket SOCK", 4, "somebody listens"),
        ("attach nbd web --socket DIR/file", 1, "is no socket"),
        ("attach vhost-user web --socket SOCK", 4, "somebody listens"),
        ("attach vhost-user web --socket DIR/file", 1, "is no socket"),
        ("attach nbd web --socket DIR/no/such/dir", 3, "no/such/dir"),
        ("detach none", 3, "not attached"),
        ("detach 99", 3, "not attached"),
        ("detach we/b", 2, "we/b"),
    ];
    for (words, code, part) in cases {
        let (was, message) = server.error(words);
        assert_eq!((was, message.contains(part)), (code, true), "{words}: {message}");
    }
    assert_eq!(server.exports().len(), 1);
    let list = std::fs::read_to_string(server.it.pool().join("exports.toml")).unwrap_or_default();
    assert!(!list.contains("[["), "{list}");
    assert_eq!(std::fs::read(&file).unwrap(), b"x");
}

#[test]
fn without_a_server_there_is_nothing_to_attach_to() {
    let server = Server::without();
    let (code, message) = server.error("attach nbd web --socket SOCK");
    assert_eq!((code, message.as_str()), (1, "no server is running on this pool"));
    assert_eq!(server.error("detach web").0, 3);
    assert_eq!(server.error("serve nbd none --socket SOCK --daemon").0, 3);
    assert_eq!(server.error("serve nbd none --socket SOCK").0, 3);
    assert!(!server.it.pool().join("control.sock").exists(), "the server that could not serve has ended");
    assert!(!server.sock().exists());
}

#[test]
fn the_socket_checks_paths_that_the_command_line_would_make_whole() {
    use afterimage::api::Request;
    let server = Server::without();
    server.json("serve nbd web --read-only --socket SOCK --daemon");
    for field in ["socket", "tls_cert"] {
        let json = format!(r#"{{"command":"attach","kind":"nbd","disks":["web"],"{field}":"relative"}}"#);
        let request: Request = serde_json::from_str(&json).unwrap();
        let error = server.client().ask(&request, &afterimage::progress::Silent).unwrap_err();
        assert!(error.message().contains("not absolute"), "{error}");
    }
    let both = r#"{"command":"attach","kind":"nbd","disks":["web"],"socket":"/a","listen":"127.0.0.1:1"}"#;
    let none = r#"{"command":"attach","kind":"nbd","disks":["web"]}"#;
    for json in [both, none] {
        let error =
            server.client().ask(&serde_json::from_str(json).unwrap(), &afterimage::progress::Silent).unwrap_err();
        assert_eq!(error.kind(), afterimage::error::Kind::Usage, "{error}");
    }
}
