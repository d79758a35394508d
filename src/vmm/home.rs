//! Where a virtual machine lives in its pool: `vms/NAME/`, for its owner alone.
//!
//! ```text
//!   vm.json       what it is made of; written whole, durably, when it is known that it can be started, before it runs
//!   api.sock      while it runs: HTTP and JSON (see afterimage-api(5))
//!   serial.sock   while it runs: its serial port
//!   console.log   what it said on its serial port, since it was started last
//!   vmm.log       what this program had to say when it ran in the background
//! ```
//!
//! # Rules
//! 1. Who runs a machine holds the lock of its folder; a second start is told so, and so is a removal.
//! 2. The folder is its owner's also where the machine runs as somebody else, so that a guest that has broken out changes
//!    neither what it is made of nor what it has said.
//! 3. `vm.json` says its version first. One of a newer program is refused, not guessed.
//!
//! # After a crash
//! The lock is gone with the process. Sockets stay and refuse connections; the next start removes them.

use std::fs::File;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{Boot, NetSettings};
use crate::checkpoint::CHECKPOINTS_DIR;
use crate::clock;
use crate::error::{Error, Result};
use crate::media::{HostMedia, Media, Open};
use crate::sys;

/// The folder of all machines in a pool.
const FOLDER: &str = "vms";
const DEFINITION: &str = "vm.json";
const TEMPORARY: &str = "vm.json.new";
/// The version of `vm.json` that this program writes.
const VERSION: u32 = 1;
/// Bytes of `vm.json` at most.
const DEFINITION_MAX: u64 = 1 << 20;
/// Bytes of the name of a machine at most: what a host name has.
const NAME_MAX: usize = 64;

/// How long whoever wants the lock waits for one who only looks whether somebody has it.
const LOOK_TIME: Duration = Duration::from_millis(50);

/// What a machine is made of, as it is kept.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Definition {
    /// Version of this file.
    pub version: u32,
    /// What it starts.
    pub boot: Boot,
    /// Bytes of its memory.
    pub memory: u64,
    /// Its processors.
    pub cpus: u8,
    /// Its disks, in order.
    #[serde(default)]
    pub disks: Vec<DiskDefinition>,
    /// Its network cards, in order.
    #[serde(default)]
    pub nets: Vec<NetSettings>,
    /// The user of the host whose rights its process has, when root starts it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
}

/// A disk of a machine, as it is kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct DiskDefinition {
    /// A file of the host, or a block device of it; `None` for a disk of the pool.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<PathBuf>,
    /// `DISK` or `DISK@SNAPSHOT` of the pool; `None` for a file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk: Option<String>,
    /// The guest cannot change it.
    #[serde(default)]
    pub read_only: bool,
    /// What the guest sees as its serial number.
    #[serde(default)]
    pub serial: String,
}

/// What a disk of a machine is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskSource<'a> {
    /// A file or block device of the host.
    File(&'a Path),
    /// `DISK` or `DISK@SNAPSHOT` of the pool.
    Pool(&'a str),
}

impl DiskDefinition {
    /// Returns what it is.
    ///
    /// # Errors
    /// `Corrupt` when it is nothing, or two things.
    pub fn source(&self) -> Result<DiskSource<'_>> {
        match (&self.file, &self.disk) {
            (Some(file), None) => Ok(DiskSource::File(file)),
            (None, Some(disk)) => Ok(DiskSource::Pool(disk)),
            _ => Err(Error::corrupt("a disk of a virtual machine is either a file or a disk of the pool")),
        }
    }
}

impl Definition {
    /// Checks what its form cannot say.
    ///
    /// # Errors
    /// `Unsupported` for a newer version, `Corrupt` for what makes no sense.
    pub fn check(&self) -> Result<()> {
        if self.version != VERSION {
            return Err(Error::unsupported(format!(
                "the definition of a machine is of version {}, and this program knows {VERSION}",
                self.version
            ))
            .hint("use the version of afterimage that wrote it, or a newer one"));
        }
        self.disks.iter().try_for_each(|disk| disk.source().map(drop))
    }

    /// Makes one of this version.
    #[must_use]
    pub fn new(boot: Boot, memory: u64, cpus: u8) -> Self {
        Self { version: VERSION, boot, memory, cpus, disks: Vec::new(), nets: Vec::new(), user: None }
    }
}

