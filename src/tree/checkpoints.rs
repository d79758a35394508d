//! `checkpoints/`: the memory of virtual machines as files, and what goes with it.
//!
//! ```text
//! checkpoints/MACHINE/NAME/memory            guest memory, flat, expanded as it is read ([`crate::checkpoint::Image`])
//! checkpoints/MACHINE/NAME/devices           the state of the devices, as it was saved
//! checkpoints/MACHINE/NAME/state.json        what the checkpoint says of itself
//! checkpoints/MACHINE/NAME/checkpoint.ckpt   the file it is in
//! ```
//!
//! # Rules
//! 1. Guest memory has keys in it: everything here is for the owner alone, whatever the modes of other directories.
//! 2. The kernel keeps no names and no attributes of this directory: the process of a machine makes checkpoints without
//!    asking this one, and what it made, or a command removed, shows at once.
//! 3. A number is made from the identity of the state that is saved, so another state under an old name is another file, and
//!    pages that the kernel has of the one are never shown for the other. It is the same after a remount.
//! 4. An open file holds its checkpoint, and what that is based on: it is not removed before the file is closed. Looking
//!    (stat, a listing) holds nothing.
//! 5. A checkpoint that is damaged at its beginning or end has no memory and no devices; the other two files are there.
//!
//! # Why memory is not pushed to the kernel
//! The kernel reads around a fault, up to a MiB (`fuse_session` raises that), which brings the neighbours in one request. To push
//! the rest of each storage block that was read (notify_store, from a thread of its own) was measured beside that, 512 MiB of
//! which half is zeros, mapped: 10,000 pages at random took 2.4 s instead of 2.8, 12 of 16 pages of 600 page blocks 2.6 s
//! instead of 2.2, pages in order 1.4 s instead of 1.2, and the server a third to all of its time more for each. So there is
//! one way less for pages to come.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::sync::{Arc, Weak};

use uuid::Uuid;

use super::errno::{Answer, Errno};
use super::exports::fixed_attr;
use super::fixed::Fixed;
use super::names::Entry;
use super::node::Node;
use super::state::{Attr, Tree};
use crate::checkpoint::{self, Access, Folder, Image, Lately, Layer, Name, Reader};
use crate::codec::crc32;
use crate::error::{Error, Kind, Result};
use crate::media::File;
use crate::sync::Mutex;

/// Bytes of pieces that are kept, of all checkpoints together.
const LATELY: usize = 32 << 20;
/// Checkpoints that have a number at a time.
const NUMBERED_MAX: usize = 1 << 16;
/// Numbers have so many bits.
const NUMBER_MASK: u64 = (1 << 56) - 1;

/// A file that a checkpoint has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Part {
    /// `memory`
    Memory,
    /// `devices`
    Devices,
    /// `state.json`
    State,
    /// `checkpoint.ckpt`
    File,
}

impl Part {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Memory, Self::Devices, Self::State, Self::File];

    /// Returns the name of the file.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::Devices => "devices",
            Self::State => "state.json",
            Self::File => "checkpoint.ckpt",
        }
    }

    /// Tells whether it is there also when the checkpoint cannot be read.
    fn survives_damage(self) -> bool {
        matches!(self, Self::State | Self::File)
    }
}

/// Bytes that are told as a file, and the checkpoint that is held for them.
#[derive(Debug)]
pub struct Told {
    /// The bytes.
    pub text: Vec<u8>,
    /// The end of the file, which names what it is.
    footer: Option<checkpoint::Footer>,
    _held: Arc<dyn File>,
}

/// A checkpoint that has a number.
#[derive(Debug)]
struct Known {
    name: Name,
    /// Identity of the state; nil when it cannot be read.
    uuid: Uuid,
    /// Bytes of memory that are no holes, when they were counted.
    data: Option<u64>,
    memory: Weak<Image>,
    devices: Weak<Told>,
}

#[derive(Debug, Default)]
struct Numbers {
    machines: HashMap<u64, String>,
    known: HashMap<u64, Known>,
}

/// The checkpoints that were looked up in a mount.
#[derive(Debug)]
pub(super) struct Checkpoints {
    numbers: Mutex<Numbers>,
    lately: Arc<Lately>,
}

impl Default for Checkpoints {
    fn default() -> Self {
        Self { numbers: Mutex::default(), lately: Lately::new(LATELY) }
    }
}

