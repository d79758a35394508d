//! What of KVM a safe interface cannot promise by itself: that memory outlives the guest that uses it, that a thread in
//! a guest can be called back, and that state of unknown length has room.
//!
//! # Rules
//! 1. A [`Vm`] owns the memory of its guest, and each [`Cpu`] its machine: no guest ever runs in memory that is gone.
//! 2. [`Kick::now`] always takes effect: the flag is set before the signal is sent, and the kernel looks at the flag when
//!    the guest is entered. A signal alone is lost when it comes just before.
#![expect(unsafe_code, reason = "KVM")]

use std::io;
use std::ops::{Deref, DerefMut};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, AtomicU8, Ordering};

use kvm_bindings::{Xsave, kvm_userspace_memory_region, kvm_xsave};
use kvm_ioctls::{Cap, VcpuFd, VmFd};
use rustix::mm::{MapFlags, ProtFlags};
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};
use vmm_sys_util::signal::register_signal_handler;

/// Offset of the flag that makes the next entry return at once (`struct kvm_run`).
const IMMEDIATE_EXIT: usize = 1;
/// What calls a thread back. Not one of the real-time signals, which are queued: a thread that has no processor for a while
/// would use up all that the user may have waiting, and calls would be lost.
const SIGNAL: libc::c_int = libc::SIGUSR1;
/// Bytes of `struct kvm_run` that are mapped for it.
const PAGE: usize = 4096;

/// A virtual machine and its memory.
#[derive(Debug)]
pub struct Vm {
    // Before the memory, so that it is closed first.
    fd: VmFd,
    memory: GuestMemoryMmap<()>,
}

impl Vm {
    /// Gives memory to a machine that has none yet.
    pub fn new(fd: VmFd, memory: GuestMemoryMmap<()>) -> io::Result<Arc<Self>> {
        for (slot, region) in (0..).zip(memory.iter()) {
            let host = memory.get_host_address(region.start_addr()).map_err(io::Error::other)?;
            let region = kvm_userspace_memory_region {
                slot,
                flags: 0,
                guest_phys_addr: region.start_addr().raw_value(),
                memory_size: region.len(),
                userspace_addr: host.addr() as u64,
            };
            // SAFETY: the region is mapped with this length, regions of a `GuestMemoryMmap` do not overlap, and the
            // mapping lives as long as the machine: `Self` owns both, and each `Cpu` shares it.
            unsafe { fd.set_user_memory_region(region) }?;
        }
        Ok(Arc::new(Self { fd, memory }))
    }

    /// Returns the memory.
    #[must_use]
    pub fn memory(&self) -> &GuestMemoryMmap<()> {
        &self.memory
    }

    /// Makes a processor. The first time in a process, the signal for [`Kick`] is set up as well.
    pub fn cpu(self: &Arc<Self>, id: u64) -> io::Result<Cpu> {
        register_signal_handler(SIGNAL, wake)?;
        let fd = self.fd.create_vcpu(id)?;
        let kick = Arc::new(Kick { run: Run::of(&fd)?, thread: AtomicI32::new(0) });
        Ok(Cpu { fd, kick, vm: Arc::clone(self) })
    }
}

impl Deref for Vm {
    type Target = VmFd;

    fn deref(&self) -> &VmFd {
        &self.fd
    }
}

