//! Increment directories: what changed between two states as plain files, and a script that applies them.
//!
//! # Parts
//! [`describe`] makes the description of what leads from one snapshot to another: [`Planner`] turns the extents of a diff into data files and ranges of zeros; [`Increment`] is the whole directory but for
//! the data, for those who write it and those who show it. [`write()`] makes one
//! on the host.
//!
//! # Rules
//! 1. Nothing but a POSIX shell and coreutils is needed to use what is written here.
//! 2. The new state is a live snapshot, held while it is read; the old one a snapshot, live or retired.
//! 3. Memory does not depend on the size of the disk or of the change.
//!
//! # After a crash
//! A directory that is not whole has another name.
//!
#![doc = include_str!("FORMAT.md")]

mod cksum;
mod describe;
mod increment;
mod plan;
mod write;

pub use cksum::Cksum;
pub use describe::describe;
pub use increment::{Increment, Member, Part, Side, Sums};
pub use plan::{FILES_MAX, Plan, Planner};
pub use write::write;
