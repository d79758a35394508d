//! Images that must not come in, and what is left then: nothing.

use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};

use afterimage::disk;
use afterimage::error::{Error, Kind};
use afterimage::progress::Progress;

use super::Bench;

impl Bench {
    fn refused(&self, file: &str, format: Option<&str>, what: &str) -> Error {
        let error = self.import(file, format, "bad").expect_err(what);
        self.no_disks();
        assert!(error.message().contains(file), "the error names the file: {error}");
        error
    }

    fn patch(&self, file: &str, at: u64, bytes: &[u8]) {
        std::fs::File::options().write(true).open(self.path(file)).unwrap().write_all_at(bytes, at).unwrap();
    }

    fn cut(&self, from: &str, to: &str, len: u64) {
        std::fs::copy(self.path(from), self.path(to)).unwrap();
        std::fs::File::options().write(true).open(self.path(to)).unwrap().set_len(len).unwrap();
    }
}

#[test]
fn other_files_are_never_read() {
    let bench = Bench::new();
    bench.make_raw("a.raw");
    bench.qemu_img(&["create", "-q", "-f", "qcow2", "-b", "a.raw", "-F", "raw", "b.qcow2"]);
    bench.qemu_img(&["create", "-q", "-f", "qcow2", "-o", "data_file=d.raw", "d.qcow2", "1M"]);
    bench.qemu_img(&["create", "-q", "-f", "vmdk", "p.vmdk", "1M"]);
    bench.qemu_img(&["create", "-q", "-f", "vmdk", "-b", "p.vmdk", "-F", "vmdk", "c.vmdk"]);
    for name in ["b.qcow2", "d.qcow2", "c.vmdk"] {
        let error = bench.refused(name, None, "it needs another file");
        assert_eq!(error.kind(), Kind::Failed, "{error}");
        assert!(error.next_step().unwrap().contains("qemu-img convert"), "{error}");
    }
}

#[test]
fn vmdk_extents_by_foreign_names_are_never_read() {
    let bench = Bench::new();
    bench.make_raw("a.raw");
    let header = "# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\ncreateType=\"monolithicFlat\"\n";
    for (line, named) in [
        ("RW 2 FLAT \"/etc/passwd\" 0", "passwd"),
        ("RW 2 FLAT \"a.raw\" 0", "a.raw"),
        ("RW 2 FLAT \"../e-flat.vmdk\" 0", "e-flat"),
        ("RW 2 SPARSE \"json:{}\"", "json"),
    ] {
        std::fs::write(bench.path("e.vmdk"), format!("{header}{line}\n")).unwrap();
        let error = bench.refused("e.vmdk", None, line);
        assert!(error.message().contains(named), "{error}");
    }
    std::os::unix::fs::symlink("/etc/passwd", bench.path("e-flat.vmdk")).unwrap();
    std::fs::write(bench.path("e.vmdk"), format!("{header}RW 2 FLAT \"e-flat.vmdk\" 0\n")).unwrap();
    bench.refused("e.vmdk", None, "a symbolic link");
    // A sparse file without a size is a descriptor in disguise.
    bench.qemu_img(&["create", "-q", "-f", "vmdk", "s.vmdk", "1M"]);
    bench.patch("s.vmdk", 12, &[0; 8]);
    let error = bench.refused("s.vmdk", None, "no size");
    assert!(error.message().contains("which files are read"), "{error}");
}

#[test]
fn encrypted_images_are_refused() {
    let bench = Bench::new();
    bench.qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "--object",
        "secret,id=s,data=x",
        "-o",
        "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10",
        "l.qcow2",
        "1M",
    ]);
    let error = bench.refused("l.qcow2", None, "encrypted");
    assert!(error.message().contains("encrypted"), "{error}");
}

#[test]
fn images_that_were_cut_short_are_damaged() {
    let bench = Bench::new();
    bench.make_raw("a.raw");
    let convert = |options: &[&str], to: &str| {
        let mut args = vec!["convert", "-f", "raw", "a.raw", to];
        args.extend(options);
        bench.qemu_img(&args);
    };
    convert(&["-O", "qcow2"], "q.img");
    convert(&["-O", "qcow2", "-c"], "c.img");
    convert(&["-O", "qcow2", "-o", "compression_type=zstd", "-c"], "z.img");
    convert(&["-O", "vmdk"], "v.img");
    convert(&["-O", "vmdk", "-o", "subformat=streamOptimized"], "s.img");
    for name in ["q.img", "c.img", "z.img", "v.img", "s.img"] {
        // Of what follows the last byte that is not zero nothing would be missed.
        let bytes = std::fs::read(bench.path(name)).unwrap();
        let len = bytes.iter().rposition(|byte| *byte != 0).unwrap() as u64 + 1;
        let mut parts = vec![80, len / 4, len / 2, len - len / 8, len - (66 << 10)];
        if name == "v.img" || name == "s.img" {
            parts.push(len - 1);
        }
        for part in parts {
            bench.cut(name, "cut.img", part);
            let error = bench.refused("cut.img", None, &format!("{name} cut to {part} of {len}"));
            assert!(matches!(error.kind(), Kind::Corrupt | Kind::Failed), "{name} {part}: {error}");
        }
    }
}

