//! Changed blocks: `qemu:dirty-bitmap:NAME` for snapshots of the lineage, live and retired.

use afterimage::disk::{self, BlockDevice};
use afterimage::nbd::{Asked, Exported, contexts_of};
use afterimage::snapshot;
use serde_json::Value;

use super::clients::map;
use super::{MIB, Rig};
use crate::real::{require_programs, run};

#[test]
fn a_bitmap_tells_what_changed_since_a_snapshot_also_a_retired_one() {
    if !require_programs(&["nbdinfo"]) {
        return;
    }
    let rig = Rig::new();
    let disk = rig.disk("a", 16 * MIB);
    disk.write(&[1; 16384], 0).unwrap();
    rig.take("a", "s1");
    disk.write(&[2; 4096], 4096).unwrap();
    disk.discard(8192, 4096).unwrap();
    rig.take("a", "s2");
    disk.write(&[3; 4096], 8 * MIB).unwrap();
    let s1_to_s2 = [(0, 4096, 0), (4096, 8192, 1), (12288, 16 * MIB - 12288, 0)];
    let s2_to_now = [(0, 8 * MIB, 0), (8 * MIB, 4096, 1), (8 * MIB + 4096, 8 * MIB - 4096, 0)];
    for retired in [false, true] {
        if retired {
            snapshot::retire(&rig.store, &[("a".to_owned(), "s1".to_owned())]).unwrap();
        }
        assert_eq!(map(&rig, "a@s2", "qemu:dirty-bitmap:s1"), s1_to_s2);
        assert_eq!(map(&rig, "a", "qemu:dirty-bitmap:s2"), s2_to_now);
        let both = map(&rig, "a", "qemu:dirty-bitmap:s1");
        let dirty: Vec<_> = both.iter().filter(|e| e.2 == 1).map(|e| (e.0, e.1)).collect();
        assert_eq!(dirty, [(4096, 8192), (8 * MIB, 4096)]);
    }
}

#[test]
fn snapshots_of_relatives_are_bases_too_and_strangers_are_refused() {
    let rig = Rig::new();
    let disk = rig.disk("a", 4 * MIB);
    disk.write(&[1; 8192], 0).unwrap();
    rig.take("a", "s");
    snapshot::clone(&rig.store, "a", "s", "b").unwrap();
    let clone = disk::open(&rig.store, "b").unwrap();
    clone.write(&[2; 4096], MIB).unwrap();
    rig.take("b", "t");
    rig.disk("c", 4 * MIB);
    rig.take("c", "u");
    let contexts = contexts_of(&rig.store, Exported::Disk(clone.id()));
    assert_eq!(contexts.names(), ["t", "a@s"]);
    assert_eq!(contexts.dirty("a@s", &Asked::patiently()).unwrap().at(0), (false, MIB));
    assert_eq!(contexts.dirty("a@s", &Asked::patiently()).unwrap().at(MIB), (true, MIB + 4096));
    assert_eq!(contexts.dirty("t", &Asked::patiently()).unwrap().at(0), (false, u64::MAX));
    let stranger = contexts.dirty("c@u", &Asked::patiently()).unwrap_err();
    assert_eq!(stranger.kind(), afterimage::error::Kind::Failed);
    assert!(stranger.to_string().contains("nothing in common"), "{stranger}");
    for unknown in ["x", "x@s", "a@x", ""] {
        assert_eq!(contexts.dirty(unknown, &Asked::patiently()).unwrap_err().kind(), afterimage::error::Kind::NotFound);
    }
    let snapshot = snapshot::open(&rig.store, "b", "t").unwrap();
    assert_eq!(contexts_of(&rig.store, Exported::Snapshot(snapshot.id())).names(), ["a@s"]);
}

#[test]
fn qemu_reads_the_bitmap_as_its_own() {
    if !require_programs(&["qemu-img"]) {
        return;
    }
    let rig = Rig::new();
    let disk = rig.disk("a", 4 * MIB);
    rig.take("a", "s");
    disk.write(&[2; 4096], MIB).unwrap();
    let options = format!(
        "driver=nbd,export=a,server.type=unix,server.path={},x-dirty-bitmap=qemu:dirty-bitmap:s",
        rig.socket().display()
    );
    let told = run("qemu-img", ["map", "--output=json", "--image-opts", &options]);
    let told: Value = serde_json::from_str(&told).unwrap();
    // QEMU shows what is dirty as what has no data.
    let dirty: Vec<_> = told.as_array().unwrap().iter().filter(|e| e["data"] == false).collect();
    assert_eq!(dirty.len(), 1, "{told}");
    assert_eq!((&dirty[0]["start"], &dirty[0]["length"]), (&MIB.into(), &4096.into()));
}
