//! Proof on demand: the diff of two states recomputed from their data.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{Diff, Extent, StateName, open};
use crate::disk::BlockDevice;
use crate::error::{Error, Result};
use crate::progress::Progress;
use crate::store::Store;
use crate::units::{BLOCK_SIZE, SnapshotId, to_usize};

/// Bytes that are compared at a time.
const PART: u64 = 1 << 20;

/// What comparing the data has found.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct VerifyReport {
    /// Bytes that were compared.
    pub compared: u64,
    /// Bytes that the diff tells of.
    pub told: u64,
    /// Of them, bytes in blocks that are the same all the same.
    pub same: u64,
    /// Bytes in blocks that differ and that the diff does not tell of: must be 0.
    pub missed: u64,
    /// Bytes that the diff calls zeros and that are not: must be 0.
    pub not_zero: u64,
    /// First byte of the first block that is wrong.
    pub first_wrong: Option<u64>,
}

/// A side with its data, and the snapshot that was taken for it.
struct Data {
    name: StateName,
    device: Option<Arc<dyn BlockDevice>>,
    hidden: Option<SnapshotId>,
}

/// Compares the data of two states that have it, and their diff with what differs. A live disk is compared as of a
/// snapshot that is taken for that and goes again.
///
/// # Errors
/// `Failed` when one is retired; any error of reading.
pub fn verify(store: &Arc<Store>, from: &StateName, to: &StateName, progress: &dyn Progress) -> Result<VerifyReport> {
    let mut sides = Vec::new();
    let result = (|| {
        for name in [from, to] {
            sides.push(side(store, name)?);
        }
        let diff = open(store, &sides[0].name, &sides[1].name)?;
        let empty: Arc<dyn BlockDevice> = Arc::new(Empty);
        let device = |n: usize| sides[n].device.as_ref().unwrap_or(&empty);
        run(&diff, &**device(0), &**device(1), progress)
    })();
    for side in sides {
        drop(side.device);
        if let Some(id) = side.hidden {
            crate::snapshot::remove::remove_hidden(store, id)?;
        }
    }
    result
}

fn side(store: &Arc<Store>, name: &StateName) -> Result<Data> {
    match name {
        StateName::Nothing => Ok(Data { name: name.clone(), device: None, hidden: None }),
        StateName::Snapshot(disk, snapshot) => {
            let device = crate::snapshot::open(store, disk, snapshot)?;
            Ok(Data { name: name.clone(), device: Some(device), hidden: None })
        }
        StateName::Disk(disk) => {
            let id = store.tables.read().disk_id(disk)?;
            let hidden = crate::snapshot::take::take_hidden(store, id)?;
            let opened = crate::snapshot::open_by_id(store, hidden);
            let device =
                opened.or_else(|error| crate::snapshot::remove::remove_hidden(store, hidden).and(Err(error)))?;
            Ok(Data { name: StateName::Hidden(hidden), device: Some(device), hidden: Some(hidden) })
        }
        StateName::Hidden(_) => Err(Error::usage("only named states are verified")),
    }
}

fn run(diff: &Diff, from: &dyn BlockDevice, to: &dyn BlockDevice, progress: &dyn Progress) -> Result<VerifyReport> {
    let mut report = VerifyReport::default();
    progress.total(diff.to_size());
    let mut at = 0;
    diff.each(&mut |extent| {
        compare_range(at, extent.offset, None, from, to, &mut report, progress)?;
        let end = extent.offset + extent.length;
        compare_range(extent.offset, end, Some(extent), from, to, &mut report, progress)?;
        at = end;
        Ok(())
    })?;
    compare_range(at, diff.to_size(), None, from, to, &mut report, progress)?;
    Ok(report)
}

fn compare_range(
    start: u64,
    end: u64,
    extent: Option<Extent>,
    from: &dyn BlockDevice,
    to: &dyn BlockDevice,
    report: &mut VerifyReport,
    progress: &dyn Progress,
) -> Result<()> {
    let mut at = start;
    while at < end {
        if progress.cancelled() {
            return Err(Error::failed("the comparison was cancelled"));
        }
        let len = PART.min(end - at);
        let (mut old, mut new) = (vec![0; to_usize(len)], vec![0; to_usize(len)]);
        for (side, bytes) in [(from, &mut old), (to, &mut new)] {
            // Beyond its end a side is zeros.
            let known = side.size().saturating_sub(at).min(len);
            if known > 0 {
                side.read(&mut bytes[..to_usize(known)], at)?;
            }
        }
        let block = to_usize(BLOCK_SIZE);
        for (n, (a, b)) in old.chunks(block).zip(new.chunks(block)).enumerate() {
            let bytes = b.len() as u64;
            let differs = a != b;
            let wrong = match extent {
                None if differs => &mut report.missed,
                Some(extent) if extent.zero && b.iter().any(|byte| *byte != 0) => &mut report.not_zero,
                Some(_) if !differs => {
                    report.same += bytes;
                    continue;
                }
                _ => continue,
            };
            *wrong += bytes;
            report.first_wrong.get_or_insert(at + n as u64 * BLOCK_SIZE);
        }
        report.compared += len;
        report.told += if extent.is_some() { len } else { 0 };
        progress.advance(len);
        at += len;
    }
    Ok(())
}

/// Nothing, to compare with.
#[derive(Debug)]
struct Empty;

impl BlockDevice for Empty {
    fn size(&self) -> u64 {
        0
    }
    fn read(&self, buf: &mut [u8], _offset: u64) -> Result<()> {
        assert!(buf.is_empty(), "nothing has no bytes");
        Ok(())
    }
    fn write(&self, _data: &[u8], _offset: u64) -> Result<()> {
        Err(Error::read_only("nothing is never written"))
    }
    fn flush(&self) -> Result<()> {
        Ok(())
    }
    fn discard(&self, _offset: u64, _len: u64) -> Result<()> {
        Err(Error::read_only("nothing is never written"))
    }
    fn write_zeroes(&self, _offset: u64, _len: u64) -> Result<()> {
        Err(Error::read_only("nothing is never written"))
    }
    fn next_data(&self, _offset: u64) -> Result<Option<(u64, u64)>> {
        Ok(None)
    }
    fn mapped(&self) -> u64 {
        0
    }
    fn read_only(&self) -> bool {
        true
    }
}
