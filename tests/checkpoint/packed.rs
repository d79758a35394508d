//! What another program saved, packed: what comes back, what is refused, and what files that change, errors and crashes leave.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use afterimage::checkpoint::{self, Folder, Packing, PageBlock, is_zero};
use afterimage::error::Kind;
use afterimage::media::sim::Fault;
use afterimage::progress::{Progress, Silent};

use super::{Save, content, name, open};
use crate::cli::{Afterimage, text};
use crate::past::{MIB, Pool, fill};

const BLOCK: u64 = 64 << 10;
/// More than a piece of one thread, and a last page block that is short.
const MEMORY: u64 = 150 * BLOCK + 3 * 4096;

/// The two files, in a folder of their own.
struct Files {
    dir: tempfile::TempDir,
}

impl Files {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("state"), state()).unwrap();
        let files = Self { dir };
        files.write(1, |_| true);
        files
    }

    fn memory(&self) -> PathBuf {
        self.dir.path().join("memory")
    }

    fn state(&self) -> PathBuf {
        self.dir.path().join("state")
    }

    /// Writes the memory of a seed, those page blocks of it. Of a page block of zeros every second one is a hole.
    fn write(&self, seed: u64, which: impl Fn(u64) -> bool) {
        let file = OpenOptions::new().create(true).write(true).truncate(false).open(self.memory()).unwrap();
        file.set_len(MEMORY).unwrap();
        for number in (0..MEMORY.div_ceil(BLOCK)).filter(|number| which(*number)) {
            let bytes = of(seed, number);
            if !is_zero(&bytes) || number % 2 == 0 {
                file.write_all_at(&bytes, number * BLOCK).unwrap();
            }
        }
    }

    fn packing<'a>(&self, paths: &'a [PathBuf; 2], into: &str) -> Packing<'a> {
        let [memory, state] = paths;
        Packing { name: name(into), memory, state, disks: vec![("d".into(), "s".into())], parent: None }
    }

    fn paths(&self) -> [PathBuf; 2] {
        [self.memory(), self.state()]
    }
}

fn of(seed: u64, number: u64) -> Vec<u8> {
    content(seed, PageBlock(number), (MEMORY - number * BLOCK).min(BLOCK) as usize)
}

/// Bytes of every sort, and no multiple of anything.
fn state() -> Vec<u8> {
    (0..100_003_u32).map(|n| (n * 7 + n / 251) as u8).collect()
}

fn pool(seed: u64) -> Pool {
    let pool = Pool::seeded(seed);
    fill(&pool.disk("d", 4 * MIB), 0, MIB, 1);
    pool.take("d", "s");
    pool
}

fn folder(pool: &Pool) -> Folder {
    Folder::of_pool(pool.store.media())
}

fn holds(pool: &Pool) -> Vec<String> {
    pool.store.snapshot_info("d", "s").unwrap().holds
}

/// Compares all of a checkpoint with what the memory file had.
fn compare(folder: &Folder, checkpoint: &str, seed: impl Fn(u64) -> u64) {
    let reader = open(folder, checkpoint).unwrap();
    assert_eq!(reader.geometry().memory(), MEMORY);
    let mut scratch = vec![0; reader.geometry().storage_block()];
    for number in 0..MEMORY.div_ceil(BLOCK) {
        let wanted = of(seed(number), number);
        let mut out = vec![0xee; wanted.len()];
        reader.read(PageBlock(number), &mut scratch, &mut out).unwrap();
        assert!(out == wanted, "page block {number}");
    }
    assert!(reader.state().unwrap() == state(), "the state, byte for byte");
}

