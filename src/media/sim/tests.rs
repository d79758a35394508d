//! The simulator must lose what was not promised and keep what was; both are shown over many seeds.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::{Fault, SimMedia};
use crate::media::{File, Media, Open};

const SEEDS: u64 = 64;

fn make(media: &SimMedia, path: &str) -> Arc<dyn File> {
    media.open(path, Open::New).unwrap()
}

fn content(media: &SimMedia, path: &str) -> Vec<u8> {
    let file = media.open(path, Open::ReadOnly).unwrap();
    let mut buf = vec![0xee; usize::try_from(file.len().unwrap()).unwrap()];
    file.read_exact_at(&mut buf, 0).unwrap();
    buf
}

/// Makes a file "f" of four pages of `a`, all durable.
fn durable_file(seed: u64) -> (SimMedia, Arc<dyn File>) {
    let media = SimMedia::new(seed);
    let file = make(&media, "f");
    file.write_at(&[b'a'; 16_384], 0).unwrap();
    file.sync().unwrap();
    media.sync_dir("").unwrap();
    (media, file)
}

/// Returns every content that "f" has after a crash, over all seeds.
fn outcomes(work: impl Fn(&SimMedia, &dyn File)) -> BTreeSet<Vec<u8>> {
    let mut seen = BTreeSet::new();
    for seed in 0..SEEDS {
        let (media, file) = durable_file(seed);
        work(&media, &*file);
        media.crash();
        seen.insert(content(&media, "f"));
    }
    seen
}

#[test]
fn a_synced_write_always_survives_whole() {
    let seen = outcomes(|_, file| {
        file.write_at(&[b'b'; 9000], 1000).unwrap();
        file.sync().unwrap();
    });
    assert_eq!(seen.len(), 1);
    let bytes = seen.first().unwrap();
    assert!(bytes[1000..10_000].iter().all(|&byte| byte == b'b'));
    assert!(bytes[10_000..].iter().all(|&byte| byte == b'a'));
}

#[test]
fn an_unsynced_write_vanishes_survives_or_tears() {
    let seen = outcomes(|_, file| file.write_at(&[b'b'; 4096], 4096).unwrap());
    let survived = |bytes: &Vec<u8>| bytes.iter().filter(|&&byte| byte == b'b').count();
    let counts: BTreeSet<usize> = seen.iter().map(survived).collect();
    assert!(counts.contains(&0) && counts.contains(&4096), "{counts:?}");
    assert!(counts.iter().any(|&count| count != 0 && count != 4096), "torn: {counts:?}");
    assert!(counts.iter().all(|count| count % 512 == 0), "sectors are atomic: {counts:?}");
    assert!(seen.iter().all(|bytes| bytes.len() == 16_384));
}

#[test]
fn writes_survive_out_of_order() {
    let seen = outcomes(|_, file| {
        file.write_at(b"1", 0).unwrap();
        file.write_at(b"2", 8192).unwrap();
    });
    let pairs: BTreeSet<(u8, u8)> = seen.iter().map(|bytes| (bytes[0], bytes[8192])).collect();
    assert_eq!(pairs.len(), 4, "{pairs:?}");
}

#[test]
fn what_survives_past_the_old_end_is_covered_by_the_length() {
    let seen = outcomes(|_, file| {
        file.write_at(&[b'b'; 4096], 16_384).unwrap();
        file.write_at(&[b'c'; 1000], 20_480).unwrap();
    });
    for bytes in &seen {
        assert!((16_384..=21_480).contains(&bytes.len()));
        assert!(bytes[..16_384].iter().all(|&byte| byte == b'a'));
        assert!(bytes[16_384..].iter().all(|&byte| matches!(byte, 0 | b'b' | b'c')));
    }
    let hole = |bytes: &&Vec<u8>| bytes.len() > 20_480 && bytes[16_384..20_480].iter().all(|&byte| byte == 0);
    assert!(seen.iter().any(|bytes| hole(&bytes)), "the later write alone leaves a hole");
    assert!(seen.iter().any(|bytes| bytes.len() == 16_384));
}

#[test]
fn cuts_and_punches_survive_or_not() {
    let lengths: BTreeSet<usize> = outcomes(|_, file| file.set_len(100).unwrap()).iter().map(Vec::len).collect();
    assert_eq!(lengths, BTreeSet::from([100, 16_384]));
    let zeros = |bytes: &Vec<u8>| bytes.iter().filter(|&&byte| byte == 0).count();
    let punched: BTreeSet<usize> = outcomes(|_, file| file.punch(4096, 8192).unwrap()).iter().map(zeros).collect();
    assert_eq!(punched, BTreeSet::from([0, 4096, 8192]));
}

#[test]
fn names_survive_as_a_prefix() {
    let mut seen = BTreeSet::new();
    for seed in 0..SEEDS {
        let media = SimMedia::new(seed);
        for name in ["a", "b", "c"] {
            make(&media, name).sync().unwrap();
        }
        media.rename("a", "d").unwrap();
        media.crash();
        seen.insert(media.paths());
    }
    let want: [&[&str]; 5] = [&[], &["a"], &["a", "b"], &["a", "b", "c"], &["b", "c", "d"]];
    let want = want.iter().map(|names| names.iter().map(|&name| name.to_owned()).collect()).collect();
    assert_eq!(seen, want);
}

