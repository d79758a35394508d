//! The Linux boot protocol in 64-bit mode (Documentation/arch/x86/boot.rst of the kernel).
//!
//! # Rules
//! 1. The kernel is entered at 0x200 behind where it is loaded, with all of its first 4 GiB of memory mapped one to one.
//! 2. Only what the header of the kernel says is believed of it, and that is checked: it must be able to start in 64-bit
//!    mode, and what it needs while it unpacks must lie in memory.

use std::path::Path;

use linux_loader::loader::KernelLoaderResult;
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use vm_memory::{Bytes, GuestAddress};

use super::{Initrd, Room, no_room, not_a_kernel};
use crate::error::{Error, Result};
use crate::vmm::layout::{COMMAND_LINE, ZERO_PAGE};
use crate::vmm::memory::{self, Memory};

/// Where the 64-bit entry is, behind the beginning.
pub(super) const LONG_ENTRY: u64 = 0x200;
/// The first version of the protocol that says whether there is such an entry.
const VERSION: u16 = 0x020c;
/// `XLF_KERNEL_64`.
const KERNEL_64: u16 = 1;
/// A loader that has no number of its own.
const LOADER: u8 = 0xff;

/// Checks the header of a kernel, and says what it needs.
///
/// # Errors
/// When it cannot be started here.
pub(super) fn check(path: &Path, kernel: &KernelLoaderResult, low_end: u64) -> Result<(Room, setup_header)> {
    let header = kernel.setup_header.ok_or_else(|| not_a_kernel(path, "it has no header"))?;
    if header.version < VERSION || header.xloadflags & KERNEL_64 == 0 {
        return Err(not_a_kernel(path, "it has no 64-bit entry"));
    }
    if header.relocatable_kernel == 0 {
        return Err(not_a_kernel(path, "it runs at one address only"));
    }
    // It moves itself to where it likes to be, and unpacks there.
    let start = kernel.kernel_load.0.max(header.pref_address);
    let end = start.checked_add(u64::from(header.init_size)).ok_or_else(|| not_a_kernel(path, "it has no size"))?;
    let initrd_end = low_end.min(u64::from(header.initrd_addr_max) + 1);
    Ok((Room { end: end.max(kernel.kernel_end), initrd_end }, header))
}

/// Writes what the kernel reads first.
///
/// # Errors
/// When the memory is too small for it.
pub(super) fn write_zero_page(
    memory: &Memory,
    bytes: u64,
    header: setup_header,
    initrd: Option<Initrd>,
    tables: GuestAddress,
) -> Result<()> {
    let low = |address: u64| u32::try_from(address).expect("below 3 GiB");
    let mut page = boot_params { hdr: header, ..boot_params::default() };
    page.hdr.type_of_loader = LOADER;
    page.hdr.cmd_line_ptr = low(COMMAND_LINE.0);
    if let Some(initrd) = initrd {
        page.hdr.ramdisk_image = low(initrd.start);
        page.hdr.ramdisk_size = low(initrd.len);
    }
    page.acpi_rsdp_addr = tables.0;
    let map = memory::map(bytes);
    page.e820_entries = u8::try_from(map.len()).expect("a handful");
    let mut table = page.e820_table;
    for (entry, range) in table.iter_mut().zip(&map) {
        *entry = boot_e820_entry { addr: range.start, size: range.len, r#type: range.what as u32 };
    }
    page.e820_table = table;
    if page.hdr.cmdline_size > 0 && u64::from(page.hdr.cmdline_size) < line_len(memory)? {
        return Err(Error::usage("the command line is longer than this kernel takes"));
    }
    memory.write_obj(page, ZERO_PAGE).map_err(no_room)
}

/// Returns the bytes of the command line, without the zero at its end.
fn line_len(memory: &Memory) -> Result<u64> {
    let mut len = 0;
    while memory.read_obj::<u8>(GuestAddress(COMMAND_LINE.0 + len)).map_err(no_room)? != 0 {
        len += 1;
    }
    Ok(len)
}
