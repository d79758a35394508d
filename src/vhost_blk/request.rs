//! Requests of a virtio block device (virtio 1.2, section 5.2.6): parsed, checked and answered.
//!
//! Knows nothing of queues and sockets: a VMM with devices of its own uses it as the vhost-user server does. What is asked
//! for is done by `flight`.
//!
//! # Rules
//! 1. A request is what its buffers say in order, however they are cut: 16 bytes of header and the data to write, then the
//!    data to read and one byte of status. Header, data and status may share a descriptor or be spread over several.
//! 2. Every length and sector is checked before it is used. What is wrong ends the request with an error status; where not
//!    even a status can be written, it is returned with nothing written.
//! 3. Data of a write is copied out of the guest before anything looks at it, once: the guest may change it meanwhile.
//! 4. A request of any length is done in parts, in memory of a fixed size; so no limit is told to the guest.
//!
//! # What unmap means
//! Disks are thin and reserve nothing, so write-zeroes unmaps whole blocks whether or not the guest allows it: there is
//! no space to be kept for it.

use virtio_bindings::bindings::virtio_blk as virtio;
use vm_memory::{Bytes, GuestAddress, GuestMemory};

use super::chain::{Chain, Scatter};
use crate::disk::BlockDevice;

/// Bytes of a sector, the unit of addresses.
pub const SECTOR: u64 = 512;
/// Segments of one discard or write-zeroes at most.
pub const SEGMENTS_MAX: u32 = 256;
/// Sectors of one such segment at most: 2 GiB, so that none takes long.
pub const SEGMENT_SECTORS_MAX: u32 = 1 << 22;
/// Bytes of the answer to "what is your serial number".
pub const SERIAL: usize = 20;
/// Bytes of the header.
const HEADER: u32 = 16;
/// Bytes of a segment.
const SEGMENT: usize = 16;

/// How a request went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    /// Done.
    Ok = 0,
    /// Failed, or makes no sense.
    Failed = 1,
    /// Of a kind the device does not know.
    Unsupported = 2,
}

/// A range of the disk in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// The first byte.
    pub offset: u64,
    /// How many.
    pub len: u64,
}

/// What is asked for.
#[derive(Debug, PartialEq, Eq)]
pub enum What {
    /// Read from here as much as there is room for.
    Read(u64),
    /// Write the data here.
    Write(u64),
    /// Make every write that was answered before durable.
    Flush,
    /// Forget these.
    Discard(Vec<Span>),
    /// Make these zeros.
    WriteZeroes(Vec<Span>),
    /// Tell the serial number.
    Serial,
    /// Nothing: it was refused.
    Refused(Status),
}

/// What a device lets requests do.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// Bytes of the disk, as far as they are whole sectors.
    pub size: u64,
    /// Refuse whatever changes it.
    pub read_only: bool,
}

impl Bounds {
    /// Asks a device.
    pub fn of(device: &dyn BlockDevice, read_only: bool) -> Self {
        Self { size: device.size() / SECTOR * SECTOR, read_only }
    }

    fn span(self, sector: u64, len: u64) -> Option<Span> {
        let offset = sector.checked_mul(SECTOR)?;
        (len.is_multiple_of(SECTOR) && offset.checked_add(len)? <= self.size).then_some(Span { offset, len })
    }
}

/// A request.
#[derive(Debug, PartialEq, Eq)]
pub struct Request {
    /// What is asked for; checked.
    pub what: What,
    /// The data: to be written to the disk, or room for what is read.
    pub data: Scatter,
    /// Where the status goes; `None` when there is no room for it.
    status: Option<GuestAddress>,
}

impl Request {
    /// Takes the request whose chain begins with descriptor `head`.
    #[must_use]
    pub fn take<M: GuestMemory>(memory: &M, table: GuestAddress, size: u16, head: u16, bounds: Bounds) -> Self {
        match Chain::read(memory, table, size, head) {
            Ok(chain) => Self::parse(memory, chain, bounds),
            Err(broken) => {
                tracing::debug!("a guest sent a broken request: {}", broken.0);
                Self { what: What::Refused(Status::Failed), data: Scatter::default(), status: None }
            }
        }
    }

