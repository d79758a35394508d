//! `afterimage.toml`: what the pool is, for people and for programs that have only a text reader.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::text_file;
use crate::error::{Error, Kind, Result};
use crate::media::Media;
use crate::units::BLOCK_SIZE;

/// Name of the superblock file.
pub const SUPERBLOCK: &str = "afterimage.toml";
/// The format this program writes, and the newest it reads.
pub const FORMAT_VERSION: u32 = 1;
/// A superblock is short; more than this is not one.
const LEN_MAX: u64 = 64 * 1024;

/// The superblock.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Superblock {
    /// Format version of the whole pool.
    pub format: u32,
    /// Identity of the pool; journal frames and segments carry it.
    pub uuid: Uuid,
    /// Always 4096 in this version.
    pub block_size: u64,
    /// Features a reader must know to open the pool; empty in this version.
    #[serde(default)]
    pub features: Vec<String>,
}

/// Read first, so that a newer superblock with other fields still gives a clear error.
#[derive(Deserialize)]
struct Version {
    format: u32,
}

impl Superblock {
    /// Makes one with a fresh identity.
    #[must_use]
    pub fn new() -> Self {
        Self { format: FORMAT_VERSION, uuid: Uuid::new_v4(), block_size: BLOCK_SIZE, features: Vec::new() }
    }

    /// Writes it durably: temporary name, sync, rename, sync of the directory.
    ///
    /// # Errors
    /// Any error of the host.
    pub fn write(&self, media: &dyn Media) -> Result<()> {
        let body = toml::to_string(self).expect("a superblock is plain fields");
        let text = format!("# Afterimage pool. Made by `afterimage init`; not meant to be edited.\n{body}");
        text_file::replace(media, SUPERBLOCK, &text)
    }

    /// Reads and checks it.
    ///
    /// # Errors
    /// `NotFound` when the directory is no pool, `Unsupported` for a newer format, `Corrupt` when it makes no sense.
    pub fn read(media: &dyn Media) -> Result<Self> {
        let text = text_file::read(media, SUPERBLOCK, LEN_MAX)?.ok_or_else(|| {
            Error::not_found(format!("there is no pool here: {SUPERBLOCK} is missing"))
                .hint("make one with `afterimage init DIR`, or name another directory with --pool")
        })?;
        let damaged = |e: toml::de::Error| Error::corrupt(format!("{SUPERBLOCK} is damaged: {}", e.message()));
        let version: Version = toml::from_str(&text).map_err(damaged)?;
        if version.format > FORMAT_VERSION {
            return Err(Error::new(
                Kind::Unsupported,
                format!(
                    "the pool has format {}, and this program knows formats up to {FORMAT_VERSION}",
                    version.format
                ),
            )
            .hint("use the newer afterimage that made it"));
        }
        let found: Self = toml::from_str(&text).map_err(damaged)?;
        if found.format == 0 || found.block_size != BLOCK_SIZE {
            return Err(Error::corrupt(format!("{SUPERBLOCK} is damaged: format or block size make no sense")));
        }
        if let Some(feature) = found.features.first() {
            return Err(Error::unsupported(format!(
                "the pool needs the feature '{feature}', which this program lacks"
            ))
            .hint("use the newer afterimage that made it"));
        }
        Ok(found)
    }
}

impl Default for Superblock {
    fn default() -> Self {
        Self::new()
    }
}
