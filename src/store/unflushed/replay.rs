//! What an opening does with the logs it finds.
//!
//! # Rules
//! 1. Nothing is replayed after a clean close, after another boot, or from another opening than the last.
//! 2. Records of an epoch that has ended are in the frame of its snapshot. Those of a younger one than the current epoch are
//!    of a snapshot that never became durable, and so belong to the current one.
//! 3. The first record that cannot be makes an end for its disk; it is said, and remembered for who comes back.
//! 4. Replayed changes are durable before the opening takes its number: killed in between, the next one replays again.
//!
//! # Why no copies of blocks are needed
//! Everything that was written is in the page cache or on the disk; it is synced here, before a frame names it. What was
//! overwritten in place has no record, and no frame waits for it: the first flush or snapshot of its disk syncs it
//! (`Head::earlier`), whoever had written.

use std::collections::{BTreeMap, BTreeSet};

use uuid::Uuid;

use super::file::{self, LOG_HEADER_LEN, LogHeader, LogRecord, MapChange};
use super::{LONG, log_path};
use crate::error::{Error, Result};
use crate::map::BlockSet;
use crate::media::Open;
use crate::pool::UNFLUSHED_DIR;
use crate::store::head::{Head, Line};
use crate::store::{Store, unmap};
use crate::units::{BLOCK_SIZE, BlockAddress, CHUNK_BLOCKS, ChunkIndex, DiskId, SegmentId, to_usize};

/// Longer files are damaged: a flush is made at [`LONG`], by the many that may write at a time.
const LEN_MAX: u64 = 64 * LONG;

/// What became of the unflushed changes of the last opening.
#[derive(Debug, Default)]
pub(in crate::store) struct Recovery {
    /// It was not closed in order.
    unclean: bool,
    /// A log of the last opening is of before a restart of the host.
    restarted: bool,
    /// Disks of which everything is there.
    whole: BTreeSet<DiskId>,
    /// Disks of which something is not, and why.
    broken: BTreeMap<DiskId, String>,
}

impl Recovery {
    pub(in crate::store) fn lost(&self, id: DiskId) -> Option<String> {
        if !self.unclean || self.whole.contains(&id) {
            return None;
        }
        let why = self.broken.get(&id).map_or("there is no log of what was not flushed", String::as_str);
        Some(format!("the pool was not closed in order, and {why}"))
    }

    pub(super) fn was_closed(&self) -> bool {
        !self.unclean
    }

    pub(super) fn restarted(&self) -> bool {
        self.restarted
    }
}

/// The log of one disk.
#[derive(Debug, Default)]
struct DiskLog {
    files: usize,
    records: Vec<LogRecord>,
    broken: Option<String>,
}

/// All logs that can be trusted, up to where they can be.
#[derive(Debug, Default)]
pub(in crate::store) struct Logs {
    unclean: bool,
    restarted: bool,
    disks: BTreeMap<DiskId, DiskLog>,
}

impl Logs {
    /// Returns the addresses of blocks that are newer than their copies in the journal.
    pub(in crate::store) fn overwritten(&self) -> BTreeSet<BlockAddress> {
        let records = self.disks.values().flat_map(|log| &log.records);
        let changes = records.filter_map(|record| match &record.change {
            MapChange::Overwritten { base, set } => Some(set.iter().map(|index| base.at(index))),
            _ => None,
        });
        changes.flatten().collect()
    }
}

impl Store {
    /// Reads the logs of the last opening. None of them keeps the pool from being opened.
    pub(in crate::store) fn read_logs(&self, clean: bool) -> Logs {
        let mut logs = Logs { unclean: !clean, ..Logs::default() };
        if clean {
            return logs;
        }
        for name in self.media.list(UNFLUSHED_DIR).unwrap_or_default() {
            let Some(disk) = file::disk_of(&name) else { continue };
            let log = logs.disks.entry(disk).or_default();
            log.files += 1;
            let (records, error) = match self.read_log(disk, &format!("{UNFLUSHED_DIR}/{name}"), &mut logs.restarted) {
                Ok(read) => read,
                Err(error) => (Vec::new(), Some(error)),
            };
            log.records.extend(records);
            if let Some(error) = error {
                log.broken.get_or_insert(error.to_string());
            }
        }
        for (disk, log) in &mut logs.disks {
            // The order of one file is kept.
            log.records.sort_by_key(|record| record.generation);
            if log.files < 2 {
                log.broken.get_or_insert(format!(
                    "one of {} and {} is missing",
                    log_path(*disk, 0),
                    log_path(*disk, 1)
                ));
            }
        }
        logs
    }

