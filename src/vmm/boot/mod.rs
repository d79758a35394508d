//! How a guest begins: its kernel, initial file system and command line in memory, and where the first processor starts.
//!
//! Two kinds of kernels are known: a Linux bzImage, entered in 64-bit mode by the Linux boot protocol ([`linux`]), and an
//! ELF file with a PVH entry, entered in 32-bit mode ([`pvh`]). What distributions ship as `vmlinuz` is the first, what a
//! kernel build leaves as `vmlinux` the second.
//!
//! # Rules
//! 1. The files come from people: what is wrong with one is told by its name, before the guest runs.
//! 2. Nothing overlaps: kernel, initial file system and the structures for the start are checked against each other, and
//!    what the kernel says it needs while it unpacks itself is kept free.

mod linux;
mod pvh;
mod registers;

use std::fs::File;
use std::io::{Read, Seek};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use linux_loader::loader::{BzImage, Elf, KernelLoader, KernelLoaderResult, PvhBootCapability};
use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress};

use super::layout::{COMMAND_LINE, COMMAND_LINE_MAX, KERNEL, LOW_END};
use super::memory::Memory;
use crate::error::{Error, Result};
use crate::sys;
use crate::units::{show_size, to_usize};
pub(super) use registers::{set_up, set_up_waiting};

/// Begin of an ELF file.
const ELF_MAGIC: [u8; 4] = *b"\x7fELF";
/// Bytes that the beginning of the initial file system is a multiple of.
const PAGE: u64 = 4096;

/// What to start.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Boot {
    /// A bzImage, or an ELF file with a PVH entry.
    pub kernel: PathBuf,
    /// The initial file system.
    #[serde(default)]
    pub initrd: Option<PathBuf>,
    /// The command line of the kernel.
    #[serde(default)]
    pub command_line: String,
}

/// Where the first processor starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Entry {
    /// In 64-bit mode, with the zero page of Linux in RSI.
    Long(u64),
    /// In 32-bit mode without paging, with the start info of PVH in EBX.
    Protected(u64),
}

/// Where the initial file system is.
#[derive(Debug, Clone, Copy)]
struct Initrd {
    start: u64,
    len: u64,
}

/// What a kernel needs to be free.
#[derive(Debug, Clone, Copy)]
struct Room {
    /// Nothing else may lie below this address.
    end: u64,
    /// The initial file system must end before.
    initrd_end: u64,
}

/// Brings everything into the memory of the guest, which has `bytes`. `tables` is where the ACPI tables are.
///
/// # Errors
/// What is wrong with the files, or that the memory is too small for them.
pub(super) fn load(boot: &Boot, files: &BootFiles, memory: &Memory, bytes: u64, tables: GuestAddress) -> Result<Entry> {
    write_command_line(&boot.command_line, memory)?;
    let mut file = begin(&files.kernel, &boot.kernel)?;
    let low_end = bytes.min(LOW_END);
    let mut magic = [0; 4];
    let cannot_read = |e| Error::io(format!("cannot read the kernel {}", boot.kernel.display()), e);
    let begins_as_elf = file.read(&mut magic).map_err(cannot_read)? == magic.len() && magic == ELF_MAGIC;
    file.rewind().map_err(cannot_read)?;
    let needs = file.metadata().map_err(cannot_read)?.len();
    if KERNEL.0 + needs > low_end {
        return Err(too_small(&boot.kernel, needs, bytes));
    }
    if begins_as_elf {
        let kernel = load_elf(&mut file, boot, memory, low_end)?;
        let room = Room { end: kernel.kernel_end, initrd_end: low_end };
        let initrd = load_initrd(boot, files, memory, room, bytes)?;
        let PvhBootCapability::PvhEntryPresent(entry) = kernel.pvh_boot_cap else {
            return Err(not_a_kernel(&boot.kernel, "it is an ELF file without a PVH entry"));
        };
        pvh::write_start_info(memory, bytes, initrd, tables)?;
        return Ok(Entry::Protected(entry.0));
    }
    let kernel = load_bzimage(&mut file, boot, memory)?;
    let (room, header) = linux::check(&boot.kernel, &kernel, low_end)?;
    if room.end > low_end {
        return Err(too_small(&boot.kernel, room.end - KERNEL.0, bytes));
    }
    let initrd = load_initrd(boot, files, memory, room, bytes)?;
    linux::write_zero_page(memory, bytes, header, initrd, tables)?;
    Ok(Entry::Long(kernel.kernel_load.0 + linux::LONG_ENTRY))
}

