//! What the device tells a guest about itself: features and the configuration space (virtio 1.2, sections 5.2.3, 5.2.4).
//!
//! # Rules
//! 1. The size is asked for anew each time, so a resize needs only that the guest looks again.
//! 2. No `SIZE_MAX`: a request of any length is done in memory of a fixed size, so there is no limit to tell.
//! 3. No `CONFIG_WCE`: the cache is write-back and a flush means what it says. A driver that does not know FLUSH gets
//!    every write flushed before it is answered (virtio 1.2, section 5.2.6.2).

use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use virtio_bindings::bindings::virtio_blk as virtio;
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::request::{SECTOR, SEGMENT_SECTORS_MAX, SEGMENTS_MAX};
use crate::units::BLOCK_SIZE;

/// Bytes of the configuration space, up to what is known of zoned devices.
const CONFIG: usize = 96;
/// Bytes a front end can ask for at most (the vhost-user protocol).
const CONFIG_MAX: usize = 256;
/// Segments of data in one request: with header and status 128 descriptors, the queue size QEMU takes unasked.
const SEGMENTS: u32 = 126;
/// Entries of a queue at most.
pub(super) const QUEUE_SIZE_MAX: u16 = 1024;

/// What a vhost-user server offers that is nothing to a guest.
pub(crate) const VHOST_USER_FEATURES: u64 = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();

/// Returns the features of a device.
pub(crate) fn features(read_only: bool, queues: usize) -> u64 {
    let bit = |number: u32| 1_u64 << number;
    let mut features = bit(VIRTIO_F_VERSION_1)
        | bit(VIRTIO_RING_F_EVENT_IDX)
        | bit(VIRTIO_RING_F_INDIRECT_DESC)
        | bit(virtio::VIRTIO_BLK_F_SEG_MAX)
        | bit(virtio::VIRTIO_BLK_F_BLK_SIZE)
        | bit(virtio::VIRTIO_BLK_F_TOPOLOGY)
        | bit(virtio::VIRTIO_BLK_F_FLUSH)
        | VHOST_USER_FEATURES;
    if queues > 1 {
        features |= bit(virtio::VIRTIO_BLK_F_MQ);
    }
    if read_only {
        features |= bit(virtio::VIRTIO_BLK_F_RO);
    } else {
        features |= bit(virtio::VIRTIO_BLK_F_DISCARD) | bit(virtio::VIRTIO_BLK_F_WRITE_ZEROES);
    }
    features
}

/// Returns what of the vhost-user protocol is known beyond its beginnings.
pub(super) fn protocol_features() -> VhostUserProtocolFeatures {
    VhostUserProtocolFeatures::MQ
        | VhostUserProtocolFeatures::CONFIG
        | VhostUserProtocolFeatures::REPLY_ACK
        | VhostUserProtocolFeatures::BACKEND_REQ
        | VhostUserProtocolFeatures::INFLIGHT_SHMFD
        | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
}

/// Tells whether a driver with these features knows of flushes.
pub(crate) fn flushes(features: u64) -> bool {
    features & (1 << virtio::VIRTIO_BLK_F_FLUSH) != 0
}

/// Tells whether a driver with these features says at which index it wants to be notified.
pub(crate) fn event_index(features: u64) -> bool {
    features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0
}

/// Returns a part of the configuration space of a disk of `size` bytes; `None` for a part that it cannot have.
pub(crate) fn space(size: u64, queues: usize, offset: u32, len: u32) -> Option<Vec<u8>> {
    let (offset, len) = (usize::try_from(offset).ok()?, usize::try_from(len).ok()?);
    let end = offset.checked_add(len).filter(|end| *end <= CONFIG_MAX)?;
    let mut space = vec![0; CONFIG_MAX.max(CONFIG)];
    let mut put = |at: usize, bytes: &[u8]| space[at..at + bytes.len()].copy_from_slice(bytes);
    let blocks_per_sector = u16::try_from(BLOCK_SIZE / SECTOR).expect("eight");
    put(0, &(size / SECTOR).to_le_bytes());
    put(12, &SEGMENTS.to_le_bytes());
    put(20, &u32::try_from(SECTOR).expect("512").to_le_bytes());
    // Topology: a physical block is 2^3 logical ones; the best I/O begins on one and is whole ones.
    put(24, &[u8::try_from(blocks_per_sector.trailing_zeros()).expect("three"), 0]);
    put(26, &blocks_per_sector.to_le_bytes());
    // Write-back.
    put(32, &[1]);
    put(34, &u16::try_from(queues).expect("checked at the start").to_le_bytes());
    // Discard: sectors of a segment, segments, alignment; write-zeroes: the same without alignment, and that it unmaps.
    put(36, &SEGMENT_SECTORS_MAX.to_le_bytes());
    put(40, &SEGMENTS_MAX.to_le_bytes());
    put(44, &u32::from(blocks_per_sector).to_le_bytes());
    put(48, &SEGMENT_SECTORS_MAX.to_le_bytes());
    put(52, &SEGMENTS_MAX.to_le_bytes());
    put(56, &[1]);
    Some(space[offset..end].to_vec())
}