/// Returns the first number from `wish` on that nothing else has.
fn free(wish: u64, mut is_taken: impl FnMut(u64) -> bool) -> u64 {
    let mut number = (wish & NUMBER_MASK).max(1);
    while is_taken(number) {
        number = ((number + 1) & NUMBER_MASK).max(1);
    }
    number
}

impl Checkpoints {
    fn number_of_machine(&self, machine: &str) -> u64 {
        let mut numbers = self.numbers.lock();
        let machines = &mut numbers.machines;
        if machines.len() >= NUMBERED_MAX {
            machines.clear();
        }
        let wish = u64::from(crc32(machine.as_bytes()));
        let number = free(wish, |number| machines.get(&number).is_some_and(|other| other != machine));
        machines.entry(number).or_insert_with(|| machine.to_owned());
        number
    }

    fn machine(&self, number: u64) -> Answer<String> {
        self.numbers.lock().machines.get(&number).cloned().ok_or(Errno::ESTALE)
    }

    fn number(&self, name: &Name, uuid: Uuid) -> u64 {
        let mut numbers = self.numbers.lock();
        let known = &mut numbers.known;
        if known.len() >= NUMBERED_MAX {
            known.retain(|_, known| known.memory.strong_count() > 0);
        }
        let wish = uuid.as_u64_pair().0 ^ u64::from(crc32(name.to_string().as_bytes()));
        let is_other = |known: &Known| known.uuid != uuid || known.name != *name;
        let number = free(wish, |number| known.get(&number).is_some_and(is_other));
        let fresh = || Known { name: name.clone(), uuid, data: None, memory: Weak::new(), devices: Weak::new() };
        known.entry(number).or_insert_with(fresh);
        number
    }

    fn with<T>(&self, number: u64, ask: impl FnOnce(&mut Known) -> T) -> Answer<T> {
        self.numbers.lock().known.get_mut(&number).map(ask).ok_or(Errno::ESTALE)
    }
}

/// What is found under a name.
struct Looked {
    file: Arc<dyn File>,
    /// `None` when it is damaged, or of a newer program.
    layer: Option<Layer>,
}

impl Looked {
    fn uuid(&self) -> Uuid {
        self.layer.as_ref().map_or(Uuid::nil(), |layer| layer.header().uuid)
    }

    fn created(&self) -> u64 {
        self.layer.as_ref().map_or(0, |layer| layer.header().created)
    }
}

/// Looks at an open file.
fn look(name: &Name, file: Arc<dyn File>) -> Result<Looked> {
    match Layer::open(&format!("the checkpoint {name}"), &file) {
        Ok(layer) => Ok(Looked { file, layer: Some(layer) }),
        Err(error) if matches!(error.kind(), Kind::Corrupt | Kind::Unsupported) => Ok(Looked { file, layer: None }),
        Err(error) => Err(error),
    }
}

/// Returns what is in `state.json`. Which others are based on it is not a matter of its own, and changes.
fn description(folder: &Folder, name: &Name) -> Result<Vec<u8>> {
    let about = checkpoint::describe(folder, name);
    let text = serde_json::to_string_pretty(&about).map_err(|_| Error::failed("a checkpoint cannot be described"))?;
    Ok(format!("{text}\n").into_bytes())
}

/// Of something that was found before: it is gone.
fn stale(error: Error) -> Errno {
    Errno::from(error).stale()
}

impl Tree {
    fn checkpoint_folder(&self) -> Folder {
        Folder::of_pool(self.store.media())
    }

    fn private_dir(&self, node: Node) -> Attr {
        Attr { perm: 0o700, keep: false, ..self.dir_attr(node, self.started) }
    }

    /// Looks at what is under the name of a number; ESTALE when that is something else by now.
    fn look_again(&self, number: u64) -> Answer<(Name, Looked)> {
        let (name, uuid) = self.checkpoints.with(number, |known| (known.name.clone(), known.uuid))?;
        let looked = self.checkpoint_folder().look(&name).and_then(|file| look(&name, file)).map_err(stale)?;
        if looked.uuid() == uuid { Ok((name, looked)) } else { Err(Errno::ESTALE) }
    }

