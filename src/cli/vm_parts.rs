//! The words for the parts of a virtual machine: disks and network cards.
//!
//! # Rules
//! 1. A disk with a slash in its name is a file, any other is of the pool.
//! 2. A card that is given no address gets one that no maker has given to another.

use std::path::PathBuf;

use crate::api::Target;
use crate::error::{Error, Result};
use crate::vmm::{DiskDefinition, NetSettings};

/// Parses `DISK[,ro][,serial=S]`; a `DISK` with a slash is a file, and one with an `@` a snapshot.
pub(super) fn parse_disk(text: &str) -> Result<DiskDefinition> {
    let mut parts = text.split(',');
    let name = parts.next().unwrap_or_default();
    let (mut file, mut of_pool) = (None, None);
    let mut read_only = false;
    if name.contains('/') {
        file = Some(PathBuf::from(name));
    } else {
        read_only = matches!(Target::parse(name)?, Target::Snapshot(..));
        of_pool = Some(name.to_owned());
    }
    let mut disk = DiskDefinition { file, disk: of_pool, read_only, serial: String::new() };
    for part in parts {
        match part.split_once('=') {
            None if part == "ro" => disk.read_only = true,
            Some(("serial", serial)) if serial.is_ascii() && serial.len() <= 20 => serial.clone_into(&mut disk.serial),
            _ => {
                return Err(Error::usage(format!("--disk {text}: '{part}' is not understood"))
                    .hint("give DISK[,ro][,serial=S], with at most 20 characters of ASCII in S"));
            }
        }
    }
    Ok(disk)
}

/// Parses `tap=T[,mac=M]`; without an address it gets one of its own.
pub(super) fn parse_net(text: &str) -> Result<NetSettings> {
    let bad = || Error::usage(format!("--net {text} is not understood")).hint("give tap=T[,mac=02:00:00:00:00:01]");
    let mut mac = new_address()?;
    let mut tap = None;
    for part in text.split(',') {
        match part.split_once('=') {
            Some(("tap", name)) => tap = Some(name.to_owned()),
            Some(("mac", address)) => {
                let mut bytes = address.split(':').map(|byte| u8::from_str_radix(byte, 16));
                for byte in &mut mac {
                    *byte = bytes.next().and_then(Result::ok).ok_or_else(bad)?;
                }
                if bytes.next().is_some() || mac[0] & 1 == 1 {
                    return Err(bad());
                }
            }
            _ => return Err(bad()),
        }
    }
    Ok(NetSettings { tap: tap.ok_or_else(bad)?, mac })
}

/// Makes an address for a network card.
pub(super) fn new_address() -> Result<[u8; 6]> {
    let mut mac = [0; 6];
    getrandom::fill(&mut mac).map_err(|e| Error::failed(format!("the host has no random numbers: {e}")))?;
    // Given by no maker, and of one card.
    mac[0] = mac[0] & 0xfc | 2;
    Ok(mac)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_are_files_with_their_wishes() {
        let disk = parse_disk("/srv/web.raw,ro,serial=web-1").unwrap();
        assert_eq!((disk.file, disk.read_only, disk.serial), (Some("/srv/web.raw".into()), true, "web-1".into()));
        let disk = parse_disk("web,serial=x").unwrap();
        assert_eq!((disk.file, disk.disk.as_deref(), disk.read_only), (None, Some("web"), false));
        assert!(parse_disk("web@monday").unwrap().read_only);
        assert_eq!(parse_disk("/a,serial=").unwrap().serial, "");
        for bad in ["", "a@b@c", "web,rw", "/a,rw", "/a,serial=123456789012345678901", "/a,ro=1"] {
            assert!(parse_disk(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn network_cards_have_a_tap_and_an_address() {
        let net = parse_net("tap=tap0,mac=02:00:00:00:00:fe").unwrap();
        assert_eq!((net.tap.as_str(), net.mac), ("tap0", [2, 0, 0, 0, 0, 0xfe]));
        assert_eq!(parse_net("tap=t").unwrap().mac[0] & 3, 2);
        for bad in ["", "tap0", "mac=02:00:00:00:00:01", "tap=t,mac=02:00", "tap=t,mac=01:00:00:00:00:00", "tap=t,x=1"]
        {
            assert!(parse_net(bad).is_err(), "{bad}");
        }
    }
}
