//! Limits and ends: too many clients, slow ones, the end of the server, sockets in the way.

use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use afterimage::disk::BlockDevice;
use afterimage::error::Kind;
use afterimage::nbd::wire::{Command, Request, command};
use afterimage::nbd::{self, Listen, Options};

use super::plain::Client;
use super::{MIB, Pool, Rig, limits};

#[test]
fn one_connection_too_many_is_closed() {
    let rig = Rig::with(2);
    rig.disk("a", MIB);
    let (first, mut second) = (Client::enter(&rig, "a"), Client::enter(&rig, "a"));
    let mut third = Client { stream: rig.connect(), structured: false };
    assert!(third.is_closed());
    assert_eq!(rig.server.as_ref().unwrap().connections(), 2);
    drop(first);
    let begun = Instant::now();
    while rig.server.as_ref().unwrap().connections() > 1 {
        assert!(begun.elapsed() < Duration::from_secs(60));
    }
    Client::enter(&rig, "a").read(0, 512);
    second.read(0, 512);
}

#[test]
fn a_client_that_takes_no_replies_slows_nobody_else_and_no_snapshot() {
    let rig = Rig::new();
    let disk = rig.disk("a", 64 * MIB);
    disk.write(&vec![3; 32 << 20], 0).unwrap();
    let mut slow = Client::enter(&rig, "a");
    // More replies than any buffer takes, and writes in between.
    let mut writer = Client { stream: slow.stream.try_clone().unwrap(), structured: true };
    let sending = std::thread::spawn(move || {
        for n in 0..200 {
            writer.request(Command::Read, 0, n, 0, 4 << 20);
            writer.send(&Request { flags: 0, kind: 1, cookie: 1000 + n, offset: 40 << 20, length: 4096 }.encode());
            writer.send(&[n as u8; 4096]);
        }
    });
    for n in 0..10 {
        let mut other = Client::enter(&rig, "a");
        assert_eq!(other.read(MIB, 4096), [3; 4096]);
        rig.take("a", &format!("s{n}"));
        disk.write(&[4; 4096], 50 * MIB).unwrap();
    }
    // It gets them all when it wants them.
    let mut seen = [0; 2];
    for _ in 0..400 {
        let (cookie, errno, data) = slow.reply(0);
        assert!(errno == 0 && (cookie >= 1000 || data.len() == 4 << 20 && data.iter().all(|byte| *byte == 3)));
        seen[usize::from(cookie >= 1000)] += 1;
    }
    assert_eq!(seen, [200, 200]);
    sending.join().unwrap();
}

#[test]
fn the_end_of_the_server_finishes_what_was_begun() {
    let mut rig = Rig::new();
    let disk = rig.disk("a", 16 * MIB);
    let mut idle = Client::enter(&rig, "a");
    let mut asking = Client::greet(&rig);
    let mut stuck = Client::enter(&rig, "a");
    for n in 0..40 {
        stuck.request(Command::Read, 0, n, 0, 1 << 20);
    }
    let mut busy = Client::enter(&rig, "a");
    for n in 0..8u64 {
        busy.send(&Request { flags: 0, kind: 1, cookie: n, offset: n << 20, length: 1 << 20 }.encode());
        busy.send(&vec![n as u8 + 1; 1 << 20]);
    }
    let (_, errno, _) = busy.reply(0);
    assert_eq!(errno, 0);
    let reading = std::thread::spawn(move || {
        let mut answered = 1;
        while busy.stream.peek_one() {
            assert_eq!(busy.reply(0).1, 0);
            answered += 1;
        }
        answered
    });
    let taking = std::thread::spawn(move || {
        while stuck.stream.peek_one() {
            stuck.reply(0);
        }
    });
    rig.stop();
    let answered = reading.join().unwrap();
    taking.join().unwrap();
    assert!(answered >= 1);
    assert!(idle.is_closed() && asking.is_closed());
    assert_eq!(rig.store.disk_info("a").unwrap().holder, None, "all leases are let go");
    assert!(!rig.socket().exists());
    let mut blocks = 0;
    for n in 0..8u64 {
        let mut byte = [0];
        disk.read(&mut byte, n << 20).unwrap();
        blocks += u64::from(byte[0] == n as u8 + 1);
    }
    assert!(blocks >= answered, "{answered} writes were answered and {blocks} are there");
    rig.start(4);
    Client::enter(&rig, "a").read(0, 512);
}

