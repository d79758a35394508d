//! Records of retired snapshots: golden, damaged, cut, and as their page says.

use std::sync::Arc;

use afterimage::disk::{self, BlockDevice};
use afterimage::error::Result;
use afterimage::media::{Media, Open, SimMedia};
use afterimage::snapshot;
use afterimage::snapshot::record::{self, Memory, Record, RecordIdentity, record_path};
use afterimage::store::{InitOptions, Moment, RetiredRow, Store};
use afterimage::units::{BranchId, Epoch};
use uuid::Uuid;

use super::make::{options, pattern};
use super::samples::{self, POOL};
use super::{each_flip, fixture, refused};

/// What varies between records.
#[derive(Clone, Copy)]
pub struct Recipe {
    pub name: &'static str,
    pub blocks: &'static [u64],
    pub nonce: u64,
    /// Segments that another disk takes first.
    pub before: u32,
    /// Opens the pool anew before the last block is written, so that it goes to another segment.
    pub reopen: bool,
}

pub const RECIPE: Recipe =
    Recipe { name: "daily-1", blocks: &[0, 1, 2, 5, 600, 601, 1500, 9000], nonce: 7, before: 0, reopen: false };

fn store(media: &Arc<dyn Media>) -> Arc<Store> {
    Store::open(Arc::clone(media), options()).unwrap()
}

