//! A server is killed, and its client is not: what was acknowledged to it is there when the next server opens the pool, or
//! its next flush says that it may not be.
//!
//! Over the simulator a kill can come at any I/O, and a loss of power instead of it; over the host it is a process that is
//! forgotten.

mod earlier;
mod reverted;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use afterimage::disk::{self, BlockDevice, Disk, Lease};
use afterimage::error::Kind;
use afterimage::media::sim::Fault;
use afterimage::media::{HostMedia, Media, Open, SimMedia};
use afterimage::progress::Silent;
use afterimage::snapshot;
use afterimage::store::unflushed::{LOG_HEADER_LEN, LONG, LogHeader, LogRecord, log_path};
use afterimage::store::{self, InitOptions, OpenOptions, Store};

const BLOCK: usize = 4096;
const SIZE: u64 = 8 << 20;
const GUEST: &str = "guest";

fn options() -> OpenOptions {
    OpenOptions { background: false, low_water: Some(0), ballast: 4096, ..OpenOptions::default() }
}

fn open(media: &Arc<dyn Media>) -> Arc<Store> {
    let store = Store::open(Arc::clone(media), options()).unwrap();
    let report = store::check(&store, false, &Silent).unwrap();
    assert!(report.problems.is_empty(), "{:#?}", report.problems);
    store
}

fn init(media: &Arc<dyn Media>, disks: &[&str]) -> Arc<Store> {
    Store::init(media, InitOptions { journal: 1 << 20, ballast: 4096, probe: false }).unwrap();
    let store = open(media);
    for name in disks {
        disk::create(&store, name, SIZE).unwrap();
    }
    store
}

fn simulated(disks: &[&str]) -> (SimMedia, Arc<dyn Media>, Arc<Store>) {
    let sim = SimMedia::new(7);
    let media: Arc<dyn Media> = Arc::new(sim.clone());
    let store = init(&media, disks);
    (sim, media, store)
}

fn attach(store: &Arc<Store>, name: &str) -> (Arc<Disk>, Lease) {
    let disk = disk::open(store, name).unwrap();
    let lease = disk.lease(GUEST).unwrap();
    (disk, lease)
}

fn come_back(store: &Arc<Store>, name: &str) -> (Arc<Disk>, Lease) {
    disk::open(store, name).unwrap().reserve(GUEST, Duration::from_secs(60));
    attach(store, name)
}

fn filled(byte: u8, blocks: usize) -> Vec<u8> {
    vec![byte; blocks * BLOCK]
}

fn read(store: &Arc<Store>, name: &str, block: usize, blocks: usize) -> Vec<u8> {
    let mut buf = filled(0xee, blocks);
    disk::open(store, name).unwrap().read(&mut buf, (block * BLOCK) as u64).unwrap();
    buf
}

fn write(disk: &Disk, byte: u8, block: usize, blocks: usize) {
    disk.write(&filled(byte, blocks), (block * BLOCK) as u64).unwrap();
}

/// Runs it over the host's files and over simulated ones; `kill` makes the next process's media.
fn both(run: impl Fn(&Arc<dyn Media>, &dyn Fn() -> Arc<dyn Media>)) {
    let dir = tempfile::tempdir().unwrap();
    let host = |path: &Path| -> Arc<dyn Media> { Arc::new(HostMedia::new(path).unwrap()) };
    run(&host(dir.path()), &|| host(dir.path()));
    let sim = SimMedia::new(3);
    let shared: Arc<dyn Media> = Arc::new(sim.clone());
    run(&shared, &|| {
        sim.kill();
        Arc::clone(&shared)
    });
}

