//! Small text files of the pool that are replaced as a whole: temporary name, sync, rename, sync of the directory.
//!
//! After a crash the old text or the new one is there, and perhaps a file under the temporary name that the next write
//! removes.

use std::io::ErrorKind;

use crate::error::{Error, Result};
use crate::media::{Media, Open};

/// Replaces the file `name` in the pool directory, durably.
///
/// # Errors
/// Any error of the host.
pub(super) fn replace(media: &dyn Media, name: &str, text: &str) -> Result<()> {
    let temporary = format!("{name}.new");
    let fail = |e| Error::io(format!("cannot write {name}"), e);
    match media.remove(&temporary) {
        Err(e) if e.kind() != ErrorKind::NotFound => return Err(fail(e)),
        _ => {}
    }
    let file = media.open(&temporary, Open::New).map_err(fail)?;
    file.write_at(text.as_bytes(), 0).map_err(fail)?;
    file.sync().map_err(fail)?;
    media.rename(&temporary, name).map_err(fail)?;
    media.sync_dir("").map_err(fail)
}

/// Reads the file `name` in the pool directory; `None` when there is none.
///
/// # Errors
/// `Corrupt` when it is longer than `len_max` or no text, any error of the host.
pub(super) fn read(media: &dyn Media, name: &str, len_max: u64) -> Result<Option<String>> {
    let fail = |e| Error::io(format!("cannot read {name}"), e);
    let file = match media.open(name, Open::ReadOnly) {
        Ok(file) => file,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(fail(e)),
    };
    let len = file.len().map_err(fail)?;
    if len > len_max {
        return Err(Error::corrupt(format!("{name} is damaged: it is {len} bytes long")));
    }
    let mut bytes = vec![0; usize::try_from(len).expect("bounded above")];
    file.read_exact_at(&mut bytes, 0).map_err(fail)?;
    let text = String::from_utf8(bytes);
    text.map(Some).map_err(|_| Error::corrupt(format!("{name} is damaged: it is not text")))
}
