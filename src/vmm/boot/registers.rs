//! The registers a processor begins with.
//!
//! # Rules
//! 1. The first processor starts where the kernel says; the others wait for it to start them, as on real machines.
//! 2. What the guest can do is told by CPUID before any register is set: KVM refuses registers that need more.

use kvm_bindings::{Msrs, kvm_msr_entry, kvm_regs, kvm_segment};
use vm_memory::{Bytes, GuestAddress};

use super::{Entry, no_room};
use crate::error::{Error, Result};
use crate::sys::kvm::Cpu;
use crate::vmm::layout::{GDT, PAGE_TABLES, STACK, START_INFO, ZERO_PAGE};
use crate::vmm::memory::Memory;

/// Selectors, as the Linux boot protocol wants them.
const CODE: u16 = 0x10;
const DATA: u16 = 0x18;
const TASK: u16 = 0x20;
/// Control registers: protection, the type of the coprocessor that is always there, errors of it as exceptions, paging.
const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_NE: u64 = 1 << 5;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LONG_ENABLED: u64 = 1 << 8;
const EFER_LONG_ACTIVE: u64 = 1 << 10;
/// A page table entry: present, writable.
const TABLE: u64 = 3;
/// The same, of a page of 2 MiB.
const LARGE_PAGE: u64 = 0x83;
/// Bytes of a page table; gigabytes that are mapped.
const PAGE: u64 = 4096;
const GIGABYTES: u64 = 4;
/// Fast string operations, which Linux looks for.
const MISC_ENABLE: u32 = 0x1a0;
const FAST_STRING: u64 = 1;
/// Bit 1 of the flags is always set.
const FLAGS: u64 = 2;

/// Sets up the first processor.
///
/// # Errors
/// Those of KVM.
pub(in crate::vmm) fn set_up(cpu: &Cpu, memory: &Memory, entry: Entry) -> Result<()> {
    let host = |e: kvm_ioctls::Error| Error::io("cannot set the registers of the guest", e.into());
    set_up_waiting(cpu)?;
    let long = matches!(entry, Entry::Long(_));
    let (code, data, task) = (segment(CODE, 0xb, long), segment(DATA, 3, false), task_segment());
    write_descriptors(memory, &[code, data, task])?;
    let mut system = cpu.get_sregs().map_err(host)?;
    system.cs = code;
    (system.ds, system.es, system.fs, system.gs, system.ss) = (data, data, data, data, data);
    system.tr = task;
    system.gdt.base = GDT.0;
    system.gdt.limit = u16::try_from((usize::from(TASK) / 8 + 2) * 8 - 1).expect("six descriptors");
    system.idt.limit = 0;
    system.cr0 = CR0_PE | CR0_ET;
    let mut registers = kvm_regs { rflags: FLAGS, ..kvm_regs::default() };
    match entry {
        Entry::Long(at) => {
            write_page_tables(memory)?;
            system.cr3 = PAGE_TABLES.0;
            system.cr4 |= CR4_PAE;
            system.cr0 |= CR0_NE | CR0_PG;
            system.efer |= EFER_LONG_ENABLED | EFER_LONG_ACTIVE;
            (registers.rip, registers.rsi, registers.rsp) = (at, ZERO_PAGE.0, STACK);
        }
        Entry::Protected(at) => {
            system.cr4 = 0;
            (registers.rip, registers.rbx) = (at, START_INFO.0);
        }
    }
    cpu.set_sregs(&system).map_err(host)?;
    cpu.set_regs(&registers).map_err(host)
}

/// Sets up what is the same in every processor.
///
/// # Errors
/// Those of KVM.
pub(in crate::vmm) fn set_up_waiting(cpu: &Cpu) -> Result<()> {
    let host = |e: kvm_ioctls::Error| Error::io("cannot set the registers of the guest", e.into());
    let entry = kvm_msr_entry { index: MISC_ENABLE, data: FAST_STRING, ..kvm_msr_entry::default() };
    let set = Msrs::from_entries(&[entry]).map_err(|e| Error::failed(format!("no room for a register: {e:?}")))?;
    // Not every KVM has it, and it is only advice.
    if cpu.set_msrs(&set).map_err(host)? == 0 {
        tracing::debug!("the host has no MISC_ENABLE register for the guest");
    }
    Ok(())
}

fn segment(selector: u16, kind: u8, long: bool) -> kvm_segment {
    kvm_segment {
        limit: u32::MAX,
        selector,
        type_: kind,
        present: 1,
        db: u8::from(!long),
        s: 1,
        l: u8::from(long),
        g: 1,
        ..kvm_segment::default()
    }
}

fn task_segment() -> kvm_segment {
    kvm_segment { limit: 0x67, selector: TASK, type_: 0xb, present: 1, ..kvm_segment::default() }
}

/// Returns a segment as it is in a table.
fn descriptor(segment: &kvm_segment) -> u64 {
    let flags = u64::from(segment.type_)
        | u64::from(segment.s) << 4
        | u64::from(segment.dpl) << 5
        | u64::from(segment.present) << 7
        | u64::from(segment.l) << 13
        | u64::from(segment.db) << 14
        | u64::from(segment.g) << 15;
    let limit = if segment.g == 1 { u64::from(segment.limit >> 12) } else { u64::from(segment.limit) };
    (limit & 0xffff) | (segment.base & 0xff_ffff) << 16 | (flags & 0xf0ff) << 40 | (limit >> 16 & 0xf) << 48
}

fn write_descriptors(memory: &Memory, segments: &[kvm_segment]) -> Result<()> {
    for segment in segments {
        let at = GuestAddress(GDT.0 + u64::from(segment.selector));
        memory.write_obj(descriptor(segment), at).map_err(no_room)?;
    }
    Ok(())
}

/// Maps the first 4 GiB one to one.
fn write_page_tables(memory: &Memory) -> Result<()> {
    let third = PAGE_TABLES.0 + PAGE;
    memory.write_obj(third | TABLE, PAGE_TABLES).map_err(no_room)?;
    for gigabyte in 0..GIGABYTES {
        let second = third + (gigabyte + 1) * PAGE;
        memory.write_obj(second | TABLE, GuestAddress(third + gigabyte * 8)).map_err(no_room)?;
        for page in 0..512 {
            let maps = (gigabyte << 30 | page << 21) | LARGE_PAGE;
            memory.write_obj(maps, GuestAddress(second + page * 8)).map_err(no_room)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_those_of_the_boot_protocol() {
        assert_eq!(descriptor(&segment(CODE, 0xb, true)), 0x00af_9b00_0000_ffff);
        assert_eq!(descriptor(&segment(CODE, 0xb, false)), 0x00cf_9b00_0000_ffff);
        assert_eq!(descriptor(&segment(DATA, 3, false)), 0x00cf_9300_0000_ffff);
        assert_eq!(descriptor(&task_segment()), 0x0000_8b00_0000_0067);
    }
}
