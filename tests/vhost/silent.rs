//! Descriptors that make whoever touches them wait: a front end may send them, and only its own connection ends.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, IoSlice, Read, Write};
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, AsRawFd, FromRawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserInflight;
use vhost::{VhostBackend, VhostUserMemoryRegionInfo};
use vmm_sys_util::eventfd::EventFd;

use super::hostile::front_at;
use super::limits::is_refused;
use super::{Ram, Served};
use crate::real::{require, wait_for};

/// A FUSE file system of one file, which answers nothing that concerns that once it is open: not even that it is closed.
struct Mute {
    at: tempfile::TempDir,
}

/// Kinds of requests (include/uapi/linux/fuse.h).
const LOOKUP: u32 = 1;
const GETATTR: u32 = 3;
const OPEN: u32 = 14;
const INIT: u32 = 26;

/// The attributes of a node: 1 is the root, 2 the file.
fn attributes(node: u64) -> Vec<u8> {
    let (mode, size) = if node == 1 { (0o040_755_u32, 0) } else { (0o100_644, 1_u64 << 30) };
    let mut bytes = Vec::new();
    [node, size, size / 512, 0, 0, 0].iter().for_each(|number| bytes.extend(number.to_le_bytes()));
    [0, 0, 0, mode, 1, 0, 0, 0, 4096, 0].iter().for_each(|number: &u32| bytes.extend(number.to_le_bytes()));
    bytes
}

/// Returns the answer to a request, if it gets one.
fn answer(request: &[u8]) -> Option<Vec<u8>> {
    let (kind, node) = (u32::from_le_bytes(request[4..8].try_into().unwrap()), request[16]);
    let numbers = |numbers: &[u64]| numbers.iter().flat_map(|number| number.to_le_bytes()).collect::<Vec<_>>();
    Some(match kind {
        // Version 7.31, nothing of what there is since; room for writes of a page.
        INIT => numbers(&[7 | 31 << 32, 0, 4096 << 32, 1, 0, 0, 0, 0]),
        LOOKUP => [numbers(&[2, 0, 0, 0, 0]), attributes(2)].concat(),
        GETATTR if node == 1 => [numbers(&[0, 0]), attributes(1)].concat(),
        OPEN => numbers(&[0, 0]),
        _ => return None,
    })
}

fn serve(device: &File) {
    let mut buffer = vec![0; 1 << 20];
    // It fails when the connection is ended.
    while let Ok(len) = rustix::io::read(device, &mut buffer) {
        let Some(body) = answer(&buffer[..len]) else { continue };
        let mut reply = ((16 + body.len()) as u32).to_le_bytes().to_vec();
        reply.extend([0; 4]);
        reply.extend(&buffer[8..16]);
        reply.extend(body);
        rustix::io::write(device, &reply).ok();
    }
}

impl Mute {
    /// Mounts it; `None` where that cannot be.
    #[expect(unsafe_code, reason = "mount(2)")]
    fn mount() -> Option<Self> {
        let root = rustix::process::geteuid().is_root();
        if !crate::tree::require_fuse() || !require(root, "root") {
            return None;
        }
        let at = tempfile::tempdir().unwrap();
        let device = fs::OpenOptions::new().read(true).write(true).open("/dev/fuse").unwrap();
        let options = format!("fd={},rootmode=40000,user_id=0,group_id=0\0", device.as_raw_fd());
        let path = std::ffi::CString::new(at.path().to_str().unwrap()).unwrap();
        // SAFETY: all of them are strings that end, and live as long as the call.
        let mounted = unsafe {
            libc::mount(c"silent".as_ptr(), path.as_ptr(), c"fuse".as_ptr(), libc::MS_NODEV, options.as_ptr().cast())
        };
        assert_eq!(mounted, 0, "{}", std::io::Error::last_os_error());
        std::thread::spawn(move || serve(&device));
        Some(Self { at })
    }

    /// Ends all waiting.
    #[expect(unsafe_code, reason = "umount2(2)")]
    fn end(&self) {
        let path = std::ffi::CString::new(self.at.path().to_str().unwrap()).unwrap();
        // SAFETY: it is a string that ends, and lives as long as the call.
        unsafe { libc::umount2(path.as_ptr(), libc::MNT_FORCE | libc::MNT_DETACH) };
    }
}

/// A front end that shares the file. It is a process of its own: whoever has the file open can neither end nor start others.
pub(crate) struct Hostile {
    mute: Mute,
    child: Child,
    answers: mpsc::Receiver<String>,
}

/// Where the file is, and the socket of the server; says that this process is that front end.
const ROLE: &str = "AFTERIMAGE_TEST_IS_HOSTILE";

impl Hostile {
    /// Begins; `None` where FUSE cannot be used.
    pub(crate) fn begin(socket: &Path) -> Option<Self> {
        let mute = Mute::mount()?;
        let mut child = Command::new(std::env::current_exe().unwrap());
        let words = ["--exact", "vhost::silent::the_front_end_of_the_other_tests", "--ignored", "--nocapture"];
        let role = format!("{} {}", mute.at.path().join("file").display(), socket.display());
        let child = child.args(words).env(ROLE, role).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = child.spawn().unwrap();
        let (lines, answers) = mpsc::channel();
        let said = BufReader::new(child.stdout.take().unwrap());
        std::thread::spawn(move || said.lines().map_while(Result::ok).try_for_each(|line| lines.send(line)));
        Some(Self { mute, child, answers })
    }

