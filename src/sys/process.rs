//! What a process asks of the kernel for itself as a whole.
#![expect(unsafe_code, reason = "users and their names are the C library's, and so is changing to one in all threads")]

use std::ffi::CString;
use std::io;
use std::os::fd::AsFd;
use std::ptr;

use rustix::process::{Gid, Resource, Rlimit, Uid};

/// Bytes of the texts that belong to a user; more than any system has.
const TEXTS: usize = 64 << 10;

/// Tells the kernel that this process serves block or file system I/O (`PR_SET_IO_FLUSHER`, Linux 5.6).
///
/// Allocating memory then never waits for write-back that would in turn wait for this process. It covers the calling
/// thread and the threads it starts afterwards, so call it first. Needs `CAP_SYS_RESOURCE`.
pub fn set_io_flusher() -> io::Result<()> {
    Ok(rustix::process::configure_io_flusher_behavior(true)?)
}

/// Raises the soft limit of open files to the hard one and returns it (`u64::MAX` when there is none).
pub fn raise_open_files() -> io::Result<u64> {
    let limit = rustix::process::getrlimit(Resource::Nofile);
    if limit.current != limit.maximum {
        rustix::process::setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum })?;
    }
    Ok(limit.maximum.unwrap_or(u64::MAX))
}

/// Returns one part in `parts` of the files that this process may have open, as the limit is now.
#[must_use]
pub fn share_of_open_files(parts: usize) -> usize {
    let limit = rustix::process::getrlimit(Resource::Nofile).current;
    limit.map_or(usize::MAX, |limit| usize::try_from(limit).unwrap_or(usize::MAX)) / parts
}

/// Has the allocator share its memory among the threads in so many parts at most. It finds out how many processors there are
/// otherwise, in a file, whenever it likes.
pub fn limit_arenas(parts: libc::c_int) {
    // SAFETY: numbers only.
    let taken = unsafe { libc::mallopt(libc::M_ARENA_MAX, parts) };
    if taken == 0 {
        tracing::debug!("the allocator does not take a limit of {parts} parts");
    }
}

/// Lets go of the pages of this program and its libraries that are mapped; what runs from here on maps what it needs again.
/// Most of what a process has executed it needed to begin with.
pub fn let_go_of_code() -> io::Result<()> {
    for line in std::fs::read_to_string("/proc/self/maps")?.lines() {
        let mut words = line.split_ascii_whitespace();
        let (Some(range), Some("r-xp"), Some(path)) = (words.next(), words.next(), words.nth(3)) else { continue };
        let ends = range
            .split_once('-')
            .map(|(start, end)| (usize::from_str_radix(start, 16), usize::from_str_radix(end, 16)));
        let Some((Ok(start), Ok(end))) = ends else { continue };
        if path.starts_with('/') {
            let at = ptr::without_provenance_mut(start);
            // SAFETY: code of a file, which nobody writes to: a page that is let go is read from the file again.
            unsafe { rustix::mm::madvise(at, end - start, rustix::mm::Advice::LinuxDontNeed) }?;
        }
    }
    Ok(())
}

/// A user of the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct User {
    /// The number of the user,
    pub uid: u32,
    /// and that of the main group.
    pub gid: u32,
}

/// Returns the release of the kernel that runs, such as `6.12.0`; empty when the host does not say.
#[must_use]
pub fn kernel() -> String {
    std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim().to_owned()
}

/// Finds a user by name; `None` when there is none of it.
pub fn find_user(name: &str) -> io::Result<Option<User>> {
    let name = CString::new(name)?;
    let mut texts = vec![0; TEXTS];
    // SAFETY: all zeros are a valid `passwd`.
    let mut entry: libc::passwd = unsafe { std::mem::zeroed() };
    let mut found = ptr::null_mut();
    let (at, len) = (texts.as_mut_ptr(), texts.len());
    // SAFETY: all pointers are to what lives through the call, and the length is that of the buffer.
    let error = unsafe { libc::getpwnam_r(name.as_ptr(), &raw mut entry, at, len, &raw mut found) };
    match error {
        0 if found.is_null() => Ok(None),
        0 => Ok(Some(User { uid: entry.pw_uid, gid: entry.pw_gid })),
        // What the manual says may come for a name that is not there.
        libc::ENOENT | libc::ESRCH => Ok(None),
        _ => Err(io::Error::from_raw_os_error(error)),
    }
}

/// Gives what a descriptor is of to a user.
pub fn give_to(what: impl AsFd, user: User) -> io::Result<()> {
    let (owner, group) = (Uid::from_raw(user.uid), Gid::from_raw(user.gid));
    Ok(rustix::fs::fchown(what, Some(owner), Some(group))?)
}

/// Makes all threads of this process those of another user, in no group but the main one, for good.
pub fn become_user(user: User) -> io::Result<()> {
    let check = |result: libc::c_int| if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) };
    // SAFETY: the list has no entries.
    check(unsafe { libc::setgroups(0, ptr::null()) })?;
    // SAFETY: numbers only.
    check(unsafe { libc::setresgid(user.gid, user.gid, user.gid) })?;
    // SAFETY: numbers only.
    check(unsafe { libc::setresuid(user.uid, user.uid, user.uid) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_are_found_by_name() {
        assert_eq!(find_user("root").unwrap(), Some(User { uid: 0, gid: 0 }));
        assert_eq!(find_user("no-such-user-here").unwrap(), None);
        find_user("a\0b").unwrap_err();
    }

    #[test]
    fn open_files_are_raised_to_the_hard_limit() {
        let limit = raise_open_files().unwrap();
        assert!(limit > 0);
        let now = rustix::process::getrlimit(Resource::Nofile);
        assert_eq!(now.current, now.maximum);
    }

    #[test]
    fn the_flusher_state_is_set_or_refused_for_want_of_privilege() {
        match set_io_flusher() {
            Ok(()) => assert!(rustix::process::is_io_flusher().unwrap()),
            // Kernels before 5.6 do not know the option.
            Err(error) => assert!(matches!(error.raw_os_error(), Some(libc::EPERM | libc::EINVAL)), "{error}"),
        }
    }
}