/// The files, open.
#[derive(Debug, Clone)]
pub(super) struct BootFiles {
    kernel: Arc<File>,
    initrd: Option<Arc<File>>,
}

impl BootFiles {
    /// Opens them.
    ///
    /// # Errors
    /// What is wrong with one.
    pub(super) fn open(boot: &Boot) -> Result<Self> {
        let kernel = Arc::new(open(&boot.kernel, "kernel")?);
        let initrd = boot.initrd.as_deref().map(|path| open(path, "initial file system").map(Arc::new)).transpose()?;
        Ok(Self { kernel, initrd })
    }
}

/// Returns a file at its beginning; a machine that reboots reads it again.
fn begin(file: &File, path: &Path) -> Result<File> {
    let cannot = |e| Error::io(format!("cannot read {}", path.display()), e);
    let mut file = file.try_clone().map_err(cannot)?;
    file.rewind().map_err(cannot)?;
    Ok(file)
}

fn open(path: &Path, what: &str) -> Result<File> {
    let cannot = |e| Error::io(format!("cannot open the {what} {}", path.display()), e);
    let file = sys::open::without_waiting(path, false).map_err(cannot)?;
    if !file.metadata().map_err(cannot)?.is_file() {
        return Err(Error::usage(format!("the {what} {} is no file", path.display())));
    }
    Ok(file)
}

fn not_a_kernel(path: &Path, why: &str) -> Error {
    Error::usage(format!("{} is not a kernel that can be started: {why}", path.display()))
        .hint("give a vmlinuz (bzImage) for x86-64, or a vmlinux with CONFIG_PVH")
}

fn too_small(path: &Path, needs: u64, bytes: u64) -> Error {
    let (needs, has) = (show_size(needs), show_size(bytes));
    Error::usage(format!("the guest has {has} of memory, and {} alone needs {needs}", path.display()))
        .hint("give it more with --memory")
}

fn load_bzimage(file: &mut File, boot: &Boot, memory: &Memory) -> Result<KernelLoaderResult> {
    BzImage::load(memory, Some(KERNEL), file, None).map_err(|e| not_a_kernel(&boot.kernel, &e.to_string()))
}

fn load_elf(file: &mut File, boot: &Boot, memory: &Memory, low_end: u64) -> Result<KernelLoaderResult> {
    let kernel = Elf::load(memory, None, file, Some(KERNEL));
    let kernel = kernel.map_err(|e| not_a_kernel(&boot.kernel, &e.to_string()))?;
    // Memory that the file does not fill counts, too.
    if kernel.kernel_end > low_end {
        return Err(not_a_kernel(&boot.kernel, "it does not fit the memory"));
    }
    Ok(kernel)
}

fn write_command_line(line: &str, memory: &Memory) -> Result<()> {
    if line.len() >= COMMAND_LINE_MAX || line.contains('\0') {
        let most = COMMAND_LINE_MAX - 1;
        return Err(Error::usage(format!(
            "the command line of the guest has {} bytes: it takes {most} at most, and no zeros",
            line.len()
        )));
    }
    let bytes = [line.as_bytes(), &[0]].concat();
    memory.write_slice(&bytes, COMMAND_LINE).map_err(no_room)
}

fn load_initrd(boot: &Boot, files: &BootFiles, memory: &Memory, room: Room, bytes: u64) -> Result<Option<Initrd>> {
    let (Some(path), Some(file)) = (&boot.initrd, &files.initrd) else { return Ok(None) };
    let mut file = begin(file, path)?;
    let cannot = |e| Error::io(format!("cannot read the initial file system {}", path.display()), e);
    let len = file.metadata().map_err(cannot)?.len();
    if len == 0 {
        return Err(Error::usage(format!("the initial file system {} is empty", path.display())));
    }
    let start = room.initrd_end.saturating_sub(len) / PAGE * PAGE;
    if start < room.end {
        return Err(too_small(path, len, bytes));
    }
    memory
        .read_exact_volatile_from(GuestAddress(start), &mut file, to_usize(len))
        .map_err(|e| cannot(std::io::Error::other(e)))?;
    Ok(Some(Initrd { start, len }))
}

/// The lowest megabyte is there in every guest.
fn no_room(error: vm_memory::GuestMemoryError) -> Error {
    Error::failed("a structure for the start does not lie in the memory of the guest").because(error)
}
