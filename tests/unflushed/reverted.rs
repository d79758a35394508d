//! A revert leaves a branch: what its log says of it is never done to the one that the disk is on then.

use std::sync::Arc;

use afterimage::disk::BlockDevice;
use afterimage::media::{Media, Open, SimMedia};
use afterimage::snapshot;
use afterimage::store::unflushed::{LOG_HEADER_LEN, LogRecord, MapChange, log_path};
use afterimage::store::{self, Store};
use afterimage::units::{DiskId, Epoch};

use super::{BLOCK, attach, attach_again, filled, open, options, read, simulated, write};

/// The snapshot to go back to; then changes of every kind that are not flushed.
fn change(store: &Arc<Store>) {
    let (disk, _lease) = attach(store, "vm");
    write(&disk, 2, 10, 20);
    disk.discard(0, 5 * BLOCK as u64).unwrap();
    write(&disk, 3, 60, 40);
    write(&disk, 4, 2, 1);
}

fn with_snapshot() -> (SimMedia, Arc<dyn Media>, Arc<Store>) {
    let (sim, media, store) = simulated(&["vm"]);
    let (disk, lease) = attach(&store, "vm");
    write(&disk, 1, 0, 50);
    disk.flush().unwrap();
    snapshot::take(&store, &[("vm".into(), "s".into())]).unwrap();
    drop((disk, lease));
    (sim, media, store)
}

fn reverted() -> Vec<u8> {
    [filled(1, 50), filled(0, 70)].concat()
}

fn changed() -> Vec<u8> {
    let mut bytes = reverted();
    for (byte, from, to) in [(2, 10, 30), (0, 0, 5), (3, 60, 100), (4, 2, 3)] {
        bytes[from * BLOCK..to * BLOCK].fill(byte);
    }
    bytes
}

#[test]
fn a_kill_at_any_io_of_a_revert_leaves_the_disk_before_it_or_after_it() {
    let (base, _, store) = with_snapshot();
    store.close().unwrap();
    let (mut before, mut after) = (0, 0);
    for n in 1.. {
        let sim = base.fork(n);
        let media: Arc<dyn Media> = Arc::new(sim.clone());
        let store = Store::open(Arc::clone(&media), options()).unwrap();
        change(&store);
        assert!(read(&store, "vm", 0, 120) == changed());
        sim.crash_after(n);
        let done = snapshot::revert(&store, "vm", "s", None).is_ok();
        let killed = sim.is_down();
        drop(store);
        sim.kill();
        let store = open(&media);
        let found = read(&store, "vm", 0, 120);
        assert!(found == reverted() || !done && found == changed(), "killed at {n}, done: {done}");
        *(if found == reverted() { &mut after } else { &mut before }) += 1;
        // Nothing of it is lost, whichever it is.
        attach_again(&store);
        if !killed {
            break;
        }
    }
    assert!(before > 3 && after > 0, "{before} before, {after} after");
}

/// Both files of the log as they are.
fn logs(media: &dyn Media) -> Vec<Vec<u8>> {
    let read = |which| {
        let file = media.open(&log_path(DiskId(1), which), Open::ReadOnly).unwrap();
        let mut bytes = vec![0; file.len().unwrap() as usize];
        file.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    };
    (0..2).map(read).collect()
}

/// Gives each record of a log another epoch.
fn in_epoch(log: &[u8], other: Epoch) -> Vec<u8> {
    let (header, records) = log.split_at(LOG_HEADER_LEN);
    let (records, error) = LogRecord::decode_all("log", records);
    assert!(error.is_none());
    let mut bytes = header.to_vec();
    for mut record in records {
        match &mut record.change {
            MapChange::Mapped { epoch, .. } | MapChange::Unmapped { epoch, .. } => *epoch = other,
            MapChange::Overwritten { .. } => {}
        }
        bytes.extend(record.encode());
    }
    bytes
}

/// Writes old records before the new ones, as if the host had lost that they were dropped.
fn put_back(media: &dyn Media, old: &[Vec<u8>], new: &[Vec<u8>], epoch: Option<Epoch>) {
    for (which, (old, new)) in old.iter().zip(new).enumerate() {
        let old = epoch.map_or_else(|| old.clone(), |epoch| in_epoch(old, epoch));
        let file = media.open(&log_path(DiskId(1), which), Open::Existing).unwrap();
        file.write_at(&[&old[..], &new[LOG_HEADER_LEN..]].concat(), 0).unwrap();
    }
}

/// A revert flushes, so there are no such records unless the host has lost that they were dropped. They may look older than the
/// branch that the disk is on, as they are, or younger.
#[test]
fn records_of_the_branch_that_a_revert_left_are_not_replayed() {
    for epoch in [None, Some(Epoch(1000))] {
        let (sim, media, store) = with_snapshot();
        change(&store);
        let old = logs(&*media);
        assert!(old.iter().any(|log| log.len() > LOG_HEADER_LEN), "there is something to be replayed");
        snapshot::revert(&store, "vm", "s", None).unwrap();
        let (disk, lease) = attach(&store, "vm");
        write(&disk, 9, 49, 1);
        let new = logs(&*media);
        drop((disk, lease, store));
        put_back(&*media, &old, &new, epoch);
        sim.kill();
        let store = open(&media);
        let mut now = reverted();
        now[49 * BLOCK..50 * BLOCK].fill(9);
        assert!(read(&store, "vm", 0, 120) == now, "{epoch:?}");
        assert_eq!(store.lost_changes(DiskId(1)), None, "{epoch:?}");
        attach_again(&store);
        store.reclaim_wait(&afterimage::progress::Silent).unwrap();
        assert!(read(&store, "vm", 0, 120) == now, "{epoch:?}");
        let report = store::check(&store, false, &afterimage::progress::Silent).unwrap();
        assert!(report.problems.is_empty(), "{:#?}", report.problems);
    }
}

#[test]
fn records_of_an_epoch_that_a_snapshot_has_ended_are_not_replayed() {
    let (sim, media, store) = with_snapshot();
    change(&store);
    let old = logs(&*media);
    snapshot::take(&store, &[("vm".into(), "t".into())]).unwrap();
    let (disk, lease) = attach(&store, "vm");
    write(&disk, 5, 0, 100);
    disk.flush().unwrap();
    write(&disk, 6, 99, 1);
    let new = logs(&*media);
    drop((disk, lease, store));
    put_back(&*media, &old, &new, None);
    sim.kill();
    let store = open(&media);
    assert!(read(&store, "vm", 0, 101) == [filled(5, 99), filled(6, 1), filled(0, 1)].concat());
    assert_eq!(store.lost_changes(DiskId(1)), None);
    attach_again(&store);
}
