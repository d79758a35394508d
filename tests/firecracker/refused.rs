//! Who connects and is no Firecracker, or one of another machine: refused by name, and nothing hangs.

use afterimage::checkpoint::{Geometry, Region, Sizes};
use afterimage::memory::firecracker::decode;
use serde_json::json;

use super::{BLOCK, MIB, Packed};

#[test]
fn what_is_not_understood_is_refused_by_name() {
    let packed = Packed::new(2 * MIB);
    let good = [[2 * MIB, 0]];
    let one = |size: u64, offset: u64| json!([{ "base_host_virt_addr": 1_u64 << 40, "size": size, "offset": offset }]);
    let text = |value: serde_json::Value| json!({ "regions": good, "text": value.to_string() });
    let cases = [
        (json!({ "regions": good, "extra": 2 }), "secret hiding"),
        (json!({ "regions": good, "extra": 1 }), "use_memfd"),
        (json!({ "regions": good, "extra": 5 }), "6 descriptors"),
        (json!({ "regions": good, "extra": 30 }), "more descriptors than one"),
        (json!({ "regions": good, "bare": true }), "no userfaultfd"),
        (json!({ "regions": good, "fake": true }), "no userfaultfd"),
        (json!({ "regions": [[MIB, 0]] }), "has 1048576 bytes of memory, and the checkpoint 2097152"),
        (json!({ "regions": [[4 * MIB, 0]] }), "beyond"),
        (json!({ "regions": [[MIB, 0], [MIB, 0]] }), "does not follow"),
        (json!({ "regions": good, "text": "GET / HTTP/1.1\r\n\r\n" }), "makes no sense"),
        (json!({ "regions": good, "text": "[".repeat(70_000) }), "makes no sense"),
        (json!({ "regions": good, "text": " ".repeat(70_000) }), "more than 65536 bytes"),
        (json!({ "regions": good, "text": "[{", "hang_up": true }), "hung up after 2 bytes"),
        (text(one(2 * MIB + 1, 0)), "whole pages"),
        (text(one(u64::MAX, 0)), "has 18446744073709551615 bytes"),
        (text(json!([])), "0 regions"),
        (text(json!({ "regions": [] })), "makes no sense"),
    ];
    for (spec, why) in cases {
        let handler = packed.serve();
        let mut player = packed.player(&spec);
        let (code, answer, said) = handler.end();
        assert!(code == 1 && answer.is_null() && said.contains(why), "{why}: exit code {code}, {said}");
        if spec.get("hang_up").is_none() {
            assert_eq!(player.ask("closed 10000"), json!(true), "who watches the connection sees it: {why}");
        }
        assert!(!packed.socket().exists());
        drop(player);
    }
    // Who only looks whether there is a socket is not taken for a machine.
    let handler = packed.serve();
    let mut player = packed.player(&json!({ "regions": good, "look_first": true }));
    assert_eq!(player.read(0, 2 * MIB, 2), packed.crc(0, 2 * MIB));
    let again = packed.it.error(&["checkpoint", "serve-uffd", "fc@no", "--socket", packed.socket().to_str().unwrap()]);
    assert_eq!(again.0, 3);
    player.exit();
    assert_eq!(handler.end().0, 0);
    // Nobody has connected when it is to end.
    let handler = packed.serve();
    let socket = packed.socket();
    let again = packed.it.error(&["checkpoint", "serve-uffd", "fc@a", "--socket", socket.to_str().unwrap()]);
    assert_eq!(again.0, 4, "somebody listens there: {}", again.1);
    handler.signal(rustix::process::Signal::INT);
    let (code, _, said) = handler.end();
    assert!(code == 1 && said.contains("nobody had connected") && !socket.exists(), "{said}");
}

/// Mutated messages: each is refused, or is all of the memory in regions that are disjoint.
#[test]
fn hostile_numbers_are_refused_or_fit() {
    let of = Geometry::new(Sizes::USUAL, &[Region { address: 0, length: 8 * MIB }]).unwrap();
    let mut seed = 0x5eed_u64;
    let mut next = move |limit: u64| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) % limit
    };
    let (mut accepted, mut refused) = (0, 0);
    for round in 0..20_000 {
        let cut = (next(8 * 16) + 1).min(127) * BLOCK;
        let huge = next(4) == 0;
        let (cut, page) = if huge { (next(3) * 2 * MIB + 2 * MIB, 2 * MIB) } else { (cut, 4096) };
        let mut numbers = [[1 << 40, cut, 0, page], [1 << 41, 8 * MIB - cut, cut, page]];
        for _ in 0..next(3) {
            let place = &mut numbers[next(2) as usize][next(4) as usize];
            *place = match next(8) {
                0 => next(u64::MAX),
                1 => u64::MAX - next(8192),
                2 => place.wrapping_add(4096),
                3 => place.wrapping_sub(4096),
                4 => 0,
                5 => *place ^ 1 << next(64),
                6 => next(4) * 2 * MIB,
                _ => *place,
            };
        }
        let region = |[at, size, offset, page]: [u64; 4]| json!({ "base_host_virt_addr": at, "size": size, "offset": offset, "page_size": page, "page_size_kib": 7 });
        let mut text = json!([region(numbers[0]), region(numbers[1])]).to_string().into_bytes();
        if round % 5 == 0 {
            let at = next(text.len() as u64) as usize;
            text[at] ^= 1 << next(8);
        }
        let Ok(layout) = decode(&text, &of) else {
            refused += 1;
            continue;
        };
        accepted += 1;
        let total: u64 = layout.regions.iter().map(afterimage::sys::guest::GuestRegion::len).sum();
        assert_eq!((total, layout.geometry.memory()), (8 * MIB, 8 * MIB));
        let mut end = 0;
        // Disjoint there as well: a range that ends where one begins has nothing of it.
        let starts: Vec<u64> = numbers.iter().map(|numbers| numbers[0]).collect();
        assert!(layout.regions.len() < 2 || round % 5 == 0 || starts[0] != starts[1]);
        for region in &layout.regions {
            assert_eq!(region.address(), end);
            end += region.len();
        }
    }
    assert!(accepted > 2000 && refused > 5000, "{accepted} accepted, {refused} refused");
}
