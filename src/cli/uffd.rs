//! `checkpoint serve-uffd`: the memory of a machine of Firecracker comes from a checkpoint.
//!
//! It serves one machine, in the foreground, and ends with it. The pool is not opened: a checkpoint is a file that needs nothing else,
//! and is held by being open.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use clap::Args;

use super::screen::Screen;
use super::{Global, signal};
use crate::checkpoint::{Folder, Name};
use crate::error::{Error, Kind, Result};
use crate::media::{HostMedia, Media};
use crate::memory::firecracker::{News, Serve, Served, Stop, serve};
use crate::units::show_size;

/// Serve the memory of a checkpoint to a virtual machine of Firecracker
///
/// Listens on a socket (of mode 0600) for one Firecracker that loads a snapshot with mem_backend {"backend_type": "Uffd",
/// "backend_path": PATH}, of the memory that was packed into this checkpoint. The guest runs at once. What it touches is read
/// first, in blocks, and everything else in the background, what was touched the last time first. Guests with pages of 2 MiB are
/// served too, and a balloon may give memory back. The checkpoint, and what it is based on, cannot be removed meanwhile.
///
/// Memory that cannot be had, because the file is damaged, is a bus error (SIGBUS) for who touches it, and is logged with its place; all
/// else goes on. Where the kernel cannot do that (before Linux 6.6) the machine is killed.
///
/// It stays until the process of the machine has ended. Asked to end by SIGTERM or SIGINT, it does so once all memory is there; the
/// second time at once, and what is missing is a bus error then. If it is killed the machine waits for ever at the next page it
/// touches: watch the connection of Firecracker, or this process. What connects and is not understood is refused, and this ends.
///
/// Exits with 0 when the machine has ended, with 5 if some of its memory could not be had, and with 1 if this was ended before all
/// memory was there.
#[derive(Debug, Args)]
pub(super) struct ServeUffd {
    /// The checkpoint
    #[arg(value_name = "MACHINE@CHECKPOINT")]
    checkpoint: String,
    /// The socket to listen on
    #[arg(long, value_name = "PATH")]
    socket: PathBuf,
}

impl ServeUffd {
    pub(super) fn run(self, global: &Global, screen: &Screen) -> Result<u8> {
        let name = Name::parse(&self.checkpoint)?;
        let pool = global.pool()?;
        let media = HostMedia::new(pool).map_err(|e| Error::io(format!("cannot open {}", pool.display()), e))?;
        let media: Arc<dyn Media> = Arc::new(media);
        let asked = Arc::new(AtomicU32::new(0));
        let counted = Arc::clone(&asked);
        signal::watch(move |_| {
            counted.fetch_add(1, Ordering::SeqCst);
        })?;
        let stop = || match asked.load(Ordering::SeqCst) {
            0 => Stop::No,
            1 => Stop::Soon,
            _ => Stop::Now,
        };
        let news = |news: &News<'_>| self.tell(news, *screen);
        let folder = Folder::of_pool(&media);
        let served = serve(&Serve { folder: &folder, name: &name, socket: &self.socket, stop: &stop, news: &news })?;
        let mut value = serde_json::to_value(served).expect("numbers");
        value["answer"] = "served".into();
        value["checkpoint"] = name.to_string().into();
        screen.confirm(&value, &line(&name, &served));
        Ok(if served.killed || served.figures.failed > 0 { Kind::Corrupt.exit_code() } else { 0 })
    }

    fn tell(&self, news: &News<'_>, screen: Screen) {
        match news {
            News::Listens => screen.brief_note(&format!("waiting for Firecracker on {}", self.socket.display())),
            News::Connected { pid, layout } => screen.brief_note(&format!(
                "serving {} in {} of {} pages{}",
                show_size(layout.geometry.memory()),
                super::show::count(layout.regions.len() as u64, "region"),
                show_size(layout.page),
                pid.map_or_else(String::new, |pid| format!(" to process {pid}"))
            )),
            // The log has the reason.
            News::Failed(failure) => {
                screen.brief_note(&format!("the memory at {:#x} is a bus error for the machine", failure.address));
            }
            News::Filled => screen.brief_note("all memory of the machine is there"),
            News::Ending(figures) => {
                screen.brief_note(&format!("ending when the {} page blocks that are missing are there", figures.left));
            }
        }
    }
}

fn line(name: &Name, served: &Served) -> String {
    let figures = &served.figures;
    let how = if served.killed { "was ended" } else { "has ended" };
    let failed = match figures.failed {
        0 => String::new(),
        failed => format!(", {failed} could not be had"),
    };
    format!(
        "{name}: the machine {how}; {} of {} page blocks came{failed}, {} faults, of a hundred waits 99 took at most {} us\n",
        figures.page_blocks - figures.left,
        figures.page_blocks,
        figures.faults,
        figures.waits.p99_us
    )
}
