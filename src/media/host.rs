//! STUB.
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use super::{File, Media, Open, Space};
/// Stub.
#[derive(Debug)]
pub struct HostMedia { root: PathBuf }
impl HostMedia {
    /// Stub.
    pub fn new(root: &Path) -> io::Result<Self> { Ok(Self { root: root.into() }) }
    /// Stub.
    pub fn root(&self) -> &Path { &self.root }
}
fn no<T>() -> io::Result<T> { Err(io::Error::from_raw_os_error(libc::ENOSYS)) }
impl Media for HostMedia {
    fn open(&self, _: &str, _: Open) -> io::Result<Arc<dyn File>> { no() }
    fn make_dir(&self, _: &str) -> io::Result<()> { no() }
    fn remove(&self, _: &str) -> io::Result<()> { no() }
    fn rename(&self, _: &str, _: &str) -> io::Result<()> { no() }
    fn list(&self, _: &str) -> io::Result<Vec<String>> { no() }
    fn sync_dir(&self, _: &str) -> io::Result<()> { no() }
    fn space(&self) -> io::Result<Space> { Ok(Space { free: 1 << 40, total: 1 << 41 }) }
}
