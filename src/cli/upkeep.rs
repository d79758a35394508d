//! Commands about the pool as a whole: check, scrub, reclaim, metrics.

use clap::Args;

use super::Ask;
use crate::api::Request;

/// Prove that the metadata is sound
///
/// Reads only, unless told to mend. Exits with 5 when something is wrong and was not mended. Beside the metadata it reads
/// the seals, the records of retired snapshots and the newest backup of the catalog; the data itself is read by
/// 'afterimage scrub'.
///
/// With --rebuild the catalog is made again, for a pool that does not open because 'catalog.redb' is damaged or lost. No
/// server may be running. If the newest backup of the catalog (one a day) and the journal fit together, nothing is lost.
/// Otherwise every sealed snapshot comes back with its data, under its last known name, and each disk becomes what its
/// newest snapshot is; the report says what is lost. The old catalog stays beside the new one as
/// 'catalog.damaged-N.redb'. Data of which nobody knows any more where it belongs is not given back to the host until
/// 'check --repair' is run. A catalog that is sound is left alone.
#[derive(Debug, Args)]
pub(super) struct Check {
    /// Give back space that nothing names, also what a rebuild left; seal again what lost its seal, from the data as it is
    /// now, keeping what can be read of the old one; make another backup of the catalog if the newest is damaged
    #[arg(long)]
    repair: bool,
    /// Make the catalog again from its newest backup, the journal and the seals of the snapshots
    #[arg(long, conflicts_with = "repair")]
    rebuild: bool,
}

impl Check {
    pub(super) fn rebuilds(&self) -> bool {
        self.rebuild
    }

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
