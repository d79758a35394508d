//! One front end: what it says, and the queues it has set up.
//!
//! The messages are read, checked for form and answered by the `vhost` crate; this decides what they mean.
//!
//! # Rules
//! 1. A queue works when it is enabled and has memory, addresses and a descriptor to be kicked by; whatever changes one of
//!    these stops it first.
//! 2. Addresses come as the front end sees them and are found in its memory table when a queue begins, not before.
//! 3. A front end that takes memory away which it has shared is disconnected (see [`super::memory`]).
//!
//! # Why not `vhost-user-backend`
//! It refuses the messages for inflight tracking, keeps its queues in its own event loop and gives no way to either.

use std::fs::File;
use std::io;
use std::sync::Arc;

use super::bell::Bell;
use super::config::{self, QUEUE_SIZE_MAX};
use super::inflight::Region;
use super::memory::{self, Memory, REGIONS_MAX};
use super::queue::{Setup, Worker};
use super::sent::Kind;
use super::server::Line;
use super::service::Target;
use crate::budget::{Pot, Share};
use crate::error::lacks_descriptors;
use crate::sync::Mutex;
use vhost::VhostUserMemoryRegionBase;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight, VhostUserLog,
    VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig, VhostUserSharedMsg,
    VhostUserSingleMemoryRegion, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{Error, GpuBackend, Result, VhostUserBackendReqHandler};

/// Descriptors of a queue: what it is kicked by and calls, what ends it, and what its engine needs.
const DESCRIPTORS: usize = 6;

/// What a front end has said of a queue.
#[derive(Default)]
struct Ring {
    size: u16,
    base: u16,
    /// What was taken before `base` and is not answered; forgotten when the front end says another base.
    left: Vec<u16>,
    /// Descriptors, available, used: addresses of the front end.
    addresses: Option<[u64; 3]>,
    enabled: bool,
    kick: Option<Arc<File>>,
    bell: Arc<Bell>,
    error: Arc<Bell>,
    worker: Option<Worker>,
    /// What it has of the descriptors that all share, once it needs any.
    paid: Option<Share>,
}

#[derive(Default)]
struct State {
    features: u64,
    memory: Option<Arc<Memory>>,
    inflight: Option<Arc<Region>>,
    rings: Vec<Ring>,
}

/// A front end.
pub(super) struct Session {
    target: Arc<Target>,
    queues: usize,
    descriptors: Arc<Pot>,
    line: Arc<Line>,
    state: Mutex<State>,
}

impl Session {
    /// Makes one; descriptors are paid out of `descriptors`.
    pub(super) fn new(target: Arc<Target>, queues: usize, descriptors: Arc<Pot>, line: Arc<Line>) -> Self {
        let mut rings = Vec::new();
        rings.resize_with(queues, || Ring { size: QUEUE_SIZE_MAX, ..Ring::default() });
        Self { target, queues, descriptors, line, state: Mutex::new(State { rings, ..State::default() }) }
    }

    /// Stops the queues, having finished what they had taken.
    pub(super) fn end(&self) {
        if let Err(error) = self.state.lock().stop_all() {
            tracing::error!("a queue of a guest did not end as it should: {error}");
        }
    }

    fn offered(&self) -> u64 {
        config::features(self.target.read_only, self.queues)
    }

    /// Takes an event of a queue, or that it has none.
    fn take_event(&self, queue: u8, event: Option<&File>) -> Result<()> {
        event.map_or(Ok(()), |event| Kind::Event.check(event)).map_err(failed)?;
        let mut state = self.state.lock();
        let ring = state.ring(usize::from(queue))?;
        if ring.paid.is_none() {
            ring.paid = Some(self.descriptors.take(DESCRIPTORS).ok_or_else(memory::no_descriptors)?);
        }
        Ok(())
    }

    /// Changes something of a queue while it does not work.
    fn change(&self, index: usize, change: impl FnOnce(&mut Ring) -> Result<()>) -> Result<()> {
        let mut state = self.state.lock();
        state.stop(index)?;
        change(&mut state.rings[index])?;
        state.start(index, self)
    }

    /// Changes something of all queues while none works.
    fn change_all(&self, change: impl FnOnce(&mut State) -> Result<()>) -> Result<()> {
        let mut state = self.state.lock();
        state.stop_all()?;
        let changed = change(&mut state);
        for index in 0..state.rings.len() {
            state.start(index, self)?;
        }
        changed
    }
}

impl State {
    fn ring(&mut self, index: usize) -> Result<&mut Ring> {
        self.rings.get_mut(index).ok_or(Error::InvalidParam)
    }

    fn stop(&mut self, index: usize) -> Result<()> {
        let ring = self.ring(index)?;
        if let Some(worker) = ring.worker.take() {
            let stopped = worker.stop().map_err(failed)?;
            (ring.base, ring.left) = (stopped.base, stopped.left);
        }
        Ok(())
    }

