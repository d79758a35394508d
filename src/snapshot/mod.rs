//! STUB: in-memory snapshots.
#![allow(missing_docs, reason = "stub")]
use std::sync::Arc;

use crate::disk::{BlockDevice, Data, check_snapshot_name, open_by_id as open_disk};
use crate::error::{Error, Result};
use crate::store::{Change, DiskInfo, SnapRec, SnapshotInfo, Store};
use crate::units::{BLOCK_SIZE, DiskId, SnapshotId};

#[derive(Debug)]
pub struct SnapshotDevice { data: Data }
impl BlockDevice for SnapshotDevice {
    fn size(&self) -> u64 { self.data.size }
    fn read(&self, buf: &mut [u8], offset: u64) -> Result<()> { self.data.read(buf, offset) }
    fn write(&self, _: &[u8], _: u64) -> Result<()> { Err(Error::read_only("a snapshot")) }
    fn flush(&self) -> Result<()> { Ok(()) }
    fn discard(&self, _: u64, _: u64) -> Result<()> { Err(Error::read_only("a snapshot")) }
    fn write_zeroes(&self, _: u64, _: u64) -> Result<()> { Err(Error::read_only("a snapshot")) }
    fn next_data(&self, offset: u64) -> Result<Option<(u64, u64)>> { Ok(self.data.next_data(offset)) }
    fn mapped(&self) -> u64 { self.data.blocks.len() as u64 * BLOCK_SIZE }
    fn read_only(&self) -> bool { true }
}
pub fn take(store: &Arc<Store>, targets: &[(String, String)]) -> Result<Vec<SnapshotInfo>> {
    let mut out = Vec::new();
    for (disk, name) in targets {
        check_snapshot_name(name)?;
        let id = SnapshotId(store.id());
        {
            let mut state = store.state.write();
            let d = Store::find(&state, disk)?;
            if Store::find_snap(&state, disk, name).is_ok() { return Err(Error::exists("there already")); }
            let data = state.disks[&d].disk.data.read().clone();
            state.snaps.insert(id, SnapRec { disk: d, name: name.clone(), dev: Arc::new(SnapshotDevice { data }), created: Store::now() });
            if let Some(r) = state.disks.get_mut(&d) { r.snaps.push(id); }
        }
        let info = store.snapshot_info_by_id(id)?;
        store.fire(&Change::Snapshot { disk: info.disk_id, disk_name: disk.clone(), id, name: name.clone(), was: None, gone: false });
        out.push(info);
    }
    Ok(out)
}
pub fn open(store: &Arc<Store>, disk: &str, snapshot: &str) -> Result<Arc<SnapshotDevice>> { let id = store.snapshot_info(disk, snapshot)?.id; open_by_id(store, id) }
pub fn open_by_id(store: &Arc<Store>, id: SnapshotId) -> Result<Arc<SnapshotDevice>> { store.state.read().snaps.get(&id).map(|s| Arc::clone(&s.dev)).ok_or_else(|| Error::not_found("no snapshot")) }
pub fn clone(store: &Arc<Store>, disk: &str, snapshot: &str, new: &str) -> Result<DiskInfo> {
    let info = crate::disk::create_empty(store, new)?;
    clone_into(store, disk, Some(snapshot), info.id)?;
    store.disk_info_by_id(info.id)
}
pub fn clone_into(store: &Arc<Store>, disk: &str, snapshot: Option<&str>, target: DiskId) -> Result<()> {
    let data = match snapshot { Some(s) => open(store, disk, s)?.data.clone(), None => crate::disk::open(store, disk)?.data.read().clone() };
    let disk = open_disk(store, target)?;
    if !disk.never_written() { return Err(Error::failed("written")); }
    *disk.data.write() = data;
    let name = store.disk_info_by_id(target)?.name;
    store.fire(&Change::Disk { id: target, name, was: None, gone: false, resized: true, data: true });
    Ok(())
}
pub fn revert(store: &Arc<Store>, disk: &str, snapshot: &str) -> Result<()> {
    let info = store.disk_info(disk)?;
    if info.holder.is_some() { return Err(Error::busy("open for writing")); }
    let data = open(store, disk, snapshot)?.data.clone();
    *open_disk(store, info.id)?.data.write() = data;
    store.fire(&Change::Disk { id: info.id, name: disk.into(), was: None, gone: false, resized: true, data: true });
    Ok(())
}
pub fn remove(store: &Arc<Store>, disk: &str, snapshot: &str) -> Result<()> {
    let info = store.snapshot_info(disk, snapshot)?;
    {
        let mut state = store.state.write();
        state.snaps.remove(&info.id);
        if let Some(r) = state.disks.get_mut(&info.disk_id) { r.snaps.retain(|s| *s != info.id); }
    }
    store.fire(&Change::Snapshot { disk: info.disk_id, disk_name: disk.into(), id: info.id, name: snapshot.into(), was: None, gone: true });
    Ok(())
}
pub fn rename(store: &Arc<Store>, disk: &str, old: &str, new: &str) -> Result<()> {
    check_snapshot_name(new)?;
    let info = store.snapshot_info(disk, old)?;
    {
        let mut state = store.state.write();
        if Store::find_snap(&state, disk, new).is_ok() { return Err(Error::exists("there already")); }
        if let Some(s) = state.snaps.get_mut(&info.id) { s.name = new.into(); }
    }
    store.fire(&Change::Snapshot { disk: info.disk_id, disk_name: disk.into(), id: info.id, name: new.into(), was: Some(old.into()), gone: false });
    Ok(())
}