#[test]
fn what_was_acknowledged_survives_a_kill() {
    both(|media, kill| {
        let store = init(media, &["vm"]);
        let (disk, _lease) = attach(&store, "vm");
        write(&disk, 1, 0, 600);
        disk.flush().unwrap();
        snapshot::take(&store, &[("vm".into(), "old".into())]).unwrap();
        write(&disk, 2, 10, 700);
        disk.write(b"part", 5 * BLOCK as u64 + 9).unwrap();
        disk.discard(20 * BLOCK as u64, 30 * BLOCK as u64).unwrap();
        write(&disk, 3, 40, 2);
        write(&disk, 4, 41, 1);
        let now = read(&store, "vm", 0, 800);

        let store = open(&kill());
        assert!(read(&store, "vm", 0, 800) == now);
        assert_eq!(&now[5 * BLOCK + 9..5 * BLOCK + 13], b"part");
        assert_eq!((now[40 * BLOCK], now[41 * BLOCK], now[30 * BLOCK]), (3, 4, 0));
        let (disk, _lease) = come_back(&store, "vm");
        disk.flush().unwrap();
        store.reclaim_wait(&Silent).unwrap();
        let store = open(&kill());
        assert!(read(&store, "vm", 0, 800) == now, "and what replaced nothing is still there after the sweep");
        store.close().unwrap();
    });
}

#[test]
fn each_disk_has_a_log_of_its_own() {
    both(|media, kill| {
        let store = init(media, &["a", "b", "c"]);
        let (a, _a) = attach(&store, "a");
        let (b, _b) = attach(&store, "b");
        write(&a, 1, 0, 3);
        write(&b, 2, 0, 3);
        a.flush().unwrap();
        write(&a, 3, 1, 1);
        let store = open(&kill());
        assert_eq!(read(&store, "a", 0, 3), [filled(1, 1), filled(3, 1), filled(1, 1)].concat());
        assert_eq!(read(&store, "b", 0, 3), filled(2, 3));
        assert_eq!(read(&store, "c", 0, 3), filled(0, 3));
    });
}

#[test]
fn a_snapshot_between_has_what_came_before_it() {
    both(|media, kill| {
        let store = init(media, &["vm"]);
        let (disk, _lease) = attach(&store, "vm");
        for (n, name) in [(1, "one"), (2, "two")] {
            write(&disk, n, 0, 4);
            write(&disk, n + 10, 2, 1);
            snapshot::take(&store, &[("vm".into(), name.into())]).unwrap();
        }
        write(&disk, 3, 3, 2);
        let store = open(&kill());
        let of = |n: u8| [filled(n, 2), filled(n + 10, 1), filled(n, 1)].concat();
        for (n, name) in [(1, "one"), (2, "two")] {
            let mut buf = filled(0, 4);
            snapshot::open(&store, "vm", name).unwrap().read(&mut buf, 0).unwrap();
            assert!(buf == of(n), "{name}");
        }
        assert_eq!(read(&store, "vm", 0, 5), [filled(2, 2), filled(12, 1), filled(3, 2)].concat());
        // Nothing of it is replayed after a revert.
        let (disk, lease) = come_back(&store, "vm");
        write(&disk, 9, 0, 4);
        drop(lease);
        snapshot::revert(&store, "vm", "one", None).unwrap();
        let store = open(&kill());
        assert!(read(&store, "vm", 0, 4) == of(1));
    });
}

/// The journal has a copy of what was flushed first, and an opening writes such copies to their places.
#[test]
fn an_old_copy_in_the_journal_does_not_undo_an_overwrite() {
    both(|media, kill| {
        let store = init(media, &["vm"]);
        let (disk, _lease) = attach(&store, "vm");
        write(&disk, 1, 7, 2);
        disk.flush().unwrap();
        write(&disk, 2, 7, 1);
        let store = open(&kill());
        assert_eq!(read(&store, "vm", 7, 2), [filled(2, 1), filled(1, 1)].concat());
    });
}

