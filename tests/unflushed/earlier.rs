//! What an earlier process has written and not synced, without a record of it: a flush and a snapshot of the next process
//! hold for it as well.

use std::sync::Arc;

use afterimage::disk::{self, BlockDevice};
use afterimage::error::Kind;
use afterimage::media::Media;
use afterimage::media::sim::Fault;
use afterimage::snapshot;

use super::{BLOCK, attach, come_back, filled, loss_is_told_once, open, read, simulated, write};

/// Of what is overwritten in its place there is no record; the next process has to sync it all the same.
#[test]
fn a_flush_after_a_kill_holds_for_what_the_killed_process_overwrote_in_place() {
    for blocks in [1, 40] {
        let (sim, media, store) = simulated(&["vm"]);
        let (disk, lease) = attach(&store, "vm");
        write(&disk, 1, 0, 100);
        disk.flush().unwrap();
        write(&disk, 2, 10, blocks);
        drop((disk, lease, store));
        sim.kill();
        let store = open(&media);
        let (disk, lease) = come_back(&store, "vm");
        disk.flush().unwrap();
        drop((disk, lease, store));
        for seed in 0..20 {
            let fork = sim.fork(seed);
            fork.crash();
            let media: Arc<dyn Media> = Arc::new(fork);
            assert!(read(&open(&media), "vm", 10, blocks) == filled(2, blocks), "{blocks} blocks, seed {seed}");
        }
    }
}

/// The next process reads from the disk what a failed sync has lost, whatever the cache had.
#[test]
fn after_a_failed_sync_who_comes_back_to_the_next_process_is_told() {
    for overwrites in [false, true] {
        let (sim, media, store) = simulated(&["vm"]);
        let (disk, lease) = attach(&store, "vm");
        write(&disk, 1, 0, 100);
        disk.flush().unwrap();
        write(&disk, 2, if overwrites { 10 } else { 200 }, 40);
        sim.fail_after(1, Fault::Eio);
        // As in the background: nobody is told.
        store.flush_all().unwrap_err();
        drop((disk, lease, store));
        sim.kill();
        let store = open(&media);
        let then = read(&store, "vm", 0, 300);
        loss_is_told_once(&store);
        drop(store);
        sim.crash();
        let store = open(&media);
        let mut now = read(&store, "vm", 0, 300);
        assert_eq!(now[100 * BLOCK], 8, "what was written since");
        now[100 * BLOCK..101 * BLOCK].fill(then[100 * BLOCK]);
        assert!(now == then, "overwrites: {overwrites}");
    }
}

/// What is read after a kill may be in the page cache alone; a snapshot of it must not be.
#[test]
fn a_snapshot_after_a_kill_is_durable_with_what_the_killed_process_had_not_synced() {
    for closed in [false, true] {
        let (sim, media, store) = simulated(&["vm"]);
        let mount = disk::open(&store, "vm").unwrap();
        write(&mount, 1, 0, 100);
        mount.flush().unwrap();
        write(&mount, 2, 10, 40);
        drop((mount, store));
        sim.kill();
        if closed {
            // One that does something else, and leaves the pool closed in order.
            open(&media).close().unwrap();
        }
        let store = open(&media);
        snapshot::take(&store, &[("vm".into(), "s".into())]).unwrap();
        let mut then = filled(0, 100);
        snapshot::open(&store, "vm", "s").unwrap().read(&mut then, 0).unwrap();
        drop(store);
        for seed in 0..20 {
            let fork = sim.fork(seed);
            fork.crash();
            let store = open(&(Arc::new(fork) as Arc<dyn Media>));
            let mut now = filled(0, 100);
            snapshot::open(&store, "vm", "s").unwrap().read(&mut now, 0).unwrap();
            assert!(now == then, "closed between {closed}, seed {seed}");
        }
    }
}

