//! Attaching, listing and detaching; the life of a server that was started to serve.

use std::io::{BufRead, BufReader};
use std::process::Stdio;

use super::client::{Nbd, list};
use super::{Server, mode};
use crate::real::wait_for;

#[test]
fn several_disks_and_snapshots_are_served_at_one_address_under_the_names_they_have_now() {
    let server = Server::without();
    server.json("snapshot web@a");
    server.json("create db -s 1M");
    let answer = server.json("serve nbd web web@a db --socket SOCK --daemon");
    assert_eq!((&answer["answer"], &answer["id"]), (&"attached".into(), &1.into()));
    assert_eq!(mode(&server.sock()), 0o600);
    assert_eq!(list(&server.sock()), ["web", "db", "web@a"]);
    assert!(Nbd::open(&server.sock(), "").is_err(), "there is no default one among several");
    assert!(Nbd::open(&server.sock(), "other").is_err());
    let mut client = Nbd::open(&server.sock(), "db").unwrap();
    assert_eq!((client.size, client.read_only()), (1 << 20, false));
    assert_eq!(client.write(&[3; 4096], 4096).unwrap(), 0);
    assert_eq!(client.flush().unwrap(), 0);
    server.json("rename db data");
    server.json("rename web@a web@b");
    assert_eq!(list(&server.sock()), ["web", "data", "web@b"]);
    assert_eq!(client.read(4096, 4096).unwrap(), [3; 4096], "who is connected goes on");
    let export = &server.exports()[0];
    assert_eq!(export["disks"], serde_json::json!(["web", "data", "web@b"]));
    assert_eq!((&export["clients"], &export["writing"]), (&1.into(), &serde_json::json!(["data"])));
    let metrics = String::from_utf8(server.it.run(&["metrics"]).stdout).unwrap();
    assert!(metrics.contains("afterimage_export_clients{export=\"1\",kind=\"nbd\"} 1"), "{metrics}");
    for words in ["rm data", "rm web --recursive"] {
        let (code, message) = server.error(words);
        assert_eq!((code, message.contains("export 1")), (4, true), "{words}: {message}");
    }
    let (code, message) = server.error("detach data");
    assert_eq!((code, message.contains("together with others")), (1, true), "{message}");
    let gone = server.json("detach 1");
    assert_eq!((&gone["answer"], &gone["exports"][0]["id"]), (&"detached".into(), &1.into()));
    assert!(client.read(4096, 4096).is_err(), "it was cut off");
    wait_for("the server ends with its last export", || !server.it.pool().join("control.sock").exists());
    assert!(!server.sock().exists());
    server.json("rm data");
    server.json("check");
}

