//! Many requests to a disk at once by one thread, as the protocols do it: what is read is what was written.

use std::sync::Arc;
use std::sync::mpsc::RecvTimeoutError;

use afterimage::disk::engine::{Op, Request};
use afterimage::disk::{self, BlockDevice, Buffers, Engine};
use afterimage::error::Kind;
use afterimage::media::{HostMedia, Media};
use afterimage::snapshot;
use afterimage::store::{InitOptions, OpenOptions, Store};

use super::tree::{new_pool, noise};

const BLOCK: usize = 4096;
const BLOCKS: usize = 2048;
const DEPTH: usize = 24;

/// A request's number, and the bytes of the disk it is about.
type Tag = (usize, std::ops::Range<usize>);

struct Load {
    device: Arc<dyn BlockDevice>,
    engine: Engine<Tag>,
    buffers: Buffers,
    twin: Vec<u8>,
    /// Blocks that a request under way is about: no other one touches them.
    busy: Vec<bool>,
    begun: usize,
    finished: usize,
}

impl Load {
    fn new(device: Arc<dyn BlockDevice>) -> Self {
        let engine = Engine::new("test", 4, Arc::default()).unwrap();
        let (twin, busy) = (vec![0; BLOCKS * BLOCK], vec![false; BLOCKS]);
        Self { device, engine, buffers: Buffers::default(), twin, busy, begun: 0, finished: 0 }
    }

    fn blocks(range: &std::ops::Range<usize>) -> std::ops::Range<usize> {
        range.start / BLOCK..range.end.div_ceil(BLOCK)
    }

    fn begin(&mut self, number: usize) {
        let dice = noise(8, number as u64);
        let first = usize::from(u16::from_le_bytes([dice[0], dice[1]])) % BLOCKS;
        let count = if dice[2].is_multiple_of(9) { usize::from(dice[3]) + 1 } else { usize::from(dice[3]) % 4 + 1 };
        let mut range = first * BLOCK..(first + count).min(BLOCKS) * BLOCK;
        if dice[4].is_multiple_of(5) {
            // Not whole blocks.
            range = range.start + 512..range.end - 1024;
        }
        if self.busy[Self::blocks(&range)].iter().any(|busy| *busy) {
            return;
        }
        let op = match dice[5] % 16 {
            0 => Op::Flush,
            1 => Op::Discard,
            2 => Op::WriteZeroes { durable: false },
            3 => Op::Write { durable: true },
            4..9 => Op::Write { durable: false },
            _ => Op::Read,
        };
        let mut pages = self.buffers.take(BLOCK + range.len()).unwrap();
        match op {
            Op::Write { .. } => {
                let data = noise(range.len(), number as u64 + 1);
                pages[BLOCK..BLOCK + range.len()].copy_from_slice(&data);
                self.twin[range.clone()].copy_from_slice(&data);
            }
            Op::WriteZeroes { .. } => self.twin[range.clone()].fill(0),
            // A file forgets parts of blocks, too.
            Op::Discard if self.device.is_prompt() => self.twin[range.clone()].fill(0),
            Op::Discard => {
                let whole = range.start.next_multiple_of(BLOCK)..range.end / BLOCK * BLOCK;
                if !whole.is_empty() {
                    self.twin[whole].fill(0);
                }
            }
            Op::Read | Op::Flush => {}
        }
        self.busy[Self::blocks(&range)].fill(true);
        self.begun += 1;
        let (offset, len) = (range.start as u64, range.len() as u64);
        let device = Arc::clone(&self.device);
        self.engine.begin(Request { op, device, offset, len, pages: Some(pages), at: BLOCK, tag: (number, range) });
    }

    /// What is forgotten here is never answered.
    fn assert_nothing_is_forgotten(&self) {
        assert_eq!(self.engine.in_flight(), self.begun - self.finished);
    }

    fn run(&mut self, count: usize) {
        for number in 0..count {
            self.begin(number);
            self.assert_nothing_is_forgotten();
            if number % 7 == 0 {
                self.engine.submit().unwrap();
            }
            while self.engine.in_flight() > number % DEPTH {
                self.engine.wait(None).unwrap();
                self.take_finished();
            }
            self.take_finished();
        }
        // What is under way is ended first: a snapshot waits for it, and it waits for this thread.
        while self.engine.in_flight() > 0 {
            self.engine.wait(None).unwrap();
            self.take_finished();
        }
    }

    fn take_finished(&mut self) {
        while let Some(done) = self.engine.finished() {
            done.result.unwrap();
            let (number, range) = done.request.tag;
            let pages = done.request.pages.unwrap();
            if done.request.op == Op::Read {
                let seen = &pages[BLOCK..BLOCK + range.len()];
                assert!(seen == &self.twin[range.clone()], "request {number}, {range:?}");
            }
            self.busy[Self::blocks(&range)].fill(false);
            self.buffers.give_back(pages);
            self.finished += 1;
        }
    }
}

