//! QEMU as the front end: its firmware boots a sector from the disk, which writes and reads another one for ever.
//!
//! # Rules
//! 1. Needs QEMU 10 or newer (`reconnect-ms`), and no KVM and no kernel: a boot takes a second or two.

use std::io::Read;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use afterimage::disk::{self, BlockDevice};

use super::serve;
use crate::real::require;

const QEMU: &str = "qemu-system-x86_64";
/// How long a guest may take for anything, on a machine that is busy.
const PATIENCE: Duration = Duration::from_secs(60);

/// Writes sector 1 full of a counter, reads it back, compares, says `.` on the serial line and does it again with the next
/// number; says `!` and halts when anything is wrong. In the syntax of nasm:
///
/// ```text
/// org 0x7c00
///   cli / xor ax,ax / mov ds,ax / mov es,ax / mov ss,ax / mov sp,0x7c00 / sti / cld / mov [drive],dl
/// again: mov di,0x8000 / mov cx,256 / mov ax,[counter] / rep stosw
///   mov ax,0x4300 / mov dl,[drive] / mov si,write / int 0x13 / jc bad
///   mov ax,0x4200 / mov dl,[drive] / mov si,read / int 0x13 / jc bad
///   mov si,0x8000 / mov di,0x9000 / mov cx,256 / repe cmpsw / jne bad
///   mov al,'.' / mov dx,0x3f8 / out dx,al / inc word [counter] / jmp again
/// bad: mov al,'!' / mov dx,0x3f8 / out dx,al / cli / hlt
/// write: db 16,0 / dw 1,0x8000,0 / dq 1
/// read: db 16,0 / dw 1,0x9000,0 / dq 1
/// counter: dw 1
/// drive: db 0
/// ```
const BOOT: &str = "fa31c08ed88ec08ed0bc007cfbfc88167e7cbf0080b90001a17c7cf3abb800438a167e7cbe5c7ccd137227b800428a167e7c\
be6c7ccd137219be0080bf0090b90001f3a7750cb02ebaf803eeff067c7cebc0b021baf803eefaf4909010000100008000000100000000000000\
100001000090000001000000000000000100";

fn boot_sector() -> Vec<u8> {
    let digits: Vec<u8> = BOOT.bytes().map(|c| (c as char).to_digit(16).unwrap() as u8).collect();
    let mut sector: Vec<u8> = digits.chunks_exact(2).map(|pair| pair[0] << 4 | pair[1]).collect();
    sector.resize(510, 0);
    sector.extend([0x55, 0xAA]);
    sector
}

struct Vm {
    process: Child,
    serial: Receiver<u8>,
}

impl Drop for Vm {
    fn drop(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }
}

impl Vm {
    fn start(socket: &std::path::Path) -> Self {
        let chardev = format!("socket,id=c,path={},reconnect-ms=100", socket.display());
        let mut process = Command::new(QEMU)
            .args(["-M", "q35", "-accel", "tcg", "-m", "64", "-nodefaults", "-display", "none", "-serial", "stdio"])
            .args(["-object", "memory-backend-memfd,id=m,size=64M,share=on", "-numa", "node,memdev=m"])
            .args(["-chardev", &chardev, "-device", "vhost-user-blk-pci,chardev=c,num-queues=2,bootindex=0"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut output = process.stdout.take().unwrap();
        let (send, serial) = channel();
        std::thread::spawn(move || {
            let mut byte = [0];
            while output.read(&mut byte).is_ok_and(|len| len == 1) && send.send(byte[0]).is_ok() {}
        });
        Self { process, serial }
    }

    /// Waits until the guest has gone round so many times more.
    fn rounds(&self, count: usize) {
        for _ in 0..count {
            let byte = self.serial.recv_timeout(PATIENCE).expect("the guest goes on");
            assert_eq!(byte as char, '.', "what was written is read");
        }
    }
}

#[test]
fn a_guest_of_qemu_goes_on_when_the_server_comes_back() {
    let version = Command::new(QEMU).arg("--version").output();
    let known = version.is_ok_and(|out| {
        let text = String::from_utf8_lossy(&out.stdout).into_owned();
        let number = text.split("version ").nth(1).and_then(|rest| rest.split('.').next()?.parse::<u32>().ok());
        number.is_some_and(|number| number >= 10)
    });
    if !require(known, "QEMU 10 or newer") {
        return;
    }
    let pool = tempfile::tempdir().unwrap();
    let store = crate::tree::new_pool(&pool);
    disk::create(&store, "d", 64 << 20).unwrap();
    let device = disk::open(&store, "d").unwrap();
    device.write(&boot_sector(), 0).unwrap();
    let socket = pool.path().join("disk.sock");
    let serve = || serve(&socket, Arc::clone(&device) as Arc<dyn BlockDevice>, 2, Box::new(()));
    let mut server = serve();
    let vm = Vm::start(&socket);
    vm.rounds(10);
    for _ in 0..3 {
        server.stop();
        server = serve();
        // More than can have been on their way.
        while vm.serial.try_recv().is_ok() {}
        vm.rounds(100);
    }
    drop(vm);
    // The next guest finds the disk as the last left it.
    Vm::start(&socket).rounds(10);
    server.stop();
}
