//! The steward of a virtual machine that runs as somebody else: a process that keeps the rights to come to the server of the
//! pool, for the disks of that machine alone.
//!
//! ```text
//!   machine (another user) --seek N, connect N--> steward (the owner of the pool) --> server of the pool
//!                          <--answer, connection--
//! ```
//!
//! # Rules
//! 1. Disks are named before the guest runs, while both have all rights. After [`Order::Begin`] the steward only looks for
//!    those again, by their numbers, connects to them, and takes and removes snapshots of them for checkpoints of the machine:
//!    that is all that a guest which has taken its machine over can ask.
//! 2. Nobody has the machine's end of the socket but the machine. It ends with it, whatever it dies of, and the steward
//!    with the socket: it gives the disks back then.
//! 3. A signal that is for the machine does not end its steward.
//! 4. One order at a time, one message each.
//!
//! # Why not a thread, or a socket of the user's
//! Rights that a process keeps in one thread are those of whoever takes any other thread over. A socket in the file system
//! that the user may open has to be made by each server anew, before it can know whether the machine is to come back.
//!
//! # After a crash
//! Without its steward a machine uses its disks as long as the server is there; when that goes, its disks fail.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc::Sender;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, Shutdown, SocketFlags, SocketType,
};
use serde::{Deserialize, Serialize};

use super::vm_disks::{Disks, Held};
use super::{Global, daemon, signal};
use crate::api::instant::{Asked, PoolDisks};
use crate::api::{Failure, check_is_pool};
use crate::checkpoint::Name;
use crate::error::{Error, Kind, Result};
use crate::nbd;
use crate::nbd::client::{Place, Sought};
use crate::sync::Mutex;
use crate::vmm::{self, Taken, Taking};

/// Bytes of a message at most: names and reasons are shorter.
const MESSAGE_MAX: usize = 64 << 10;
/// How long a machine waits for its steward to give the disks back.
const END_TIME_MAX: Timespec = Timespec { tv_sec: 10, tv_nsec: 0 };

/// What a machine asks of its steward.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
enum Order {
    /// To attach a disk.
    Open { disk: String, read_only: bool },
    /// To attach no more of them from now on.
    Begin,
    /// To look where a disk is.
    Seek { number: usize },
    /// To connect to it there.
    Connect { number: usize },
    /// To take snapshots of disks that were opened, for a checkpoint of this machine; done when the instant has been.
    Snapshot { disks: Vec<String>, checkpoint: String },
    /// To wait until those are durable.
    Durable,
    /// To remove those of a checkpoint that came to nothing.
    Forget { checkpoint: String },
}

/// What the steward answers.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
enum Reply {
    /// It is done; a connection comes with it if one was asked for.
    Done,
    /// The disk has this number.
    Opened { number: usize },
    /// It is there, under this name.
    At { name: String },
    /// The snapshots are durable.
    Taken { taken: Vec<Taken> },
    /// It is not there yet.
    Later(Failure),
    /// It is not there any more.
    Never(Failure),
    /// It cannot be done.
    Failed(Failure),
}

/// The steward, as its machine has it.
#[derive(Debug)]
pub(super) struct Steward {
    socket: Mutex<OwnedFd>,
}

fn lost(error: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error::failed("the process that reaches the server of the pool has ended").because(error)
}

fn strange() -> Error {
    Error::failed("the process that reaches the server of the pool makes no sense")
}

fn send(socket: &OwnedFd, message: &impl Serialize, with: Option<&OwnedFd>) -> Result<()> {
    let text = serde_json::to_vec(message).expect("these types hold nothing JSON cannot say");
    let with = with.map(|file| [file.as_fd()]);
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut files = SendAncillaryBuffer::new(&mut space);
    if let Some(with) = &with {
        assert!(files.push(SendAncillaryMessage::ScmRights(with)), "there is room for one");
    }
    let parts = [IoSlice::new(&text)];
    let sent = rustix::io::retry_on_intr(|| rustix::net::sendmsg(socket, &parts, &mut files, SendFlags::NOSIGNAL));
    sent.map(drop).map_err(lost)
}

/// Receives a message, and the descriptor that came with it; `None` at the end.
fn receive(socket: &OwnedFd) -> Result<Option<(Vec<u8>, Option<OwnedFd>)>> {
    let mut text = vec![0; MESSAGE_MAX];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut files = RecvAncillaryBuffer::new(&mut space);
    let got = rustix::io::retry_on_intr(|| {
        rustix::net::recvmsg(socket, &mut [IoSliceMut::new(&mut text)], &mut files, RecvFlags::CMSG_CLOEXEC)
    });
    text.truncate(got.map_err(lost)?.bytes);
    let with = files.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(files) => Some(files),
        _ => None,
    });
    let with = with.flatten().next();
    Ok((!text.is_empty()).then_some((text, with)))
}

