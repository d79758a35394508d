//! The folder of all checkpoints: names, paths, and what is in it.
//!
//! ```text
//!   checkpoints/MACHINE/NAME.ckpt       a checkpoint
//!   checkpoints/MACHINE/NAME.ckpt.new   one that is being saved; whoever saves has it locked
//!   checkpoints/MACHINE/NAME.faults     what the last restore touched first; goes with the checkpoint
//! ```
//!
//! # Rules
//! 1. Names are checked before they become paths, those in a file as well: a checkpoint that names `..` as its parent's machine is damaged.
//! 2. A file that is being saved is locked exclusively, one that is read is locked shared; both by the kernel, so the locks of a
//!    process that died are gone. What is locked is neither removed nor taken for a leftover.
//! 3. A lock is of a file and not of its name, and a file has its name before it can be locked: so who has locked one looks whether
//!    the name is still of that file ([`Folder::take`]), and begins again if it is not.

use std::io::{self, ErrorKind};
use std::sync::Arc;
use std::time::Duration;

use crate::clock;
use crate::disk::{check_disk_name, check_snapshot_name};
use crate::error::{Error, Result};
use crate::media::{File, Media, Open};

/// The folder of the checkpoints in a pool.
pub const CHECKPOINTS_DIR: &str = "checkpoints";
/// How long whoever wants a checkpoint waits for others who only look, or are just done with it.
pub(super) const LOOK_TIME: Duration = Duration::from_millis(50);
/// What a checkpoint is called.
const WHOLE: &str = ".ckpt";
/// What it is called while it is saved.
const UNFINISHED: &str = ".ckpt.new";
/// What is called like a checkpoint and goes with it.
const FAULTS: &str = ".faults";
/// What that is called while it is written.
const FAULTS_NEW: &str = ".faults.new";

/// The name of a checkpoint: its machine and its own.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Name {
    machine: String,
    name: String,
}

impl Name {
    /// Makes one.
    ///
    /// # Errors
    /// `Usage` when either part is no name.
    pub fn new(machine: &str, name: &str) -> Result<Self> {
        check_disk_name(machine).map_err(|e| e.context("the machine of a checkpoint"))?;
        check_snapshot_name(name).map_err(|e| e.context("the name of a checkpoint"))?;
        Ok(Self { machine: machine.to_owned(), name: name.to_owned() })
    }

    /// Parses `MACHINE@NAME`.
    ///
    /// # Errors
    /// `Usage` when it is no such name.
    pub fn parse(text: &str) -> Result<Self> {
        let Some((machine, name)) = text.split_once('@') else {
            return Err(Error::usage(format!("'{text}' is not the name of a checkpoint"))
                .hint("write MACHINE@NAME; 'afterimage checkpoint ls' lists what there is"));
        };
        Self::new(machine, name)
    }

    /// Returns the name of the machine.
    #[must_use]
    pub fn machine(&self) -> &str {
        &self.machine
    }

    /// Returns the name of the checkpoint among those of its machine.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }
}

impl std::fmt::Display for Name {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}@{}", self.machine, self.name)
    }
}

/// How a checkpoint is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Through the page cache of the host, and what is there is believed: every byte is checked when it is used.
    Cached,
    /// Past the page cache, where the host can do that. Buffers are best aligned to pages.
    Direct,
}

/// The folder of all checkpoints of a pool. Clones are the same folder.
#[derive(Debug, Clone)]
pub struct Folder {
    media: Arc<dyn Media>,
    /// Path of the folder, with a slash behind it; empty when it is the root.
    root: String,
    /// The machine whose folder is the root, if it is that and not the folder of all.
    own: Option<String>,
}

impl Folder {
    /// The folder of a pool, which is the root of `media`.
    #[must_use]
    pub fn of_pool(media: &Arc<dyn Media>) -> Self {
        Self { media: Arc::clone(media), root: format!("{CHECKPOINTS_DIR}/"), own: None }
    }

    /// The folder that is itself the root of `media`.
    #[must_use]
    pub fn at(media: &Arc<dyn Media>) -> Self {
        Self { media: Arc::clone(media), root: String::new(), own: None }
    }

    /// The folder of one machine alone, which is itself the root of `media`: for a process that reaches no other.
    #[must_use]
    pub fn of_one(media: &Arc<dyn Media>, machine: &str) -> Self {
        Self { media: Arc::clone(media), root: String::new(), own: Some(machine.to_owned()) }
    }

    /// Returns the host files, for what is kept beside a checkpoint.
    pub(crate) fn media(&self) -> &dyn Media {
        &*self.media
    }

    fn path(&self, name: &Name, end: &str) -> String {
        match self.of_machine(&name.machine).as_str() {
            "" => format!("{}{end}", name.name),
            folder => format!("{folder}/{}{end}", name.name),
        }
    }

