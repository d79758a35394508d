//! A checkpoint with all it is based on: where each page block really is, and its bytes.
//!
//! # Rules
//! 1. A chain is opened whole: a parent that is missing, or is another one than it was, is an error that names it, before
//!    anything runs from it.
//! 2. Page blocks are read from the newest layer that has them; one that says "as in the parent" is looked up in the next.
//! 3. What is handed out was checked against the checksum in the index first.

use std::sync::Arc;

use super::folder::{Access, Folder, Name};
use super::geometry::{Geometry, PageBlock, StorageBlock};
use super::header::Header;
use super::layer::{Layer, Source};
use super::place::{Place, Stored};
use crate::error::{Error, Kind, Result};

/// Most files of a chain.
pub const CHAIN_MAX: usize = 65;

/// Where a page block really is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found {
    /// It is zeros.
    Zero,
    /// It is in a storage block of a layer.
    Stored {
        /// Number of the layer; 0 is the checkpoint itself, 1 its parent.
        layer: usize,
        /// Where it is there.
        stored: Stored,
    },
}

/// A checkpoint that is open, with all it is based on.
#[derive(Debug)]
pub struct Reader {
    layers: Vec<Layer>,
}

impl Reader {
    /// Opens a checkpoint and all it is based on. None of them can be removed while this is open.
    ///
    /// # Errors
    /// `NotFound` for it or one of its parents, `Corrupt`, `Unsupported` for a newer format, any error of the host.
    pub fn open(folder: &Folder, name: &Name, access: Access) -> Result<Self> {
        let layer = |name: &Name| Layer::open(&format!("the checkpoint {name}"), &folder.open(name, access)?);
        let mut layers = vec![layer(name)?];
        while let Some(parent) = layers.last().and_then(|layer| layer.header().parent.clone()) {
            if layers.len() == CHAIN_MAX {
                return Err(Error::failed(format!("{name} is based on more than {} checkpoints", CHAIN_MAX - 1))
                    .hint("flatten one of them with 'afterimage checkpoint flatten'"));
            }
            let other = Name::new(&parent.machine, &parent.name)?;
            let needed = layers.last().map(|layer| layer.what().to_owned()).unwrap_or_default();
            layers.push(layer(&other).map_err(|error| {
                match error.kind() {
                    Kind::NotFound => {
                        Error::not_found(format!("{needed} is based on the checkpoint {other}, which is gone"))
                            .hint("put its file back; without it nothing can be restored from this one")
                    }
                    _ => error.context(format!("{needed} is based on another one")),
                }
            })?);
        }
        Self::of(layers)
    }

    /// Makes one of files that are open already: the checkpoint, its parent, and so on.
    ///
    /// # Errors
    /// `Corrupt` when one is not the parent of the one before it, or is of another memory.
    pub fn of(layers: Vec<Layer>) -> Result<Self> {
        assert!(!layers.is_empty(), "a checkpoint is at least one file");
        for pair in layers.windows(2) {
            let (layer, parent) = (&pair[0], &pair[1]);
            let named = layer.header().parent.as_ref();
            if named.map(|parent| parent.uuid) != Some(parent.header().uuid) {
                return Err(Error::corrupt(format!(
                    "{} is based on another state than {} is now",
                    layer.what(),
                    parent.what()
                ))
                .hint("it was made again under the same name; put the old file back"));
            }
            if !layer.geometry().fits(parent.geometry()) {
                return Err(Error::corrupt(format!("{} is of other memory than {}", layer.what(), parent.what())));
            }
        }
        if let Some(last) = layers.last().filter(|last| last.header().parent.is_some()) {
            return Err(Error::not_found(format!("what {} is based on is not there", last.what())));
        }
        Ok(Self { layers })
    }

    /// Puts something between the files and who reads their storage blocks.
    pub fn wrap(&mut self, mut wrap: impl FnMut(usize, Arc<dyn Source>) -> Arc<dyn Source>) {
        for (number, layer) in self.layers.iter_mut().enumerate() {
            layer.wrap(|source| wrap(number, source));
        }
    }

