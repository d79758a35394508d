//! Changes made elsewhere show at once, although the kernel caches names, attributes and contents.

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};

use afterimage::disk::{self, BlockDevice};
use afterimage::snapshot;

use super::{Mount, create, errno, noise};

#[test]
fn names_made_changed_and_removed_elsewhere_show_at_once() {
    let Some(mount) = Mount::new() else { return };
    let store = &mount.store;
    for round in 0..50 {
        assert_eq!(errno(fs::metadata(mount.disk("a"))), libc::ENOENT, "round {round}");
        disk::create(store, "a", 4096).unwrap();
        let ino = fs::metadata(mount.disk("a")).unwrap().ino();
        fs::metadata(mount.dir.join("snapshots/a")).unwrap();
        snapshot::take(store, &[("a".into(), "s".into())]).unwrap();
        fs::metadata(mount.snapshot("a", "s")).unwrap();
        snapshot::rename(store, "a", "s", "t").unwrap();
        assert_eq!(errno(fs::metadata(mount.snapshot("a", "s"))), libc::ENOENT, "round {round}");
        fs::metadata(mount.snapshot("a", "t")).unwrap();
        disk::rename(store, "a", "b").unwrap();
        assert_eq!(errno(fs::metadata(mount.disk("a"))), libc::ENOENT);
        assert_eq!(errno(fs::metadata(mount.snapshot("a", "t"))), libc::ENOENT);
        assert_eq!(fs::metadata(mount.disk("b")).unwrap().ino(), ino);
        fs::metadata(mount.snapshot("b", "t")).unwrap();
        snapshot::remove(store, "b", "t").unwrap();
        assert_eq!(errno(fs::metadata(mount.snapshot("b", "t"))), libc::ENOENT);
        disk::remove(store, "b", false).unwrap();
        assert_eq!(errno(fs::metadata(mount.disk("b"))), libc::ENOENT);
        assert_eq!(errno(fs::metadata(mount.dir.join("snapshots/b"))), libc::ENOENT);
    }
}

#[test]
fn a_resize_elsewhere_shows_in_open_files_too() {
    let Some(mount) = Mount::new() else { return };
    let path = mount.make("a", 4096);
    let open = fs::File::open(&path).unwrap();
    for size in [8192, 1 << 30, 100, 0, 5000] {
        disk::open(&mount.store, "a").unwrap().resize(size, true).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().len(), size);
        assert_eq!(open.metadata().unwrap().len(), size);
    }
}

#[test]
fn a_revert_drops_what_the_kernel_has_cached() {
    let Some(mount) = Mount::new() else { return };
    let path = mount.make("a", 1 << 20);
    create(&path).write_all_at(&noise(1 << 20, 1), 0).unwrap();
    snapshot::take(&mount.store, &[("a".into(), "s".into())]).unwrap();
    let reader = fs::File::open(&path).unwrap();
    for round in 0..20 {
        create(&path).write_all_at(&noise(1 << 20, 100 + round), 0).unwrap();
        assert!(fs::read(&path).unwrap() == noise(1 << 20, 100 + round));
        mount.wait_until_free("a");
        snapshot::revert(&mount.store, "a", "s").unwrap();
        let mut seen = vec![0; 1 << 20];
        reader.read_exact_at(&mut seen, 0).unwrap();
        assert!(seen == noise(1 << 20, 1), "round {round}: through a file that was open");
        assert!(fs::read(&path).unwrap() == noise(1 << 20, 1), "round {round}: through a new open");
    }
}

#[test]
fn changes_while_the_tree_is_busy_neither_hang_nor_hide() {
    let Some(mount) = Mount::new() else { return };
    let stop = std::sync::atomic::AtomicBool::new(false);
    mount.make("busy", 16 << 20);
    std::thread::scope(|scope| {
        for worker in 0..4u64 {
            let (mount, stop) = (&mount, &stop);
            scope.spawn(move || {
                let file = create(&mount.disk("busy"));
                let mut n = 0;
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    n += 1;
                    file.write_all_at(&[1; 65_536], (n * 4 + worker) % 256 * 65_536).unwrap();
                    assert!(fs::read_dir(mount.dir.join("disks")).unwrap().count() >= 1);
                    drop(fs::metadata(mount.dir.join("snapshots/busy")));
                }
            });
        }
        let begun = std::time::Instant::now();
        for n in 0..100 {
            disk::create(&mount.store, "other", 4096 + n * 512).unwrap();
            assert_eq!(fs::metadata(mount.disk("other")).unwrap().len(), 4096 + n * 512);
            disk::open(&mount.store, "busy").unwrap().resize((16 << 20) + n, true).unwrap();
            assert_eq!(fs::metadata(mount.disk("busy")).unwrap().len(), (16 << 20) + n);
            disk::remove(&mount.store, "other", false).unwrap();
            assert_eq!(errno(fs::metadata(mount.disk("other"))), libc::ENOENT);
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        assert!(begun.elapsed() < std::time::Duration::from_secs(60), "{:?}", begun.elapsed());
    });
    assert_eq!(disk::open(&mount.store, "busy").unwrap().size(), (16 << 20) + 99);
}
