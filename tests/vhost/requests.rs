//! What a guest can ask of a disk, in all the shapes that are allowed.

use std::sync::Arc;

use afterimage::budget::Budget;
use afterimage::disk::{self, BlockDevice};
use afterimage::error::Kind;
use afterimage::snapshot;
use afterimage::vhost_blk::{self, Options};

use super::guest::{DISCARD, FLUSH, Guest, ID, IN, INDIRECT, OUT, WRITE, ZEROES, header, segment};
use super::{Ram, Served};

fn number(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |sum, byte| sum << 8 | u64::from(*byte))
}

#[test]
fn a_disk_is_read_written_flushed_and_trimmed() {
    let pool = tempfile::tempdir().unwrap();
    let store = crate::tree::new_pool(&pool);
    disk::create(&store, "d", 64 << 20).unwrap();
    let device = disk::open(&store, "d").unwrap();
    let served = Served::new(Arc::clone(&device) as Arc<dyn BlockDevice>, 1);
    let mut guest = served.guest(1);
    let data: Vec<u8> = (0..1 << 20).map(|i: u32| (i >> 9) as u8 | 1).collect();
    assert_eq!(guest.write(0, 2048, &data), 0);
    assert!(guest.read(0, 2048, 1 << 20) == data);
    assert_eq!(guest.read(0, 2049, 512), data[512..1024], "a sector inside of a block");
    assert_eq!(guest.write(0, 2051, &[7; 1024]), 0, "a part of a block");
    assert_eq!(guest.read(0, 2050, 512), data[1024..1536]);
    assert_eq!(guest.read(0, 2051, 1024), [7; 1024]);
    assert_eq!(guest.ask(0, FLUSH, 0, &[], 0).0, 0);
    let mut seen = vec![0; 512];
    device.read(&mut seen, 2051 * 512).unwrap();
    assert_eq!(seen, [7; 512], "the disk has it");
    let mapped = device.mapped();
    assert_eq!(guest.ask(0, DISCARD, 0, &segment(2048, 1024, 0), 0).0, 0);
    assert_eq!(device.mapped(), mapped - (512 << 10), "the space is given back");
    assert!(guest.read(0, 2048, 512 << 10) == vec![0; 512 << 10]);
    let two = [segment(3072, 8, 1), segment(3081, 1, 0)].concat();
    assert_eq!(guest.ask(0, ZEROES, 0, &two, 0).0, 0);
    assert_eq!(guest.read(0, 3072, 4096), [0; 4096]);
    let at = (3080 - 2048) * 512;
    let mut left = data[at..at + 1536].to_vec();
    left[512..1024].fill(0);
    assert!(guest.read(0, 3080, 1536) == left, "a sector of a block is zeros");
    let (status, id) = guest.ask(0, ID, 0, &[], 20);
    assert_eq!((status, &id[..]), (0, &b"disk-of-the-test\0\0\0\0"[..]));
}

