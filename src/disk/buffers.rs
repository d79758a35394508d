//! Memory for the data of requests, kept for the next one: mapping it anew costs a fault for each page.
//!
//! # Rules
//! 1. A buffer has the length that was asked for or the next power of two, so that any request of a size fits any buffer
//!    of that size.
//! 2. What is kept is bounded, in bytes. More than that goes back to the host, and all of it when the owner says so: memory
//!    that nobody uses is counted as his ([`Buffers::total`]).
//! 3. The first buffers of a large size are cut from huge pages, unless the owner has to save memory. Those are kept as long
//!    as one of that size is lent, whatever the owner says: a huge page of which a part was given back stays in memory as a
//!    whole until the host runs short. So it is counted as a whole, from the first part that is lent
//!    ([`Buffers::cost`]).
//!
//! # Why huge pages
//! For direct I/O the kernel pins and describes each page of a buffer. Measured with 1 MiB sequential reads at depth 1 over
//! vhost-user-blk: 2314 MiB/s into one huge page, 901 MiB/s into 256 small ones.

use std::io;

use crate::sys::pages::{HUGE_PAGE, PAGE, Pages};

/// Bytes that are kept at most, without what is cut from huge pages.
const KEPT_MAX: usize = 16 << 20;
/// Bytes of a buffer from which on it is worth a huge page.
const LARGE: usize = 128 << 10;
/// Huge pages that buffers of one size are cut from at most.
const HUGE_MAX: usize = 2;
/// Sizes are powers of two, from a page on.
const SIZES: usize = 24;

/// The buffers of one thread.
#[derive(Debug)]
pub struct Buffers {
    spare: [Spare; SIZES],
    kept: usize,
    /// Bytes that are lent.
    lent: usize,
    /// Bytes in huge pages' parts that are kept.
    huge: usize,
    /// No more huge pages are cut.
    thrifty: bool,
}

/// Buffers of one size that nobody uses.
#[derive(Debug, Default)]
struct Spare {
    small: Vec<Pages>,
    /// Cut from huge pages; used first.
    huge: Vec<Pages>,
    /// How many of those are lent.
    lent: usize,
    /// Huge pages that were cut.
    cut: usize,
}

impl Default for Buffers {
    fn default() -> Self {
        Self { spare: std::array::from_fn(|_| Spare::default()), kept: 0, lent: 0, huge: 0, thrifty: false }
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
        let pages = self.find(len)?;
        self.lent += pages.len();
        Ok(pages)
    }

    /// Returns by how much [`Self::total`] grows with a buffer of `len` bytes.
    #[must_use]
    pub fn cost(&self, len: usize) -> usize {
        let size = size_of(len);
        let whole = PAGE << size;
        match self.spare.get(size) {
            Some(spare) if !spare.huge.is_empty() || !spare.small.is_empty() => 0,
            Some(spare) if !self.thrifty && spare.may_cut(whole) => HUGE_PAGE,
            _ => whole,
        }
    }

    /// Says whether memory is to be saved: no more huge pages are cut then, which are faster and more than what is asked for.
    pub fn save(&mut self, thrifty: bool) {
        self.thrifty = thrifty;
    }

    fn find(&mut self, len: usize) -> io::Result<Pages> {
        let size = size_of(len);
        let whole = PAGE << size;
        let Some(spare) = self.spare.get_mut(size) else { return Pages::new(whole) };
        if let Some(pages) = spare.huge.pop() {
            spare.lent += 1;
            self.huge -= pages.len();
            return Ok(pages);
        }
        if let Some(pages) = spare.small.pop() {
            self.kept -= pages.len();
            return Ok(pages);
        }
        if !self.thrifty && spare.may_cut(whole) {
            let pages = spare.cut_huge(whole)?;
            self.huge += HUGE_PAGE - whole;
            return Ok(pages);
        }
        if whole < HUGE_PAGE { Pages::new(whole) } else { Pages::huge(whole) }
    }

    /// Takes memory back that was taken from here.
    pub fn give_back(&mut self, pages: Pages) {
        self.lent -= pages.len();
        let Some(spare) = self.spare.get_mut(size_of(pages.len())) else { return };
        if pages.is_huge() && pages.len() < HUGE_PAGE {
            self.huge += pages.len();
            spare.lent -= 1;
            spare.huge.push(pages);
        } else if self.kept + pages.len() <= KEPT_MAX {
            self.kept += pages.len();
            spare.small.push(pages);
        }
    }

    /// Returns how many bytes are taken and were not given back.
    #[must_use]
    pub fn lent(&self) -> usize {
        self.lent
    }

