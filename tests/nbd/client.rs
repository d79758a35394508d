//! Our own client: with our server, without it, and with servers that make no sense.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use afterimage::disk::engine::{self, Op};
use afterimage::disk::{self, BlockDevice, Buffers, Engine};
use afterimage::error::{Error, Kind, Result};
use afterimage::nbd::Client;
use afterimage::nbd::client::{Place, Sought};
use afterimage::nbd::option::{self, kind, reply};
use afterimage::nbd::wire::{Reply, Request, chunk, transmission};
use afterimage::store::Cancel;

use super::{MIB, Rig};
use crate::real::wait_for;

/// Opens the disk `web` at a socket.
fn open(socket: &Path, connections: usize) -> Client {
    let place = Place::at(socket, "web");
    Client::open("disk 'web'", connections, Box::new(move |_| Sought::At(place.clone()))).unwrap()
}

/// Lets a request wait as those who serve guests do; returns what it is told then.
fn wait(client: &Client, error: &Error, cancel: &Arc<Cancel>) -> Option<Result<()>> {
    let need = client.waits_for(error)?;
    let (go, went) = std::sync::mpsc::channel();
    client.wait(need, cancel, Box::new(move |turn| go.send(turn).unwrap()));
    Some(went.recv().unwrap())
}

/// Asks again until there is an answer.
fn patiently(client: &Client, mut ask: impl FnMut() -> Result<()>) -> Result<()> {
    loop {
        let Err(error) = ask() else { return Ok(()) };
        wait(client, &error, &Arc::default()).ok_or(error)??;
    }
}

#[test]
fn what_many_threads_write_over_several_connections_comes_back() {
    let rig = Rig::new();
    rig.disk("web", 64 * MIB);
    let client = Arc::new(open(&rig.socket(), 4));
    assert_eq!((client.size(), client.read_only(), client.is_connected()), (64 * MIB, false, true));
    std::thread::scope(|scope| {
        for thread in 0..8_u64 {
            let client = &client;
            scope.spawn(move || {
                // Of any alignment, and larger than a piece.
                for (at, len) in [(0, 512), (4096, 8192), (100_001, 3 * MIB as usize + 7)] {
                    let at = thread * 8 * MIB + at;
                    let data: Vec<u8> = (0..len).map(|n| (n as u64 * 31 + thread) as u8).collect();
                    client.write(&data, at).unwrap();
                    let mut back = vec![0; len];
                    client.read(&mut back, at).unwrap();
                    assert!(back == data, "thread {thread} at {at}");
                }
            });
        }
    });
    client.write_durable(&[9; 4096], 8192).unwrap();
    client.flush().unwrap();
    client.write_zeroes(4096, 4096).unwrap();
    client.discard(8 * MIB, 8 * MIB).unwrap();
    let mut back = vec![1; 8192];
    client.read(&mut back, 4096).unwrap();
    assert_eq!((&back[..4096], &back[4096..]), (&[0; 4096][..], &[9; 4096][..]));
    client.read(&mut back, 8 * MIB).unwrap();
    assert_eq!(back, [0; 8192]);
    assert_eq!(client.write(&[1], 64 * MIB).unwrap_err().kind(), Kind::Usage);
}

#[test]
fn requests_wait_for_a_server_that_is_gone_and_are_done_when_it_is_back() {
    let mut rig = Rig::new();
    rig.disk("web", 16 * MIB);
    let client = Arc::new(open(&rig.socket(), 2));
    client.write(&[1; 4096], 0).unwrap();
    for round in 0..5_u8 {
        rig.stop();
        let writer = std::thread::spawn({
            let client = Arc::clone(&client);
            move || {
                patiently(&client, || client.write(&[round; 65536], MIB)).unwrap();
                patiently(&client, || client.flush()).unwrap();
                let mut back = vec![0; 65536];
                patiently(&client, || client.read(&mut back, MIB)).unwrap();
                back
            }
        });
        std::thread::sleep(Duration::from_millis(30));
        assert!(!writer.is_finished() && !client.is_connected());
        rig.start(16);
        assert_eq!(writer.join().unwrap(), [round; 65536]);
    }
}