/// Makes a snapshot and its record, and returns the bytes.
pub fn record_of(recipe: &Recipe) -> Vec<u8> {
    let media: Arc<dyn Media> = Arc::new(SimMedia::new(1));
    Store::init(&media, InitOptions { journal: 1 << 20, ballast: 4096, probe: false }).unwrap();
    let mut pool = store(&media);
    for n in 0..recipe.before {
        let name = format!("first{n}");
        disk::create(&pool, &name, 1 << 20).unwrap();
        disk::open(&pool, &name).unwrap().write(&pattern(1, 0), 0).unwrap();
    }
    disk::create(&pool, "web", 64 << 20).unwrap();
    for (n, block) in recipe.blocks.iter().enumerate() {
        if recipe.reopen && n + 1 == recipe.blocks.len() {
            pool.close().unwrap();
            drop(pool);
            pool = store(&media);
        }
        disk::open(&pool, "web").unwrap().write(&pattern(1, *block), block * 4096).unwrap();
    }
    snapshot::take(&pool, &[("web".into(), "s".into())]).unwrap();
    let key = {
        let tables = pool.tables.read();
        tables.snapshot(tables.disk_id("web").unwrap(), "s").unwrap().0
    };
    let mut state = samples::state();
    state.status = afterimage::store::Status::Retired;
    state.name = recipe.name.into();
    state.referenced = recipe.blocks.len() as u64;
    let identity = RecordIdentity {
        pool: POOL,
        moment: Moment { opening: 4, nonce: 9 },
        disk_uuid: Uuid::from_u128(5),
        disk_name: "web".into(),
        row: RetiredRow { branch: BranchId(2), epoch: Epoch(9), lineage: BranchId(1), state },
    };
    record::write(&*media, &identity, &pool.map_of(key), &|_| Ok(recipe.nonce)).unwrap();
    let file = media.open(&record_path(identity.row.state.uuid), Open::ReadOnly).unwrap();
    let mut bytes = vec![0; file.len().unwrap() as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

fn read(bytes: &[u8]) -> Result<Record> {
    let media = SimMedia::new(1);
    let file = media.open("record", Open::New).unwrap();
    file.write_at(bytes, 0).unwrap();
    Record::read("the record", &file)
}

fn blocks(record: &Record) -> Vec<u64> {
    let mut walk = record.walk().unwrap();
    let mut all = Vec::new();
    while let Some((chunk, pieces)) = walk.step().unwrap() {
        let first = u64::from(chunk.0) * 512;
        all.extend(pieces.iter().flat_map(|piece| piece.set.iter()).map(|block| first + block as u64));
    }
    all
}

#[test]
fn a_record_is_golden_and_comes_back() {
    let golden = fixture("record");
    assert!(golden == record_of(&RECIPE), "the record is made otherwise");
    let record = read(&golden).unwrap();
    assert_eq!((record.identity.pool, record.identity.row.state.name.as_str()), (POOL, "daily-1"));
    assert_eq!(record.identity.moment, Moment { opening: 4, nonce: 9 });
    assert_eq!(record.identity.row.state.size, 10 << 30);
    assert_eq!(blocks(&record), RECIPE.blocks);
    // In parts it is the same, wherever they begin.
    for first in 0..=u32::try_from(RECIPE.blocks.iter().max().unwrap() / 512).unwrap() {
        let mut walk = record.walk_between(first..first + 1).unwrap();
        let mut all = Vec::new();
        while let Some((chunk, pieces)) = walk.step().unwrap() {
            assert_eq!(chunk.0, first);
            all.extend(
                pieces.iter().flat_map(|piece| piece.set.iter()).map(|block| u64::from(first) * 512 + block as u64),
            );
        }
        let expected: Vec<u64> =
            RECIPE.blocks.iter().copied().filter(|block| block / 512 == u64::from(first)).collect();
        assert_eq!(all, expected);
    }
    let two = Recipe { reopen: true, ..RECIPE };
    assert_eq!(blocks(&read(&record_of(&two)).unwrap()), RECIPE.blocks);
}

/// A record that does not fit into memory is walked over all the same.
#[test]
fn a_record_is_the_same_with_little_memory() {
    let many = Recipe { reopen: true, ..RECIPE };
    for bytes in [record_of(&many), record_of(&scattered())] {
        let media = SimMedia::new(1);
        let file = media.open("record", Open::New).unwrap();
        file.write_at(&bytes, 0).unwrap();
        let whole = Record::read("the record", &file).unwrap();
        let expected = blocks(&whole);
        for (sets, runs) in [(0, usize::MAX), (u64::MAX, 1), (0, 1), (0, 2), (0, 3), (0, 7), (0, 64)] {
            let little = Record::read_within("the record", &file, Memory { sets, runs }).unwrap();
            assert_eq!(blocks(&little), expected, "{sets} bytes of sets, {runs} runs");
            let chunks: std::collections::BTreeSet<u64> = expected.iter().map(|block| block / 512).collect();
            let last = u32::try_from(*chunks.last().unwrap()).unwrap();
            // From any chunk on, and chunk by chunk, also those that have nothing.
            for first in [0, 1, last / 2, last, last + 1, last + 5000] {
                let walk = |record: &Record| {
                    let mut walk = record.walk_between(first..first + 40).unwrap();
                    let mut all = Vec::new();
                    while let Some((chunk, pieces)) = walk.step().unwrap() {
                        all.push((chunk, pieces.to_vec()));
                    }
                    all
                };
                assert_eq!(walk(&little), walk(&whole), "from chunk {first}, {sets}, {runs}");
                let (mut a, mut b) =
                    (little.walk_between(first..u32::MAX).unwrap(), whole.walk_between(first..u32::MAX).unwrap());
                for chunk in (first..first + 200).step_by(3) {
                    let chunk = afterimage::units::ChunkIndex(chunk);
                    assert_eq!(a.pick(chunk).unwrap(), b.pick(chunk).unwrap());
                }
            }
        }
    }
}

/// Every other block of many chunks, written in an order that no run can tell.
fn scattered() -> Recipe {
    static BLOCKS: std::sync::LazyLock<Vec<u64>> = std::sync::LazyLock::new(|| {
        (0..31).flat_map(|n| (0..9).map(move |i| (n * 12 % 31) * 512 + i * 56 + n % 3)).collect()
    });
    Recipe { blocks: &BLOCKS, ..RECIPE }
}

#[test]
fn every_flipped_bit_of_a_record_is_corruption() {
    each_flip(&fixture("record"), |bit, bad| refused(&format!("bit {bit}"), read(bad)));
}

#[test]
fn every_cut_and_every_addition_to_a_record_is_corruption() {
    let golden = fixture("record");
    for len in 0..golden.len() {
        refused(&format!("cut to {len}"), read(&golden[..len]));
    }
    refused("a byte more", read(&[&golden[..], &[0]].concat()));
}
