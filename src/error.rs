//! One error type: a kind to act on, a sentence to read, a next step, and the cause kept.
//!
//! # Rules
//! 1. The message says what failed, on what, and why. The hint says what to do next.
//! 2. The kind decides the exit code and, at the edges, the errno or protocol status: once, at the edge.
//! 3. A kind never changes its exit code: scripts depend on it.

use std::fmt;
use std::io;

/// What sort of failure it is; decides the exit code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Kind {
    /// Refused or failed for a reason the message gives (exit 1).
    Failed,
    /// The request makes no sense: bad name, bad size, bad flag (exit 2).
    Usage,
    /// A thing by that name is not there (exit 3).
    NotFound,
    /// A thing by that name is there already (exit 1).
    Exists,
    /// Locked, or in use by somebody the message names (exit 4).
    Busy,
    /// Stored bytes are not what was written (exit 5).
    Corrupt,
    /// No room: host file system, quota (exit 6).
    NoSpace,
    /// The pool or the thing refuses writes (exit 1).
    ReadOnly,
    /// The host lacks something, or the format is newer than this program (exit 1).
    Unsupported,
    /// Permission denied by the host (exit 1).
    Denied,
    /// An I/O error of the host (exit 1).
    Io,
    /// The request was called back while it waited (exit 1).
    Cancelled,
}

impl Kind {
    /// Every kind, for tables and tests.
    pub const ALL: [Self; 12] = [
        Self::Failed,
        Self::Usage,
        Self::NotFound,
        Self::Exists,
        Self::Busy,
        Self::Corrupt,
        Self::NoSpace,
        Self::ReadOnly,
        Self::Unsupported,
        Self::Denied,
        Self::Io,
        Self::Cancelled,
    ];

    /// Returns the exit code of the command line.
    #[must_use]
    pub fn exit_code(self) -> u8 {
        match self {
            Self::Usage => 2,
            Self::NotFound => 3,
            Self::Busy => 4,
            Self::Corrupt => 5,
            Self::NoSpace => 6,
            _ => 1,
        }
    }

    /// Returns the name used in JSON answers.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Failed => "failed",
            Self::Usage => "usage",
            Self::NotFound => "not-found",
            Self::Exists => "exists",
            Self::Busy => "busy",
            Self::Corrupt => "corrupt",
            Self::NoSpace => "no-space",
            Self::ReadOnly => "read-only",
            Self::Unsupported => "unsupported",
            Self::Denied => "denied",
            Self::Io => "io",
            Self::Cancelled => "cancelled",
        }
    }

    /// Finds the kind by its JSON name.
    #[must_use]
    pub fn by_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name)
    }
}

/// An error for people and programs alike.
#[derive(Debug)]
#[expect(clippy::error_impl_error, reason = "the one error of the crate: there is no other it could be confused with")]
pub struct Error {
    kind: Kind,
    message: String,
    hint: Option<String>,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

/// The result of everything that can fail.
pub type Result<T, E = Error> = std::result::Result<T, E>;

macro_rules! constructors {
    ($($(#[$doc:meta])* $name:ident => $kind:ident),* $(,)?) => {
        $($(#[$doc])*
        #[must_use]
        pub fn $name(message: impl Into<String>) -> Self {
            Self::new(Kind::$kind, message)
        })*
    };
}

impl Error {
    /// Makes an error of a kind.
    #[must_use]
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), hint: None, source: None }
    }

    constructors! {
        /// Refused or failed.
        failed => Failed,
        /// A request that makes no sense.
        usage => Usage,
        /// A thing that is not there.
        not_found => NotFound,
        /// A thing that is there already.
        exists => Exists,
        /// A thing in use.
        busy => Busy,
        /// Stored bytes are wrong.
        corrupt => Corrupt,
        /// No room.
        no_space => NoSpace,
        /// Writes are refused.
        read_only => ReadOnly,
        /// Not possible on this host, or a newer format.
        unsupported => Unsupported,
    }

    /// Wraps an I/O error, keeping it as the source; the kind follows from the errno.
    #[must_use]
    pub fn io(what: impl fmt::Display, source: io::Error) -> Self {
        let kind = match source.raw_os_error() {
            Some(libc::ENOSPC | libc::EDQUOT) => Kind::NoSpace,
            Some(libc::ENOENT) => Kind::NotFound,
            Some(libc::EEXIST) => Kind::Exists,
            Some(libc::EACCES | libc::EPERM) => Kind::Denied,
            Some(libc::EROFS) => Kind::ReadOnly,
            Some(libc::EBUSY) => Kind::Busy,
            _ => Kind::Io,
        };
        let hint =
            lacks_descriptors(&source).then(|| "raise the limit of open files: LimitNOFILE=, ulimit -n".to_owned());
        Self { kind, message: format!("{what}: {source}"), hint, source: Some(Box::new(source)) }
    }

    /// Adds what to do next.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// Keeps the cause.
    #[must_use]
    pub fn because(mut self, source: impl std::error::Error + Send + Sync + 'static) -> Self {
        self.source = Some(Box::new(source));
        self
    }

    /// Puts what was being done in front of the message.
    #[must_use]
    pub fn context(mut self, what: impl fmt::Display) -> Self {
        self.message = format!("{what}: {}", self.message);
        self
    }

    /// Returns the kind.
    #[must_use]
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Tells whether data could not be had: whose it was is worth knowing then.
    #[must_use]
    pub fn is_of_data(&self) -> bool {
        matches!(self.kind, Kind::Corrupt | Kind::Io)
    }

    /// Tells whether the host had no descriptor for a file that was to be opened or made. Nothing was done then, and it may
    /// work the next time: unlike other errors of the host it says nothing about the disk.
    #[must_use]
    pub fn lacks_descriptors(&self) -> bool {
        let source = self.source.as_deref().and_then(|source| source.downcast_ref::<io::Error>());
        source.is_some_and(lacks_descriptors)
    }

    /// Returns the sentence without the hint.
    #[must_use]
    pub fn message(&self) -> &str {
        &self.message
    }

    /// Returns the next step, if one is known.
    #[must_use]
    pub fn next_step(&self) -> Option<&str> {
        self.hint.as_deref()
    }

    /// Makes a second error with the same kind, message and hint, for another waiter of the same operation.
    #[must_use]
    pub fn again(&self) -> Self {
        Self { kind: self.kind, message: self.message.clone(), hint: self.hint.clone(), source: None }
    }
}

/// Tells whether an error is that the process, or the host, has no more descriptors.
#[must_use]
pub fn lacks_descriptors(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE))
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_deref().map(|s| s as _)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_are_stable() {
        let codes: Vec<u8> = Kind::ALL.iter().map(|k| k.exit_code()).collect();
        assert_eq!(codes, [1, 2, 3, 1, 4, 5, 6, 1, 1, 1, 1, 1]);
    }

    #[test]
    fn names_find_their_kind() {
        for kind in Kind::ALL {
            assert_eq!(Kind::by_name(kind.name()), Some(kind));
        }
        assert_eq!(Kind::by_name("nonsense"), None);
    }

    #[test]
    fn io_errors_keep_their_cause() {
        let error = Error::io("cannot write /x", io::Error::from_raw_os_error(libc::ENOSPC));
        assert_eq!(error.kind(), Kind::NoSpace);
        assert!(std::error::Error::source(&error).is_some() && !error.lacks_descriptors());
        let error = Error::io("cannot open /x", io::Error::from_raw_os_error(libc::EMFILE)).context("there");
        assert!(error.lacks_descriptors() && error.next_step().is_some() && error.kind() == Kind::Io);
    }
}
