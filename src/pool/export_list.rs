//! `exports.toml`: what is served again whenever a server opens the pool, and who was writing to what when it last ended.
//!
//! # Rules
//! 1. Disks and snapshots are named by their ids: they may be renamed, and ids are never used again.
//! 2. What is no longer in the pool is dropped by whoever restores the list, not here.
//! 3. The list is replaced as a whole, durably.
//! 4. Numbers of exports are never used again, also those of exports that were not kept: holders are told apart by them.
//!
//! # Why not rows of the catalog
//! This is what a host does with its pool, not what the pool is. A list that is lost or damaged must not keep a disk from
//! being opened; a person can read it and take a line out; a rebuild of the catalog leaves it alone.

use serde::{Deserialize, Serialize};

use super::text_file;
use crate::error::{Error, Kind, Result};
use crate::media::Media;

/// Name of the file.
pub const EXPORT_LIST: &str = "exports.toml";
/// The format this program writes, and the newest it reads.
const FORMAT: u32 = 2;
/// The first format that has [`LeaseRow::until`], [`LeaseRow::lost`] and [`ExportList::last_id`].
const FORMAT_OF_CLAIMS: u32 = 2;
/// Thousands of exports with the longest paths are shorter.
const LEN_MAX: u64 = 16 << 20;
/// Queues of a device at most.
const QUEUES_MAX: u16 = 64;

/// How disks are served.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ExportKind {
    /// NBD.
    Nbd,
    /// vhost-user-blk.
    VhostUser,
}

impl ExportKind {
    /// Returns the name used in the file, in JSON and on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Nbd => "nbd",
            Self::VhostUser => "vhost-user",
        }
    }
}

/// One export.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct ExportRow {
    /// Its number, from 1.
    pub id: u64,
    /// What it speaks.
    pub kind: ExportKind,
    /// Ids of the disks.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<u64>,
    /// Ids of the snapshots.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub snapshots: Vec<u64>,
    /// Absolute path of its Unix socket.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket: Option<String>,
    /// Address and port it listens on instead.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub listen: Option<String>,
    /// Absolute path of the certificate for TLS.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls_cert: Option<String>,
    /// Absolute path of its key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls_key: Option<String>,
    /// Absolute path of the roots that certificates of clients lead to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls_ca: Option<String>,
    /// Nothing is written through it.
    pub read_only: bool,
    /// Queues of a vhost-user device; 0 for other kinds.
    #[serde(default)]
    pub queues: u16,
}

/// Who was writing to a disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct LeaseRow {
    /// Id of the disk.
    pub disk: u64,
    /// The name under which the lease was held.
    pub holder: String,
    /// Seconds since 1970 up to which the disk is kept for it; set by the first server that came after it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub until: Option<u64>,
    /// Why something that was acknowledged to it may be lost, as long as it was not told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lost: Option<String>,
}

/// The list.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct ExportList {
    /// Format version of this file.
    pub format: u32,
    /// The last number that an export was given.
    #[serde(default)]
    pub last_id: u64,
    /// What is served.
    #[serde(default, rename = "export", skip_serializing_if = "Vec::is_empty")]
    pub exports: Vec<ExportRow>,
    /// Who writes.
    #[serde(default, rename = "lease", skip_serializing_if = "Vec::is_empty")]
    pub leases: Vec<LeaseRow>,
}

/// Read first, so that a newer list with other fields still gives a clear error.
#[derive(Deserialize)]
struct Version {
    format: u32,
}

impl Default for ExportList {
    fn default() -> Self {
        Self { format: FORMAT, last_id: 0, exports: Vec::new(), leases: Vec::new() }
    }
}

impl LeaseRow {
    /// Makes the row of a holder that writes.
    #[must_use]
    pub fn new(disk: u64, holder: String) -> Self {
        Self { disk, holder, until: None, lost: None }
    }
}

impl ExportRow {
    /// Returns where clients connect, as people write it.
    #[must_use]
    pub fn address(&self) -> String {
        self.socket.clone().or_else(|| self.listen.clone()).unwrap_or_default()
    }

    fn problem(&self) -> Option<&'static str> {
        let absolute = |path: &Option<String>| path.as_ref().is_none_or(|path| path.starts_with('/'));
        let nbd = self.kind == ExportKind::Nbd;
        if self.id == 0 {
            Some("an export has the number 0")
        } else if self.disks.is_empty() && self.snapshots.is_empty() {
            Some("an export is of nothing")
        } else if self.socket.is_some() == self.listen.is_some() {
            Some("an export has not one address")
        } else if ![&self.socket, &self.tls_cert, &self.tls_key, &self.tls_ca].into_iter().all(absolute) {
            Some("a path is not absolute")
        } else if self.tls_cert.is_some() != self.tls_key.is_some() || (self.tls_ca.is_some() && self.tls_key.is_none())
        {
            Some("certificate and key do not go together")
        } else if nbd == (self.queues > 0) || self.queues > QUEUES_MAX || (!nbd && self.listen.is_some()) {
            Some("an export has what its kind has not")
        } else {
            None
        }
    }
}

impl ExportList {
    /// Reads and checks the list of a pool; an empty one when there is none.
    ///
    /// # Errors
    /// `Unsupported` for a newer format, `Corrupt` when it makes no sense, any error of the host.
    pub fn read(media: &dyn Media) -> Result<Self> {
        let Some(text) = text_file::read(media, EXPORT_LIST, LEN_MAX)? else { return Ok(Self::default()) };
        let damaged = |why: &str| {
            Error::corrupt(format!("{EXPORT_LIST} is damaged: {why}"))
                .hint(format!("mend it, or remove it and attach again; what was served stands in {EXPORT_LIST}"))
        };
        let version: Version = toml::from_str(&text).map_err(|e| damaged(e.message()))?;
        if version.format > FORMAT {
            let format = version.format;
            return Err(Error::new(
                Kind::Unsupported,
                format!("{EXPORT_LIST} has format {format}, and this program knows formats up to {FORMAT}"),
            )
            .hint("use the newer afterimage that made it"));
        }
        let mut found: Self = toml::from_str(&text).map_err(|e| damaged(e.message()))?;
        if found.format == 0 {
            return Err(damaged("format 0 makes no sense"));
        }
        let newer = |lease: &LeaseRow| lease.until.is_some() || lease.lost.is_some();
        if found.format < FORMAT_OF_CLAIMS && (found.last_id > 0 || found.leases.iter().any(newer)) {
            return Err(damaged("it has keys of a newer format"));
        }
        found.format = FORMAT;
        if let Some(problem) = found.exports.iter().find_map(ExportRow::problem) {
            return Err(damaged(problem));
        }
        let mut ids: Vec<u64> = found.exports.iter().map(|export| export.id).collect();
        ids.sort_unstable();
        if ids.windows(2).any(|pair| pair[0] == pair[1]) {
            return Err(damaged("two exports have one number"));
        }
        found.last_id = found.last_id.max(ids.last().copied().unwrap_or(0));
        Ok(found)
    }

    /// Writes the list durably.
    ///
    /// # Errors
    /// Any error of the host.
    pub fn write(&self, media: &dyn Media) -> Result<()> {
        let body = toml::to_string(self).map_err(|e| Error::failed(format!("cannot write {EXPORT_LIST}: {e}")))?;
        let text = format!("# What a server of this pool serves; 'afterimage attach' and 'detach' change it.\n{body}");
        text_file::replace(media, EXPORT_LIST, &text)
    }
}
