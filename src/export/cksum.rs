//! The CRC of the POSIX utility `cksum`.
//!
//! # Rules
//! 1. The number is what `cksum` prints: POSIX.1-2017, utility `cksum`, polynomial 0x04C11DB7.
//! 2. Sixteen bytes a step, by tables made at compile time (after M. E. Kounavis and F. L. Berry, "Novel table lookup-based
//!    algorithms for high-performance CRC generation"): a copy is bound by its disk, not by this.

const POLYNOMIAL: u32 = 0x04c1_1db7;
const STEP: usize = 16;

const TABLES: [[u32; 256]; STEP] = tables();

#[expect(clippy::cast_possible_truncation, reason = "the index of a byte")]
const fn tables() -> [[u32; 256]; STEP] {
    let mut tables = [[0; 256]; STEP];
    let mut byte = 0;
    while byte < 256 {
        let mut crc = (byte as u32) << 24;
        let mut bit = 0;
        while bit < 8 {
            crc = if crc & 0x8000_0000 == 0 { crc << 1 } else { crc << 1 ^ POLYNOMIAL };
            bit += 1;
        }
        tables[0][byte] = crc;
        byte += 1;
    }
    let mut table = 1;
    while table < STEP {
        byte = 0;
        while byte < 256 {
            let before = tables[table - 1][byte];
            tables[table][byte] = before << 8 ^ tables[0][(before >> 24) as usize];
            byte += 1;
        }
        table += 1;
    }
    tables
}

/// A CRC in the making.
#[derive(Debug, Clone, Copy, Default)]
pub struct Cksum {
    crc: u32,
    length: u64,
}

impl Cksum {
    /// Goes on with more bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        let (steps, rest) = bytes.as_chunks::<STEP>();
        for step in steps {
            let head = self.crc.to_be_bytes();
            self.crc = 0;
            for (at, byte) in step.iter().enumerate() {
                let byte = if at < head.len() { byte ^ head[at] } else { *byte };
                self.crc ^= TABLES[STEP - 1 - at][usize::from(byte)];
            }
        }
        for byte in rest {
            self.step(*byte);
        }
        self.length += bytes.len() as u64;
    }

    fn step(&mut self, byte: u8) {
        let [high, ..] = self.crc.to_be_bytes();
        self.crc = self.crc << 8 ^ TABLES[0][usize::from(high ^ byte)];
    }

    /// Returns what `cksum` prints for the bytes so far.
    #[must_use]
    pub fn finish(mut self) -> u32 {
        let mut length = self.length;
        while length != 0 {
            let [low, ..] = length.to_le_bytes();
            self.step(low);
            length >>= 8;
        }
        !self.crc
    }

    /// Returns the CRC of bytes that are all there.
    #[must_use]
    pub fn of(bytes: &[u8]) -> u32 {
        let mut crc = Self::default();
        crc.update(bytes);
        crc.finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_those_of_the_utility() {
        assert_eq!(Cksum::of(b""), 4_294_967_295);
        assert_eq!(Cksum::of(b"123456789"), 930_766_865);
        let block: Vec<u8> = (0..4096_u32).map(|i| (i * 7 % 251) as u8).collect();
        let mut parts = Cksum::default();
        for part in block.chunks(37) {
            parts.update(part);
        }
        assert_eq!(parts.finish(), Cksum::of(&block));
    }
}