#[test]
fn requests_to_a_file_read_what_was_written_alone_and_together() {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len((BLOCKS * BLOCK) as u64).unwrap();
    let device = Arc::new(afterimage::vmm::FileDisk::open(file.path(), false).unwrap());
    let mut load = Load::new(device.clone());
    load.run(6000);
    assert!(load.finished > 3000, "{} requests", load.finished);
    // One by one: no other thread has to be woken.
    for number in 6000..8000 {
        load.begin(number);
        load.engine.submit().unwrap();
        load.take_finished();
        while load.engine.in_flight() > 0 {
            load.engine.wait(None).unwrap();
            load.take_finished();
        }
    }
    let mut seen = vec![1; BLOCKS * BLOCK];
    device.read(&mut seen, 0).unwrap();
    assert!(seen == load.twin);
}

#[test]
fn requests_under_way_together_read_what_was_written() {
    let dir = tempfile::tempdir().unwrap();
    let store = new_pool(&dir);
    let made = disk::create(&store, "a", (BLOCKS * BLOCK) as u64).map(drop);
    made.unwrap();
    let device = disk::open(&store, "a").unwrap();
    let mut load = Load::new(device.clone());
    let (stop, stopped) = std::sync::mpsc::channel::<()>();
    let snapshots = std::thread::spawn({
        let store = Arc::clone(&store);
        move || {
            let mut taken = 0;
            while stopped
                .recv_timeout(std::time::Duration::from_millis(20))
                .is_err_and(|e| e == RecvTimeoutError::Timeout)
            {
                drop(snapshot::take(&store, &[("a".into(), format!("s{taken}"))]).unwrap());
                taken += 1;
            }
            taken
        }
    });
    load.run(6000);
    drop(stop);
    assert!(snapshots.join().unwrap() > 0);
    assert!(load.finished > 3000, "{} requests", load.finished);
    let mut seen = vec![1; BLOCKS * BLOCK];
    device.read(&mut seen, 0).unwrap();
    assert!(seen == load.twin);
}

#[test]
fn a_request_that_is_wrong_fails_by_itself() {
    let dir = tempfile::tempdir().unwrap();
    let store = new_pool(&dir);
    drop(disk::create(&store, "a", (BLOCKS * BLOCK) as u64).unwrap());
    let device: Arc<dyn BlockDevice> = disk::open(&store, "a").unwrap();
    let mut engine: Engine<u64> = Engine::new("test", 2, Arc::default()).unwrap();
    let end = device.size();
    for offset in [0, end - 4096, end, u64::MAX - 100] {
        for op in [Op::Read, Op::Write { durable: false }, Op::Discard, Op::WriteZeroes { durable: true }] {
            let pages = Some(afterimage::sys::pages::Pages::new(8192).unwrap());
            engine.begin(Request { op, device: Arc::clone(&device), offset, len: 8192, pages, at: 0, tag: offset });
        }
    }
    let mut ok = 0;
    while engine.in_flight() > 0 {
        engine.wait(None).unwrap();
        while let Some(done) = engine.finished() {
            assert_eq!(done.result.is_ok(), done.request.tag == 0, "{:?}: {:?}", done.request.op, done.result);
            ok += usize::from(done.result.is_ok());
        }
    }
    assert_eq!(ok, 4);
}

#[test]
fn an_engine_that_is_dropped_holds_nothing_of_the_disk() {
    let dir = tempfile::tempdir().unwrap();
    let store = new_pool(&dir);
    drop(disk::create(&store, "a", (BLOCKS * BLOCK) as u64).unwrap());
    let device: Arc<dyn BlockDevice> = disk::open(&store, "a").unwrap();
    let mut engine: Engine<usize> = Engine::new("test", 2, Arc::default()).unwrap();
    for tag in 0..32 {
        let mut pages = afterimage::sys::pages::Pages::new(BLOCK).unwrap();
        pages.fill(tag as u8);
        let (op, offset, len) = (Op::Write { durable: tag % 8 == 7 }, (tag * BLOCK) as u64, BLOCK as u64);
        engine.begin(Request { op, device: Arc::clone(&device), offset, len, pages: Some(pages), at: 0, tag });
    }
    engine.submit().unwrap();
    drop(engine);
    // Both would wait for ever for a write that was forgotten.
    device.write(&[9; BLOCK], 0).unwrap();
    drop(snapshot::take(&store, &[("a".into(), "s".into())]).unwrap());
    let mut seen = [0; 2 * BLOCK];
    device.read(&mut seen, 0).unwrap();
    assert_eq!((seen[0], seen[BLOCK]), (9, 1));
}

#[test]
fn a_watched_descriptor_ends_the_wait() {
    let mut engine: Engine<()> = Engine::new("test", 1, Arc::default()).unwrap();
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    let waiting = std::thread::spawn(move || {
        std::thread::sleep(std::time::Duration::from_millis(20));
        rustix::io::write(&writer, b"x").unwrap();
        writer
    });
    let mut byte = [0];
    loop {
        engine.wait(Some(std::os::fd::AsFd::as_fd(&reader))).unwrap();
        let ready = rustix::event::PollFd::new(&reader, rustix::event::PollFlags::IN);
        if rustix::event::poll(&mut [ready], Some(&rustix::event::Timespec::default())).unwrap() == 1 {
            break;
        }
    }
    assert_eq!(rustix::io::read(&reader, &mut byte).unwrap(), 1);
    drop(waiting.join().unwrap());
}

