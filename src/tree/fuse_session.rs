//! Mounting, serving, and unmounting: the life of one FUSE session.
//!
//! # Rules
//! 1. The session ends when the file system is unmounted, by us or by anyone; [`Mounted::wait`] returns then.
//! 2. An unmount that finds open files detaches the tree, so nobody can open more, and gives those who have files open
//!    [`GRACE`]; after that [`Mounted::wait`] returns although they still have, and they get errors once the process
//!    ends. A server told to stop does stop.
//! 3. Threads of the session are marked as I/O flushers: memory reclaim must not wait for the file system that is
//!    trying to get memory.
//!
//! # What a crash leaves
//! The mount stays and answers ENOTCONN. [`mount`] takes such a leftover away if it is ours and of the same pool.

use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use fuser::{Config, MountOption, Notifier, Session, SessionACL, SessionUnmounter};

use super::MountOptions;
use super::fuse::{Mount, tell};
use super::fuse_split::Parts;
use super::stale::{self, Queue};
use super::state::{Owner, Tree};
use super::waits::Waits;
use crate::clock;
use crate::error::{Error, Result};
use crate::snapshot;
use crate::store::Store;
use crate::sync::{Condvar, Mutex};
use crate::units::SnapshotId;
use crate::workers::Workers;

/// Threads for requests that may wait ([`super::fuse_split`]): as many of fuser's, and as many workers if needed. Without
/// io_uring fuser's serve all requests, and this is the queue depth the pool's file sees.
const THREADS: usize = 16;
/// How long a stop waits for files that are still open.
const GRACE: Duration = Duration::from_secs(3);
/// Kilobytes the kernel reads ahead on the mount; at mounting it offers no more than 128.
const READ_AHEAD_KB: &str = "1024";

static NEXT_MOUNT: AtomicU64 = AtomicU64::new(1);

#[derive(Debug, Default)]
struct Progress {
    /// Set when a stop was asked for.
    stopping: Option<clock::Instant>,
    /// Set when the session has ended, with the reason if it failed.
    ended: Option<Option<String>>,
}

/// What the session's thread, the one that waits and those that unmount share.
#[derive(Debug)]
struct Shared {
    progress: Mutex<Progress>,
    changed: Condvar,
    mountpoint: PathBuf,
    unmounter: Mutex<SessionUnmounter>,
}

/// A mounted tree; dropping it unmounts.
#[derive(Debug)]
pub struct Mounted {
    shared: Arc<Shared>,
}

impl Mounted {
    /// Returns when the file system was unmounted, by whomever.
    ///
    /// # Errors
    /// `Kind::Failed` when the session broke instead.
    pub fn wait(self) -> Result<()> {
        self.shared.wait()
    }

    /// Returns a function that unmounts, for any thread but a handler's, any number of times.
    #[must_use]
    pub fn unmounter(&self) -> Box<dyn Fn() + Send + Sync> {
        let shared = Arc::clone(&self.shared);
        Box::new(move || shared.unmount())
    }

    /// Tells whether it is unmounted already.
    #[must_use]
    pub fn ended(&self) -> bool {
        self.shared.progress.lock().ended.is_some()
    }

    /// Returns where it is mounted, absolute.
    #[must_use]
    pub fn mountpoint(&self) -> &Path {
        &self.shared.mountpoint
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let stopped = {
            let progress = self.shared.progress.lock();
            progress.ended.is_some() || progress.stopping.is_some()
        };
        if stopped {
            return;
        }
        self.shared.unmount();
        if let Err(error) = self.shared.wait() {
            tracing::warn!("{error}");
        }
    }
}

impl Shared {
    fn wait(&self) -> Result<()> {
        let mut progress = self.progress.lock();
        loop {
            match (&progress.ended, progress.stopping) {
                (Some(None), _) => return Ok(()),
                (Some(Some(why)), _) => return Err(Error::failed(format!("the mount ended: {why}"))),
                (None, None) => self.changed.wait(&mut progress),
                (None, Some(since)) => {
                    let timed_out = self.changed.wait_until(&mut progress, since + GRACE).timed_out();
                    if timed_out && progress.ended.is_none() {
                        let at = self.mountpoint.display();
                        tracing::warn!("files below {at} are still open; they fail from now on");
                        return Ok(());
                    }
                }
            }
        }
    }