#[test]
fn what_another_program_saved_comes_back() {
    let (pool, files) = (pool(1), Files::new());
    let paths = files.paths();
    let info = checkpoint::pack(&pool.store, &files.packing(&paths, "fc@a"), &Silent).unwrap();
    compare(&folder(&pool), "fc@a", |_| 1);
    let zeros = (0..151).filter(|number| is_zero(&of(1, *number))).count() as u64;
    assert!(zeros > 30, "the memory has them: {zeros}");
    assert_eq!((info.zero_blocks, info.stored_blocks, info.inherited_blocks), (zeros, 151 - zeros, 0));
    assert_eq!((info.maker.as_str(), info.state_version), (checkpoint::ANOTHER_PROGRAM, 0));
    assert_eq!((info.regions.len(), info.regions[0].address, info.memory), (1, 0, MEMORY));
    assert_eq!(info.disks[0].snapshot, "d@s");
    let written = std::fs::metadata(files.memory()).unwrap().modified().unwrap();
    assert_eq!(info.created, written.duration_since(std::time::UNIX_EPOCH).unwrap().as_secs());
    assert!(checkpoint::verify(&folder(&pool), &name("fc@a"), &Silent).unwrap().is_sound());
    assert_eq!(holds(&pool), ["checkpoint fc@a"]);
    assert_eq!(pool.media.paths().iter().filter(|path| path.contains("ckpt")).count(), 1);
    checkpoint::remove(&pool.store, &name("fc@a")).unwrap();
    assert_eq!(holds(&pool), [""; 0]);
}

#[test]
fn what_is_as_in_the_parent_is_not_stored_again() {
    let (pool, files) = (pool(1), Files::new());
    let paths = files.paths();
    checkpoint::pack(&pool.store, &files.packing(&paths, "fc@a"), &Silent).unwrap();
    // Some become others; of those, some become zeros, and some zeros become something. A few of it goes on to the next one.
    std::fs::remove_file(files.memory()).unwrap();
    files.write(1, |number| number % 10 != 3);
    files.write(2, |number| number % 10 == 3);
    let child = Packing { parent: Some(name("fc@a")), disks: Vec::new(), ..files.packing(&paths, "fc@b") };
    let info = checkpoint::pack(&pool.store, &child, &Silent).unwrap();
    assert!(info.stored_blocks <= 15 && info.inherited_blocks > 60, "{info:?}");
    let seed = |number: u64| if number % 10 == 3 { 2 } else { 1 };
    compare(&folder(&pool), "fc@b", seed);
    files.write(2, |number| number == 3 || number == 7);
    let third = Packing { parent: Some(name("fc@b")), disks: Vec::new(), ..files.packing(&paths, "fc@c") };
    assert!(checkpoint::pack(&pool.store, &third, &Silent).unwrap().stored_blocks <= 1);
    let error = checkpoint::remove(&pool.store, &name("fc@a")).unwrap_err();
    assert!(error.kind() == Kind::Busy && error.to_string().contains("fc@b"), "{error}");
    assert_eq!(checkpoint::flatten(&folder(&pool), &name("fc@b"), &Silent).unwrap().parent, None);
    checkpoint::remove(&pool.store, &name("fc@a")).unwrap();
    compare(&folder(&pool), "fc@b", seed);
    // A parent of another memory, or one that is damaged, is told.
    let file = OpenOptions::new().write(true).open(files.memory()).unwrap();
    file.set_len(MEMORY + 4096).unwrap();
    let other = Packing { parent: Some(name("fc@b")), disks: Vec::new(), ..files.packing(&paths, "fc@d") };
    let error = checkpoint::pack(&pool.store, &other, &Silent).unwrap_err();
    assert!(error.to_string().contains("of other memory"), "{error}");
    file.set_len(MEMORY).unwrap();
    pool.media.flip_bit("checkpoints/fc/b.ckpt", (1 << 20) + 70, 3).unwrap();
    assert_eq!(checkpoint::pack(&pool.store, &other, &Silent).unwrap_err().kind(), Kind::Corrupt);
    assert_eq!(pool.media.paths().iter().filter(|path| path.contains("d.ckpt")).count(), 0);
}

/// Does something once it has begun.
struct Meanwhile<F: Fn() + Sync> {
    act: F,
    done: AtomicBool,
    bytes: AtomicU64,
    cancel: bool,
}

impl<F: Fn() + Sync> Meanwhile<F> {
    fn new(act: F) -> Self {
        Self { act, done: AtomicBool::new(false), bytes: AtomicU64::new(0), cancel: false }
    }
}