impl Steward {
    /// Starts one for a machine, with the rights that this process has now.
    ///
    /// # Errors
    /// Those of the host.
    pub(super) fn start(pool: &Path, vm: &str, global: &Global) -> Result<Arc<Self>> {
        let cannot = |e| Error::io("cannot start the process that reaches the server of the pool", e);
        let pair = rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None);
        let (own, other) = pair.map_err(|e| cannot(e.into()))?;
        let mut command = Command::new(std::env::current_exe().map_err(cannot)?);
        command.arg("--pool").arg(pool);
        command.args(std::iter::repeat_n("-v", usize::from(global.verbose)));
        command.args(["serve", "--steward", vm]);
        // Its stdin is its end of the socket. It is not waited for: its end is seen there.
        command.stdin(Stdio::from(other)).stdout(Stdio::null());
        command.spawn().map_err(cannot)?;
        Ok(Arc::new(Self { socket: Mutex::new(own) }))
    }

    fn ask(&self, order: &Order) -> Result<(Reply, Option<OwnedFd>)> {
        let socket = self.socket.lock();
        send(&socket, order, None)?;
        let ended = || lost(std::io::Error::from(std::io::ErrorKind::UnexpectedEof));
        let (text, with) = receive(&socket)?.ok_or_else(ended)?;
        match serde_json::from_slice(&text).map_err(|e| strange().because(e))? {
            Reply::Failed(failure) => Err(failure.into()),
            reply => Ok((reply, with)),
        }
    }

    /// Opens a disk with so many connections.
    ///
    /// # Errors
    /// As [`Disks::open`].
    pub(super) fn open(self: &Arc<Self>, disk: &str, read_only: bool, connections: usize) -> Result<nbd::Client> {
        let (Reply::Opened { number }, _) = self.ask(&Order::Open { disk: disk.to_owned(), read_only })? else {
            return Err(strange());
        };
        let steward = Arc::clone(self);
        let seek = move |_| steward.seek(number);
        nbd::Client::open(&format!("disk '{disk}'"), connections, Box::new(seek))
    }

    fn seek(self: &Arc<Self>, number: usize) -> Sought {
        match self.ask(&Order::Seek { number }) {
            Ok((Reply::At { name }, _)) => {
                let steward = Arc::clone(self);
                Sought::At(Place::through(name, move || steward.connect(number)))
            }
            Ok((Reply::Later(failure), _)) => Sought::Later(failure.into()),
            Ok((Reply::Never(failure), _)) => Sought::Never(failure.into()),
            Ok(_) => Sought::Never(strange()),
            Err(error) => Sought::Never(error),
        }
    }

    fn connect(&self, number: usize) -> Result<OwnedFd> {
        match self.ask(&Order::Connect { number })? {
            (Reply::Done, Some(connection)) => Ok(connection),
            _ => Err(strange()),
        }
    }

    /// Says that the guest is about to run.
    ///
    /// # Errors
    /// When the steward has ended.
    pub(super) fn begin(&self) -> Result<()> {
        self.ask(&Order::Begin).map(drop)
    }

    /// Takes snapshots; `told` is called when the instant has been.
    fn take(&self, disks: Vec<String>, checkpoint: &str, told: &Sender<()>) -> Result<Vec<Taken>> {
        self.ask(&Order::Snapshot { disks, checkpoint: checkpoint.to_owned() })?;
        // Nobody waits any more: then nobody wants to know.
        told.send(()).ok();
        match self.ask(&Order::Durable)?.0 {
            Reply::Taken { taken } => Ok(taken),
            _ => Err(strange()),
        }
    }

    /// Ends it, and waits until it has given the disks back.
    pub(super) fn end(&self) {
        // One that has ended is not connected.
        let Some(socket) = self.socket.try_lock() else { return };
        rustix::net::shutdown(&*socket, Shutdown::Write).ok();
        let ended = rustix::event::poll(&mut [PollFd::new(&*socket, PollFlags::IN)], Some(&END_TIME_MAX));
        if ended != Ok(1) {
            tracing::warn!("the disks of the virtual machine are given back a little later");
        }
    }
}

/// The disks of a machine, whose steward takes snapshots of them.
#[derive(Debug)]
pub(super) struct StewardDisks(pub(super) Arc<Steward>);

impl vmm::Disks for StewardDisks {
    fn snapshot(&self, disks: &[String], checkpoint: &str) -> Result<Box<dyn Taking>> {
        let (steward, these, taking) = (Arc::clone(&self.0), disks.to_vec(), checkpoint.to_owned());
        let (forgetting, checkpoint) = (Self(Arc::clone(&self.0)), checkpoint.to_owned());
        let forget = move || vmm::Disks::forget(&forgetting, &checkpoint);
        Asked::begin(move |told| steward.take(these, &taking, told), Arc::new(forget))
    }