    fn unmount(&self) {
        {
            let mut progress = self.progress.lock();
            if progress.ended.is_some() {
                return;
            }
            progress.stopping.get_or_insert_with(clock::now);
        }
        if let Err(error) = self.unmounter.lock().unmount() {
            tracing::info!("{} is in use ({error}); detaching it", self.mountpoint.display());
            write_mapped(&self.mountpoint);
            detach(&self.mountpoint);
        }
        // From here on the clock of `wait` runs, however long the unmount took.
        self.progress.lock().stopping = Some(clock::now());
        self.changed.notify_all();
    }

    fn end(&self, why: Option<String>) {
        self.progress.lock().ended = Some(why);
        self.changed.notify_all();
    }
}

/// Asks the kernel to write what programs changed through shared mappings, as an ordinary unmount does; not for long.
fn write_mapped(mountpoint: &Path) {
    let Ok(root) = fs::File::open(mountpoint) else { return };
    let (done, wait) = std::sync::mpsc::channel();
    let started = thread::Builder::new().name("mount-sync".into()).spawn(move || {
        if let Err(error) = rustix::fs::syncfs(&root) {
            tracing::warn!("cannot write what is mapped: {error}");
        }
        done.send(()).ok();
    });
    if started.is_ok() {
        wait.recv_timeout(GRACE).ok();
    }
}

/// Takes a mount out of the tree of names although files in it are open.
fn detach(mountpoint: &Path) {
    let root = rustix::process::geteuid().is_root();
    let commands: &[(&str, &[&str])] = &[("fusermount3", &["-u", "-q", "-z", "--"]), ("umount", &["-l", "--"])];
    for (program, arguments) in commands.iter().skip(usize::from(root)) {
        let mut command = Command::new(program);
        command.args(*arguments).arg(mountpoint).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        match command.status() {
            Ok(status) if status.success() => return,
            Ok(status) => tracing::warn!("{program} {}: {status}", mountpoint.display()),
            Err(error) => tracing::warn!("cannot run {program}: {error}"),
        }
    }
}

/// Finds what is mounted at a path, without touching it: (type, source).
fn mounted_at(mountpoint: &Path) -> Option<(String, String)> {
    let table = fs::read("/proc/self/mountinfo").ok()?;
    let mut found = None;
    for line in table.split(|byte| *byte == b'\n') {
        let mut fields = line.split(|byte| *byte == b' ');
        if fields.nth(4).is_none_or(|at| unescape(at) != mountpoint.as_os_str().as_bytes()) {
            continue;
        }
        let mut rest = fields.skip_while(|field| *field != b"-").skip(1);
        let (kind, source) = (unescape(rest.next()?), unescape(rest.next()?));
        found = Some((String::from_utf8_lossy(&kind).into_owned(), String::from_utf8_lossy(&source).into_owned()));
    }
    found
}

/// Undoes the octal escapes of the mount table.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let [first, tail @ ..] = rest {
        let octal = tail.get(..3).and_then(|digits| std::str::from_utf8(digits).ok());
        match octal.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) if *first == b'\\' => {
                out.push(byte);
                rest = &tail[3..];
            }
            _ => {
                out.push(*first);
                rest = tail;
            }
        }
    }
    out
}

/// Makes sure that there is a directory to mount over, taking away what a killed server of the same pool left.
fn prepare(mountpoint: &Path, fs_name: &str) -> Result<PathBuf> {
    let shown = mountpoint.display();
    let absolute =
        std::path::absolute(mountpoint).map_err(|error| Error::io(format!("cannot mount at {shown}"), error))?;
    // Listed, not asked for its attributes: those the kernel still has.
    if let Err(error) = fs::read_dir(&absolute)
        && error.raw_os_error() == Some(libc::ENOTCONN)
    {
        match real_name(&absolute).as_deref().and_then(mounted_at) {
            Some((kind, source)) if kind.starts_with("fuse") && source == fs_name => {
                tracing::info!("taking away the mount a killed server left at {shown}");
                detach(&absolute);
            }
            _ => {
                return Err(Error::busy(format!("cannot mount at {shown}: a dead mount of something else is there"))
                    .hint(format!("run: umount {shown}")));
            }
        }
    }
    let at = fs::canonicalize(&absolute)
        .map_err(|error| Error::io(format!("cannot mount at {shown}"), error).hint(format!("run: mkdir -p {shown}")))?;
    if !at.is_dir() {
        return Err(Error::usage(format!("cannot mount at {shown}: it is no directory")));
    }
    if let Some((_, source)) = mounted_at(&at)
        && source == fs_name
    {
        return Err(Error::busy(format!("{shown} is mounted already, from this pool")));
    }
    Ok(at)
}

