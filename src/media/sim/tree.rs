//! Simulated directories: the names a program sees, the names the disk holds, and the changes in between.
//!
//! # Rules
//! 1. A name is durable only after its directory was synced. Syncing the file itself does not help: ext4 happens to be
//!    kinder, POSIX is not.
//! 2. A crash keeps a prefix of the changes of each directory, as a journal would; different directories keep prefixes
//!    of their own. A rename is one change, so it survives whole or not at all, also between two directories.
//! 3. Ids are never used twice, so a durable name cannot point at a file that came later.

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use super::rng::Rng;
use crate::media::checked;

/// The id of the root directory.
const ROOT: u64 = 0;

/// What a name stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Node {
    File(u64),
    Dir(u64),
}

type Names = BTreeMap<String, Node>;

#[derive(Debug, Clone, Default)]
struct Dir {
    volatile: Names,
    durable: Names,
}

/// A change of names that is not durable yet.
#[derive(Debug, Clone)]
enum Change {
    Add { dir: u64, name: String, node: Node },
    Remove { dir: u64, name: String },
    Rename { from: (u64, String), to: (u64, String) },
}

impl Change {
    /// Returns the directories it touches; both are the same unless it moves a name.
    fn dirs(&self) -> [u64; 2] {
        match self {
            Self::Add { dir, .. } | Self::Remove { dir, .. } => [*dir; 2],
            Self::Rename { from, to } => [from.0, to.0],
        }
    }
}

/// All directories of a medium.
#[derive(Debug, Clone)]
pub(super) struct Tree {
    dirs: BTreeMap<u64, Dir>,
    /// In the order in which they were made, over all directories.
    journal: Vec<Change>,
    next_id: u64,
}

fn errno(code: i32) -> io::Error {
    io::Error::from_raw_os_error(code)
}

impl Tree {
    pub(super) fn new() -> Self {
        Self { dirs: BTreeMap::from([(ROOT, Dir::default())]), journal: Vec::new(), next_id: ROOT + 1 }
    }

    /// Finds the file behind a path.
    pub(super) fn file(&self, path: &str) -> io::Result<u64> {
        match self.find(path)? {
            Node::File(inode) => Ok(inode),
            Node::Dir(_) => Err(errno(libc::EISDIR)),
        }
    }

    /// Adds a new, empty file and returns its id.
    pub(super) fn add_file(&mut self, path: &str) -> io::Result<u64> {
        let id = self.next_id;
        self.add(path, Node::File(id))?;
        Ok(id)
    }

    /// Adds a new, empty directory.
    pub(super) fn add_dir(&mut self, path: &str) -> io::Result<()> {
        let id = self.next_id;
        self.add(path, Node::Dir(id))?;
        self.dirs.insert(id, Dir::default());
        Ok(())
    }

    /// Removes a name and returns the file that had it.
    pub(super) fn remove(&mut self, path: &str) -> io::Result<u64> {
        let inode = self.file(path)?;
        let (dir, name) = self.parent(path)?;
        self.names(dir).remove(name);
        self.journal.push(Change::Remove { dir, name: name.to_owned() });
        Ok(inode)
    }

    /// Renames a file and returns the one that had the name before.
    pub(super) fn rename(&mut self, from: &str, to: &str) -> io::Result<Option<u64>> {
        let inode = self.file(from)?;
        let (from, to) = (self.parent(from)?, self.parent(to)?);
        let replaced = match self.dirs[&to.0].volatile.get(to.1) {
            Some(Node::Dir(_)) => return Err(errno(libc::EISDIR)),
            Some(&Node::File(same)) if same == inode => return Ok(None),
            Some(&Node::File(other)) => Some(other),
            None => None,
        };
        self.names(from.0).remove(from.1);
        self.names(to.0).insert(to.1.to_owned(), Node::File(inode));
        self.journal.push(Change::Rename { from: (from.0, from.1.to_owned()), to: (to.0, to.1.to_owned()) });
        Ok(replaced)
    }

    pub(super) fn list(&self, path: &str) -> io::Result<Vec<String>> {
        Ok(self.dirs[&self.dir(path)?].volatile.keys().cloned().collect())
    }

    /// Makes the names of a directory durable; returns the files that thereby lost their last durable name.
    pub(super) fn sync(&mut self, path: &str) -> io::Result<Vec<u64>> {
        // Walking back finds what the wanted changes stand on: a name must be in one directory before it can move on.
        let mut wanted = BTreeSet::from([self.dir(path)?]);
        let (mut now, mut later) = (Vec::new(), Vec::new());
        for change in std::mem::take(&mut self.journal).into_iter().rev() {
            if change.dirs().iter().any(|dir| wanted.contains(dir)) {
                wanted.extend(change.dirs());
                now.push(change);
            } else {
                later.push(change);
            }
        }
        later.reverse();
        self.journal = later;
        Ok(now.into_iter().rev().filter_map(|change| self.settle(change)).collect())
    }

