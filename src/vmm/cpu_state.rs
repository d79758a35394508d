//! The state of a processor as plain data.
//!
//! # Rules
//! 1. The order is that of the kernel's own rules (Documentation/virt/kvm/api.rst) and of Firecracker: reading begins with
//!    the run state, which may change the local APIC, and ends with pending events; writing begins with CPUID, without
//!    which later values are refused, and sets the deadline of the timer after the clock it refers to.
//! 2. What a host cannot set again as it was is an error, never left out.
//! 3. A deadline that has just passed reads as none, and its interrupt may not have been delivered yet. So where the timer
//!    takes deadlines and none is set, it is set to now: a call too many is none to a guest.
//! 4. The clock of the processor goes on as if the guest had only not been run meanwhile: it is set ahead by as much time as
//!    went by. Otherwise a guest that takes its time from there would be late from then on.
//! 5. What a guest runs in a machine of its own is part of the state, where KVM has such a thing.

use std::time::Duration;

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, Msrs, Xsave, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs,
    kvm_sregs, kvm_vcpu_events, kvm_xcrs,
};
use kvm_ioctls::KvmNestedStateBuffer;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::sys::kvm::Cpu;

/// The deadline of the timer, and the clock it is a time of.
const DEADLINE: u32 = 0x6e0;
const CLOCK: u32 = 0x10;
/// Says whether the guest may make machines of its own (`IA32_FEATURE_CONTROL`); comes before what it made.
const FEATURE_CONTROL: u32 = 0x3a;

/// Everything of a processor that its guest could notice.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) struct CpuState {
    pub(super) cpuid: CpuId,
    run: kvm_mp_state,
    registers: kvm_regs,
    system: kvm_sregs,
    extended: Xsave,
    pub(super) extended_control: kvm_xcrs,
    debug: kvm_debugregs,
    interrupts: kvm_lapic_state,
    /// Model specific registers: number and value.
    pub(super) model: Vec<(u32, u64)>,
    events: kvm_vcpu_events,
    pub(super) clock_khz: u32,
    /// Of the machine that the guest runs itself; empty where KVM lets it run none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    nested: Vec<u8>,
}

fn host(error: kvm_ioctls::Error) -> Error {
    Error::io("the state of a processor cannot be read or set", error.into())
}

fn msrs(entries: &[kvm_msr_entry]) -> Result<Msrs> {
    Msrs::from_entries(entries).map_err(|e| Error::failed(format!("no room for registers: {e:?}")))
}

impl CpuState {
    /// Reads the state of a processor that rests. `model` are the registers of this kind of machine.
    ///
    /// # Errors
    /// Those of KVM.
    pub(super) fn of(cpu: &Cpu, model: &[u32]) -> Result<Self> {
        let io = |e| Error::io("the state of a processor cannot be read", e);
        Ok(Self {
            run: cpu.get_mp_state().map_err(host)?,
            registers: cpu.get_regs().map_err(host)?,
            system: cpu.get_sregs().map_err(host)?,
            extended: cpu.xsave().map_err(io)?,
            extended_control: cpu.get_xcrs().map_err(host)?,
            debug: cpu.get_debug_regs().map_err(host)?,
            interrupts: cpu.get_lapic().map_err(host)?,
            clock_khz: cpu.get_tsc_khz().map_err(host)?,
            cpuid: cpu.get_cpuid2(KVM_MAX_CPUID_ENTRIES).map_err(host)?,
            model: read_model(cpu, model).map(due)?,
            nested: read_nested(cpu)?,
            events: cpu.get_vcpu_events().map_err(host)?,
        })
    }

    /// Sets the state of a processor that has not run, `later` than it was read.
    ///
    /// # Errors
    /// Those of KVM, and `Unsupported` for what this host does not take.
    pub(super) fn set(&self, cpu: &Cpu, later: Duration) -> Result<()> {
        let io = |e| Error::io("the state of a processor cannot be set", e);
        let own_khz = cpu.get_tsc_khz().map_err(host)?;
        if own_khz != self.clock_khz {
            cpu.set_tsc_khz(self.clock_khz).map_err(|e| {
                Error::unsupported(format!(
                    "the clock of the guest has {} kHz, and that of this host's processors {own_khz} kHz, which cannot be \
                     changed",
                    self.clock_khz
                ))
                .because(e)
            })?;
        }
        cpu.set_cpuid2(&self.cpuid).map_err(host)?;
        cpu.set_mp_state(self.run).map_err(host)?;
        cpu.set_regs(&self.registers).map_err(host)?;
        cpu.set_sregs(&self.system).map_err(host)?;
        self.set_nested(cpu)?;
        cpu.set_xsave(&self.extended).map_err(io)?;
        cpu.set_xcrs(&self.extended_control).map_err(host)?;
        cpu.set_debug_regs(&self.debug).map_err(host)?;
        cpu.set_lapic(&self.interrupts).map_err(host)?;
        self.set_model(cpu, later)?;
        cpu.set_vcpu_events(&self.events).map_err(host)?;
        // So that a watchdog of the guest does not take the time it was away for a hang. KVM refuses it (EINVAL) where the
        // guest does not use its clock.
        if let Err(error) = cpu.kvmclock_ctrl() {
            tracing::trace!("the guest is not told that it was paused: {error}");
        }
        Ok(())
    }

