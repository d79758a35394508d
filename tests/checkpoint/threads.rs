//! Several threads at once: savers with buffers of their own, and readers.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use afterimage::checkpoint::{
    self, Access, Cut, Folder, PageBlock, Place, Plan, Pushed, Reader, Sizes, Staging, Writer, is_zero,
};
use afterimage::error::Kind;
use afterimage::media::{HostMedia, Media};
use afterimage::progress::Silent;

use super::{SMALL, compare, content, geometry_of, name};

const PAGE_BLOCKS: u64 = 800;

#[test]
fn threads_save_side_by_side_and_read_side_by_side() {
    let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    let media: Arc<dyn Media> = Arc::new(HostMedia::new(dir.path()).unwrap());
    let folder = Folder::of_pool(&media);
    for direct in [true, false] {
        let text = if direct { "vm@direct" } else { "vm@cached" };
        save(&folder, text, direct);
        let report = checkpoint::verify(&folder, &name(text), &Silent).unwrap();
        assert!(report.is_sound(), "{report:?}");
        for access in [Access::Cached, Access::Direct] {
            let reader = Reader::open(&folder, &name(text), access).unwrap();
            std::thread::scope(|scope| {
                for _ in 0..3 {
                    scope.spawn(|| compare(&reader, &|_| 1).unwrap());
                }
            });
        }
    }
}

/// Three threads take page blocks in turn; one of them is hot.
fn save(folder: &Folder, text: &str, direct: bool) {
    let sizes = Sizes { page_block: 16 << 10, storage_block: 256 << 10, table_page: 4096 };
    let geometry = geometry_of(sizes, PAGE_BLOCKS);
    let plan = Plan { direct, ..Plan::new(name(text), "test", geometry.clone()) };
    let (writer, next) = (Writer::create(folder, plan).unwrap(), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for hot in [true, false, false] {
            let (writer, next, geometry) = (&writer, &next, &geometry);
            scope.spawn(move || {
                let mut staging = Staging::new(geometry).unwrap();
                loop {
                    let number = PageBlock(next.fetch_add(1, Ordering::Relaxed));
                    let Some(length) = geometry.length(number) else { break };
                    let plain = content(1, number, length);
                    if is_zero(&plain) {
                        writer.set(number, Place::Zero).unwrap();
                    } else if staging.push(number, &plain) == Pushed::Full {
                        writer.write(&mut staging, hot).unwrap();
                    }
                }
                while !staging.is_empty() {
                    writer.write(&mut staging, hot).unwrap();
                }
            });
        }
    });
    let state = vec![7; 100_000];
    let cut = Cut { created: 1, disks: Vec::new(), state_version: 1, state: &state };
    let sum = writer.written();
    writer.commit(&cut).unwrap();
    assert_eq!(sum.stored + sum.zeros, PAGE_BLOCKS);
    // Full ones, and at most two for each thread that are not; a page block may be missing at the end of each.
    let most = sum.bytes as f64 / f64::from(sizes.storage_block) * 1.07 + 6.0;
    assert!(f64::from(sum.blocks) <= most, "{} blocks, at most {most}", sum.blocks);
}

/// Whoever makes a checkpoint of a name has it alone, whoever else looks, sweeps and tries at the same time.
#[test]
fn two_never_save_under_one_name() {
    let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    let media: Arc<dyn Media> = Arc::new(HostMedia::new(dir.path()).unwrap());
    let folder = Folder::of_pool(&media);
    let path = dir.path().join("checkpoints/vm/a.ckpt.new");
    let (alive, made, until) = (AtomicU64::new(0), AtomicU64::new(0), Instant::now() + Duration::from_secs(3));
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                while Instant::now() < until {
                    let plan = Plan { direct: false, ..Plan::new(name("vm@a"), "test", geometry_of(SMALL, 8)) };
                    match Writer::create(&folder, plan) {
                        Ok(writer) => {
                            assert_eq!(alive.fetch_add(1, Ordering::SeqCst), 0, "somebody else saves it");
                            assert!(path.exists(), "nobody took it for a leftover");
                            made.fetch_add(1, Ordering::SeqCst);
                            alive.fetch_sub(1, Ordering::SeqCst);
                            drop(writer);
                        }
                        Err(error) => assert_eq!(error.kind(), Kind::Busy, "{error}"),
                    }
                }
            });
        }
        scope.spawn(|| {
            while Instant::now() < until {
                folder.sweep().unwrap();
                folder.is_being_saved(&name("vm@a")).unwrap();
            }
        });
    });
    assert!(made.load(Ordering::SeqCst) > 10, "{made:?} were made");
}
