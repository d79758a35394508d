//! Whether a machine, on this host, can have the state of another.
//!
//! # Rules
//! 1. It is looked at before anything is set, and all that is wrong is told at once, by its name: parts of the machine, and
//!    what the guest uses of its processors.
//! 2. A guest uses what its processors say they have: it was told once, when it began, and nobody can tell it otherwise now.
//!    So a host that has more will do and one that has less will not, and it has to be of the same maker.
//! 3. What only looks different is no difference: bits that follow the registers of the guest, registers that are zero.

use std::collections::BTreeSet;

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm, VcpuFd};
use serde::{Deserialize, Serialize};

use super::cpu_state::CpuState;
use super::cpuid::Supported;
use super::machine::Settings;
use super::state::MachineState;
use crate::error::{Error, Result};
use crate::sys::kvm::Cpu;
use crate::units::show_size;

/// What a machine is made of, as far as its guest can see.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) struct Shape {
    memory: u64,
    cpus: u8,
    disks: Vec<DiskShape>,
    /// Network cards. Their addresses may change.
    nets: usize,
}

/// A disk, as far as a guest can see.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct DiskShape {
    size: u64,
    read_only: bool,
}

impl Shape {
    /// Returns that of a machine.
    pub(super) fn of(settings: &Settings) -> Self {
        let disk = |disk: &super::DiskSettings| DiskShape {
            size: disk.device.size(),
            read_only: disk.read_only || disk.device.read_only(),
        };
        Self {
            memory: settings.memory,
            cpus: settings.cpus,
            disks: settings.disks.iter().map(disk).collect(),
            nets: settings.nets.len(),
        }
    }

    /// Says what is different in a machine that is to take the place of this one.
    fn differences(&self, new: &Self) -> Vec<String> {
        let mut found = Vec::new();
        let mut compare = |what: &str, had: String, has: String| {
            if had != has {
                found.push(format!("{what}: the guest had {had}, and would have {has}"));
            }
        };
        compare("memory", show_size(self.memory), show_size(new.memory));
        if self.memory != new.memory {
            compare("bytes of memory", self.memory.to_string(), new.memory.to_string());
        }
        compare("processors", self.cpus.to_string(), new.cpus.to_string());
        compare("disks", self.disks.len().to_string(), new.disks.len().to_string());
        compare("network cards", self.nets.to_string(), new.nets.to_string());
        for (number, (had, has)) in self.disks.iter().zip(&new.disks).enumerate() {
            compare(&format!("bytes of disk {number}"), had.size.to_string(), has.size.to_string());
            let access =
                |disk: &DiskShape| if disk.read_only { "reading only" } else { "reading and writing" }.to_owned();
            compare(&format!("access to disk {number}"), access(had), access(has));
        }
        found
    }
}

/// Checks that a machine of these settings and processors, on this host, can have a state.
///
/// # Errors
/// Those of KVM, and `Unsupported`, with all that is in the way.
pub(super) fn check(state: &MachineState, settings: &Settings, kvm: &Kvm, cpus: &[Cpu]) -> Result<()> {
    let mut found = state.shape.differences(&Shape::of(settings));
    if let (Some(had), Some(cpu)) = (state.cpus.first(), cpus.first()) {
        found.extend(Host::ask(kvm, cpu, settings.cpus)?.lacks(had));
    }
    refuse(&found)
}

/// As [`check`], of what the host has alone; the processor is any.
///
/// # Errors
/// As [`check`].
pub(super) fn check_host(state: &MachineState, settings: &Settings, kvm: &Kvm, cpu: &VcpuFd) -> Result<()> {
    let Some(had) = state.cpus.first() else { return Ok(()) };
    refuse(&Host::ask(kvm, cpu, settings.cpus)?.lacks(had))
}

fn refuse(found: &[String]) -> Result<()> {
    if found.is_empty() {
        return Ok(());
    }
    let hint = "give the machine the parts it had, on a host whose processors have what the guest uses";
    Err(Error::unsupported(format!("the guest cannot go on here: {}", found.join("; "))).hint(hint))
}

/// What this host has.
struct Host {
    cpuid: CpuId,
    /// Numbers of model specific registers.
    model: BTreeSet<u32>,
    clock_khz: u32,
    /// Its clock can have another speed for a guest.
    scales_clock: bool,
}

/// A register of CPUID.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

/// Where CPUID says what there is: leaf, part of it, register, and the bits that follow the registers of the guest or that
/// say nothing of the host.
const FEATURES: [(u32, u32, Register, u32); 14] = [
    // MWAIT, OSXSAVE.
    (0x1, 0, Register::Ecx, 1 << 3 | 1 << 27),
    // The local APIC, which a guest can switch off.
    (0x1, 0, Register::Edx, 1 << 9),
    (0x7, 0, Register::Ebx, 0),
    // OSPKE.
    (0x7, 0, Register::Ecx, 1 << 4),
    (0x7, 0, Register::Edx, 0),
    (0x7, 1, Register::Eax, 0),
    (0x7, 1, Register::Edx, 0),
    (0xd, 1, Register::Eax, 0),
    (0x4000_0001, 0, Register::Eax, 0),
    (0x8000_0001, 0, Register::Ecx, 0),
    (0x8000_0001, 0, Register::Edx, 1 << 9),
    (0x8000_0007, 0, Register::Edx, 0),
    (0x8000_0008, 0, Register::Ebx, 0),
    (0x8000_0021, 0, Register::Eax, 0),
];