#[test]
fn a_move_between_directories_is_atomic() {
    for seed in 0..SEEDS {
        let media = SimMedia::new(seed);
        media.make_dir("x").unwrap();
        media.make_dir("y").unwrap();
        make(&media, "x/f");
        media.sync_dir("x").unwrap();
        media.sync_dir("").unwrap();
        media.rename("x/f", "y/f").unwrap();
        make(&media, "x/g");
        let fork = media.fork(seed);
        media.crash();
        let kept: Vec<String> = media.paths().into_iter().filter(|path| path.ends_with('f')).collect();
        assert_eq!(kept.len(), 1, "{kept:?}");
        fork.sync_dir("y").unwrap();
        fork.crash();
        assert!(fork.paths().contains(&"y/f".to_owned()));
        assert!(!fork.paths().contains(&"x/f".to_owned()));
    }
}

#[test]
fn a_file_in_a_directory_that_was_not_synced_may_go_with_it() {
    let lost = (0..SEEDS).any(|seed| {
        let media = SimMedia::new(seed);
        media.make_dir("d").unwrap();
        make(&media, "d/f").sync().unwrap();
        media.sync_dir("d").unwrap();
        media.crash();
        media.paths().is_empty()
    });
    assert!(lost);
}

#[test]
fn a_removed_file_may_come_back_with_its_bytes() {
    let mut back = 0;
    for seed in 0..SEEDS {
        let (media, file) = durable_file(seed);
        drop(file);
        let free = media.space().unwrap().free;
        media.remove("f").unwrap();
        assert_eq!(media.space().unwrap().free, free + 16_384);
        media.crash();
        if media.paths() == ["f"] {
            back += 1;
            assert_eq!(content(&media, "f"), [b'a'; 16_384]);
            assert_eq!(media.space().unwrap().free, free);
        }
    }
    assert!((1..SEEDS).contains(&back));
}

#[test]
fn the_same_seed_gives_the_same_disk() {
    let run = |seed| {
        let (media, file) = durable_file(seed);
        for i in 0..50 {
            file.write_at(&[u8::try_from(i).unwrap(); 3000], i * 700).unwrap();
        }
        media.crash();
        content(&media, "f")
    };
    assert_eq!(run(7), run(7));
    assert!((0..8).map(run).collect::<BTreeSet<_>>().len() > 4);
}

#[test]
fn power_is_lost_at_the_nth_io_and_stays_lost() {
    let (media, file) = durable_file(3);
    let start = media.io_count();
    media.crash_after(2);
    file.write_at(b"x", 0).unwrap();
    assert!(!media.is_down());
    let error = file.write_at(b"y", 1).unwrap_err();
    assert!(error.to_string().contains("power lost"), "{error}");
    assert!(media.is_down());
    file.read_at(&mut [0], 0).unwrap_err();
    assert!(file.len().is_err() && file.sync().is_err() && file.next_data(0).is_err());
    assert!(media.open("f", Open::ReadOnly).is_err() && media.list("").is_err() && media.space().is_err());
    assert!(media.sync_dir("").is_err() && media.make_dir("d").is_err());
    assert_eq!(media.io_count(), start + 2);
    media.crash();
    assert!(!media.is_down());
    file.read_at(&mut [0], 0).expect_err("handles from before are dead");
    file.sync().unwrap_err();
    assert_eq!(content(&media, "f").len(), 16_384);
}

#[test]
fn the_io_that_was_cut_may_survive() {
    let seen = outcomes(|media, file| {
        media.crash_after(1);
        file.write_at(b"b", 0).unwrap_err();
    });
    assert_eq!(seen.iter().map(|bytes| bytes[0]).collect::<BTreeSet<_>>(), BTreeSet::from([b'a', b'b']));
}

#[test]
fn a_fault_strikes_once_and_without_effect() {
    let (media, file) = durable_file(1);
    media.fail_after(2, Fault::Enospc);
    file.write_at(b"b", 0).unwrap();
    assert_eq!(file.write_at(b"c", 0).unwrap_err().raw_os_error(), Some(libc::ENOSPC));
    assert_eq!(content(&media, "f")[0], b'b');
    media.fail_after(1, Fault::Eio);
    assert_eq!(media.make_dir("d").unwrap_err().raw_os_error(), Some(libc::EIO));
    media.make_dir("d").unwrap();
}

#[test]
fn a_failed_sync_loses_the_changes_though_the_next_succeeds() {
    let seen = outcomes(|media, file| {
        file.write_at(b"b", 0).unwrap();
        media.fail_after(1, Fault::Eio);
        assert_eq!(file.sync().unwrap_err().raw_os_error(), Some(libc::EIO));
        file.sync().unwrap();
        assert_eq!(content(media, "f")[0], b'b', "the page cache lies");
    });
    assert_eq!(seen.len(), 1);
    assert_eq!(seen.first().unwrap()[0], b'a');
}

