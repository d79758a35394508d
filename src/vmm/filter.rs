//! What the threads of a virtual machine may ask of the kernel: filters of system calls (seccomp(2)), one per kind of thread.
//!
//! | kind | threads | may |
//! |---|---|---|
//! | processor | `cpu-N` | run the guest, wake others |
//! | device | those of disks and network cards, and what they start | read, write and flush what is open |
//! | whole | all others: the API, the console, what makes a new machine for a reboot | both, make a machine, accept connections |
//!
//! # Rules
//! 1. A thread inherits the filter of the one that starts it, and of two filters the stricter answer counts. So the filter of
//!    the whole contains the others, and is set first, for all threads there are; each processor and device adds its own.
//! 2. `ioctl` is let through by number: no driver but those of KVM and userfaultfd is ever reached, and of these only what is
//!    used.
//! 3. No memory becomes code, no process and no program is started, none but this one gets a signal, nothing is opened for
//!    writing or renamed by name but from the folder of the machine's checkpoints, whose descriptor the process has from the
//!    start, and no socket but local ones is made. A filter does not see the names themselves: what lies beyond that folder
//!    is kept from the process by its user, where it has one of its own.
//! 4. A filter sees the arguments of a call and not what they point to. So there is no io_uring, which opens files and makes
//!    sockets as told in memory, and no `clone3`: for these threads the kernel has neither (ENOSYS). A disk then has threads
//!    do its work ([`crate::disk::Engine`]), and the C library starts threads with `clone`.
//! 5. What is not let through ends the process, with a line in the log that names it ([`crate::sys::forbidden`]): a guest that
//!    has taken a thread over learns nothing, and a mistake in these lists is found.
//!
//! # Why a list in code
//! Each number has the name that the manual has for it, and the compiler checks it; `seccompiler` makes the program of it.

use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

use kvm_bindings::{
    kvm_clock_data, kvm_cpuid2, kvm_debugregs, kvm_ioeventfd, kvm_irq_routing, kvm_irqchip, kvm_irqfd, kvm_lapic_state,
    kvm_mp_state, kvm_msr_list, kvm_msrs, kvm_nested_state, kvm_pit_config, kvm_pit_state2, kvm_regs, kvm_sregs,
    kvm_userspace_memory_region, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule, TargetArch,
};

use crate::error::{Error, Result};
use crate::sys::{forbidden, process, userfaultfd};

/// What a call that the kernel does not have returns.
const ENOSYS: u32 = libc::ENOSYS.cast_unsigned();

/// What every thread needs.
const COMMON: [i64; 31] = [
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_close,
    libc::SYS_futex,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_brk,
    libc::SYS_rt_sigreturn,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigaction,
    libc::SYS_sigaltstack,
    libc::SYS_restart_syscall,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_nanosleep,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_getrandom,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_membarrier,
    libc::SYS_eventfd2,
];

/// What devices need beside that: files that are open, and threads for what may wait.
const DEVICE: [i64; 20] = [
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_preadv,
    libc::SYS_pwritev,
    libc::SYS_preadv2,
    libc::SYS_pwritev2,
    libc::SYS_fdatasync,
    libc::SYS_fsync,
    libc::SYS_fallocate,
    libc::SYS_lseek,
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendto,
    libc::SYS_sendmsg,
    libc::SYS_shutdown,
    libc::SYS_fcntl,
    libc::SYS_fadvise64,
];

/// What is not there for any of these threads, as if the kernel were older: who asks for it has another way.
const ABSENT: [i64; 2] = [libc::SYS_io_uring_setup, libc::SYS_clone3];

/// What `clone` is to share with whom it starts: it is a thread of this process then.
const THREAD: i32 = libc::CLONE_VM | libc::CLONE_FS | libc::CLONE_FILES | libc::CLONE_SIGHAND | libc::CLONE_THREAD;
/// What it is not to have of its own.
const SPACES: i32 = libc::CLONE_NEWNS
    | libc::CLONE_NEWCGROUP
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUSER
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWNET;

/// What the rest of the process needs beside that.
const WHOLE: [i64; 20] = [
    libc::SYS_accept4,
    libc::SYS_connect,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    libc::SYS_getpeername,
    libc::SYS_getsockname,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_memfd_create,
    libc::SYS_ftruncate,
    libc::SYS_unlink,
    libc::SYS_unlinkat,
    libc::SYS_dup,
    libc::SYS_seccomp,
    libc::SYS_geteuid,
    libc::SYS_getuid,
    libc::SYS_flock,
    libc::SYS_fstatfs,
];

