//! In which order memory is filled that nobody waits for: what the last machine touched, what was hot when it was saved, the rest.

use std::collections::{BTreeMap, VecDeque};

use super::cache::Key;
use super::touched::Touched;
use crate::checkpoint::{Found, PageBlock, Reader};
use crate::error::Result;

/// What is to be brought next.
#[derive(Debug, Clone)]
pub(super) enum Next {
    /// These page blocks, of one storage block.
    These(Vec<PageBlock>),
    /// A whole storage block.
    All(Key),
    /// The storage block that this page block is in.
    With(PageBlock),
}

/// The order, and how far it is.
#[derive(Debug, Default)]
pub(super) struct Order {
    first: VecDeque<Next>,
    /// It is known what comes first. Before that nothing is filled that nobody waits for.
    planned: bool,
    /// Page blocks before this one were looked at.
    scanned: u64,
}

impl Order {
    /// Returns what comes before the rest: page blocks that were touched, by where they are in the files, and hot storage blocks.
    pub(super) fn plan(reader: &Reader, touched: Option<&Touched>) -> Result<Vec<Next>> {
        let mut places: BTreeMap<Key, Vec<(u32, PageBlock)>> = BTreeMap::new();
        for block in touched.map(Touched::blocks).unwrap_or_default() {
            if let Found::Stored { layer, stored } = reader.place(*block)? {
                places.entry((layer, stored.block)).or_default().push((stored.offset, *block));
            }
        }
        let mut first = Vec::new();
        for mut blocks in places.into_values() {
            blocks.sort_unstable();
            first.push(Next::These(blocks.into_iter().map(|(_, block)| block).collect()));
        }
        first.extend(reader.hot()?.into_iter().map(|block| Next::All((0, block))));
        Ok(first)
    }

    /// Says what comes first.
    pub(super) fn planned(&mut self, first: Vec<Next>) {
        self.first = first.into();
        self.planned = true;
    }

    /// Looks at everything again.
    pub(super) fn again(&mut self) {
        self.scanned = 0;
    }

    /// Returns what is next; `absent` finds the first page block from one on that is not there.
    pub(super) fn next(&mut self, absent: impl FnOnce(u64) -> Option<PageBlock>) -> Option<Next> {
        if !self.planned {
            return None;
        }
        if let Some(next) = self.first.pop_front() {
            return Some(next);
        }
        match absent(self.scanned) {
            Some(block) => {
                self.scanned = block.0 + 1;
                Some(Next::With(block))
            }
            None => {
                self.scanned = u64::MAX;
                None
            }
        }
    }
}