#[test]
fn a_client_that_is_cancelled_waits_no_longer() {
    let mut rig = Rig::new();
    rig.disk("web", MIB);
    let client = Arc::new(open(&rig.socket(), 1));
    rig.stop();
    let waiting = std::thread::spawn({
        let client = Arc::clone(&client);
        move || patiently(&client, || client.flush())
    });
    std::thread::sleep(Duration::from_millis(20));
    assert!(!waiting.is_finished());
    client.cancel();
    assert_eq!(waiting.join().unwrap().unwrap_err().kind(), Kind::Failed);
    assert!(client.read(&mut [0; 512], 0).is_err());
}

/// Whoever stops a guest waits for what its disks are doing, which may be to wait for room.
#[test]
fn what_is_called_back_comes_back_although_the_server_is_gone_or_lets_it_wait() {
    let mut rig = Rig::new();
    rig.disk("web", 16 * MIB);
    for (key, value) in [("quota", "4K"), ("enospc", "wait")] {
        disk::set(&rig.store, "web", key, value).unwrap();
    }
    let client = Arc::new(open(&rig.socket(), 2));
    client.write(&[1; 4096], 0).unwrap();
    let cancel: Arc<Cancel> = Arc::default();
    client.heed(&cancel);
    let writing = std::thread::spawn({
        let client = Arc::clone(&client);
        move || client.write(&[2; 65536], MIB).unwrap_err()
    });
    std::thread::sleep(Duration::from_millis(100));
    assert!(!writing.is_finished(), "there is no room");
    cancel.cancel();
    let error = writing.join().unwrap();
    assert_eq!(wait(&client, &error, &cancel).unwrap().unwrap_err().kind(), Kind::Cancelled);
    disk::set(&rig.store, "web", "quota", "none").unwrap();
    patiently(&client, || client.write(&[2; 65536], MIB)).unwrap();
    // And where it waits for the server.
    rig.stop();
    wait_for("it has gone", || !client.is_connected());
    let cancel: Arc<Cancel> = Arc::default();
    let waiting = std::thread::spawn({
        let (client, cancel) = (Arc::clone(&client), Arc::clone(&cancel));
        move || wait(&client, &client.flush().unwrap_err(), &cancel).unwrap().unwrap_err().kind()
    });
    std::thread::sleep(Duration::from_millis(50));
    assert!(!waiting.is_finished());
    cancel.cancel();
    assert_eq!(waiting.join().unwrap(), Kind::Cancelled);
    rig.start(16);
    patiently(&client, || client.flush()).unwrap();
}

/// What waited for room kept all threads, and a guest that had no room for its writes could not read either.
#[test]
fn what_comes_after_requests_that_wait_for_room_goes_on() {
    const WAITING: u64 = 100;
    let rig = Rig::new();
    rig.disk("web", 16 * MIB);
    for (key, value) in [("quota", "4K"), ("enospc", "wait")] {
        disk::set(&rig.store, "web", key, value).unwrap();
    }
    let client = Arc::new(open(&rig.socket(), 2));
    client.write(&[1; 4096], 0).unwrap();
    let mut engine = Engine::new("test", client.threads(), Arc::default()).unwrap();
    let mut buffers = Buffers::default();
    let mut begin = |engine: &mut Engine<u64>, op, tag: u64| {
        let device: Arc<dyn BlockDevice> = Arc::<Client>::clone(&client);
        let (pages, offset, len) = (Some(buffers.take(4096).unwrap()), tag * 65536, 4096);
        engine.begin(engine::Request { op, device, offset, len, pages, at: 0, tag });
        engine.submit().unwrap();
    };
    for tag in 1..=WAITING {
        begin(&mut engine, Op::Write { durable: false }, tag);
    }
    for _ in 0..3 {
        begin(&mut engine, Op::Read, 0);
        let done = loop {
            match engine.finished() {
                Some(done) => break done,
                None => engine.wait(None).unwrap(),
            }
        };
        assert!(done.result.is_ok() && done.request.tag == 0 && done.request.pages.unwrap()[..4096] == [1; 4096]);
    }
    disk::set(&rig.store, "web", "quota", "none").unwrap();
    let mut left = WAITING;
    while left > 0 {
        match engine.finished() {
            Some(done) => {
                done.result.unwrap();
                left -= 1;
            }
            None => engine.wait(None).unwrap(),
        }
    }
}

