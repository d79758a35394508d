//! What there is: each checkpoint as its file describes it, and which needs which.
//!
//! One that cannot be read is listed with what is wrong with it: it takes room, and somebody must decide about it.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::folder::{Access, Folder, Name};
use super::layer::Layer;
use crate::error::{Kind, Result};

/// A checkpoint, as `ls` and `info` tell of it. Where `damage` is set, numbers that could not be read are 0.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Checkpoint {
    /// The machine.
    pub machine: String,
    /// Its name among those of the machine.
    pub name: String,
    /// What keeps its file from being read; `null` when nothing was found at its beginning and end.
    pub damage: Option<String>,
    /// Identity of the state that is saved; `null` when it cannot be read.
    pub uuid: Option<Uuid>,
    /// Seconds since 1970 at the instant that is saved.
    pub created: u64,
    /// Bytes of the memory of the machine.
    pub memory: u64,
    /// Bytes of memory that are stored, as they are stored.
    pub stored: u64,
    /// Bytes that the file takes on the host.
    pub allocated: u64,
    /// Bytes of a page block.
    pub page_block: u32,
    /// Bytes of a storage block.
    pub storage_block: u32,
    /// Page blocks that are stored.
    pub stored_blocks: u64,
    /// Page blocks that are zeros.
    pub zero_blocks: u64,
    /// Page blocks that are as in the parent.
    pub inherited_blocks: u64,
    /// Storage blocks.
    pub storage_blocks: u32,
    /// Of them, those that a restore reads first.
    pub hot_blocks: u32,
    /// Who made the state of the devices.
    pub maker: String,
    /// Version of that state, in terms of its maker.
    pub state_version: u32,
    /// Bytes of that state.
    pub state_bytes: u64,
    /// Regions of memory.
    pub regions: Vec<RegionInfo>,
    /// The disks, in the order in which the machine has them.
    pub disks: Vec<DiskInfo>,
    /// `MACHINE@NAME` of what it is based on.
    pub parent: Option<String>,
    /// `MACHINE@NAME` of those that are based on it.
    pub children: Vec<String>,
}

/// A region of memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegionInfo {
    /// Guest address.
    pub address: u64,
    /// Bytes.
    pub bytes: u64,
}

/// A disk of a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskInfo {
    /// `DISK@SNAPSHOT`, as it was called then.
    pub snapshot: String,
    /// Identity of the disk.
    pub disk_uuid: Uuid,
    /// Identity of the snapshot.
    pub uuid: Uuid,
}

/// Returns all checkpoints, by machine and name.
///
/// # Errors
/// When a folder cannot be listed.
pub fn list(folder: &Folder) -> Result<Vec<Checkpoint>> {
    let names = folder.names()?;
    let mut all: Vec<_> = names.iter().map(|name| describe(folder, name)).collect();
    let mut children: HashMap<String, Vec<String>> = HashMap::new();
    for (name, one) in names.iter().zip(&all) {
        if let Some(parent) = &one.parent {
            children.entry(parent.clone()).or_default().push(name.to_string());
        }
    }
    for (name, one) in names.iter().zip(&mut all) {
        one.children = children.remove(&name.to_string()).unwrap_or_default();
    }
    Ok(all)
}

/// Returns one checkpoint.
///
/// # Errors
/// `NotFound`, and when a folder cannot be listed.
pub fn info(folder: &Folder, name: &Name) -> Result<Checkpoint> {
    if !folder.exists(name)? {
        return Err(folder.missing(name));
    }
    let children = children(folder, name)?;
    Ok(Checkpoint { children, ..describe(folder, name) })
}

/// Returns the names of those that are based on a checkpoint.
fn children(folder: &Folder, name: &Name) -> Result<Vec<String>> {
    let is_child = |other: &Name| describe(folder, other).parent.is_some_and(|parent| parent == name.to_string());
    Ok(folder.names()?.into_iter().filter(|other| other != name && is_child(other)).map(|n| n.to_string()).collect())
}

/// As [`children`], for who is about to remove the checkpoint: one that cannot be asked may be based on it.
///
/// # Errors
/// What keeps one from being read, but for damage.
pub(super) fn children_for_sure(folder: &Folder, name: &Name) -> Result<Vec<String>> {
    let mut children = Vec::new();
    for other in folder.names()?.into_iter().filter(|other| other != name) {
        match open_alone(folder, &other) {
            Ok(layer) => {
                let parent = layer.header().parent.as_ref();
                if parent.is_some_and(|parent| parent.machine == name.machine() && parent.name == name.name()) {
                    children.push(other.to_string());
                }
            }
            Err(error) if matches!(error.kind(), Kind::Corrupt | Kind::Unsupported | Kind::NotFound) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(children)
}

/// Opens the file of a checkpoint alone.
pub(super) fn open_alone(folder: &Folder, name: &Name) -> Result<Layer> {
    Layer::open(&format!("the checkpoint {name}"), &folder.open(name, Access::Cached)?)
}

/// Describes what a file says of itself, or what is wrong with it; which others are based on it is left out. Holds nothing.
#[must_use]
pub fn describe(folder: &Folder, name: &Name) -> Checkpoint {
    let (machine, own) = (name.machine().to_owned(), name.name().to_owned());
    let named = Checkpoint { machine, name: own, ..Checkpoint::default() };
    let file = folder.look(name);
    let layer = match file.and_then(|file| Layer::open(&format!("the checkpoint {name}"), &file)) {
        Ok(layer) => layer,
        Err(error) => return Checkpoint { damage: Some(error.to_string()), ..named },
    };
    let (header, footer, sizes) = (layer.header(), layer.footer(), layer.geometry().sizes());
    let snapshot = |disk: &super::DiskSnapshot| DiskInfo {
        snapshot: format!("{}@{}", disk.disk_name, disk.snapshot_name),
        disk_uuid: disk.disk,
        uuid: disk.snapshot,
    };
    Checkpoint {
        uuid: Some(header.uuid),
        created: header.created,
        memory: header.geometry.memory(),
        stored: footer.bytes,
        allocated: layer.allocated().unwrap_or_default(),
        page_block: sizes.page_block,
        storage_block: sizes.storage_block,
        stored_blocks: footer.stored,
        zero_blocks: footer.zeros,
        inherited_blocks: footer.inherited,
        storage_blocks: footer.blocks,
        hot_blocks: footer.hot,
        maker: header.maker.clone(),
        state_version: footer.state_version,
        state_bytes: footer.state_length,
        regions: header
            .geometry
            .regions()
            .map(|region| RegionInfo { address: region.address, bytes: region.length })
            .collect(),
        disks: header.disks.iter().map(snapshot).collect(),
        parent: header.parent.as_ref().map(|parent| format!("{}@{}", parent.machine, parent.name)),
        ..named
    }
}
