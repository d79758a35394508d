//! Answers in words, for people.

use super::table::{Head, Table, sheet};
use crate::api::Response;
use crate::api::answer::{Disk, Exported, Imported, Pruned, Reverted, Settings, Snapshot, Status};
use crate::clock;
use crate::disk::ScrubReport;
use crate::error::{Error, Result};
use crate::store::{CheckReport, RebuildReport, RecordFault};
use crate::stream::{ReceiveReport, SendReport};
use crate::units::show_size;

/// How much to say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Style {
    /// One line that confirms a change.
    Brief,
    /// Everything.
    Full,
}

/// Returns an answer as text, newline included.
pub(super) fn show(response: &Response, style: Style) -> String {
    match response {
        Response::Disk(disk) if style == Style::Full => disk_sheet(disk),
        Response::Disk(disk) => format!("disk {}, {}\n", disk.name, show_size(disk.size)),
        Response::Disks { disks, health, damage, full, records } => {
            disk_table(disks) + &troubles([health.as_deref(), damage.as_deref(), full.as_deref(), records.as_deref()])
        }
        Response::Snapshot(snapshot) if style == Style::Full => snapshot_sheet(snapshot),
        Response::Snapshot(snapshot) => snapshot_line(snapshot),
        Response::Snapshots { snapshots, .. } if style == Style::Full => snapshot_table(snapshots),
        Response::Snapshots { snapshots, open } => {
            let still = |name| format!("{name} is still read: its data is freed when the last reader lets go\n");
            snapshots.iter().map(snapshot_line).chain(open.iter().map(still)).collect()
        }
        Response::Removed { name } => format!("removed {name}\n"),
        Response::Reverted(report) => reverted(report),
        Response::Diff(diff) => super::changes::show_diff(diff, style),
        Response::Estimate(diff) => super::changes::show_estimate(diff),
        Response::Verified(verified) => super::changes::show_verified(verified),
        Response::Pruned { dry_run, snapshots } => pruned(*dry_run, snapshots),
        Response::Settings { settings, .. } => settings_lines(settings),
        Response::Checked(report) => checked(report),
        Response::Rebuilt(report) => rebuilt(report),
        Response::Scrubbed(report) => scrubbed(report),
        Response::Reclaimed { freed, complete: true } => format!("gave back {}\n", show_size(*freed)),
        Response::Reclaimed { .. } => "space is given back in the background; --wait waits for it\n".to_owned(),
        Response::Metrics { text } => text.clone(),
        Response::Flushed {} => "everything is durable\n".to_owned(),
        Response::Imported(report) => imported(report),
        Response::Mounted { snapshot, mount } => format!("mounted the extent files of {snapshot} at {mount}\n"),
        Response::Attached(export) => super::exports::show_export(export, "at"),
        Response::VmDisk(disk) => format!("{} waits at {}\n", disk.name, disk.socket),
        Response::Detached { exports } => {
            exports.iter().map(|export| super::exports::show_export(export, "no longer at")).collect()
        }
        Response::Exports { exports, awaited } => super::exports::show_exports(exports, awaited),
        Response::Exported(report) => exported(report),
        Response::Sent(report) => sent(report),
        Response::Received(report) => received(report),
        Response::Token { token, .. } => format!("{token}\n"),
        Response::Aborted { disk } => format!("dropped what had arrived for {disk}\n"),
        Response::Checkpoints { checkpoints } => super::checkpoint::show_list(checkpoints),
        Response::Checkpoint(one) => super::checkpoint::show(one, style),
        Response::CheckpointVerified(report) => super::checkpoint::show_verified(report),
        Response::Status(status) => status_sheet(status),
        Response::Stopping { pid } => format!("process {pid} ends\n"),
    }
}

fn sent(report: &SendReport) -> String {
    let SendReport { disk, snapshot, data, zeros, stream, unverified, .. } = report;
    let mut text = format!(
        "sent {disk}@{snapshot}: {} of data and {} of zeros in a stream of {}",
        show_size(*data),
        show_size(*zeros),
        show_size(*stream)
    );
    if *unverified > 0 {
        text += &format!("; {} not compared with a seal, there is none yet", show_size(*unverified));
    }
    text + "\n"
}

fn received(report: &ReceiveReport) -> String {
    let ReceiveReport { disk, snapshot, data, zeros, kept, .. } = report;
    let mut text =
        format!("received {disk}@{snapshot}: {} of data and {} of zeros", show_size(*data), show_size(*zeros));
    if let Some(kept) = kept {
        text += &format!("; what was there is kept as {disk}@{kept}");
    }
    text + "\n"
}

