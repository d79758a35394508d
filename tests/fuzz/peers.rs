//! Peers on sockets, and guests on rings.

use std::fs::File;
use std::io::{IoSlice, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;
use std::time::Duration;

use afterimage::disk::BlockDevice;
use afterimage::nbd::option::{self, Choice, OPTION_REPLY, OptionReply, Queries, kind};
use afterimage::nbd::wire::{CHUNK, Command, Reply, Request, SIMPLE};
use rustix::event::{EventfdFlags, eventfd};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use vm_memory::{Bytes, GuestAddress};

use super::fuzz;
use crate::nbd::Rig;
use crate::vhost::guest::{Guest, INDIRECT, NEXT, SIZE, WRITE, header};
use crate::vhost::{Ram, Served};

/// How long a server may take to close a connection on a machine that is busy.
const PATIENCE: Duration = Duration::from_secs(60);

/// Sends everything, hangs up, and returns what came until the server closed.
fn converse(mut stream: UnixStream, send: impl FnOnce(&mut UnixStream) + Send) -> Vec<u8> {
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
    let mut writer = stream.try_clone().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            send(&mut writer);
            writer.shutdown(Shutdown::Write).ok();
        });
        let mut came = Vec::new();
        match stream.read_to_end(&mut came) {
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => panic!("the connection is not closed"),
            _ => came,
        }
    })
}

/// The kinds of the answers of an NBD server.
fn answers(mut bytes: &[u8]) -> String {
    let mut kinds = String::new();
    bytes = bytes.get(18..).unwrap_or_default();
    while let Some(header) = bytes.first_chunk::<OPTION_REPLY>().and_then(OptionReply::decode) {
        kinds += &format!("{} ", word(u64::from(header.kind)));
        bytes = bytes.get(OPTION_REPLY + header.length as usize..).unwrap_or_default();
    }
    let mut errors = std::collections::BTreeSet::new();
    for at in 0..bytes.len() {
        match Reply::decode(&bytes[at..]) {
            Some(Reply::Simple { error, .. }) if bytes.len() >= at + SIMPLE => errors.insert((0, error)),
            Some(Reply::Chunk { kind, length, .. }) if bytes.len() >= at + CHUNK => {
                errors.insert((kind, length.min(40)))
            }
            _ => continue,
        };
    }
    errors.iter().for_each(|(kind, error)| kinds += &format!("{}-{} ", word((*kind).into()), word((*error).into())));
    kinds
}

/// A number in letters: digits do not count in a kind of answer.
fn word(number: u64) -> String {
    format!("{number:x}").bytes().map(|digit| char::from(digit % 48 + b'g')).collect()
}

/// Good sessions: every option, every request.
fn sessions() -> Vec<Vec<u8>> {
    let option = option::option;
    let choice = |name: &str| Choice { name: name.into(), infos: vec![0, 1, 2, 3] }.encode();
    let queries = |queries: &[&str]| {
        Queries { name: "a".into(), queries: queries.iter().map(|&query| query.to_owned()).collect() }.encode()
    };
    let request = |command, flags, offset, length| {
        Request { flags, kind: command as u16, cookie: 7, offset, length }.encode().to_vec()
    };
    let every = [
        request(Command::Read, 0, 4096, 10_000),
        request(Command::Write, 1, 4000, 300),
        vec![5; 300],
        request(Command::Flush, 0, 0, 0),
        request(Command::Trim, 0, 8192, 8192),
        request(Command::WriteZeroes, 2, 100, 9000),
        request(Command::Cache, 0, 0, 4096),
        request(Command::BlockStatus, 0, 0, 1 << 20),
        request(Command::Read, 4, 0, 512),
        request(Command::Disconnect, 0, 0, 0),
    ]
    .concat();
    let begin = 3_u32.to_be_bytes().to_vec();
    let contexts = queries(&["base:allocation", "qemu:dirty-bitmap:s", "qemu:"]);
    let asks = [
        option(kind::LIST, &[]),
        option(kind::INFO, &choice("a@s")),
        option(kind::LIST_META_CONTEXT, &queries(&["base:", "qemu:dirty-bitmap:"])),
        option(kind::STARTTLS, &[]),
        option(99, b"what"),
        option(kind::ABORT, &[]),
    ]
    .concat();
    let structured = [option(kind::STRUCTURED_REPLY, &[]), option(kind::SET_META_CONTEXT, &contexts)].concat();
    vec![
        [begin.clone(), asks].concat(),
        [begin.clone(), structured, option(kind::GO, &choice("a")), every.clone()].concat(),
        [begin.clone(), option(kind::GO, &choice("a@s")), every.clone()].concat(),
        [begin, option(kind::EXPORT_NAME, b"a"), every].concat(),
    ]
}

