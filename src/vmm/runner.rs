//! A defined machine from its start to its end: through reboots, with its console kept.
//!
//! # Rules
//! 1. A reboot is a new machine on the same disks; a pause lasts through it.
//! 2. What the guest says goes to `console.log` and to whoever started it.
//! 3. Asked to stop, the guest is asked in turn (the power button); asked again, or when it takes longer than whoever asked
//!    has patience for, it ends as by a power cut.
//! 4. Everything is opened when it is made. [`Runner::confine`] gives up rights after that, and reboots need none.
//! 5. Disks are looked at every second: a guest is told when one has grown.
//! 6. A guest whose memory cannot be had stands still, and everything else goes on: it can be looked at, told to try again,
//!    and always be ended.
//! 7. A disk of the pool may wait for its server. The machine is paused and goes on all the same, and ending it ends the
//!    waiting.

use std::fs::File;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::console_log;
use super::home::{Definition, DiskDefinition, DiskSource, Home, HomeLock};
use super::instant::Disks;
use super::restore::{Filling, MemoryInfo, Restore};
use super::serial::BACKLOG;
use super::{DiskSettings, Ending, FileDisk, Machine, Means, Settings, Stuck};
use crate::checkpoint::{Folder, Name, Sizes};
use crate::disk::BlockDevice;
use crate::error::{Error, Kind, Result};
use crate::media::socket::Socket;
use crate::media::{HostMedia, Media};
use crate::memory::{SaveFigures, Watch};
use crate::nbd;
use crate::sync::{Condvar, Mutex, MutexGuard};
use crate::sys::process::{self, User};
use crate::sys::userfaultfd::Userfault;

/// How long a guest that is asked to switch itself off may take.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// How often the files that are disks are looked at.
const LOOK: Duration = Duration::from_secs(1);

/// What a machine does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// It runs.
    Running,
    /// It stands still.
    Paused,
    /// A page of its memory cannot be had: it stands still until it is told to try again, or is ended.
    MemoryError,
    /// It was asked to switch itself off.
    Stopping,
    /// It has ended.
    Ended,
}

#[derive(Debug)]
pub(super) struct Now {
    pub(super) machine: Option<Arc<Machine>>,
    /// Made when the first checkpoint is, or when the memory comes from one.
    pub(super) watch: Option<Arc<Watch>>,
    pub(super) state: State,
    ending: Option<Ending>,
    /// When a guest that was asked to switch itself off is stopped.
    deadline: Option<Instant>,
}

impl Now {
    /// Tells why the guest stands still though nobody paused it.
    fn stuck(&self) -> Option<Stuck> {
        self.machine.as_ref().and_then(|machine| machine.stuck())
    }
}

/// A machine that runs.
#[derive(Debug)]
pub struct Runner {
    pub(super) home: Home,
    pub(super) definition: Definition,
    pub(super) settings: Settings,
    means: Means,
    /// The disks that are files, by their numbers.
    files: Vec<(usize, Arc<FileDisk>)>,
    /// The disks that have a server.
    served: Vec<Served>,
    /// Whoever takes snapshots of them.
    pub(super) disks: Arc<dyn Disks>,
    /// Where its checkpoints are.
    pub(super) folder: Folder,
    /// What watches its memory, or why nothing can.
    faults: Result<Userfault>,
    /// The checkpoint that the next can be based on. Who makes one has the lock.
    pub(super) last: Mutex<Option<Name>>,
    /// How a checkpoint that is being made is going.
    pub(super) saving: Mutex<Option<SaveFigures>>,
    /// Memory that comes from a checkpoint.
    pub(super) filling: Mutex<Option<Filling>>,
    /// Whose rights the process will have.
    user: Option<User>,
    serial: Arc<Socket>,
    log: Mutex<Option<File>>,
    pub(super) now: Mutex<Now>,
    changed: Condvar,
    _lock: HomeLock,
}

/// A disk that has a server.
#[derive(Debug)]
struct Served {
    /// Its number.
    number: usize,
    client: Arc<nbd::Client>,
    /// Its size when it was looked at last.
    size: AtomicU64,
}

