//! The lines of an answer on the socket: progress while the work goes on, the instant it is about, then the result or the
//! error.
//!
//! # Rules
//! 1. One JSON object per line, ended by a newline; the last one is `result` or `error`, and no answer lacks it. A
//!    connection that ends before it means that nobody knows how the work went.
//! 2. An error crosses with its kind, its sentence and its hint, so both ways in fail alike.

use serde::{Deserialize, Serialize};

use super::Response;
use crate::error::{Error, Kind};

/// One line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[expect(clippy::large_enum_variant, reason = "one at a time, and the large one is the usual one")]
pub enum Line {
    /// How far it is.
    Progress {
        /// Units done.
        done: u64,
        /// Units in all; 0 while that is not known.
        total: u64,
        /// What is being done; may be empty.
        message: String,
    },
    /// The instant has been that was asked for: what happens from now on is not in it. The result comes later.
    Instant {},
    /// It is done.
    Result(Response),
    /// It failed or was refused.
    Error(Failure),
}

/// An error, as it stands in JSON.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// Name of the kind, see [`Kind::name`].
    pub kind: String,
    /// What failed, on what, and why.
    pub message: String,
    /// What to do next.
    pub hint: Option<String>,
}

impl From<&Error> for Failure {
    fn from(error: &Error) -> Self {
        Self {
            kind: error.kind().name().to_owned(),
            message: error.message().to_owned(),
            hint: error.next_step().map(str::to_owned),
        }
    }
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        // A kind this version does not know comes from a newer server.
        let error = Self::new(Kind::by_name(&failure.kind).unwrap_or(Kind::Failed), failure.message);
        match failure.hint {
            Some(hint) => error.hint(hint),
            None => error,
        }
    }
}

impl Line {
    /// Writes the line, newline included.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = serde_json::to_vec(self).expect("these types hold nothing JSON cannot say");
        bytes.push(b'\n');
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_cross_whole() {
        for kind in Kind::ALL {
            let error = Error::new(kind, "it failed").hint("try again");
            let there = Failure::from(&error);
            let back = Error::from(there.clone());
            assert_eq!(Failure::from(&back), there);
        }
        let newer = Failure { kind: "tired".into(), message: "m".into(), hint: None };
        assert_eq!(Error::from(newer).kind(), Kind::Failed);
    }

    #[test]
    fn lines_are_pinned() {
        let line = Line::Progress { done: 1, total: 2, message: "reading".into() };
        assert_eq!(line.encode(), b"{\"progress\":{\"done\":1,\"total\":2,\"message\":\"reading\"}}\n");
        assert_eq!(Line::Instant {}.encode(), b"{\"instant\":{}}\n");
        let line = Line::Error(Failure::from(&Error::busy("in use")));
        assert_eq!(line.encode(), b"{\"error\":{\"kind\":\"busy\",\"message\":\"in use\",\"hint\":null}}\n");
        let line = Line::Result(Response::Flushed {});
        assert_eq!(line.encode(), b"{\"result\":{\"answer\":\"flushed\"}}\n");
    }
}
