//! Where things are in the eyes of the guest: memory, devices, interrupts, ports.
//!
//! # Rules
//! 1. Memory begins at zero and goes up to 3 GiB; what is more continues at 4 GiB. Devices are between the two.
//! 2. What is here is part of a checkpoint: a guest that goes on finds everything where it was.

use vm_memory::GuestAddress;

/// Where memory ends at first, and where it goes on.
pub(super) const LOW_END: u64 = 3 << 30;
pub(super) const HIGH_START: u64 = 4 << 30;

/// Structures for the start; the guest may use the memory as soon as it has read them.
pub(super) const GDT: GuestAddress = GuestAddress(0x500);
pub(super) const START_INFO: GuestAddress = GuestAddress(0x6000);
pub(super) const ZERO_PAGE: GuestAddress = GuestAddress(0x7000);
pub(super) const STACK: u64 = 0x8ff0;
pub(super) const PAGE_TABLES: GuestAddress = GuestAddress(0x9000);
pub(super) const COMMAND_LINE: GuestAddress = GuestAddress(0x2_0000);
/// Bytes of the command line at most, with the zero at its end: what x86 Linux takes.
pub(super) const COMMAND_LINE_MAX: usize = 2048;

/// The usable memory below the hole of the PC ends here.
pub(super) const BASE_END: u64 = 0x9_fc00;
/// Tables of ACPI, and behind them a page with the generation id.
pub(super) const ACPI: GuestAddress = GuestAddress(0xe_0000);
pub(super) const ACPI_MAX: usize = 0x1_f000;
pub(super) const GENERATION: GuestAddress = GuestAddress(0xf_f000);
/// Where a PC begins after a reset.
pub(super) const RESET_VECTOR: GuestAddress = GuestAddress(0xf_fff0);
/// Kernels are loaded from here up.
pub(super) const KERNEL: GuestAddress = GuestAddress(0x10_0000);

/// Registers of the virtio devices: one page each.
pub(super) const VIRTIO: u64 = 0xd000_0000;
pub(super) const VIRTIO_STEP: u64 = 0x1000;
pub(super) const VIRTIO_MAX: usize = 17;

/// What KVM and the processors have.
pub(super) const IO_APIC: u32 = 0xfec0_0000;
pub(super) const LOCAL_APIC: u32 = 0xfee0_0000;
pub(super) const IDENTITY_MAP: u64 = 0xfffb_c000;
pub(super) const TASK_STATE: usize = 0xfffb_d000;

/// Interrupts.
pub(super) const SERIAL_IRQ: u32 = 4;
pub(super) const EVENT_IRQ: u32 = 5;

/// Returns the interrupt of a virtio device. 8 is left out, which is the clock of a PC.
pub(super) fn virtio_irq(index: usize) -> u32 {
    let index = u32::try_from(index).expect("a handful");
    if index < 2 { 6 + index } else { 7 + index }
}

/// Returns where the registers of a virtio device are.
pub(super) fn virtio_base(index: usize) -> u64 {
    VIRTIO + index as u64 * VIRTIO_STEP
}

/// Ports.
pub(super) const SERIAL_PORT: u16 = 0x3f8;
pub(super) const SERIAL_PORTS: u16 = 8;
pub(super) const KEYBOARD_COMMAND: u16 = 0x64;
pub(super) const SLEEP_CONTROL: u16 = 0x600;
pub(super) const SLEEP_STATUS: u16 = 0x601;
pub(super) const RESET: u16 = 0x602;
pub(super) const EVENTS: u16 = 0x603;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_device_has_an_interrupt_of_its_own() {
        let mut taken = vec![SERIAL_IRQ, EVENT_IRQ, 8];
        for index in 0..VIRTIO_MAX {
            let irq = virtio_irq(index);
            assert!(irq < 24 && !taken.contains(&irq), "{irq}");
            taken.push(irq);
        }
    }
}