impl Served {
    fn look(&self) -> bool {
        let size = self.client.size();
        self.size.swap(size, Ordering::Relaxed) != size
    }
}

/// Opens a disk of the pool for a machine.
pub type OpenDisk<'a> = dyn Fn(&str, &DiskDefinition) -> Result<nbd::Client> + 'a;

/// What a machine has of the pool it is in.
#[derive(Clone)]
pub struct Pool<'a> {
    /// Opens its disks.
    pub open: &'a OpenDisk<'a>,
    /// Takes snapshots of them.
    pub disks: Arc<dyn Disks>,
}

impl std::fmt::Debug for Pool<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pool").field("disks", &self.disks).finish_non_exhaustive()
    }
}

/// How a machine begins.
#[derive(Debug)]
pub enum Begin<'a> {
    /// With its kernel.
    Boot,
    /// Where a checkpoint was made.
    Restore(Box<Restore<'a>>),
}

impl Begin<'_> {
    /// Finds what is in the way, as far as that can be looked at, and has the disks made ready.
    fn prepare(self, settings: &Settings, means: &Means, faults: &Result<Userfault>) -> Result<Self> {
        let Self::Restore(mut restore) = self else { return Ok(self) };
        restore.check(settings, means, faults)?;
        std::mem::replace(&mut restore.ready, Box::new(|| Ok(())))()?;
        Ok(Self::Restore(restore))
    }
}

/// The disks of a machine.
struct Opened {
    disks: Vec<DiskSettings>,
    files: Vec<(usize, Arc<FileDisk>)>,
    served: Vec<Served>,
}

/// What is told about a machine.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Info {
    /// Its name.
    pub name: String,
    /// What it does.
    pub state: State,
    /// How it ended, or why it stands still, in words.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ending: Option<String>,
    /// The process that runs it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pid: Option<i32>,
    /// Where its memory comes from, if it is not where it began.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<MemoryInfo>,
    /// How a checkpoint that is being made is going.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub saving: Option<SaveFigures>,
    /// A disk of it waits for the server of the pool.
    #[serde(default)]
    pub waits_for_server: bool,
    /// What it is made of.
    pub definition: Definition,
}

impl Info {
    /// Tells about a machine that nobody runs.
    ///
    /// # Errors
    /// When its definition cannot be read.
    pub fn of_stopped(home: &Home) -> Result<Self> {
        let (name, definition) = (home.name().to_owned(), home.definition()?);
        Ok(Self {
            name,
            state: State::Ended,
            ending: None,
            pid: None,
            memory: None,
            saving: None,
            waits_for_server: false,
            definition,
        })
    }
}

impl Runner {
    /// Prepares a machine: opens its disks, those of the pool with `pool`, and all else, makes it once to see that it can be
    /// made, and makes the socket of its serial port.
    ///
    /// # Errors
    /// `Busy` when a disk is in use, and what [`Machine::new`] finds.
    pub fn new(home: Home, definition: Definition, lock: HomeLock, pool: Pool<'_>, begin: Begin<'_>) -> Result<Self> {
        let user = definition.user.as_deref().map(find_user).transpose()?;
        let folder = open_folder(&home, user)?;
        let mut settings = Settings {
            boot: definition.boot.clone(),
            memory: definition.memory,
            cpus: definition.cpus,
            disks: Vec::new(),
            nets: definition.nets.clone(),
            generation: Uuid::new_v4(),
        };
        let faults = Watch::open();
        let means = match &begin {
            Begin::Boot => Means::open(&settings)?,
            Begin::Restore(_) => Means::open_to_go_on_and_reboot(&settings)?,
        };
        let means = means.confined(Some(folder.as_fd()))?;
        let begin = begin.prepare(&settings, &means, &faults)?;
        let Opened { disks, files, served } = open_disks(&definition, pool.open)?;
        settings.disks = disks;
        let (machine, watch, filling) = match begin {
            Begin::Boot => (Arc::new(Machine::of(&settings, &means)?), None, None),
            Begin::Restore(restore) => {
                let faults = faults.as_ref().map_err(Error::again)?;
                let begun = restore.begin(&settings, &means, copy_of(faults)?)?;
                (begun.machine, Some(begun.watch), begun.filling)
            }
        };
        let serial = Arc::new(Socket::listen(&home.path("serial.sock"), BACKLOG)?);
        machine.serve_serial(&serial)?;
        let log = Mutex::new(console_log::open(&home));
        let now = Now { machine: Some(machine), watch, state: State::Running, ending: None, deadline: None };
        let media: Arc<dyn Media> = Arc::new(folder);
        Ok(Self {
            folder: Folder::of_one(&media, home.name()),
            disks: pool.disks,
            faults,
            last: Mutex::new(None),
            saving: Mutex::new(None),
            filling: Mutex::new(filling),
            now: Mutex::new(now),
            changed: Condvar::new(),
            _lock: lock,
            home,
            definition,
            settings,
            means,
            files,
            served,
            user,
            serial,
            log,
        })
    }