/// The version alone, of whatever else there is.
#[derive(Deserialize)]
struct Versioned {
    version: u32,
}

/// The folder of a machine.
#[derive(Debug, Clone)]
pub struct Home {
    name: String,
    dir: PathBuf,
}

/// Held by whoever runs the machine.
#[derive(Debug)]
pub struct HomeLock {
    _dir: File,
}

impl Home {
    /// Names the folder of a machine, which may be there or not.
    ///
    /// # Errors
    /// `Usage` for a name that cannot be.
    pub fn of(pool: &Path, name: &str) -> Result<Self> {
        let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        let begins = name.starts_with(|c: char| c.is_ascii_alphanumeric());
        if !begins || name.len() > NAME_MAX || !name.chars().all(good) {
            return Err(Error::usage(format!("'{name}' cannot be the name of a virtual machine")).hint(format!(
                "use letters, digits, '-', '_' and '.', at most {NAME_MAX}, and begin with a letter or digit"
            )));
        }
        Ok(Self { name: name.to_owned(), dir: pool.join(FOLDER).join(name) })
    }

    /// Returns all machines of a pool, in the order of their names.
    ///
    /// # Errors
    /// Those of the host.
    pub fn list(pool: &Path) -> Result<Vec<Self>> {
        let folder = pool.join(FOLDER);
        let cannot = |e| Error::io(format!("cannot list {}", folder.display()), e);
        let entries = match std::fs::read_dir(&folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(cannot)?,
        };
        let mut homes = Vec::new();
        for entry in entries {
            let name = entry.map_err(cannot)?.file_name();
            if let Some(home) = name.to_str().and_then(|name| Self::of(pool, name).ok())
                && home.dir.join(DEFINITION).exists()
            {
                homes.push(home);
            }
        }
        homes.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(homes)
    }

    /// Returns the name of the machine.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns the path of a file in the folder.
    #[must_use]
    pub fn path(&self, file: &str) -> PathBuf {
        self.dir.join(file)
    }

    /// Tells whether the machine is defined.
    #[must_use]
    pub fn exists(&self) -> bool {
        self.path(DEFINITION).exists()
    }

