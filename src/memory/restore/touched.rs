//! What a machine touched while it was restored, to be fetched first the next time.
//!
//! ```text
//! NAME.faults   89 41 46 54 46 53 0D 0A | version 1 (4) | uuid of the checkpoint (16) | count (4) | page blocks (4 each) | CRC32 (4)
//! ```
//!
//! # Rules
//! 1. It is a hint. One that is damaged, or of another checkpoint, is none.
//! 2. It is written under another name and renamed, never synced: a crash loses nothing but time.

use uuid::Uuid;

use crate::checkpoint::{Folder, Header, Name, PageBlock};
use crate::codec::{Reader, Writer, unseal};
use crate::error::{Error, Result};
use crate::media::Open;

const MAGIC: [u8; 8] = *b"\x89AFTFS\r\n";
const VERSION: u32 = 1;
/// Most page blocks: 4 GiB of memory. Who touches more than that at once is better served in order.
const BLOCKS_MAX: usize = 1 << 16;

/// Page blocks of a checkpoint that a restored machine touched.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Touched {
    checkpoint: Uuid,
    blocks: Vec<PageBlock>,
}

impl Touched {
    /// Makes the set of a checkpoint, of page blocks in growing order; only the first [`BLOCKS_MAX`] are kept.
    pub(super) fn new(checkpoint: Uuid, mut blocks: Vec<PageBlock>) -> Self {
        blocks.truncate(BLOCKS_MAX);
        Self { checkpoint, blocks }
    }

    /// Returns the page blocks.
    #[must_use]
    pub fn blocks(&self) -> &[PageBlock] {
        &self.blocks
    }

    /// Returns the checkpoint.
    #[must_use]
    pub fn checkpoint(&self) -> Uuid {
        self.checkpoint
    }

    /// Returns the bytes of the file.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Writer::new();
        out.raw(&MAGIC).u32(VERSION).raw(self.checkpoint.as_bytes());
        out.u32(u32::try_from(self.blocks.len()).expect("cut to a few when it was made"));
        for block in &self.blocks {
            out.u32(u32::try_from(block.0).expect("there are at most 2^30 page blocks"));
        }
        out.sealed()
    }

    /// Takes the bytes of the file apart; it must be of that checkpoint.
    ///
    /// # Errors
    /// `Corrupt`: it is not to be used.
    pub fn decode(bytes: &[u8], header: &Header) -> Result<Self> {
        let what = "the list of what was touched";
        let mut input = Reader::new(what, unseal(what, bytes)?);
        if input.raw(MAGIC.len())? != MAGIC || input.u32()? != VERSION {
            return Err(input.corrupt("it is none, or of a newer format"));
        }
        if input.raw(16)? != header.uuid.as_bytes() {
            return Err(input.corrupt("it is of another checkpoint"));
        }
        let count = input.u32()? as usize;
        if count > BLOCKS_MAX || input.left() != count * 4 {
            return Err(input.corrupt("it has another length than it says"));
        }
        let mut blocks = Vec::with_capacity(count);
        for _ in 0..count {
            let block = PageBlock(input.u32()?.into());
            if block.0 >= header.geometry.page_blocks() || blocks.last().is_some_and(|last| *last >= block) {
                return Err(input.corrupt("it names page blocks that are none"));
            }
            blocks.push(block);
        }
        input.end()?;
        Ok(Self { checkpoint: header.uuid, blocks })
    }

    /// Reads what the last restore of a checkpoint has left, if that can be used.
    #[must_use]
    pub fn load(folder: &Folder, name: &Name, header: &Header) -> Option<Self> {
        let most = MAGIC.len() + 4 + 16 + 4 + BLOCKS_MAX * 4 + 4;
        let read = || -> Result<Vec<u8>> {
            let host = |error| Error::io("cannot be read", error);
            let file = folder.media().open(&folder.faults(name), Open::ReadOnly).map_err(host)?;
            let mut bytes = vec![0; most];
            let got = file.read_at(&mut bytes, 0).map_err(host)?;
            bytes.truncate(got);
            Ok(bytes)
        };
        match read().and_then(|bytes| Self::decode(&bytes, header)) {
            Ok(touched) => Some(touched),
            Err(error) => {
                tracing::debug!("nothing is known of what a machine restored from {name} touches first: {error}");
                None
            }
        }
    }

    /// Writes it beside the checkpoint.
    ///
    /// # Errors
    /// Those of the host.
    pub fn store(&self, folder: &Folder, name: &Name) -> Result<()> {
        let host = |error| Error::io(format!("cannot note what a machine restored from {name} touches first"), error);
        let (path, media) = (folder.faults(name), folder.media());
        let new = folder.new_faults(name);
        match media.remove(&new) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(host(error)),
            _ => {}
        }
        media.open(&new, Open::New).and_then(|file| file.write_at(&self.encode(), 0)).map_err(host)?;
        media.rename(&new, &path).map_err(host)
    }
}
