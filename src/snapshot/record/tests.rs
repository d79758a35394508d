//! Records of the largest disk, made without a disk: how much memory reading one takes.
//!
//! Ignored by default: they write 2 GiB and take a minute or two. Run them one at a time, for the figures:
//! `cargo test --lib record::tests -- --ignored --nocapture --test-threads 1`.

use std::sync::Arc;

use roaring::RoaringBitmap;
use uuid::Uuid;

use super::write::{Gathered, put_segment};
use super::{HEADER_LEN, Header, Record, RecordIdentity};
use crate::clock;
use crate::codec::Writer;
use crate::media::{File, HostMedia, Media, Open};
use crate::store::{Moment, RetiredRow, StateRow, Status};
use crate::units::{BranchId, CHUNK_SIZE, CHUNKS_MAX, DISK_SIZE_MAX, DiskId, Epoch, SegmentId, SnapshotId};

const SEGMENTS: u32 = 128;
const CHUNKS: u32 = 1 << 25;
/// The whole budget of the map: see `OpenOptions::cache_bytes`.
const BUDGET: u64 = 512 << 20;

fn identity(referenced: u64) -> RecordIdentity {
    let state = StateRow {
        status: Status::Retired,
        snapshot: SnapshotId(1),
        disk: DiskId(1),
        name: "s".into(),
        uuid: Uuid::from_u128(1),
        size: DISK_SIZE_MAX,
        trim: false,
        created: 1,
        stamp: 1,
        referenced,
        written: referenced,
        floor: 0,
        sealed: true,
        holds: Vec::new(),
    };
    RecordIdentity {
        pool: Uuid::from_u128(2),
        moment: Moment { opening: 1, nonce: 1 },
        disk_uuid: Uuid::from_u128(3),
        disk_name: "d".into(),
        row: RetiredRow { branch: BranchId(1), epoch: Epoch(1), lineage: BranchId(1), state },
    }
}

/// Writes a record in which the slab `n` of all belongs to the chunk `order(n)`, and has `blocks` of its 512 blocks.
fn write(file: &dyn File, blocks: u64, order: impl Fn(u32) -> u32) {
    let per = CHUNKS / SEGMENTS;
    let head = identity(blocks * u64::from(CHUNKS)).encode();
    let mut header = Header {
        identity: u32::try_from(head.len()).unwrap(),
        directory: 0,
        directory_len: 0,
        length: 0,
        segments: u64::from(SEGMENTS),
    };
    let mut at = HEADER_LEN as u64;
    let mut put = |bytes: &[u8]| {
        file.write_at(bytes, at).unwrap();
        at += bytes.len() as u64;
        Ok((at - bytes.len() as u64, bytes.len() as u64))
    };
    put(&head).unwrap();
    let mut directory = Writer::new();
    for segment in 0..SEGMENTS {
        let slabs: Vec<_> = (0..per).map(|n| (1 + n, order(segment * per + n))).collect();
        let set = if blocks == 512 {
            let mut all = RoaringBitmap::new();
            all.insert_range(512..512 * (per + 1));
            all
        } else {
            // Bits that neither runs nor arrays tell shorter: every other one.
            assert_eq!(blocks, 256);
            RoaringBitmap::from_lsb0_bytes(512, &vec![0x55; 64 * per as usize])
        };
        let id = SegmentId(u64::from(segment) + 1);
        put_segment(id, 1, Gathered { slabs, set }, &mut put).unwrap().encode(&mut directory);
    }
    (header.directory, header.directory_len) = put(&directory.sealed()).unwrap();
    header.length = header.directory + header.directory_len;
    file.write_at(&header.encode(), 0).unwrap();
}

/// Returns the peak of the memory of this process since it was asked for last, in bytes.
fn peak() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    let kib: u64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
    std::fs::OpenOptions::new()
        .write(true)
        .open("/proc/self/clear_refs")
        .map(|mut file| {
            std::io::Write::write_all(&mut file, b"5").unwrap();
        })
        .unwrap();
    kib << 10
}

fn measure(what: &str, blocks: u64, order: impl Fn(u32) -> u32) {
    assert_eq!((u64::from(CHUNKS), u64::from(CHUNKS) * CHUNK_SIZE), (CHUNKS_MAX, DISK_SIZE_MAX));
    let dir = tempfile::tempdir().unwrap();
    let media = HostMedia::new(dir.path()).unwrap();
    let file: Arc<dyn File> = media.open("record", Open::New).unwrap();
    write(&*file, blocks, order);
    peak();
    let begun = clock::now();
    let record = Record::read("the record", &file).unwrap();
    let (opened, at_opening) = (begun.elapsed(), peak());
    let mut walk = record.walk().unwrap();
    let (mut found, mut next) = (0, 0);
    while let Some((chunk, pieces)) = walk.step().unwrap() {
        assert_eq!(chunk.0, next);
        next += 1;
        found += pieces.iter().map(|piece| u64::from(piece.set.count())).sum::<u64>();
    }
    assert_eq!((next, found), (CHUNKS, blocks * u64::from(CHUNKS)));
    let (walked, at_walking) = (begun.elapsed(), peak());
    println!(
        "{what}: {} MiB; opened in {:.1} s with {} MiB, walked after {:.1} s with {} MiB",
        file.len().unwrap() >> 20,
        opened.as_secs_f64(),
        at_opening >> 20,
        walked.as_secs_f64(),
        at_walking >> 20
    );
    assert!(at_opening.max(at_walking) < BUDGET, "it fits the budget of the map");
}

#[test]
#[ignore = "a record of 64 TiB: for the figures"]
fn a_record_of_the_largest_disk_filled_in_order_takes_little_memory() {
    measure("64 TiB in order", 512, |n| n);
}

#[test]
#[ignore = "a record of 64 TiB: for the figures"]
fn a_record_of_the_largest_disk_filled_at_random_fits_the_budget() {
    measure("64 TiB at random, every other block", 256, |n| n.wrapping_mul(0x9e37_79b1) % CHUNKS);
}
