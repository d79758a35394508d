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
        while let Some(point) = todo.pop() {
            let (next, branches) = self.right_below(point);
            out.extend(next);
            todo.extend(branches.map(|child| (child, Epoch(0))));
        }
        out
    }

    /// Returns what comes next in the branch of a point, and the branches that began at the point, or at an epoch that has no row
    /// any more, before that.
    fn right_below(&self, (branch, epoch): StateKey) -> (Option<StateKey>, impl Iterator<Item = BranchId> + '_) {
        let head = self.head_of(branch).map(|(_, disk)| (branch, disk.epoch)).filter(|head| head.1 > epoch);
        let next = self.next_state(branch, epoch).or(head);
        let near = self.offspring(branch, epoch).take_while(move |(at, _)| next.is_none_or(|next| *at < next.1));
        (next, near.map(|(_, child)| child))
    }

    /// Returns the address below which nothing was born in the epoch of a node; `u64::MAX` when that is not known.
    pub fn floor_of(&self, node: StateKey) -> u64 {
        self.state(node).map_or(u64::MAX, |row| row.floor)
    }

    fn is_ghost(&self, node: StateKey) -> bool {
        self.state(node).is_some_and(|row| row.status == Status::Ghost)
    }

    /// Returns the nodes next to a node, where every ghost is walked through instead of returned.
    pub fn neighbours(&self, node: StateKey) -> Vec<StateKey> {
        let mut around = Around::below(node).and_beyond(self);
        std::iter::from_fn(|| around.next(self, |_| false)).collect()
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

/// A walk over the nodes next to a node that looks no further than it is asked to: below a ghost there may be thousands, and
/// the first of them is mostly answer enough.
///
/// It may go on after the tree has changed, as long as no ghost goes.
#[derive(Debug)]
pub(super) struct Around {
    node: StateKey,
    todo: Vec<Step>,
    /// The order among the children of a ghost is another one for each node: so that those who change the same chunk one after
    /// the other do not all look first at those who have changed it already.
    turn: Turn,
}

/// What a walk has still to look at.
#[derive(Debug)]
enum Step {
    /// A node, and the one the walk came from.
    Node(StateKey, StateKey),
    /// What comes below a point of the stretch of the node that is second, but for the node that is third.
    Below(StateKey, StateKey, StateKey),
}

/// An order that looks like none, and is the same each time (SplitMix64).
#[derive(Debug)]
struct Turn(u64);

impl Turn {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    fn shuffle<T>(&mut self, list: &mut [T]) {
        for last in (1..list.len()).rev() {
            let with = self.next() % (last as u64 + 1);
            list.swap(last, usize::try_from(with).unwrap_or(last));
        }
    }
}

impl Around {
    /// The nodes below: nobody else has what was born in the epoch of the node, or resolves to entries of its stretches.
    pub(super) fn below(node: StateKey) -> Self {
        let turn = Turn(node.0.0 ^ node.1.0.rotate_left(32));
        Self { node, todo: vec![Step::Below(node, node, node)], turn }
    }

    /// The nodes that are reached through the parent.
    pub(super) fn beyond(node: StateKey, tables: &Tables) -> Self {
        Self { todo: Vec::new(), ..Self::below(node) }.and_beyond(tables)
    }

    /// Adds those that are reached through the parent.
    pub(super) fn and_beyond(mut self, tables: &Tables) -> Self {
        // Last in, first out: what is below comes first.
        self.todo.splice(0..0, tables.parent(self.node).map(|parent| Step::Node(parent, self.node)));
        self
    }

    /// Goes on to the next node. Ghosts, and nodes for which `through` says so, are walked through.
    pub(super) fn next(&mut self, tables: &Tables, through: impl Fn(StateKey) -> bool) -> Option<StateKey> {
        loop {
            match self.todo.pop()? {
                Step::Node(at, from) => {
                    if !tables.is_ghost(at) && !through(at) {
                        return Some(at);
                    }
                    let parent = tables.parent(at).filter(|parent| *parent != from);
                    self.todo.extend(parent.map(|parent| Step::Node(parent, at)));
                    self.todo.push(Step::Below(at, at, from));
                }
                Step::Below(point, of, except) => {
                    let (next, branches) = tables.right_below(point);
                    let first = self.todo.len();
                    self.todo.extend(branches.map(|child| Step::Below((child, Epoch(0)), of, except)));
                    self.todo.extend(next.filter(|next| *next != except).map(|next| Step::Node(next, of)));
                    self.turn.shuffle(&mut self.todo[first..]);
                }
            }
        }
    }
}
