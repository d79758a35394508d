//! STUB: an in-memory fake with the signatures of the storage core.
#![allow(missing_docs, reason = "stub")]
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use uuid::Uuid;

use crate::clock;
use crate::disk::Disk;
use crate::error::{Error, Result};
use crate::media::{Media, Space};
use crate::snapshot::SnapshotDevice;
use crate::sync::{Mutex, RwLock};
use crate::units::{DiskId, SnapshotId};

#[derive(Debug, Clone)]
pub struct OpenOptions { pub cache_bytes: u64, pub background: bool }
impl Default for OpenOptions { fn default() -> Self { Self { cache_bytes: 512 << 20, background: true } } }
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EnospcPolicy { Fail, Wait }
#[derive(Debug, Clone)]
pub struct Settings { pub enospc: EnospcPolicy, pub quota: Option<u64>, pub iops: Option<u64>, pub bandwidth: Option<u64>, pub extent_size: u64 }
#[derive(Debug, Clone)]
pub struct DiskInfo { pub id: DiskId, pub name: String, pub uuid: Uuid, pub size: u64, pub referenced: u64, pub written: u64, pub created: u64, pub modified: u64, pub snapshots: usize, pub origin: Option<String>, pub settings: Settings, pub holder: Option<String> }
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SnapshotState { Live, Retired }
#[derive(Debug, Clone)]
pub struct SnapshotInfo { pub id: SnapshotId, pub disk: String, pub disk_id: DiskId, pub name: String, pub uuid: Uuid, pub size: u64, pub referenced: u64, pub written: u64, pub created: u64, pub state: SnapshotState, pub holds: Vec<String> }
#[derive(Debug, Clone)]
pub enum Change {
    Disk { id: DiskId, name: String, was: Option<String>, gone: bool, resized: bool, data: bool },
    Snapshot { disk: DiskId, disk_name: String, id: SnapshotId, name: String, was: Option<String>, gone: bool },
}
pub(crate) struct DiskRec { pub(crate) name: String, pub(crate) disk: Arc<Disk>, pub(crate) created: u64, pub(crate) snaps: Vec<SnapshotId> }
pub(crate) struct SnapRec { pub(crate) disk: DiskId, pub(crate) name: String, pub(crate) dev: Arc<SnapshotDevice>, pub(crate) created: u64 }
#[derive(Default)]
pub(crate) struct State { pub(crate) disks: BTreeMap<DiskId, DiskRec>, pub(crate) snaps: BTreeMap<SnapshotId, SnapRec> }
pub type Hook = Box<dyn Fn(&Change) + Send + Sync>;
#[derive(Default)]
pub struct Store { pub(crate) state: RwLock<State>, hooks: Mutex<Vec<Arc<Hook>>>, pub(crate) next: AtomicU64, pub poisoned: std::sync::atomic::AtomicBool }
impl std::fmt::Debug for Store { fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result { f.write_str("Store") } }
impl Store {
    pub fn init(_: Arc<dyn Media>) -> Result<Uuid> { Ok(Uuid::nil()) }
    pub fn open(_: Arc<dyn Media>, _: OpenOptions) -> Result<Arc<Self>> { Ok(Arc::new(Self::default())) }
    pub fn close(&self) -> Result<()> { Ok(()) }
    pub fn uuid(&self) -> Uuid { Uuid::nil() }
    pub fn health(&self) -> Option<String> { None }
    pub fn space(&self) -> Result<Space> { Ok(Space { free: 1 << 40, total: 1 << 41 }) }
    pub fn flush_all(&self) -> Result<()> { Ok(()) }
    pub fn changes(&self) -> u64 { self.next.load(Ordering::SeqCst) }
    pub fn subscribe(&self, hook: Hook) { self.hooks.lock().push(Arc::new(hook)); }
    pub(crate) fn id(&self) -> u64 { self.next.fetch_add(1, Ordering::SeqCst) + 1 }
    pub(crate) fn fire(&self, change: &Change) {
        let hooks: Vec<_> = self.hooks.lock().clone();
        for hook in hooks { hook(change); }
    }
    fn info(id: DiskId, rec: &DiskRec) -> DiskInfo {
        use crate::disk::BlockDevice;
        DiskInfo { id, name: rec.name.clone(), uuid: Uuid::nil(), size: rec.disk.size(), referenced: rec.disk.mapped(), written: 0, created: rec.created, modified: rec.disk.modified(), snapshots: rec.snaps.len(), origin: None,
            settings: Settings { enospc: EnospcPolicy::Fail, quota: None, iops: None, bandwidth: None, extent_size: 4 << 20 }, holder: rec.disk.holder() }
    }
    fn snap_info(state: &State, id: SnapshotId) -> SnapshotInfo {
        use crate::disk::BlockDevice;
        let rec = &state.snaps[&id];
        SnapshotInfo { id, disk: state.disks[&rec.disk].name.clone(), disk_id: rec.disk, name: rec.name.clone(), uuid: Uuid::nil(), size: rec.dev.size(), referenced: rec.dev.mapped(), written: 0, created: rec.created, state: SnapshotState::Live, holds: Vec::new() }
    }
    pub fn disks(&self) -> Vec<DiskInfo> {
        let mut all: Vec<_> = self.state.read().disks.iter().map(|(id, rec)| Self::info(*id, rec)).collect();
        all.sort_by(|a, b| a.name.cmp(&b.name));
        all
    }
    pub(crate) fn find(state: &State, name: &str) -> Result<DiskId> {
        state.disks.iter().find(|(_, r)| r.name == name).map(|(id, _)| *id).ok_or_else(|| Error::not_found(format!("there is no disk '{name}'")))
    }
    pub(crate) fn find_snap(state: &State, disk: &str, name: &str) -> Result<SnapshotId> {
        let id = Self::find(state, disk)?;
        state.disks[&id].snaps.iter().copied().find(|s| state.snaps[s].name == name).ok_or_else(|| Error::not_found(format!("there is no snapshot '{disk}@{name}'")))
    }
    pub fn disk_info(&self, name: &str) -> Result<DiskInfo> {
        let state = self.state.read();
        let id = Self::find(&state, name)?;
        Ok(Self::info(id, &state.disks[&id]))
    }
    pub fn disk_info_by_id(&self, id: DiskId) -> Result<DiskInfo> {
        self.state.read().disks.get(&id).map(|r| Self::info(id, r)).ok_or_else(|| Error::not_found(format!("there is no disk with id {id}")))
    }
    pub fn snapshots(&self, disk: &str) -> Result<Vec<SnapshotInfo>> { let id = self.disk_info(disk)?.id; self.snapshots_by_id(id) }
    pub fn snapshots_by_id(&self, id: DiskId) -> Result<Vec<SnapshotInfo>> {
        let state = self.state.read();
        let rec = state.disks.get(&id).ok_or_else(|| Error::not_found("no disk"))?;
        Ok(rec.snaps.iter().map(|s| Self::snap_info(&state, *s)).collect())
    }
    pub fn snapshot_info(&self, disk: &str, snapshot: &str) -> Result<SnapshotInfo> {
        let state = self.state.read();
        let id = Self::find_snap(&state, disk, snapshot)?;
        Ok(Self::snap_info(&state, id))
    }
    pub fn snapshot_info_by_id(&self, id: SnapshotId) -> Result<SnapshotInfo> {
        let state = self.state.read();
        if state.snaps.contains_key(&id) { Ok(Self::snap_info(&state, id)) } else { Err(Error::not_found("no snapshot")) }
    }
    pub fn latest(&self, disk: DiskId) -> Option<SnapshotInfo> { self.snapshots_by_id(disk).ok()?.pop() }
    pub(crate) fn now() -> u64 { clock::wall_seconds() }
}