#[test]
fn damaged_metadata_never_leaves_a_disk_or_panics() {
    let bench = Bench::new();
    bench.make_raw("a.raw");
    bench.qemu_img(&["convert", "-f", "raw", "-O", "qcow2", "a.raw", "q.img"]);
    let good = std::fs::read(bench.path("q.img")).unwrap();
    let l1 = u64::from_be_bytes(good[40..48].try_into().unwrap());
    let l2 = u64::from_be_bytes(good[l1 as usize..][..8].try_into().unwrap()) & 0x00ff_ffff_ffff_fe00;
    let mut seed = 1_u64;
    let mut failed = 0;
    for round in 0..120 {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let at = match round % 3 {
            0 => 4 + (seed >> 40) % 100,
            1 => l1 + (seed >> 40) % 8,
            _ => l2 + (seed >> 40) % 1280,
        };
        std::fs::write(bench.path("bad.img"), &good).unwrap();
        bench.patch("bad.img", at, &[good[at as usize] ^ (1 << (seed >> 61))]);
        match bench.import("bad.img", Some("qcow2"), "bad") {
            Ok(_) => disk::remove(&bench.store, "bad", false).unwrap(),
            Err(_) => failed += 1,
        }
        bench.no_disks();
    }
    assert!(failed > 20, "only {failed} of 120 were noticed");
}

#[test]
fn formats_are_named_or_known() {
    let bench = Bench::new();
    bench.make_raw("a.raw");
    assert_eq!(bench.import("a.raw", Some("vhdx"), "x").unwrap_err().kind(), Kind::Usage);
    assert_eq!(bench.refused("a.raw", Some("qcow2"), "not qcow2").kind(), Kind::Corrupt);
    assert_eq!(bench.refused("a.raw", Some("vmdk"), "not vmdk").kind(), Kind::Corrupt);
    assert_eq!(bench.refused("nothing.raw", None, "not there").kind(), Kind::NotFound);
    bench.qemu_img(&["create", "-q", "-f", "vdi", "a.vdi", "1M"]);
    assert!(bench.refused("a.vdi", None, "VDI").message().contains("VDI"));
    std::fs::write(bench.path("empty"), b"").unwrap();
    assert_eq!(bench.refused("empty", None, "no bytes").kind(), Kind::Usage);
    bench.refused("pool", None, "a folder");
}

#[test]
fn names_are_not_taken_over() {
    let bench = Bench::new();
    bench.make_raw("a.raw");
    disk::create(&bench.store, "there", 4096).unwrap();
    assert_eq!(bench.import("a.raw", None, "there").unwrap_err().kind(), Kind::Exists);
    assert_eq!(bench.import("a.raw", None, "a@b").unwrap_err().kind(), Kind::Usage);
    assert_eq!(bench.store.disks().len(), 1);
}

/// Cancels after so many bytes.
struct Impatient {
    most: u64,
    done: AtomicU64,
}

impl Progress for Impatient {
    fn total(&self, _units: u64) {}
    fn advance(&self, done: u64) {
        self.done.fetch_add(done, Ordering::Relaxed);
    }
    fn message(&self, _text: &str) {}
    fn cancelled(&self) -> bool {
        self.done.load(Ordering::Relaxed) >= self.most
    }
}

#[test]
fn cancelled_imports_leave_no_disk() {
    let bench = Bench::new();
    bench.make_raw("a.raw");
    bench.qemu_img(&["convert", "-f", "raw", "-O", "qcow2", "a.raw", "a.qcow2"]);
    bench.qemu_img(&["convert", "-f", "raw", "-O", "vmdk", "a.raw", "a.vmdk"]);
    for name in ["a.raw", "a.qcow2", "a.vmdk"] {
        for most in [0, 3 << 20, 80 << 20] {
            let progress = Impatient { most, done: AtomicU64::new(0) };
            let error = disk::import(&bench.store, &bench.path(name), None, "bad", &progress).unwrap_err();
            assert!(error.message().ends_with("cancelled"), "{error}");
            bench.no_disks();
        }
        let progress = Impatient { most: u64::MAX, done: AtomicU64::new(0) };
        disk::import(&bench.store, &bench.path(name), None, "good", &progress).unwrap();
        assert_eq!(progress.done.into_inner(), 80 << 20, "progress comes to the whole");
        disk::remove(&bench.store, "good", false).unwrap();
    }
}
