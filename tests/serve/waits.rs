//! Requests that wait on purpose, for room (`enospc=wait`) or for a limit: what ends the waiting, and what does not wait for
//! them. Each way in is asked for 200 blocks of a disk that lets one through, and then none or one a second.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};

use super::Server;
use super::client::Nbd;
use crate::real::wait_for;
use crate::vhost::guest::{FLUSH, Guest, IN, OUT};
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;

const BLOCK: usize = 4096;
/// Blocks that are written.
const BLOCKS: u64 = 200;
/// What makes them wait, and what lets them go on.
const CAUSES: [(&str, &str); 4] = [
    ("enospc=wait quota=4K", "quota=none"),
    ("enospc=wait quota=4K", "enospc=fail"),
    ("iops=1", "iops=none"),
    ("bandwidth=4K", "bandwidth=none"),
];

/// Those that are different for who does not wait for them to go on.
fn causes() -> impl Iterator<Item = &'static str> {
    CAUSES.iter().map(|cause| cause.0).enumerate().filter(|(n, _)| *n != 1).map(|(_, cause)| cause)
}

fn waiting(server: &Server) -> u64 {
    server.json("info web")["waiting"].as_u64().unwrap()
}

/// Waits until requests wait for room, if that is what they wait for.
fn wait_until_they_wait(server: &Server, cause: &str) {
    if cause.contains("wait") {
        wait_for("writes wait for room", || waiting(server) > 0);
        let output = server.it.run(&["ls"]);
        let shown = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(shown.contains("disk 'web': ") && shown.contains(" for room"), "{shown}");
        let metrics = server.it.run(&["metrics"]);
        let metrics = String::from_utf8_lossy(&metrics.stdout).into_owned();
        let line = metrics.lines().find(|line| line.starts_with("afterimage_disk_waiting_writes{disk=\"web\"}"));
        assert!(!line.unwrap().ends_with(" 0"), "{metrics}");
    }
}

/// What nobody waits for: metadata, snapshots.
fn nobody_else_waits(server: &Server, round: usize) {
    server.json(&format!("snapshot web@s{round}"));
    server.json("info web");
    server.json(&format!("create other{round} -s 1M"));
}

// NBD

/// A client that sends everything before it takes any reply.
struct Flood {
    stream: UnixStream,
}

impl Flood {
    fn new(server: &Server) -> Self {
        let client = Nbd::open(&server.sock(), "web").unwrap();
        let mut it = Self { stream: client.into_stream() };
        let mut bytes = Vec::new();
        for n in 0..BLOCKS {
            bytes.extend(request(1, n, n * BLOCK as u64, BLOCK as u32));
            bytes.extend([n as u8 + 1; BLOCK]);
        }
        it.stream.write_all(&bytes).unwrap();
        it
    }

    /// Returns the next reply: cookie and error; `None` at the end.
    fn reply(&mut self) -> Option<(u64, u32)> {
        let mut head = [0; 16];
        self.stream.read_exact(&mut head).ok()?;
        let errno = u32::from_be_bytes(head[4..8].try_into().unwrap());
        Some((u64::from_be_bytes(head[8..].try_into().unwrap()), errno))
    }
}

fn request(command: u16, cookie: u64, offset: u64, len: u32) -> Vec<u8> {
    [
        &0x2560_9513_u32.to_be_bytes()[..],
        &0_u16.to_be_bytes(),
        &command.to_be_bytes(),
        &cookie.to_be_bytes(),
        &offset.to_be_bytes(),
        &len.to_be_bytes(),
    ]
    .concat()
}

fn served_over(kind: &str) -> Server {
    let server = Server::without();
    server.json(&format!("serve {kind} web --socket SOCK --daemon"));
    server
}

#[test]
fn over_nbd_they_go_on_when_the_cause_is_gone_and_hold_nothing_up_meanwhile() {
    let server = served_over("nbd");
    for (round, (cause, lift)) in CAUSES.into_iter().enumerate() {
        server.json(&format!("set web {cause}"));
        let mut client = Flood::new(&server);
        // Whichever: they are many at once.
        let (first, errno) = client.reply().unwrap();
        assert_eq!(errno, 0, "{cause}: one passes");
        wait_until_they_wait(&server, cause);
        nobody_else_waits(&server, round);
        // A flush overtakes them.
        client.stream.write_all(&request(3, 4711, 0, 0)).unwrap();
        let mut left: Vec<u64> = (0..BLOCKS).filter(|n| *n != first).collect();
        loop {
            let (cookie, errno) = client.reply().unwrap();
            assert_eq!(errno, 0, "{cause}");
            if cookie == 4711 {
                break;
            }
            left.retain(|n| *n != cookie);
        }
        assert!(!left.is_empty(), "{cause}: they wait");
        server.json(&format!("set web {lift}"));
        let expected = if lift == "enospc=fail" { 28 } else { 0 };
        while !left.is_empty() {
            let (cookie, errno) = client.reply().expect("all are answered");
            assert_eq!(errno, expected, "{cause} {lift}");
            left.retain(|n| *n != cookie);
        }
        client.stream.write_all(&request(2, 0, 0, 0)).unwrap();
        wait_for("the lease falls", || server.holder("web").is_none());
        server.json("set web quota=none enospc=fail");
        assert_eq!(waiting(&server), 0);
        // Unmapped: the next round needs room again.
        let mut client = Nbd::open(&server.sock(), "web").unwrap();
        assert_eq!(client.trim(0, 8 << 20).unwrap(), 0);
        assert_eq!(client.flush().unwrap(), 0);
        for name in server.json("ls web")["snapshots"].as_array().unwrap() {
            server.json(&format!("rm web@{}", name["name"].as_str().unwrap()));
        }
    }
}

