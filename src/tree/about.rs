//! `snapshot.json` in a tree of one snapshot: what the extent files beside it belong to.
//!
//! # Rules
//! 1. Its time lies behind those of all extents, and is another one for every snapshot of a lineage.
//! 2. It says what was so when the tree was mounted.
//!
//! # Why
//! borg does not trust its memory of the files that have the newest time in a backup: they could have changed once more in
//! the same second. Extents that were written in one epoch have one time, so without a newer file beside them borg would
//! read all of them again the next time.

use std::sync::Arc;

use super::errno::{Answer, Errno};
use super::exports::fixed_attr;
use super::extent::Cut;
use super::node::Node;
use super::state::{Attr, Tree};
use crate::error::Result;
use crate::store::Store;

/// The name of the file.
pub(super) const ABOUT: &str = "snapshot.json";

/// What the file is.
#[derive(Debug)]
pub(super) struct About {
    text: Arc<[u8]>,
    mtime: u64,
}

impl About {
    pub(super) fn of(store: &Store, cut: &Cut) -> Result<Self> {
        let tables = store.tables.read();
        let (_, row) = tables.snapshot_by_id(cut.id)?;
        let about = serde_json::json!({
            "disk": tables.disk(row.disk)?.name,
            "snapshot": row.name,
            "uuid": row.uuid,
            "size": cut.size,
            "extent-size": cut.extent_size(),
            "created": cut.created,
        });
        Ok(Self { text: format!("{about:#}\n").into_bytes().into(), mtime: row.stamp + 1 })
    }
}

impl Tree {
    fn about(&self) -> Answer<&About> {
        self.about.as_ref().ok_or(Errno::ESTALE)
    }

    pub(super) fn about_attr(&self) -> Answer<Attr> {
        let About { text, mtime } = self.about()?;
        let size = text.len() as u64;
        Ok(fixed_attr(Node::About, size, size.div_ceil(512), *mtime))
    }

    /// Returns what is in the file.
    pub(super) fn about_text(&self) -> Answer<Arc<[u8]>> {
        Ok(Arc::clone(&self.about()?.text))
    }
}
