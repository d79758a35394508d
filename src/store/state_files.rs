//! Keeps the seals of states (see [`super::state_file`]): one for every snapshot that can be read, and those they are
//! based on.
//!
//! # Rules
//! 1. A seal is based on the nearest ancestor that can be read and has a seal: the index then names every chunk that
//!    differs. Entries of a state that is gone may have been dropped, and with them the tombstones that nothing needs any
//!    more; so without such an ancestor a seal has no base and lists the whole map.
//! 2. Before the first block of a state is given up its seal is renamed to `.gone`, durably ([`Store::bury`]). A rebuild
//!    never takes it for a snapshot then.
//! 3. A seal that is gone stays while others are based on it. One with a single follower is merged into it while that is
//!    cheap: at most twice as long as the follower. So a chain of daily snapshots leaves few files behind, and what is
//!    written for it grows with the changes, not with the disk.
//! 4. All of this happens in turn with the work in the background.
//!
//! 5. A file that is damaged or lost is made again: by the next opening, which reads their beginnings, or by
//!    `check --repair`, which reads all of each.
//!
//! # After a crash
//! Which files there are is read off the directory. What is missing is written again, what nothing needs is removed.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};

use super::Store;
use super::state_file::{STATES_DIR, StateSeal, parse_name, state_path};
use super::states::{StateRow, Status};
use super::tables::{StateKey, Tables};
use super::tree::Stretch;
use crate::error::{Error, Kind, Result};
use crate::map::Entry;
use crate::media::{Media, Open};
use crate::sync::Mutex;
use crate::units::{ChunkIndex, Epoch};

/// A gone seal of so many bytes is always merged.
const SMALL: u64 = 64 << 10;

/// What is known of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Known {
    gone: bool,
    base: Option<Epoch>,
    len: u64,
}

/// The files there are.
#[derive(Debug, Default)]
pub(super) struct StateFiles {
    /// `None` until they were looked at.
    files: Mutex<Option<BTreeMap<Epoch, Known>>>,
    /// One more than the [`Tables::readable_news`] at which no state lacked its seal; 0 when that is not known.
    complete: AtomicU64,
}

/// Where a seal is to be based, and the stretches of epochs that lie between.
struct Place {
    base: Option<StateKey>,
    stretches: Vec<Stretch>,
}

fn listing(media: &dyn Media) -> Result<Vec<String>> {
    match media.list(STATES_DIR) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        other => other.map_err(|e| Error::io(format!("cannot list {STATES_DIR}"), e)),
    }
}

fn remove(media: &dyn Media, path: &str) -> Result<()> {
    match media.remove(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::io(format!("cannot remove {path}"), e)),
        _ => Ok(()),
    }
}

impl StateFiles {
    fn look(media: &dyn Media) -> Result<BTreeMap<Epoch, Known>> {
        let mut known = BTreeMap::new();
        for name in listing(media)? {
            let Some((epoch, gone)) = parse_name(&name) else {
                // What a crash left of a file that was being written.
                remove(media, &format!("{STATES_DIR}/{name}"))?;
                continue;
            };
            match StateSeal::open(media, epoch, gone) {
                Ok((seal, reader)) => {
                    known.insert(epoch, Known { gone, base: seal.base, len: reader.file_len() });
                }
                // Written again if it can be; the others stay for a rebuild to report.
                Err(error) if error.kind() == Kind::Corrupt => {
                    tracing::warn!("the seal of a state is damaged: {error}");
                }
                Err(error) => return Err(error),
            }
        }
        Ok(known)
    }

    /// Runs `with` on what is known, looking first if need be.
    fn with<T>(&self, media: &dyn Media, with: impl FnOnce(&mut BTreeMap<Epoch, Known>) -> T) -> Result<T> {
        let mut known = self.files.lock();
        if known.is_none() {
            *known = Some(Self::look(media)?);
        }
        Ok(with(known.as_mut().expect("looked above")))
    }
}

impl Tables {
    /// Finds where the seal of a state is to be based; `usable` tells which states have one that says what they are.
    fn place_of_seal(&self, node: StateKey, usable: impl Fn(StateKey) -> bool) -> Result<Place> {
        let mut stretches = Vec::new();
        let mut at = node;
        let mut base = None;
        loop {
            stretches.extend(self.stretches(at));
            let Some(parent) = self.parent(at) else { break };
            if usable(parent) {
                base = Some(parent);
                break;
            }
            at = parent;
        }
        // A branch that was cut loose on the way keeps copies, and what they replace is not in the index any more.
        let mut branch = node.0;
        while let Some(key) = base
            && branch != key.0
        {
            let row = self.branch(branch)?;
            if !row.inherits {
                base = None;
            }
            branch = row.parent.map_or(key.0, |parent| parent.0);
        }
        if base.is_none() {
            let path = self.lookup_path(node.0, node.1);
            stretches = path.into_iter().map(|(branch, upto)| Stretch { branch, after: Epoch(0), upto }).collect();
        }
        Ok(Place { base, stretches })
    }
}

