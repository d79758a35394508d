//! A power cut, an error and a kill at every I/O of a save: the old file, the new one, or none, and never another.

use std::sync::Arc;

use afterimage::checkpoint::{self, Folder, PageBlock};
use afterimage::error::Kind;
use afterimage::media::sim::Fault;
use afterimage::media::{Media, SimMedia};
use afterimage::progress::Silent;

use super::{Save, compare, name, open, sim};

fn folder_of(media: &SimMedia) -> Folder {
    let shared: Arc<dyn Media> = Arc::new(media.clone());
    Folder::of_pool(&shared)
}

/// What is left is whole, and what was interrupted goes at the next opening.
fn settle(media: &SimMedia, what: &str) -> bool {
    let folder = folder_of(media);
    folder.sweep().unwrap();
    let there = folder.exists(&name("vm@a")).unwrap();
    let left: Vec<_> = media.paths().into_iter().filter(|path| !path.ends_with(".ckpt")).collect();
    assert_eq!(left, [""; 0], "{what}");
    if there {
        let report = checkpoint::verify(&folder, &name("vm@a"), &Silent).unwrap();
        assert!(report.is_sound(), "{what}: {report:?}");
    }
    there
}

#[test]
fn a_power_cut_leaves_the_whole_file_or_none() {
    let mut ends = [0, 0];
    for countdown in 1.. {
        let mut all_down = true;
        for seed in 0..4 {
            let media = SimMedia::new(seed * 1000 + countdown);
            media.crash_after(countdown);
            let saved = Save::default().run(&folder_of(&media));
            let (done, down) = (saved.is_ok(), media.is_down());
            media.crash();
            let what = format!("crash after {countdown}, seed {seed}");
            let there = settle(&media, &what);
            assert!(there || !done, "what was answered holds: {what}");
            if there {
                compare(&open(&folder_of(&media), "vm@a").unwrap(), &|_| 1).unwrap();
            }
            Save { replace: there, seed: &|_| Some(9), ..Save::default() }.run(&folder_of(&media)).unwrap();
            compare(&open(&folder_of(&media), "vm@a").unwrap(), &|_| 9).unwrap();
            ends[usize::from(there)] += usize::from(down);
            all_down &= down;
        }
        if !all_down {
            assert!(ends[0] > 50 && ends[1] > 1, "crashes that leave none and one: {ends:?}");
            return;
        }
    }
}

/// The canary: without the sync of the file, a cut must leave a file under the name that is not whole.
#[test]
fn a_file_that_is_not_synced_is_caught() {
    let mut caught = 0;
    for seed in 0..20 {
        let media = SimMedia::new(seed);
        media.set_ignore_sync(".ckpt");
        Save::default().run(&folder_of(&media)).unwrap();
        media.crash();
        let verified = checkpoint::verify(&folder_of(&media), &name("vm@a"), &Silent);
        caught += usize::from(!verified.is_ok_and(|report| report.is_sound()));
    }
    assert!(caught > 10, "{caught} of 20");
}

#[test]
fn an_error_is_told_and_leaves_what_was_there() {
    for fault in [Fault::Eio, Fault::Enospc] {
        for replace in [false, true] {
            for countdown in 1.. {
                let (media, folder) = sim();
                if replace {
                    Save::default().run(&folder).unwrap();
                }
                let before = media.io_count();
                media.fail_after(countdown, fault);
                let saved = Save { replace, seed: &|_| Some(2), ..Save::default() }.run(&folder);
                let reached = media.io_count() - before >= countdown;
                media.fail_after(1 << 40, fault);
                let what = format!("{fault:?} at {countdown}, replacing: {replace}");
                match &saved {
                    Ok(()) => assert!(!reached, "{what}: an error was lost"),
                    Err(error) => {
                        let kind = if fault == Fault::Enospc { Kind::NoSpace } else { Kind::Io };
                        assert_eq!(error.kind(), kind, "{what}: {error}");
                    }
                }
                let there = settle(&media, &what);
                if there {
                    // Only after the rename an error may leave the new one, and then only in the place of an old one.
                    let old = compare_any(&folder);
                    assert!(saved.is_ok() || replace, "{what}");
                    assert!(old == 2 || saved.is_err(), "{what}");
                } else {
                    assert!(saved.is_err() && !replace, "{what}");
                }
                if !reached {
                    break;
                }
            }
        }
    }
}

