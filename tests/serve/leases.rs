//! One writer to a disk, whoever comes: the mount, an NBD client, a guest over vhost-user.

use std::os::unix::fs::FileExt;

use super::Server;
use super::client::{Nbd, ask_about};
use crate::real::wait_for;

const EBUSY: Option<i32> = Some(libc::EBUSY);

#[test]
fn an_nbd_client_has_the_lease_as_long_as_it_is_connected() {
    let Some(server) = Server::mounted() else { return };
    server.json("attach nbd web --socket SOCK");
    let writer = server.open_to_write("web").expect("nobody is connected");
    // Opened before, so it is read through the cache; what is opened while another one writes is not.
    let before = std::fs::File::open(server.disk("web")).unwrap();
    let mut seen = [0; 5000];
    before.read_exact_at(&mut seen, 1000).unwrap();
    let refused = Nbd::open(&server.sock(), "web").err().expect("the mount writes");
    assert!(refused.contains("disk 'web' is open for writing by mount"), "{refused}");
    drop(writer);
    let mut first = Nbd::open(&server.sock(), "web").expect("the file was closed");
    let second = Nbd::open(&server.sock(), "").expect("another connection of the same export");
    let holder = format!("export 1 (nbd {})", server.sock().display());
    assert_eq!(server.holder("web").as_deref(), Some(holder.as_str()));
    assert_eq!(server.json("ls")["disks"][0]["holder"], holder);
    assert_eq!(server.open_to_write("web").unwrap_err().raw_os_error(), EBUSY);
    for words in ["resize web 4M --shrink", "rm web", "umount DIR/mnt"] {
        let (code, message) = server.error(words);
        assert_eq!(code, 4, "{words}: {message}");
    }
    server.json("resize web 16M");
    let during = std::fs::File::open(server.disk("web")).unwrap();
    for round in 1..20_u8 {
        assert_eq!(first.write(&[round; 5000], 1000).unwrap(), 0);
        for (name, file) in [("before", &before), ("during", &during)] {
            file.read_exact_at(&mut seen, 1000).unwrap();
            assert_eq!(seen, [round; 5000], "what was acknowledged there is seen here, opened {name}");
        }
    }
    drop(first);
    assert_eq!(server.open_to_write("web").unwrap_err().raw_os_error(), EBUSY, "one is still there");
    drop(second);
    wait_for("the lease falls", || server.open_to_write("web").is_ok());
}

#[test]
fn who_only_asks_about_an_export_needs_no_lease_and_takes_none() {
    let server = Server::without();
    server.json("serve nbd web --socket SOCK --daemon");
    server.json("attach nbd web --socket DIR/other");
    let asking = ask_about(&server.sock(), "web").unwrap();
    assert_eq!(server.holder("web"), None);
    assert_eq!(server.exports()[0]["clients"], 0);
    server.json("resize web 4M --shrink");
    let writer = Nbd::open(&server.it.path("other"), "web").expect("the other one only asks");
    ask_about(&server.sock(), "web").expect("asking is free while somebody writes");
    Nbd::open(&server.sock(), "web").err().expect("the disk has its writer");
    drop((asking, writer));
}

#[test]
fn what_is_missing_is_missing_whoever_writes() {
    let server = Server::without();
    server.json("serve nbd web --socket SOCK --daemon");
    let _writer = Nbd::open(&server.sock(), "web").unwrap();
    let (code, message) = server.error("revert web@none");
    assert_eq!((code, message.contains("none")), (3, true), "{message}");
    assert_eq!(server.error("revert none@a").0, 3);
}

#[test]
fn a_client_that_dies_lets_go() {
    let Some(server) = Server::mounted() else { return };
    server.json("attach nbd web --socket SOCK");
    for _ in 0..20 {
        let mut client = Nbd::open(&server.sock(), "web").unwrap();
        client.write(&[1; 4096], 0).unwrap();
        drop(client);
        server.open_to_write("web").expect("the lease fell with the connection");
    }
}

#[test]
fn a_vhost_user_device_has_the_lease_while_it_is_attached() {
    let Some(server) = Server::mounted() else { return };
    let writer = server.open_to_write("web").unwrap();
    let (code, message) = server.error("attach vhost-user web --socket SOCK");
    assert_eq!((code, message.as_str()), (4, "disk 'web' is open for writing by mount"));
    assert!(!server.sock().exists());
    drop(writer);
    server.json("attach vhost-user web --socket SOCK");
    assert_eq!(server.open_to_write("web").unwrap_err().raw_os_error(), EBUSY);
    let holder = format!("export 2 (vhost-user {})", server.sock().display());
    assert_eq!(server.exports()[0]["writing"][0], "web");
    for words in ["attach nbd web --socket DIR/other", "attach vhost-user web --socket DIR/other"] {
        let (code, message) = server.error(words);
        assert_eq!((code, message.contains(&holder)), (4, true), "{words}: {message}");
    }
    server.json("detach web");
    server.open_to_write("web").unwrap();
}

#[test]
fn who_only_reads_needs_no_lease() {
    let Some(server) = Server::mounted() else { return };
    let writer = server.open_to_write("web").unwrap();
    writer.write_all_at(&[7; 8192], 0).unwrap();
    server.json("snapshot web@a");
    server.json("attach nbd web --read-only --socket SOCK");
    server.json("attach nbd web@a --socket DIR/two");
    server.json("attach vhost-user web@a --socket DIR/three");
    server.json("attach vhost-user web --read-only --socket DIR/four");
    let mut live = Nbd::open(&server.sock(), "web").unwrap();
    let mut old = Nbd::open(&server.it.path("two"), "web@a").unwrap();
    assert!(live.read_only() && old.read_only());
    writer.write_all_at(&[8; 4096], 0).unwrap();
    assert_eq!(live.read(4096, 0).unwrap(), [8; 4096]);
    assert_eq!(old.read(4096, 0).unwrap(), [7; 4096]);
    assert_ne!(live.write(&[1; 4096], 0).unwrap(), 0);
    assert_ne!(old.write(&[1; 4096], 0).unwrap(), 0);
    assert_eq!(server.holder("web").as_deref(), Some("mount"));
    // A snapshot that is served goes at once, and its data with the last who reads it.
    server.json("rm web@a");
    assert_eq!(old.read(8192, 0).unwrap(), [7; 8192]);
}
