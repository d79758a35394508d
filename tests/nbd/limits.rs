//! What clients may take of a server together, and for how long: memory, descriptors, the handshake, comparisons.

use std::io::{Read, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use afterimage::budget::{Budget, Pot};
use afterimage::disk::BlockDevice;
use afterimage::error::{Error, Kind, Result};
use afterimage::nbd::option::{self, Choice, Queries, kind, reply};
use afterimage::nbd::wire::{Command, Request};
use afterimage::nbd::{
    self, Asked, Contexts, Dirty, Export, Exported, Exports, Limits, Listen, Options, Server, contexts_of,
};

use super::plain::Client;
use super::{MIB, Pool, Rig, limits};
use crate::real::wait_for;
use crate::tree::noise;

fn with_memory(bytes: usize, stall: Duration) -> (Rig, Arc<Pot>) {
    let budget = Budget { requests: Pot::new(bytes), ..Budget::new(400) };
    let requests = Arc::clone(&budget.requests);
    let rig = Rig::within(Limits { stall, ..Limits::new(16, budget) });
    rig.disk("a", 64 * MIB).write(&vec![3; 32 << 20], 0).unwrap();
    (rig, requests)
}

/// Asks for much and takes nothing, until it has all the memory there is.
fn hog(rig: &Rig, requests: &Pot) -> Client {
    let mut client = Client::enter(rig, "a");
    for n in 0..64 {
        client.request(Command::Read, 0, n, 0, 1 << 20);
    }
    wait_for("the memory is not used", || requests.left() < 1 << 20);
    client
}

#[test]
fn when_others_have_the_memory_small_requests_go_on_and_large_ones_wait_for_it() {
    const ALL: usize = 8 << 20;
    let (rig, requests) = with_memory(ALL, Duration::from_secs(3600));
    let mut hog = hog(&rig, &requests);
    let mut other = Client::enter(&rig, "a");
    for n in 0..100 {
        assert_eq!(other.read(n * 4096, 4096), [3; 4096]);
    }
    let mut waiting = Client::enter(&rig, "a");
    let reading = std::thread::spawn(move || (waiting.read(MIB, 4 << 20), waiting));
    wait_for("nobody waits", || requests.is_wanted());
    let mut writing = Client::enter(&rig, "a");
    let write = Request { flags: 0, kind: 1, cookie: 5, offset: 40 << 20, length: 4 << 20 };
    let writing = std::thread::spawn(move || {
        writing.send(&write.encode());
        writing.send(&vec![9; 4 << 20]);
        assert_eq!(writing.reply(0), (5, 0, Vec::new()));
        writing
    });
    for n in 0..100 {
        assert_eq!(other.read(n * 4096, 4096), [3; 4096]);
        assert_eq!(other.read(n * 4096, 256 << 10), [3; 256 << 10], "no huge page is cut for it");
    }
    assert!(!reading.is_finished());
    for _ in 0..64 {
        let (_, errno, data) = hog.reply(0);
        assert!(errno == 0 && data.len() == 1 << 20);
    }
    let (data, _reader) = reading.join().unwrap();
    assert!(data.iter().all(|byte| *byte == 3));
    let mut writer = writing.join().unwrap();
    assert_eq!(writer.read(40 << 20, 4096), [9; 4096]);
    // Who rests has nothing, and who has gone neither.
    wait_for("a client that rests keeps memory", || requests.left() == ALL);
    drop(self::hog(&rig, &requests));
    wait_for("a client that has gone keeps memory", || requests.left() == ALL);
}

#[test]
fn a_client_that_does_not_move_loses_memory_for_which_others_wait() {
    let (rig, requests) = with_memory(8 << 20, Duration::from_millis(10));
    let mut stuck = hog(&rig, &requests);
    // It is not hurried as long as nobody else wants anything.
    std::thread::sleep(Duration::from_millis(1500));
    assert_eq!(rig.server.as_ref().unwrap().connections(), 1);
    assert_eq!(Client::enter(&rig, "a").read(MIB, 4 << 20).len(), 4 << 20);
    wait_for("it is not disconnected", || requests.left() == 8 << 20);
    while !stuck.is_closed() {}
    // Nor does the beginning of a request keep it for ever.
    let mut half = Client::enter(&rig, "a");
    half.send(&Request { flags: 0, kind: 1, cookie: 5, offset: 0, length: 8 << 20 }.encode());
    half.send(&[1; 4096]);
    wait_for("the memory is not used", || requests.left() < 1 << 20);
    assert_eq!(Client::enter(&rig, "a").read(MIB, 4 << 20).len(), 4 << 20);
    assert!(half.is_closed());
}

#[test]
fn a_client_that_moves_a_little_now_and_then_does_not_keep_memory_for_ever() {
    let (rig, requests) = with_memory(8 << 20, Duration::from_millis(10));
    // Some bytes of a request at a time.
    let mut sender = Client::enter(&rig, "a");
    sender.send(&Request { flags: 0, kind: 1, cookie: 5, offset: 0, length: 8 << 20 }.encode());
    sender.send(&[1; 4096]);
    wait_for("the memory is not used", || requests.left() < 1 << 20);
    let sending = std::thread::spawn(move || {
        (0..300).any(|_| {
            std::thread::sleep(Duration::from_millis(100));
            sender.stream.write_all(&[1]).is_err()
        })
    });
    assert_eq!(Client::enter(&rig, "a").read(MIB, 4 << 20).len(), 4 << 20);
    assert!(sending.join().unwrap(), "it could send what it liked");
    // Some bytes of a reply at a time, and now and then it asks for more.
    let mut taker = hog(&rig, &requests);
    let taking = std::thread::spawn(move || {
        let mut bytes = vec![0; 64 << 10];
        (0..1000).any(|n| {
            std::thread::sleep(Duration::from_millis(20));
            let got = taker.stream.read(&mut bytes).unwrap_or(0);
            taker.stream.write_all(&Request { flags: 0, kind: 3, cookie: n, offset: 0, length: 0 }.encode()).ok();
            got == 0
        })
    });
    assert_eq!(Client::enter(&rig, "a").read(MIB, 4 << 20).len(), 4 << 20);
    assert!(taking.join().unwrap(), "it could take as little as it liked");
}

#[test]
fn a_client_that_goes_while_it_waits_for_memory_is_not_waited_for() {
    let (rig, requests) = with_memory(8 << 20, Duration::from_secs(3600));
    let _hog = hog(&rig, &requests);
    let mut waiting = Client::enter(&rig, "a");
    waiting.request(Command::Read, 0, 1, 0, 4 << 20);
    wait_for("it does not wait", || requests.is_wanted());
    drop(waiting);
    wait_for("it waits although it has gone", || rig.server.as_ref().unwrap().connections() == 1);
    assert!(!requests.is_wanted());
}

#[test]
fn connections_leave_descriptors_for_the_pool() {
    let budget = Budget::new(8);
    let rig = Rig::within(Limits::new(100, budget.clone()));
    rig.disk("a", MIB);
    let second = Rig::within(Limits::new(100, budget));
    second.disk("a", MIB);
    let (mut first, one_more) = (Client::enter(&rig, "a"), Client::enter(&second, "a"));
    for rig in [&rig, &second] {
        assert!(Client { stream: rig.connect(), structured: false }.is_closed(), "a third one, of two servers");
    }
    first.read(0, 512);
    drop(one_more);
    second.wait_until_quiet();
    Client::enter(&rig, "a").read(0, 512);
}

#[test]
fn a_handshake_has_an_end_and_what_comes_after_has_none() {
    let rig = Rig::within(Limits { handshake: Duration::from_millis(300), ..limits(16) });
    rig.disk("a", MIB);
    let mut idle = Client::enter(&rig, "a");
    // One that always says something, one that says a part of something, and one that says nothing.
    let mut talking = Client::greet(&rig);
    let mut slow = Client::greet(&rig);
    let mut silent = Client { stream: rig.connect(), structured: false };
    silent.receive::<{ option::GREETING }>();
    let option = option::option(kind::GO, &[0; 30_000]);
    let begun = Instant::now();
    let mut at = 0;
    let mut open = [true, true];
    while open.contains(&true) {
        assert!(begun.elapsed() < Duration::from_secs(60), "{open:?}");
        open[0] = open[0] && talking.stream.write_all(&option::option(4711, &[])).is_ok();
        open[1] = open[1] && slow.stream.write_all(&option[at..=at]).is_ok();
        at += 1;
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(silent.is_closed());
    // The clients see it before the server has counted it.
    wait_for("three connections are not ended", || rig.server.as_ref().unwrap().connections() == 1);
    idle.read(0, 512);
}

#[test]
fn more_options_than_anybody_needs_end_the_connection() {
    let rig = Rig::new();
    rig.disk("a", MIB);
    let mut client = Client::greet(&rig);
    let mut writer = client.stream.try_clone().unwrap();
    let flood = std::thread::spawn(move || {
        let options: Vec<u8> = (0..10_001).flat_map(|_| option::option(4711, &[])).collect();
        writer.write_all(&options).ok();
    });
    let mut replies = 0;
    while !client.is_closed() {
        // The first byte is gone.
        let rest: [u8; option::OPTION_REPLY - 1] = client.receive();
        let length = u32::from_be_bytes(rest[15..].try_into().unwrap());
        for _ in 0..length {
            client.receive::<1>();
        }
        replies += 1;
    }
    assert_eq!(replies, 10_000);
    flood.join().unwrap();
    Client::enter(&rig, "a").read(0, 512);
}

/// Compares for ever, unless nobody wants it any more; counts how often it has begun.
struct Endless(Arc<AtomicUsize>);

impl Contexts for Endless {
    fn names(&self) -> Vec<String> {
        vec!["s".into()]
    }

    fn dirty(&self, _name: &str, asked: &Asked<'_>) -> Result<Arc<Dirty>> {
        self.0.fetch_add(1, Ordering::SeqCst);
        while !(asked.cancelled)() {
            std::thread::sleep(Duration::from_millis(1));
        }
        Err(Error::failed("it was broken off"))
    }
}

struct Slow(Pool, Arc<AtomicUsize>);

impl Exports for Slow {
    fn names(&self) -> Vec<String> {
        self.0.names()
    }

    fn open(&self, name: &str) -> Result<Export> {
        Ok(Export { contexts: Arc::new(Endless(Arc::clone(&self.1))), ..self.0.open(name)? })
    }
}

fn chosen(name: &str, queries: &[&str]) -> Vec<u8> {
    Queries { name: name.into(), queries: queries.iter().map(|query| (*query).to_owned()).collect() }.encode()
}

#[test]
fn a_comparison_that_nobody_wants_any_more_is_broken_off() {
    let mut rig = Rig::new();
    rig.disk("a", MIB);
    rig.stop();
    let begun = Arc::new(AtomicUsize::new(0));
    let start = |rig: &Rig| -> Server {
        let options = Options { listen: Listen::Unix(rig.socket()), tls: None, limits: limits(4) };
        nbd::start(options, Arc::new(Slow(Pool(Arc::clone(&rig.store)), Arc::clone(&begun)))).unwrap()
    };
    let ask = |rig: &Rig| {
        let mut client = Client::greet(rig);
        client.ask(kind::STRUCTURED_REPLY, &[]);
        client.send(&option::option(kind::SET_META_CONTEXT, &chosen("a", &["qemu:dirty-bitmap:s"])));
        client
    };
    rig.server = Some(start(&rig));
    let client = ask(&rig);
    wait_for("it does not begin", || begun.load(Ordering::SeqCst) == 1);
    drop(client);
    rig.wait_until_quiet();
    // And when the server ends, which waits for it.
    let _client = ask(&rig);
    wait_for("it does not begin", || begun.load(Ordering::SeqCst) == 2);
    rig.stop();
    assert_eq!(rig.store.disk_info("a").unwrap().holder, None);
}

#[test]
fn with_less_memory_a_comparison_tells_of_more_and_with_none_it_is_refused() {
    let budget = Budget { answers: Pot::new(128 << 10), ..Budget::new(400) };
    let answers = Arc::clone(&budget.answers);
    let rig = Rig::within(Limits::new(16, budget));
    let disk = rig.disk("a", 1024 * MIB);
    rig.take("a", "s");
    for n in 0..400 {
        disk.write(&noise(4096, n), n * 3 * 4096).unwrap();
    }
    let contexts = contexts_of(&rig.store, Exported::Disk(disk.id()));
    let exact = contexts.dirty("s", &Asked::patiently()).unwrap();
    let few = contexts.dirty("s", &Asked { bytes: 800, ..Asked::patiently() }).unwrap();
    let runs = |dirty: &Dirty| {
        let (mut at, mut runs) = (0, 0);
        while at < 1024 * MIB {
            let (is, upto) = dirty.at(at);
            runs += u32::from(is);
            at = upto;
        }
        runs
    };
    assert_eq!(runs(&exact), 400);
    assert!(runs(&few) <= 100);
    assert!((0..400).all(|n| few.at(n * 3 * 4096).0), "more, never less");
    let cancelled = contexts.dirty("s", &Asked { cancelled: &|| true, ..Asked::patiently() }).unwrap_err();
    assert_eq!(cancelled.kind(), Kind::Failed);
    // What is kept is counted, as long as the client is there.
    let mut client = Client::greet(&rig);
    client.ask(kind::STRUCTURED_REPLY, &[]);
    let query = chosen("a", &["qemu:dirty-bitmap:s"]);
    assert_eq!(client.ask(kind::SET_META_CONTEXT, &query).last().unwrap().0, reply::ACK);
    assert_eq!(answers.left(), (128 << 10) - 400 * 8);
    let hogged = answers.take(answers.left() - 1000).unwrap();
    let refused = client.ask(kind::SET_META_CONTEXT, &query);
    let refused = refused.last().unwrap();
    assert!(refused.0 & reply::ERROR != 0 && String::from_utf8_lossy(&refused.1).contains("no memory"), "{refused:?}");
    drop(hogged);
    assert_eq!(client.ask(kind::SET_META_CONTEXT, &query).last().unwrap().0, reply::ACK);
    drop(client);
    rig.wait_until_quiet();
    assert_eq!(answers.left(), 128 << 10);
}

#[test]
fn lengths_and_offsets_at_the_ends_of_what_numbers_can_say_are_answered() {
    let rig = Rig::new();
    let disk = rig.disk("a", MIB);
    disk.write(&noise(MIB as usize, 1), 0).unwrap();
    let mut client = Client::enter(&rig, "a");
    let (top, all) = (u64::MAX, u32::MAX);
    for (command, offset, length, errno) in [
        (Command::Read, 0, all, 22),
        (Command::Read, top, all, 22),
        (Command::Read, top, 0, 22),
        (Command::Read, MIB, 0, 0),
        (Command::Read, top - 4095, 4096, 22),
        (Command::Trim, 0, all, 22),
        (Command::Trim, top - 4095, 4096, 22),
        (Command::Trim, top, 0, 22),
        (Command::Trim, MIB, 0, 0),
        (Command::WriteZeroes, 0, all, 28),
        (Command::WriteZeroes, top - 1, all, 28),
        (Command::WriteZeroes, 5, 0, 0),
        (Command::Cache, 0, all, 22),
        (Command::Cache, top, 1, 22),
        (Command::Flush, top, all, 0),
        (Command::BlockStatus, 0, all, 22),
        (Command::BlockStatus, top, 0, 22),
        (Command::Write, 0, 0, 0),
        (Command::Write, MIB, 0, 0),
        (Command::Write, top, 0, 28),
    ] {
        client.request(command, 0, 6, offset, length);
        let (cookie, answer, data) = client.reply(0);
        assert_eq!((cookie, answer, data.len()), (6, errno, 0), "{command:?} {length} at {offset}");
    }
    for offset in [top - 511, top - 4095, MIB - 256] {
        client.request(Command::Write, 0, 8, offset, 512);
        client.send(&[1; 512]);
        assert_eq!(client.reply(0), (8, 28, Vec::new()), "a write at {offset}");
    }
    // Cookies are the client's own affair.
    for _ in 0..50 {
        client.request(Command::Read, 0, 1, 0, 4096);
    }
    for _ in 0..50 {
        let (cookie, errno, data) = client.reply(0);
        assert!((cookie, errno) == (1, 0) && data == noise(MIB as usize, 1)[..4096]);
    }
    // A name that is as long as an option may be, and cannot be refused.
    let mut client = Client::greet(&rig);
    client.send(&option::option(kind::EXPORT_NAME, &[b'a'; 64 << 10]));
    assert!(client.is_closed());
    let mut client = Client::greet(&rig);
    let long = Choice { name: "a".repeat(4097), infos: Vec::new() };
    assert_eq!(client.ask(kind::INFO, &long.encode()).last().unwrap().0, reply::ERR_INVALID);
    client.go("a");
    assert_eq!(super::content(&*disk), noise(MIB as usize, 1));
}