    /// Gives up the rights that running the machine does not take, in all threads and for good: becomes the user that the
    /// definition names, and confines the system calls.
    ///
    /// # Errors
    /// When the host does not do it.
    pub fn confine(&self) -> Result<()> {
        if let Some(user) = self.user {
            process::become_user(user).map_err(|e| Error::io("cannot become the user of the virtual machine", e))?;
        }
        self.means.confine()
    }

    /// Runs it to its end. `show` gets what the guest says.
    ///
    /// # Errors
    /// When a socket cannot be made, or the machine not be made again for a reboot.
    pub fn run(&self, show: impl Fn(&[u8]) + Send + Sync) -> Result<Ending> {
        if let Err(error) = crate::sys::process::let_go_of_code() {
            tracing::debug!("the code that was needed to begin with stays in memory: {error}");
        }
        std::thread::scope(|scope| {
            let _end = End(self);
            scope.spawn(|| self.watch());
            scope.spawn(|| self.attend());
            let ended = self.live(&show);
            self.now.lock().ending = ended.as_ref().ok().cloned();
            ended
        })
    }

    fn live(&self, show: &(impl Fn(&[u8]) + Send + Sync)) -> Result<Ending> {
        let mut machine = self.now.lock().machine.clone().expect("made by new");
        loop {
            machine.serve_serial(&self.serial)?;
            let console = machine.console();
            let ending = std::thread::scope(|scope| {
                scope.spawn(|| console_log::follow(&console, &self.log, show));
                {
                    // Under the lock: a pause that came before stays.
                    let now = self.now.lock();
                    if now.state != State::Paused {
                        machine.resume();
                    }
                }
                machine.wait()
            });
            tracing::info!("{ending}");
            if ending != Ending::Reboot || self.now.lock().state == State::Stopping {
                return Ok(ending);
            }
            // The old one must be gone before the new one takes its place: it has the network cards.
            self.let_go();
            drop(machine);
            machine = Arc::new(Machine::of(&self.settings, &self.means)?);
            self.now.lock().machine = Some(Arc::clone(&machine));
        }
    }

    /// Forgets the machine, whose guest has ended, and its memory.
    fn let_go(&self) {
        self.end_filling();
        let mut now = self.now.lock();
        let gone = (now.machine.take(), now.watch.take());
        drop(now);
        drop(gone);
        if let Some(mut last) = self.last.try_lock() {
            *last = None;
        }
    }

    /// Returns the machine, which lives.
    pub(super) fn machine(&self) -> Result<Arc<Machine>> {
        let now = self.now.lock();
        if now.state == State::Ended {
            return Err(Error::failed("the virtual machine has ended"));
        }
        now.machine.clone().ok_or_else(|| Error::busy("the guest reboots").hint("try again"))
    }

    /// Returns what watches the memory of the machine; it is made the first time.
    pub(super) fn watched(&self, machine: &Arc<Machine>) -> Result<Arc<Watch>> {
        let mut now = self.now.lock();
        if !now.machine.as_ref().is_some_and(|current| Arc::ptr_eq(current, machine)) {
            return Err(Error::busy("the guest reboots").hint("try again"));
        }
        if now.watch.is_none() {
            let faults = copy_of(self.faults.as_ref().map_err(Error::again)?)?;
            now.watch = Some(Arc::new(Watch::new(faults, machine.memory(), Sizes::USUAL)?));
        }
        Ok(Arc::clone(now.watch.as_ref().expect("it was just made")))
    }

