//! The tree of states of a lineage: parents, children, neighbours, and the stretches of epochs that belong to a state.
//!
//! A node is an ended epoch with a row, or the epoch a disk is writing. The parent of a node is the node before it in its
//! branch, or - for the first one - the last node at or before the point where the branch began. Epochs without a row
//! (deleted, with one child left) simply belong to the node after them.
//!
//! # Rules
//! 1. The states that hold one address are connected in the tree, if one walks through ghosts: an address is born in
//!    one state, and states get it from their parents only.
//! 2. Ghosts have at least two children; everything else may have any number.

use super::states::Status;
use super::tables::{StateKey, Tables};
use crate::units::{BranchId, Epoch};

/// A stretch of epochs of one branch: after `after`, up to and including `upto`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stretch {
    /// The branch.
    pub branch: BranchId,
    /// Epochs greater than this.
    pub after: Epoch,
    /// Epochs up to this.
    pub upto: Epoch,
}

impl Tables {
    /// Tells whether the node is the epoch a disk is writing.
    #[must_use]
    pub fn is_head(&self, node: StateKey) -> bool {
        self.head_of(node.0).is_some_and(|(_, disk)| disk.epoch == node.1)
    }

    /// Returns the parent of a node.
    #[must_use]
    pub fn parent(&self, node: StateKey) -> Option<StateKey> {
        self.walk_up(node).1
    }

    /// Returns the stretches of epochs that belong to a node: from its parent (left out) to itself, nearest first.
    #[must_use]
    pub fn stretches(&self, node: StateKey) -> Vec<Stretch> {
        self.walk_up(node).0
    }

    fn walk_up(&self, node: StateKey) -> (Vec<Stretch>, Option<StateKey>) {
        let mut out = Vec::new();
        let (mut branch, mut upto) = node;
        let mut before = Epoch(node.1.0.saturating_sub(1));
        loop {
            let last = self.last_state(branch, before);
            let after = last.map_or(Epoch(0), |state| state.1);
            if upto > after {
                out.push(Stretch { branch, after, upto });
            }
            if last.is_some() {
                return (out, last);
            }
            let Some(parent) = self.branch(branch).ok().and_then(|row| row.parent) else { return (out, None) };
            (branch, upto) = parent;
            before = upto;
        }
    }

    /// Returns the children of a node.
    #[must_use]
    pub fn children(&self, node: StateKey) -> Vec<StateKey> {
        let mut out = Vec::new();
        let mut todo = vec![node];
        while let Some((branch, epoch)) = todo.pop() {
            let head = self.head_of(branch).map(|(_, disk)| (branch, disk.epoch)).filter(|head| head.1 > epoch);
            let next = self.next_state(branch, epoch).or(head);
            out.extend(next);
            // Branches that began here, or at an epoch that has no row any more, before the next node.
            let near = self.offspring(branch, epoch).take_while(|(at, _)| next.is_none_or(|next| *at < next.1));
            todo.extend(near.map(|(_, child)| (child, Epoch(0))));
        }
        out
    }

    fn is_ghost(&self, node: StateKey) -> bool {
        self.state(node).is_some_and(|row| row.status == Status::Ghost)
    }

    /// Returns the nodes next to a node, where every ghost (and every node for which `through` says so) is walked
    /// through instead of returned.
    pub fn neighbours(&self, node: StateKey, through: impl Fn(StateKey) -> bool) -> Vec<StateKey> {
        let mut found = Vec::new();
        let mut todo = vec![(node, node)];
        while let Some((at, from)) = todo.pop() {
            let next = self.children(at).into_iter().chain(self.parent(at)).filter(|n| *n != from);
            for n in next {
                if self.is_ghost(n) || through(n) {
                    todo.push((n, at));
                } else {
                    found.push(n);
                }
            }
        }
        found
    }

    /// Returns the stretches whose entries a node may resolve to and that no other readable ancestor shares: its own,
    /// and those of the ghosts right above it.
    #[must_use]
    pub fn stretches_to_holder(&self, node: StateKey) -> Vec<Stretch> {
        let (mut out, mut parent) = self.walk_up(node);
        while let Some(ghost) = parent.filter(|p| self.is_ghost(*p)) {
            let (more, next) = self.walk_up(ghost);
            out.extend(more);
            parent = next;
        }
        out
    }

    /// Returns the branches a look-up in `branch` goes through, with the epoch bound in each; the first is `branch`.
    #[must_use]
    pub fn lookup_path(&self, branch: BranchId, epoch: Epoch) -> Vec<StateKey> {
        let mut path = vec![(branch, epoch)];
        let mut at = branch;
        while let Ok(row) = self.branch(at)
            && row.inherits
            && let Some(parent) = row.parent
        {
            path.push(parent);
            at = parent.0;
        }
        path
    }
}
