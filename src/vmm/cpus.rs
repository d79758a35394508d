//! The processors of a guest at work: a thread each.
//!
//! # Rules
//! 1. The threads do what is wanted: run, pause or end. Whoever wants something else says so first and calls the processors
//!    back then; a thread clears the call before it looks at what is wanted. So none is lost.
//! 2. A paused processor has nothing half done: an access to a device that the guest began is finished by entering KVM once
//!    more with the order to come straight back (Documentation/virt/kvm/api.rst, `KVM_RUN`).
//! 3. The first thing that ends the guest counts, and ends it on all processors.
//! 4. A thread is confined just before it enters the guest for the first time.
//! 5. An access to a device at an address where there is memory is never answered: that is a page that cannot be had.
//! 6. When a page of its memory cannot be had the guest is stuck: it stands still on all processors, and whoever runs it
//!    decides whether it tries again or ends. That may last as long as it likes; nobody waits for a processor that does not
//!    come out of the kernel meanwhile.

use std::sync::Arc;
use std::thread::JoinHandle;

use kvm_ioctls::VcpuExit;
use vm_memory::{GuestAddress, GuestMemoryBackend};

use super::bus::Bus;
use super::cpu_state::CpuState;
use super::ending::{Ending, Stuck};
use super::filter::Confinement;
use super::memory::Memory;
use crate::error::{Error, Result};
use crate::sync::{Condvar, Mutex};
use crate::sys::kvm::{Cpu, Kick, Vm};
use crate::sys::shared::Shared as Guard;

/// What the threads are to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wanted {
    Run,
    Pause,
    End,
}

#[derive(Debug)]
struct State {
    wanted: Wanted,
    /// Threads that are not in the guest and will not be before something else is wanted.
    resting: usize,
    stuck: Option<Stuck>,
    ending: Option<Ending>,
}

/// What the threads share.
#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    kicks: Vec<Arc<Kick>>,
    /// Of the regions of memory.
    guards: Vec<Guard>,
    vm: Arc<Vm>,
    bus: Arc<Bus>,
    confinement: Confinement,
}

/// The processors.
#[derive(Debug)]
pub(super) struct Cpus {
    shared: Arc<Shared>,
    cpus: Vec<Arc<Mutex<Cpu>>>,
    threads: Vec<JoinHandle<()>>,
}

impl Cpus {
    /// Starts the threads; they rest until [`Cpus::run`].
    ///
    /// # Errors
    /// When the host has no thread.
    pub(super) fn start(
        vm: &Arc<Vm>,
        cpus: Vec<Cpu>,
        bus: Arc<Bus>,
        guards: Vec<Guard>,
        confinement: &Confinement,
    ) -> Result<Self> {
        let state = State { wanted: Wanted::Pause, resting: 0, stuck: None, ending: None };
        let kicks = cpus.iter().map(Cpu::kick).collect();
        let (state, changed) = (Mutex::new(state), Condvar::new());
        let (vm, confinement) = (Arc::clone(vm), confinement.clone());
        let shared = Arc::new(Shared { state, changed, kicks, guards, vm, bus, confinement });
        let cpus: Vec<_> = cpus.into_iter().map(|cpu| Arc::new(Mutex::new(cpu))).collect();
        // Threads that did start end when this is dropped.
        let mut started = Self { shared, cpus, threads: Vec::new() };
        for (index, cpu) in started.cpus.iter().enumerate() {
            let (cpu, kick) = (Arc::clone(cpu), Arc::clone(&started.shared.kicks[index]));
            let shared = Arc::clone(&started.shared);
            let thread = std::thread::Builder::new().name(format!("cpu-{index}")).spawn(move || {
                kick.enter();
                shared.live(&cpu, &kick, index == 0);
                kick.leave();
            });
            started.threads.push(thread.map_err(|e| Error::io("no thread for a processor of the guest", e))?);
        }
        Ok(started)
    }

    /// Lets them run, unless the guest is stuck: that it stays, or the page would never be asked for again.
    pub(super) fn run(&self) {
        self.shared.run(false);
    }

    /// Lets them run; one that was stuck tries again.
    pub(super) fn retry(&self) {
        self.shared.run(true);
    }

    /// Stops them for want of a page, and returns at once.
    pub(super) fn stick(&self, stuck: Stuck) {
        self.shared.stick(stuck);
    }

    /// Returns what page is wanting, if one is.
    pub(super) fn stuck(&self) -> Option<Stuck> {
        self.shared.state.lock().stuck.clone()
    }

    /// Stops them, and returns when none is in the guest any more.
    pub(super) fn pause(&self) {
        self.shared.want(Wanted::Pause);
        self.shared.wait_for_rest();
    }

