//! What an increment directory consists of: names, lengths and texts, without any of the data.
//!
//! # Rules
//! 1. Everything follows from the plan and the two states; nothing here reads or writes. The same description makes the
//!    directory that `export` writes and the one that the mount shows.
//! 2. Checksums need the data, the lengths of the texts do not: numbers have fixed widths, so a mount can tell the size of
//!    every file at once and compute the checksums when somebody reads them.

use std::fmt::Write as _;

use uuid::Uuid;

use super::{Cksum, Plan};
use crate::error::Result;

const APPLY: &str = include_str!("apply.sh");

/// A range of bytes of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
}

impl Part {
    /// Returns the end.
    #[must_use]
    pub fn end(self) -> u64 {
        self.offset + self.length
    }

    /// Returns the name of the data file.
    #[must_use]
    pub fn name(self) -> String {
        format!("{:014}-{:014}.bin", self.offset, self.length)
    }
}

/// The identity of a state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Side {
    /// Name of the disk.
    pub disk: String,
    /// Identity of the disk.
    pub disk_uuid: Uuid,
    /// Name of the snapshot.
    pub snapshot: String,
    /// Identity of the snapshot.
    pub uuid: Uuid,
    /// Bytes of the disk then.
    pub size: u64,
    /// Seconds since 1970.
    pub created: u64,
}

impl Side {
    /// Returns `DISK@SNAPSHOT`.
    #[must_use]
    pub fn name(&self) -> String {
        format!("{}@{}", self.disk, self.snapshot)
    }

    fn json(&self) -> String {
        format!(
            r#"{{"disk": {}, "snapshot": {}, "uuid": "{}", "disk-uuid": "{}", "size": {}, "created": {}}}"#,
            quoted(&self.disk),
            quoted(&self.snapshot),
            self.uuid,
            self.disk_uuid,
            self.size,
            self.created
        )
    }
}

fn quoted(text: &str) -> String {
    serde_json::to_string(text).expect("a text has a JSON form")
}

/// A file of an increment directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Member {
    /// A data file: this range of the new state.
    Data(Part),
    /// The ranges of zeros: [`Increment::zeros_text`].
    Zeros,
    /// The manifest: [`Increment::manifest_text`].
    Manifest,
    /// The checksums: [`Increment::cksums_text`].
    Cksums,
    /// The script: [`Increment::apply_text`].
    Apply,
}

impl Member {
    /// Those that are not data.
    pub const TEXTS: [Self; 4] = [Self::Zeros, Self::Manifest, Self::Cksums, Self::Apply];

    /// Returns the name in the directory.
    #[must_use]
    pub fn name(self) -> String {
        match self {
            Self::Data(part) => part.name(),
            Self::Zeros => "zeros".to_owned(),
            Self::Manifest => "manifest.json".to_owned(),
            Self::Cksums => "cksums".to_owned(),
            Self::Apply => "apply".to_owned(),
        }
    }
}

/// Checksums of the data files, in their order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sums(pub Vec<u32>);

/// The description of an increment directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Increment {
    /// The state it begins at; `None` when it carries the whole disk.
    pub from: Option<Side>,
    /// The state it leads to.
    pub to: Side,
    /// Data files and ranges of zeros.
    pub plan: Plan,
}

impl Increment {
    /// Returns the bytes in data files.
    #[must_use]
    pub fn data(&self) -> u64 {
        self.plan.files.iter().map(|part| part.length).sum()
    }

    /// Returns the bytes in ranges of zeros.
    #[must_use]
    pub fn zeros(&self) -> u64 {
        self.plan.zeros.iter().map(|part| part.length).sum()
    }

