//! Bytes that nobody would send: every reader of bytes from outside, under inputs that are nearly right.
//!
//! An input is a good one with some bytes turned, cut, doubled or taken from another one. Checksums are made right again most
//! of the time, or nothing behind them would ever be reached. An input that leads to an answer not seen before is itself
//! changed later on.
//!
//! # Rules
//! 1. Whatever the bytes are, the reader ends: with a value, with an error, or by closing the connection. It never panics,
//!    in no thread, and a server serves the next one.
//! 2. An input that once broke something is kept in `fixtures/hostile/TARGET/` and tried first, for ever.
//! 3. An ordinary run tries a fixed number of inputs. `AFTERIMAGE_FUZZ_SECONDS=300 cargo test --release fuzz::` goes on that
//!    long with each target, from the seed `AFTERIMAGE_FUZZ_SEED` if that is set.

mod files;
mod mutate;
mod peers;
mod pools;

use std::collections::BTreeSet;
use std::panic::AssertUnwindSafe;
use std::path::PathBuf;
use std::sync::Once;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::format::{fixture_path, from_hex, to_hex};
use mutate::{Input, Mutator};

/// Inputs that are kept because their answer was a new one, at most.
const KEPT_MAX: usize = 400;

/// What panicked in threads that no test waits for.
static FALLEN: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// Notes the panics of threads that serve: the server goes on, and only its log tells of them.
fn watch_servers() {
    static WATCH: Once = Once::new();
    WATCH.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            let thread = std::thread::current();
            let serves = ["nbd-", "vhost-", "engine-", "disk-work"];
            if thread.name().is_some_and(|name| serves.iter().any(|of| name.starts_with(of))) {
                FALLEN.lock().push(format!("thread {}: {info}", thread.name().unwrap_or_default()));
            }
            before(info);
        }));
    });
}

/// Inputs that once broke a target.
fn kept(target: &str) -> Vec<(PathBuf, Vec<u8>)> {
    let Ok(files) = std::fs::read_dir(fixture_path(&format!("hostile/{target}"))) else { return Vec::new() };
    let mut paths: Vec<_> = files.map(|file| file.unwrap().path()).collect();
    paths.sort();
    paths.into_iter().map(|path| (path.clone(), from_hex(&std::fs::read_to_string(path).unwrap()))).collect()
}

/// Runs one input; says what is wrong with what came of it.
fn attempt(run: &mut impl FnMut(&[u8]) -> String, bytes: &[u8]) -> Result<String, String> {
    let answer = std::panic::catch_unwind(AssertUnwindSafe(|| run(bytes))).map_err(|_| "it panicked".to_owned());
    match FALLEN.lock().drain(..).next() {
        Some(fallen) => Err(fallen),
        None => answer,
    }
}

/// Kinds of answers are told apart without the numbers and names in them.
fn kind(answer: &str) -> String {
    answer.chars().filter(|c| !c.is_ascii_digit()).take(200).collect()
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().expect("a number"))
}

/// Tries inputs made from `corpus`, `ordinary` of them or as many as there is time for. `run` returns what came of one.
fn fuzz(target: &str, corpus: Vec<Vec<u8>>, ordinary: u64, mut run: impl FnMut(&[u8]) -> String) {
    watch_servers();
    let mut kinds = BTreeSet::new();
    for (path, bytes) in kept(target) {
        attempt(&mut run, &bytes).unwrap_or_else(|what| panic!("{}: {what}", path.display()));
    }
    let mut corpus: Vec<Input> = corpus.into_iter().map(Input::new).collect();
    for input in &corpus {
        kinds.insert(kind(&attempt(&mut run, &input.bytes).expect("a good input")));
    }
    let begun = Instant::now();
    let soak = number("AFTERIMAGE_FUZZ_SECONDS").map(Duration::from_secs);
    let mut mutator = Mutator::new(number("AFTERIMAGE_FUZZ_SEED").unwrap_or(1));
    let (good, mut tried, mut slowest) = (corpus.len(), 0, Duration::ZERO);
    while soak.map_or(tried < ordinary, |time| begun.elapsed() < time) {
        let bytes = mutator.next(&corpus);
        let started = Instant::now();
        match attempt(&mut run, &bytes) {
            Ok(answer) => {
                if kinds.insert(kind(&answer)) && corpus.len() < good + KEPT_MAX {
                    corpus.push(Input::new(bytes));
                }
            }
            Err(what) => {
                let path = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("{target}-{tried}.hex"));
                std::fs::write(&path, to_hex(target, 1, &bytes)).unwrap();
                panic!("{target}, input {tried}: {what}; when mended, keep it in fixtures/hostile: {}", path.display());
            }
        }
        slowest = slowest.max(started.elapsed());
        tried += 1;
    }
    println!("fuzz {target}: {tried} inputs, {} kinds of answers, the slowest took {slowest:?}", kinds.len());
    assert!(kinds.len() > 1, "everything has the same answer: nothing was reached");
}
