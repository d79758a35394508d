//! Clients that mean harm, or are broken: the server answers what it can, closes what it must, and serves the next one.

use std::io::{Read, Write};

use afterimage::disk::BlockDevice;
use afterimage::nbd::option::{self, GREETING, kind};
use afterimage::nbd::wire::{Command, Request};

use super::plain::Client;
use super::{MIB, Rig, content};
use crate::tree::noise;

fn byte(seed: u64) -> u8 {
    noise(1, seed)[0]
}

/// A pool with a disk of known content, and what must be true of the server at any time.
struct Target {
    rig: Rig,
    content: Vec<u8>,
}

impl Target {
    fn new() -> Self {
        // Clients are gone long before the server has done with them.
        let rig = Rig::with(400);
        let disk = rig.disk("a", MIB);
        disk.write(&noise(MIB as usize, 1), 0).unwrap();
        rig.take("a", "s");
        Self { content: content(&*disk), rig }
    }

    fn must_serve(&self) {
        let mut client = Client::enter(&self.rig, "a@s");
        assert!(client.read(0, 8192) == self.content[..8192]);
        client.request(Command::Disconnect, 0, 0, 0, 0);
    }
}

#[test]
fn bytes_of_any_kind_end_a_connection_and_nothing_else() {
    let target = Target::new();
    for seed in 0..300 {
        let mut stream = target.rig.connect();
        let mut bytes = noise(usize::from(byte(seed)) * 8 + 1, seed);
        if seed % 3 == 0 {
            // Past the flags, into the options.
            bytes.splice(..0, 3u32.to_be_bytes());
        }
        if seed % 3 == 1 {
            // Options of any kind, with any data: it is cut off, or all of it is there.
            let data = noise(usize::from(byte(seed + 7) % 64), seed);
            let option = option::option(u32::from(byte(seed + 9) % 14), &data);
            let cut = usize::from(byte(seed + 11)) % option.len();
            let rest = if seed % 2 == 0 { &option[..cut] } else { &option[..] };
            bytes = [&3u32.to_be_bytes()[..], rest].concat();
        }
        // It may be closed before it has taken everything.
        stream.write_all(&bytes).ok();
        stream.shutdown(std::net::Shutdown::Write).ok();
        stream.read_to_end(&mut Vec::new()).ok();
    }
    target.must_serve();
    target.rig.wait_until_quiet();
}

#[test]
fn a_message_that_is_no_message_ends_the_connection() {
    let target = Target::new();
    let mut client = Client { stream: target.rig.connect(), structured: false };
    client.receive::<GREETING>();
    client.send(&0x8000_0003u32.to_be_bytes());
    assert!(client.is_closed(), "flags that nobody offered");
    let mut client = Client::greet(&target.rig);
    client.send(b"IHAVENOT\0\0\0\x07\0\0\0\0");
    assert!(client.is_closed(), "no option");
    for kind in [kind::EXPORT_NAME, kind::GO, kind::SET_META_CONTEXT, 99] {
        let mut client = Client::greet(&target.rig);
        let mut header = option::option(kind, &[]);
        header[12..].copy_from_slice(&u32::MAX.to_be_bytes());
        client.send(&header);
        assert!(client.is_closed(), "4 GiB of data for option {kind}");
    }
    let mut client = Client::enter(&target.rig, "a");
    client.send(&[0x25; 28]);
    assert!(client.is_closed(), "no request");
    target.must_serve();
}

