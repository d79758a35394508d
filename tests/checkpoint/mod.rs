//! Checkpoint files: what comes back, what crashes leave, what damage does, and what a checkpoint keeps from being removed.
//!
//! Memory is made of a seed, page block by page block, half of it zeros and the rest of several sorts, so that what is
//! read back can be compared with what was saved without keeping it.

mod chains;
mod commands;
mod crashes;
mod damage;
mod packed;
mod pools;
mod threads;

use std::sync::Arc;

use afterimage::checkpoint::{
    Access, Cut, Folder, Found, Geometry, Name, PageBlock, Place, Plan, Pushed, Reader, Region, Sizes, Staging, Writer,
    is_zero,
};
use afterimage::error::Result;
use afterimage::media::{Media, SimMedia};

/// Small parts, so that a small memory has many of them.
pub const SMALL: Sizes = Sizes { page_block: 8192, storage_block: 32 << 10, table_page: 4096 };

/// Two regions, the first of which ends within a page block.
pub fn geometry() -> Geometry {
    geometry_of(SMALL, 40)
}

pub fn geometry_of(sizes: Sizes, page_blocks: u64) -> Geometry {
    let block = u64::from(sizes.page_block);
    let first = Region { address: 0, length: block * page_blocks / 2 - 4096 };
    let second = Region { address: 1 << 32, length: block * page_blocks.div_ceil(2) };
    Geometry::new(sizes, &[first, second]).unwrap()
}

pub fn name(text: &str) -> Name {
    Name::parse(text).unwrap()
}

pub fn sim() -> (SimMedia, Folder) {
    let media = SimMedia::new(1);
    let shared: Arc<dyn Media> = Arc::new(media.clone());
    (media, Folder::of_pool(&shared))
}

/// What a page block has: of one in three zeros, of the others something that depends on the seed.
pub fn content(seed: u64, number: PageBlock, length: usize) -> Vec<u8> {
    let mut state = (seed + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ number.0.wrapping_mul(0xd1b5_4a32_d192_ed03);
    let mut next = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    match next() % 6 {
        0 | 1 => vec![0; length],
        2 | 3 => (0..length).map(|_| (next() >> 33) as u8).collect(),
        4 => (0..length).map(|n| (n / 97) as u8).collect(),
        _ => (0..length / 8).flat_map(|n| if n % 3 == 0 { next().to_le_bytes() } else { [n as u8; 8] }).collect(),
    }
}

/// What of a memory is saved, and how.
pub struct Save<'a> {
    pub name: &'a str,
    pub geometry: Geometry,
    pub parent: Option<&'a str>,
    /// The seed of a page block; `None` when it is as in the parent.
    pub seed: &'a dyn Fn(PageBlock) -> Option<u64>,
    /// Whether a page block goes to a hot storage block.
    pub hot: &'a dyn Fn(PageBlock) -> bool,
    pub state: &'a [u8],
    pub replace: bool,
}

impl Default for Save<'_> {
    fn default() -> Self {
        Self {
            name: "vm@a",
            geometry: geometry(),
            parent: None,
            seed: &|_| Some(1),
            hot: &|number| number.0 % 5 == 4,
            state: b"the state of the devices",
            replace: false,
        }
    }
}

impl Save<'_> {
    pub fn plan(&self) -> Plan {
        let parent = self.parent.map(name);
        Plan { parent, replace: self.replace, ..Plan::new(name(self.name), "test", self.geometry.clone()) }
    }

    /// Enters all of the memory.
    pub fn enter(&self, writer: &Writer) -> Result<()> {
        let [mut cold, mut hot] = [(); 2].map(|()| Staging::new(&self.geometry).unwrap());
        for number in (0..self.geometry.page_blocks()).map(PageBlock) {
            let Some(seed) = (self.seed)(number) else {
                writer.set(number, Place::Parent)?;
                continue;
            };
            let plain = content(seed, number, self.geometry.length(number).unwrap());
            if is_zero(&plain) {
                writer.set(number, Place::Zero)?;
                continue;
            }
            let is_hot = (self.hot)(number);
            let staging = if is_hot { &mut hot } else { &mut cold };
            if staging.push(number, &plain) == Pushed::Full {
                writer.write(staging, is_hot)?;
            }
        }
        for (staging, is_hot) in [(&mut hot, true), (&mut cold, false)] {
            while !staging.is_empty() {
                writer.write(staging, is_hot)?;
            }
        }
        Ok(())
    }

    pub fn run(&self, folder: &Folder) -> Result<()> {
        let writer = Writer::create(folder, self.plan())?;
        self.enter(&writer)?;
        let cut = Cut { created: 1_800_000_000, disks: Vec::new(), state_version: 7, state: self.state };
        writer.commit(&cut).map(drop)
    }
}

/// Compares all of a checkpoint with what its page blocks should have.
pub fn compare(reader: &Reader, seed: &dyn Fn(PageBlock) -> u64) -> Result<()> {
    let geometry = reader.geometry();
    let mut scratch = vec![0; geometry.storage_block()];
    for number in (0..geometry.page_blocks()).map(PageBlock) {
        let mut out = vec![0xee; geometry.length(number).unwrap()];
        reader.read(number, &mut scratch, &mut out)?;
        assert!(out == content(seed(number), number, out.len()), "page block {number}");
        assert_eq!(matches!(reader.place(number)?, Found::Zero), is_zero(&out), "page block {number}");
    }
    Ok(())
}

pub fn open(folder: &Folder, text: &str) -> Result<Reader> {
    Reader::open(folder, &name(text), Access::Cached)
}