/// Directions of data in the number of an `ioctl`.
const NONE: u32 = 0;
const IN: u32 = 1;
const OUT: u32 = 2;
const BOTH: u32 = 3;

/// Returns the number of an `ioctl` of KVM (include/uapi/asm-generic/ioctl.h).
const fn kvm(direction: u32, number: u32, size: usize) -> u32 {
    assert!(size < 1 << 14, "the size has 14 bits");
    #[expect(clippy::cast_possible_truncation, reason = "checked just above")]
    let size = size as u32;
    direction << 30 | size << 16 | 0xae << 8 | number
}

/// What a processor asks of KVM: to run, where it is when it fails, and to tell the guest that it was paused.
const PROCESSOR_IOCTLS: [u32; 4] = [
    kvm(NONE, 0x80, 0),
    kvm(OUT, 0x81, size_of::<kvm_regs>()),
    kvm(OUT, 0x83, size_of::<kvm_sregs>()),
    kvm(NONE, 0xad, 0),
];

/// What makes a descriptor not wait, and what asks whether it is a terminal.
const DESCRIPTOR_IOCTLS: [u64; 3] = [libc::FIONBIO, libc::TCGETS, libc::TIOCGWINSZ];

/// What making a machine, reading its state and setting it takes.
const WHOLE_IOCTLS: [u32; 44] = [
    // The system: version, machine, registers there are, extensions, size of the shared page, CPUID.
    kvm(NONE, 0x00, 0),
    kvm(NONE, 0x01, 0),
    kvm(BOTH, 0x02, size_of::<kvm_msr_list>()),
    kvm(NONE, 0x03, 0),
    kvm(NONE, 0x04, 0),
    kvm(BOTH, 0x05, size_of::<kvm_cpuid2>()),
    // The machine: processors, memory, interrupts, timer, clock.
    kvm(NONE, 0x41, 0),
    kvm(IN, 0x46, size_of::<kvm_userspace_memory_region>()),
    kvm(NONE, 0x47, 0),
    kvm(IN, 0x48, size_of::<u64>()),
    kvm(NONE, 0x60, 0),
    kvm(BOTH, 0x62, size_of::<kvm_irqchip>()),
    kvm(OUT, 0x63, size_of::<kvm_irqchip>()),
    kvm(IN, 0x6a, size_of::<kvm_irq_routing>()),
    kvm(IN, 0x76, size_of::<kvm_irqfd>()),
    kvm(IN, 0x77, size_of::<kvm_pit_config>()),
    kvm(IN, 0x79, size_of::<kvm_ioeventfd>()),
    kvm(IN, 0x7b, size_of::<kvm_clock_data>()),
    kvm(OUT, 0x7c, size_of::<kvm_clock_data>()),
    kvm(OUT, 0x9f, size_of::<kvm_pit_state2>()),
    kvm(IN, 0xa0, size_of::<kvm_pit_state2>()),
    // A processor: its state, in and out.
    kvm(IN, 0x82, size_of::<kvm_regs>()),
    kvm(IN, 0x84, size_of::<kvm_sregs>()),
    kvm(BOTH, 0x88, size_of::<kvm_msrs>()),
    kvm(IN, 0x89, size_of::<kvm_msrs>()),
    kvm(OUT, 0x8e, size_of::<kvm_lapic_state>()),
    kvm(IN, 0x8f, size_of::<kvm_lapic_state>()),
    kvm(IN, 0x90, size_of::<kvm_cpuid2>()),
    kvm(BOTH, 0x91, size_of::<kvm_cpuid2>()),
    kvm(OUT, 0x98, size_of::<kvm_mp_state>()),
    kvm(IN, 0x99, size_of::<kvm_mp_state>()),
    kvm(OUT, 0x9f, size_of::<kvm_vcpu_events>()),
    kvm(IN, 0xa0, size_of::<kvm_vcpu_events>()),
    kvm(OUT, 0xa1, size_of::<kvm_debugregs>()),
    kvm(IN, 0xa2, size_of::<kvm_debugregs>()),
    kvm(NONE, 0xa2, 0),
    kvm(NONE, 0xa3, 0),
    kvm(OUT, 0xa4, size_of::<kvm_xsave>()),
    kvm(IN, 0xa5, size_of::<kvm_xsave>()),
    kvm(OUT, 0xa6, size_of::<kvm_xcrs>()),
    kvm(IN, 0xa7, size_of::<kvm_xcrs>()),
    kvm(OUT, 0xcf, size_of::<kvm_xsave>()),
    kvm(BOTH, 0xbe, size_of::<kvm_nested_state>()),
    kvm(IN, 0xbf, size_of::<kvm_nested_state>()),
];

