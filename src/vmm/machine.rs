//! A virtual machine, put together.
//!
//! # Rules
//! 1. Whatever can be wrong with what is asked for is found before the guest runs.
//! 2. Order down: processors first, devices then, memory last.
//! 3. A reboot is a new machine from the same settings: nothing of the old one is left to be wrong.
//! 4. Memory is guarded before anybody touches it: what cannot be had is an error, and ends no process.

use std::sync::Arc;
use std::time::Duration;

use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQCHIP_IOAPIC, KVM_PIT_SPEAKER_DUMMY, KvmIrqRouting, kvm_irq_routing_entry,
    kvm_irq_routing_irqchip, kvm_pit_config,
};
use kvm_ioctls::{IoEventAddress, Kvm};
use serde::{Deserialize, Serialize};
use uuid::Uuid;
use vm_memory::{Bytes, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use super::boot::{self, Boot};
use super::bus::Bus;
use super::cpuid::Supported;
use super::cpus::Cpus;
use super::ending::{Ending, Stuck};
use super::filter::Confinement;
use super::fit::{self, Shape};
use super::means::Means;
use super::power::{self, Power};
use super::serial::{Log, Serial, SerialSocket, SerialState};
use super::state::{Chips, MachineState};
use super::virtio::{Block, Device, Net, Rng, Transport};
use super::{acpi, layout, memory, virtio};
use crate::clock;
use crate::disk::BlockDevice;
use crate::error::{Error, Kind, Result};
use crate::media::socket::Socket;
use crate::sync::Mutex;
use crate::sys::kvm::{Cpu, Vm};
use crate::sys::shared::Shared as Guard;

/// Processors of a guest at most: numbers of local APICs have eight bits, and the last means all.
const CPUS_MAX: u8 = 254;
/// Inputs of the IO-APIC.
const PINS: u32 = 24;
/// How often devices that are drained are looked at.
const LOOK: Duration = Duration::from_micros(100);

/// What a machine is made of.
#[derive(Debug, Clone)]
pub struct Settings {
    /// What it starts.
    pub boot: Boot,
    /// Bytes of its memory.
    pub memory: u64,
    /// Its processors.
    pub cpus: u8,
    /// Its disks, in order: `/dev/vda`, `/dev/vdb` ...
    pub disks: Vec<DiskSettings>,
    /// Its network cards, in order.
    pub nets: Vec<NetSettings>,
    /// What identifies this life of the machine; a restored one has another.
    pub generation: Uuid,
}

/// A disk of a machine.
#[derive(Debug, Clone)]
pub struct DiskSettings {
    /// Where its blocks are.
    pub device: Arc<dyn BlockDevice>,
    /// The guest cannot change it.
    pub read_only: bool,
    /// What the guest sees as its serial number; cut to 20 bytes.
    pub serial: String,
}

/// A network card of a machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct NetSettings {
    /// The tap of the host that it is plugged into.
    pub tap: String,
    /// Its address.
    pub mac: [u8; 6],
}

/// A virtual machine. Dropping it ends the guest as a power cut does.
#[derive(Debug)]
pub struct Machine {
    // In the order in which they are dropped.
    cpus: Cpus,
    socket: Mutex<Option<SerialSocket>>,
    bus: Arc<Bus>,
    /// Identifies this start of the guest for those who watch it.
    start: Uuid,
    settings: Settings,
    /// It was resumed last, and not paused.
    runs: Mutex<bool>,
    vm: Arc<Vm>,
    kvm: Arc<Kvm>,
}

impl Machine {
    /// Makes a machine, with its kernel in memory and its processors at rest; [`Machine::resume`] starts it.
    ///
    /// # Errors
    /// `Usage` for settings that cannot be, what is wrong with the files, and what the host lacks.
    pub fn new(settings: &Settings) -> Result<Self> {
        check(settings)?;
        Self::of(settings, &Means::open(settings)?)
    }

