//! Memory served to Firecracker: `player.py` plays its side, in a process of its own, from its documentation.

mod refused;

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use afterimage::checkpoint::PageBlock;
use afterimage::codec::crc32;
use serde_json::{Value, json};

use crate::checkpoint::content;
use crate::cli::Afterimage;

const MIB: u64 = 1 << 20;
const BLOCK: u64 = 64 << 10;
const PLAYER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/firecracker/player.py");

/// A pool with a checkpoint `fc@a` of a memory that was packed.
struct Packed {
    it: Afterimage,
    memory: Vec<u8>,
}

impl Packed {
    fn new(bytes: u64) -> Self {
        let it = Afterimage::with_pool();
        let memory = Self::content(bytes);
        let (file, state) = (it.path("memory"), it.path("state"));
        std::fs::write(&file, &memory).unwrap();
        std::fs::write(&state, b"of a microVM").unwrap();
        let [file, state] = [&file, &state].map(|path| path.to_str().unwrap());
        it.json(&["checkpoint", "save", "--memory-file", file, "--state", state, "--into", "fc@a"]);
        Self { it, memory }
    }

    /// Page blocks of all sorts, a third of them zeros, and in the middle 4 MiB of nothing.
    fn content(bytes: u64) -> Vec<u8> {
        let hole = bytes / 2..bytes / 2 + 4 * MIB;
        let block = |number: u64| match hole.contains(&(number * BLOCK)) && bytes > 16 * MIB {
            true => vec![0; BLOCK as usize],
            false => content(7, PageBlock(number), (bytes - number * BLOCK).min(BLOCK) as usize),
        };
        (0..bytes.div_ceil(BLOCK)).flat_map(block).collect()
    }

    fn file(&self) -> PathBuf {
        self.it.pool().join("checkpoints/fc/a.ckpt")
    }

    fn socket(&self) -> PathBuf {
        self.it.path("uffd.sock")
    }

    /// Begins to serve, and waits until there is a socket.
    fn serve(&self) -> Handler {
        let words = ["--json", "checkpoint", "serve-uffd", "fc@a", "--socket"];
        let mut command = self.it.command(&words);
        command.arg(self.socket()).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let handler = Handler(Some(command.spawn().unwrap()));
        let until = Instant::now() + Duration::from_secs(30);
        while !self.socket().exists() {
            assert!(Instant::now() < until, "nobody listens");
            std::thread::sleep(Duration::from_millis(5));
        }
        handler
    }

    fn player(&self, spec: &Value) -> Player {
        let mut command = Command::new("python3");
        command.arg(PLAYER).arg(self.socket()).arg(spec.to_string());
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let (input, output) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
        let mut player = Player { child, input: Some(input), output };
        assert_eq!(player.answer(), "ready");
        player
    }

    fn crc(&self, start: u64, length: u64) -> u64 {
        crc32(&self.memory[start as usize..(start + length) as usize]).into()
    }
}

/// `checkpoint serve-uffd`.
struct Handler(Option<Child>);

impl Handler {
    fn id(&self) -> u32 {
        self.0.as_ref().unwrap().id()
    }

    fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_raw(self.id() as i32).unwrap();
        rustix::process::kill_process(pid, signal).unwrap();
    }

    /// Waits for its end, and returns its exit code, what it answered, and what it said.
    fn end(mut self) -> (i32, Value, String) {
        let mut child = self.0.take().unwrap();
        let status = wait(&mut child, 60);
        let (mut answer, mut said) = (String::new(), String::new());
        child.stdout.take().unwrap().read_to_string(&mut answer).unwrap();
        child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        (status.code().unwrap_or(-1), serde_json::from_str(&answer).unwrap_or_default(), said)
    }
}

impl Drop for Handler {
    fn drop(&mut self) {
        if let Some(mut child) = self.0.take() {
            child.kill().ok();
            child.wait().unwrap();
        }
    }
}

