//! Saves: what is in the file is what memory had at the cut.

use std::time::Duration;

use afterimage::checkpoint::Writer;
use afterimage::error::Kind;
use afterimage::memory::save_stopped;

use super::*;

#[test]
fn a_live_save_is_the_instant_of_the_cut() {
    let mut caught = 0;
    for (threads, ring) in [(0, 64 << 20), (1, 64 << 20), (4, 64 << 20), (1, 1), (4, 1)] {
        let guest = Guest::usual();
        guest.fill(threads + 1);
        let (_, folder) = media();
        let watch = guest.watch();
        let writers = Writers::new(&guest);
        let twins = writers.during(threads, || {
            ["a", "b"].map(|to| {
                let options = SaveOptions { ring, keep_tracking: false };
                let (twin, figures) = save_live(&guest, &watch, &writers, writer(&folder, to, &watch, None), options);
                assert!(threads > 0 || figures.caught == 0, "{figures:?}");
                caught += figures.caught;
                assert!(figures.inherited == 0 && figures.writes * (1 << 20) >= figures.bytes, "{figures:?}");
                let hot = open(&folder, to).hot().unwrap();
                assert_eq!(hot.is_empty(), figures.caught == 0, "what was caught is hot");
                (to, twin)
            })
        });
        for (of, twin) in twins {
            assert_restores(&folder, of, &guest, &twin);
        }
    }
    assert!(caught > 0, "in none of them the guest wrote to what was not saved yet");
}

/// What nobody has ever touched is not read, and takes no memory.
#[test]
fn holes_stay_holes() {
    let guest = Guest::new(32 << 20, 16 << 20);
    guest.store(9 << 20, 1);
    let (_, folder) = media();
    let watch = guest.watch();
    let writers = Writers::new(&guest);
    let data = || {
        let mut pages = 0;
        for region in &guest.regions {
            let mut at = 0;
            while let Some((start, end)) = region.next_data(at).unwrap() {
                pages += (end - start) / PAGE;
                at = end;
            }
        }
        pages
    };
    assert_eq!(data(), 1);
    let (twin, figures) =
        save_live(&guest, &watch, &writers, writer(&folder, "a", &watch, None), SaveOptions::default());
    assert_eq!((data(), figures.writes), (1, 1));
    assert_eq!(figures.zeros, figures.page_blocks - 1);
    // What nobody watches any more is written without anybody being asked.
    guest.store(20 << 20, 1);
    assert_eq!(data(), 2);
    assert_restores(&folder, "a", &guest, &twin);
}

#[test]
fn a_machine_that_is_stopped_is_saved_without_faults() {
    let guest = Guest::usual();
    guest.fill(5);
    let (_, folder) = media();
    let watch = guest.watch();
    let to = writer(&folder, "a", &watch, None);
    save_stopped(&watch, &to, &Silent).unwrap();
    to.commit(&cut()).unwrap();
    assert_restores(&folder, "a", &guest, &guest.content());
}

#[test]
fn checkpoints_based_on_one_another_have_what_was_written_since() {
    for threads in [1, 4] {
        let guest = Guest::usual();
        guest.fill(threads + 20);
        let (_, folder) = media();
        let watch = guest.watch();
        let writers = Writers { reach: 12 << 20, ..Writers::new(&guest) };
        let keep = SaveOptions { keep_tracking: true, ..SaveOptions::default() };
        let mut twins = Vec::new();
        writers.during(threads, || {
            let (twin, _) = save_live(&guest, &watch, &writers, writer(&folder, "0", &watch, None), keep);
            twins.push(("0", twin));
            for (parent, to) in [("0", "1"), ("1", "2"), ("2", "3")] {
                std::thread::sleep(Duration::from_millis(5));
                let to_write = writer(&folder, to, &watch, Some(parent));
                let (twin, figures) = save_live(&guest, &watch, &writers, to_write, keep);
                let (inherited, all) = (figures.inherited, figures.page_blocks);
                assert!(inherited > 0 && figures.zeros + inherited < all, "{figures:?}");
                twins.push((to, twin));
            }
        });
        // Nobody writes any more: all is as in the parent, but for a few page blocks.
        guest.store(8, 1);
        let twin = guest.content();
        let (_, figures) = save_live(&guest, &watch, &writers, writer(&folder, "4", &watch, Some("3")), keep);
        assert!(figures.inherited > 0, "{figures:?}");
        let (_, figures) = save_live(&guest, &watch, &writers, writer(&folder, "5", &watch, Some("4")), keep);
        assert_eq!((figures.inherited, figures.writes), (figures.page_blocks, 0), "nothing was written since");
        twins.push(("4", twin.clone()));
        twins.push(("5", twin));
        for (of, twin) in twins {
            assert_restores(&folder, of, &guest, &twin);
        }
    }
}