    fn set_model(&self, cpu: &Cpu, later: Duration) -> Result<()> {
        let (last, first): (Vec<_>, Vec<_>) = self.model.iter().partition(|(index, _)| *index == DEADLINE);
        for (index, data) in first.into_iter().chain(last) {
            let data = if index == CLOCK { ahead(data, self.clock_khz, later) } else { data };
            set_one(cpu, index, data)?;
        }
        Ok(())
    }

    fn set_nested(&self, cpu: &Cpu) -> Result<()> {
        if self.nested.is_empty() {
            return Ok(());
        }
        if let Some((index, data)) = self.model.iter().find(|(index, _)| *index == FEATURE_CONTROL) {
            set_one(cpu, *index, *data)?;
        }
        let bad = |e| Error::corrupt("the state of a guest's own guest makes no sense").because(e);
        let mut bytes = self.nested.clone();
        bytes.resize(size_of::<KvmNestedStateBuffer>(), 0);
        let mut state: KvmNestedStateBuffer =
            serde_json::to_value(bytes).and_then(serde_json::from_value).map_err(bad)?;
        state.size = state.size.min(u32::try_from(size_of::<KvmNestedStateBuffer>()).expect("8 KiB"));
        cpu.set_nested_state(&state)
            .map_err(|e| Error::unsupported("this host cannot run the guests that the guest runs itself").because(e))
    }
}

/// Sets a model specific register. One that this host does not have is as good as zero.
fn set_one(cpu: &Cpu, index: u32, data: u64) -> Result<()> {
    let entry = kvm_msr_entry { index, data, ..kvm_msr_entry::default() };
    if cpu.set_msrs(&msrs(&[entry])?).map_err(host)? == 1 || data == 0 {
        return Ok(());
    }
    Err(Error::unsupported(format!("this host cannot give a processor the value {data:#x} in its register {index:#x}")))
}

/// Returns what a clock of so many kHz shows later.
fn ahead(clock: u64, khz: u32, later: Duration) -> u64 {
    let ticks = later.as_nanos() * u128::from(khz) / 1_000_000;
    // It wraps after centuries, as that of a processor does.
    #[expect(clippy::cast_possible_truncation, reason = "see above")]
    let ticks = ticks as u64;
    clock.wrapping_add(ticks)
}

/// Reads what KVM has of a machine that the guest runs itself; nothing where there can be none.
fn read_nested(cpu: &Cpu) -> Result<Vec<u8>> {
    if !cpu.has_nested_state() {
        return Ok(Vec::new());
    }
    let mut state = KvmNestedStateBuffer::empty();
    cpu.nested_state(&mut state).map_err(host)?;
    let strange = |e| Error::failed("the state of a guest's own guest cannot be written").because(e);
    let mut bytes: Vec<u8> = serde_json::to_value(state).and_then(serde_json::from_value).map_err(strange)?;
    bytes.truncate(crate::units::to_usize(state.size.into()));
    Ok(bytes)
}

/// Gives a deadline that reads as none the time it is now.
fn due(mut model: Vec<(u32, u64)>) -> Vec<(u32, u64)> {
    let now = model.iter().find(|(index, _)| *index == CLOCK).map_or(0, |(_, now)| *now);
    for (index, value) in &mut model {
        if *index == DEADLINE && *value == 0 {
            *value = now;
        }
    }
    model
}

/// Reads registers one by one: the list of a host has some that not every guest has.
fn read_model(cpu: &Cpu, model: &[u32]) -> Result<Vec<(u32, u64)>> {
    let mut values = Vec::new();
    for index in model {
        let mut entry = msrs(&[kvm_msr_entry { index: *index, ..kvm_msr_entry::default() }])?;
        if cpu.get_msrs(&mut entry).map_err(host)? == 1 {
            values.push((*index, entry.as_slice()[0].data));
        }
    }
    Ok(values)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_goes_on_while_nobody_looks() {
        assert_eq!(ahead(5, 2_000_000, Duration::from_millis(3)), 5 + 6_000_000);
        assert_eq!(ahead(u64::MAX, 1, Duration::from_millis(1)), 0);
        assert_eq!(ahead(7, 3_000_000, Duration::ZERO), 7);
    }

    #[test]
    fn a_deadline_that_has_passed_is_due_at_once() {
        assert_eq!(due(vec![(CLOCK, 7), (DEADLINE, 0), (1, 0)]), [(CLOCK, 7), (DEADLINE, 7), (1, 0)]);
        assert_eq!(due(vec![(CLOCK, 7), (DEADLINE, 9)]), [(CLOCK, 7), (DEADLINE, 9)]);
    }
}
