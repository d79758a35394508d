//! SIGINT and SIGTERM, as calls on a thread of their own.

use tokio::signal::unix::{SignalKind, signal};

use crate::error::{Error, Result};

/// Which signal came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Signal {
    Interrupt,
    Terminate,
}

/// Calls `act` for each signal, from now to the end of the process.
pub(super) fn watch(act: impl Fn(Signal) + Send + 'static) -> Result<()> {
    let cannot = |e| Error::io("cannot watch for signals", e);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(cannot)?;
    let (mut interrupt, mut terminate) = {
        let _inside = runtime.enter();
        (signal(SignalKind::interrupt()).map_err(cannot)?, signal(SignalKind::terminate()).map_err(cannot)?)
    };
    let body = move || {
        runtime.block_on(async move {
            loop {
                let came = tokio::select! {
                    Some(()) = interrupt.recv() => Signal::Interrupt,
                    Some(()) = terminate.recv() => Signal::Terminate,
                    else => return,
                };
                act(came);
            }
        });
    };
    std::thread::Builder::new().name("signals".into()).spawn(body).map_err(cannot)?;
    Ok(())
}

/// Ends the process as the signal would have.
#[expect(clippy::exit, reason = "asked twice to stop; the pool is as safe as after a crash")]
pub(super) fn end(signal: Signal) -> ! {
    std::process::exit(match signal {
        Signal::Interrupt => 130,
        Signal::Terminate => 143,
    })
}