#[test]
fn what_lies_beyond_the_end_or_makes_no_sense_is_an_error_and_nothing_else() {
    let ram = Ram::new(1 << 20);
    let served = Served::new(ram.clone(), 1);
    let mut guest = served.guest(1);
    let end = (1 << 20) / 512;
    for (kind, sector, out, room) in [
        (IN, end, 0, 512),
        (IN, end - 1, 0, 1024),
        (IN, u64::MAX, 0, 512),
        (IN, u64::MAX / 512, 0, 512),
        (IN, 1 << 55, 0, 512),
        (IN, 0, 0, 511),
        (IN, 0, 512, 512),
        (OUT, end, 512, 0),
        (OUT, 0, 513, 0),
        (OUT, 0, 512, 1),
        (DISCARD, 0, 0, 0),
        (DISCARD, 0, 15, 0),
        (ZEROES, 0, 17, 0),
    ] {
        assert_eq!(guest.ask(0, kind, sector, &vec![0; out], room).0, 1, "{kind} {sector} {out} {room}");
    }
    assert_eq!(guest.ask(0, DISCARD, 0, &segment(end - 1, 2, 0), 0).0, 1);
    assert_eq!(guest.ask(0, DISCARD, 0, &segment(u64::MAX, 1, 0), 0).0, 1);
    assert_eq!(guest.ask(0, ZEROES, 0, &segment(0, u32::MAX, 0), 0).0, 1);
    assert_eq!(guest.ask(0, ZEROES, 0, &segment(0, 1, 0).repeat(257), 0).0, 1);
    assert_eq!(guest.ask(0, DISCARD, 0, &segment(0, 1, 1), 0).0, 2, "a discard has no flags");
    assert_eq!(guest.ask(0, ZEROES, 0, &segment(0, 1, 2), 0).0, 2);
    for kind in [2, 3, 5, 10, 14, 15, u32::MAX] {
        assert_eq!(guest.ask(0, kind, 0, &[], 512).0, 2, "kind {kind}");
    }
    assert!(ram.log.lock().is_empty(), "the disk was not asked");
    ram.fail(true);
    assert_eq!(guest.write(0, 0, &[1; 512]), 1);
    ram.fail(false);
    assert_eq!(guest.write(0, 0, &[1; 512]), 0);
}

#[test]
fn header_data_and_status_may_be_cut_anywhere() {
    let ram = Ram::new(1 << 20);
    let served = Served::new(ram, 1);
    let mut guest = served.guest(1);
    // Written: header and data in one buffer, in single bytes, and with empty buffers between.
    let data: Vec<u8> = (0..1024_u32).map(|i| i as u8).collect();
    let whole = [&header(OUT, 4)[..], &data[..]].concat();
    let at = guest.put(&whole);
    let status = guest.put(&[9]);
    let cuts: [&[usize]; 4] = [&[], &[1, 2, 3, 16, 17, 600], &[16, 16, 528], &[15, 1039]];
    for cuts in cuts {
        let mut edges = vec![0];
        edges.extend(cuts);
        edges.push(whole.len());
        let mut buffers: Vec<_> =
            edges.windows(2).map(|e| (at + e[0] as u64, (e[1] - e[0]) as u32, 0)).collect::<Vec<_>>();
        buffers.push((status, 1, WRITE));
        assert_eq!(finish(&mut guest, &buffers, status), (0, 1));
    }
    assert_eq!(guest.read(0, 4, 1024), data);
    // Read: data and status in one buffer, and cut.
    let ask = guest.put(&header(IN, 4));
    for cuts in cuts {
        let at = guest.put(&[0xEE; 1025]);
        let mut edges = vec![0];
        edges.extend(cuts.iter().filter(|cut| **cut < 1025));
        edges.push(1025);
        let mut buffers = vec![(ask, 16, 0)];
        buffers.extend(edges.windows(2).map(|e| (at + e[0] as u64, (e[1] - e[0]) as u32, WRITE)));
        assert_eq!(finish(&mut guest, &buffers, at + 1024), (0, 1025));
        assert_eq!(guest.get(at, 1024), data);
    }
}

/// Sends a chain and returns its status and how much was written.
fn finish(guest: &mut Guest, buffers: &[(u64, u32, u16)], status: u64) -> (u8, u32) {
    let head = guest.chain(0, buffers);
    guest.offer(0, head);
    guest.kick(0);
    let (answered, len) = guest.answer(0);
    assert_eq!(answered, head);
    (guest.get(status, 1)[0], len)
}

#[test]
fn a_request_may_lie_in_an_indirect_table() {
    let served = Served::new(Ram::new(1 << 20), 1);
    let mut guest = served.guest(1);
    let data = vec![5; 100 * 512];
    let ask = guest.put(&header(OUT, 8));
    let at = guest.put(&data);
    let status = guest.put(&[9]);
    let table = guest.room(16 * 128 + 16).next_multiple_of(16);
    let mut buffers = vec![(ask, 16, 0)];
    buffers.extend((0..100).map(|i| (at + i * 512, 512, 0)));
    buffers.push((status, 1, WRITE));
    guest.write_chain(table, 0, &buffers);
    assert_eq!(finish(&mut guest, &[(table, 102 * 16, INDIRECT)], status), (0, 1));
    assert!(guest.read(0, 8, data.len()) == data);
}