impl Store {
    /// For a pool without a background: seals the states that have no seal while `goes_on`, and makes a backup of the
    /// catalog if one is due. What goes wrong is logged; the next who opens the pool tries again.
    pub fn prepare_for_the_worst(&self, goes_on: impl Fn() -> bool) {
        let _turn = self.tidying.lock();
        while goes_on() {
            match self.seal_one_state() {
                Ok(true) => {}
                Ok(false) => break,
                Err(error) => {
                    tracing::debug!("a state is sealed later: {error}");
                    break;
                }
            }
        }
        self.back_up_if_due();
    }

    /// Writes the seal of one state that has none. Returns false when every state has its seal.
    ///
    /// # Errors
    /// Any error of the host; `Corrupt` when rows are damaged.
    pub(super) fn seal_one_state(&self) -> Result<bool> {
        let missing = self.state_files.with(&*self.media, |known| {
            let tables = self.tables.read();
            let (news, complete) = (tables.readable_news() + 1, &self.state_files.complete);
            if complete.load(Ordering::Relaxed) == news {
                return None;
            }
            let open = tables.states().filter(|(key, row)| row.status.readable() && !known.contains_key(&key.1));
            // The oldest first, so that later ones can be based on it.
            let oldest = open.min_by_key(|(key, _)| key.1).map(|(key, row)| (key, row.clone()));
            complete.store(if oldest.is_none() { news } else { 0 }, Ordering::Relaxed);
            oldest
        })?;
        let Some((key, row)) = missing else { return Ok(false) };
        let known = self.write_state_seal(key, row)?;
        self.state_files.with(&*self.media, |files| files.insert(key.1, known))?;
        Ok(true)
    }

    /// Makes sure that the map of a state that can be read is sealed.
    ///
    /// # Errors
    /// As [`Store::seal_one_state`].
    pub(super) fn seal_map_of(&self, key: StateKey) -> Result<()> {
        loop {
            let readable = self.tables.read().state(key).is_some_and(|row| row.status.readable());
            if !readable || self.state_files.with(&*self.media, |known| known.contains_key(&key.1))? {
                return Ok(());
            }
            // Others may come first: later ones can be based on them.
            self.seal_one_state()?;
        }
    }

    /// Reads the seal of every state to its end; returns what is wrong, by epoch, and how many states wait for a first seal.
    /// That is no fault: a pool of an older version has none, and the next opening makes what a lost one held again.
    ///
    /// # Errors
    /// Any error of the host.
    pub(super) fn faulty_state_seals(&self) -> Result<(BTreeMap<Epoch, String>, usize)> {
        let _turn = self.tidying.lock();
        let mut faults = BTreeMap::new();
        let mut bases: BTreeMap<Epoch, Option<Epoch>> = BTreeMap::new();
        for (epoch, gone) in listing(&*self.media)?.iter().filter_map(|name| parse_name(name)) {
            let base = StateSeal::open(&*self.media, epoch, gone).and_then(|(seal, mut entries)| {
                entries.try_for_each(|entry| entry.map(drop))?;
                if seal.pool == self.uuid() { Ok(seal.base) } else { Err(Error::corrupt("it is of another pool")) }
            });
            match base {
                Ok(base) => drop(bases.insert(epoch, base)),
                Err(error) if matches!(error.kind(), Kind::Corrupt | Kind::Unsupported) => {
                    faults.insert(epoch, format!("the seal {} is damaged: {error}", state_path(epoch, gone)));
                }
                Err(error) => return Err(error),
            }
        }
        for (epoch, base) in bases.iter().filter_map(|(epoch, base)| Some((*epoch, (*base)?))) {
            if !bases.contains_key(&base) && !faults.contains_key(&base) {
                let what =
                    format!("the seal of epoch {epoch} says what differs from epoch {base}, whose seal is missing");
                faults.insert(epoch, what);
            }
        }
        let sealed: Vec<_> = {
            let tables = self.tables.read();
            tables.states().filter(|(_, row)| row.sealed && row.status.readable()).map(|(key, _)| key).collect()
        };
        let written = self.state_files.with(&*self.media, |known| known.keys().copied().collect::<BTreeSet<_>>())?;
        let absent = sealed.into_iter().filter(|key| !bases.contains_key(&key.1) && !faults.contains_key(&key.1));
        let (lost, waiting): (Vec<_>, Vec<_>) = absent.partition(|key| written.contains(&key.1));
        for key in lost {
            let path = state_path(key.1, false);
            faults.insert(
                key.1,
                format!("the seal {path} of {} is missing: a rebuild would lose it", self.describe(key)),
            );
        }
        Ok((faults, waiting.len()))
    }

