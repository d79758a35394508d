//! What Firecracker says of its memory: one message with all its regions, and the userfaultfd beside it.
//!
//! ```text
//! [{"base_host_virt_addr": u64, "size": u64, "offset": u64, "page_size": u64, "page_size_kib": u64}, ...]   and SCM_RIGHTS
//! ```
//!
//! `offset` is where the region is in the memory file, not where the guest has it. `page_size_kib` is in bytes in spite of its name, and
//! older versions have that alone; the oldest have neither, and pages of 4 KiB. What else is said is for others.
//!
//! # Rules
//! 1. The message has no length: it is over when it is a whole piece of JSON. Descriptors may come with any byte of it.
//! 2. There is one descriptor. Three are of a Firecracker that keeps the memory of its guest from the host, two of one that has it in a
//!    file; neither is served by what one descriptor can do, so both are refused by name.
//! 3. Each number is compared with the others and with the checkpoint before anything is done with it: regions are of whole
//!    pages, are disjoint there and here, and are all of the memory.

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags};
use serde::Deserialize;

use crate::checkpoint::{Geometry, REGIONS_MAX, Region};
use crate::error::{Error, Result};
use crate::sys::guest::{GuestRegion, PAGE};
use crate::sys::pages::HUGE_PAGE;

/// Most bytes of the message: seven hundred regions.
const MESSAGE_MAX: usize = 64 << 10;
/// Descriptors that are looked at.
const DESCRIPTORS_MAX: usize = 8;

/// A region, as it is said.
#[derive(Debug, Deserialize)]
struct Said {
    base_host_virt_addr: u64,
    size: u64,
    offset: u64,
    page_size: Option<u64>,
    page_size_kib: Option<u64>,
}

/// The memory of a machine of Firecracker.
#[derive(Debug)]
pub struct Layout {
    /// Bytes of a page.
    pub page: u64,
    /// The regions, in the order in which they are in the memory file.
    pub regions: Vec<GuestRegion>,
    /// How they are cut up.
    pub geometry: Geometry,
}

/// What has come of a message.
#[derive(Debug, Default)]
pub(super) struct Message {
    text: Vec<u8>,
    descriptors: Vec<OwnedFd>,
    regions: Option<Vec<Said>>,
}

fn wrong(why: impl std::fmt::Display) -> Error {
    Error::failed(format!("what connected is not served: {why}"))
        .hint("Firecracker is to connect by itself: give it the socket as mem_backend with backend_type Uffd")
}