fn wait(child: &mut Child, seconds: u64) -> ExitStatus {
    let until = Instant::now() + Duration::from_secs(seconds);
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status;
        }
        if Instant::now() >= until {
            child.kill().unwrap();
            child.wait().unwrap();
            panic!("a process hangs");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Firecracker.
struct Player {
    child: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
}

impl Player {
    fn answer(&mut self) -> Value {
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("{line:?}: {error}"))
    }

    fn say(&mut self, command: &str) {
        writeln!(self.input.as_mut().unwrap(), "{command}").unwrap();
    }

    fn ask(&mut self, command: &str) -> Value {
        self.say(command);
        self.answer()
    }

    fn read(&mut self, start: u64, length: u64, threads: u32) -> u64 {
        self.ask(&format!("read {start} {length} {threads}")).as_u64().unwrap()
    }

    /// Tells of which pages memory cannot be had.
    fn lost(&mut self, pages: &[u64]) -> Vec<bool> {
        let efault = self.ask("errno");
        let words: Vec<_> = pages.iter().map(u64::to_string).collect();
        let errors = self.ask(&format!("errors {}", words.join(" ")));
        let errors = errors.as_array().unwrap().clone();
        assert!(errors.iter().all(|error| *error == efault || error.as_u64() == Some(0)), "{errors:?}");
        errors.into_iter().map(|error| error == efault).collect()
    }

    fn exit(mut self) {
        self.say("exit");
        assert!(wait(&mut self.child, 30).success());
    }
}

impl Drop for Player {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().unwrap();
    }
}

/// Two regions, of which the first one that is mapped is the second one of the file.
fn regions(bytes: u64) -> Value {
    let first = 10 * MIB;
    json!({ "regions": [[bytes - first, first], [first, 0]] })
}

#[test]
fn a_machine_has_the_memory_that_was_saved() {
    let bytes = 40 * MIB + 3 * 4096;
    let packed = Packed::new(bytes);
    let handler = packed.serve();
    assert_eq!(std::fs::metadata(packed.socket()).unwrap().permissions().mode() & 0o777, 0o600);
    let (code, error) = packed.it.error(&["checkpoint", "rm", "fc@a"]);
    assert!(code == 4 && error["message"].as_str().unwrap().contains("fc@a is being read"), "{error}");
    // Some waits for its memory before anybody knows what is in it, and some is taken away by then.
    let block =
        |number: u64| packed.memory[(number * BLOCK) as usize..][..BLOCK as usize].iter().any(|byte| *byte != 0);
    let busy: Vec<u64> = (0..bytes / BLOCK).filter(|number| block(*number)).take(4).map(|n| n * BLOCK).collect();
    let reads = busy[..3].iter().map(|at| format!("read {at} 4096 1"));
    let early: Vec<String> = reads.chain([format!("remove {} {BLOCK}", busy[3])]).collect();
    let mut spec = regions(bytes);
    spec["early"] = json!(early);
    let mut player = packed.player(&spec);
    let found = player.ask("early");
    for (at, found) in busy[..3].iter().zip(found.as_array().unwrap()) {
        assert_eq!(found.as_u64(), Some(packed.crc(*at, 4096)), "what was touched before it was served");
    }
    let mut memory = packed.memory.clone();
    memory[busy[3] as usize..][..BLOCK as usize].fill(0);
    assert_eq!(player.read(0, bytes, 4), u64::from(crc32(&memory)));
    assert_eq!(player.ask("peer").as_u64(), Some(handler.id().into()));
    assert!(!packed.socket().exists(), "one machine is served");
    player.ask(&format!("write {} 77", 30 * MIB));
    player.ask(&format!("remove {} {}", 12 * MIB, MIB));
    assert_eq!(player.read(12 * MIB, MIB, 2), u64::from(crc32(&vec![0; MIB as usize])));
    let mut page = packed.memory[30 * MIB as usize..][..4096].to_vec();
    page[0] = 77;
    assert_eq!(player.read(30 * MIB, 4096, 1), u64::from(crc32(&page)));
    player.exit();
    let (code, answer, said) = handler.end();
    assert_eq!(code, 0, "{said}");
    assert_eq!((answer["answer"].as_str(), answer["checkpoint"].as_str()), (Some("served"), Some("fc@a")));
    assert_eq!(
        (answer["resident"].as_bool(), answer["left"].as_u64(), answer["failed"].as_u64()),
        (Some(true), Some(0), Some(0))
    );
    assert!(answer["faults"].as_u64().unwrap() > 0 && answer["regions"].as_u64() == Some(2), "{answer}");
    // What was touched is fetched first the next time; and the checkpoint can go.
    assert!(packed.file().with_extension("faults").exists());
    let handler = packed.serve();
    let mut player = packed.player(&json!({ "regions": [[bytes, 0]], "fields": "kib", "pieces": true }));
    assert_eq!(player.read(0, bytes, 3), packed.crc(0, bytes));
    drop(player);
    assert_eq!(handler.end().0, 0);
    packed.it.json(&["checkpoint", "rm", "fc@a"]);
}