    fn stop_all(&mut self) -> Result<()> {
        // Or the last would go on taking requests while the first finishes what it has.
        self.rings.iter().filter_map(|ring| ring.worker.as_ref()).for_each(Worker::ask_to_stop);
        // All of them, whatever becomes of one.
        let stopped: Vec<_> = (0..self.rings.len()).map(|index| self.stop(index)).collect();
        stopped.into_iter().collect()
    }

    /// Lets a queue work if all is said.
    fn start(&mut self, index: usize, session: &Session) -> Result<()> {
        // A front end that knows of no protocol features knows no other way to enable a queue.
        let known = vhost::vhost_user::message::VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        let enabled = self.rings[index].enabled || self.features & known == 0;
        let ring = &self.rings[index];
        let (Some(memory), Some(addresses), Some(kick), true) = (&self.memory, ring.addresses, &ring.kick, enabled)
        else {
            return Ok(());
        };
        let [descriptors, available, used] = addresses.map(|address| memory.guest_address(address));
        let track = match &self.inflight {
            Some(region) => Some(region.track(index, ring.size).map_err(|what| failed(io::Error::other(what)))?),
            None => None,
        };
        let left = ring.left.clone();
        let setup = Setup {
            memory: Arc::clone(memory),
            size: ring.size,
            descriptors: descriptors?,
            available: available?,
            used: used?,
            base: ring.base,
            left,
            event_index: config::event_index(self.features),
            flushes: config::flushes(self.features),
            kick: Arc::clone(kick),
            bell: Arc::clone(&ring.bell),
            track,
            line: Arc::clone(&session.line),
        };
        let worker = Worker::start(setup, Arc::clone(&session.target), Arc::clone(&ring.error)).map_err(failed)?;
        self.rings[index].worker = Some(worker);
        Ok(())
    }
}

/// Says in the log why something is refused, and what to do where it is the host that lacks something.
pub(super) fn failed(error: io::Error) -> Error {
    if lacks_descriptors(&error) {
        tracing::error!(
            "a front end was disconnected, for this process has no more descriptors: {error}; raise the limit of open files: \
             LimitNOFILE=, ulimit -n"
        );
    } else {
        tracing::warn!("a front end asks for something that cannot be: {error}");
    }
    Error::ReqHandlerError(error)
}

fn index(index: u32) -> usize {
    usize::try_from(index).unwrap_or(usize::MAX)
}

impl VhostUserBackendReqHandler for Session {
    fn set_owner(&self) -> Result<()> {
        self.line.greeted();
        Ok(())
    }

    fn reset_owner(&self) -> Result<()> {
        Ok(())
    }

    fn reset_device(&self) -> Result<()> {
        Err(Error::InvalidOperation("not offered"))
    }

    fn get_features(&self) -> Result<u64> {
        Ok(self.offered())
    }

    fn set_features(&self, features: u64) -> Result<()> {
        if features & !self.offered() != 0 {
            return Err(Error::InvalidParam);
        }
        self.change_all(|state| {
            state.features = features;
            Ok(())
        })
    }

    fn set_mem_table(
        &self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy: Option<bool>,
    ) -> Result<Option<Vec<VhostUserMemoryRegionBase>>> {
        let memory = Memory::of(regions, files, &self.descriptors)?;
        self.change_all(|state| {
            state.memory = Some(Arc::new(memory));
            Ok(())
        })?;
        Ok(None)
    }

    fn set_vring_num(&self, queue: u32, num: u32) -> Result<()> {
        let size = u16::try_from(num).ok().filter(|size| size.is_power_of_two() && *size <= QUEUE_SIZE_MAX);
        let size = size.ok_or(Error::InvalidParam)?;
        self.change(index(queue), |ring| {
            ring.size = size;
            Ok(())
        })
    }

