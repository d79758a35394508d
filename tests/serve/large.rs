//! Gigabytes in one request after another: whoever serves must never rest while something is undone.
//!
//! A request that the host had finished within the call that gave it to the host was forgotten, and its client waited for
//! ever; that took a fast file system, large requests, and many of them. So the pool lies in memory here, where there is some.

use std::time::{Duration, Instant};

use super::Server;
use super::client::Nbd;
use crate::cli::Afterimage;
use crate::vhost::Guest;

/// Bytes of the disk, which is written again and again.
const DISK: u64 = 256 << 20;
/// Bytes that are written with requests of one length.
const ALL: u64 = 4 << 30;
/// Lengths of requests.
const LENGTHS: [usize; 2] = [1 << 20, 128 << 10];
/// How long all of it may take on a machine that is busy. That one request takes too long is found by its client.
const DEADLINE: Duration = Duration::from_secs(600);

fn server() -> Server {
    let memory = std::path::Path::new("/dev/shm");
    let has_room = rustix::fs::statvfs(memory).is_ok_and(|is| is.f_bavail * is.f_frsize > 8 * DISK);
    let it = if has_room {
        let it = Afterimage { dir: tempfile::tempdir_in(memory).unwrap() };
        it.json(&["init"]);
        it
    } else {
        println!("there is no room in {}: the pool lies where others do", memory.display());
        Afterimage::with_pool()
    };
    it.json(&["create", "big", "-s", &DISK.to_string()]);
    Server { it }
}

/// Calls `write` with what is to be written where.
fn write_all(mut write: impl FnMut(&[u8], u64)) {
    let begun = Instant::now();
    for len in LENGTHS {
        let mut data = vec![0; len];
        for n in 0..ALL / len as u64 {
            let at = n * len as u64 % DISK;
            data[..8].copy_from_slice(&at.to_le_bytes());
            data[len - 1] = len.trailing_zeros() as u8;
            write(&data, at);
            assert!(begun.elapsed() < DEADLINE, "{n} requests of {len} bytes took {:?}", begun.elapsed());
        }
        println!("{} MiB in requests of {len} bytes: {:?} so far", ALL >> 20, begun.elapsed());
    }
}

/// Calls `read`, which must find what was written last.
fn read_all(mut read: impl FnMut(usize, u64) -> Vec<u8>) {
    for len in LENGTHS {
        for at in (0..DISK).step_by(len) {
            let data = read(len, at);
            let last = LENGTHS[1];
            for (n, part) in data.chunks(last).enumerate() {
                let stamp = at + (n * last) as u64;
                assert_eq!((&part[..8], part[last - 1]), (&stamp.to_le_bytes()[..], last.trailing_zeros() as u8));
            }
        }
    }
}

#[test]
fn gigabytes_over_nbd_one_request_at_a_time() {
    let server = server();
    server.json("serve nbd big --socket SOCK --daemon");
    let mut client = Nbd::open(&server.sock(), "big").unwrap();
    write_all(|data, at| assert_eq!(client.write(data, at).unwrap(), 0));
    assert_eq!(client.flush().unwrap(), 0);
    read_all(|len, at| client.read(len, at).unwrap());
}

#[test]
fn gigabytes_over_vhost_user_one_request_at_a_time() {
    let server = server();
    server.json("serve vhost-user big --socket SOCK --daemon");
    let mut guest = Guest::new(1);
    guest.connect(&server.sock());
    write_all(|data, at| assert_eq!(guest.write(0, at / 512, data), 0));
    read_all(|len, at| guest.read(0, at / 512, len));
}