    fn forget(&self, checkpoint: &str) {
        if let Err(error) = self.0.ask(&Order::Forget { checkpoint: checkpoint.to_owned() }) {
            tracing::warn!("snapshots of the checkpoint {checkpoint}, which came to nothing, stay: {error}");
        }
    }
}

/// Snapshots, as a steward takes them: of the disks that it looks after, for checkpoints of its machine.
struct Instants {
    vm: String,
    pool: PoolDisks,
    taking: Option<Box<dyn Taking>>,
}

impl Instants {
    fn check(&self, checkpoint: &str) -> Result<()> {
        if Name::parse(checkpoint)?.machine() == self.vm {
            return Ok(());
        }
        Err(Error::new(Kind::Denied, format!("{checkpoint} is no checkpoint of the virtual machine {}", self.vm)))
    }

    fn begin(&mut self, kept: &[Kept], disks: &[String], checkpoint: &str) -> Result<Reply> {
        self.check(checkpoint)?;
        if let Some(disk) = disks.iter().find(|disk| !kept.iter().any(|kept| kept.disk == **disk)) {
            return Err(Error::new(Kind::Denied, format!("the disk {disk} is none of this virtual machine")));
        }
        let mut taking = vmm::Disks::snapshot(&self.pool, disks, checkpoint)?;
        taking.instant()?;
        self.taking = Some(taking);
        Ok(Reply::Done)
    }

    fn wait(&mut self) -> Result<Reply> {
        let taking = self.taking.take().ok_or_else(|| Error::failed("no snapshots are being taken"))?;
        taking.durable().map(|taken| Reply::Taken { taken })
    }

    fn forget(&mut self, checkpoint: &str) -> Result<Reply> {
        self.check(checkpoint)?;
        vmm::Disks::forget(&self.pool, checkpoint);
        Ok(Reply::Done)
    }
}

/// A disk that a steward looks after.
struct Kept {
    disk: String,
    held: Held,
    place: Option<PathBuf>,
}

/// Is the steward of a machine, at the other end of stdin.
pub(super) fn serve(vm: &str, global: &Global) -> Result<u8> {
    let pool = check_is_pool(global.pool()?)?;
    daemon::detach()?;
    signal::watch(|signal| tracing::debug!("{signal:?} is for the virtual machine"))?;
    let socket = std::io::stdin().as_fd().try_clone_to_owned().map_err(|e| Error::io("cannot take stdin", e))?;
    // Given back when this ends.
    let disks = Disks::new(&pool, vm);
    let (mut kept, mut begun) = (Vec::new(), false);
    let mut instants = Instants { vm: vm.to_owned(), pool: PoolDisks::new(&pool), taking: None };
    while let Some((text, _)) = receive(&socket)? {
        let order = serde_json::from_slice(&text).map_err(|e| strange().because(e))?;
        let done = match order {
            Order::Open { .. } | Order::Begin if begun => Err(Error::new(Kind::Denied, "the guest runs")),
            Order::Begin => {
                begun = true;
                Ok((Reply::Done, None))
            }
            Order::Open { disk, read_only } => disks.hold(&disk, read_only, global).map(|held| {
                kept.push(Kept { disk, held, place: None });
                (Reply::Opened { number: kept.len() - 1 }, None)
            }),
            Order::Seek { number } => with(&mut kept, number).map(|kept| (kept.seek(), None)),
            Order::Connect { number } => with(&mut kept, number).and_then(|kept| kept.connect()),
            Order::Snapshot { disks, checkpoint } => instants.begin(&kept, &disks, &checkpoint).map(alone),
            Order::Durable => instants.wait().map(alone),
            Order::Forget { checkpoint } => instants.forget(&checkpoint).map(alone),
        };
        let (reply, with) = done.unwrap_or_else(|error| (Reply::Failed(Failure::from(&error)), None));
        send(&socket, &reply, with.as_ref())?;
    }
    Ok(0)
}

/// A reply without a connection.
fn alone(reply: Reply) -> (Reply, Option<OwnedFd>) {
    (reply, None)
}

fn with(kept: &mut [Kept], number: usize) -> Result<&mut Kept> {
    kept.get_mut(number).ok_or_else(|| Error::not_found(format!("there is no disk {number}")))
}

impl Kept {
    fn seek(&mut self) -> Reply {
        match self.held.seek() {
            Ok(disk) => {
                self.place = Some(disk.socket.into());
                Reply::At { name: disk.name }
            }
            Err((false, error)) => Reply::Later(Failure::from(&error)),
            Err((true, error)) => Reply::Never(Failure::from(&error)),
        }
    }

    fn connect(&self) -> Result<(Reply, Option<OwnedFd>)> {
        let place = self.place.as_deref().ok_or_else(|| Error::failed("it is not known where the disk is"))?;
        Ok((Reply::Done, Some(nbd::client::connect(place)?)))
    }
}
