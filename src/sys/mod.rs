//! All unsafe code of the project, and the system calls that have no safe wrapper elsewhere.
pub mod process;