/// Names of features that people know, as Linux has them.
const NAMES: [(u32, Register, u32, &str); 40] = [
    (0x1, Register::Ecx, 0, "sse3"),
    (0x1, Register::Ecx, 1, "pclmulqdq"),
    (0x1, Register::Ecx, 5, "vmx"),
    (0x1, Register::Ecx, 9, "ssse3"),
    (0x1, Register::Ecx, 12, "fma"),
    (0x1, Register::Ecx, 13, "cx16"),
    (0x1, Register::Ecx, 17, "pcid"),
    (0x1, Register::Ecx, 19, "sse4_1"),
    (0x1, Register::Ecx, 20, "sse4_2"),
    (0x1, Register::Ecx, 21, "x2apic"),
    (0x1, Register::Ecx, 22, "movbe"),
    (0x1, Register::Ecx, 23, "popcnt"),
    (0x1, Register::Ecx, 24, "tsc_deadline_timer"),
    (0x1, Register::Ecx, 25, "aes"),
    (0x1, Register::Ecx, 26, "xsave"),
    (0x1, Register::Ecx, 28, "avx"),
    (0x1, Register::Ecx, 29, "f16c"),
    (0x1, Register::Ecx, 30, "rdrand"),
    (0x7, Register::Ebx, 0, "fsgsbase"),
    (0x7, Register::Ebx, 3, "bmi1"),
    (0x7, Register::Ebx, 5, "avx2"),
    (0x7, Register::Ebx, 7, "smep"),
    (0x7, Register::Ebx, 8, "bmi2"),
    (0x7, Register::Ebx, 9, "erms"),
    (0x7, Register::Ebx, 10, "invpcid"),
    (0x7, Register::Ebx, 16, "avx512f"),
    (0x7, Register::Ebx, 18, "rdseed"),
    (0x7, Register::Ebx, 19, "adx"),
    (0x7, Register::Ebx, 20, "smap"),
    (0x7, Register::Ebx, 23, "clflushopt"),
    (0x7, Register::Ebx, 24, "clwb"),
    (0x7, Register::Ebx, 29, "sha_ni"),
    (0x7, Register::Ecx, 3, "pku"),
    (0x7, Register::Ecx, 16, "la57"),
    (0x7, Register::Edx, 24, "amx_tile"),
    (0x8000_0001, Register::Ecx, 2, "svm"),
    (0x8000_0001, Register::Edx, 26, "pdpe1gb"),
    (0x8000_0001, Register::Edx, 27, "rdtscp"),
    (0x8000_0001, Register::Edx, 29, "lm"),
    (0x8000_0007, Register::Edx, 8, "constant_tsc"),
];

/// Names of units whose state is saved, by their bits in XCR0.
const UNITS: [(u32, &str); 11] = [
    (1, "SSE"),
    (2, "AVX"),
    (3, "MPX"),
    (4, "MPX"),
    (5, "AVX-512"),
    (6, "AVX-512"),
    (7, "AVX-512"),
    (9, "PKU"),
    (17, "AMX"),
    (18, "AMX"),
    (19, "APX"),
];

/// Clocks that differ by no more than a part in this many are the same to KVM.
const CLOCK_TOLERANCE: u32 = 4000;

fn value(list: &CpuId, leaf: u32, part: u32, register: Register) -> u32 {
    let of = |entry: &kvm_cpuid_entry2| match register {
        Register::Eax => entry.eax,
        Register::Ebx => entry.ebx,
        Register::Ecx => entry.ecx,
        Register::Edx => entry.edx,
    };
    list.as_slice().iter().find(|entry| (entry.function, entry.index) == (leaf, part)).map_or(0, of)
}

/// Returns what leaf 0 says of who made a processor.
fn maker(list: &CpuId) -> String {
    let parts = [Register::Ebx, Register::Edx, Register::Ecx].map(|register| value(list, 0, 0, register).to_le_bytes());
    String::from_utf8_lossy(parts.as_flattened()).into_owned()
}

fn bits(word: u64) -> impl Iterator<Item = u32> {
    (0..u64::BITS).filter(move |bit| word >> bit & 1 == 1)
}

