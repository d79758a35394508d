//! What the host says about itself: mounts and file systems.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::fs::Access;

use crate::error::{Error, Kind, Result};

/// What stands before the path of the pool in the name of a mounted file system (see [`crate::tree::MountOptions`]).
const NAME_PREFIX: &[u8] = b"afterimage:";

/// Returns the pool that is mounted at `mount`, by the list of the kernel; `None` if there is none.
pub(super) fn pool_at(mount: &Path) -> Result<Option<PathBuf>> {
    let table = fs::read("/proc/self/mounts").map_err(|e| Error::io("cannot read /proc/self/mounts", e))?;
    Ok(find_pool(&table, mount))
}

/// Finds the uppermost mount at a path: later lines lie on top.
fn find_pool(table: &[u8], mount: &Path) -> Option<PathBuf> {
    let lines = table.split(|byte| *byte == b'\n').rev();
    let mut here = lines.filter_map(|line| {
        let mut fields = line.split(|byte| *byte == b' ');
        let (name, at) = (unescape(fields.next()?), unescape(fields.next()?));
        (at == mount.as_os_str().as_bytes()).then_some(name)
    });
    let name = here.next()?;
    Some(PathBuf::from(OsString::from_vec(name.strip_prefix(NAME_PREFIX)?.to_vec())))
}

/// Undoes the octal escapes of /proc/mounts (blank, tab, newline, backslash, hash).
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, after)) = rest.split_first() {
        let digits = after.get(..3).filter(|d| first == b'\\' && d.iter().all(|b| (b'0'..=b'7').contains(b)));
        let value = digits.and_then(|d| d.iter().try_fold(0_u8, |sum, b| sum.checked_mul(8)?.checked_add(b - b'0')));
        match value {
            Some(value) => {
                bytes.push(value);
                rest = &after[3..];
            }
            None => {
                bytes.push(first);
                rest = after;
            }
        }
    }
    bytes
}

/// Returns an absolute path without links, without touching what is mounted there: its server may be dead.
pub(super) fn resolve_mount(mount: &Path) -> Result<PathBuf> {
    let cannot = |e| Error::io(format!("cannot look at {}", mount.display()), e);
    let whole = std::path::absolute(mount).map_err(cannot)?;
    match (whole.parent(), whole.file_name()) {
        // A link has to be followed, and reading one is harmless even on a dead mount.
        (Some(parent), Some(name)) => match fs::read_link(&whole) {
            Ok(_) => whole.canonicalize().map_err(cannot),
            Err(_) => Ok(parent.canonicalize().map_err(cannot)?.join(name)),
        },
        _ => whole.canonicalize().map_err(cannot),
    }
}

/// Returns a path that need not be there yet, absolute and without links as far as it is.
pub(super) fn resolve_new(path: &Path) -> Result<PathBuf> {
    let cannot = |e| Error::io(format!("cannot look at {}", path.display()), e);
    let whole = std::path::absolute(path).map_err(cannot)?;
    let there = whole.ancestors().find_map(|dir| Some((dir, dir.canonicalize().ok()?)));
    let Some((dir, real)) = there else { return Ok(whole) };
    Ok(real.join(whole.strip_prefix(dir).expect("it is one of its ancestors")))
}

/// Adds to an error of missing permission who has it, if it is about `path`.
pub(super) fn explain(error: Error, path: &Path) -> Error {
    if error.kind() != Kind::Denied || error.next_step().is_some() {
        return error;
    }
    match who_may(path) {
        Some(hint) => error.hint(hint),
        None => error,
    }
}

/// Says who may use the first thing on the way to `path` that this process may not.
fn who_may(path: &Path) -> Option<String> {
    use std::os::unix::fs::MetadataExt;
    let whole = std::path::absolute(path).ok()?;
    let way: Vec<&Path> = whole.ancestors().collect();
    let (at, meta) = way.into_iter().rev().find_map(|at| {
        let meta = fs::metadata(at).ok()?;
        let wants = match (meta.is_dir(), at == whole) {
            (true, false) => Access::EXEC_OK,
            (true, true) => Access::READ_OK | Access::WRITE_OK | Access::EXEC_OK,
            (false, _) => Access::READ_OK | Access::WRITE_OK,
        };
        // Also the directory in which the next thing is not there, and would be made.
        let made_here = meta.is_dir() && at != whole && !is_next_there(at, &whole);
        let wants = if made_here { wants | Access::WRITE_OK } else { wants };
        rustix::fs::access(at, wants).is_err().then_some((at, meta))
    })?;
    let me = rustix::process::geteuid().as_raw();
    Some(format!(
        "{} belongs to user {}, group {} and has mode {:04o}; this is user {}: run it as that user or as root",
        at.display(),
        name_of("/etc/passwd", meta.uid()),
        name_of("/etc/group", meta.gid()),
        meta.mode() & 0o7777,
        name_of("/etc/passwd", me)
    ))
}

