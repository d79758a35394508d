//! The registers and rings of a device, with a test in the place of the driver: a good one, and hostile ones.
#![allow(clippy::cast_possible_truncation, reason = "parts of numbers, random ones among them")]

use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::disk::{self, BlockDevice};
use crate::media::{HostMedia, Media};
use crate::store::{InitOptions, OpenOptions, Store};
use crate::sync::{Condvar, Mutex};
use crate::vmm::filter::Confinement;
use crate::vmm::memory;
use crate::vmm::virtio::{Block, Rng};

const DESCRIPTORS: u64 = 0x1000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;
const BUFFER: u64 = 0x4000;

fn event() -> EventFd {
    EventFd::new(libc::EFD_NONBLOCK).unwrap()
}

struct Bench {
    memory: Memory,
    line: EventFd,
    kicks: Vec<EventFd>,
    device: Transport,
}

impl Bench {
    fn new(device: Box<dyn Device>) -> Self {
        let memory = memory::make(4 << 20).unwrap();
        let (line, kicks) = (event(), device.queues().iter().map(|_| event()).collect::<Vec<_>>());
        let theirs = kicks.iter().map(|kick| kick.try_clone().unwrap()).collect();
        let nursery = Arc::new(Nursery::new(Confinement::default()).unwrap());
        let ours = line.try_clone().unwrap();
        let device = Transport::new(device, "bench".into(), memory.clone(), ours, theirs, nursery).unwrap();
        Self { memory, line, kicks, device }
    }

    fn read(&self, at: u64) -> u32 {
        let mut value = [0xee; 4];
        self.device.read(at, &mut value);
        u32::from_le_bytes(value)
    }

    fn write(&mut self, at: u64, value: u32) {
        self.device.write(at, &value.to_le_bytes());
    }

    /// Goes as far as features.
    fn negotiate(&mut self, features: u64) {
        self.write(0x70, 0);
        self.write(0x70, 3);
        for half in 0..2 {
            self.write(0x24, half);
            self.write(0x20, (features >> (32 * half)) as u32);
        }
        self.write(0x70, 11);
    }

    /// Sets up queue 0 and starts.
    fn start(&mut self, features: u64) {
        self.negotiate(features | 1 << VIRTIO_F_VERSION_1);
        self.write(0x30, 0);
        self.write(0x38, 8);
        for (at, address) in [(0x80, DESCRIPTORS), (0x90, AVAILABLE), (0xa0, USED)] {
            self.write(at, address as u32);
            self.write(at + 4, 0);
        }
        self.write(0x44, 1);
        self.write(0x70, 15);
    }

    /// Offers descriptor `head` as request number `index`.
    fn offer(&self, index: u16, head: u16) {
        self.memory.write_obj(head, GuestAddress(AVAILABLE + 4 + u64::from(index % 8) * 2)).unwrap();
        self.memory.store(index + 1, GuestAddress(AVAILABLE + 2), Ordering::SeqCst).unwrap();
        self.kicks[0].write(1).unwrap();
    }

    fn wait_for_answer(&self, index: u16) -> u32 {
        while self.memory.load::<u16>(GuestAddress(USED + 2), Ordering::SeqCst).unwrap() <= index {
            std::thread::yield_now();
        }
        let at = GuestAddress(USED + 4 + u64::from(index % 8) * 8 + 4);
        self.memory.read_obj(at).unwrap()
    }

    fn wait_for_status(&self, bit: u32) {
        while self.read(0x70) & bit == 0 {
            std::thread::yield_now();
        }
    }
}

#[test]
fn a_device_says_what_it_is() {
    let bench = Bench::new(Box::new(Rng));
    assert_eq!((bench.read(0), bench.read(4), bench.read(8)), (MAGIC, 2, 4));
    assert_eq!(bench.read(0x34), 64);
    assert_eq!((bench.read(0xb0), bench.read(0xfc), bench.read(0x100)), (u32::MAX, 0, 0));
}