    /// As [`Machine::new`], of what was opened for these settings.
    ///
    /// # Errors
    /// As [`Machine::new`].
    pub fn of(settings: &Settings, means: &Means) -> Result<Self> {
        let parts = Parts::make(settings, means, None)?;
        let guards = memory::guard(parts.vm.memory())?;
        let memory = parts.vm.memory();
        let tables = acpi::write(memory, settings.cpus, parts.bus.virtio.len())?;
        write_generation(memory, settings.generation)?;
        power::write_firmware(memory)?;
        let files = means.boot.as_ref().ok_or_else(|| Error::failed("a machine that begins needs a kernel"))?;
        let entry = boot::load(&settings.boot, files, memory, settings.memory, tables)?;
        let supported = Supported::ask(&parts.kvm, settings.cpus)?;
        for (index, cpu) in (0..settings.cpus).zip(&parts.cpus) {
            cpu.set_cpuid2(&supported.of(index)).map_err(host)?;
            if index == 0 {
                boot::set_up(cpu, memory, entry)?;
            } else {
                boot::set_up_waiting(cpu)?;
            }
        }
        parts.finish(settings, guards)
    }

    /// Makes a machine in the state that another had, of the same settings. `fill` gives it its memory; the boot of the
    /// settings is not looked at. The guest is told of the generation of the settings before it runs, and its clocks go on
    /// as if it had only not been run meanwhile.
    ///
    /// # Errors
    /// As [`Machine::new`]; `Unsupported` for the state of a machine of other parts and for what this host lacks of what
    /// the guest uses, all of it by name; `Corrupt` for a state that no machine can have; `Io` when memory that it takes
    /// to begin could not be had, and was a bus error instead; what `fill` says.
    pub fn restore(
        settings: &Settings,
        state: &MachineState,
        fill: impl FnOnce(&GuestMemoryMmap<()>) -> Result<()>,
    ) -> Result<Self> {
        Self::go_on(settings, &Means::open_to_go_on(settings)?, state, fill)
    }

    /// As [`Machine::restore`], of what was opened for these settings.
    ///
    /// # Errors
    /// As [`Machine::restore`].
    pub fn go_on(
        settings: &Settings,
        means: &Means,
        state: &MachineState,
        fill: impl FnOnce(&GuestMemoryMmap<()>) -> Result<()>,
    ) -> Result<Self> {
        let parts = Parts::make(settings, means, Some(&state.serial))?;
        fit::check(state, settings, &parts.kvm, &parts.cpus)?;
        if state.cpus.len() != parts.cpus.len() || state.virtio.len() != parts.bus.virtio.len() {
            return Err(Error::corrupt("the state is that of a machine with other processors or devices"));
        }
        // From here on memory may come as it is touched, or not.
        let guards = memory::guard(parts.vm.memory())?;
        fill(parts.vm.memory())?;
        write_generation(parts.vm.memory(), settings.generation)?;
        state.chips.set_clock(&parts.vm)?;
        let later = state.chips.later();
        for (cpu, state) in parts.cpus.iter().zip(&state.cpus) {
            state.set(cpu, later)?;
        }
        state.chips.set(&parts.vm)?;
        for (device, state) in parts.bus.virtio.iter().zip(&state.virtio) {
            device.lock().restore(state)?;
        }
        parts.bus.power.tell(state.events | power::GENERATION);
        parts.bus.serial.call_again();
        if guards.iter().any(Guard::is_lost) {
            return Err(Error::new(Kind::Io, "memory that the guest needs to go on cannot be had"));
        }
        parts.finish(settings, guards)
    }

    /// Returns the state of a machine that is paused, but not its memory.
    ///
    /// # Errors
    /// When the guest has ended, which it may have just before the pause: such a one has nothing to go on with. Those of KVM.
    pub fn state(&self) -> Result<MachineState> {
        if let Some(ending) = self.ending() {
            return Err(Error::failed(format!("a guest that has ended has no state to go on from: {ending}")));
        }
        if let Some(Stuck { what, .. }) = self.stuck() {
            return Err(Error::failed(format!("a guest whose memory cannot be had cannot be saved: {what}")));
        }
        let list = self.kvm.get_msr_index_list().map_err(host)?;
        Ok(MachineState {
            shape: Shape::of(&self.settings),
            cpus: self.cpus.states(list.as_slice())?,
            chips: Chips::of(&self.vm)?,
            serial: self.bus.serial.state(),
            events: self.bus.power.events(),
            virtio: self.bus.virtio.iter().map(|device| device.lock().state()).collect(),
        })
    }

