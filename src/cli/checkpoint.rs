//! Commands about checkpoints: ls, info, verify, rm, flatten, save, serve-uffd.

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};

use super::screen::Screen;
use super::show::{Style, count, exact, time};
use super::table::{Head, Table, sheet};
use super::uffd::ServeUffd;
use super::{Ask, Global};
use crate::api::Request;
use crate::checkpoint::{Checkpoint as Info, VerifyReport};
use crate::clock;
use crate::error::{Error, Result};
use crate::units::show_size;

/// Look after the checkpoints of virtual machines
///
/// A checkpoint is the memory of a virtual machine and the state of its devices, as one file in POOL/checkpoints, with the
/// snapshots of its disks that were taken at the same instant. It is called MACHINE@CHECKPOINT. What it needs, those
/// snapshots and the checkpoint it is based on, cannot be removed before it.
#[derive(Debug, Args)]
pub(super) struct Checkpoint {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// List checkpoints
    ///
    /// MEMORY is what the machine has, STORED what the file has of it: compressed, without zeros, and without what is as in the
    /// checkpoint it is based on.
    Ls {
        /// Only those of this machine
        machine: Option<String>,
    },
    /// Tell everything about a checkpoint
    Info(One),
    /// Read all of a checkpoint and compare its checksums
    ///
    /// Reads those it is based on, too. Names each piece of memory that is damaged with its address in the guest and its place in
    /// the file, and exits with 5 if there is one.
    Verify(One),
    /// Remove a checkpoint
    ///
    /// Refused while another checkpoint is based on it, and while a machine that was restored from it has not read all of its
    /// memory yet. The snapshots of its disks stay, and can be removed after that.
    Rm(One),
    /// Make a checkpoint that is based on others one that is not
    ///
    /// Its file is written anew with everything it needs and then takes the place of the old one. Those that are based on it
    /// stay as they are. The others can be removed then, if nothing else is based on them.
    Flatten(One),
    /// Make a checkpoint of what another program saved of a virtual machine
    ///
    /// The memory is a flat file as Firecracker writes it (mem_file_path), or the file of a shared memory backend of QEMU; the state is
    /// kept byte for byte and never looked into. Holes and pages of zeros take no room, the rest is compressed. An address that
    /// is told of such a checkpoint is one in the memory file.
    ///
    /// The machine must not run: when the files have changed by the time they were read, nothing is saved. Who writes to memory
    /// files in RAM (tmpfs) through a mapping is not noticed.
    Save(Save),
    ServeUffd(ServeUffd),
}

#[derive(Debug, Args)]
struct Save {
    /// The memory: a flat file
    #[arg(long, value_name = "FILE")]
    memory_file: PathBuf,
    /// The state of the devices
    #[arg(long, value_name = "FILE")]
    state: PathBuf,
    /// A snapshot that was taken at the same instant, for each disk; it cannot be removed before the checkpoint
    #[arg(long = "disk", value_name = "DISK@SNAPSHOT")]
    disks: Vec<String>,
    /// Name of the checkpoint
    #[arg(long = "into", value_name = "MACHINE@CHECKPOINT")]
    checkpoint: String,
    /// Store only what differs from this checkpoint, which is needed from then on
    #[arg(long, value_name = "MACHINE@CHECKPOINT")]
    parent: Option<String>,
}

impl Save {
    fn ask(self) -> Result<Ask> {
        let (memory, state) = (whole(&self.memory_file, "memory")?, whole(&self.state, "state")?);
        let Self { disks, checkpoint, parent, .. } = self;
        Ok(Ask::change(Request::CheckpointSave { checkpoint, memory, state, disks, parent }).in_bytes())
    }
}

/// Returns the whole path of a file, for who has another working directory.
fn whole(path: &Path, what: &str) -> Result<String> {
    let shown = path.display();
    let cannot = |e| super::host::explain(Error::io(format!("cannot open the {what} file {shown}"), e), path);
    path.canonicalize().map_err(cannot)?.into_os_string().into_string().map_err(|_| {
        Error::usage(format!("the path of the {what} file {shown} is not UTF-8"))
            .hint("rename or link it, and try again")
    })
}

#[derive(Debug, Args)]
struct One {
    /// The checkpoint
    #[arg(value_name = "MACHINE@CHECKPOINT")]
    checkpoint: String,
}