#[test]
fn a_full_disk_refuses_new_pages_only() {
    let (media, file) = durable_file(1);
    media.set_space(Some(8192));
    assert_eq!(media.space().unwrap().free, 8192);
    assert_eq!(file.write_at(&[1; 12_288], 16_384).unwrap_err().raw_os_error(), Some(libc::ENOSPC));
    assert_eq!(file.len().unwrap(), 16_384, "without effect");
    file.write_at(&[1; 8192], 16_384).unwrap();
    file.write_at(&[2; 16_384], 0).unwrap();
    assert_eq!(file.write_at(b"x", 30_000).unwrap_err().raw_os_error(), Some(libc::ENOSPC));
    file.set_len(1 << 30).unwrap();
    file.punch(0, 4096).unwrap();
    assert_eq!(media.space().unwrap().free, 4096);
    file.write_at(b"x", 30_000).unwrap();
    media.remove("f").unwrap();
    assert_eq!(media.space().unwrap().free, 24_576);
    file.write_at(&[3; 4096], 1 << 20).unwrap();
    drop(file);
    media.sync_dir("").unwrap();
    assert_eq!(media.space().unwrap().free, 24_576);
    media.set_space(None);
    assert!(media.space().unwrap().free > 1 << 49);
}

#[test]
fn an_ignored_sync_loses_data() {
    let seen = outcomes(|media, file| {
        // A handle knows the path it was opened by: "f" here.
        media.set_ignore_sync("f");
        file.write_at(b"b", 0).unwrap();
        file.sync().unwrap();
    });
    assert!(seen.len() > 1);
    let lost = (0..SEEDS).any(|seed| {
        let media = SimMedia::new(seed);
        media.set_ignore_sync_dir(true);
        make(&media, "g");
        media.sync_dir("").unwrap();
        media.crash();
        media.paths().is_empty()
    });
    assert!(lost);
}

#[test]
fn forks_go_their_own_way() {
    let (media, file) = durable_file(1);
    file.write_at(b"b", 0).unwrap();
    let firsts: BTreeSet<u8> = (0..SEEDS)
        .map(|seed| {
            let fork = media.fork(seed);
            fork.crash();
            content(&fork, "f")[0]
        })
        .collect();
    assert_eq!(firsts, BTreeSet::from([b'a', b'b']));
    file.write_at(b"c", 1).unwrap();
    assert_eq!(&content(&media, "f")[..3], b"bca", "the original goes on");
}

#[test]
fn damage_is_on_the_disk() {
    let (media, file) = durable_file(1);
    media.flip_bit("f", 5000, 0).unwrap();
    assert!(media.flip_bit("f", 16_384, 0).is_err());
    media.truncate("f", 6000).unwrap();
    media.truncate("none", 0).unwrap_err();
    file.sync().unwrap();
    media.crash();
    let bytes = content(&media, "f");
    assert_eq!(bytes.len(), 6000);
    assert_eq!(bytes.iter().position(|&byte| byte != b'a'), Some(5000));
    assert_eq!(bytes[5000], b'a' ^ 1);
}

/// Random work on one file against a plain vector, with syncs in between: after a synced crash both agree.
#[test]
fn syncing_agrees_with_a_plain_model() {
    for seed in 0..SEEDS {
        let mut rng = super::rng::Rng::new(seed);
        let (media, file) = durable_file(seed);
        let mut model = vec![b'a'; 16_384];
        for step in 0..200_u64 {
            let offset = rng.up_to(30_000);
            let len = rng.up_to(9000);
            match rng.below(8) {
                0 => {
                    file.set_len(offset as u64).unwrap();
                    model.resize(offset, 0);
                }
                1 => {
                    file.punch(offset as u64, len as u64).unwrap();
                    let size = model.len();
                    model[offset.min(size)..(offset + len).min(size)].fill(0);
                }
                2 => file.sync().unwrap(),
                _ => {
                    let byte = u8::try_from(step).unwrap();
                    file.write_at(&vec![byte; len], offset as u64).unwrap();
                    if len > 0 {
                        model.resize(model.len().max(offset + len), 0);
                        model[offset..offset + len].fill(byte);
                    }
                }
            }
            assert!(content(&media, "f") == model, "seed {seed} step {step}");
        }
        file.sync().unwrap();
        media.crash();
        assert!(content(&media, "f") == model, "seed {seed} after the crash");
    }
}

#[test]
fn a_kill_keeps_what_was_written_and_a_crash_is_another_boot() {
    let media = SimMedia::new(1);
    let boot = media.boot().unwrap();
    let file = media.open("f", Open::New).unwrap();
    file.write_at(b"abc", 0).unwrap();
    media.crash_after(1);
    assert!(file.sync().is_err());
    media.kill();
    assert!(file.len().is_err(), "its handles are dead");
    let mut buf = [0; 3];
    media.open("f", Open::ReadOnly).unwrap().read_exact_at(&mut buf, 0).unwrap();
    assert_eq!((&buf, media.boot().unwrap()), (b"abc", boot));
    media.crash();
    assert_ne!(media.boot().unwrap(), boot);
}
