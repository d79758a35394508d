//! Streams: their bytes, from pool to pool with crashes on both sides, and into raw files.

mod files;
pub mod format;
mod histories;
mod pipes;
mod pools;
mod refusals;

use std::sync::Arc;

use afterimage::disk::{self, BlockDevice};
use afterimage::error::Result;
use afterimage::media::{Media, SimMedia};
use afterimage::progress::Silent;
use afterimage::snapshot;
use afterimage::store::{self, InitOptions, OpenOptions, Store};
use afterimage::stream::{self, ReceiveOptions, ReceiveReport, SendOptions, Token, What};

/// A pool over simulated files.
struct Pool {
    media: SimMedia,
    store: Option<Arc<Store>>,
}

fn options() -> OpenOptions {
    OpenOptions {
        cache_bytes: 64 << 10,
        catalog_cache_bytes: 1 << 20,
        background: false,
        low_water: Some(0),
        ballast: 4096,
        segment_blocks: 300,
        depth_max: 3,
    }
}

impl Pool {
    fn new(seed: u64) -> Self {
        let media = SimMedia::new(seed);
        let shared: Arc<dyn Media> = Arc::new(media.clone());
        Store::init(&shared, InitOptions { journal: 512 << 10, ballast: 4096, probe: false }).unwrap();
        Self::on(media)
    }

    fn on(media: SimMedia) -> Self {
        let store = Store::open(Arc::new(media.clone()), options()).unwrap();
        Self { media, store: Some(store) }
    }

    /// Another pool with the same content, as if the power had gone.
    fn fork(&self, seed: u64) -> Self {
        Self::on(self.media.fork(seed))
    }

    fn store(&self) -> &Arc<Store> {
        self.store.as_ref().expect("it is open")
    }

    /// Opens it again after a power cut.
    fn reopen(&mut self) {
        self.store = None;
        self.media.crash();
        self.store = Some(Store::open(Arc::new(self.media.clone()), options()).unwrap());
    }

    fn check(&self) {
        let report = store::check(self.store(), false, &Silent).unwrap();
        assert!(report.problems.is_empty(), "{:?}", report.problems);
    }

    /// Does all the work that would be done in the background.
    fn tidy(&self) {
        while self.store().tidy_step().unwrap() {}
    }

    fn live(&self, disk: &str) -> Vec<u8> {
        read_all(&*disk::open(self.store(), disk).unwrap())
    }

    fn snapshot(&self, disk: &str, name: &str) -> Vec<u8> {
        read_all(&*snapshot::open(self.store(), disk, name).unwrap())
    }

    fn names(&self, disk: &str) -> Vec<String> {
        self.store().snapshots(disk).unwrap().into_iter().map(|info| info.name).collect()
    }

    fn take(&self, disk: &str, name: &str) {
        snapshot::take(self.store(), &[(disk.to_owned(), name.to_owned())]).unwrap();
    }

    fn write(&self, disk: &str, offset: u64, data: &[u8]) {
        disk::open(self.store(), disk).unwrap().write(data, offset).unwrap();
    }

    fn send(&self, from: Option<&str>, to: &str) -> Vec<u8> {
        let split = |name: &str| name.split_once('@').map(|(d, s)| (d.to_owned(), s.to_owned())).unwrap();
        let what = What::States { from: from.map(split), to: split(to) };
        let mut bytes = Vec::new();
        stream::send(self.store(), &SendOptions { what, compress: true }, &mut bytes, &Silent).unwrap();
        bytes
    }

    fn resume(&self, token: Token) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        let options = SendOptions { what: What::Rest(token), compress: false };
        stream::send(self.store(), &options, &mut bytes, &Silent).map(|_| bytes)
    }

    fn receive(&self, disk: &str, bytes: &[u8]) -> Result<ReceiveReport> {
        let options = ReceiveOptions { disk: disk.to_owned(), force: false, name: None };
        stream::receive(self.store(), &options, &mut &*bytes, &Silent)
    }

    fn force(&self, disk: &str, bytes: &[u8]) -> Result<ReceiveReport> {
        let options = ReceiveOptions { disk: disk.to_owned(), force: true, name: None };
        stream::receive(self.store(), &options, &mut &*bytes, &Silent)
    }
}

fn read_all(device: &dyn BlockDevice) -> Vec<u8> {
    let mut bytes = vec![0; device.size() as usize];
    device.read(&mut bytes, 0).unwrap();
    bytes
}

/// Bytes that do not compress.
fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        bytes.extend_from_slice(&x.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// Compares without printing megabytes.
fn same(what: &str, found: &[u8], expected: &[u8]) {
    assert_eq!(found.len(), expected.len(), "{what}: size");
    if let Some(at) = (0..found.len()).find(|at| found[*at] != expected[*at]) {
        panic!("{what}: byte {at} (block {}) is {} instead of {}", at / 4096, found[at], expected[at]);
    }
}
