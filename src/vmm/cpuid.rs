//! What the processors of a guest say of themselves.
//!
//! # Rules
//! 1. What KVM supports is what the guest gets, with the topology of this guest in place of that of the host: one socket
//!    with as many cores as there are processors, one thread each.
//! 2. The timer of the local APIC takes deadlines: KVM does them whatever the host has, and without a PIT that works (the
//!    tables say there is none) it is the only clock that Linux need not measure first.

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm};

use crate::error::{Error, Result};

/// `CPUID.1:ECX`: the timer takes deadlines; there is a hypervisor. `CPUID.1:EDX`: more than one processor.
const DEADLINE: u32 = 1 << 24;
const HYPERVISOR: u32 = 1 << 31;
const SEVERAL: u32 = 1 << 28;

/// What the host supports, asked once.
#[derive(Debug)]
pub(super) struct Supported {
    list: CpuId,
    deadline: bool,
    cpus: u8,
}

impl Supported {
    /// Asks the host, for a guest with so many processors.
    ///
    /// # Errors
    /// Those of KVM.
    pub(super) fn ask(kvm: &Kvm, cpus: u8) -> Result<Self> {
        let list = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(|e| Error::io("cannot ask KVM what processors it has", e.into()))?;
        Ok(Self { list, deadline: kvm.check_extension(Cap::TscDeadlineTimer), cpus })
    }

    /// Returns what processor `index` says.
    pub(super) fn of(&self, index: u8) -> CpuId {
        let mut list = self.list.clone();
        for entry in list.as_mut_slice() {
            self.set(entry, index);
        }
        list
    }

    fn set(&self, entry: &mut kvm_cpuid_entry2, index: u8) {
        let (own, cpus) = (u32::from(index), u32::from(self.cpus));
        // Bits of a processor's number, and how many numbers those are.
        let bits = cpus.next_power_of_two().trailing_zeros();
        match entry.function {
            1 => {
                entry.ebx = entry.ebx & 0xffff | cpus << 16 | own << 24;
                entry.ecx |= HYPERVISOR | if self.deadline { DEADLINE } else { 0 };
                entry.edx = if cpus > 1 { entry.edx | SEVERAL } else { entry.edx & !SEVERAL };
            }
            // Caches: how many processors share each, and how many cores a socket has, both less one.
            4 if entry.eax & 0x1f != 0 => {
                let shared = if entry.eax >> 5 & 7 >= 3 { (1 << bits) - 1 } else { 0 };
                entry.eax = entry.eax & 0x3fff | shared << 14 | ((1 << bits) - 1) << 26;
            }
            0xb | 0x1f => {
                let (shift, count, kind) = match entry.index {
                    0 => (0, 1, 1),
                    1 => (bits, cpus, 2),
                    _ => (0, 0, 0),
                };
                (entry.eax, entry.ebx, entry.edx) = (shift, count, own);
                entry.ecx = entry.index & 0xff | kind << 8;
            }
            0x8000_0008 => entry.ecx = entry.ecx & !0xf0ff | bits << 12 | (cpus - 1),
            0x8000_001d if entry.eax & 0x1f != 0 => {
                let shared = if entry.eax >> 5 & 7 >= 3 { cpus - 1 } else { 0 };
                entry.eax = entry.eax & 0x3fff | shared << 14;
            }
            0x8000_001e => {
                (entry.eax, entry.ebx, entry.ecx) = (own, own, 0);
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, index: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, index, eax: 0x163, ebx: u32::MAX, ecx: u32::MAX, ..Default::default() }
    }

    #[test]
    fn each_processor_knows_its_number_and_how_many_there_are() {
        let list = CpuId::from_entries(&[entry(1, 0), entry(4, 3), entry(0xb, 0), entry(0xb, 1)]).unwrap();
        let supported = Supported { list, deadline: true, cpus: 3 };
        let third = supported.of(2);
        let said = third.as_slice();
        assert_eq!((said[0].ebx >> 24, said[0].ebx >> 16 & 0xff), (2, 3));
        assert_eq!(said[1].eax >> 26, 3, "cores are counted in powers of two");
        assert_eq!((said[2].eax, said[2].ebx, said[2].ecx, said[2].edx), (0, 1, 0x100, 2));
        assert_eq!((said[3].eax, said[3].ebx, said[3].ecx, said[3].edx), (2, 3, 0x201, 2));
    }
}
