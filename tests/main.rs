//! All integration tests, in one binary: one link, and helpers shared without a crate of their own.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout, clippy::print_stderr, reason = "tests")]
#![allow(clippy::disallowed_methods, clippy::too_many_lines, missing_docs, unreachable_pub, reason = "tests")]
#![allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_possible_wrap, reason = "tests")]
#![allow(clippy::let_underscore_must_use, let_underscore_drop, reason = "tests")]

mod checkpoint;
mod cli;
mod engine;
mod export;
mod firecracker;
mod format;
mod fuzz;
mod guest;
mod import;
mod instant;
mod limits;
mod memory;
mod model;
mod nbd;
mod past;
mod real;
mod scarce;
mod serve;
mod stream;
mod tidy;
mod tree;
mod unflushed;
mod vhost;
mod vmm;
