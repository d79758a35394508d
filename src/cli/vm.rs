//! `vm`: virtual machines of the pool, one process each.
//!
//! # Rules
//! 1. `vm run` and `vm start` are that process. In the foreground they show what the guest says, and their exit code tells
//!    how it ended: 0 when it switched itself off, 1 when it crashed, 5 when its memory could not be had, 7 when it was ended as
//!    by a power cut.
//! 2. With --detach they start it in the background and return when the guest runs; its log is POOL/vms/NAME/vmm.log.
//! 3. Disks of the pool come from its server, which is started if there is none; the pool is never opened here.
//! 4. The first SIGTERM or SIGINT asks the guest to switch itself off, the second ends it; so does the end of its patience.
//! 5. What is defined is what could be started: a definition is kept when the machine has been made, and else the one before.
//! 6. Once all is open the process gives up what rights it does not need.

use std::ffi::OsString;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

use clap::{Args, Subcommand};

use super::screen::Screen;
use super::vm_checkpoint::{Checkpoint, Restore};
use super::vm_disks::Disks;
use super::vm_parts::{parse_disk, parse_net};
use super::{Global, daemon, signal};
use crate::api::machine::{
    Act, Listed, MachineServer, ask_machine, kill_machine, list_machines, tell_machine, wait_for_end,
};
use crate::api::{Failure, Line};
use crate::error::{Error, Kind, Result};
use crate::media::socket::ShortPath;
use crate::units::{parse_size, show_size};
use crate::vmm::{
    Begin, Boot, Definition, DiskDefinition, DiskSource, Ending, Home, HomeLock, Info, PATIENCE, Pool, Runner,
    SERIAL_SOCKET, Show, State,
};

/// Run virtual machines
///
/// A machine boots a Linux kernel (bzImage, or ELF with a PVH entry) directly on KVM. Its devices are virtio over MMIO,
/// which the kernel finds through ACPI; the modules it needs are virtio_mmio, virtio_blk and virtio_net. Each machine is
/// one process and has a folder POOL/vms/NAME with its definition, its sockets and its logs.
///
/// Disks of the pool are had from its server, which vm run and vm start start in the background if there is none; it ends
/// with the last machine. A machine outlives its server: when that is killed, or ends, requests of the guest wait until
/// there is one again (afterimage serve --daemon, or afterimage mount), and are sent again. The disks are kept for the
/// machine for 60 seconds after a server has begun.
///
/// The guest is not trusted, and neither is the process that runs it: when all it needs is open it confines itself to the
/// system calls it needs (seccomp), a set for each kind of thread. Any other ends it, and the log names the call. With --user
/// a process that root started has the rights of somebody else from then on. If it has disks of the pool, a second process
/// keeps those to come back to its server, for these disks alone, and ends with it.
#[derive(Debug, Args)]
pub(super) struct Vm {
    #[command(subcommand)]
    what: VmCommand,
}

/// The exit code of a machine whose guest was ended without its consent. No error has it (see [`Kind::exit_code`]).
const POWER_CUT: u8 = 7;

#[derive(Debug, Subcommand)]
enum VmCommand {
    Run(Run),
    Start(Start),
    Ls(Ls),
    Info(Named),
    Pause(Pause),
    Resume(Resume),
    Stop(Stop),
    Rm(Rm),
    Console(Console),
    Checkpoint(Checkpoint),
    Restore(Restore),
}

/// Define a virtual machine and run it
///
/// In the foreground the exit code tells how the guest ended: 0 when it switched itself off, also when it was asked to; 7 when it
/// was ended without its consent, as by a power cut; 1 when it crashed; 5 when its memory could not be had.
#[derive(Debug, Args)]
struct Run {
    /// Name of the machine; one of that name is defined anew, unless it runs
    name: String,
    /// The kernel: a bzImage (vmlinuz), or an ELF file with a PVH entry
    #[arg(long, value_name = "FILE")]
    kernel: PathBuf,
    /// The initial file system
    #[arg(long, value_name = "FILE")]
    initrd: Option<PathBuf>,
    /// The command line of the kernel
    #[arg(long, value_name = "TEXT", default_value = "console=ttyS0 reboot=k panic=-1")]
    cmdline: String,
    /// A disk; may be given several times
    ///
    /// A name with a slash is a file or a block device. Any other is a disk of the pool, or a snapshot, DISK@SNAPSHOT, which
    /// is read-only. A disk has one writer: one that is in use is refused, with the name of who has it.
    #[arg(long = "disk", value_name = "DISK|FILE[,ro][,serial=S]")]
    disks: Vec<String>,
    /// A network card on a tap of the host; may be given several times
    #[arg(long = "net", value_name = "tap=T[,mac=M]")]
    nets: Vec<String>,
    /// Memory, such as 512M
    #[arg(long, value_name = "SIZE", default_value = "512M")]
    memory: String,
    /// Processors
    #[arg(long, value_name = "N", default_value_t = 1)]
    cpus: u8,
    /// As root: run it with the rights of this user, once all that it needs has been opened
    #[arg(long, value_name = "NAME")]
    user: Option<String>,
    #[command(flatten)]
    how: How,
}

