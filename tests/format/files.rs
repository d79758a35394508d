//! Files with a header: superblock, list of exports, journal, seals of segments and of states.

use std::sync::Arc;

use afterimage::codec::{Writer, crc32};
use afterimage::error::{Kind, Result};
use afterimage::map::Entry;
use afterimage::media::{File, Media, Open, SimMedia};
use afterimage::pool::{EXPORT_LIST, ExportKind, ExportList, ExportRow, LeaseRow, SUPERBLOCK, Superblock};
use afterimage::store::rows::{BranchRow, Key, Row, decode_entry};
use afterimage::store::seal_file::{SealFile, SealedSlab, seal_path};
use afterimage::store::state_file::{StateSeal, state_path};
use afterimage::store::{JOURNAL_MIN, Journal, Mark, StateRow, encode_row};
use afterimage::units::{BlockAddress, BranchId, ChunkIndex, DiskId, Epoch, SegmentId};
use uuid::Uuid;

use super::samples::{self, POOL};
use super::{each_flip, fixture, fixture_of, refused};

/// A file with these bytes.
fn file_of(media: &SimMedia, path: &str, bytes: &[u8]) -> Arc<dyn File> {
    if let Some((dir, _)) = path.rsplit_once('/') {
        let _ = media.make_dir(dir.split_once('/').map_or(dir, |(top, _)| top));
        let _ = media.make_dir(dir);
    }
    let _ = media.remove(path);
    let file = media.open(path, Open::New).unwrap();
    file.write_at(bytes, 0).unwrap();
    file
}

