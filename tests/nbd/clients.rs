//! Real clients: libnbd's programs and its shell, QEMU's, and fio.

use std::fs;
use std::os::unix::fs::FileExt;

use afterimage::codec::crc32;
use afterimage::disk::BlockDevice;
use serde_json::Value;

use super::{MIB, Rig, content};
use crate::real::{command, require_programs, run};
use crate::tree::noise;

/// A file with data and holes, its end not on a block.
fn image(rig: &Rig) -> std::path::PathBuf {
    let path = rig.file("image.raw");
    let file = fs::File::create(&path).unwrap();
    for (at, len) in [(0, 3 * MIB), (10 * MIB, 4096), (20 * MIB + 512, 777)] {
        file.write_all_at(&noise(len as usize, at), at).unwrap();
    }
    file.set_len(24 * MIB + 512).unwrap();
    path
}

#[test]
fn nbdinfo_tells_what_there_is() {
    if !require_programs(&["nbdinfo"]) {
        return;
    }
    let rig = Rig::new();
    rig.disk("a", 24 * MIB + 512).write(&[1; 8192], 0).unwrap();
    rig.take("a", "s");
    rig.disk("b", MIB);
    let told: Value = serde_json::from_str(&run("nbdinfo", ["--json", &rig.uri("a")])).unwrap();
    let export = &told["exports"][0];
    assert_eq!((&told["protocol"], &told["structured"]), (&"newstyle-fixed".into(), &true.into()));
    assert_eq!((&export["export-size"], &export["is_read_only"]), (&(24 * MIB + 512).into(), &false.into()));
    for can in
        ["can_cache", "can_df", "can_fast_zero", "can_flush", "can_fua", "can_multi_conn", "can_trim", "can_zero"]
    {
        assert_eq!(export[can], true, "{can} in {told}");
    }
    let sizes = ["block_size_minimum", "block_size_preferred", "block_size_maximum"].map(|key| export[key].as_u64());
    assert_eq!(sizes, [Some(1), Some(4096), Some(32 << 20)]);
    assert_eq!(export["contexts"], serde_json::json!(["base:allocation", "qemu:dirty-bitmap:s"]));
    let told: Value = serde_json::from_str(&run("nbdinfo", ["--json", "--list", &rig.uri("")])).unwrap();
    let names: Vec<_> =
        told["exports"].as_array().unwrap().iter().map(|e| e["export-name"].as_str().unwrap()).collect();
    assert_eq!(names, ["a", "a@s", "b"]);
    assert_eq!(told["exports"][1]["is_read_only"], true);
    rig.wait_until_quiet();
    assert_eq!(rig.store.disk_info("a").unwrap().holder, None, "the lease fell with the connection");
}

#[test]
fn maps_tell_data_from_holes() {
    if !require_programs(&["nbdinfo", "qemu-img"]) {
        return;
    }
    let rig = Rig::new();
    let disk = rig.disk("a", 16 * MIB + 512);
    disk.write(&[1; 8192], 4096).unwrap();
    disk.write(&[1; 100], 8 * MIB + 5000).unwrap();
    let expected = [
        (0, 4096, 3),
        (4096, 8192, 0),
        (12288, 8 * MIB + 4096 - 12288, 3),
        (8 * MIB + 4096, 4096, 0),
        (8 * MIB + 8192, 8 * MIB + 512 - 8192, 3),
    ];
    assert_eq!(map(&rig, "a", "base:allocation"), expected);
    let told: Value = serde_json::from_str(&run("qemu-img", ["map", "--output=json", &rig.uri("a")])).unwrap();
    // QEMU rounds the end of a disk up to 512.
    let told: Vec<_> =
        told.as_array().unwrap().iter().map(|e| (e["start"].as_u64().unwrap(), e["data"] == true)).collect();
    assert_eq!(told, expected.map(|(start, _, flags)| (start, flags == 0)));
}

