//! How inputs are changed.

use std::ops::Range;

/// Longer inputs are not searched for checksums: that takes time with the square of the length.
const SEARCHED_MAX: usize = 6000;
/// Inputs do not grow beyond this.
const LEN_MAX: usize = 1 << 18;

/// Bytes with a checksum over them somewhere beside.
#[derive(Clone)]
struct Sum {
    over: Range<usize>,
    at: usize,
}

/// An input, with the checksums that were found in it.
pub struct Input {
    pub bytes: Vec<u8>,
    sums: Vec<Sum>,
}

impl Input {
    /// Looks for checksums by trying: a CRC32 behind its bytes, before them, or before them with four bytes between.
    pub fn new(bytes: Vec<u8>) -> Self {
        let table = crc_table();
        let word = |at: usize| bytes.get(at..at + 4).map(|word| u32::from_le_bytes(word.try_into().unwrap()));
        let mut sums = Vec::new();
        let searched = if bytes.len() > SEARCHED_MAX { 0 } else { bytes.len() };
        for from in 0..searched {
            let before = [4, 8].map(|back| from.checked_sub(back).and_then(|at| Some((at, word(at)?))));
            let mut crc = u32::MAX;
            for upto in from + 1..=searched {
                crc = table[((crc ^ u32::from(bytes[upto - 1])) & 0xff) as usize] ^ crc >> 8;
                if upto - from < 4 {
                    continue;
                }
                let over = from..upto;
                if word(upto) == Some(!crc) {
                    sums.push(Sum { over: over.clone(), at: upto });
                }
                let found = before.iter().flatten().filter(|(_, word)| *word == !crc);
                sums.extend(found.map(|(at, _)| Sum { over: over.clone(), at: *at }));
            }
        }
        Self { bytes, sums }
    }

    #[cfg(test)]
    pub fn sums(&self) -> usize {
        self.sums.len()
    }
}

fn crc_table() -> Vec<u32> {
    let step = |crc: u32| if crc & 1 == 1 { crc >> 1 ^ 0xEDB8_8320 } else { crc >> 1 };
    (0..256).map(|byte| (0..8).fold(byte, |crc, _| step(crc))).collect()
}

pub struct Mutator(u64);

impl Mutator {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn below(&mut self, below: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % below.max(1)
    }

    fn index(&mut self, below: usize) -> usize {
        self.below(below as u64) as usize
    }

    /// Makes the next input.
    pub fn next(&mut self, corpus: &[Input]) -> Vec<u8> {
        let base = &corpus[self.index(corpus.len())];
        let mut bytes = base.bytes.clone();
        for _ in 0..1 + self.below(5) {
            self.change(&mut bytes, corpus);
        }
        bytes.truncate(LEN_MAX);
        // In place: the checksums are where they were. Thrice, because some lie in the bytes of others.
        if bytes.len() == base.bytes.len() && self.below(8) > 0 {
            for sum in base.sums.iter().chain(&base.sums).chain(&base.sums) {
                let crc = afterimage::codec::crc32(&bytes[sum.over.clone()]);
                bytes[sum.at..sum.at + 4].copy_from_slice(&crc.to_le_bytes());
            }
        }
        bytes
    }

    fn change(&mut self, bytes: &mut Vec<u8>, corpus: &[Input]) {
        let at = self.index(bytes.len() + 1);
        let most = if self.below(4) == 0 { 200 } else { 12 };
        let len = 1 + self.index(most);
        let range = at..(at + len).min(bytes.len());
        match self.below(14) {
            0..=2 if at < bytes.len() => bytes[at] ^= 1 << self.below(8),
            3 | 4 if at < bytes.len() => bytes[at] = self.below(256) as u8,
            5..=7 => self.put_number(bytes, at),
            8 => drop(bytes.drain(range)),
            9 => {
                let again = bytes[range].to_vec();
                bytes.splice(at..at, again);
            }
            10 => {
                let other = &corpus[self.index(corpus.len())].bytes;
                let from = self.index(other.len() + 1);
                let piece = other[from..(from + len * 4).min(other.len())].to_vec();
                if self.below(2) == 0 {
                    bytes.splice(at..at, piece);
                } else {
                    let end = (at + piece.len()).min(bytes.len());
                    bytes.splice(at..end, piece);
                }
            }
            11 => bytes.truncate(at),
            12 => {
                // Two pieces change places.
                let other = self.index(bytes.len() + 1);
                for n in 0..len {
                    if at + n < bytes.len() && other + n < bytes.len() {
                        bytes.swap(at + n, other + n);
                    }
                }
            }
            _ => bytes[range].fill(if self.below(2) == 0 { 0 } else { 0xff }),
        }
    }

    /// Puts a number of some width that is often a limit.
    fn put_number(&mut self, bytes: &mut [u8], at: usize) {
        let width = [1, 2, 4, 8][self.index(4)];
        let at = if self.below(2) == 0 { at / 4 * 4 } else { at };
        let number = match self.below(8) {
            0 => u64::MAX,
            1 => u64::MAX >> 1,
            2 => 1 << self.below(64),
            3 => (1 << self.below(64)) - 1,
            4 => self.below(300),
            5 => bytes.len() as u64 + self.below(9),
            6 => self.below(u64::MAX).saturating_sub(self.below(9)),
            _ => 0,
        };
        let (little, big) = (number.to_le_bytes(), number.to_be_bytes());
        let number = if self.below(2) == 0 { &little[..width] } else { &big[8 - width..] };
        if let Some(place) = bytes.get_mut(at..at + width) {
            place.copy_from_slice(number);
        }
    }
}

#[test]
fn checksums_are_found_and_made_right_again() {
    let inner = afterimage::codec::seal(b"the inner part".to_vec());
    let input = Input::new(afterimage::codec::seal([&b"around"[..], &inner].concat()));
    assert!(input.sums() >= 2, "{}", input.sums());
    let (mut mutator, corpus) = (Mutator::new(1), [input]);
    let right = (0..1000)
        .map(|_| mutator.next(&corpus))
        .filter(|bytes| *bytes != corpus[0].bytes && afterimage::codec::unseal("it", bytes).is_ok())
        .count();
    assert!(right > 200, "{right}");
}