#[test]
fn an_nbd_client_that_goes_or_is_detached_leaves_no_lease() {
    let server = served_over("nbd");
    for cause in causes() {
        server.json(&format!("set web {cause}"));
        let client = Flood::new(&server);
        wait_until_they_wait(&server, cause);
        drop(client);
        wait_for("the lease falls", || server.holder("web").is_none());
        // With more requests than the server takes it does not read the end of the connection.
        let floods: Vec<_> = (0..2).map(|_| Flood::new(&server)).collect();
        let mut more = Flood::new(&server);
        let bytes: Vec<_> = (0..80).flat_map(|n| [request(1, n, 0, BLOCK as u32), vec![1; BLOCK]].concat()).collect();
        more.stream.write_all(&bytes).unwrap();
        drop((floods, more));
        wait_for("the lease falls", || server.holder("web").is_none());
        // Detached, it is told.
        let first = server.exports()[0]["id"].clone();
        let second = server.json("attach nbd web --socket DIR/second")["id"].clone();
        let client = Nbd::open(&server.it.path("second"), "web").unwrap();
        let mut client = Flood { stream: client.into_stream() };
        for n in 0..3 {
            let bytes = [request(1, n, (4 + n) << 20, BLOCK as u32), vec![1; BLOCK]].concat();
            client.stream.write_all(&bytes).unwrap();
        }
        server.json(&format!("detach {second}"));
        let replies: Vec<_> = std::iter::from_fn(|| client.reply()).collect();
        assert!(replies.iter().all(|(_, errno)| [0, 108].contains(errno)), "{cause}: {replies:?}");
        assert_eq!(server.holder("web"), None);
        server.json("set web quota=none enospc=fail iops=none bandwidth=none");
        server.json(&format!("detach {first}"));
        wait_for("it has ended", || afterimage::pool::PoolLock::take(&server.it.pool()).is_ok());
        server.json("serve nbd web --socket SOCK --daemon");
    }
}

#[test]
fn a_server_ends_while_clients_of_nbd_wait() {
    for cause in causes() {
        let server = served_over("nbd");
        server.json(&format!("set web {cause}"));
        let mut client = Flood::new(&server);
        assert_eq!(client.reply(), Some((0, 0)), "{cause}: one passes");
        wait_until_they_wait(&server, cause);
        server.end();
        while let Some((_, errno)) = client.reply() {
            assert!([0, 108].contains(&errno), "{errno}");
        }
        server.it.json(&["check"]);
    }
}

// vhost-user

fn flood(guest: &mut Guest) -> Vec<u64> {
    // As many as the ring has room for, of three descriptors each.
    let sent: Vec<_> =
        (0..20_u64).map(|n| guest.send(0, OUT, n * 8, &[n as u8 + 1; BLOCK], 0)).map(|sent| sent.status).collect();
    guest.kick(0);
    sent
}

#[test]
fn requests_of_a_guest_go_on_when_the_cause_is_gone_and_a_flush_overtakes_them() {
    for (round, (cause, lift)) in CAUSES.into_iter().enumerate() {
        let server = served_over("vhost-user");
        server.json(&format!("set web {cause}"));
        let mut guest = Guest::new(1);
        guest.connect(&server.sock());
        let sent = flood(&mut guest);
        guest.answer(0);
        wait_until_they_wait(&server, cause);
        nobody_else_waits(&server, round);
        let flush = guest.send(0, FLUSH, 0, &[], 0);
        guest.kick(0);
        let mut answered = 1;
        while guest.answer(0).0 != flush.head {
            answered += 1;
        }
        assert_eq!(guest.get(flush.status, 1), [0]);
        assert!(answered < sent.len(), "{cause}: they wait");
        server.json(&format!("set web {lift}"));
        while answered < sent.len() {
            guest.answer(0);
            answered += 1;
        }
        let failed = sent.iter().filter(|status| guest.get(**status, 1) != [0]).count();
        assert_eq!(failed > 0, lift == "enospc=fail", "{cause}: {failed} failed");
    }
}