fn origin(disk: &Disk) -> Option<String> {
    let gone = if disk.origin_gone { " (gone)" } else { "" };
    Some(format!("{}{gone}", disk.origin.as_ref()?))
}

fn waiting(writes: u64) -> String {
    if writes == 1 { "1 write waits".to_owned() } else { format!("{writes} writes wait") }
}

/// What to do about damaged records.
const CHECK: &str = "; 'afterimage check' names each";

/// What is wrong with the pool, a line each: why it refuses writes, what of it is lost, why it takes no new data, which
/// records are.
fn troubles(troubles: [Option<&str>; 4]) -> String {
    let ends = [("refuses writes", ""), ("is damaged", ""), ("takes no new data", ""), ("is damaged", CHECK)];
    let lines = ends.iter().zip(troubles);
    lines.filter_map(|((meaning, hint), why)| Some(format!("the pool {meaning}: {}{hint}\n", why?))).collect()
}

fn disk_table(disks: &[Disk]) -> String {
    let mut table = Table::new(&[
        Head::Left("DISK"),
        Head::Right("SIZE"),
        Head::Right("REFERENCED"),
        Head::Right("WRITTEN"),
        Head::Right("SNAPSHOTS"),
        Head::Left("CREATED"),
        Head::Left("ORIGIN"),
    ]);
    for disk in disks {
        table.row([
            disk.name.clone(),
            show_size(disk.size),
            show_size(disk.referenced),
            show_size(disk.written),
            disk.snapshots.to_string(),
            clock::show(disk.created),
            origin(disk).unwrap_or_else(|| "-".to_owned()),
        ]);
    }
    let waits =
        |disk: &Disk| (disk.waiting > 0).then(|| format!("disk '{}': {} for room\n", disk.name, waiting(disk.waiting)));
    let waiting_for_room: String = disks.iter().filter_map(waits).collect();
    table.render() + &waiting_for_room
}

/// The state of a snapshot, and what is wrong with its record.
fn state(snapshot: &Snapshot) -> String {
    let record = match snapshot.record {
        None => "",
        Some(RecordFault::Missing) => ", record missing",
        Some(RecordFault::Damaged) => ", record damaged",
    };
    format!("{}{record}", snapshot.state)
}

fn snapshot_table(snapshots: &[Snapshot]) -> String {
    let mut table = Table::new(&[
        Head::Left("SNAPSHOT"),
        Head::Right("SIZE"),
        Head::Right("REFERENCED"),
        Head::Right("WRITTEN"),
        Head::Left("CREATED"),
        Head::Left("STATE"),
        Head::Left("HELD BY"),
    ]);
    for snapshot in snapshots {
        table.row([
            format!("{}@{}", snapshot.disk, snapshot.name),
            show_size(snapshot.size),
            show_size(snapshot.referenced),
            show_size(snapshot.written),
            clock::show(snapshot.created),
            state(snapshot),
            if snapshot.holds.is_empty() { "-".to_owned() } else { snapshot.holds.join(", ") },
        ]);
    }
    table.render()
}

/// Returns a number of things: `1 disk`, `2 disks`.
pub(super) fn count(number: u64, noun: &str) -> String {
    format!("{number} {noun}{}", if number == 1 { "" } else { "s" })
}

/// Returns an amount for people and the exact bytes.
pub(super) fn exact(bytes: u64) -> String {
    if bytes < 1024 { show_size(bytes) } else { format!("{} ({bytes} bytes)", show_size(bytes)) }
}

/// Returns a time for people.
pub(super) fn time(seconds: u64) -> String {
    format!("{} UTC", clock::show(seconds))
}

fn disk_sheet(disk: &Disk) -> String {
    let mut lines = vec![
        ("disk", disk.name.clone()),
        ("uuid", disk.uuid.to_string()),
        ("size", exact(disk.size)),
        ("referenced", exact(disk.referenced)),
        ("written", exact(disk.written)),
    ];
    if let Some(unique) = disk.unique {
        lines.push(("unique", exact(unique)));
    }
    lines.push(("snapshots", disk.snapshots.to_string()));
    lines.push(("created", time(disk.created)));
    lines.push(("modified", time(disk.modified)));
    if let Some(origin) = origin(disk) {
        lines.push(("origin", origin));
    }
    if let Some(holder) = &disk.holder {
        lines.push(("open for writing", holder.clone()));
    }
    if let Some(holder) = &disk.reserved {
        lines.push(("kept for", holder.clone()));
    }
    if disk.waiting > 0 {
        lines.push(("for room", waiting(disk.waiting)));
    }
    for key in KEYS {
        let value = setting(&disk.settings, key).expect("the key is from the list");
        let bytes = value.parse().ok().filter(|_| key != "iops");
        lines.push((key, bytes.map_or(value, exact)));
    }
    sheet(&lines)
}

