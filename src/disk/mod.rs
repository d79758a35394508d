//! STUB: in-memory disks.
#![allow(missing_docs, reason = "stub")]
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::Weak;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::error::{Error, Result};
use crate::store::{Change, DiskInfo, DiskRec, Store};
use crate::sync::{Mutex, RwLock};
use crate::units::{BLOCK_SIZE, DISK_SIZE_MAX, DiskId};

pub trait BlockDevice: Send + Sync {
    fn size(&self) -> u64;
    fn read(&self, buf: &mut [u8], offset: u64) -> Result<()>;
    fn write(&self, data: &[u8], offset: u64) -> Result<()>;
    fn flush(&self) -> Result<()>;
    fn discard(&self, offset: u64, len: u64) -> Result<()>;
    fn write_zeroes(&self, offset: u64, len: u64) -> Result<()>;
    fn next_data(&self, offset: u64) -> Result<Option<(u64, u64)>>;
    fn mapped(&self) -> u64;
    fn read_only(&self) -> bool;
}
#[derive(Debug, Clone, Default)]
pub(crate) struct Data { pub(crate) size: u64, pub(crate) blocks: BTreeMap<u64, Arc<Vec<u8>>> }
impl Data {
    pub(crate) fn read(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        if offset + buf.len() as u64 > self.size { return Err(Error::usage("read beyond the end")); }
        let mut done = 0;
        while done < buf.len() {
            let at = offset + done as u64;
            let inner = (at % BLOCK_SIZE) as usize;
            let n = (BLOCK_SIZE as usize - inner).min(buf.len() - done);
            match self.blocks.get(&(at / BLOCK_SIZE)) { Some(b) => buf[done..done + n].copy_from_slice(&b[inner..inner + n]), None => buf[done..done + n].fill(0) }
            done += n;
        }
        Ok(())
    }
    fn write(&mut self, data: &[u8], offset: u64) -> Result<()> {
        if offset + data.len() as u64 > self.size { return Err(Error::usage("write beyond the end")); }
        let mut done = 0;
        while done < data.len() {
            let at = offset + done as u64;
            let inner = (at % BLOCK_SIZE) as usize;
            let n = (BLOCK_SIZE as usize - inner).min(data.len() - done);
            let block = Arc::make_mut(self.blocks.entry(at / BLOCK_SIZE).or_insert_with(|| Arc::new(vec![0; 4096])));
            block[inner..inner + n].copy_from_slice(&data[done..done + n]);
            done += n;
        }
        Ok(())
    }
    fn zero(&mut self, offset: u64, len: u64, edges: bool) {
        let end = (offset + len).min(self.size);
        let (first, last) = (offset.div_ceil(BLOCK_SIZE), if end == self.size { end.div_ceil(BLOCK_SIZE) } else { end / BLOCK_SIZE });
        if first < last { let keys: Vec<u64> = self.blocks.range(first..last).map(|(k, _)| *k).collect(); for k in keys { self.blocks.remove(&k); } }
        if edges {
            for block in [offset / BLOCK_SIZE, end / BLOCK_SIZE] {
                if let Some(b) = self.blocks.get_mut(&block) {
                    let (lo, hi) = (offset.max(block * BLOCK_SIZE), end.min((block + 1) * BLOCK_SIZE));
                    if lo < hi { Arc::make_mut(b)[(lo - block * BLOCK_SIZE) as usize..(hi - block * BLOCK_SIZE) as usize].fill(0); }
                }
            }
        }
    }
    pub(crate) fn next_data(&self, offset: u64) -> Option<(u64, u64)> {
        if offset >= self.size { return None; }
        let (k, _) = self.blocks.range(offset / BLOCK_SIZE..).next()?;
        let start = (k * BLOCK_SIZE).max(offset);
        if start >= self.size { return None; }
        Some((start, ((k + 1) * BLOCK_SIZE).min(self.size)))
    }
}
#[derive(Debug)]
pub struct Disk { id: DiskId, store: Weak<Store>, pub(crate) data: RwLock<Data>, lease: Mutex<Option<(String, usize)>>, written: AtomicBool, modified: AtomicU64, pub flushes: AtomicU64, gone: AtomicBool }
#[derive(Debug)]
pub struct Lease { disk: Arc<Disk> }
impl Drop for Lease {
    fn drop(&mut self) {
        let mut lease = self.disk.lease.lock();
        if let Some((_, n)) = lease.as_mut() { *n -= 1; if *n == 0 { *lease = None; } }
    }
}
impl Disk {
    pub fn id(&self) -> DiskId { self.id }
    pub(crate) fn modified(&self) -> u64 { self.modified.load(Ordering::SeqCst) }
    pub(crate) fn holder(&self) -> Option<String> { self.lease.lock().as_ref().map(|(h, _)| h.clone()) }
    fn touch(&self) { self.written.store(true, Ordering::SeqCst); self.modified.store(Store::now(), Ordering::SeqCst); }
    pub fn resize(&self, size: u64, shrink: bool) -> Result<()> {
        if size > DISK_SIZE_MAX { return Err(Error::usage("too large")); }
        {
            let mut data = self.data.write();
            if size < data.size && !shrink { return Err(Error::usage("would shrink")); }
            if size < data.size { let (old, len) = (size, data.size - size); data.zero(old, len, true); }
            data.size = size;
        }
        self.modified.store(Store::now(), Ordering::SeqCst);
        let Some(store) = self.store.upgrade() else { return Ok(()) };
        let Ok(info) = store.disk_info_by_id(self.id) else { return Ok(()) };
        store.fire(&Change::Disk { id: self.id, name: info.name, was: None, gone: false, resized: true, data: false });
        Ok(())
    }
    pub fn lease(self: &Arc<Self>, holder: &str) -> Result<Lease> {
        let mut lease = self.lease.lock();
        match lease.as_mut() {
            Some((h, n)) if h == holder => *n += 1,
            Some((h, _)) => return Err(Error::busy(format!("the disk is in use by {h}"))),
            None => *lease = Some((holder.into(), 1)),
        }
        Ok(Lease { disk: Arc::clone(self) })
    }
    pub fn never_written(&self) -> bool { !self.written.load(Ordering::SeqCst) }
    fn alive(&self) -> Result<()> { if self.gone.load(Ordering::SeqCst) { Err(Error::not_found("the disk was removed")) } else { Ok(()) } }
}
impl BlockDevice for Disk {
    fn size(&self) -> u64 { self.data.read().size }
    fn read(&self, buf: &mut [u8], offset: u64) -> Result<()> { self.alive()?; self.data.read().read(buf, offset) }
    fn write(&self, data: &[u8], offset: u64) -> Result<()> { self.alive()?; self.touch(); self.data.write().write(data, offset) }
    fn flush(&self) -> Result<()> { self.flushes.fetch_add(1, Ordering::SeqCst); tracing::debug!("flush"); Ok(()) }
    fn discard(&self, offset: u64, len: u64) -> Result<()> { self.touch(); self.data.write().zero(offset, len, false); Ok(()) }
    fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> { self.touch(); self.data.write().zero(offset, len, true); Ok(()) }
    fn next_data(&self, offset: u64) -> Result<Option<(u64, u64)>> { Ok(self.data.read().next_data(offset)) }
    fn mapped(&self) -> u64 { self.data.read().blocks.len() as u64 * BLOCK_SIZE }
    fn read_only(&self) -> bool { false }
}
fn check(name: &str, max: usize) -> Result<()> {
    let bad = name.is_empty() || name.len() > max || name.starts_with(['-', '.']) || name.contains(['/', '@', '#']) || name.contains("..") || name.chars().any(char::is_control);
    if bad { Err(Error::usage(format!("'{}' is not a name", name.escape_default()))) } else { Ok(()) }
}
pub fn check_disk_name(name: &str) -> Result<()> { check(name, 128) }
pub fn check_snapshot_name(name: &str) -> Result<()> { check(name, 120) }
pub fn create_empty(store: &Arc<Store>, name: &str) -> Result<DiskInfo> { make(store, name, 0) }
pub fn create(store: &Arc<Store>, name: &str, size: u64) -> Result<DiskInfo> {
    if size == 0 { return Err(Error::usage("size 0")); }
    make(store, name, size)
}
fn make(store: &Arc<Store>, name: &str, size: u64) -> Result<DiskInfo> {
    check_disk_name(name)?;
    let id = DiskId(store.id());
    {
        let mut state = store.state.write();
        if Store::find(&state, name).is_ok() { return Err(Error::exists(format!("disk '{name}' is there already"))); }
        let disk = Arc::new(Disk { id, store: Arc::downgrade(store), data: RwLock::new(Data { size, blocks: BTreeMap::new() }), lease: Mutex::new(None), written: AtomicBool::new(false), modified: AtomicU64::new(Store::now()), flushes: AtomicU64::new(0), gone: AtomicBool::new(false) });
        state.disks.insert(id, DiskRec { name: name.into(), disk, created: Store::now(), snaps: Vec::new() });
    }
    store.fire(&Change::Disk { id, name: name.into(), was: None, gone: false, resized: false, data: false });
    store.disk_info_by_id(id)
}
pub fn open(store: &Arc<Store>, name: &str) -> Result<Arc<Disk>> { let state = store.state.read(); let id = Store::find(&state, name)?; Ok(Arc::clone(&state.disks[&id].disk)) }
pub fn open_by_id(store: &Arc<Store>, id: DiskId) -> Result<Arc<Disk>> { store.state.read().disks.get(&id).map(|r| Arc::clone(&r.disk)).ok_or_else(|| Error::not_found("no disk")) }
pub fn rename(store: &Arc<Store>, old: &str, new: &str) -> Result<()> {
    check_disk_name(new)?;
    let id = {
        let mut state = store.state.write();
        let id = Store::find(&state, old)?;
        if Store::find(&state, new).is_ok() { return Err(Error::exists("there already")); }
        if let Some(r) = state.disks.get_mut(&id) { r.name = new.into(); }
        id
    };
    store.fire(&Change::Disk { id, name: new.into(), was: Some(old.into()), gone: false, resized: false, data: false });
    Ok(())
}
pub fn remove(store: &Arc<Store>, name: &str, recursive: bool) -> Result<()> {
    let id = {
        let mut state = store.state.write();
        let id = Store::find(&state, name)?;
        if state.disks[&id].disk.holder().is_some() { return Err(Error::busy("open for writing")); }
        let snaps = state.disks[&id].snaps.clone();
        if !snaps.is_empty() && !recursive { return Err(Error::busy("has snapshots")); }
        for s in snaps { state.snaps.remove(&s); }
        if let Some(r) = state.disks.remove(&id) { r.disk.gone.store(true, Ordering::SeqCst); }
        id
    };
    store.fire(&Change::Disk { id, name: name.into(), was: None, gone: true, resized: false, data: false });
    Ok(())
}
