//! One value of each kind, as fixed as the fixtures made from them.

use afterimage::error::Result;
use afterimage::map::{BlockSet, Entry};
use afterimage::pool::SegmentHeader;
use afterimage::store::rows::{self, BranchRow, Meta, SegmentRow};
use afterimage::store::{self, DiskRow, EnospcPolicy, OpeningRow, RetiredRow, Settings, StateRow, Status};
use afterimage::units::{BlockAddress, BranchId, DiskId, Epoch, SegmentId, SnapshotId};
use uuid::Uuid;

/// A value in its coding, and its decoder, which tells whether the value came back.
pub struct Sample {
    pub name: &'static str,
    pub bytes: Vec<u8>,
    pub decode: Decode,
}

type Decode = Box<dyn Fn(&[u8]) -> Result<bool>>;

pub const POOL: Uuid = Uuid::from_u128(0x00112233_4455_6677_8899_aabbccddeeff);
const OTHER: Uuid = Uuid::from_u128(0xfedcba98_7654_4321_8123_456789abcdef);

fn sample<T: PartialEq + 'static>(
    name: &'static str,
    value: T,
    encode: fn(&T) -> Vec<u8>,
    decode: fn(&[u8]) -> Result<T>,
) -> Sample {
    let bytes = encode(&value);
    Sample { name, bytes, decode: Box::new(move |bytes| decode(bytes).map(|found| found == value)) }
}

pub fn meta() -> Meta {
    Meta {
        disk: DiskId(3),
        branch: BranchId(5),
        epoch: Epoch(0x0102_0304_0506_0708),
        snapshot: SnapshotId(12),
        segment: SegmentId(7),
        openings: 2,
        clean: true,
    }
}

pub fn branch() -> BranchRow {
    BranchRow { parent: Some((BranchId(2), Epoch(9))), inherits: true, depth: 3, lineage: BranchId(1) }
}

pub fn segment() -> SegmentRow {
    let nonce = 0x8877_6655_4433_2211;
    SegmentRow { disk: DiskId(3), nonce, opening: 2, mapped: 515, swept: true, removed: false }
}

fn disk() -> DiskRow {
    DiskRow {
        name: "web-1".into(),
        uuid: OTHER,
        size: 10 << 30,
        trim: true,
        branch: BranchId(5),
        epoch: Epoch(11),
        base: Some((BranchId(2), Epoch(9))),
        floor: BlockAddress::new(SegmentId(7), 1024).raw(),
        created: 1_700_000_000,
        modified: 1_700_000_100,
        stamp: 1_700_000_050,
        referenced: 515,
        written: 3,
        origin: Some("golden@ready".into()),
        touched: true,
        settings: Settings {
            enospc: EnospcPolicy::Wait,
            quota: Some(20 << 30),
            iops: Some(500),
            bandwidth: None,
            extent_size: 8 << 20,
        },
    }
}

fn plain_disk() -> DiskRow {
    let settings = Settings::default();
    DiskRow { name: "a".into(), base: None, origin: None, trim: false, touched: false, floor: 0, settings, ..disk() }
}

pub fn state() -> StateRow {
    StateRow {
        status: Status::Live,
        snapshot: SnapshotId(12),
        disk: DiskId(3),
        name: "daily-1".into(),
        uuid: OTHER,
        size: 10 << 30,
        trim: false,
        created: 1_700_000_000,
        stamp: 1_700_000_001,
        referenced: 515,
        written: 3,
        floor: BlockAddress::new(SegmentId(6), 512).raw(),
        sealed: true,
        holds: vec!["backup".into(), "vm:web".into()],
    }
}

fn ghost() -> StateRow {
    StateRow { status: Status::Ghost, name: String::new(), sealed: false, holds: Vec::new(), ..state() }
}

fn retired() -> RetiredRow {
    let state = StateRow { status: Status::Retired, ..state() };
    RetiredRow { branch: BranchId(5), epoch: Epoch(10), lineage: BranchId(1), state }
}

pub fn opening() -> OpeningRow {
    OpeningRow { nonce: 0x1122_3344_5566_7788, snapshot: SnapshotId(11), begun: 1_700_000_000 }
}

pub fn header() -> SegmentHeader {
    SegmentHeader { pool: POOL, id: SegmentId(7), nonce: 0x8877_6655_4433_2211, disk: DiskId(3) }
}

fn slab(n: u32) -> BlockAddress {
    BlockAddress::new(SegmentId(7), n * 512)
}

/// A set of each form: full, range, list, bitmap.
pub fn sets() -> [BlockSet; 4] {
    [BlockSet::FULL, BlockSet::range(5, 400), [0, 7, 511].into_iter().collect(), (1..512).step_by(2).collect()]
}

fn entry(pieces: &[(u32, BlockSet)]) -> Entry {
    let mut entry = Entry::EMPTY;
    for (n, set) in pieces {
        entry.assign(slab(*n), set);
    }
    entry
}

fn scattered() -> Entry {
    let pieces: Vec<_> = (0..512).map(|i| (i + 1, BlockSet::range(i as usize, i as usize + 1))).collect();
    let mut entry = entry(&pieces);
    entry.remove(&BlockSet::range(100, 101));
    entry
}

fn free(bytes: &[u8]) -> Result<u64> {
    rows::decode_count(slab(2), bytes)
}

/// Every value that has a decoder of its own.
pub fn all() -> Vec<Sample> {
    let [full, range, list, bitmap] = sets();
    let maps = [
        ("map-tombstone", Entry::EMPTY),
        ("map-full", entry(&[(1, full)])),
        ("map-range", entry(&[(1, range)])),
        ("map-list", entry(&[(1, list)])),
        ("map-bitmap", entry(&[(1, bitmap)])),
        ("map-pieces", entry(&[(9, BlockSet::range(0, 512)), (2, list), (4, BlockSet::range(100, 140))])),
        ("map-flat", scattered()),
    ];
    let indexes = [("index-full", full), ("index-range", range), ("index-list", list), ("index-bitmap", bitmap)];
    let mut all = vec![
        sample("meta", meta(), Meta::encode, Meta::decode),
        sample("meta-new", Meta::default(), Meta::encode, Meta::decode),
        sample("branch", branch(), BranchRow::encode, BranchRow::decode),
        sample(
            "branch-first",
            BranchRow { parent: None, inherits: false, depth: 1, lineage: BranchId(1) },
            BranchRow::encode,
            BranchRow::decode,
        ),
        sample("segment-row", segment(), SegmentRow::encode, SegmentRow::decode),
        sample("disk", disk(), DiskRow::encode, DiskRow::decode),
        sample("disk-plain", plain_disk(), DiskRow::encode, DiskRow::decode),
        sample("state", state(), StateRow::encode, StateRow::decode),
        sample("state-ghost", ghost(), StateRow::encode, StateRow::decode),
        sample("retired", retired(), RetiredRow::encode, RetiredRow::decode),
        sample("stamp", 1_700_000_050, |stamp| store::encode_stamp(*stamp), store::decode_stamp),
        sample("opening", opening(), OpeningRow::encode, OpeningRow::decode),
        sample("free", 300, |count| rows::encode_count(*count), free),
        sample("data", super::make::pattern(1, 2), |block| rows::encode_block(block), rows::decode_block),
        sample("segment-header", header(), SegmentHeader::encode, |bytes| SegmentHeader::decode("it", bytes)),
    ];
    all.extend(maps.map(|(name, entry)| sample(name, entry, rows::encode_entry, rows::decode_entry)));
    all.extend(indexes.map(|(name, set)| sample(name, set, rows::encode_set, rows::decode_set)));
    all
}
