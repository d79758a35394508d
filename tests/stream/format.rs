//! The bytes of a stream: golden, every bit turned over, cut at every byte.

use afterimage::codec::{crc32, seal};
use afterimage::error::{Error, Kind};
use afterimage::store::Moment;
use afterimage::stream::format::{Codec, Header, RECORD_LEN, Record, StateId};
use afterimage::stream::{Part, StreamReader, StreamWriter};
use uuid::Uuid;

use crate::format::{each_flip, fixture};

pub fn header() -> Header {
    let state = |uuid, size, name: &str| StateId {
        uuid: Uuid::from_u128(uuid),
        size,
        created: 1_795_352_707,
        moment: Moment { opening: 3, nonce: 0x1122_3344_5566_7788 },
        name: name.to_owned(),
    };
    Header {
        pool: Uuid::from_u128(0x0011_2233),
        disk: Uuid::from_u128(0x4455_6677),
        disk_name: "web".to_owned(),
        base: Some(state(0x8899, 1 << 20, "monday")),
        target: state(0xaabb, (1 << 21) + 512, "tuesday"),
        start: 0,
        data: 8192 + 512,
        zeros: 12288,
    }
}

fn block(tag: u8) -> Vec<u8> {
    (0..4096).map(|i: u32| (i.wrapping_mul(2_654_435_761) >> 24) as u8 ^ tag).collect()
}

pub fn golden() -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut writer = StreamWriter::new(&mut bytes, &header()).unwrap();
    writer.data(4096, 4096, Codec::Raw, &block(1), crc32(&block(1))).unwrap();
    writer.zeros(8192, 12288).unwrap();
    let plain = vec![7; 4096];
    // One literal, a match of 4090 bytes, five literals: as the block format of LZ4 has it.
    let mut packed = vec![0x1f, 7, 1, 0];
    packed.extend(std::iter::repeat_n(255, 15));
    packed.extend([(4090 - 19 - 15 * 255) as u8, 0x50, 7, 7, 7, 7, 7]);
    writer.data(1 << 20, 4096, Codec::Lz4, &packed, crc32(&plain)).unwrap();
    writer.data(1 << 21, 512, Codec::Raw, &block(2)[..512], crc32(&block(2)[..512])).unwrap();
    writer.end().unwrap();
    bytes
}

/// Offset, bytes or none for zeros, length.
type Found = (u64, Option<Vec<u8>>, u64);

/// Reads a whole stream and returns its parts.
fn read(mut bytes: &[u8]) -> Result<Vec<Found>, Error> {
    let mut reader = StreamReader::new(&mut bytes)?;
    let mut parts = Vec::new();
    while let Some(part) = reader.next_part()? {
        parts.push(match part {
            Part::Data { offset, bytes } => (offset, Some(bytes.to_vec()), bytes.len() as u64),
            Part::Zeros { offset, length } => (offset, None, length),
        });
    }
    Ok(parts)
}

#[test]
fn the_stream_is_golden() {
    assert_eq!(fixture("stream"), golden());
    let parts = read(&golden()).unwrap();
    let expected = [
        (4096, Some(block(1)), 4096),
        (8192, None, 12288),
        (1 << 20, Some(vec![7; 4096]), 4096),
        (1 << 21, Some(block(2)[..512].to_vec()), 512),
    ];
    assert_eq!(parts, expected);
}

#[test]
fn every_flipped_bit_is_refused() {
    each_flip(&golden(), |bit, bad| {
        let Err(error) = read(bad) else { panic!("bit {bit} may be turned over") };
        assert!(matches!(error.kind(), Kind::Corrupt | Kind::Unsupported), "bit {bit}: {error}");
    });
}

#[test]
fn every_cut_and_every_addition_is_refused() {
    let golden = golden();
    for len in 0..golden.len() {
        assert_eq!(read(&golden[..len]).unwrap_err().kind(), Kind::Corrupt, "cut to {len}");
    }
    assert_eq!(read(&[&golden[..], &[0]].concat()).unwrap_err().kind(), Kind::Corrupt);
}

