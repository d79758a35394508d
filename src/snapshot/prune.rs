//! `prune`: keeps the newest snapshots and the newest of each hour, day, week, month and year; deletes the others.
//!
//! As in restic and Proxmox: rules are applied one after the other to the snapshots from new to old; a rule keeps the newest
//! snapshot of each period until its count is used up. Held snapshots are always kept. Periods are in UTC.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::clock;
use crate::error::{Error, Kind, Result};
use crate::store::{SnapshotInfo, SnapshotState, Store};

/// How many of each to keep.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct Keep {
    /// The newest so many.
    pub last: u32,
    /// The newest of each of so many hours.
    pub hourly: u32,
    /// The newest of each of so many days.
    pub daily: u32,
    /// The newest of each of so many weeks (Monday to Sunday).
    pub weekly: u32,
    /// The newest of each of so many months.
    pub monthly: u32,
    /// The newest of each of so many years.
    pub yearly: u32,
}

/// What was decided of one snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PruneLine {
    /// Its name.
    pub snapshot: String,
    /// Whether it is kept.
    pub kept: bool,
    /// Why.
    pub why: String,
    /// Why it could not be deleted: it is kept, although no rule says so.
    pub error: Option<String>,
}

/// Decides for snapshots from new to old.
fn decide(newest_first: &[SnapshotInfo], keep: &Keep) -> Vec<PruneLine> {
    type Period = fn(u64) -> String;
    let rules: [(&str, u32, Period); 5] = [
        ("hourly", keep.hourly, |t| clock::show(t)[..13].to_owned()),
        ("daily", keep.daily, |t| clock::show(t)[..10].to_owned()),
        // 1970-01-01 was a Thursday: day 4 is the first Monday.
        ("weekly", keep.weekly, |t| ((t / 86_400 + 3) / 7).to_string()),
        ("monthly", keep.monthly, |t| clock::show(t)[..7].to_owned()),
        ("yearly", keep.yearly, |t| clock::show(t)[..4].to_owned()),
    ];
    let mut left = rules.map(|rule| rule.1);
    let mut seen: [Option<String>; 5] = Default::default();
    let mut lines = Vec::new();
    for (n, info) in newest_first.iter().enumerate() {
        let mut why = Vec::new();
        if !info.holds.is_empty() {
            why.push(format!("held: {}", info.holds.join(", ")));
        }
        if n < keep.last as usize {
            why.push("last".to_owned());
        }
        for (rule, (name, _, period)) in rules.iter().enumerate() {
            let this = Some(period(info.created));
            if left[rule] > 0 && seen[rule] != this {
                left[rule] -= 1;
                why.push((*name).to_owned());
                seen[rule] = this;
            }
        }
        let kept = !why.is_empty();
        let why = if kept { why.join(", ") } else { "no rule keeps it".to_owned() };
        lines.push(PruneLine { snapshot: info.name.clone(), kept, why, error: None });
    }
    lines
}

/// Deletes the live snapshots of a disk that no rule keeps; with `dry_run` only says which. Oldest first. One that cannot be
/// deleted, such as one that was held meanwhile, keeps none of the others: its line says why.
///
/// # Errors
/// `Usage` when no rule keeps anything; `NotFound`; `ReadOnly` when nothing can be deleted any more.
pub fn prune(store: &Arc<Store>, disk: &str, keep: &Keep, dry_run: bool) -> Result<Vec<PruneLine>> {
    if *keep == Keep::default() {
        return Err(
            Error::usage("no rule says what to keep").hint("give --keep-last, --keep-daily or another --keep rule")
        );
    }
    let mut list = store.snapshots(disk)?;
    list.retain(|info| info.state == SnapshotState::Live);
    list.reverse();
    let mut lines = decide(&list, keep);
    lines.reverse();
    if !dry_run {
        carry_out(&mut lines, |snapshot| super::remove(store, disk, snapshot))?;
    }
    Ok(lines)
}

/// Deletes what is not kept.
fn carry_out(lines: &mut [PruneLine], mut remove: impl FnMut(&str) -> Result<()>) -> Result<()> {
    for line in lines.iter_mut().filter(|line| !line.kept) {
        match remove(&line.snapshot) {
            Ok(()) => {}
            // Somebody else has deleted it.
            Err(error) if error.kind() == Kind::NotFound => {}
            Err(error) if error.kind() == Kind::ReadOnly => return Err(error),
            Err(error) => {
                line.kept = true;
                line.error = Some(error.to_string());
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::units::{DiskId, SnapshotId};

    fn at(name: &str, created: u64) -> SnapshotInfo {
        SnapshotInfo {
            id: SnapshotId(1),
            disk: "d".into(),
            disk_id: DiskId(1),
            name: name.into(),
            uuid: Uuid::nil(),
            size: 0,
            referenced: 0,
            written: 0,
            created,
            state: SnapshotState::Live,
            holds: Vec::new(),
        }
    }

    #[test]
    fn the_newest_of_each_period_is_kept() {
        let day = 86_400;
        let mut list: Vec<_> = (0..40).map(|n| at(&format!("s{n}"), 1_795_352_707 - n * day / 2)).collect();
        list[7].holds.push("user".into());
        let lines = decide(&list, &Keep { last: 1, daily: 3, ..Keep::default() });
        let kept: Vec<_> = lines.iter().filter(|l| l.kept).map(|l| l.snapshot.as_str()).collect();
        assert_eq!(kept, ["s0", "s2", "s4", "s7"]);
    }

    #[test]
    fn weeks_begin_on_monday() {
        // 2026-11-22 is a Sunday, 2026-11-23 a Monday.
        let sunday = 1_795_305_600;
        let list = [at("monday", sunday + 86_400), at("sunday", sunday), at("saturday", sunday - 86_400)];
        let lines = decide(&list, &Keep { weekly: 2, ..Keep::default() });
        assert_eq!(lines.iter().map(|l| l.kept).collect::<Vec<_>>(), [true, true, false]);
    }

    /// The first snapshot that could not be deleted left all the others where they were.
    #[test]
    fn one_that_cannot_be_deleted_keeps_no_other() {
        let list: Vec<_> = ["e", "d", "c", "b", "a"].into_iter().map(|name| at(name, 1_795_352_707)).collect();
        let mut lines = decide(&list, &Keep { last: 1, ..Keep::default() });
        lines.reverse();
        let mut deleted = Vec::new();
        let remove = |name: &str| match name {
            "b" => Err(Error::busy("snapshot 'd@b' is held: backup")),
            "c" => Err(Error::not_found("there is no snapshot 'd@c'")),
            _ => {
                deleted.push(name.to_owned());
                Ok(())
            }
        };
        carry_out(&mut lines, remove).unwrap();
        assert_eq!(deleted, ["a", "d"]);
        let kept: Vec<_> = lines.iter().filter(|line| line.kept).map(|line| line.snapshot.as_str()).collect();
        assert_eq!(kept, ["b", "e"]);
        assert_eq!(lines[1].error.as_deref(), Some("snapshot 'd@b' is held: backup"));
        assert!(lines[4].error.is_none());

        let mut lines = decide(&list, &Keep { last: 1, ..Keep::default() });
        carry_out(&mut lines, |_| Err(Error::read_only("the pool refuses writes"))).unwrap_err();
    }
}
