//! Which chunk each slab of a segment belongs to, coded for the two ways disks are filled: in order, and by several
//! writers at once, each in order. A disk filled in order takes a few bytes, one filled in parallel a byte for each slab.
//! The coding is in the FORMAT page of `snapshot::record`.

use crate::codec::{Reader, Writer};
use crate::error::Result;
use crate::units::{CHUNK_BLOCKS, CHUNKS_MAX, SLOT_BITS};

/// Numbers of slabs end here.
const SLABS_MAX: u64 = (1 << SLOT_BITS) / CHUNK_BLOCKS;
const EXPECTED_MAX: usize = 63;
const LITERAL: u8 = 63;
const GAP: u8 = 1 << 6;
const RUN: u8 = 1 << 7;

/// Consecutive slabs that belong to consecutive chunks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct SlabRun {
    /// Number of the first slab.
    pub slab: u32,
    /// Its chunk.
    pub chunk: u32,
    /// Slabs.
    pub len: u32,
}

/// Gathers single slabs, in growing order of number, into runs.
pub(super) fn gather(slabs: &[(u32, u32)]) -> Vec<SlabRun> {
    let mut runs: Vec<SlabRun> = Vec::new();
    for (slab, chunk) in slabs {
        match runs.last_mut() {
            Some(run) if run.slab + run.len == *slab && run.chunk + run.len == *chunk => run.len += 1,
            _ => runs.push(SlabRun { slab: *slab, chunk: *chunk, len: 1 }),
        }
    }
    runs
}

/// Chunks that are likely to come next, the latest first.
#[derive(Debug, Default)]
struct Expected(Vec<u32>);

impl Expected {
    fn put(&mut self, chunk: u32) {
        self.0.truncate(EXPECTED_MAX - 1);
        self.0.insert(0, chunk);
    }
}

/// Codes runs in growing order of slab.
pub(super) fn encode(runs: &[SlabRun], out: &mut Writer) {
    let mut expected = Expected::default();
    let (mut next_slab, mut last_chunk) = (1, 0);
    for run in runs {
        let place = expected.0.iter().position(|chunk| *chunk == run.chunk);
        let code = place.map_or(LITERAL, |place| u8::try_from(place).expect("at most 62"));
        let gap = run.slab - next_slab;
        out.u8(code | if gap > 0 { GAP } else { 0 } | if run.len > 1 { RUN } else { 0 });
        if gap > 0 {
            out.varint(u64::from(gap));
        }
        match place {
            Some(place) => drop(expected.0.remove(place)),
            None => drop(out.varint(zigzag(i64::from(run.chunk) - i64::from(last_chunk)))),
        }
        if run.len > 1 {
            out.varint(u64::from(run.len - 1));
        }
        last_chunk = run.chunk + run.len - 1;
        next_slab = run.slab + run.len;
        expected.put(last_chunk + 1);
    }
}

fn zigzag(value: i64) -> u64 {
    ((value << 1) ^ (value >> 63)).cast_unsigned()
}

fn unzigzag(value: u64) -> i64 {
    (value >> 1).cast_signed() ^ -(value & 1).cast_signed()
}

/// Takes coded runs apart: `count` slabs in all.
///
/// # Errors
/// `Corrupt`.
pub(super) fn decode(from: &mut Reader<'_>, count: u32) -> Result<Vec<SlabRun>> {
    let mut expected = Expected::default();
    let mut runs = Vec::new();
    let (mut next_slab, mut last_chunk, mut seen) = (1u64, 0i64, 0u64);
    while seen < u64::from(count) {
        let token = from.u8()?;
        if token & GAP != 0 {
            next_slab = next_slab.saturating_add(from.varint()?);
        }
        let chunk = match token & LITERAL {
            LITERAL => last_chunk.saturating_add(unzigzag(from.varint()?)),
            place if usize::from(place) < expected.0.len() => i64::from(expected.0.remove(usize::from(place))),
            _ => return Err(from.corrupt("a slab expects a chunk that nothing led to")),
        };
        let len = if token & RUN == 0 { 1 } else { from.varint()?.saturating_add(1) };
        let beyond = |first: u64, most: u64| first.checked_add(len).is_none_or(|end| end > most);
        let Ok(first) = u64::try_from(chunk) else { return Err(from.corrupt("a slab has a chunk below 0")) };
        if beyond(next_slab, SLABS_MAX) || beyond(first, CHUNKS_MAX) {
            return Err(from.corrupt("a slab or its chunk is beyond the largest"));
        }
        seen += len;
        let narrow = |value: u64| u32::try_from(value).expect("compared with the largest");
        runs.push(SlabRun { slab: narrow(next_slab), chunk: narrow(first), len: narrow(len) });
        next_slab += len;
        last_chunk = chunk + len.cast_signed() - 1;
        expected.put(narrow(first + len));
    }
    if seen != u64::from(count) {
        return Err(from.corrupt("there are more slabs than the directory says"));
    }
    Ok(runs)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn round(slabs: &[(u32, u32)]) -> usize {
        let runs = gather(slabs);
        let mut out = Writer::new();
        encode(&runs, &mut out);
        let bytes = out.finish();
        let mut from = Reader::new("slabs", &bytes);
        assert_eq!(decode(&mut from, u32::try_from(slabs.len()).unwrap()).unwrap(), runs);
        from.end().unwrap();
        for cut in 0..bytes.len().min(200) {
            let mut from = Reader::new("slabs", &bytes[..cut]);
            decode(&mut from, u32::try_from(slabs.len()).unwrap()).unwrap_err();
        }
        bytes.len()
    }

    #[test]
    fn slabs_come_back_and_are_short() {
        assert_eq!(round(&[]), 0);
        let in_order: Vec<_> = (0..500_000).map(|i| (i + 1, i)).collect();
        assert!(round(&in_order) < 10);
        let mut next = [0u32, 100_000, 200_000, 300_000, 400_000];
        let parallel: Vec<_> = (0..400_000u32)
            .map(|i| {
                let who = (i.wrapping_mul(2_654_435_761) >> 20) as usize % next.len();
                next[who] += 1;
                (i * 2 + 1, next[who])
            })
            .take(200_000)
            .collect();
        assert!(round(&parallel) <= 200_000 * 2 + 30);
        let random: Vec<_> = (0..10_000u32).map(|i| (i + 1, i.wrapping_mul(7_919) % (1 << 25))).collect();
        round(&random);
    }

    #[test]
    fn no_bytes_lead_beyond_the_limits() {
        let mut seed = 7u64;
        for _ in 0..20_000 {
            let bytes: Vec<u8> = (0..12)
                .map(|_| {
                    seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    (seed >> 56) as u8
                })
                .collect();
            for run in decode(&mut Reader::new("noise", &bytes), 3).into_iter().flatten() {
                assert!(u64::from(run.slab + run.len) <= SLABS_MAX && u64::from(run.chunk + run.len) <= CHUNKS_MAX);
            }
        }
    }
}
