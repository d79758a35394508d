//! Which chunks can differ between two states that are relatives, by the index of their epochs.
//!
//! # Why nothing is missed
//! If two states resolve a chunk to different entries, at least one of the entries lies in an epoch between the state and
//! the last state both stem from; entries of an epoch are in the index as long as they exist. An entry that a later state
//! of the way stands on never goes: it is dropped only when no state resolves to it, and an unmapped chunk leaves a
//! tombstone. A branch that was cut loose does not lead further up: then every chunk is compared.

use std::collections::BTreeSet;

use roaring::RoaringBitmap;

use super::{Map, Side};
use crate::error::Result;
use crate::store::{Frozen, StateKey, Stretch, Tables};
use crate::units::{BLOCK_SIZE, CHUNK_BLOCKS, ChunkIndex, Epoch};

/// Returns the stretches of epochs in which the two sides can have come to differ; `None` when the tree cannot tell.
pub(super) fn between(tables: &Tables, from: &Side, to: &Side) -> Option<Vec<Stretch>> {
    match (&from.map, &to.map) {
        (Map::View(_), Map::View(_)) => in_tree(tables, from.node, to.node),
        (Map::Record(_), Map::View(_)) => behind(tables, from.node, to.node),
        // Beyond its end a record counts as unmapped, wherever else its addresses are.
        (Map::View(_), Map::Record(_)) if to.size <= from.size => behind(tables, to.node, from.node),
        _ => None,
    }
}

/// Returns the chunks that may differ, of two sides that can have come to differ in some stretches only.
///
/// # Errors
/// `Corrupt` when rows are damaged; any error of reading the catalog.
pub(super) fn chunks(frozen: &Frozen, stretches: &[Stretch], from: &Side, to: &Side) -> Result<RoaringBitmap> {
    let mut chunks = frozen.indexed_chunks(stretches)?;
    for side in [from, to] {
        if let Map::View(view) = &side.map {
            chunks.extend(view.unsaved_chunks().map(|chunk| chunk.0));
        }
    }
    if let Map::View(view) = &to.map
        && to.size > from.size
    {
        // Beyond the end of FROM everything is new, also what both resolve to.
        let first = u32::try_from(from.size / BLOCK_SIZE / CHUNK_BLOCKS).expect("a size is checked");
        let mut walk = view.walk(ChunkIndex(first))?;
        while let Some(found) = walk.step()? {
            chunks.insert(found.chunk.0);
        }
    }
    Ok(chunks)
}

/// Returns the stretches between two nodes of the tree, up from both to the last node they have in common.
fn in_tree(tables: &Tables, from: Option<StateKey>, to: Option<StateKey>) -> Option<Vec<Stretch>> {
    let (from, to) = (from?, to?);
    let ancestors = |node: StateKey| {
        let mut list = vec![node];
        while let Some(parent) = tables.parent(*list.last().expect("begins with the node")) {
            list.push(parent);
        }
        list
    };
    let (left, right) = (ancestors(from), ancestors(to));
    let common: BTreeSet<StateKey> = left.iter().copied().collect();
    let meeting = right.iter().find(|node| common.contains(node));
    let mut stretches = Vec::new();
    for list in [&left, &right] {
        for node in list.iter().take_while(|node| Some(*node) != meeting) {
            stretches.extend(tables.stretches(*node));
        }
    }
    Some(stretches)
}

/// Returns the stretches on the way of look-ups from `state` down to where `past` was; `None` when it is not on that way.
fn behind(tables: &Tables, past: Option<StateKey>, state: Option<StateKey>) -> Option<Vec<Stretch>> {
    let ((branch, epoch), state) = (past?, state?);
    let mut stretches = Vec::new();
    for (at, upto) in tables.lookup_path(state.0, state.1) {
        if at == branch {
            return (upto >= epoch).then(|| {
                stretches.push(Stretch { branch, after: epoch, upto });
                stretches
            });
        }
        stretches.push(Stretch { branch: at, after: Epoch(0), upto });
    }
    None
}
