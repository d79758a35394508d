//! Quotas of disks hold for what is written, not only for what was flushed.

use std::sync::Arc;

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
