//! An NBD client: newstyle handshake, GO, simple replies (the protocol's doc/proto.md).

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

const OPTION: u64 = 0x4948_4156_454f_5054;
const LIST: u32 = 3;
const INFO: u32 = 6;
const GO: u32 = 7;
const READ: u16 = 0;
const WRITE: u16 = 1;
const FLUSH: u16 = 3;
const TRIM: u16 = 4;

/// A connection in transmission.
pub struct Nbd {
    stream: UnixStream,
    /// Bytes of the export.
    pub size: u64,
    /// Transmission flags.
    pub flags: u16,
}

fn connect(path: &Path) -> io::Result<UnixStream> {
    let mut stream = UnixStream::connect(path)?;
    stream.set_read_timeout(Some(Duration::from_secs(30)))?;
    let mut hello = [0; 18];
    stream.read_exact(&mut hello)?;
    assert_eq!(&hello[..16], b"NBDMAGICIHAVEOPT");
    stream.write_all(&3_u32.to_be_bytes())?;
    Ok(stream)
}

fn option(stream: &mut UnixStream, option: u32, data: &[u8]) -> io::Result<()> {
    let head = [&OPTION.to_be_bytes()[..], &option.to_be_bytes(), &(data.len() as u32).to_be_bytes(), data];
    stream.write_all(&head.concat())
}

fn reply(stream: &mut UnixStream) -> io::Result<(u32, Vec<u8>)> {
    let mut head = [0; 20];
    stream.read_exact(&mut head)?;
    let number = |at: usize| u32::from_be_bytes(head[at..at + 4].try_into().unwrap());
    let mut data = vec![0; number(16) as usize];
    stream.read_exact(&mut data)?;
    Ok((number(12), data))
}

fn request(command: u16, offset: u64, len: u32) -> Vec<u8> {
    let parts = [
        &0x2560_9513_u32.to_be_bytes()[..],
        &0_u16.to_be_bytes(),
        &command.to_be_bytes(),
        &7_u64.to_be_bytes(),
        &offset.to_be_bytes(),
        &len.to_be_bytes(),
    ];
    parts.concat()
}

/// Returns the names a server lists.
pub fn list(path: &Path) -> Vec<String> {
    let mut stream = connect(path).unwrap();
    option(&mut stream, LIST, &[]).unwrap();
    let mut names = Vec::new();
    loop {
        match reply(&mut stream).unwrap() {
            (1, _) => return names,
            (2, data) => {
                let len = u32::from_be_bytes(data[..4].try_into().unwrap()) as usize;
                names.push(String::from_utf8(data[4..4 + len].to_vec()).unwrap());
            }
            other => panic!("{other:?}"),
        }
    }
}

/// Asks about an export and chooses none; the handshake lasts as long as what is returned.
pub fn ask_about(path: &Path, name: &str) -> Result<UnixStream, String> {
    let mut stream = connect(path).map_err(|e| e.to_string())?;
    let data = [&(name.len() as u32).to_be_bytes()[..], name.as_bytes(), &[0, 0]].concat();
    option(&mut stream, INFO, &data).map_err(|e| e.to_string())?;
    loop {
        match reply(&mut stream).map_err(|e| e.to_string())? {
            (1, _) => return Ok(stream),
            (3, _) => {}
            (_, message) => return Err(String::from_utf8_lossy(&message).into_owned()),
        }
    }
}

impl Nbd {
    /// Opens an export, or tells why it was refused.
    pub fn open(path: &Path, name: &str) -> Result<Self, String> {
        let mut stream = connect(path).map_err(|e| e.to_string())?;
        let data = [&(name.len() as u32).to_be_bytes()[..], name.as_bytes(), &[0, 0]].concat();
        option(&mut stream, GO, &data).map_err(|e| e.to_string())?;
        let (mut size, mut flags) = (0, 0);
        loop {
            match reply(&mut stream).map_err(|e| e.to_string())? {
                (1, _) => return Ok(Self { stream, size, flags }),
                (3, info) if info[..2] == [0, 0] => {
                    size = u64::from_be_bytes(info[2..10].try_into().unwrap());
                    flags = u16::from_be_bytes(info[10..12].try_into().unwrap());
                }
                (3, _) => {}
                (_, message) => return Err(String::from_utf8_lossy(&message).into_owned()),
            }
        }
    }

    /// Tells whether the export is only for reading.
    pub fn read_only(&self) -> bool {
        self.flags & 2 != 0
    }

    fn ask(&mut self, command: u16, offset: u64, len: u32, data: &[u8]) -> io::Result<u32> {
        self.stream.write_all(&[&request(command, offset, len), data].concat())?;
        let mut head = [0; 16];
        self.stream.read_exact(&mut head)?;
        assert_eq!(head[..4], 0x6744_6698_u32.to_be_bytes());
        Ok(u32::from_be_bytes(head[4..8].try_into().unwrap()))
    }

    /// Writes; returns the error number of NBD, 0 for none.
    pub fn write(&mut self, data: &[u8], offset: u64) -> io::Result<u32> {
        self.ask(WRITE, offset, data.len() as u32, data)
    }

    /// Unmaps.
    pub fn trim(&mut self, offset: u64, len: u32) -> io::Result<u32> {
        self.ask(TRIM, offset, len, &[])
    }

    /// Returns the connection, for a client that does more than one thing at a time.
    pub fn into_stream(self) -> UnixStream {
        self.stream
    }

    /// Asks for data several times, and takes none of it yet.
    pub fn begin_reads(&mut self, times: usize, len: usize) -> io::Result<()> {
        self.stream.write_all(&request(READ, 0, len as u32).repeat(times))
    }

    /// Takes what [`Nbd::begin_reads`] asked for, as far as it comes; returns how many bytes of data that were.
    pub fn take(&mut self, replies: usize, len: usize) -> usize {
        let mut taken = 0;
        for _ in 0..replies {
            let (mut head, mut data) = ([0; 16], vec![0; len]);
            if self.stream.read_exact(&mut head).and_then(|()| self.stream.read_exact(&mut data)).is_err() {
                break;
            }
            taken += len;
        }
        taken
    }

    /// Waits until the server ends the connection.
    pub fn wait_for_the_end(&mut self) {
        assert_eq!(self.stream.read(&mut [0; 1]).unwrap(), 0);
    }

    /// Flushes.
    pub fn flush(&mut self) -> io::Result<u32> {
        self.ask(FLUSH, 0, 0, &[])
    }

    /// Reads.
    pub fn read(&mut self, len: usize, offset: u64) -> io::Result<Vec<u8>> {
        let error = self.ask(READ, offset, len as u32, &[])?;
        if error != 0 {
            return Err(io::Error::from_raw_os_error(error as i32));
        }
        let mut data = vec![0; len];
        self.stream.read_exact(&mut data)?;
        Ok(data)
    }
}