    fn parse<M: GuestMemory>(memory: &M, chain: Chain, bounds: Bounds) -> Self {
        let Chain { mut readable, mut writable } = chain;
        let status = writable.pop();
        let mut header = [0; HEADER as usize];
        if status.is_none() || !readable.copy_out(memory, 0, &mut header) {
            return Self { what: What::Refused(Status::Failed), data: Scatter::default(), status };
        }
        readable.skip(HEADER);
        let kind = u32::from_le_bytes(header[..4].try_into().expect("4 bytes"));
        let sector = u64::from_le_bytes(header[8..].try_into().expect("8 bytes"));
        let what = match kind {
            virtio::VIRTIO_BLK_T_IN if readable.is_empty() => {
                bounds.span(sector, writable.len() as u64).map(|span| What::Read(span.offset))
            }
            virtio::VIRTIO_BLK_T_OUT if writable.is_empty() && !bounds.read_only => {
                bounds.span(sector, readable.len() as u64).map(|span| What::Write(span.offset))
            }
            virtio::VIRTIO_BLK_T_FLUSH => Some(What::Flush),
            virtio::VIRTIO_BLK_T_GET_ID => Some(What::Serial),
            virtio::VIRTIO_BLK_T_DISCARD if !bounds.read_only => {
                Some(spans(memory, &readable, bounds, 0).map_or_else(What::Refused, What::Discard))
            }
            virtio::VIRTIO_BLK_T_WRITE_ZEROES if !bounds.read_only => {
                let unmap = virtio::VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP;
                Some(spans(memory, &readable, bounds, unmap).map_or_else(What::Refused, What::WriteZeroes))
            }
            virtio::VIRTIO_BLK_T_IN
            | virtio::VIRTIO_BLK_T_OUT
            | virtio::VIRTIO_BLK_T_DISCARD
            | virtio::VIRTIO_BLK_T_WRITE_ZEROES => None,
            _ => Some(What::Refused(Status::Unsupported)),
        };
        let what = what.unwrap_or(What::Refused(Status::Failed));
        let data = if matches!(what, What::Write(_)) { readable } else { writable };
        Self { what, data, status }
    }

    /// Writes the status and returns how many bytes the used ring says were written, of which `data` are data.
    #[must_use]
    pub fn answer<M: GuestMemory>(&self, memory: &M, status: Status, data: usize) -> u32 {
        match self.status {
            Some(at) if memory.write_obj(status as u8, at).is_ok() => {
                u32::try_from(data + 1).expect("a chain has less than 4 GiB")
            }
            _ => 0,
        }
    }
}

/// Reads the segments of a discard or write-zeroes.
fn spans<M: GuestMemory>(memory: &M, data: &Scatter, bounds: Bounds, flags: u32) -> Result<Vec<Span>, Status> {
    let len = data.len();
    if len == 0 || !len.is_multiple_of(SEGMENT) || len > SEGMENTS_MAX as usize * SEGMENT {
        return Err(Status::Failed);
    }
    let mut bytes = vec![0; len];
    if !data.copy_out(memory, 0, &mut bytes) {
        return Err(Status::Failed);
    }
    let span = |segment: &[u8]| {
        let sector = u64::from_le_bytes(segment[..8].try_into().expect("8 bytes"));
        let count = u32::from_le_bytes(segment[8..12].try_into().expect("4 bytes"));
        let said = u32::from_le_bytes(segment[12..].try_into().expect("4 bytes"));
        if said & !flags != 0 {
            return Err(Status::Unsupported);
        }
        if count > SEGMENT_SECTORS_MAX {
            return Err(Status::Failed);
        }
        bounds.span(sector, u64::from(count) * SECTOR).ok_or(Status::Failed)
    };
    bytes.chunks_exact(SEGMENT).map(span).collect()
}
