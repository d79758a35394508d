//! Bringing images into the pool.

use std::path::Path;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::progress::Progress;
use crate::store::Store;

/// What an import did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct ImportReport {
    /// Bytes read from the image.
    pub bytes_read: u64,
    /// Bytes written to the disk.
    pub bytes_written: u64,
    /// Format of the image.
    pub format: String,
    /// Size of the disk.
    pub size: u64,
}

/// Makes a disk from an image.
///
/// # Errors
/// Always, for now.
pub fn import(_: &Arc<Store>, _: &Path, _: Option<&str>, _: &str, _: &dyn Progress) -> Result<ImportReport> {
    Err(Error::unsupported("import is not there yet"))
}