/// Returns a path as the mount table has it, without touching what is mounted there.
fn real_name(absolute: &Path) -> Option<PathBuf> {
    Some(fs::canonicalize(absolute.parent()?).ok()?.join(absolute.file_name()?))
}

/// A name that survives the option list of fusermount3, where a comma ends it.
fn source_name(name: &str) -> String {
    name.chars().map(|c| if matches!(c, ',' | '\\') || c.is_control() { '_' } else { c }).collect()
}

fn threads(options: &MountOptions) -> usize {
    options.threads.unwrap_or(THREADS).max(1)
}

fn acl(options: &MountOptions) -> SessionACL {
    if options.allow_other { SessionACL::All } else { SessionACL::Owner }
}

fn configuration(options: &MountOptions, source: String) -> Config {
    let mut config = Config::default();
    config.mount_options = vec![
        MountOption::FSName(source),
        // As an option of the kernel, so that it also holds for a mount made without fusermount3.
        MountOption::CUSTOM("subtype=afterimage".into()),
        MountOption::DefaultPermissions,
        MountOption::NoDev,
        MountOption::NoSuid,
        MountOption::NoExec,
        MountOption::NoAtime,
    ];
    config.acl = acl(options);
    config.n_threads = Some(threads(options));
    config.clone_fd = false;
    config
}

fn mount_error(mountpoint: &Path, error: io::Error) -> Error {
    let what = format!("cannot mount at {}", mountpoint.display());
    if !Path::new("/dev/fuse").exists() {
        return Error::unsupported(format!("{what}: this host has no /dev/fuse")).hint("run: modprobe fuse");
    }
    let hint = match error.raw_os_error() {
        Some(libc::EACCES) if fs::File::open("/dev/fuse").is_err() => "run as root: chmod 666 /dev/fuse",
        None if error.to_string().contains("user_allow_other") => "root must put user_allow_other into /etc/fuse.conf",
        _ => "install fuse3 (for fusermount3), or mount as root",
    };
    Error::io(what, error).hint(hint)
}

/// Mounts the tree of a pool and serves it until it is unmounted.
///
/// # Errors
/// `Kind::NotFound` for a missing directory, `Kind::Unsupported` without FUSE, `Kind::Denied` when the host refuses,
/// `Kind::Busy` when it is mounted there already.
pub fn mount(store: &Arc<Store>, mountpoint: &Path, options: &MountOptions) -> Result<Mounted> {
    serve(store, Tree::new(Arc::clone(store), owner(options)), mountpoint, options)
}

/// Mounts the extent files of one live snapshot and serves them until they are unmounted. They stay for as long, also
/// when the snapshot is removed or retired.
///
/// # Errors
/// As [`mount`]; `Kind::NotFound` when there is no such snapshot, `Kind::Failed` when it is retired.
pub fn mount_extents(
    store: &Arc<Store>,
    snapshot: SnapshotId,
    mountpoint: &Path,
    options: &MountOptions,
) -> Result<Mounted> {
    drop(snapshot::open_by_id(store, snapshot)?);
    serve(store, Tree::of_extents(Arc::clone(store), owner(options), snapshot)?, mountpoint, options)
}

fn owner(options: &MountOptions) -> Owner {
    Owner { uid: options.uid, gid: options.gid }
}