    fn set_vring_addr(
        &self,
        queue: u32,
        _flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> Result<()> {
        self.change(index(queue), |ring| {
            ring.addresses = Some([descriptor, available, used]);
            Ok(())
        })
    }

    fn set_vring_base(&self, queue: u32, base: u32) -> Result<()> {
        let base = u16::try_from(base).map_err(|_| Error::InvalidParam)?;
        self.change(index(queue), |ring| {
            if ring.base != base {
                ring.left.clear();
            }
            ring.base = base;
            Ok(())
        })
    }

    fn get_vring_base(&self, queue: u32) -> Result<VhostUserVringState> {
        let mut state = self.state.lock();
        state.stop(index(queue))?;
        let ring = state.ring(index(queue))?;
        ring.kick = None;
        ring.bell.set(None).map_err(failed)?;
        Ok(VhostUserVringState::new(queue, u32::from(ring.base)))
    }

    fn set_vring_kick(&self, queue: u8, file: Option<File>) -> Result<()> {
        let file = file.ok_or(Error::InvalidOperation("a queue must have a descriptor to be kicked by"))?;
        self.take_event(queue, Some(&file))?;
        self.change(usize::from(queue), |ring| {
            ring.kick = Some(Arc::new(file));
            Ok(())
        })
    }

    fn set_vring_call(&self, queue: u8, file: Option<File>) -> Result<()> {
        self.take_event(queue, file.as_ref())?;
        let mut state = self.state.lock();
        let ring = state.ring(usize::from(queue))?;
        ring.bell.set(file).map_err(failed)?;
        // What was answered while there was none: once too often does no harm.
        if ring.worker.is_some() {
            ring.bell.ring();
        }
        Ok(())
    }

    fn set_vring_err(&self, queue: u8, file: Option<File>) -> Result<()> {
        self.take_event(queue, file.as_ref())?;
        self.state.lock().ring(usize::from(queue))?.error.set(file).map_err(failed)
    }

    fn get_protocol_features(&self) -> Result<VhostUserProtocolFeatures> {
        Ok(config::protocol_features())
    }

    fn set_protocol_features(&self, features: u64) -> Result<()> {
        if features & !config::protocol_features().bits() != 0 {
            return Err(Error::InvalidParam);
        }
        Ok(())
    }

    fn get_queue_num(&self) -> Result<u64> {
        Ok(self.queues as u64)
    }

    fn set_vring_enable(&self, queue: u32, enable: bool) -> Result<()> {
        self.change(index(queue), |ring| {
            ring.enabled = enable;
            Ok(())
        })
    }

    fn get_config(&self, offset: u32, size: u32, _flags: VhostUserConfigFlags) -> Result<Vec<u8>> {
        config::space(self.target.device.size(), self.queues, offset, size).ok_or(Error::InvalidParam)
    }

    fn set_config(&self, _offset: u32, _data: &[u8], _flags: VhostUserConfigFlags) -> Result<()> {
        Err(Error::InvalidOperation("nothing of the configuration can be changed"))
    }

    fn set_gpu_socket(&self, _socket: GpuBackend) -> Result<()> {
        Err(Error::InvalidOperation("this is a disk"))
    }

    fn get_shared_object(&self, _uuid: VhostUserSharedMsg) -> Result<File> {
        Err(Error::InvalidOperation("this is a disk"))
    }

    fn get_inflight_fd(&self, wanted: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        let (queues, size) = (wanted.num_queues, wanted.queue_size);
        if usize::from(queues) > self.queues || size > QUEUE_SIZE_MAX {
            return Err(Error::InvalidParam);
        }
        let (len, file) = Region::make(queues, size).map_err(failed)?;
        Ok((VhostUserInflight::new(len, 0, queues, size), file))
    }

    fn set_inflight_fd(&self, kept: &VhostUserInflight, file: File) -> Result<()> {
        let (queues, size) = (kept.num_queues, kept.queue_size);
        if usize::from(queues) > self.queues || size > QUEUE_SIZE_MAX {
            return Err(Error::InvalidParam);
        }
        let region = Region::open(file, kept.mmap_offset, kept.mmap_size, queues, size).map_err(failed)?;
        self.change_all(|state| {
            state.inflight = Some(Arc::new(region));
            Ok(())
        })
    }

    fn get_max_mem_slots(&self) -> Result<u64> {
        Ok(REGIONS_MAX)
    }

    fn add_mem_region(
        &self,
        region: &VhostUserSingleMemoryRegion,
        file: File,
        _postcopy: Option<bool>,
    ) -> Result<Option<VhostUserMemoryRegionBase>> {
        self.change_all(|state| {
            let memory = state.memory.clone().unwrap_or_default().with(region, file, &self.descriptors)?;
            state.memory = Some(Arc::new(memory));
            Ok(())
        })?;
        Ok(None)
    }

    fn remove_mem_region(&self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        self.change_all(|state| {
            let old = state.memory.clone().unwrap_or_default();
            state.memory = Some(Arc::new(old.without(region.guest_phys_addr, region.memory_size)?));
            Ok(())
        })
    }

    fn set_device_state_fd(
        &self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _file: File,
    ) -> Result<Option<File>> {
        Err(Error::InvalidOperation("a disk has no state to transfer"))
    }

    fn check_device_state(&self) -> Result<()> {
        Err(Error::InvalidOperation("a disk has no state to transfer"))
    }

    fn get_shmem_config(&self) -> Result<VhostUserShMemConfig> {
        Err(Error::InvalidOperation("a disk shares no memory of its own"))
    }

    fn set_log_base(&self, _log: &VhostUserLog, _file: File) -> Result<()> {
        Err(Error::InvalidOperation("not offered"))
    }
}
