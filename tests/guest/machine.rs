//! A virtual machine with a real Linux in it: QEMU, driven from outside.
//!
//! # Shape
//! Processors are emulated, so that it runs wherever QEMU does and every time alike. Three channels lead out: the console
//! goes to a file, which also tells what a load has synced; the agent answers on the second serial port; QEMU itself on
//! its QMP socket. Each is a socket or file in the directory of the machine.
//!
//! # When it goes wrong
//! A guest that panics, an ended QEMU or an answer that does not come fails the test with the end of the console and of
//! what QEMU said. The process is killed when its `Machine` is dropped.

use std::fs;
use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::parts::{Parts, base64, unbase64};
use crate::real::wait_for;

/// How long a guest may take for anything, on a machine that is busy: it boots in 6 s on an idle one.
const PATIENCE: Duration = Duration::from_secs(240);
/// Processors of a guest.
pub(super) const PROCESSORS: u64 = 2;

/// A running guest.
pub(super) struct Machine {
    child: Child,
    agent: BufReader<UnixStream>,
    control: BufReader<UnixStream>,
    dir: PathBuf,
    number: u64,
    boot: String,
}

/// What a command in the guest came to.
pub(super) struct Outcome {
    pub(super) status: u64,
    pub(super) said: String,
}

impl Machine {
    /// Boots a guest whose disk these words attach, and waits until its agent answers. `dir` is made for its files.
    pub(super) fn boot(parts: &Parts, dir: &Path, disk: &[String]) -> Self {
        let mut machine = Self::start(parts, dir, "memory-backend-memfd,share=on", disk);
        machine.wait_until_ready();
        machine
    }

    /// Boots a guest that has its memory in a file of the host, which is made.
    pub(super) fn boot_in(parts: &Parts, dir: &Path, memory: &Path, disk: &[String]) -> Self {
        let memory = format!("memory-backend-file,share=on,mem-path={}", memory.display());
        let mut machine = Self::start(parts, dir, &memory, disk);
        machine.wait_until_ready();
        machine
    }

    /// Starts a machine that goes on from the memory in one file and the devices in another one.
    pub(super) fn resume(parts: &Parts, dir: &Path, (memory, devices): (&Path, &Path), disk: &[String]) -> Self {
        let memory = format!("memory-backend-file,share=off,readonly=on,rom=off,mem-path={}", memory.display());
        let words = [disk, &["-incoming", "defer"].map(str::to_owned)].concat();
        let mut machine = Self::start(parts, dir, &memory, &words);
        machine.leave_memory_alone();
        machine.control("migrate-incoming", &json!({ "uri": format!("file:{}", devices.display()) }));
        machine.wait_until_moved();
        machine.control("cont", &json!({}));
        machine
    }

    /// Stops the guest, writes the state of its devices to a file, and ends QEMU; `stopped` is called in between.
    pub(super) fn suspend(mut self, devices: &Path, stopped: impl FnOnce()) {
        self.leave_memory_alone();
        self.control("stop", &json!({}));
        self.control("migrate", &json!({ "uri": format!("file:{}", devices.display()) }));
        self.wait_until_moved();
        stopped();
        self.control("quit", &json!({}));
        self.child.wait().unwrap();
    }

    /// Memory that is in a file is not a matter of a migration.
    fn leave_memory_alone(&mut self) {
        let capability = json!({ "capability": "x-ignore-shared", "state": true });
        self.control("migrate-set-capabilities", &json!({ "capabilities": [capability] }));
    }

