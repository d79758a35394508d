//! From a stream of extents to the files and ranges of an increment, in bounded memory.
//!
//! # Rules
//! 1. At most so many data files: where there are more, the smallest gaps between them are joined. What became zeros in
//!    such a gap is carried as data then.
//! 2. At most so many changes are kept at a time. When there are more, half of the neighbours are joined, those for which
//!    that carries the fewest bytes more. Of pure data this joins nothing that rule 1 would not join in the end.
//! 3. Nothing is ever left out: joining only adds bytes.

use super::Part;
use crate::snapshot::diff::Extent;
use crate::units::{BLOCK_SIZE, DISK_SIZE_MAX};

/// Most data files of an increment.
pub const FILES_MAX: usize = 65_536;
/// Most changes kept apart: 32 MiB.
const CHANGES_MAX: usize = 1 << 21;

/// A change; 16 bytes, because there may be millions.
#[derive(Debug, Clone, Copy)]
struct Range {
    /// First byte; the lowest bit says that it reads as zeros.
    tagged: u64,
    end: u64,
}

impl Range {
    fn new(start: u64, end: u64, zero: bool) -> Self {
        Self { tagged: start | u64::from(zero), end }
    }

    fn start(self) -> u64 {
        self.tagged & !1
    }

    fn zero(self) -> bool {
        self.tagged & 1 == 1
    }

    fn len(self) -> u64 {
        self.end - self.start()
    }
}

/// Takes extents, and plans the files.
#[derive(Debug)]
pub struct Planner {
    ranges: Vec<Range>,
    data: u64,
    files_max: usize,
    changes_max: usize,
}

/// The files and ranges of an increment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    /// Data files, in order.
    pub files: Vec<Part>,
    /// Ranges of zeros, in order.
    pub zeros: Vec<Part>,
    /// Bytes in files that no extent had as data.
    pub joined: u64,
}

impl Default for Planner {
    fn default() -> Self {
        Self::with_limits(FILES_MAX, CHANGES_MAX)
    }
}

impl Planner {
    /// Makes one with other limits.
    pub(super) fn with_limits(files_max: usize, changes_max: usize) -> Self {
        assert!(files_max > 0 && changes_max >= 2 * files_max, "limits that can be kept");
        Self { ranges: Vec::new(), data: 0, files_max, changes_max }
    }

    /// Takes the next extent; they come sorted and disjoint.
    pub fn push(&mut self, extent: Extent) {
        let Extent { offset, length, zero } = extent;
        let after = self.ranges.last().map_or(0, |last| last.end);
        assert!(length > 0 && offset >= after && offset % BLOCK_SIZE == 0, "extents come sorted and whole");
        assert!(length <= DISK_SIZE_MAX && offset <= DISK_SIZE_MAX - length, "extents lie inside a disk");
        if !zero {
            self.data += length;
        }
        if let Some(last) = self.ranges.last_mut()
            && last.end == offset
            && last.zero() == zero
        {
            last.end += length;
            return;
        }
        if self.ranges.len() == self.changes_max {
            self.join_half();
        }
        self.ranges.push(Range::new(offset, offset + length, zero));
    }

    /// Joins half of the neighbours.
    fn join_half(&mut self) {
        // The bytes that are carried more when two neighbours become one file.
        let cost = |pair: &[Range]| {
            let zeros: u64 = pair.iter().filter(|range| range.zero()).map(|range| range.len()).sum();
            pair[1].start() - pair[0].end + zeros
        };
        let costs: Vec<u64> = self.ranges.windows(2).map(cost).collect();
        let joins = smallest(&costs, costs.len() / 2 + 1);
        self.ranges = fuse(&self.ranges, &joins);
    }

    /// Returns the plan.
    #[must_use]
    pub fn finish(mut self) -> Plan {
        let files: Vec<Range> = self.ranges.iter().copied().filter(|range| !range.zero()).collect();
        if files.len() > self.files_max {
            let gaps: Vec<u64> = files.windows(2).map(|pair| pair[1].start() - pair[0].end).collect();
            let joins = smallest(&gaps, files.len() - self.files_max);
            self.ranges.retain(|range| range.zero());
            let files = fuse(&files, &joins);
            // Both are sorted, and a range of zeros is inside a file or outside of all.
            let mut at = 0;
            self.ranges.retain(|zero| {
                while files.get(at).is_some_and(|file| file.end <= zero.start()) {
                    at += 1;
                }
                files.get(at).is_none_or(|file| zero.end <= file.start())
            });
            return self.plan(&files);
        }
        self.plan(&files)
    }

    fn plan(&self, files: &[Range]) -> Plan {
        let part = |range: &Range| Part { offset: range.start(), length: range.len() };
        let files: Vec<Part> = files.iter().map(part).collect();
        let zeros = self.ranges.iter().filter(|range| range.zero()).map(part).collect();
        let joined = files.iter().map(|file| file.length).sum::<u64>() - self.data;
        Plan { files, zeros, joined }
    }
}

