//! What a user can set on a disk: `set DISK KEY=VALUE`.

use serde::{Deserialize, Serialize};

use crate::codec::{Reader, Writer};
use crate::error::{Error, Result};
use crate::units::{BLOCK_SIZE, CHUNK_SIZE, parse_size};

/// What a write does when there is no room.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EnospcPolicy {
    /// Fails with ENOSPC.
    #[default]
    Fail,
    /// Waits until there is room again.
    Wait,
}

/// The settings of one disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Settings {
    /// What a write does when there is no room.
    pub enospc: EnospcPolicy,
    /// Most bytes the disk and its snapshots may hold together.
    pub quota: Option<u64>,
    /// Most reads and writes per second.
    pub iops: Option<u64>,
    /// Most bytes read and written per second.
    pub bandwidth: Option<u64>,
    /// Bytes of one file in the extent tree.
    pub extent_size: u64,
}

impl Default for Settings {
    fn default() -> Self {
        Self { enospc: EnospcPolicy::Fail, quota: None, iops: None, bandwidth: None, extent_size: 4 << 20 }
    }
}

impl Settings {
    /// The keys of `set` and `get`.
    pub const KEYS: [&'static str; 5] = ["enospc", "quota", "iops", "bandwidth", "extent-size"];

    /// Sets one by its name; `none` lifts a limit.
    ///
    /// # Errors
    /// `Usage` for an unknown key or a value that makes no sense.
    pub fn set(&mut self, key: &str, value: &str) -> Result<()> {
        match key {
            "enospc" => {
                self.enospc = match value {
                    "fail" => EnospcPolicy::Fail,
                    "wait" => EnospcPolicy::Wait,
                    _ => return Err(Error::usage(format!("enospc is 'fail' or 'wait', not '{value}'"))),
                }
            }
            "quota" => self.quota = limit(key, value, BLOCK_SIZE)?,
            "iops" => self.iops = limit(key, value, 1)?,
            "bandwidth" => self.bandwidth = limit(key, value, BLOCK_SIZE)?,
            "extent-size" => {
                let fits = |size: &u64| size.is_power_of_two() && (CHUNK_SIZE..=1 << 30).contains(size);
                self.extent_size = parse_size(value).ok().filter(fits).ok_or_else(|| {
                    Error::usage(format!("extent-size is a power of two from 2M to 1G, not '{value}'"))
                })?;
            }
            _ => return Err(unknown(key)),
        }
        Ok(())
    }

    /// Returns one by its name.
    ///
    /// # Errors
    /// `Usage` for an unknown key.
    pub fn get(&self, key: &str) -> Result<String> {
        let number = |n: Option<u64>| n.map_or_else(|| "none".to_owned(), |n| n.to_string());
        Ok(match key {
            "enospc" if self.enospc == EnospcPolicy::Fail => "fail".into(),
            "enospc" => "wait".into(),
            "quota" => number(self.quota),
            "iops" => number(self.iops),
            "bandwidth" => number(self.bandwidth),
            "extent-size" => self.extent_size.to_string(),
            _ => return Err(unknown(key)),
        })
    }

    pub(super) fn encode(&self, out: &mut Writer) {
        out.u8(u8::from(self.enospc == EnospcPolicy::Wait));
        for limit in [self.quota, self.iops, self.bandwidth] {
            out.varint(limit.unwrap_or(0));
        }
        out.u8(u8::try_from(self.extent_size.trailing_zeros()).expect("at most 64"));
    }

    pub(super) fn decode(from: &mut Reader<'_>) -> Result<Self> {
        let enospc = if from.flag()? { EnospcPolicy::Wait } else { EnospcPolicy::Fail };
        let mut limit = || Ok::<_, Error>(Some(from.varint()?).filter(|n| *n > 0));
        let (quota, iops, bandwidth) = (limit()?, limit()?, limit()?);
        let shift = from.u8()?;
        if !(21..=30).contains(&shift) {
            return Err(from.corrupt("an extent size makes no sense"));
        }
        Ok(Self { enospc, quota, iops, bandwidth, extent_size: 1 << shift })
    }
}

fn limit(key: &str, value: &str, least: u64) -> Result<Option<u64>> {
    if value == "none" {
        return Ok(None);
    }
    let number = parse_size(value).ok().filter(|number| *number >= least);
    number.map(Some).ok_or_else(|| {
        let what = match key {
            "iops" => "a number of reads and writes a second, such as 500",
            "bandwidth" => "a number of bytes a second, at least 4K, such as 100M",
            _ => "a size, at least 4K, such as 20G",
        };
        Error::usage(format!("{key} is {what}, or 'none' for no limit, not '{value}'"))
    })
}

fn unknown(key: &str) -> Error {
    Error::usage(format!("'{key}' is not a setting")).hint(format!("the settings are {}", Settings::KEYS.join(", ")))
}
