//! Front ends and servers that go and come again.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use vhost::VhostBackend;
use vm_memory::{Bytes, GuestAddress};

use super::guest::{DISCARD, FLUSH, Guest, IN, OUT, segment};
use super::{Ram, Served, serve};

#[test]
fn a_front_end_that_comes_again_goes_on_where_it_was() {
    let served = Served::new(Ram::new(1 << 20), 2);
    let mut guest = served.guest(2);
    for round in 0..5_u8 {
        assert_eq!(guest.write(0, 8, &[round; 512]), 0);
        assert_eq!(guest.read(1, 8, 512), [round; 512]);
        guest.disconnect();
        // Offered while nobody is there.
        let sent = guest.send(0, OUT, 9, &[round; 512], 0);
        guest.connect(&served.socket);
        assert_eq!(guest.answer(0).0, sent.head);
        assert_eq!(guest.read(1, 9, 512), [round; 512]);
    }
    guest.disconnect();
    // Another guest altogether.
    assert_eq!(served.guest(1).read(0, 9, 512), [4; 512]);
}

#[test]
fn a_queue_stops_when_what_it_took_is_finished_and_can_be_begun_again() {
    let ram = Ram::new(1 << 20);
    let served = Served::new(ram.clone(), 1);
    let mut guest = served.guest(1);
    guest.write(0, 0, &[1; 512]);
    ram.close(true);
    let sent = guest.send(0, OUT, 1, &[2; 512], 0);
    guest.kick(0);
    while ram.log.lock().len() < 2 {
        std::thread::yield_now();
    }
    let front = guest.front.take().unwrap();
    let stopping = std::thread::spawn(move || {
        let base = front.get_vring_base(0).unwrap();
        (front, base)
    });
    std::thread::sleep(Duration::from_millis(50));
    assert!(!stopping.is_finished() && guest.used(0) == 1);
    ram.close(false);
    let (front, base) = stopping.join().unwrap();
    assert_eq!((base, guest.used(0), guest.get(sent.status, 1)[0]), (2, 2, 0));
    guest.answer(0);
    // What is offered meanwhile waits.
    guest.send(0, OUT, 2, &[3; 512], 0);
    guest.kick(0);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!((guest.used(0), ram.log.lock().len()), (2, 2));
    guest.begin(&front, &guest.rings[0], base as u16);
    guest.front = Some(front);
    guest.answer(0);
    assert_eq!(guest.read(0, 2, 512), [3; 512]);
}

#[test]
fn what_is_in_flight_when_a_front_end_goes_is_finished_before_the_next_is_served() {
    let ram = Ram::new(1 << 20);
    let served = Served::new(ram.clone(), 1);
    let mut guest = served.guest(1);
    ram.close(true);
    guest.send(0, OUT, 1, &[2; 512], 0);
    guest.kick(0);
    while ram.log.lock().is_empty() {
        std::thread::yield_now();
    }
    guest.disconnect();
    let socket = served.socket.clone();
    let next = std::thread::spawn(move || {
        let mut next = Guest::new(1);
        next.connect(&socket);
        next.read(0, 1, 512)
    });
    std::thread::sleep(Duration::from_millis(50));
    assert!(!next.is_finished());
    ram.close(false);
    assert_eq!(next.join().unwrap(), [2; 512]);
    assert_eq!(guest.used(0), 1);
}

