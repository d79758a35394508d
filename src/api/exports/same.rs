//! A wish for an address that an export has already: it is that export, or another one, and why.
//!
//! # Rules
//! 1. The same wish as an export that persists is that export, however often it is said: a service that is started anew says
//!    the same words, and finds what the list has brought back.
//! 2. If that export could not be started it is attempted again, under its number.
//! 3. Everything else for the same address is refused with what is different.

use super::wish::parse_listen;
use super::{Exports, Front, holder, not_attached};
use crate::api::answer::Export;
use crate::error::{Error, Result};
use crate::pool::ExportRow;

/// Tells whether two exports have one address.
fn at_one_address(one: &ExportRow, other: &ExportRow) -> bool {
    let port = |row: &ExportRow| row.listen.as_deref().and_then(|text| parse_listen(text).ok());
    match (&one.socket, &other.socket) {
        (Some(one), Some(other)) => one == other,
        // Port 0 is another one each time.
        (None, None) => port(one).is_some_and(|address| address.port() != 0 && port(other) == Some(address)),
        _ => false,
    }
}

fn sorted(ids: &[u64]) -> Vec<u64> {
    let mut ids = ids.to_vec();
    ids.sort_unstable();
    ids
}

/// Returns how an export differs from a wish for its address, as the end of a sentence about the export.
fn difference(there: &ExportRow, wish: &ExportRow) -> Option<String> {
    let what = |row: &ExportRow| (sorted(&row.disks), sorted(&row.snapshots));
    let tls = |row: &ExportRow| (row.tls_cert.clone(), row.tls_key.clone(), row.tls_ca.clone());
    if there.kind != wish.kind {
        Some(format!("speaks {}", there.kind.name()))
    } else if what(there) != what(wish) {
        Some("is of other disks".to_owned())
    } else if there.read_only != wish.read_only {
        Some(if there.read_only { "is read-only" } else { "can be written" }.to_owned())
    } else if there.queues != wish.queues {
        Some(format!("has {} queues", there.queues))
    } else if tls(there) != tls(wish) {
        let how = there.tls_cert.as_ref().map_or("has no TLS", |_| "has TLS with other files");
        Some(how.to_owned())
    } else {
        None
    }
}

impl Exports {
    /// Finds the export that has the address of a wish; `None` when there is none, `Some` with its answer when it is the same.
    ///
    /// # Errors
    /// `Busy` when it is another one; as [`Exports::attach`] when it is the same and cannot be started this time either.
    pub(super) fn find_same(&self, wish: &ExportRow, persist: bool) -> Result<Option<Export>> {
        let (row, persists, failed, shown) = {
            let table = self.table.lock();
            let Some(there) = table.running.values().find(|there| at_one_address(&there.row, wish)) else {
                return Ok(None);
            };
            let failed = matches!(there.front, Front::Failed(_));
            (there.row.clone(), there.persist, failed, self.show(there))
        };
        let different = difference(&row, wish).or_else(|| match (persists, persist) {
            (true, true) => None,
            (true, false) => Some("persists".to_owned()),
            (false, true) => Some("does not persist".to_owned()),
            (false, false) => Some("is attached".to_owned()),
        });
        match different {
            None if failed => self.attempt_again(&row).map(Some),
            None => Ok(Some(shown)),
            Some(different) => Err(Error::busy(format!(
                "somebody listens on {}: export {} has this address, and {different}",
                wish.address(),
                row.id
            ))
            .hint(format!("name another address, or end it with 'afterimage detach {}'", row.id))),
        }
    }

    /// Starts an export that could not be started.
    fn attempt_again(&self, row: &ExportRow) -> Result<Export> {
        let leases = self.book.read()?.leases;
        match self.begin(row, true, false) {
            Ok(running) => {
                let mut table = self.table.lock();
                let serves = table.serves;
                if !serves || !table.running.contains_key(&row.id) {
                    drop(table);
                    running.end_within(self.patience);
                    return Err(if serves { not_attached(&row.id.to_string()) } else { super::book::ending() });
                }
                let shown = self.show(&running);
                let failed = table.running.insert(row.id, running);
                drop(table);
                drop(failed);
                Ok(shown)
            }
            Err(error) => {
                let own = leases.iter().filter(|lease| lease.holder == holder(row));
                own.for_each(|lease| self.await_again(lease));
                if let Some(running) = self.table.lock().running.get_mut(&row.id)
                    && let Front::Failed(why) = &mut running.front
                {
                    *why = error.to_string();
                }
                Err(error)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pool::ExportKind;

    fn row() -> ExportRow {
        ExportRow {
            id: 1,
            kind: ExportKind::Nbd,
            disks: vec![3, 4],
            snapshots: vec![5],
            socket: None,
            listen: Some("[::1]:10809".into()),
            tls_cert: Some("/c".into()),
            tls_key: Some("/k".into()),
            tls_ca: None,
            read_only: false,
            queues: 0,
        }
    }

    #[test]
    fn the_order_and_the_spelling_make_no_difference_and_everything_else_does() {
        let same = ExportRow { id: 0, disks: vec![4, 3], listen: Some("[0:0::1]:10809".into()), ..row() };
        assert!(at_one_address(&row(), &same) && difference(&row(), &same).is_none());
        let others = [
            ExportRow { kind: ExportKind::VhostUser, ..row() },
            ExportRow { disks: vec![3], ..row() },
            ExportRow { snapshots: vec![], ..row() },
            ExportRow { read_only: true, ..row() },
            ExportRow { queues: 2, ..row() },
            ExportRow { tls_ca: Some("/a".into()), ..row() },
            ExportRow { tls_cert: None, tls_key: None, ..row() },
        ];
        for other in others {
            assert!(difference(&row(), &other).is_some() && difference(&other, &row()).is_some(), "{other:?}");
        }
        let elsewhere = [
            ExportRow { listen: Some("[::1]:10810".into()), ..row() },
            ExportRow { listen: None, socket: Some("/s".into()), ..row() },
        ];
        for other in &elsewhere {
            assert!(!at_one_address(&row(), other) && !at_one_address(other, &row()), "{other:?}");
        }
        assert!(at_one_address(&elsewhere[1], &elsewhere[1]));
        let any = ExportRow { listen: Some("127.0.0.1:0".into()), ..row() };
        assert!(!at_one_address(&any, &any));
    }
}
