//! Commands about the pool as a whole: check, scrub, reclaim, metrics.

use clap::Args;

use super::Ask;
use crate::api::Request;

/// Prove that the metadata is sound
///
/// Reads only, unless told to mend. Exits with 5 when something is wrong and was not mended.
#[derive(Debug, Args)]
pub(super) struct Check {
    /// Mend leaks: give back space that nothing names
    #[arg(long)]
    repair: bool,
    /// Make the block map again from the seal files and the newest backup of the catalog
    #[arg(long, conflicts_with = "repair")]
    rebuild: bool,
}

impl Check {
    pub(super) fn ask(self) -> Ask {
        Ask::question(Request::Check { repair: self.repair, rebuild: self.rebuild })
    }
}

/// Read every sealed block and compare its checksum
///
/// Names each disk, snapshot and offset that is damaged, and exits with 5 if there is one.
#[derive(Debug, Args)]
pub(super) struct Scrub {}

impl Scrub {
    #[expect(clippy::unused_self, reason = "all commands are asked alike")]
    pub(super) fn ask(self) -> Ask {
        Ask::question(Request::Scrub {}).in_bytes()
    }
}

/// Give freed space back to the host
///
/// A server does this in the background; this tells when it is done.
#[derive(Debug, Args)]
pub(super) struct Reclaim {
    /// Return only when all of it is back
    #[arg(long)]
    wait: bool,
}

impl Reclaim {
    pub(super) fn ask(self) -> Ask {
        Ask::change(Request::Reclaim { wait: self.wait }).in_bytes()
    }
}

/// Print the counters as Prometheus text
#[derive(Debug, Args)]
pub(super) struct Metrics {}

impl Metrics {
    #[expect(clippy::unused_self, reason = "all commands are asked alike")]
    pub(super) fn ask(self) -> Ask {
        Ask::question(Request::Metrics {})
    }
}