    /// Loses power: some of the changes become durable, then nothing else exists. Returns the files that still have a
    /// name.
    pub(super) fn crash(&mut self, rng: &mut Rng) -> BTreeSet<u64> {
        let journal = std::mem::take(&mut self.journal);
        let mut keep = BTreeMap::new();
        for dir in journal.iter().flat_map(Change::dirs) {
            *keep.entry(dir).or_insert(0) += 1;
        }
        for left in keep.values_mut() {
            *left = match rng.below(3) {
                0 => 0,
                1 => *left,
                _ => rng.up_to(*left),
            };
        }
        for change in journal {
            let dirs = change.dirs();
            let stopped = dirs.iter().any(|dir| keep[dir] == 0);
            for dir in dirs {
                let left = keep.get_mut(&dir).expect("counted above");
                *left = if stopped { 0 } else { left.saturating_sub(1) };
            }
            if !stopped {
                self.settle(change);
            }
        }
        self.forget_unreachable()
    }

    /// Returns the path and id of every file, sorted by path.
    pub(super) fn files(&self) -> Vec<(String, u64)> {
        let mut found = Vec::new();
        let mut todo = vec![(String::new(), ROOT)];
        while let Some((prefix, dir)) = todo.pop() {
            for (name, node) in &self.dirs[&dir].volatile {
                match node {
                    Node::File(inode) => found.push((format!("{prefix}{name}"), *inode)),
                    Node::Dir(id) => todo.push((format!("{prefix}{name}/"), *id)),
                }
            }
        }
        found.sort_unstable();
        found
    }

    /// Finds a directory; the root is "".
    pub(super) fn dir(&self, path: &str) -> io::Result<u64> {
        if path.is_empty() {
            return Ok(ROOT);
        }
        match self.find(path)? {
            Node::Dir(id) => Ok(id),
            Node::File(_) => Err(errno(libc::ENOTDIR)),
        }
    }

    fn find(&self, path: &str) -> io::Result<Node> {
        let mut node = Node::Dir(ROOT);
        for name in checked(path)?.split('/') {
            let Node::Dir(dir) = node else { return Err(errno(libc::ENOTDIR)) };
            node = *self.dirs[&dir].volatile.get(name).ok_or_else(|| errno(libc::ENOENT))?;
        }
        Ok(node)
    }

    /// Splits a path into its directory, which must exist, and its last name, which need not.
    fn parent<'a>(&self, path: &'a str) -> io::Result<(u64, &'a str)> {
        let (dir, name) = checked(path)?.rsplit_once('/').unwrap_or(("", path));
        Ok((self.dir(dir)?, name))
    }

    fn names(&mut self, dir: u64) -> &mut Names {
        &mut self.dirs.get_mut(&dir).expect("directories are dropped by a crash only").volatile
    }

    fn durable(&mut self, dir: u64) -> &mut Names {
        &mut self.dirs.get_mut(&dir).expect("directories are dropped by a crash only").durable
    }

    fn add(&mut self, path: &str, node: Node) -> io::Result<()> {
        let (dir, name) = self.parent(path)?;
        if self.names(dir).contains_key(name) {
            return Err(errno(libc::EEXIST));
        }
        self.names(dir).insert(name.to_owned(), node);
        self.journal.push(Change::Add { dir, name: name.to_owned(), node });
        self.next_id += 1;
        Ok(())
    }

    /// Makes one change durable; returns the file that lost its durable name by it.
    fn settle(&mut self, change: Change) -> Option<u64> {
        let gone = match change {
            Change::Add { dir, name, node } => self.durable(dir).insert(name, node),
            Change::Remove { dir, name } => self.durable(dir).remove(&name),
            Change::Rename { from, to } => {
                let node = self.durable(from.0).remove(&from.1).expect("changes of a directory settle in order");
                self.durable(to.0).insert(to.1, node)
            }
        };
        match gone {
            Some(Node::File(inode)) => Some(inode),
            Some(Node::Dir(_)) | None => None,
        }
    }

    /// Makes the durable names the only ones and drops what cannot be reached from the root.
    fn forget_unreachable(&mut self) -> BTreeSet<u64> {
        let mut files = BTreeSet::new();
        let mut old = std::mem::take(&mut self.dirs);
        let mut todo = vec![ROOT];
        while let Some(id) = todo.pop() {
            let durable = old.remove(&id).expect("each directory has one durable name").durable;
            for node in durable.values() {
                match node {
                    Node::File(inode) => files.extend([*inode]),
                    Node::Dir(dir) => todo.push(*dir),
                }
            }
            self.dirs.insert(id, Dir { volatile: durable.clone(), durable });
        }
        files
    }
}