    /// Returns the attributes of what is in `checkpoints/`.
    pub(super) fn checkpoint_attr(&self, node: Node) -> Answer<Attr> {
        match node {
            Node::Checkpoints => Ok(self.private_dir(node)),
            Node::CheckpointsOf(number) => self.checkpoints.machine(number).map(|_| self.private_dir(node)),
            Node::Checkpoint(number) => self.look_again(number).map(|(_, looked)| self.checkpoint_dir(number, &looked)),
            Node::CheckpointPart { number, part } => {
                let (name, looked) = self.look_again(number)?;
                self.part_attr(number, part, &name, looked).map_err(Errno::stale)
            }
            _ => Err(Errno::ESTALE),
        }
    }

    fn checkpoint_dir(&self, number: u64, looked: &Looked) -> Attr {
        Attr { mtime: looked.created(), ..self.private_dir(Node::Checkpoint(number)) }
    }

    fn part_attr(&self, number: u64, part: Part, name: &Name, looked: Looked) -> Answer<Attr> {
        let created = looked.created();
        let (size, blocks) = match (part, &looked.layer) {
            (Part::Memory, Some(_)) => return self.memory_attr(number, name, looked),
            (Part::Devices, Some(layer)) => (layer.footer().state_length, layer.footer().state_length.div_ceil(512)),
            (Part::State, _) => {
                let length = description(&self.checkpoint_folder(), name)?.len() as u64;
                (length, length.div_ceil(512))
            }
            (Part::File, _) => {
                let fail = |e| Errno::from(Error::io(format!("cannot look at the checkpoint {name}"), e));
                (looked.file.len().map_err(fail)?, looked.file.allocated().map_err(fail)?.div_ceil(512))
            }
            (Part::Memory | Part::Devices, None) => return Err(Errno::ENOENT),
        };
        let node = Node::CheckpointPart { number, part };
        Ok(Attr { keep: false, ..fixed_attr(node, size, blocks, created) })
    }

    fn memory_attr(&self, number: u64, name: &Name, looked: Looked) -> Answer<Attr> {
        let (created, layer) = (looked.created(), looked.layer.ok_or(Errno::ENOENT)?);
        let size = layer.geometry().memory();
        let data = match self.checkpoints.with(number, |known| known.data)? {
            Some(data) => data,
            None => {
                let is_alone = layer.header().parent.is_none();
                let reader = if is_alone {
                    Reader::of(vec![layer])
                } else {
                    Reader::open(&self.checkpoint_folder(), name, Access::Cached)
                };
                match reader.and_then(|reader| checkpoint::data(&reader)) {
                    Ok(data) => {
                        self.checkpoints.with(number, |known| known.data = Some(data))?;
                        data
                    }
                    // What cannot be read has no holes that anybody could count on.
                    Err(error) => {
                        tracing::warn!("the holes in the memory of the checkpoint {name} are not known: {error}");
                        size
                    }
                }
            }
        };
        let node = Node::CheckpointPart { number, part: Part::Memory };
        Ok(Attr { keep: false, ..fixed_attr(node, size, data / 512, created) })
    }

    /// Finds a name in a directory of `checkpoints/`.
    pub(super) fn checkpoint_lookup(&self, parent: Node, name: &OsStr) -> Answer<Attr> {
        let name = name.to_str().ok_or(Errno::ENOENT)?;
        match parent {
            Node::Checkpoints => {
                let is_there = self.checkpoint_folder().names()?.iter().any(|known| known.machine() == name);
                let number = is_there.then(|| self.checkpoints.number_of_machine(name)).ok_or(Errno::ENOENT)?;
                Ok(self.private_dir(Node::CheckpointsOf(number)))
            }
            Node::CheckpointsOf(number) => {
                let name = Name::new(&self.checkpoints.machine(number)?, name).map_err(|_| Errno::ENOENT)?;
                let looked = self.checkpoint_folder().look(&name).and_then(|file| look(&name, file))?;
                Ok(self.checkpoint_dir(self.checkpoints.number(&name, looked.uuid()), &looked))
            }
            Node::Checkpoint(number) => {
                let part = Part::ALL.into_iter().find(|part| part.name() == name).ok_or(Errno::ENOENT)?;
                let (name, looked) = self.look_again(number)?;
                self.part_attr(number, part, &name, looked)
            }
            _ => Err(Errno::ENOTDIR),
        }
    }