#[test]
fn a_request_is_answered_and_the_guest_called() {
    let mut bench = Bench::new(Box::new(Rng));
    bench.start(0);
    assert_eq!(bench.read(0x70), 15);
    bench.memory.write_obj(Descriptor::new(BUFFER, 32, 2, 0), GuestAddress(DESCRIPTORS)).unwrap();
    bench.offer(0, 0);
    assert_eq!(bench.wait_for_answer(0), 32);
    while bench.line.read().is_err() {
        std::thread::yield_now();
    }
    assert_eq!(bench.read(0x60), 1);
    bench.write(0x64, 1);
    assert_eq!(bench.read(0x60), 0);
    let random: [u8; 32] = bench.memory.read_obj(GuestAddress(BUFFER)).unwrap();
    assert!(random.iter().any(|byte| *byte != random[0]));
}

#[test]
fn a_paused_device_goes_on_where_it_was() {
    let mut bench = Bench::new(Box::new(Rng));
    bench.start(0);
    bench.memory.write_obj(Descriptor::new(BUFFER, 8, 2, 0), GuestAddress(DESCRIPTORS)).unwrap();
    for index in 0..20 {
        bench.device.pause();
        bench.offer(index, 0);
        assert_eq!(bench.memory.load::<u16>(GuestAddress(USED + 2), Ordering::SeqCst).unwrap(), index);
        bench.device.resume();
        assert_eq!(bench.wait_for_answer(index), 8);
    }
}

#[test]
fn features_that_are_not_offered_or_missing_are_not_fine() {
    let mut bench = Bench::new(Box::new(Rng));
    for features in [0, 1 << 28, 1 << VIRTIO_F_VERSION_1 | 1, u64::MAX] {
        bench.negotiate(features);
        assert_eq!(bench.read(0x70), 3, "{features:#x}");
        bench.write(0x70, 15);
        assert_eq!(bench.read(0x70) & (FEATURES_OK | DRIVER_OK), 0, "not without features");
    }
}

#[test]
fn a_queue_that_lies_elsewhere_stops_the_device_until_it_is_reset() {
    let mut bench = Bench::new(Box::new(Rng));
    bench.negotiate(1 << VIRTIO_F_VERSION_1);
    bench.write(0x84, 0x7fff_ffff);
    bench.write(0x44, 1);
    bench.write(0x70, 15);
    assert_eq!(bench.read(0x70) & NEEDS_RESET, NEEDS_RESET);
    assert_eq!(bench.read(0x60), 2);
    bench.start(0);
    assert_eq!(bench.read(0x70), 15);
}

#[test]
fn a_ring_that_makes_no_sense_stops_the_device_until_it_is_reset() {
    let mut bench = Bench::new(Box::new(Rng));
    bench.start(0);
    // More requests than the ring has.
    bench.memory.store(1000_u16, GuestAddress(AVAILABLE + 2), Ordering::SeqCst).unwrap();
    bench.kicks[0].write(1).unwrap();
    bench.wait_for_status(NEEDS_RESET);
    bench.device.pause();
    bench.device.resume();
    assert_eq!(bench.read(0x70) & NEEDS_RESET, NEEDS_RESET);
    bench.memory.store(0_u16, GuestAddress(AVAILABLE + 2), Ordering::SeqCst).unwrap();
    bench.start(0);
    bench.memory.write_obj(Descriptor::new(BUFFER, 8, 2, 0), GuestAddress(DESCRIPTORS)).unwrap();
    bench.offer(0, 0);
    assert_eq!(bench.wait_for_answer(0), 8);
}

#[test]
fn a_queue_at_work_cannot_be_changed() {
    let mut bench = Bench::new(Box::new(Rng));
    bench.start(0);
    bench.write(0x80, 0xffff_0000);
    bench.write(0x44, 0);
    bench.device.pause();
    assert_eq!(bench.read(0x44), 1);
    assert_eq!(bench.device.queues[0].desc_table(), DESCRIPTORS);
}

/// A disk of nothing, for drivers that mean harm.
#[derive(Debug)]
struct Void;

impl BlockDevice for Void {
    fn size(&self) -> u64 {
        1 << 20
    }

    fn read(&self, buf: &mut [u8], _offset: u64) -> Result<()> {
        buf.fill(0);
        Ok(())
    }

