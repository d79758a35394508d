//! Serves a session: by the loop where the host has io_uring, by fuser alone where it has not.
//!
//! With the loop there are two sessions. The real one has the mount and has greeted the kernel; its device is read by
//! [`super::fuse_loop`]. The second one is fuser's for everything that is not read, write or sync; its device is a socket
//! over which requests come and answers go, unchanged, and the greeting it gets is made up.
//!
//! # Rules
//! 1. fuser keeps deciding what its requests mean and how they are answered; the loop does not look into them.
//! 2. Without io_uring (old kernels, `kernel.io_uring_disabled`, seccomp) nothing is different but the speed, and that
//!    fuser knows of no signals: a program that is killed while it waits on purpose is found out a little later.

use std::cell::RefCell;
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use fuser::{Config, Session, SessionACL};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

use super::fuse::{Mount, REQUEST_MAX};
use super::fuse_device::Device;
use super::fuse_loop::{Cut, Flight, Loop, pass_answers};
use super::fuse_wire as wire;
use super::stale::Queue;
use super::state::Tree;
use super::waits::Waits;
use crate::sys::ring::Ring;

const RING_ENTRIES: u32 = 128;

/// What a session is served with.
#[derive(Debug)]
pub(super) struct Parts {
    pub(super) tree: Arc<Tree>,
    pub(super) waits: Arc<Waits>,
    pub(super) number: u64,
    pub(super) queue: Arc<Queue>,
    pub(super) threads: usize,
    pub(super) acl: SessionACL,
    /// Use the loop if the host allows it.
    pub(super) ring: bool,
}

/// Serves until the file system is unmounted.
///
/// # Errors
/// When the session breaks.
pub(super) fn serve(session: Session<Mount>, parts: Parts) -> io::Result<()> {
    if !parts.ring {
        return session.run();
    }
    match Ring::new(RING_ENTRIES) {
        Ok(ring) => serve_split(session, parts, ring),
        Err(error) => {
            tracing::debug!("this host allows no io_uring: {error}");
            session.run()
        }
    }
}

fn serve_split(session: Session<Mount>, parts: Parts, mut ring: Ring<Flight>) -> io::Result<()> {
    let Parts { tree, waits, number, queue, threads, acl, .. } = parts;
    let device = Device::new(fs::File::from(session.as_fd().try_clone_to_owned()?), REQUEST_MAX as usize)?;
    let (near, far) = rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    let near = Arc::new(near);
    let _cut = Cut(Arc::clone(&near));
    let mount = Mount { tree: Arc::clone(&tree), waits: Arc::clone(&waits), number, queue };
    let mut config = Config::default();
    config.n_threads = Some(threads);
    let other = greet(mount, &near, far, acl, config)?;
    let running = std::thread::Builder::new().name("mount-fuser".into()).spawn({
        let cut = Cut(Arc::clone(&near));
        move || {
            let _cut = cut;
            other.run()
        }
    })?;
    let answers = {
        let (device, near) = (Arc::clone(&device), Arc::clone(&near));
        std::thread::Builder::new().name("mount-answer".into()).spawn(move || pass_answers(&device, &near))?
    };
    let fuser = Arc::clone(&near);
    let served = Loop { tree, device, waits, fuser, number, ahead: RefCell::default() }.run(&mut ring);
    for _ in 0..threads {
        rustix::net::send(&near, &wire::farewell(), SendFlags::empty())?;
    }
    let ended = running.join().unwrap_or_else(|_| Err(io::Error::other("a thread of fuser panicked")));
    // fuser has let go of its end, so this ends too.
    let passed = answers.join();
    drop(session);
    served.and(ended).and(passed.map_err(|_| io::Error::other("the thread that passes answers on panicked")))
}

/// Makes fuser's session on a socket, answering for the kernel.
fn greet(mount: Mount, near: &OwnedFd, far: OwnedFd, acl: SessionACL, config: Config) -> io::Result<Session<Mount>> {
    rustix::net::send(near, &wire::greeting(), SendFlags::empty())?;
    let session = Session::from_fd(mount, far, acl, config)?;
    let mut answer = [0; 256];
    rustix::net::recv(near, &mut answer[..], RecvFlags::empty())?;
    Ok(session)
}