#[test]
fn a_server_whose_disk_does_not_answer_ends_all_the_same_and_keeps_its_lease_until_it_does() {
    let (ram, lease) = (Ram::new(1 << 20), Arc::new(()));
    let mut served = Served::keeping(ram.clone(), 1, Box::new(Arc::clone(&lease)));
    let mut guest = served.guest(1);
    ram.close(true);
    guest.send(0, OUT, 1, &[2; 512], 0);
    guest.kick(0);
    while ram.log.lock().is_empty() {
        std::thread::yield_now();
    }
    served.server.take().unwrap().stop_within(Duration::from_millis(20));
    assert_eq!((Arc::strong_count(&lease), guest.used(0)), (2, 0), "it can still write");
    ram.close(false);
    while Arc::strong_count(&lease) > 1 {
        std::thread::yield_now();
    }
    assert_eq!((guest.used(0), &ram.content()[512..1024]), (1, &[2; 512][..]));
    // One that has nothing under way ends at once.
    let mut served = Served::keeping(ram, 1, Box::new(Arc::clone(&lease)));
    served.guest(1).read(0, 1, 512);
    served.server.take().unwrap().stop();
    assert_eq!(Arc::strong_count(&lease), 1);
}

#[test]
fn what_a_killed_server_had_taken_the_next_one_does_again_in_order() {
    let killed = Ram::new(1 << 20);
    killed.close(true);
    let served = Served::new(killed.clone(), 1);
    let mut guest = served.guest(1);
    let reads: Vec<_> = (0..2).map(|_| guest.send(0, IN, 0, &[], 512)).collect();
    guest.kick(0);
    for _ in &reads {
        guest.answer(0);
    }
    let sent: Vec<_> = (0..10_u8).map(|i| guest.send(0, OUT, u64::from(i), &[i + 1; 512], 0)).collect();
    guest.kick(0);
    while !killed.log.lock().iter().any(|(what, ..)| *what == "write") {
        std::thread::yield_now();
    }
    // As good as dead: its disk never answers.
    Box::leak(Box::new(served));
    guest.disconnect();
    let ram = Ram::new(1 << 20);
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("again.sock");
    let server = serve(&socket, ram.clone(), 1, Box::new(()));
    guest.connect(&socket);
    let mut heads: Vec<_> = sent.iter().map(|_| guest.answer(0).0).collect();
    heads.sort_unstable();
    let mut expected: Vec<_> = sent.iter().map(|sent| sent.head).collect();
    expected.sort_unstable();
    assert_eq!(heads, expected, "each is answered once");
    assert!(sent.iter().all(|sent| guest.get(sent.status, 1) == [0]));
    for i in 0..10_u8 {
        assert_eq!(guest.read(0, u64::from(i), 512), [i + 1; 512]);
    }
    assert_eq!(guest.used(0), 22, "and nothing else is");
    server.stop();
}

#[test]
fn what_a_killed_server_had_answered_is_not_done_again() {
    let ram = Ram::new(1 << 20);
    let served = Served::new(ram.clone(), 1);
    let mut guest = served.guest(1);
    let sent = guest.send(0, OUT, 1, &[1; 512], 0);
    guest.kick(0);
    guest.answer(0);
    guest.disconnect();
    // Another is served when this one has gone altogether.
    drop(served.guest(1));
    // Killed between the used ring and the marks: the answer is in the ring, the region does not say so.
    let file = guest.inflight.as_ref().unwrap().1.try_clone().unwrap();
    let put = |bytes: &[u8], at: usize| rustix::io::pwrite(&file, bytes, at as u64).unwrap();
    put(&0_u16.to_le_bytes(), 14);
    put(&sent.head.to_le_bytes(), 12);
    put(&[1], 16 + 16 * usize::from(sent.head));
    // And one that was taken and not answered.
    let taken = guest.send(0, OUT, 2, &[2; 512], 0);
    put(&9_u64.to_le_bytes(), 16 + 16 * usize::from(taken.head) + 8);
    put(&[1], 16 + 16 * usize::from(taken.head));
    guest.connect(&served.socket);
    assert_eq!(guest.answer(0).0, taken.head);
    assert_eq!(guest.ask(0, FLUSH, 0, &[], 0).0, 0);
    let log = ram.log.lock().clone();
    assert_eq!(log, [("write", 512, 512), ("write", 1024, 512), ("flush", 0, 0)]);
}

