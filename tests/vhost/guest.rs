//! A front end and its guest: memory, rings and the requests that go through them.

use std::fs::File;
use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{Ordering, fence};
use std::time::Duration;

use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserInflight, VhostUserProtocolFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;
pub(crate) const INDIRECT: u16 = 4;
/// Entries of each queue.
pub(crate) const SIZE: u16 = 64;
/// How long an answer may take on a machine that is busy.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);
/// Bytes of each of the two regions; the second begins at 4 GiB.
const REGION: u64 = 16 << 20;
const HIGH: u64 = 4 << 30;
const EVENT_INDEX: u64 = 1 << 29;

pub(crate) struct Ring {
    index: usize,
    pub(crate) kick: EventFd,
    pub(crate) call: EventFd,
    /// The next index of the ring of available requests, and the next of the used ones.
    pub(crate) available: u16,
    pub(crate) seen: u16,
    /// Where the next descriptors go.
    next: u16,
}

impl Ring {
    /// Waits until the server notifies.
    pub(crate) fn wait(&self) {
        let epoll = Epoll::new().unwrap();
        epoll.ctl(ControlOperation::Add, self.call.as_raw_fd(), EpollEvent::new(EventSet::IN, 0)).unwrap();
        let mut events = [EpollEvent::default()];
        let patience = i32::try_from(PATIENCE.as_millis()).unwrap();
        assert_eq!(epoll.wait(patience, &mut events).unwrap(), 1, "no notification of queue {}", self.index);
        self.call.read().unwrap();
    }
}

pub(crate) struct Guest {
    pub(crate) memory: GuestMemoryMmap,
    pub(crate) rings: Vec<Ring>,
    pub(crate) front: Option<Frontend>,
    pub(crate) features: u64,
    pub(crate) refused: u64,
    pub(crate) inflight: Option<(VhostUserInflight, File)>,
    channel: Option<UnixStream>,
    /// Where the next data goes, in the high region.
    data: u64,
}

fn ring_at(index: usize) -> u64 {
    index as u64 * 0x1_0000
}

