//! The memory of a machine that runs: saved while it does, and restored while it does already.
//!
//! # Parts
//! A [`Watch`] has the memory and the one userfaultfd of it, for as long as the machine lives. A [`Saver`] makes a checkpoint of it
//! ([`crate::checkpoint`]), a [`Restorer`] fills it from one; both may be at work at the same time. [`firecracker`] has the
//! restorer fill the memory of a process of somebody else.
//!
//! ```text
//! save       Watch::new ... Saver::begin; settle; pause the machine; cut; resume; wait; commit
//! restore    Watch::new; Restorer::begin; set the state; run ... event: Failed -> stop, retry or poison_all; Filled
//! ```
//!
//! # Rules
//! 1. A byte that is saved is the one that memory had at the cut; a byte that is restored is the one that was saved. What cannot be had
//!    is told, and never something else in its place.
//! 2. Nobody waits for ever: not for a thread of ours that has died, not for a file that cannot be read, not for a disk that is full.
//! 3. Memory is ordinary pages of memfds that nobody else has mapped. Writes past the page tables (vhost-user, VFIO, registered buffers
//!    of io_uring) are not seen: who has such devices stops the machine for as long as it is saved.
//!
//! # Threads and the system calls they make
//! For those who filter them; `ioctl` only with the numbers of [`IOCTLS`](crate::sys::userfaultfd::IOCTLS). All of them make futex, mmap,
//! munmap, madvise, clock_gettime, clock_nanosleep and sched_yield, and write when something is logged.
//!
//! | thread | lives | makes beside that |
//! |---|---|---|
//! | `faults` | as long as the [`Watch`] | ppoll, read, pread64, ioctl |
//! | `save-sweep` | during a save | lseek, pread64, pwrite64, ioctl |
//! | `save-caught` | during a save | pwrite64, ioctl |
//! | `fill-N` | during a restore | pread64, ioctl; the last of them closes the checkpoint |
//!
//! Whoever calls: those of opening and committing a checkpoint, `clone` for the threads, eventfd2, ioctl, lseek, fstat and fstatfs. The userfaultfd is
//! opened ([`Watch::open`]) before rights are given up. Each `fill-N` may wait for the disk, and no other thread waits for one.
//!
//! # After a crash
//! Memory dies with the machine. Of a save there is the old checkpoint or the new one, of a restore nothing.

mod bits;
mod figures;
pub mod firecracker;
mod gate;
mod handler;
mod restore;
mod save;
mod watch;

pub use figures::Waits;
pub use restore::{Event, Failure, RestoreFigures, RestoreOptions, Restorer, Touched, can_restore_lazily, restore_all};
pub use save::{SaveFigures, SaveOptions, Saver, save_stopped};
pub use watch::Watch;