fn snapshot_sheet(snapshot: &Snapshot) -> String {
    let mut lines = vec![
        ("snapshot", format!("{}@{}", snapshot.disk, snapshot.name)),
        ("uuid", snapshot.uuid.to_string()),
        ("state", state(snapshot)),
        ("size", exact(snapshot.size)),
        ("referenced", exact(snapshot.referenced)),
        ("written", exact(snapshot.written)),
    ];
    if let Some(unique) = snapshot.unique {
        lines.push(("unique", exact(unique)));
    }
    lines.push(("created", time(snapshot.created)));
    if !snapshot.holds.is_empty() {
        lines.push(("held by", snapshot.holds.join(", ")));
    }
    sheet(&lines)
}

fn snapshot_line(snapshot: &Snapshot) -> String {
    let retired = if snapshot.state == "retired" { ", retired" } else { "" };
    let held =
        if snapshot.holds.is_empty() { String::new() } else { format!(", held by {}", snapshot.holds.join(", ")) };
    format!("snapshot {}@{}{retired}{held}\n", snapshot.disk, snapshot.name)
}

fn reverted(report: &Reverted) -> String {
    let Reverted { disk, snapshot, dropped, at_most, kept } = report;
    let most = if *at_most { "at most " } else { "" };
    let rest = match kept {
        Some(kept) => format!("what was written since is kept as {disk}@{kept}"),
        None => format!("{most}{} written since the last snapshot were dropped", show_size(*dropped)),
    };
    format!("disk {disk} is as in {disk}@{snapshot}; {rest}\n")
}

fn pruned(dry_run: bool, snapshots: &[Pruned]) -> String {
    let mut table = Table::new(&[Head::Left("SNAPSHOT"), Head::Left("DECISION"), Head::Left("WHY")]);
    for snapshot in snapshots {
        let decision = match (&snapshot.error, snapshot.kept, dry_run) {
            (Some(_), ..) => "not removed",
            (None, true, _) => "kept",
            (None, false, true) => "would go",
            (None, false, false) => "removed",
        };
        let why = snapshot.error.as_ref().unwrap_or(&snapshot.why);
        table.row([snapshot.name.clone(), decision.to_owned(), why.clone()]);
    }
    table.render()
}

/// The keys of the settings, in the order in which they are shown.
const KEYS: [&str; 5] = ["enospc", "quota", "iops", "bandwidth", "extent-size"];

/// Returns the value of a setting as it is written on the command line.
pub(super) fn setting(settings: &Settings, key: &str) -> Result<String> {
    let limit = |value: Option<u64>| value.map_or_else(|| "none".to_owned(), |value| value.to_string());
    Ok(match key {
        "enospc" => settings.enospc.clone(),
        "quota" => limit(settings.quota),
        "iops" => limit(settings.iops),
        "bandwidth" => limit(settings.bandwidth),
        "extent-size" => settings.extent_size.to_string(),
        _ => {
            return Err(Error::usage(format!("there is no setting '{key}'"))
                .hint(format!("the settings are {}", KEYS.join(", "))));
        }
    })
}

fn settings_lines(settings: &Settings) -> String {
    KEYS.iter().map(|key| format!("{key}={}\n", setting(settings, key).expect("the key is from the list"))).collect()
}

fn checked(report: &CheckReport) -> String {
    let mut text = String::new();
    for problem in &report.problems {
        text.push_str(&format!("{}: {}\n", if problem.fixed { "mended" } else { "problem" }, problem.what));
    }
    if report.more() > 0 {
        text.push_str(&format!("and {} more\n", report.more()));
    }
    for note in &report.notes {
        text.push_str(&format!("note: {note}\n"));
    }
    if report.kept > 0 {
        text.push_str(&format!(
            "{} are left of a rebuild and named by nothing; --repair gives them back to the host\n",
            show_size(report.kept)
        ));
    }
    text.push_str(&format!(
        "{}, {}, {}, {}; {} leaked; {}\n",
        count(report.disks, "disk"),
        count(report.snapshots, "snapshot"),
        count(report.segments, "segment"),
        count(report.blocks, "block"),
        show_size(report.leaked),
        if report.open() == 0 { "sound".to_owned() } else { count(report.open(), "problem") },
    ));
    text
}

