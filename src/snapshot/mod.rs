//! Snapshots: one instant of one or more disks; read, cloned, reverted to, retired, compared, deleted in any order.
//!
//! # Rules
//! 1. A snapshot contains every write that was acknowledged before it was asked for. Several disks are one instant, all or
//!    none, because all their rows are in one frame.
//! 2. The stop of the writers is an exchange of numbers: no I/O, whatever the size of the disk. What was written before
//!    is synced mostly before the stop and fully after it, before the answer.
//! 3. A revert moves a pointer. It deletes no snapshot, and nothing that was snapshotted.
//! 4. A snapshot that somebody reads keeps its data until the last reader lets go, whatever its name has become.
//! 5. A retired snapshot has no data. Its addresses stay, durable before the first block is freed, for every diff to come.
//!
//! # After a crash
//! A snapshot that was answered is there. One that was not is there whole, for all its disks, or not at all.

mod branch;
mod check;
mod device;
pub mod diff;
pub mod incoming;
mod prune;
pub mod record;
mod remove;
mod retire;
mod take;
mod verifier;

pub use branch::{RevertReport, clone, clone_into, revert};
pub use check::{check, record_faults};
pub use device::{SnapshotDevice, open, open_by_id};
pub use prune::{Keep, PruneLine, prune};
pub(crate) use remove::refuse_held;
pub use remove::{CHECKPOINT_HOLD, hold, release, remove, rename, unique};
pub use retire::{attend, import_record, retire, wait_retired};
pub use take::{take, take_at_once};
pub use verifier::{VerifiedReader, Verifier, Verifiers};