#[test]
fn a_payload_too_long_is_read_past() {
    let target = Target::new();
    let mut client = Client::enter(&target.rig, "a");
    let len = (32 << 20) + 5;
    client.request(Command::Write, 0, 1, 0, len);
    client.send(&vec![1; len as usize]);
    // Beyond the end and on a snapshot the payload is there, too.
    client.request(Command::Write, 0, 2, MIB - 1, 2);
    client.send(&[1, 2]);
    client.request(Command::Write, 1 << 9, 3, 0, 2);
    client.send(&[1, 2]);
    let replies: Vec<_> = (0..3).map(|_| client.reply(0)).map(|(cookie, errno, _)| (cookie, errno)).collect();
    assert_eq!(replies, [(1, 22), (2, 28), (3, 22)]);
    client.request(Command::Read, 0, 4, 0, u32::MAX);
    assert_eq!(client.reply(0), (4, 22, Vec::new()));
    client.request(Command::Read, 0, 5, u64::MAX, 1);
    assert_eq!(client.reply(0), (5, 22, Vec::new()));
    client.send(&Request { flags: 0, kind: 8, cookie: 6, offset: 0, length: 0 }.encode());
    assert_eq!(client.reply(0), (6, 22, Vec::new()));
    assert!(client.read(0, 4096) == target.content[..4096]);
    let mut client = Client::enter(&target.rig, "a@s");
    client.request(Command::Write, 0, 7, 0, 4096);
    client.send(&[1; 4096]);
    assert_eq!(client.reply(0), (7, 1, Vec::new()));
    assert!(client.read(0, 4096) == target.content[..4096]);
}

#[test]
fn requests_of_any_kind_are_answered_as_long_as_they_are_requests() {
    let target = Target::new();
    let disk = afterimage::disk::open(&target.rig.store, "a").unwrap();
    for seed in 0..40 {
        let mut client = Client::enter(&target.rig, "a");
        for number in 0..50u64 {
            let dice = noise(32, seed * 1000 + number);
            let word = |at: usize| u32::from_le_bytes(dice[at..at + 4].try_into().unwrap());
            // Mostly near the disk, sometimes anywhere.
            let offset =
                if dice[0].is_multiple_of(8) { u64::from(word(4)) << 32 } else { u64::from(word(4)) % (MIB + 9000) };
            let length = if dice[1].is_multiple_of(8) { word(8) } else { word(8) % 20_000 };
            let kind = u16::from(dice[2] % 10);
            let length = if kind == 1 { length % (40 << 20) } else { length };
            let flags = u16::from(dice[3]) & u16::from(dice[12]);
            if kind == 2 {
                continue;
            }
            client.send(&Request { flags, kind, cookie: number, offset, length }.encode());
            if kind == 1 {
                client.send(&vec![dice[13]; length as usize]);
            }
            let (cookie, errno, data) = client.reply(0);
            assert_eq!(cookie, number);
            assert!([0, 1, 22, 28, 75, 95].contains(&errno), "{errno}");
            assert!(kind != 0 || errno != 0 || data.len() == length as usize);
        }
    }
    assert_eq!(disk.size(), MIB);
    target.must_serve();
    let report = afterimage::store::check(&target.rig.store, false, &afterimage::progress::Silent).unwrap();
    assert!(report.problems.is_empty(), "{:?}", report.problems);
}

#[test]
fn clients_that_go_in_the_middle_leave_nothing_behind() {
    let target = Target::new();
    let disk = afterimage::disk::open(&target.rig.store, "a").unwrap();
    for seed in 0..200u64 {
        let mut client = Client::enter(&target.rig, "a");
        let length = 4096 * (u32::from(byte(seed)) % 64 + 1);
        let mut bytes = Vec::new();
        for number in 0..u64::from(byte(seed + 1) % 8) {
            bytes.extend(Request { flags: 0, kind: 0, cookie: number, offset: 0, length: 1 << 20 }.encode());
        }
        bytes.extend(Request { flags: 0, kind: 1, cookie: 9, offset: 0, length }.encode());
        bytes.extend(noise(length as usize, seed));
        let cut = noise(8, seed + 2);
        let cut = u64::from_le_bytes(cut.try_into().unwrap()) % (bytes.len() as u64 + 1);
        client.send(&bytes[..cut as usize]);
        drop(client);
    }
    target.rig.wait_until_quiet();
    assert_eq!(target.rig.store.disk_info("a").unwrap().holder, None);
    // Nothing is claimed any more: a snapshot, and a write of every block, need all of it.
    target.rig.take("a", "after");
    disk.write(&vec![1; MIB as usize], 0).unwrap();
    disk.flush().unwrap();
    target.must_serve();
}
