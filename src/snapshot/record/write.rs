//! Writing a record from the map of a snapshot.
//!
//! The map comes in the order of chunks and the record is in the order of addresses, so addresses are gathered in memory: of
//! as many segments at a time as fit into [`BUDGET`]. A disk of a terabyte takes one walk over its map.

use std::collections::BTreeMap;

use roaring::RoaringBitmap;
use uuid::Uuid;

use super::slabs::{self, gather};
use super::{DirectoryEntry, HEADER_LEN, Header, RecordIdentity, record_path};
use crate::codec::{Writer, seal};
use crate::error::{Error, Result};
use crate::media::{File, Media, Open};
use crate::pool::RETIRED_DIR;
use crate::store::MapView;
use crate::units::{CHUNK_BLOCKS, ChunkIndex, SegmentId};

/// Bytes of addresses in memory at a time, about.
const BUDGET: u64 = 128 << 20;

/// How much of a snapshot lies in a segment.
#[derive(Debug, Default, Clone, Copy)]
struct Share {
    blocks: u64,
    slabs: u64,
}

impl Share {
    /// Returns the bytes that gathering it takes at most.
    fn weight(&self) -> u64 {
        let containers = self.slabs.div_ceil((1 << 16) / CHUNK_BLOCKS) + 1;
        self.slabs * 8 + (self.blocks * 2).min(containers * 8192)
    }
}

/// What is gathered of a segment.
#[derive(Debug, Default)]
pub(super) struct Gathered {
    /// Number and chunk of each slab.
    pub(super) slabs: Vec<(u32, u32)>,
    pub(super) set: RoaringBitmap,
}

/// Writes the record of a snapshot durably; one that is there is replaced. `nonce` tells the nonce of a segment.
///
/// # Errors
/// Any error of the host, of the catalog, or of `nonce`. A temporary file may stay and is replaced by the next try.
pub fn write(
    media: &dyn Media,
    identity: &RecordIdentity,
    map: &MapView,
    nonce: &dyn Fn(SegmentId) -> Result<u64>,
) -> Result<()> {
    replace(media, identity.row.state.uuid, &|file, path| fill(file, path, identity, map, nonce))
}

/// Puts a copy of a record that was read elsewhere into its place, durably.
///
/// # Errors
/// As [`write()`].
pub fn copy(media: &dyn Media, snapshot: Uuid, from: &dyn File) -> Result<()> {
    replace(media, snapshot, &|file, path| {
        let mut buf = vec![0; 1 << 20];
        let mut at = 0;
        loop {
            let got = from.read_at(&mut buf, at).map_err(|e| Error::io("cannot read the copy of a record", e))?;
            if got == 0 {
                return Ok(());
            }
            file.write_at(&buf[..got], at).map_err(|e| Error::io(format!("cannot write {path}"), e))?;
            at += got as u64;
        }
    })
}

/// Makes a file under a temporary name, fills it, and puts it in its place.
fn replace(media: &dyn Media, snapshot: Uuid, fill: &dyn Fn(&dyn File, &str) -> Result<()>) -> Result<()> {
    let path = record_path(snapshot);
    let temporary = format!("{path}.new");
    let fail = |e| Error::io(format!("cannot write {path}"), e);
    match media.make_dir(RETIRED_DIR) {
        Ok(()) => media.sync_dir("").map_err(fail)?,
        Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => return Err(fail(e)),
        Err(_) => {}
    }
    match media.remove(&temporary) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(fail(e)),
        _ => {}
    }
    let file = media.open(&temporary, Open::New).map_err(fail)?;
    let written = fill(&*file, &path);
    if written.is_err() {
        // It takes room that somebody is waiting for; what cannot be removed either is replaced by the next try.
        drop(media.remove(&temporary));
    }
    written?;
    file.sync().map_err(fail)?;
    media.rename(&temporary, &path).map_err(fail)?;
    media.sync_dir(RETIRED_DIR).map_err(fail)
}