fn rebuilt(report: &RebuildReport) -> String {
    if !report.rebuilt {
        return "the catalog is sound: nothing was changed\n".to_owned();
    }
    let mut text = String::new();
    for note in &report.notes {
        text.push_str(&format!("note: {note}\n"));
    }
    for disk in &report.disks {
        let live = disk.live.as_ref().map(|name| format!(", now like snapshot '{name}'")).unwrap_or_default();
        let (name, mapped) = (&disk.disk, show_size(disk.referenced));
        let snapshots = count(disk.snapshots, "snapshot");
        text.push_str(&format!("disk {name}: {snapshots}, {mapped} mapped{live}\n"));
        for lost in &disk.lost {
            text.push_str(&format!("  lost: {lost}\n"));
        }
    }
    let source = report.source.as_deref().map_or_else(String::new, |name| format!(" from {name}"));
    text.push_str(&match report.complete {
        true => {
            format!("the catalog is made again{source} and {} frames of the journal: nothing is lost\n", report.frames)
        }
        false => "the catalog is made again from the seals of the snapshots\n".to_owned(),
    });
    if let Some(kept) = &report.kept {
        text.push_str(&format!("the old one is {kept} now\n"));
    }
    if report.unnamed > 0 {
        text.push_str(&format!(
            "{} in the segments belong to nothing that is left; they stay until 'afterimage check --repair'\n",
            show_size(report.unnamed)
        ));
    }
    text.push_str("run 'afterimage check' and 'afterimage scrub' now\n");
    text
}

fn scrubbed(report: &ScrubReport) -> String {
    let mut text = String::new();
    for damage in &report.damaged {
        let snapshot = damage.snapshot.as_ref().map(|name| format!("@{name}")).unwrap_or_default();
        let (disk, offset, segment) = (&damage.disk, damage.offset, damage.segment);
        text.push_str(&format!("damaged: {disk}{snapshot} at {offset} (segment {segment}): {}\n", damage.why));
    }
    if report.more > 0 {
        text.push_str(&format!("and {} more\n", report.more));
    }
    text.push_str(&format!(
        "{}, {} read, {} not yet sealed; {}\n",
        count(report.blocks, "block"),
        show_size(report.bytes),
        report.unverified,
        match report.damaged.len() as u64 + report.more {
            0 => "sound".to_owned(),
            n => format!("{n} damaged"),
        },
    ));
    text
}

fn imported(report: &Imported) -> String {
    format!(
        "disk {}, {}, from {}: {} read, {} written\n",
        report.disk.name,
        show_size(report.disk.size),
        report.format,
        show_size(report.bytes_read),
        show_size(report.bytes_written),
    )
}

fn exported(report: &Exported) -> String {
    let Exported { path, from, to, files, data, joined, zeros } = report;
    let what = from.as_ref().map_or_else(|| format!("{to}, whole"), |from| format!("{from} to {to}"));
    let joined = if *joined > 0 { format!(", {} of them from joining", show_size(*joined)) } else { String::new() };
    let (data, zeros) = (show_size(*data), show_size(*zeros));
    format!(
        "{path}: {what}: {data} in {}{joined}, {zeros} of zeros; apply it with 'sh {path}/apply TARGET'\n",
        count(*files, "file")
    )
}

fn health(status: &Status) -> String {
    let troubles = [&status.health, &status.damage, &status.full, &status.records];
    let told: Vec<&str> = troubles.into_iter().flatten().map(String::as_str).collect();
    if told.is_empty() { "good".to_owned() } else { told.join("; ") }
}

fn status_sheet(status: &Status) -> String {
    sheet(&[
        ("pool", status.pool.clone()),
        ("uuid", status.uuid.to_string()),
        ("process", status.pid.to_string()),
        ("version", status.version.clone()),
        ("mounted at", status.mount.clone().unwrap_or_else(|| "-".to_owned())),
        ("health", health(status)),
        ("free", format!("{} of {}", show_size(status.free), show_size(status.total))),
        ("for new data", show_size(status.available)),
    ])
}
