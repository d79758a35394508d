//! The FORMAT pages against the encoders: each table of offsets is compared with real bytes.
//!
//! A table counts when its title ends with "N bytes:" or "N bytes; ...:" and its first columns are offset, size, name. The
//! fields must lie end to end and fill N bytes. Then every field is changed alone: only its own bytes, and the checksum,
//! may differ. A field nobody can change (magic, version, reserved, crc32) is compared with what the page says.

use afterimage::codec::crc32;
use afterimage::pool::SegmentHeader;
use afterimage::store::rows::{BranchRow, Meta, SegmentRow};
use afterimage::store::unflushed::LogHeader;
use afterimage::store::{JOURNAL_MIN, OpeningRow};
use afterimage::stream::format::{Codec, Header, Record};
use afterimage::units::{BranchId, DiskId, Epoch, SegmentId, SnapshotId};
use uuid::Uuid;

use super::record::{RECIPE, Recipe, record_of};
use super::samples::{self, POOL};
use super::{files, fixture};

const POOL_PAGE: &str = include_str!("../../src/pool/FORMAT.md");
const SNAPSHOT_PAGE: &str = include_str!("../../src/snapshot/record/FORMAT.md");
const STORE_PAGE: &str = include_str!("../../src/store/FORMAT.md");
const STREAM_PAGE: &str = include_str!("../../src/stream/FORMAT.md");

#[derive(Debug)]
struct Field {
    offset: usize,
    size: usize,
    name: String,
    meaning: String,
}

#[derive(Debug)]
struct Layout {
    title: String,
    fields: Vec<Field>,
}

/// Finds the tables of offsets of a page.
fn layouts(page: &str) -> Vec<Layout> {
    let lines: Vec<&str> = page.lines().collect();
    let mut found = Vec::new();
    for (n, line) in lines.iter().enumerate().filter(|(_, line)| line.starts_with("| offset | size | name |")) {
        let text = lines[..n].iter().rev().find(|line| !line.is_empty()).expect("a table has a title");
        let (title, rest) = text.split_once(", ").unwrap_or_else(|| panic!("'{text}' has no length"));
        let len: usize = rest.split(' ').next().and_then(|len| len.parse().ok()).expect("a length in bytes");
        let mut fields = Vec::new();
        for row in lines[n + 2..].iter().take_while(|row| row.starts_with('|')) {
            let cells: Vec<&str> = row.trim_matches('|').split('|').map(str::trim).collect();
            let number = |cell: &str| cell.parse().unwrap_or_else(|_| panic!("'{cell}' in '{row}' is no number"));
            let (name, meaning) = (cells[2].to_owned(), cells[3].to_owned());
            fields.push(Field { offset: number(cells[0]), size: number(cells[1]), name, meaning });
        }
        let end = fields.iter().fold(0, |at, field| {
            assert_eq!(
                field.offset, at,
                "{title}: '{}' does not begin where the last field ends in {line}",
                field.name
            );
            at + field.size
        });
        assert_eq!(end, len, "{title} has another length than its fields");
        found.push(Layout { title: title.to_owned(), fields });
    }
    found
}

/// Bytes that differ from the golden ones because one field was changed, and the fields that follow from it.
pub struct Variant {
    pub name: &'static str,
    pub bytes: Vec<u8>,
    pub also: &'static [&'static str],
}

pub fn variant(name: &'static str, bytes: Vec<u8>) -> Variant {
    Variant { name, bytes, also: &[] }
}