    fn wait_until_moved(&mut self) {
        let begun = Instant::now();
        loop {
            let state = self.control("query-migrate", &json!({}));
            match state["status"].as_str() {
                Some("completed") => return,
                Some("failed" | "cancelled") => panic!("{state}{}", self.told()),
                _ => assert!(begun.elapsed() < PATIENCE, "{state}{}", self.told()),
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Returns the number of the process.
    pub(super) fn process(&self) -> u32 {
        self.child.id()
    }

    /// Starts QEMU with this memory and these words, and connects to it.
    fn start(parts: &Parts, dir: &Path, memory: &str, words: &[String]) -> Self {
        fs::create_dir_all(dir).unwrap();
        let at = |name: &str| dir.join(name).to_str().unwrap().to_owned();
        for name in ["agent", "control", "console"] {
            fs::remove_file(at(name)).ok();
        }
        let log = fs::OpenOptions::new().create(true).append(true).open(at("qemu.log")).unwrap();
        let mut command = Command::new("qemu-system-x86_64");
        command.args(["-nodefaults", "-no-user-config", "-display", "none", "-accel", "tcg,thread=multi"]);
        command.args(["-machine", "q35,memory-backend=memory", "-cpu", "max", "-smp", &PROCESSORS.to_string()]);
        command.args(["-m", "256M", "-object", &format!("{memory},id=memory,size=256M")]);
        command.args(["-kernel".as_ref(), parts.kernel.as_os_str(), "-initrd".as_ref(), parts.initrd.as_os_str()]);
        // The check of the timer fails when the host has no time for an emulated processor; as a KVM guest Linux skips it.
        command.args(["-append", "console=ttyS0 quiet panic=0 no_timer_check"]);
        command.args(["-chardev", &format!("file,id=console,path={}", at("console")), "-serial", "chardev:console"]);
        let agent = format!("socket,id=agent,path={},server=on,wait=off", at("agent"));
        command.args(["-chardev", &agent, "-serial", "chardev:agent"]);
        command.args(["-qmp", &format!("unix:{},server=on,wait=off", at("control"))]);
        command.args(words).stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        let mut child = command.spawn().unwrap();
        let (agent, control) = (connect(&mut child, dir, "agent"), connect(&mut child, dir, "control"));
        let mut machine = Self { child, agent, control, dir: dir.to_owned(), number: 0, boot: String::new() };
        machine.expect("QMP", |it| &mut it.control);
        machine.control("qmp_capabilities", &json!({}));
        machine
    }

    /// Waits until the agent says that it is there.
    fn wait_until_ready(&mut self) {
        let line = self.expect("agent that is ready", |it| &mut it.agent);
        let boot = line.strip_prefix("ready ").unwrap_or_else(|| panic!("{line:?}{}", self.told()));
        assert_ne!(boot, self.boot, "a boot has an id of its own");
        self.boot = boot.to_owned();
    }

    /// Runs a script in the guest that must succeed, and returns what it said.
    #[track_caller]
    pub(super) fn run(&mut self, script: &str) -> String {
        let Outcome { status, said } = self.attempt(script);
        assert_eq!(status, 0, "{script}\nsaid: {said}{}", self.told());
        said.trim_end().to_owned()
    }

    /// Runs a script in the guest.
    #[track_caller]
    pub(super) fn attempt(&mut self, script: &str) -> Outcome {
        self.send(script);
        let line = self.expect(script, |it| &mut it.agent);
        let words: Vec<&str> = line.split(' ').collect();
        let [number, status, said] = words[..] else { panic!("the agent said {line:?}{}", self.told()) };
        assert_eq!(number, self.number.to_string(), "{line:?}");
        Outcome { status: status.parse().unwrap(), said: unbase64(said) }
    }

    /// Hands the agent a script without waiting for an answer.
    fn send(&mut self, script: &str) {
        self.number += 1;
        let line = format!("{} {}\n", self.number, base64(script));
        self.agent.get_mut().write_all(line.as_bytes()).unwrap_or_else(|e| panic!("{e}{}", self.told()));
    }

    /// Lets the guest restart itself, and waits until it is up again.
    pub(super) fn reboot(&mut self) {
        self.send("umount -r / || true; sync; reboot -f");
        self.wait_until_ready();
    }

    /// Lets the guest end as it should, and waits until QEMU has ended as well.
    pub(super) fn power_off(mut self) {
        self.send("umount -r / || true; sync; poweroff -f");
        let begun = Instant::now();
        while self.child.try_wait().unwrap().is_none() {
            assert!(begun.elapsed() < PATIENCE, "the guest stays on{}", self.told());
            std::thread::sleep(Duration::from_millis(10));
        }
        let status = self.child.wait().unwrap();
        assert!(status.success(), "{status}{}", self.told());
    }

    /// Ends QEMU as the kernel would when memory runs out.
    pub(super) fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Asks QEMU for something and returns its answer.
    #[track_caller]
    pub(super) fn control(&mut self, command: &str, arguments: &Value) -> Value {
        let line = json!({ "execute": command, "arguments": arguments }).to_string();
        self.control.get_mut().write_all(format!("{line}\n").as_bytes()).unwrap();
        loop {
            let line = self.expect(command, |it| &mut it.control);
            let answer: Value = serde_json::from_str(&line).unwrap();
            assert!(answer["error"].is_null(), "{command}: {answer}");
            // What happens beside it is told in between.
            if answer["event"].is_null() {
                return answer["return"].clone();
            }
        }
    }

    /// Returns the number of the newest file that a load has told to be synced; 0 for none.
    pub(super) fn synced(&self, load: &str) -> u64 {
        let word = format!("synced {load} ");
        let console = self.console();
        // The line in the making has no end yet.
        let whole = console.rfind('\n').map_or("", |end| &console[..end]);
        let numbers = whole.lines().filter_map(|line| line.trim_end().strip_prefix(&*word)?.parse().ok());
        numbers.max().unwrap_or(0)
    }

    pub(super) fn console(&self) -> String {
        String::from_utf8_lossy(&fs::read(self.dir.join("console")).unwrap_or_default()).into_owned()
    }

    /// Reads a line from a channel, however long it takes, as long as the guest lives.
    #[track_caller]
    fn expect(&mut self, what: &str, channel: impl Fn(&mut Self) -> &mut BufReader<UnixStream>) -> String {
        let begun = Instant::now();
        let mut line = String::new();
        loop {
            match channel(self).read_line(&mut line) {
                Ok(0) => panic!("QEMU ended before it answered: {what}{}", self.told()),
                Ok(_) if line.ends_with('\n') => return line.trim_end_matches(['\r', '\n']).to_owned(),
                Ok(_) => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock => {}
                Err(e) => panic!("{what}: {e}{}", self.told()),
            }
            let dead = self.console().contains("Kernel panic");
            assert!(!dead && begun.elapsed() < PATIENCE, "in vain: {what}{}", self.told());
        }
    }

    /// Returns the end of what the console and QEMU told, for the failure of a test.
    fn told(&self) -> String {
        let end = |text: &str| {
            let skip = text.lines().count().saturating_sub(40);
            text.lines().skip(skip).collect::<Vec<_>>().join("\n")
        };
        let log = fs::read_to_string(self.dir.join("qemu.log")).unwrap_or_default();
        format!("\nconsole of the guest:\n{}\nQEMU:\n{}", end(&self.console()), end(&log))
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// Connects to a socket that QEMU makes when it starts.
fn connect(child: &mut Child, dir: &Path, name: &str) -> BufReader<UnixStream> {
    let mut stream = None;
    wait_for("QEMU makes its sockets", || {
        stream = UnixStream::connect(dir.join(name)).ok();
        stream.is_some() || child.try_wait().unwrap().is_some()
    });
    let log = || fs::read_to_string(dir.join("qemu.log")).unwrap_or_default();
    let stream = stream.unwrap_or_else(|| panic!("QEMU did not start: {}", log()));
    stream.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
    BufReader::new(stream)
}