#[test]
fn every_queue_works_at_the_same_time() {
    let ram = Ram::new(4 << 20);
    let served = Served::new(ram.clone(), 4);
    let mut guest = served.guest(4);
    for round in 0..50_u64 {
        let mut sent = Vec::new();
        for queue in 0..4 {
            for i in 0..4_u64 {
                let data = [(round + i) as u8 ^ queue as u8; 512];
                sent.push((queue, guest.send(queue, OUT, queue as u64 * 512 + i, &data, 0)));
            }
            guest.kick(queue);
        }
        for (queue, _) in &sent {
            guest.answer(*queue);
        }
        assert!(sent.iter().all(|(_, sent)| guest.get(sent.status, 1) == [0]));
    }
    for queue in 0..4 {
        assert_eq!(guest.read((queue + 1) % 4, queue as u64 * 512 + 3, 512), [52 ^ queue as u8; 512]);
    }
    ram.close(true);
    // One that waits holds up only its own.
    guest.send(0, OUT, 0, &[1; 512], 0);
    guest.kick(0);
    guest.read(1, 0, 512);
    ram.close(false);
    guest.answer(0);
}

#[test]
fn a_guest_is_notified_when_it_wants_to_be() {
    let served = Served::new(Ram::new(1 << 20), 1);
    let mut guest = served.guest(1);
    for _ in 0..3 {
        guest.read(0, 0, 512);
    }
    let quiet = |guest: &Guest| guest.rings[0].call.read().is_err();
    while !quiet(&guest) {}
    // After the tenth from now.
    let seen = guest.rings[0].seen;
    guest.notify_after(0, seen.wrapping_add(9));
    for _ in 0..9 {
        guest.send(0, IN, 0, &[], 512);
        guest.kick(0);
    }
    while guest.used(0) != seen.wrapping_add(9) {
        std::thread::yield_now();
    }
    // The last is in the ring and may not be looked at yet; a request and its answer put that in order.
    assert!(quiet(&guest), "nine are not ten");
    guest.send(0, IN, 0, &[], 512);
    guest.kick(0);
    while guest.used(0) != seen.wrapping_add(10) {
        std::thread::yield_now();
    }
    guest.rings[0].wait();
}

#[test]
fn a_driver_without_event_index_and_flush_is_served_as_it_expects() {
    let ram = Ram::new(1 << 20);
    let served = Served::new(ram.clone(), 1);
    let mut guest = Guest::new(1);
    guest.refused = 1 << 29 | 1 << 28 | 1 << 9;
    guest.connect(&served.socket);
    assert_eq!(guest.write(0, 0, &[1; 512]), 0);
    assert_eq!(*ram.log.lock(), [("write", 0, 512), ("flush", 0, 0)], "its writes are durable when they are answered");
}

#[test]
fn a_snapshot_is_read_only() {
    let pool = tempfile::tempdir().unwrap();
    let store = crate::tree::new_pool(&pool);
    disk::create(&store, "d", 1 << 20).unwrap();
    let device = disk::open(&store, "d").unwrap();
    device.write(&[8; 4096], 0).unwrap();
    snapshot::take(&store, &[("d".into(), "s".into())]).unwrap();
    device.write(&[9; 4096], 0).unwrap();
    let served = Served::new(snapshot::open(&store, "d", "s").unwrap(), 1);
    let mut guest = served.guest(1);
    assert_eq!(guest.features & (1 << 5 | 1 << 13 | 1 << 14), 1 << 5, "RO, and neither DISCARD nor WRITE_ZEROES");
    assert_eq!(guest.read(0, 0, 4096), [8; 4096]);
    assert_eq!(guest.write(0, 0, &[1; 512]), 1);
    assert_eq!(guest.ask(0, DISCARD, 0, &segment(0, 8, 0), 0).0, 1);
    assert_eq!(guest.ask(0, FLUSH, 0, &[], 0).0, 0);
    assert_eq!(guest.read(0, 0, 4096), [8; 4096]);
}