/// Zeros that are to be written are written part after part: 4 GiB of them for one request, and 256 requests at a time.
#[test]
fn the_end_of_the_server_does_not_wait_for_zeros_that_were_not_begun() {
    let mut rig = Rig::new();
    rig.disk("a", 64 << 30);
    let mut client = Client::enter(&rig, "a");
    for n in 0..200 {
        client.request(Command::WriteZeroes, command::NO_HOLE, n, 0, u32::MAX);
    }
    let begun = Instant::now();
    while rig.store.disk_info("a").unwrap().referenced == 0 {
        assert!(begun.elapsed() < Duration::from_secs(60));
    }
    let reading = std::thread::spawn(move || {
        let mut errors = Vec::new();
        while client.stream.peek_one() {
            errors.push(client.reply(0).1);
        }
        errors
    });
    let begun = Instant::now();
    rig.stop();
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    let errors = reading.join().unwrap();
    assert!(!errors.is_empty() && errors.iter().all(|errno| *errno == 108), "{errors:?}");
    assert_eq!(rig.store.disk_info("a").unwrap().holder, None);
}

trait Peek {
    fn peek_one(&mut self) -> bool;
}

impl Peek for UnixStream {
    /// Tells whether anything more comes.
    fn peek_one(&mut self) -> bool {
        rustix::net::recv(&*self, &mut [0; 1], rustix::net::RecvFlags::PEEK).is_ok_and(|(len, _)| len == 1)
    }
}

#[test]
fn a_socket_is_for_its_owner_and_one_in_the_way_is_removed_if_it_is_dead() {
    let mut rig = Rig::new();
    rig.disk("a", MIB);
    let mode = std::fs::metadata(rig.socket()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let start = |path: std::path::PathBuf| {
        let options = Options { listen: Listen::Unix(path), tls: None, limits: limits(2) };
        nbd::start(options, Arc::new(Pool(Arc::clone(&rig.store))))
    };
    let busy = start(rig.socket()).unwrap_err();
    assert_eq!(busy.kind(), Kind::Busy);
    assert!(busy.to_string().contains("nbd.sock") && busy.next_step().is_some(), "{busy}");
    Client::enter(&rig, "a").read(0, 512);
    let file = rig.file("plain");
    std::fs::write(&file, "mine").unwrap();
    assert_eq!(start(file.clone()).unwrap_err().kind(), Kind::Exists);
    assert_eq!(std::fs::read(&file).unwrap(), b"mine");
    // What a crash leaves.
    let dead = rig.file("dead.sock");
    drop(UnixListener::bind(&dead).unwrap());
    assert!(dead.exists());
    let server = start(dead.clone()).unwrap();
    assert_eq!(server.address(), dead.display().to_string());
    // A socket that somebody else has put there meanwhile stays.
    std::fs::remove_file(&dead).unwrap();
    let _other = UnixListener::bind(&dead).unwrap();
    server.stop();
    assert!(dead.exists());
    rig.stop();
    assert!(!rig.socket().exists());
}

#[test]
fn a_path_may_be_longer_than_the_kernel_takes() {
    let rig = Rig::new();
    rig.disk("a", MIB);
    let deep = rig.file(&"d".repeat(120));
    std::fs::create_dir(&deep).unwrap();
    let path = deep.join("nbd.sock");
    let options = Options { listen: Listen::Unix(path.clone()), tls: None, limits: limits(2) };
    let server = nbd::start(options, Arc::new(Pool(Arc::clone(&rig.store)))).unwrap();
    assert!(path.exists());
    server.stop();
    assert!(!path.exists());
    let missing = Listen::Unix(rig.file("no/such/dir.sock"));
    let options = Options { listen: missing, tls: None, limits: limits(2) };
    assert_eq!(nbd::start(options, Arc::new(Pool(Arc::clone(&rig.store)))).unwrap_err().kind(), Kind::NotFound);
}

#[test]
fn a_disk_that_somebody_else_writes_is_refused_with_the_name() {
    let rig = Rig::new();
    let disk = rig.disk("a", MIB);
    let lease = disk.lease("the mount").unwrap();
    let mut client = Client::greet(&rig);
    let choice = afterimage::nbd::option::Choice { name: "a".into(), infos: Vec::new() };
    let answer = client.ask(afterimage::nbd::option::kind::GO, &choice.encode());
    assert_eq!(answer[0].0, afterimage::nbd::option::reply::ERR_POLICY);
    let said = String::from_utf8(answer[0].1.clone()).unwrap();
    assert!(said.contains("the mount") && said.contains("'a'"), "{said}");
    drop(lease);
    client.go("a");
    assert_eq!(rig.store.disk_info("a").unwrap().holder.as_deref(), Some("nbd"));
}
