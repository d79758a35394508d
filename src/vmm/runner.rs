//! A defined machine from its start to its end: through reboots, with its console kept.
//!
//! # Rules
//! 1. A reboot is a new machine on the same disks; a pause lasts through it.
//! 2. What the guest says goes to `console.log` and to whoever started it. A log that cannot be written is told of once, and
//!    the guest runs on.
//! 3. Asked to stop, the guest is asked in turn (the power button); asked again, or when it takes longer than
//!    [`PATIENCE`], it ends as by a power cut.

use std::fs::File;
use std::io::{self, Seek, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::home::{Definition, Home, HomeLock};
use super::{DiskSettings, Ending, FileDisk, Log, Machine, Settings};
use crate::error::{Error, Result};
use crate::sync::{Condvar, Mutex};

/// How long a guest that is asked to switch itself off may take.
pub const PATIENCE: Duration = Duration::from_secs(60);

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
}

/// A machine that runs.
#[derive(Debug)]
pub struct Runner {
    home: Home,
    definition: Definition,
    settings: Settings,
    now: Mutex<Now>,
    changed: Condvar,
    _lock: HomeLock,
}

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
        Ok(Self { name, state: State::Ended, ending: None, pid: None, definition })
    }
}

impl Runner {
    /// Prepares a machine: takes its lock, opens its disks, and makes it once to see that it can be made.
    ///
    /// # Errors
    /// `Busy` when it runs already or a disk is in use, and what [`Machine::new`] finds.
    pub fn new(home: Home, definition: Definition, lock: HomeLock) -> Result<Self> {
        let mut disks = Vec::new();
        for disk in &definition.disks {
            let device = Arc::new(FileDisk::open(&disk.file, disk.read_only)?);
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
        let machine = Some(Arc::new(Machine::new(&settings)?));
        let now = Mutex::new(Now { machine, state: State::Running, ending: None });
        Ok(Self { home, definition, settings, now, changed: Condvar::new(), _lock: lock })
    }

    /// Makes the socket of the serial port, so that it is there before anybody is told that the guest runs; [`Self::run`]
    /// does it otherwise.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn serve_serial(&self) -> Result<()> {
        let machine = self.now.lock().machine.clone();
        machine.map_or(Ok(()), |machine| machine.serve_serial(&self.home.path("serial.sock")))
    }

    /// Runs it to its end. `show` gets what the guest says.
    ///
    /// # Errors
    /// When a socket cannot be made, or the machine not be made again for a reboot.
    pub fn run(&self, show: impl Fn(&[u8]) + Send + Sync) -> Result<Ending> {
        let log = self.open_log();
        let ended = self.live(&log, &show);
        let mut now = self.now.lock();
        (now.state, now.machine) = (State::Ended, None);
        now.ending = ended.as_ref().ok().cloned();
        drop(now);
        self.changed.notify_all();
        ended
    }

    fn live(&self, log: &Mutex<Option<File>>, show: &(impl Fn(&[u8]) + Send + Sync)) -> Result<Ending> {
        let mut machine = self.now.lock().machine.clone().expect("made by new");
        loop {
            machine.serve_serial(&self.home.path("serial.sock"))?;
            let console = machine.console();
            let ending = std::thread::scope(|scope| {
                scope.spawn(move || follow(&console, log, show));
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
            machine = Arc::new(Machine::new(&self.settings)?);
            self.now.lock().machine = Some(Arc::clone(&machine));
        }
    }

    fn open_log(&self) -> Mutex<Option<File>> {
        let path = self.home.path("console.log");
        let opened = File::options().write(true).create(true).truncate(true).mode(0o600).open(&path);
        Mutex::new(opened.map_err(|e| tracing::warn!("cannot write {}: {e}", path.display())).ok())
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

    /// Asks the guest to switch itself off, at first; asked again, or with `force`, ends it as by a power cut.
    ///
    /// # Errors
    /// When it has ended.
    pub fn stop(&self, force: bool) -> Result<()> {
        let mut now = self.now.lock();
        if now.state == State::Ended {
            return Err(Error::failed("the virtual machine has ended"));
        }
        // Without a machine it is between two lives: the next is the last.
        if let Some(machine) = &now.machine {
            if force || now.state == State::Stopping {
                machine.stop();
            } else {
                machine.resume();
                machine.press_power_button();
            }
        }
        now.state = State::Stopping;
        Ok(())
    }

    /// Waits for the end of a guest that was asked to stop; ends it when it does not.
    pub fn wait_for_end(&self) {
        let deadline = crate::clock::now() + PATIENCE;
        let mut now = self.now.lock();
        while now.state != State::Ended {
            let late = self.changed.wait_until(&mut now, deadline).timed_out();
            if late && let Some(machine) = &now.machine {
                tracing::warn!("the guest does not switch itself off; it is stopped");
                machine.stop();
                self.changed.wait(&mut now);
            }
        }
    }

    /// Tells about it.
    pub fn info(&self) -> Info {
        let now = self.now.lock();
        let ending = now.ending.as_ref().or(None).map(ToString::to_string);
        let pid = Some(rustix::process::getpid().as_raw_nonzero().get());
        let (name, definition) = (self.home.name().to_owned(), self.definition.clone());
        Info { name, state: now.state, ending, pid, definition }
    }
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