    /// Looks after the machine until it has ended: at its disks, and at how long it takes to switch itself off.
    fn watch(&self) {
        let mut now = self.now.lock();
        while now.state != State::Ended {
            let next = crate::clock::now() + LOOK;
            let next = now.deadline.map_or(next, |deadline| deadline.min(next));
            self.changed.wait_until(&mut now, next);
            if now.deadline.is_some_and(|deadline| crate::clock::now() >= deadline)
                && let Some(machine) = &now.machine
            {
                tracing::warn!("the guest does not switch itself off; it is stopped");
                self.cancel();
                machine.stop();
                now.deadline = None;
            }
            // The file system of a disk may take its time, and is not waited for under the lock.
            let grown = MutexGuard::unlocked(&mut now, || self.changed_disks());
            if let Some(machine) = &now.machine {
                grown.into_iter().for_each(|number| machine.resized(number));
            }
        }
    }

    /// Returns the numbers of the disks that have another size than before.
    fn changed_disks(&self) -> Vec<usize> {
        let changed = |(number, file): &(usize, Arc<FileDisk>)| match file.look() {
            Ok(changed) => changed.then_some(*number),
            Err(error) => {
                tracing::debug!("disk {number}: {error}");
                None
            }
        };
        let served = self.served.iter().filter(|disk| disk.look()).map(|disk| disk.number);
        self.files.iter().filter_map(changed).chain(served).collect()
    }

    /// Stops the guest where it is. One that stands still already stays so.
    ///
    /// # Errors
    /// When it has ended, or is ending.
    pub fn pause(&self) -> Result<()> {
        let mut now = self.now.lock();
        match now.state {
            State::Running | State::Paused | State::MemoryError => {}
            State::Stopping => return Err(Error::busy("the virtual machine is about to end")),
            State::Ended => return Err(Error::failed("the virtual machine has ended")),
        }
        if let Some(stuck) = now.stuck() {
            return Err(self.cannot_be_had(&stuck));
        }
        if let Some(machine) = &now.machine {
            machine.pause_unless_stuck().map_err(|stuck| self.cannot_be_had(&stuck))?;
        }
        now.state = State::Paused;
        Ok(())
    }

    /// Lets the guest go on. One that runs, runs on. One whose memory cannot be had tries again if it is to `retry`.
    ///
    /// # Errors
    /// When it has ended, and when its memory cannot be had.
    pub fn resume(&self, retry: bool) -> Result<()> {
        let mut now = self.now.lock();
        if now.state == State::Ended {
            return Err(Error::failed("the virtual machine has ended"));
        }
        if let Some(stuck) = now.stuck() {
            if !retry || stuck.for_good {
                return Err(self.cannot_be_had(&stuck));
            }
            // In this order: what fails again at once makes the guest stand still again, and that is not to be undone.
            if let Some(machine) = &now.machine {
                machine.retry();
            }
            if let Some(filling) = &*self.filling.lock() {
                filling.restorer.retry();
            }
            now.state = if now.state == State::Stopping { State::Stopping } else { State::Running };
        } else if now.state == State::Paused {
            now.state = State::Running;
            if let Some(machine) = &now.machine {
                machine.resume();
            }
        }
        Ok(())
    }

    /// Asks the guest to switch itself off, at first, and ends it as by a power cut when it takes longer than `patience`;
    /// asked again, or without patience, does that at once.
    ///
    /// # Errors
    /// When it has ended.
    pub fn stop(&self, patience: Duration) -> Result<()> {
        if patience.is_zero() {
            // Before the lock: a pause may have it, and wait for the host.
            self.cancel();
        }
        self.poison(patience.is_zero());
        let mut now = self.now.lock();
        if now.state == State::Ended {
            return Err(Error::failed("the virtual machine has ended"));
        }
        // Without a machine it is between two lives: the next is the last.
        if let Some(machine) = &now.machine {
            if let Some(stuck) = machine.stuck() {
                // It does not hear a button.
                self.cancel();
                machine.give_up(stuck);
            } else if patience.is_zero() || now.state == State::Stopping {
                self.cancel();
                machine.stop();
            } else {
                machine.resume();
                machine.press_power_button();
                now.deadline = Some(crate::clock::now() + patience);
            }
        }
        now.state = State::Stopping;
        drop(now);
        self.changed.notify_all();
        Ok(())
    }

