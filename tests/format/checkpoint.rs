//! Checkpoints: golden, damaged, cut, hostile, and as their page says.

use std::sync::{Arc, LazyLock};

use afterimage::checkpoint::{
    self, Codec, Cut, DiskSnapshot, Folder, Footer, Geometry, Header, Name, PageBlock, Place, Plan, Pushed, Region,
    Sizes, Staging, StorageBlock, Stored, Writer,
};
use afterimage::codec::crc32;
use afterimage::error::{Kind, Result};
use afterimage::media::{Media, Open, SimMedia};
use afterimage::progress::Silent;
use uuid::Uuid;

use super::pages::{Variant, check, variant};
use super::{each_flip, fixture, refused};

pub const PAGE: &str = include_str!("../../src/checkpoint/FORMAT.md");
const SIZES: Sizes = Sizes { page_block: 8192, storage_block: 16_384, table_page: 4096 };
/// Where the parts of the golden file of the whole memory are: it has three storage blocks.
const INDEX: usize = 4 * 16_384;
const CONTENTS: usize = INDEX + 4096;
const STATE: usize = CONTENTS + 4096;
const FOOTER: usize = STATE + 4096;

static WHOLE: LazyLock<Vec<u8>> = LazyLock::new(|| fixture("checkpoint"));

fn geometry() -> Geometry {
    // The last page block of the first region is a short one.
    let regions = [Region { address: 0, length: 28_672 }, Region { address: 1 << 32, length: 24_576 }];
    Geometry::new(SIZES, &regions).unwrap()
}

fn name(text: &str) -> Name {
    Name::parse(text).unwrap()
}

fn disks() -> Vec<DiskSnapshot> {
    let (disk_name, snapshot_name) = ("web".to_owned(), "daily-1".to_owned());
    vec![DiskSnapshot { disk: Uuid::from_u128(5), disk_name, snapshot: Uuid::from_u128(6), snapshot_name }]
}

/// What page block `number` of the golden file has: it repeats every eight bytes.
fn pattern(number: u64, length: usize) -> Vec<u8> {
    (0..length).map(|n| (number as u8 + 1) * 16 + (n % 8) as u8).collect()
}

/// The same as an LZ4 block, made by hand: it must not depend on what a compressor finds.
fn packed(number: u64, length: usize) -> Vec<u8> {
    let plain = pattern(number, length);
    // Eight literals, a match that goes on from there, and five literals at the end.
    let mut block = vec![0x8f];
    block.extend_from_slice(&plain[..8]);
    block.extend_from_slice(&[8, 0]);
    let mut more = length - 8 - 5 - 4 - 15;
    while more >= 255 {
        block.push(255);
        more -= 255;
    }
    block.push(more as u8);
    block.push(0x50);
    block.extend_from_slice(&plain[length - 5..]);
    block
}

/// What does not repeat.
fn noise(number: u64, length: usize) -> Vec<u8> {
    let words = (0..length as u64 / 8).map(|n| (n + 1).wrapping_mul(number * 2 + 0x9e37_79b9_7f4a_7c15));
    words.flat_map(u64::to_le_bytes).collect()
}

fn push(writer: &Writer, staging: &mut Staging, number: u64, codec: Codec, bytes: &[u8]) {
    if staging.push_stored(PageBlock(number), codec, bytes) == Pushed::Full {
        writer.write(staging, false).unwrap();
    }
}

