//! The edge where an [`Error`] becomes an errno: once, here, with a line in the log for whoever has to look.
//!
//! A program that works on a file gets a number and nothing else, so what the number cannot say (which disk, which
//! offset, what to do next) goes to the log. What a program runs into in the normal course of its work (a name that is
//! not there, or is there already) is logged for debugging only.
//!
//! # Rules
//! 1. The mapping is part of the interface: scripts and `mv`, `cp`, `rm` act on it. EXDEV is never answered, because
//!    `mv` would copy the disk and delete it.
//! 2. EIO and EROFS mean that somebody must look, and are logged as errors.

use std::fmt;

use crate::error::{Error, Kind};

/// An errno, positive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Errno(pub i32);

/// What an operation of the tree answers.
pub type Answer<T> = Result<T, Errno>;

impl Errno {
    /// Operation not permitted.
    pub const EPERM: Self = Self(libc::EPERM);
    /// No such file or directory.
    pub const ENOENT: Self = Self(libc::ENOENT);
    /// A signal came while it waited.
    pub const EINTR: Self = Self(libc::EINTR);
    /// I/O error.
    pub const EIO: Self = Self(libc::EIO);
    /// No such offset: nothing follows there.
    pub const ENXIO: Self = Self(libc::ENXIO);
    /// The handle does not allow it.
    pub const EBADF: Self = Self(libc::EBADF);
    /// Not yet.
    pub const EAGAIN: Self = Self(libc::EAGAIN);
    /// In use.
    pub const EBUSY: Self = Self(libc::EBUSY);
    /// There already.
    pub const EEXIST: Self = Self(libc::EEXIST);
    /// Not a directory.
    pub const ENOTDIR: Self = Self(libc::ENOTDIR);
    /// Is a directory.
    pub const EISDIR: Self = Self(libc::EISDIR);
    /// Makes no sense.
    pub const EINVAL: Self = Self(libc::EINVAL);
    /// Beyond the largest disk.
    pub const EFBIG: Self = Self(libc::EFBIG);
    /// No room.
    pub const ENOSPC: Self = Self(libc::ENOSPC);
    /// Never written.
    pub const EROFS: Self = Self(libc::EROFS);
    /// The name is too long.
    pub const ENAMETOOLONG: Self = Self(libc::ENAMETOOLONG);
    /// Not offered; the kernel remembers this answer and does not ask again.
    pub const ENOSYS: Self = Self(libc::ENOSYS);
    /// Not offered.
    pub const EOPNOTSUPP: Self = Self(libc::EOPNOTSUPP);
    /// The inode is gone; the kernel looks the name up again.
    pub const ESTALE: Self = Self(libc::ESTALE);

    /// Returns the errno of a kind of failure.
    #[must_use]
    pub fn of(kind: Kind) -> Self {
        match kind {
            Kind::Usage => Self::EINVAL,
            Kind::NotFound => Self::ENOENT,
            Kind::Exists => Self::EEXIST,
            Kind::Busy => Self::EBUSY,
            Kind::NoSpace => Self::ENOSPC,
            Kind::ReadOnly => Self::EROFS,
            Kind::Unsupported => Self::EOPNOTSUPP,
            Kind::Denied => Self::EPERM,
            Kind::Cancelled => Self::EINTR,
            Kind::Failed | Kind::Corrupt | Kind::Io => Self::EIO,
        }
    }

    /// Turns "not found" into ESTALE, for operations on something that was found before.
    #[must_use]
    pub fn stale(self) -> Self {
        if self == Self::ENOENT { Self::ESTALE } else { self }
    }
}

impl From<Error> for Errno {
    fn from(error: Error) -> Self {
        let errno = Self::of(error.kind());
        let hint = error.next_step().unwrap_or_default();
        match error.kind() {
            Kind::NotFound | Kind::Exists | Kind::Usage | Kind::Cancelled => tracing::debug!(%errno, hint, "{error}"),
            Kind::Busy | Kind::NoSpace | Kind::Unsupported | Kind::Denied => tracing::warn!(%errno, hint, "{error}"),
            _ => tracing::error!(%errno, hint, "{error}"),
        }
        errno
    }
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_has_an_errno_and_none_makes_mv_copy() {
        for kind in Kind::ALL {
            assert!(Errno::of(kind).0 > 0);
            assert_ne!(Errno::of(kind).0, libc::EXDEV);
        }
        assert_eq!(Errno::of(Kind::Corrupt), Errno::EIO);
        assert_eq!(Errno::from(Error::busy("x")), Errno::EBUSY);
        assert_eq!(Errno::ENOENT.stale(), Errno::ESTALE);
        assert_eq!(Errno::EIO.stale(), Errno::EIO);
    }
}
