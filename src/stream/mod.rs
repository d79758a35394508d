//! Streams: one file or pipe that carries the changes from one state of a disk to another.
//!
//! [`send`] reads them in the order of their addresses and writes them in the order of the disk; [`receive`] makes them a
//! snapshot of a disk in a pool, [`receive_file`] the content of a raw file or a block device.
//!
//! # Rules
//! 1. Nothing that came in is used before its checksum was compared, and nothing a reader of the disk can see changes
//!    before the end of the stream was read.
//! 2. An increment goes only onto its base: the state with the same uuid, unchanged. Anything else is an error that says so.
//! 3. What had been sealed is compared with its seal when it is read for sending; a block that differs is never sent.
//! 4. Memory is bounded whatever the size of the disk, and both sides go on where they were cut off.
//!
//! # After a crash
//! The sender leaves nothing. The receiver leaves what was safe, and a token that says how far that is.
//!
#![doc = include_str!("FORMAT.md")]

mod fetch;
mod file;
pub mod format;
mod pace;
mod reader;
mod receive;
mod send;
mod source;
mod token;
mod writer;

pub use file::{FileOptions, FileReport, Place, file_token, receive_at, receive_file};
pub use reader::{Part, StreamReader};
pub use receive::{ReceiveOptions, ReceiveReport, abort, receive, token};
pub use send::{SendOptions, SendReport, What, send};
pub use token::Token;
pub use writer::StreamWriter;