    /// As [`Cpus::pause`], but gives up when the guest is stuck: a processor that waits for a page in the kernel may never
    /// come out. The others rest then.
    pub(super) fn pause_unless_stuck(&self) -> Result<(), Stuck> {
        self.shared.want(Wanted::Pause);
        let mut state = self.shared.state.lock();
        while state.resting < self.cpus.len() {
            if let Some(stuck) = &state.stuck {
                return Err(stuck.clone());
            }
            self.shared.changed.wait(&mut state);
        }
        Ok(())
    }

    /// Ends them for a reason, if nothing ended them before.
    pub(super) fn end(&self, ending: Ending) {
        self.shared.end(ending);
    }

    /// Waits until something ends the guest, and all processors have left it. Returns what it was.
    pub(super) fn wait(&self) -> Ending {
        let mut state = self.shared.state.lock();
        loop {
            if let Some(ending) = &state.ending
                && state.resting == self.cpus.len()
            {
                return ending.clone();
            }
            self.shared.changed.wait(&mut state);
        }
    }

    /// Reads the state of each processor; they are paused.
    ///
    /// # Errors
    /// Those of KVM.
    pub(super) fn states(&self, model: &[u32]) -> Result<Vec<CpuState>> {
        self.cpus.iter().map(|cpu| CpuState::of(&cpu.lock(), model)).collect()
    }

    /// Returns what ended the guest, if something has.
    pub(super) fn ending(&self) -> Option<Ending> {
        self.shared.state.lock().ending.clone()
    }
}

impl Drop for Cpus {
    fn drop(&mut self) {
        self.shared.end(Ending::Stopped);
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a processor of the guest ended on a mistake in this program");
            }
        }
    }
}

impl Shared {
    /// Says what the threads are to do, and calls them out of the guest. An end stays.
    fn want(&self, wanted: Wanted) {
        let mut state = self.state.lock();
        if state.wanted != Wanted::End {
            state.wanted = wanted;
        }
        self.changed.notify_all();
        drop(state);
        if wanted != Wanted::Run {
            self.kicks.iter().for_each(|kick| kick.now());
        }
    }

    /// In one step: a page that is lost meanwhile makes the guest stand still for good.
    fn run(&self, retry: bool) {
        let mut state = self.state.lock();
        if retry {
            state.stuck = None;
        }
        if state.stuck.is_none() && state.wanted != Wanted::End {
            state.wanted = Wanted::Run;
        }
        self.changed.notify_all();
    }

    fn end(&self, ending: Ending) {
        self.state.lock().ending.get_or_insert(ending);
        self.want(Wanted::End);
    }

    fn stick(&self, stuck: Stuck) {
        let mut state = self.state.lock();
        if state.stuck.is_none() && state.ending.is_none() {
            tracing::error!("the guest stands still, for memory of it cannot be had: {}", stuck.what);
        }
        // What is worse counts.
        if state.stuck.as_ref().is_none_or(|known| !known.for_good) {
            state.stuck = Some(stuck);
        }
        drop(state);
        self.want(Wanted::Pause);
    }

    fn wait_for_rest(&self) {
        let mut state = self.state.lock();
        while state.resting < self.kicks.len() {
            self.changed.wait(&mut state);
        }
    }

    /// The life of a thread.
    fn live(&self, cpu: &Mutex<Cpu>, kick: &Kick, first: bool) {
        let (mut ran, mut confined) = (false, false);
        loop {
            kick.clear();
            // What is wanted is looked at after the call was cleared (rule 1).
            let wanted = self.state.lock().wanted;
            if wanted == Wanted::Run {
                if !std::mem::replace(&mut confined, true) {
                    if let Err(error) = self.confinement.processor() {
                        self.end(Ending::Crashed(error.to_string()));
                        continue;
                    }
                    if first {
                        tracing::info!("the guest begins");
                    }
                }
                ran = true;
                let stop = self.enter(&mut cpu.lock());
                self.stop(stop);
                continue;
            }
            if std::mem::take(&mut ran) {
                let stop = self.finish(&mut cpu.lock(), kick);
                self.stop(stop);
            }
            if !self.rest() {
                return;
            }
        }
    }

    fn stop(&self, stop: Option<Stop>) {
        match stop {
            Some(Stop::End(ending)) => self.end(ending),
            Some(Stop::Stick(stuck)) => self.stick(stuck),
            None => {}
        }
    }

    /// Rests until the guest is to run again; false when it is not.
    fn rest(&self) -> bool {
        let mut state = self.state.lock();
        state.resting += 1;
        self.changed.notify_all();
        while state.wanted == Wanted::Pause {
            self.changed.wait(&mut state);
        }
        if state.wanted == Wanted::End {
            return false;
        }
        state.resting -= 1;
        true
    }

