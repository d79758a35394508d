//! The logs of unflushed changes: golden bytes, damage, truncation.

use afterimage::map::BlockSet;
use afterimage::store::unflushed::{LOG_HEADER_LEN, LogHeader, LogRecord, MapChange};
use afterimage::units::{BlockAddress, BranchId, ChunkIndex, DiskId, Epoch, SegmentId};
use uuid::Uuid;

use super::samples::POOL;
use super::{each_flip, fixture, refused};

pub fn header() -> LogHeader {
    LogHeader { pool: POOL, boot: Uuid::from_u128(0x0123_4567_89ab_cdef << 64 | 77), opening: 5, disk: DiskId(3) }
}

fn records() -> Vec<LogRecord> {
    let (branch, epoch, chunk) = (BranchId(2), Epoch(0x0102_0304), ChunkIndex(600));
    let base = BlockAddress::new(SegmentId(7), 1024);
    let set = BlockSet::range(3, 5).or(&BlockSet::range(500, 512));
    let changes = [
        MapChange::Mapped { branch, epoch, chunk, base, set },
        MapChange::Unmapped { branch, epoch, chunk, set: BlockSet::FULL },
        MapChange::Overwritten { base, set: BlockSet::range(4, 5) },
        MapChange::Mapped { branch, epoch, chunk, base, set: (0..512).step_by(2).collect() },
    ];
    changes.into_iter().map(|change| LogRecord { generation: 9, change }).collect()
}

pub fn golden() -> Vec<u8> {
    records().iter().fold(header().encode(), |mut bytes, record| {
        bytes.extend(record.encode());
        bytes
    })
}

#[test]
fn a_log_is_golden() {
    let bytes = fixture("unflushed");
    assert_eq!(bytes, golden());
    assert_eq!(LogHeader::decode("log", &bytes).unwrap(), header());
    let (found, error) = LogRecord::decode_all("log", &bytes[LOG_HEADER_LEN..]);
    assert!(error.is_none() && found == records());
}

#[test]
fn a_damaged_log_is_refused_from_the_damage_on() {
    let golden = golden();
    each_flip(&golden[..LOG_HEADER_LEN], |bit, bad| refused(&format!("bit {bit}"), LogHeader::decode("log", bad)));
    for len in 0..LOG_HEADER_LEN {
        refused(&format!("{len} bytes"), LogHeader::decode("log", &golden[..len]));
    }
    let body = &golden[LOG_HEADER_LEN..];
    let ends: Vec<usize> = records()
        .iter()
        .scan(0, |end, record| {
            *end += record.encode().len();
            Some(*end)
        })
        .collect();
    let before = |at: usize| ends.iter().filter(|end| **end <= at).count();
    each_flip(body, |bit, bad| {
        let (found, error) = LogRecord::decode_all("log", bad);
        assert!(error.is_some() && found == records()[..before(bit / 8)], "bit {bit}");
    });
    for len in 0..body.len() {
        let (found, error) = LogRecord::decode_all("log", &body[..len]);
        assert!(found == records()[..before(len)], "{len} bytes");
        assert_eq!(error.is_none(), len == 0 || ends.contains(&len), "{len} bytes");
    }
}
