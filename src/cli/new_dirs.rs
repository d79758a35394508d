//! Directories that a command makes on its way to something that may fail: they go again with it.
//!
//! Only what was not there before, and only while it is empty: somebody else may have put something in meanwhile.

use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

/// What was made, innermost first.
#[derive(Debug)]
pub(super) struct NewDirs(Vec<PathBuf>);

impl NewDirs {
    /// Makes a directory and those above it, as far as they are missing.
    ///
    /// # Errors
    /// Any error of the host; nothing is left then.
    pub(super) fn make(dir: &Path, mode: u32) -> io::Result<Self> {
        let whole = std::path::absolute(dir)?;
        let missing = |dir: &&Path| dir.symlink_metadata().is_err_and(|e| e.kind() == io::ErrorKind::NotFound);
        let new = Self(whole.ancestors().take_while(missing).map(Path::to_owned).collect());
        std::fs::DirBuilder::new().recursive(true).mode(mode).create(&whole).inspect_err(|_| new.undo())?;
        Ok(new)
    }

    /// Takes away what is still empty.
    pub(super) fn undo(&self) {
        for dir in &self.0 {
            // The error is the one that led here; what cannot be removed is an empty directory.
            std::fs::remove_dir(dir).ok();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_there_before_stays() {
        let dir = tempfile::tempdir().unwrap();
        let new = NewDirs::make(&dir.path().join("a/b/c"), 0o700).unwrap();
        assert!(dir.path().join("a/b/c").is_dir());
        std::fs::create_dir(dir.path().join("a/other")).unwrap();
        new.undo();
        assert!(dir.path().join("a/other").is_dir() && !dir.path().join("a/b").exists());
        NewDirs::make(&dir.path().join("a"), 0o700).unwrap().undo();
        assert!(dir.path().join("a").is_dir());
    }

    #[test]
    fn half_a_way_is_taken_back() {
        let dir = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("/nowhere", dir.path().join("link")).unwrap();
        NewDirs::make(&dir.path().join("link/x/y"), 0o700).unwrap_err();
        let long = format!("a/{}", "x".repeat(300));
        NewDirs::make(&dir.path().join(long), 0o700).unwrap_err();
        assert!(!dir.path().join("a").exists());
    }
}
