//! Answers what is asked of checkpoints.

use std::sync::Arc;

use super::name::absolute;
use super::{Request, Response, Target};
use crate::checkpoint::{self, Folder, Name, Packing};
use crate::disk::check_disk_name;
use crate::error::{Error, Result};
use crate::progress::Progress;
use crate::store::Store;

/// Answers a request of this kind.
///
/// # Errors
/// As [`super::execute`].
pub(super) fn execute(store: &Arc<Store>, request: Request, progress: &dyn Progress) -> Result<Response> {
    let folder = Folder::of_pool(store.media());
    match request {
        Request::CheckpointLs { machine } => {
            if let Some(machine) = &machine {
                check_disk_name(machine)?;
            }
            let mut checkpoints = checkpoint::list(&folder)?;
            checkpoints.retain(|one| machine.as_ref().is_none_or(|machine| one.machine == *machine));
            Ok(Response::Checkpoints { checkpoints })
        }
        Request::CheckpointInfo { checkpoint } => {
            checkpoint::info(&folder, &Name::parse(&checkpoint)?).map(|info| Response::Checkpoint(Box::new(info)))
        }
        Request::CheckpointVerify { checkpoint } => {
            checkpoint::verify(&folder, &Name::parse(&checkpoint)?, progress).map(Response::CheckpointVerified)
        }
        Request::CheckpointRm { checkpoint } => {
            checkpoint::remove(store, &Name::parse(&checkpoint)?)?;
            Ok(Response::Removed { name: checkpoint })
        }
        Request::CheckpointDisks { checkpoint, disks } => {
            let name = Name::parse(&checkpoint)?;
            let snapshots = checkpoint::snapshot(store, &name, &disks, &|| progress.instant())?;
            Ok(Response::Snapshots { snapshots: snapshots.into_iter().map(Into::into).collect(), open: Vec::new() })
        }
        Request::CheckpointForget { checkpoint } => {
            checkpoint::forget(store, &Name::parse(&checkpoint)?)?;
            Ok(Response::Removed { name: checkpoint })
        }
        Request::CheckpointSave { checkpoint, memory, state, disks, parent } => {
            let packing = Packing {
                name: Name::parse(&checkpoint)?,
                memory: absolute(&memory)?,
                state: absolute(&state)?,
                disks: disks.iter().map(|disk| Target::snapshot(disk)).collect::<Result<_>>()?,
                parent: parent.as_deref().map(Name::parse).transpose()?,
            };
            checkpoint::pack(store, &packing, progress).map(|saved| Response::Checkpoint(Box::new(saved)))
        }
        Request::CheckpointFlatten { checkpoint } => {
            let flat = checkpoint::flatten(&folder, &Name::parse(&checkpoint)?, progress)?;
            Ok(Response::Checkpoint(Box::new(flat)))
        }
        _ => Err(Error::usage("not a request about checkpoints")),
    }
}