    fn write(&self, _data: &[u8], _offset: u64) -> Result<()> {
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn discard(&self, _offset: u64, _len: u64) -> Result<()> {
        Ok(())
    }

    fn write_zeroes(&self, _offset: u64, _len: u64) -> Result<()> {
        Ok(())
    }

    fn next_data(&self, _offset: u64) -> Result<Option<(u64, u64)>> {
        Ok(None)
    }

    fn mapped(&self) -> u64 {
        0
    }

    fn read_only(&self) -> bool {
        false
    }
}

/// A disk that answers no read before several are under way.
#[derive(Debug)]
struct Meeting {
    void: Void,
    arrived: Mutex<usize>,
    complete: Condvar,
}

/// How many, and how long they wait for each other.
const TOGETHER: usize = 4;
const WAIT: std::time::Duration = std::time::Duration::from_secs(30);

impl BlockDevice for Meeting {
    fn size(&self) -> u64 {
        self.void.size()
    }

    fn read(&self, buf: &mut [u8], _offset: u64) -> Result<()> {
        let mut arrived = self.arrived.lock();
        *arrived += 1;
        self.complete.notify_all();
        let until = crate::clock::now() + WAIT;
        while *arrived < TOGETHER {
            if self.complete.wait_until(&mut arrived, until).timed_out() {
                return Err(Error::failed("the others did not come"));
            }
        }
        buf.fill(7);
        Ok(())
    }