    /// Returns the path of a checkpoint below the root of its media.
    pub(super) fn whole(&self, name: &Name) -> String {
        self.path(name, WHOLE)
    }

    /// Returns the path of a checkpoint that is being saved.
    pub(super) fn unfinished(&self, name: &Name) -> String {
        self.path(name, UNFINISHED)
    }

    /// Returns the path of what the last restore of a checkpoint touched first.
    #[must_use]
    pub fn faults(&self, name: &Name) -> String {
        self.path(name, FAULTS)
    }

    /// Returns the path of that while it is written.
    #[must_use]
    pub fn new_faults(&self, name: &Name) -> String {
        self.path(name, FAULTS_NEW)
    }

    /// Returns the path of the folder of a machine; empty when it is the root.
    pub(super) fn of_machine(&self, machine: &str) -> String {
        if self.own.as_deref() == Some(machine) {
            return String::new();
        }
        format!("{}{machine}", self.root)
    }

    /// Makes the folder of a machine, durably.
    pub(super) fn make(&self, machine: &str) -> Result<()> {
        let root = self.root.trim_end_matches('/');
        let mut above = "";
        for dir in [root, &self.of_machine(machine)].into_iter().filter(|dir| !dir.is_empty()) {
            match self.media.make_dir(dir) {
                Err(e) if e.kind() != ErrorKind::AlreadyExists => {
                    return Err(Error::io(format!("cannot make {dir}"), e));
                }
                _ => {}
            }
            self.media.sync_dir(above).map_err(|e| Error::io(format!("cannot make {dir}"), e))?;
            above = root;
        }
        Ok(())
    }

    /// Opens the file of a checkpoint, and keeps it from being removed while it is open.
    ///
    /// # Errors
    /// `NotFound`, `Busy` when it is being removed, any error of the host.
    pub fn open(&self, name: &Name, access: Access) -> Result<Arc<dyn File>> {
        let path = self.whole(name);
        let open = || match access {
            Access::Cached => self.media.open(&path, Open::ReadCached),
            Access::Direct => self.media.open_direct(&path, Open::ReadCached),
        };
        let begun = clock::now();
        loop {
            let taken = self.take(&path, open, |file| file.try_lock_shared()).map_err(|e| match e.kind() {
                ErrorKind::NotFound => self.missing(name),
                _ => Error::io(format!("cannot open the checkpoint {name}"), e),
            })?;
            match taken {
                Some(file) => return Ok(file),
                // It may be refused to whoever removes it, and who has just saved it may have a process that just begins.
                None if begun.elapsed() < LOOK_TIME => clock::sleep(LOOK_TIME / 10),
                None => return Err(Error::busy(format!("the checkpoint {name} is being removed"))),
            }
        }
    }

    /// Opens a file and locks it; `None` when somebody has it. The path is that of the file that is locked.
    ///
    /// # Errors
    /// `NotFound` when there is none; errors of the host.
    pub(super) fn take(
        &self,
        path: &str,
        open: impl Fn() -> io::Result<Arc<dyn File>>,
        lock: impl Fn(&dyn File) -> io::Result<bool>,
    ) -> io::Result<Option<Arc<dyn File>>> {
        loop {
            let file = open()?;
            if !lock(&*file)? {
                return Ok(None);
            }
            // Otherwise it was removed or renamed before it was locked.
            if self.is_at(path, &*file)? {
                return Ok(Some(file));
            }
        }
    }

    /// Opens the file of a path and locks it for this process alone; as [`Self::take`].
    pub(super) fn take_alone(&self, path: &str) -> io::Result<Option<Arc<dyn File>>> {
        self.take(path, || self.media.open(path, Open::Existing), |file| file.try_lock())
    }

    /// Tells whether a path is that of a file.
    pub(super) fn is_at(&self, path: &str, file: &dyn File) -> io::Result<bool> {
        match self.media.open(path, Open::ReadCached) {
            Ok(there) => Ok(there.identity()? == file.identity()?),
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(false),
            Err(e) => Err(e),
        }
    }

    /// Makes the error that there is no such checkpoint.
    #[expect(clippy::unused_self, reason = "it is of this folder")]
    pub(super) fn missing(&self, name: &Name) -> Error {
        Error::not_found(format!("there is no checkpoint {name}"))
            .hint("'afterimage checkpoint ls' lists what there is")
    }