    /// Returns the folder of its checkpoints, which is made if it is not there.
    ///
    /// # Errors
    /// Those of the host.
    pub fn checkpoints(&self) -> Result<PathBuf> {
        let pool = self.dir.parent().and_then(Path::parent).expect("it is in a folder of the pool");
        let path = pool.join(CHECKPOINTS_DIR).join(&self.name);
        let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&path);
        made.map_err(|e| Error::io(format!("cannot make {}", path.display()), e))?;
        Ok(path)
    }

    /// Makes the folder.
    ///
    /// # Errors
    /// Those of the host.
    pub fn make(&self) -> Result<()> {
        let cannot = |e| Error::io(format!("cannot make {}", self.dir.display()), e);
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.dir).map_err(cannot)
    }

    /// Removes the folder of a machine that was never defined, with the lock that its maker has, and the sockets and logs
    /// in it; leaves any other.
    pub fn forget(&self, _lock: HomeLock) {
        if !self.exists()
            && let Err(error) = std::fs::remove_dir_all(&self.dir)
        {
            tracing::debug!("{} stays: {error}", self.dir.display());
        }
    }

    /// Takes the lock.
    ///
    /// # Errors
    /// `Busy` when the machine runs, `NotFound` when there is none.
    pub fn lock(&self) -> Result<HomeLock> {
        let begun = clock::now();
        loop {
            if let Some(lock) = self.try_lock()? {
                return Ok(lock);
            }
            if begun.elapsed() >= LOOK_TIME {
                return Err(Error::busy(format!("the virtual machine {} runs", self.name))
                    .hint(format!("'afterimage vm stop {}' ends it", self.name)));
            }
            clock::sleep(LOOK_TIME / 10);
        }
    }

    fn try_lock(&self) -> Result<Option<HomeLock>> {
        let dir = File::open(&self.dir).map_err(|e| match e.kind() {
            io::ErrorKind::NotFound => self.missing(),
            _ => Error::io(format!("cannot open {}", self.dir.display()), e),
        })?;
        match sys::lock::try_exclusive(&dir) {
            Ok(true) => Ok(Some(HomeLock { _dir: dir })),
            Ok(false) => Ok(None),
            Err(error) => Err(Error::io(format!("cannot lock {}", self.dir.display()), error)),
        }
    }

    /// Tells whether somebody has the lock. It is taken for a moment to find out.
    ///
    /// # Errors
    /// As [`Home::lock`], but for the lock itself.
    pub fn is_locked(&self) -> Result<bool> {
        Ok(self.try_lock()?.is_none())
    }

    /// Writes what the machine is made of, durably.
    ///
    /// # Errors
    /// Those of the host.
    pub fn define(&self, definition: &Definition) -> Result<()> {
        let mut text = serde_json::to_vec_pretty(definition)
            .map_err(|e| Error::failed("the definition of a machine cannot be written").because(e))?;
        text.push(b'\n');
        self.write(&text)
    }

    /// As [`Home::define`], and then does what must succeed as well: otherwise what was there before is there again, or
    /// nothing.
    ///
    /// # Errors
    /// Those of the host and of `then`.
    pub fn define_if(&self, definition: &Definition, then: impl FnOnce() -> Result<()>) -> Result<()> {
        let before = match std::fs::read(self.path(DEFINITION)) {
            Ok(text) => Some(text),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(Error::io(format!("cannot read {}", self.path(DEFINITION).display()), error)),
        };
        self.define(definition).and_then(|()| then()).inspect_err(|_| {
            let undone = before.map_or_else(|| self.undefine(), |text| self.write(&text));
            if let Err(error) = undone {
                tracing::warn!("the virtual machine {} stays defined, though it cannot run: {error}", self.name);
            }
        })
    }

    fn undefine(&self) -> Result<()> {
        let cannot = |e| Error::io(format!("cannot remove {}", self.path(DEFINITION).display()), e);
        let media = HostMedia::new(&self.dir).map_err(cannot)?;
        match media.remove(DEFINITION) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(cannot(error)),
            _ => {}
        }
        media.sync_dir("").map_err(cannot)
    }

    fn write(&self, text: &[u8]) -> Result<()> {
        let cannot = |e| Error::io(format!("cannot write {}", self.path(DEFINITION).display()), e);
        let media = HostMedia::new(&self.dir).map_err(cannot)?;
        match media.remove(TEMPORARY) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(cannot(error)),
            _ => {}
        }
        let file = media.open(TEMPORARY, Open::New).map_err(cannot)?;
        file.write_at(text, 0).map_err(cannot)?;
        file.sync().map_err(cannot)?;
        media.rename(TEMPORARY, DEFINITION).map_err(cannot)?;
        media.sync_dir("").map_err(cannot)
    }

    /// Reads what the machine is made of.
    ///
    /// # Errors
    /// `NotFound` when there is none, `Unsupported` for a newer version, `Corrupt` for what makes no sense.
    pub fn definition(&self) -> Result<Definition> {
        let path = self.path(DEFINITION);
        let shown = path.display();
        let cannot = |e: io::Error| match e.kind() {
            io::ErrorKind::NotFound => self.missing(),
            _ => Error::io(format!("cannot read {shown}"), e),
        };
        if std::fs::metadata(&path).map_err(cannot)?.len() > DEFINITION_MAX {
            return Err(Error::corrupt(format!("{shown} is far too long")));
        }
        let text = std::fs::read(&path).map_err(cannot)?;
        let strange = |e: serde_json::Error| Error::corrupt(format!("{shown} does not describe a machine: {e}"));
        let version = serde_json::from_slice::<Versioned>(&text).map_err(strange)?.version;
        if version != VERSION {
            return Err(Error::unsupported(format!(
                "{shown} is of version {version}, and this program knows {VERSION}"
            ))
            .hint("use the version of afterimage that wrote it, or a newer one"));
        }
        let definition: Definition = serde_json::from_slice(&text).map_err(strange)?;
        definition.check().map_err(|e| e.context(&shown))?;
        Ok(definition)
    }

    /// Removes the machine, of which the caller holds the lock. Its disks stay.
    ///
    /// # Errors
    /// Those of the host.
    pub fn remove(&self, _lock: HomeLock) -> Result<()> {
        std::fs::remove_dir_all(&self.dir).map_err(|e| Error::io(format!("cannot remove {}", self.dir.display()), e))
    }

    fn missing(&self) -> Error {
        Error::not_found(format!("there is no virtual machine {}", self.name)).hint("'afterimage vm ls' lists them")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;

    fn definition() -> Definition {
        let boot = Boot { kernel: "/boot/vmlinuz".into(), initrd: None, command_line: "quiet".into() };
        let mut definition = Definition::new(boot, 1 << 29, 2);
        let (file, disk) = (Some("/srv/web.raw".into()), Some("web@monday".to_owned()));
        definition.disks.push(DiskDefinition { file, disk: None, read_only: true, serial: "web".into() });
        definition.disks.push(DiskDefinition { file: None, disk, read_only: false, serial: String::new() });
        definition.nets.push(NetSettings { tap: "tap0".into(), mac: [2, 0, 0, 0, 0, 1] });
        definition
    }

    #[test]
    fn a_definition_comes_back_and_is_listed() {
        let pool = tempfile::tempdir().unwrap();
        assert!(Home::list(pool.path()).unwrap().is_empty());
        let home = Home::of(pool.path(), "web").unwrap();
        assert_eq!(home.definition().unwrap_err().kind(), Kind::NotFound);
        assert_eq!(home.lock().unwrap_err().kind(), Kind::NotFound);
        home.make().unwrap();
        assert!(Home::list(pool.path()).unwrap().is_empty(), "it is not defined yet");
        for _ in 0..2 {
            home.define(&definition()).unwrap();
        }
        let back = home.definition().unwrap();
        assert_eq!(serde_json::to_value(&back).unwrap(), serde_json::to_value(definition()).unwrap());
        assert_eq!(Home::list(pool.path()).unwrap()[0].name(), "web");
    }

    #[test]
    fn a_definition_that_comes_to_nothing_leaves_the_one_before() {
        let pool = tempfile::tempdir().unwrap();
        let home = Home::of(pool.path(), "web").unwrap();
        home.make().unwrap();
        let define = |cpus, ends: Result<()>| home.define_if(&Definition { cpus, ..definition() }, || ends);
        let fails = || Err(Error::failed("it cannot run"));
        assert_eq!(define(3, fails()).unwrap_err().message(), "it cannot run");
        assert!(!home.exists());
        define(4, Ok(())).unwrap();
        define(5, fails()).unwrap_err();
        assert_eq!(home.definition().unwrap().cpus, 4);
    }

    #[test]
    fn a_machine_that_runs_is_neither_started_nor_removed() {
        let pool = tempfile::tempdir().unwrap();
        let home = Home::of(pool.path(), "web").unwrap();
        home.make().unwrap();
        let lock = home.lock().unwrap();
        assert_eq!(home.lock().unwrap_err().kind(), Kind::Busy);
        home.remove(lock).unwrap();
        assert!(!home.exists());
    }

    #[test]
    fn what_is_strange_is_refused() {
        let pool = tempfile::tempdir().unwrap();
        let home = Home::of(pool.path(), "web").unwrap();
        home.make().unwrap();
        home.define(&definition()).unwrap();
        let text = std::fs::read_to_string(home.path(DEFINITION)).unwrap();
        let newer = text.replace("\"version\": 1", "\"version\": 2, \"more\": 1");
        let both = text.replace("\"file\"", "\"disk\": \"web\", \"file\"");
        let neither = text.replace("\"disk\": \"web@monday\",", "");
        assert!(both != text && neither != text, "{text}");
        for (text, kind) in [
            (newer.as_str(), Kind::Unsupported),
            ("{}", Kind::Corrupt),
            ("", Kind::Corrupt),
            (&both, Kind::Corrupt),
            (&neither, Kind::Corrupt),
        ] {
            std::fs::OpenOptions::new().write(true).truncate(true).open(home.path(DEFINITION)).unwrap();
            std::os::unix::fs::FileExt::write_all_at(
                &std::fs::OpenOptions::new().write(true).open(home.path(DEFINITION)).unwrap(),
                text.as_bytes(),
                0,
            )
            .unwrap();
            assert_eq!(home.definition().unwrap_err().kind(), kind, "{text}");
        }
    }

    #[test]
    fn names_stay_in_the_folder() {
        for name in ["", ".", "..", ".web", "-web", "a/b", "a b", "\u{e4}", &"x".repeat(65)] {
            assert_eq!(Home::of(Path::new("/pool"), name).unwrap_err().kind(), Kind::Usage, "{name:?}");
        }
    }
}
