//! The whole state of a simulated disk, behind one lock: names, files, room, armed faults.
//!
//! # Rules
//! 1. [`World::step`] is the one gate of everything that changes something. It counts, and it decides what fails.
//! 2. `used_pages` is the sum over the files that have a volatile name. A file that is only open costs no room; that is
//!    kinder than a real disk, and nothing here relies on either.
//! 3. All collections iterate in a fixed order, or a seed would not mean anything.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use super::Fault;
use super::image::{Image, PAGE};
use super::inode::Inode;
use super::rng::Rng;
use super::tree::Tree;
use crate::media::Space;

/// Pages of a disk that nobody made smaller: 1 PiB.
const DEFAULT_PAGES: u64 = (1 << 50) / PAGE;

/// What an I/O meets at the gate.
enum Gate {
    Go,
    /// Power is lost while it is under way.
    Last,
    Fail(Fault),
}

pub(super) struct World {
    pub(super) tree: Tree,
    pub(super) ignore_sync: Option<String>,
    pub(super) ignore_sync_dir: bool,
    inodes: BTreeMap<u64, Inode>,
    /// Without a name anywhere, but open when last looked at.
    orphans: Vec<u64>,
    rng: Rng,
    generation: u64,
    /// Losses of power so far.
    boots: u64,
    ios: u64,
    down: bool,
    cut_at: Option<u64>,
    fault_at: Option<(u64, Fault)>,
    limit_pages: u64,
    used_pages: u64,
}

fn power_lost() -> io::Error {
    io::Error::other("input/output error: power lost (simulated)")
}

fn fault_error(fault: Fault) -> io::Error {
    io::Error::from_raw_os_error(match fault {
        Fault::Eio => libc::EIO,
        Fault::Enospc => libc::ENOSPC,
    })
}

impl World {
    pub(super) fn new(seed: u64) -> Self {
        Self {
            tree: Tree::new(),
            ignore_sync: None,
            ignore_sync_dir: false,
            inodes: BTreeMap::new(),
            orphans: Vec::new(),
            rng: Rng::new(seed),
            generation: 0,
            boots: 0,
            ios: 0,
            down: false,
            cut_at: None,
            fault_at: None,
            limit_pages: DEFAULT_PAGES,
            used_pages: 0,
        }
    }

    pub(super) fn fork(&self, seed: u64) -> Self {
        let mut inodes = self.inodes.clone();
        // The handles stay with the original.
        inodes.values_mut().for_each(|inode| inode.held = Arc::default());
        Self {
            tree: self.tree.clone(),
            ignore_sync: self.ignore_sync.clone(),
            ignore_sync_dir: self.ignore_sync_dir,
            inodes,
            orphans: self.orphans.clone(),
            rng: Rng::new(seed),
            generation: self.generation,
            boots: self.boots,
            ios: self.ios,
            down: self.down,
            cut_at: None,
            fault_at: None,
            limit_pages: self.limit_pages,
            used_pages: self.used_pages,
        }
    }

    pub(super) fn crash(&mut self) {
        let named = self.tree.crash(&mut self.rng);
        self.inodes.retain(|id, _| named.contains(id));
        self.orphans.clear();
        for inode in self.inodes.values_mut() {
            inode.crash(&mut self.rng);
        }
        self.recount();
        self.generation += 1;
        self.boots += 1;
        self.down = false;
        self.cut_at = None;
        self.fault_at = None;
    }

    pub(super) fn kill(&mut self) {
        let ids: Vec<u64> = self.inodes.keys().copied().collect();
        ids.into_iter().for_each(|id| self.change(id, Inode::reopen));
        self.generation += 1;
        self.down = false;
        self.cut_at = None;
        self.fault_at = None;
    }

    pub(super) fn boot(&self) -> u128 {
        u128::from(self.boots) + 1
    }

    pub(super) fn crash_after(&mut self, n: u64) {
        self.down |= n == 0;
        self.cut_at = Some(self.ios + n);
    }

    pub(super) fn fail_after(&mut self, n: u64, fault: Fault) {
        self.fault_at = Some((self.ios + n, fault));
    }

    pub(super) fn io_count(&self) -> u64 {
        self.ios
    }

    pub(super) fn is_down(&self) -> bool {
        self.down
    }

    pub(super) fn generation(&self) -> u64 {
        self.generation
    }

    pub(super) fn set_space(&mut self, free: Option<u64>) {
        self.limit_pages = free.map_or(DEFAULT_PAGES, |free| self.used_pages + free / PAGE);
    }

    pub(super) fn space(&self) -> Space {
        let free = self.limit_pages.saturating_sub(self.used_pages);
        Space { free: free * PAGE, total: self.limit_pages * PAGE }
    }

    /// Fails when power is lost.
    pub(super) fn alive(&self) -> io::Result<()> {
        if self.down { Err(power_lost()) } else { Ok(()) }
    }