#[test]
fn a_newer_version_is_named_before_anything_else_is_read() {
    let mut newer = golden()[..16].to_vec();
    newer[8] = 2;
    newer[12..16].copy_from_slice(&u32::MAX.to_le_bytes());
    let error = read(&newer).unwrap_err();
    assert_eq!(error.kind(), Kind::Unsupported);
    assert!(error.message().contains("version 2"), "{error}");
    assert_eq!(read(b"QFI\xfb0000000000000000").unwrap_err().kind(), Kind::Corrupt);
}

fn with_records(header: &Header, records: &[Record]) -> Vec<u8> {
    let mut bytes = header.encode();
    for record in records {
        bytes.extend(record.encode());
    }
    bytes
}

/// Headers that are whole, and do not fit each other.
#[test]
fn records_that_do_not_fit_are_refused() {
    let zeros = |offset, length| Record::Zeros { offset, length };
    let header = header();
    let size = header.target.size;
    for records in [
        vec![zeros(4096, 4096), zeros(0, 4096)],
        vec![zeros(4096, 8192), zeros(8192, 4096)],
        vec![zeros(0, size + 4096)],
        vec![zeros(0, 512)],
        vec![zeros(1 << 21, 4096)],
    ] {
        assert_eq!(read(&with_records(&header, &records)).unwrap_err().kind(), Kind::Corrupt, "{records:?}");
    }
    // Without a base nothing may be left out.
    let full = Header { base: None, data: 0, zeros: size, ..header };
    let error = read(&with_records(&full, &[zeros(0, 4096), zeros(8192, 4096)])).unwrap_err();
    assert!(error.message().contains("8192"), "{error}");
    let mut bytes = Vec::new();
    let mut writer = StreamWriter::new(&mut bytes, &Header { zeros: 4096, ..full }).unwrap();
    writer.zeros(0, 4096).unwrap();
    writer.end().unwrap();
    assert_eq!(read(&bytes).unwrap_err().kind(), Kind::Corrupt, "a full stream that ends early");
}

/// Damage with right checksums: decoders hold out without them.
#[test]
fn bodies_are_checked_behind_their_checksums_too() {
    let whole = header().encode();
    let body = &whole[..whole.len() - 4];
    each_flip(body, |bit, bad| {
        if bit / 8 >= 16 && Header::decode(&seal(bad.to_vec())).is_ok_and(|found| found == header()) {
            panic!("bit {bit} of the header means nothing");
        }
    });
    for len in 0..body.len() {
        Header::decode(&seal(body[..len].to_vec())).unwrap_err();
    }
    let record = Record::Data { offset: 4096, length: 8192, codec: Codec::Lz4, stored: 77, crc: 9 };
    let bytes = record.encode();
    each_flip(&bytes[..RECORD_LEN - 4], |bit, bad| {
        if Record::decode(&seal(bad.to_vec())).is_ok_and(|found| found == record) {
            panic!("bit {bit} of a record means nothing");
        }
    });
    for (at, value) in [(0, 0), (0, 4), (1, 2), (2, 1), (3, 1), (8, 1), (15, 1), (23, 1)] {
        let mut bad = bytes[..RECORD_LEN - 4].to_vec();
        bad[at] = value;
        Record::decode(&seal(bad)).unwrap_err();
    }
}

/// An LZ4 block that claims more or less than the record, or points before its beginning.
#[test]
fn packed_data_is_checked() {
    for packed in [&[0x10, 7][..], &[0x1f, 7, 9, 0, 255, 255, 0x50, 7, 7, 7, 7, 7], &[0xff; 40], &[0]] {
        let mut bytes = Vec::new();
        let mut writer = StreamWriter::new(&mut bytes, &header()).unwrap();
        writer.data(0, 4096, Codec::Lz4, packed, crc32(&[7; 4096])).unwrap();
        writer.end().unwrap();
        assert_eq!(read(&bytes).unwrap_err().kind(), Kind::Corrupt);
    }
}