/// Returns what nbdinfo says of a context, as offset, length and flags.
pub(super) fn map(rig: &Rig, export: &str, context: &str) -> Vec<(u64, u64, u64)> {
    let told = run("nbdinfo", ["--json", &format!("--map={context}"), &rig.uri(export)]);
    let told: Value = serde_json::from_str(&told).unwrap();
    let number = |entry: &Value, key: &str| entry[key].as_u64().unwrap();
    told.as_array().unwrap().iter().map(|e| (number(e, "offset"), number(e, "length"), number(e, "type"))).collect()
}

#[test]
fn nbdcopy_goes_both_ways() {
    if !require_programs(&["nbdcopy"]) {
        return;
    }
    let rig = Rig::new();
    let image = image(&rig);
    let disk = rig.disk("a", 24 * MIB + 512);
    disk.write(&noise(4 << 20, 9), 8 * MIB).unwrap();
    run("nbdcopy", [image.to_str().unwrap(), &rig.uri("a")]);
    assert!(content(&*disk) == fs::read(&image).unwrap());
    assert!(disk.mapped() < 4 * MIB, "holes stay holes: {}", disk.mapped());
    let out = rig.file("out.raw");
    run("nbdcopy", ["--flush", &rig.uri("a"), out.to_str().unwrap()]);
    run("cmp", [&image, &out]);
    rig.disk("b", 24 * MIB + 512);
    // With every block allocated, by many connections, from one export to the other.
    run("nbdcopy", ["--allocated", "--connections=4", "--requests=64", &rig.uri("a"), &rig.uri("b")]);
    let copy = afterimage::disk::open(&rig.store, "b").unwrap();
    assert!(content(&*copy) == fs::read(&image).unwrap());
    assert_eq!(copy.mapped(), (24 * MIB + 512).next_multiple_of(4096));
}

#[test]
fn qemu_img_converts_and_compares() {
    if !require_programs(&["qemu-img"]) {
        return;
    }
    let rig = Rig::new();
    let image = image(&rig);
    let disk = rig.disk("a", 24 * MIB + 512);
    let (from, uri, out) = (image.to_str().unwrap(), rig.uri("a"), rig.file("out.qcow2"));
    run("qemu-img", ["convert", "-n", "-f", "raw", "-O", "raw", from, &uri]);
    assert!(content(&*disk) == fs::read(&image).unwrap());
    rig.take("a", "s");
    disk.write(&[5; 4096], 5 * MIB).unwrap();
    let snapshot = rig.uri("a@s");
    run("qemu-img", ["convert", "-m", "16", "-W", "-O", "qcow2", &snapshot, out.to_str().unwrap()]);
    run("qemu-img", ["compare", "-f", "raw", "-F", "qcow2", &snapshot, out.to_str().unwrap()]);
    run("qemu-img", ["compare", "-f", "raw", "-F", "raw", &snapshot, from]);
}

