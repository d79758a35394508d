//! How fast a vhost-user-blk server is: the part of fio that `tests/bench/guest` needs, without a guest.
//!
//! The driver's side of the rings is `blkio`, on which fio's own engine for this stands; Debian builds neither into fio nor
//! into QEMU. So any server of the protocol is measured by the same client, and none by an emulated processor.
//!
//! One thread, one queue. Buffers and rings are in memory that is shared with the server. Whenever requests have come back,
//! as many new ones are put in and the server is told once, if it wants to be. Random offsets are visited once each. The
//! time of a flush at the end counts as time of the writes.
//!
//!     cargo bench --bench vhost_user -- SOCKET PATTERN BLOCK DEPTH SECONDS
//!
//! PATTERN is read, write, randread or randwrite, BLOCK in bytes. Prints one line of JSON.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout, reason = "a bench")]
#![allow(clippy::disallowed_methods, clippy::cast_precision_loss, reason = "a bench")]

use std::mem::MaybeUninit;
use std::time::{Duration, Instant};

use blkio::{Blkio, Blkioq, Completion, ReqFlags};
use serde_json::json;

/// More than the depths that are asked for.
const QUEUE_SIZE: i32 = 256;

struct Given {
    socket: String,
    random: bool,
    write: bool,
    block: usize,
    depth: usize,
    seconds: f64,
}

fn given() -> Given {
    // Cargo adds a word of its own.
    let words: Vec<String> = std::env::args().skip(1).filter(|word| word != "--bench").collect();
    let [socket, pattern, block, depth, seconds] = &words[..] else {
        panic!("usage: SOCKET PATTERN BLOCK DEPTH SECONDS, not {words:?}")
    };
    let kind = pattern.strip_prefix("rand").unwrap_or(pattern);
    assert!(matches!(kind, "read" | "write"), "there is no pattern {pattern}");
    Given {
        socket: socket.clone(),
        random: kind != pattern,
        write: kind == "write",
        block: block.parse().unwrap(),
        depth: depth.parse().unwrap(),
        seconds: seconds.parse().unwrap(),
    }
}

fn main() {
    let given = given();
    let mut device = Blkio::new("virtio-blk-vhost-user").unwrap();
    device.set_str("path", &given.socket).unwrap();
    device.connect().expect("a vhost-user-blk server listens there");
    device.set_i32("queue-size", QUEUE_SIZE).unwrap();
    let capacity = device.get_u64("capacity").unwrap();
    let mut queue = device.start().unwrap().queues.pop().unwrap();
    let memory = device.alloc_mem_region(given.block * given.depth).unwrap();
    device.map_mem_region(&memory).unwrap();

    let offsets = Offsets::new(capacity / given.block as u64, given.random);
    let mut run = Run {
        given: &given,
        queue: &mut queue,
        memory: memory.addr,
        offsets,
        begun: vec![Instant::now(); given.depth],
    };
    run.fill_buffers();
    let (mut times, took) = run.run();

    times.sort_unstable();
    let ios = times.len();
    let line = json!({
        "iops": ios as f64 / took.as_secs_f64(),
        "mib": (ios * given.block) as f64 / 1_048_576.0 / took.as_secs_f64(),
        "ios": ios,
        "p50_us": micros(times[ios / 2]),
        "p99_us": micros(times[ios * 99 / 100]),
        "max_ms": micros(times[ios - 1]) / 1000.0,
    });
    println!("{line}");
}

fn micros(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}

/// Blocks in the order of their visit.
struct Offsets {
    blocks: u64,
    /// Which were visited; of no use in sequence.
    visited: Option<Vec<bool>>,
    next: u64,
    left: u64,
}

impl Offsets {
    fn new(blocks: u64, random: bool) -> Self {
        let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
        let (next, visited) = if random {
            (u64::from(since.subsec_nanos()) | 1, Some(vec![false; usize::try_from(blocks).unwrap()]))
        } else {
            (0, None)
        };
        Self { blocks, visited, next, left: blocks }
    }

    /// Returns the next block; `None` when all were visited.
    fn take(&mut self) -> Option<u64> {
        self.left = self.left.checked_sub(1)?;
        let Some(visited) = &mut self.visited else {
            self.next += 1;
            return Some(self.next - 1);
        };
        // xorshift64, then the first that is left from there on.
        self.next ^= self.next << 13;
        self.next ^= self.next >> 7;
        self.next ^= self.next << 17;
        let mut block = self.next % self.blocks;
        while std::mem::replace(&mut visited[usize::try_from(block).unwrap()], true) {
            block = (block + 1) % self.blocks;
        }
        Some(block)
    }
}

struct Run<'a> {
    given: &'a Given,
    queue: &'a mut Blkioq,
    /// Where the buffers begin, one for each request in flight.
    memory: usize,
    offsets: Offsets,
    /// When the request of each buffer was put in.
    begun: Vec<Instant>,
}

impl Run<'_> {
    /// Keeps so many requests in flight until the time is up; returns what each took, and what all did.
    fn run(&mut self) -> (Vec<Duration>, Duration) {
        let begun = Instant::now();
        let end = begun + Duration::from_secs_f64(self.given.seconds);
        let mut times = Vec::with_capacity(1 << 20);
        let mut in_flight = (0..self.given.depth).filter(|buffer| self.submit(*buffer)).count();
        assert_eq!(in_flight, self.given.depth, "the disk has as many blocks as requests are in flight");
        while in_flight > 0 {
            let done = self.wait();
            let now = Instant::now();
            for buffer in done {
                times.push(now - self.begun[buffer]);
                let more = now < end && self.submit(buffer);
                in_flight -= usize::from(!more);
            }
        }
        if self.given.write {
            self.queue.flush(0, ReqFlags::empty());
            self.wait();
        }
        (times, begun.elapsed())
    }

    /// Puts a request in; false when there is no block left.
    fn submit(&mut self, buffer: usize) -> bool {
        let Some(block) = self.offsets.take() else { return false };
        let (start, length) = (block * self.given.block as u64, self.given.block);
        let at = self.memory + buffer * length;
        self.begun[buffer] = Instant::now();
        if self.given.write {
            self.queue.write(start, at as *const u8, length, buffer, ReqFlags::empty());
        } else {
            self.queue.read(start, at as *mut u8, length, buffer, ReqFlags::empty());
        }
        true
    }

    /// Tells the server of what was put in, waits for at least one answer, and returns the buffers of all that are there.
    #[expect(unsafe_code, reason = "the library writes into memory that is not set")]
    fn wait(&mut self) -> Vec<usize> {
        let mut completions = [const { MaybeUninit::<Completion>::uninit() }; QUEUE_SIZE as usize];
        let count = self.queue.do_io(&mut completions, 1, None, None).unwrap();
        let buffer = |completion: &MaybeUninit<Completion>| {
            // SAFETY: do_io has set as many as it says, and these are they.
            let completion = unsafe { completion.assume_init_ref() };
            assert_eq!(completion.ret, 0, "the server answers with an error");
            completion.user_data
        };
        completions[..count].iter().map(buffer).collect()
    }

    /// Fills the buffers with bytes that no server takes for zeros.
    #[expect(unsafe_code, reason = "the library hands memory out as an address")]
    fn fill_buffers(&mut self) {
        let length = self.given.block * self.given.depth;
        // SAFETY: the region is mapped, is ours, has this length and is used by nobody else before the first request.
        let bytes = unsafe { std::slice::from_raw_parts_mut(self.memory as *mut u8, length) };
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        for word in bytes.chunks_exact_mut(8) {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            word.copy_from_slice(&state.to_le_bytes());
        }
    }
}
