//! Commands about snapshots: snapshot, clone, revert, hold, release, prune.

use clap::Args;

use super::Ask;
use crate::api::{Keep, Request};

/// Take snapshots, all at one instant or none
///
/// Writers wait for a moment at most, whatever the size of the disks.
#[derive(Debug, Args)]
pub(super) struct Snapshot {
    /// DISK@SNAPSHOT, each disk once
    #[arg(value_name = "DISK@SNAPSHOT", required = true)]
    snapshots: Vec<String>,
}

impl Snapshot {
    pub(super) fn ask(self) -> Ask {
        Ask::change(Request::Snapshot { snapshots: self.snapshots })
    }
}

/// Make a disk that begins as a snapshot
///
/// Takes no time and no space; the snapshot may be removed later.
#[derive(Debug, Args)]
pub(super) struct Clone {
    /// The snapshot
    #[arg(value_name = "DISK@SNAPSHOT")]
    snapshot: String,
    /// Name of the new disk
    #[arg(value_name = "NEW")]
    disk: String,
}

impl Clone {
    pub(super) fn ask(self) -> Ask {
        Ask::change(Request::Clone { snapshot: self.snapshot, disk: self.disk })
    }
}

/// Take a disk back to one of its snapshots
///
/// All snapshots stay, newer ones too. What was written since the last one is dropped unless --keep is given, and the
/// answer says how much that was: exactly, or "at most" so much when a snapshot in between was removed or retired, for a
/// block that was written before and after it then counts twice. Refused while something has the disk open for writing.
#[derive(Debug, Args)]
pub(super) struct Revert {
    /// The snapshot
    #[arg(value_name = "DISK@SNAPSHOT")]
    snapshot: String,
    /// Keep what was written since the last snapshot, as a snapshot of this name
    #[arg(long, value_name = "NAME")]
    keep: Option<String>,
}

impl Revert {
    pub(super) fn ask(self) -> Ask {
        Ask::change(Request::Revert { snapshot: self.snapshot, keep: self.keep })
    }
}

/// Keep a snapshot from being removed
#[derive(Debug, Args)]
pub(super) struct Hold {
    /// The snapshot
    #[arg(value_name = "DISK@SNAPSHOT")]
    snapshot: String,
    /// Who holds it; several may
    #[arg(long, default_value = "user")]
    tag: String,
}

impl Hold {
    pub(super) fn ask(self) -> Ask {
        Ask::change(Request::Hold { snapshot: self.snapshot, tag: self.tag })
    }
}

/// Let go of a held snapshot
#[derive(Debug, Args)]
pub(super) struct Release {
    /// The snapshot
    #[arg(value_name = "DISK@SNAPSHOT")]
    snapshot: String,
    /// Who held it
    #[arg(long, default_value = "user")]
    tag: String,
}

impl Release {
    pub(super) fn ask(self) -> Ask {
        Ask::change(Request::Release { snapshot: self.snapshot, tag: self.tag })
    }
}

/// Remove the snapshots of a disk that no rule keeps
///
/// Each rule keeps the newest snapshots of its sort; a snapshot stays if any rule keeps it, or if it is held.
#[derive(Debug, Args)]
pub(super) struct Prune {
    /// The disk
    disk: String,
    /// Keep the newest N
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    keep_last: u32,
    /// Keep the newest of each of the last N hours that have one
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    keep_hourly: u32,
    /// Keep the newest of each of the last N days that have one
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    keep_daily: u32,
    /// Keep the newest of each of the last N weeks that have one
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    keep_weekly: u32,
    /// Keep the newest of each of the last N months that have one
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    keep_monthly: u32,
    /// Keep the newest of each of the last N years that have one
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    keep_yearly: u32,
    /// Only tell what would be removed
    #[arg(short = 'n', long)]
    dry_run: bool,
}

impl Prune {
    pub(super) fn ask(self) -> Ask {
        let keep = Keep {
            last: self.keep_last,
            hourly: self.keep_hourly,
            daily: self.keep_daily,
            weekly: self.keep_weekly,
            monthly: self.keep_monthly,
            yearly: self.keep_yearly,
        };
        let request = Request::Prune { disk: self.disk, keep, dry_run: self.dry_run };
        if self.dry_run { Ask::question(request) } else { Ask::change(request) }
    }
}
