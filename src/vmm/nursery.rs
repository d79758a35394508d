//! Where the threads of devices come from.
//!
//! A driver that is ready starts the threads of its device, and it is the thread of a processor of the guest that hears so.
//! What a thread starts inherits its filter of system calls ([`Confinement`]), and that of a processor lets little through.
//! So a thread that has no narrow filter starts them.
//!
//! # Rules
//! 1. It starts what it is told to start, in order, and ends when nobody can tell it any more.

use std::io;
use std::sync::mpsc;
use std::thread::JoinHandle;

use super::filter::Confinement;
use super::virtio::{Broken, Seat};

type Born = io::Result<JoinHandle<Vec<Seat>>>;

struct Order {
    name: String,
    body: Box<dyn FnOnce() -> Vec<Seat> + Send>,
    answer: mpsc::Sender<Born>,
}

/// The thread that starts others.
#[derive(Debug)]
pub(super) struct Nursery {
    orders: Option<mpsc::Sender<Order>>,
    thread: Option<JoinHandle<()>>,
    confinement: Confinement,
}

impl Nursery {
    /// Starts it.
    ///
    /// # Errors
    /// When the host has no thread.
    pub(super) fn new(confinement: Confinement) -> io::Result<Self> {
        let (orders, inbox) = mpsc::channel::<Order>();
        let thread = std::thread::Builder::new().name("nursery".into()).spawn(move || {
            for Order { name, body, answer } in inbox {
                // Whoever asked waits for the answer.
                answer.send(std::thread::Builder::new().name(name).spawn(body)).ok();
            }
        })?;
        Ok(Self { orders: Some(orders), thread: Some(thread), confinement })
    }

    /// Starts a thread.
    ///
    /// # Errors
    /// When the host has none.
    pub(super) fn start(&self, name: &str, body: impl FnOnce() -> Vec<Seat> + Send + 'static) -> Born {
        let gone = || io::Error::other("the thread that starts others has gone");
        let (answer, wait) = mpsc::channel();
        let order = Order { name: name.into(), body: Box::new(body), answer };
        self.orders.as_ref().and_then(|orders| orders.send(order).ok()).ok_or_else(gone)?;
        wait.recv().map_err(|_| gone())?
    }

    /// Confines the calling thread to what devices need, if this machine is confined.
    ///
    /// # Errors
    /// When the host does not do it.
    pub(super) fn confine(&self) -> Result<(), Broken> {
        self.confinement.device().map_err(|error| Broken(error.to_string()))
    }
}

impl Drop for Nursery {
    fn drop(&mut self) {
        self.orders = None;
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the thread that starts others failed on a mistake in this program");
        }
    }
}