fn bytes_of(file: &Arc<dyn File>) -> Vec<u8> {
    let mut bytes = vec![0; file.len().unwrap() as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

/// The superblock as it is written for [`POOL`].
pub fn superblock() -> Vec<u8> {
    let media = SimMedia::new(1);
    Superblock { uuid: POOL, ..Superblock::new() }.write(&media).unwrap();
    bytes_of(&media.open(SUPERBLOCK, Open::ReadOnly).unwrap())
}

fn read_superblock(bytes: &[u8]) -> Result<Superblock> {
    let media = SimMedia::new(1);
    file_of(&media, SUPERBLOCK, bytes);
    Superblock::read(&media)
}

#[test]
fn the_superblock_is_golden() {
    assert_eq!(fixture("superblock"), superblock());
    let read = read_superblock(&fixture("superblock")).unwrap();
    assert_eq!((read.uuid, read.format, read.block_size), (POOL, 1, 4096));
    assert_eq!(read.features, [""; 0]);
}

/// It is text for people and has no checksum: what a flip leaves readable names another pool, which the journal refuses.
#[test]
fn a_damaged_superblock_never_passes_for_another_format() {
    each_flip(&superblock(), |bit, bad| match read_superblock(bad) {
        Ok(read) => assert_eq!((read.format, read.block_size), (1, 4096), "bit {bit}"),
        Err(error) => assert!(matches!(error.kind(), Kind::Corrupt | Kind::Unsupported), "bit {bit}: {error}"),
    });
    for len in 0..superblock().len() {
        // Without the list of features it is still a superblock.
        if let Err(error) = read_superblock(&superblock()[..len]) {
            assert_eq!(error.kind(), Kind::Corrupt, "{error}");
        }
    }
    let newer = String::from_utf8(superblock()).unwrap().replace("format = 1", "format = 2\nshape = \"other\"");
    assert_eq!(read_superblock(newer.as_bytes()).unwrap_err().kind(), Kind::Unsupported);
}

fn export_list() -> ExportList {
    let nbd = ExportRow {
        id: 3,
        kind: ExportKind::Nbd,
        disks: vec![7, 9],
        snapshots: vec![12],
        socket: None,
        listen: Some("0.0.0.0:10809".into()),
        tls_cert: Some("/etc/c.pem".into()),
        tls_key: Some("/etc/k.pem".into()),
        tls_ca: Some("/etc/ca.pem".into()),
        read_only: false,
        queues: 0,
    };
    let vhost = ExportRow {
        id: 5,
        kind: ExportKind::VhostUser,
        disks: vec![8],
        snapshots: Vec::new(),
        socket: Some("/run/a \"b\".sock".into()),
        listen: None,
        tls_cert: None,
        tls_key: None,
        tls_ca: None,
        read_only: true,
        queues: 64,
    };
    let leases = vec![LeaseRow::new(7, "export 3 (nbd 0.0.0.0:10809)".into())];
    ExportList { exports: vec![nbd, vhost], leases, last_id: 5, ..ExportList::default() }
}

/// What version 1 could not say.
fn export_list_2() -> ExportList {
    let mut list = export_list();
    let waits = LeaseRow::new(9, "export 3 (nbd 0.0.0.0:10809)".into());
    list.leases.push(LeaseRow { until: Some(1_800_000_060), lost: Some("a \"log\" is missing".into()), ..waits });
    ExportList { last_id: 12, ..list }
}

/// The list of exports as it is written.
pub fn exports() -> Vec<u8> {
    let media = SimMedia::new(1);
    export_list_2().write(&media).unwrap();
    bytes_of(&media.open(EXPORT_LIST, Open::ReadOnly).unwrap())
}

fn read_exports(bytes: &[u8]) -> Result<ExportList> {
    let media = SimMedia::new(1);
    file_of(&media, EXPORT_LIST, bytes);
    ExportList::read(&media)
}

#[test]
fn the_list_of_exports_is_golden() {
    assert_eq!(fixture_of("v2", "exports"), exports());
    assert_eq!(read_exports(&fixture_of("v2", "exports")).unwrap(), export_list_2());
    assert_eq!(read_exports(&fixture("exports")).unwrap(), export_list(), "version 1 is read as the next one");
    assert_eq!(ExportList::read(&SimMedia::new(1)).unwrap(), ExportList::default(), "there need not be one");
}

/// It is text for people and has no checksum: what can still be read makes sense by itself.
#[test]
fn a_damaged_list_of_exports_is_corrupt_or_another_list() {
    each_flip(&exports(), |bit, bad| {
        if let Err(error) = read_exports(bad) {
            assert!(matches!(error.kind(), Kind::Corrupt | Kind::Unsupported), "bit {bit}: {error}");
        }
    });
    for len in 1..exports().len() {
        if let Err(error) = read_exports(&exports()[..len]) {
            assert_eq!(error.kind(), Kind::Corrupt, "{error}");
        }
    }
    let text = String::from_utf8(exports()).unwrap();
    let newer = text.replace("format = 2", "format = 3\nshape = \"other\"");
    assert_eq!(read_exports(newer.as_bytes()).unwrap_err().kind(), Kind::Unsupported);
    for (good, bad) in [
        ("format = 2", "format = 0"),
        ("format = 2", "format = 1"),
        ("last-id = 12", "last-id = -1"),
        ("until = 1800000060", "until = -1"),
        ("id = 3", "id = 0"),
        ("id = 3", "id = 5"),
        ("id = 3", "id = 3\nother = 1"),
        ("disks = [8]", ""),
        ("socket = ", "listen = \"127.0.0.1:1\"\nsocket = "),
        ("\"/etc/k.pem\"", "\"etc/k.pem\""),
        ("tls-key = \"/etc/k.pem\"", ""),
        ("queues = 64", "queues = 65"),
        ("queues = 64", "queues = 0"),
        ("queues = 0", "queues = 1"),
        ("kind = \"nbd\"", "kind = \"iscsi\""),
        ("disk = 7", "disk = -7"),
    ] {
        assert!(text.contains(good), "{good}");
        let error = read_exports(text.replacen(good, bad, 1).as_bytes()).unwrap_err();
        assert_eq!(error.kind(), Kind::Corrupt, "{bad}: {error}");
    }
}

/// The rows of the golden frames.
pub fn frames() -> [Vec<Row>; 2] {
    let (branch, epoch) = (BranchId(5), Epoch(11));
    let value = |name: &str| samples::all().into_iter().find(|sample| sample.name == name).expect("it is there").bytes;
    let first = vec![
        Row::put(Key::meta(), value("meta")),
        Row::put(Key::disk(DiskId(3)), value("disk")),
        Row::put(Key::branch(branch), value("branch")),
        Row::put(Key::state(BranchId(2), Epoch(9)), value("state")),
        Row::put(Key::segment(SegmentId(7)), value("segment-row")),
        Row::put(Key::map(branch, ChunkIndex(4), epoch), value("map-pieces")),
        Row::put(Key::index(branch, epoch, 0), value("index-list")),
        Row::put(Key::free(BlockAddress::new(SegmentId(7), 1024)), value("free")),
    ];
    let second = vec![
        Row::delete(Key::free(BlockAddress::new(SegmentId(7), 1024))),
        Row::put(Key::map(branch, ChunkIndex(5), epoch), value("map-flat")),
        Row::put(Key::data(BlockAddress::new(SegmentId(7), 513)), value("data")),
    ];
    [first, second]
}

/// The body of a frame.
pub fn body_of(rows: &[Row]) -> Vec<u8> {
    let mut body = Writer::new();
    rows.iter().for_each(|row| encode_row(row, &mut body));
    body.finish()
}

/// A journal with frames of these bodies and numbers of rows.
pub fn journal_with(pool: Uuid, capacity: u64, frames: &[(Vec<u8>, u32)]) -> Vec<u8> {
    journal_salted(pool, SALT, capacity, frames)
}

/// As [`journal_with`], with another salt.
pub fn journal_salted(pool: Uuid, salt: Uuid, capacity: u64, frames: &[(Vec<u8>, u32)]) -> Vec<u8> {
    let media = SimMedia::new(1);
    let file = media.open("journal", Open::New).unwrap();
    Journal::create(&file, pool, salt, capacity).unwrap();
    let (mut journal, found) = Journal::open(Arc::clone(&file), pool, Mark::START).unwrap();
    assert_eq!(found.len(), 0);
    for (body, rows) in frames {
        journal.append(body, *rows).unwrap();
    }
    bytes_of(&file)
}

/// A journal whose one frame says that the frame before it is folded.
pub fn journal_folded(body: &[u8], rows: u32) -> Vec<u8> {
    let media = SimMedia::new(1);
    let file = media.open("journal", Open::New).unwrap();
    Journal::create(&file, POOL, SALT, JOURNAL_MIN).unwrap();
    let (mut journal, _) = Journal::open(Arc::clone(&file), POOL, Mark { lsn: 7, ..Mark::START }).unwrap();
    journal.append(body, rows).unwrap();
    bytes_of(&file)
}

pub const SALT: Uuid = Uuid::from_u128(0x5a17_5a17_5a17_5a17_5a17_5a17_5a17_5a17);

/// The golden journal.
pub fn journal() -> Vec<u8> {
    journal_with(POOL, JOURNAL_MIN, &frames().map(|rows| (body_of(&rows), rows.len() as u32)))
}

fn open_journal(bytes: &[u8]) -> Result<(Journal, Vec<Vec<Row>>)> {
    let media = SimMedia::new(1);
    Journal::open(file_of(&media, "journal", bytes), POOL, Mark::START)
}

#[test]
fn the_journal_is_golden() {
    assert_eq!(fixture("journal"), journal());
    let (journal, found) = open_journal(&fixture("journal")).unwrap();
    assert_eq!(found, frames());
    journal.check_end().unwrap();
}

#[test]
fn a_damaged_journal_header_is_corruption() {
    let golden = journal();
    each_flip(&golden[..44], |bit, bad| {
        refused(&format!("bit {bit}"), open_journal(&[bad, &golden[44..]].concat()));
    });
    for len in (0..64).chain((4096..JOURNAL_MIN as usize).step_by(4096)) {
        refused(&format!("a journal of {len} bytes"), open_journal(&golden[..len]));
    }
    let other = journal_with(Uuid::from_u128(1), JOURNAL_MIN, &[]);
    refused("the journal of another pool", open_journal(&other));
}

/// A frame that is not whole is the end of the journal; with a whole one behind it, it is corruption.
#[test]
fn damage_in_a_frame_ends_the_journal_or_is_corruption() {
    let golden = journal();
    let len = |n: usize| 64 + body_of(&frames()[n]).len();
    let (first, second) = (4096, 4096 + len(0).next_multiple_of(4096));
    each_flip(&golden[first..first + len(0)], |bit, bad| {
        let bytes = [&golden[..first], bad, &golden[first + len(0)..]].concat();
        let (journal, found) = open_journal(&bytes).unwrap();
        assert_eq!(found.len(), 0, "bit {bit} of the first frame");
        refused(&format!("bit {bit} of the first frame"), journal.check_end());
    });
    // Every bit of the header, every byte of the body.
    let mut places: Vec<usize> = (0..64 * 8).collect();
    places.extend((64..len(1)).map(|byte| byte * 8 + byte % 8));
    for bit in places {
        let mut bytes = golden.clone();
        bytes[second + bit / 8] ^= 1 << (bit % 8);
        let (journal, found) = open_journal(&bytes).unwrap();
        assert_eq!(found.len(), 1, "bit {bit} of the second frame");
        journal.check_end().unwrap();
    }
}

/// A torn frame: everything behind some byte is still what was there before.
#[test]
fn a_frame_that_ends_early_is_the_end_of_the_journal() {
    let golden = journal();
    let len = 64 + body_of(&frames()[1]).len();
    let second = 4096 + (64 + body_of(&frames()[0]).len()).next_multiple_of(4096);
    for cut in 0..len {
        let mut bytes = golden.clone();
        bytes[second + cut..].fill(0);
        // The last bytes may be zeros already.
        let whole = bytes == golden;
        let (journal, found) = open_journal(&bytes).unwrap();
        assert_eq!(found.len(), if whole { 2 } else { 1 }, "cut at {cut}");
        journal.check_end().unwrap();
    }
}

/// Rows that do not decode although the checksum of the body is right come from no crash.
#[test]
fn a_body_of_nonsense_is_corruption() {
    let good = body_of(&frames()[0]);
    for (body, rows) in [
        (good.clone(), 7),
        (good.clone(), 9),
        (good[..good.len() - 1].to_vec(), 8),
        (vec![0], 1),
        (vec![1, 13, 0], 1),
        (vec![1, 1, 0x80, 0], 1),
        (vec![1, 1, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1], 1),
    ] {
        refused("nonsense", open_journal(&journal_with(POOL, JOURNAL_MIN, &[(body, rows)])));
    }
}

fn seal_header() -> SealFile {
    SealFile {
        pool: POOL,
        segment: SegmentId(7),
        nonce: samples::header().nonce,
        disk: DiskId(3),
        branch: BranchId(5),
        epoch: Epoch(11),
    }
}

fn seal_records() -> Vec<SealedSlab> {
    let slab = |n: u32| BlockAddress::new(SegmentId(7), n * 512);
    let [full, range, list, bitmap] = samples::sets();
    let crcs = |count: u32| (0..count).map(|i| crc32(&i.to_le_bytes())).collect();
    vec![
        SealedSlab::Written { base: slab(1), chunk: ChunkIndex(4), set: list, crcs: crcs(3) },
        SealedSlab::Written { base: slab(2), chunk: ChunkIndex(5), set: range, crcs: crcs(395) },
        SealedSlab::Unmapped { chunk: ChunkIndex(6), set: full },
        SealedSlab::Unmapped { chunk: ChunkIndex(7), set: bitmap },
    ]
}

/// The seal file with this header.
pub fn seal_of(header: &SealFile) -> Vec<u8> {
    let media = SimMedia::new(1);
    let path = seal_path(header.segment, header.epoch);
    file_of(&media, &format!("{path}.tmp"), &[]);
    header.write(&media, seal_records().into_iter().map(Ok)).unwrap();
    bytes_of(&media.open(&path, Open::ReadOnly).unwrap())
}

/// The golden seal file.
pub fn seal() -> Vec<u8> {
    seal_of(&seal_header())
}

/// Headers that differ from the golden one in one field.
pub fn seal_variants() -> Vec<(&'static str, SealFile)> {
    let base = seal_header();
    vec![
        ("pool", SealFile { pool: Uuid::from_u128(1), ..base }),
        ("segment", SealFile { segment: SegmentId(9), ..base }),
        ("nonce", SealFile { nonce: 1, ..base }),
        ("disk", SealFile { disk: DiskId(9), ..base }),
        ("branch", SealFile { branch: BranchId(9), ..base }),
        ("epoch", SealFile { epoch: Epoch(9), ..base }),
    ]
}

fn read_seal(bytes: &[u8]) -> Result<(SealFile, Vec<SealedSlab>)> {
    let media = SimMedia::new(1);
    file_of(&media, &seal_path(SegmentId(7), Epoch(11)), bytes);
    let (header, records) = SealFile::open(&media, SegmentId(7), Epoch(11))?;
    Ok((header, records.collect::<Result<_>>()?))
}

#[test]
fn the_seal_is_golden() {
    assert_eq!(fixture("seal"), seal());
    assert_eq!(read_seal(&fixture("seal")).unwrap(), (seal_header(), seal_records()));
}

#[test]
fn every_flipped_bit_and_every_cut_of_a_seal_is_corruption() {
    let golden = seal();
    each_flip(&golden, |bit, bad| refused(&format!("bit {bit}"), read_seal(bad)));
    for len in 0..golden.len() {
        refused(&format!("a seal of {len} bytes"), read_seal(&golden[..len]));
    }
}

fn state_seal() -> StateSeal {
    StateSeal {
        pool: POOL,
        branch: BranchId(5),
        epoch: Epoch(11),
        base: Some(Epoch(10)),
        disk_uuid: Uuid::from_u128(0x99),
        disk_name: "web-1".into(),
        row: StateRow { holds: Vec::new(), ..samples::state() },
        branches: vec![
            (BranchId(5), BranchRow { parent: Some((BranchId(2), Epoch(9))), ..samples::branch() }),
            (BranchId(2), BranchRow { parent: None, inherits: false, depth: 1, lineage: BranchId(2) }),
        ],
    }
}

fn state_entries() -> Vec<(ChunkIndex, Entry)> {
    let entry = |name: &str| {
        let sample = samples::all().into_iter().find(|sample| sample.name == name).expect("it is there");
        decode_entry(&sample.bytes).unwrap()
    };
    vec![
        (ChunkIndex(0), entry("map-tombstone")),
        (ChunkIndex(4), entry("map-pieces")),
        (ChunkIndex(9), entry("map-flat")),
    ]
}

/// The golden seal of a state, and how its bytes are read back.
pub fn state_seal_bytes() -> Vec<u8> {
    let media = SimMedia::new(1);
    media.make_dir("states").unwrap();
    let len = state_seal().write(&media, false, state_entries().into_iter().map(Ok)).unwrap();
    let bytes = bytes_of(&media.open(&state_path(Epoch(11), false), Open::ReadOnly).unwrap());
    assert_eq!(len, bytes.len() as u64);
    bytes
}

type State = (StateSeal, Vec<(ChunkIndex, Entry)>);

fn read_state_seal(bytes: &[u8]) -> Result<State> {
    let media = SimMedia::new(1);
    file_of(&media, &state_path(Epoch(11), true), bytes);
    let (seal, entries) = StateSeal::open(&media, Epoch(11), true)?;
    Ok((seal, entries.collect::<Result<_>>()?))
}

#[test]
fn the_seal_of_a_state_is_golden() {
    let golden = fixture_of("v2", "state-seal");
    assert_eq!(golden, state_seal_bytes());
    assert_eq!(golden[8..12], [2, 0, 0, 0], "the version");
    assert_eq!(read_state_seal(&golden).unwrap(), (state_seal(), state_entries()));
}

#[test]
fn every_flipped_bit_and_every_cut_of_the_seal_of_a_state_is_corruption() {
    let golden = state_seal_bytes();
    each_flip(&golden, |bit, bad| refused(&format!("bit {bit}"), read_state_seal(bad)));
    for len in 0..golden.len() {
        refused(&format!("a seal of {len} bytes"), read_state_seal(&golden[..len]));
    }
}

/// One kind is never taken for the other, whatever it is called.
#[test]
fn seals_of_segments_and_of_states_are_told_apart() {
    refused("the seal of a segment", read_state_seal(&seal()));
    refused("the seal of a state", read_seal(&state_seal_bytes()));
}
