//! What the kernel has to forget after a change, and the queue in which it is told.
//!
//! The kernel keeps names, attributes and file contents until it is told otherwise, so every change that was not made
//! by an operation of this very mount is announced to it. A command must not return before that (what the command line
//! did, `ls` shows at once), so whoever made the change waits for the announcement.
//!
//! # Rules
//! 1. Announcing is done by one thread of its own and never by a handler: the kernel may hold the lock of a directory
//!    or page that the announcement needs until the handler answers.
//! 2. A handler never waits for an announcement, not even for that of another mount, for the same reason. Handlers are
//!    known by a mark on their thread ([`enter_handler`]).
//! 3. Others wait at most [`PATIENCE`]: a page under a write that waits for space must not hold up the command line.
//!
//! # Why not short lifetimes
//! With lifetimes of a second each stat of a disk would cost a round trip a second, and `ls` would be wrong for one.

use std::cell::Cell;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use super::node::{self, Node};
use crate::clock;
use crate::store::Change;
use crate::sync::{Condvar, Mutex};

/// How long a change waits for the kernel to be told.
pub const PATIENCE: Duration = Duration::from_secs(5);

thread_local! {
    static HANDLER_OF: Cell<u64> = const { Cell::new(0) };
}

/// Marks this thread as a handler of the mount with this number (not 0).
pub fn enter_handler(mount: u64) {
    HANDLER_OF.set(mount);
}

/// Returns the number of the mount this thread handles requests of; 0 if of none.
#[must_use]
pub fn handler_of() -> u64 {
    HANDLER_OF.get()
}

/// Something the kernel has to forget.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stale {
    /// A name in a directory.
    Entry {
        /// The directory's inode number.
        parent: u64,
        /// The name.
        name: String,
    },
    /// The attributes of an inode.
    Attr(u64),
    /// The attributes and the cached bytes of an inode.
    Data(u64),
}

/// Returns what the kernel has to forget after a change. What an operation of this mount (`ours`) changed in its own
/// directory the kernel knows; what that entails elsewhere it does not. (Names in `snapshots/` are not kept at all.)
#[must_use]
pub fn after(change: &Change, ours: bool) -> Vec<Stale> {
    let mut stale = Vec::new();
    match change {
        Change::Disk { id, name, was, gone, resized, data } => {
            if !ours && (*resized || *data) {
                stale.push(Stale::Data(Node::Disk(*id).ino()));
            }
            if *resized || *data {
                return stale;
            }
            if !ours {
                for name in was.iter().chain((was.is_some() || *gone).then_some(name)) {
                    stale.push(Stale::Entry { parent: Node::Disks.ino(), name: node::file_name(name) });
                }
                stale.push(Stale::Attr(Node::Disk(*id).ino()));
                stale.push(Stale::Attr(Node::Disks.ino()));
            }
            stale.extend([Node::Snapshots, Node::Retired, Node::Exports].map(|dir| Stale::Attr(dir.ino())));
        }
        Change::Written { disk } => stale.push(Stale::Data(Node::Disk(*disk).ino())),
        Change::Snapshot { disk, id, name, was, gone, retired, .. } => {
            let (snapshots, records) = (Node::SnapshotsOf(*disk).ino(), Node::RetiredOf(*disk).ino());
            let exports = Node::ExportsOf(*disk).ino();
            let names = was.iter().chain((was.is_some() || *gone || *retired).then_some(name));
            for name in names {
                stale.push(Stale::Entry { parent: exports, name: name.clone() });
                // Also after our own: a rename from the one to the other leaves the old inode under the new name.
                if !ours || *retired {
                    stale.push(Stale::Entry { parent: snapshots, name: node::file_name(name) });
                    stale.push(Stale::Entry { parent: records, name: node::record_name(name) });
                }
            }
            stale.push(Stale::Attr(Node::Snapshot(*id).ino()));
            stale.extend([snapshots, records, exports].map(Stale::Attr));
        }
    }
    stale
}

#[derive(Debug, Default)]
struct Inner {
    items: VecDeque<Stale>,
    /// How many items were ever put in, and how many the kernel was told of.
    put: u64,
    told: u64,
    closed: bool,
}

