//! Writers of our own, which sync often and know the version of every block.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::thread::JoinHandle;

use super::{BLOCK, Load, Place, kill_under, kills};

const SECTOR: usize = 512;
/// Blocks of one writer.
const REGION: u64 = 512;
const WRITERS: u64 = 3;

/// What a writer knows of a block: the version that was synced last, and the last one it tried to write.
type Known = BTreeMap<u64, (u64, u64)>;

fn content(block: u64, version: u64) -> Vec<u8> {
    let mut bytes = vec![0; BLOCK];
    for (n, sector) in bytes.chunks_mut(SECTOR).enumerate() {
        sector[..8].copy_from_slice(&version.to_le_bytes());
        sector[8..16].copy_from_slice(&block.to_le_bytes());
        sector[16..].fill((version as u8) ^ (block as u8) ^ (n as u8));
    }
    bytes
}

/// Writes until the server is gone.
fn write(path: &Path, writer: u64, round: u64, mut known: Known) -> Known {
    let Ok(file) = OpenOptions::new().write(true).custom_flags(libc::O_CLOEXEC).open(path) else { return known };
    let mut random = round * 31 + writer + 1;
    let mut unsynced = Vec::new();
    for n in 1.. {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let block = writer * REGION + (random >> 33) % REGION;
        let entry = known.entry(block).or_default();
        entry.1 += 1;
        if file.write_all_at(&content(block, entry.1), block * BLOCK as u64).is_err() {
            return known;
        }
        unsynced.push(block);
        if n % (1 + (random >> 60)) == 0 {
            if file.sync_data().is_err() {
                return known;
            }
            for block in unsynced.drain(..) {
                let entry = known.get_mut(&block).unwrap();
                entry.0 = entry.1;
            }
        }
    }
    known
}

/// Compares every block, and takes what was found for what is known.
fn compare(file: &File, known: &mut Known) -> Result<(), String> {
    for (block, (synced, tried)) in known {
        let mut found = vec![0; BLOCK];
        file.read_exact_at(&mut found, *block * BLOCK as u64).unwrap();
        let mut newest = 0;
        for (n, sector) in found.chunks(SECTOR).enumerate() {
            let version = u64::from_le_bytes(sector[..8].try_into().unwrap());
            let whole = version == 0 && sector.iter().all(|byte| *byte == 0)
                || sector == &content(*block, version)[n * SECTOR..(n + 1) * SECTOR];
            if !whole {
                return Err(format!("block {block} sector {n} is torn"));
            }
            if !(*synced..=*tried).contains(&version) {
                return Err(format!("block {block} has version {version}, {synced} was synced and {tried} written"));
            }
            newest = newest.max(version);
        }
        (*synced, *tried) = (newest, newest);
    }
    Ok(())
}

struct Writers {
    known: Vec<Known>,
    running: Vec<JoinHandle<Known>>,
}

impl Load for Writers {
    fn begin(&mut self, place: &Place, round: u64) {
        let path = place.disk("vm");
        let known = self.known.drain(..).enumerate();
        let start = |(n, mine)| {
            let path = path.clone();
            std::thread::spawn(move || write(&path, n as u64, round, mine))
        };
        self.running = known.map(start).collect();
    }

    fn end(&mut self) {
        self.known = self.running.drain(..).map(|writer| writer.join().unwrap()).collect();
    }

    fn compare(&mut self, place: &Place, _: u64) -> Result<(), String> {
        let file = File::open(place.disk("vm")).unwrap();
        self.known.iter_mut().try_for_each(|known| compare(&file, known))
    }
}

#[test]
fn nothing_that_was_synced_is_lost() {
    let Some(place) = Place::new() else { return };
    let kills = kills(4);
    let server = place.serve();
    place.cli.json(&["create", "vm", "--size", "8M"]);
    let mut writers = Writers { known: (0..WRITERS).map(|_| Known::new()).collect(), running: Vec::new() };
    let server = kill_under(&place, server, "vm", &mut writers, kills);
    let blocks: usize = writers.known.iter().map(Known::len).sum();
    println!("{kills} kills, {blocks} blocks written");
    assert!(blocks > 0, "something was written");

    // A block that goes back to what it was, whole, is a loss.
    let (block, (synced, _)) = writers.known[0].iter().max_by_key(|(_, (synced, _))| *synced).unwrap();
    let file = OpenOptions::new().write(true).open(place.disk("vm")).unwrap();
    file.write_all_at(&content(*block, synced - 1), *block * BLOCK as u64).unwrap();
    drop(file);
    assert!(writers.compare(&place, kills).is_err_and(|lost| lost.contains("was synced")), "a loss is seen");
    server.stop();
    assert!(!place.check().contains("not closed in order"), "it was closed in order at last");
}
