//! Descriptors of events of the kind that KVM takes, for those who wait on descriptors.
#![expect(unsafe_code, reason = "vmm_sys_util knows only numbers of descriptors")]

use std::os::fd::{AsRawFd, BorrowedFd};

use vmm_sys_util::eventfd::EventFd;

/// Returns the descriptor of an event.
#[must_use]
pub fn descriptor(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the event owns the descriptor and is borrowed for as long.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}