#[test]
fn a_restart_of_the_host_is_known_where_a_log_of_the_last_opening_tells_of_it() {
    let (sim, media, store) = simulated(&["vm"]);
    let (disk, lease) = attach(&store, "vm");
    drop((disk, lease, store));
    sim.kill();
    let store = open(&media);
    assert!(!store.restarted(), "only the process was");
    let (disk, lease) = attach(&store, "vm");
    let header = |which| {
        let mut bytes = vec![0; LOG_HEADER_LEN];
        let file = media.open(&log_path(disk.id(), which), Open::Existing).unwrap();
        file.read_exact_at(&mut bytes, 0).unwrap();
        (file, LogHeader::decode("log", &bytes).unwrap())
    };
    for which in 0..2 {
        let (file, mut header) = header(which);
        header.boot = uuid::Uuid::from_u128(77);
        // Left by an older opening, it says nothing.
        header.opening -= u64::from(which == 0);
        file.write_at(&header.encode(), 0).unwrap();
    }
    drop((disk, lease, store));
    let stale = sim.fork(1);
    stale.kill();
    media.remove(&log_path(afterimage::units::DiskId(1), 1)).ok();
    sim.kill();
    assert!(!open(&media).restarted());
    assert!(open(&(Arc::new(stale) as Arc<dyn Media>)).restarted());
}

#[test]
fn what_the_mount_had_not_synced_is_flushed_before_another_one_writes() {
    both(|media, kill| {
        let store = init(media, &["vm"]);
        let mount = disk::open(&store, "vm").unwrap();
        let lease = mount.lease(disk::MOUNT).unwrap();
        write(&mount, 1, 0, 40);
        drop(lease);
        let (disk, _lease) = attach(&store, "vm");
        // In place: there is no record of it.
        write(&disk, 2, 3, 1);
        let store = open(&kill());
        assert_eq!(read(&store, "vm", 2, 3), [filled(1, 1), filled(2, 1), filled(1, 1)].concat());
    });
}

#[test]
fn the_mount_writes_no_log() {
    let (_, media, store) = simulated(&["vm"]);
    let mount = disk::open(&store, "vm").unwrap();
    let _lease = mount.lease(disk::MOUNT).unwrap();
    write(&mount, 1, 0, 40);
    mount.flush().unwrap();
    assert_eq!(media.list("unflushed").unwrap_err().kind(), std::io::ErrorKind::NotFound);
}

/// Writes, flushes and a snapshot; returns how many of the steps were acknowledged.
fn history(store: &Arc<Store>) -> usize {
    let run = || -> Result<(), usize> {
        let disk = disk::open(store, "vm").map_err(|_| 0usize)?;
        let _lease = disk.lease(GUEST).map_err(|_| 0usize)?;
        for step in 1..=STEPS {
            let at = |block: usize| (block * BLOCK) as u64;
            let done = match step {
                5 | 9 => disk.flush(),
                7 => snapshot::take(store, &[("vm".into(), format!("s{step}"))]).map(drop),
                8 | 12 => disk.discard(at(4), at(6)),
                _ => disk.write(&filled(step as u8, 5 + step * 3), at(step % 4)),
            };
            done.map_err(|_| step - 1)?;
        }
        Ok(())
    };
    run().err().unwrap_or(STEPS)
}

const STEPS: usize = 13;

/// What is there after so many steps of [`history`].
fn twin(steps: usize) -> Vec<u8> {
    let mut bytes = filled(0, 64);
    for step in 1..=steps {
        let (from, len, byte) = match step {
            5 | 9 | 7 => continue,
            8 | 12 => (4, 6, 0),
            _ => (step % 4, 5 + step * 3, step as u8),
        };
        bytes[from * BLOCK..(from + len) * BLOCK].fill(byte);
    }
    bytes
}

/// Every block is as after the steps that were acknowledged, or as after the one that was under way.
fn explains(found: &[u8], steps: usize) -> bool {
    let (before, after) = (twin(steps), twin((steps + 1).min(STEPS)));
    let blocks = found.chunks(BLOCK).zip(before.chunks(BLOCK)).zip(after.chunks(BLOCK));
    blocks.into_iter().all(|((found, before), after)| found == before || found == after)
}

