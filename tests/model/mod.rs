//! The model test: random operations on a pool over simulated files, beside a twin that is slow and obvious.
//!
//! A diff must tell of every byte that differs, and of exactly the blocks that were written or unmapped between the two
//! states, whatever was retired, reverted, cloned, deleted and resized; only where a power cut left open what a block
//! has, more is allowed.
//!
//! Every I/O can be the last one. After each recovery `check` must find nothing, and every byte of every disk and
//! snapshot must be what the twin allows: for a snapshot exactly its image, for a live disk each 512-byte sector either
//! what was last flushed or one of the versions written since.
//!
//! One failing seed is one command: `AFTERIMAGE_SEED=N cargo test model::seeds`. A long run:
//! `AFTERIMAGE_SEEDS=1000 cargo test --release model::seeds`.

mod past;
mod rebuild;
mod run;
mod seals;
mod twin;

use run::Run;

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
    let seeds = number("AFTERIMAGE_SEEDS", 24);
    let mut total = run::Counts::default();
    for seed in 1..=seeds {
        let outcome = std::panic::catch_unwind(|| {
            let mut run = Run::new(seed);
            run.go(ops);
            run.counts
        });
        match outcome {
            Ok(counts) => total.add(&counts),
            Err(panic) => {
                eprintln!("repeat it with: AFTERIMAGE_SEED={seed} AFTERIMAGE_OPS={ops} cargo test model::seeds");
                std::panic::resume_unwind(panic);
            }
        }
    }
    println!("model: {seeds} seeds, {total:?}");
    assert!(
        total.crashes > 0 && total.snapshots > 0 && total.reverts > 0 && total.retires > 0 && total.diffs > 0,
        "the histories do something"
    );
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
