//! Programs that handle disk images: qemu-img, cp, dd, truncate, mmap, fallocate, and what they are told about space.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use super::{Place, require_programs, run, shell};
use crate::tree::noise;

const MIB: u64 = 1 << 20;

/// An image of 64 MiB outside of the pool, with data and holes, its end not on a block.
fn image(place: &Place) -> std::path::PathBuf {
    let path = place.cli.path("image.raw");
    let file = fs::File::create(&path).unwrap();
    for (at, len) in [(0, 3 * MIB), (10 * MIB, 4096), (40 * MIB + 512, 777)] {
        file.write_all_at(&noise(len as usize, at), at).unwrap();
    }
    file.set_len(64 * MIB + 512).unwrap();
    path
}

/// Bytes that the pool takes on the host.
fn usage(place: &Place) -> u64 {
    let listed = run("du", [OsStr::new("-sk"), place.cli.pool().as_os_str()]);
    listed.split_whitespace().next().unwrap().parse::<u64>().unwrap() << 10
}

fn mapped(path: &Path) -> u64 {
    fs::metadata(path).unwrap().blocks() * 512
}

#[test]
fn qemu_img_converts_in_and_out() {
    if !require_programs(&["qemu-img"]) {
        return;
    }
    let Some(place) = Place::new() else { return };
    let server = place.serve();
    let (image, disk) = (image(&place), place.disk("a"));
    let qcow2 = place.cli.path("out.qcow2");
    let convert = |from: &Path, format: &str, to: &Path| {
        run("qemu-img", ["convert".as_ref(), "-O".as_ref(), format.as_ref(), from.as_os_str(), to.as_os_str()]);
    };
    convert(&image, "raw", &disk);
    run("cmp", [&image, &disk]);
    assert!(mapped(&disk) < 5 * MIB, "holes stay holes: {}", mapped(&disk));
    let told = run("qemu-img", ["info".as_ref(), "--output=json".as_ref(), disk.as_os_str()]);
    let told: serde_json::Value = serde_json::from_str(&told).unwrap();
    assert_eq!((&told["format"], &told["virtual-size"]), (&"raw".into(), &(64 * MIB + 512).into()));
    place.cli.json(&["snapshot", "a@s"]);
    convert(&place.snapshot("a", "s"), "qcow2", &qcow2);
    let compare = |a: &Path, b: &Path| {
        run("qemu-img", ["compare".as_ref(), "-q".as_ref(), a.as_os_str(), b.as_os_str()]);
    };
    compare(&qcow2, &disk);
    convert(&qcow2, "raw", &place.disk("back"));
    compare(&place.disk("back"), &image);
    // A qcow2 image may also lie in a disk, as in any other file.
    convert(&image, "qcow2", &place.disk("inner"));
    run(
        "qemu-img",
        [OsStr::new("check"), "-q".as_ref(), "-f".as_ref(), "qcow2".as_ref(), place.disk("inner").as_os_str()],
    );
    place.wait_until_free("inner");
    server.stop();
    place.check();
}

#[test]
fn cp_of_a_snapshot_without_holes_is_an_instant_clone() {
    let Some(place) = Place::new() else { return };
    let server = place.serve();
    fs::write(place.disk("a"), noise(96 << 20, 1)).unwrap();
    place.cli.json(&["snapshot", "a@s"]);
    let before = usage(&place);
    run("cp", [place.snapshot("a", "s"), place.disk("copy")]);
    let info = place.cli.json(&["info", "copy"]);
    assert_eq!(info["origin"], "a@s", "{info}");
    assert_eq!((&info["referenced"], &info["unique"]), (&(96 << 20).into(), &0.into()));
    let after = usage(&place);
    assert!(after < before + 4 * MIB, "no data was copied: {before}, then {after}");
    run("cmp", [place.snapshot("a", "s"), place.disk("copy")]);
    server.stop();
    place.check();
}

#[test]
fn cp_copies_in_and_out_with_and_without_holes() {
    let Some(place) = Place::new() else { return };
    let server = place.serve();
    let image = image(&place);
    for (name, sparse, most) in [("auto", "auto", 5), ("always", "always", 5), ("never", "never", 66)] {
        let (disk, back) = (place.disk(name), place.cli.path(&format!("{name}.back")));
        let sparse = format!("--sparse={sparse}");
        run("cp", [sparse.as_ref(), image.as_os_str(), disk.as_os_str()]);
        run("cmp", [&image, &disk]);
        assert!(mapped(&disk) < most * MIB, "{name}: {}", mapped(&disk));
        place.cli.json(&["snapshot", &format!("{name}@s")]);
        run("cp", [sparse.as_ref(), place.snapshot(name, "s").as_os_str(), back.as_os_str()]);
        run("cmp", [&image, &back]);
        // Within the pool.
        let copy = place.disk(&format!("{name}-copy"));
        run("cp", [sparse.as_ref(), place.snapshot(name, "s").as_os_str(), copy.as_os_str()]);
        run("cmp", [&image, &copy]);
    }
    server.stop();
    place.check();
}