fn serve(store: &Arc<Store>, tree: Tree, mountpoint: &Path, options: &MountOptions) -> Result<Mounted> {
    let source = source_name(&options.fs_name);
    let mountpoint = prepare(mountpoint, &source)?;
    let tree = Arc::new(tree);
    let queue = Arc::new(Queue::default());
    let number = NEXT_MOUNT.fetch_add(1, Ordering::Relaxed);
    let cannot = |error| Error::io("cannot start a thread", error);
    let workers = Workers::new("mount-work", threads(options), stale::enter_handler, number).map_err(cannot)?;
    let waits = Waits::new(Arc::clone(&tree), workers);
    let mount = Mount { tree: Arc::clone(&tree), waits: Arc::clone(&waits), number, queue: Arc::clone(&queue) };
    let mut session = Session::new(mount, &mountpoint, &configuration(options, source))
        .map_err(|error| mount_error(&mountpoint, error))?;
    let notifier = session.notifier();
    let unmounter = Mutex::new(session.unmount_callable());
    let shared = Arc::new(Shared { progress: Mutex::default(), changed: Condvar::new(), mountpoint, unmounter });
    let announce = {
        let queue = Arc::clone(&queue);
        thread::Builder::new().name("mount-notify".into()).spawn(move || announce(&queue, &notifier)).map_err(cannot)?
    };
    drop(announce); // It ends with the queue, which the session closes.
    let looker = Arc::downgrade(&tree);
    store.subscribe(stale::hook(number, &queue, move |change, ours| {
        looker.upgrade().map(|tree| tree.changed(change, ours)).unwrap_or_default()
    }));
    let at_end = (Arc::clone(&shared), Arc::clone(&queue));
    let parts = Parts {
        tree: Arc::clone(&tree),
        waits: Arc::clone(&waits),
        number,
        queue,
        threads: threads(options),
        acl: acl(options),
        ring: options.ring,
    };
    let serve = move || {
        if let Err(error) = crate::sys::process::set_io_flusher() {
            tracing::debug!("cannot mark the threads as I/O flushers: {error}");
        }
        // A panic must end the mount for everybody, not leave them waiting.
        let served = catch_unwind(AssertUnwindSafe(|| super::fuse_split::serve(session, parts)));
        let result = served.unwrap_or_else(|_| Err(std::io::Error::other("serving the mount panicked")));
        at_end.1.close();
        waits.end();
        tree.release_all();
        drop(tree);
        at_end.0.end(result.err().map(|error| error.to_string()));
    };
    drop(thread::Builder::new().name("mount".into()).spawn(serve).map_err(cannot)?);
    read_further_ahead(&shared.mountpoint);
    Ok(Mounted { shared })
}

/// Tells the kernel of what became stale until the mount is gone.
fn announce(queue: &Queue, notifier: &Notifier) {
    while let Some(items) = queue.take() {
        for item in &items {
            // A panic is a line in the log: without this thread every command would wait in vain.
            let told = catch_unwind(AssertUnwindSafe(|| tell(notifier, item)));
            if let Ok(Err(error)) = told {
                tracing::debug!("cannot tell the kernel to forget {item:?}: {error}");
            }
            queue.told(1);
        }
    }
}

/// Lets the kernel read further ahead than it offers when mounting. Only root may; without it reads are a little slower.
fn read_further_ahead(mountpoint: &Path) {
    let set = || -> io::Result<()> {
        let device = std::os::unix::fs::MetadataExt::dev(&fs::metadata(mountpoint)?);
        let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
        let knob = format!("/sys/class/bdi/{major}:{minor}/read_ahead_kb");
        let mut file = fs::OpenOptions::new().write(true).open(knob)?;
        io::Write::write_all(&mut file, READ_AHEAD_KB.as_bytes())
    };
    if let Err(error) = set() {
        tracing::debug!("cannot raise the read-ahead: {error}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mount_table_is_read_with_its_escapes() {
        assert_eq!(unescape(b"/a\\040b\\134c"), b"/a b\\c");
        assert_eq!(unescape(b"\\04"), b"\\04");
        assert!(mounted_at(Path::new("/")).is_some());
        assert_eq!(mounted_at(Path::new("/nothing is here")), None);
    }

    #[test]
    fn a_comma_in_a_path_does_not_end_the_name() {
        assert_eq!(source_name("afterimage:/a,b\\c"), "afterimage:/a_b_c");
    }
}