    /// Returns the memory of the guest.
    #[must_use]
    pub fn memory(&self) -> &GuestMemoryMmap<()> {
        self.vm.memory()
    }

    /// Shows the serial port at a socket, if it is not shown yet.
    ///
    /// # Errors
    /// Those of the host.
    pub fn serve_serial(&self, socket: &Arc<Socket>) -> Result<()> {
        let mut served = self.socket.lock();
        if served.is_none() {
            *served = Some(SerialSocket::serve(socket, Arc::clone(&self.bus), self.start)?);
        }
        Ok(())
    }

    /// Tells the guest that a disk has another size now.
    pub fn resized(&self, disk: usize) {
        // Disks come first among the devices.
        if let Some(device) = self.bus.virtio.get(disk) {
            device.lock().changed();
        }
    }

    /// Returns what the guest says on its serial port.
    #[must_use]
    pub fn console(&self) -> Arc<Log> {
        Arc::clone(self.bus.serial.log())
    }

    /// Types on the serial port.
    pub fn type_in(&self, bytes: &[u8]) {
        self.bus.serial.type_in(bytes);
    }

    /// Lets the guest run, at first or after a pause.
    pub fn resume(self: &Arc<Self>) {
        self.let_run(Cpus::run);
    }

    /// As [`Machine::resume`]; a guest that is stuck for want of memory tries again.
    pub fn retry(self: &Arc<Self>) {
        self.let_run(Cpus::retry);
    }

    fn let_run(self: &Arc<Self>, run: impl FnOnce(&Cpus)) {
        *self.runs.lock() = true;
        // The guest first: what it asks of a device before that works waits in its queue.
        run(&self.cpus);
        if self.is_drained() {
            self.bus.virtio.iter().for_each(|device| device.lock().resume());
        } else if let Err(error) = self.work_on() {
            // One that has not ended what it took may wait for the very memory that somebody is about to bring.
            tracing::error!("{error}");
        }
    }

    fn is_drained(&self) -> bool {
        self.bus.virtio.iter().all(|device| device.lock().can_work())
    }

    /// Stops the guest and its devices. When this returns, nothing is half done; the guest may have ended meanwhile.
    pub fn pause(&self) {
        *self.runs.lock() = false;
        self.cpus.pause();
        self.bus.virtio.iter().for_each(|device| device.lock().pause());
    }

    /// As [`Machine::pause`], but does not wait for memory that cannot be had.
    ///
    /// # Errors
    /// Why the guest is stuck: then it stands still anyway.
    pub fn pause_unless_stuck(&self) -> Result<(), Stuck> {
        *self.runs.lock() = false;
        self.cpus.pause_unless_stuck()?;
        self.bus.virtio.iter().for_each(|device| device.lock().drain());
        while !self.bus.virtio.iter().all(|device| device.lock().is_drained()) {
            // A device touches memory as well.
            if let Some(stuck) = self.stuck() {
                return Err(stuck);
            }
            clock::sleep(LOOK);
        }
        self.bus.virtio.iter().for_each(|device| device.lock().pause());
        Ok(())
    }

    /// Has the devices finish what they took and take nothing more, while the guest runs: a pause after that waits for
    /// nobody. Devices work again when the machine is resumed.
    ///
    /// # Errors
    /// `Busy` when that takes longer than `patience`: the devices work on then, each as soon as it has finished what it took.
    pub fn drain(self: &Arc<Self>, patience: Duration) -> Result<()> {
        self.bus.virtio.iter().for_each(|device| device.lock().drain());
        let until = clock::now() + patience;
        while !self.bus.virtio.iter().all(|device| device.lock().is_drained()) {
            if clock::now() >= until || self.stuck().is_some() {
                self.work_on()?;
                let what = format!("a request to a disk takes longer than {} ms", patience.as_millis());
                return Err(Error::busy(what).hint("try again; the log says what the disk waits for"));
            }
            clock::sleep(LOOK);
        }
        Ok(())
    }