    /// Fails when power is lost, or was since the handle was opened.
    pub(super) fn fresh(&self, generation: u64) -> io::Result<()> {
        self.alive()?;
        if generation == self.generation {
            return Ok(());
        }
        Err(io::Error::other("input/output error: opened before the power was lost (simulated)"))
    }

    pub(super) fn inode(&self, id: u64) -> &Inode {
        self.inodes.get(&id).expect("open and named files are kept")
    }

    /// Counts an I/O and does it, unless it is to fail.
    pub(super) fn step<T>(&mut self, op: impl FnOnce(&mut Self) -> io::Result<T>) -> io::Result<T> {
        match self.gate()? {
            Gate::Go => op(self),
            Gate::Last => {
                // It may survive the crash: it was under way. Whether it succeeded nobody will learn.
                drop(op(self));
                Err(power_lost())
            }
            Gate::Fail(fault) => Err(fault_error(fault)),
        }
    }

    fn gate(&mut self) -> io::Result<Gate> {
        self.alive()?;
        self.ios += 1;
        if self.cut_at.is_some_and(|at| at <= self.ios) {
            self.down = true;
            return Ok(Gate::Last);
        }
        match self.fault_at {
            Some((at, fault)) if at <= self.ios => {
                self.fault_at = None;
                Ok(Gate::Fail(fault))
            }
            _ => Ok(Gate::Go),
        }
    }

    /// Counts a sync and makes the file durable; on a fault its changes are lost for good.
    pub(super) fn sync(&mut self, id: u64, path: &str) -> io::Result<()> {
        let lie = self.ignore_sync.as_ref().is_some_and(|part| path.contains(part));
        let gate = self.gate()?;
        let inode = self.inodes.get_mut(&id).expect("open files are kept");
        match gate {
            Gate::Go if lie => Ok(()),
            Gate::Go => {
                inode.sync();
                Ok(())
            }
            Gate::Last => Err(power_lost()),
            Gate::Fail(fault) => {
                inode.lose_pending();
                Err(fault_error(fault))
            }
        }
    }

    /// Counts a sync of a directory and makes its names durable.
    pub(super) fn sync_dir(&mut self, path: &str) -> io::Result<()> {
        match self.gate()? {
            Gate::Go if self.ignore_sync_dir => self.tree.dir(path).map(drop),
            Gate::Go => {
                let gone = self.tree.sync(path)?;
                self.orphans.extend(gone);
                let inodes = &mut self.inodes;
                self.orphans.retain(|id| {
                    let open = inodes.get(id).is_some_and(|inode| Arc::strong_count(&inode.held) > 1);
                    if !open {
                        inodes.remove(id);
                    }
                    open
                });
                Ok(())
            }
            Gate::Last => Err(power_lost()),
            Gate::Fail(fault) => Err(fault_error(fault)),
        }
    }

    pub(super) fn add_file(&mut self, path: &str) -> io::Result<u64> {
        let id = self.tree.add_file(path)?;
        self.inodes.insert(id, Inode::named());
        Ok(id)
    }

    pub(super) fn remove(&mut self, path: &str) -> io::Result<()> {
        let id = self.tree.remove(path)?;
        self.lost_name(id);
        Ok(())
    }

    pub(super) fn rename(&mut self, from: &str, to: &str) -> io::Result<()> {
        if let Some(replaced) = self.tree.rename(from, to)? {
            self.lost_name(replaced);
        }
        Ok(())
    }

    pub(super) fn write(&mut self, id: u64, data: &[u8], offset: u64) -> io::Result<()> {
        let inode = self.inode(id);
        let free = self.limit_pages.saturating_sub(self.used_pages);
        if inode.named && inode.image().missing(offset, data.len()) > free {
            return Err(io::Error::from_raw_os_error(libc::ENOSPC));
        }
        self.change(id, |inode| inode.write(data, offset));
        Ok(())
    }

    /// Changes a file and keeps the account of the room.
    pub(super) fn change(&mut self, id: u64, op: impl FnOnce(&mut Inode)) {
        let inode = self.inodes.get_mut(&id).expect("open files are kept");
        let before = inode.image().pages();
        op(inode);
        if inode.named {
            self.used_pages = self.used_pages - before + inode.image().pages();
        }
    }

    pub(super) fn damage(&mut self, id: u64, harm: impl Fn(&mut Image)) {
        self.change(id, |inode| inode.damage(harm));
    }

    fn lost_name(&mut self, id: u64) {
        let inode = self.inodes.get_mut(&id).expect("named files are kept");
        inode.named = false;
        self.used_pages -= inode.image().pages();
    }

    /// After a crash each file that is left has a name, also one whose removal did not survive.
    fn recount(&mut self) {
        self.used_pages = 0;
        for inode in self.inodes.values_mut() {
            inode.named = true;
            self.used_pages += inode.image().pages();
        }
    }
}