    pub(super) fn cannot_be_had(&self, stuck: &Stuck) -> Error {
        let name = self.home.name();
        let hint = if stuck.for_good {
            format!("'afterimage vm stop {name}' ends it")
        } else {
            format!("'afterimage vm resume {name} --retry' reads it again, 'afterimage vm stop {name}' ends the guest")
        };
        Error::corrupt(format!("memory of the virtual machine {name} cannot be had: {}", stuck.what)).hint(hint)
    }

    /// Ends all waiting for a server: the guest is not to go on.
    fn cancel(&self) {
        self.served.iter().for_each(|disk| disk.client.cancel());
    }

    /// Tells about it.
    pub fn info(&self) -> Info {
        let now = self.now.lock();
        let stuck = now.stuck();
        let state = if stuck.is_some() { State::MemoryError } else { now.state };
        let why = stuck.map(|stuck| format!("memory of the guest cannot be had: {}", stuck.what));
        let ending = now.ending.as_ref().map(ToString::to_string).or(why);
        let pid = Some(rustix::process::getpid().as_raw_nonzero().get());
        let (name, definition) = (self.home.name().to_owned(), self.definition.clone());
        let memory = self.filling.lock().as_ref().map(Filling::info);
        let saving = *self.saving.lock();
        let waits_for_server = self.served.iter().any(|disk| disk.client.is_away());
        Info { name, state, ending, pid, memory, saving, waits_for_server, definition }
    }
}

/// Says that a machine has ended, however that came about: others wait for it.
struct End<'a>(&'a Runner);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.now.lock().state = State::Ended;
        self.0.let_go();
        self.0.changed.notify_all();
        // Nobody asks for anything any more, and whoever ends the disks is not one that went away.
        self.0.cancel();
        // Others may keep the value to the end of the process.
        self.0.serial.remove();
    }
}

/// Opens the folder of the checkpoints of a machine, which is its own also when it runs as somebody else.
fn open_folder(home: &Home, user: Option<User>) -> Result<HostMedia> {
    let path = home.checkpoints()?;
    let cannot = |e| Error::io(format!("cannot open {}", path.display()), e);
    let folder = HostMedia::new(&path).map_err(cannot)?;
    if let Some(user) = user {
        process::give_to(&folder, user).map_err(cannot)?;
    }
    Ok(folder)
}

/// Returns another descriptor of what watches memory: each machine has its own.
fn copy_of(faults: &Userfault) -> Result<Userfault> {
    faults.try_clone().map_err(|e| Error::io("the memory of the guest cannot be watched", e))
}

fn open_disks(definition: &Definition, open: &OpenDisk<'_>) -> Result<Opened> {
    let mut opened = Opened { disks: Vec::new(), files: Vec::new(), served: Vec::new() };
    for disk in &definition.disks {
        let device: Arc<dyn BlockDevice> = match disk.source()? {
            DiskSource::File(file) => {
                let file = Arc::new(FileDisk::open(file, disk.read_only)?);
                opened.files.push((opened.disks.len(), Arc::clone(&file)));
                file
            }
            DiskSource::Pool(name) => {
                let client = Arc::new(open(name, disk)?);
                let (number, size) = (opened.disks.len(), AtomicU64::new(client.size()));
                opened.served.push(Served { number, client: Arc::clone(&client), size });
                client
            }
        };
        opened.disks.push(DiskSettings { device, read_only: disk.read_only, serial: disk.serial.clone() });
    }
    Ok(opened)
}

fn find_user(name: &str) -> Result<User> {
    let found = process::find_user(name).map_err(|e| Error::io(format!("cannot look for the user {name}"), e))?;
    let user = found.ok_or_else(|| Error::not_found(format!("this host has no user {name}")))?;
    if !rustix::process::geteuid().is_root() {
        return Err(
            Error::new(Kind::Denied, "only root can run a virtual machine as somebody else").hint("leave --user out")
        );
    }
    Ok(user)
}
