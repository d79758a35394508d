//! A plain client, for what real ones do not do, and what the handshake answers to it.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use afterimage::disk::BlockDevice;
use afterimage::nbd::option::{self, Choice, GREETING, OPTION_REPLY, OptionReply, Queries, kind, reply};
use afterimage::nbd::wire::{CHUNK, Command, Reply, Request, SIMPLE, chunk};

use super::{MIB, Rig};

/// A connection whose messages are taken apart.
pub(super) struct Client {
    pub(super) stream: UnixStream,
    pub(super) structured: bool,
}

impl Client {
    /// Connects and exchanges flags.
    pub(super) fn greet(rig: &Rig) -> Self {
        let mut client = Self { stream: rig.connect(), structured: false };
        client.stream.set_read_timeout(Some(std::time::Duration::from_secs(60))).unwrap();
        let greeting: [u8; GREETING] = client.receive();
        assert_eq!(option::flags_of(&greeting), Some(3));
        client.send(&3u32.to_be_bytes());
        client
    }

    /// Connects and chooses an export, with structured replies.
    pub(super) fn enter(rig: &Rig, export: &str) -> Self {
        let mut client = Self::greet(rig);
        assert_eq!(client.ask(kind::STRUCTURED_REPLY, &[]).last().unwrap().0, reply::ACK);
        client.structured = true;
        client.go(export);
        client
    }

    pub(super) fn go(&mut self, export: &str) {
        let choice = Choice { name: export.into(), infos: Vec::new() };
        assert_eq!(self.ask(kind::GO, &choice.encode()).last().unwrap().0, reply::ACK);
    }

    pub(super) fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
    }

    pub(super) fn receive<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        self.stream.read_exact(&mut bytes).unwrap();
        bytes
    }

    fn take(&mut self, len: u32) -> Vec<u8> {
        let mut bytes = vec![0; len as usize];
        self.stream.read_exact(&mut bytes).unwrap();
        bytes
    }

    /// Sends an option and returns the kinds and data of its replies.
    pub(super) fn ask(&mut self, kind: u32, data: &[u8]) -> Vec<(u32, Vec<u8>)> {
        self.send(&option::option(kind, data));
        let mut replies = Vec::new();
        loop {
            let header: [u8; OPTION_REPLY] = self.receive();
            let header = OptionReply::decode(&header).unwrap();
            assert_eq!(header.option, kind);
            replies.push((header.kind, self.take(header.length)));
            if header.kind == reply::ACK || header.kind & reply::ERROR != 0 {
                return replies;
            }
        }
    }

    /// Sends a request without payload.
    pub(super) fn request(&mut self, command: Command, flags: u16, cookie: u64, offset: u64, length: u32) {
        self.send(&Request { flags, kind: command as u16, cookie, offset, length }.encode());
    }

    /// Takes the next reply, all its chunks: cookie, error number, and bytes of the data that came.
    pub(super) fn reply(&mut self, simple_data: u32) -> (u64, u32, Vec<u8>) {
        let mut data = Vec::new();
        let mut errno = 0;
        loop {
            let mut bytes = self.receive::<SIMPLE>().to_vec();
            match Reply::decode(&bytes) {
                Some(Reply::Simple { error, cookie }) => {
                    if error == 0 {
                        data = self.take(simple_data);
                    }
                    return (cookie, error, data);
                }
                _ => bytes.extend(self.receive::<{ CHUNK - SIMPLE }>()),
            }
            let Some(Reply::Chunk { flags, kind, cookie, length }) = Reply::decode(&bytes) else {
                panic!("no reply: {bytes:?}");
            };
            let body = self.take(length);
            match kind {
                chunk::NONE => assert_eq!(length, 0),
                chunk::OFFSET_DATA => data.extend(&body[8..]),
                chunk::OFFSET_HOLE => {
                    let len = u32::from_be_bytes(body[8..].try_into().unwrap());
                    data.resize(data.len() + len as usize, 0);
                }
                chunk::BLOCK_STATUS => data.extend(&body),
                _ => errno = u32::from_be_bytes(body[..4].try_into().unwrap()),
            }
            if flags & chunk::DONE != 0 {
                return (cookie, errno, data);
            }
        }
    }

    /// Tells whether the server has closed the connection, having sent nothing else.
    pub(super) fn is_closed(&mut self) -> bool {
        matches!(self.stream.read(&mut [0; 1]), Ok(0) | Err(_))
    }

    /// Reads a block, which must work.
    pub(super) fn read(&mut self, offset: u64, length: u32) -> Vec<u8> {
        self.request(Command::Read, 0, 77, offset, length);
        let (cookie, errno, data) = self.reply(length);
        assert_eq!((cookie, errno, data.len()), (77, 0, length as usize));
        data
    }
}

