//! What happens when a thread makes a system call that its filter (seccomp(2)) does not let through and traps.
//!
//! # Rules
//! 1. The process says which call it was, on stderr, and ends: nothing of what made the call runs on.
//! 2. The handler of a signal allocates nothing, takes no lock, and writes and exits with calls that filters let through.
#![expect(unsafe_code, reason = "the handler of a signal")]

use std::io::{self, Write};

use vmm_sys_util::signal::register_signal_handler;

/// The exit code of a process that is ended so: that of whatever is refused.
const EXIT_CODE: libc::c_int = 1;
/// Where the number of the call is in `siginfo_t` (`si_syscall`), in numbers of 32 bits.
const CALL: usize = 6;

/// Has the process end with a word on stderr when a system call is trapped.
pub fn name_what_is_forbidden() -> io::Result<()> {
    Ok(register_signal_handler(libc::SIGSYS, forbidden)?)
}

extern "C" fn forbidden(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    let number = info.cast::<libc::c_int>().wrapping_add(CALL);
    // SAFETY: the kernel gives the handler a `siginfo_t`, which is larger than this.
    let number = unsafe { number.read() };
    let name = usize::try_from(number).ok().and_then(syscalls::Sysno::new).map_or("a system call", |call| call.name());
    let mut text = [0; 160];
    let mut rest = &mut text[..];
    let what = "is not among the system calls that this thread may make: the process ends";
    // It fits.
    writeln!(rest, "afterimage: {name} (number {number}) {what}").ok();
    let left = rest.len();
    let len = text.len() - left;
    // SAFETY: the text is initialised and as long as told.
    unsafe { libc::write(libc::STDERR_FILENO, text.as_ptr().cast(), len) };
    // SAFETY: it ends the process, and nothing that was going on is touched.
    unsafe { libc::_exit(EXIT_CODE) };
}
