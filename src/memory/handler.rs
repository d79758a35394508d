//! The thread that answers faults.
//!
//! # Rules
//! 1. It takes no lock that anybody holds while they wait for a disk or for the guest, and never touches guest memory: whoever it serves
//!    may be the thread that holds any lock of the machine. It reads what it captures from the file of the memory. While it serves a
//!    save it allocates nothing; what is wanted of a restore, and why a save has failed, it notes in memory of its own.
//! 2. It reads all messages there are, does what removals say first, and then answers faults: the kernel hands a fault out before
//!    the removal that it follows from.
//! 3. It waits for nothing but room in the ring of a save, and for the 64 KiB that another thread is copying. A fault that has to wait for
//!    anything else is put off, and messages are read meanwhile.
//! 4. While messages about removals are read no page is put in: a copy that was decided on before would undo the removal.

use std::io;
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec};

use super::restore::Answer;
use super::watch::{Core, Phase};
use crate::checkpoint::PageBlock;
use crate::clock::{self, Instant};
use crate::sys::pages::HUGE_PAGE;
use crate::sys::userfaultfd::{How, Message, Messages};
use crate::units::to_usize;

/// Messages that are read at once: more threads than ever wait.
const MESSAGES: usize = 1024;
/// How long faults that were put off wait for the next try.
const AGAIN: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000 };

/// The largest page there is.
static ZEROS: [u8; HUGE_PAGE] = [0; HUGE_PAGE];

/// Calls the thread back.
#[derive(Debug)]
pub(super) struct Bell(OwnedFd);

impl Bell {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self(rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?))
    }

    /// Ends the thread.
    pub(super) fn ring(&self) {
        rustix::io::write(&self.0, &1_u64.to_le_bytes()).expect("a counter takes a one");
    }
}

/// Somebody who waits.
#[derive(Debug, Clone, Copy)]
struct Fault {
    region: usize,
    offset: u64,
    block: PageBlock,
    protected: bool,
    since: Instant,
}

/// Answers faults until the bell rings.
pub(super) fn run(core: &Core, bell: &Bell) {
    guarded(core, || serve_all(core, bell));
}

/// Answers faults; when that panics nobody does any more, and nobody is to wait: what is protected is let go, and what is
/// missing becomes a SIGBUS.
fn guarded(core: &Core, serve: impl FnOnce()) {
    if catch_unwind(AssertUnwindSafe(serve)).is_ok() {
        return;
    }
    let why = "a mistake in this program ended the thread that answers faults";
    tracing::error!("{why}");
    if let Some(capture) = core.capture.read().clone() {
        capture.fail(crate::error::Error::failed(why));
    }
    let filling = core.filling.read().clone();
    core.end_watching(|| {
        if let Some(filling) = filling {
            filling.break_down_unheard(core, why);
        }
    });
}

fn serve_all(core: &Core, bell: &Bell) {
    let mut messages = Messages::new(MESSAGES);
    let mut faults = Vec::with_capacity(2 * MESSAGES);
    while !core.has_begun() {
        if is_ready(&mut [PollFd::new(&bell.0, PollFlags::IN)], Some(&AGAIN)) {
            return;
        }
    }
    while !is_over(core, bell, !faults.is_empty()) {
        if let Err(error) = read_all(core, &mut messages, &mut faults) {
            tracing::error!("faults of a guest cannot be read: {error}");
            clock::sleep(std::time::Duration::from_millis(100));
        }
        let Some(_inside) = core.gate.enter() else { continue };
        faults.retain(|fault| !serve(core, fault));
    }
}

/// Waits for messages; true when the bell rang.
fn is_over(core: &Core, bell: &Bell, put_off: bool) -> bool {
    let mut both = [PollFd::new(&core.faults, PollFlags::IN), PollFd::new(&bell.0, PollFlags::IN)];
    is_ready(&mut both, put_off.then_some(&AGAIN)) && both[1].revents().contains(PollFlags::IN)
}

