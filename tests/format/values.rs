//! Values of rows and the segment header: golden, damaged, cut; and the keys.

use afterimage::codec::{seal, unseal};
use afterimage::store::StateRow;
use afterimage::store::rows::{self, BranchRow, Key, KeyParts, Meta};
use afterimage::units::{BlockAddress, BranchId, ChunkIndex, DiskId, Epoch, SegmentId, SnapshotId};

use super::{each_flip, fixture, refused, samples};

#[test]
fn encoders_make_the_golden_bytes_and_decoders_read_them() {
    for sample in samples::all() {
        let golden = fixture(sample.name);
        assert_eq!(golden, sample.bytes, "{}", sample.name);
        assert!((sample.decode)(&golden).unwrap(), "{} comes back as another value", sample.name);
    }
}

#[test]
fn every_flipped_bit_is_corruption() {
    for sample in samples::all() {
        each_flip(&sample.bytes, |bit, bad| refused(&format!("bit {bit} of {}", sample.name), (sample.decode)(bad)));
    }
}

#[test]
fn every_cut_and_every_addition_is_corruption() {
    for sample in samples::all() {
        for len in 0..sample.bytes.len() {
            refused(&format!("{} cut to {len}", sample.name), (sample.decode)(&sample.bytes[..len]));
        }
        let longer = [&sample.bytes[..], &[0]].concat();
        refused(&format!("{} with a byte more", sample.name), (sample.decode)(&longer));
    }
}

/// Damage that has a right checksum: from a bug, or by hand. The decoder must hold out without it.
#[test]
fn bodies_are_checked_behind_their_checksum_too() {
    for sample in samples::all().into_iter().filter(|sample| sample.name != "segment-header") {
        let body = unseal("it", &sample.bytes).unwrap().to_vec();
        for len in 0..body.len() {
            refused(&format!("body of {} cut to {len}", sample.name), (sample.decode)(&seal(body[..len].to_vec())));
        }
        let longer = seal([&body[..], &[0]].concat());
        refused(&format!("body of {} with a byte more", sample.name), (sample.decode)(&longer));
        // Another value, or refused; never a panic.
        each_flip(&body, |bit, bad| {
            if (sample.decode)(&seal(bad.to_vec())).is_ok_and(|same| same) {
                panic!("bit {bit} of {} means nothing", sample.name);
            }
        });
    }
}

#[test]
fn values_that_make_no_sense_are_corruption() {
    let resealed = |name: &str, at: usize, byte: u8| {
        let mut body = unseal("it", &fixture(name)).unwrap().to_vec();
        body[at] = byte;
        seal(body)
    };
    refused("clean = 2", Meta::decode(&resealed("meta", 48, 2)));
    refused("inherits without a parent", BranchRow::decode(&resealed("branch", 0, 0)));
    refused("status 0", StateRow::decode(&resealed("state", 0, 0)));
    refused("status 6", StateRow::decode(&resealed("state", 0, 6)));
    refused("form 3", rows::decode_entry(&resealed("map-full", 0, 3)));
    refused("a slab base at an odd slot", rows::decode_entry(&resealed("map-full", 2, 1)));
    refused("an address in the wrong place", rows::decode_entry(&resealed("map-flat", 1, 1)));
    let last = BlockAddress::new(SegmentId(1), (1 << 28) - 1);
    refused("no blocks", rows::decode_count(last, &rows::encode_count(0)));
    refused("blocks beyond the segment", rows::decode_count(last, &rows::encode_count(2)));
    refused("blocks without end", rows::decode_count(last, &rows::encode_count(u64::MAX - u64::from(u32::MAX))));
}

/// The keys of the page, byte by byte.
#[test]
fn keys_are_table_and_big_endian_ids() {
    let hex = |key: Key| key.as_bytes().iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let (branch, epoch, chunk) = (BranchId(0x0102), Epoch(0x0304), ChunkIndex(0x0506));
    let address = BlockAddress::new(SegmentId(7), 513);
    let golden = [
        (Key::meta(), "01", KeyParts::Meta),
        (Key::disk(DiskId(258)), "020000000000000102", KeyParts::Disk(DiskId(258))),
        (Key::branch(branch), "030000000000000102", KeyParts::Branch(branch)),
        (Key::state(branch, epoch), "0400000000000001020000000000000304", KeyParts::State(branch, epoch)),
        (Key::segment(SegmentId(7)), "050000000000000007", KeyParts::Segment(SegmentId(7))),
        (
            Key::map(branch, chunk, epoch),
            "060000000000000102000005060000000000000304",
            KeyParts::Map(branch, chunk, epoch),
        ),
        (Key::index(branch, epoch, 9), "070000000000000102000000000000030400000009", KeyParts::Index(branch, epoch, 9)),
        (Key::retired(SnapshotId(258)), "0a0000000000000102", KeyParts::Retired(SnapshotId(258))),
        (Key::stamp(epoch), "0b0000000000000304", KeyParts::Stamp(epoch)),
        (Key::opening(258), "0c0000000000000102", KeyParts::Opening(258)),
        (Key::free(address), "080000000070000201", KeyParts::Free(address)),
        (Key::data(address), "090000000070000201", KeyParts::Data(address)),
    ];
    for (key, bytes, parts) in golden {
        assert_eq!(hex(key), bytes);
        assert_eq!(Key::from_bytes(key.as_bytes()).unwrap().parts().unwrap(), parts);
        for len in 1..key.as_bytes().len() {
            refused("a short key", Key::from_bytes(&key.as_bytes()[..len]).unwrap().parts());
        }
        let longer = Key::from_bytes(&[key.as_bytes(), &[0]].concat());
        refused("a long key", longer.and_then(|key| key.parts()));
    }
    refused("no key", Key::from_bytes(&[]));
    refused("table 0", Key::from_bytes(&[0]));
    refused("table 13", Key::from_bytes(&[13]));
    refused("a long key", Key::from_bytes(&[1; 22]));
    refused("address 0", Key::from_bytes(&[8, 0, 0, 0, 0, 0, 0, 0, 0]).unwrap().parts());
}
