//! Puts a stream together, record by record, into anything that takes bytes.

use std::io::Write;

use super::format::{Codec, Header, Record, Totals};
use crate::codec::crc32;
use crate::error::{Error, Result};

/// A stream being written.
pub struct StreamWriter<'a> {
    out: &'a mut dyn Write,
    headers: crc32fast::Hasher,
    totals: Totals,
    written: u64,
}

impl std::fmt::Debug for StreamWriter<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StreamWriter").field("totals", &self.totals).finish_non_exhaustive()
    }
}

impl<'a> StreamWriter<'a> {
    /// Begins with the header.
    ///
    /// # Errors
    /// Any error of the writer.
    pub fn new(out: &'a mut dyn Write, header: &Header) -> Result<Self> {
        let mut it = Self { out, headers: crc32fast::Hasher::new(), totals: Totals::default(), written: 0 };
        let bytes = header.encode();
        it.headers.update(&bytes);
        it.put(&bytes)?;
        Ok(it)
    }

    /// Adds data; `stored` is how it goes into the stream, `crc` is of the plain bytes.
    ///
    /// # Errors
    /// Any error of the writer.
    pub fn data(&mut self, offset: u64, length: u64, codec: Codec, stored: &[u8], crc: u32) -> Result<()> {
        let len = u32::try_from(stored.len()).expect("at most 1 MiB");
        self.record(&Record::Data { offset, length, codec, stored: len, crc })?;
        if codec == Codec::Lz4 {
            self.headers.update(stored);
        }
        self.put(stored)?;
        self.totals.data_records += 1;
        self.totals.data += length;
        Ok(())
    }

    /// Adds zeros.
    ///
    /// # Errors
    /// Any error of the writer.
    pub fn zeros(&mut self, offset: u64, length: u64) -> Result<()> {
        self.record(&Record::Zeros { offset, length })?;
        self.totals.zero_records += 1;
        self.totals.zeros += length;
        Ok(())
    }

    /// Ends the stream and returns how many bytes it has.
    ///
    /// # Errors
    /// Any error of the writer.
    pub fn end(mut self) -> Result<u64> {
        let totals = Totals { headers: self.headers.clone().finalize(), ..self.totals }.encode();
        self.record(&Record::End { crc: crc32(&totals) })?;
        self.put(&totals)?;
        self.out.flush().map_err(|e| Error::io(WRITE, e))?;
        Ok(self.written)
    }

    fn record(&mut self, record: &Record) -> Result<()> {
        let bytes = record.encode();
        self.headers.update(&bytes);
        self.put(&bytes)
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.out.write_all(bytes).map_err(|e| Error::io(WRITE, e))?;
        self.written += bytes.len() as u64;
        Ok(())
    }
}

const WRITE: &str = "cannot write the stream";