/// Waits for descriptors; false when there is nothing.
fn is_ready(which: &mut [PollFd<'_>], time: Option<&Timespec>) -> bool {
    match rustix::event::poll(which, time) {
        Ok(ready) => ready > 0,
        Err(error) => {
            assert_eq!(error, rustix::io::Errno::INTR, "descriptors that are open can be waited for");
            false
        }
    }
}

fn read_all(core: &Core, messages: &mut Messages, faults: &mut Vec<Fault>) -> io::Result<()> {
    let filling = core.filling.read().clone();
    while faults.capacity() - faults.len() >= MESSAGES {
        let still = filling.as_ref().map(|filling| filling.stop_copies());
        let any = core.faults.read(messages)?;
        for message in messages.iter() {
            match message {
                Message::Removed(start, end) => removed(core, start, end),
                Message::Other(kind) => tracing::debug!("a message of kind {kind} about memory that nobody asked for"),
                Message::Missing(_) | Message::Protected(_) => {}
            }
        }
        drop(still);
        let since = clock::now();
        for message in messages.iter() {
            let (address, protected) = match message {
                Message::Missing(address) => (address, false),
                Message::Protected(address) => (address, true),
                _ => continue,
            };
            let Some((region, offset)) = core.locate(address) else { continue };
            let Some(block) = core.geometry.of_region(region, offset) else { continue };
            faults.push(Fault { region, offset: core.page_of(offset), block, protected, since });
        }
        if !any || messages.iter().count() < MESSAGES {
            break;
        }
    }
    Ok(())
}

/// Does what is to be done when memory is taken away: what is there becomes zeros.
fn removed(core: &Core, start: u64, end: u64) {
    core.removals.fetch_add(1, Ordering::SeqCst);
    let (capture, filling) = (core.capture.read().clone(), core.filling.read().clone());
    for (index, region) in core.regions.iter().enumerate() {
        // The range may be of several regions, and of memory beside them.
        let Some(range) = region.part_of(start, end) else { continue };
        if let Some(filling) = &filling {
            filling.removed(core, index, range.clone());
        }
        for block in core.blocks_of(index, range) {
            core.changed.insert(block);
            core.open.insert(block);
            if let Some(capture) = &capture {
                capture.removed(PageBlock(block));
            }
        }
    }
}

/// Answers a fault; false when it is to be tried again.
fn serve(core: &Core, fault: &Fault) -> bool {
    if !fault.protected {
        return missing(core, fault);
    }
    let capture = core.capture.read().clone();
    if let Some(capture) = &capture
        && core.phase() == Phase::Saving
    {
        capture.keep(core, fault.block);
    }
    if core.let_through(fault.block).is_err() {
        return false;
    }
    if let Some(capture) = &capture {
        capture.waits.add(fault.since.elapsed());
    }
    true
}

fn missing(core: &Core, fault: &Fault) -> bool {
    let filling = core.filling.read().clone();
    let answer = filling.map_or(Answer::Zeros, |filling| filling.asked(core, fault.block, fault.offset, fault.since));
    let region = &core.regions[fault.region];
    let stopped = match answer {
        Answer::Later => return true,
        Answer::Poison => core.faults.poison(region, fault.offset, core.page).err(),
        Answer::Zeros => {
            let how = How { wake: true, protect: core.protect.load(Ordering::SeqCst) };
            core.faults.copy(region, fault.offset, &ZEROS[..to_usize(core.page)], how).stopped
        }
    };
    match stopped {
        None => true,
        Some(error) if error.kind() == io::ErrorKind::WouldBlock => false,
        Some(error) => {
            // It is there by now, or not watched any more: who waits looks again.
            tracing::trace!("a page was not put in: {error}");
            core.wake(fault.region, fault.offset, core.page);
            true
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::sync::Arc;

    use rustix::fs::MemfdFlags;
    use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

    use super::*;
    use crate::checkpoint::{Access, Cut, Folder, Name, Plan, Reader, Sizes, Writer};
    use crate::media::{Media, SimMedia};
    use crate::memory::{Event, RestoreOptions, Restorer, SaveOptions, Saver, Watch, save_stopped};
    use crate::progress::Silent;
    use crate::sys::guest::PAGE;

    const SIZE: u64 = 4 << 20;

    fn memory() -> GuestMemoryMmap<()> {
        let file = File::from(rustix::fs::memfd_create("guest", MemfdFlags::CLOEXEC).unwrap());
        file.set_len(SIZE).unwrap();
        let range = (GuestAddress(0), to_usize(SIZE), Some(FileOffset::new(file, 0)));
        GuestMemoryMmap::from_ranges_with_files([range]).unwrap()
    }

    fn watch(memory: &GuestMemoryMmap<()>) -> Watch {
        Watch::new(Watch::open().unwrap(), memory, Sizes::USUAL).unwrap()
    }

    fn writer(folder: &Folder, watch: &Watch, name: &str) -> Writer {
        let plan = Plan::new(Name::new("vm", name).unwrap(), "test", watch.geometry().clone());
        Writer::create(folder, plan).unwrap()
    }

    /// A checkpoint of a memory that has a number in each page, and noise behind it: a storage block has a few page blocks.
    fn saved() -> (Folder, Reader) {
        let media: Arc<dyn Media> = Arc::new(SimMedia::new(1));
        let (folder, memory) = (Folder::at(&media), memory());
        let mut noise = 1_u64;
        for at in (0..SIZE).step_by(8) {
            noise = noise.wrapping_mul(0x5851_f42d_4c95_7f2d).rotate_left(23) ^ at;
            let value = if at % PAGE == 0 { at + 1 } else { noise };
            memory.write_obj(value, GuestAddress(at)).unwrap();
        }
        let watch = watch(&memory);
        let to = writer(&folder, &watch, "a");
        save_stopped(&watch, &to, &Silent).unwrap();
        to.commit(&Cut { created: 1, disks: Vec::new(), state_version: 1, state: b"" }).unwrap();
        let reader = Reader::open(&folder, &Name::new("vm", "a").unwrap(), Access::Cached).unwrap();
        (folder, reader)
    }

    /// Reads a page as a device does: by a system call, which fails where a load would be a signal.
    fn touch(memory: &GuestMemoryMmap<()>, at: u64) -> io::Result<u64> {
        let (read, write) = rustix::pipe::pipe()?;
        let sent = memory.write_volatile_to(GuestAddress(at), &mut File::from(write), 8);
        sent.map_err(|error| match error {
            vm_memory::GuestMemoryError::IOError(error) => error,
            error => io::Error::other(error),
        })?;
        let mut bytes = [0; 8];
        rustix::io::read(&read, &mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }

    #[test]
    fn nobody_waits_for_a_thread_that_has_died() {
        let (folder, reader) = saved();
        let memory = memory();
        let mut watch = watch(&memory);
        let options = RestoreOptions { background: false, ..RestoreOptions::default() };
        let restorer = Restorer::begin(&watch, reader, options).unwrap();
        assert_eq!(touch(&memory, 0).unwrap(), 1);
        while restorer.figures().left > SIZE / (64 << 10) - 2 {
            std::thread::yield_now();
        }
        watch.deafen();
        let last = SIZE - PAGE;
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| touch(&memory, last));
            std::thread::sleep(std::time::Duration::from_millis(50));
            assert!(!waiting.is_finished(), "nobody answers");
            guarded(watch.core(), || panic!("a mistake, for the test"));
            assert_eq!(waiting.join().unwrap().unwrap_err().raw_os_error(), Some(libc::EFAULT));
        });
        assert!(matches!(restorer.event(std::time::Duration::ZERO), Event::Broken(_)));
        // Each page is what was saved, or cannot be had, and that for everybody who comes later.
        let mut there = 0;
        for at in (0..SIZE).step_by(to_usize(PAGE)) {
            match touch(&memory, at) {
                Ok(value) => {
                    assert_eq!(value, at + 1);
                    there += 1;
                }
                Err(error) => assert_eq!(error.raw_os_error(), Some(libc::EFAULT)),
            }
        }
        assert!((16..SIZE / PAGE).contains(&there), "{there} pages were there");
        // Nothing is protected by whom nobody would hear.
        let to = writer(&folder, &watch, "b");
        let error = Saver::begin(&watch, to, SaveOptions::default()).unwrap_err();
        assert!(error.to_string().contains("mistake in this program"), "{error}");
        memory.write_obj(7_u64, GuestAddress(0)).unwrap();
        assert_eq!(touch(&memory, 0).unwrap(), 7);
    }

    #[test]
    fn a_save_whose_thread_has_died_lets_the_guest_write() {
        let (folder, memory) = (saved().0, memory());
        memory.write_obj(1_u64, GuestAddress(0)).unwrap();
        let mut watch = watch(&memory);
        let to = writer(&folder, &watch, "b");
        let mut saver =
            Saver::begin(&watch, to, SaveOptions { keep_tracking: true, ..SaveOptions::default() }).unwrap();
        saver.cut().unwrap();
        watch.deafen();
        std::thread::scope(|scope| {
            let writing = scope.spawn(|| memory.write_obj(2_u64, GuestAddress(0)).unwrap());
            std::thread::sleep(std::time::Duration::from_millis(50));
            guarded(watch.core(), || panic!("a mistake, for the test"));
            writing.join().unwrap();
        });
        saver.wait().ok();
        memory.write_obj(3_u64, GuestAddress(SIZE - PAGE)).unwrap();
        assert_eq!(touch(&memory, 0).unwrap(), 2);
    }
}
