//! What guests may take of a server together: memory for their requests, and descriptors.

use std::fs::File;
use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use afterimage::budget::{Budget, Pot};
use vhost::vhost_user::VhostUserFrontend;
use vhost::{VhostBackend, VhostUserMemoryRegionInfo};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::guest::{IN, OUT};
use super::hostile::front;
use super::{Guest, Ram, Served, serve};
use crate::real::wait_for;
use crate::tree::noise;

const MIB: usize = 1 << 20;

fn with_memory(bytes: usize, queues: usize) -> (Arc<Ram>, Served, Arc<Pot>) {
    let budget = Budget { requests: Pot::new(bytes), ..Budget::new(1000) };
    let (ram, requests) = (Ram::new(16 * MIB), Arc::clone(&budget.requests));
    let served = Served::within(Arc::clone(&ram) as _, queues, Box::new(()), budget);
    (ram, served, requests)
}

/// Writes that the device has begun.
fn begun(ram: &Ram) -> usize {
    ram.log.lock().iter().filter(|(what, ..)| *what == "write").count()
}

#[test]
fn memory_for_requests_comes_out_of_the_pot_and_goes_back() {
    const ALL: usize = 64 * MIB;
    let (ram, served, requests) = with_memory(ALL, 1);
    let mut guest = served.guest(1);
    let data = noise(4 * MIB, 7);
    ram.close(true);
    for n in 0..3 {
        guest.send(0, OUT, n * 8192, &data, 0);
    }
    guest.kick(0);
    wait_for("no memory is taken", || requests.left() <= ALL - 10 * MIB);
    assert!(requests.left() >= ALL - 16 * MIB, "{} are left", requests.left());
    ram.close(false);
    for _ in 0..3 {
        guest.answer(0);
    }
    assert!((0..3).all(|n| ram.content()[n * 4 * MIB..][..4 * MIB] == data));
    wait_for("a queue that rests keeps memory", || requests.left() == ALL);
    // Who goes while it has some gives it back, too.
    ram.close(true);
    guest.send(0, OUT, 0, &data, 0);
    guest.kick(0);
    wait_for("no memory is taken", || requests.left() < ALL);
    guest.disconnect();
    ram.close(false);
    wait_for("who has gone keeps memory", || requests.left() == ALL);
}

#[test]
fn without_memory_in_the_pot_requests_are_done_part_by_part() {
    let (ram, served, requests) = with_memory(8 * MIB, 1);
    let others = requests.take(8 * MIB).unwrap();
    let mut guest = served.guest(1);
    let data = noise(4 * MIB, 9);
    ram.close(true);
    guest.send(0, OUT, 8192, &data, 0);
    guest.send(0, OUT, 0, &data[..MIB], 0);
    guest.kick(0);
    wait_for("nothing is begun", || begun(&ram) > 0);
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(begun(&ram), 1, "a queue has memory of its own for one part");
    ram.close(false);
    for _ in 0..2 {
        guest.answer(0);
    }
    assert!(ram.content()[4 * MIB..][..4 * MIB] == data && ram.content()[..MIB] == data[..MIB]);
    for (n, len) in [(8, MIB), (0, 512), (11, 3 * MIB), (8, 4 * MIB)] {
        let (status, read) = guest.ask(0, IN, n * 1024, &[], len);
        let expected = ram.content()[n as usize * 1024 * 512..][..len].to_vec();
        assert!(status == 0 && read == expected, "{len} bytes");
    }
    // A part that fails while the next one waits ends its request, and no other.
    ram.fail(true);
    assert_eq!(guest.write(0, 0, &data), 1);
    ram.fail(false);
    assert_eq!(guest.write(0, 0, &data), 0);
    // With memory again it is as before.
    drop(others);
    ram.close(true);
    ram.log.lock().clear();
    guest.send(0, OUT, 0, &data, 0);
    guest.kick(0);
    wait_for("it does not make use of it", || begun(&ram) == 4);
    ram.close(false);
    guest.answer(0);
}

#[test]
fn a_queue_that_is_stopped_finishes_what_waits_for_memory() {
    let (ram, served, requests) = with_memory(8 * MIB, 1);
    let _others = requests.take(8 * MIB).unwrap();
    let mut guest = served.guest(1);
    let data = noise(4 * MIB, 3);
    ram.close(true);
    guest.send(0, OUT, 8192, &data, 0);
    guest.kick(0);
    wait_for("nothing is begun", || begun(&ram) > 0);
    let front = guest.front.take().unwrap();
    let stopping = std::thread::spawn(move || front.get_vring_base(0).unwrap());
    std::thread::sleep(Duration::from_millis(50));
    assert!(!stopping.is_finished() && begun(&ram) == 1 && guest.used(0) == 0);
    ram.close(false);
    assert_eq!((stopping.join().unwrap(), begun(&ram), guest.used(0)), (1, 4, 1));
    assert!(ram.content()[4 * MIB..][..4 * MIB] == data);
}