#[test]
fn dd_and_truncate_write_in_place_and_change_the_size() {
    let Some(place) = Place::new() else { return };
    let server = place.serve();
    let (image, disk) = (image(&place), place.disk("a"));
    let twin = place.cli.path("twin.raw");
    for target in [&twin, &disk] {
        run("truncate", ["-s".as_ref(), "80M".as_ref(), target.as_os_str()]);
        for step in [
            "dd if=$1 of=$2 bs=1M conv=notrunc oflag=direct iflag=fullblock count=3 seek=7 status=none",
            "dd if=$1 of=$2 bs=64k conv=notrunc,fsync seek=100 status=none",
            "dd if=$1 of=$2 bs=777 count=3000 seek=1234 conv=notrunc oflag=dsync status=none",
            "truncate -s 33M $2",
            "truncate -s +20M $2",
            "dd if=$1 of=$2 bs=4k count=1 seek=20000 conv=notrunc status=none",
        ] {
            shell(step, &[image.as_os_str(), target.as_os_str()]);
        }
    }
    assert_eq!(fs::metadata(&disk).unwrap().len(), 20_001 * 4096);
    run("cmp", [&twin, &disk]);
    server.stop();
    place.check();
    let _server = place.serve();
    run("cmp", [&twin, &disk]);
}

#[test]
fn a_mapped_file_is_written_at_the_latest_by_msync() {
    if !require_programs(&["python3"]) {
        return;
    }
    let Some(place) = Place::new() else { return };
    let server = place.serve();
    run("truncate", ["-s".as_ref(), "16M".as_ref(), place.disk("a").as_os_str()]);
    let script = "import mmap, os, sys
f = open(sys.argv[1], 'r+b')
m = mmap.mmap(f.fileno(), 0)
for at in range(0, len(m), 65521):
    m[at:at+5] = b'%05d' % (at % 99999)
m.flush()
os._exit(0)";
    run("python3", ["-c".as_ref(), script.as_ref(), place.disk("a").as_os_str()]);
    let whole = |path: &Path| {
        let bytes = fs::read(path).unwrap();
        (0..bytes.len() - 5).step_by(65521).all(|at| bytes[at..at + 5] == *format!("{:05}", at % 99999).as_bytes())
    };
    assert!(whole(&place.disk("a")));
    place.cli.json(&["snapshot", "a@s"]);
    server.kill();
    place.check();
    let _server = place.serve();
    assert!(whole(&place.disk("a")) && whole(&place.snapshot("a", "s")));
}

#[test]
fn fallocate_gives_space_back_and_seek_finds_the_holes() {
    if !require_programs(&["fallocate"]) {
        return;
    }
    let Some(place) = Place::new() else { return };
    let _server = place.serve();
    let disk = place.disk("a");
    fs::write(&disk, noise(16 << 20, 5)).unwrap();
    assert_eq!(mapped(&disk), 16 * MIB);
    let fallocate = |words: &[&str]| run("fallocate", words.iter().map(OsStr::new).chain([disk.as_os_str()]));
    fallocate(&["--punch-hole", "--offset", "1M", "--length", "2M"]);
    assert_eq!(mapped(&disk), 14 * MIB);
    fallocate(&["--zero-range", "--offset", "8M", "--length", "1M"]);
    assert_eq!(mapped(&disk), 13 * MIB);
    fallocate(&["--punch-hole", "--offset", "1000", "--length", "2000"]);
    assert_eq!(mapped(&disk), 13 * MIB, "an edge is zeroed and stays mapped");
    fallocate(&["--length", "20M"]);
    assert_eq!((fs::metadata(&disk).unwrap().len(), mapped(&disk)), (20 * MIB, 13 * MIB));
    let mut expected = noise(16 << 20, 5);
    expected.resize(20 << 20, 0);
    for range in [1 << 20..3 << 20, 8 << 20..9 << 20, 1000..3000] {
        expected[range].fill(0);
    }
    assert!(fs::read(&disk).unwrap() == expected);
    if !super::require(super::is_installed("xfs_io"), "xfs_io") {
        return;
    }
    let walk = run("xfs_io", ["-r".as_ref(), "-c".as_ref(), "seek -a -r 0".as_ref(), disk.as_os_str()]);
    let found: Vec<&str> = walk.lines().filter(|line| line.contains(char::is_numeric)).collect();
    let wanted = ["DATA\t0", "HOLE\t1048576", "DATA\t3145728", "HOLE\t8388608", "DATA\t9437184", "HOLE\t16777216"];
    assert_eq!(found, wanted, "{walk}");
}