/// The queue between those who change things and the thread that tells the kernel.
#[derive(Debug, Default)]
pub struct Queue {
    inner: Mutex<Inner>,
    work: Condvar,
    done: Condvar,
}

impl Queue {
    /// Puts items in; with `wait`, returns when the kernel was told (or the mount is gone, or [`PATIENCE`] ran out).
    pub fn put(&self, items: Vec<Stale>, wait: bool) {
        if items.is_empty() {
            return;
        }
        let until = clock::now() + PATIENCE;
        let mut inner = self.inner.lock();
        inner.put += items.len() as u64;
        let mine = inner.put;
        inner.items.extend(items);
        self.work.notify_one();
        while wait && inner.told < mine && !inner.closed {
            if self.done.wait_until(&mut inner, until).timed_out() {
                tracing::warn!("the kernel did not take notice of a change within {PATIENCE:?}");
                return;
            }
        }
    }

    /// Waits for items and takes them all; `None` when closed.
    pub fn take(&self) -> Option<Vec<Stale>> {
        let mut inner = self.inner.lock();
        while inner.items.is_empty() && !inner.closed {
            self.work.wait(&mut inner);
        }
        (!inner.closed).then(|| inner.items.drain(..).collect())
    }

    /// Reports that the kernel was told of `count` items.
    pub fn told(&self, count: u64) {
        self.inner.lock().told += count;
        self.done.notify_all();
    }

    /// Ends it: nobody waits any more.
    pub fn close(&self) {
        self.inner.lock().closed = true;
        self.work.notify_all();
        self.done.notify_all();
    }
}

/// Returns the hook for [`crate::store::Store::subscribe`] that looks at each change with `look` and puts what it
/// returns into the queue. `mount` is the number given to [`enter_handler`]. Both are let go with the mount.
pub fn hook(
    mount: u64,
    queue: &Arc<Queue>,
    look: impl Fn(&Change, bool) -> Vec<Stale> + Send + Sync + 'static,
) -> Box<dyn Fn(&Change) + Send + Sync> {
    let queue = Arc::downgrade(queue);
    Box::new(move |change| {
        let Some(queue) = queue.upgrade() else { return };
        let handler = handler_of();
        queue.put(look(change, handler == mount), handler == 0);
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::DiskId;

    fn disk(name: &str, was: Option<&str>, gone: bool, data: bool) -> Change {
        Change::Disk { id: DiskId(9), name: name.into(), was: was.map(Into::into), gone, resized: false, data }
    }

    #[test]
    fn a_rename_from_outside_makes_both_names_stale() {
        let stale = after(&disk("b", Some("a"), false, false), false);
        for name in ["a.raw", "b.raw"] {
            assert!(stale.contains(&Stale::Entry { parent: 2, name: name.into() }), "{name}");
        }
    }

    #[test]
    fn our_own_removal_is_stale_only_where_the_kernel_cannot_know() {
        assert_eq!(after(&disk("a", None, true, false), true), [3, 4, 5].map(Stale::Attr));
        assert_eq!(after(&disk("a", None, false, true), true), []);
    }

    #[test]
    fn a_revert_drops_the_bytes() {
        assert_eq!(after(&disk("a", None, false, true), false), [Stale::Data(Node::Disk(DiskId(9)).ino())]);
    }

    #[test]
    fn whoever_waits_is_let_go_when_the_kernel_was_told_or_the_mount_is_gone() {
        let queue = Arc::new(Queue::default());
        let teller = std::thread::spawn({
            let queue = Arc::clone(&queue);
            move || {
                let items = queue.take().unwrap();
                queue.told(items.len() as u64);
                std::thread::sleep(Duration::from_millis(20));
                queue.close();
                assert_eq!(queue.take(), None);
            }
        });
        queue.put(vec![Stale::Attr(2)], true);
        queue.put(vec![Stale::Attr(2)], true);
        teller.join().unwrap();
    }

    #[test]
    fn a_handler_does_not_wait() {
        let queue = Arc::new(Queue::default());
        let hook = hook(5, &queue, after);
        enter_handler(6);
        hook(&disk("a", None, true, false));
        enter_handler(0);
        assert_eq!(queue.take().map(|items| items.len()), Some(6));
    }
}