#[test]
fn a_server_that_ends_leaves_what_waits_for_memory() {
    let (ram, mut served, requests) = with_memory(8 * MIB, 1);
    let _others = requests.take(8 * MIB).unwrap();
    let mut guest = served.guest(1);
    let data = noise(4 * MIB, 3);
    ram.close(true);
    guest.send(0, OUT, 8192, &data, 0);
    guest.kick(0);
    wait_for("nothing is begun", || begun(&ram) > 0);
    let server = served.server.take().unwrap();
    let stopping = std::thread::spawn(move || server.stop_within(Duration::from_secs(60)).is_none());
    guest.wait_for_end();
    ram.close(false);
    assert!(stopping.join().unwrap(), "it has ended in time");
    assert_eq!((begun(&ram), guest.used(0)), (1, 0), "the rest was not begun, and nothing answered");
    // The next server does it again, all of it.
    served.server = Some(serve(&served.socket, Arc::clone(&ram) as _, 1, Box::new(())));
    guest.disconnect();
    guest.connect(&served.socket);
    guest.answer(0);
    assert!(begun(&ram) == 1 + 4 && ram.content()[4 * MIB..][..4 * MIB] == data);
}

#[test]
fn who_waits_for_memory_gets_what_a_queue_only_keeps() {
    let (_ram, served, requests) = with_memory(8 * MIB, 1);
    let mut guest = served.guest(1);
    assert_eq!(guest.write(0, 0, &noise(4 * MIB, 1)), 0);
    let all = Arc::clone(&requests);
    let waiting = std::thread::spawn(move || {
        let mut share = all.nothing();
        let soon = || afterimage::clock::now() + Duration::from_millis(50);
        while !share.wait(8 * MIB, soon()) {}
        share
    });
    let mut writes = 0;
    while !waiting.is_finished() {
        // It works all the time, and does not rest.
        assert_eq!(guest.write(0, 0, &[writes; 4096]), 0);
        writes = writes.wrapping_add(1);
    }
    drop(waiting.join().unwrap());
    assert_eq!(guest.write(0, 0, &noise(4 * MIB, 2)), 0);
}

/// Tells whether a server ends a connection that has said nothing.
pub(super) fn is_refused(served: &Served) -> bool {
    let mut stream = UnixStream::connect(&served.socket).unwrap();
    stream.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    stream.read(&mut [0]).is_ok_and(|bytes| bytes == 0)
}

#[test]
fn front_ends_leave_descriptors_for_the_pool() {
    // A connection, a queue, two regions; and not as many once more.
    let budget = Budget::new(6 + 6 + 2 + 5);
    let serve = || Served::within(Ram::new(MIB), 2, Box::new(()), budget.clone());
    let (first, second) = (serve(), serve());
    let mut guest = first.guest(1);
    assert_eq!(budget.descriptors.left(), 5);
    assert!(is_refused(&second));
    guest.read(0, 0, 512);
    guest.disconnect();
    wait_for("who has gone keeps descriptors", || budget.descriptors.left() == 19);
    let mut guest = Guest::new(1);
    guest.connect(&second.socket);
    // Regions, and events of another queue, until there are none.
    let front_end = guest.front.as_mut().unwrap();
    let file = File::from(rustix::fs::memfd_create("some", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
    file.set_len(1 << 20).unwrap();
    let event = EventFd::new(EFD_NONBLOCK).unwrap();
    let mut region = VhostUserMemoryRegionInfo {
        guest_phys_addr: 8 << 30,
        memory_size: 4096,
        userspace_addr: 1 << 50,
        mmap_offset: 0,
        mmap_handle: file.as_raw_fd(),
    };
    for left in (0..5).rev() {
        front_end.add_mem_region(&region).unwrap();
        assert_eq!(budget.descriptors.left(), left);
        region.guest_phys_addr += 1 << 20;
        region.userspace_addr += 1 << 20;
    }
    front_end.add_mem_region(&region).unwrap_err();
    wait_for("who was refused keeps descriptors", || budget.descriptors.left() == 19);
    let taken = budget.descriptors.take(10).unwrap();
    front(&second).set_vring_kick(0, &event).expect_err("there are three left, and six are needed");
    drop(taken);
    front(&second).set_vring_call(0, &event).unwrap();
    wait_for("who has gone keeps descriptors", || budget.descriptors.left() == 19);
    assert!(!is_refused(&first));
}
