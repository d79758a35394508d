//! Network interfaces of the kind "tap": what the kernel sends to one, a program reads, and the other way round.
//!
//! # Rules
//! 1. Frames come and go with a header of 12 bytes in front (`virtio_net_hdr_v1`), one frame per read or write.
//! 2. Reads and writes never wait.
#![expect(unsafe_code, reason = "ioctls that no crate has")]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;

use rustix::io::Errno;
use rustix::net::netdevice::name_to_index;
use rustix::net::{AddressFamily, SocketType};

/// Bytes of the header of a frame.
pub const HEADER: usize = 12;
/// Characters of the name of an interface at most.
pub const NAME_MAX: usize = libc::IFNAMSIZ - 1;

/// Tells whether the network that this process is in has an interface of that name, of whatever kind.
pub fn exists(name: &str) -> io::Result<bool> {
    if !is_name(name) {
        return Err(no_name());
    }
    let socket = rustix::net::socket(AddressFamily::UNIX, SocketType::DGRAM, None)?;
    match name_to_index(socket, name) {
        Ok(_) => Ok(true),
        Err(Errno::NODEV) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Opens an interface. The kernel makes one that is not there, which the caller does not want: it looks with [`exists`].
pub fn open(name: &str) -> io::Result<File> {
    if !is_name(name) {
        return Err(no_name());
    }
    let file = File::options().read(true).write(true).custom_flags(libc::O_NONBLOCK).open("/dev/net/tun")?;
    // SAFETY: all zeros are a valid `ifreq`.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = libc::c_char::try_from(from).map_err(|_| no_name())?;
    }
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(flags).map_err(|_| no_name())?;
    // SAFETY: the request is an `ifreq` that lives through the call.
    check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) })?;
    let header = libc::c_int::try_from(HEADER).expect("twelve");
    // SAFETY: the request is an `int` that lives through the call.
    check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const header) })?;
    Ok(file)
}

/// The kernel takes a `%` for a number that it chooses.
fn is_name(name: &str) -> bool {
    !name.is_empty() && name.len() <= NAME_MAX && name.is_ascii() && !name.contains(['\0', '/', '%'])
}

fn no_name() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, "no name of a network interface")
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_cannot_be_is_refused_before_anything_is_asked() {
        for name in ["", "sixteen-letters-", "a/b", "a\0b", "a%d", "\u{e4}"] {
            assert_eq!(open(name).unwrap_err().kind(), io::ErrorKind::InvalidInput, "{name:?}");
            assert_eq!(exists(name).unwrap_err().kind(), io::ErrorKind::InvalidInput, "{name:?}");
        }
    }

    #[test]
    fn what_is_there_is_told_from_what_is_not() {
        assert!(exists("lo").unwrap() && !exists("nosuch0").unwrap());
    }
}