#[test]
fn a_kill_at_any_io_loses_nothing() {
    let (base, _, store) = simulated(&["vm"]);
    store.close().unwrap();
    let mut kills = 0;
    for n in 1.. {
        let sim = base.fork(n);
        let media: Arc<dyn Media> = Arc::new(sim.clone());
        let store = Store::open(Arc::clone(&media), options()).unwrap();
        sim.crash_after(n);
        let steps = history(&store);
        let killed = sim.is_down();
        drop(store);
        // And again while it recovers: at some I/O that depends on the first.
        sim.kill();
        sim.crash_after(1 + n % 29);
        let again = Store::open(Arc::clone(&media), options()).is_err();
        sim.kill();
        let store = open(&media);
        let found = read(&store, "vm", 0, 64);
        assert!(explains(&found, steps), "killed at {n}, again {again}, {steps} steps were acknowledged");
        store.reclaim_wait(&Silent).unwrap();
        assert!(read(&store, "vm", 0, 64) == found);
        let report = store::check(&store, false, &Silent).unwrap();
        assert!(report.problems.is_empty(), "{:#?}", report.problems);
        if !killed {
            break;
        }
        kills += 1;
    }
    assert!(kills > 40, "{kills} kills");
}

/// The proof that the test above can fail.
#[test]
fn without_the_log_a_kill_loses_acknowledged_writes() {
    let (sim, media, store) = simulated(&["vm"]);
    assert_eq!(history(&store), STEPS);
    drop(store);
    sim.kill();
    for which in 0..2 {
        media.remove(&log_path(afterimage::units::DiskId(1), which)).unwrap();
    }
    assert!(!explains(&read(&open(&media), "vm", 0, 64), STEPS));
}

fn loss_is_told_once(store: &Arc<Store>) {
    let (disk, lease) = come_back(store, "vm");
    write(&disk, 8, 100, 1);
    let error = disk.flush().unwrap_err();
    assert_eq!(error.kind(), Kind::Io);
    assert!(error.message().contains("acknowledged and not flushed were lost"), "{error}");
    disk.flush().unwrap();
    drop(lease);
}

#[test]
fn after_a_loss_of_power_who_comes_back_is_told_once() {
    let (sim, media, store) = simulated(&["vm"]);
    let (disk, _lease) = attach(&store, "vm");
    write(&disk, 1, 0, 40);
    disk.flush().unwrap();
    snapshot::take(&store, &[("vm".into(), "s".into())]).unwrap();
    write(&disk, 2, 0, 40);
    drop((disk, _lease, store));
    sim.crash();
    let store = open(&media);
    assert_eq!(read(&store, "vm", 0, 40), filled(1, 40), "the log is not trusted, whatever is left of it");
    // One that is fresh has nothing to be told.
    let fresh = disk::open(&store, "vm").unwrap();
    let lease = fresh.lease("other").unwrap();
    fresh.flush().unwrap();
    drop(lease);
    loss_is_told_once(&store);
    assert_eq!(read(&store, "vm", 100, 1), filled(8, 1));
}

#[test]
fn who_was_not_told_before_the_next_kill_is_told_after_it() {
    let (sim, media, store) = simulated(&["vm"]);
    let (disk, lease) = attach(&store, "vm");
    write(&disk, 1, 0, 40);
    drop((disk, lease, store));
    sim.crash();
    let store = open(&media);
    let (disk, lease) = come_back(&store, "vm");
    write(&disk, 2, 0, 40);
    drop((disk, lease, store));
    sim.kill();
    let store = open(&media);
    assert_eq!(read(&store, "vm", 0, 40), filled(2, 40), "it was flushed, one by one");
    loss_is_told_once(&store);
    write(&disk::open(&store, "vm").unwrap(), 3, 0, 1);
    drop(store);
    sim.kill();
    let store = open(&media);
    let (disk, _lease) = come_back(&store, "vm");
    disk.flush().expect("nothing was lost this time");
}