    /// Makes seals of states again, and those that are based on what cannot be made again.
    ///
    /// # Errors
    /// Any error of the host; `Corrupt` when rows are damaged.
    pub(super) fn rewrite_state_seals(&self, mut faulty: BTreeSet<Epoch>) -> Result<()> {
        let _turn = self.tidying.lock();
        let known = self.state_files.with(&*self.media, |known| known.clone())?;
        let again: BTreeSet<Epoch> = {
            let tables = self.tables.read();
            tables.states().filter(|(_, row)| row.status.readable()).map(|(key, _)| key.1).collect()
        };
        // In the order of epochs: a base is older.
        for (epoch, file) in &known {
            if file.base.is_some_and(|base| faulty.contains(&base) && !again.contains(&base)) {
                faulty.insert(*epoch);
            }
        }
        for epoch in &faulty {
            remove(&*self.media, &state_path(*epoch, true))?;
            remove(&*self.media, &state_path(*epoch, false))?;
        }
        self.state_files.with(&*self.media, |known| {
            known.retain(|epoch, _| !faulty.contains(epoch));
            self.state_files.complete.store(0, Ordering::Relaxed);
        })?;
        while self.seal_one_state()? {}
        Ok(())
    }

    fn write_state_seal(&self, key: StateKey, row: StateRow) -> Result<Known> {
        let (place, seal) = self.state_files.with(&*self.media, |seals| -> Result<_> {
            let tables = self.tables.read();
            let usable = |node: StateKey| {
                seals.get(&node.1).is_some_and(|known| !known.gone)
                    && tables.state(node).is_some_and(|row| row.status.readable())
            };
            let place = tables.place_of_seal(key, usable)?;
            let disk = tables.disk(row.disk).ok();
            let mut branches = vec![(key.0, *tables.branch(key.0)?)];
            while let Some((parent, _)) = branches.last().and_then(|last| last.1.parent) {
                branches.push((parent, *tables.branch(parent)?));
            }
            let seal = StateSeal {
                pool: self.uuid(),
                branch: key.0,
                epoch: key.1,
                base: place.base.map(|base| base.1),
                disk_uuid: disk.map_or(uuid::Uuid::nil(), |disk| disk.uuid),
                disk_name: disk.map_or(String::new(), |disk| disk.name.clone()),
                row: StateRow { holds: Vec::new(), ..row },
                branches,
            };
            Ok((place, seal))
        })??;
        let chunks = self.indexed_chunks(&place.stretches)?;
        let entries = chunks.into_iter().map(|chunk| {
            if self.keeper.stopping() {
                return Err(Error::failed("the pool is being closed; the state is sealed after the next opening"));
            }
            Ok((chunk, self.resolve(key, chunk)?.entry))
        });
        // Without a base an empty entry hides nothing.
        let hides = seal.base.is_some();
        let entries = entries.filter(|entry| hides || !entry.as_ref().is_ok_and(|(_, entry)| entry.is_empty()));
        self.make_states_dir()?;
        let len = seal.write(&*self.media, false, entries)?;
        Ok(Known { gone: false, base: seal.base, len })
    }

    fn make_states_dir(&self) -> Result<()> {
        let fail = |e| Error::io(format!("cannot make {STATES_DIR}"), e);
        match self.media.make_dir(STATES_DIR) {
            Ok(()) => self.media.sync_dir("").map_err(fail),
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => Ok(()),
            Err(e) => Err(fail(e)),
        }
    }

    /// Makes sure that no rebuild takes a state for a snapshot whose blocks are about to be given up. Seals that can be
    /// based on it are written first, while they can.
    ///
    /// # Errors
    /// Any error of the host; nothing of the state may be freed then.
    pub(super) fn bury(&self, node: StateKey) -> Result<()> {
        loop {
            match self.seal_one_state() {
                Ok(true) => {}
                Ok(false) => break,
                // Deleting works on a full host; those seals are written later, and longer.
                Err(error) if error.kind() == Kind::NoSpace => break,
                Err(error) => return Err(error),
            }
        }
        // Never before the frame that deletes it: after a crash the state would be there, and its seal not.
        self.ledger.wait(self.ledger.latest())?;
        let there = self.state_files.with(&*self.media, |known| known.get(&node.1).is_some_and(|file| !file.gone))?;
        if there {
            self.mark_gone(node.1)?;
        }
        Ok(())
    }

