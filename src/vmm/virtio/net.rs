//! A network card: virtio-net (virtio 1.2, section 5.1) on a tap of the host.
//!
//! # Rules
//! 1. No offloads are offered, so a frame is a frame: what the guest says in the header of one is not passed on to the host.
//! 2. A frame that has no room in the buffer of the guest, or no buffer at all, waits in the tap or is lost, as on a wire.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use virtio_bindings::bindings::virtio_net::VIRTIO_NET_F_MAC;

use super::{Broken, Crew, Device, Ring, Steps, Work};
use crate::error::{Error, Kind, Result};
use crate::sys::tap::{self, HEADER};

/// The number of a network card among devices.
const KIND: u32 = 1;
/// Entries of a queue.
const QUEUE: u16 = 256;
/// Bytes of a frame with its header at most, and of the smallest that has two addresses and a type.
const FRAME_MAX: usize = 64 << 10;
const FRAME_MIN: usize = HEADER + 14;
/// Where in the header it says over how many buffers the frame goes: one.
const BUFFERS: usize = 10;
/// Which queue is which.
const RECEIVE: usize = 0;
const SEND: usize = 1;

/// The device.
#[derive(Debug)]
pub(in crate::vmm) struct Net {
    tap: Arc<File>,
    mac: [u8; 6],
}

impl Net {
    /// Plugs a card into a tap.
    pub(in crate::vmm) fn new(tap: Arc<File>, mac: [u8; 6]) -> Self {
        Self { tap, mac }
    }
}

/// Opens a tap.
///
/// # Errors
/// What is wrong with it.
pub(in crate::vmm) fn open_tap(name: &str) -> Result<File> {
    let cannot = |e| Error::io(format!("cannot open the network interface {name}"), e);
    let make = format!("make it as root: ip tuntap add dev {name} mode tap user USER && ip link set {name} up");
    // The kernel would make it, for as long as the guest runs.
    if !tap::exists(name).map_err(cannot)? {
        return Err(Error::not_found(format!("this host has no network interface {name}")).hint(make));
    }
    tap::open(name).map_err(|e| {
        if e.kind() == io::ErrorKind::InvalidInput {
            return Error::usage(format!("the network interface {name} is no tap with one queue"))
                .because(e)
                .hint(make);
        }
        let error = cannot(e);
        match error.kind() {
            Kind::Denied => error.hint(format!("as root: ip tuntap add dev {name} mode tap user USER")),
            Kind::Busy => error.hint("another program has it open"),
            Kind::NotFound => error.hint("the host has no /dev/net/tun: modprobe tun"),
            _ => error,
        }
    })
}

impl Device for Net {
    fn kind(&self) -> u32 {
        KIND
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_NET_F_MAC
    }

    fn queues(&self) -> Vec<u16> {
        vec![QUEUE; 2]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let from = usize::try_from(offset).unwrap_or(usize::MAX).min(self.mac.len());
        data.iter_mut().zip(&self.mac[from..]).for_each(|(to, from)| *to = *from);
    }

    fn work(&mut self, _features: u64) -> Result<Vec<Crew>> {
        let one = |side: Side, queue| {
            let work = Frames { tap: Arc::clone(&self.tap), side, buffer: vec![0; FRAME_MAX], starved: false };
            (Box::new(work) as Box<dyn Work>, vec![queue])
        };
        Ok(vec![one(Side::ToGuest, RECEIVE), one(Side::FromGuest, SEND)])
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    ToGuest,
    FromGuest,
}

/// One direction at work.
struct Frames {
    tap: Arc<File>,
    side: Side,
    buffer: Vec<u8>,
    /// The guest has no buffer for more frames: the tap is not waited for until it has.
    starved: bool,
}

impl Steps for Frames {
    fn also(&self) -> Option<BorrowedFd<'_>> {
        (self.side == Side::ToGuest && !self.starved).then(|| self.tap.as_fd())
    }

    fn work(&mut self, rings: &mut [Ring]) -> Result<(), Broken> {
        for ring in rings {
            match self.side {
                Side::ToGuest => self.receive(ring)?,
                Side::FromGuest => self.send(ring)?,
            }
        }
        Ok(())
    }
}

impl Frames {
    fn receive(&mut self, ring: &mut Ring) -> Result<(), Broken> {
        loop {
            let Some(head) = ring.next()? else {
                self.starved = true;
                return Ok(());
            };
            self.starved = false;
            let len = match rustix::io::read(&*self.tap, &mut self.buffer) {
                Ok(len) if len >= FRAME_MIN => len,
                Ok(_) => {
                    ring.put_back();
                    continue;
                }
                Err(error) => {
                    ring.put_back();
                    if error != rustix::io::Errno::AGAIN {
                        return Err(Broken(format!("the tap cannot be read: {error}")));
                    }
                    return Ok(());
                }
            };
            self.buffer[BUFFERS..HEADER].copy_from_slice(&1_u16.to_le_bytes());
            let fits = ring.chain(head).is_some_and(|chain| {
                chain.writable.len() >= len && chain.writable.copy_in(ring.memory(), 0, &self.buffer[..len])
            });
            ring.answer(head, if fits { u32::try_from(len).expect("64 KiB at most") } else { 0 })?;
        }
    }

    fn send(&mut self, ring: &mut Ring) -> Result<(), Broken> {
        while let Some(head) = ring.next()? {
            let frame = ring.chain(head).and_then(|chain| {
                let len = chain.readable.len();
                let whole = (FRAME_MIN..=FRAME_MAX).contains(&len)
                    && chain.readable.copy_out(ring.memory(), 0, &mut self.buffer[..len]);
                whole.then_some(len)
            });
            if let Some(len) = frame {
                self.buffer[..HEADER].fill(0);
                // A full queue of the host loses frames, as any does.
                if let Err(error) = rustix::io::write(&*self.tap, &self.buffer[..len]) {
                    tracing::debug!("a frame of the guest was lost: {error}");
                }
            }
            ring.answer(head, 0)?;
        }
        Ok(())
    }
}