/// Nothing that changes the device gets as far as the device.
#[test]
fn what_changes_a_read_only_device_is_refused_before_it_gets_there() {
    let ram = Ram::sealed(1 << 20);
    let served = Served::new(Arc::clone(&ram) as Arc<dyn BlockDevice>, 1);
    let mut guest = served.guest(1);
    assert_eq!(guest.write(0, 0, &[1; 512]), 1);
    for kind in [DISCARD, ZEROES] {
        assert_eq!(guest.ask(0, kind, 0, &segment(0, 8, 0), 0).0, 1);
    }
    assert_eq!(ram.log.lock().len(), 0);
}

#[test]
fn a_guest_learns_of_a_new_size() {
    let ram = Ram::new(1 << 20);
    let served = Served::new(ram.clone(), 2);
    let mut guest = served.guest(2);
    let config = guest.config(0, 60);
    assert_eq!(number(&config[..8]), 2048);
    assert_eq!(number(&config[12..16]), 126, "segments");
    assert_eq!((number(&config[20..24]), config[24]), (512, 3), "a sector, and blocks of 4096");
    assert_eq!(number(&config[34..36]), 2, "queues");
    assert_eq!(number(&config[44..48]), 8, "discards are aligned to blocks");
    assert_eq!(config[56], 1, "write-zeroes unmaps");
    assert_eq!(guest.ask(0, IN, 2048, &[], 512).0, 1);
    ram.grow(2 << 20);
    served.server.as_ref().unwrap().resized();
    assert_eq!(guest.message(), [2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0], "the configuration has changed");
    assert_eq!(number(&guest.config(0, 8)), 4096);
    assert_eq!(guest.ask(1, IN, 2048, &[], 512).0, 0);
    guest.disconnect();
    served.server.as_ref().unwrap().resized();
}

#[test]
fn a_request_of_many_megabytes_is_done_in_pieces() {
    let served = Served::new(Ram::new(8 << 20), 1);
    let mut guest = served.guest(1);
    let data: Vec<u8> = (0..3 << 20).map(|i: u32| (i >> 12) as u8).collect();
    assert_eq!(guest.write(0, 3, &data), 0);
    assert!(guest.read(0, 3, 3 << 20) == data);
}

#[test]
fn a_server_refuses_what_cannot_be() {
    let served = Served::new(Ram::new(1 << 20), 1);
    let budget = Budget::new(100);
    let options =
        |queues| Options { socket: served.socket.clone(), queues, serial: String::new(), budget: budget.clone() };
    for queues in [0, 65] {
        let error = vhost_blk::start(options(queues), Ram::new(512), Box::new(())).unwrap_err();
        assert_eq!(error.kind(), Kind::Usage);
    }
    let error = vhost_blk::start(options(1), Ram::new(512), Box::new(())).unwrap_err();
    assert_eq!(error.kind(), Kind::Busy, "{error}");
    served.guest(1).read(0, 0, 512);
}

#[test]
fn what_is_kept_goes_when_the_server_has_stopped() {
    let kept = Arc::new(());
    let mut served = Served::keeping(Ram::new(1 << 20), 1, Box::new(Arc::clone(&kept)));
    let mut guest = served.guest(1);
    guest.read(0, 0, 512);
    assert_eq!(Arc::strong_count(&kept), 2);
    served.server.take().unwrap().stop();
    assert_eq!(Arc::strong_count(&kept), 1);
    assert!(!served.socket.exists());
}