    /// Returns the files: the checkpoint, its parent, and so on.
    #[must_use]
    pub fn layers(&self) -> &[Layer] {
        &self.layers
    }

    /// Returns what the checkpoint says of itself.
    #[must_use]
    pub fn header(&self) -> &Header {
        self.layers[0].header()
    }

    /// Returns the memory.
    #[must_use]
    pub fn geometry(&self) -> &Geometry {
        self.layers[0].geometry()
    }

    /// Returns the version of the state of the devices, in terms of its maker.
    #[must_use]
    pub fn state_version(&self) -> u32 {
        self.layers[0].footer().state_version
    }

    /// Returns the state of the devices.
    ///
    /// # Errors
    /// As [`Layer::state`].
    pub fn state(&self) -> Result<Vec<u8>> {
        self.layers[0].state()
    }

    /// Returns the hot storage blocks of the checkpoint itself, in the order in which they were written.
    ///
    /// # Errors
    /// As [`Layer::hot`].
    pub fn hot(&self) -> Result<Vec<StorageBlock>> {
        self.layers[0].hot()
    }

    /// Returns where a page block really is.
    ///
    /// # Errors
    /// As [`Layer::place`].
    pub fn place(&self, number: PageBlock) -> Result<Found> {
        for (layer, file) in self.layers.iter().enumerate() {
            match file.place(number)? {
                Place::Zero => return Ok(Found::Zero),
                Place::Stored(stored) => return Ok(Found::Stored { layer, stored }),
                Place::Parent => {}
            }
        }
        Err(self.layers[0].bad(number, None, "it is in none of the checkpoints that this one is based on"))
    }

    /// Calls `each` with the page blocks of a storage block of a layer that are what the checkpoint has, and where they
    /// are in it, in the order in which they lie there: not with those that a newer layer has otherwise.
    ///
    /// # Errors
    /// As [`Layer::contents`] and [`Layer::place`], and those of `each`.
    pub fn contents(
        &self,
        layer: usize,
        block: StorageBlock,
        mut each: impl FnMut(PageBlock, Stored) -> Result<()>,
    ) -> Result<()> {
        self.layers[layer].contents(block, |number| match self.place(number)? {
            Found::Stored { layer: of, stored } if of == layer && stored.block == block => each(number, stored),
            _ => Ok(()),
        })
    }

    /// Reads a storage block of a layer into `out`, which has its length.
    ///
    /// # Errors
    /// Any error of the host.
    pub fn read_block(&self, layer: usize, block: StorageBlock, out: &mut [u8]) -> Result<()> {
        self.layers[layer].read_block(block, out)
    }

    /// Checks and expands a page block out of the storage block it is in; `out` has the length of the page block.
    ///
    /// # Errors
    /// `Corrupt` when its bytes do not match their checksum or do not expand; `out` is anything then.
    pub fn expand(
        &self,
        number: PageBlock,
        layer: usize,
        stored: &Stored,
        storage_block: &[u8],
        out: &mut [u8],
    ) -> Result<()> {
        let from = stored.offset as usize;
        let bytes = storage_block.get(from..from + stored.length as usize);
        let bytes = bytes.ok_or_else(|| "it reaches beyond its storage block".to_owned());
        let expanded = bytes.and_then(|bytes| stored.expand(bytes, out));
        expanded.map_err(|why| self.layers[layer].bad(number, Some((stored.block, stored.offset)), &why))
    }

    /// Reads one page block; `out` has its length, and `scratch` that of a storage block.
    ///
    /// # Errors
    /// As [`Self::place`], [`Self::read_block`] and [`Self::expand`].
    pub fn read(&self, number: PageBlock, scratch: &mut [u8], out: &mut [u8]) -> Result<()> {
        match self.place(number)? {
            Found::Zero => {
                out.fill(0);
                Ok(())
            }
            Found::Stored { layer, stored } => {
                self.read_block(layer, stored.block, scratch)?;
                self.expand(number, layer, &stored, scratch, out)
            }
        }
    }
}
