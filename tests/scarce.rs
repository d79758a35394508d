//! A host that has too few descriptors: a request may fail for it, the pool does not.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use afterimage::disk::{self, BlockDevice, Disk};
use afterimage::media::{File, HostMedia, Media, Open, Space};
use afterimage::snapshot;
use afterimage::store::{InitOptions, OpenOptions, Store};

use super::tree::noise;

const MIB: u64 = 1 << 20;

/// Files of the host, few of them open at a time. A file that is opened takes two, as it does for direct I/O.
#[derive(Debug)]
struct Scarce {
    inner: HostMedia,
    held: Arc<()>,
    most: AtomicUsize,
}

impl Scarce {
    fn new(dir: &tempfile::TempDir) -> Arc<Self> {
        let inner = HostMedia::new(dir.path()).unwrap();
        Arc::new(Self { inner, held: Arc::new(()), most: AtomicUsize::new(usize::MAX) })
    }

    fn open_now(&self) -> usize {
        Arc::strong_count(&self.held) - 1
    }

    /// Leaves room for so many more.
    fn leave(&self, more: usize) {
        self.most.store(self.open_now() + more, Ordering::SeqCst);
    }

    fn plenty(&self) {
        self.most.store(usize::MAX, Ordering::SeqCst);
    }

    fn take(&self) -> io::Result<Arc<()>> {
        if self.open_now() >= self.most.load(Ordering::SeqCst) {
            return Err(io::Error::from_raw_os_error(libc::EMFILE));
        }
        Ok(Arc::clone(&self.held))
    }
}

#[derive(Debug)]
struct Held {
    file: Arc<dyn File>,
    _held: Vec<Arc<()>>,
}

impl File for Held {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.file.read_at(buf, offset)
    }
    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        self.file.write_at(data, offset)
    }
    fn write_cached_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        self.file.write_cached_at(data, offset)
    }
    fn direct(&self) -> Option<Arc<std::fs::File>> {
        self.file.direct()
    }
    fn sync(&self) -> io::Result<()> {
        self.file.sync()
    }
    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.file.set_len(len)
    }
    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        self.file.punch(offset, len)
    }
    fn next_data(&self, offset: u64) -> io::Result<Option<(u64, u64)>> {
        self.file.next_data(offset)
    }
    fn allocated(&self) -> io::Result<u64> {
        self.file.allocated()
    }
}

impl Media for Scarce {
    fn open(&self, path: &str, how: Open) -> io::Result<Arc<dyn File>> {
        let held = vec![self.take()?];
        Ok(Arc::new(Held { file: self.inner.open(path, how)?, _held: held }))
    }
    fn open_direct(&self, path: &str, how: Open) -> io::Result<Arc<dyn File>> {
        let first = self.take()?;
        // As on the host: the file is made, and then there is no descriptor for direct I/O.
        let file = self.inner.open_direct(path, how)?;
        let second = self.take()?;
        Ok(Arc::new(Held { file, _held: vec![first, second] }))
    }
    fn make_dir(&self, path: &str) -> io::Result<()> {
        self.inner.make_dir(path)
    }
    fn remove(&self, path: &str) -> io::Result<()> {
        self.inner.remove(path)
    }
    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.inner.rename(from, to)
    }
    fn list(&self, path: &str) -> io::Result<Vec<String>> {
        self.take()?;
        self.inner.list(path)
    }
    fn sync_dir(&self, path: &str) -> io::Result<()> {
        self.take()?;
        self.inner.sync_dir(path)
    }
    fn space(&self) -> io::Result<Space> {
        self.inner.space()
    }
    fn boot(&self) -> io::Result<u128> {
        self.inner.boot()
    }
}

fn pool(media: &Arc<Scarce>) -> Arc<Store> {
    let shared: Arc<dyn Media> = Arc::clone(media) as _;
    let small = InitOptions { journal: 4 << 20, ballast: 4096, probe: true };
    Store::init(&shared, small).unwrap();
    // What is done in the background would take descriptors, too, at any time.
    Store::open(shared, OpenOptions { background: false, ..OpenOptions::default() }).unwrap()
}

fn data(n: u64) -> Vec<u8> {
    noise(256 << 10, n)
}

fn is_as_written(disk: &Arc<Disk>, n: u64) {
    let mut bytes = vec![0; 256 << 10];
    disk.read(&mut bytes, 0).unwrap();
    assert!(bytes == data(n), "disk {n}");
}

