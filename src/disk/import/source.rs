//! The file that is imported, its format, and what every reader of a format can do.
//!
//! # Rules
//! 1. The path is opened once, here. What is then read, and what a child is given, is this descriptor.
//! 2. Only regular files and block devices: a pipe would hang, a directory has no bytes.

use std::fs;
use std::io::{Read, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::Path;

use crate::error::{Error, Kind, Result};

/// Bytes looked at to tell the format.
const HEAD: u64 = 512;
/// First bytes of formats that would otherwise be taken for raw: offset, bytes, name.
const FOREIGN: [(usize, &[u8], &str); 4] =
    [(0, b"vhdxfile", "VHDX"), (0, b"conectix", "VHD"), (0, b"QED\0", "QED"), (64, b"\x7f\x10\xda\xbe", "VDI")];

/// An image that tells data from holes and is read anywhere.
pub(super) trait Image {
    /// Returns the size of the disk in the image.
    fn size(&self) -> u64;
    /// Returns the end of the extent that begins at `at`, and whether it is data. `at` only ever grows.
    fn extent(&mut self, at: u64) -> Result<(u64, bool)>;
    /// Reads a range inside the size; holes are zeros.
    fn read(&mut self, buf: &mut [u8], at: u64) -> Result<()>;
}

/// The formats.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Format {
    Raw,
    Qcow2,
    Vmdk,
}

impl Format {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
            Self::Vmdk => "vmdk",
        }
    }

    pub(super) fn by_name(name: &str) -> Result<Self> {
        [Self::Raw, Self::Qcow2, Self::Vmdk].into_iter().find(|format| format.name() == name).ok_or_else(|| {
            Error::usage(format!("{name:?} is not a format that can be imported")).hint("give raw, qcow2 or vmdk")
        })
    }
}

/// The open file.
#[derive(Debug)]
pub(super) struct Source {
    pub(super) file: fs::File,
    pub(super) len: u64,
    /// Whether it is a block device.
    pub(super) device: bool,
}

impl Source {
    pub(super) fn open(path: &Path) -> Result<Self> {
        Self::open_flags(path, 0)
    }

    /// Opens a file that is no symbolic link.
    pub(super) fn open_itself(path: &Path) -> Result<Self> {
        Self::open_flags(path, libc::O_NOFOLLOW)
    }

    fn open_flags(path: &Path, flags: i32) -> Result<Self> {
        let fail = |error| {
            let error = Error::io("cannot open it", error);
            let user = rustix::process::geteuid().as_raw();
            match error.kind() {
                Kind::Denied => error.hint(format!(
                    "it is read by the process that has the pool open, which is user {user}: let that user read it"
                )),
                _ => error,
            }
        };
        // Without O_NONBLOCK the opening of a pipe waits for a writer.
        let how = libc::O_NONBLOCK | libc::O_NOCTTY | flags;
        let mut file = fs::OpenOptions::new().read(true).custom_flags(how).open(path).map_err(fail)?;
        let kind = file.metadata().map_err(fail)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(Error::failed("it is neither a regular file nor a block device"));
        }
        let len = file.seek(SeekFrom::End(0)).map_err(fail)?;
        Ok(Self { file, len, device: kind.is_block_device() })
    }

    /// Returns the path under which another process of this user opens the same file, whatever became of its name.
    pub(super) fn proc_path(&self) -> String {
        proc_path(&self.file)
    }

    /// Fills `buf` from `at`.
    pub(super) fn read(&self, buf: &mut [u8], at: u64) -> Result<()> {
        self.file.read_exact_at(buf, at).map_err(|error| match error.kind() {
            std::io::ErrorKind::UnexpectedEof => {
                Error::corrupt(format!("the file ends early: {} bytes at {at} are missing", buf.len()))
            }
            _ => Error::io(format!("cannot read at {at}"), error),
        })
    }

    /// Returns the first bytes, at most `most`.
    pub(super) fn head(&self, most: u64) -> Result<Vec<u8>> {
        let mut head = Vec::new();
        let mut file = &self.file;
        file.seek(SeekFrom::Start(0))
            .and_then(|_| file.take(most).read_to_end(&mut head))
            .map_err(|error| Error::io("cannot read it", error))?;
        Ok(head)
    }

    /// Tells the format by the first bytes; what has no magic is raw.
    pub(super) fn detect(&self) -> Result<Format> {
        let head = self.head(HEAD)?;
        if head.starts_with(super::qcow2::MAGIC) {
            return Ok(Format::Qcow2);
        }
        if super::vmdk::is_vmdk(&head) {
            return Ok(Format::Vmdk);
        }
        for (offset, magic, name) in FOREIGN {
            if head.get(offset..).is_some_and(|rest| rest.starts_with(magic)) {
                return Err(Error::failed(format!("it looks like a {name} image, which cannot be imported")).hint(
                    "make a qcow2 of it with `qemu-img convert -O qcow2`, or say `--format raw` to take its bytes as they are",
                ));
            }
        }
        Ok(Format::Raw)
    }
}

/// Returns the path of a descriptor of this process.
pub(super) fn proc_path(file: &impl AsRawFd) -> String {
    format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd())
}