    /// Lets devices that were being drained work on, each when it has finished what it took. That may take as long as
    /// whatever it waits for, so nobody waits for it here.
    fn work_on(self: &Arc<Self>) -> Result<()> {
        let machine = Arc::downgrade(self);
        let body = move || {
            let mut left: Vec<usize> = machine.upgrade().map_or_else(Vec::new, |m| (0..m.bus.virtio.len()).collect());
            // Nobody waits for this thread either, and it keeps no machine alive.
            while !left.is_empty()
                && let Some(machine) = machine.upgrade()
            {
                let runs = machine.runs.lock();
                left.retain(|index| *runs && !machine.bus.virtio[*index].lock().work_on());
                drop(runs);
                drop(machine);
                clock::sleep(LOOK);
            }
        };
        let started = std::thread::Builder::new().name("work-on".into()).spawn(body);
        started.map(drop).map_err(|e| Error::io("no thread to let the devices of the guest work on", e))
    }

    /// Presses the power button; what comes of it is up to the guest.
    pub fn press_power_button(&self) {
        self.bus.power.tell(power::BUTTON);
    }

    /// Ends the guest as a power cut does.
    pub fn stop(&self) {
        self.cpus.end(Ending::Stopped);
    }

    /// Waits until the guest has ended, and returns how. Requests that its disks had taken are done then.
    #[must_use]
    pub fn wait(&self) -> Ending {
        let ending = self.cpus.wait();
        self.bus.virtio.iter().for_each(|device| device.lock().pause());
        self.bus.serial.log().close();
        ending
    }

    /// Stops the guest for want of a page of its memory, and returns at once: a processor that waits for it in the kernel
    /// stays there until the page comes. [`Machine::resume`] lets the guest try again.
    pub fn stick(&self, stuck: Stuck) {
        self.cpus.stick(stuck);
    }

    /// Returns which page of its memory the guest waits for; `None` when it does not.
    #[must_use]
    pub fn stuck(&self) -> Option<Stuck> {
        self.cpus.stuck()
    }

    /// Ends a guest whose memory cannot be had, as a power cut does.
    pub fn give_up(&self, stuck: Stuck) {
        self.cpus.end(Ending::MemoryError(stuck.what));
    }

    /// Returns how the guest has ended; `None` while it lives.
    #[must_use]
    pub fn ending(&self) -> Option<Ending> {
        self.cpus.ending()
    }
}

/// What a machine is put together from, before it has a state.
struct Parts {
    kvm: Arc<Kvm>,
    confinement: Confinement,
    vm: Arc<Vm>,
    bus: Arc<Bus>,
    cpus: Vec<Cpu>,
}

fn host(error: kvm_ioctls::Error) -> Error {
    Error::io("KVM cannot make a machine", error.into())
}

impl Parts {
    fn make(settings: &Settings, means: &Means, serial: Option<&SerialState>) -> Result<Self> {
        check(settings)?;
        let kvm = Arc::clone(&means.kvm);
        let cpus_max = kvm.get_max_vcpus();
        if usize::from(settings.cpus) > cpus_max {
            return Err(Error::usage(format!(
                "a guest cannot have {} processors here: KVM takes {cpus_max} at most",
                settings.cpus
            )));
        }
        let memory = memory::make(settings.memory)?;
        let fd = kvm.create_vm().map_err(host)?;
        fd.set_identity_map_address(layout::IDENTITY_MAP).map_err(host)?;
        fd.set_tss_address(layout::TASK_STATE).map_err(host)?;
        fd.create_irq_chip().map_err(host)?;
        fd.create_pit2(kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..kvm_pit_config::default() }).map_err(host)?;
        fd.set_gsi_routing(&routes()?).map_err(host)?;
        let vm = Vm::new(fd, memory).map_err(|e| Error::io("KVM does not take the memory of the guest", e))?;
        let bus = Arc::new(make_bus(settings, means, &vm, serial)?);
        let cpu = |index| vm.cpu(u64::from(index)).map_err(|e| Error::io("KVM cannot make a processor", e));
        let cpus = (0..settings.cpus).map(cpu).collect::<Result<Vec<_>>>()?;
        Ok(Self { kvm, confinement: means.confinement.clone(), vm, bus, cpus })
    }

    fn finish(self, settings: &Settings, guards: Vec<Guard>) -> Result<Machine> {
        let Self { kvm, confinement, vm, bus, cpus } = self;
        let cpus = Cpus::start(&vm, cpus, Arc::clone(&bus), guards, &confinement)?;
        let (socket, start, settings) = (Mutex::new(None), Uuid::new_v4(), settings.clone());
        Ok(Machine { cpus, socket, bus, start, settings, runs: Mutex::new(false), vm, kvm })
    }
}

