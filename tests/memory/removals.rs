//! Memory that is given back to the host, as a balloon does, while it is saved or restored.

use std::time::Duration;

use afterimage::error::Kind;

use super::restores::{Between, only_when_touched, saved, something, through};
use super::*;

/// Whatever comes first: what is given back is zeros, never what the checkpoint has.
#[test]
fn what_is_given_back_while_memory_comes_is_zeros() {
    for round in 0..6_u64 {
        let (_, folder) = media();
        let (like, mut twin) = saved(&folder, 40 + round);
        let guest = empty_like(&like);
        let watch = guest.watch();
        let between = Arc::new(Between { delay: Duration::from_micros(300 * round), ..Between::default() });
        let restorer =
            Restorer::begin(&watch, through(open(&folder, "a"), &between), RestoreOptions::default()).unwrap();
        let region = &guest.regions[0];
        std::thread::scope(|scope| {
            for number in 0..2 {
                let (guest, over) = (&guest, region.len());
                scope.spawn(move || {
                    let mut random = Random(round * 10 + number + 1);
                    for _ in 0..500 {
                        guest.load(random.below(over / 8) * 8);
                    }
                });
            }
            let mut random = Random(round + 77);
            for _ in 0..120 {
                let (first, pages) = (random.below(region.len() / PAGE - 40), random.below(40) + 1);
                region.give_back(first * PAGE, pages * PAGE).unwrap();
                let range = usize::try_from(first * PAGE).unwrap()..usize::try_from((first + pages) * PAGE).unwrap();
                twin[range].fill(0);
            }
        });
        restorer.wait_filled().unwrap();
        assert_same(&guest.content(), &twin, &format!("round {round}"));
    }
}

/// A page that was given back, and touched before its page block comes, is zeros; what is written there stays.
#[test]
fn what_is_given_back_and_written_stays() {
    let (_, folder) = media();
    let (like, mut twin) = saved(&folder, 50);
    let guest = empty_like(&like);
    let watch = guest.watch();
    let between = Arc::new(Between { delay: Duration::from_millis(30), ..Between::default() });
    let restorer = Restorer::begin(&watch, through(open(&folder, "a"), &between), only_when_touched()).unwrap();
    let at = something(&twin, 20);
    guest.regions[0].give_back(at as u64 + 2 * PAGE, 3 * PAGE).unwrap();
    guest.store(at as u64 + 3 * PAGE, 5);
    assert_eq!(guest.load(at as u64 + 2 * PAGE), 0);
    twin[at + 2 * 4096..at + 5 * 4096].fill(0);
    twin[at + 3 * 4096] = 5;
    assert_eq!(guest.load(at as u64), u64::from_le_bytes(twin[at..at + 8].try_into().unwrap()));
    let whole = something(&twin, 60);
    guest.regions[0].give_back(whole as u64, BLOCK).unwrap();
    twin[whole..whole + (1 << 16)].fill(0);
    assert_eq!(guest.load(whole as u64), 0);
    save_stopped_is(&guest, &watch, &folder, &twin);
    restorer.wait_filled().unwrap();
    // Given back again when all is there.
    guest.regions[0].give_back(at as u64, BLOCK).unwrap();
    assert_eq!(guest.load(at as u64), 0);
}

fn save_stopped_is(guest: &Guest, watch: &Watch, folder: &Folder, twin: &[u8]) {
    let to = writer(folder, "b", watch, None);
    afterimage::memory::save_stopped(watch, &to, &Silent).unwrap();
    to.commit(&cut()).unwrap();
    assert_same(&guest.content(), twin, "the memory");
    assert_restores(folder, "b", guest, twin);
}