impl Layout {
    fn compare(&self, golden: &[u8], variants: &[Variant]) {
        let title = &self.title;
        for field in &self.fields {
            let here = &golden[field.offset..field.offset + field.size];
            match field.name.as_str() {
                "magic" => {
                    let digits = field.meaning.split('`').nth(1).expect("the magic is in backquotes");
                    let hex: Vec<String> = here.iter().map(|byte| format!("{byte:02X}")).collect();
                    assert_eq!(hex.join(" "), digits, "{title}: magic");
                }
                "version" => assert_eq!(here, [1, 0, 0, 0], "{title}: version"),
                "reserved" => assert!(here.iter().all(|byte| *byte == 0), "{title}: reserved bytes"),
                "crc32" => {
                    let crc = crc32(&golden[..field.offset]).to_le_bytes();
                    assert_eq!(here, crc, "{title}: the checksum covers what is before it");
                    assert_eq!(field.meaning, format!("of bytes 0..{}", field.offset), "{title}: crc32");
                }
                name => {
                    let variant = variants.iter().find(|variant| variant.name == name);
                    self.compare_field(
                        field,
                        golden,
                        variant.unwrap_or_else(|| panic!("{title}: no test of '{name}'")),
                    );
                }
            }
        }
        for variant in variants {
            assert!(self.fields.iter().any(|field| field.name == variant.name), "{title} lacks '{}'", variant.name);
        }
    }

    fn compare_field(&self, field: &Field, golden: &[u8], variant: &Variant) {
        let end = self.fields.last().map_or(0, |last| last.offset + last.size);
        let differ: Vec<usize> = (0..end).filter(|at| golden[*at] != variant.bytes[*at]).collect();
        let inside = |field: &Field, at: usize| (field.offset..field.offset + field.size).contains(&at);
        assert!(differ.iter().any(|at| inside(field, *at)), "{}: '{}' is not at its place", self.title, field.name);
        for at in differ {
            let owner = self.fields.iter().find(|field| inside(field, at)).expect("fields fill the layout");
            let may = owner.name == field.name || owner.name == "crc32" || variant.also.contains(&&*owner.name);
            assert!(may, "{}: '{}' also changes byte {at}, which is of '{}'", self.title, field.name, owner.name);
        }
    }
}

pub fn check(page: &str, title: &str, golden: &[u8], variants: &[Variant]) {
    let found = layouts(page).into_iter().find(|layout| layout.title == title);
    found.unwrap_or_else(|| panic!("the page has no table '{title}'")).compare(golden, variants);
}

#[test]
fn every_table_of_offsets_is_compared() {
    let titles = |page| layouts(page).into_iter().map(|layout| layout.title).collect::<Vec<_>>();
    assert_eq!(titles(POOL_PAGE), ["Segment header", "Seal file header"]);
    assert_eq!(titles(STREAM_PAGE), ["Prefix", "Record header"]);
    assert_eq!(
        titles(STORE_PAGE),
        ["Journal header", "Frame header", "Log header", "Meta", "Branch", "Segment", "Stamp", "Opening"]
    );
    assert_eq!(titles(SNAPSHOT_PAGE), ["Record header", "Directory entry"]);
    assert_eq!(titles(super::checkpoint::PAGE), ["Header", "Page trailer", "Index cell", "Footer"]);
}

#[test]
fn segments_and_seals_are_as_the_page_says() {
    let base = samples::header();
    let variants = [
        variant("pool", SegmentHeader { pool: Uuid::from_u128(1), ..base }.encode()),
        variant("id", SegmentHeader { id: SegmentId(9), ..base }.encode()),
        variant("nonce", SegmentHeader { nonce: 1, ..base }.encode()),
        variant("disk", SegmentHeader { disk: DiskId(9), ..base }.encode()),
    ];
    check(POOL_PAGE, "Segment header", &fixture("segment-header"), &variants);
    let variants: Vec<_> = files::seal_variants()
        .into_iter()
        .map(|(name, header)| variant(name, super::files::seal_of(&header)))
        .collect();
    check(POOL_PAGE, "Seal file header", &fixture("seal"), &variants);
}

