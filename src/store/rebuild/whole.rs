//! The better way: a catalog, and every frame that came after it.
//!
//! # Rules
//! 1. The frames must be an unbroken line from the one after the catalog's mark to the newest in the ring.
//! 2. Frames up to the last fold that the journal tells of go into the new catalog; the rest stays in the journal, and the
//!    next opening replays it as always. Copies of blocks in folded frames are out of date and are left out; what deletes
//!    them is not, for the catalog may have some of a segment whose file was missing.
//! 3. A segment with data that the rows do not know contradicts rule 1, whatever the numbers say: opening the pool would
//!    remove it. Then this way is not gone.

use std::collections::BTreeMap;

use super::source::Source;
use super::{Output, Work};
use crate::error::Result;
use crate::media::Media;
use crate::pool::{CATALOG, SegmentHeader, Segments};
use crate::store::journal::{Mark, Survey};
use crate::store::rows::{Key, KeyParts, Meta, Row, Table};
use crate::units::{BLOCK_SIZE, CHUNK_SIZE, DiskId, SegmentId};

/// What there is to begin from.
pub(super) enum Found {
    /// The catalog of the pool itself: there is nothing to do.
    Sound,
    /// One of the sources, or the empty catalog of a new pool.
    Source(Option<usize>),
}

/// Looks for a catalog that an unbroken line of frames follows.
pub(super) fn find(work: &mut Work<'_>, sources: &[Source]) -> Result<Option<Found>> {
    let Some(survey) = &work.survey else { return Ok(None) };
    for (n, source) in sources.iter().enumerate() {
        if follows(survey, source.mark.lsn)? && knows_all_segments(&**work.media, survey, Some(source))? {
            work.report.source = Some(source.name.clone());
            work.report.complete = true;
            let sound = source.name == CATALOG;
            return Ok(Some(if sound { Found::Sound } else { Found::Source(Some(n)) }));
        }
    }
    if survey.last().is_some() && follows(survey, 0)? && knows_all_segments(&**work.media, survey, None)? {
        work.report.complete = true;
        return Ok(Some(Found::Source(None)));
    }
    Ok(None)
}

/// Tells whether every frame after `lsn` is there.
fn follows(survey: &Survey, lsn: u64) -> Result<bool> {
    let (last, first) = (survey.last().unwrap_or(0), survey.first_of_line().unwrap_or(1));
    if last < lsn || (last > lsn && first > lsn + 1) {
        return Ok(false);
    }
    if survey.folded() > 0 {
        return Ok(true);
    }
    // Frames of a program that did not tell what was folded: copies of blocks in them may be out of date or not.
    for n in lsn + 1..=last {
        if survey.rows(n)?.iter().any(|row| row.key.is_of(Table::Data) && row.value.is_some()) {
            return Ok(false);
        }
    }
    Ok(true)
}

