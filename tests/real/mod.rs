//! The program as it is used: the real binary serves a pool, and what people run on disks runs on them.
//!
//! # Rules
//! 1. The server is a process of its own; the tests know it by its exit code, its log, its socket and its files.
//! 2. A test that needs root, FUSE, loop devices or a program says loudly when it skips, and fails instead under CI.
//! 3. Pools lie in the build directory, which is on a real disk where the directory for temporary files may be not.

mod backups;
mod damage;
mod file_systems;
mod full;
mod images;
mod increments;
mod kills;
mod making;
mod ordinary;
mod signals;

use std::ffi::OsStr;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::cli::{Afterimage, text};

/// How long anything may take that should be quick, on a machine that is busy.
const PATIENCE: Duration = Duration::from_secs(60);

/// Tells whether a thing that a test needs is there. Says so loudly when not; under CI that is a failure.
pub(crate) fn require(there: bool, what: &str) -> bool {
    if !there {
        assert!(std::env::var_os("CI").is_none(), "CI must have {what}");
        eprintln!("SKIPPED: this needs {what}");
    }
    there
}

/// Tells whether loop devices can be attached and mounted.
pub(crate) fn require_loop() -> bool {
    let can = rustix::process::geteuid().is_root() && Path::new("/dev/loop-control").exists();
    crate::tree::require_fuse() && require(can, "root and /dev/loop-control")
}

/// Tells whether programs are installed.
pub(crate) fn require_programs(programs: &[&str]) -> bool {
    programs.iter().all(|program| require(is_installed(program), program))
}

pub(crate) fn is_installed(program: &str) -> bool {
    let path = search_path();
    std::env::split_paths(&path).any(|dir| dir.join(program).is_file())
}

/// The search path with the directories of the administrator, which ordinary users often lack, and the one into which
/// `tests/run` puts what it builds.
pub(crate) fn search_path() -> std::ffi::OsString {
    let mut path = std::env::var_os("PATH").unwrap_or_default();
    path.push(concat!(":/usr/sbin:/sbin:", env!("CARGO_TARGET_TMPDIR"), "/../tools/bin"));
    path
}

/// Returns a new directory in the build directory.
pub(crate) fn scratch() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

/// A pool with a place to mount it.
pub(crate) struct Place {
    pub(crate) cli: Afterimage,
    mnt: PathBuf,
    /// What the servers log; not beside the pool, where there may be no room for it.
    log: tempfile::NamedTempFile,
}

impl Place {
    /// Makes a pool; `None` where FUSE cannot be used.
    pub(crate) fn new() -> Option<Self> {
        crate::tree::require_fuse().then(|| Self::within(scratch()))
    }

    /// Makes a pool in a directory.
    fn within(dir: tempfile::TempDir) -> Self {
        let cli = Afterimage { dir };
        let mnt = cli.path("mnt");
        fs::create_dir(&mnt).unwrap();
        cli.json(&["init"]);
        let log = tempfile::NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        Self { cli, mnt, log }
    }

    /// Starts the server.
    pub(crate) fn serve(&self) -> Server {
        let words = ["-v", "--json", "mount", self.mnt.to_str().unwrap()];
        let log = fs::OpenOptions::new().append(true).open(self.log.path()).unwrap();
        let mut child = self.cli.command(&words).stdout(Stdio::piped()).stderr(log).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let server = Server { child, mnt: self.mnt.clone() };
        assert!(line.contains("\"answer\":\"status\""), "no server: {line}{}", self.log());
        server
    }

    fn log(&self) -> String {
        let lines = fs::read_to_string(self.log.path()).unwrap();
        let last = lines.lines().count().saturating_sub(50);
        lines.lines().skip(last).collect::<Vec<_>>().join("\n")
    }

    /// Returns where it is mounted.
    pub(crate) fn mnt(&self) -> &Path {
        &self.mnt
    }

    pub(crate) fn disk(&self, name: &str) -> PathBuf {
        self.mnt.join(format!("disks/{name}.raw"))
    }

    pub(crate) fn snapshot(&self, disk: &str, name: &str) -> PathBuf {
        self.mnt.join(format!("snapshots/{disk}/{name}.raw"))
    }

    /// Returns a number of an answer.
    pub(crate) fn number(&self, words: &[&str], key: &str) -> u64 {
        let answer = self.cli.json(words);
        answer[key].as_u64().unwrap_or_else(|| panic!("{key} in {answer}"))
    }

    /// Proves that the pool is sound, and returns what the command said on stderr about opening it.
    #[track_caller]
    pub(crate) fn check(&self) -> String {
        let output = self.cli.run(&["check", "-v"]);
        let (said, told) = (text(&output.stdout), text(&output.stderr));
        assert!(output.status.success(), "check: {said}{told}\nlog of the server:\n{}", self.log());
        told.to_owned()
    }

