//! The end of a server that serves several exports, and of one that is just being asked for another.

use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;

use afterimage::api::{Answer, Request, Service};
use afterimage::disk;
use afterimage::error::Kind;
use afterimage::progress::Silent;

use super::Server;
use super::client::Nbd;
use crate::real::wait_for;
use crate::real::{require_programs, shell};
use crate::vhost::guest::Guest;
use crate::vhost::silent::{Hostile, UNWANTED, in_time};

/// Were they ended one after another, the second would not hear of it before the first had been cut off, with replies that
/// were never taken.
#[test]
fn all_exports_end_at_once() {
    let server = Server::without();
    server.json("create db -s 1M");
    server.json("serve nbd web --socket DIR/one --daemon");
    server.json("attach nbd db --socket DIR/two");
    let mut slow = Nbd::open(&server.it.path("one"), "web").unwrap();
    let mut idle = Nbd::open(&server.it.path("two"), "db").unwrap();
    let (replies, len) = (16, 1 << 20);
    slow.begin_reads(replies, len).unwrap();
    assert_eq!(slow.take(1, len), len);
    std::thread::scope(|scope| {
        scope.spawn(|| server.end());
        idle.wait_for_the_end();
        assert_eq!(slow.take(replies - 1, len), (replies - 1) * len, "what was begun is answered");
        drop(slow);
    });
}

/// The certificate comes out of a pipe, so that the test decides how long it takes to attach.
#[test]
fn what_is_attached_while_the_server_ends_is_not_kept() {
    if !require_programs(&["openssl", "mkfifo"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let script = "cd \"$1\" && mkfifo pipe && openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 \
                  -nodes -keyout key.pem -out cert.pem -days 30 -subj /CN=localhost 2>&1";
    shell(script, &[dir.path().as_os_str()]);
    let pool = tempfile::TempDir::new_in(dir.path()).unwrap();
    let store = crate::tree::new_pool(&pool);
    disk::create(&store, "web", 1 << 20).unwrap();
    let service = Service::new(Arc::clone(&store), pool.path()).on_shutdown(Box::new(|| {}));
    service.start_exports();
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let path = |name: &str| dir.path().join(name).display().to_string();
    let request: Request = serde_json::from_value(serde_json::json!({
        "command": "attach", "kind": "nbd", "disks": ["web"], "listen": format!("127.0.0.1:{port}"),
        "tls_cert": path("pipe"), "tls_key": path("key.pem"), "persist": true,
    }))
    .unwrap();
    std::thread::scope(|scope| {
        let attaching = scope.spawn(|| service.answer(request, &Silent));
        let open = || std::fs::OpenOptions::new().write(true).custom_flags(libc::O_NONBLOCK).open(path("pipe"));
        // Opened once: its end is that of the certificate.
        let pipe = std::cell::RefCell::new(None);
        wait_for("the certificate is read", || {
            *pipe.borrow_mut() = open().ok();
            pipe.borrow().is_some()
        });
        let mut pipe = pipe.into_inner().unwrap();
        service.end_exports();
        pipe.write_all(&std::fs::read(path("cert.pem")).unwrap()).unwrap();
        drop(pipe);
        assert_eq!(attaching.join().unwrap().unwrap_err().kind(), Kind::Busy);
    });
    let list = std::fs::read_to_string(pool.path().join("exports.toml")).unwrap_or_default();
    assert!(!list.contains("[["), "{list}");
    store.close().unwrap();
}

/// To close what a front end has sent may take for ever, also at the end of a process, which keeps what it has open as long.
#[test]
fn a_server_that_is_killed_lets_the_pool_go_although_a_file_of_a_front_end_cannot_be_closed() {
    let server = Server::without();
    server.json("serve vhost-user web --socket SOCK --daemon");
    let socket = server.sock();
    let Some(mut hostile) = Hostile::begin(&socket) else { return };
    assert!(!hostile.share(UNWANTED));
    in_time("the next front end", move || {
        let mut guest = Guest::new(1);
        guest.connect(&socket);
        guest.read(0, 0, 512);
    });
    server.kill();
    server.json("serve vhost-user web --read-only --socket DIR/other --daemon");
    let mut guest = Guest::new(1);
    guest.connect(&server.it.path("other"));
    guest.read(0, 0, 512);
}