/// The golden files: a whole one, and one that is based on it.
fn make() -> (SimMedia, Folder) {
    let media = SimMedia::new(1);
    let shared: Arc<dyn Media> = Arc::new(media.clone());
    let folder = Folder::of_pool(&shared);
    let plan = Plan { uuid: Uuid::from_u128(1), ..Plan::new(name("vm@whole"), "afterimage", geometry()) };
    let writer = Writer::create(&folder, plan).unwrap();
    let [mut cold, mut hot] = [(); 2].map(|()| Staging::new(&geometry()).unwrap());
    push(&writer, &mut cold, 0, Codec::Lz4, &packed(0, 8192));
    push(&writer, &mut cold, 1, Codec::Raw, &noise(1, 8192));
    writer.set(PageBlock(2), Place::Zero).unwrap();
    // Does not fit any more: the first of the second storage block.
    push(&writer, &mut cold, 4, Codec::Raw, &noise(4, 8192));
    push(&writer, &mut cold, 3, Codec::Lz4, &packed(3, 4096));
    push(&writer, &mut hot, 6, Codec::Lz4, &packed(6, 8192));
    push(&writer, &mut hot, 5, Codec::Lz4, &packed(5, 8192));
    writer.write(&mut hot, true).unwrap();
    while !cold.is_empty() {
        writer.write(&mut cold, false).unwrap();
    }
    let state = b"state of the devices";
    writer.commit(&Cut { created: 1_800_000_000, disks: disks(), state_version: 3, state }).unwrap();
    let parent = Some(name("vm@whole"));
    let plan = Plan { uuid: Uuid::from_u128(2), parent, ..Plan::new(name("vm@part"), "afterimage", geometry()) };
    let writer = Writer::create(&folder, plan).unwrap();
    for number in [0, 2, 3, 5, 6] {
        writer.set(PageBlock(number), Place::Parent).unwrap();
    }
    writer.set(PageBlock(1), Place::Zero).unwrap();
    push(&writer, &mut cold, 4, Codec::Lz4, &packed(4, 8192));
    writer.write(&mut cold, false).unwrap();
    writer.commit(&Cut { created: 1_800_000_060, disks: Vec::new(), state_version: 3, state: b"" }).unwrap();
    (media, folder)
}