/// Tells for each number whether it is one of the `count` smallest; of equal ones the first.
fn smallest(numbers: &[u64], count: usize) -> Vec<bool> {
    let mut sorted = numbers.to_vec();
    let (below, limit, _) = sorted.select_nth_unstable(count - 1);
    let limit = *limit;
    let mut equal = count - below.iter().filter(|number| **number < limit).count();
    let mut take = |number: u64| {
        if number == limit && equal > 0 {
            equal -= 1;
            return true;
        }
        number < limit
    };
    numbers.iter().map(|number| take(*number)).collect()
}

/// Joins range i + 1 to range i where `joins[i]` says so; what is joined is data.
fn fuse(ranges: &[Range], joins: &[bool]) -> Vec<Range> {
    let mut fused: Vec<Range> = Vec::new();
    for (at, range) in ranges.iter().enumerate() {
        match fused.last_mut() {
            Some(last) if joins[at - 1] => *last = Range::new(last.start(), range.end, false),
            _ => fused.push(*range),
        }
    }
    fused
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::units::to_usize;

    fn plan(planner: Planner, blocks: &[(u64, u64, bool)]) -> Plan {
        let mut planner = planner;
        for (first, count, zero) in blocks {
            planner.push(Extent { offset: first * BLOCK_SIZE, length: count * BLOCK_SIZE, zero: *zero });
        }
        planner.finish()
    }

    fn blocks(parts: &[Part]) -> Vec<(u64, u64)> {
        parts.iter().map(|part| (part.offset / BLOCK_SIZE, part.length / BLOCK_SIZE)).collect()
    }

    #[test]
    fn few_extents_stay_as_they_are() {
        let plan = plan(Planner::default(), &[(0, 1, false), (1, 2, true), (3, 4, false), (7, 1, false)]);
        assert_eq!(blocks(&plan.files), [(0, 1), (3, 5)]);
        assert_eq!((blocks(&plan.zeros), plan.joined), (vec![(1, 2)], 0));
    }

    #[test]
    fn the_smallest_gaps_are_joined_and_zeros_in_them_are_data() {
        let all = [(0, 1, false), (10, 1, false), (12, 1, true), (14, 1, false), (40, 2, true), (50, 1, false)];
        let plan = plan(Planner::with_limits(3, 6), &all);
        assert_eq!(blocks(&plan.files), [(0, 1), (10, 5), (50, 1)]);
        assert_eq!((blocks(&plan.zeros), plan.joined), (vec![(40, 2)], 3 * BLOCK_SIZE));
    }

    #[test]
    fn seventy_thousand_extents_make_65536_files() {
        let all: Vec<_> = (0..70_000).map(|i| (i * 16 + i % 3, 1, false)).collect();
        let plan = plan(Planner::default(), &all);
        assert_eq!(plan.files.len(), FILES_MAX);
        // Gaps are 16, 16 and 13 blocks: it is the last sort that goes.
        assert_eq!(plan.joined, (70_000 - FILES_MAX as u64) * 13 * BLOCK_SIZE);
    }

    fn extents() -> impl Strategy<Value = Vec<(u64, u64, bool)>> {
        prop::collection::vec((0_u64..6, 1_u64..5, any::<bool>()), 0..120).prop_map(|steps| {
            let mut at = 0;
            let place = |(gap, count, zero): (u64, u64, bool)| {
                let first = at + gap;
                at = first + count;
                (first, count, zero)
            };
            steps.into_iter().map(place).collect()
        })
    }

    proptest! {
        #[test]
        fn nothing_is_left_out(all in extents(), files_max in 1_usize..9, room in 0_usize..40) {
            let plan = plan(Planner::with_limits(files_max, 2 * files_max + room), &all);
            prop_assert!(plan.files.len() <= files_max);
            let mut now = vec![None; 1300];
            for (parts, zero) in [(&plan.files, false), (&plan.zeros, true)] {
                prop_assert!(parts.windows(2).all(|pair| pair[0].end() <= pair[1].offset));
                for (first, count) in blocks(parts) {
                    for block in &mut now[to_usize(first)..to_usize(first + count)] {
                        prop_assert!(block.is_none(), "nothing is there twice");
                        *block = Some(zero);
                    }
                }
            }
            let mut data = 0;
            for (first, count, zero) in all {
                data += if zero { 0 } else { count };
                for block in &now[to_usize(first)..to_usize(first + count)] {
                    // Data is good for both: it is read from the new state.
                    prop_assert!(*block == Some(zero) || *block == Some(false));
                }
            }
            prop_assert_eq!(plan.joined, blocks(&plan.files).iter().map(|(_, n)| n).sum::<u64>() * 4096 - data * 4096);
        }
    }
}
