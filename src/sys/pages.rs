//! Memory in whole pages, for direct I/O.
//!
//! The allocator would have to be told to zero it, which touches all of it; an anonymous mapping costs only the pages
//! that are used, so a buffer for the largest request is cheap for a small one.

#![expect(unsafe_code, reason = "a mapping is raw memory")]

use std::io;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

use rustix::mm::{MapFlags, ProtFlags};

/// Bytes of a page, to which the memory is aligned.
pub const PAGE: usize = 4096;
/// Bytes of a huge page.
pub const HUGE_PAGE: usize = 2 << 20;

/// Zeroed memory, aligned to a page.
#[derive(Debug)]
pub struct Pages {
    at: NonNull<u8>,
    len: usize,
    /// The whole mapping, of which the memory is a part.
    mapping: (NonNull<u8>, usize),
    huge: bool,
}

// SAFETY: it owns its memory as a `Box` does.
unsafe impl Send for Pages {}
// SAFETY: shared access only reads.
unsafe impl Sync for Pages {}

impl Pages {
    /// Maps `len` bytes, which must not be 0.
    pub fn new(len: usize) -> io::Result<Self> {
        let (protection, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE);
        // SAFETY: a new private mapping at an address the kernel chooses touches no memory of anybody.
        let at = unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), len, protection, flags)? };
        let at = NonNull::new(at.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { at, len, mapping: (at, len), huge: false })
    }

    /// As [`Self::new`], in huge pages where the host has them: for direct I/O the kernel then looks up one page instead
    /// of 256 for a megabyte. Costs 2 MiB of memory at the first touch.
    pub fn huge(len: usize) -> io::Result<Self> {
        let len = len.next_multiple_of(HUGE_PAGE);
        let mut whole = Self::new(len + HUGE_PAGE)?;
        let skip = whole.at.as_ptr().align_offset(HUGE_PAGE);
        assert!(skip <= HUGE_PAGE, "a mapping begins on a page");
        // SAFETY: `skip + len` bytes from `at` on are mapped.
        let at = unsafe { whole.at.add(skip) };
        // SAFETY: it is advice on memory that is ours; its contents stay.
        let advised = unsafe { rustix::mm::madvise(at.as_ptr().cast(), len, rustix::mm::Advice::LinuxHugepage) };
        // Without huge pages it is memory as good as any.
        advised.ok();
        (whole.at, whole.len, whole.huge) = (at, len, true);
        Ok(whole)
    }

    /// Tells whether it was made by [`Self::huge`], or cut from that.
    #[must_use]
    pub fn is_huge(&self) -> bool {
        self.huge
    }

    /// Cuts it in two before byte `at`, a multiple of [`PAGE`], and returns the second part.
    ///
    /// # Panics
    /// When a part would be empty or begin in the middle of a page.
    #[must_use]
    pub fn split_off(&mut self, at: usize) -> Self {
        assert!(at.is_multiple_of(PAGE) && at > 0 && at < self.len, "both parts are whole pages");
        let mapped = self.mapping.0.addr().get() + self.mapping.1;
        // SAFETY: `at` is below the length, and so many bytes are mapped.
        let second = unsafe { self.at.add(at) };
        let rest =
            Self { at: second, len: self.len - at, mapping: (second, mapped - second.addr().get()), huge: self.huge };
        self.len = at;
        self.mapping.1 = second.addr().get() - self.mapping.0.addr().get();
        rest
    }
}

impl Deref for Pages {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: `len` mapped, initialised (zeroed) bytes, until `self` is dropped.
        unsafe { std::slice::from_raw_parts(self.at.as_ptr(), self.len) }
    }
}

impl DerefMut for Pages {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `self` is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.at.as_ptr(), self.len) }
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours and nobody has a reference into it any more.
        let result = unsafe { rustix::mm::munmap(self.mapping.0.as_ptr().cast(), self.mapping.1) };
        assert!(result.is_ok(), "a mapping of ours can be unmapped");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_aligned_and_zero() {
        let mut pages = Pages::new(3 * PAGE).unwrap();
        assert_eq!(pages.as_ptr().align_offset(PAGE), 0);
        assert!(pages.iter().all(|byte| *byte == 0));
        pages[3 * PAGE - 1] = 7;
        assert_eq!(pages[3 * PAGE - 1], 7);
        let mut huge = Pages::huge(PAGE).unwrap();
        assert_eq!((huge.as_ptr().align_offset(HUGE_PAGE), huge.len()), (0, HUGE_PAGE));
        huge.fill(1);
        let mut second = huge.split_off(PAGE);
        assert_eq!((huge.len(), second.len()), (PAGE, HUGE_PAGE - PAGE));
        second.fill(2);
        let third = second.split_off(HUGE_PAGE / 2);
        drop(second);
        assert!(huge.is_huge() && third.is_huge() && !pages.is_huge());
        assert!(huge.iter().all(|byte| *byte == 1) && third.iter().all(|byte| *byte == 2));
    }
}
