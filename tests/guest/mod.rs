//! Guests: a real Linux that runs from a disk of a pool, as its user would run it.
//!
//! # Rules
//! 1. The guest is a kernel of the distribution in QEMU; nothing in it knows whose disk it has.
//! 2. Each way to attach a disk goes through the same life: boot, write under snapshots, reboot, grow, trim, power off.
//! 3. What a snapshot must hold is what the guest had told to be synced before the snapshot was asked for.
//! 4. Snapshots are judged from outside, by e2fsck and by content.
//!
//! 5. A guest that goes on from a checkpoint does not notice: its processes are the same.
//!
//! Needs root, FUSE, loop devices, QEMU and the kernel that `tests/run` fetches; says loudly what is missing.

mod life;
mod machine;
mod parts;
mod resume;