#[test]
fn the_journal_is_as_the_page_says() {
    use files::SALT;

    let other = Uuid::from_u128(1);
    let frame = |salt, bodies: &[(Vec<u8>, u32)]| {
        files::journal_salted(POOL, salt, JOURNAL_MIN, bodies)[4096 * bodies.len()..4096 * bodies.len() + 4096].to_vec()
    };
    let variants = [
        variant("pool", files::journal_with(other, JOURNAL_MIN, &[])),
        variant("capacity", files::journal_with(POOL, JOURNAL_MIN * 2, &[])),
        variant("salt", files::journal_salted(POOL, other, JOURNAL_MIN, &[])),
    ];
    check(STORE_PAGE, "Journal header", &fixture("journal"), &variants);
    let (a, b) = (vec![1; 40], vec![2; 40]);
    let golden = frame(SALT, &[(a.clone(), 3)]);
    let mut variants = vec![
        variant("salt", frame(other, &[(a.clone(), 3)])),
        variant("lsn", frame(SALT, &[(b.clone(), 3), (a.clone(), 3)])),
        variant("length", frame(SALT, &[(vec![1; 41], 3)])),
        variant("rows", frame(SALT, &[(a.clone(), 4)])),
        variant("bodycrc", frame(SALT, &[(b, 3)])),
        variant("folded", files::journal_folded(&a, 3)[4096..8192].to_vec()),
    ];
    variants[2].also = &["bodycrc"];
    variants[5].also = &["lsn"];
    check(STORE_PAGE, "Frame header", &golden, &variants);
    assert_eq!(golden[40..44], crc32(&a).to_le_bytes(), "bodycrc is the checksum of the body");
    assert_eq!(golden[64..104], a, "the body follows the header");
}

#[test]
fn logs_of_unflushed_changes_are_as_the_page_says() {
    let base = super::unflushed::header();
    let variants = [
        variant("pool", LogHeader { pool: Uuid::from_u128(1), ..base }.encode()),
        variant("boot", LogHeader { boot: Uuid::from_u128(1), ..base }.encode()),
        variant("opening", LogHeader { opening: 9, ..base }.encode()),
        variant("disk", LogHeader { disk: DiskId(9), ..base }.encode()),
    ];
    check(STORE_PAGE, "Log header", &fixture("unflushed"), &variants);
}

#[test]
fn streams_are_as_the_page_says() {
    let header = crate::stream::format::header();
    let longer = Header { disk_name: "webs".to_owned(), ..header };
    check(STREAM_PAGE, "Prefix", &fixture("stream")[..16], &[variant("length", longer.encode()[..16].to_vec())]);
    let data = |offset, length, codec, stored, crc| Record::Data { offset, length, codec, stored, crc }.encode();
    let mut variants = [
        variant("kind", Record::Zeros { offset: 4096, length: 8192 }.encode()),
        variant("codec", data(4096, 8192, Codec::Raw, 8192, 9)),
        variant("stored", data(4096, 8192, Codec::Lz4, 78, 9)),
        variant("offset", data(8192, 8192, Codec::Lz4, 77, 9)),
        variant("length", data(4096, 4096, Codec::Lz4, 77, 9)),
        variant("plain", data(4096, 8192, Codec::Lz4, 77, 8)),
    ];
    variants[0].also = &["codec", "stored", "plain"];
    variants[1].also = &["stored"];
    check(STREAM_PAGE, "Record header", &data(4096, 8192, Codec::Lz4, 77, 9), &variants);
}

