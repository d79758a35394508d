//! What `check` of a large map keeps in memory.

use std::fs;
use std::sync::Arc;
use std::time::Duration;

use afterimage::disk;
use afterimage::map::{BlockSet, Entry};
use afterimage::media::{HostMedia, Media, Open};
use afterimage::pool::segment_path;
use afterimage::store::{Capture, InitOptions, OpenOptions, Store};
use afterimage::units::{CHUNK_SIZE, ChunkIndex};

use super::{Afterimage, text};

const CHUNKS: u32 = 1 << 17;

/// Makes a pool with a disk of 256 GiB that is mapped all over, and has no data.
fn fill(dir: &std::path::Path) {
    fs::create_dir(dir).unwrap();
    let media: Arc<dyn Media> = Arc::new(HostMedia::new(dir).unwrap());
    Store::init(&media, InitOptions { ballast: 0, probe: false, ..InitOptions::default() }).unwrap();
    let options = OpenOptions { background: false, low_water: Some(0), ..OpenOptions::default() };
    let store = Store::open(media, options).unwrap();
    let info = disk::create(&store, "big", u64::from(CHUNKS) * CHUNK_SIZE).unwrap();
    let head = store.head(info.id).unwrap();
    let line = head.line();
    let mut ends = std::collections::BTreeMap::new();
    for first in (0..CHUNKS).step_by(8192) {
        let captures = (first..first + 8192).map(|chunk| {
            let chunk = ChunkIndex(chunk);
            let mut entry = Entry::EMPTY;
            for (slab, part) in head.hand_out(&store, chunk, &BlockSet::FULL).unwrap() {
                entry.assign(slab.base, &part);
                ends.insert(slab.base.segment(), slab.base.byte() + CHUNK_SIZE);
            }
            head.count(512);
            let (saved, dropped) = (Entry::EMPTY, Vec::new());
            Capture { chunk, epoch: line.epoch, entry, saved, row: None, dropped, fresh: 0, marked: false }
        });
        let ticket = store.submit_captures(info.id, &line, captures.collect()).unwrap();
        store.ledger.wait(ticket).unwrap();
    }
    for (segment, end) in ends {
        store.media().open(&segment_path(segment), Open::Existing).unwrap().set_len(end).unwrap();
    }
    drop(head);
    store.close().unwrap();
}

/// Returns the bytes of its own that a process has in memory.
fn resident(pid: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"))?;
    Some(line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10)
}

/// It once held all entries of the map, 900 bytes a chunk: half a GiB for a disk of a TiB.
#[test]
fn a_check_does_not_hold_the_map() {
    let it = Afterimage::new();
    fill(&it.pool());
    let mut child = it.command(&["--json", "check"]).stdout(std::process::Stdio::piped()).spawn().unwrap();
    let (mut most, mut looks) = (0, 0);
    while child.try_wait().unwrap().is_none() {
        if let Some(now) = resident(child.id()) {
            (most, looks) = (now.max(most), looks + 1);
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", text(&output.stdout));
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["blocks"], u64::from(CHUNKS) * 512);
    assert!(looks > 10, "it was looked at {looks} times");
    println!("a check of {CHUNKS} chunks took {} MiB", most >> 20);
    assert!(most < 72 << 20, "{} MiB", most >> 20);
}