#[test]
fn a_write_that_finds_no_descriptor_fails_and_the_next_one_does_not() {
    let dir = tempfile::tempdir().unwrap();
    let media = Scarce::new(&dir);
    let store = pool(&media);
    let disk = |name: &str| {
        drop(disk::create(&store, name, 16 * MIB).unwrap());
        disk::open(&store, name).unwrap()
    };
    let (a, b) = (disk("a"), disk("b"));
    a.write(&data(1), 0).unwrap();
    for more in [0, 1, 2, 0] {
        media.leave(more);
        let error = b.write(&data(2), 0).unwrap_err();
        assert!(error.to_string().contains("Too many open files"), "{error}");
        assert!(error.next_step().is_some_and(|hint| hint.contains("LimitNOFILE")), "{error:?}");
        assert_eq!(store.health(), None, "the pool goes on");
        // Who has what he needs goes on, and so do flushes and snapshots.
        a.write(&data(3), MIB).unwrap();
        a.flush().unwrap();
        snapshot::take(&store, &[("a".into(), format!("s{}", store.snapshots("a").unwrap().len()))]).unwrap();
        store.ledger.fold().unwrap();
        is_as_written(&a, 1);
    }
    media.plenty();
    b.write(&data(2), 0).unwrap();
    b.flush().unwrap();
    is_as_written(&b, 2);
    let report = afterimage::store::check(&store, false, &afterimage::progress::Silent).unwrap();
    assert!(report.problems.is_empty(), "{:?}", report.problems);
    store.close().unwrap();
}

#[test]
fn segments_that_nobody_uses_make_room_for_those_that_are_needed() {
    let dir = tempfile::tempdir().unwrap();
    let media = Scarce::new(&dir);
    let store = pool(&media);
    for n in 0..20 {
        let name = format!("d{n}");
        drop(disk::create(&store, &name, 16 * MIB).unwrap());
        disk::open(&store, &name).unwrap().write(&data(n), 0).unwrap();
    }
    store.close().unwrap();
    drop(store);
    assert_eq!(media.open_now(), 0);
    let store =
        Store::open(Arc::clone(&media) as _, OpenOptions { background: false, ..OpenOptions::default() }).unwrap();
    // The first change numbers the opening.
    drop(disk::create(&store, "more", MIB).unwrap());
    let others = media.open_now();
    // Room for three segments.
    media.leave(6);
    for n in [0, 7, 3].into_iter().chain(0..20) {
        is_as_written(&disk::open(&store, &format!("d{n}")).unwrap(), n);
    }
    assert!(media.open_now() - others <= 6);
    // A new one, too.
    let more = disk::open(&store, "more").unwrap();
    more.write(&data(99), 0).unwrap();
    more.flush().unwrap();
    for n in 0..20 {
        is_as_written(&disk::open(&store, &format!("d{n}")).unwrap(), n);
    }
    is_as_written(&more, 99);
    assert_eq!(store.health(), None);
    media.plenty();
    store.close().unwrap();
}

/// As after a kill: what was open is let go, and nothing is closed in order.
fn killed(store: Arc<Store>, disks: Vec<Arc<Disk>>) {
    drop(disks);
    drop(store);
}

#[test]
fn the_first_flush_after_a_kill_may_find_no_descriptor_and_the_next_one_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let media = Scarce::new(&dir);
    let store = pool(&media);
    let make = |name: &str| {
        drop(disk::create(&store, name, 16 * MIB).unwrap());
        disk::open(&store, name).unwrap()
    };
    let disks = vec![make("a"), make("b")];
    for disk in &disks {
        disk.write(&data(1), 0).unwrap();
        disk.flush().unwrap();
        // In place, and not synced.
        disk.write(&data(2), 0).unwrap();
    }
    killed(store, disks);

    let options = OpenOptions { background: false, ..OpenOptions::default() };
    let store = Store::open(Arc::clone(&media) as _, options).unwrap();
    let (a, b) = (disk::open(&store, "a").unwrap(), disk::open(&store, "b").unwrap());
    // Its new segment is open, and the one it had before is not.
    a.write(&data(3), MIB).unwrap();
    for (name, disk) in [("a", &a), ("b", &b)] {
        // At first there are segments that can be closed, and that is not enough.
        for leave in [None, Some(0), Some(1)] {
            leave.map_or_else(|| media.most.store(0, Ordering::SeqCst), |more| media.leave(more));
            let error = disk.flush().unwrap_err();
            assert!(error.to_string().contains("Too many open files"), "{error}");
            assert!(snapshot::take(&store, &[(name.into(), "s".into())]).unwrap_err().lacks_descriptors());
            assert_eq!(store.health(), None, "the pool goes on");
        }
        media.plenty();
        disk.flush().unwrap();
        is_as_written(disk, 2);
    }
    let mut bytes = vec![0; 256 << 10];
    a.read(&mut bytes, MIB).unwrap();
    assert!(bytes == data(3), "no change was lost with the flush that failed");
    drop((a, b));
    store.close().unwrap();
    drop(store);
    let store = Store::open(Arc::clone(&media) as _, OpenOptions::default()).unwrap();
    disk::open(&store, "a").unwrap().read(&mut bytes, MIB).unwrap();
    assert!(bytes == data(3), "nor in the catalog");
    store.close().unwrap();
}