impl Guest {
    pub(crate) fn new(queues: usize) -> Self {
        let file = File::from(rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
        file.set_len(2 * REGION).unwrap();
        let copy = || file.try_clone().unwrap();
        let memory = GuestMemoryMmap::from_ranges_with_files([
            (GuestAddress(0), REGION as usize, Some(FileOffset::new(copy(), 0))),
            (GuestAddress(HIGH), REGION as usize, Some(FileOffset::new(copy(), REGION))),
        ])
        .unwrap();
        let event = || EventFd::new(EFD_NONBLOCK).unwrap();
        let ring = |index| Ring { index, kick: event(), call: event(), available: 0, seen: 0, next: 0 };
        let rings = (0..queues).map(ring).collect();
        Self { memory, rings, front: None, features: 0, refused: 0, inflight: None, channel: None, data: HIGH }
    }

    /// Connects and sets everything up; after a disconnect it goes on where it was, as QEMU does.
    pub(crate) fn connect(&mut self, socket: &Path) {
        let stream = UnixStream::connect(socket).unwrap();
        let mut front = Frontend::from_stream(stream, self.rings.len() as u64);
        front.set_owner().unwrap();
        self.features = front.get_features().unwrap() & !self.refused;
        let protocol = front.get_protocol_features().unwrap();
        front.set_protocol_features(protocol).unwrap();
        assert!(protocol.contains(VhostUserProtocolFeatures::REPLY_ACK));
        front.set_hdr_flags(vhost::vhost_user::message::VhostUserHeaderFlag::NEED_REPLY);
        assert!(front.get_queue_num().unwrap() as usize >= self.rings.len());
        let (ours, theirs) = UnixStream::pair().unwrap();
        front.set_backend_request_fd(&theirs).unwrap();
        self.channel = Some(ours);
        front.set_features(self.features).unwrap();
        let regions: Vec<_> =
            self.memory.iter().map(|region| VhostUserMemoryRegionInfo::from_guest_region(region).unwrap()).collect();
        front.set_mem_table(&regions).unwrap();
        let inflight = self.inflight.take().unwrap_or_else(|| {
            front.get_inflight_fd(&VhostUserInflight::new(0, 0, self.rings.len() as u16, SIZE)).unwrap()
        });
        front.set_inflight_fd(&inflight.0, inflight.1.as_raw_fd()).unwrap();
        self.inflight = Some(inflight);
        for ring in &self.rings {
            self.begin(&front, ring, self.used(ring.index));
        }
        for ring in &self.rings {
            front.set_vring_enable(ring.index, true).unwrap();
        }
        self.front = Some(front);
    }

    /// Sets one ring up.
    pub(crate) fn begin(&self, front: &Frontend, ring: &Ring, base: u16) {
        let at = |offset| self.memory.get_host_address(GuestAddress(ring_at(ring.index) + offset)).unwrap() as u64;
        let config = VringConfigData {
            queue_max_size: SIZE,
            queue_size: SIZE,
            flags: 0,
            desc_table_addr: at(0),
            avail_ring_addr: at(0x4000),
            used_ring_addr: at(0x8000),
            log_addr: None,
        };
        front.set_vring_num(ring.index, SIZE).unwrap();
        front.set_vring_base(ring.index, base).unwrap();
        front.set_vring_addr(ring.index, &config).unwrap();
        front.set_vring_kick(ring.index, &ring.kick).unwrap();
        front.set_vring_call(ring.index, &ring.call).unwrap();
    }

    /// Shortens the file of its memory, which it must not touch any more.
    pub(crate) fn take_memory_away(&self, left: u64) {
        let region = self.memory.iter().next().unwrap();
        region.file_offset().unwrap().file().set_len(left).unwrap();
    }

    /// Waits until the server has ended the connection.
    pub(crate) fn wait_for_end(&mut self) {
        let channel = self.channel.as_mut().unwrap();
        channel.set_read_timeout(Some(PATIENCE)).unwrap();
        assert_eq!(channel.read(&mut [0; 12]).unwrap(), 0);
    }

    /// Goes away without a word.
    pub(crate) fn disconnect(&mut self) {
        self.front = None;
        self.channel = None;
    }

    pub(crate) fn config(&mut self, offset: u32, len: u32) -> Vec<u8> {
        let front = self.front.as_mut().unwrap();
        let wanted = vec![0; len as usize];
        front.get_config(offset, len, VhostUserConfigFlags::empty(), &wanted).unwrap().1
    }

    /// Returns the next message on the channel from the server.
    pub(crate) fn message(&mut self) -> [u8; 12] {
        let mut message = [0; 12];
        let channel = self.channel.as_mut().unwrap();
        channel.set_read_timeout(Some(PATIENCE)).unwrap();
        channel.read_exact(&mut message).unwrap();
        message
    }

    /// Takes room for data.
    pub(crate) fn room(&mut self, len: usize) -> u64 {
        if self.data + len as u64 > HIGH + REGION {
            self.data = HIGH;
        }
        self.data += len as u64;
        self.data - len as u64
    }

    pub(crate) fn put(&mut self, bytes: &[u8]) -> u64 {
        let at = self.room(bytes.len());
        self.memory.write_slice(bytes, GuestAddress(at)).unwrap();
        at
    }

    pub(crate) fn get(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }

    pub(crate) fn used(&self, queue: usize) -> u16 {
        self.memory.load(GuestAddress(ring_at(queue) + 0x8002), Ordering::Acquire).unwrap()
    }

    /// Writes one descriptor.
    pub(crate) fn describe(&self, at: u64, (address, len, flags, next): (u64, u32, u16, u16)) {
        self.memory.write_obj(address, GuestAddress(at)).unwrap();
        self.memory.write_obj(len, GuestAddress(at + 8)).unwrap();
        self.memory.write_obj(flags, GuestAddress(at + 12)).unwrap();
        self.memory.write_obj(next, GuestAddress(at + 14)).unwrap();
    }

    /// Writes a chain of buffers (address, length, flags without NEXT) and returns its head.
    pub(crate) fn chain(&mut self, queue: usize, buffers: &[(u64, u32, u16)]) -> u16 {
        let count = buffers.len() as u16;
        let ring = &mut self.rings[queue];
        if ring.next + count > SIZE {
            ring.next = 0;
        }
        let head = ring.next;
        ring.next += count;
        self.write_chain(ring_at(queue), head, buffers);
        head
    }

    pub(crate) fn write_chain(&self, table: u64, head: u16, buffers: &[(u64, u32, u16)]) {
        for (index, (at, len, flags)) in (head..).zip(buffers) {
            let more = usize::from(index - head) + 1 < buffers.len();
            let flags = if more { flags | NEXT } else { *flags };
            self.describe(table + u64::from(index) * 16, (*at, *len, flags, index + 1));
        }
    }

    /// Puts a head into the ring of available requests.
    pub(crate) fn offer(&mut self, queue: usize, head: u16) {
        let ring = &mut self.rings[queue];
        let at = ring_at(queue) + 0x4000;
        self.memory.write_obj(head, GuestAddress(at + 4 + u64::from(ring.available % SIZE) * 2)).unwrap();
        ring.available = ring.available.wrapping_add(1);
        self.memory.store(ring.available, GuestAddress(at + 2), Ordering::Release).unwrap();
    }

    pub(crate) fn kick(&self, queue: usize) {
        fence(Ordering::SeqCst);
        self.rings[queue].kick.write(1).unwrap();
    }

    /// Says after which answer it wants to be notified (the event index).
    pub(crate) fn notify_after(&self, queue: usize, index: u16) {
        let at = ring_at(queue) + 0x4000 + 4 + u64::from(SIZE) * 2;
        self.memory.store(index, GuestAddress(at), Ordering::Release).unwrap();
        fence(Ordering::SeqCst);
    }

    /// Waits for the next answer: its head, and the bytes that were written.
    pub(crate) fn answer(&mut self, queue: usize) -> (u16, u32) {
        loop {
            let seen = self.rings[queue].seen;
            if self.features & EVENT_INDEX != 0 {
                self.notify_after(queue, seen);
            }
            if self.used(queue) != seen {
                let at = GuestAddress(ring_at(queue) + 0x8004 + u64::from(seen % SIZE) * 8);
                self.rings[queue].seen = seen.wrapping_add(1);
                let [head, len]: [u32; 2] = self.memory.read_obj(at).unwrap();
                return (head as u16, len);
            }
            self.rings[queue].wait();
        }
    }

    /// Sends a request and returns its head and where the status and the data to read will be.
    pub(crate) fn send(&mut self, queue: usize, kind: u32, sector: u64, out: &[u8], room: usize) -> Sent {
        let header = self.put(&header(kind, sector));
        let status = self.put(&[0xEE]);
        let data = self.room(room);
        let mut buffers = vec![(header, 16, 0)];
        if !out.is_empty() {
            buffers.push((self.put(out), out.len() as u32, 0));
        }
        if room > 0 {
            buffers.push((data, room as u32, WRITE));
        }
        buffers.push((status, 1, WRITE));
        let head = self.chain(queue, &buffers);
        self.offer(queue, head);
        Sent { head, status, data, room }
    }

    /// Sends a request, waits for its answer and returns status and data.
    pub(crate) fn ask(&mut self, queue: usize, kind: u32, sector: u64, out: &[u8], room: usize) -> (u8, Vec<u8>) {
        let sent = self.send(queue, kind, sector, out, room);
        self.kick(queue);
        let (head, len) = self.answer(queue);
        assert_eq!(head, sent.head);
        let status = self.get(sent.status, 1)[0];
        assert_eq!(len as usize, if status == 0 { 1 + sent.room } else { 1 });
        (status, self.get(sent.data, room))
    }

    pub(crate) fn write(&mut self, queue: usize, sector: u64, data: &[u8]) -> u8 {
        self.ask(queue, OUT, sector, data, 0).0
    }

    pub(crate) fn read(&mut self, queue: usize, sector: u64, len: usize) -> Vec<u8> {
        let (status, data) = self.ask(queue, IN, sector, &[], len);
        assert_eq!(status, 0);
        data
    }
}

pub(crate) struct Sent {
    pub(crate) head: u16,
    pub(crate) status: u64,
    pub(crate) data: u64,
    pub(crate) room: usize,
}

pub(crate) const IN: u32 = 0;
pub(crate) const OUT: u32 = 1;
pub(crate) const FLUSH: u32 = 4;
pub(crate) const ID: u32 = 8;
pub(crate) const DISCARD: u32 = 11;
pub(crate) const ZEROES: u32 = 13;

pub(crate) fn header(kind: u32, sector: u64) -> [u8; 16] {
    let mut header = [0; 16];
    header[..4].copy_from_slice(&kind.to_le_bytes());
    header[8..].copy_from_slice(&sector.to_le_bytes());
    header
}

/// A segment of a discard.
pub(crate) fn segment(sector: u64, count: u32, flags: u32) -> [u8; 16] {
    let mut segment = [0; 16];
    segment[..8].copy_from_slice(&sector.to_le_bytes());
    segment[8..12].copy_from_slice(&count.to_le_bytes());
    segment[12..].copy_from_slice(&flags.to_le_bytes());
    segment
}
