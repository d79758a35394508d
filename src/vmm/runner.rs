//! A defined machine from its start to its end: through reboots, with its console kept.
//!
//! # Rules
//! 1. A reboot is a new machine on the same disks; a pause lasts through it.
//! 2. What the guest says goes to `console.log` and to whoever started it. A log that cannot be written is told of once, and
//!    the guest runs on.
//! 3. Asked to stop, the guest is asked in turn (the power button); asked again, or when it takes longer than whoever asked
//!    has patience for, it ends as by a power cut.
//! 4. Everything is opened when it is made. [`Runner::confine`] gives up rights after that, and reboots need none.
//! 5. Disks are looked at every second: a guest is told when one has grown.
//! 6. A disk of the pool may wait for its server. The machine is paused and goes on all the same, and ending it ends the
//!    waiting.

use std::fs::File;
use std::io::{self, Seek, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::home::{Definition, DiskDefinition, DiskSource, Home, HomeLock};
use super::serial::BACKLOG;
use super::{DiskSettings, Ending, FileDisk, Log, Machine, Means, Settings};
use crate::disk::BlockDevice;
use crate::error::{Error, Kind, Result};
use crate::media::socket::Socket;
use crate::nbd;
use crate::sync::{Condvar, Mutex, MutexGuard};
use crate::sys::process::{self, User};

/// How long a guest that is asked to switch itself off may take.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// How often the files that are disks are looked at.
const LOOK: Duration = Duration::from_secs(1);

/// Bytes of `console.log` at most; a guest that says more begins it anew.
const LOG_MAX: u64 = 16 << 20;

/// What a machine does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// It runs.
    Running,
    /// It stands still.
    Paused,
    /// It was asked to switch itself off.
    Stopping,
    /// It has ended.
    Ended,
}

#[derive(Debug)]
struct Now {
    machine: Option<Arc<Machine>>,
    state: State,
    ending: Option<Ending>,
    /// When a guest that was asked to switch itself off is stopped.
    deadline: Option<Instant>,
}

/// A machine that runs.
#[derive(Debug)]
pub struct Runner {
    home: Home,
    definition: Definition,
    settings: Settings,
    means: Means,
    /// The disks that are files, by their numbers.
    files: Vec<(usize, Arc<FileDisk>)>,
    /// The disks that have a server.
    served: Vec<Served>,
    /// Whose rights the process will have.
    user: Option<User>,
    serial: Arc<Socket>,
    log: Mutex<Option<File>>,
    now: Mutex<Now>,
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

/// What is told about a machine.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Info {
    /// Its name.
    pub name: String,
    /// What it does.
    pub state: State,
    /// How it ended, in words.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ending: Option<String>,
    /// The process that runs it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pid: Option<i32>,
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
        Ok(Self { name, state: State::Ended, ending: None, pid: None, waits_for_server: false, definition })
    }
}

