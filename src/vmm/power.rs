//! Switching off, resetting, and the events that the guest is told of: the power button, and that it was restored.
//!
//! # Rules
//! 1. The registers are those of hardware-reduced ACPI (ACPI 6.5, section 4.8.3.7); the tables say where they are.
//! 2. Events wait in a register until the guest reads it, which clears them; the interrupt only says that it should look.

use std::sync::atomic::{AtomicU8, Ordering};

use vm_memory::Bytes;
use vmm_sys_util::eventfd::EventFd;

use super::ending::Ending;
use super::layout::{RESET, RESET_VECTOR};
use super::memory::Memory;
use crate::error::{Error, Result};

/// What, written to the reset register, resets.
pub(super) const RESET_VALUE: u8 = 1;
/// The sleep type of "off".
pub(super) const OFF: u8 = 5;
/// Bits of the events.
pub(super) const BUTTON: u8 = 1;
pub(super) const GENERATION: u8 = 2;
/// The sleep control register: go to sleep now; where the type is.
const SLEEP_NOW: u8 = 1 << 5;
const TYPE_SHIFT: u8 = 2;
const TYPE_MASK: u8 = 7;

/// The events that wait for the guest.
#[derive(Debug)]
pub(super) struct Power {
    events: AtomicU8,
    interrupt: EventFd,
}

impl Power {
    pub(super) fn new(interrupt: EventFd) -> Self {
        Self { events: AtomicU8::new(0), interrupt }
    }

    /// Tells the guest of events.
    pub(super) fn tell(&self, events: u8) {
        self.events.fetch_or(events, Ordering::SeqCst);
        if let Err(error) = self.interrupt.write(1) {
            tracing::warn!("the guest could not be told of an event: {error}");
        }
    }

    /// Returns the events that wait, and leaves them.
    pub(super) fn events(&self) -> u8 {
        self.events.load(Ordering::SeqCst)
    }

    /// Returns the events the guest was not told of before.
    pub(super) fn take_events(&self) -> u8 {
        self.events.swap(0, Ordering::SeqCst)
    }
}

/// Writes all the firmware there is: where a PC begins after a reset, code that asks for one.
///
/// Linux on hardware-reduced ACPI takes it that there is EFI to reboot with, and where there is none jumps to this place in
/// real mode (unless `reboot=` says otherwise), before it would try the register that the tables name.
///
/// # Errors
/// When the memory ends before.
pub(super) fn write_firmware(memory: &Memory) -> Result<()> {
    let [low, high] = RESET.to_le_bytes();
    // mov $RESET_VALUE, %al; mov $RESET, %dx; out %al, (%dx); hlt; jmp to the hlt
    let code = [[0xb0, RESET_VALUE, 0xba], [low, high, 0xee], [0xf4, 0xeb, 0xfd]].concat();
    let cannot = |e| Error::failed("the firmware does not lie in the memory of the guest").because(e);
    memory.write_slice(&code, RESET_VECTOR).map_err(cannot)
}

/// What a write to the sleep control register means.
pub(super) fn sleep(value: u8) -> Option<Ending> {
    let off = value & SLEEP_NOW != 0 && value >> TYPE_SHIFT & TYPE_MASK == OFF;
    off.then_some(Ending::PowerOff)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_order_to_be_off_switches_off() {
        assert_eq!(sleep(OFF << 2 | 1 << 5), Some(Ending::PowerOff));
        assert_eq!(sleep(OFF << 2), None, "the order is missing");
        assert_eq!(sleep(3 << 2 | 1 << 5), None, "asleep is not off");
    }

    #[test]
    fn an_event_is_told_once() {
        let interrupt = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let power = Power::new(interrupt.try_clone().unwrap());
        power.tell(BUTTON);
        power.tell(GENERATION);
        assert_eq!(power.take_events(), BUTTON | GENERATION);
        assert_eq!(power.take_events(), 0);
        assert_eq!(interrupt.read().unwrap(), 2);
    }
}
