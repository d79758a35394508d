//! What a checkpoint asks of whoever has the disks of a machine: snapshots of all of them, at the instant the machine stands
//! still for.
//!
//! The machine does not know the pool ([`super`], rule 3), so this is a seam: who runs machines of a pool gives a [`Disks`]
//! that asks its server.
//!
//! # Rules
//! 1. The disks are flushed, and nothing is under way to them, when snapshots are asked for: so the instant comes at once.
//! 2. What is durable later than the instant is waited for after the guest runs on.
//! 3. If the checkpoint comes to nothing, so do its snapshots ([`Disks::forget`]).

use std::fmt::Debug;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::error::Result;

/// A snapshot of a disk of a machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Taken {
    /// Name of the disk.
    pub disk: String,
    /// Identity of the disk.
    pub disk_uuid: Uuid,
    /// Name of the snapshot, without the disk.
    pub name: String,
    /// Identity of the snapshot.
    pub uuid: Uuid,
}

/// Whoever has the disks.
pub trait Disks: Send + Sync + Debug {
    /// Begins to take snapshots of disks, by their names, for `checkpoint` (`MACHINE@NAME`): all at one instant or none.
    ///
    /// # Errors
    /// When they cannot even be begun.
    fn snapshot(&self, disks: &[String], checkpoint: &str) -> Result<Box<dyn Taking>>;

    /// Removes the snapshots of a checkpoint that came to nothing. What cannot be removed is told in the log.
    fn forget(&self, checkpoint: &str);
}

/// Snapshots that are being taken.
pub trait Taking: Send {
    /// Waits until the instant has been: what is written from then on is in none of them.
    ///
    /// # Errors
    /// Why there will be no snapshots.
    fn instant(&mut self) -> Result<()>;

    /// Waits until they are durable, and returns them in the order of the disks.
    ///
    /// # Errors
    /// Why there are none.
    fn durable(self: Box<Self>) -> Result<Vec<Taken>>;
}