/// Returns the seed of what is there, all of which has it.
fn compare_any(folder: &Folder) -> u64 {
    let reader = open(folder, "vm@a").unwrap();
    let seeds = [1, 2].into_iter().find(|seed| {
        let (seed, compared) = (*seed, std::panic::AssertUnwindSafe(&reader));
        std::panic::catch_unwind(move || compare(&compared, &|_| seed).unwrap()).is_ok()
    });
    seeds.expect("it is all of one save")
}

#[test]
fn a_cut_while_a_chain_is_flattened_leaves_the_chain_or_the_flat_one() {
    let third = |number: PageBlock| number.0.is_multiple_of(3).then_some(2);
    let seed_of = |number: PageBlock| if number.0.is_multiple_of(3) { 2 } else { 1 };
    let mut ends = [0, 0];
    for countdown in 1.. {
        let mut all_down = true;
        for seed in 0..3 {
            let media = SimMedia::new(seed * 1000 + countdown);
            let folder = folder_of(&media);
            Save::default().run(&folder).unwrap();
            Save { name: "vm@b", parent: Some("vm@a"), seed: &third, ..Save::default() }.run(&folder).unwrap();
            media.crash_after(countdown);
            let done = checkpoint::flatten(&folder, &name("vm@b"), &Silent).is_ok();
            let down = media.is_down();
            media.crash();
            settle(&media, &format!("crash after {countdown}"));
            let reader = open(&folder, "vm@b").unwrap();
            compare(&reader, &seed_of).unwrap();
            let flat = reader.layers().len() == 1;
            assert!(flat || !done);
            ends[usize::from(flat)] += usize::from(down);
            all_down &= down;
        }
        if !all_down {
            assert!(ends[0] > 10 && ends[1] > 1, "crashes that leave the chain and the flat one: {ends:?}");
            return;
        }
    }
}

/// Who is killed leaves a file that nobody has locked; who still saves has it locked, and keeps it.
#[test]
fn what_is_still_being_saved_is_no_leftover() {
    let dir = tempfile::tempdir().unwrap();
    let media: Arc<dyn Media> = Arc::new(afterimage::media::HostMedia::new(dir.path()).unwrap());
    let folder = Folder::of_pool(&media);
    let save = Save::default();
    let writer = checkpoint::Writer::create(&folder, save.plan()).unwrap();
    save.enter(&writer).unwrap();
    folder.sweep().unwrap();
    assert!(folder.is_being_saved(&name("vm@a")).unwrap());
    assert_eq!(save.run(&folder).unwrap_err().kind(), Kind::Busy);
    let cut = checkpoint::Cut { created: 1, disks: Vec::new(), state_version: 1, state: b"s" };
    writer.commit(&cut).unwrap();
    compare(&open(&folder, "vm@a").unwrap(), &|_| 1).unwrap();
    // As a killed process leaves it.
    let path = dir.path().join("checkpoints/vm/b.ckpt.new");
    std::fs::write(&path, b"half").unwrap();
    std::fs::write(dir.path().join("checkpoints/vm/b.faults"), b"of none").unwrap();
    std::fs::write(dir.path().join("checkpoints/vm/a.faults"), b"of one").unwrap();
    std::fs::write(dir.path().join("checkpoints/vm/notes"), b"of somebody").unwrap();
    assert!(!folder.is_being_saved(&name("vm@b")).unwrap());
    folder.sweep().unwrap();
    let mut left: Vec<_> = std::fs::read_dir(path.parent().unwrap()).unwrap().map(|e| e.unwrap().file_name()).collect();
    left.sort();
    assert_eq!(left, ["a.ckpt", "a.faults", "notes"]);
    // And in the way of a new one it does not stay either.
    std::fs::write(&path, b"half").unwrap();
    Save { name: "vm@b", ..Save::default() }.run(&folder).unwrap();
    let mode = |path: &str| {
        use std::os::unix::fs::PermissionsExt;
        std::fs::metadata(dir.path().join(path)).unwrap().permissions().mode() & 0o777
    };
    assert_eq!(["checkpoints", "checkpoints/vm", "checkpoints/vm/b.ckpt"].map(mode), [0o700, 0o700, 0o600]);
}
