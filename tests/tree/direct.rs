//! Reading and writing past the kernel's cache, many at a time and in sequence, with the ring and without it.

use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::fs::{FallocateFlags, fallocate};

use afterimage::tree::MountOptions;

use super::{Mount, noise, open_direct};

const BLOCK: usize = 4096;
const MIB: usize = 1 << 20;

/// Blocks and lengths that look random, from a seed.
fn places(seed: u64, count: usize, blocks: usize) -> Vec<(usize, usize)> {
    let bytes = noise(count * 8, seed);
    let number = |at: usize| usize::from(u16::from_le_bytes([bytes[at], bytes[at + 1]]));
    let place = |i: usize| {
        let len = if number(i * 8).is_multiple_of(7) { number(i * 8 + 2) % 300 + 1 } else { number(i * 8 + 2) % 4 + 1 };
        let first = number(i * 8 + 4) % blocks;
        (first, len.min(blocks - first))
    };
    (0..count).map(place).collect()
}

#[test]
fn many_writers_and_readers_at_once_see_what_they_wrote_across_snapshots() {
    for ring in [true, false] {
        let Some(mount) = Mount::with(|options| MountOptions { ring, ..options }) else { return };
        let (threads, region) = (6, 8 * MIB);
        let path = mount.make("a", (threads * region) as u64);
        let done = AtomicBool::new(false);
        let twins: Vec<Vec<u8>> = std::thread::scope(|scope| {
            let work = |n: usize| {
                let path = &path;
                move || {
                    let (file, base) = (open_direct(path), n * region);
                    let mut twin = vec![0; region];
                    for (round, (first, len)) in places(n as u64, 400, region / BLOCK).into_iter().enumerate() {
                        let range = first * BLOCK..(first + len) * BLOCK;
                        if round % 3 == 0 {
                            let mut seen = vec![1; range.len()];
                            file.read_exact_at(&mut seen, (base + range.start) as u64).unwrap();
                            assert!(seen == twin[range.clone()], "thread {n}, round {round}, {range:?}");
                        } else if round % 50 == 1 {
                            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                            fallocate(&file, flags, (base + range.start) as u64, range.len() as u64).unwrap();
                            twin[range].fill(0);
                        } else {
                            let data = noise(range.len(), (n * 1000 + round) as u64);
                            file.write_all_at(&data, (base + range.start) as u64).unwrap();
                            twin[range].copy_from_slice(&data);
                        }
                        if round % 90 == 89 {
                            file.sync_data().unwrap();
                        }
                    }
                    twin
                }
            };
            let workers: Vec<_> = (0..threads).map(|n| scope.spawn(work(n))).collect();
            let snapshots = scope.spawn(|| {
                for n in 0.. {
                    if done.load(Ordering::Relaxed) {
                        return;
                    }
                    drop(afterimage::snapshot::take(&mount.store, &[("a".into(), format!("s{n}"))]).unwrap());
                    std::thread::sleep(Duration::from_millis(20));
                }
            });
            let twins = workers.into_iter().map(|worker| worker.join().unwrap()).collect();
            done.store(true, Ordering::Relaxed);
            snapshots.join().unwrap();
            twins
        });
        let file = open_direct(&path);
        let mut seen = vec![1; region];
        for (n, twin) in twins.iter().enumerate() {
            file.read_exact_at(&mut seen, (n * region) as u64).unwrap();
            assert!(seen == *twin, "region {n}, ring {ring}");
        }
    }
}

#[test]
fn a_reader_in_sequence_sees_every_change_that_was_made_before_it_asked() {
    let Some(mount) = Mount::new() else { return };
    let path = mount.make("a", 64 * MIB as u64);
    let (reader, writer) = (open_direct(&path), open_direct(&path));
    let mut twin = noise(64 * MIB, 3);
    writer.write_all_at(&twin, 0).unwrap();
    drop(afterimage::snapshot::take(&mount.store, &[("a".into(), "s".into())]).unwrap());
    let mut seen = vec![0; MIB];
    for n in 0..64 {
        reader.read_exact_at(&mut seen, (n * MIB) as u64).unwrap();
        assert!(seen == twin[n * MIB..(n + 1) * MIB], "megabyte {n}");
        // What follows has been read ahead by now, or is being read.
        if n % 2 == 0 {
            std::thread::sleep(Duration::from_millis(3));
        }
        let next = (n + 1) * MIB + (n % 5) * 3 * BLOCK;
        if next + 2 * BLOCK > twin.len() {
            break;
        }
        match n % 4 {
            0 | 1 => {
                let data = noise(BLOCK, n as u64);
                writer.write_all_at(&data, next as u64).unwrap();
                twin[next..next + BLOCK].copy_from_slice(&data);
            }
            2 => {
                let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                fallocate(&writer, flags, next as u64, 2 * BLOCK as u64).unwrap();
                twin[next..next + 2 * BLOCK].fill(0);
            }
            _ => {}
        }
    }
}
