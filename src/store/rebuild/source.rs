//! Catalogs to begin from: the one of the pool, and its backups. They are read, never written.

use super::super::catalog::{Catalog, View, guard};
use super::super::journal::Mark;
use super::super::rows::Key;
use super::CACHE;
use crate::codec::unseal;
use crate::error::{Error, Result};
use crate::media::{Media, Open};

const PAGE: usize = 4096;

/// A catalog every byte of which is what was written.
pub(super) struct Source {
    pub(super) name: String,
    pub(super) mark: Mark,
    view: View,
    _catalog: Catalog,
}

impl Source {
    /// Opens a catalog and reads all of it.
    ///
    /// # Errors
    /// `Corrupt` when anything in it is damaged; any error of the host.
    pub(super) fn open(media: &dyn Media, name: &str) -> Result<Self> {
        // The database checks what it reads, but damage in places that it trusts must not end the rescue.
        let opened = guard(|| Self::open_whole(media, name));
        opened.unwrap_or_else(|| Err(Error::corrupt(format!("{name} is damaged beyond what the database expects"))))
    }

    fn open_whole(media: &dyn Media, name: &str) -> Result<Self> {
        let file = media.open(name, Open::ReadOnly).map_err(|e| Error::io(format!("cannot open {name}"), e))?;
        if file.len().map_err(|e| Error::io(format!("cannot look at {name}"), e))? == 0 {
            // The database would make an empty one of it.
            return Err(Error::corrupt(format!("{name} is empty")));
        }
        let mut catalog = Catalog::look_at(file, CACHE)?;
        catalog.verify()?;
        let view = catalog.view()?;
        let source = Self { name: name.to_owned(), mark: view.mark(), view, _catalog: catalog };
        let mut meta = false;
        source.each(&mut |key, value| {
            key.parts()?;
            meta |= key == Key::meta();
            unseal("a value of the catalog", &value).map(drop)
        })?;
        if meta { Ok(source) } else { Err(Error::corrupt(format!("{name} has no meta row"))) }
    }

    /// Calls `each` for every row, in order.
    ///
    /// # Errors
    /// As [`View::page`], or what `each` returns.
    pub(super) fn each(&self, each: &mut dyn FnMut(Key, Vec<u8>) -> Result<()>) -> Result<()> {
        let mut at = Key::meta();
        loop {
            let rows = self.view.page(&at, &Key::last(), PAGE)?;
            let more = (rows.len() == PAGE).then(|| rows[PAGE - 1].0.after());
            for (key, value) in rows {
                each(key, value)?;
            }
            let Some(next) = more else { return Ok(()) };
            at = next;
        }
    }
}
