//! What goes wrong: full disks, damaged and lost files. Nothing hangs, and nothing lies.

use std::fs::File;
use std::time::{Duration, Instant};

use afterimage::error::Kind;
use afterimage::media::sim::Fault;
use afterimage::memory::Event;

use super::restores::{Between, only_when_touched, saved, something, through};
use super::*;

const PATIENCE: Duration = Duration::from_secs(10);

#[test]
fn a_disk_that_fails_lets_the_guest_go_and_the_old_file_be() {
    let guest = Guest::usual();
    guest.fill(30);
    let (media, folder) = media();
    let watch = guest.watch();
    let writers = Writers::new(&guest);
    writers.during(2, || {
        let (twin, _) = save_live(&guest, &watch, &writers, writer(&folder, "a", &watch, None), SaveOptions::default());
        for after in [1, 2, 4, 8] {
            for ring in [1, 64 << 20] {
                let to = writer(&folder, "b", &watch, None);
                let mut saver = Saver::begin(&watch, to, SaveOptions { ring, keep_tracking: true }).unwrap();
                media.fail_after(after, Fault::Enospc);
                writers.cut(&mut saver);
                let failed = saver.commit(&cut()).unwrap_err();
                media.fail_after(1 << 40, Fault::Enospc);
                assert_eq!(failed.kind(), Kind::NoSpace, "{failed}");
                let before = writers.stores.load(Ordering::Relaxed);
                while writers.stores.load(Ordering::Relaxed) < before + 1000 {
                    std::thread::yield_now();
                }
            }
        }
        assert!(media.paths().iter().all(|path| !path.contains("/b.")), "{:?}", media.paths());
        save_live(&guest, &watch, &writers, writer(&folder, "b", &watch, None), SaveOptions::default());
        assert_restores(&folder, "a", &guest, &twin);
    });
}

/// Touches a byte as a device would: by a system call, which fails where a load would be a signal.
fn touch(guest: &Guest, byte: u64) -> std::io::Result<u8> {
    let (read, write) = rustix::pipe::pipe().unwrap();
    let mut write = File::from(write);
    guest.memory.write_volatile_to(guest.address(byte), &mut write, 1).map_err(|error| match error {
        vm_memory::GuestMemoryError::IOError(error) => error,
        error => std::io::Error::other(error),
    })?;
    let mut bytes = [0];
    rustix::io::read(&read, &mut bytes).unwrap();
    Ok(bytes[0])
}

fn failure(restorer: &Restorer) -> afterimage::memory::Failure {
    match restorer.event(PATIENCE) {
        Event::Failed(failure) => failure,
        event => panic!("{event:?} {:?}", restorer.figures()),
    }
}

/// Where the stored bytes of a page block are in the file of `vm@a`.
fn in_file(folder: &Folder, block: usize) -> u64 {
    let reader = open(folder, "a");
    match reader.place(afterimage::checkpoint::PageBlock(block as u64)).unwrap() {
        afterimage::checkpoint::Found::Stored { stored, .. } => {
            (u64::from(stored.block.0) + 1) * reader.geometry().storage_block() as u64 + u64::from(stored.offset)
        }
        afterimage::checkpoint::Found::Zero => panic!("it is zeros"),
    }
}

#[test]
fn a_bit_that_has_flipped_is_told_waited_for_and_read_again() {
    let (media, folder) = media();
    let (like, twin) = saved(&folder, 31);
    for background in [false, true] {
        let guest = empty_like(&like);
        let watch = guest.watch();
        let at = something(&twin, 20);
        let place = in_file(&folder, at >> 16);
        media.flip_bit("vm/a.ckpt", place, 5).unwrap();
        let options = RestoreOptions { background, ..RestoreOptions::default() };
        let restorer = Restorer::begin(&watch, open(&folder, "a"), options).unwrap();
        std::thread::scope(|scope| {
            let touching = scope.spawn(|| guest.load(at as u64 + 8));
            let failed = failure(&restorer);
            assert_eq!((failed.address, failed.error.kind()), (at as u64, Kind::Corrupt), "{}", failed.error);
            assert!(failed.error.to_string().contains("vm@a") && failed.waited_for);
            // Everything else is there for who touches it.
            let other = something(&twin, 200);
            assert_eq!(guest.load(other as u64), u64::from_le_bytes(twin[other..other + 8].try_into().unwrap()));
            // Read again it is as bad, and told again.
            restorer.retry();
            assert_eq!(failure(&restorer).address, at as u64);
            assert!(!touching.is_finished());
            assert!(matches!(restorer.event(Duration::from_millis(20)), Event::Nothing));
            if background {
                assert_eq!(restorer.wait_filled().unwrap_err().kind(), Kind::Corrupt);
                assert_eq!((restorer.figures().left, restorer.figures().failed), (1, 1));
            }
            // Somebody mends the file.
            media.flip_bit("vm/a.ckpt", place, 5).unwrap();
            restorer.retry();
            assert_eq!(touching.join().unwrap(), u64::from_le_bytes(twin[at + 8..at + 16].try_into().unwrap()));
        });
        if background {
            restorer.wait_filled().unwrap();
            assert_same(&guest.content(), &twin, "after it was mended");
        }
    }
}