/// Parts of the memory of the allocator: as many as there are kinds of threads that are busy at a time, and one.
const ARENAS: i32 = 4;
type Rules = BTreeMap<i64, Vec<SeccompRule>>;

#[derive(Debug)]
struct Filters {
    absent: BpfProgram,
    processor: BpfProgram,
    device: BpfProgram,
    whole: BpfProgram,
}

/// The filters of a machine, or none: a program that uses machines as a library confines itself.
#[derive(Debug, Clone, Default)]
pub(super) struct Confinement(Option<Arc<Filters>>);

fn failed(error: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error::failed("the system calls of the virtual machine cannot be confined").because(error)
}

impl Confinement {
    /// Makes the filters, for the process that calls, which makes checkpoints in a folder. [`Self::process`] comes before any
    /// processor or device runs.
    ///
    /// # Errors
    /// None that are known.
    pub(super) fn strict(folder: Option<BorrowedFd<'_>>) -> Result<Self> {
        Ok(Self(Some(Arc::new(Filters {
            absent: program(rules_of(ABSENT), SeccompAction::Allow, SeccompAction::Errno(ENOSYS))?,
            processor: program(processor()?, SeccompAction::Trap, SeccompAction::Allow)?,
            device: program(device()?, SeccompAction::Trap, SeccompAction::Allow)?,
            whole: program(whole(folder)?, SeccompAction::Trap, SeccompAction::Allow)?,
        }))))
    }

    /// Confines all threads of the process.
    ///
    /// # Errors
    /// When the host does not do it.
    pub(super) fn process(&self) -> Result<()> {
        let Some(filters) = &self.0 else { return Ok(()) };
        process::limit_arenas(ARENAS);
        forbidden::name_what_is_forbidden().map_err(failed)?;
        // Of two answers the kernel takes the one that lets less happen: a trap before an error, an error before a call.
        seccompiler::apply_filter_all_threads(&filters.absent).map_err(failed)?;
        seccompiler::apply_filter_all_threads(&filters.whole).map_err(failed)
    }

    /// Confines the calling thread, which runs a processor.
    ///
    /// # Errors
    /// As [`Self::process`].
    pub(super) fn processor(&self) -> Result<()> {
        self.0.as_ref().map_or(Ok(()), |filters| seccompiler::apply_filter(&filters.processor).map_err(failed))
    }

    /// Confines the calling thread, which works for a device, and those that it starts.
    ///
    /// # Errors
    /// As [`Self::process`].
    pub(super) fn device(&self) -> Result<()> {
        self.0.as_ref().map_or(Ok(()), |filters| seccompiler::apply_filter(&filters.device).map_err(failed))
    }
}

/// Makes a filter that does something with the calls of the rules, and something else with all others.
fn program(rules: Rules, others: SeccompAction, these: SeccompAction) -> Result<BpfProgram> {
    let filter = SeccompFilter::new(rules, others, these, TargetArch::x86_64);
    BpfProgram::try_from(filter.map_err(failed)?).map_err(failed)
}

/// Lets a call through when an argument is one of these.
fn one_of(argument: u8, values: impl IntoIterator<Item = u64>) -> Result<Vec<SeccompRule>> {
    let mut rules = Vec::new();
    for value in values {
        let is = SeccompCondition::new(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value).map_err(failed)?;
        rules.push(SeccompRule::new(vec![is]).map_err(failed)?);
    }
    Ok(rules)
}

/// Lets a call through when of these bits of an argument just those are set.
fn masked(argument: u8, bits: i32, set: i32) -> Result<Vec<SeccompRule>> {
    let (bits, set) = (u64::from(bits.cast_unsigned()), u64::from(set.cast_unsigned()));
    let just = SeccompCondition::new(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::MaskedEq(bits), set);
    Ok(vec![SeccompRule::new(vec![just.map_err(failed)?]).map_err(failed)?])
}