/// Run a virtual machine that is defined
///
/// In the foreground the exit code tells how the guest ended: 0 when it switched itself off, also when it was asked to; 7 when it
/// was ended without its consent, as by a power cut; 1 when it crashed; 5 when its memory could not be had.
#[derive(Debug, Args)]
struct Start {
    /// Name of the machine
    name: String,
    #[command(flatten)]
    how: How,
}

#[derive(Debug, Args)]
struct How {
    /// Run in the background and return when the guest runs
    #[arg(long)]
    detach: bool,
}

/// List the virtual machines of the pool
///
/// One whose process says nothing, because it was stopped or waits for the host, is listed as not-answering; 'vm stop --force'
/// ends it. One whose definition cannot be read is listed as damaged, or as unknown where that is for another reason, with
/// what is wrong with it, and the exit code is that of the error: 5 when it is damaged. The others are listed all the same.
#[derive(Debug, Args)]
struct Ls {}

/// Tell about a virtual machine
#[derive(Debug, Args)]
struct Named {
    /// Name of the machine
    name: String,
}

/// Stop a guest where it is; vm resume lets it go on
#[derive(Debug, Args)]
struct Pause {
    /// Name of the machine
    name: String,
}

/// Let a paused guest go on
///
/// A guest whose memory could not be had stands still in the state memory-error until it is told to try again.
#[derive(Debug, Args)]
struct Resume {
    /// Name of the machine
    name: String,
    /// Read again what of its memory could not be had
    #[arg(long)]
    retry: bool,
}

/// Ask a guest to switch itself off, and wait until it has
///
/// Presses its power button. A guest that takes too long is ended, as by a power cut, and so is one that was asked before.
#[derive(Debug, Args)]
struct Stop {
    /// Name of the machine
    name: String,
    /// End it at once, as by a power cut; kill its process if that does not answer
    #[arg(long)]
    force: bool,
    /// How long the guest may take
    #[arg(long, value_name = "SECONDS", default_value_t = PATIENCE.as_secs().try_into().unwrap_or(u32::MAX))]
    patience: u32,
}

/// Remove a virtual machine that does not run; its disks stay
#[derive(Debug, Args)]
struct Rm {
    /// Name of the machine
    name: String,
}

/// Show and use the serial console of a guest
///
/// Shows what the guest has said, up to a megabyte, and what it says from then on; what comes on stdin is typed. Ends when
/// the guest ends, or with Ctrl-C.
#[derive(Debug, Args)]
struct Console {
    /// Name of the machine
    name: String,
}

