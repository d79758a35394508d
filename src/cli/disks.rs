//! Commands about disks: create, import, resize, ls, info, rename, rm, set, get.

use std::collections::BTreeMap;
use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::screen::Screen;
use super::show::setting;
use super::{Ask, Global};
use crate::api::{Request, Response};
use crate::disk::round_size;
use crate::error::{Error, Result};
use crate::units::parse_size;

/// Make a disk
///
/// The disk is thin: it takes space as it is written.
#[derive(Debug, Args)]
pub(super) struct Create {
    /// Name of the new disk
    disk: String,
    /// Size, such as 10G; rounded up to 512 bytes, at most 64T
    #[arg(short, long)]
    size: String,
}

impl Create {
    pub(super) fn ask(self) -> Result<Ask> {
        Ok(Ask::change(Request::Create { disk: self.disk, size: size(&self.size)? }))
    }
}

/// Make a disk from an image file
///
/// Holes of the image stay holes. The image is only read. Where there is no room it ends, and there is no disk then: a new one
/// does not wait for room (see afterimage-set(1)). An import whose process is killed leaves a disk by the name of
/// DISK~import- and eight more characters: remove it, and import again.
#[derive(Debug, Args)]
pub(super) struct Import {
    /// The image
    file: PathBuf,
    /// Name of the new disk
    disk: String,
    /// Format of the image; found out from its first bytes when left out
    #[arg(short, long)]
    format: Option<Format>,
}

/// A format of disk images.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum Format {
    Raw,
    Qcow2,
    Vmdk,
}

impl Import {
    pub(super) fn ask(self) -> Result<Ask> {
        let shown = self.file.display().to_string();
        let path = self
            .file
            .canonicalize()
            .map_err(|e| super::host::explain(Error::io(format!("cannot open the image {shown}"), e), &self.file))?;
        let path = path.into_os_string().into_string().map_err(|_| {
            Error::usage(format!("the path of the image {shown} is not UTF-8")).hint("rename or link it, and try again")
        })?;
        let format = self.format.map(|format| match format {
            Format::Raw => "raw".to_owned(),
            Format::Qcow2 => "qcow2".to_owned(),
            Format::Vmdk => "vmdk".to_owned(),
        });
        Ok(Ask::change(Request::Import { path, format, disk: self.disk }).in_bytes())
    }
}

/// Change the size of a disk
///
/// A disk grows while it is in use. Shrinking loses what lies beyond the new end for ever.
#[derive(Debug, Args)]
pub(super) struct Resize {
    /// The disk
    disk: String,
    /// New size, such as 20G
    size: String,
    /// Allow the disk to lose its tail
    #[arg(long)]
    shrink: bool,
}

impl Resize {
    pub(super) fn ask(self) -> Result<Ask> {
        Ok(Ask::change(Request::Resize { disk: self.disk, size: size(&self.size)?, shrink: self.shrink }))
    }
}

/// List the disks, or the snapshots of one
///
/// REFERENCED is what is mapped, WRITTEN what was written since the snapshot before.
#[derive(Debug, Args)]
pub(super) struct Ls {
    /// The disk whose snapshots to list, oldest first
    disk: Option<String>,
}

impl Ls {
    pub(super) fn ask(self) -> Ask {
        Ask::question(Request::Ls { disk: self.disk })
    }
}

/// Tell everything about a disk or a snapshot
///
/// UNIQUE is what would be freed if only this one were removed.
#[derive(Debug, Args)]
pub(super) struct Info {
    /// DISK or DISK@SNAPSHOT
    name: String,
}

impl Info {
    pub(super) fn ask(self) -> Ask {
        Ask::question(Request::Info { name: self.name })
    }
}

/// Rename a disk or a snapshot
#[derive(Debug, Args)]
pub(super) struct Rename {
    /// DISK or DISK@SNAPSHOT
    old: String,
    /// The new name: DISK, or DISK@SNAPSHOT with the same disk
    new: String,
}

impl Rename {
    pub(super) fn ask(self) -> Ask {
        Ask::change(Request::Rename { old: self.old, new: self.new })
    }
}

/// Remove a disk or a snapshot
///
/// Clones of a removed snapshot stay whole. Space that nothing else holds is given back to the host.
#[derive(Debug, Args)]
pub(super) struct Rm {
    /// DISK or DISK@SNAPSHOT
    name: String,
    /// Remove the disk together with its snapshots
    #[arg(short, long)]
    recursive: bool,
}

impl Rm {
    pub(super) fn ask(self) -> Ask {
        Ask::change(Request::Rm { name: self.name, recursive: self.recursive })
    }
}

/// Change settings of a disk
///
/// enospc=fail|wait says what happens to writes of programs and guests when the host has no room; 'afterimage receive' never
/// waits for it. quota=SIZE, iops=N and bandwidth=SIZE limit the disk ("none" lifts the limit); extent-size=SIZE is the size of
/// a file of its extent tree, and fixed from the first snapshot on.
#[derive(Debug, Args)]
pub(super) struct Set {
    /// The disk
    disk: String,
    /// What to set
    #[arg(value_name = "KEY=VALUE", required = true)]
    settings: Vec<String>,
}

impl Set {
    pub(super) fn ask(self) -> Result<Ask> {
        let mut settings = BTreeMap::new();
        for text in self.settings {
            let Some((key, value)) = text.split_once('=') else {
                return Err(Error::usage(format!("'{text}' is no setting")).hint("write KEY=VALUE, such as quota=20G"));
            };
            if settings.insert(key.to_owned(), value.to_owned()).is_some() {
                return Err(Error::usage(format!("'{key}' is set twice")).hint("leave one of them out"));
            }
        }
        Ok(Ask::change(Request::Set { disk: self.disk, settings }))
    }
}

/// Tell the settings of a disk
#[derive(Debug, Args)]
pub(super) struct Get {
    /// The disk
    disk: String,
    /// Print only the value of this setting
    key: Option<String>,
}

impl Get {
    pub(super) fn run(self, global: &Global, screen: &Screen) -> Result<u8> {
        let Some(key) = self.key else {
            return super::ask(global, screen, Ask::question(Request::Get { disk: self.disk }));
        };
        let response = super::answer(global, screen, Ask::question(Request::Get { disk: self.disk }))?;
        let Response::Settings { settings, .. } = &response else {
            return Err(Error::failed("the answer is not the one that was asked for"));
        };
        let value = setting(settings, &key)?;
        screen.text(&response, &format!("{value}\n"));
        Ok(0)
    }
}

/// Reads a size for a disk.
fn size(text: &str) -> Result<u64> {
    round_size(parse_size(text)?)
}
