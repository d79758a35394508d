//! Files and values, one reader at a time.

use std::sync::Arc;

use afterimage::checkpoint::Header;
use afterimage::error::Result;
use afterimage::media::{File, Media, Open, SimMedia};
use afterimage::snapshot::record::{Memory, Record};
use afterimage::store::unflushed::{LOG_HEADER_LEN, LogHeader, LogRecord};
use afterimage::stream::{Part, StreamReader, Token};

use super::fuzz;
use crate::format::{checkpoint, files, fixture, fixture_of, samples};

fn told<T>(result: Result<T>) -> String {
    result.map_or_else(|error| format!("{:?} {error}", error.kind()), |_| "good".into())
}

pub(super) fn file_of(bytes: &[u8]) -> Arc<dyn File> {
    let file = SimMedia::new(1).open("it", Open::New).unwrap();
    file.write_at(bytes, 0).unwrap();
    file
}

#[test]
fn values_of_the_catalog() {
    let samples = samples::all();
    let numbered = |(n, sample): (usize, &samples::Sample)| [&[n as u8][..], &sample.bytes].concat();
    let corpus = samples.iter().enumerate().map(numbered).collect();
    fuzz("values", corpus, 20_000, |bytes| {
        let Some((n, value)) = bytes.split_first() else { return String::new() };
        let sample = &samples[usize::from(*n) % samples.len()];
        format!("{} {}", sample.name, told((sample.decode)(value)))
    });
}

#[test]
fn seals_of_segments_and_states() {
    fuzz("seal", vec![fixture("seal")], 4000, |bytes| told(files::read_seal(bytes)));
    fuzz("state-seal", vec![fixture_of("v2", "state-seal")], 4000, |bytes| told(files::read_state_seal(bytes)));
}

#[test]
fn texts() {
    fuzz("exports", vec![fixture("exports")], 3000, |bytes| told(files::read_exports(bytes)));
    fuzz("superblock", vec![fixture("superblock")], 2000, |bytes| told(files::read_superblock(bytes)));
    let golden = fixture("stream");
    let mut stream = &golden[..];
    let token = Token::of(&StreamReader::new(&mut stream).unwrap().header, 0).to_string();
    fuzz("token", vec![token.into_bytes()], 3000, |bytes| told(Token::parse(&String::from_utf8_lossy(bytes))));
}

#[test]
fn journals() {
    // What is behind its frames is zeros.
    let mut golden = fixture("journal");
    let whole = golden.len();
    golden.truncate(golden.iter().rposition(|byte| *byte != 0).unwrap() / 512 * 512 + 512);
    fuzz("journal", vec![golden], 3000, |bytes| {
        let mut all = bytes.to_vec();
        all.resize(whole.max(bytes.len()), 0);
        told(files::open_journal(&all).and_then(|(journal, _)| journal.check_end()))
    });
}

#[test]
fn logs_of_unflushed_changes() {
    fuzz("unflushed", vec![fixture("unflushed")], 10_000, |bytes| {
        let header = told(LogHeader::decode("log", bytes));
        let (records, error) = LogRecord::decode_all("log", bytes.get(LOG_HEADER_LEN..).unwrap_or_default());
        format!("{header} {} {error:?}", records.len().min(5))
    });
}

fn walk(bytes: &[u8], memory: Memory) -> Result<()> {
    let record = Record::read_within("the record", &file_of(bytes), memory)?;
    let mut walk = record.walk()?;
    while walk.step()?.is_some() {}
    let mut walk = record.walk_between(3..700)?;
    while walk.step()?.is_some() {}
    Ok(())
}

#[test]
fn records_of_retired_snapshots() {
    fuzz("record", vec![fixture("record")], 4000, |bytes| {
        let whole = walk(bytes, Memory { sets: u64::MAX, runs: usize::MAX });
        format!("{} {}", told(whole), told(walk(bytes, Memory { sets: 0, runs: 2 })))
    });
}

fn read(mut bytes: &[u8]) -> Result<u64> {
    let mut reader = StreamReader::new(&mut bytes)?;
    let mut total = 0;
    while let Some(part) = reader.next_part()? {
        total += u64::from(matches!(part, Part::Data { .. }));
    }
    Ok(total)
}

#[test]
fn streams() {
    fuzz("stream", vec![fixture("stream")], 6000, |bytes| told(read(bytes)));
}

/// The parts of a golden file that mean something, one after the other, and before them a byte that says whether checksums
/// are made right again. What is cut or grown moves from one part into the next.
#[test]
fn checkpoints() {
    let parts = checkpoint::parts();
    let golden = fixture("checkpoint");
    let sealed = [&[1][..], &parts.iter().flat_map(|(_, bytes)| bytes.clone()).collect::<Vec<_>>()].concat();
    let mut plain = sealed.clone();
    plain[0] = 0;
    fuzz("checkpoint", vec![sealed, plain], 4000, |bytes| {
        let Some((seal, mut rest)) = bytes.split_first() else { return String::new() };
        let mut file = golden.clone();
        for (at, part) in &parts {
            let (here, more) = rest.split_at(part.len().min(rest.len()));
            file[*at..*at + here.len()].copy_from_slice(here);
            rest = more;
        }
        if *seal & 1 == 1 {
            checkpoint::seal(&mut file);
        }
        told(checkpoint::read_all(&file))
    });
    let header = golden[..parts[0].1.len()].to_vec();
    fuzz("checkpoint-header", vec![header], 4000, |bytes| told(Header::decode("it", bytes)));
}