/// What nobody waits for is known, and becomes news when somebody does.
#[test]
fn what_could_not_be_filled_is_news_when_it_is_touched() {
    let (media, folder) = media();
    let (like, twin) = saved(&folder, 32);
    let guest = empty_like(&like);
    let watch = guest.watch();
    let at = something(&twin, 20);
    media.flip_bit("vm/a.ckpt", in_file(&folder, at >> 16), 5).unwrap();
    let restorer = Restorer::begin(&watch, open(&folder, "a"), RestoreOptions::default()).unwrap();
    restorer.wait_filled().unwrap_err();
    assert_eq!(restorer.failures().len(), 1);
    assert!(matches!(restorer.event(Duration::from_millis(20)), Event::Nothing));
    std::thread::scope(|scope| {
        let touching = scope.spawn(|| touch(&guest, at as u64));
        assert_eq!(failure(&restorer).address, at as u64);
        restorer.poison_all();
        assert_eq!(touching.join().unwrap().unwrap_err().raw_os_error(), Some(libc::EFAULT));
    });
}

#[test]
fn who_waits_for_what_never_comes_goes_on_with_an_error_at_the_end() {
    let (media, folder) = media();
    let (like, twin) = saved(&folder, 33);
    for cut_off in [false, true] {
        let guest = empty_like(&like);
        let watch = guest.watch();
        let between = Arc::new(Between::default());
        let reader = through(open(&folder, "a"), &between);
        let restorer = Restorer::begin(&watch, reader, only_when_touched()).unwrap();
        if cut_off {
            // As if the file server had lost the end of it.
            media.truncate("vm/a.ckpt", 1 << 20).unwrap();
        } else {
            between.broken.store(true, Ordering::SeqCst);
        }
        std::thread::scope(|scope| {
            let waiting: Vec<_> = (0..4)
                .map(|n| {
                    let (guest, at) = (&guest, something(&twin, 20 + 60 * n));
                    scope.spawn(move || touch(guest, at as u64 + 5000))
                })
                .collect();
            for _ in 0..4 {
                let failed = failure(&restorer);
                assert_eq!(failed.error.kind(), Kind::Io, "{}", failed.error);
            }
            let begun = Instant::now();
            let figures = restorer.stop();
            assert!(begun.elapsed() < PATIENCE && !figures.resident);
            for waiting in waiting {
                assert_eq!(waiting.join().unwrap().unwrap_err().raw_os_error(), Some(libc::EFAULT));
            }
            // So does whoever comes later.
            let late = something(&twin, 130);
            assert_eq!(touch(&guest, late as u64).unwrap_err().raw_os_error(), Some(libc::EFAULT));
        });
    }
}

/// A save that needs what cannot be had fails, and the guest goes on.
#[test]
fn a_save_while_memory_cannot_come_fails() {
    let (media, folder) = media();
    let (like, twin) = saved(&folder, 34);
    let guest = empty_like(&like);
    let watch = guest.watch();
    let restorer = Restorer::begin(&watch, open(&folder, "a"), only_when_touched()).unwrap();
    let at = something(&twin, 20);
    media.flip_bit("vm/a.ckpt", in_file(&folder, at >> 16), 5).unwrap();
    let writers = Writers::new(&guest);
    let mut saver = Saver::begin(&watch, writer(&folder, "b", &watch, None), SaveOptions::default()).unwrap();
    writers.cut(&mut saver);
    assert_eq!(saver.commit(&cut()).unwrap_err().kind(), Kind::Corrupt);
    let other = something(&twin, 100) as u64;
    guest.store(other, 1);
    assert_eq!(guest.load(other), 1);
    assert_eq!(
        afterimage::memory::save_stopped(&watch, &writer(&folder, "b", &watch, None), &Silent).unwrap_err().kind(),
        Kind::Corrupt
    );
    drop(restorer);
}

