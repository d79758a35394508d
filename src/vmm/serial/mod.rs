//! The serial port of a guest: what it says is kept, what is typed reaches it.
//!
//! ```text
//!   guest --out--> Serial --> Log (the last MiB) --> readers: serial.sock, console.log, the terminal
//!   guest <--in--- Serial <-- what a reader types
//! ```
//!
//! # Rules
//! 1. The guest never waits for a reader. One that is slower than the guest misses what fell out of the log, and can see
//!    that by the numbers of the bytes.
//! 2. Nobody waits for the guest either: what is typed waits here until the guest takes it, up to [`TYPED_MAX`] bytes. What
//!    is more is lost, as on a line of copper. It is part of the state, and goes where the guest goes.

mod log;
mod socket;

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use vm_superio::Trigger;
use vm_superio::serial::NoEvents;
use vmm_sys_util::eventfd::EventFd;

use crate::error::{Error, Result};
use crate::sync::Mutex;
pub use log::{Log, Part};
pub(super) use socket::SerialSocket;

/// Bytes that wait for the guest at most.
const TYPED_MAX: usize = 64 << 10;
/// In the register that identifies the interrupt: there is none.
const NO_INTERRUPT: u8 = 1;

/// The interrupt of the port.
#[derive(Debug)]
struct Interrupt(EventFd);

impl Trigger for Interrupt {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// The registers of the port and what waits in it, as plain data.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) struct SerialState {
    /// In the order of `vm_superio::SerialState`.
    registers: [u8; 9],
    /// In the port.
    waiting: Vec<u8>,
    /// Not in the port yet.
    typed: Vec<u8>,
}

#[derive(Debug)]
struct Port {
    registers: vm_superio::Serial<Interrupt, NoEvents, log::Writer>,
    /// Typed, and not in the port yet, which has room for 64 bytes.
    typed: VecDeque<u8>,
}

/// The port.
#[derive(Debug)]
pub(super) struct Serial {
    port: Mutex<Port>,
    log: Arc<Log>,
}

impl Serial {
    pub(super) fn new(interrupt: EventFd, log: Arc<Log>) -> Self {
        let registers = vm_superio::Serial::new(Interrupt(interrupt), log::Writer(Arc::clone(&log)));
        Self { port: Mutex::new(Port { registers, typed: VecDeque::new() }), log }
    }

    /// Makes a port in a state that another had. See [`Serial::call_again`] for its interrupt.
    ///
    /// # Errors
    /// `Corrupt` for a state that none can have.
    pub(super) fn restore(interrupt: EventFd, log: Arc<Log>, state: &SerialState) -> Result<Self> {
        if state.typed.len() > TYPED_MAX {
            return Err(Error::corrupt("the state of a serial port makes no sense: more was typed than it keeps"));
        }
        let [low, high, enable, identification, line, line_status, modem, modem_status, scratch] = state.registers;
        let registers = vm_superio::SerialState {
            baud_divisor_low: low,
            baud_divisor_high: high,
            interrupt_enable: enable,
            interrupt_identification: identification,
            line_control: line,
            line_status,
            modem_control: modem,
            modem_status,
            scratch,
            in_buffer: state.waiting.clone(),
        };
        let writer = log::Writer(Arc::clone(&log));
        let registers = vm_superio::Serial::from_state(&registers, Interrupt(interrupt), NoEvents, writer)
            .map_err(|e| Error::corrupt("the state of a serial port makes no sense").because(e))?;
        Ok(Self { port: Mutex::new(Port { registers, typed: state.typed.iter().copied().collect() }), log })
    }

    /// Calls the guest if there is something it has not seen: once the interrupt controller has its state, because that
    /// forgets the calls before.
    pub(super) fn call_again(&self) {
        let port = self.port.lock();
        if port.registers.state().interrupt_identification & NO_INTERRUPT == 0
            && let Err(error) = port.registers.interrupt_evt().trigger()
        {
            tracing::warn!("the guest could not be told of the serial port: {error}");
        }
    }

    /// Returns the state.
    pub(super) fn state(&self) -> SerialState {
        let port = self.port.lock();
        let state = port.registers.state();
        let registers = [
            state.baud_divisor_low,
            state.baud_divisor_high,
            state.interrupt_enable,
            state.interrupt_identification,
            state.line_control,
            state.line_status,
            state.modem_control,
            state.modem_status,
            state.scratch,
        ];
        SerialState { registers, waiting: state.in_buffer, typed: port.typed.iter().copied().collect() }
    }

    /// Returns what the guest said.
    pub(super) fn log(&self) -> &Arc<Log> {
        &self.log
    }

    /// Reads a register.
    pub(super) fn read(&self, register: u16) -> u8 {
        let mut port = self.port.lock();
        let value = port.registers.read(u8::try_from(register).unwrap_or(u8::MAX));
        port.feed();
        value
    }

    /// Writes a register.
    pub(super) fn write(&self, register: u16, value: u8) {
        let mut port = self.port.lock();
        if let Err(error) = port.registers.write(u8::try_from(register).unwrap_or(u8::MAX), value) {
            tracing::debug!("the serial port of the guest: {error}");
        }
        port.feed();
    }

    /// Types.
    pub(super) fn type_in(&self, bytes: &[u8]) {
        let mut port = self.port.lock();
        let room = (TYPED_MAX - port.typed.len()).min(bytes.len());
        port.typed.extend(&bytes[..room]);
        if room < bytes.len() {
            tracing::debug!("{} bytes were typed that the guest does not take", bytes.len() - room);
        }
        port.feed();
    }
}

impl Port {
    /// Gives the guest of what is typed as much as there is room for.
    fn feed(&mut self) {
        let room = self.registers.fifo_capacity().min(self.typed.len());
        if room == 0 {
            return;
        }
        let next: Vec<u8> = self.typed.iter().take(room).copied().collect();
        match self.registers.enqueue_raw_bytes(&next) {
            Ok(taken) => drop(self.typed.drain(..taken)),
            Err(error) => tracing::debug!("the serial port of the guest: {error}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn serial() -> (Serial, EventFd) {
        let interrupt = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        (Serial::new(interrupt.try_clone().unwrap(), Arc::new(Log::new())), interrupt)
    }

    #[test]
    fn what_the_guest_says_is_in_the_log() {
        let (serial, _) = serial();
        for byte in b"hello" {
            serial.write(0, *byte);
        }
        assert_eq!(serial.log().part(0).unwrap(), Part { start: 0, bytes: b"hello".to_vec() });
    }

    #[test]
    fn what_is_typed_waits_until_the_guest_takes_it() {
        let (serial, interrupt) = serial();
        serial.write(1, 1);
        let typed: Vec<u8> = (0..200).collect();
        serial.type_in(&typed);
        let mut came = Vec::new();
        while serial.read(5) & 1 == 1 {
            came.push(serial.read(0));
        }
        assert_eq!(came, typed);
        assert!(interrupt.read().unwrap() > 0);
    }

    #[test]
    fn what_nobody_takes_does_not_pile_up() {
        let (serial, _) = serial();
        for _ in 0..3 {
            serial.type_in(&[7; TYPED_MAX]);
        }
        assert_eq!(serial.port.lock().typed.len(), TYPED_MAX);
    }

    #[test]
    fn any_register_can_be_read_and_written() {
        let (serial, _) = serial();
        for register in 0..8 {
            for value in 0..=u8::MAX {
                serial.write(register, value);
                serial.read(register);
            }
        }
    }
}