fn fill(
    file: &dyn File,
    path: &str,
    identity: &RecordIdentity,
    map: &MapView,
    nonce: &dyn Fn(SegmentId) -> Result<u64>,
) -> Result<()> {
    let fail = |e| Error::io(format!("cannot write {path}"), e);
    let mut head = identity.encode();
    let mut header = Header {
        identity: u32::try_from(head.len()).expect("names are short"),
        directory: 0,
        directory_len: 0,
        length: 0,
        segments: 0,
    };
    let mut at = HEADER_LEN as u64;
    let mut put = |bytes: &[u8]| -> Result<(u64, u64)> {
        file.write_at(bytes, at).map_err(fail)?;
        let place = (at, bytes.len() as u64);
        at += bytes.len() as u64;
        Ok(place)
    };
    put(&head)?;
    let mut directory = Writer::new();
    let shares = shares(map)?;
    let mut rest = shares.iter().peekable();
    while let Some((first, share)) = rest.next() {
        let (mut last, mut weight) = (*first, share.weight());
        while let Some((segment, share)) = rest.next_if(|(_, next)| weight + next.weight() <= BUDGET) {
            last = *segment;
            weight += share.weight();
        }
        for (segment, gathered) in gather_segments(map, *first, last)? {
            let entry = put_segment(segment, nonce(segment)?, gathered, &mut put)?;
            entry.encode(&mut directory);
            header.segments += 1;
        }
    }
    (header.directory, header.directory_len) = put(&directory.sealed())?;
    header.length = header.directory + header.directory_len;
    head = header.encode();
    file.write_at(&head, 0).map_err(fail)
}

/// Finds which segments the snapshot lies in, and how much of it.
fn shares(map: &MapView) -> Result<BTreeMap<SegmentId, Share>> {
    let mut shares: BTreeMap<SegmentId, Share> = BTreeMap::new();
    let mut walk = map.walk(ChunkIndex(0))?;
    while let Some(found) = walk.step()? {
        for piece in found.entry.pieces() {
            let share = shares.entry(piece.base.segment()).or_default();
            share.blocks += u64::from(piece.set.count());
            share.slabs += 1;
        }
    }
    Ok(shares)
}

fn gather_segments(map: &MapView, first: SegmentId, last: SegmentId) -> Result<BTreeMap<SegmentId, Gathered>> {
    let mut all: BTreeMap<SegmentId, Gathered> = BTreeMap::new();
    let mut walk = map.walk(ChunkIndex(0))?;
    while let Some(found) = walk.step()? {
        for piece in found.entry.pieces() {
            let segment = piece.base.segment();
            if segment < first || segment > last {
                continue;
            }
            let gathered = all.entry(segment).or_default();
            gathered.slabs.push((piece.base.slot() / SLAB, found.chunk.0));
            for (start, end) in piece.set.runs() {
                let slot = piece.base.at(start).slot();
                gathered.set.insert_range(slot..slot + u32::try_from(end - start).expect("at most 512"));
            }
        }
    }
    Ok(all)
}

/// Appends bytes; returns where they are and how many.
pub(super) type Put<'a> = &'a mut dyn FnMut(&[u8]) -> Result<(u64, u64)>;

const SLAB: u32 = 512;
const _: () = assert!(SLAB as u64 == CHUNK_BLOCKS);

/// Appends the parts of one segment; returns where they are.
pub(super) fn put_segment(
    segment: SegmentId,
    nonce: u64,
    mut gathered: Gathered,
    put: Put<'_>,
) -> Result<DirectoryEntry> {
    gathered.slabs.sort_unstable();
    let slab_count = u32::try_from(gathered.slabs.len()).expect("a segment has fewer than 2^19 slabs");
    let mut table = Writer::new();
    slabs::encode(&gather(&gathered.slabs), &mut table);
    drop(std::mem::take(&mut gathered.slabs));
    gathered.set.optimize();
    let mut set = Vec::with_capacity(gathered.set.serialized_size() + 4);
    gathered.set.serialize_into(&mut set).expect("writing to memory does not fail");
    Ok(DirectoryEntry {
        segment: segment.0,
        nonce,
        blocks: gathered.set.len(),
        slab_count,
        slabs: put(&table.sealed())?,
        set: put(&seal(set))?,
    })
}
