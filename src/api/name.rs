//! Names as people write them: `DISK` or `DISK@SNAPSHOT`, and paths on the host.
//!
//! # Rules
//! 1. Both parts are checked here, so a name that could never exist is a usage error and not "not found".
//! 2. Nothing behind this module ever sees an `@`.
//! 3. A path is absolute: the server has a working directory of its own.

use std::path::Path;

use crate::disk::{check_disk_name, check_snapshot_name};
use crate::error::{Error, Result};

/// A disk, or one of its snapshots.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// `DISK`.
    Disk(String),
    /// `DISK@SNAPSHOT`.
    Snapshot(String, String),
}

impl Target {
    /// Parses `DISK` or `DISK@SNAPSHOT`.
    ///
    /// # Errors
    /// `Kind::Usage` when either part is no name.
    pub fn parse(text: &str) -> Result<Self> {
        let Some((disk, snapshot)) = text.split_once('@') else {
            check_disk_name(text)?;
            return Ok(Self::Disk(text.to_owned()));
        };
        check_disk_name(disk)?;
        check_snapshot_name(snapshot)?;
        Ok(Self::Snapshot(disk.to_owned(), snapshot.to_owned()))
    }

    /// Parses a name that must be a disk.
    ///
    /// # Errors
    /// `Kind::Usage` when it is no name, or that of a snapshot.
    pub fn disk(text: &str) -> Result<String> {
        match Self::parse(text)? {
            Self::Disk(disk) => Ok(disk),
            Self::Snapshot(disk, _) => {
                Err(Error::usage(format!("'{text}' names a snapshot, and a disk is wanted here"))
                    .hint(format!("give the disk alone: {disk}")))
            }
        }
    }

    /// Parses a name that must be a snapshot.
    ///
    /// # Errors
    /// `Kind::Usage` when it is no name, or that of a disk.
    pub fn snapshot(text: &str) -> Result<(String, String)> {
        match Self::parse(text)? {
            Self::Snapshot(disk, snapshot) => Ok((disk, snapshot)),
            Self::Disk(disk) => Err(Error::usage(format!("'{text}' names a disk, and a snapshot is wanted here"))
                .hint(format!("write {disk}@SNAPSHOT; 'afterimage ls {disk}' lists what there is"))),
        }
    }
}

/// Refuses a path that would mean something else in another working directory.
pub(super) fn absolute(path: &str) -> Result<&Path> {
    let path = Path::new(path);
    if path.is_absolute() {
        return Ok(path);
    }
    Err(Error::usage(format!("the path '{}' is not absolute", path.display()))
        .hint("the server has a working directory of its own: give the whole path"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;

    #[test]
    fn the_first_at_sign_divides() {
        assert_eq!(Target::parse("web").unwrap(), Target::Disk("web".into()));
        assert_eq!(Target::parse("web@monday").unwrap(), Target::Snapshot("web".into(), "monday".into()));
        for bad in ["", "@", "web@", "@monday", "a@b@c", "a/b", "..", "a@b/c", "-x", ".x", "a\nb"] {
            assert_eq!(Target::parse(bad).unwrap_err().kind(), Kind::Usage, "{bad:?}");
        }
    }

    #[test]
    fn the_wrong_sort_is_refused_with_a_hint() {
        assert!(Target::disk("web@monday").unwrap_err().next_step().is_some());
        assert!(Target::snapshot("web").unwrap_err().next_step().is_some());
    }
}
