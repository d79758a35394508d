//! Descriptor chains: what a guest says a request consists of, taken apart and checked.
//!
//! `virtio_queue::DescriptorChain` ends quietly where a chain is broken, so that a broken one looks like a short one, and
//! it cannot be made for a chain that is submitted again after a restart. So chains are walked here, strictly.
//!
//! # Rules
//! 1. The guest may change descriptors while they are read: each is read once, and only what was read is used.
//! 2. A chain is whole or it is [`Broken`]: it ends, it has no loop, what the device reads comes before what it writes, no
//!    buffer wraps around the end of the address space, and all of them together have less than 4 GiB.
//! 3. Whether a buffer lies in the memory of the guest shows when it is copied; nothing is reached without that check.

use virtio_bindings::bindings::virtio_ring::VRING_DESC_F_WRITE;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemory};

/// Descriptors of an indirect table at most. A driver that keeps to what the device offers needs 128 of them.
const INDIRECT_MAX: u32 = 4096;
/// Bytes of a descriptor.
const DESCRIPTOR: u32 = 16;

/// Why a chain cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Broken(pub &'static str);

/// Consecutive bytes of guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Buffer {
    at: GuestAddress,
    len: u32,
}

/// Bytes of guest memory, scattered over buffers.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Scatter {
    buffers: Vec<Buffer>,
    len: usize,
}

/// A request as it lies in the memory of a guest.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Chain {
    /// What the device may read.
    pub readable: Scatter,
    /// What the device may write.
    pub writable: Scatter,
}

impl Chain {
    /// Walks the chain that begins with descriptor `head` of the table at `table`, which has `size` descriptors.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn read<M: GuestMemory>(memory: &M, table: GuestAddress, size: u16, head: u16) -> Result<Self, Broken> {
        let mut chain = Self::default();
        let (mut table, mut count, mut index, mut indirect) = (table, u32::from(size), u32::from(head), false);
        let mut left = count;
        loop {
            if index >= count {
                return Err(Broken("a descriptor lies outside of its table"));
            }
            left = left.checked_sub(1).ok_or(Broken("the descriptors form a loop"))?;
            let at = table.checked_add(u64::from(index * DESCRIPTOR)).ok_or(Broken("a table wraps around"))?;
            let descriptor: Descriptor =
                memory.read_obj(at).map_err(|_| Broken("a descriptor lies outside of the memory"))?;
            if descriptor.refers_to_indirect_table() {
                let len = descriptor.len();
                if indirect || descriptor.has_next() {
                    return Err(Broken("an indirect table is in another one, or not the end"));
                }
                if len == 0 || !len.is_multiple_of(DESCRIPTOR) || len / DESCRIPTOR > INDIRECT_MAX {
                    return Err(Broken("an indirect table has a bad length"));
                }
                (table, count, index, indirect) = (descriptor.addr(), len / DESCRIPTOR, 0, true);
                left = count;
                continue;
            }
            chain.add(&descriptor)?;
            if !descriptor.has_next() {
                return Ok(chain);
            }
            index = u32::from(descriptor.next());
        }
    }

    fn add(&mut self, descriptor: &Descriptor) -> Result<(), Broken> {
        let buffer = Buffer { at: descriptor.addr(), len: descriptor.len() };
        buffer.at.checked_add(u64::from(buffer.len)).ok_or(Broken("a buffer wraps around"))?;
        let before = self.readable.len + self.writable.len;
        if u32::try_from(before + buffer.len as usize).is_err() {
            return Err(Broken("the buffers have 4 GiB or more"));
        }
        if u32::from(descriptor.flags()) & VRING_DESC_F_WRITE != 0 {
            self.writable.push(buffer);
        } else if self.writable.len == 0 {
            self.readable.push(buffer);
        } else {
            return Err(Broken("something to read comes after something to write"));
        }
        Ok(())
    }
}

impl Scatter {
    fn push(&mut self, buffer: Buffer) {
        if buffer.len > 0 {
            self.len += buffer.len as usize;
            self.buffers.push(buffer);
        }
    }

    /// Returns the bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Tells whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Takes the last byte off and returns where it is.
    pub fn pop(&mut self) -> Option<GuestAddress> {
        let last = self.buffers.last_mut()?;
        last.len -= 1;
        self.len -= 1;
        let at = last.at.unchecked_add(u64::from(last.len));
        if last.len == 0 {
            self.buffers.pop();
        }
        Some(at)
    }

    /// Drops the first bytes.
    pub fn skip(&mut self, mut bytes: u32) {
        let mut gone = 0;
        for buffer in &mut self.buffers {
            let part = bytes.min(buffer.len);
            buffer.at = buffer.at.unchecked_add(u64::from(part));
            buffer.len -= part;
            bytes -= part;
            self.len -= part as usize;
            if buffer.len > 0 {
                break;
            }
            gone += 1;
        }
        self.buffers.drain(..gone);
    }

    /// Copies the bytes from `from` on out of the guest, as many as `into` has; false when there are not so many, or they
    /// are not in its memory.
    #[must_use]
    pub fn copy_out<M: GuestMemory>(&self, memory: &M, from: usize, into: &mut [u8]) -> bool {
        let mut done = 0;
        self.pieces(from, into.len(), |at, len| {
            let copied = memory.read_slice(&mut into[done..done + len], at).is_ok();
            done += len;
            copied
        })
    }