#[test]
fn the_foreground_server_answers_others_and_ends_on_a_signal() {
    let server = Server::without();
    let mut child = server
        .it
        .command(&["--json", "serve", "nbd", "web", "--listen", "127.0.0.1:0"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let answer: serde_json::Value = serde_json::from_str(&line).unwrap();
    let listen = answer["listen"].as_str().unwrap();
    let address: std::net::SocketAddr = listen.parse().unwrap();
    assert_ne!(address.port(), 0, "it says which port it got");
    std::net::TcpStream::connect(address).unwrap();
    let second = server.json("serve nbd web --read-only --socket SOCK");
    assert_eq!(second["id"], 2, "the server that runs was told to");
    assert_eq!(server.exports().len(), 2);
    server.json("detach 2");
    let pid = rustix::process::Pid::from_child(&child);
    let mut client = {
        server.json("attach nbd web --socket SOCK");
        Nbd::open(&server.sock(), "web").unwrap()
    };
    assert_eq!(client.write(&[9; 65536], 0).unwrap(), 0);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    client.read(1, 0).unwrap_err();
    server.json("check");
    assert_eq!(server.json("exports")["exports"], serde_json::json!([]));
}

#[test]
fn tables_and_lines_are_for_people() {
    let server = Server::without();
    server.json("serve nbd web --socket SOCK --persist --daemon");
    let sock = server.sock();
    let text = String::from_utf8(server.it.run(&["exports"]).stdout).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    assert!(lines[0].starts_with("ID  KIND  DISK  ADDRESS"), "{text}");
    assert!(lines[1].contains(sock.to_str().unwrap()) && lines[1].ends_with("read-write  yes       on"), "{text}");
    let text = String::from_utf8(server.it.run(&["detach", "web"]).stdout).unwrap();
    assert_eq!(text, format!("export 1: web no longer at {} over nbd\n", sock.display()));
}

#[test]
fn a_socket_may_lie_deeper_than_the_kernel_takes() {
    let server = Server::without();
    let deep = server.it.path(&"d".repeat(200));
    std::fs::create_dir(&deep).unwrap();
    let sock = deep.join("s");
    let words = |kind: &'static str, name| ["attach", kind, "web", "--socket", name].map(str::to_owned);
    server.json("serve nbd web --read-only --socket SOCK --daemon");
    for kind in ["nbd", "vhost-user"] {
        let words = words(kind, sock.to_str().unwrap());
        server.it.json(&words.iter().map(String::as_str).collect::<Vec<_>>());
        assert_eq!(mode(&sock), 0o600);
        let id = server.exports()[1]["id"].to_string();
        server.it.json(&["detach", &id]);
        assert!(!sock.exists());
    }
}

#[test]
fn a_number_is_a_number_unless_a_disk_is_called_so() {
    let server = Server::without();
    server.json("create 2 -s 1M");
    server.json("serve nbd 2 --socket SOCK --daemon");
    server.json("attach nbd web --socket DIR/b");
    let (code, message) = server.error("detach 2");
    assert_eq!(code, 1, "{message}");
    server.json("detach web");
    server.json("detach 2");
}

/// Lets a process have so many files open beyond those it has; all it may have with `None`.
fn limit_files(pid: rustix::process::Pid, more: Option<u64>) {
    use rustix::process::{Resource, Rlimit, prlimit};
    let open = std::fs::read_dir(format!("/proc/{}/fd", pid.as_raw_nonzero())).unwrap().count() as u64;
    let hard = rustix::process::getrlimit(Resource::Nofile).maximum;
    let current = more.map_or(hard, |more| Some(open + more));
    prlimit(Some(pid), Resource::Nofile, Rlimit { current, maximum: hard }).unwrap();
}

#[test]
fn a_server_without_descriptors_refuses_what_needs_one_and_goes_on_when_it_has_some() {
    use std::os::unix::fs::FileExt;
    let Some(server) = Server::mounted() else { return };
    server.json("create db -s 16M");
    server.json("attach nbd web --socket SOCK");
    let mut client = Nbd::open(&server.sock(), "web").unwrap();
    assert_eq!(client.write(&[1; 4096], 0).unwrap(), 0);
    let file = server.open_to_write("db").unwrap();
    let pid = server.pid();
    limit_files(pid, Some(0));
    for _ in 0..3 {
        // The first write to a disk makes its segment.
        assert_eq!(file.write_all_at(&[2; 4096], 0).unwrap_err().raw_os_error(), Some(libc::EIO));
        assert_eq!(client.write(&[3; 4096], 0).unwrap(), 0, "who has what he needs goes on");
        assert_eq!(client.flush().unwrap(), 0);
    }
    limit_files(pid, None);
    file.write_all_at(&[2; 4096], 0).unwrap();
    file.sync_all().unwrap();
    let mut bytes = [0; 4096];
    file.read_exact_at(&mut bytes, 0).unwrap();
    assert_eq!(bytes, [2; 4096]);
    assert_eq!(client.write(&[4; 4096], 1 << 20).unwrap(), 0);
    assert_eq!(client.flush().unwrap(), 0);
}
