//! The way in for people and programs: one request type, one function that answers it, and the socket in front of it.
//!
//! Whether a command runs inside the server or opens the pool itself, it becomes a [`Request`], is answered by
//! [`execute`] and comes back as a [`Response`] or an [`crate::error::Error`]. The socket only carries these.
//!
//! ```text
//! command line -> Way -+-> Client -> control.sock -> Server -+-> Service -> execute -> Store
//!                      +-------------------------------------+
//! ```
//!
//! # Rules
//! 1. What a request means is decided in [`execute`] alone; neither side of the socket interprets it.
//! 2. The names of fields in requests and answers are for ever. Fields are added, never renamed or given new meaning.
//! 3. A request with a field nobody knows is refused: a misspelt option must not be silently ignored.
//! 4. The socket answers its own user and root, nobody else, and reads no more than [`server::BODY_SIZE_MAX`] bytes.
//!
//! Answers are types of their own ([`answer`]) so that the core can change its structs without changing the wire.
//! The same JSON is what `--json` prints; `man/afterimage-api.5` describes it.
//!
//! # After a crash
//! A server that was killed leaves `control.sock` behind. Whoever holds the lock of the pool next removes it.

pub mod answer;
mod checkpoint;
pub mod client;
mod execute;
mod exports;
pub mod instant;
mod line;
pub mod machine;
mod name;
mod past;
mod request;
pub mod server;
mod service;
mod transfer;
mod way;

pub use answer::Response;
pub use client::Client;
pub use execute::execute;
pub use line::{Failure, Line};
pub use name::Target;
pub use request::{Keep, Request};
pub use server::Server;
pub use service::{Answer, Service};
/// File name of the control socket in the pool directory.
const SOCKET_NAME: &str = "control.sock";

pub use way::{Entry, Way, check_is_pool, enter, open_store, rebuild};