    /// Copies bytes into the guest, from `from` on; false when there is not so much room, or it is not in its memory.
    #[must_use]
    pub fn copy_in<M: GuestMemory>(&self, memory: &M, from: usize, data: &[u8]) -> bool {
        let mut done = 0;
        self.pieces(from, data.len(), |at, len| {
            let copied = memory.write_slice(&data[done..done + len], at).is_ok();
            done += len;
            copied
        })
    }

    /// Calls `each` with the parts of a range, until it says false.
    fn pieces(&self, mut from: usize, mut len: usize, mut each: impl FnMut(GuestAddress, usize) -> bool) -> bool {
        for buffer in &self.buffers {
            let whole = buffer.len as usize;
            if from >= whole {
                from -= whole;
                continue;
            }
            let part = len.min(whole - from);
            if part > 0 && !each(buffer.at.unchecked_add(from as u64), part) {
                return false;
            }
            len -= part;
            from = 0;
            if len == 0 {
                break;
            }
        }
        len == 0
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::GuestMemoryMmap;

    use super::*;

    const NEXT: u16 = 1;
    const WRITE: u16 = 2;
    const INDIRECT: u16 = 4;

    fn memory(descriptors: &[(u64, u32, u16, u16)]) -> GuestMemoryMmap<()> {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1_0000)]).unwrap();
        for (index, (at, len, flags, next)) in descriptors.iter().enumerate() {
            let descriptor = Descriptor::new(*at, *len, *flags, *next);
            memory.write_obj(descriptor, GuestAddress(index as u64 * 16)).unwrap();
        }
        memory
    }

    fn read(descriptors: &[(u64, u32, u16, u16)]) -> Result<Chain, Broken> {
        let size = descriptors.len() as u16;
        Chain::read(&memory(descriptors), GuestAddress(0), size, 0)
    }

    #[test]
    fn a_chain_is_walked_to_its_end_also_through_a_table() {
        let chain = read(&[(0x1000, 16, NEXT, 2), (0x3000, 1, WRITE, 0), (0x2000, 512, NEXT, 1)]).unwrap();
        assert_eq!((chain.readable.len(), chain.writable.len()), (528, 1));
        let chain =
            read(&[(0x4000, 8, NEXT, 1), (32, 32, INDIRECT, 0), (0x1000, 16, NEXT, 1), (0x3000, 1, WRITE, 0)]).unwrap();
        assert_eq!((chain.readable.len(), chain.writable.len()), (24, 1));
    }

    #[test]
    fn a_broken_chain_is_refused() {
        let broken: [&[(u64, u32, u16, u16)]; 10] = [
            &[(0, 1, NEXT, 0)],
            &[(0, 1, NEXT, 7)],
            &[(0, 1, WRITE | NEXT, 1), (0, 1, 0, 0)],
            &[(u64::MAX, 2, 0, 0)],
            &[(0, u32::MAX, NEXT, 1), (0, u32::MAX, 0, 0)],
            &[(0, 0, INDIRECT, 0)],
            &[(0, 17, INDIRECT, 0)],
            &[(16, 16, INDIRECT, 0), (0, 16, INDIRECT, 0)],
            &[(0, 16, INDIRECT | NEXT, 1), (0, 1, 0, 0)],
            &[(0xFFFF_0000, 16, INDIRECT, 0)],
        ];
        for (number, descriptors) in broken.iter().enumerate() {
            assert!(read(descriptors).is_err(), "chain {number} is broken");
        }
        let fine = memory(&[(0, 1, 0, 0)]);
        assert!(Chain::read(&fine, GuestAddress(0), 1, 1).is_err());
        assert!(Chain::read(&fine, GuestAddress(u64::MAX - 8), 1, 0).is_err());
    }

    #[test]
    fn bytes_are_found_across_buffers() {
        let memory = memory(&[]);
        let mut bytes = Scatter::default();
        for (at, len) in [(0x100, 3), (0x200, 0), (0x300, 2), (0x400, 4)] {
            bytes.push(Buffer { at: GuestAddress(at), len });
        }
        assert!(bytes.copy_in(&memory, 0, b"abcdefghi"));
        assert_eq!(bytes.pop(), Some(GuestAddress(0x403)));
        bytes.skip(4);
        assert_eq!(bytes.len(), 4);
        let mut into = [0; 4];
        assert!(bytes.copy_out(&memory, 0, &mut into));
        assert_eq!(&into, b"efgh");
        assert!(bytes.copy_out(&memory, 1, &mut into[..2]));
        assert_eq!(&into[..2], b"fg");
        assert!(!bytes.copy_out(&memory, 1, &mut into), "there are only three");
        assert!(!bytes.copy_in(&memory, 4, b"x"));
        let mut outside = Scatter::default();
        outside.push(Buffer { at: GuestAddress(0xFFFF), len: 2 });
        assert!(!outside.copy_in(&memory, 0, b"xy") && !outside.copy_out(&memory, 0, &mut into[..2]));
        bytes.skip(9);
        assert!(bytes.is_empty() && bytes.pop().is_none());
    }
}
