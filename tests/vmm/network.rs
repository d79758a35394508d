//! A guest on the network: a tap of this machine, and a program at its other end.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use afterimage::error::Kind;
use afterimage::vmm::{Ending, Machine, NetSettings};

use super::toy::{require_kvm, run, settings};
use crate::real::{require, require_programs};

/// Answers one frame with its text in large letters.
const PEER: &str = "
import socket, sys
peer = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x88b5))
peer.bind((sys.argv[1], 0x88b5))
peer.settimeout(60)
print('ready', flush=True)
frame = peer.recv(2048)
print(frame[6:12].hex(':'), flush=True)
peer.send(frame[6:12] + bytes([2, 0, 0, 0, 0, 1]) + frame[12:14] + frame[14:].upper())
";

/// So that each has a name of its own.
static NEXT: AtomicU32 = AtomicU32::new(0);

/// A tap, until it is dropped.
struct Tap(String);

impl Tap {
    fn new() -> Option<Self> {
        let programs = require_programs(&["ip", "python3"]);
        let able = rustix::process::geteuid().is_root() && std::path::Path::new("/dev/net/tun").exists();
        if !programs || !require(able, "root and /dev/net/tun") {
            return None;
        }
        let tap = Self(format!("aft{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed)));
        tap.ip(&["tuntap", "add", "dev", &tap.0, "mode", "tap"]);
        tap.ip(&["link", "set", &tap.0, "up"]);
        Some(tap)
    }

    fn ip(&self, words: &[&str]) {
        assert!(Command::new("ip").args(words).status().unwrap().success(), "{words:?} of {}", self.0);
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        self.ip(&["link", "del", &self.0]);
    }
}

/// The kernel makes an interface that is not there.
#[test]
fn what_is_no_tap_is_refused_and_none_is_made() {
    if !require_kvm() {
        return;
    }
    let Some(tap) = Tap::new() else { return };
    for (name, kind) in [("nosuch0", Kind::NotFound), ("a%d", Kind::Io), ("lo", Kind::Usage)] {
        let mut settings = settings("off");
        settings.nets.push(NetSettings { tap: name.into(), mac: [2, 0, 0, 0, 0, 0xfe] });
        let error = Machine::new(&settings).unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
        assert!(error.message().contains(name), "{error}");
        if kind != Kind::Io {
            let hint = error.next_step().unwrap();
            assert!(hint.contains(&format!("ip tuntap add dev {name} mode tap")), "{hint}");
        }
    }
    let mut settings = settings("off");
    settings.nets.push(NetSettings { tap: tap.0.clone(), mac: [2, 0, 0, 0, 0, 0xfe] });
    Machine::new(&settings).unwrap();
}

#[test]
fn a_guest_sends_and_gets_frames() {
    if !require_kvm() {
        return;
    }
    let Some(tap) = Tap::new() else { return };
    let mut settings = settings("talk=hello off");
    settings.nets.push(NetSettings { tap: tap.0.clone(), mac: [2, 0, 0, 0, 0, 0xfe] });
    let mut peer = Command::new("python3").args(["-c", PEER, &tap.0]).stdout(Stdio::piped()).spawn().unwrap();
    let mut said = BufReader::new(peer.stdout.take().unwrap()).lines();
    assert_eq!(said.next().unwrap().unwrap(), "ready");
    assert_eq!(run(&settings), ("HELLO\n".into(), Ending::PowerOff));
    assert_eq!(said.next().unwrap().unwrap(), "02:00:00:00:00:fe");
    assert!(peer.wait().unwrap().success());
}