impl Host {
    /// Asks KVM; the processor has not run and is told what all of such a machine are.
    fn ask(kvm: &Kvm, cpu: &VcpuFd, cpus: u8) -> Result<Self> {
        let cannot = |e: kvm_ioctls::Error| Error::io("cannot ask KVM what its processors have", e.into());
        let model = kvm.get_msr_index_list().map_err(cannot)?;
        // What it reads back is what a guest is told, which on some hosts is more than KVM says that it supports.
        cpu.set_cpuid2(&Supported::ask(kvm, cpus)?.of(0)).map_err(cannot)?;
        Ok(Self {
            cpuid: cpu.get_cpuid2(KVM_MAX_CPUID_ENTRIES).map_err(cannot)?,
            model: model.as_slice().iter().copied().collect(),
            clock_khz: cpu.get_tsc_khz().map_err(cannot)?,
            scales_clock: kvm.check_extension(Cap::TscControl),
        })
    }

    /// Says what this host lacks of what a guest uses.
    fn lacks(&self, cpu: &CpuState) -> Vec<String> {
        let mut found = Vec::new();
        let (had, has) = (maker(&cpu.cpuid), maker(&self.cpuid));
        if had != has {
            found.push(format!("the guest's processors are of {had}, and those of this host of {has}"));
        }
        for (leaf, part, register, ignored) in FEATURES {
            let (had, has) = (value(&cpu.cpuid, leaf, part, register), value(&self.cpuid, leaf, part, register));
            let lacking = bits(u64::from(had & !ignored & !has));
            found.extend(
                lacking.map(|bit| format!("this host's processors lack {}", feature(leaf, part, register, bit))),
            );
        }
        let units = self.lacking_units(cpu);
        if !units.is_empty() {
            let units = units.into_iter().collect::<Vec<_>>().join(", ");
            found.push(format!("the guest uses units that this host's processors lack: {units}"));
        }
        for (index, value) in cpu.model.iter().filter(|(index, value)| *value != 0 && !self.model.contains(index)) {
            found.push(format!("this host's processors have no register {index:#x}, which holds {value:#x}"));
        }
        found.extend(self.clock(cpu));
        found
    }

    fn lacking_units(&self, cpu: &CpuState) -> BTreeSet<String> {
        let controls = &cpu.extended_control;
        let used = controls.xcrs.iter().take(controls.nr_xcrs as usize).find(|control| control.xcr == 0);
        let has = u64::from(value(&self.cpuid, 0xd, 0, Register::Eax))
            | u64::from(value(&self.cpuid, 0xd, 0, Register::Edx)) << 32;
        // The first bit is always set, also where there is no such register.
        let lacking = used.map_or(0, |control| control.value) & !has & !1;
        let name = |bit| {
            let known = UNITS.iter().find(|(known, _)| *known == bit);
            known.map_or_else(|| format!("bit {bit} of XCR0"), |(_, name)| (*name).to_owned())
        };
        bits(lacking).map(name).collect()
    }

    /// Says whether the clock cannot have the speed that the guest knows.
    fn clock(&self, cpu: &CpuState) -> Option<String> {
        let (had, own) = (cpu.clock_khz, self.clock_khz);
        let differs = own.abs_diff(had) > own / CLOCK_TOLERANCE;
        (differs && !self.scales_clock)
            .then(|| format!("the clock of the guest has {had} kHz, and that of this host's processors {own} kHz"))
    }
}

/// Names a feature.
fn feature(leaf: u32, part: u32, register: Register, bit: u32) -> String {
    let place = format!("bit {bit} of {} in leaf {leaf:#x}.{part} of CPUID", format!("{register:?}").to_uppercase());
    let known = NAMES.iter().find(|known| part == 0 && (known.0, known.1, known.2) == (leaf, register, bit));
    known.map_or_else(|| place.clone(), |(.., name)| format!("{name} ({place})"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape(memory: u64, cpus: u8, sizes: &[u64]) -> Shape {
        let disks = sizes.iter().map(|size| DiskShape { size: *size, read_only: false }).collect();
        Shape { memory, cpus, disks, nets: 0 }
    }

    #[test]
    fn every_part_that_differs_is_named() {
        let had = shape(1 << 30, 2, &[512, 1024]);
        assert!(had.differences(&had.clone()).is_empty());
        let mut has = shape(1 << 29, 1, &[512, 2048]);
        has.disks[0].read_only = true;
        let found = had.differences(&has).join("; ");
        for part in
            ["1.0 GiB, and would have 512.0 MiB", "processors: the guest had 2", "bytes of disk 1: the guest had 1024"]
        {
            assert!(found.contains(part), "{found}");
        }
        assert!(found.contains("access to disk 0") && !found.contains("network"), "{found}");
        assert!(!had.differences(&shape((1 << 30) + 4096, 2, &[512, 1024])).is_empty(), "a page is a difference");
    }

    #[test]
    fn features_are_named_as_people_know_them() {
        assert_eq!(feature(7, 0, Register::Ebx, 5), "avx2 (bit 5 of EBX in leaf 0x7.0 of CPUID)");
        assert_eq!(feature(7, 1, Register::Ebx, 5), "bit 5 of EBX in leaf 0x7.1 of CPUID");
    }
}