/// The log of another writer, that came while who had lost something was away, made the next process believe that nothing
/// had been lost.
#[test]
fn who_left_before_it_was_told_is_told_after_another_one_wrote_and_the_next_kill() {
    for comes in [true, false] {
        let (sim, media, store) = simulated(&["vm"]);
        let (disk, lease) = attach(&store, "vm");
        write(&disk, 1, 0, 40);
        drop((disk, lease, store));
        sim.crash();
        let store = open(&media);
        if comes {
            drop(come_back(&store, "vm"));
        } else {
            // It is awaited, and its time is over.
            disk::open(&store, "vm").unwrap().reserve(GUEST, Duration::ZERO);
        }
        let other = disk::open(&store, "vm").unwrap();
        let lease = other.lease("other").unwrap();
        write(&other, 2, 0, 40);
        other.flush().expect("it has lost nothing");
        write(&other, 3, 0, 20);
        drop((other, lease, store));
        sim.kill();
        let store = open(&media);
        let now = [filled(3, 20), filled(2, 20)].concat();
        assert_eq!(read(&store, "vm", 0, 40), now, "what the other one wrote is there");
        loss_is_told_once(&store);
    }
}

#[test]
fn who_was_awaited_and_had_not_come_has_lost_nothing_in_a_second_kill() {
    let (sim, media, store) = simulated(&["vm"]);
    let (disk, lease) = attach(&store, "vm");
    write(&disk, 1, 0, 40);
    drop((disk, lease, store));
    sim.kill();
    let store = open(&media);
    disk::open(&store, "vm").unwrap().reserve(GUEST, Duration::from_secs(60));
    drop(store);
    sim.kill();
    let store = open(&media);
    let (disk, _lease) = come_back(&store, "vm");
    disk.flush().unwrap();
    assert_eq!(read(&store, "vm", 0, 40), filled(1, 40));
}

#[test]
fn a_log_that_is_cut_or_damaged_anywhere_is_replayed_up_to_there() {
    let (sim, _, store) = simulated(&["vm"]);
    let (disk, lease) = attach(&store, "vm");
    let mut ends = vec![LOG_HEADER_LEN as u64];
    let path = log_path(disk.id(), 0);
    let file = |media: &SimMedia| media.open(&path, Open::ReadOnly).unwrap().len().unwrap();
    for n in 1..=4 {
        write(&disk, n, usize::from(n) * 2, 2);
        ends.push(file(&sim));
    }
    disk.discard(4 * BLOCK as u64, 2 * BLOCK as u64).unwrap();
    ends.push(file(&sim));
    drop((disk, lease, store));
    sim.kill();
    let len = *ends.last().unwrap();
    let states: Vec<Vec<u8>> = (0..ends.len())
        .map(|records| {
            let mut bytes = filled(0, 12);
            for n in 1..=records.min(4) {
                bytes[n * 2 * BLOCK..(n * 2 + 2) * BLOCK].fill(n as u8);
            }
            if records == 5 {
                bytes[4 * BLOCK..6 * BLOCK].fill(0);
            }
            bytes
        })
        .collect();
    let compare = |sim: &SimMedia, what: String, records: Option<usize>, whole: bool| {
        let media: Arc<dyn Media> = Arc::new(sim.clone());
        let store = open(&media);
        let found = read(&store, "vm", 0, 12);
        assert!(records.map_or(states.contains(&found), |n| found == states[n]), "{what}");
        if whole {
            attach_again(&store);
        } else {
            loss_is_told_once(&store);
        }
    };
    for cut in 0..=len {
        let sim = sim.fork(cut);
        sim.truncate(&path, cut).unwrap();
        let records = ends.iter().filter(|end| **end <= cut).count().saturating_sub(1);
        compare(&sim, format!("cut at {cut}"), Some(records), ends.contains(&cut));
    }
    for byte in 0..len {
        let sim = sim.fork(byte);
        sim.flip_bit(&path, byte, (byte % 8) as u8).unwrap();
        let records = ends.iter().filter(|end| **end <= byte).count().saturating_sub(1);
        compare(&sim, format!("flipped at {byte}"), Some(records), false);
    }
}