    /// Has it share the file in one of the [`WAYS`]; tells whether that was taken.
    pub(crate) fn share(&mut self, way: usize) -> bool {
        writeln!(self.child.stdin.as_mut().unwrap(), "{way}").unwrap();
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let line = self.answers.recv_timeout(left);
            let line = line.unwrap_or_else(|_| panic!("it takes for ever to share {}", WAYS[way].0));
            if let Some(taken) = line.strip_prefix(&format!("way {way} taken ")) {
                return taken == "true";
            }
        }
    }

    /// Ends all waiting.
    pub(crate) fn end(&self) {
        self.mute.end();
    }
}

impl Drop for Hostile {
    fn drop(&mut self) {
        // First: before that it cannot end.
        self.mute.end();
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// Not run by itself: [`Hostile::begin`] runs it in a process of its own.
#[test]
#[ignore = "it is a part of other tests"]
fn the_front_end_of_the_other_tests() {
    let role = std::env::var(ROLE).unwrap();
    let (path, socket) = role.split_once(' ').unwrap();
    let file = fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
    for line in std::io::stdin().lines().map_while(Result::ok) {
        let way: usize = line.parse().unwrap();
        println!("\nway {way} taken {}", WAYS[way].1(Path::new(socket), &file));
    }
}

/// Does something in a thread of its own and waits for it, but not for ever.
pub(crate) fn in_time<T: Send + 'static>(what: &str, run: impl FnOnce() -> T + Send + 'static) -> T {
    let (done, result) = mpsc::channel();
    std::thread::spawn(move || done.send(run()));
    result.recv_timeout(Duration::from_secs(60)).unwrap_or_else(|_| panic!("{what} takes for ever"))
}

/// A descriptor in the shape that the crate wants.
#[expect(unsafe_code, reason = "an event descriptor is not made of anything else in any other way")]
fn event(file: &File) -> ManuallyDrop<EventFd> {
    // SAFETY: it is not closed, and its owner outlives it.
    ManuallyDrop::new(unsafe { EventFd::from_raw_fd(file.as_raw_fd()) })
}

/// Sends a message that brings a descriptor, and waits for the end of the connection.
fn bring(socket: &Path, code: u32, file: &File) -> bool {
    let mut stream = UnixStream::connect(socket).unwrap();
    let head = [code.to_le_bytes(), 1_u32.to_le_bytes(), [0; 4]].concat();
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let files = [file.as_fd()];
    assert!(control.push(SendAncillaryMessage::ScmRights(&files)));
    rustix::net::sendmsg(&stream, &[IoSlice::new(&head)], &mut control, SendFlags::NOSIGNAL).unwrap();
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).ok();
    !rest.is_empty()
}

type Share = fn(&Path, &File) -> bool;

/// All ways in which a front end shares a descriptor; each tells whether it was taken.
const WAYS: [(&str, Share); 7] = [
    ("memory", |socket, file| front_at(socket).set_mem_table(&[region(file)]).is_ok()),
    ("one more region", |socket, file| front_at(socket).add_mem_region(&region(file)).is_ok()),
    ("requests in flight", |socket, file| {
        front_at(socket).set_inflight_fd(&VhostUserInflight::new(4096, 0, 1, 64), file.as_raw_fd()).is_ok()
    }),
    ("a kick", |socket, file| front_at(socket).set_vring_kick(0, &event(file)).is_ok()),
    ("a call", |socket, file| front_at(socket).set_vring_call(0, &event(file)).is_ok()),
    ("an error", |socket, file| front_at(socket).set_vring_err(0, &event(file)).is_ok()),
    // SET_OWNER brings nothing.
    ("something nobody wants", |socket, file| bring(socket, 3, file)),
];
/// The last of them.
pub(crate) const UNWANTED: usize = 6;

fn region(file: &File) -> VhostUserMemoryRegionInfo {
    VhostUserMemoryRegionInfo {
        guest_phys_addr: 0,
        memory_size: 4096,
        userspace_addr: 1 << 40,
        mmap_offset: 0,
        mmap_handle: file.as_raw_fd(),
    }
}

/// As [`Served::guest`] and a request, and not for ever.
fn is_served(served: Served) -> Served {
    in_time("the next front end", move || {
        served.guest(1).read(0, 0, 512);
        served
    })
}

#[test]
fn a_file_whose_file_system_never_answers_holds_up_nobody() {
    let mut served = Served::new(Ram::new(1 << 20), 1);
    let Some(mut hostile) = Hostile::begin(&served.socket) else { return };
    for (way, (what, _)) in WAYS.iter().enumerate() {
        assert!(!hostile.share(way), "{what}");
    }
    served = is_served(served);
    // One more of them, and nobody else is taken until the file system is gone.
    // The first may itself be refused, while the thread that looked at what the last one sent is still ending.
    wait_for("front ends are taken without end", || !hostile.share(UNWANTED) && is_refused(&served));
    hostile.end();
    wait_for("no front end is taken any more", || !is_refused(&served));
    is_served(served);
}

#[test]
fn a_server_ends_although_a_file_cannot_be_closed() {
    let mut served = Served::new(Ram::new(1 << 20), 1);
    let Some(mut hostile) = Hostile::begin(&served.socket) else { return };
    assert!(!hostile.share(UNWANTED));
    served = is_served(served);
    let begun = Instant::now();
    served.server.take().unwrap().stop();
    assert!(begun.elapsed() < Duration::from_secs(8), "it gave up");
}