#[test]
fn a_queue_that_is_stopped_leaves_them_to_the_next_session() {
    for cause in causes() {
        let server = served_over("vhost-user");
        server.json(&format!("set web {cause}"));
        let mut guest = Guest::new(1);
        guest.connect(&server.sock());
        let sent = flood(&mut guest);
        guest.answer(0);
        wait_until_they_wait(&server, cause);
        // Stopped and begun again, as when the machine is paused.
        let mut front = guest.front.take().unwrap();
        let base = front.get_vring_base(0).unwrap();
        assert_eq!(base as usize, sent.len(), "{cause}: all count as taken");
        assert!(usize::from(guest.used(0)) < sent.len());
        guest.begin(&front, &guest.rings[0], base as u16);
        front.set_vring_enable(0, true).unwrap();
        // The front end goes and comes again.
        drop(front);
        guest.disconnect();
        guest.connect(&server.sock());
        // The server goes and comes again.
        server.end();
        server.json("serve vhost-user web --socket SOCK --daemon");
        guest.disconnect();
        guest.connect(&server.sock());
        wait_until_they_wait(&server, cause);
        server.json("set web quota=none iops=none bandwidth=none");
        for _ in 1..sent.len() {
            guest.answer(0);
        }
        assert!(sent.iter().all(|status| guest.get(*status, 1) == [0]), "{cause}");
        assert_eq!(usize::from(guest.used(0)), sent.len(), "{cause}: each is answered once");
        for n in 0..sent.len() as u64 {
            assert_eq!(guest.read(0, n * 8, BLOCK), [n as u8 + 1; BLOCK], "{cause}: {n}");
        }
    }
}

#[test]
fn a_device_is_detached_and_its_server_ends_while_a_guest_waits() {
    for cause in causes() {
        let Some(server) = Server::mounted() else { return };
        server.json("attach vhost-user web --socket SOCK");
        server.json(&format!("set web {cause}"));
        let mut guest = Guest::new(1);
        guest.connect(&server.sock());
        flood(&mut guest);
        guest.answer(0);
        wait_until_they_wait(&server, cause);
        server.json("detach web");
        assert_eq!(server.holder("web"), None);
        server.json("attach vhost-user web --socket SOCK");
        guest.disconnect();
        guest.connect(&server.sock());
        wait_until_they_wait(&server, cause);
        server.end();
    }
}

// FUSE