impl Runner {
    /// Prepares a machine: opens its disks, those of the pool with `open`, and all else, makes it once to see that it can be
    /// made, and makes the socket of its serial port.
    ///
    /// # Errors
    /// `Busy` when a disk is in use, and what [`Machine::new`] finds.
    pub fn new(home: Home, definition: Definition, lock: HomeLock, open: &OpenDisk<'_>) -> Result<Self> {
        let user = definition.user.as_deref().map(find_user).transpose()?;
        let (mut disks, mut files, mut served) = (Vec::new(), Vec::new(), Vec::new());
        for disk in &definition.disks {
            let device: Arc<dyn BlockDevice> = match disk.source()? {
                DiskSource::File(file) => {
                    let file = Arc::new(FileDisk::open(file, disk.read_only)?);
                    files.push((disks.len(), Arc::clone(&file)));
                    file
                }
                DiskSource::Pool(name) => {
                    let client = Arc::new(open(name, disk)?);
                    let (number, size) = (disks.len(), AtomicU64::new(client.size()));
                    served.push(Served { number, client: Arc::clone(&client), size });
                    client
                }
            };
            disks.push(DiskSettings { device, read_only: disk.read_only, serial: disk.serial.clone() });
        }
        let settings = Settings {
            boot: definition.boot.clone(),
            memory: definition.memory,
            cpus: definition.cpus,
            disks,
            nets: definition.nets.clone(),
            generation: Uuid::new_v4(),
        };
        let means = Means::open(&settings)?.confined()?;
        let machine = Arc::new(Machine::of(&settings, &means)?);
        let serial = Arc::new(Socket::listen(&home.path("serial.sock"), BACKLOG)?);
        machine.serve_serial(&serial)?;
        let log = Mutex::new(open_log(&home));
        let now = Now { machine: Some(machine), state: State::Running, ending: None, deadline: None };
        let (now, changed) = (Mutex::new(now), Condvar::new());
        Ok(Self { home, definition, settings, means, files, served, user, serial, log, now, changed, _lock: lock })
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
                scope.spawn(|| follow(&console, &self.log, show));
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
            self.now.lock().machine = None;
            drop(machine);
            machine = Arc::new(Machine::of(&self.settings, &self.means)?);
            self.now.lock().machine = Some(Arc::clone(&machine));
        }
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
            State::Running | State::Paused => {}
            State::Stopping => return Err(Error::busy("the virtual machine is about to end")),
            State::Ended => return Err(Error::failed("the virtual machine has ended")),
        }
        if let Some(machine) = &now.machine {
            machine.pause();
        }
        now.state = State::Paused;
        Ok(())
    }

    /// Lets the guest go on. One that runs, runs on.
    ///
    /// # Errors
    /// When it has ended.
    pub fn resume(&self) -> Result<()> {
        let mut now = self.now.lock();
        if now.state == State::Ended {
            return Err(Error::failed("the virtual machine has ended"));
        }
        if now.state == State::Paused {
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
        let mut now = self.now.lock();
        if now.state == State::Ended {
            return Err(Error::failed("the virtual machine has ended"));
        }
        // Without a machine it is between two lives: the next is the last.
        if let Some(machine) = &now.machine {
            if patience.is_zero() || now.state == State::Stopping {
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

    /// Ends all waiting for a server: the guest is not to go on.
    fn cancel(&self) {
        self.served.iter().for_each(|disk| disk.client.cancel());
    }

    /// Tells about it.
    pub fn info(&self) -> Info {
        let now = self.now.lock();
        let ending = now.ending.as_ref().or(None).map(ToString::to_string);
        let pid = Some(rustix::process::getpid().as_raw_nonzero().get());
        let (name, definition) = (self.home.name().to_owned(), self.definition.clone());
        let waits_for_server = self.served.iter().any(|disk| disk.client.is_away());
        Info { name, state: now.state, ending, pid, waits_for_server, definition }
    }
}

/// Says that a machine has ended, however that came about: others wait for it.
struct End<'a>(&'a Runner);

impl Drop for End<'_> {
    fn drop(&mut self) {
        let mut now = self.0.now.lock();
        (now.state, now.machine) = (State::Ended, None);
        drop(now);
        self.0.changed.notify_all();
        // Nobody asks for anything any more, and whoever ends the disks is not one that went away.
        self.0.cancel();
        // Others may keep the value to the end of the process.
        self.0.serial.remove();
    }
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

fn open_log(home: &Home) -> Option<File> {
    let path = home.path("console.log");
    let opened = File::options().write(true).create(true).truncate(true).mode(0o600).open(&path);
    opened.map_err(|e| tracing::warn!("cannot write {}: {e}", path.display())).ok()
}

/// Writes what a guest says, until it ends.
fn follow(console: &Log, log: &Mutex<Option<File>>, show: &impl Fn(&[u8])) {
    let mut next = 0;
    while let Some(part) = console.part(next) {
        next = part.start + part.bytes.len() as u64;
        show(&part.bytes);
        let mut log = log.lock();
        if let Some(file) = &mut *log
            && let Err(error) = write_log(file, &part.bytes)
        {
            tracing::warn!("console.log is not written any more: {error}");
            *log = None;
        }
    }
}

/// Writes to the end of a log, which begins anew when it is full.
fn write_log(file: &mut File, bytes: &[u8]) -> io::Result<()> {
    if file.stream_position()? + bytes.len() as u64 > LOG_MAX {
        file.set_len(0)?;
        file.rewind()?;
    }
    file.write_all(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_that_talks_for_ever_does_not_fill_the_host() {
        let mut file = tempfile::tempfile().unwrap();
        let part = vec![b'x'; 1 << 20];
        for _ in 0..LOG_MAX / (1 << 20) {
            write_log(&mut file, &part).unwrap();
        }
        assert_eq!(file.metadata().unwrap().len(), LOG_MAX);
        write_log(&mut file, b"more").unwrap();
        assert_eq!(file.metadata().unwrap().len(), 4);
    }
}