#[test]
fn a_server_that_parts_is_come_back_to_and_tells_a_new_size() {
    let mut rig = Rig::new();
    let disk = rig.disk("web", MIB);
    let client = Arc::new(open(&rig.socket(), 3));
    let end = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let mut rounds = 0_u64;
            while !end.load(Ordering::SeqCst) {
                rounds += 1;
                let byte = rounds as u8;
                patiently(&client, || client.write(&[byte; 8192], 4096)).unwrap();
                let mut back = vec![0; 8192];
                patiently(&client, || client.read(&mut back, 4096)).unwrap();
                assert!(back.iter().all(|is| *is == byte), "round {rounds}");
            }
        });
        for size in 2..10 {
            disk.resize(size * MIB, false).unwrap();
            rig.part();
            wait_for("it knows the new size", || client.size() == size * MIB);
        }
        end.store(true, Ordering::SeqCst);
        writer.join().unwrap();
    });
    patiently(&client, || client.write(&[3; 4096], 9 * MIB - 4096)).unwrap();
    rig.stop();
}

#[test]
fn a_disk_that_was_not_kept_fails_and_what_the_server_has_against_it_is_told() {
    let mut rig = Rig::new();
    rig.disk("web", MIB);
    let place = Place::at(&rig.socket(), "web");
    let seek = move |again| {
        if again { Sought::Never(Error::new(Kind::Denied, "not kept")) } else { Sought::At(place.clone()) }
    };
    let client = Client::open("disk 'web'", 1, Box::new(seek)).unwrap();
    assert_eq!(client.flush().map_err(|e| e.kind()), Ok(()));
    rig.stop();
    assert_eq!(patiently(&client, || client.flush()).unwrap_err().message(), "not kept");
    rig.start(16);
    let place = Place::at(&rig.socket(), "other");
    let error = Client::open("disk 'other'", 1, Box::new(move |_| Sought::At(place.clone()))).unwrap_err();
    assert_eq!(error.kind(), Kind::NotFound, "{error}");
}

/// A server that answers the handshake, and each read with `answer`; the number of sessions it had.
fn hostile(socket: &Path, answer: impl Fn(&Request) -> Vec<u8> + Send + 'static) -> Arc<AtomicUsize> {
    let listener = UnixListener::bind(socket).unwrap();
    let sessions = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&sessions);
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            count.fetch_add(1, Ordering::SeqCst);
            // The client may hang up at any time.
            speak(stream.unwrap(), &answer).ok();
        }
    });
    sessions
}

fn speak(mut stream: UnixStream, answer: &dyn Fn(&Request) -> Vec<u8>) -> std::io::Result<()> {
    stream.write_all(&option::greeting(option::FIXED_NEWSTYLE | option::NO_ZEROES))?;
    stream.read_exact(&mut [0; 4])?;
    for wanted in [kind::STRUCTURED_REPLY, kind::GO] {
        let mut header = [0; option::OPTION];
        stream.read_exact(&mut header)?;
        let (kind, len) = option::option_header(&header).unwrap();
        assert_eq!(kind, wanted);
        stream.read_exact(&mut vec![0; len as usize])?;
        if kind == kind::GO {
            let flags = transmission::HAS_FLAGS | transmission::SEND_FLUSH;
            stream.write_all(&option::option_reply(kind, reply::INFO, &option::export_info(MIB, flags)))?;
        }
        stream.write_all(&option::option_reply(kind, reply::ACK, &[]))?;
    }
    loop {
        let mut request = [0; 28];
        stream.read_exact(&mut request)?;
        stream.write_all(&answer(&Request::decode(&request).unwrap()))?;
    }
}

/// Makes a chunk.
fn piece(request: &Request, flags: u16, kind: u16, length: u32, body: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    Reply::Chunk { flags, kind, cookie: request.cookie, length }.encode(&mut bytes);
    [bytes, body.to_vec()].concat()
}

fn data(request: &Request, flags: u16, offset: u64, len: usize) -> Vec<u8> {
    let body = [&offset.to_be_bytes()[..], &vec![7; len]].concat();
    piece(request, flags, chunk::OFFSET_DATA, 8 + len as u32, &body)
}