#[test]
fn a_server_ends_while_requests_come_without_end() {
    let mut served = Served::new(Ram::new(1 << 20), 1);
    let mut guest = served.guest(1);
    let sent = guest.send(0, IN, 0, &[], 512);
    guest.kick(0);
    guest.answer(0);
    let memory = guest.memory.clone();
    let kick = guest.rings[0].kick.try_clone().unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let flood = std::thread::spawn({
        let stop = Arc::clone(&stop);
        move || {
            // The ring says that there is always one more.
            let mut said = 1_u16;
            while !stop.load(Ordering::Acquire) {
                let used: u16 = memory.load(GuestAddress(0x8002), Ordering::Acquire).unwrap();
                let more = used.wrapping_add(60);
                // It never goes back.
                if more.wrapping_sub(said) < 0x8000 {
                    said = more;
                    memory.store(said, GuestAddress(0x4002), Ordering::Release).unwrap();
                    kick.write(1).unwrap();
                }
            }
        }
    });
    for at in 0..64 {
        guest.memory.write_obj(sent.head, GuestAddress(0x4004 + at * 2)).unwrap();
    }
    guest.kick(0);
    let begun = std::time::Instant::now();
    while guest.used(0) < 1000 {
        assert!(begun.elapsed() < super::guest::PATIENCE, "it goes on and on");
        std::thread::yield_now();
    }
    served.server.take().unwrap().stop();
    stop.store(true, Ordering::Release);
    flood.join().unwrap();
}

/// What was asked for was finished, however long it was: at 4 GiB a request a guest kept its disk for a minute and more.
#[test]
fn a_server_that_ends_leaves_the_parts_of_a_long_request_that_it_has_not_begun() {
    const MIB: usize = 1 << 20;
    for kind in [OUT, DISCARD] {
        let (ram, kept) = (Ram::new(32 * MIB), Arc::new(()));
        let mut served = Served::keeping(ram.clone(), 1, Box::new(Arc::clone(&kept)));
        let mut guest = served.guest(1);
        ram.close(true);
        let spans: Vec<u8> = (0..12).flat_map(|n| segment(n * 8, 8, 0)).collect();
        guest.send(0, kind, 0, if kind == OUT { &[7; 12 * MIB] } else { &spans }, 0);
        guest.kick(0);
        while ram.log.lock().len() < 4 {
            std::thread::yield_now();
        }
        let server = served.server.take().unwrap();
        let stopping = std::thread::spawn(move || server.stop_within(Duration::from_secs(60)).is_none());
        guest.wait_for_end();
        // Nothing ends as long as it may be under way.
        std::thread::sleep(Duration::from_millis(50));
        assert!(!stopping.is_finished() && Arc::strong_count(&kept) == 2);
        ram.close(false);
        assert!(stopping.join().unwrap(), "it has ended in time");
        assert_eq!((ram.log.lock().len(), guest.used(0)), (4, 0), "the rest was not begun, and nothing answered");
        assert_eq!(Arc::strong_count(&kept), 1);
        // The next server does it again, all of it.
        served.server = Some(serve(&served.socket, ram.clone(), 1, Box::new(())));
        guest.disconnect();
        guest.connect(&served.socket);
        guest.answer(0);
        assert_eq!(ram.log.lock().len(), 4 + 12);
    }
}

#[test]
fn what_does_not_end_in_time_is_told_and_can_be_waited_for() {
    let (ram, kept) = (Ram::new(1 << 20), Arc::new(()));
    let mut served = Served::keeping(ram.clone(), 1, Box::new(Arc::clone(&kept)));
    let mut guest = served.guest(1);
    ram.close(true);
    guest.send(0, FLUSH, 0, &[], 0);
    guest.kick(0);
    while ram.log.lock().is_empty() {
        std::thread::yield_now();
    }
    let rest = served.server.take().unwrap().stop_within(Duration::from_millis(50)).expect("a flush is under way");
    assert_eq!(Arc::strong_count(&kept), 2);
    ram.close(false);
    rest();
    assert_eq!(Arc::strong_count(&kept), 1);
}