/// Begins to write all blocks to a file, one after the other, past the kernel's cache or through it.
fn dd(server: &Server, direct: bool) -> Child {
    let of = format!("of={}", server.disk("web").display());
    let count = format!("count={BLOCKS}");
    let flags = if direct { "oflag=direct" } else { "oflag=sync" };
    Command::new("dd")
        .args(["if=/dev/zero", &of, "bs=4096", &count, "conv=notrunc", flags])
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

fn ends(child: &mut Child) -> std::process::ExitStatus {
    let status = std::cell::Cell::new(None);
    let child = std::cell::RefCell::new(child);
    wait_for("the program ends", || {
        status.set(child.borrow_mut().try_wait().unwrap());
        status.get().is_some()
    });
    status.get().unwrap()
}

#[test]
fn in_a_file_they_go_on_when_the_cause_is_gone_and_hold_nothing_up_meanwhile() {
    for (round, (cause, lift)) in CAUSES.into_iter().enumerate() {
        for direct in [true, false] {
            let Some(server) = Server::mounted() else { return };
            server.json(&format!("set web {cause}"));
            let mut writer = dd(&server, direct);
            wait_for("it writes", || server.holder("web").is_some());
            wait_until_they_wait(&server, cause);
            nobody_else_waits(&server, round);
            // It can be opened and, without a limit, read; so can others, and be written.
            let reader = File::open(server.disk("web")).unwrap();
            if cause.contains("quota") {
                reader.read_exact_at(&mut [0; BLOCK], 1 << 20).unwrap();
            }
            std::fs::write(server.disk(&format!("other{round}")), [1; BLOCK]).unwrap();
            assert!(writer.try_wait().unwrap().is_none(), "{cause}: it waits");
            server.json(&format!("set web {lift}"));
            assert_eq!(ends(&mut writer).success(), lift != "enospc=fail", "{cause} {lift}");
        }
    }
}

#[test]
fn a_program_that_is_killed_ends_and_leaves_no_lease() {
    for cause in causes() {
        for signal in [rustix::process::Signal::KILL, rustix::process::Signal::INT] {
            let Some(server) = Server::mounted() else { return };
            server.json(&format!("set web {cause}"));
            let mut writer = dd(&server, true);
            wait_for("it writes", || server.holder("web").is_some());
            wait_until_they_wait(&server, cause);
            rustix::process::kill_process(rustix::process::Pid::from_child(&writer), signal).unwrap();
            assert!(!ends(&mut writer).success());
            wait_for("the lease falls", || server.holder("web").is_none());
            assert_eq!(waiting(&server), 0);
            server.json("umount DIR/mnt");
        }
    }
}

/// Zeroing a part of a block that a snapshot has, and copying, need a block too.
#[test]
fn a_program_that_zeroes_or_copies_can_be_killed_as_well() {
    if !crate::real::require_programs(&["xfs_io"]) {
        return;
    }
    for (work, more) in [("fzero", "100 100"), ("copy_range", "-s 0 -d 1M -l 4096 SNAPSHOT")] {
        for signal in [rustix::process::Signal::KILL, rustix::process::Signal::INT] {
            let Some(server) = Server::mounted() else { return };
            let file = std::fs::OpenOptions::new().write(true).open(server.disk("web")).unwrap();
            file.write_all_at(&[1; BLOCK], 0).unwrap();
            drop(file);
            server.json("snapshot web@s");
            server.json("set web enospc=wait quota=4K");
            let snapshot = server.it.path("mnt/snapshots/web/s.raw");
            let words = format!("{work} {}", more.replace("SNAPSHOT", snapshot.to_str().unwrap()));
            let disk = server.disk("web");
            let mut program = crate::real::command("xfs_io", ["-c", &words, disk.to_str().unwrap()])
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .unwrap();
            wait_for("it waits for room", || waiting(&server) > 0);
            assert!(program.try_wait().unwrap().is_none(), "{work}");
            rustix::process::kill_process(rustix::process::Pid::from_child(&program), signal).unwrap();
            assert!(!ends(&mut program).success(), "{work}");
            wait_for("the lease falls", || server.holder("web").is_none());
            assert_eq!(waiting(&server), 0);
            server.json("umount DIR/mnt");
        }
    }
}

#[test]
fn a_program_with_asynchronous_io_can_be_killed_as_well() {
    if !crate::real::require_programs(&["fio"]) {
        return;
    }
    for cause in causes() {
        let Some(server) = Server::mounted() else { return };
        server.json(&format!("set web {cause}"));
        let file = format!("--filename={}", server.disk("web").display());
        let mut writer = Command::new("fio")
            .args(["--name=a", &file, "--ioengine=libaio", "--direct=1", "--rw=write", "--bs=4k", "--iodepth=64"])
            .args(["--size=8M", "--thread"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        wait_for("it writes", || server.holder("web").is_some());
        wait_until_they_wait(&server, cause);
        writer.kill().unwrap();
        assert!(!ends(&mut writer).success());
        wait_for("the lease falls", || server.holder("web").is_none());
    }
}

#[test]
fn a_server_ends_while_a_program_waits() {
    for cause in causes() {
        let Some(server) = Server::mounted() else { return };
        server.json(&format!("set web {cause}"));
        let mut writer = dd(&server, true);
        wait_for("it writes", || server.holder("web").is_some());
        wait_until_they_wait(&server, cause);
        server.end();
        assert!(!ends(&mut writer).success(), "{cause}: it was never acknowledged");
        server.it.json(&["check"]);
    }
}

#[test]
fn without_waiting_no_room_is_an_error_of_each_front_end() {
    let Some(server) = Server::mounted() else { return };
    server.json("set web quota=4K");
    let file = std::fs::OpenOptions::new().write(true).custom_flags(libc::O_SYNC).open(server.disk("web")).unwrap();
    file.write_all_at(&[1; BLOCK], 0).unwrap();
    assert_eq!(file.write_all_at(&[1; BLOCK], 8192).unwrap_err().raw_os_error(), Some(libc::ENOSPC));
    drop(file);
    wait_for("the lease falls", || server.holder("web").is_none());
    server.json("attach nbd web --socket SOCK");
    let mut client = Nbd::open(&server.sock(), "web").unwrap();
    assert_eq!(client.write(&[1; BLOCK], 8192).unwrap(), 28);
    assert_eq!(client.write(&[2; BLOCK], 0).unwrap(), 0, "in place");
    drop(client);
    server.json("detach web");
    server.json("attach vhost-user web --socket SOCK");
    let mut guest = Guest::new(1);
    guest.connect(&server.sock());
    assert_eq!(guest.write(0, 16, &[1; BLOCK]), 1);
    assert_eq!(guest.write(0, 0, &[3; BLOCK]), 0);
    assert_eq!(guest.ask(0, IN, 0, &[], BLOCK), (0, vec![3; BLOCK]));
}