    /// Returns all files: data in order, then the texts.
    pub fn members(&self) -> impl Iterator<Item = Member> + '_ {
        self.plan.files.iter().map(|part| Member::Data(*part)).chain(Member::TEXTS)
    }

    /// Finds a file by its name.
    #[must_use]
    pub fn member(&self, name: &str) -> Option<Member> {
        if let Some(text) = Member::TEXTS.into_iter().find(|text| text.name() == name) {
            return Some(text);
        }
        let offset = name.split_once('-')?.0.parse::<u64>().ok()?;
        let at = self.plan.files.binary_search_by_key(&offset, |part| part.offset).ok()?;
        let part = self.plan.files[at];
        (part.name() == name).then_some(Member::Data(part))
    }

    /// Returns the length of a file, for which no data is needed.
    #[must_use]
    pub fn len(&self, member: Member) -> u64 {
        let blank = || Sums(vec![0; self.plan.files.len()]);
        match member {
            Member::Data(part) => part.length,
            Member::Zeros => self.zeros_text().len() as u64,
            Member::Manifest => self.manifest_text(&blank()).len() as u64,
            Member::Cksums => self.cksums_text(&blank()).len() as u64,
            Member::Apply => self.apply_text().len() as u64,
        }
    }

    /// Tells whether nothing changed.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.plan.files.is_empty() && self.plan.zeros.is_empty()
    }

    /// Computes the checksums by reading all the data; `read` fills a buffer from an offset of the new state.
    ///
    /// # Errors
    /// Those of `read`.
    pub fn sums(&self, mut read: impl FnMut(&mut [u8], u64) -> Result<()>) -> Result<Sums> {
        const PIECE: u64 = 1 << 20;
        let mut buffer = vec![0; usize::try_from(PIECE).expect("1 MiB")];
        let mut sums = Vec::with_capacity(self.plan.files.len());
        for part in &self.plan.files {
            let mut sum = Cksum::default();
            let mut at = part.offset;
            while at < part.end() {
                let here = usize::try_from(PIECE.min(part.end() - at)).expect("1 MiB");
                read(&mut buffer[..here], at)?;
                sum.update(&buffer[..here]);
                at += here as u64;
            }
            sums.push(sum.finish());
        }
        Ok(Sums(sums))
    }

    /// Returns the list of zeros.
    #[must_use]
    pub fn zeros_text(&self) -> String {
        let mut text = String::new();
        for part in &self.plan.zeros {
            line(&mut text, format_args!("{} {}", part.offset, part.length));
        }
        text
    }

    /// Returns the manifest.
    #[must_use]
    pub fn manifest_text(&self, sums: &Sums) -> String {
        assert_eq!(sums.0.len(), self.plan.files.len(), "one checksum for each file");
        let mut text = String::new();
        let from = self.from.as_ref().map_or_else(|| "null".to_owned(), Side::json);
        line(&mut text, format_args!("{{\n\"format\": \"afterimage-increment\",\n\"version\": 1,"));
        line(&mut text, format_args!("\"from\": {from},\n\"to\": {},", self.to.json()));
        line(&mut text, format_args!("\"data\": {},\n\"joined\": {},", self.data(), self.plan.joined));
        line(&mut text, format_args!("\"zeros\": {},\n\"ranges\": {},", self.zeros(), self.plan.zeros.len()));
        text.push_str("\"files\": [");
        for (at, (part, sum)) in self.plan.files.iter().zip(&sums.0).enumerate() {
            let (comma, name) = (if at == 0 { "" } else { "," }, part.name());
            let Part { offset, length } = part;
            write!(
                text,
                "{comma}\n{{\"name\": \"{name}\", \"offset\": {offset}, \"length\": {length}, \"cksum\": {sum:10}}}"
            )
            .expect("a text takes what is written to it");
        }
        line(&mut text, format_args!("\n]\n}}"));
        text
    }

    /// Returns the list of checksums.
    #[must_use]
    pub fn cksums_text(&self, sums: &Sums) -> String {
        let mut text = String::new();
        let mut add = |sum: u32, length: u64, name: &str| line(&mut text, format_args!("{sum:10} {length} {name}"));
        for (part, sum) in self.plan.files.iter().zip(&sums.0) {
            add(*sum, part.length, &part.name());
        }
        for (member, content) in [(Member::Zeros, self.zeros_text()), (Member::Manifest, self.manifest_text(sums))] {
            add(Cksum::of(content.as_bytes()), content.len() as u64, &member.name());
        }
        text
    }

    /// Returns the script.
    #[must_use]
    pub fn apply_text(&self) -> String {
        let from = self.from.as_ref();
        let values = [
            ("@FROM@", from.map_or_else(|| "-".to_owned(), |side| side.uuid.to_string())),
            ("@FROM_NAME@", word(&from.map(Side::name).unwrap_or_default())),
            ("@FROM_SIZE@", from.map_or(0, |side| side.size).to_string()),
            ("@TO@", self.to.uuid.to_string()),
            ("@TO_NAME@", word(&self.to.name())),
            ("@TO_SIZE@", self.to.size.to_string()),
            ("@LINES@", (self.plan.files.len() + 2).to_string()),
        ];
        let fill = |text: &str| match text.split_once('=') {
            // A name is put in last and never looked at again.
            Some((key, value)) => match values.iter().find(|(place, _)| *place == value) {
                Some((_, value)) => format!("{key}={value}\n"),
                None => format!("{text}\n"),
            },
            None => format!("{text}\n"),
        };
        APPLY.lines().map(fill).collect()
    }
}