#[test]
fn a_server_that_makes_no_sense_is_given_up_and_nothing_it_says_is_taken() {
    type Bad = fn(&Request) -> Vec<u8>;
    let bad: [(&str, Bad); 12] = [
        ("garbage", |_| vec![0xa5; 64]),
        ("another request", |r| data(&Request { cookie: r.cookie + 1, ..*r }, chunk::DONE, r.offset, 512)),
        ("a part", |r| data(r, chunk::DONE, r.offset, 511)),
        ("too much", |r| data(r, chunk::DONE, r.offset, 513)),
        ("beside it", |r| data(r, chunk::DONE, r.offset - 1, 512)),
        ("far away", |r| data(r, chunk::DONE, u64::MAX, 512)),
        ("twice", |r| [data(r, 0, r.offset, 256), data(r, chunk::DONE, r.offset + 128, 256)].concat()),
        ("a hole that overlaps", |r| {
            let body = [&r.offset.to_be_bytes()[..], &u32::MAX.to_be_bytes()].concat();
            piece(r, chunk::DONE, chunk::OFFSET_HOLE, 12, &body)
        }),
        ("a long chunk", |r| piece(r, 0, chunk::OFFSET_DATA, u32::MAX, &r.offset.to_be_bytes())),
        ("a long error", |r| piece(r, chunk::DONE, chunk::ERROR, 1 << 20, &[0; 64])),
        ("a kind that is none", |r| piece(r, chunk::DONE, 77, 0, &[])),
        ("a simple reply", |r| {
            let mut bytes = Vec::new();
            Reply::Simple { error: 0, cookie: r.cookie }.encode(&mut bytes);
            bytes
        }),
    ];
    let dir = tempfile::tempdir().unwrap();
    for (number, (what, answer)) in bad.into_iter().enumerate() {
        let socket = dir.path().join(number.to_string());
        let sessions = hostile(&socket, answer);
        let client = open(&socket, 3);
        let mut back = [1; 512];
        let error = patiently(&client, || client.read(&mut back, 4096)).unwrap_err();
        assert_eq!((error.kind(), back), (Kind::Corrupt, [1; 512]), "{what}: {error}");
        assert!(sessions.load(Ordering::SeqCst) <= 6, "{what}");
    }
}

/// It was asked for ever, and whoever waited for the disk did, too.
#[test]
fn a_server_whose_handshake_makes_no_sense_is_given_up_unless_it_recovers() {
    let dir = tempfile::tempdir().unwrap();
    for (bad, recovers) in [(3, true), (1000, false)] {
        let socket = dir.path().join(bad.to_string());
        let listener = UnixListener::bind(&socket).unwrap();
        let sessions = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&sessions);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let number = count.fetch_add(1, Ordering::SeqCst);
                let mut stream = stream.unwrap();
                match number {
                    // It parts at the first request.
                    0 => {
                        let parting = stream.try_clone().unwrap();
                        speak(stream, &|_| parting.shutdown(std::net::Shutdown::Both).map_or(vec![1], |()| vec![]))
                    }
                    number if number <= bad => stream.write_all(&[0xa5; 64]),
                    _ => speak(stream, &|r| data(r, chunk::DONE, r.offset, 512)),
                }
                .ok();
            }
        });
        let client = open(&socket, 1);
        let mut back = [1; 512];
        let read = patiently(&client, || client.read(&mut back, 4096));
        if recovers {
            assert_eq!((read.map_err(|e| e.to_string()), back), (Ok(()), [7; 512]));
            continue;
        }
        let error = read.unwrap_err();
        assert_eq!((error.kind(), sessions.load(Ordering::SeqCst)), (Kind::Corrupt, 6), "{error}");
        assert!(error.to_string().contains("makes no sense"), "{error}");
        assert_eq!(client.flush().unwrap_err().kind(), Kind::Corrupt, "for good");
    }
}

#[test]
fn pieces_in_any_order_and_errors_are_understood() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("s");
    hostile(&socket, |request| match request.offset {
        0 => {
            let hole = [&256_u64.to_be_bytes()[..], &256_u32.to_be_bytes()].concat();
            [piece(request, 0, chunk::OFFSET_HOLE, 12, &hole), data(request, chunk::DONE, 0, 256)].concat()
        }
        // Data, and then it fails after all.
        _ => {
            [data(request, 0, request.offset, 512), piece(request, chunk::DONE, chunk::ERROR, 6, &[0, 0, 0, 28, 0, 0])]
                .concat()
        }
    });
    let client = open(&socket, 1);
    let mut back = [1; 512];
    client.read(&mut back, 0).unwrap();
    assert_eq!((&back[..256], &back[256..]), (&[7; 256][..], &[0; 256][..]));
    assert_eq!(client.read(&mut back, 4096).unwrap_err().kind(), Kind::NoSpace);
    assert!(client.is_connected());
}
