//! Files in memory that crash: a disk that keeps exactly what was promised, and of the rest what a seed decides.
//!
//! Every file and directory has a volatile image, which programs see, and a durable one, which outlives a crash.
//! [`SimMedia::crash`] loses power: of the changes that were not synced some survive, reordered, and torn at 512-byte
//! sectors (`sim/inode.rs`); of the names that were not synced a prefix per directory (`sim/tree.rs`).
//!
//! # Rules
//! 1. The same seed and the same sequence of calls give the same disk, bit for bit. Only threads can spoil that.
//! 2. An I/O that changes something is counted, and any of them can be made to fail ([`SimMedia::fail_after`]) or to be
//!    the last one before the lights go out ([`SimMedia::crash_after`]). Reading is not counted.
//! 3. The change during which power is lost may survive, wholly or in part, although its caller saw an error.
//! 4. What is written survives [`SimMedia::kill`], synced or not; only [`SimMedia::crash`] makes another [`Media::boot`].
//! 5. Handles from before a crash or a kill are dead: everything on them fails, as it would for a process that died.
//!
//! # Why so strict
//! Real file systems lose less than this. What survives here survives anywhere that keeps the two rules of
//! [`super`] about syncing.

mod image;
mod inode;
mod rng;
#[cfg(test)]
mod tests;
mod tree;
mod world;

use std::fmt;
use std::io;
use std::sync::Arc;

use self::world::World;
use super::{File, Media, Open, Space};
use crate::sync::Mutex;

/// An error that [`SimMedia::fail_after`] lets an I/O fail with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The device failed.
    Eio,
    /// There is no room.
    Enospc,
}

/// A simulated directory tree. Clones are the same tree; [`SimMedia::fork`] makes another one.
#[derive(Clone)]
pub struct SimMedia {
    world: Arc<Mutex<World>>,
}

impl fmt::Debug for SimMedia {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let world = self.world.lock();
        f.debug_struct("SimMedia").field("ios", &world.io_count()).field("down", &world.is_down()).finish()
    }
}

impl SimMedia {
    /// Makes an empty tree whose crashes are decided by `seed`.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self::of(World::new(seed))
    }

    fn of(world: World) -> Self {
        Self { world: Arc::new(Mutex::new(world)) }
    }

    /// Copies everything, volatile and durable, into a tree of its own with its own seed.
    ///
    /// Armed faults are not copied. Open handles stay with this tree. Pages are shared, so it costs little.
    #[must_use]
    pub fn fork(&self, seed: u64) -> Self {
        Self::of(self.world.lock().fork(seed))
    }

    /// Loses power, now at the latest, and comes up again with what survived, all of it durable.
    ///
    /// Handles opened before are dead. Armed faults are disarmed; lying syncs and the room stay as they were set.
    pub fn crash(&self) {
        self.world.lock().crash();
    }

    /// Ends every program that has something open, as a signal would, now or at the I/O that [`SimMedia::crash_after`] said:
    /// its handles are dead, and everything it has written is there, durable or not, but for what a failed sync has lost. Armed
    /// faults are disarmed.
    pub fn kill(&self) {
        self.world.lock().kill();
    }

    /// Loses power at the `n`-th counted I/O from now (1 is the next one, 0 is now): it and everything after it, reads
    /// too, fails with "power lost" until [`SimMedia::crash`].
    pub fn crash_after(&self, n: u64) {
        self.world.lock().crash_after(n);
    }

    /// Tells whether power is lost, so that an error comes from that.
    #[must_use]
    pub fn is_down(&self) -> bool {
        self.world.lock().is_down()
    }

    /// Lets the `n`-th counted I/O from now (1 is the next one) fail once, without effect.
    ///
    /// When that is a [`File::sync`], the changes it should have saved never reach the disk, although they can be read
    /// until the crash, and the next sync succeeds: Linux does the same. When it is a [`Media::sync_dir`], they stay
    /// pending.
    pub fn fail_after(&self, n: u64, fault: Fault) {
        self.world.lock().fail_after(n, fault);
    }

    /// Returns how many I/Os were counted: `write_at`, `sync`, `set_len`, `punch`, `sync_dir`, `make_dir`, `remove`,
    /// `rename` and the opening of new files, failed ones included.
    #[must_use]
    pub fn io_count(&self) -> u64 {
        self.world.lock().io_count()
    }

    /// Leaves room for `free` more bytes (whole pages of 4096), or a PiB in all for `None`.
    ///
    /// A write that needs more fails with ENOSPC, without effect. Punching, cutting and removing give room back.
    pub fn set_space(&self, free: Option<u64>) {
        self.world.lock().set_space(free);
    }

    /// Makes [`File::sync`] a lie for files opened by a path that contains `part`; "" stops the lying.
    ///
    /// For canaries: a crash test that does not notice is no test.
    pub fn set_ignore_sync(&self, part: &str) {
        self.world.lock().ignore_sync = Some(part.to_owned()).filter(|part| !part.is_empty());
    }

    /// Makes [`Media::sync_dir`] a lie for every directory, or stops that.
    pub fn set_ignore_sync_dir(&self, lie: bool) {
        self.world.lock().ignore_sync_dir = lie;
    }

    /// Turns over bit `bit` (0 to 7) of byte `byte`, on the disk and in what readers see.
    pub fn flip_bit(&self, path: &str, byte: u64, bit: u8) -> io::Result<()> {
        let mut world = self.world.lock();
        let inode = world.tree.file(path)?;
        if byte >= world.inode(inode).image().len() {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        world.damage(inode, |image| image.flip(byte, bit));
        Ok(())
    }

    /// Cuts or extends a file, on the disk and in what readers see.
    pub fn truncate(&self, path: &str, len: u64) -> io::Result<()> {
        let mut world = self.world.lock();
        let inode = world.tree.file(path)?;
        world.damage(inode, |image| image.set_len(len));
        Ok(())
    }

    /// Lists all files with their paths, sorted; also while power is lost.
    #[must_use]
    pub fn paths(&self) -> Vec<String> {
        self.world.lock().tree.files().into_iter().map(|(path, _)| path).collect()
    }
}