/// A balloon takes memory while it comes: what was taken away is zeros for ever, whichever was first.
#[test]
fn memory_that_is_given_back_is_zeros() {
    let bytes = 64 * MIB;
    let packed = Packed::new(bytes);
    for round in 0..5 {
        let handler = packed.serve();
        let mut player = packed.player(&json!({ "regions": [[16 * MIB, 0], [48 * MIB, 16 * MIB]], "fields": "none" }));
        let taken = 48 * MIB;
        let wrong = player.ask(&format!("churn {taken} {} {} 4", bytes - taken, 300 + round * 100));
        assert_eq!(wrong, json!([]), "pages that had something after they were taken away");
        player.ask(&format!("remove {} {}", 20 * MIB + 4096, 4096 * 5));
        let mut memory = packed.memory.clone();
        memory[20 * MIB as usize + 4096..][..4096 * 5].fill(0);
        assert_eq!(player.read(0, taken, 4), u64::from(crc32(&memory[..taken as usize])));
        player.exit();
        let (code, answer, said) = handler.end();
        assert_eq!((code, answer["left"].as_u64()), (0, Some(0)), "{said}");
    }
}

/// Huge pages that the host has, for as long as this lives.
struct HugePages {
    before: String,
}

const HUGE_PAGES: &str = "/proc/sys/vm/nr_hugepages";

impl HugePages {
    fn take(count: u64) -> Option<Self> {
        let before = std::fs::read_to_string(HUGE_PAGES).ok()?.trim().to_owned();
        let it = Self { before };
        std::fs::write(HUGE_PAGES, (count + it.before.parse::<u64>().ok()?).to_string()).ok()?;
        let free = std::fs::read_to_string("/proc/meminfo").ok()?;
        let free = free.lines().find_map(|line| line.strip_prefix("HugePages_Free:")?.trim().parse::<u64>().ok())?;
        (free >= count).then_some(it)
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        std::fs::write(HUGE_PAGES, &self.before).ok();
    }
}

#[test]
fn pages_of_2_mib_come_whole() {
    let bytes = 48 * MIB;
    let Some(_pages) = HugePages::take(bytes / (2 * MIB)) else {
        eprintln!(
            "NOT TESTED: this host gives no {} huge pages, so memory in pages of 2 MiB was not served",
            bytes / (2 * MIB)
        );
        return;
    };
    let packed = Packed::new(bytes);
    let spec = json!({ "regions": [[28 * MIB, 20 * MIB], [20 * MIB, 0]], "page": 2 * MIB });
    for round in 0..3 {
        let handler = packed.serve();
        let mut player = packed.player(&spec);
        if round > 0 {
            let wrong = player.ask(&format!("churn {} {} 50 4", 40 * MIB, 8 * MIB));
            assert_eq!(wrong, json!([]), "pages that had something after they were taken away");
        }
        assert_eq!(player.read(0, 40 * MIB, 4), packed.crc(0, 40 * MIB));
        player.exit();
        let (code, answer, said) = handler.end();
        assert_eq!((code, answer["page-size"].as_u64()), (0, Some(2 * MIB)), "{said}");
        // 24 pages, of which two are all zeros: more than that are 2 MiB of zeros nowhere.
        assert_eq!((answer["page-blocks"].as_u64(), answer["left"].as_u64()), (Some(22), Some(0)), "{answer}");
    }
    // One damaged piece is the loss of its page alone.
    damage(&packed, 0);
    let handler = packed.serve();
    let mut player = packed.player(&spec);
    let pages: Vec<u64> = (0..24).map(|n| n * 2 * MIB).collect();
    assert_eq!(player.lost(&pages).into_iter().filter(|lost| *lost).count(), 1);
    player.exit();
    assert_eq!(handler.end().0, 5);
}

/// Flips a bit in a storage block.
fn damage(packed: &Packed, block: u64) {
    let file = std::fs::OpenOptions::new().read(true).write(true).open(packed.file()).unwrap();
    let (mut byte, at) = ([0], (block + 1) * MIB + 100);
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 4], at).unwrap();
}

