//! Guests and front ends that mean no good: whatever they do, the server serves the next one.

use std::fs::File;
use std::io::{IoSlice, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::fs::MemfdFlags;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use vhost::vhost_user::message::VhostUserInflight;
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::guest::{INDIRECT, NEXT, SIZE, WRITE, header};
use super::{Ram, Served};

struct Dice(u64);

impl Dice {
    fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn below(&mut self, below: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % below
    }

    fn of<T: Copy>(&mut self, these: &[T]) -> T {
        these[self.below(these.len() as u64) as usize]
    }
}

/// The seeds to try: one, if the environment names it.
fn seeds(count: u64) -> std::ops::Range<u64> {
    match std::env::var("AFTERIMAGE_SEED").ok().and_then(|seed| seed.parse().ok()) {
        Some(seed) => seed..seed + 1,
        None => 1..count + 1,
    }
}

#[test]
fn descriptors_of_any_kind_end_their_request_and_nothing_else() {
    let ram = Ram::new(1 << 20);
    let served = Served::new(ram, 1);
    for seed in seeds(20) {
        let mut dice = Dice::new(seed);
        let mut guest = served.guest(1);
        for _ in 0..100 {
            let count = 1 + dice.below(20) as u16;
            let base = guest.room(4096);
            // The rings themselves are spared: a guest that writes over them has no queue any more, which another test
            // is about.
            for index in 0..count {
                let address = match dice.below(8) {
                    0 => dice.below(u64::MAX >> 11) << 11,
                    1 => u64::MAX - dice.below(32),
                    2 => (16 << 20) - dice.below(64),
                    _ => base + dice.below(4096),
                };
                let len = match dice.below(6) {
                    0 => dice.below(1 << 32) as u32,
                    1 => 0,
                    2 => 16 * dice.below(20) as u32,
                    _ => dice.of(&[1, 15, 16, 17, 512, 513, 1024, 4096]),
                };
                let flags = dice.of(&[0, NEXT, NEXT, NEXT, WRITE, NEXT | WRITE, INDIRECT, INDIRECT | NEXT, 0xFFFF]);
                let next = dice.below(u64::from(count) + 2) as u16;
                guest.describe(u64::from(index) * 16, (address, len, flags, next));
            }
            // Some of them begin as a request should, and some tables are tables.
            let request = header(dice.of(&[0, 1, 4, 8, 11, 13, 99]), dice.below(4000));
            guest.memory.write_slice(&request, GuestAddress(base)).unwrap();
            if dice.below(2) == 0 {
                let flags = dice.of(&[NEXT, NEXT | INDIRECT, INDIRECT]);
                guest.describe(0, (base, 16, flags, 1));
            }
            for at in 1..20 {
                let flags = dice.of(&[NEXT, WRITE, NEXT | WRITE, INDIRECT]);
                guest.describe(base + 512 + at * 16, (base + dice.below(2048), 512, flags, dice.below(24) as u16));
            }
            let heads = 1 + dice.below(4);
            for _ in 0..heads {
                let head = dice.below(u64::from(count)) as u16;
                guest.offer(0, head);
            }
            guest.kick(0);
            for _ in 0..heads {
                let (_, len) = guest.answer(0);
                assert!(len <= (1 << 20) + 1 || len == 0, "seed {seed}: {len} bytes of a disk of 1 MiB");
            }
        }
        guest.write(0, 7, &[seed as u8; 512]);
        assert_eq!(guest.read(0, 7, 512), [seed as u8; 512], "seed {seed}");
    }
}

#[test]
fn a_ring_that_makes_no_sense_ends_its_queue_and_no_other() {
    let served = Served::new(Ram::new(1 << 20), 2);
    for case in 0..3 {
        let mut guest = served.guest(2);
        let error = EventFd::new(EFD_NONBLOCK).unwrap();
        guest.front.as_ref().unwrap().set_vring_err(0, &error).unwrap();
        guest.read(0, 0, 512);
        match case {
            // More requests than a ring has.
            0 => guest.memory.store(1000_u16, GuestAddress(0x4002), Ordering::Release).unwrap(),
            // No such descriptor.
            1 => guest.offer(0, SIZE),
            _ => guest.offer(0, u16::MAX),
        }
        guest.kick(0);
        while error.read().is_err() {
            std::thread::yield_now();
        }
        guest.read(1, 0, 512);
        guest.disconnect();
    }
    served.guest(1).read(0, 0, 512);
}

/// A front end that has said who it is, and nothing of memory and queues.
pub(super) fn front(served: &Served) -> Frontend {
    front_at(&served.socket)
}

/// As [`front`], of the server at a socket.
pub(super) fn front_at(socket: &Path) -> Frontend {
    let mut front = Frontend::from_stream(UnixStream::connect(socket).unwrap(), 1);
    front.set_owner().unwrap();
    let features = front.get_features().unwrap();
    let protocol = front.get_protocol_features().unwrap();
    front.set_protocol_features(protocol).unwrap();
    front.set_hdr_flags(vhost::vhost_user::message::VhostUserHeaderFlag::NEED_REPLY);
    front.set_features(features).unwrap();
    front
}

#[test]
fn a_front_end_cannot_share_memory_that_is_not_there() {
    let served = Served::new(Ram::new(1 << 20), 1);
    let front = || front(&served);
    let file = File::from(rustix::fs::memfd_create("small", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
    file.set_len(1 << 20).unwrap();
    let region = |offset, size| VhostUserMemoryRegionInfo {
        guest_phys_addr: 0,
        memory_size: size,
        userspace_addr: 1 << 40,
        mmap_offset: offset,
        mmap_handle: file.as_raw_fd(),
    };
    for (offset, size) in [(0, 2 << 20), (4096, 1 << 20), (1 << 20, 4096), (1, 4096), (0, 1 << 62)] {
        assert!(front().set_mem_table(&[region(offset, size)]).is_err(), "{size} bytes at {offset}");
        assert!(front().add_mem_region(&region(offset, size)).is_err(), "{size} bytes at {offset}");
    }
    assert!(front().set_mem_table(&[region(0, 4096), region(0, 8192)]).is_err(), "two at one place");
    // Rings that lie elsewhere, partly elsewhere, or askew.
    let addresses = |descriptors, available, used| VringConfigData {
        queue_max_size: 256,
        queue_size: 256,
        flags: 0,
        desc_table_addr: descriptors,
        avail_ring_addr: available,
        used_ring_addr: used,
        log_addr: None,
    };
    let at = |offset: u64| (1 << 40) + offset;
    let end = 1 << 20;
    for config in [
        addresses(at(0), at(8192), at(end)),
        addresses(at(end - 16), at(8192), at(16384)),
        addresses(at(0), at(end - 2), at(16384)),
        addresses(at(0), at(8192), at(end - 8)),
        addresses(at(8), at(8192), at(16384)),
        addresses(at(0), at(8193), at(16384)),
        addresses(!15, at(8192), at(16384)),
    ] {
        let mut front = front();
        front.set_mem_table(&[region(0, end)]).unwrap();
        front.set_vring_num(0, 256).unwrap();
        let kick = EventFd::new(EFD_NONBLOCK).unwrap();
        let set = front
            .set_vring_addr(0, &config)
            .and_then(|()| front.set_vring_kick(0, &kick))
            .map_err(|e| e.to_string())
            .and_then(|()| front.set_vring_enable(0, true).map_err(|e| e.to_string()));
        assert!(set.is_err());
    }
    for size in [3, 2048] {
        assert!(front().set_vring_num(0, size).is_err());
    }
    assert!(front().set_inflight_fd(&VhostUserInflight::new(64, 0, 1, 64), file.as_raw_fd()).is_err());
    assert!(front().set_inflight_fd(&VhostUserInflight::new(1 << 40, 1 << 20, 1, 64), file.as_raw_fd()).is_err());
    assert!(front().get_inflight_fd(&VhostUserInflight::new(0, 0, 2, 64)).is_err());
    assert!(front().get_inflight_fd(&VhostUserInflight::new(0, 0, 1, u16::MAX)).is_err());
    served.guest(1).read(0, 0, 512);
}

#[test]
fn a_front_end_cannot_share_parts_of_huge_pages() {
    const HUGE: u64 = 2 << 20;
    let served = Served::new(Ram::new(1 << 20), 1);
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
    let file = File::from(rustix::fs::memfd_create("huge", flags).unwrap());
    file.set_len(HUGE).unwrap();
    let mut region = VhostUserMemoryRegionInfo {
        guest_phys_addr: 0,
        memory_size: HUGE / 2,
        userspace_addr: 1 << 40,
        mmap_offset: 0,
        mmap_handle: file.as_raw_fd(),
    };
    for offset in [0, HUGE / 2] {
        region.mmap_offset = offset;
        assert!(front(&served).set_mem_table(&[region]).is_err(), "half of one at {offset}");
        assert!(front(&served).add_mem_region(&region).is_err(), "half of one at {offset}");
    }
    assert!(front(&served).set_inflight_fd(&VhostUserInflight::new(HUGE, 0, 1, 64), file.as_raw_fd()).is_err());
    served.guest(1).read(0, 0, 512);
}

#[test]
fn messages_of_any_kind_end_their_connection_and_nothing_else() {
    let served = Served::new(Ram::new(1 << 20), 2);
    let file = File::from(rustix::fs::memfd_create("some", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
    file.set_len(1 << 20).unwrap();
    for seed in seeds(600) {
        let mut dice = Dice::new(seed);
        let mut stream = UnixStream::connect(&served.socket).unwrap();
        for _ in 0..1 + dice.below(12) {
            let mut message = vec![0; 12];
            // Most of them have the form of a message, so that they get further than the first check.
            let size = dice.of(&[0, 8, 8, 8, 12, 16, 20, 40, 60, 300]);
            message[..4].copy_from_slice(&(dice.below(46) as u32).to_le_bytes());
            message[4..8].copy_from_slice(&dice.of(&[1_u32, 1, 9, 9, 5, 0, 0xFFFF_FFFF]).to_le_bytes());
            let said = if dice.below(10) == 0 { dice.below(1 << 32) as u32 } else { size };
            message[8..12].copy_from_slice(&said.to_le_bytes());
            for _ in 0..size {
                let byte = dice.below(256) as u8;
                message.push(dice.of(&[0, 0, 1, 0x40, byte]));
            }
            let cut = if dice.below(10) == 0 { dice.below(message.len() as u64) as usize } else { message.len() };
            let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(9))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            let files = vec![file.as_fd(); dice.of(&[0, 0, 1, 1, 2, 9])];
            if !files.is_empty() {
                assert!(control.push(SendAncillaryMessage::ScmRights(&files)));
            }
            let data = [IoSlice::new(&message[..cut])];
            if rustix::net::sendmsg(&stream, &data, &mut control, SendFlags::NOSIGNAL).is_err() {
                break;
            }
        }
        if dice.below(2) == 0 {
            stream.flush().unwrap();
            stream.shutdown(std::net::Shutdown::Write).unwrap();
        }
    }
    let mut guest = served.guest(2);
    guest.write(0, 0, &[1; 512]);
    assert_eq!(guest.read(1, 0, 512), [1; 512]);
}

#[test]
fn what_is_no_event_is_no_kick_no_call_and_no_memory() {
    let served = Served::new(Ram::new(1 << 20), 1);
    let (pipe, _writer) = rustix::pipe::pipe().unwrap();
    let (socket, _other) = UnixStream::pair().unwrap();
    let memory = File::from(rustix::fs::memfd_create("some", MemfdFlags::CLOEXEC).unwrap());
    memory.set_len(1 << 20).unwrap();
    let event = File::from(rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap());
    let files = [
        File::open("/dev/zero").unwrap(),
        File::open("/proc/self/status").unwrap(),
        File::open("/").unwrap(),
        File::from(pipe),
        File::from(std::os::fd::OwnedFd::from(socket)),
        memory,
        event,
    ];
    for (index, file) in files.into_iter().enumerate() {
        let (is_memory, is_event) = (index == 5, index == 6);
        let mut region = VhostUserMemoryRegionInfo {
            guest_phys_addr: 0,
            memory_size: 4096,
            userspace_addr: 1 << 40,
            mmap_offset: 0,
            mmap_handle: file.as_raw_fd(),
        };
        assert_eq!(front(&served).set_mem_table(&[region]).is_ok(), is_memory, "{index}");
        region.userspace_addr <<= 1;
        assert_eq!(front(&served).add_mem_region(&region).is_ok(), is_memory, "{index}");
        let tracked = VhostUserInflight::new(1 << 16, 0, 1, 64);
        assert_eq!(front(&served).set_inflight_fd(&tracked, file.as_raw_fd()).is_ok(), is_memory, "{index}");
        let file = as_event(file);
        assert_eq!(front(&served).set_vring_kick(0, &file).is_ok(), is_event, "{index}");
        assert_eq!(front(&served).set_vring_call(0, &file).is_ok(), is_event, "{index}");
        assert_eq!(front(&served).set_vring_err(0, &file).is_ok(), is_event, "{index}");
    }
    served.guest(1).read(0, 0, 512);
}

/// Whoever shares an event can say that it makes others wait, and see to it that it does.
#[test]
fn a_call_that_is_full_holds_nothing_up() {
    let mut served = Served::new(Ram::new(1 << 20), 1);
    let mut guest = served.guest(1);
    let call = File::from(rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap());
    let shared = as_event(call.try_clone().unwrap());
    guest.front.as_ref().unwrap().set_vring_call(0, &shared).unwrap();
    rustix::fs::fcntl_setfl(&call, rustix::fs::OFlags::empty()).unwrap();
    // It was rung when it came.
    rustix::io::read(&call, &mut [0; 8]).unwrap();
    rustix::io::write(&call, &(u64::MAX - 1).to_le_bytes()).unwrap();
    for _ in 0..100 {
        guest.notify_after(0, guest.rings[0].seen);
        guest.send(0, 0, 0, &[], 512);
        guest.kick(0);
        crate::real::wait_for("it is not answered", || guest.used(0) != guest.rings[0].seen);
        guest.answer(0);
    }
    let begun = std::time::Instant::now();
    served.server.take().unwrap().stop();
    assert!(begun.elapsed() < std::time::Duration::from_secs(8), "it gave up");
}

#[test]
fn a_front_end_that_takes_memory_away_loses_its_session_and_nothing_else() {
    let ram = Ram::new(1 << 20);
    let served = Served::new(Arc::clone(&ram) as _, 2);
    // All of it, rings included, and only the data of a request that is written.
    for left in [0, (16 << 20) + (512 << 10)] {
        let mut guest = served.guest(2);
        assert_eq!(guest.write(0, 8, &[7; 512]), 0);
        let (header, status) = (guest.put(&header(1, 0)), guest.put(&[0xEE]));
        guest.room(1 << 20);
        let data = guest.put(&[9; 512]);
        let head = guest.chain(1, &[(header, 16, 0), (data, 512, 0), (status, 1, WRITE)]);
        guest.offer(1, head);
        // From here on it is not touched here: to this process it would be what it must not be to the server.
        guest.take_memory_away(left);
        guest.kick(1);
        guest.wait_for_end();
        guest.disconnect();
        assert_eq!(&ram.content()[8 * 512..][..512], &[7; 512]);
    }
    assert!(!ram.log.lock().contains(&("write", 0, 512)), "what is gone was not written");
    let mut guest = served.guest(2);
    assert_eq!(guest.write(0, 0, &[1; 512]), 0);
    assert_eq!(guest.read(1, 8, 512), [7; 512]);
    // The memory in which requests are tracked, too.
    guest.inflight.as_ref().unwrap().1.set_len(0).expect_err("the one we have made is sealed");
    guest.disconnect();
    let file = File::from(rustix::fs::memfd_create("tracked", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
    file.set_len(1 << 16).unwrap();
    let mut guest = super::Guest::new(1);
    guest.inflight = Some((VhostUserInflight::new(1 << 16, 0, 1, SIZE), file.try_clone().unwrap()));
    guest.connect(&served.socket);
    guest.read(0, 0, 512);
    file.set_len(0).unwrap();
    guest.send(0, 0, 0, &[], 512);
    guest.kick(0);
    guest.wait_for_end();
    served.guest(1).read(0, 0, 512);
}

#[test]
fn what_is_to_be_done_again_is_checked_against_the_queue() {
    let served = Served::new(Ram::new(1 << 20), 1);
    // A region of a queue of 1024, for one of 64: marks beyond it, or more marks than it has.
    for heads in [vec![63, 64], (0..65).collect(), vec![1023], (0..1024).collect::<Vec<u64>>()] {
        let file = File::from(rustix::fs::memfd_create("tracked", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
        file.set_len(1 << 16).unwrap();
        let write = |at: u64, bytes: &[u8]| std::os::unix::fs::FileExt::write_all_at(&file, bytes, at).unwrap();
        write(8, &1_u16.to_le_bytes());
        write(10, &1024_u16.to_le_bytes());
        for head in &heads {
            write(16 + 16 * head, &[1]);
        }
        let mut guest = super::Guest::new(1);
        guest.inflight = Some((VhostUserInflight::new(1 << 16, 0, 1, 1024), file));
        let refused = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| guest.connect(&served.socket)));
        assert!(refused.is_err(), "{} heads up to {:?}", heads.len(), heads.last());
        served.guest(1).read(0, 0, 512);
    }
}

#[test]
fn a_front_end_with_regions_of_every_wrong_kind_is_refused() {
    let served = Served::new(Ram::new(1 << 20), 1);
    let file = File::from(rustix::fs::memfd_create("some", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
    file.set_len(1 << 20).unwrap();
    let front = || front(&served);
    let region = |guest, size, theirs| VhostUserMemoryRegionInfo {
        guest_phys_addr: guest,
        memory_size: size,
        userspace_addr: theirs,
        mmap_offset: 0,
        mmap_handle: file.as_raw_fd(),
    };
    for wrong in [
        vec![region(0, 0, 0)],
        vec![region(u64::MAX - 4095, 8192, 0)],
        vec![region(u64::MAX - 4095, 4096, 0), region(0, 4096, 0)],
        vec![region(0, 4096, u64::MAX - 4094)],
        vec![region(0, 8192, 0), region(4096, 8192, 1 << 30)],
        vec![region(8192, 8192, 0), region(0, 12_288, 1 << 30)],
    ] {
        front().set_mem_table(&wrong).unwrap_err();
    }
    // More of them, one by one, than there may be.
    let mut patient = front();
    let mut added = 0_u64;
    while added < 2000 && patient.add_mem_region(&region(added << 20, 4096, added << 20)).is_ok() {
        added += 1;
    }
    assert_eq!(added, 509);
    drop(patient);
    served.guest(1).read(0, 0, 512);
}

#[test]
fn memory_tables_that_do_not_fit_their_descriptors_are_refused() {
    let served = Served::new(Ram::new(1 << 20), 1);
    let file = File::from(rustix::fs::memfd_create("some", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
    file.set_len(1 << 20).unwrap();
    let send = |stream: &UnixStream, code: u32, body: &[u8], files: usize| {
        let head = [code.to_le_bytes(), 9_u32.to_le_bytes(), (body.len() as u32).to_le_bytes()].concat();
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(40))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let files = vec![file.as_fd(); files];
        if !files.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(&files)));
        }
        rustix::net::sendmsg(stream, &[IoSlice::new(&head), IoSlice::new(body)], &mut control, SendFlags::NOSIGNAL)
            .is_ok()
    };
    // What the table says, regions in it, descriptors.
    for (said, regions, files) in [
        (0, 0, 0),
        (1, 1, 0),
        (1, 1, 2),
        (2, 2, 1),
        (8, 8, 1),
        (9, 9, 9),
        (40, 40, 40),
        (2, 1, 2),
        (1, 2, 1),
        (u32::MAX, 1, 1),
        (1, 0, 1),
    ] {
        let mut stream = UnixStream::connect(&served.socket).unwrap();
        let mut body = [said.to_le_bytes(), [0; 4]].concat();
        for n in 0..regions as u64 {
            for number in [n << 20, 4096, n << 20, 0] {
                body.extend_from_slice(&number.to_le_bytes());
            }
        }
        // The features first, so that there is an answer; then that none comes is as good as one that refuses.
        let mut sent = send(&stream, 3, &[], 0) && send(&stream, 2, &(1_u64 << 30).to_le_bytes(), 0);
        sent = sent && send(&stream, 16, &8_u64.to_le_bytes(), 0) && send(&stream, 5, &body, files);
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut answers = Vec::new();
        std::io::Read::read_to_end(&mut stream, &mut answers).ok();
        let last = answers.chunks_exact(20).rfind(|answer| answer[..4] == 5_u32.to_le_bytes());
        let accepted = last.is_some_and(|answer| answer[12..] == [0; 8]);
        assert!(!accepted, "{said} said, {regions} there, {files} descriptors ({sent})");
    }
    served.guest(1).read(0, 0, 512);
}

#[expect(unsafe_code, reason = "an event descriptor is not made of anything else in any other way")]
fn as_event(file: File) -> EventFd {
    use std::os::fd::IntoRawFd;
    // SAFETY: the descriptor is given away, and nothing else has it.
    unsafe { EventFd::from_raw_fd(file.into_raw_fd()) }
}
