//! Finds the device for an access of the guest.
//!
//! # Rules
//! 1. Where nothing is, reads give ones and writes do nothing, as on the bus of a PC.
//! 2. Some writes end the guest; those are returned.

use super::ending::Ending;
use super::layout::{EVENTS, KEYBOARD_COMMAND, RESET, SERIAL_PORT, SERIAL_PORTS, SLEEP_CONTROL, VIRTIO, VIRTIO_STEP};
use super::power::Power;
use super::serial::Serial;
use super::virtio::Transport;
use crate::sync::Mutex;
use crate::units::to_usize;

/// The devices of a guest.
#[derive(Debug)]
pub(super) struct Bus {
    pub(super) serial: Serial,
    pub(super) power: Power,
    pub(super) virtio: Vec<Mutex<Transport>>,
}

/// `i8042`: reset the processor.
const RESET_PROCESSOR: u8 = 0xfe;

impl Bus {
    /// Answers `in`.
    pub(super) fn read_port(&self, port: u16, data: &mut [u8]) {
        // A repeated access reads the same port for each byte.
        for byte in data {
            *byte = match port {
                SERIAL_PORT.. if port - SERIAL_PORT < SERIAL_PORTS => self.serial.read(port - SERIAL_PORT),
                // Nothing to read, and ready for a command.
                KEYBOARD_COMMAND | SLEEP_CONTROL => 0,
                super::layout::SLEEP_STATUS => 0,
                EVENTS => self.power.take_events(),
                _ => u8::MAX,
            };
        }
    }

    /// Does `out`.
    pub(super) fn write_port(&self, port: u16, data: &[u8]) -> Option<Ending> {
        data.iter().find_map(|byte| match port {
            SERIAL_PORT.. if port - SERIAL_PORT < SERIAL_PORTS => {
                self.serial.write(port - SERIAL_PORT, *byte);
                None
            }
            SLEEP_CONTROL => super::power::sleep(*byte),
            RESET if *byte == super::power::RESET_VALUE => Some(Ending::Reboot),
            KEYBOARD_COMMAND if *byte == RESET_PROCESSOR => Some(Ending::Reboot),
            _ => None,
        })
    }

    /// Reads a register in memory.
    pub(super) fn read(&self, at: u64, data: &mut [u8]) {
        match self.device(at) {
            Some((device, offset)) => device.lock().read(offset, data),
            None => data.fill(u8::MAX),
        }
    }

    /// Writes a register in memory.
    pub(super) fn write(&self, at: u64, data: &[u8]) {
        if let Some((device, offset)) = self.device(at) {
            device.lock().write(offset, data);
        }
    }

    fn device(&self, at: u64) -> Option<(&Mutex<Transport>, u64)> {
        let offset = at.checked_sub(VIRTIO)?;
        Some((self.virtio.get(to_usize(offset / VIRTIO_STEP))?, offset % VIRTIO_STEP))
    }
}
