//! The state of a machine as plain data: all of it but its memory and its disks.
//!
//! # Layout
//! Four bytes of version (little-endian), then JSON. The version can be read whatever follows; what follows is checked as
//! it is read, and every number of it again by the device that gets it.
//!
//! # Rules
//! 1. Taken of a machine that is paused, set in one that has never run and is made of the same parts.
//! 2. An interrupt may be on its way when the state is taken, in the hands of the kernel. So devices that have something
//!    to say call again when they are restored; a call too many is none to a guest.
//! 3. The clocks of the guest go on as if it had not been run meanwhile: they are set ahead by as much as the clock of the
//!    host says that went by, and never back. That holds for the clock of KVM and for those of the processors, and then it
//!    holds for what a guest makes of either.
//! 4. What a machine or a host lacks is found before anything is set ([`super::fit`]).

use std::time::Duration;

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data, kvm_irqchip, kvm_pit_state2,
};
use serde::{Deserialize, Serialize};

use super::cpu_state::CpuState;
use super::fit::Shape;
use super::serial::SerialState;
use super::virtio::TransportState;
use crate::clock;
use crate::error::{Error, Result};
use crate::sys::kvm::Vm;

/// The version that is written and read.
const VERSION: u32 = 1;
const VERSION_LEN: usize = 4;

/// Everything of a machine that its guest could notice, but memory and disks.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct MachineState {
    pub(super) shape: Shape,
    pub(super) cpus: Vec<CpuState>,
    pub(super) chips: Chips,
    pub(super) serial: SerialState,
    /// Events the guest was not told of.
    pub(super) events: u8,
    pub(super) virtio: Vec<TransportState>,
}

impl std::fmt::Debug for MachineState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MachineState").field("cpus", &self.cpus.len()).finish_non_exhaustive()
    }
}

impl MachineState {
    /// Returns the state as bytes.
    ///
    /// # Errors
    /// None that are known.
    pub fn encode(&self) -> Result<Vec<u8>> {
        let mut bytes = VERSION.to_le_bytes().to_vec();
        serde_json::to_writer(&mut bytes, self)
            .map_err(|e| Error::failed("the state of a machine cannot be written").because(e))?;
        Ok(bytes)
    }

    /// Reads the state.
    ///
    /// # Errors
    /// `Unsupported` for another version, `Corrupt` for what makes no sense.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        let (version, body) = bytes
            .split_first_chunk::<VERSION_LEN>()
            .ok_or_else(|| Error::corrupt("the state of a machine is shorter than its version"))?;
        match u32::from_le_bytes(*version) {
            VERSION => {}
            other => {
                return Err(Error::unsupported(format!(
                    "the state of a machine is of version {other}, and this program knows {VERSION}"
                )));
            }
        }
        serde_json::from_slice(body).map_err(|e| Error::corrupt("the state of a machine makes no sense").because(e))
    }
}

/// What KVM has of a machine beside its processors.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) struct Chips {
    clock: kvm_clock_data,
    /// When that was, in nanoseconds since 1970.
    read_at: u64,
    interrupts: Vec<kvm_irqchip>,
    timer: kvm_pit_state2,
}

fn host(error: kvm_ioctls::Error) -> Error {
    Error::io("the state of a machine cannot be read or set", error.into())
}

impl Chips {
    /// Reads the state.
    ///
    /// # Errors
    /// Those of KVM.
    pub(super) fn of(vm: &Vm) -> Result<Self> {
        let clock = vm.get_clock().map_err(host)?;
        let read_at = u64::try_from(clock::wall().as_nanos()).unwrap_or(u64::MAX);
        let mut interrupts = Vec::new();
        for chip_id in [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC] {
            let mut chip = kvm_irqchip { chip_id, ..kvm_irqchip::default() };
            vm.get_irqchip(&mut chip).map_err(host)?;
            interrupts.push(chip);
        }
        Ok(Self { clock, read_at, interrupts, timer: vm.get_pit2().map_err(host)? })
    }

    /// Returns how much time went by since the state was read; none if the clock of the host went back.
    pub(super) fn later(&self) -> Duration {
        clock::wall().saturating_sub(Duration::from_nanos(self.read_at))
    }

    /// Sets the clock, which a guest may find in its memory as soon as its processors have their registers.
    ///
    /// # Errors
    /// Those of KVM.
    pub(super) fn set_clock(&self, vm: &Vm) -> Result<()> {
        let later = u64::try_from(self.later().as_nanos()).unwrap_or(u64::MAX);
        // KVM could do the sum itself, but only on hosts whose own clock is that of the processors.
        let clock = kvm_clock_data { clock: self.clock.clock.saturating_add(later), ..kvm_clock_data::default() };
        vm.set_clock(&clock).map_err(host)
    }

    /// Sets the state, after that of the processors and before any of them runs.
    ///
    /// # Errors
    /// Those of KVM.
    pub(super) fn set(&self, vm: &Vm) -> Result<()> {
        vm.set_pit2(&self.timer).map_err(host)?;
        self.set_clock(vm)?;
        for chip in &self.interrupts {
            vm.set_irqchip(chip).map_err(host)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;

    #[test]
    fn what_is_no_state_is_refused() {
        for (bytes, kind) in [
            (&b""[..], Kind::Corrupt),
            (&[1, 0, 0], Kind::Corrupt),
            (&[2, 0, 0, 0, b'{', b'}'], Kind::Unsupported),
            (&[1, 0, 0, 0], Kind::Corrupt),
            (&[1, 0, 0, 0, b'{', b'}'], Kind::Corrupt),
        ] {
            assert_eq!(MachineState::decode(bytes).unwrap_err().kind(), kind, "{bytes:?}");
        }
    }
}