#[test]
fn clients_of_nbd() {
    let rig = Rig::with(400);
    let disk = rig.disk("a", crate::nbd::MIB);
    disk.write(&crate::tree::noise(600_000, 1), 0).unwrap();
    rig.take("a", "s");
    let mut then = vec![0; 600_000];
    disk.read(&mut then, 0).unwrap();
    fuzz("nbd", sessions(), 600, |bytes| answers(&converse(rig.connect(), |stream| drop(stream.write_all(bytes)))));
    rig.wait_until_quiet();
    let snapshot = afterimage::snapshot::open(&rig.store, "a", "s").unwrap();
    let mut now = vec![0; 600_000];
    snapshot.read(&mut now, 0).unwrap();
    assert!(then == now, "nobody wrote to the snapshot");
    let report = afterimage::store::check(&rig.store, false, &afterimage::progress::Silent).unwrap();
    assert!(report.problems.is_empty(), "{:?}", report.problems);
}

/// A message of vhost-user, behind the numbers of the descriptors that go with it.
fn message(files: u8, request: u32, body: &[u8]) -> Vec<u8> {
    let head = [request, 1 | 8, body.len() as u32].map(u32::to_le_bytes).concat();
    [&[files, (head.len() + body.len()) as u8][..], &head, body].concat()
}

fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// What a good front end says, more or less.
fn set_ups() -> Vec<Vec<u8>> {
    const AT: u64 = 1 << 40;
    let half = |a: u32, b: u32| [a.to_le_bytes(), b.to_le_bytes()].concat();
    let region = words(&[0, 1 << 20, AT, 0]);
    let table = [half(1, 0), region.clone()].concat();
    let rings = [half(0, 0), words(&[AT, AT + 0x8000, AT + 0x4000, 0])].concat();
    let begin = [
        message(0, 3, &[]),
        message(0, 1, &[]),
        message(0, 2, &words(&[1 << 32 | 1 << 30 | 1 << 29 | 1 << 28])),
        message(0, 15, &[]),
        message(0, 16, &words(&[0b1_1111_0110_1010_1011])),
    ];
    let memory = message(1, 5, &table);
    let inflight = [words(&[0, 0]), [1_u16.to_le_bytes(), 64_u16.to_le_bytes()].concat()].concat();
    let ring = [
        message(0, 8, &half(0, 64)),
        message(0, 10, &half(0, 0)),
        message(0, 9, &rings),
        message(2, 12, &words(&[0])),
        message(2, 13, &words(&[0])),
        message(2, 14, &words(&[0])),
        message(0, 18, &half(0, 1)),
    ];
    let rest = [
        message(0, 24, &[half(0, 60), half(0, 0)[..4].to_vec(), vec![0; 60]].concat()),
        message(0, 17, &[]),
        message(0, 31, &inflight),
        message(1, 32, &inflight),
        message(1, 37, &[words(&[0]), region.clone()].concat()),
        message(1, 38, &[words(&[0]), region].concat()),
        message(0, 36, &[]),
        message(0, 11, &half(0, 0)),
        message(0, 4, &[]),
    ];
    let begin = begin.concat();
    vec![
        [begin.clone(), memory.clone(), ring.concat()].concat(),
        [begin.clone(), ring.concat(), memory, rest.concat()].concat(),
        [begin, rest.concat()].concat(),
    ]
}

fn say(stream: &UnixStream, mut bytes: &[u8], files: [BorrowedFd<'_>; 2]) {
    while let [with, len, rest @ ..] = bytes {
        let (message, rest) = rest.split_at(usize::from(*len).min(rest.len()));
        bytes = rest;
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(9))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let attached = match with % 8 {
            0 => Vec::new(),
            1 => vec![files[0]],
            2 => vec![files[1]],
            many => vec![files[usize::from(many % 2)]; usize::from(many)],
        };
        if !attached.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(&attached)));
        }
        if rustix::net::sendmsg(stream, &[IoSlice::new(message)], &mut control, SendFlags::NOSIGNAL).is_err() {
            return;
        }
    }
}

#[test]
fn front_ends_of_vhost_user() {
    let served = Served::new(Ram::new(1 << 20), 2);
    let file = File::from(rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
    file.set_len(1 << 20).unwrap();
    // Rings that have something in them, so that a queue that begins has something to do.
    let mut content = crate::tree::noise(1 << 20, 3);
    content[0x4000..0x4004].copy_from_slice(&[0, 0, 8, 0]);
    std::os::unix::fs::FileExt::write_all_at(&file, &content, 0).unwrap();
    let event = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).unwrap();
    fuzz("vhost", set_ups(), 600, |bytes| {
        rustix::io::write(&event, &1_u64.to_le_bytes()).ok();
        let stream = UnixStream::connect(&served.socket).unwrap();
        let came = converse(stream, |stream| {
            say(stream, bytes, [file.as_fd(), event.as_fd()]);
        });
        let head = |at: usize| came.get(at..at + 4).map_or(0, |word| u64::from(word[0]));
        format!("{} {}", word(came.len() as u64), word(head(0)))
    });
    let mut guest = served.guest(2);
    guest.write(0, 0, &[1; 512]);
    assert_eq!(guest.read(1, 0, 512), [1; 512]);
}