/// Tells whether what follows `dir` on the way to `path` is there, or cannot be known.
fn is_next_there(dir: &Path, path: &Path) -> bool {
    let next = path.strip_prefix(dir).ok().and_then(|rest| rest.components().next());
    let found = next.map(|name| dir.join(name).symlink_metadata());
    !found.is_some_and(|found| found.is_err_and(|e| e.kind() == io::ErrorKind::NotFound))
}

/// Returns the name of a user or a group where the host has a list of them, and the number where not.
fn name_of(table: &str, id: u32) -> String {
    let text = fs::read_to_string(table).unwrap_or_default();
    let number = id.to_string();
    let name = text.lines().find_map(|line| {
        let mut fields = line.split(':');
        let (name, _password, found) = (fields.next()?, fields.next()?, fields.next()?);
        (found == number).then_some(name)
    });
    name.map_or(number.clone(), |name| format!("{name} ({number})"))
}

/// Takes a mount away with the tool that needs no privileges. Files that somebody has open keep it busy, unless its server is
/// dead: then they are of no use to anybody, and go on giving errors.
pub(super) fn fusermount(mount: &Path) -> Result<()> {
    let how = if is_dead(mount) { "-uz" } else { "-u" };
    let output = Command::new("fusermount3").arg(how).arg("--").arg(mount).output().map_err(|e| {
        Error::io("cannot run fusermount3", e).hint("install it (Debian: apt install fuse3), or run umount as root")
    })?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let said = said.trim().trim_start_matches("fusermount3: ");
    let error = format!("cannot unmount {}: {said}", mount.display());
    if said.contains("busy") {
        return Err(Error::busy(error).hint(busy_hint(mount)));
    }
    Err(Error::failed(error))
}

/// Says how to find out who keeps a mount busy.
pub(super) fn busy_hint(mount: &Path) -> String {
    format!("'fuser -vm {}' shows who has files open there; end them and try again", mount.display())
}

/// Tells whether the server of what is mounted at `mount` is dead.
pub(super) fn is_dead(mount: &Path) -> bool {
    // Not stat: its answer may come from the cache of the kernel, long after the server is gone.
    rustix::fs::statfs(mount).is_err_and(|errno| errno == rustix::io::Errno::NOTCONN)
}

/// Returns the name of a network file system, if `path` lies on one (magic numbers: linux/magic.h).
pub(super) fn network_file_system(path: &Path) -> io::Result<Option<&'static str>> {
    let magic = i128::from(rustix::fs::statfs(path)?.f_type) & 0xffff_ffff;
    Ok(match magic {
        0x6969 => Some("NFS"),
        0xff53_4d42 | 0xfe53_4d42 | 0x517b => Some("SMB"),
        0x00c3_6400 => Some("Ceph"),
        0x0102_1997 => Some("9P"),
        0x6573_5546 => Some("FUSE"),
        0x5346_414f => Some("AFS"),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_uppermost_mount_counts() {
        let table = b"proc /proc proc rw 0 0\n\
            afterimage:/srv/my\\040pool /mnt/a\\134b fuse rw 0 0\n\
            afterimage:/old /mnt/c fuse rw 0 0\ntmpfs /mnt/c tmpfs rw 0 0\n";
        assert_eq!(find_pool(table, Path::new("/mnt/a\\b")), Some(PathBuf::from("/srv/my pool")));
        assert_eq!(find_pool(table, Path::new("/mnt/c")), None);
        assert_eq!(find_pool(table, Path::new("/nowhere")), None);
    }

    #[test]
    fn escapes_are_octal() {
        assert_eq!(unescape(b"a\\040b"), b"a b");
        assert_eq!(unescape(b"a\\04"), b"a\\04");
        assert_eq!(unescape(b"\\777x"), b"\\777x");
        assert_eq!(unescape(b"\\134040"), b"\\040");
    }
}