impl Vm {
    pub(super) fn run(self, global: &Global, screen: &Screen) -> Result<u8> {
        let pool = crate::api::check_is_pool(global.pool()?)?;
        match self.what {
            VmCommand::Run(run) => {
                let home = Home::of(&pool, &run.name)?;
                let definition = run.definition()?;
                if run.how.detach && !daemon::is_child() {
                    home.make()?;
                    // The background half is told the same words.
                    return detached(&home, &std::env::args_os().skip(1).collect::<Vec<_>>(), screen);
                }
                start(&home, Life::New(definition), &pool, global, screen)
            }
            VmCommand::Start(wanted) => {
                let home = Home::of(&pool, &wanted.name)?;
                if wanted.how.detach && !daemon::is_child() {
                    return detached(&home, &std::env::args_os().skip(1).collect::<Vec<_>>(), screen);
                }
                start(&home, Life::Defined, &pool, global, screen)
            }
            VmCommand::Ls(Ls {}) => {
                let machines = list_machines(&pool)?;
                let text: String = machines.iter().map(listed).collect();
                screen.text(&serde_json::json!({ "answer": "vms", "vms": machines }), &text);
                Ok(machines.iter().map(exit_code).max().unwrap_or(0))
            }
            VmCommand::Info(wanted) => {
                let home = Home::of(&pool, &wanted.name)?;
                let info = tell_machine(&home)?;
                screen.text(&value(&info), &sheet(&info));
                Ok(0)
            }
            VmCommand::Pause(wanted) => ask(&Home::of(&pool, &wanted.name)?, Act::Pause, screen),
            VmCommand::Resume(wanted) => {
                let act = if wanted.retry { Act::Retry } else { Act::Resume };
                ask(&Home::of(&pool, &wanted.name)?, act, screen)
            }
            VmCommand::Stop(wanted) => {
                let patience = if wanted.force { 0 } else { wanted.patience };
                stop(&Home::of(&pool, &wanted.name)?, patience, screen)
            }
            VmCommand::Rm(wanted) => {
                let home = Home::of(&pool, &wanted.name)?;
                let lock = home.lock()?;
                Disks::forget(&pool, home.name());
                home.remove(lock)?;
                let value = serde_json::json!({ "answer": "removed", "name": home.name() });
                screen.confirm(&value, &format!("removed the virtual machine {}\n", home.name()));
                Ok(0)
            }
            VmCommand::Checkpoint(wanted) => wanted.run(&pool, screen),
            VmCommand::Restore(wanted) => {
                let home = wanted.home(&pool)?;
                if wanted.detach && !daemon::is_child() {
                    home.make()?;
                    return detached(&home, &std::env::args_os().skip(1).collect::<Vec<_>>(), screen);
                }
                wanted.run(&pool, global, screen)
            }
            VmCommand::Console(wanted) => console(&Home::of(&pool, &wanted.name)?, screen),
        }
    }
}

impl Run {
    fn definition(&self) -> Result<Definition> {
        let absolute =
            |path: &Path| path.canonicalize().map_err(|e| Error::io(format!("cannot open {}", path.display()), e));
        let boot = Boot {
            kernel: absolute(&self.kernel)?,
            initrd: self.initrd.as_deref().map(absolute).transpose()?,
            command_line: self.cmdline.clone(),
        };
        let mut definition = Definition::new(boot, parse_size(&self.memory)?, self.cpus);
        definition.user.clone_from(&self.user);
        for disk in &self.disks {
            let mut disk = parse_disk(disk)?;
            if let Some(file) = &mut disk.file {
                *file = absolute(file)?;
            }
            if disk.disk.is_some() && definition.disks.iter().any(|other| other.disk == disk.disk) {
                return Err(Error::usage(format!("the disk {} is given twice", disk.disk.unwrap_or_default())));
            }
            definition.disks.push(disk);
        }
        for net in &self.nets {
            definition.nets.push(parse_net(net)?);
        }
        Ok(definition)
    }
}

/// How a machine comes to run.
pub(super) enum Life {
    /// It is defined anew.
    New(Definition),
    /// It is defined.
    Defined,
    /// It goes on from a checkpoint.
    Restored(Restore),
}

/// A machine that is made.
struct Ready {
    runner: Arc<Runner>,
    server: MachineServer,
    /// Last: they are given back when nobody uses them.
    disks: Disks,
}

/// Runs a machine in this process.
pub(super) fn start(home: &Home, life: Life, pool: &Path, global: &Global, screen: &Screen) -> Result<u8> {
    let child = daemon::is_child();
    if child {
        daemon::detach()?;
    }
    let ready = match prepare(home, life, pool, global, screen) {
        Ok(ready) => ready,
        Err(error) if child => {
            screen.bytes(&Line::Error(Failure::from(&error)).encode());
            return Err(error);
        }
        Err(error) => return Err(error),
    };
    let Ready { runner, server, disks } = ready;
    if child {
        screen.bytes(format!("{}\n", value(&runner.info())).as_bytes());
    }
    let of_guest = *screen;
    let show = (!child).then(|| -> Show { Box::new(move |said| of_guest.bytes(said)) });
    let ending = runner.run(show);
    drop(server);
    drop(disks);
    let ending = ending?;
    screen.brief_note(&ending.to_string());
    Ok(match ending {
        Ending::PowerOff | Ending::Reboot => 0,
        Ending::Stopped => POWER_CUT,
        Ending::Crashed(_) => Kind::Failed.exit_code(),
        Ending::MemoryError(_) => Kind::Corrupt.exit_code(),
    })
}