/// Appends a line.
fn line(text: &mut String, what: std::fmt::Arguments<'_>) {
    writeln!(text, "{what}").expect("a text takes what is written to it");
}

/// Returns a text as one word of a shell.
fn word(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn side(snapshot: &str, size: u64) -> Side {
        let uuid = Uuid::from_u128(u128::from(size));
        Side { disk: "it's".into(), disk_uuid: Uuid::nil(), snapshot: snapshot.into(), uuid, size, created: 7 }
    }

    fn increment() -> Increment {
        let files = vec![Part { offset: 0, length: 8192 }, Part { offset: 1 << 46, length: 512 }];
        let zeros = vec![Part { offset: 8192, length: 4096 }];
        Increment { from: Some(side("a", 4096)), to: side("$(b)", 8192), plan: Plan { files, zeros, joined: 4096 } }
    }

    #[test]
    fn lengths_are_known_before_the_checksums() {
        let it = increment();
        for sums in [Sums(vec![1, u32::MAX]), Sums(vec![u32::MAX, 12_345])] {
            assert_eq!(it.len(Member::Manifest), it.manifest_text(&sums).len() as u64);
            assert_eq!(it.len(Member::Cksums), it.cksums_text(&sums).len() as u64);
        }
    }

    #[test]
    fn the_manifest_is_json() {
        let manifest: serde_json::Value = serde_json::from_str(&increment().manifest_text(&Sums(vec![1, 2]))).unwrap();
        assert_eq!(manifest["from"]["disk"], "it's");
        assert_eq!(manifest["to"]["snapshot"], "$(b)");
        assert_eq!(
            (&manifest["data"], &manifest["joined"], &manifest["zeros"]),
            (&8704.into(), &4096.into(), &4096.into())
        );
        assert_eq!(manifest["files"][1]["name"], "70368744177664-00000000000512.bin");
        assert_eq!(manifest["files"][1]["cksum"], 2);
    }

    #[test]
    fn every_member_is_found_by_its_name() {
        let it = increment();
        for member in it.members() {
            assert_eq!(it.member(&member.name()), Some(member));
        }
        for name in ["", "-", "0-8192.bin", "00000000000000-00000000008191.bin", "+0000000000000-00000000008192.bin"] {
            assert_eq!(it.member(name), None, "{name}");
        }
    }

    #[test]
    fn names_are_one_word_in_the_script() {
        let text = increment().apply_text();
        assert!(text.contains("\nto_name='it'\\''s@$(b)'\n"), "{text}");
        assert!(!text.lines().any(|line| line.contains("=@")));
    }
}
