//! The bytes of the wire: golden ones, those of the protocol's page, and any others.

use afterimage::nbd::option::{self, Choice, Queries, kind, reply};
use afterimage::nbd::wire::{CHUNK, Command, Errno, REQUEST, Reply, Request, SIMPLE, chunk, command};

use crate::tree::noise;

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn requests_have_the_bytes_of_the_protocol() {
    let request =
        Request { flags: command::FUA, kind: 1, cookie: 0x1122_3344_5566_7788, offset: 0x99aa, length: 0xbbcc };
    let bytes = request.encode();
    assert_eq!(hex(&bytes), "256095130001000111223344556677880000000000".to_owned() + "0099aa0000bbcc");
    assert_eq!(Request::decode(&bytes), Some(request));
    assert_eq!(request.command(), Some(Command::Write));
    for (number, command) in (0..).zip(Command::ALL) {
        assert_eq!(command as u16, number);
        assert!(command.flags() & command::FUA != 0, "FUA is taken with anything");
    }
    assert_eq!(Request { kind: 8, ..request }.command(), None);
    assert_eq!(Request::decode(&[0; REQUEST]), None);
}

#[test]
fn replies_have_the_bytes_of_the_protocol() {
    let mut bytes = Vec::new();
    Reply::Simple { error: 22, cookie: 7 }.encode(&mut bytes);
    assert_eq!(hex(&bytes), "67446698000000160000000000000007");
    assert_eq!(bytes.len(), SIMPLE);
    assert_eq!(Reply::decode(&bytes), Some(Reply::Simple { error: 22, cookie: 7 }));
    bytes.clear();
    let chunk = Reply::Chunk { flags: chunk::DONE, kind: chunk::OFFSET_HOLE, cookie: 9, length: 12 };
    chunk.encode(&mut bytes);
    assert_eq!(hex(&bytes), "668e33ef0001000200000000000000090000000c");
    assert_eq!(bytes.len(), CHUNK);
    assert_eq!(Reply::decode(&bytes), Some(chunk));
    assert_eq!(Reply::decode(&bytes[..19]), None);
    assert_eq!((chunk::ERROR, chunk::ERROR_OFFSET, chunk::BLOCK_STATUS), (32769, 32770, 5));
    let numbers: Vec<u32> = Errno::ALL.iter().map(|errno| *errno as u32).collect();
    assert_eq!(numbers, [1, 5, 12, 22, 28, 75, 95, 108]);
    assert_eq!((Errno::by_number(28), Errno::by_number(2)), (Errno::NoSpc, Errno::Inval));
}

#[test]
fn the_handshake_has_the_bytes_of_the_protocol() {
    let greeting = option::greeting(3);
    assert_eq!(hex(&greeting), "4e42444d414749434948415645".to_owned() + "4f50540003");
    assert_eq!(option::flags_of(&greeting), Some(3));
    let choice = Choice { name: "disk".into(), infos: vec![3, 1] };
    assert_eq!(hex(&choice.encode()), "000000046469736b000200030001");
    assert_eq!(Choice::decode(&choice.encode()), Some(choice.clone()));
    let bytes = option::option(kind::GO, &choice.encode());
    assert_eq!(hex(&bytes[..16]), "49484156454f5054000000070000000e");
    assert_eq!(option::option_header(bytes[..16].try_into().unwrap()), Some((7, 14)));
    let queries = Queries { name: "d".into(), queries: vec!["base:allocation".into(), String::new()] };
    let expected = "000000016400000002".to_owned() + "0000000f" + &hex(b"base:allocation") + "00000000";
    assert_eq!(hex(&queries.encode()), expected);
    assert_eq!(Queries::decode(&queries.encode()), Some(queries));
    let bytes = option::option_reply(kind::GO, reply::ERR_UNKNOWN, b"no");
    assert_eq!(hex(&bytes), "0003e889045565a90000000780000006000000026e6f");
    let header = option::OptionReply::decode(bytes[..20].try_into().unwrap()).unwrap();
    assert_eq!((header.option, header.kind, header.length), (7, reply::ERR_UNKNOWN, 2));
    assert_eq!(hex(&option::export_info(1 << 20, 0x565)), "000000000000001000000565");
    assert_eq!(hex(&option::block_size_info(1, 4096, 32 << 20)), "0003000000010000100002000000");
    assert_eq!(hex(&option::context(1, "x:y")), "00000001783a79");
    assert_eq!(hex(&option::named("ab")), "000000026162");
    assert_eq!(hex(&option::text_info(2, "hi")), "00026869");
}

/// Data that is cut, has a byte too many or is just any bytes never panics, and only the whole is taken.
#[test]
fn data_of_options_is_taken_whole_or_not_at_all() {
    let choice = Choice { name: "disk".into(), infos: vec![3, 1] }.encode();
    let queries = Queries { name: "disk".into(), queries: vec!["a".into(), "b:c".into()] }.encode();
    for (bytes, takes) in [(&choice, is_choice as fn(&[u8]) -> bool), (&queries, is_queries)] {
        for len in 0..bytes.len() {
            assert!(!takes(&bytes[..len]), "{len} of {}", hex(bytes));
        }
        assert!(takes(bytes) && !takes(&[&bytes[..], &[0]].concat()));
    }
    // A name that is not UTF-8, one that is too long, and lengths beyond everything.
    assert!(!is_choice(&[0, 0, 0, 1, 0xff, 0, 0]));
    assert!(!is_choice(&Choice { name: "n".repeat(4097), infos: Vec::new() }.encode()));
    assert!(is_choice(&Choice { name: "n".repeat(4096), infos: Vec::new() }.encode()));
    assert!(!is_queries(&[0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]));
    for seed in 0..20_000 {
        let len = noise(1, seed)[0] as usize;
        let mut bytes = noise(len % 64, seed + 1);
        // Small numbers where lengths are, so that the insides are reached.
        bytes.iter_mut().step_by(3).for_each(|byte| *byte &= 3);
        if let Some(choice) = Choice::decode(&bytes) {
            assert_eq!(choice.encode(), bytes);
        }
        if let Some(queries) = Queries::decode(&bytes) {
            assert_eq!(queries.encode(), bytes);
        }
        if let Some(reply) = Reply::decode(&bytes) {
            let mut out = Vec::new();
            reply.encode(&mut out);
            assert!(bytes.starts_with(&out));
        }
    }
}

fn is_choice(bytes: &[u8]) -> bool {
    Choice::decode(bytes).is_some()
}

fn is_queries(bytes: &[u8]) -> bool {
    Queries::decode(bytes).is_some()
}