impl<F: Fn() + Sync> Progress for Meanwhile<F> {
    fn total(&self, units: u64) {
        assert_eq!(units, MEMORY);
    }

    fn advance(&self, done: u64) {
        self.bytes.fetch_add(done, Ordering::Relaxed);
        if !self.done.swap(true, Ordering::Relaxed) {
            (self.act)();
        }
    }

    fn message(&self, _text: &str) {}

    fn cancelled(&self) -> bool {
        self.cancel && self.done.load(Ordering::Relaxed)
    }
}

#[test]
fn a_file_that_changes_while_it_is_read_is_told_and_nothing_is_saved() {
    let (pool, files) = (pool(1), Files::new());
    let paths = files.paths();
    let write = || OpenOptions::new().write(true).open(&paths[0]).unwrap();
    let cases: [(&str, &(dyn Fn() + Sync)); 4] = [
        ("it was written to", &|| write().write_all_at(b"x", MEMORY - 1).unwrap()),
        ("it has 12288 bytes", &|| write().set_len(12_288).unwrap()),
        ("bytes and had", &|| write().set_len(MEMORY + 4096).unwrap()),
        ("it was written to", &|| write().set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap()),
    ];
    for (what, act) in cases {
        files.write(1, |_| true);
        let meanwhile = Meanwhile::new(act);
        let error = checkpoint::pack(&pool.store, &files.packing(&paths, "fc@a"), &meanwhile).unwrap_err();
        let told = error.to_string();
        let shorter = what.starts_with("it has") && told.contains("it became shorter");
        assert!(told.contains("changed while it was read") && (shorter || told.contains(what)), "{told}");
        assert!(error.kind() == Kind::Failed && error.next_step().is_some());
        assert_eq!(holds(&pool), [""; 0]);
        assert!(!pool.media.paths().iter().any(|path| path.contains("ckpt")), "nothing is left");
    }
    files.write(1, |_| true);
    let cancel = Meanwhile { cancel: true, ..Meanwhile::new(|| {}) };
    let error = checkpoint::pack(&pool.store, &files.packing(&paths, "fc@a"), &cancel).unwrap_err();
    assert_eq!(error.kind(), Kind::Cancelled);
    assert!(!pool.media.paths().iter().any(|path| path.contains("ckpt")), "nothing is left");
    let all = Meanwhile::new(|| {});
    checkpoint::pack(&pool.store, &files.packing(&paths, "fc@a"), &all).unwrap();
    assert_eq!(all.bytes.into_inner(), MEMORY);
}