/// Returns how many threads of this process have a name.
fn threads(name: &str) -> usize {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap().flatten();
    tasks.filter(|task| std::fs::read_to_string(task.path().join("comm")).is_ok_and(|is| is.trim() == name)).count()
}

#[test]
fn what_waits_takes_no_thread_holds_nothing_up_and_can_be_called_back() {
    let dir = tempfile::tempdir().unwrap();
    let store = new_pool(&dir);
    drop(disk::create(&store, "a", (BLOCKS * BLOCK) as u64).unwrap());
    let device: Arc<dyn BlockDevice> = disk::open(&store, "a").unwrap();
    for (cause, value, lift) in [("quota", "4K", "none"), ("iops", "1", "none"), ("bandwidth", "4K", "none")] {
        disk::set(&store, "a", "enospc", "wait").unwrap();
        device.discard(0, (BLOCKS * BLOCK) as u64).unwrap();
        device.flush().unwrap();
        disk::set(&store, "a", cause, value).unwrap();
        let mut engine: Engine<usize> = Engine::new("waits", 2, Arc::default()).unwrap();
        let begin = |engine: &mut Engine<usize>, op, tag: usize| {
            let pages = Some(afterimage::sys::pages::Pages::new(BLOCK).unwrap());
            let (offset, len) = ((tag % BLOCKS * BLOCK) as u64, if op == Op::Flush { 0 } else { BLOCK as u64 });
            engine.begin(Request { op, device: Arc::clone(&device), offset, len, pages, at: 0, tag });
        };
        let next = |engine: &mut Engine<usize>| loop {
            if let Some(done) = engine.finished() {
                return (done.request.tag, done.result.map_err(|error| error.kind()));
            }
            engine.wait(None).unwrap();
        };
        for tag in 0..1000 {
            begin(&mut engine, Op::Write { durable: false }, tag);
        }
        begin(&mut engine, Op::Flush, 5000);
        let mut written = 0;
        loop {
            match next(&mut engine) {
                (5000, Ok(())) => break,
                (_, Ok(())) => written += 1,
                other => panic!("{cause}: {other:?}"),
            }
        }
        assert!((0..100).contains(&written), "{cause}: {written} did not wait");
        assert!(threads("waits") <= 2, "{cause}");
        // All of them hold nothing.
        drop(snapshot::take(&store, &[("a".into(), cause.into())]).unwrap());
        if cause == "quota" {
            // The flush may have been quicker than the first attempts, and than the one write that fits.
            while store.disk_info("a").unwrap().waiting < 900 {
                std::thread::yield_now();
            }
            begin(&mut engine, Op::Read, 6000);
            loop {
                match next(&mut engine) {
                    (6000, Ok(())) => break,
                    (_, Ok(())) => written += 1,
                    other => panic!("{cause}: {other:?}"),
                }
            }
            assert!(written <= 1, "{written} did not wait");
            device.flush().unwrap();
        }
        engine.cancel();
        let mut back = 0;
        while written + back < 1000 {
            match next(&mut engine) {
                (_, Ok(())) => written += 1,
                (_, Err(kind)) => {
                    assert_eq!(kind, Kind::Cancelled, "{cause}");
                    back += 1;
                }
            }
        }
        assert_eq!((engine.in_flight(), store.disk_info("a").unwrap().waiting), (0, 0));
        disk::set(&store, "a", cause, lift).unwrap();
        snapshot::remove(&store, "a", cause).unwrap();
    }
}

/// Where no log of unflushed changes can be made, a write is durable when it is finished: for whoever opens the pool next.
#[test]
fn without_a_log_a_write_of_an_engine_is_flushed_before_it_is_finished() {
    let dir = tempfile::tempdir().unwrap();
    let media: Arc<dyn Media> = Arc::new(HostMedia::new(dir.path()).unwrap());
    let small = InitOptions { journal: 4 << 20, ballast: 4096, probe: true };
    Store::init(&media, small).unwrap();
    let options = OpenOptions { background: false, ..OpenOptions::default() };
    let store = Store::open(Arc::clone(&media), options).unwrap();
    drop(disk::create(&store, "a", (BLOCKS * BLOCK) as u64).unwrap());
    std::fs::write(dir.path().join("unflushed"), "in the way").unwrap();
    let disk = disk::open(&store, "a").unwrap();
    let _lease = disk.lease("guest").unwrap();
    let mut load = Load::new(disk);
    for number in 0..200 {
        load.begin(number);
        while load.engine.in_flight() > 0 {
            load.engine.wait(None).unwrap();
            load.take_finished();
        }
    }
    // As if it were killed: nothing is closed.
    let next = Store::open(media, options).unwrap();
    let mut found = vec![0; BLOCKS * BLOCK];
    disk::open(&next, "a").unwrap().read(&mut found, 0).unwrap();
    assert!(found == load.twin);
}