/// Bytes of an input that become descriptors; the rest becomes data.
const TABLE: usize = 24 * 16;

fn tables() -> Vec<Vec<u8>> {
    let descriptor = |at: u64, len: u32, flags: u16, next: u16| {
        [&at.to_le_bytes()[..], &len.to_le_bytes(), &flags.to_le_bytes(), &next.to_le_bytes()].concat()
    };
    let filled = |mut table: Vec<u8>, data: &[u8]| {
        table.resize(TABLE, 0);
        table.extend(data);
        table
    };
    let mut all = Vec::new();
    for kind in [0, 1, 4, 8, 11, 13] {
        let flags = if matches!(kind, 0 | 8) { NEXT | WRITE } else { NEXT };
        let chain = [descriptor(0, 16, NEXT, 1), descriptor(64, 1024, flags, 2), descriptor(2000, 1, WRITE, 0)];
        let range = [words(&[1]), vec![8, 0, 0, 0, 0, 0, 0, 0]].concat();
        let data = [header(kind, 3).to_vec(), vec![0; 48], range].concat();
        all.push(filled(chain.concat(), &data));
        // The same as an indirect table in the data.
        let data = [header(kind, 3).to_vec(), vec![0; 48], chain.concat()].concat();
        all.push(filled(descriptor(64, 48, INDIRECT, 0), &data));
    }
    all
}

/// Descriptors lie in an input as offsets into its own data, of small numbers; others are taken as they are.
#[test]
fn guests_of_vhost_user() {
    let served = Served::new(Ram::new(1 << 20), 1);
    let mut guest = served.guest(1);
    fuzz("descriptors", tables(), 3000, |bytes| {
        let base = guest.room(4096);
        let (table, data) = bytes.split_at(bytes.len().min(TABLE));
        let mut data = data[..data.len().min(4096)].to_vec();
        // Tables in the data point into it, too, wherever they begin.
        for at in 64..data.len().saturating_sub(7) {
            relocate(&mut data[at..at + 8], base);
        }
        guest.memory.write_slice(&data, GuestAddress(base)).unwrap();
        for (index, descriptor) in table.chunks_exact(16).enumerate() {
            let mut descriptor = descriptor.to_vec();
            relocate(&mut descriptor[..8], base);
            guest.memory.write_slice(&descriptor, GuestAddress(index as u64 * 16)).unwrap();
        }
        let heads = [0, u16::from(*bytes.last().unwrap_or(&0)) % SIZE];
        heads.iter().for_each(|head| guest.offer(0, *head));
        guest.kick(0);
        let Some(lens) = wait_for(&guest, 2) else {
            // It has written over its own rings.
            guest.disconnect();
            guest = served.guest(1);
            return "spoiled".into();
        };
        guest.rings[0].seen = guest.rings[0].seen.wrapping_add(2);
        format!("{} {}", word(u64::from(lens[0])), word(u64::from(lens[1])))
    });
    guest.disconnect();
    let mut guest = served.guest(1);
    assert_eq!(guest.write(0, 7, &[9; 512]), 0);
    assert_eq!(guest.read(0, 7, 512), [9; 512]);
}

/// Waits for so many answers and returns their lengths; `None` when the rings make no sense any more.
fn wait_for(guest: &Guest, count: u16) -> Option<Vec<u32>> {
    let begun = std::time::Instant::now();
    let seen = guest.rings[0].seen;
    loop {
        let available: u16 = guest.memory.load(GuestAddress(0x4002), Ordering::Acquire).unwrap();
        let done = guest.used(0).wrapping_sub(seen);
        if available != guest.rings[0].available || done > count {
            return None;
        }
        if done == count {
            let at = |n: u16| GuestAddress(0x8004 + u64::from(seen.wrapping_add(n) % SIZE) * 8 + 4);
            return Some((0..count).map(|n| guest.memory.read_obj(at(n)).unwrap()).collect());
        }
        assert!(begun.elapsed() < PATIENCE, "a request is not answered");
        std::thread::yield_now();
    }
}

/// Small addresses are in the data. None is left in the rings: a guest that writes over them has no queue any more.
fn relocate(address: &mut [u8], base: u64) {
    let at = u64::from_le_bytes(address.try_into().unwrap());
    if at < 0x1_0000 {
        address.copy_from_slice(&(base + at).to_le_bytes());
    }
}
