//! The formats: golden bytes, damage, truncation, the FORMAT pages against the encoders, and a whole pool of version 1.
//!
//! Fixtures are for ever: a program that cannot read one any more has broken somebody's pool. They are made by
//! `AFTERIMAGE_MAKE_FIXTURES=1 cargo test format::make`, which never changes one that is there.

mod archive;
pub(crate) mod checkpoint;
pub(crate) mod files;
mod make;
mod pages;
mod pool;
mod record;
pub(crate) mod samples;
mod unflushed;
mod values;

use std::path::PathBuf;

use afterimage::error::{Kind, Result};

/// Returns a path below `fixtures/`.
pub(crate) fn fixture_path(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(name)
}

/// Reads a fixture: lines of hex digits, `zeros N`, and comments.
pub(crate) fn fixture(name: &str) -> Vec<u8> {
    fixture_of("v1", name)
}

/// As [`fixture`], of another version of the format.
pub(crate) fn fixture_of(version: &str, name: &str) -> Vec<u8> {
    let path = fixture_path(&format!("format/{version}/{name}.hex"));
    from_hex(&std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display())))
}

/// The bytes of a text as [`to_hex`] makes it.
pub(crate) fn from_hex(text: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        if let Some(count) = line.strip_prefix("zeros ") {
            bytes.resize(bytes.len() + count.parse::<usize>().expect("a number"), 0);
            continue;
        }
        for at in (0..line.len()).step_by(2) {
            bytes.push(u8::from_str_radix(&line[at..at + 2], 16).expect("hex digits"));
        }
    }
    bytes
}

/// Writes bytes the way [`fixture`] reads them.
pub(crate) fn to_hex(name: &str, version: u32, bytes: &[u8]) -> String {
    let mut text = format!("# {name}, format version {version}: {} bytes.\n", bytes.len());
    let mut rest = bytes;
    while !rest.is_empty() {
        let zeros = rest.iter().take_while(|byte| **byte == 0).count();
        if zeros >= 32 {
            text += &format!("zeros {zeros}\n");
            rest = &rest[zeros..];
            continue;
        }
        let (line, more) = rest.split_at(rest.len().min(32));
        line.iter().for_each(|byte| text += &format!("{byte:02x}"));
        text += "\n";
        rest = more;
    }
    text
}

/// Fails unless the result is the error that damage must give.
fn refused<T>(what: &str, result: Result<T>) {
    match result {
        Ok(_) => panic!("{what} is accepted"),
        Err(error) => assert!(
            matches!(error.kind(), Kind::Corrupt | Kind::Unsupported),
            "{what} gives {:?}, not Corrupt: {error}",
            error.kind()
        ),
    }
}

/// Calls `each` with every copy of `bytes` that has one bit turned over, and the number of the bit.
pub(crate) fn each_flip(bytes: &[u8], mut each: impl FnMut(usize, &[u8])) {
    let mut bad = bytes.to_vec();
    for bit in 0..bytes.len() * 8 {
        bad[bit / 8] ^= 1 << (bit % 8);
        each(bit, &bad);
        bad[bit / 8] ^= 1 << (bit % 8);
    }
}