fn bytes_of(media: &SimMedia, path: &str) -> Vec<u8> {
    let file = media.open(path, Open::ReadOnly).unwrap();
    let mut bytes = vec![0; file.len().unwrap() as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

/// Both golden files, by the names of their fixtures.
pub fn golden() -> [(&'static str, Vec<u8>); 2] {
    let (media, _) = make();
    ["whole", "part"].map(|name| {
        let fixture = if name == "whole" { "checkpoint" } else { "checkpoint-part" };
        (fixture, bytes_of(&media, &format!("checkpoints/vm/{name}.ckpt")))
    })
}

/// Puts bytes under a name, and the golden whole file beside it for those that are based on it.
fn folder_of(bytes: &[u8]) -> (SimMedia, Folder) {
    let media = SimMedia::new(1);
    media.make_dir("checkpoints").unwrap();
    media.make_dir("checkpoints/vm").unwrap();
    for (path, bytes) in [("it", bytes), ("whole", &WHOLE)] {
        media.open(&format!("checkpoints/vm/{path}.ckpt"), Open::New).unwrap().write_at(bytes, 0).unwrap();
    }
    let shared: Arc<dyn Media> = Arc::new(media.clone());
    (media, Folder::of_pool(&shared))
}

/// Reads all there is of a checkpoint; what is damaged is an error.
pub fn read_all(bytes: &[u8]) -> Result<u64> {
    let (_, folder) = folder_of(bytes);
    let report = checkpoint::verify(&folder, &name("vm@it"), &Silent)?;
    match report.faults.first() {
        None => Ok(report.stored_blocks),
        Some(fault) => Err(afterimage::error::Error::corrupt(fault.sentence())),
    }
}

#[test]
fn checkpoints_are_golden_and_come_back() {
    for (name, bytes) in golden() {
        assert!(fixture(name) == bytes, "{name} is written otherwise");
    }
    let (_, folder) = folder_of(&fixture("checkpoint-part"));
    let reader = checkpoint::Reader::open(&folder, &name("vm@it"), checkpoint::Access::Cached).unwrap();
    let expected: [Vec<u8>; 7] = [
        pattern(0, 8192),
        vec![0; 8192],
        vec![0; 8192],
        pattern(3, 4096),
        pattern(4, 8192),
        pattern(5, 8192),
        pattern(6, 8192),
    ];
    let mut scratch = vec![0; 16_384];
    for (number, expected) in (0..).map(PageBlock).zip(expected) {
        let mut out = vec![1; reader.geometry().length(number).unwrap()];
        reader.read(number, &mut scratch, &mut out).unwrap();
        assert!(out == expected, "page block {number}");
    }
    let whole = &reader.layers()[1];
    assert_eq!(whole.header().disks, disks());
    assert_eq!((whole.state().unwrap(), whole.footer().state_version), (b"state of the devices".to_vec(), 3));
    assert_eq!(whole.hot().unwrap(), [StorageBlock(1)]);
    let mut out = vec![0; 8192];
    let Place::Stored(stored) = whole.place(PageBlock(4)).unwrap() else { panic!("page block 4 is stored") };
    whole.read_block(stored.block, &mut scratch).unwrap();
    stored.expand(&scratch[stored.offset as usize..][..stored.length as usize], &mut out).unwrap();
    assert_eq!(out, noise(4, 8192));
}

/// The ranges of bytes that mean something: not what is behind the header, behind what is in a storage block, behind the state.
fn meaning(bytes: &[u8]) -> [std::ops::Range<usize>; 6] {
    let header = u32::from_le_bytes(bytes[12..16].try_into().unwrap()) as usize;
    let used =
        [packed(0, 8192).len() + 8192, packed(6, 8192).len() + packed(5, 8192).len(), 8192 + packed(3, 4096).len()];
    let block = |number: usize| (number + 1) * 16_384..(number + 1) * 16_384 + used[number];
    let state = STATE + b"state of the devices".len();
    [0..header, block(0), block(1), block(2), INDEX..state, FOOTER..bytes.len()]
}

#[test]
fn every_flipped_byte_is_corruption() {
    let golden = fixture("checkpoint");
    assert_eq!(golden.len(), FOOTER + 4096);
    assert_eq!(read_all(&golden).unwrap(), 6);
    let (media, folder) = folder_of(&golden);
    let mut tried = 0;
    for at in meaning(&golden).into_iter().flatten() {
        // Every bit where fields are, one of some bytes elsewhere.
        let cells = [INDEX..INDEX + 7 * 16, CONTENTS - 16..CONTENTS + 44, STATE - 16..STATE + 20, FOOTER..FOOTER + 128];
        let fields = at < 16_384 || cells.iter().any(|cells| cells.contains(&at));
        if !fields && !at.is_multiple_of(23) {
            continue;
        }
        for bit in (0..8).filter(|bit| fields || *bit == at % 8) {
            media.flip_bit("checkpoints/vm/it.ckpt", at as u64, bit as u8).unwrap();
            let verified = checkpoint::verify(&folder, &name("vm@it"), &Silent);
            match verified {
                Ok(report) => assert!(!report.is_sound(), "bit {bit} of byte {at} is not seen"),
                Err(error) => {
                    assert!(matches!(error.kind(), Kind::Corrupt | Kind::Unsupported), "byte {at}: {error}");
                }
            }
            media.flip_bit("checkpoints/vm/it.ckpt", at as u64, bit as u8).unwrap();
            tried += 1;
        }
    }
    assert!(tried > 5000, "{tried}");
    assert_eq!(read_all(&bytes_of(&media, "checkpoints/vm/it.ckpt")).unwrap(), 6);
}

#[test]
fn every_cut_of_a_checkpoint_is_corruption() {
    let golden = fixture("checkpoint");
    for len in (0..golden.len()).filter(|len| *len < 600 || len % 509 == 0 || golden.len() - len < 20) {
        refused(&format!("cut to {len}"), read_all(&golden[..len]));
    }
    refused("a byte more", read_all(&[&golden[..], &[0]].concat()));
    refused("a page more", read_all(&[&golden[..], &[0; 4096]].concat()));
}

/// Makes the checksums of a file right again, whatever else is in it.
pub fn seal(bytes: &mut [u8]) {
    let put = |bytes: &mut [u8], from: usize, at: usize| {
        let crc = crc32(&bytes[from..at]).to_le_bytes();
        bytes[at..at + 4].copy_from_slice(&crc);
    };
    put(bytes, 0, 60);
    let length = u32::from_le_bytes(bytes[12..16].try_into().unwrap()) as usize;
    if (68..=INDEX).contains(&length) {
        put(bytes, 0, length - 4);
        let crc: [u8; 4] = bytes[length - 4..length].try_into().unwrap();
        bytes[FOOTER + 24..FOOTER + 28].copy_from_slice(&crc);
    }
    put(bytes, INDEX, CONTENTS - 4);
    put(bytes, CONTENTS, STATE - 4);
    put(bytes, FOOTER, FOOTER + 124);
}

/// The parts of the golden file that mean something, for who turns them over.
pub fn parts() -> Vec<(usize, Vec<u8>)> {
    let golden = fixture("checkpoint");
    let cut = |from: usize, len: usize| (from, golden[from..from + len].to_vec());
    let header = u32::from_le_bytes(golden[12..16].try_into().unwrap()) as usize;
    vec![
        cut(0, header),
        cut(16_384, 48),
        cut(INDEX, 7 * 16),
        cut(CONTENTS - 16, 16),
        cut(CONTENTS, 11 * 4),
        cut(STATE - 16, 16),
        cut(STATE, 20),
        cut(FOOTER, 128),
    ]
}

/// Files with right checksums and wrong numbers: each is refused, and named as damaged.
#[test]
fn hostile_numbers_are_refused() {
    let put = |at: usize, bytes: &[u8]| {
        let mut bad = WHOLE.clone();
        bad[at..at + bytes.len()].copy_from_slice(bytes);
        seal(&mut bad);
        bad
    };
    let cell = |number: usize| INDEX + number * 16;
    let hostile: Vec<(&str, Vec<u8>)> = vec![
        ("a newer version", put(8, &[2, 0, 0, 0])),
        ("a feature nobody knows", put(16, &[1])),
        ("a long header", put(12, &u32::MAX.to_le_bytes())),
        ("a short header", put(12, &[64, 0, 0, 0])),
        ("page blocks of 0 bytes", put(40, &[0; 4])),
        ("storage blocks of 1 GiB", put(44, &(1u32 << 30).to_le_bytes())),
        ("pages of 16 bytes", put(48, &16u32.to_le_bytes())),
        ("reserved bytes of the header", put(52, &[1])),
        ("many storage blocks", put(FOOTER + 28, &u32::MAX.to_le_bytes())),
        ("no storage blocks", put(FOOTER + 28, &[0; 4])),
        ("many page blocks", put(FOOTER + 32, &u64::MAX.to_le_bytes())),
        ("page blocks of no parent", put(FOOTER + 48, &1u64.to_le_bytes())),
        ("another sum of bytes", put(FOOTER + 56, &1u64.to_le_bytes())),
        ("many hot storage blocks", put(FOOTER + 64, &u32::MAX.to_le_bytes())),
        ("a large state", put(FOOTER + 72, &(1u64 << 40).to_le_bytes())),
        ("another length", put(FOOTER + 84, &0u64.to_le_bytes())),
        ("reserved bytes of the footer", put(FOOTER + 100, &[1])),
        ("bytes behind the footer", put(FOOTER + 4000, &[1])),
        ("a cell of kind 0", put(cell(0), &[0])),
        ("a cell of a codec nobody knows", put(cell(0), &[5])),
        ("a place in the parent without one", put(cell(2), &[2])),
        ("an offset beyond the storage block", put(cell(0) + 1, &[0xff, 0xff, 0xff])),
        ("a storage block that is not there", put(cell(0) + 4, &3u32.to_le_bytes())),
        ("stored bytes of no length", put(cell(0) + 8, &[0; 4])),
        ("more stored bytes than there are", put(cell(0) + 8, &8191u32.to_le_bytes())),
        ("a raw page block of another length", put(cell(1) + 8, &8191u32.to_le_bytes())),
        ("zeros with a place", put(cell(2) + 4, &[1])),
        ("contents that go back", put(CONTENTS + 4, &9u32.to_le_bytes())),
        ("a page block that is none", put(CONTENTS + 16, &7u32.to_le_bytes())),
        ("a page block that is elsewhere", put(CONTENTS + 16, &6u32.to_le_bytes())),
        ("a hot storage block that is none", put(CONTENTS + 40, &3u32.to_le_bytes())),
        ("another page of the index", put(CONTENTS - 16, &[1])),
        ("a page of another table", put(CONTENTS - 8, &[2])),
    ];
    for (what, bytes) in hostile {
        refused(what, read_all(&bytes));
        // It is also refused by who only reads what it needs, or read as what it was; never something else.
        let (_, folder) = folder_of(&bytes);
        let Ok(reader) = checkpoint::Reader::open(&folder, &name("vm@it"), checkpoint::Access::Cached) else {
            continue;
        };
        let (sound, mut scratch) =
            (checkpoint::Reader::open(&folder, &name("vm@whole"), checkpoint::Access::Cached), vec![0; 16_384]);
        for number in (0..7).map(PageBlock) {
            let (mut out, mut right) = (vec![0; 8192], vec![0; 8192]);
            let length = reader.geometry().length(number).unwrap();
            sound.as_ref().unwrap().read(number, &mut scratch, &mut right[..length]).unwrap();
            if reader.read(number, &mut scratch, &mut out[..length]).is_ok() {
                assert!(out == right, "{what}: page block {number}");
            }
        }
    }
}

#[test]
fn a_header_survives_any_bytes() {
    let golden = fixture("checkpoint");
    let length = u32::from_le_bytes(golden[12..16].try_into().unwrap()) as usize;
    let header = Header::decode("it", &golden).unwrap();
    assert_eq!(header.encode().unwrap(), golden[..length]);
    each_flip(&golden[..length], |bit, bad| refused(&format!("bit {bit}"), Header::decode("it", bad)));
    for len in 0..length {
        refused(&format!("cut to {len}"), Header::decode("it", &golden[..len]));
    }
}

#[test]
fn checkpoints_are_as_the_page_says() {
    let golden = fixture("checkpoint");
    let base = Header::decode("it", &golden).unwrap();
    let of = |sizes| {
        let regions: Vec<_> = base.geometry.regions().collect();
        let geometry = Geometry::new(sizes, &regions).unwrap();
        Header { geometry, ..base.clone() }.encode().unwrap()
    };
    let mut featured = golden.clone();
    featured[16] = 1;
    seal(&mut featured);
    let variants = [
        variant("length", Header { name: "longer".into(), ..base.clone() }.encode().unwrap()),
        variant("features", featured),
        variant("uuid", Header { uuid: Uuid::from_u128(9), ..base.clone() }.encode().unwrap()),
        variant("page block", of(Sizes { page_block: 4096, ..SIZES })),
        variant("storage block", of(Sizes { storage_block: 8192, ..SIZES })),
        variant("table page", of(Sizes { table_page: 8192, ..SIZES })),
    ];
    check(PAGE, "Header", &golden, &variants);
    let trailer = |bytes: &[u8], page: usize| bytes[page + 4080..page + 4096].to_vec();
    let other = |at: usize, byte: u8| {
        let mut bytes = golden.clone();
        bytes[at] = byte;
        seal(&mut bytes);
        trailer(&bytes, INDEX)
    };
    let mut variants = [
        variant("number", other(CONTENTS - 16, 1)),
        variant("table", trailer(&golden, CONTENTS)),
        variant("pagecrc", other(INDEX + 12, 1)),
    ];
    variants[0].also = &["pagecrc"];
    variants[1].also = &["pagecrc"];
    check(PAGE, "Page trailer", &trailer(&golden, INDEX), &variants);
    let stored = Stored { block: StorageBlock(1), offset: 5, length: 77, codec: Codec::Lz4, crc: 9 };
    let cell = |stored| Place::Stored(stored).encode().to_vec();
    let variants = [
        variant("kind", cell(Stored { codec: Codec::Raw, ..stored })),
        variant("offset", cell(Stored { offset: 0x0103_0507 & 0xff_ffff, ..stored })),
        variant("block", cell(Stored { block: StorageBlock(9), ..stored })),
        variant("length", cell(Stored { length: 78, ..stored })),
        variant("storedcrc", cell(Stored { crc: 8, ..stored })),
    ];
    check(PAGE, "Index cell", &cell(stored), &variants);
    footer_is_as_the_page_says(&base);
}

fn footer_is_as_the_page_says(header: &Header) {
    let (golden, geometry) = (fixture("checkpoint"), &header.geometry);
    let crc = u32::from_le_bytes(golden[FOOTER + 24..FOOTER + 28].try_into().unwrap());
    let base = Footer::decode("it", &golden[FOOTER..], header, crc, golden.len() as u64).unwrap();
    let of = |footer: Footer| footer.encode(geometry)[..128].to_vec();
    let with = |name, footer, also| Variant { name, bytes: of(footer), also };
    let variants = [
        with("uuid", Footer { uuid: Uuid::from_u128(9), ..base }, &[]),
        with("header", Footer { header: 9, ..base }, &[]),
        with("blocks", Footer { blocks: 4, ..base }, &["length"]),
        with("stored", Footer { stored: 9, ..base }, &[]),
        with("zeros", Footer { zeros: 9, ..base }, &[]),
        with("inherited", Footer { inherited: 9, ..base }, &[]),
        with("bytes", Footer { bytes: 9, ..base }, &[]),
        with("hot", Footer { hot: 9, ..base }, &[]),
        with("state version", Footer { state_version: 9, ..base }, &[]),
        with("state length", Footer { state_length: 21, ..base }, &[]),
        with("state crc", Footer { state_crc: 9, ..base }, &[]),
        with("length", Footer { stored: 2000, ..base }, &["stored"]),
    ];
    check(PAGE, "Footer", &golden[FOOTER..], &variants);
}