/// Runs lines of Python with a libnbd handle `h` that is not connected.
fn nbdsh(rig: &Rig, script: &str) {
    let path = rig.socket();
    let script = format!("import errno\nsock = {:?}\nmib = 1 << 20\n{script}", path.to_str().unwrap());
    // The shell is for the host's own Python, whatever other one comes first elsewhere.
    let output = command("nbdsh", ["-c", &script]).env("PATH", "/usr/bin:/bin").output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn requests_of_every_kind_do_what_they_say() {
    if !require_programs(&["nbdsh"]) {
        return;
    }
    let rig = Rig::new();
    let disk = rig.disk("a", 16 * MIB);
    nbdsh(
        &rig,
        r#"
h.add_meta_context("base:allocation")
h.set_export_name("a")
h.connect_unix(sock)
h.set_strict_mode(0)
assert h.get_structured_replies_negotiated()
def fails(number, what, *args):
    try: what(*args)
    except nbd.Error as error: assert error.errnum == number, (number, error)
    else: assert False, what
# Writes of any alignment, and FUA.
h.pwrite(b"x" * 3, 4095)
h.pwrite(b"y" * (8 * mib), 4 * mib, nbd.CMD_FLAG_FUA)
assert h.pread(8192, 0) == b"\0" * 4095 + b"xxx" + b"\0" * 4094
# A read with holes comes in pieces, and with DF in one.
pieces = []
def chunk(data, offset, status, error): pieces.append((offset, len(data), status))
buf = h.pread_structured(mib, 3 * mib + 512 * 1024, chunk)
assert buf == b"\0" * (mib // 2) + b"y" * (mib // 2)
assert pieces == [(3 * mib + mib // 2, mib // 2, nbd.READ_HOLE), (4 * mib, mib // 2, nbd.READ_DATA)], pieces
pieces = []
h.pread_structured(mib, 3 * mib + 512 * 1024, chunk, nbd.CMD_FLAG_DF)
assert pieces == [(3 * mib + mib // 2, mib, nbd.READ_DATA)], pieces
# What is not wanted any more.
def status(count, offset, flags=0):
    out = []
    h.block_status(count, offset, lambda context, at, entries, error: out.extend(entries), flags)
    return out
assert status(16 * mib, 0) == [8192, 0, 4 * mib - 8192, 3, 8 * mib, 0, 4 * mib, 3], status(16 * mib, 0)
assert status(16 * mib, 0, nbd.CMD_FLAG_REQ_ONE) == [8192, 0]
h.trim(2 * mib + 100, 5 * mib - 50, nbd.CMD_FLAG_FUA)
assert h.pread(2, 5 * mib - 1) == b"y\0"
assert status(3 * mib, 5 * mib) == [2 * mib, 3, mib, 0], status(3 * mib, 5 * mib)
h.zero(100, 8 * mib + 5)
assert h.pread(102, 8 * mib + 4) == b"y" + b"\0" * 100 + b"y"
h.zero(mib, 9 * mib, nbd.CMD_FLAG_FAST_ZERO)
assert status(mib, 9 * mib) == [mib, 3]
h.zero(3 * mib + 7, 12 * mib + 1, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FUA)
assert h.pread(4 * mib, 12 * mib) == b"\0" * 4 * mib
assert status(4 * mib, 12 * mib)[1] == 0, status(4 * mib, 12 * mib)
fails(errno.ENOTSUP, h.zero, mib, 9 * mib, nbd.CMD_FLAG_FAST_ZERO | nbd.CMD_FLAG_NO_HOLE)
h.cache(mib, 0)
h.flush()
# What makes no sense is refused, and the connection goes on.
fails(errno.EINVAL, h.pread, 1, 16 * mib)
fails(errno.ENOSPC, h.pwrite, b"z", 16 * mib)
fails(errno.ENOSPC, h.zero, 2, 16 * mib - 1)
fails(errno.EINVAL, h.trim, 2, 16 * mib - 1)
fails(errno.EINVAL, h.pread, 33 * mib, 0)
fails(errno.EINVAL, h.pwrite, b"z" * (33 * mib), 0)
fails(errno.EINVAL, h.pread, 1, 0, 1 << 9)
assert h.pread(1, 4 * mib) == b"y"
h.shutdown()
"#,
    );
    disk.flush().unwrap();
    let mut three = [0; 3];
    disk.read(&mut three, 4095).unwrap();
    assert_eq!(&three, b"xxx");
}

#[test]
fn a_snapshot_is_not_written() {
    if !require_programs(&["nbdsh"]) {
        return;
    }
    let rig = Rig::new();
    rig.disk("a", MIB).write(&[7; 4096], 0).unwrap();
    rig.take("a", "s");
    nbdsh(
        &rig,
        r#"
h.set_export_name("a@s")
h.set_full_info(True)
h.connect_unix(sock)
h.set_strict_mode(0)
assert h.get_export_description() == "'a@s' of a test" and h.get_canonical_export_name() == "a@s"
assert h.is_read_only() and not h.can_trim() and not h.can_zero()
for write in [lambda: h.pwrite(b"x", 0), lambda: h.trim(4096, 0), lambda: h.zero(4096, 0)]:
    try: write()
    except nbd.Error as error: assert error.errnum == errno.EPERM, error
    else: assert False
h.flush()
assert h.pread(4096, 0) == b"\x07" * 4096
"#,
    );
}

#[test]
fn what_one_connection_wrote_another_one_flushes() {
    if !require_programs(&["nbdsh"]) {
        return;
    }
    let rig = Rig::new();
    rig.disk("a", 64 * MIB);
    nbdsh(
        &rig,
        r#"
hs = [nbd.NBD() for _ in range(4)]
for h in hs:
    h.set_export_name("a")
    h.connect_unix(sock)
    assert h.can_multi_conn()
for n in range(256):
    hs[n % 4].pwrite(bytes([n]) * 4096, n * 8192)
hs[0].flush()
for n in range(256):
    assert hs[(n + 1) % 4].pread(4096, n * 8192) == bytes([n]) * 4096
for h in hs: h.shutdown()
"#,
    );
}

#[test]
fn a_client_without_structured_replies_is_served() {
    if !require_programs(&["nbdsh"]) {
        return;
    }
    let rig = Rig::new();
    rig.disk("a", 4 * MIB);
    nbdsh(
        &rig,
        r#"
h.set_request_structured_replies(False)
h.set_handshake_flags(0)
h.connect_unix(sock)
assert not h.get_structured_replies_negotiated() and not h.can_df()
h.pwrite(b"q" * 5000, 10)
assert h.pread(5002, 9) == b"\0" + b"q" * 5000 + b"\0"
try: h.pread(10, 4 * mib - 5)
except nbd.Error: pass
else: assert False
assert h.pread(1, 10) == b"q"
"#,
    );
}

/// What is taken under its writes stays as it was then.
#[test]
fn fio_finds_what_it_wrote_while_snapshots_are_taken() {
    if !require_programs(&["fio"]) {
        return;
    }
    let rig = Rig::new();
    rig.disk("a", 64 * MIB);
    let dir = format!("--aux-path={}", rig.file("").display());
    let uri = format!("--uri={}", rig.uri("a"));
    let mut taken = Vec::new();
    for (mode, size, depth) in [("randrw", "4k", 32), ("randwrite", "1536", 16), ("write", "1m", 4)] {
        let words = [
            "--name=v".to_owned(),
            "--ioengine=nbd".to_owned(),
            uri.clone(),
            dir.clone(),
            format!("--rw={mode}"),
            format!("--bs={size}"),
            format!("--iodepth={depth}"),
            "--size=24m".to_owned(),
            "--verify=crc32c".to_owned(),
            "--verify_state_save=0".to_owned(),
            "--do_verify=1".to_owned(),
            "--randseed=1".to_owned(),
        ];
        std::thread::scope(|scope| {
            let fio = scope.spawn(|| run("fio", words));
            while !fio.is_finished() {
                let name = format!("s{}", taken.len());
                rig.take("a", &name);
                let snapshot = afterimage::snapshot::open(&rig.store, "a", &name).unwrap();
                taken.push((crc32(&content(&*snapshot)), snapshot));
                std::thread::sleep(std::time::Duration::from_millis(20));
            }
        });
    }
    println!("{} snapshots under fio", taken.len());
    let sums: std::collections::BTreeSet<u32> = taken.iter().map(|(sum, _)| *sum).collect();
    assert!(sums.len() > 3, "they were taken while it wrote");
    for (then, snapshot) in taken {
        assert_eq!(crc32(&content(&*snapshot)), then, "a snapshot stays as it was");
    }
}
