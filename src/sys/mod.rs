//! The system calls of the project, one small safe function each.
//!
//! Most of them are thin names over `rustix`: callers see what is meant (`punch_hole`), not how Linux spells it.
//!
//! # Rules
//! 1. Unsafe code lives in this folder and nowhere else; a file that has some says so with `#![expect(unsafe_code)]`.
//! 2. A function here makes one system call (or a fixed handful), decides nothing and returns the errno untouched.

pub mod apart;
pub mod cow;
pub mod event;
pub mod forbidden;
pub mod guest;
pub mod hole;
pub mod kvm;
pub mod lock;
pub mod notify;
pub mod open;
pub mod pages;
pub mod peer;
pub mod pipe;
pub mod process;
pub mod ring;
pub mod shared;
pub mod tap;
pub mod userfaultfd;