extern "C" fn wake(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

/// A processor of a machine.
#[derive(Debug)]
pub struct Cpu {
    fd: VcpuFd,
    kick: Arc<Kick>,
    /// Its memory must outlive the last entry into the guest.
    vm: Arc<Vm>,
}

impl Cpu {
    /// Returns what calls it back out of the guest.
    #[must_use]
    pub fn kick(&self) -> Arc<Kick> {
        Arc::clone(&self.kick)
    }

    /// Reads the state of the floating point unit and of all that came after it.
    pub fn xsave(&self) -> io::Result<Xsave> {
        let mut state = Xsave::new(self.xsave_words()).map_err(|e| io::Error::other(format!("no room: {e:?}")))?;
        // SAFETY: there is as much room as this machine says the state has.
        unsafe { self.fd.get_xsave2(&mut state) }?;
        Ok(state)
    }

    /// Sets what [`Cpu::xsave`] has read, maybe on another host: where it is longer there it must end in zeros, which is the
    /// state of units that were not used.
    pub fn set_xsave(&self, state: &Xsave) -> io::Result<()> {
        let (words, own) = (state.as_slice(), self.xsave_words());
        if words.len() == own {
            // SAFETY: it is as long as this machine says the state is.
            return Ok(unsafe { self.fd.set_xsave2(state) }?);
        }
        if words.iter().skip(own).any(|word| *word != 0) {
            let what = "the processor has units in use that those of this host lack";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
        }
        let mut fitted = Xsave::new(own).map_err(|e| io::Error::other(format!("no room: {e:?}")))?;
        // SAFETY: only the bytes change, not how many there are.
        unsafe { fitted.as_mut_fam_struct() }.xsave.region = state.as_fam_struct_ref().xsave.region;
        fitted.as_mut_slice().iter_mut().zip(words).for_each(|(to, from)| *to = *from);
        // SAFETY: it is as long as this machine says the state is.
        Ok(unsafe { self.fd.set_xsave2(&fitted) }?)
    }

    /// Tells whether KVM keeps what a guest runs in machines of its own.
    #[must_use]
    pub fn has_nested_state(&self) -> bool {
        self.vm.check_extension(Cap::NestedState)
    }

    /// Words of that state beyond those that every machine has.
    fn xsave_words(&self) -> usize {
        let whole = usize::try_from(self.vm.check_extension_int(Cap::Xsave2)).unwrap_or(0);
        whole.saturating_sub(size_of::<kvm_xsave>()).div_ceil(size_of::<u32>())
    }
}

impl Deref for Cpu {
    type Target = VcpuFd;

    fn deref(&self) -> &VcpuFd {
        &self.fd
    }
}

impl DerefMut for Cpu {
    fn deref_mut(&mut self) -> &mut VcpuFd {
        &mut self.fd
    }
}

/// Calls a processor back out of its guest, from any thread.
#[derive(Debug)]
pub struct Kick {
    run: Run,
    /// The thread that runs it; 0 when none does.
    thread: AtomicI32,
}

impl Kick {
    /// Says that the calling thread runs the processor from now on.
    pub fn enter(&self) {
        self.thread.store(rustix::thread::gettid().as_raw_nonzero().get(), Ordering::SeqCst);
    }

    /// Says that it does no longer.
    pub fn leave(&self) {
        self.thread.store(0, Ordering::SeqCst);
    }

    /// Makes the processor leave the guest, or not enter it, until [`Kick::clear`].
    pub fn now(&self) {
        self.run.flag().store(1, Ordering::SeqCst);
        let thread = self.thread.load(Ordering::SeqCst);
        if thread != 0 {
            let process = rustix::process::getpid().as_raw_nonzero().get();
            // SAFETY: a system call without pointers. A thread that has just ended is not found; its number in the hands
            // of another thread of ours means a signal that does nothing.
            unsafe { libc::syscall(libc::SYS_tgkill, process, thread, SIGNAL) };
        }
    }

    /// Lets it enter the guest again.
    pub fn clear(&self) {
        self.run.flag().store(0, Ordering::SeqCst);
    }
}

/// A second mapping of what processor and kernel share, so that the flag can be reached while the guest runs.
#[derive(Debug)]
struct Run(NonNull<u8>);

// SAFETY: the only thing done with the mapping is an atomic access to one byte.
unsafe impl Send for Run {}
// SAFETY: as above.
unsafe impl Sync for Run {}

impl Run {
    fn of(cpu: &VcpuFd) -> io::Result<Self> {
        // SAFETY: the descriptor is open as long as `cpu` is borrowed.
        let fd = unsafe { BorrowedFd::borrow_raw(cpu.as_raw_fd()) };
        let (access, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED);
        // SAFETY: a new mapping at an address of the kernel's choice replaces nothing.
        let at = unsafe { rustix::mm::mmap(std::ptr::null_mut(), PAGE, access, flags, fd, 0) }?;
        Ok(Self(NonNull::new(at.cast()).ok_or_else(|| io::Error::other("a mapping at address zero"))?))
    }

    fn flag(&self) -> &AtomicU8 {
        // SAFETY: the offset lies within the page that is mapped.
        let at = unsafe { self.0.add(IMMEDIATE_EXIT) };
        // SAFETY: the byte is mapped as long as `self` lives, and the kernel reads it as one byte.
        unsafe { AtomicU8::from_ptr(at.as_ptr()) }
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `of` with this length, and nothing refers to it any more.
        let unmapped = unsafe { rustix::mm::munmap(self.0.as_ptr().cast(), PAGE) };
        if let Err(error) = unmapped {
            tracing::debug!("a page could not be unmapped: {error}");
        }
    }
}