#[test]
fn what_is_damaged_is_a_bus_error_and_the_rest_is_served() {
    let bytes = 24 * MIB;
    let packed = Packed::new(bytes);
    damage(&packed, 1);
    let handler = packed.serve();
    let mut player = packed.player(&regions(bytes));
    let pages: Vec<u64> = (0..bytes / BLOCK).map(|n| n * BLOCK + 4096 * (n % 16)).collect();
    let lost = player.lost(&pages);
    assert_eq!(lost.iter().filter(|lost| **lost).count(), 1);
    let at = lost.iter().position(|lost| *lost).unwrap() as u64 * BLOCK;
    // Again, and all of the page block.
    let all: Vec<u64> = (at..at + BLOCK).step_by(4096).collect();
    assert!(player.lost(&all).into_iter().all(|lost| lost));
    assert_eq!(player.read(0, at, 3), packed.crc(0, at));
    assert_eq!(player.read(at + BLOCK, bytes - at - BLOCK, 3), packed.crc(at + BLOCK, bytes - at - BLOCK));
    // What is taken away is zeros, there too.
    player.ask(&format!("remove {} 8192", at + 4096));
    assert_eq!(player.lost(&[at, at + 4096, at + 8192, at + 12_288]), [true, false, false, true]);
    player.exit();
    let (code, answer, said) = handler.end();
    assert_eq!((code, answer["failed"].as_u64(), answer["killed"].as_bool()), (5, Some(1), Some(false)), "{said}");
    assert!(said.contains("checksum") && said.contains(&format!("{at:#x}")) && said.contains("fc@a"), "{said}");
}

#[test]
fn a_file_that_is_cut_off_meanwhile_holds_nobody_up() {
    let bytes = 24 * MIB;
    let packed = Packed::new(bytes);
    let handler = packed.serve();
    std::fs::OpenOptions::new().write(true).open(packed.file()).unwrap().set_len(MIB + 8192).unwrap();
    let mut player = packed.player(&regions(bytes));
    let zero = |n: u64| packed.memory[(n * BLOCK) as usize..][..BLOCK as usize].iter().all(|byte| *byte == 0);
    let numbers: Vec<u64> = (0..bytes / BLOCK).collect();
    let pages: Vec<u64> = numbers.iter().map(|n| n * BLOCK).collect();
    let lost = player.lost(&pages);
    for (number, lost) in numbers.iter().zip(lost) {
        assert_eq!(lost, !zero(*number), "page block {number}");
    }
    player.exit();
    let (code, _, said) = handler.end();
    assert_eq!(code, 5, "{said}");
    // Nobody can be served from what is left of it.
    let (code, error) =
        packed.it.error(&["checkpoint", "serve-uffd", "fc@a", "--socket", packed.socket().to_str().unwrap()]);
    assert!(code == 5 && error["message"].as_str().unwrap().contains("fc@a"), "{error}");
    assert!(!packed.socket().exists());
}

#[test]
fn each_side_sees_the_end_of_the_other() {
    let bytes = 64 * MIB;
    let packed = Packed::new(bytes);
    // The machine is killed, with threads that wait for memory.
    for delay in [0, 2, 10, 40] {
        let handler = packed.serve();
        let mut player = packed.player(&regions(bytes));
        player.say(&format!("read 0 {bytes} 4"));
        std::thread::sleep(Duration::from_millis(delay));
        drop(player);
        let (code, _, said) = handler.end();
        assert_eq!(code, 0, "{said}");
        assert!(!said.contains("no memory for the guest"), "its end is no failure: {said}");
    }
    // The handler is killed: the connection says so.
    let handler = packed.serve();
    let mut player = packed.player(&regions(bytes));
    assert_eq!(player.ask("closed 0"), json!(false));
    handler.signal(rustix::process::Signal::KILL);
    assert_eq!(player.ask("closed 10000"), json!(true));
    drop(player);
    // Asked to end, it does when all is there, and the machine lives on.
    let handler = packed.serve();
    let mut player = packed.player(&regions(bytes));
    handler.signal(rustix::process::Signal::TERM);
    let (code, answer, said) = handler.end();
    assert_eq!((code, answer["resident"].as_bool()), (0, Some(true)), "{said}");
    assert_eq!(player.ask("closed 10000"), json!(true));
    assert_eq!(player.read(0, bytes, 2), packed.crc(0, bytes));
    player.exit();
}