    fn read_log(&self, disk: DiskId, path: &str, restarted: &mut bool) -> Result<(Vec<LogRecord>, Option<Error>)> {
        let fail = |e| Error::io(format!("cannot read {path}"), e);
        let file = self.media.open(path, Open::ReadOnly).map_err(fail)?;
        let len = file.len().map_err(fail)?;
        if len > LEN_MAX {
            return Err(Error::corrupt(format!("{path} is damaged: it is too long")));
        }
        let mut bytes = vec![0; to_usize(len)];
        file.read_exact_at(&mut bytes, 0).map_err(fail)?;
        let header = LogHeader::decode(path, &bytes)?;
        let boot = Uuid::from_u128(self.media.boot().map_err(fail)?);
        if header.boot != boot {
            // One of an older opening, that could not be removed, says nothing about the last.
            *restarted |= header.pool == self.uuid() && header.opening + 1 == self.opening;
            return Err(Error::failed(format!("{path} is of before a restart of the host")));
        }
        if header != (LogHeader { pool: self.uuid(), boot, opening: self.opening - 1, disk }) {
            return Err(Error::failed(format!("{path} is of another opening, disk or pool")));
        }
        Ok(LogRecord::decode_all(path, &bytes[LOG_HEADER_LEN..]))
    }

    /// Makes what the logs say durable.
    ///
    /// # Errors
    /// Any error of the host or of the catalog.
    pub(in crate::store) fn replay_logs(&self, logs: Logs) -> Result<()> {
        let mut recovery = Recovery { unclean: logs.unclean, restarted: logs.restarted, ..Recovery::default() };
        for (id, log) in logs.disks {
            // Of a removed disk nothing is wanted any more.
            let Ok(name) = self.tables.read().disk(id).map(|row| row.name.clone()) else { continue };
            let stopped = self.replay_log(id, &log.records)?;
            if let Some(why) = stopped.or(log.broken) {
                tracing::error!("disk '{name}': changes that were acknowledged and not flushed may be lost: {why}");
                recovery.broken.insert(id, why);
            } else {
                recovery.whole.insert(id);
            }
        }
        *self.recovery.lock() = recovery;
        Ok(())
    }

    /// Replays the log of one disk; returns why it ends early, if it does.
    fn replay_log(&self, id: DiskId, records: &[LogRecord]) -> Result<Option<String>> {
        let head = self.head(id)?;
        let line = head.line();
        let mut stopped = None;
        let mut count = 0;
        for record in records {
            match &record.change {
                MapChange::Mapped { branch, epoch, chunk, base, set } => {
                    if *branch != line.branch || *epoch < line.epoch {
                        continue;
                    }
                    if let Some(why) = self.impossible(&line, id, *chunk, *base, set)? {
                        stopped = Some(format!("a record of its log cannot be: {why}"));
                        break;
                    }
                    self.replay_change(&head, &line, *chunk, Some(*base), set)?;
                }
                MapChange::Unmapped { branch, epoch, chunk, set } => {
                    if *branch != line.branch || *epoch < line.epoch {
                        continue;
                    }
                    self.replay_change(&head, &line, *chunk, None, set)?;
                }
                MapChange::Overwritten { .. } => continue,
            }
            count += 1;
        }
        if count > 0 {
            // It syncs what the killed process has written (`Head::earlier`).
            self.flush(&head)?;
            let name = self.tables.read().called(id);
            tracing::info!("{count} changes of disk {name} that were not flushed are there again");
        }
        Ok(stopped)
    }

    /// Says what is wrong with a mapping, if anything is.
    fn impossible(
        &self,
        line: &Line,
        id: DiskId,
        chunk: ChunkIndex,
        base: BlockAddress,
        set: &BlockSet,
    ) -> Result<Option<String>> {
        let Some(last) = set.last() else { return Ok(Some("it maps nothing".into())) };
        let segment: SegmentId = base.segment();
        let known = self.tables.read().segment(segment).is_ok_and(|row| !row.removed && row.disk == id);
        if !known || self.segments.is_lost(segment) {
            return Ok(Some(format!("segment {segment} is none of the disk")));
        }
        if chunk.byte() >= line.size {
            return Ok(Some(format!("chunk {chunk} lies beyond the end")));
        }
        let inside = base.at(last).byte() + BLOCK_SIZE <= self.segment(segment)?.len()?;
        if base.raw() < line.floor || u64::from(base.slot()) < CHUNK_BLOCKS || !inside {
            return Ok(Some(format!("address {base} was not handed out for it")));
        }
        Ok(None)
    }

    fn replay_change(
        &self,
        head: &Head,
        line: &Line,
        index: ChunkIndex,
        base: Option<BlockAddress>,
        set: &BlockSet,
    ) -> Result<()> {
        let chunk = self.chunk(&line.source(), index)?;
        let mut state = chunk.lock();
        head.begin_change(line, index, &mut state);
        let before = i64::from(state.entry.mapped().count());
        let lost = match base {
            Some(base) => state.entry.assign(base, set),
            None => state.entry.remove(set),
        };
        head.count(i64::from(state.entry.mapped().count()) - before);
        unmap::note_dropped(&mut state, lost);
        Ok(())
    }
}