    /// Finishes what the guest has begun.
    fn finish(&self, cpu: &mut Cpu, kick: &Kick) -> Option<Stop> {
        loop {
            kick.now();
            match self.step(cpu) {
                Step::Came(None) => {}
                Step::Called => {
                    kick.clear();
                    // So that a watchdog of the guest does not take the time it stands still for a hang. KVM refuses it
                    // (EINVAL) where the guest does not use its clock.
                    if let Err(error) = cpu.kvmclock_ctrl() {
                        tracing::trace!("the guest is not told that it was paused: {error}");
                    }
                    return None;
                }
                Step::Came(stop) => {
                    kick.clear();
                    return stop;
                }
            }
        }
    }

    /// Runs the guest until it is called back.
    fn enter(&self, cpu: &mut Cpu) -> Option<Stop> {
        loop {
            match self.step(cpu) {
                Step::Came(None) => {}
                // A bus error calls it as well, and has put zeros where its memory was.
                Step::Called if self.guards.iter().any(Guard::is_lost) => {
                    let what = "the host has lost a page of it".into();
                    return Some(Stop::Stick(Stuck { what, for_good: true }));
                }
                Step::Called => return None,
                Step::Came(stop) => return stop,
            }
        }
    }

    /// Enters the guest once, and answers what it wants when it leaves.
    fn step(&self, cpu: &mut Cpu) -> Step {
        match self.answer(cpu.run()) {
            Step::Came(Some(Stop::End(Ending::Crashed(how)))) => {
                let place = place(cpu);
                Step::Came(Some(Stop::End(Ending::Crashed(format!("{how}{place}")))))
            }
            step => step,
        }
    }

    fn answer(&self, exit: Result<VcpuExit<'_>, kvm_ioctls::Error>) -> Step {
        let memory = self.vm.memory();
        let crashed = |how: String| Some(Stop::End(Ending::Crashed(how)));
        Step::Came(match exit {
            Ok(VcpuExit::IoOut(port, data)) => self.bus.write_port(port, data).map(Stop::End),
            Ok(VcpuExit::IoIn(port, data)) => {
                self.bus.read_port(port, data);
                None
            }
            Ok(VcpuExit::MmioRead(at, data)) => match in_memory(memory, at) {
                None => {
                    self.bus.read(at, data);
                    None
                }
                some => some,
            },
            Ok(VcpuExit::MmioWrite(at, data)) => match in_memory(memory, at) {
                None => {
                    self.bus.write(at, data);
                    None
                }
                some => some,
            },
            Ok(VcpuExit::Intr) => return Step::Called,
            Ok(VcpuExit::Shutdown) => crashed("a fault while it handled a fault (triple fault)".into()),
            Ok(VcpuExit::MemoryFault { gpa, .. }) => Some(Stop::Stick(Stuck { what: page(gpa), for_good: false })),
            Ok(VcpuExit::FailEntry(reason, _)) => crashed(format!("KVM could not enter it: {reason:#x}")),
            Ok(exit) => crashed(format!("it left to KVM for a reason that has no answer: {exit:?}")),
            Err(error) => match error.errno() {
                libc::EINTR => return Step::Called,
                libc::EAGAIN => None,
                libc::EFAULT => {
                    let what = "the host cannot bring a page of it".into();
                    Some(Stop::Stick(Stuck { what, for_good: false }))
                }
                _ => crashed(format!("KVM failed: {error}")),
            },
        })
    }
}

/// What came of entering the guest.
enum Step {
    /// It was called back.
    Called,
    /// It left by itself, which was answered or stops it.
    Came(Option<Stop>),
}

/// What stops the guest on all processors.
enum Stop {
    End(Ending),
    Stick(Stuck),
}

/// Says where the guest is.
fn place(cpu: &mut Cpu) -> String {
    let (Ok(registers), Ok(system)) = (cpu.get_regs(), cpu.get_sregs()) else { return String::new() };
    let run = cpu.get_kvm_run();
    let code = run.exit_reason;
    format!(
        ", at {:#x}:{:#x} (cr0 {:#x}, cr3 {:#x}, cr4 {:#x}, efer {:#x}; exit {code})",
        system.cs.selector, registers.rip, system.cr0, system.cr3, system.cr4, system.efer
    )
}

fn in_memory(memory: &Memory, at: u64) -> Option<Stop> {
    memory.address_in_range(GuestAddress(at)).then(|| Stop::Stick(Stuck { what: page(at), for_good: true }))
}

fn page(at: u64) -> String {
    format!("the page at {:#x} of the guest", at & !0xfff)
}