#[test]
fn what_cannot_be_packed_is_refused() {
    let (pool, files) = (pool(1), Files::new());
    let paths = files.paths();
    let refused = |packing: &Packing<'_>| {
        let error = checkpoint::pack(&pool.store, packing, &Silent).unwrap_err();
        assert!(!pool.media.paths().iter().any(|path| path.contains("ckpt")), "{error}");
        assert_eq!(holds(&pool), [""; 0], "{error}");
        (error.kind(), error.to_string())
    };
    let good = files.packing(&paths, "fc@a");
    let disks = |list: &[(&str, &str)]| list.iter().map(|(d, s)| ((*d).into(), (*s).into())).collect::<Vec<_>>();
    assert_eq!(refused(&Packing { disks: disks(&[("d", "no")]), ..good.clone() }).0, Kind::NotFound);
    assert_eq!(refused(&Packing { disks: disks(&[("d", "s"), ("d", "s")]), ..good.clone() }).0, Kind::Usage);
    assert_eq!(refused(&Packing { memory: Path::new("/no/such"), ..good.clone() }).0, Kind::NotFound);
    assert_eq!(refused(&Packing { state: Path::new("/no/such"), ..good.clone() }).0, Kind::NotFound);
    assert_eq!(refused(&Packing { parent: Some(name("fc@no")), ..good.clone() }).0, Kind::NotFound);
    assert!(refused(&Packing { memory: Path::new("/dev/zero"), ..good.clone() }).1.contains("neither a regular file"));
    assert!(refused(&Packing { memory: files.dir.path(), ..good.clone() }).1.contains("neither a regular file"));
    let made = |name: &str, length| {
        let path = files.dir.path().join(name);
        File::create(&path).unwrap().set_len(length).unwrap();
        path
    };
    let (odd, empty, large) = (made("odd", 4097), made("empty", 0), made("large", (64 << 20) + 1));
    for memory in [&odd, &empty] {
        let (kind, told) = refused(&Packing { memory, ..good.clone() });
        assert!(kind == Kind::Usage && told.contains("no memory"), "{told}");
    }
    assert_eq!(refused(&Packing { state: &large, ..good.clone() }).0, Kind::Usage);
    let pipe = files.dir.path().join("pipe");
    rustix::fs::mkfifoat(rustix::fs::CWD, &pipe, rustix::fs::Mode::RUSR).unwrap();
    assert!(refused(&Packing { memory: &pipe, ..good.clone() }).1.contains("neither a regular file"));
    // An empty state is one, and a name that is taken is left alone.
    checkpoint::pack(&pool.store, &Packing { state: &empty, ..good.clone() }, &Silent).unwrap();
    assert_eq!(checkpoint::pack(&pool.store, &good, &Silent).unwrap_err().kind(), Kind::Exists);
    assert!(open(&folder(&pool), "fc@a").unwrap().state().unwrap().is_empty());
    assert_eq!(holds(&pool), ["checkpoint fc@a"]);
    checkpoint::remove(&pool.store, &name("fc@a")).unwrap();
    pool.retire("d", "s");
    let error = checkpoint::pack(&pool.store, &good, &Silent).unwrap_err();
    assert!(error.to_string().contains("is retired"), "{error}");
}

/// At every I/O that fails: what is there afterwards holds its snapshot, and what is not there does not.
#[test]
fn an_error_of_the_host_leaves_no_half() {
    let files = Files::new();
    let paths = files.paths();
    let mut failed = 0;
    for fault in [Fault::Eio, Fault::Enospc] {
        for countdown in 1.. {
            let mut pool = pool(countdown);
            let before = pool.media.io_count();
            pool.media.fail_after(countdown, fault);
            let packed = checkpoint::pack(&pool.store, &files.packing(&paths, "fc@a"), &Silent);
            let reached = pool.media.io_count() - before >= countdown;
            pool.media.fail_after(1 << 40, fault);
            let what = format!("{fault:?} at {countdown}");
            if packed.is_err() {
                assert!(!pool.media.paths().iter().any(|path| path.ends_with("ckpt")), "{what}");
                failed += 1;
            }
            // A pool that had an error takes no changes until it is opened again: that lets go as well.
            pool.media.kill();
            pool.store = Pool::open(&pool.media);
            checkpoint::attend(&pool.store);
            let expected: &[&str] = if packed.is_ok() { &["checkpoint fc@a"] } else { &[] };
            assert_eq!(holds(&pool), expected, "{what}: {packed:?}");
            if packed.is_ok() {
                compare(&folder(&pool), "fc@a", |_| 1);
            }
            if !reached {
                break;
            }
        }
    }
    assert!(failed > 20, "{failed}");
}

/// The same for a power cut.
#[test]
fn a_crash_leaves_a_checkpoint_with_its_hold_or_none() {
    let files = Files::new();
    let paths = files.paths();
    let mut ends = [0, 0];
    for countdown in 1.. {
        let mut all_down = true;
        for seed in 0..3 {
            let mut pool = pool(seed * 1000 + countdown);
            pool.media.crash_after(countdown);
            let packed = checkpoint::pack(&pool.store, &files.packing(&paths, "fc@s"), &Silent).is_ok();
            let down = pool.media.is_down();
            pool.media.crash();
            pool.store = Pool::open(&pool.media);
            checkpoint::attend(&pool.store);
            let there = folder(&pool).exists(&name("fc@s")).unwrap();
            // It has the name of the checkpoint, and was not taken for it.
            pool.store.snapshot_info("d", "s").expect("what somebody has named stays");
            assert!(there || !packed, "crash after {countdown}, seed {seed}");
            let expected: &[&str] = if there { &["checkpoint fc@s"] } else { &[] };
            assert_eq!(holds(&pool), expected, "crash after {countdown}, seed {seed}");
            if there {
                compare(&folder(&pool), "fc@s", |_| 1);
            }
            ends[usize::from(there)] += usize::from(down);
            all_down &= down;
            pool.sound();
        }
        if !all_down {
            assert!(ends[0] > 30 && ends[1] > 0, "{ends:?}");
            return;
        }
    }
}