/// Makes a machine and all that belongs to it. A new one is defined when nothing can be wrong with it any more.
fn prepare(home: &Home, life: Life, pool: &Path, global: &Global, screen: &Screen) -> Result<Ready> {
    if let Life::Defined = life {
        let ready = make(home, home.definition()?, home.lock()?, Begin::Boot, (pool, global))?;
        return ready.runner.confine().map(|()| ready);
    }
    home.make()?;
    let made = match life {
        Life::New(definition) => define(home, definition, Begin::Boot, (pool, global)),
        Life::Restored(restore) => restore.open(pool, home, screen).and_then(|opened| {
            let (from, definition, undo) = opened.split();
            define(home, definition, Begin::Restore(Box::new(from)), (pool, global))
                .inspect_err(|_| undo.undo(home.name()))
        }),
        Life::Defined => unreachable!("see above"),
    };
    made.inspect_err(|_| {
        if let Ok(lock) = home.lock() {
            home.forget(lock);
        }
    })
}

/// Makes a machine and defines it, if it can run.
fn define(home: &Home, definition: Definition, begin: Begin<'_>, (pool, global): (&Path, &Global)) -> Result<Ready> {
    let ready = make(home, definition.clone(), home.lock()?, begin, (pool, global))?;
    // The machine keeps the lock until that is done, or undone.
    home.define_if(&definition, || ready.runner.confine())?;
    Ok(ready)
}

fn make(
    home: &Home,
    definition: Definition,
    lock: HomeLock,
    begin: Begin<'_>,
    (pool, global): (&Path, &Global),
) -> Result<Ready> {
    let from_pool = definition.disks.iter().any(|disk| disk.disk.is_some());
    let disks = if definition.user.is_some() && from_pool {
        Disks::with_steward(pool, home.name(), global)?
    } else {
        Disks::new(pool, home.name())
    };
    let cpus = usize::from(definition.cpus);
    let open = |name: &str, disk: &DiskDefinition| disks.open(name, disk.read_only, cpus, global);
    let of_pool = Pool { open: &open, disks: disks.instants() };
    let runner = Arc::new(Runner::new(home.clone(), definition, lock, of_pool, begin)?);
    let server = MachineServer::start(home, Arc::clone(&runner))?;
    // Should it come to nothing, this does not keep it.
    let watched = Arc::downgrade(&runner);
    signal::watch(move |_| {
        if let Some(runner) = watched.upgrade()
            && let Err(error) = runner.stop(PATIENCE)
        {
            tracing::debug!("a signal came too late: {error}");
        }
    })?;
    disks.begin()?;
    Ok(Ready { runner, server, disks })
}

/// Starts the background half with the words that this process was told, and returns when the guest runs.
fn detached(home: &Home, words: &[OsString], screen: &Screen) -> Result<u8> {
    let cannot = |e| Error::io("cannot start the virtual machine in the background", e);
    // Told here rather than by a log.
    drop(home.lock()?);
    let path = home.path("vmm.log");
    let log = std::fs::OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .open(&path)
        .map_err(|e| Error::io(format!("cannot open the log {}", path.display()), e))?;
    let mut command = Command::new(std::env::current_exe().map_err(cannot)?);
    command.args(words).arg("-v");
    daemon::mark_child(&mut command);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log);
    let mut child = command.spawn().map_err(cannot)?;
    let mut told = String::new();
    BufReader::new(child.stdout.take().expect("stdout is piped")).read_line(&mut told).map_err(cannot)?;
    if let Ok(Told { vm }) = serde_json::from_str::<Told>(&told) {
        screen.confirm(&value(&vm), &line(&vm));
        return Ok(0);
    }
    match serde_json::from_str(&told) {
        Ok(Line::Error(failure)) => Err(failure.into()),
        _ => {
            Err(Error::failed("the virtual machine ended before it ran").hint(format!("{} says more", path.display())))
        }
    }
}

/// Stops a machine, and returns when it has ended.
fn stop(home: &Home, patience: u32, screen: &Screen) -> Result<u8> {
    let ran = if patience == 0 { kill_machine(home)? } else { ask_machine(home, Act::Stop(patience))?.is_some() };
    if !ran {
        return Err(does_not_run(home)?);
    }
    let info = wait_for_end(home, patience)?;
    screen.confirm(&value(&info), &line(&info));
    Ok(0)
}

/// Says that nobody runs a machine that is defined.
pub(super) fn does_not_run(home: &Home) -> Result<Error> {
    home.definition()?;
    Ok(Error::not_found(format!("the virtual machine {} does not run", home.name()))
        .hint(format!("'afterimage vm start {}' starts it", home.name())))
}

/// What the background half writes when all is well.
#[derive(serde::Deserialize)]
struct Told {
    vm: Info,
}