    /// Returns the names of all checkpoints, in order.
    ///
    /// # Errors
    /// Those of the host.
    pub fn names(&self) -> Result<Vec<Name>> {
        let mut names = Vec::new();
        self.each(|machine, file| {
            // A file that is called otherwise is none of ours.
            if let Some(name) = file.strip_suffix(WHOLE)
                && let Ok(name) = Name::new(machine, name)
            {
                names.push(name);
            }
            Ok(())
        })?;
        names.sort();
        Ok(names)
    }

    /// Calls `each` with the machine and name of every file.
    fn each(&self, mut each: impl FnMut(&str, &str) -> Result<()>) -> Result<()> {
        let root = self.root.trim_end_matches('/');
        let machines = match &self.own {
            Some(machine) => vec![machine.clone()],
            None => self.list(root)?,
        };
        for machine in machines {
            for file in self.list(&self.of_machine(&machine))? {
                each(&machine, &file)?;
            }
        }
        Ok(())
    }

    /// Lists a folder; one that is not there, or is a file, has nothing.
    fn list(&self, path: &str) -> Result<Vec<String>> {
        match self.media.list(path) {
            Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => Ok(Vec::new()),
            other => other.map_err(|e| Error::io(format!("cannot list {path}"), e)),
        }
    }

    /// Removes what saves and removals that did not end have left. What is still being saved stays.
    ///
    /// # Errors
    /// Those of the host.
    pub fn sweep(&self) -> Result<()> {
        let mut left = Vec::new();
        self.each(|machine, file| {
            let stem =
                [UNFINISHED, FAULTS, FAULTS_NEW].into_iter().find_map(|end| Some((file.strip_suffix(end)?, end)));
            if let Some((stem, end)) = stem
                && let Ok(name) = Name::new(machine, stem)
            {
                left.push((name, end));
            }
            Ok(())
        })?;
        for (name, end) in left {
            let gone = match end {
                UNFINISHED => self.remove_leftover(&name)?,
                _ => !self.exists(&name)? && self.remove_file(&self.path(&name, end))?,
            };
            if gone {
                tracing::info!("what an interrupted command had left of the checkpoint {name} is removed");
            }
        }
        Ok(())
    }

    /// Tells whether there is such a checkpoint.
    ///
    /// # Errors
    /// Those of the host.
    pub fn exists(&self, name: &Name) -> Result<bool> {
        match self.media.open(&self.whole(name), Open::ReadCached) {
            Ok(_) => Ok(true),
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(false),
            Err(e) => Err(Error::io(format!("cannot look for the checkpoint {name}"), e)),
        }
    }

    /// Tells whether somebody saves a checkpoint of this name now.
    ///
    /// # Errors
    /// Those of the host.
    pub fn is_being_saved(&self, name: &Name) -> Result<bool> {
        let fail = |e| Error::io(format!("cannot look for the checkpoint {name}"), e);
        match self.take_alone(&self.unfinished(name)) {
            Ok(taken) => Ok(taken.is_none()),
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(false),
            Err(e) => Err(fail(e)),
        }
    }

    /// Removes what is kept beside a checkpoint.
    pub(super) fn remove_beside(&self, name: &Name) -> Result<()> {
        for end in [FAULTS, FAULTS_NEW] {
            self.remove_file(&self.path(name, end))?;
        }
        Ok(())
    }

    /// Returns the names of checkpoints that are being saved, or were.
    pub(super) fn unfinished_names(&self) -> Result<Vec<Name>> {
        let mut names = Vec::new();
        self.each(|machine, file| {
            let name = file.strip_suffix(UNFINISHED).and_then(|name| Name::new(machine, name).ok());
            names.extend(name);
            Ok(())
        })?;
        Ok(names)
    }

    /// Removes an unfinished checkpoint that nobody saves any more; false when there is none, or somebody does.
    pub(super) fn remove_leftover(&self, name: &Name) -> Result<bool> {
        self.remove_leftover_after(name, || Ok(()))
    }

    /// As [`Self::remove_leftover`]; `first` is called before, while nobody can begin to save one of that name.
    pub(super) fn remove_leftover_after(&self, name: &Name, first: impl FnOnce() -> Result<()>) -> Result<bool> {
        let path = self.unfinished(name);
        let fail = |e| Error::io(format!("cannot remove {path}"), e);
        let taken = match self.take_alone(&path) {
            Ok(taken) => taken,
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(false),
            Err(e) => return Err(fail(e)),
        };
        // Kept until the name is gone: nobody else may take it for theirs.
        let Some(_file) = taken else { return Ok(false) };
        first()?;
        self.remove_file(&path)
    }

    /// Removes a file; false when it is gone already.
    pub(super) fn remove_file(&self, path: &str) -> Result<bool> {
        match self.media.remove(path) {
            Ok(()) => Ok(true),
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(false),
            Err(e) => Err(Error::io(format!("cannot remove {path}"), e)),
        }
    }
}