impl Message {
    /// Takes what has come; false at the end of the connection. It is over when [`Self::is_whole`].
    pub(super) fn receive(&mut self, from: &UnixStream) -> Result<bool> {
        let mut bytes = vec![0; MESSAGE_MAX - self.text.len()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
        let mut beside = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
        let got = rustix::net::recvmsg(from, &mut [IoSliceMut::new(&mut bytes)], &mut beside, flags);
        let got = match got {
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return Ok(true),
            got => got.map_err(|error| Error::io("cannot read what Firecracker says", io::Error::from(error)))?,
        };
        for message in beside.drain() {
            if let RecvAncillaryMessage::ScmRights(descriptors) = message {
                self.descriptors.extend(descriptors);
            }
        }
        if got.flags.contains(ReturnFlags::CTRUNC) || self.descriptors.len() > DESCRIPTORS_MAX {
            return Err(wrong("it sent more descriptors than one"));
        }
        self.text.extend_from_slice(&bytes[..got.bytes]);
        if got.bytes > 0 {
            self.parse()?;
        }
        Ok(got.bytes > 0)
    }

    fn parse(&mut self) -> Result<()> {
        match serde_json::from_slice(&self.text) {
            Ok(regions) => self.regions = Some(regions),
            Err(error) if error.is_eof() && self.text.len() < MESSAGE_MAX => {}
            Err(_) if self.text.len() >= MESSAGE_MAX => {
                return Err(wrong(format!("it said more than {MESSAGE_MAX} bytes")));
            }
            Err(error) => return Err(wrong(format!("what it said of its memory makes no sense ({error})"))),
        }
        Ok(())
    }

    pub(super) fn is_empty(&self) -> bool {
        self.text.is_empty()
    }

    pub(super) fn is_whole(&self) -> bool {
        self.regions.is_some()
    }

    /// Returns the memory, which must be that of a checkpoint, and the descriptor of its faults.
    pub(super) fn take(self, of: &Geometry) -> Result<(Layout, OwnedFd)> {
        let Some(regions) = self.regions else {
            return Err(wrong(format!("it hung up after {} bytes of what it had to say", self.text.len())));
        };
        let mut descriptors = self.descriptors;
        let one = descriptors.pop();
        match (one, descriptors.len()) {
            (Some(one), 0) => Ok((layout(regions, of).map_err(wrong)?, one)),
            (None, _) => Err(wrong("it sent no userfaultfd")),
            (_, 1) => Err(wrong(
                "it sent two descriptors, so it is a Firecracker that has the memory of its guest in a file (use_memfd), and only \
                 anonymous memory is served",
            )),
            (_, 2) => Err(wrong(
                "it sent three descriptors, so it is a Firecracker that hides the memory of its guest from the host (secret hiding, \
                 guest_memfd), which only Firecracker itself can fill",
            )),
            (_, more) => Err(wrong(format!("it sent {} descriptors and not one", more + 1))),
        }
    }
}

/// Reads a whole message that is in memory, for those who test it.
///
/// # Errors
/// As a handshake.
pub fn decode(text: &[u8], of: &Geometry) -> Result<Layout> {
    let regions = serde_json::from_slice(text).map_err(wrong)?;
    layout(regions, of).map_err(wrong)
}

/// Checks all numbers.
fn layout(mut said: Vec<Said>, of: &Geometry) -> Result<Layout, String> {
    if said.is_empty() || said.len() > REGIONS_MAX {
        return Err(format!("it has {} regions of memory, and from 1 to {REGIONS_MAX} are possible", said.len()));
    }
    let page_of = |said: &Said| said.page_size.or(said.page_size_kib).unwrap_or(PAGE);
    let page = page_of(&said[0]);
    if said.iter().any(|one| page_of(one) != page) {
        return Err("its regions have pages of different sizes".to_owned());
    }
    if page != PAGE && page != HUGE_PAGE as u64 {
        return Err(format!("it has pages of {page} bytes, and {PAGE} and {HUGE_PAGE} are possible"));
    }
    said.sort_unstable_by_key(|one| one.base_host_virt_addr);
    let mut mapped = 0;
    for one in &said {
        let Said { base_host_virt_addr: at, size, .. } = *one;
        let end = at.checked_add(size).ok_or_else(|| format!("its region at {at:#x} has {size} bytes"))?;
        if at < mapped {
            return Err(format!("its region at {at:#x} begins within another one"));
        }
        mapped = end;
    }
    said.sort_unstable_by_key(|one| one.offset);
    let unit = page.max(of.page_block() as u64);
    let memory = of.memory();
    let (mut next, mut regions, mut list) = (0, Vec::new(), Vec::new());
    for one in &said {
        let Said { base_host_virt_addr: at, size, offset, .. } = *one;
        let what = || format!("its region of {size} bytes at {at:#x}, byte {offset} of the memory file,");
        let whole = [at, size, offset].iter().all(|bytes| bytes.is_multiple_of(page));
        if !whole || size == 0 {
            return Err(format!("{} is not of whole pages of {page} bytes", what()));
        }
        let end = offset.checked_add(size).filter(|end| *end <= memory);
        let Some(end) = end else { return Err(format!("{} ends beyond the {memory} bytes of the checkpoint", what())) };
        if offset != next {
            return Err(format!("{} does not follow the one before it, which ends at byte {next}", what()));
        }
        if !offset.is_multiple_of(unit) {
            return Err(format!("{} does not begin with a page block of {unit} bytes", what()));
        }
        next = end;
        list.push(Region { address: offset, length: size });
        regions
            .push(GuestRegion::elsewhere(at, size, offset).map_err(|error| format!("{} cannot be: {error}", what()))?);
    }
    if next != memory {
        return Err(format!("it has {next} bytes of memory, and the checkpoint {memory}"));
    }
    let fits = || -> Option<Geometry> {
        let geometry = Geometry::new(of.sizes(), &list).ok()?;
        let parts = u32::try_from(unit / of.page_block() as u64).ok()?;
        let (geometry, of) = (geometry.coarser(parts)?, of.coarser(parts)?);
        geometry.cuts_as(&of).then_some(geometry)
    };
    let geometry = fits().ok_or("its memory cannot be cut up as that of the checkpoint is")?;
    Ok(Layout { page, regions, geometry })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::Sizes;

    const MIB: u64 = 1 << 20;

    fn of(bytes: u64) -> Geometry {
        Geometry::new(Sizes::USUAL, &[Region { address: 0, length: bytes }]).unwrap()
    }

    fn region(at: u64, size: u64, offset: u64, more: &str) -> String {
        format!(r#"{{"base_host_virt_addr":{at},"size":{size},"offset":{offset}{more}}}"#)
    }

    fn told(regions: &[String], bytes: u64) -> String {
        let text = format!("[{}]", regions.join(","));
        decode(text.as_bytes(), &of(bytes)).unwrap_err().to_string()
    }

    #[test]
    fn what_firecracker_says_is_understood() {
        for (more, page) in [
            ("", 4096),
            (r#","page_size_kib":4096"#, 4096),
            (r#","page_size_kib":2097152"#, 2 * MIB),
            (r#","page_size":2097152,"page_size_kib":4096,"new":{"x":[1,null]}"#, 2 * MIB),
            (r#","page_size":null,"page_size_kib":null"#, 4096),
        ] {
            let regions = [region(1 << 45, 4 * MIB, 6 * MIB, more), region(1 << 46, 6 * MIB, 0, more)];
            let text = format!(" [{}]\n", regions.join(", "));
            let layout = decode(text.as_bytes(), &of(10 * MIB)).unwrap();
            assert_eq!((layout.page, layout.regions.len(), layout.geometry.memory()), (page, 2, 10 * MIB));
            assert_eq!(layout.regions[0].part_of(0, u64::MAX), Some(0..6 * MIB), "in the order of the file");
            assert_eq!(layout.geometry.page_block() as u64, page.max(65_536));
        }
        let short = [region(0, MIB + 4096, 0, "")];
        decode(format!("[{}]", short[0]).as_bytes(), &of(MIB + 4096)).unwrap();
    }

    #[test]
    fn each_number_is_checked() {
        let one = |at, size, offset, more: &str, bytes| told(&[region(at, size, offset, more)], bytes);
        assert!(told(&[], MIB).contains("0 regions"));
        assert!(one(1, MIB, 0, "", MIB).contains("whole pages"));
        assert!(one(0, MIB + 1, 0, "", MIB).contains("whole pages"));
        assert!(one(0, 0, 0, "", MIB).contains("whole pages"));
        assert!(one(0, MIB, 5, "", MIB).contains("whole pages"));
        assert!(one(MIB, MIB, 0, r#","page_size":2097152"#, MIB).contains("whole pages"));
        assert!(one(0, MIB, 0, r#","page_size":16384"#, MIB).contains("pages of 16384 bytes"));
        assert!(one(0, MIB, 0, r#","page_size":0"#, MIB).contains("pages of 0 bytes"));
        assert!(one(u64::MAX - 4095, MIB, 0, "", MIB).contains("has 1048576 bytes"));
        assert!(one(0, MIB, u64::MAX - 4095, "", MIB).contains("beyond"));
        assert!(one(0, u64::MAX - 4095, 0, "", MIB).contains("beyond"));
        assert!(one(0, 2 * MIB, 0, "", MIB).contains("beyond"));
        assert!(one(0, MIB, 0, "", 2 * MIB).contains("the checkpoint 2097152"));
        assert!(one(0, MIB, MIB, "", 2 * MIB).contains("does not follow"));
        let two =
            |a: [u64; 3], b: [u64; 3]| told(&[region(a[0], a[1], a[2], ""), region(b[0], b[1], b[2], "")], 2 * MIB);
        assert!(two([0, MIB, 0], [MIB - 4096, MIB, MIB]).contains("within another one"));
        assert!(two([0, MIB, 0], [MIB, MIB, MIB - 4096]).contains("does not follow"));
        assert!(two([0, MIB + 4096, 0], [8 * MIB, MIB - 4096, MIB + 4096]).contains("page block of 65536"));
        let mixed = [region(0, MIB, 0, ""), region(MIB * 8, MIB, MIB, r#","page_size":2097152"#)];
        assert!(told(&mixed, 2 * MIB).contains("different sizes"));
        let many: Vec<_> = (0..1025).map(|n| region(n << 32, 65_536, n * 65_536, "")).collect();
        assert!(told(&many, 1025 * 65_536).contains("1025 regions"));
        for text in ["", "{}", "[{}]", "[1]", r#"[{"base_host_virt_addr":-1,"size":1,"offset":1}]"#, "null", "[] x"] {
            decode(text.as_bytes(), &of(MIB)).unwrap_err();
        }
    }

    #[test]
    fn a_message_may_come_in_pieces_and_a_descriptor_with_the_first() {
        use std::io::Write;
        let (mut there, here) = UnixStream::pair().unwrap();
        let text = format!("[{}]", region(0, MIB, 0, ""));
        let mut message = Message::default();
        assert!(message.receive(&here).unwrap() && message.is_empty(), "nothing has come");
        for byte in text.as_bytes() {
            assert!(!message.is_whole());
            there.write_all(&[*byte]).unwrap();
            assert!(message.receive(&here).unwrap());
        }
        assert!(message.is_whole());
        let error = message.take(&of(MIB)).unwrap_err();
        assert!(error.to_string().contains("no userfaultfd"), "{error}");
        let mut message = Message::default();
        there.write_all(&text.as_bytes()[..9]).unwrap();
        drop(there);
        assert!(message.receive(&here).unwrap() && !message.receive(&here).unwrap());
        assert!(message.take(&of(MIB)).unwrap_err().to_string().contains("hung up after 9 bytes"));
    }
}