/// What a process did of the work in the background before it was killed is found by the next one, which builds upon it; a loss
/// of power after that takes nothing that anything counts on.
#[test]
fn what_a_killed_process_left_in_directories_is_durable_before_anything_counts_on_it() {
    let (base, media, store) = simulated(&["vm", "other"]);
    let (disk, lease) = attach(&store, "vm");
    write(&disk, 1, 0, 700);
    snapshot::take(&store, &[("vm".into(), "s".into())]).unwrap();
    write(&disk, 2, 10, 5);
    disk.flush().unwrap();
    drop((disk, lease, store, media));
    base.crash();
    // Makes a segment with its directory, seals of both kinds with theirs, and folds.
    let work = |store: &Arc<afterimage::store::Store>| -> afterimage::error::Result<()> {
        disk::open(store, "other")?.write(&filled(3, 4), 0)?;
        store.flush_all()?;
        while store.seal_next()? {}
        // That they are sealed is durable with the next frame.
        disk::open(store, "other")?.write(&filled(3, 4), 1 << 20)?;
        store.flush_all()?;
        store.fold().map(drop)
    };
    let mut kills = 0;
    loop {
        let sim = base.fork(kills);
        let media: Arc<dyn Media> = Arc::new(sim.clone());
        let store = open(&media);
        sim.crash_after(kills + 1);
        let ended = work(&store);
        drop(store);
        if ended.is_ok() && !sim.is_down() {
            break;
        }
        kills += 1;
        sim.kill();
        let store = open(&media);
        work(&store).unwrap();
        drop(store);
        for seed in 0..12 {
            let fork = sim.fork(1000 * kills + seed);
            fork.crash();
            let media: Arc<dyn Media> = Arc::new(fork);
            let store = open(&media);
            assert!(read(&store, "other", 0, 4) == filled(3, 4), "killed at I/O {kills}, seed {seed}");
            assert!(read(&store, "vm", 10, 5) == filled(2, 5), "killed at I/O {kills}, seed {seed}");
        }
    }
    assert!(kills > 30, "{kills} kills");
}

/// The journal is full and the host too, so nothing can be folded: a flush that fails is not followed by one that says it is done.
#[test]
fn a_flush_that_found_no_room_is_not_done_for_the_next_one() {
    let (sim, media, store) = simulated(&["vm"]);
    let disk = disk::open(&store, "vm").unwrap();
    write(&disk, 1, 0, 2048);
    disk.flush().unwrap();
    store.fold().unwrap();
    sim.set_space(Some(0));
    // Unmapping needs no room but that of the journal.
    let mut done = 0;
    let mut failed = 0;
    for block in (0..2048u64).step_by(3) {
        let unmap = disk.discard(block * BLOCK as u64, BLOCK as u64).and_then(|()| disk.flush());
        match unmap {
            Ok(()) => {
                assert_eq!(failed, 0, "nothing has changed: there is no room");
                done += 1;
            }
            Err(error) => {
                assert_eq!(error.kind(), Kind::NoSpace, "{error}");
                failed += 1;
                if failed == 20 {
                    break;
                }
            }
        }
    }
    assert!(done > 0 && failed == 20, "{done} flushes, {failed} failed");
    assert!(store.health().is_none(), "want of room is no reason to refuse writes for ever");
    // The state that each of them promised is there after a loss of power.
    let fork = sim.fork(1);
    fork.crash();
    fork.set_space(None);
    let media_of_fork: Arc<dyn Media> = Arc::new(fork);
    let seen = read(&open(&media_of_fork), "vm", 0, 2048);
    for n in 0..done {
        assert_eq!(seen[3 * n * BLOCK], 0, "block {} was flushed as unmapped", 3 * n);
    }
    // With room again the same flush is done, and then it is.
    sim.set_space(None);
    disk.flush().unwrap();
    let now = read(&store, "vm", 0, 2048);
    drop((disk, store));
    sim.crash();
    assert!(read(&open(&media), "vm", 0, 2048) == now);
}

/// Between a write that is the first to leave something to sync and its entry into the books another one may be flushed.
#[test]
fn a_flush_beside_a_large_write_syncs_what_was_acknowledged_before_it() {
    let (sim, _media, store) = simulated(&["vm"]);
    let disk = disk::open(&store, "vm").unwrap();
    write(&disk, 1, 0, 2048);
    disk.flush().unwrap();
    let others = std::sync::atomic::AtomicBool::new(true);
    std::thread::scope(|threads| {
        let writer = threads.spawn(|| {
            while others.load(std::sync::atomic::Ordering::Relaxed) {
                write(&disk, 2, 1024, 1000);
            }
        });
        let lost = (0..150u8).find(|n| {
            write(&disk, *n, 7, 1);
            disk.flush().unwrap();
            let fork = sim.fork(u64::from(*n));
            fork.crash();
            let media: Arc<dyn Media> = Arc::new(fork);
            read(&open(&media), "vm", 7, 1) != filled(*n, 1)
        });
        others.store(false, std::sync::atomic::Ordering::Relaxed);
        writer.join().unwrap();
        assert_eq!(lost, None, "that flush lost what was written before it");
    });
}