#[test]
fn what_is_not_known_is_not_based_on() {
    let guest = Guest::usual();
    let (_, folder) = media();
    let watch = guest.watch();
    let writers = Writers::new(&guest);
    let keep = SaveOptions { keep_tracking: true, ..SaveOptions::default() };
    let refused = |writer: Writer| Saver::begin(&watch, writer, keep).unwrap_err();
    save_live(&guest, &watch, &writers, writer(&folder, "a", &watch, None), SaveOptions::default());
    assert_eq!(refused(writer(&folder, "b", &watch, Some("a"))).kind(), Kind::Failed);
    save_live(&guest, &watch, &writers, writer(&folder, "c", &watch, None), keep);
    assert_eq!(refused(writer(&folder, "b", &watch, Some("a"))).kind(), Kind::Failed);
    // One at a time.
    let saver = Saver::begin(&watch, writer(&folder, "d", &watch, Some("c")), keep).unwrap();
    assert_eq!(refused(writer(&folder, "b", &watch, None)).kind(), Kind::Busy);
    drop(saver);
    // It was given up, so what is protected is not known any more.
    assert_eq!(refused(writer(&folder, "d", &watch, Some("c"))).kind(), Kind::Failed);
    save_live(&guest, &watch, &writers, writer(&folder, "d", &watch, None), keep);
    let other = Guest::new(1 << 20, 1 << 20);
    assert_eq!(refused(writer(&folder, "e", &other.watch(), None)).kind(), Kind::Usage);
}

/// The guest goes on, nothing is protected any more, the file is gone, and the next save is as good as any.
#[test]
fn a_save_can_be_given_up_at_any_time() {
    let guest = Guest::usual();
    guest.fill(3);
    let (media, folder) = media();
    let watch = guest.watch();
    let writers = Writers::new(&guest);
    let twin = writers.during(4, || {
        for round in 0..12_u64 {
            let options = SaveOptions { ring: 1, keep_tracking: round % 2 == 0 };
            let mut saver = Saver::begin(&watch, writer(&folder, "a", &watch, None), options).unwrap();
            if round % 3 > 0 {
                writers.cut(&mut saver);
                std::thread::sleep(Duration::from_micros(round * 300));
            }
            drop(saver);
            assert!(media.paths().iter().all(|path| !path.contains("ckpt")), "{:?}", media.paths());
            let before = writers.stores.load(Ordering::Relaxed);
            while writers.stores.load(Ordering::Relaxed) < before + 1000 {
                std::thread::yield_now();
            }
        }
        save_live(&guest, &watch, &writers, writer(&folder, "a", &watch, None), SaveOptions::default()).0
    });
    assert_restores(&folder, "a", &guest, &twin);
}

/// With a ring of two page blocks and a file that is slow the guest waits, and that is told.
#[test]
fn a_full_ring_makes_the_guest_wait_and_is_counted() {
    let guest = Guest::usual();
    let mut random = Random(4);
    for at in (0..guest.size()).step_by(8) {
        guest.store(at, random.next());
    }
    let (_, folder) = media();
    let watch = guest.watch();
    let writers = Writers::new(&guest);
    let (twin, figures) = writers.during(4, || {
        let options = SaveOptions { ring: 1, keep_tracking: false };
        save_live(&guest, &watch, &writers, writer(&folder, "a", &watch, None), options)
    });
    assert!(figures.stalls > 0 && figures.stalled_us > 0, "{figures:?}");
    assert!(figures.waits.count > 0 && figures.waits.max_us >= figures.waits.p99_us, "{figures:?}");
    assert_restores(&folder, "a", &guest, &twin);
}