/// Lets a call through when none of these bits of an argument is set.
fn without(argument: u8, bits: i32) -> Result<Vec<SeccompRule>> {
    masked(argument, bits, 0)
}

/// Lets calls through whatever their arguments are.
fn rules_of(calls: impl IntoIterator<Item = i64>) -> Rules {
    calls.into_iter().map(|call| (call, Vec::new())).collect()
}

/// What every thread may.
fn common() -> Result<Rules> {
    let mut rules = rules_of(COMMON.into_iter().chain(ABSENT));
    rules.insert(libc::SYS_tgkill, one_of(0, [u64::from(std::process::id())])?);
    rules.insert(libc::SYS_mmap, without(2, libc::PROT_EXEC)?);
    rules.insert(libc::SYS_mprotect, without(2, libc::PROT_EXEC)?);
    // The standard library of a debug build looks whether what it closes is open.
    rules.insert(libc::SYS_fcntl, one_of(1, [u64::from(libc::F_GETFD.cast_unsigned())])?);
    Ok(rules)
}

fn processor() -> Result<Rules> {
    let mut rules = common()?;
    rules.insert(libc::SYS_ioctl, one_of(1, PROCESSOR_IOCTLS.map(u64::from))?);
    Ok(rules)
}

fn device() -> Result<Rules> {
    let mut rules = common()?;
    rules.extend(rules_of(DEVICE));
    rules.insert(libc::SYS_clone, masked(0, THREAD | SPACES, THREAD)?);
    rules.insert(libc::SYS_prctl, one_of(0, [u64::from(libc::PR_SET_NAME.cast_unsigned())])?);
    Ok(rules)
}

fn whole(folder: Option<BorrowedFd<'_>>) -> Result<Rules> {
    let mut rules = device()?;
    rules.extend(rules_of(WHOLE));
    let ioctls = PROCESSOR_IOCTLS.into_iter().chain(WHOLE_IOCTLS).chain(userfaultfd::IOCTLS).map(u64::from);
    rules.insert(libc::SYS_ioctl, one_of(1, ioctls.chain(DESCRIPTOR_IOCTLS))?);
    let names_and_rights = [libc::PR_SET_NAME, libc::PR_SET_NO_NEW_PRIVS].map(|what| u64::from(what.cast_unsigned()));
    rules.insert(libc::SYS_prctl, one_of(0, names_and_rights)?);
    rules.insert(libc::SYS_socket, one_of(0, [u64::from(libc::AF_UNIX.cast_unsigned())])?);
    let mut opened = without(2, libc::O_WRONLY | libc::O_RDWR | libc::O_CREAT | libc::O_TRUNC)?;
    if let Some(folder) = folder {
        let folder = u64::from(folder.as_raw_fd().cast_unsigned());
        opened.extend(one_of(0, [folder])?);
        let is = |argument| SeccompCondition::new(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, folder);
        let within = SeccompRule::new(vec![is(0).map_err(failed)?, is(2).map_err(failed)?]);
        rules.insert(libc::SYS_renameat, vec![within.map_err(failed)?]);
    }
    rules.insert(libc::SYS_openat, opened);
    // Limits of this process are only read.
    rules.insert(libc::SYS_prlimit64, one_of(2, [0])?);
    Ok(rules)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_filter_of_the_whole_contains_the_others() {
        let whole = whole(None).unwrap();
        for (call, rules) in processor().unwrap().into_iter().chain(device().unwrap()) {
            let allowed = whole.get(&call).unwrap_or_else(|| panic!("call {call} is missing"));
            assert!(allowed.is_empty() || rules.iter().all(|rule| allowed.contains(rule)), "call {call}");
        }
    }

    #[test]
    fn numbers_are_those_of_the_kernel() {
        // As strace and the headers of the kernel have them.
        assert_eq!(kvm(NONE, 0x80, 0), 0xae80);
        assert_eq!(kvm(OUT, 0x81, size_of::<kvm_regs>()), 0x8090_ae81);
        assert_eq!(kvm(IN, 0x46, size_of::<kvm_userspace_memory_region>()), 0x4020_ae46);
        assert_eq!(kvm(BOTH, 0x05, size_of::<kvm_cpuid2>()), 0xc008_ae05);
        assert_eq!(kvm(OUT, 0xcf, size_of::<kvm_xsave>()), 0x9000_aecf);
    }
}
