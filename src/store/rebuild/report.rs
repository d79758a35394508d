//! What a rebuild tells: what is there again, and what is not.

use serde::{Deserialize, Serialize};

/// One disk of a rebuilt pool.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RebuiltDisk {
    /// Its name.
    pub disk: String,
    /// Snapshots that are there again.
    pub snapshots: u64,
    /// Bytes that the disk maps.
    pub referenced: u64,
    /// The snapshot that the disk begins as now; `None` when it is as it was, or empty.
    pub live: Option<String>,
    /// What is not there any more, in sentences.
    pub lost: Vec<String>,
}

/// What a rebuild did.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RebuildReport {
    /// A new catalog was made; otherwise the old one is sound, and nothing was touched.
    pub rebuilt: bool,
    /// Everything acknowledged is there: a catalog and all frames after it were found.
    pub complete: bool,
    /// The catalog or backup it was made from; `None` when it was made without.
    pub source: Option<String>,
    /// Frames of the journal that were used.
    pub frames: u64,
    /// Name of the old catalog now.
    pub kept: Option<String>,
    /// Bytes in segments that nothing names, kept until `check --repair`.
    pub unnamed: u64,
    /// The disks.
    pub disks: Vec<RebuiltDisk>,
    /// What else there is to say.
    pub notes: Vec<String>,
}
