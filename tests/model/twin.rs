//! The twin: images as plain vectors.

use std::collections::{BTreeMap, HashMap};

pub const SECTOR: usize = 512;

/// A live disk, with everything that may be found after a power cut.
#[derive(Clone, Default)]
pub struct Image {
    /// As last flushed.
    pub durable: Vec<u8>,
    /// As of now.
    pub now: Vec<u8>,
    /// Other versions of sectors since the flush.
    versions: HashMap<usize, Vec<Vec<u8>>>,
}

impl Image {
    pub fn new(size: usize) -> Self {
        Self { durable: vec![0; size], now: vec![0; size], versions: HashMap::new() }
    }

    pub fn of(bytes: Vec<u8>) -> Self {
        Self { durable: bytes.clone(), now: bytes, versions: HashMap::new() }
    }

    pub fn write(&mut self, offset: usize, data: &[u8]) {
        self.now[offset..offset + data.len()].copy_from_slice(data);
        if data.is_empty() {
            return;
        }
        for sector in offset / SECTOR..(offset + data.len()).div_ceil(SECTOR) {
            let (start, end) = (sector * SECTOR, ((sector + 1) * SECTOR).min(self.now.len()));
            self.versions.entry(sector).or_default().push(self.now[start..end].to_vec());
        }
    }

    pub fn flush(&mut self) {
        self.durable = self.now.clone();
        self.versions.clear();
    }

    /// A resize is durable at once; a shrink flushes.
    pub fn resize(&mut self, size: usize) {
        if size < self.now.len() {
            self.flush();
        }
        let old = self.now.len();
        self.now.resize(size, 0);
        self.durable.resize(size, 0);
        // The versions of a last, short sector get longer with the disk.
        if !old.is_multiple_of(SECTOR)
            && let Some(list) = self.versions.get_mut(&(old / SECTOR))
        {
            let len = (size - old / SECTOR * SECTOR).min(SECTOR);
            list.iter_mut().for_each(|version| version.resize(len, 0));
        }
    }

    /// Says which sector cannot be explained.
    pub fn explain(&self, found: &[u8]) -> Result<(), String> {
        if found.len() != self.now.len() {
            return Err(format!("size {} instead of {}", found.len(), self.now.len()));
        }
        for (sector, bytes) in found.chunks(SECTOR).enumerate() {
            let start = sector * SECTOR;
            let durable = &self.durable[start..start + bytes.len()];
            let known = bytes == durable || self.versions.get(&sector).is_some_and(|v| v.iter().any(|v| v == bytes));
            if !known {
                let versions = self.versions.get(&sector).map_or(0, Vec::len);
                return Err(format!(
                    "byte {start}: found {:02x?}.., flushed {:02x?}.., {versions} versions since",
                    &bytes[..8.min(bytes.len())],
                    &durable[..8.min(durable.len())]
                ));
            }
        }
        Ok(())
    }
}

/// A disk and its snapshots.
#[derive(Clone, Default)]
pub struct TwinDisk {
    pub live: Image,
    pub snapshots: BTreeMap<String, Vec<u8>>,
}

/// The whole pool.
#[derive(Clone, Default)]
pub struct Twin {
    pub disks: BTreeMap<String, TwinDisk>,
}
