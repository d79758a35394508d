//! `serve`, `attach`, `detach` and `exports` with the real binary: who may write, what a restart brings back, what is
//! refused.
//!
//! # Rules
//! 1. Servers run in processes of their own and are ended with the test, however it ends ([`Server`]).
//! 2. NBD is spoken by a client of a few lines ([`client`]), so that the tests hold where no tool for it is installed.

mod again;
mod attach;
mod client;
mod direct;
mod durable;
mod ending;
mod large;
mod leases;
mod refused;
mod removed;
mod restart;
mod waits;

use std::path::Path;

use afterimage::api::{Client, Request, Response};
use afterimage::progress::Silent;
use serde_json::Value;

use crate::cli::Afterimage;
use crate::real::wait_for;

/// A pool with a server that ends with the test.
struct Server {
    it: Afterimage,
}

impl Server {
    /// Makes a pool with a disk `web` of 8 MiB, and no server.
    fn without() -> Self {
        let it = Afterimage::with_pool();
        it.json(&["create", "web", "-s", "8M"]);
        Self { it }
    }

    /// As [`Server::without`], mounted at `mnt`; `None` where FUSE cannot be used.
    fn mounted() -> Option<Self> {
        if !crate::tree::require_fuse() {
            return None;
        }
        let server = Self::without();
        std::fs::create_dir(server.it.path("mnt")).unwrap();
        server.mount();
        Some(server)
    }

    /// Mounts the pool again after its server has ended.
    fn mount(&self) {
        self.it.json(&["mount", "--daemon", self.it.path("mnt").to_str().unwrap()]);
    }

    /// Runs a command that must succeed; `SOCK` in it is the path of a socket.
    fn json(&self, words: &str) -> Value {
        let words = self.words(words);
        self.it.json(&words.iter().map(String::as_str).collect::<Vec<_>>())
    }

    /// Runs a command that must fail; returns the exit code and the message.
    fn error(&self, words: &str) -> (i32, String) {
        let words = self.words(words);
        let (code, error) = self.it.error(&words.iter().map(String::as_str).collect::<Vec<_>>());
        (code, error["message"].as_str().unwrap().to_owned())
    }

    fn words(&self, words: &str) -> Vec<String> {
        let dir = self.it.dir.path().to_str().unwrap();
        words.split(' ').map(|word| word.replace("SOCK", &format!("{dir}/sock")).replace("DIR", dir)).collect()
    }

    fn sock(&self) -> std::path::PathBuf {
        self.it.path("sock")
    }

    fn disk(&self, name: &str) -> std::path::PathBuf {
        self.it.path("mnt/disks").join(format!("{name}.raw"))
    }

    fn open_to_write(&self, name: &str) -> std::io::Result<std::fs::File> {
        std::fs::OpenOptions::new().read(true).write(true).open(self.disk(name))
    }

    fn exports(&self) -> Vec<Value> {
        self.json("exports")["exports"].as_array().unwrap().clone()
    }

    fn holder(&self, disk: &str) -> Option<String> {
        self.json(&format!("info {disk}"))["holder"].as_str().map(str::to_owned)
    }

    fn client(&self) -> Client {
        Client::find(&self.it.pool()).unwrap().expect("a server answers")
    }

    fn pid(&self) -> rustix::process::Pid {
        let Response::Status(status) = self.client().ask(&Request::Status {}, &Silent).unwrap() else { panic!() };
        rustix::process::Pid::from_raw(i32::try_from(status.pid).unwrap()).unwrap()
    }

    /// Kills the server, and waits until the kernel has taken away what it had.
    fn kill(&self) {
        self.signal(rustix::process::Signal::KILL);
    }

    /// Ends the server in order.
    fn end(&self) {
        self.signal(rustix::process::Signal::TERM);
    }

    fn signal(&self, signal: rustix::process::Signal) {
        let pid = self.pid();
        rustix::process::kill_process(pid, signal).unwrap();
        let lock = || afterimage::pool::PoolLock::take(&self.it.pool());
        wait_for("the server ends", || lock().is_ok());
        let mount = self.it.path("mnt");
        // Listed: names the kernel may still have.
        let shows = || std::fs::read_dir(&mount).is_ok_and(|mut names| names.next().is_some());
        wait_for("the mount is dead or gone", || !shows());
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let mount = self.it.path("mnt");
        if mount.exists() {
            self.it.command(&["umount", "--force"]).arg(&mount).output().unwrap();
        }
        if let Ok(Some(client)) = Client::find(&self.it.pool()) {
            client.ask(&Request::Shutdown {}, &Silent).ok();
        }
    }
}

fn mode(path: &Path) -> u32 {
    std::os::unix::fs::PermissionsExt::mode(&path.metadata().unwrap().permissions()) & 0o7777
}