fn value(info: &Info) -> serde_json::Value {
    serde_json::json!({ "answer": "vm", "vm": info })
}

/// Asks a machine that must run.
fn ask(home: &Home, act: Act, screen: &Screen) -> Result<u8> {
    let Some(info) = ask_machine(home, act)? else { return Err(does_not_run(home)?) };
    screen.confirm(&value(&info), &line(&info));
    Ok(0)
}

fn state(info: &Info) -> &'static str {
    match info.state {
        State::Running => "running",
        State::Paused => "paused",
        State::MemoryError => "memory-error",
        State::Stopping => "stopping",
        State::Ended => "stopped",
        State::NotAnswering => "not-answering",
    }
}

fn line(info: &Info) -> String {
    let Definition { memory, cpus, .. } = info.definition;
    let waits = if info.waits_for_server { " (a disk waits for the server of the pool)" } else { "" };
    format!("{}: {}{waits}, {} of memory, {cpus} processors\n", info.name, state(info), show_size(memory))
}

fn listed(machine: &Listed) -> String {
    match machine {
        Listed::Known(info) => line(info),
        Listed::Unknown { name, state, error } => format!("{name}: {state}: {}\n", error.message),
    }
}

/// What a machine makes of the exit code of a list.
fn exit_code(machine: &Listed) -> u8 {
    match machine {
        Listed::Known(_) => 0,
        Listed::Unknown { error, .. } => Error::from(error.clone()).kind().exit_code(),
    }
}

fn sheet(info: &Info) -> String {
    use std::fmt::Write as _;
    let mut text = line(info);
    let mut add = |what: &str, how: String| {
        writeln!(text, "  {what:<8} {how}").expect("texts take all");
    };
    if let Some(pid) = info.pid {
        add("process", pid.to_string());
    }
    if let (State::MemoryError, Some(why)) = (info.state, &info.ending) {
        add("why", why.clone());
    }
    if let Some(memory) = &info.memory {
        let how = match memory.figures.resident {
            true => "resident".to_owned(),
            false => format!("{} % there", memory.figures.filled_percent),
        };
        add("memory", format!("{how}, from the checkpoint {}", memory.checkpoint));
    }
    add("kernel", info.definition.boot.kernel.display().to_string());
    if let Some(initrd) = &info.definition.boot.initrd {
        add("initrd", initrd.display().to_string());
    }
    add("cmdline", info.definition.boot.command_line.clone());
    for disk in &info.definition.disks {
        let name = match disk.source() {
            Ok(DiskSource::File(file)) => file.display().to_string(),
            Ok(DiskSource::Pool(name)) => name.to_owned(),
            Err(error) => error.to_string(),
        };
        add("disk", format!("{name}{}", if disk.read_only { ", read-only" } else { "" }));
    }
    for net in &info.definition.nets {
        let mac = net.mac.map(|byte| format!("{byte:02x}")).join(":");
        add("network", format!("tap {}, {mac}", net.tap));
    }
    if let Some(user) = &info.definition.user {
        add("user", user.clone());
    }
    text
}

/// Joins a terminal with the serial port.
fn console(home: &Home, screen: &Screen) -> Result<u8> {
    let path = home.path(SERIAL_SOCKET);
    let cannot = |e: std::io::Error| match e.kind() {
        std::io::ErrorKind::NotFound | std::io::ErrorKind::ConnectionRefused => {
            Error::not_found(format!("the virtual machine {} does not run", home.name()))
        }
        _ => Error::io(format!("cannot reach the console of {}", home.name()), e),
    };
    let short = ShortPath::of(&path).map_err(cannot)?;
    let mut stream = UnixStream::connect(short.path()).map_err(cannot)?;
    let mut typing = stream.try_clone().map_err(cannot)?;
    let mut greeting = String::new();
    // Byte by byte: what follows the line is not for this reader.
    let mut byte = [0];
    while !greeting.ends_with('\n') && stream.read(&mut byte).map_err(cannot)? == 1 {
        greeting.push(char::from(byte[0]));
    }
    if greeting.ends_with("busy\n") {
        return Err(Error::busy(format!("somebody else has the console of {}", home.name())));
    }
    std::thread::spawn(move || {
        // Whatever ends it ends the typing only.
        std::io::copy(&mut std::io::stdin(), &mut typing).and_then(|_| typing.flush()).ok();
    });
    let mut said = [0; 4096];
    loop {
        match stream.read(&mut said) {
            Ok(0) | Err(_) => return Ok(0),
            Ok(len) => screen.bytes(&said[..len]),
        }
    }
}
