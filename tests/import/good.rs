//! Images that come in whole.

use super::Bench;

#[test]
fn raw_keeps_its_holes() {
    let bench = Bench::new();
    bench.make_raw("a.raw");
    let report = bench.same("a.raw", "raw");
    assert!(report.bytes_read < 10 << 20, "holes are not read: {report:?}");
    assert!(report.bytes_written < 4 << 20, "{report:?}");
}

#[test]
fn raw_of_any_length_is_rounded_up() {
    let bench = Bench::new();
    for len in [1, 511, 512, 4095, 4097, 5_000_001] {
        let bytes: Vec<u8> = (0..len).map(|i| (i % 251 + 1) as u8).collect();
        std::fs::write(bench.path("odd.raw"), &bytes).unwrap();
        let report = bench.import("odd.raw", None, "odd").unwrap();
        assert_eq!(report.size, (len as u64).next_multiple_of(512));
        let disk = afterimage::disk::open(&bench.store, "odd").unwrap();
        let mut got = vec![9; usize::try_from(report.size).unwrap()];
        afterimage::disk::BlockDevice::read(&*disk, &mut got, 0).unwrap();
        assert!(got[..bytes.len()] == bytes && got[bytes.len()..].iter().all(|b| *b == 0), "{len}");
        drop(disk);
        afterimage::disk::remove(&bench.store, "odd", false).unwrap();
    }
}

#[test]
fn an_empty_disk_of_64_tib_is_quick() {
    let bench = Bench::new();
    bench.qemu_img(&["create", "-q", "-f", "qcow2", "-o", "cluster_size=2M", "huge.qcow2", "64T"]);
    let report = bench.import("huge.qcow2", None, "huge").unwrap();
    assert_eq!((report.size, report.bytes_read, report.bytes_written), (64 << 40, 0, 0));
}

#[test]
fn qcow2_of_every_kind() {
    let bench = Bench::new();
    bench.make_raw("a.raw");
    for options in [
        "compat=1.1,cluster_size=64k",
        "compat=0.10,cluster_size=64k",
        "compat=1.1,cluster_size=2M",
        "compat=1.1,cluster_size=512",
        "compat=1.1,preallocation=metadata",
        "compat=1.1,compression_type=zstd",
        "compat=1.1,extended_l2=on,cluster_size=64k",
    ] {
        for compressed in [false, true] {
            if compressed && (options.contains("preallocation") || options.contains("=512")) {
                continue;
            }
            let mut args = vec!["convert", "-f", "raw", "-O", "qcow2", "-o", options, "a.raw", "b.qcow2"];
            if compressed {
                args.push("-c");
            }
            bench.qemu_img(&args);
            bench.same("b.qcow2", "qcow2");
        }
    }
}

#[test]
fn qcow2_shows_its_present_not_its_snapshots() {
    let bench = Bench::new();
    bench.make_raw("a.raw");
    bench.qemu_img(&["convert", "-f", "raw", "-O", "qcow2", "a.raw", "s.qcow2"]);
    bench.qemu_img(&["snapshot", "-c", "one", "s.qcow2"]);
    // Zero clusters, with and without an allocation, over data of the snapshot; new data; a discard.
    bench.qemu_io(&[
        "-f",
        "qcow2",
        "-c",
        "write -z 1M 256k",
        "-c",
        "write -z -u 2M 256k",
        "-c",
        "write -P 9 50M 100k",
        "-c",
        "discard 70M 64k",
        "s.qcow2",
    ]);
    bench.qemu_img(&["snapshot", "-c", "two", "s.qcow2"]);
    bench.qemu_io(&["-f", "qcow2", "-c", "write -P 3 50M 10k", "s.qcow2"]);
    bench.same("s.qcow2", "qcow2");
}

#[test]
fn vmdk_of_every_kind() {
    let bench = Bench::new();
    bench.make_raw("a.raw");
    for kind in ["monolithicSparse", "streamOptimized", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat", "monolithicFlat"]
    {
        let (options, file) = (format!("subformat={kind}"), format!("{kind}.vmdk"));
        bench.qemu_img(&["convert", "-f", "raw", "-O", "vmdk", "-o", &options, "a.raw", &file]);
        bench.same(&file, "vmdk");
    }
}

#[test]
fn vmdk_of_several_extents() {
    let bench = Bench::new();
    bench.qemu_img(&["create", "-q", "-f", "vmdk", "-o", "subformat=twoGbMaxExtentSparse", "big.vmdk", "5G"]);
    bench.qemu_io(&["-f", "vmdk", "-c", "write -P 5 2147450880 128k", "-c", "write -P 6 4G 1M", "big.vmdk"]);
    let report = bench.import("big.vmdk", Some("vmdk"), "big").unwrap();
    assert_eq!((report.size, report.bytes_written), (5 << 30, (1 << 20) + (128 << 10)));
    let disk = afterimage::disk::open(&bench.store, "big").unwrap();
    for (at, want) in [(2_147_450_879, 0), (2_147_450_880, 5), (2_147_581_951, 5), (2_147_581_952, 0), (4 << 30, 6)] {
        let mut byte = [1];
        afterimage::disk::BlockDevice::read(&*disk, &mut byte, at).unwrap();
        assert_eq!(byte[0], want, "{at}");
    }
}

#[test]
fn a_given_format_is_not_second_guessed() {
    let bench = Bench::new();
    bench.qemu_img(&["create", "-q", "-f", "qcow2", "-b", "/etc/passwd", "-F", "raw", "b.qcow2", "1M"]);
    let report = bench.import("b.qcow2", Some("raw"), "as-is").unwrap();
    assert_eq!(report.size, std::fs::metadata(bench.path("b.qcow2")).unwrap().len().next_multiple_of(512));
}

#[test]
fn qcow2_that_was_not_closed_is_read() {
    let bench = Bench::new();
    bench.qemu_img(&["create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on", "dirty.qcow2", "8M"]);
    let writer = std::process::Command::new("qemu-io")
        .args(["-f", "qcow2", "-c", "write -P 5 1M 1M", "-c", "flush", "-c", "abort", "dirty.qcow2"])
        .current_dir(bench.dir.path())
        .output();
    assert!(!writer.unwrap().status.success());
    let head = std::fs::read(bench.path("dirty.qcow2")).unwrap();
    assert_eq!(head[79] & 1, 1, "it is marked as dirty");
    bench.same("dirty.qcow2", "qcow2");
}