#[test]
fn the_command_packs() {
    let it = Afterimage::with_pool();
    it.json(&["create", "web", "--size", "4M"]);
    it.json(&["snapshot", "web@s"]);
    let files = Files::new();
    let [memory, state] = files.paths().map(|path| path.to_str().unwrap().to_owned());
    let into = |checkpoint: &'static str| {
        ["checkpoint", "save", "--memory-file", &memory, "--state", &state, "--into", checkpoint].map(str::to_owned)
    };
    let words = |checkpoint: &'static str, more: &[&str]| -> Vec<String> {
        into(checkpoint).into_iter().chain(more.iter().map(|word| (*word).to_owned())).collect()
    };
    let run = |words: &[String]| it.json(&words.iter().map(String::as_str).collect::<Vec<_>>());
    let refuse = |words: &[String]| it.error(&words.iter().map(String::as_str).collect::<Vec<_>>());
    let saved = run(&words("fc@a", &["--disk", "web@s"]));
    assert_eq!((saved["answer"].as_str(), saved["memory"].as_u64()), (Some("checkpoint"), Some(MEMORY)));
    assert_eq!(saved["disks"][0]["snapshot"].as_str(), Some("web@s"));
    let (code, error) = it.error(&["rm", "web@s"]);
    assert!(code == 4 && error["message"].as_str().unwrap().contains("checkpoint fc@a"), "{error}");
    let saved = run(&words("fc@b", &["--parent", "fc@a"]));
    assert_eq!((saved["stored_blocks"].as_u64(), saved["parent"].as_str()), (Some(0), Some("fc@a")));
    assert_eq!(it.json(&["checkpoint", "ls", "fc"])["checkpoints"].as_array().unwrap().len(), 2);
    assert_eq!(it.json(&["checkpoint", "verify", "fc@b"])["files"].as_u64(), Some(2));
    let output = it.run(&["checkpoint", "info", "fc@a"]);
    assert!(text(&output.stdout).contains("made by another program"), "{}", text(&output.stdout));
    assert_eq!(refuse(&words("fc@a", &[])).0, 1);
    assert_eq!(refuse(&words("fc", &[])).0, 2);
    assert_eq!(refuse(&words("fc@c", &["--disk", "web"])).0, 2);
    let (code, error) = it.error(&["vm", "restore", "fc@a"]);
    let told = error["message"].as_str().unwrap();
    assert!(code == 1 && told.contains("of another program") && error["hint"].as_str().unwrap().contains("serve-uffd"));
    assert_eq!(it.json(&["checkpoint", "flatten", "fc@b"])["parent"], serde_json::Value::Null);
    it.json(&["checkpoint", "rm", "fc@a"]);
    it.json(&["checkpoint", "rm", "fc@b"]);
    it.json(&["rm", "web@s"]);
}

#[test]
fn a_checkpoint_of_another_maker_can_be_a_parent_only_of_the_same_memory() {
    let (pool, files) = (pool(1), Files::new());
    Save { name: "fc@ours", ..Save::default() }.run(&folder(&pool)).unwrap();
    let paths = files.paths();
    let packing = Packing { parent: Some(name("fc@ours")), ..files.packing(&paths, "fc@a") };
    let error = checkpoint::pack(&pool.store, &packing, &Silent).unwrap_err();
    assert!(error.to_string().contains("of other memory"), "{error}");
}
