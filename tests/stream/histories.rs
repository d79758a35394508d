//! Random histories of a disk, sent step by step between any two of its snapshots, with crashes of the receiver and cuts of
//! the stream.
//!
//! One failing seed is one command: `AFTERIMAGE_SEED=N cargo test stream::histories`.

use std::collections::BTreeMap;

use afterimage::disk::{self, BlockDevice};
use afterimage::snapshot;
use afterimage::stream;

use super::{Pool, noise, same};

const SIZE_MAX: u64 = 7 << 20;

struct Run {
    from: Pool,
    to: Pool,
    random: u64,
    images: BTreeMap<String, Vec<u8>>,
    /// What the copy has, oldest first.
    copied: Vec<String>,
    names: u64,
    crashes: u64,
    resumed: u64,
}

impl Run {
    fn next(&mut self, below: u64) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random >> 11) % below
    }

    fn change(&mut self) {
        let disk = disk::open(self.from.store(), "web").unwrap();
        let size = disk.size();
        let offset = self.next(size);
        let offset = if self.next(3) > 0 { offset / 4096 * 4096 } else { offset };
        let (pages, odd) = (1 + self.next(200), self.next(5000));
        let len = (4096 * pages + odd).min(size - offset);
        match self.next(10) {
            0..=4 => {
                let seed = self.next(1 << 40);
                let data = if self.next(2) == 0 { noise(seed, len as usize) } else { vec![seed as u8; len as usize] };
                disk.write(&data, offset).unwrap();
            }
            5 | 6 => disk.discard(offset, len).unwrap(),
            7 => disk.write_zeroes(offset, len).unwrap(),
            8 => disk.resize((1 + self.next(SIZE_MAX / 512)) * 512, true).unwrap(),
            _ => {
                let names: Vec<_> = self.images.keys().cloned().collect();
                if !names.is_empty() {
                    let name = names[self.next(names.len() as u64) as usize].clone();
                    snapshot::revert(self.from.store(), "web", &name, None).unwrap();
                }
            }
        }
    }

    fn take(&mut self) {
        self.names += 1;
        let name = format!("s{:03}", self.names);
        self.from.take("web", &name);
        self.images.insert(name.clone(), self.from.snapshot("web", &name));
    }

    /// Sends to any snapshot that the copy does not have, from what it has.
    fn send(&mut self) {
        let todo: Vec<_> = self.images.keys().filter(|name| !self.copied.contains(name)).cloned().collect();
        if todo.is_empty() {
            return;
        }
        let name = todo[self.next(todo.len() as u64) as usize].clone();
        let base = self.copied.last().map(|base| format!("web@{base}"));
        let mut bytes = self.from.send(base.as_deref(), &format!("web@{name}"));
        for _ in 0..6 {
            let fault = self.next(4);
            match fault {
                0 => self.to.media.crash_after(1 + self.random % 60),
                1 => bytes.truncate(self.next(bytes.len() as u64) as usize),
                _ => {}
            }
            let result = self.to.receive("copy", &bytes);
            self.crashes += u64::from(self.to.media.is_down());
            if fault == 0 {
                self.to.reopen();
            }
            self.to.check();
            let there = !self.to.store().disks().is_empty() && self.to.names("copy").contains(&name);
            if there {
                self.copied.push(name);
                return self.compare();
            }
            assert!(result.is_err(), "it was acknowledged and is not there");
            if !self.copied.is_empty() {
                self.compare();
            }
            bytes = match stream::token(self.to.store(), "copy") {
                Ok(token) if self.next(3) > 0 => {
                    self.resumed += 1;
                    self.from.resume(token).unwrap()
                }
                _ => self.from.send(base.as_deref(), &format!("web@{name}")),
            };
        }
        // Given up for another one.
        if self.next(2) == 0 && stream::token(self.to.store(), "copy").is_ok() {
            stream::abort(self.to.store(), "copy").unwrap();
        }
    }

    fn compare(&self) {
        assert_eq!(self.to.names("copy").len(), self.copied.len());
        for name in &self.copied {
            same(name, &self.to.snapshot("copy", name), &self.images[name]);
        }
        let last = self.copied.last().expect("there is one");
        same("live", &self.to.live("copy"), &self.images[last]);
    }
}

fn run(seed: u64) -> (u64, u64, usize) {
    let random = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let (from, to) = (Pool::new(seed), Pool::new(seed + 1000));
    disk::create(from.store(), "web", 4 << 20).unwrap();
    let mut run =
        Run { from, to, random, images: BTreeMap::new(), copied: Vec::new(), names: 0, crashes: 0, resumed: 0 };
    for _ in 0..24 {
        for _ in 0..run.next(8) {
            run.change();
        }
        run.take();
        if run.next(3) > 0 {
            run.send();
        }
        if run.next(4) == 0 {
            run.to.tidy();
            run.from.tidy();
            run.to.check();
        }
    }
    run.to.tidy();
    run.to.check();
    run.from.check();
    (run.crashes, run.resumed, run.copied.len())
}

#[test]
fn what_arrives_is_what_was_sent() {
    let seeds = match std::env::var("AFTERIMAGE_SEED") {
        Ok(seed) => vec![seed.parse().expect("a number")],
        Err(_) => {
            let count = std::env::var("AFTERIMAGE_SEEDS").map_or(8, |text| text.parse().expect("a number"));
            (1..=count).collect()
        }
    };
    let (mut crashes, mut resumed, mut received) = (0, 0, 0);
    for seed in seeds {
        let outcome = std::panic::catch_unwind(|| run(seed)).unwrap_or_else(|panic| {
            eprintln!("repeat it with: AFTERIMAGE_SEED={seed} cargo test stream::histories");
            std::panic::resume_unwind(panic)
        });
        (crashes, resumed, received) = (crashes + outcome.0, resumed + outcome.1, received + outcome.2);
    }
    println!("streams: {received} received, {crashes} crashes, {resumed} resumed");
}
