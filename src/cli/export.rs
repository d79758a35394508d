//! `export`: an increment directory.

use std::path::PathBuf;

use clap::Args;

use super::Ask;
use crate::api::Request;
use crate::error::{Error, Result};

/// Write what changed between two snapshots as a directory of plain files
///
/// The directory holds the changed data, a list of what became zeros, a manifest, checksums, and a script: "sh DIR/apply
/// TARGET" brings a raw image file or a block device that is at OLD to NEW, with nothing but a POSIX shell and coreutils.
/// OLD may be retired. Without --from it carries the whole disk.
#[derive(Debug, Args)]
pub(super) struct Export {
    /// The snapshot to begin at, live or retired; '-' is nothing, as without it: the whole disk is written
    #[arg(long, value_name = "OLD", allow_hyphen_values = true)]
    from: Option<String>,
    /// The snapshot to end at, DISK@SNAPSHOT
    #[arg(value_name = "NEW")]
    to: String,
    /// The directory to write, new or empty
    dir: PathBuf,
}

impl Export {
    pub(super) fn ask(self) -> Result<Ask> {
        let shown = self.dir.display().to_string();
        let path = std::path::absolute(&self.dir).map_err(|e| Error::io(format!("cannot find {shown}"), e))?;
        // The server follows a link once, here and now, as the caller sees it.
        let path = path.canonicalize().unwrap_or(path);
        let path = path.into_os_string().into_string().map_err(|_| {
            Error::usage(format!("the path of the directory {shown} is not UTF-8")).hint("rename it, and try again")
        })?;
        Ok(Ask::change(Request::Export { from: self.from, to: self.to, path }).in_bytes())
    }
}
