//! Disks and snapshots over NBD, for QEMU, libnbd and the kernel; and a client of our own, for our virtual machines.
//!
//! ```text
//!   Server --accept--> Link (socket, TLS) --Handshake--> Terms --Session--> Engine --> disk
//! ```
//!
//! Newstyle with fixed options, structured replies, `base:allocation` and a `qemu:dirty-bitmap:NAME` for every snapshot of
//! the lineage, live or retired ([`contexts`]); TLS; several clients, and several connections of one.
//!
//! # Rules
//! 1. No byte of a client reaches an index, a length or an allocation unchecked. What makes no sense is refused with the
//!    error that the protocol has for it; a connection ends only when nobody knows where its next message begins.
//! 2. A client slows and harms itself only: its requests, its replies and its memory are bounded, those of all clients
//!    together too ([`crate::budget`]); and so is the time for which it may keep others from what they share.
//! 3. A flush, and FUA, cover what was answered on any connection (`CAN_MULTI_CONN`): all of them use one disk.
//! 4. Asking about an export (LIST, INFO, contexts) needs no lease. Choosing it (GO, EXPORT_NAME) takes what it needs, a
//!    lease, which is let go when the connection has ended and nothing is under way.
//! 5. Requests of any alignment are taken. Those of whole blocks are fast.
//!
//! # After a crash
//! As if the power of a disk had gone: what was flushed, or written with FUA, is there. The socket file stays, and the next
//! server removes it.
//!
//! # Why not a crate
//! `nbd` 0.3 and `nbd-async` speak simple replies of one request at a time and know no contexts; `tokio-nbd` wants an async
//! runtime below every disk; `nbdkit` binds to plugins of a C server. None has block status, which backups are about.

pub mod client;
pub mod contexts;
mod handshake;
mod link;
mod listen;
pub mod option;
mod receive;
mod send;
mod serve;
mod server;
mod status;
mod tls;
pub mod wire;

use std::any::Any;
use std::sync::Arc;

pub use client::Client;
pub use contexts::{Asked, Contexts, Dirty, Exported, NoContexts, contexts_of};
pub use listen::Listen;
pub use server::{Limits, Options, Server, start};
pub use tls::Tls;

use crate::disk::BlockDevice;
use crate::error::Result;

/// What is needed as long as an export is used, like a lease; dropped with the connection.
pub type Keep = Box<dyn Any + Send + Sync>;

/// What a client asks about, and uses once it has chosen it.
pub struct Export {
    /// Its name.
    pub name: String,
    /// What people are told of it.
    pub description: String,
    /// The disk or the snapshot.
    pub device: Arc<dyn BlockDevice>,
    /// What can be asked about it.
    pub contexts: Arc<dyn Contexts>,
    /// Called when a client has chosen it, before its first request. May fail, such as with `Busy`; the message is told to
    /// the client.
    pub enter: Box<dyn Fn() -> Result<Keep> + Send + Sync>,
}

impl std::fmt::Debug for Export {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Export").field("name", &self.name).finish_non_exhaustive()
    }
}

/// What a server has.
pub trait Exports: Send + Sync {
    /// Returns the names that are listed.
    fn names(&self) -> Vec<String>;
    /// Opens one for a client that asks about it; the empty name is that of the default export, where there is one.
    ///
    /// # Errors
    /// `NotFound`; whatever keeps it from being opened. The message is told to the client.
    fn open(&self, name: &str) -> Result<Export>;
}
