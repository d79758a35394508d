//! Afterimage: disk virtualization for Linux KVM hosts.

pub mod api;
pub mod cli;
pub mod clock;
pub mod codec;
pub mod disk;
pub mod error;
pub mod export;
pub mod map;
pub mod media;
pub mod pool;
pub mod progress;
pub mod snapshot;
pub mod store;
pub mod stream;
pub mod sync;
pub mod sys;
pub mod tree;
pub mod units;