#[test]
fn values_of_fixed_length_are_as_the_page_says() {
    let base = samples::meta();
    let variants = [
        variant("disk", Meta { disk: DiskId(9), ..base }.encode()),
        variant("branch", Meta { branch: BranchId(9), ..base }.encode()),
        variant("epoch", Meta { epoch: Epoch(9), ..base }.encode()),
        variant("snapshot", Meta { snapshot: SnapshotId(9), ..base }.encode()),
        variant("segment", Meta { segment: SegmentId(9), ..base }.encode()),
        variant("openings", Meta { openings: 9, ..base }.encode()),
        variant("clean", Meta { clean: false, ..base }.encode()),
    ];
    check(STORE_PAGE, "Meta", &fixture("meta"), &variants);
    let base = BranchRow { inherits: false, ..samples::branch() };
    let parent = |branch, epoch| Some((BranchId(branch), Epoch(epoch)));
    let mut variants = [
        variant("started", BranchRow { parent: None, ..base }.encode()),
        variant("parent branch", BranchRow { parent: parent(4, 9), ..base }.encode()),
        variant("parent epoch", BranchRow { parent: parent(2, 8), ..base }.encode()),
        variant("inherits", BranchRow { inherits: true, ..base }.encode()),
        variant("depth", BranchRow { depth: 9, ..base }.encode()),
        variant("lineage", BranchRow { lineage: BranchId(9), ..base }.encode()),
    ];
    variants[0].also = &["parent branch", "parent epoch"];
    check(STORE_PAGE, "Branch", &base.encode(), &variants);
    let base = samples::segment();
    let variants = [
        variant("disk", SegmentRow { disk: DiskId(9), ..base }.encode()),
        variant("nonce", SegmentRow { nonce: 9, ..base }.encode()),
        variant("opening", SegmentRow { opening: 9, ..base }.encode()),
        variant("mapped", SegmentRow { mapped: 9, ..base }.encode()),
        variant("swept", SegmentRow { swept: false, ..base }.encode()),
        variant("removed", SegmentRow { removed: true, ..base }.encode()),
    ];
    check(STORE_PAGE, "Segment", &fixture("segment-row"), &variants);
    check(STORE_PAGE, "Stamp", &fixture("stamp"), &[variant("stamp", afterimage::store::encode_stamp(9))]);
    let base = samples::opening();
    let variants = [
        variant("nonce", OpeningRow { nonce: 9, ..base }.encode()),
        variant("snapshot", OpeningRow { snapshot: SnapshotId(9), ..base }.encode()),
        variant("begun", OpeningRow { begun: 9, ..base }.encode()),
    ];
    check(STORE_PAGE, "Opening", &fixture("opening"), &variants);
}

#[test]
fn records_are_as_the_page_says() {
    let golden = fixture("record");
    let other = |name, recipe: Recipe, also| Variant { name, bytes: record_of(&recipe), also };
    let more = Recipe { blocks: &[0, 1, 2, 5, 600, 601, 1500, 5000, 9000], ..RECIPE };
    let two = Recipe { reopen: true, ..RECIPE };
    let variants = [
        other("identity", Recipe { name: "daily-12", ..RECIPE }, &["directory", "length"]),
        other("directory", more, &["length"]),
        other("length", more, &["directory"]),
        other("directory length", two, &["directory", "length", "segments"]),
        other("segments", two, &["directory", "length", "directory length"]),
    ];
    check(SNAPSHOT_PAGE, "Record header", &golden, &variants);
    let entry = |bytes: &[u8]| {
        let at = u64::from_le_bytes(bytes[16..24].try_into().unwrap()) as usize;
        bytes[at..at + 60].to_vec()
    };
    let of = |name, recipe: Recipe, also| Variant { name, bytes: entry(&record_of(&recipe)), also };
    let longer = Recipe { name: "daily-12", ..RECIPE };
    let variants = [
        of("segment", Recipe { before: 1, ..RECIPE }, &[]),
        of("nonce", Recipe { nonce: 8, ..RECIPE }, &[]),
        of("blocks", more, &["slabs count", "slabs length", "set", "set length"]),
        of("slabs count", more, &["blocks", "slabs length", "set", "set length"]),
        of("slabs", longer, &["set"]),
        of("slabs length", more, &["blocks", "slabs count", "set", "set length"]),
        of("set", longer, &["slabs"]),
        of("set length", more, &["blocks", "slabs count", "slabs length", "set"]),
    ];
    check(SNAPSHOT_PAGE, "Directory entry", &entry(&golden), &variants);
}