fn check(settings: &Settings) -> Result<()> {
    if !(1..=CPUS_MAX).contains(&settings.cpus) {
        return Err(Error::usage(format!(
            "a guest cannot have {} processors: it takes 1 to {CPUS_MAX}",
            settings.cpus
        )));
    }
    let devices = settings.disks.len() + settings.nets.len() + 1;
    if devices > layout::VIRTIO_MAX {
        let most = layout::VIRTIO_MAX - 1;
        return Err(Error::usage(format!(
            "{} disks and network cards are too many: a guest takes {most} of them",
            devices - 1
        )));
    }
    Ok(())
}

/// Interrupts go to the IO-APIC alone. There is a PIC in KVM, too, which would send them a second time from the start; the
/// tables say that there is none.
fn routes() -> Result<KvmIrqRouting> {
    let route = |pin| {
        let mut route = kvm_irq_routing_entry { gsi: pin, type_: KVM_IRQ_ROUTING_IRQCHIP, ..Default::default() };
        route.u.irqchip = kvm_irq_routing_irqchip { irqchip: KVM_IRQCHIP_IOAPIC, pin };
        route
    };
    let routes: Vec<_> = (0..PINS).map(route).collect();
    KvmIrqRouting::from_entries(&routes).map_err(|e| Error::failed(format!("no room for interrupts: {e:?}")))
}

fn write_generation(memory: &memory::Memory, generation: Uuid) -> Result<()> {
    let cannot = |e| Error::failed("the generation id does not lie in the memory of the guest").because(e);
    memory.write_slice(generation.as_bytes(), layout::GENERATION).map_err(cannot)
}

fn interrupt(vm: &Vm, irq: u32) -> Result<EventFd> {
    let host = |e| Error::io("no interrupt for a device of the guest", e);
    let line = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(host)?;
    vm.register_irqfd(&line, irq).map_err(|e| host(e.into()))?;
    Ok(line)
}

/// Makes what a virtio device and the guest call each other through.
fn wire(vm: &Vm, index: usize, queues: usize) -> Result<(EventFd, Vec<EventFd>)> {
    let host = |e| Error::io("no notifications for a device of the guest", e);
    let notify = IoEventAddress::Mmio(layout::virtio_base(index) + virtio::NOTIFY);
    let mut kicks = Vec::new();
    for queue in 0..u32::try_from(queues).expect("a handful") {
        let kick = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(host)?;
        vm.register_ioevent(&kick, &notify, queue).map_err(|e| host(e.into()))?;
        kicks.push(kick);
    }
    Ok((interrupt(vm, layout::virtio_irq(index))?, kicks))
}

fn make_bus(settings: &Settings, means: &Means, vm: &Arc<Vm>, state: Option<&SerialState>) -> Result<Bus> {
    let nursery = means.nursery()?;
    let mut devices: Vec<(String, Box<dyn Device>)> = Vec::new();
    let queues = usize::from(settings.cpus);
    for (number, disk) in settings.disks.iter().enumerate() {
        let block = Block::new(Arc::clone(&disk.device), disk.read_only, &disk.serial, queues);
        devices.push((format!("disk-{number}"), Box::new(block)));
    }
    for (number, (net, tap)) in settings.nets.iter().zip(&means.taps).enumerate() {
        devices.push((format!("net-{number}"), Box::new(Net::new(Arc::clone(tap), net.mac))));
    }
    devices.push(("rng".into(), Box::new(Rng)));
    let mut transports = Vec::new();
    for (index, (name, device)) in devices.into_iter().enumerate() {
        let (line, kicks) = wire(vm, index, device.queues().len())?;
        let (memory, nursery) = (vm.memory().clone(), Arc::clone(&nursery));
        transports.push(Mutex::new(Transport::new(device, name, memory, line, kicks, nursery)?));
    }
    let (line, log) = (interrupt(vm, layout::SERIAL_IRQ)?, Arc::new(Log::new()));
    let serial = match state {
        Some(state) => Serial::restore(line, log, state)?,
        None => Serial::new(line, log),
    };
    let power = Power::new(interrupt(vm, layout::EVENT_IRQ)?);
    Ok(Bus { serial, power, virtio: transports })
}