impl Media for SimMedia {
    fn open(&self, path: &str, how: Open) -> io::Result<Arc<dyn File>> {
        let mut world = self.world.lock();
        let inode = if how == Open::New {
            world.step(|world| world.add_file(path))?
        } else {
            world.alive()?;
            world.tree.file(path)?
        };
        Ok(Arc::new(SimFile {
            world: Arc::clone(&self.world),
            inode,
            generation: world.generation(),
            path: path.to_owned(),
            writable: how.writes(),
            _held: Arc::clone(&world.inode(inode).held),
        }))
    }

    fn make_dir(&self, path: &str) -> io::Result<()> {
        self.world.lock().step(|world| world.tree.add_dir(path))
    }

    fn remove(&self, path: &str) -> io::Result<()> {
        self.world.lock().step(|world| world.remove(path))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.world.lock().step(|world| world.rename(from, to))
    }

    fn list(&self, path: &str) -> io::Result<Vec<String>> {
        let world = self.world.lock();
        world.alive()?;
        world.tree.list(path)
    }

    fn sync_dir(&self, path: &str) -> io::Result<()> {
        self.world.lock().sync_dir(path)
    }

    fn space(&self) -> io::Result<Space> {
        let world = self.world.lock();
        world.alive()?;
        Ok(world.space())
    }

    fn boot(&self) -> io::Result<u128> {
        let world = self.world.lock();
        world.alive()?;
        Ok(world.boot())
    }
}

/// An open simulated file.
struct SimFile {
    world: Arc<Mutex<World>>,
    inode: u64,
    /// Of the world when it was opened.
    generation: u64,
    path: String,
    writable: bool,
    /// Keeps the inode after its last name is gone; see [`inode::Inode::held`].
    _held: Arc<()>,
}

impl fmt::Debug for SimFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SimFile").field("path", &self.path).field("inode", &self.inode).finish_non_exhaustive()
    }
}

impl SimFile {
    /// Locks the world for reading.
    fn see<T>(&self, look: impl FnOnce(&image::Image) -> T) -> io::Result<T> {
        let world = self.world.lock();
        world.fresh(self.generation)?;
        Ok(look(world.inode(self.inode).image()))
    }

    /// Does one counted change; `end` is where it ends in the file.
    fn change(&self, end: Option<u64>, op: impl FnOnce(&mut World) -> io::Result<()>) -> io::Result<()> {
        let mut world = self.world.lock();
        world.fresh(self.generation)?;
        if !self.writable {
            return Err(io::Error::from_raw_os_error(libc::EBADF));
        }
        // Offsets are signed 64-bit numbers to the kernel.
        if end.is_none_or(|end| i64::try_from(end).is_err()) {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        world.step(op)
    }
}

impl File for SimFile {
    fn identity(&self) -> io::Result<Option<(u64, u64)>> {
        Ok(Some((0, self.inode)))
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.see(|image| image.read(buf, offset))
    }

    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        self.change(offset.checked_add(data.len() as u64), |world| world.write(self.inode, data, offset))
    }

    fn sync(&self) -> io::Result<()> {
        let mut world = self.world.lock();
        world.fresh(self.generation)?;
        world.sync(self.inode, &self.path)
    }

    fn len(&self) -> io::Result<u64> {
        self.see(image::Image::len)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.change(Some(len), |world| {
            world.change(self.inode, |inode| inode.set_len(len));
            Ok(())
        })
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        self.change(offset.checked_add(len), |world| {
            if len > 0 {
                world.change(self.inode, |inode| inode.punch(offset, len));
            }
            Ok(())
        })
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<(u64, u64)>> {
        self.see(|image| image.next_data(offset))
    }

    fn allocated(&self) -> io::Result<u64> {
        self.see(|image| image.pages() * image::PAGE)
    }
}
