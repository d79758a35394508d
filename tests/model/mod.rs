//! The model test: random operations on a pool over simulated files, beside a twin that is slow and obvious.
//!
//! A diff must tell of every byte that differs, and of exactly the blocks that were written or unmapped between the two
//! states, whatever was retired, reverted, cloned, deleted and resized; only where a power cut left open what a block
//! has, more is allowed.
//!
//! A stream and an increment directory must carry exactly that too, and lead from the bytes of one state to those of the
//! other. What is received, into a new disk, onto its base or by force, is there whole or not at all; a stream that does
//! not fit or was cut off changes nothing.
//!
//! Every I/O can be the last one. After each recovery `check` must find nothing, and every byte of every disk and
//! snapshot must be what the twin allows: for a snapshot exactly its image, for a live disk each 512-byte sector either
//! what was last flushed or one of the versions written since.
//!
//! The host may be full for a while (`full`): what is said to be done then is done, too.
//!
//! The process may also be killed: then what was acknowledged to a guest that comes back is there, flushed or not (`ends`).
//!
//! One failing seed is one command: `AFTERIMAGE_SEED=N cargo test model::seeds`. A long run:
//! `AFTERIMAGE_SEEDS=1000 cargo test --release model::seeds`, beginning with seed `AFTERIMAGE_FIRST` if that is set. It
//! goes on after a seed that fails, and names all of them at the end.

mod ends;
mod full;
mod past;
mod rebuild;
mod run;
mod seals;
mod streams;
mod twin;

use run::Run;

/// What a run did.
#[derive(Debug, Default, Clone, Copy)]
struct Counts {
    ops: u64,
    crashes: u64,
    faults: u64,
    reopens: u64,
    snapshots: u64,
    reverts: u64,
    clones: u64,
    retires: u64,
    diffs: u64,
    sends: u64,
    exports: u64,
    scripts: u64,
    received: u64,
    onto: u64,
    forced: u64,
    refused: u64,
    cut: u64,
    resumed: u64,
    kills: u64,
    guests: u64,
    back: u64,
    told: u64,
    full: u64,
    found_full: u64,
    journals: u64,
}

impl Counts {
    fn add(&mut self, other: &Self) {
        self.ops += other.ops;
        self.crashes += other.crashes;
        self.faults += other.faults;
        self.reopens += other.reopens;
        self.snapshots += other.snapshots;
        self.reverts += other.reverts;
        self.clones += other.clones;
        self.retires += other.retires;
        self.diffs += other.diffs;
        self.sends += other.sends;
        self.exports += other.exports;
        self.scripts += other.scripts;
        self.received += other.received;
        self.onto += other.onto;
        self.forced += other.forced;
        self.refused += other.refused;
        self.cut += other.cut;
        self.resumed += other.resumed;
        self.kills += other.kills;
        self.guests += other.guests;
        self.back += other.back;
        self.told += other.told;
        self.full += other.full;
        self.found_full += other.found_full;
        self.journals += other.journals;
    }
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().map_or(default, |text| text.parse().expect("a number"))
}

/// Random histories with crashes at any I/O, reopenings, and all background work as steps.
#[test]
fn seeds() {
    let ops = number("AFTERIMAGE_OPS", 1000);
    if let Ok(seed) = std::env::var("AFTERIMAGE_SEED") {
        let mut run = Run::new(seed.parse().expect("a number"));
        run.verbose = true;
        run.go(ops);
        return;
    }
    let (first, seeds) = (number("AFTERIMAGE_FIRST", 1), number("AFTERIMAGE_SEEDS", 24));
    let mut total = Counts::default();
    let mut failed = Vec::new();
    for seed in first..first + seeds {
        let outcome = std::panic::catch_unwind(|| {
            let mut run = Run::new(seed);
            run.go(ops);
            run.counts
        });
        match outcome {
            Ok(counts) => total.add(&counts),
            Err(_) => {
                eprintln!("repeat it with: AFTERIMAGE_SEED={seed} AFTERIMAGE_OPS={ops} cargo test model::seeds");
                failed.push(seed);
            }
        }
    }
    println!("model: {seeds} seeds, {total:?}");
    assert!(failed.is_empty(), "these seeds failed: {failed:?}");
    assert!(
        total.crashes > 0 && total.snapshots > 0 && total.reverts > 0 && total.retires > 0 && total.diffs > 0,
        "the histories do something"
    );
    assert!(total.full > 0 && total.found_full > 0 && total.journals > 0, "the host runs full");
    assert!(total.kills > 0 && total.back > 0 && total.told > 0, "guests come back, and are told");
    assert!(total.sends > 0 && total.exports > 0 && total.received > 0 && total.onto > 0, "and so do the streams");
}

/// The same with the threads in the background at work in between: what they do may come between any two I/Os.
#[test]
fn seeds_with_the_background() {
    let (ops, seeds) = (number("AFTERIMAGE_OPS", 400), number("AFTERIMAGE_SEEDS", 6));
    let first = number("AFTERIMAGE_FIRST", 1);
    for seed in first..first + seeds {
        println!("background: seed {seed}");
        Run::of(seed, true).go(ops);
    }
}

/// The canary: with one kind of sync removed the model must find lost data, or it could not find it at all.
#[test]
fn a_missing_sync_is_caught() {
    for part in ["journal", ".seg"] {
        let caught = (1..=40u64).any(|seed| {
            std::panic::catch_unwind(|| {
                let mut run = Run::new(seed);
                run.media.set_ignore_sync(part);
                run.go(400);
            })
            .is_err()
        });
        assert!(caught, "nothing was noticed in 40 seeds with the sync of '{part}' removed");
    }
}
