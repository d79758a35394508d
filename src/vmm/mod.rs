//! A small virtual machine monitor on KVM: boots a distribution kernel from a disk of a pool, or from any [`BlockDevice`](crate::disk::BlockDevice).
//!
//! ```text
//!   Machine --- Cpus            a thread for each processor: runs the guest, answers what it wants
//!           --- Bus             finds the device for an access
//!                |- Serial      COM1, with the last MiB of what the guest said
//!                |- Power       off, reset, the power button
//!                '- Transport   a virtio device: disk, network card, random numbers; threads for its queues
//! ```
//!
//! # Rules
//! 1. The guest is hostile. Each register, descriptor, address and length is checked where it comes in; the worst a guest
//!    can do is end itself.
//! 2. A machine that is paused has nothing half done: no access, no request to a device.
//! 3. One machine per process; it never opens a pool. Its disks are block devices, whatever is behind them.
//! 4. Threads that a guest can reach are confined: each kind makes the system calls it needs and no others (see `filter`), and
//!    a process that was started by root can go on as somebody else. What it needs is opened before ([`Means`]).
//! 5. There is no firmware (but for nine bytes, see `power`), no PCI and no hardware of a PC that has to be guessed: tables of ACPI say what there is.
//!
//! # Why not QEMU
//! QEMU is served well (see [`crate::vhost_blk`]). This is the reference for what a checkpoint needs of a VMM, small enough
//! to be read, and what one command gives a user.
//!
//! # After a crash
//! The guest is as after a power cut. Nothing of it is on the host but its disks, and sockets that the next start removes.

mod acpi;
mod audience;
mod boot;
mod bus;
mod checkpoint;
mod console_log;
mod cpu_state;
mod cpuid;
mod cpus;
mod ending;
mod file_disk;
mod filter;
mod fit;
mod frozen;
mod home;
mod instant;
mod layout;
mod machine;
mod means;
mod memory;
mod nursery;
mod power;
mod restore;
mod runner;
mod serial;
mod state;
mod virtio;

pub use audience::Show;
pub use boot::Boot;
pub use checkpoint::Saved;
pub use ending::{Ending, Stuck};
pub use file_disk::FileDisk;
pub use frozen::Frozen;
pub use home::{Definition, DiskDefinition, DiskSource, Home, HomeLock, SERIAL_SOCKET};
pub use instant::{Disks, Taken, Taking};
pub use machine::{DiskSettings, Machine, NetSettings, Settings};
pub use means::Means;
pub use restore::{MemoryInfo, Restore};
pub use runner::{Begin, Info, OpenDisk, PATIENCE, Pool, Runner, State};
pub use serial::{Log, Part};
pub use state::MachineState;