    /// Returns how much memory that is, with what is kept.
    #[must_use]
    pub fn total(&self) -> usize {
        self.lent + self.kept + self.huge
    }

    /// Gives all that is kept back to the host, but for the rest of huge pages of which a part is lent.
    pub fn trim(&mut self) {
        (self.kept, self.huge) = (0, 0);
        for spare in &mut self.spare {
            spare.small = Vec::new();
            if spare.lent == 0 {
                *spare = Spare::default();
            }
            self.huge += spare.huge.iter().map(|pages| pages.len()).sum::<usize>();
        }
    }
}

impl Spare {
    /// Tells whether a huge page may be cut for buffers of `len` bytes.
    fn may_cut(&self, len: usize) -> bool {
        (LARGE..HUGE_PAGE).contains(&len) && self.cut < HUGE_MAX
    }

    /// Cuts a huge page into buffers of `len` bytes and returns one of them.
    fn cut_huge(&mut self, len: usize) -> io::Result<Pages> {
        let mut pages = Pages::huge(HUGE_PAGE)?;
        self.cut += 1;
        self.lent += 1;
        while pages.len() > len {
            let rest = pages.split_off(pages.len() - len);
            self.huge.push(rest);
        }
        Ok(pages)
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
        assert_eq!((buffers.lent(), buffers.total()), ((20 << 20) + 12_288, (20 << 20) + 12_288));
        many.into_iter().for_each(|pages| buffers.give_back(pages));
        assert_eq!((buffers.kept, buffers.total()), (KEPT_MAX, KEPT_MAX + 12_288));
        buffers.trim();
        assert_eq!(buffers.total(), 12_288);
        let large = buffers.take(1 << 40);
        assert!(large.is_err() || large.unwrap().len() == 1 << 40);
    }

    #[test]
    fn large_buffers_are_cut_from_few_huge_pages_and_those_are_kept_whole() {
        let mut buffers = Buffers::default();
        let len = 512 << 10;
        let taken: Vec<_> = (0..40).map(|_| buffers.take(len).unwrap()).collect();
        let huge = taken.iter().filter(|pages| pages.is_huge()).count();
        assert_eq!(huge, HUGE_MAX * HUGE_PAGE / len);
        assert!(taken.iter().all(|pages| pages.len() == len && pages.as_ptr().align_offset(PAGE) == 0));
        taken.into_iter().rev().for_each(|pages| buffers.give_back(pages));
        assert_eq!((buffers.spare[size_of(len)].huge.len(), buffers.kept), (huge, KEPT_MAX));
        assert_eq!((buffers.lent(), buffers.total()), (0, KEPT_MAX + HUGE_MAX * HUGE_PAGE));
        let again: Vec<_> = (0..huge).map(|_| buffers.take(len).unwrap()).collect();
        assert!(again.iter().all(Pages::is_huge), "they are used first");
        assert!(!buffers.take(len).unwrap().is_huge() && !buffers.take(LARGE / 2).unwrap().is_huge());
    }

    #[test]
    fn what_a_buffer_costs_is_told_before_it_is_taken() {
        let mut buffers = Buffers::default();
        let mut taken = Vec::new();
        for round in 0..4 {
            buffers.save(round == 2);
            for len in [1, 4096, 100_000, 128 << 10, 300_000, 1 << 20, 1 << 20, 1 << 20, (2 << 20) - 1, 3 << 20] {
                let (cost, before) = (buffers.cost(len), buffers.total());
                taken.push(buffers.take(len).unwrap());
                assert_eq!(buffers.total() - before, cost, "{len} bytes in round {round}");
            }
            for (n, pages) in std::mem::take(&mut taken).into_iter().enumerate() {
                if n % 3 == round { taken.push(pages) } else { buffers.give_back(pages) }
            }
            buffers.trim();
        }
        taken.into_iter().for_each(|pages| buffers.give_back(pages));
        buffers.trim();
        assert_eq!((buffers.total(), buffers.cost(128 << 10)), (0, HUGE_PAGE));
        buffers.save(true);
        assert_eq!(buffers.cost(128 << 10), 128 << 10);
        buffers.save(false);
        // The rest of a huge page is there as long as a part of it is lent.
        let part = buffers.take(128 << 10).unwrap();
        buffers.trim();
        assert_eq!((buffers.total(), buffers.cost(128 << 10)), (HUGE_PAGE, 0));
        buffers.give_back(part);
        assert_eq!(buffers.total(), HUGE_PAGE);
        buffers.trim();
        assert_eq!(buffers.total(), 0);
    }
}