    fn write(&self, data: &[u8], offset: u64) -> Result<()> {
        self.void.write(data, offset)
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn discard(&self, offset: u64, len: u64) -> Result<()> {
        self.void.discard(offset, len)
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        self.void.write_zeroes(offset, len)
    }

    fn next_data(&self, offset: u64) -> Result<Option<(u64, u64)>> {
        self.void.next_data(offset)
    }

    fn mapped(&self) -> u64 {
        0
    }

    fn read_only(&self) -> bool {
        false
    }
}

#[test]
fn requests_that_wait_on_purpose_are_called_back_by_a_pause_and_done_once_after_it() {
    let dir = tempfile::tempdir().unwrap();
    let media: Arc<dyn Media> = Arc::new(HostMedia::new(dir.path()).unwrap());
    Store::init(&media, InitOptions { journal: 4 << 20, ballast: 4096, probe: false }).unwrap();
    let store = Store::open(media, OpenOptions::default()).unwrap();
    drop(disk::create(&store, "a", 1 << 20).unwrap());
    disk::set(&store, "a", "enospc", "wait").unwrap();
    disk::set(&store, "a", "quota", "4K").unwrap();
    let device: Arc<dyn BlockDevice> = disk::open(&store, "a").unwrap();
    let mut bench = Bench::new(Box::new(Block::new(Arc::clone(&device), false, "a", 1)));
    bench.start(0);
    for number in 0..4_u16 {
        let (at, to) = (DESCRIPTORS + u64::from(number) * 32, BUFFER + u64::from(number) * 0x2000);
        bench.memory.write_obj(u32::to_le(1), GuestAddress(to)).unwrap();
        bench.memory.write_obj(u64::from(number) * 8, GuestAddress(to + 8)).unwrap();
        bench.memory.write_slice(&[number as u8 + 1; 4096], GuestAddress(to + 16)).unwrap();
        bench.memory.write_obj(0xee_u8, GuestAddress(to + 0x1800)).unwrap();
        let chain = [Descriptor::new(to, 4112, 1, number * 2 + 1), Descriptor::new(to + 0x1800, 1, 2, 0)];
        bench.memory.write_obj(chain[0], GuestAddress(at)).unwrap();
        bench.memory.write_obj(chain[1], GuestAddress(at + 16)).unwrap();
        bench.offer(number, number * 2);
    }
    let answered = |bench: &Bench| bench.memory.load::<u16>(GuestAddress(USED + 2), Ordering::SeqCst).unwrap();
    // One fits.
    while store.disk_info("a").unwrap().waiting < 3 || answered(&bench) < 1 {
        std::thread::yield_now();
    }
    for _ in 0..2 {
        bench.device.pause();
        assert_eq!((store.disk_info("a").unwrap().waiting, answered(&bench)), (0, 1));
        assert_eq!(bench.device.state().queues[0].left.len(), 3);
        bench.device.resume();
        while store.disk_info("a").unwrap().waiting < 3 {
            std::thread::yield_now();
        }
    }
    bench.device.pause();
    let mut state = bench.device.state();
    bench.device.restore(&state).unwrap();
    bench.device.resume();
    disk::set(&store, "a", "quota", "none").unwrap();
    bench.wait_for_answer(3);
    bench.device.pause();
    assert_eq!((answered(&bench), bench.device.state().queues[0].left.len()), (4, 0));
    for number in 0..4_u16 {
        let status = GuestAddress(BUFFER + u64::from(number) * 0x2000 + 0x1800);
        assert_eq!(bench.memory.read_obj::<u8>(status).unwrap(), 0);
        let mut found = [0; 4096];
        device.read(&mut found, u64::from(number) * 4096).unwrap();
        assert_eq!(found, [number as u8 + 1; 4096]);
    }
    state.queues[0].left[0] = 8;
    bench.device.restore(&state).unwrap_err();
}

#[test]
fn requests_of_one_queue_are_under_way_together_and_all_answered_before_a_pause() {
    let meeting = Meeting { void: Void, arrived: Mutex::new(0), complete: Condvar::new() };
    let mut bench = Bench::new(Box::new(Block::new(Arc::new(meeting), false, "meeting", 1)));
    bench.start(0);
    // A header of zeros says: read from sector 0.
    for number in 0..TOGETHER as u16 {
        let at = DESCRIPTORS + u64::from(number) * 32;
        let (data, next) = (BUFFER + 0x1000 + u64::from(number) * 0x400, number * 2 + 1);
        bench.memory.write_obj(Descriptor::new(BUFFER, 16, 1, next), GuestAddress(at)).unwrap();
        bench.memory.write_obj(Descriptor::new(data, 513, 2, 0), GuestAddress(at + 16)).unwrap();
        bench.offer(number, number * 2);
    }
    assert_eq!(bench.wait_for_answer(0), 513);
    bench.device.pause();
    assert_eq!(bench.memory.load::<u16>(GuestAddress(USED + 2), Ordering::SeqCst).unwrap(), TOGETHER as u16);
    for number in 0..TOGETHER as u64 {
        let mut came = [0; 513];
        bench.memory.read_slice(&mut came, GuestAddress(BUFFER + 0x1000 + number * 0x400)).unwrap();
        assert_eq!((came[0], came[511], came[512]), (7, 7, 0));
    }
}

#[test]
fn a_change_of_the_configuration_is_told_and_can_be_seen() {
    let mut bench = Bench::new(Box::new(Rng));
    bench.device.changed();
    assert_eq!((bench.read(0x60), bench.read(0xfc)), (0, 1), "no driver is there to be told");
    bench.start(0);
    bench.device.changed();
    assert_eq!((bench.read(0x60), bench.read(0xfc)), (2, 2));
}

#[test]
fn no_driver_harms_more_than_its_own_guest() {
    let mut seed = 0x2545_f491_4f6c_dd1d_u64;
    let mut random = move || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    };
    let mut bench = Bench::new(Box::new(Block::new(Arc::new(Void), false, "void", 2)));
    for _ in 0..300 {
        // Rings full of nonsense that is sometimes nearly sense.
        for at in (DESCRIPTORS..BUFFER).step_by(8) {
            let word = if random() & 3 == 0 { random() } else { random() & 0x7_0000_0fff };
            bench.memory.write_obj(word, GuestAddress(at)).unwrap();
        }
        bench.memory.write_obj(random() as u16 & 7, GuestAddress(AVAILABLE + 2)).unwrap();
        bench.memory.write_obj(0_u16, GuestAddress(USED + 2)).unwrap();
        bench.start(random() & (1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC));
        bench.kicks[0].write(1).unwrap();
        for _ in 0..50 {
            let (at, value) = (random() & 0x1ff, random());
            let width = [1, 2, 4, 8][(random() & 3) as usize];
            bench.device.read(at, &mut vec![0; width]);
            bench.device.write(at, &value.to_le_bytes()[..width]);
            if random() & 15 == 0 {
                bench.device.pause();
                bench.device.resume();
            }
        }
    }
    bench.start(0);
    assert_eq!(bench.read(0x70) & 15, 15, "a reset still makes all well");
}