    /// Lists a directory of `checkpoints/`; tells what is above it.
    pub(super) fn checkpoint_list(&self, node: Node) -> Answer<(Node, Vec<Entry>)> {
        match node {
            Node::Checkpoints => {
                let mut machines: Vec<String> =
                    self.checkpoint_folder().names()?.iter().map(|name| name.machine().to_owned()).collect();
                machines.dedup();
                let entry =
                    |name: String| Entry { node: Node::CheckpointsOf(self.checkpoints.number_of_machine(&name)), name };
                Ok((Node::Root, machines.into_iter().map(entry).collect()))
            }
            Node::CheckpointsOf(number) => {
                let (machine, folder) = (self.checkpoints.machine(number)?, self.checkpoint_folder());
                let mut entries = Vec::new();
                for name in folder.names()?.into_iter().filter(|name| name.machine() == machine) {
                    // It may have gone meanwhile.
                    let looked = match folder.look(&name).and_then(|file| look(&name, file)) {
                        Err(error) if error.kind() == Kind::NotFound => continue,
                        looked => looked?,
                    };
                    let node = Node::Checkpoint(self.checkpoints.number(&name, looked.uuid()));
                    entries.push(Entry { node, name: name.name().to_owned() });
                }
                Ok((Node::Checkpoints, entries))
            }
            Node::Checkpoint(number) => {
                let (name, looked) = self.look_again(number)?;
                let is_there = |part: &Part| looked.layer.is_some() || part.survives_damage();
                let entry =
                    |part: Part| Entry { node: Node::CheckpointPart { number, part }, name: part.name().into() };
                let above = Node::CheckpointsOf(self.checkpoints.number_of_machine(name.machine()));
                Ok((above, Part::ALL.into_iter().filter(is_there).map(entry).collect()))
            }
            _ => Err(Errno::ENOTDIR),
        }
    }

    /// Opens a file of a checkpoint, which is held from then on; the flag tells whether what the kernel has cached of it
    /// holds.
    pub(super) fn open_checkpoint(&self, number: u64, part: Part) -> Answer<(Fixed, bool)> {
        let (name, uuid) = self.checkpoints.with(number, |known| (known.name.clone(), known.uuid))?;
        let folder = self.checkpoint_folder();
        let held = folder.open(&name, Access::Cached).map_err(stale)?;
        let looked = look(&name, Arc::clone(&held)).map_err(stale)?;
        if looked.uuid() != uuid {
            return Err(Errno::ESTALE);
        }
        match (part, looked.layer) {
            (Part::Memory, Some(_)) => Ok((Fixed::Memory(self.open_memory(number, &name)?), true)),
            (Part::Devices, Some(layer)) => Ok((Fixed::Told(self.open_devices(number, &layer, held)?), true)),
            (Part::State, _) => {
                let told = Told { text: description(&folder, &name)?, footer: None, _held: held };
                Ok((Fixed::Told(Arc::new(told)), false))
            }
            (Part::File, _) => {
                let length = held.len().map_err(|e| Error::io(format!("cannot look at the checkpoint {name}"), e))?;
                Ok((Fixed::File(held, length), false))
            }
            (Part::Memory | Part::Devices, None) => Err(Errno::ESTALE),
        }
    }

    fn open_memory(&self, number: u64, name: &Name) -> Answer<Arc<Image>> {
        let reader = Reader::open(&self.checkpoint_folder(), name, Access::Cached).map_err(|error| {
            // It is there, so what is not is what it is based on.
            let is_parent = error.kind() == Kind::NotFound;
            let errno = Errno::from(error);
            if is_parent { Errno::EIO } else { errno }
        })?;
        let footer = *reader.layers()[0].footer();
        self.checkpoints.with(number, |known| {
            // A flattened one has the same memory in another file, and it is the new one that must be held.
            let shared = known.memory.upgrade().filter(|open| *open.reader().layers()[0].footer() == footer);
            let image = shared.unwrap_or_else(|| Arc::new(Image::new(reader, &self.checkpoints.lately)));
            known.memory = Arc::downgrade(&image);
            image
        })
    }

    fn open_devices(&self, number: u64, layer: &Layer, held: Arc<dyn File>) -> Answer<Arc<Told>> {
        let footer = *layer.footer();
        let shared = self.checkpoints.with(number, |known| known.devices.upgrade())?;
        if let Some(told) = shared.filter(|told| told.footer == Some(footer)) {
            return Ok(told);
        }
        let told = Arc::new(Told { text: layer.state()?, footer: Some(footer), _held: held });
        self.checkpoints.with(number, |known| known.devices = Arc::downgrade(&told))?;
        Ok(told)
    }
}