fn knows_all_segments(media: &dyn Media, survey: &Survey, source: Option<&Source>) -> Result<bool> {
    let mut known = std::collections::BTreeSet::new();
    let mut take = |key: &Key, there: bool| -> Result<()> {
        if let KeyParts::Segment(id) = key.parts()? {
            if there {
                known.insert(id)
            } else {
                known.remove(&id)
            };
        }
        Ok(())
    };
    if let Some(source) = source {
        source.each(&mut |key, _| if key.is_of(Table::Segment) { take(&key, true) } else { Ok(()) })?;
    }
    for lsn in source.map_or(0, |source| source.mark.lsn) + 1..=survey.last().unwrap_or(0) {
        for row in survey.rows(lsn)?.iter().filter(|row| row.key.is_of(Table::Segment)) {
            take(&row.key, row.value.is_some())?;
        }
    }
    for id in segment_ids(media)? {
        if !known.contains(&id) && has_data(media, id)? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Returns the ids of all segment files.
pub(super) fn segment_ids(media: &dyn Media) -> Result<Vec<SegmentId>> {
    Segments::ids(media)
}

fn has_data(media: &dyn Media, id: SegmentId) -> Result<bool> {
    let path = crate::pool::segment_path(id);
    let fail = |e| crate::error::Error::io(format!("cannot look at {path}"), e);
    let file = media.open(&path, crate::media::Open::ReadOnly).map_err(fail)?;
    Ok(file.next_data(CHUNK_SIZE).map_err(fail)?.is_some())
}

/// Reads the header of a segment file.
pub(super) fn segment_header(media: &dyn Media, id: SegmentId) -> Result<(SegmentHeader, u64)> {
    let path = crate::pool::segment_path(id);
    let fail = |e| crate::error::Error::io(format!("cannot look at {path}"), e);
    let file = media.open(&path, crate::media::Open::ReadOnly).map_err(fail)?;
    let mut bytes = [0; 64];
    let short = |e| crate::error::Error::corrupt(format!("the header of {path} cannot be read: {e}"));
    file.read_exact_at(&mut bytes, 0).map_err(short)?;
    Ok((SegmentHeader::decode(&path, &bytes)?, file.len().map_err(fail)?))
}

/// Writes the new catalog.
pub(super) fn write(work: &mut Work<'_>, source: Option<&Source>) -> Result<()> {
    let survey = work.survey.as_ref().expect("found with it");
    let start = source.map_or(Mark::START, |source| source.mark);
    let upto = start.lsn.max(survey.folded());
    let mark = if upto == start.lsn { start } else { survey.mark_behind(upto).unwrap_or(start) };
    work.progress.message("writing the catalog");
    let mut output = Output::create(&**work.media, mark)?;
    match source {
        Some(source) => source.each(&mut |key, value| output.put_value(key, value))?,
        None => output.put_value(Key::meta(), Meta { clean: true, ..Meta::default() }.encode())?,
    }
    for lsn in start.lsn + 1..=upto {
        for row in survey.rows(lsn)? {
            if !row.key.is_of(Table::Data) || row.value.is_none() {
                output.put(row)?;
            }
        }
    }
    output.finish()?;
    work.report.frames = survey.last().unwrap_or(0).saturating_sub(start.lsn);
    tell_disks(work, source, start)
}

/// Names the disks and counts their snapshots, for the report.
fn tell_disks(work: &mut Work<'_>, source: Option<&Source>, start: Mark) -> Result<()> {
    let survey = work.survey.as_ref().expect("found with it");
    let mut rows: BTreeMap<Key, Vec<u8>> = BTreeMap::new();
    let small = |key: &Key| key.is_of(Table::Disk) || key.is_of(Table::State);
    if let Some(source) = source {
        source.each(&mut |key, value| {
            if small(&key) {
                rows.insert(key, value);
            }
            Ok(())
        })?;
    }
    for lsn in start.lsn + 1..=survey.last().unwrap_or(0) {
        for Row { key, value } in survey.rows(lsn)?.into_iter().filter(|row| small(&row.key)) {
            match value {
                Some(value) => rows.insert(key, value),
                None => rows.remove(&key),
            };
        }
    }
    let mut disks: BTreeMap<DiskId, super::RebuiltDisk> = BTreeMap::new();
    for (key, value) in &rows {
        match key.parts()? {
            KeyParts::Disk(id) => {
                let row = crate::store::DiskRow::decode(value)?;
                let disk = disks.entry(id).or_default();
                disk.disk = row.name;
                disk.referenced = row.referenced * BLOCK_SIZE;
            }
            KeyParts::State(..) => {
                let row = crate::store::StateRow::decode(value)?;
                if !row.name.is_empty()
                    && let Some(disk) = disks.get_mut(&row.disk)
                {
                    disk.snapshots += 1;
                }
            }
            _ => {}
        }
    }
    work.report.disks = disks.into_values().collect();
    Ok(())
}
