//! A host that is full for long: what fails is followed by more, without a recovery in between, until there is room again.
//!
//! # Rules
//! 1. An operation on data that finds no room has changed what it was to change, in part or not at all, and the program runs
//!    on. What was flushed before it stays; a flush that is answered with success later holds all of it.
//! 2. An operation on names that finds no room ends it: whether it happened is seen after a recovery.
//! 3. With room again everything works, without another opening.

use afterimage::disk::{self, BlockDevice};
use afterimage::error::Kind;

use super::run::{Run, read_all};
use super::twin::{End, Twin};

impl Run {
    /// Takes the room away for some operations.
    pub(super) fn run_full(&mut self) {
        let pages = self.next(4);
        self.say(|| format!("the host runs full but for {pages} pages"));
        self.media.set_space(Some(pages * 4096));
        self.full = true;
        self.counts.full += 1;
        if self.chance(70) {
            self.fill_journal();
        }
        for _ in 0..20 + self.next(140) {
            match self.next(20) {
                0..=4 => self.write(),
                5..=9 => self.unmap(),
                10..=14 => self.flush(),
                15..=16 => self.tidy(),
                17 => self.read(),
                18 => self.rename(),
                _ if self.chance(30) => self.remove_snapshot(),
                _ if self.chance(30) => self.retire(),
                _ => self.fold(),
            }
            if !self.full {
                return;
            }
        }
        self.give_room();
        // What could not be made durable can be now, without another opening.
        for name in self.twin.disks.keys().cloned().collect::<Vec<_>>() {
            self.flush_of(&name);
        }
        if self.chance(60) {
            self.end_at_once();
        }
    }

    /// Commits, of what the twin does not know of, until the journal has no room and no fold can give it any. A flush that
    /// has something to say fails then.
    fn fill_journal(&mut self) {
        let Some(name) = self.any_disk() else { return };
        let store = self.store();
        let full = (0..400).any(|_| disk::set(store, &name, "quota", "none").is_err());
        self.counts.journals += u64::from(full && !self.media.is_down());
    }

    /// Gives the room back.
    pub(super) fn give_room(&mut self) {
        if std::mem::take(&mut self.full) {
            self.say(|| "there is room again".into());
            self.media.set_space(None);
        }
    }

    /// An operation found no room, and the program runs on if it was one on data. Returns whether it does.
    pub(super) fn goes_on_full(&mut self, after: &Twin, kind: Kind) -> bool {
        let names = |twin: &Twin| -> Vec<_> {
            let disks = twin.disks.iter();
            disks.map(|(name, disk)| (name.clone(), disk.snapshots.len(), disk.retired.len())).collect()
        };
        if !self.full || kind != Kind::NoSpace || names(after) != names(&self.twin) {
            return false;
        }
        self.counts.found_full += 1;
        let twin = self.twin.clone();
        self.compare(&twin, End::Power).unwrap_or_else(|why| panic!("after a failure for want of room: {why}"));
        for (name, twin) in &mut self.twin.disks {
            let found = read_all(&*disk::open(self.store.as_ref().expect("open"), name).unwrap());
            twin.live = twin.live.found_meanwhile(found);
        }
        true
    }

    fn flush_of(&mut self, name: &str) {
        let mut after = self.twin.clone();
        // One that an ended operation has taken away.
        let Some(disk) = after.disks.get_mut(name) else { return };
        disk.live.flush();
        let mut told = false;
        let done = self.attempt(&format!("flush {name}"), after, |store| match disk::open(store, name)?.flush() {
            Err(error) if error.message().contains("acknowledged and not flushed were lost") => {
                told = true;
                // It was flushed all the same.
                Ok(())
            }
            flushed => flushed,
        });
        if done {
            self.hear(name, told);
        }
    }

    pub(super) fn flush(&mut self) {
        let Some(name) = self.any_disk() else { return };
        self.flush_of(&name);
    }
}
