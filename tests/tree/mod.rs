//! The mounted tree, really mounted: what coreutils, programs and the kernel see.
//!
//! # Rules
//! 1. A test that needs FUSE begins with [`Mount::new`], which skips loudly where there is none and panics instead of
//!    skipping under CI.
//! 2. Tests look from outside, through system calls and programs, and reach into the store only to do what the command
//!    line does.

mod checkpoints;
mod copying;
mod direct;
mod exports;
mod extents;
mod files;
mod hostile;
mod increments;
mod leases;
mod names;
mod news;
mod retired;
mod snapshots;
mod stopping;

use std::fs;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;

use afterimage::media::host::HostMedia;
use afterimage::store::{OpenOptions, Store};
use afterimage::tree::{MountOptions, Mounted, mount};

/// Tells whether FUSE can be used here. Says so loudly when not; under CI that is a failure.
pub(crate) fn require_fuse() -> bool {
    let usable = fs::OpenOptions::new().read(true).write(true).open("/dev/fuse").is_ok()
        || (Path::new("/dev/fuse").exists() && Command::new("fusermount3").arg("-V").output().is_ok());
    if !usable {
        assert!(std::env::var_os("CI").is_none(), "FUSE must be usable under CI: /dev/fuse is missing or closed to us");
        eprintln!("SKIPPED: FUSE cannot be used here (no /dev/fuse, or neither root nor fusermount3)");
    }
    usable
}

/// Makes a pool and opens it.
pub(crate) fn new_pool(dir: &tempfile::TempDir) -> Arc<Store> {
    new_pool_with(dir, OpenOptions::default())
}

/// As [`new_pool`], opened with these options.
pub(crate) fn new_pool_with(dir: &tempfile::TempDir, options: OpenOptions) -> Arc<Store> {
    let media: Arc<dyn afterimage::media::Media> = Arc::new(HostMedia::new(dir.path()).unwrap());
    let small = afterimage::store::InitOptions { journal: 4 << 20, ballast: 4096, probe: true };
    Store::init(&media, small).unwrap();
    Store::open(media, options).unwrap()
}

/// A pool in a temporary directory and its tree, unmounted at the end.
pub(crate) struct Mount {
    pub(crate) store: Arc<Store>,
    pub(crate) dir: PathBuf,
    pub(crate) mounted: Option<Mounted>,
    _pool: tempfile::TempDir,
    _at: tempfile::TempDir,
}

impl Mount {
    /// Mounts a new pool; `None` where FUSE cannot be used.
    pub(crate) fn new() -> Option<Self> {
        Self::with(|options| options)
    }

    /// As [`Mount::new`], with other options.
    pub(crate) fn with(change: impl FnOnce(MountOptions) -> MountOptions) -> Option<Self> {
        Self::opened(OpenOptions::default(), change)
    }

    /// As [`Mount::with`], of a pool that was opened with other options.
    pub(crate) fn opened(open: OpenOptions, change: impl FnOnce(MountOptions) -> MountOptions) -> Option<Self> {
        if !require_fuse() {
            return None;
        }
        let pool = tempfile::tempdir().unwrap();
        let at = tempfile::tempdir().unwrap();
        let store = new_pool_with(&pool, open);
        let mounted = mount(&store, at.path(), &change(MountOptions::of_pool(pool.path()))).unwrap();
        let dir = mounted.mountpoint().to_path_buf();
        Some(Self { store, dir, mounted: Some(mounted), _pool: pool, _at: at })
    }

    /// Returns the path of a disk.
    pub(crate) fn disk(&self, name: &str) -> PathBuf {
        self.dir.join("disks").join(format!("{name}.raw"))
    }

    /// Returns the path of a snapshot.
    pub(crate) fn snapshot(&self, disk: &str, name: &str) -> PathBuf {
        self.dir.join("snapshots").join(disk).join(format!("{name}.raw"))
    }

    /// Makes a disk of `size` bytes, as `truncate -s` does.
    pub(crate) fn make(&self, name: &str, size: u64) -> PathBuf {
        let path = self.disk(name);
        create(&path).set_len(size).unwrap();
        path
    }

    /// Waits until nobody holds a disk: the kernel sends the release of a closed file a moment after close(2).
    pub(crate) fn wait_until_free(&self, name: &str) {
        for _ in 0..2000 {
            if self.store.disk_info(name).unwrap().holder.is_none() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        panic!("the lease of a closed file never ended");
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        self.mounted = None;
        self.store.close().ok();
    }
}

/// Opens for reading and writing, making the file.
pub(crate) fn create(path: &Path) -> fs::File {
    fs::OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).unwrap()
}

/// Opens for reading and writing past the cache.
pub(crate) fn open_direct(path: &Path) -> fs::File {
    fs::OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(path).unwrap()
}

/// Returns the errno of what must have failed.
#[track_caller]
pub(crate) fn errno<T>(result: std::io::Result<T>) -> i32 {
    match result {
        Ok(_) => panic!("it should have failed"),
        Err(error) => error.raw_os_error().expect("an errno"),
    }
}

/// Returns the errno of a rustix call that must have failed.
#[track_caller]
pub(crate) fn rustix_errno<T>(result: rustix::io::Result<T>) -> i32 {
    errno(result.map_err(std::io::Error::from))
}

/// Runs a program that must succeed.
#[track_caller]
pub(crate) fn run(program: &str, arguments: &[&std::ffi::OsStr]) -> Output {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    output
}

/// Bytes that differ everywhere, from a seed.
pub(crate) fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(2).wrapping_add(0x9e37_79b9_7f4a_7c15);
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 24).to_le_bytes()[0]
        })
        .collect()
}