#[test]
fn what_was_saved_comes_back() {
    let (media, folder) = sim();
    Save::default().run(&folder).unwrap();
    assert_eq!(media.paths(), ["checkpoints/vm/a.ckpt"]);
    let reader = open(&folder, "vm@a").unwrap();
    compare(&reader, &|_| 1).unwrap();
    assert_eq!((reader.state().unwrap(), reader.state_version()), (b"the state of the devices".to_vec(), 7));
    let (header, footer) = (reader.header(), *reader.layers()[0].footer());
    assert_eq!((header.machine.as_str(), header.name.as_str(), header.maker.as_str()), ("vm", "a", "test"));
    assert_eq!((header.created, header.geometry.clone()), (1_800_000_000, geometry()));
    assert_eq!(footer.stored + footer.zeros, geometry().page_blocks());
    assert!(footer.zeros > 5 && footer.blocks > 3, "{footer:?}");
    // Contents and index say the same, and what is hot is in the hot storage blocks.
    let hot = reader.hot().unwrap();
    assert_eq!(hot.len(), footer.hot as usize);
    let mut stored = 0;
    for block in (0..footer.blocks).map(afterimage::checkpoint::StorageBlock) {
        let mut end = 0;
        reader
            .contents(0, block, |number, place| {
                assert_eq!((place.block, place.offset), (block, end));
                assert_eq!(hot.contains(&block), number.0 % 5 == 4, "page block {number}");
                end += place.length;
                stored += 1;
                Ok(())
            })
            .unwrap();
    }
    assert_eq!(stored, footer.stored);
    reader.contents(0, afterimage::checkpoint::StorageBlock(footer.blocks), |_, _| Ok(())).unwrap_err();
}

/// One pwrite for each storage block and nothing else of data: what does not compress fills them exactly.
#[test]
fn storage_blocks_are_one_write_each() {
    let (media, folder) = sim();
    let sizes = Sizes::USUAL;
    let geometry = Geometry::new(sizes, &[Region { address: 0, length: 8 << 20 }]).unwrap();
    let writer = Writer::create(&folder, Plan::new(name("vm@raw"), "test", geometry.clone())).unwrap();
    let before = media.io_count();
    let mut staging = Staging::new(&geometry).unwrap();
    for number in (0..geometry.page_blocks()).map(PageBlock) {
        let mut plain = content(3, PageBlock(number.0 * 6), 0);
        plain.resize(64 << 10, 0);
        let mut state = number.0 + 1;
        plain.iter_mut().for_each(|byte| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            *byte = (state >> 56) as u8;
        });
        if staging.push(number, &plain) == Pushed::Full {
            writer.write(&mut staging, false).unwrap();
        }
    }
    assert!(staging.is_empty());
    assert_eq!(media.io_count() - before, 8, "8 MiB are eight writes");
    assert_eq!((writer.written().blocks, writer.written().bytes), (8, 8 << 20));
}

/// Opening reads no more of a large memory than of a small one.
#[test]
fn opening_does_not_depend_on_the_size_of_the_memory() {
    let (_, folder) = sim();
    let mut took = Vec::new();
    for (text, gib) in [("vm@small", 1), ("vm@large", 1024)] {
        let geometry = Geometry::new(Sizes::USUAL, &[Region { address: 0, length: gib << 30 }]).unwrap();
        let writer = Writer::create(&folder, Plan::new(name(text), "test", geometry.clone())).unwrap();
        for number in (0..geometry.page_blocks()).map(PageBlock) {
            writer.set(number, Place::Zero).unwrap();
        }
        let cut = Cut { created: 1, disks: Vec::new(), state_version: 1, state: b"" };
        writer.commit(&cut).unwrap();
        let open = || {
            let begun = std::time::Instant::now();
            let reader = open(&folder, text).unwrap();
            assert_eq!(reader.place(PageBlock(geometry.page_blocks() - 1)).unwrap(), Found::Zero);
            begun.elapsed()
        };
        took.push((0..5).map(|_| open()).min().unwrap());
    }
    let more = took[1].saturating_sub(took[0]);
    assert!(more < std::time::Duration::from_millis(5), "1,024 times the index costs {more:?} more: {took:?}");
}

#[test]
fn what_is_not_whole_is_no_checkpoint() {
    let (media, folder) = sim();
    let save = Save::default();
    let cut = Cut { created: 1, disks: Vec::new(), state_version: 1, state: b"" };
    // Nothing entered, then all but one, then one twice.
    Writer::create(&folder, save.plan()).unwrap().commit(&cut).unwrap_err();
    let writer = Writer::create(&folder, save.plan()).unwrap();
    for number in 1..save.geometry.page_blocks() {
        writer.set(PageBlock(number), Place::Zero).unwrap();
    }
    let error = writer.commit(&cut).unwrap_err();
    assert!(error.to_string().contains("39 of 40"), "{error}");
    let writer = Writer::create(&folder, save.plan()).unwrap();
    writer.set(PageBlock(0), Place::Zero).unwrap();
    writer.set(PageBlock(0), Place::Zero).unwrap_err();
    for number in 1..save.geometry.page_blocks() {
        writer.set(PageBlock(number), Place::Zero).unwrap();
    }
    writer.commit(&cut).unwrap_err();
    let writer = Writer::create(&folder, save.plan()).unwrap();
    writer.set(PageBlock(40), Place::Zero).unwrap_err();
    writer.set(PageBlock(0), Place::Parent).unwrap_err();
    drop(writer);
    assert_eq!(media.paths(), [""; 0], "nothing stays");
    // A name that is taken.
    save.run(&folder).unwrap();
    assert_eq!(save.run(&folder).unwrap_err().kind(), afterimage::error::Kind::Exists);
    Save { replace: true, seed: &|_| Some(2), ..Save::default() }.run(&folder).unwrap();
    compare(&open(&folder, "vm@a").unwrap(), &|_| 2).unwrap();
}
