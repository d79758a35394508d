//! A stand-in until the server is merged: same types, no protocol.
//!
//! .
//! .
//! .

use std::any::Any;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::disk::BlockDevice;
use crate::error::{Error, Result};
use crate::store::Store;
use crate::units::{DiskId, SnapshotId};

/// Address.
#[derive(Debug, Clone)]
pub enum Listen {
    /// .
    Unix(PathBuf),
    /// .
    Tcp(SocketAddr),
}
/// .
#[derive(Debug, Clone)]
pub struct Tls;
impl Tls {
    /// .
    /// # Errors
    /// .
    pub fn load(_: &Path, _: &Path, _: Option<&Path>) -> Result<Self> {
        Ok(Self)
    }
}
/// .
#[derive(Debug)]
pub struct Options {
    /// .
    pub listen: Listen,
    /// .
    pub tls: Option<Tls>,
    /// .
    pub connections_max: usize,
}
/// .
pub trait Contexts: Send + Sync {}
/// .
#[derive(Debug)]
pub struct NoContexts;
impl Contexts for NoContexts {}
/// .
#[derive(Debug, Clone, Copy)]
pub enum Exported {
    /// .
    Disk(DiskId),
    /// .
    Snapshot(SnapshotId),
}
/// .
pub fn contexts_of(_: &Arc<Store>, _: Exported) -> Arc<dyn Contexts> {
    Arc::new(NoContexts)
}
/// .
#[allow(missing_debug_implementations, reason = "stub")]
pub struct Export {
    /// .
    pub name: String,
    /// .
    pub description: String,
    /// .
    pub device: Arc<dyn BlockDevice>,
    /// .
    pub contexts: Arc<dyn Contexts>,
    /// .
    pub keep: Box<dyn Any + Send + Sync>,
}
/// .
pub trait Exports: Send + Sync {
    /// .
    fn names(&self) -> Vec<String>;
    /// .
    /// # Errors
    /// .
    fn open(&self, name: &str) -> Result<Export>;
}
/// .
#[derive(Debug)]
pub struct Server;
/// .
/// # Errors
/// .
pub fn start(_: Options, _: Arc<dyn Exports>) -> Result<Server> {
    Err(Error::unsupported("no NBD yet"))
}
impl Server {
    /// .
    pub fn address(&self) -> String {
        String::new()
    }
    /// .
    pub fn stop(self) {}
}
