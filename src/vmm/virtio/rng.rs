//! A source of random numbers: virtio-rng (virtio 1.2, section 5.4).

use super::{Broken, Crew, Device, Ring, Steps};
use crate::error::Result;

/// The number of a source of random numbers among devices.
const KIND: u32 = 4;
/// Entries of the queue.
const QUEUE: u16 = 64;
/// Bytes of one answer at most; the guest asks again.
const ANSWER: usize = 64 << 10;

/// The device.
#[derive(Debug)]
pub(in crate::vmm) struct Rng;

impl Device for Rng {
    fn kind(&self) -> u32 {
        KIND
    }

    fn features(&self) -> u64 {
        0
    }

    fn queues(&self) -> Vec<u16> {
        vec![QUEUE]
    }

    fn read_config(&self, _offset: u64, _data: &mut [u8]) {}

    fn work(&mut self, _features: u64) -> Result<Vec<Crew>> {
        Ok(vec![(Box::new(Source { buffer: vec![0; ANSWER] }), vec![0])])
    }
}

struct Source {
    buffer: Vec<u8>,
}

impl Steps for Source {
    fn work(&mut self, rings: &mut [Ring]) -> Result<(), Broken> {
        for ring in rings {
            while let Some(head) = ring.next()? {
                let written = self.fill(ring, head);
                ring.answer(head, written)?;
            }
        }
        Ok(())
    }
}

impl Source {
    /// Fills the buffers of a request; returns how many bytes were written.
    fn fill(&mut self, ring: &Ring, head: u16) -> u32 {
        let Some(chain) = ring.chain(head) else { return 0 };
        let bytes = &mut self.buffer[..chain.writable.len().min(ANSWER)];
        if let Err(error) = getrandom::fill(bytes) {
            tracing::error!("the host has no random numbers: {error}");
            return 0;
        }
        let filled = chain.writable.copy_in(ring.memory(), 0, bytes);
        if filled { u32::try_from(bytes.len()).expect("64 KiB at most") } else { 0 }
    }
}
