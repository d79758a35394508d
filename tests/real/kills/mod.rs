//! The server is killed at any moment under programs that sync: nothing that was synced is lost, and the pool opens
//! without repair. A few times in an ordinary run; `AFTERIMAGE_KILLS=200 cargo test real::kills` is the long one.
//!
//! # Rules
//! 1. What was written before a sync that ended well must be there, whole. What was written later is there or not, block
//!    by block; nothing else is ever found.
//! 2. Every test also proves that it would see a loss.

mod fio;
mod fsx;
mod writers;

use std::time::Duration;

use super::{Place, Server};

const BLOCK: usize = 4096;

/// Something that writes and syncs until the server is gone, and knows what must be there afterwards.
trait Load {
    /// Starts it, and returns when it writes.
    fn begin(&mut self, place: &Place, round: u64);
    /// Waits until all of it has noticed that the server is gone.
    fn end(&mut self);
    /// Says what is lost or torn; takes what is found for what is known.
    fn compare(&mut self, place: &Place, round: u64) -> Result<(), String>;
}

/// Tells how often to kill: few times, or as often as the environment says.
fn kills(few: u64) -> u64 {
    std::env::var("AFTERIMAGE_KILLS").map_or(few, |text| text.parse().unwrap())
}

/// Kills servers under a load that writes a disk, and starts them again. One round of three has a snapshot taken under
/// the load, another one has it deleted.
fn kill_under(place: &Place, mut server: Server, disk: &str, load: &mut dyn Load, kills: u64) -> Server {
    for round in 0..kills {
        load.begin(place, round);
        // The last one is long, so that something was synced on a machine that is busy.
        let long = if round + 1 == kills { 500 } else { 0 };
        let half = Duration::from_millis(15 + long + round * 137 % 400 / 2);
        std::thread::sleep(half);
        match round % 3 {
            1 => drop(place.cli.json(&["snapshot", &format!("{disk}@s{round}")])),
            2 => drop(place.cli.json(&["rm", &format!("{disk}@s{}", round - 1)])),
            _ => {}
        }
        std::thread::sleep(half);
        server.kill();
        load.end();
        // An error that a program gets from a server that lives has a line there.
        assert!(!place.log().contains(" ERROR "), "round {round}: {}", place.log());
        if round % 5 == 0 {
            place.check();
        }
        server = place.serve();
        if let Err(lost) = load.compare(place, round) {
            panic!("round {round}: {lost}\nlog of the server:\n{}", place.log());
        }
    }
    server
}
