//! Afterimage: disk virtualization for Linux KVM hosts.
//!
//! Virtual disks and their snapshots live in a pool, a directory on the host, and show as plain files over FUSE. When a
//! snapshot has been backed up it is *retired*: its data is freed, the list of its block addresses stays, and any later
//! state can still be compared with it. So backups stay incremental for ever while old data costs nothing.
//!
//! # Map
//! | module | what it owns |
//! |---|---|
//! | [`units`], [`codec`], [`error`], [`clock`], [`sync`], [`parallel`], [`workers`], [`budget`], [`progress`], [`metrics`] | numbers with types, bytes, errors, time, locks, threads, what is told of them |
//! | [`sys`] | all unsafe code: system calls, memory in pages, io_uring |
//! | [`media`] | host files, and the simulator that crashes at any I/O |
//! | [`pool`] | the directory: superblock, lock, segments |
//! | [`map`] | the block map: sets of blocks, entries, the cache of chunks |
//! | [`store`] | the commit point: journal, catalog, the tree of states, reclaim, check, rebuild |
//! | [`snapshot`] | take, clone, revert, delete, retire; records and diffs |
//! | [`disk`] | disks: read, write, flush, discard, resize, import, scrub |
//! | [`stream`], [`mod@export`] | changes as one file, and as a directory of plain files |
//! | [`checkpoint`] | the memory of virtual machines as files |
//! | [`memory`] | the memory of a machine that runs: saved and restored while it does |
//! | [`tree`] | the mounted tree: names and files, and the FUSE adapter |
//! | [`nbd`] | disks and snapshots over NBD, with what changed since any snapshot |
//! | [`vhost_blk`] | disks for virtual machines over vhost-user |
//! | [`vmm`] | virtual machines of our own on KVM |
//! | [`api`], [`cli`] | the control socket and the command line: one request type, one function for both |
//!
//! # Layers
//! Lower never names higher: `units codec error clock sync parallel workers budget metrics progress` < `sys` < `media` < `pool` < `map` <
//! `store` < `snapshot, disk` < `stream, export, checkpoint` < `memory` < `tree, nbd, vhost_blk, vmm` < `api` < `cli`. Only `cli` prints and reads the
//! environment; storage is synchronous and knows nothing of FUSE and HTTP. A tidy test holds this.
//!
//! # What must always hold
//! 1. A block address is handed out once, to one block of a disk in one epoch. Freeing is punching a hole, never reuse.
//! 2. A block that any snapshot can reach is never written again.
//! 3. Data is durable before metadata that names it, and metadata before anything it replaces is punched.
//! 4. A flush returns only when every write acknowledged before it survives the loss of power.
//! 5. A snapshot contains every write acknowledged before it was asked for; of several disks it is one instant, all or none.
//! 6. What a diff needs of a retired snapshot is durable before the first of its blocks is freed.
//! 7. Diffs may tell of more than differs, never of less. A base that cannot be used is an error that says so.
//! 8. Reading and writing do not depend on how many snapshots there are; deleting and retiring copy no data and work on a
//!    full host.
//! 9. After a failed sync the pool refuses further writes until it is opened again; a sync is never retried.
//! 10. No byte from a guest, a peer or a file reaches an index, a length or an allocation unchecked.
//!
//! The formats are in the FORMAT pages of [`pool`], [`store`], [`snapshot::record`], [`stream`], [`mod@export`] and [`checkpoint`].

pub mod api;
pub mod budget;
pub mod checkpoint;
pub mod cli;
pub mod clock;
pub mod codec;
pub mod disk;
pub mod error;
pub mod export;
pub mod map;
pub mod media;
pub mod memory;
pub mod metrics;
pub mod nbd;
pub mod parallel;
pub mod pool;
pub mod progress;
pub mod snapshot;
pub mod store;
pub mod stream;
pub mod sync;
pub mod sys;
pub mod tree;
pub mod units;
pub mod vhost_blk;
pub mod vmm;
pub mod workers;