#[test]
fn a_damaged_index_restores_nothing() {
    let (media, folder) = media();
    let (like, _) = saved(&folder, 35);
    let blocks = u64::from(open(&folder, "a").layers()[0].footer().blocks);
    media.flip_bit("vm/a.ckpt", (1 + blocks) << 20 | 100, 2).unwrap();
    let guest = empty_like(&like);
    let watch = guest.watch();
    let begun = Restorer::begin(&watch, open(&folder, "a"), RestoreOptions::default());
    assert_eq!(begun.unwrap_err().kind(), Kind::Corrupt);
    assert_eq!(guest.load(0), 0, "it is memory like any other");
}

/// A mistake in this program ends a thread that fills memory: nobody waits for it, and the owner hears.
#[test]
fn who_waits_for_a_thread_that_has_died_goes_on_with_an_error() {
    let (_, folder) = media();
    let (like, twin) = saved(&folder, 36);
    let guest = empty_like(&like);
    let watch = guest.watch();
    let between = Arc::new(Between { panics: AtomicBool::new(true), ..Between::default() });
    let restorer = Restorer::begin(&watch, through(open(&folder, "a"), &between), only_when_touched()).unwrap();
    let at = something(&twin, 20);
    std::thread::scope(|scope| {
        let guest = &guest;
        let touching: Vec<_> = (0..3).map(|page| scope.spawn(move || touch(guest, at as u64 + page * PAGE))).collect();
        for touching in touching {
            assert_eq!(touching.join().unwrap().unwrap_err().raw_os_error(), Some(libc::EFAULT));
        }
    });
    assert!(matches!(restorer.event(PATIENCE), Event::Broken(_)));
    let other = something(&twin, 100);
    assert_eq!(touch(&guest, other as u64).unwrap_err().raw_os_error(), Some(libc::EFAULT));
    let saving = afterimage::memory::save_stopped(&watch, &writer(&folder, "b", &watch, None), &Silent);
    assert!(saving.unwrap_err().to_string().contains("ended before"), "it waits for nobody");
}

/// Before anybody looks after a restore, who touches what cannot be had does not wait.
#[test]
fn nobody_waits_for_an_owner_that_is_not_there_yet() {
    let (media, folder) = media();
    let (like, twin) = saved(&folder, 37);
    let at = something(&twin, 20);
    media.flip_bit("vm/a.ckpt", in_file(&folder, at >> 16), 5).unwrap();
    for background in [false, true] {
        let guest = empty_like(&like);
        let watch = guest.watch();
        let options = RestoreOptions { background, unattended: true, ..RestoreOptions::default() };
        let restorer = Restorer::begin(&watch, open(&folder, "a"), options).unwrap();
        if background {
            // Known before anybody wants it.
            restorer.wait_filled().unwrap_err();
        }
        assert_eq!(touch(&guest, at as u64).unwrap_err().raw_os_error(), Some(libc::EFAULT));
        let failed = failure(&restorer);
        assert_eq!((failed.address, failed.error.kind()), (at as u64, Kind::Corrupt));
    }
    // Once there is one, who touches it waits for what that decides.
    let guest = empty_like(&like);
    let watch = guest.watch();
    let options = RestoreOptions { unattended: true, ..only_when_touched() };
    let restorer = Restorer::begin(&watch, open(&folder, "a"), options).unwrap();
    restorer.attend();
    std::thread::scope(|scope| {
        let touching = scope.spawn(|| touch(&guest, at as u64));
        assert_eq!(failure(&restorer).address, at as u64);
        assert!(!touching.is_finished());
        restorer.poison_all();
        touching.join().unwrap().unwrap_err();
    });
}

/// Without poison nobody could be let go who waits for what never comes.
#[test]
fn a_kernel_without_poison_restores_all_at_once_and_no_other_way() {
    let (_, folder) = media();
    let (like, twin) = saved(&folder, 38);
    let guest = empty_like(&like);
    let watch = Watch::new(Watch::open().unwrap().without_poison(), &guest.memory, Sizes::USUAL).unwrap();
    let error = Restorer::begin(&watch, open(&folder, "a"), RestoreOptions::default()).unwrap_err();
    let told = format!("{error} {}", error.next_step().unwrap());
    assert!(error.kind() == Kind::Unsupported && told.contains("Linux") && told.contains("--eager"), "{told}");
    restore_all(&watch, &open(&folder, "a"), 2, &Silent).unwrap();
    assert_same(&guest.content(), &twin, "all at once");
    let writers = Writers::new(&guest);
    let (twin, _) = save_live(&guest, &watch, &writers, writer(&folder, "b", &watch, None), SaveOptions::default());
    assert_restores(&folder, "b", &guest, &twin);
}
