//! `retired/`: moving a snapshot there retires it, and its record is a file.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::PathBuf;

use afterimage::snapshot;
use afterimage::snapshot::record::Record;
use afterimage::store::SnapshotState;

use super::{Mount, create, errno, noise, run};

impl Mount {
    /// Returns the path of a record.
    fn record(&self, disk: &str, name: &str) -> PathBuf {
        self.dir.join("retired").join(disk).join(format!("{name}.aimg"))
    }
}

#[test]
fn moving_a_snapshot_retires_it() {
    let Some(mount) = Mount::new() else { return };
    let path = mount.make("a", 8 << 20);
    create(&path).write_all_at(&noise(8 << 20, 1), 0).unwrap();
    for round in 0..20 {
        let name = format!("s{round}");
        let (live, record) = (mount.snapshot("a", &name), mount.record("a", &name));
        create(&live);
        fs::metadata(&live).unwrap();
        run("mv", &[live.as_os_str(), record.as_os_str()]);
        assert_eq!(mount.store.snapshot_info("a", &name).unwrap().state, SnapshotState::Retired);
        assert_eq!(errno(fs::metadata(&live)), libc::ENOENT);
        assert_eq!(errno(fs::metadata(mount.dir.join("exports/a").join(&name))), libc::ENOENT);
        let bytes = fs::read(&record).unwrap();
        let meta = fs::metadata(&record).unwrap();
        assert_eq!((meta.len(), meta.permissions().mode() & 0o7777), (bytes.len() as u64, 0o400));
        let uuid = mount.store.snapshot_info("a", &name).unwrap().uuid;
        assert_eq!(Record::open(&**mount.store.media(), uuid).unwrap().identity.row.state.name, name);
        assert_eq!(bytes[..8], *b"\x89AFTAI\r\n");
        create(&path).write_all_at(&noise(100, round + 2), round * 4096).unwrap();
    }
    assert_eq!(fs::read_dir(mount.dir.join("retired/a")).unwrap().count(), 20);
    assert_eq!(fs::read_dir(mount.dir.join("snapshots/a")).unwrap().count(), 0);
}

#[test]
fn other_moves_are_refused() {
    let Some(mount) = Mount::new() else { return };
    mount.make("a", 4096);
    mount.make("b", 4096);
    create(&mount.snapshot("a", "s"));
    create(&mount.snapshot("a", "old"));
    fs::rename(mount.snapshot("a", "old"), mount.record("a", "old")).unwrap();
    for (from, to) in [
        (mount.snapshot("a", "s"), mount.record("a", "t")),
        (mount.snapshot("a", "s"), mount.record("b", "s")),
        (mount.snapshot("a", "s"), mount.dir.join("retired/a/s.raw")),
        (mount.snapshot("a", "s"), mount.dir.join("retired/s.aimg")),
        (mount.record("a", "old"), mount.snapshot("a", "old")),
        (mount.record("a", "old"), mount.record("b", "old")),
        (mount.disk("a"), mount.record("a", "a")),
    ] {
        assert_eq!(errno(fs::rename(&from, &to)), libc::EPERM, "{} {}", from.display(), to.display());
    }
    assert_eq!(errno(fs::File::create_new(mount.record("a", "new"))), libc::EPERM);
    snapshot::hold(&mount.store, "a", "s", "me").unwrap();
    assert_eq!(errno(fs::rename(mount.snapshot("a", "s"), mount.record("a", "s"))), libc::EBUSY);
    fs::metadata(mount.snapshot("a", "s")).unwrap();
}

#[test]
fn a_record_is_renamed_and_removed_as_a_file() {
    let Some(mount) = Mount::new() else { return };
    let path = mount.make("a", 1 << 20);
    create(&path).write_all_at(&noise(1 << 20, 1), 0).unwrap();
    create(&mount.snapshot("a", "s"));
    create(&mount.snapshot("a", "live"));
    snapshot::retire(&mount.store, &[("a".into(), "s".into())]).unwrap();
    let before = fs::read(mount.record("a", "s")).unwrap();
    let ino = fs::metadata(mount.record("a", "s")).unwrap().ino();
    assert_eq!(errno(fs::rename(mount.record("a", "s"), mount.record("a", "live"))), libc::EEXIST);
    fs::rename(mount.record("a", "s"), mount.record("a", "t")).unwrap();
    assert_eq!(errno(fs::metadata(mount.record("a", "s"))), libc::ENOENT);
    assert_eq!(fs::metadata(mount.record("a", "t")).unwrap().ino(), ino);
    assert!(fs::read(mount.record("a", "t")).unwrap() == before);
    let open = fs::File::open(mount.record("a", "t")).unwrap();
    let root = rustix::process::geteuid().is_root();
    let refused = if root { libc::EROFS } else { libc::EACCES };
    assert_eq!(errno(fs::OpenOptions::new().write(true).open(mount.record("a", "t"))), refused);
    run("rm", &[OsStr::new("-f"), mount.record("a", "t").as_os_str()]);
    assert_eq!(errno(fs::metadata(mount.record("a", "t"))), libc::ENOENT);
    mount.store.snapshot_info("a", "t").unwrap_err();
    let mut buf = vec![0; before.len()];
    open.read_exact_at(&mut buf, 0).unwrap();
    assert!(buf == before, "an open record outlives its name");
}
