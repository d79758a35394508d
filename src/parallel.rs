//! Work in parts on all CPUs, with results in order.
//!
//! # Rules
//! 1. What is in memory are the results of two parts for each thread, and one more.
//! 2. One part is worked on where the caller is: small work starts no thread, and a simulated crash finds the same I/O.

use std::sync::mpsc::sync_channel;
use std::thread::{available_parallelism, scope};

use crate::error::Result;

/// Threads at a time; beyond this the disk is the limit.
const THREADS_MAX: usize = 8;

/// Calls `work` for `0..parts`, on several threads, and `each` with the results, here and in order. The first error ends it.
///
/// # Errors
/// Of `work` and of `each`.
pub fn in_order<T: Send>(
    parts: u32,
    work: impl Fn(u32) -> Result<T> + Sync,
    each: &mut dyn FnMut(T) -> Result<()>,
) -> Result<()> {
    let threads = available_parallelism().map_or(1, usize::from).min(THREADS_MAX);
    if parts <= 1 || threads == 1 {
        return (0..parts).try_for_each(|part| each(work(part)?));
    }
    let threads = u32::try_from(threads).expect("a few").min(parts);
    let work = &work;
    scope(|scope| {
        // Each thread has every so many parts to itself. One that is not waited for any more finds nobody to send to.
        let results: Vec<_> = (0..threads)
            .map(|first| {
                let (sender, results) = sync_channel(1);
                let own = (first..parts).step_by(threads as usize);
                scope.spawn(move || own.map(work).all(|result| sender.send(result).is_ok()));
                results
            })
            .collect();
        for part in 0..parts {
            // Without a result it has panicked, and so does the end of the scope.
            let Ok(result) = results[(part % threads) as usize].recv() else { break };
            each(result?)?;
        }
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;

    #[test]
    fn results_come_in_order_and_the_first_error_ends_it() {
        for parts in [0, 1, 2, 100] {
            let mut seen = Vec::new();
            let each = &mut |part| {
                seen.push(part);
                Ok(())
            };
            in_order(parts, Ok, each).unwrap();
            assert_eq!(seen, (0..parts).collect::<Vec<_>>());
        }
        let mut seen = 0;
        let work = |part| if part == 5 { Err(Error::failed("five")) } else { Ok(part) };
        let count = &mut |_| {
            seen += 1;
            Ok(())
        };
        assert!(in_order(100, work, count).unwrap_err().to_string().contains("five"));
        assert_eq!(seen, 5);
        in_order(100, Ok, &mut |part| if part == 7 { Err(Error::failed("seven")) } else { Ok(()) }).unwrap_err();
    }
}
