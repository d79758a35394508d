//! Memory for the data of requests, kept for the next one: mapping it anew costs a fault for each page.
//!
//! # Rules
//! 1. A buffer has the length that was asked for or the next power of two, so that any request of a size fits any buffer
//!    of that size.
//! 2. What is kept is bounded, in bytes. More than that goes back to the host.

use std::io;

use crate::sys::pages::{PAGE, Pages};

/// Bytes that are kept at most.
const KEPT_MAX: usize = 16 << 20;
/// Sizes are powers of two, from a page on.
const SIZES: usize = 24;

/// The buffers of one thread.
#[derive(Debug)]
pub struct Buffers {
    spare: [Vec<Pages>; SIZES],
    kept: usize,
}

impl Default for Buffers {
    fn default() -> Self {
        Self { spare: std::array::from_fn(|_| Vec::new()), kept: 0 }
    }
}

fn size_of(len: usize) -> usize {
    let pages = len.max(PAGE).next_power_of_two() / PAGE;
    pages.trailing_zeros() as usize
}

impl Buffers {
    /// Returns page-aligned memory of at least `len` bytes. What is in it is what was in it before: zeros, or the data of
    /// an earlier request.
    ///
    /// # Errors
    /// When the host has no memory.
    pub fn take(&mut self, len: usize) -> io::Result<Pages> {
        let size = size_of(len);
        match self.spare.get_mut(size).and_then(Vec::pop) {
            Some(pages) => {
                self.kept -= pages.len();
                Ok(pages)
            }
            None => Pages::new(PAGE << size),
        }
    }

    /// Takes memory back.
    pub fn give_back(&mut self, pages: Pages) {
        if let Some(spare) = self.spare.get_mut(size_of(pages.len()))
            && self.kept + pages.len() <= KEPT_MAX
        {
            self.kept += pages.len();
            spare.push(pages);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_comes_back_for_its_size_and_not_too_many_are_kept() {
        let mut buffers = Buffers::default();
        let mut pages = buffers.take(5000).unwrap();
        assert_eq!(pages.len(), 8192);
        pages[0] = 7;
        buffers.give_back(pages);
        assert_eq!(buffers.take(4096).unwrap()[0], 0, "another size");
        assert_eq!((buffers.take(8192).unwrap()[0], buffers.kept), (7, 0));
        let many: Vec<_> = (0..5).map(|_| buffers.take(4 << 20).unwrap()).collect();
        many.into_iter().for_each(|pages| buffers.give_back(pages));
        assert_eq!(buffers.kept, KEPT_MAX);
        let large = buffers.take(1 << 40);
        assert!(large.is_err() || large.unwrap().len() == 1 << 40);
    }
}
