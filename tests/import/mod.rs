//! Imports of real images, made by the real qemu-img, compared byte by byte with what `qemu-img convert -O raw` reads.

mod good;
mod refused;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use afterimage::disk::{self, BlockDevice, ImportReport};
use afterimage::media::{HostMedia, Media};
use afterimage::progress::Silent;
use afterimage::store::{InitOptions, OpenOptions, Store};

/// A pool and a folder for images.
struct Bench {
    store: Arc<Store>,
    dir: tempfile::TempDir,
}

/// Runs a tool of qemu in `dir`.
fn tool(dir: &Path, tool: &str, args: &[&str]) {
    let output = Command::new(tool).args(args).current_dir(dir).output().unwrap();
    assert!(output.status.success(), "{tool} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
}

impl Bench {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let pool = dir.path().join("pool");
        std::fs::create_dir(&pool).unwrap();
        let media: Arc<dyn Media> = Arc::new(HostMedia::new(&pool).unwrap());
        Store::init(&media, InitOptions { ballast: 0, probe: false, ..InitOptions::default() }).unwrap();
        let options = OpenOptions { background: false, low_water: Some(0), ballast: 0, ..OpenOptions::default() };
        Self { store: Store::open(media, options).unwrap(), dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn qemu_img(&self, args: &[&str]) {
        tool(self.dir.path(), "qemu-img", args);
    }

    fn qemu_io(&self, args: &[&str]) {
        tool(self.dir.path(), "qemu-io", args);
    }

    /// Makes a sparse raw file with data, zeros that are data, and holes.
    fn make_raw(&self, name: &str) {
        use std::os::unix::fs::FileExt;
        let file = std::fs::File::create_new(self.path(name)).unwrap();
        file.set_len(80 << 20).unwrap();
        let noise: Vec<u8> = (0..3_000_000_u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 23) as u8).collect();
        file.write_all_at(&noise, 1 << 20).unwrap();
        file.write_all_at(&[0; 1 << 20], 8 << 20).unwrap();
        file.write_all_at(b"alone", (40 << 20) + 12_345).unwrap();
        file.write_all_at(&noise[..70_000], 70 << 20).unwrap();
        file.write_all_at(&[7; 512], (80 << 20) - 512).unwrap();
    }

    fn import(&self, file: &str, format: Option<&str>, name: &str) -> afterimage::error::Result<ImportReport> {
        disk::import(&self.store, &self.path(file), format, name, &Silent)
    }

    /// Imports an image and compares it with what qemu reads.
    fn same(&self, file: &str, format: &str) -> ImportReport {
        let report = self.import(file, None, "disk").unwrap_or_else(|e| panic!("{file}: {e}"));
        assert_eq!(report.format, format);
        self.qemu_img(&["convert", "-f", format, "-O", "raw", file, "want.raw"]);
        let want = std::fs::read(self.path("want.raw")).unwrap();
        let disk = disk::open(&self.store, "disk").unwrap();
        assert_eq!(disk.size(), want.len() as u64);
        let mut got = vec![1; want.len()];
        disk.read(&mut got, 0).unwrap();
        assert!(got == want, "{file} differs");
        let blocks = want.chunks(4096).filter(|block| block.iter().any(|byte| *byte != 0)).count() as u64;
        assert_eq!(disk.mapped(), blocks * 4096, "zeros stay holes");
        assert_eq!(self.store.disk_info("disk").unwrap().referenced, blocks * 4096);
        assert_eq!(report.bytes_written.next_multiple_of(4096), blocks * 4096);
        drop(disk);
        disk::remove(&self.store, "disk", false).unwrap();
        std::fs::remove_file(self.path("want.raw")).unwrap();
        report
    }

    fn no_disks(&self) {
        assert!(self.store.disks().is_empty(), "a half-made disk is left");
    }
}
