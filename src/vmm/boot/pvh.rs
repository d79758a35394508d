//! The PVH start of the Xen project, which Linux, FreeBSD and others know (xen/include/public/arch-x86/hvm/start_info.h).
//!
//! # Rules
//! 1. The kernel is entered in 32-bit mode without paging, with the address of the start info in EBX.

use linux_loader::loader::start_info::{
    XEN_HVM_START_MAGIC_VALUE, hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use vm_memory::{Bytes, GuestAddress};

use super::{Initrd, no_room};
use crate::codec::Writer;
use crate::error::Result;
use crate::vmm::layout::{COMMAND_LINE, START_INFO, ZERO_PAGE};
use crate::vmm::memory::{self, Memory};

/// Version 1 has a map of the memory.
const VERSION: u32 = 1;

/// Writes what the kernel reads first.
///
/// # Errors
/// When the memory is too small for it.
pub(super) fn write_start_info(
    memory: &Memory,
    bytes: u64,
    initrd: Option<Initrd>,
    tables: GuestAddress,
) -> Result<()> {
    let map = memory::map(bytes);
    let modules = START_INFO.0 + size_of::<hvm_start_info>() as u64;
    let ranges = modules + size_of::<hvm_modlist_entry>() as u64;
    let end = ranges + (map.len() * size_of::<hvm_memmap_table_entry>()) as u64;
    assert!(end <= ZERO_PAGE.0, "the start info outgrew its page");
    let (flags, reserved, no_line) = (0, 0, 0);
    let mut info = Writer::new();
    info.u32(XEN_HVM_START_MAGIC_VALUE).u32(VERSION).u32(flags).u32(u32::from(initrd.is_some()));
    info.u64(if initrd.is_some() { modules } else { 0 }).u64(COMMAND_LINE.0).u64(tables.0).u64(ranges);
    info.u32(u32::try_from(map.len()).expect("a handful")).u32(reserved);
    let (start, len) = initrd.map_or((0, 0), |initrd| (initrd.start, initrd.len));
    info.u64(start).u64(len).u64(no_line).u64(0);
    for range in map {
        info.u64(range.start).u64(range.len).u32(range.what as u32).u32(reserved);
    }
    memory.write_slice(&info.finish(), START_INFO).map_err(no_room)
}