/// What is given back after the cut and before it is captured is lost: the save says so and the guest goes on.
#[test]
fn a_save_whose_memory_is_given_back_fails_or_is_right() {
    let (mut right, mut failed) = (0, 0);
    for round in 0..12_u64 {
        let guest = Guest::usual();
        guest.fill(60 + round);
        let (_, folder) = media();
        let watch = guest.watch();
        let writers = Writers::new(&guest);
        let mut saver = Saver::begin(&watch, writer(&folder, "a", &watch, None), SaveOptions::default()).unwrap();
        // Before the cut it is as good as written.
        watch.give_back(5 * BLOCK, BLOCK + PAGE).unwrap();
        let twin = writers.cut(&mut saver);
        assert!(twin[5 << 16..6 << 16].iter().all(|byte| *byte == 0));
        let done = || saver.figures().done == saver.figures().page_blocks;
        while round % 2 == 1 && !done() {
            std::thread::sleep(Duration::from_millis(1));
        }
        watch.give_back(18 << 20, BLOCK).unwrap();
        guest.store(18 << 20, 1);
        match saver.commit(&cut()) {
            Ok(_) => {
                assert_restores(&folder, "a", &guest, &twin);
                right += 1;
            }
            Err(error) => {
                assert!(round % 2 == 0 && error.kind() == Kind::Failed, "{error}");
                failed += 1;
            }
        }
    }
    assert!(right > 0 && failed > 0, "{right} were right and {failed} failed");
}

/// What is given back counts as written for the next save.
#[test]
fn what_is_given_back_is_in_the_next_save() {
    let guest = Guest::usual();
    guest.fill(70);
    let (_, folder) = media();
    let watch = guest.watch();
    let writers = Writers::new(&guest);
    let keep = SaveOptions { keep_tracking: true, ..SaveOptions::default() };
    save_live(&guest, &watch, &writers, writer(&folder, "a", &watch, None), keep);
    watch.give_back(7 * BLOCK + PAGE, 4 * BLOCK).unwrap();
    guest.store(9 * BLOCK, 9);
    let (twin, figures) = save_live(&guest, &watch, &writers, writer(&folder, "b", &watch, Some("a")), keep);
    assert_eq!(figures.page_blocks - figures.inherited, 5);
    guest.store(9 * BLOCK + 8, 10);
    let (second, _) = save_live(&guest, &watch, &writers, writer(&folder, "c", &watch, Some("b")), keep);
    assert_restores(&folder, "b", &guest, &twin);
    assert_restores(&folder, "c", &guest, &second);
}

/// Memory is given back and written up to the instant: each save is right, and so is each that is based on it.
#[test]
fn saves_are_right_while_memory_is_given_back_all_the_time() {
    let guest = Guest::new(4 << 20, 1 << 20);
    guest.fill(80);
    let (_, folder) = media();
    let watch = guest.watch();
    let writers = Writers::new(&guest);
    let keep = SaveOptions { keep_tracking: true, ..SaveOptions::default() };
    let (mut parent, mut based) = (None::<String>, 0);
    let (over, arming) = (AtomicBool::new(false), RwLock::new(()));
    writers.during(2, || {
        std::thread::scope(|scope| {
            let _over = Over(&over);
            scope.spawn(|| {
                let mut random = Random(81);
                while !over.load(Ordering::Relaxed) {
                    let (_arming, _running) = (arming.read(), writers.hold.read());
                    let (first, pages) = (random.below(1000), random.below(20) + 1);
                    watch.give_back(first * PAGE, pages * PAGE).unwrap();
                    guest.store((first + random.below(pages)) * PAGE, random.next());
                }
            });
            for round in 0..20 {
                let to = writer(&folder, &format!("n{round}"), &watch, parent.as_deref());
                let mut saver = Saver::begin(&watch, to, keep).unwrap();
                // Some meet removals that are told of and not done yet.
                for _ in 0..5 {
                    saver.settle().unwrap();
                }
                // After the cut it would fail, as it should.
                let _none = arming.write();
                let twin = writers.cut(&mut saver);
                let was_based = parent.is_some();
                saver.commit(&cut()).unwrap();
                based += u64::from(was_based);
                let made = format!("n{round}");
                assert_eager(&folder, &made, &guest, &twin);
                // As many as can be based on each other.
                parent = (round % 8 != 7).then_some(made);
            }
        });
    });
    assert!(based > 12, "{based}");
}

fn assert_eager(folder: &Folder, of: &str, like: &Guest, twin: &[u8]) {
    let guest = empty_like(like);
    restore_all(&guest.watch(), &open(folder, of), 1, &Silent).unwrap();
    assert_same(&guest.content(), twin, of);
}
