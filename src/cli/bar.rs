//! Progress on a terminal, and the wish to stop.
//!
//! # Rules
//! 1. Nothing is drawn in the first second: most work is done by then.
//! 2. The first signal asks the work to stop and leaves the pool clean; the second ends the process at once.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::screen::Screen;
use super::signal;
use crate::clock::{self, Instant};
use crate::error::Result;
use crate::progress::Progress;
use crate::sync::Mutex;

/// How long nothing is drawn.
const SILENCE: Duration = Duration::from_secs(1);

/// What the units of the work are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Units {
    Bytes,
    Items,
}

/// A progress bar that appears when it is worth it.
#[derive(Debug)]
pub(super) struct Bar {
    units: Units,
    shown: bool,
    begun: Instant,
    state: Mutex<State>,
    stopped: Arc<AtomicBool>,
}

#[derive(Debug, Default)]
struct State {
    total: u64,
    done: u64,
    message: String,
    bar: Option<ProgressBar>,
}

impl Bar {
    /// Makes a bar for work that begins now; `shown` says whether there is a terminal to draw on.
    pub(super) fn new(units: Units, shown: bool) -> Self {
        let stopped = Arc::new(AtomicBool::new(false));
        Self { units, shown, begun: clock::now(), state: Mutex::default(), stopped }
    }

    /// Lets SIGINT and SIGTERM cancel the work.
    pub(super) fn stop_on_signals(&self, screen: Screen) -> Result<()> {
        let stopped = Arc::clone(&self.stopped);
        signal::watch(move |signal| {
            if stopped.swap(true, Ordering::AcqRel) {
                signal::end(signal);
            }
            screen.note("stopping cleanly; once more stops at once");
        })
    }

    /// Takes the bar off the terminal.
    pub(super) fn finish(&self) {
        if let Some(bar) = self.state.lock().bar.take() {
            bar.finish_and_clear();
        }
    }

    fn update(&self, change: impl FnOnce(&mut State)) {
        if !self.shown {
            return;
        }
        let mut state = self.state.lock();
        change(&mut state);
        if state.bar.is_none() && self.begun.elapsed() >= SILENCE {
            state.bar = Some(self.draw());
        }
        let State { total, done, message, bar } = &*state;
        if let Some(bar) = bar {
            if bar.length() != Some(*total) {
                bar.set_length(*total);
            }
            bar.set_position(*done);
            if bar.message() != *message {
                bar.set_message(message.clone());
            }
        }
    }

    fn draw(&self) -> ProgressBar {
        let template = match self.units {
            Units::Bytes => "{wide_bar} {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} {eta} {msg}",
            Units::Items => "{wide_bar} {human_pos}/{human_len} {per_sec} {eta} {msg}",
        };
        let style = ProgressStyle::with_template(template).expect("the template is a constant");
        let elapsed = self.begun.elapsed();
        ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr()).with_style(style).with_elapsed(elapsed)
    }
}

impl Progress for Bar {
    fn total(&self, units: u64) {
        self.update(|state| state.total = units);
    }

    fn advance(&self, done: u64) {
        self.update(|state| state.done = state.done.saturating_add(done));
    }

    fn message(&self, text: &str) {
        self.update(|state| text.clone_into(&mut state.message));
    }

    fn cancelled(&self) -> bool {
        self.stopped.load(Ordering::Acquire)
    }
}
