//! What a checkpoint keeps of a machine beside its memory: what it is made of, and the state of all its parts.
//!
//! # Layout
//! JSON. Its version stands beside it in the checkpoint ([`VERSION`]) and is looked at before it.
//!
//! # Rules
//! 1. It is all that is needed: a machine that was removed goes on from its checkpoint.
//! 2. It comes from a file and is checked as it is read, and all numbers of it again by the parts that get them.

use serde::{Deserialize, Serialize};

use super::home::Definition;
use super::state::MachineState;
use crate::checkpoint::Reader;
use crate::error::{Error, Result};

/// Who makes and understands this state.
pub(super) const MAKER: &str = "afterimage";
/// The version that is written and read.
pub(super) const VERSION: u32 = 1;

/// A machine that stands still, without its memory and its disks.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Frozen {
    /// What it is made of.
    pub definition: Definition,
    /// The state of its parts.
    pub state: MachineState,
}

impl Frozen {
    /// Returns it as bytes.
    ///
    /// # Errors
    /// None that are known.
    pub fn encode(&self) -> Result<Vec<u8>> {
        serde_json::to_vec(self).map_err(|e| Error::failed("the state of a machine cannot be written").because(e))
    }

    /// Reads it from a checkpoint.
    ///
    /// # Errors
    /// `Unsupported` when somebody else made the state, or a newer version; `Corrupt` for what makes no sense, those of the
    /// checkpoint.
    pub fn read(checkpoint: &Reader) -> Result<Self> {
        let header = checkpoint.header();
        let name = format!("{}@{}", header.machine, header.name);
        if header.maker != MAKER {
            return Err(Error::unsupported(format!(
                "the checkpoint {name} is that of a machine of {}, and only that can run it",
                header.maker
            ))
            .hint("its memory is served to Firecracker by 'afterimage checkpoint serve-uffd', see afterimage-checkpoint(1)"));
        }
        let version = checkpoint.state_version();
        if version != VERSION {
            return Err(Error::unsupported(format!(
                "the state in the checkpoint {name} is of version {version}, and this program knows {VERSION}"
            ))
            .hint("use the version of afterimage that made it, or a newer one"));
        }
        let strange = |e: serde_json::Error| {
            Error::corrupt(format!("the state in the checkpoint {name} makes no sense")).because(e)
        };
        let frozen: Self = serde_json::from_slice(&checkpoint.state()?).map_err(strange)?;
        frozen.definition.check().map_err(|e| e.context(format!("the checkpoint {name}")))?;
        Ok(frozen)
    }
}