#[test]
fn options_are_answered_or_refused_and_the_handshake_goes_on() {
    let rig = Rig::new();
    rig.disk("a", MIB);
    rig.take("a", "s");
    let mut client = Client::greet(&rig);
    let error = |answer: Vec<(u32, Vec<u8>)>| answer.last().unwrap().0;
    assert_eq!(error(client.ask(4711, b"what")), reply::ERR_UNSUP);
    assert_eq!(error(client.ask(kind::STARTTLS, &[])), reply::ERR_POLICY);
    assert_eq!(error(client.ask(kind::LIST, b"x")), reply::ERR_INVALID);
    assert_eq!(error(client.ask(kind::STRUCTURED_REPLY, b"x")), reply::ERR_INVALID);
    assert_eq!(error(client.ask(kind::INFO, b"x")), reply::ERR_INVALID);
    assert_eq!(error(client.ask(kind::GO, &[0; 70_000])), reply::ERR_TOO_BIG);
    let choice = |name: &str| Choice { name: name.into(), infos: Vec::new() }.encode();
    assert_eq!(error(client.ask(kind::GO, &choice("nobody"))), reply::ERR_UNKNOWN);
    let queries = |query: &[&str]| {
        Queries { name: "a".into(), queries: query.iter().map(|query| (*query).to_owned()).collect() }.encode()
    };
    assert_eq!(error(client.ask(kind::SET_META_CONTEXT, &queries(&["base:allocation"]))), reply::ERR_INVALID);
    assert_eq!(error(client.ask(kind::STRUCTURED_REPLY, &[])), reply::ACK);
    let mut contexts = |option, query: &[&str]| {
        let replies = client.ask(option, &queries(query));
        assert_eq!(replies.last().unwrap().0, reply::ACK);
        let names = replies[..replies.len() - 1].iter().map(|(_, data)| String::from_utf8(data[4..].to_vec()).unwrap());
        names.collect::<Vec<_>>()
    };
    let all = ["base:allocation", "qemu:dirty-bitmap:s"];
    assert_eq!(contexts(kind::LIST_META_CONTEXT, &[]), all);
    assert_eq!(contexts(kind::LIST_META_CONTEXT, &["qemu:", "base:"]), all);
    assert_eq!(contexts(kind::LIST_META_CONTEXT, &["base:"]), all[..1]);
    assert_eq!(contexts(kind::LIST_META_CONTEXT, &["qemu:dirty-bitmap:"]), all[1..]);
    assert_eq!(contexts(kind::LIST_META_CONTEXT, &["qemu:dirty-bitmap:s"]), all[1..]);
    assert_eq!(contexts(kind::LIST_META_CONTEXT, &["else:", "q"]), [""; 0]);
    assert_eq!(contexts(kind::SET_META_CONTEXT, &["base:", "qemu:dirty-bitmap:x", "else:y"]), [""; 0]);
    let both = ["qemu:dirty-bitmap:s", "base:allocation", "qemu:dirty-bitmap:s"];
    assert_eq!(contexts(kind::SET_META_CONTEXT, &both), both[..2]);
    client.structured = true;
    client.go("a");
    // Both contexts, by the numbers they were given.
    client.request(Command::BlockStatus, 0, 5, 0, 1 << 20);
    let (_, errno, data) = client.reply(0);
    let numbers: Vec<_> = data.chunks(4).map(|bytes| u32::from_be_bytes(bytes.try_into().unwrap())).collect();
    assert_eq!((errno, numbers), (0, vec![1, 1 << 20, 0, 2, 1 << 20, 3]));
    client.request(Command::Disconnect, 0, 0, 0, 0);
    assert!(client.is_closed());
}

#[test]
fn contexts_of_another_export_are_not_used() {
    let rig = Rig::new();
    rig.disk("a", MIB);
    rig.disk("b", MIB);
    let mut client = Client::greet(&rig);
    client.ask(kind::STRUCTURED_REPLY, &[]);
    let queries = Queries { name: "a".into(), queries: vec!["base:allocation".into()] };
    assert_eq!(client.ask(kind::SET_META_CONTEXT, &queries.encode()).len(), 2);
    client.go("b");
    client.request(Command::BlockStatus, 0, 5, 0, 4096);
    assert_eq!(client.reply(0), (5, 22, Vec::new()));
}

#[test]
fn the_oldest_way_to_choose_an_export_works() {
    let rig = Rig::new();
    rig.disk("a", MIB).write(&[9; 512], 0).unwrap();
    for zeroes in [true, false] {
        let mut client = Client { stream: rig.connect(), structured: false };
        client.receive::<GREETING>();
        client.send(&u32::from(if zeroes { 1u8 } else { 3 }).to_be_bytes());
        client.send(&option::option(kind::EXPORT_NAME, b"a"));
        let told: [u8; 10] = client.receive();
        assert_eq!(told[..8], MIB.to_be_bytes());
        if zeroes {
            assert_eq!(client.receive::<124>(), [0; 124]);
        }
        assert_eq!(client.read(0, 512), [9; 512]);
    }
    let mut client = Client::greet(&rig);
    client.send(&option::option(kind::EXPORT_NAME, b"nobody"));
    assert!(client.is_closed());
}

#[test]
fn many_requests_in_one_piece_are_all_answered() {
    let rig = Rig::new();
    let disk = rig.disk("a", 16 * MIB);
    let mut client = Client::enter(&rig, "a");
    let mut bytes = Vec::new();
    for n in 0..600u64 {
        let request = Request { flags: 0, kind: 1, cookie: n, offset: n * 4096, length: 4096 };
        bytes.extend(request.encode());
        bytes.extend(vec![n as u8; 4096]);
    }
    let mut writer = client.stream.try_clone().unwrap();
    let sending = std::thread::spawn(move || writer.write_all(&bytes).unwrap());
    let mut seen: Vec<u64> =
        (0..600).map(|_| client.reply(0)).map(|(cookie, errno, _)| cookie + u64::from(errno)).collect();
    sending.join().unwrap();
    seen.sort_unstable();
    assert_eq!(seen, (0..600).collect::<Vec<_>>());
    // Many large reads: more than the server takes at a time.
    for n in 0..300u64 {
        client.request(Command::Read, 0, n, 0, 2 << 20);
    }
    for _ in 0..300 {
        let (_, errno, data) = client.reply(0);
        assert!(errno == 0 && data.len() == 2 << 20);
        assert!((0..512u64).all(|n| data[n as usize * 4096] == n as u8));
    }
    let mut block = [0; 4096];
    disk.read(&mut block, 599 * 4096).unwrap();
    assert_eq!(block, [599u64 as u8; 4096]);
}
