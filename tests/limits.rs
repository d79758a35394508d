//! Quotas of disks hold for what is written, not only for what was flushed.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use afterimage::disk::{self, BlockDevice, Disk};
use afterimage::error::Kind;
use afterimage::snapshot;

use super::tree::new_pool;

const MIB: u64 = 1 << 20;
const QUOTA: u64 = 10 * MIB;

/// Writes MiB after MiB from `first` on until it is refused, and returns how many there were.
fn fill(disk: &Arc<Disk>, first: u64) -> u64 {
    let data = vec![7; MIB as usize];
    for n in 0.. {
        match disk.write(&data, (first + n) * MIB) {
            Ok(()) => {}
            Err(error) => {
                assert_eq!(error.kind(), Kind::NoSpace, "{error}");
                return n;
            }
        }
    }
    unreachable!("it is refused some time")
}

#[test]
fn a_quota_holds_without_a_flush_for_many_writers_and_across_snapshots() {
    let dir = tempfile::tempdir().unwrap();
    let store = new_pool(&dir);
    drop(disk::create(&store, "a", 4096 * MIB).unwrap());
    disk::set(&store, "a", "quota", "10M").unwrap();
    let disk = disk::open(&store, "a").unwrap();
    let written: u64 = std::thread::scope(|scope| {
        let writers: Vec<_> = (0..4)
            .map(|n| {
                scope.spawn({
                    let disk = &disk;
                    move || fill(disk, n * 512)
                })
            })
            .collect();
        writers.into_iter().map(|writer| writer.join().unwrap()).sum()
    });
    assert_eq!(written, QUOTA / MIB);
    disk.flush().unwrap();
    assert_eq!(fill(&disk, 3000), 0, "after a flush, too");
    // What is there is overwritten in place; after a snapshot it would take new room.
    disk.write(&[1; 4096], 0).unwrap();
    drop(snapshot::take(&store, &[("a".into(), "s".into())]).unwrap());
    assert_eq!(disk.write(&[2; 4096], 0).unwrap_err().kind(), Kind::NoSpace);
    // Room that comes back can be used, all of it.
    disk::set(&store, "a", "quota", "12M").unwrap();
    assert_eq!(fill(&disk, 3000), 2);
    disk.flush().unwrap();
    assert_eq!(fill(&disk, 3500), 0);
}

/// What a flush was about counted twice until the flush was done, so that a quota was full at half of it.
#[test]
fn what_is_being_flushed_counts_once() {
    let dir = tempfile::tempdir().unwrap();
    let store = new_pool(&dir);
    for n in 0..5 {
        let name = format!("d{n}");
        drop(disk::create(&store, &name, 4096 * MIB).unwrap());
        let disk = disk::open(&store, &name).unwrap();
        // Also what was written before there was a quota.
        assert!(disk.write(&[1; 4096], 0).is_ok());
        disk::set(&store, &name, "quota", "10M").unwrap();
        let done = AtomicBool::new(false);
        let fits = std::thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    disk.flush().unwrap();
                }
            });
            let fits = fill(&disk, 1);
            done.store(true, Ordering::Relaxed);
            fits
        });
        assert_eq!(fits, 9, "and a block, and not a MiB more");
        // A write that was refused, or failed, holds nothing.
        disk.write(&vec![1; MIB as usize - 4096], 100 * MIB).unwrap();
        assert_eq!(disk.write(&[1; 4096], 200 * MIB).unwrap_err().kind(), Kind::NoSpace);
        disk.discard(0, 4096).unwrap();
        disk.flush().unwrap();
        disk.write(&[1; 4096], 200 * MIB).unwrap();
    }
}

/// Three locks, taken in two orders: this stood still for ever now and then.
#[test]
fn disks_are_used_first_while_others_list_them_and_change_them() {
    let dir = tempfile::tempdir().unwrap();
    {
        let store = new_pool(&dir);
        for n in 0..200 {
            drop(disk::create(&store, &format!("d{n}"), MIB).unwrap());
        }
        store.close().unwrap();
    }
    let media = Arc::new(afterimage::media::host::HostMedia::new(dir.path()).unwrap());
    let store = afterimage::store::Store::open(media, afterimage::store::OpenOptions::default()).unwrap();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    assert_eq!(store.disks().len(), 200);
                }
            });
        }
        scope.spawn(|| {
            let mut n = 0;
            while !done.load(Ordering::Relaxed) {
                n += 1;
                disk::set(&store, "d0", "quota", &format!("{n}M")).unwrap();
            }
        });
        for n in 0..200 {
            drop(disk::open(&store, &format!("d{n}")).unwrap());
        }
        done.store(true, Ordering::Relaxed);
    });
    store.close().unwrap();
}