fn attach_again(store: &Arc<Store>) {
    let (disk, _lease) = come_back(store, "vm");
    disk.flush().unwrap();
}

#[test]
fn without_room_for_the_log_writes_are_durable_when_they_are_answered() {
    for fault in [Fault::Enospc, Fault::Eio] {
        let (sim, media, store) = simulated(&["vm"]);
        let (disk, _lease) = attach(&store, "vm");
        write(&disk, 1, 0, 40);
        disk.flush().unwrap();
        snapshot::take(&store, &[("vm".into(), "s".into())]).unwrap();
        write(&disk, 2, 30, 10);
        // Its data, then its record.
        sim.fail_after(2, fault);
        write(&disk, 3, 0, 20);
        let log = |n| media.open(&log_path(disk.id(), n), Open::ReadOnly).unwrap().len().unwrap();
        assert_eq!((log(0), log(1)), (LOG_HEADER_LEN as u64, LOG_HEADER_LEN as u64), "it was flushed");
        write(&disk, 4, 20, 5);
        let fork = sim.fork(9);
        fork.crash();
        let after_power_loss: Arc<dyn Media> = Arc::new(fork);
        assert_eq!(read(&open(&after_power_loss), "vm", 0, 20), filled(3, 20));
        drop((disk, _lease, store));
        sim.kill();
        assert_eq!(
            read(&open(&media), "vm", 0, 40),
            [filled(3, 20), filled(4, 5), filled(1, 5), filled(2, 10)].concat()
        );
    }
}

#[test]
fn a_long_log_is_flushed() {
    let media: Arc<dyn Media> = Arc::new(SimMedia::new(7));
    Store::init(&media, InitOptions { probe: false, ..InitOptions::default() }).unwrap();
    let store = open(&media);
    disk::create(&store, "vm", SIZE).unwrap();
    let (disk, _lease) = attach(&store, "vm");
    let path = |n| log_path(disk.id(), n);
    let len = |n| media.open(&path(n), Open::ReadOnly).unwrap().len().unwrap();
    let mut longest = 0;
    let mut flushed = false;
    for n in 0..2 * LONG / 40 {
        if n % 2 == 0 {
            write(&disk, 1, 5, 1);
        } else {
            disk.discard(5 * BLOCK as u64, BLOCK as u64).unwrap();
        }
        let now = len(0).max(len(1));
        flushed |= now < longest;
        longest = longest.max(now);
        if flushed {
            break;
        }
    }
    assert!(flushed && longest < LONG + 1000, "{longest}");
}

/// Two files may have records of the same block: of the later one the number is higher.
#[test]
fn records_tell_how_many_flushes_came_before_them() {
    let (_, media, store) = simulated(&["vm"]);
    let (disk, _lease) = attach(&store, "vm");
    let newest = || {
        let each = (0..2).flat_map(|which| {
            let file = media.open(&log_path(disk.id(), which), Open::ReadOnly).unwrap();
            let mut bytes = vec![0; file.len().unwrap() as usize];
            file.read_exact_at(&mut bytes, 0).unwrap();
            LogRecord::decode_all("log", &bytes[LOG_HEADER_LEN..]).0
        });
        each.map(|record| record.generation).max()
    };
    let mut last = None;
    for block in 0..5 {
        write(&disk, 1, block * 50, 40);
        let now = newest();
        assert!(now > last, "{now:?} after {last:?}");
        last = now;
        disk.flush().unwrap();
    }
}

#[test]
fn nothing_is_left_of_the_log_after_a_close() {
    let (_, media, store) = simulated(&["vm"]);
    let (disk, lease) = attach(&store, "vm");
    write(&disk, 1, 0, 40);
    drop((disk, lease));
    assert_eq!(media.list("unflushed").unwrap().len(), 2);
    store.close().unwrap();
    assert_eq!(media.list("unflushed").unwrap(), [""; 0]);
    let store = open(&media);
    let (disk, _lease) = come_back(&store, "vm");
    disk.flush().unwrap();
}