impl Checkpoint {
    pub(super) fn run(self, global: &Global, screen: &Screen) -> Result<u8> {
        let asked = match self.what {
            What::Ls { machine } => Ask::question(Request::CheckpointLs { machine }),
            What::Info(One { checkpoint }) => Ask::question(Request::CheckpointInfo { checkpoint }),
            What::Verify(One { checkpoint }) => Ask::question(Request::CheckpointVerify { checkpoint }).in_bytes(),
            What::Rm(One { checkpoint }) => Ask::change(Request::CheckpointRm { checkpoint }),
            What::Flatten(One { checkpoint }) => Ask::change(Request::CheckpointFlatten { checkpoint }).in_bytes(),
            What::Save(save) => save.ask()?,
            What::ServeUffd(serve) => return serve.run(global, screen),
        };
        super::ask(global, screen, asked)
    }
}

/// Returns a list of checkpoints.
pub(super) fn show_list(checkpoints: &[Info]) -> String {
    let mut table = Table::new(&[
        Head::Left("CHECKPOINT"),
        Head::Right("MEMORY"),
        Head::Right("STORED"),
        Head::Left("CREATED"),
        Head::Right("DISKS"),
        Head::Left("BASED ON"),
    ]);
    for one in checkpoints {
        let readable = one.damage.is_none();
        let or_dash = |text: String| if readable { text } else { "-".to_owned() };
        table.row([
            format!("{}@{}", one.machine, one.name),
            or_dash(show_size(one.memory)),
            or_dash(show_size(one.stored)),
            or_dash(clock::show(one.created)),
            or_dash(one.disks.len().to_string()),
            one.parent.clone().unwrap_or_else(|| "-".to_owned()),
        ]);
    }
    let damaged = checkpoints.iter().filter_map(|one| Some(format!("{}\n", one.damage.as_ref()?)));
    table.render() + &damaged.collect::<String>()
}

/// Returns a checkpoint as text.
pub(super) fn show(one: &Info, style: Style) -> String {
    let name = format!("{}@{}", one.machine, one.name);
    if style == Style::Brief {
        let based = one.parent.as_ref().map_or_else(String::new, |parent| format!(", based on {parent}"));
        return format!("checkpoint {name}, {} of {}{based}\n", show_size(one.stored), show_size(one.memory));
    }
    if let Some(damage) = &one.damage {
        return sheet(&[("checkpoint", name), ("damage", damage.clone())]);
    }
    let mut lines = vec![
        ("checkpoint", name),
        ("uuid", one.uuid.map(|uuid| uuid.to_string()).unwrap_or_default()),
        ("created", time(one.created)),
        ("memory", exact(one.memory)),
        ("stored", exact(one.stored)),
        ("allocated", exact(one.allocated)),
        (
            "page blocks",
            format!(
                "{} of {}: {} stored, {} zeros, {} as in what it is based on",
                one.stored_blocks + one.zero_blocks + one.inherited_blocks,
                show_size(u64::from(one.page_block)),
                one.stored_blocks,
                one.zero_blocks,
                one.inherited_blocks
            ),
        ),
        (
            "storage blocks",
            format!("{} of {}, {} hot", one.storage_blocks, show_size(u64::from(one.storage_block)), one.hot_blocks),
        ),
        ("devices", format!("{}, made by {}, version {}", exact(one.state_bytes), one.maker, one.state_version)),
    ];
    for region in &one.regions {
        lines.push(("region", format!("{} at {:#x}", exact(region.bytes), region.address)));
    }
    lines.extend(one.disks.iter().map(|disk| ("disk", disk.snapshot.clone())));
    lines.extend(one.parent.iter().map(|parent| ("based on", parent.clone())));
    lines.extend(one.children.iter().map(|child| ("needed by", child.clone())));
    sheet(&lines)
}

/// Returns what a verification found.
pub(super) fn show_verified(report: &VerifyReport) -> String {
    let mut text: String = report.faults.iter().map(|fault| format!("{}\n", fault.sentence())).collect();
    if report.more > 0 {
        text.push_str(&format!("and {} more\n", report.more));
    }
    let faults = report.faults.len() as u64 + report.more;
    text + &format!(
        "{}: {}, {}, {} read; {}\n",
        report.checkpoint,
        count(report.files, "file"),
        count(report.stored_blocks, "page block"),
        show_size(report.bytes),
        if faults == 0 { "sound".to_owned() } else { count(faults, "fault") }
    )
}
