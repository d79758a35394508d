//! What a machine needs of the host, opened once: KVM, its kernel, its network cards.
//!
//! # Rules
//! 1. A machine is made of it without opening anything: so one that reboots is made anew when the process has no rights to
//!    anything any more.
//! 2. One machine at a time: the next is made when the one before is gone.

use std::fs::File;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use kvm_ioctls::Kvm;

use super::boot::BootFiles;
use super::filter::Confinement;
use super::fit;
use super::machine::Settings;
use super::nursery::Nursery;
use super::state::MachineState;
use super::virtio;
use crate::error::{Error, Kind, Result};

/// The one version of the interface of KVM there ever was.
const KVM_VERSION: i32 = 12;
const DEVICE: &str = "/dev/kvm";

/// What a machine is made from, beside its settings.
#[derive(Debug, Clone)]
pub struct Means {
    pub(super) kvm: Arc<Kvm>,
    /// `None` for one that goes on where another was.
    pub(super) boot: Option<BootFiles>,
    pub(super) taps: Vec<Arc<File>>,
    pub(super) confinement: Confinement,
}

impl Means {
    /// Opens what a machine that begins needs.
    ///
    /// # Errors
    /// What the host lacks, or is wrong with a file.
    pub fn open(settings: &Settings) -> Result<Self> {
        let boot = Some(BootFiles::open(&settings.boot)?);
        Ok(Self { boot, ..Self::open_to_go_on(settings)? })
    }

    /// Opens what a machine that goes on where another was needs, and what it would take to reboot, if that is there: a
    /// machine whose kernel was removed meanwhile goes on, and only does not begin again.
    ///
    /// # Errors
    /// What the host lacks.
    pub(super) fn open_to_go_on_and_reboot(settings: &Settings) -> Result<Self> {
        let boot = BootFiles::open(&settings.boot);
        let boot = boot.inspect_err(|e| tracing::warn!("the guest goes on, and will not reboot: {e}")).ok();
        Ok(Self { boot, ..Self::open_to_go_on(settings)? })
    }

    /// Finds out whether this host can have a state, without making a machine of it.
    ///
    /// # Errors
    /// As [`fit::check_host`].
    pub(super) fn check_host(&self, state: &MachineState, settings: &Settings) -> Result<()> {
        let vm = self.kvm.create_vm().map_err(|e| Error::io("KVM cannot make a machine", e.into()))?;
        let cpu = vm.create_vcpu(0).map_err(|e| Error::io("KVM cannot make a processor", e.into()))?;
        fit::check_host(state, settings, &self.kvm, &cpu)
    }

    /// Opens what a machine that goes on where another was needs.
    ///
    /// # Errors
    /// What the host lacks.
    pub(super) fn open_to_go_on(settings: &Settings) -> Result<Self> {
        let kvm = Arc::new(open_kvm()?);
        let taps = settings.nets.iter().map(|net| virtio::open_tap(&net.tap).map(Arc::new)).collect::<Result<_>>()?;
        Ok(Self { kvm, boot: None, taps, confinement: Confinement::default() })
    }

    /// Says that machines made of this run in threads that are confined; [`Self::confine`] comes before they do. Beside
    /// reading, files are only reached from `folder`, where the process keeps its checkpoints.
    ///
    /// # Errors
    /// None that are known.
    pub fn confined(self, folder: Option<BorrowedFd<'_>>) -> Result<Self> {
        Ok(Self { confinement: Confinement::strict(folder)?, ..self })
    }

    /// Confines all threads of the process to what machines need of the kernel, for good; nothing for one that is not to be
    /// [`Self::confined`].
    ///
    /// # Errors
    /// When the host does not do it.
    pub fn confine(&self) -> Result<()> {
        self.confinement.process()
    }

    pub(super) fn nursery(&self) -> Result<Arc<Nursery>> {
        let nursery = Nursery::new(self.confinement.clone());
        Ok(Arc::new(nursery.map_err(|e| Error::io("no thread for the devices of the guest", e))?))
    }
}

fn open_kvm() -> Result<Kvm> {
    let kvm = Kvm::new().map_err(|e| {
        let error = Error::io(format!("cannot open {DEVICE}"), e.into());
        match error.kind() {
            Kind::Denied => error.hint(format!("you need to write to {DEVICE}: join the group 'kvm', or be root")),
            Kind::NotFound => error.hint("the host has no KVM: switch virtualization on in its firmware, modprobe kvm"),
            _ => error,
        }
    })?;
    match kvm.get_api_version() {
        KVM_VERSION => Ok(kvm),
        other => Err(Error::unsupported(format!("{DEVICE} is of version {other}, not {KVM_VERSION}"))),
    }
}