    fn mark_gone(&self, epoch: Epoch) -> Result<()> {
        let (from, to) = (state_path(epoch, false), state_path(epoch, true));
        let fail = |e| Error::io(format!("cannot rename {from}"), e);
        match self.media.rename(&from, &to) {
            // Renamed by an earlier try, of which the sync failed.
            Err(e) if e.kind() == std::io::ErrorKind::NotFound && self.media.open(&to, Open::ReadOnly).is_ok() => {}
            other => other.map_err(fail)?,
        }
        self.media.sync_dir(STATES_DIR).map_err(fail)?;
        self.state_files.with(&*self.media, |known| known.get_mut(&epoch).into_iter().for_each(|file| file.gone = true))
    }

    /// Seals one state, or does away with one seal that is not needed any more. Returns whether there may be more.
    ///
    /// # Errors
    /// As [`Store::seal_one_state`].
    pub(super) fn tend_state_files(&self) -> Result<bool> {
        if self.seal_one_state()? || self.let_one_seal_go()? {
            return Ok(true);
        }
        // A state that left the tree is gone, whatever kept its seal from being renamed.
        let lost = self.state_files.with(&*self.media, |known| {
            let tables = self.tables.read();
            let there: BTreeSet<Epoch> =
                tables.states().filter(|(_, row)| row.status != Status::Ghost).map(|(key, _)| key.1).collect();
            known.iter().find(|(epoch, file)| !file.gone && !there.contains(*epoch)).map(|(epoch, _)| *epoch)
        })?;
        lost.map_or(Ok(false), |epoch| self.mark_gone(epoch).map(|()| true))
    }

    /// Does away with one seal that is gone, or merges it into its only follower. Returns false when there is none.
    fn let_one_seal_go(&self) -> Result<bool> {
        let next = self.state_files.with(&*self.media, |known| {
            let gone = known.iter().filter(|(_, file)| file.gone).map(|(epoch, _)| (*epoch, Vec::new()));
            let mut followers: BTreeMap<Epoch, Vec<Epoch>> = gone.collect();
            if followers.is_empty() {
                return None;
            }
            for (epoch, file) in &*known {
                if let Some(list) = file.base.and_then(|base| followers.get_mut(&base)) {
                    list.push(*epoch);
                }
            }
            followers.into_iter().find_map(|(epoch, list)| match list[..] {
                [] => Some((epoch, None)),
                [only] => {
                    let follower = known[&only];
                    (known[&epoch].len <= SMALL.max(2 * follower.len)).then_some((epoch, Some((only, follower))))
                }
                _ => None,
            })
        })?;
        let Some((epoch, follower)) = next else { return Ok(false) };
        if let Some((follower, known)) = follower {
            let merged = self.merge_seals(epoch, follower, known)?;
            self.state_files.with(&*self.media, |files| files.insert(follower, merged))?;
        }
        remove(&*self.media, &state_path(epoch, true))?;
        self.media.sync_dir(STATES_DIR).map_err(|e| Error::io(format!("cannot sync {STATES_DIR}"), e))?;
        self.state_files.with(&*self.media, |known| known.remove(&epoch))?;
        Ok(true)
    }

    /// Writes a seal anew, based on what its base was based on.
    fn merge_seals(&self, base: Epoch, follower: Epoch, known: Known) -> Result<Known> {
        let (below, below_entries) = StateSeal::open(&*self.media, base, true)?;
        let (seal, entries) = StateSeal::open(&*self.media, follower, known.gone)?;
        let seal = StateSeal { base: below.base, ..seal };
        let hides = seal.base.is_some();
        let merged = Merge { below: below_entries.peekable(), above: entries.peekable() };
        let entries = merged.filter(|entry| hides || !entry.as_ref().is_ok_and(|(_, entry)| entry.is_empty()));
        let len = seal.write(&*self.media, known.gone, entries)?;
        Ok(Known { gone: known.gone, base: seal.base, len })
    }
}

/// Two lists of entries as one: where both have a chunk, the one above holds.
struct Merge<I: Iterator<Item = Result<(ChunkIndex, Entry)>>> {
    below: std::iter::Peekable<I>,
    above: std::iter::Peekable<I>,
}

impl<I: Iterator<Item = Result<(ChunkIndex, Entry)>>> Iterator for Merge<I> {
    type Item = Result<(ChunkIndex, Entry)>;

    fn next(&mut self) -> Option<Self::Item> {
        match (self.below.peek(), self.above.peek()) {
            (Some(Ok((low, _))), Some(Ok((high, _)))) if low < high => self.below.next(),
            (Some(Ok((low, _))), Some(Ok((high, _)))) if low == high => {
                self.below.next();
                self.above.next()
            }
            (Some(Err(_)), _) | (Some(_), None) => self.below.next(),
            _ => self.above.next(),
        }
    }
}