    /// Waits until nobody writes a disk: the kernel sends the release of a closed file a moment after close(2).
    pub(crate) fn wait_until_free(&self, disk: &str) {
        wait_for(&format!("{disk} is let go of"), || self.cli.json(&["info", disk])["holder"].is_null());
    }
}

/// A server in the foreground, killed at the latest when this is dropped.
pub(crate) struct Server {
    child: Child,
    mnt: PathBuf,
}

impl Server {
    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// Waits until the process has ended by itself.
    fn wait(mut self) -> ExitStatus {
        let begun = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(begun.elapsed() < PATIENCE, "the server does not end");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Asks it to end and waits until it has.
    pub(crate) fn stop(self) {
        self.signal(Signal::TERM);
        assert_eq!(self.wait().code(), Some(0));
    }

    /// Kills it as the kernel would when memory runs out, and takes the dead mount away.
    pub(crate) fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        run("fusermount3", ["-u", "-z", self.mnt.to_str().unwrap()]);
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            self.child.kill().ok();
            self.child.wait().ok();
        }
        Command::new("fusermount3").args(["-q", "-u", "-z"]).arg(&self.mnt).output().ok();
    }
}

/// A loop device, detached when this is dropped.
pub(crate) struct Loop(String);

impl Loop {
    pub(crate) fn attach(file: &Path, options: &[&str]) -> Self {
        // Somebody else may take the free device between the question and the answer.
        for _ in 0..20 {
            let words = ["-f", "--show"].iter().chain(options).map(OsStr::new).chain([file.as_os_str()]);
            let output = command("losetup", words).output().unwrap();
            if output.status.success() {
                return Self(text(&output.stdout).trim().to_owned());
            }
            let said = text(&output.stderr);
            assert!(said.contains("busy") || said.contains("temporarily"), "losetup {options:?}: {said}");
            std::thread::sleep(Duration::from_millis(100));
        }
        panic!("no loop device was free");
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let output = command("losetup", ["-d", &self.0]).output().unwrap();
        assert!(output.status.success() || std::thread::panicking(), "{}", text(&output.stderr));
    }
}

/// A mounted file system, unmounted when this is dropped.
pub(crate) struct FileSystem(PathBuf);

impl FileSystem {
    pub(crate) fn mount(device: &Loop, at: &Path, options: &str) -> Self {
        fs::create_dir_all(at).unwrap();
        run("mount", [OsStr::new("-o"), options.as_ref(), device.0.as_ref(), at.as_os_str()]);
        Self(at.to_path_buf())
    }

    /// One that lies in memory.
    pub(crate) fn in_memory(at: &Path, options: &str) -> Self {
        fs::create_dir_all(at).unwrap();
        run("mount", ["-t", "tmpfs", "-o", options, "tmpfs", at.to_str().unwrap()]);
        Self(at.to_path_buf())
    }
}

impl Drop for FileSystem {
    fn drop(&mut self) {
        let Err(said) = unmount(&self.0) else { return };
        command("umount", [OsStr::new("-l"), self.0.as_os_str()]).output().ok();
        assert!(std::thread::panicking(), "{said}");
    }
}

/// Unmounts; `Err` is what `umount` said.
pub(crate) fn unmount(at: &Path) -> Result<(), String> {
    let mut said = String::new();
    // A process that another test is just starting may still have our files open, until it becomes its program.
    for _ in 0..100 {
        let output = command("umount", [at]).output().unwrap();
        if output.status.success() {
            return Ok(());
        }
        said = text(&output.stderr).to_owned();
        if !said.contains("busy") {
            break;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    Err(said)
}

pub(crate) fn command<S: AsRef<OsStr>>(program: &str, words: impl IntoIterator<Item = S>) -> Command {
    let mut command = Command::new(program);
    command.args(words).env("PATH", search_path()).env("LC_ALL", "C").stdin(Stdio::null());
    command
}

/// Runs a program that must succeed, and returns what it said.
#[track_caller]
pub(crate) fn run<S: AsRef<OsStr>>(program: &str, words: impl IntoIterator<Item = S>) -> String {
    let mut command = command(program, words);
    let Output { status, stdout, stderr } = command.output().unwrap_or_else(|e| panic!("{program}: {e}"));
    let said = String::from_utf8_lossy(&stdout).into_owned();
    assert!(status.success(), "{command:?}: {status}: {said}{}", String::from_utf8_lossy(&stderr));
    said
}

/// Runs a line of shell that must succeed; the words are its `$1`, `$2` ...
#[track_caller]
pub(crate) fn shell(line: &str, words: &[&OsStr]) -> String {
    run("bash", ["-euc", line, "bash"].iter().map(OsStr::new).chain(words.iter().copied()))
}

#[track_caller]
pub(crate) fn wait_for(what: &str, mut is: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !is() {
        assert!(begun.elapsed() < PATIENCE, "in vain: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}
