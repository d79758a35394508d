//! Who is at the other end of a Unix socket, to be watched and, at the worst, ended.
#![expect(unsafe_code, reason = "options of sockets that rustix does not know, or takes no zero for")]

use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use rustix::process::{Pid, PidfdFlags, Signal};

/// A process, by a descriptor: its number may be that of another one by tomorrow, the descriptor never is.
#[derive(Debug)]
pub struct Process {
    pidfd: OwnedFd,
    number: i32,
}

impl Process {
    /// Returns the process that connected, or listened; `None` when it cannot be seen from here, as one of another PID
    /// namespace, or is gone.
    ///
    /// # Errors
    /// Errors of the host.
    pub fn of_peer(socket: impl AsFd) -> io::Result<Option<Self>> {
        let mut who = libc::ucred { pid: 0, uid: 0, gid: 0 };
        // SAFETY: the option fills a `ucred`.
        unsafe { option(socket.as_fd(), libc::SO_PEERCRED, &mut who) }?;
        let Some(pid) = Pid::from_raw(who.pid) else { return Ok(None) };
        let mut raw: RawFd = -1;
        // SAFETY: the option fills a descriptor.
        let pidfd = match unsafe { option(socket.as_fd(), libc::SO_PEERPIDFD, &mut raw) } {
            // SAFETY: the kernel has just made it, and nobody else knows it.
            Ok(()) => unsafe { OwnedFd::from_raw_fd(raw) },
            // Linux has this option since 6.5. The number is still its own unless it has ended since it connected.
            Err(error) if error.raw_os_error() == Some(libc::ENOPROTOOPT) => {
                match rustix::process::pidfd_open(pid, PidfdFlags::empty()) {
                    Err(rustix::io::Errno::SRCH) => return Ok(None),
                    opened => opened?,
                }
            }
            // It has been reaped.
            Err(error) if matches!(error.raw_os_error(), Some(libc::ESRCH | libc::ENODATA | libc::EINVAL)) => {
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        Ok(Some(Self { pidfd, number: who.pid }))
    }

    /// Returns its number, for people.
    #[must_use]
    pub fn number(&self) -> i32 {
        self.number
    }

    /// Ends it.
    ///
    /// # Errors
    /// Errors of the host.
    pub fn kill(&self) -> io::Result<()> {
        Ok(rustix::process::pidfd_send_signal(&self.pidfd, Signal::KILL)?)
    }
}

/// Can be read from when the process has ended.
impl AsFd for Process {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

/// Reads an option of a socket.
///
/// # Safety
/// The option is of the type `T`, and every value that the kernel gives is one of that type.
unsafe fn option<T>(socket: BorrowedFd<'_>, name: libc::c_int, value: &mut T) -> io::Result<()> {
    let mut length = libc::socklen_t::try_from(size_of::<T>()).expect("a few bytes");
    let to = std::ptr::from_mut(value).cast();
    // SAFETY: value and length live through the call, and the length is that of the value.
    let done = unsafe { libc::getsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, name, to, &raw mut length) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::{UnixListener, UnixStream};
    use std::process::{Command, Stdio};

    use rustix::event::{PollFd, PollFlags, Timespec, poll};

    use super::*;

    fn has_ended(process: &Process, wait: i64) -> bool {
        let wait = Timespec { tv_sec: wait, tv_nsec: 0 };
        poll(&mut [PollFd::new(process, PollFlags::IN)], Some(&wait)).unwrap() == 1
    }

    #[test]
    fn the_other_end_is_found() {
        let (one, _two) = UnixStream::pair().unwrap();
        let own = Process::of_peer(&one).unwrap().unwrap();
        assert_eq!(own.number().unsigned_abs(), std::process::id());
        assert!(!has_ended(&own, 0));
    }

    #[test]
    fn who_connected_is_watched_and_can_be_ended() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        let script =
            "import socket, sys, time\ns = socket.socket(socket.AF_UNIX)\ns.connect(sys.argv[1])\ntime.sleep(60)";
        let mut child = Command::new("python3").arg("-c").arg(script).arg(&path).stdin(Stdio::null()).spawn().unwrap();
        let (socket, _) = listener.accept().unwrap();
        let process = Process::of_peer(&socket).unwrap().unwrap();
        assert_eq!(process.number().unsigned_abs(), child.id());
        assert!(!has_ended(&process, 0));
        process.kill().unwrap();
        assert!(has_ended(&process, 10));
        assert!(!child.wait().unwrap().success());
        assert!(Process::of_peer(&socket).unwrap().is_none_or(|process| has_ended(&process, 0)));
    }
}
