//! What makes writes durable reaches the disk, and is answered only then.

use std::os::unix::net::UnixStream;
use std::sync::Arc;

use afterimage::error::Result;
use afterimage::nbd::option::{GREETING, kind};
use afterimage::nbd::wire::{Command, command};
use afterimage::nbd::{self, Exports, Listen, NoContexts, Options, Server};

use super::plain::Client;
use crate::vhost::Ram;

/// One disk in memory, under any name.
struct One(Arc<Ram>);

impl Exports for One {
    fn names(&self) -> Vec<String> {
        vec!["a".into()]
    }

    fn open(&self, name: &str) -> Result<nbd::Export> {
        let device = Arc::clone(&self.0);
        let (name, description, contexts) = (name.to_owned(), String::new(), Arc::new(NoContexts));
        Ok(nbd::Export { name, description, device, contexts, enter: Box::new(|| Ok(Box::new(()))) })
    }
}

fn serve(ram: &Arc<Ram>) -> (Server, Client, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("sock");
    let options = Options { listen: Listen::Unix(path.clone()), tls: None, connections_max: 4 };
    let server = nbd::start(options, Arc::new(One(Arc::clone(ram)))).unwrap();
    let mut client = Client { stream: UnixStream::connect(path).unwrap(), structured: false };
    client.stream.set_read_timeout(Some(std::time::Duration::from_secs(60))).unwrap();
    client.receive::<GREETING>();
    client.send(&3u32.to_be_bytes());
    client.ask(kind::STRUCTURED_REPLY, &[]);
    client.structured = true;
    client.go("a");
    (server, client, dir)
}

#[test]
fn each_way_to_ask_for_durability_ends_with_a_flush_of_the_disk() {
    let ram = Ram::new(1 << 20);
    let (_server, mut client, _dir) = serve(&ram);
    let fua = command::FUA;
    for (what, flags, done) in [
        (Command::Write, 0, &["write"][..]),
        (Command::Flush, 0, &["flush"]),
        (Command::Flush, fua, &["flush"]),
        (Command::Write, fua, &["write", "flush"]),
        (Command::Trim, 0, &["discard"]),
        (Command::Trim, fua, &["discard", "flush"]),
        (Command::WriteZeroes, 0, &["zero"]),
        (Command::WriteZeroes, fua, &["zero", "flush"]),
        (Command::WriteZeroes, fua | command::NO_HOLE, &["write", "flush"]),
        (Command::Read, fua, &["read"]),
    ] {
        let len = if what == Command::Flush { 0 } else { 8192 };
        ram.log.lock().clear();
        client.request(what, flags, 5, 0, len);
        if what == Command::Write {
            client.send(&[3; 8192]);
        }
        let (cookie, errno, _) = client.reply(0);
        assert_eq!((cookie, errno), (5, 0), "{what:?} {flags}");
        let log: Vec<_> = ram.log.lock().iter().map(|(name, ..)| *name).collect();
        assert_eq!(log, done, "{what:?} {flags}");
    }
}

/// A read that is asked for after it is answered before it, as long as the disk has not flushed.
#[test]
fn nothing_is_answered_before_the_flush_of_the_disk_has_ended() {
    let ram = Ram::new(1 << 20);
    let (_server, mut client, _dir) = serve(&ram);
    for (what, flags, len) in [(Command::Flush, 0, 0), (Command::Trim, command::FUA, 4096)] {
        ram.close(true);
        client.request(what, flags, 1, 0, len);
        client.request(Command::Read, 0, 2, 4096, 512);
        assert_eq!(client.reply(0).0, 2);
        ram.close(false);
        assert_eq!(client.reply(0).0, 1);
    }
    ram.fail(true);
    client.request(Command::Flush, 0, 3, 0, 0);
    let (cookie, errno, _) = client.reply(0);
    assert_eq!(cookie, 3);
    assert_ne!(errno, 0, "a flush that failed is no flush");
}
