//! Saving the memory of a machine that is stopped and stays so until it is saved: no faults, no ring.

use super::work::{Holes, Out};
use crate::checkpoint::{PageBlock, Place, Writer};
use crate::error::{Error, Result};
use crate::memory::watch::Watch;
use crate::progress::Progress;
use crate::sys::pages::Pages;

/// Saves all of a memory that nobody writes to; the caller commits the writer afterwards. Page blocks that are not in memory yet, because
/// it is being restored, are taken from where they are.
///
/// # Errors
/// `Usage` for a writer of another memory or with a parent; `Cancelled` when `progress` says so; errors of the host.
pub fn save_stopped(watch: &Watch, writer: &Writer, progress: &dyn Progress) -> Result<()> {
    let core = watch.core();
    let plan = writer.plan();
    if plan.geometry != core.geometry || writer.parent().is_some() {
        return Err(Error::usage("what is saved like this is a whole checkpoint of this memory"));
    }
    let host = |e| Error::io("the memory of the guest cannot be saved", e);
    let filling = core.filling.read().clone();
    let (mut out, mut holes) = (Out::new(writer, false)?, Holes::new(core));
    let mut raw = Pages::new(core.geometry.page_block()).map_err(host)?;
    progress.total(core.geometry.page_blocks());
    for number in 0..core.geometry.page_blocks() {
        if progress.cancelled() {
            return Err(Error::new(crate::error::Kind::Cancelled, "the save was given up"));
        }
        progress.advance(1);
        let block = PageBlock(number);
        let span = core.span(block);
        let bytes = &mut raw[..span.length];
        if let Some(filling) = &filling {
            filling.bring(block)?;
            // What was a hole when somebody last looked may be data by now.
            holes.forget();
        }
        if holes.has(&span)? {
            writer.set(block, Place::Zero)?;
            continue;
        }
        core.regions[span.region].read(bytes, span.offset).map_err(host)?;
        out.push(block, bytes)?;
    }
    out.finish()
}
