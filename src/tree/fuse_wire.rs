//! The few messages of the FUSE protocol that are handled without fuser: include/uapi/linux/fuse.h of Linux.
//!
//! # Rules
//! 1. A request that is not as long as it says, or whose data is not there, is not taken apart: it goes to fuser.
//! 2. Numbers are little-endian: the protocol has the host's order, and the hosts this program runs on have that one.
//!    (The build fails on others.)

use crate::codec::Reader;
use crate::error::Result;

/// READ.
pub(super) const READ: u32 = 15;
/// WRITE.
pub(super) const WRITE: u32 = 16;
/// RELEASE.
pub(super) const RELEASE: u32 = 18;
/// FSYNC.
pub(super) const FSYNC: u32 = 20;
/// INTERRUPT; has no answer, the request it is about has.
pub(super) const INTERRUPT: u32 = 36;
/// FORGET; has no answer.
pub(super) const FORGET: u32 = 2;
/// BATCH_FORGET; has no answer.
pub(super) const BATCH_FORGET: u32 = 42;
/// DESTROY.
pub(super) const DESTROY: u32 = 38;
/// INIT.
const INIT: u32 = 26;
/// Version of the protocol in the greeting that is made up for fuser.
const VERSION: (u32, u32) = (7, 40);

/// Bytes of the header of a request.
pub(super) const HEADER: usize = 40;
/// Bytes of a request to read or write, without the data.
pub(super) const TRANSFER: usize = HEADER + 40;
/// Bytes of the header of an answer.
pub(super) const ANSWER: usize = 16;

const _: () = assert!(cfg!(target_endian = "little"), "the protocol's numbers are read as little-endian");

/// The beginning of a request.
#[derive(Debug, Clone, Copy)]
pub(super) struct Header {
    /// What is asked for.
    pub(super) opcode: u32,
    /// Its number, for the answer.
    pub(super) unique: u64,
    /// The thread that asks; 0 when it cannot be seen from here.
    pub(super) thread: u32,
}

/// A request to read or write.
#[derive(Debug, Clone, Copy)]
pub(super) struct Transfer {
    pub(super) handle: u64,
    pub(super) offset: u64,
    pub(super) size: u32,
    /// Flags of the file and the call.
    pub(super) flags: i32,
}

/// Takes the header off a request; `None` when it is not as long as it says.
pub(super) fn header(message: &[u8]) -> Option<Header> {
    let parse = || -> Result<(usize, Header)> {
        let mut from = Reader::new("a request", message);
        let len = from.u32()? as usize;
        let (opcode, unique) = (from.u32()?, from.u64()?);
        from.raw(16)?;
        let thread = from.u32()?;
        from.raw(4)?;
        Ok((len, Header { opcode, unique, thread }))
    };
    parse().ok().filter(|(len, _)| *len == message.len()).map(|(_, header)| header)
}

/// Takes a request to read or write apart.
pub(super) fn transfer(message: &[u8]) -> Option<Transfer> {
    let parse = || -> Result<Transfer> {
        let mut from = Reader::new("a request", message);
        from.raw(HEADER)?;
        let (handle, offset, size) = (from.u64()?, from.u64()?, from.u32()?);
        from.raw(4 + 8)?;
        let flags = from.u32()?.cast_signed();
        from.raw(4)?;
        Ok(Transfer { handle, offset, size, flags })
    };
    parse().ok()
}

/// Returns the handle of a request to sync or release, or the number of the request that one to interrupt is about.
pub(super) fn handle(message: &[u8]) -> Option<u64> {
    let mut from = Reader::new("a request", message);
    from.raw(HEADER).ok()?;
    from.u64().ok()
}

/// Returns the header of an answer with `len` bytes behind it; `errno` is 0 or positive.
pub(super) fn answer(unique: u64, errno: i32, len: usize) -> [u8; ANSWER] {
    let mut out = [0; ANSWER];
    let total = u32::try_from(ANSWER + len).expect("answers are as small as requests");
    out[..4].copy_from_slice(&total.to_le_bytes());
    out[4..8].copy_from_slice(&errno.wrapping_neg().to_le_bytes());
    out[8..].copy_from_slice(&unique.to_le_bytes());
    out
}

/// Returns the answer to a write of `len` bytes.
pub(super) fn written(unique: u64, len: u32) -> [u8; ANSWER + 8] {
    let mut out = [0; ANSWER + 8];
    out[..ANSWER].copy_from_slice(&answer(unique, 0, 8));
    out[ANSWER..ANSWER + 4].copy_from_slice(&len.to_le_bytes());
    out
}

fn request(opcode: u32, body: &[u8]) -> Vec<u8> {
    let mut out = vec![0; HEADER];
    let len = u32::try_from(HEADER + body.len()).expect("short");
    out[..4].copy_from_slice(&len.to_le_bytes());
    out[4..8].copy_from_slice(&opcode.to_le_bytes());
    // Its number: requests of the kernel have even ones.
    out[8..16].copy_from_slice(&1u64.to_le_bytes());
    out.extend_from_slice(body);
    out
}

/// Bytes of read-ahead in the made-up greeting; fuser adds to it, so it is not just the largest number.
const READ_AHEAD: u32 = 1 << 20;

/// Returns a greeting, as the kernel would send it, that offers everything: the real one has been answered already.
pub(super) fn greeting() -> Vec<u8> {
    let mut body = [0; 64];
    body[..4].copy_from_slice(&VERSION.0.to_le_bytes());
    body[4..8].copy_from_slice(&VERSION.1.to_le_bytes());
    body[8..12].copy_from_slice(&READ_AHEAD.to_le_bytes());
    body[12..20].fill(0xff);
    request(INIT, &body)
}

/// Returns a farewell, as the kernel would send it.
pub(super) fn farewell() -> Vec<u8> {
    request(DESTROY, &[])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_taken_apart_only_if_it_is_as_long_as_it_says() {
        let mut body = [0; 40];
        body[0] = 3;
        body[8] = 4;
        body[16] = 5;
        body[33] = 6;
        let message = request(WRITE, &body);
        assert_eq!(header(&message).unwrap().opcode, WRITE);
        let transfer = transfer(&message).unwrap();
        assert_eq!((transfer.handle, transfer.offset, transfer.size, transfer.flags), (3, 4, 5, 6 << 8));
        assert_eq!(handle(&message), Some(3));
        for len in 0..message.len() {
            assert!(header(&message[..len]).is_none());
        }
        assert!(super::transfer(&message[..TRANSFER - 1]).is_none());
    }

    #[test]
    fn answers_are_as_the_kernel_wants_them() {
        assert_eq!(answer(9, 5, 1), [17, 0, 0, 0, 251, 255, 255, 255, 9, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(written(1, 4096)[16..], [0, 16, 0, 0, 0, 0, 0, 0]);
    }
}
