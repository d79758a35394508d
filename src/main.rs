//! The command: see [`afterimage`].

fn main() {}
