//! Checkpoints that are based on others: what is read through them, what is missing, and what flattening makes of them.

use afterimage::checkpoint::{self, Found, Geometry, PageBlock, Region, Sizes, StorageBlock};
use afterimage::error::Kind;
use afterimage::media::{Media, Open};
use afterimage::progress::Silent;

use super::{SMALL, Save, compare, name, open, sim};

/// `a` has all, `b` every third page block, `c` every seventh.
fn seed_of(number: PageBlock) -> u64 {
    if number.0.is_multiple_of(7) {
        3
    } else if number.0.is_multiple_of(3) {
        2
    } else {
        1
    }
}

fn chain(folder: &checkpoint::Folder) {
    Save::default().run(folder).unwrap();
    let third = |number: PageBlock| number.0.is_multiple_of(3).then_some(2);
    Save { name: "vm@b", parent: Some("vm@a"), seed: &third, state: b"b", ..Save::default() }.run(folder).unwrap();
    let seventh = |number: PageBlock| number.0.is_multiple_of(7).then_some(3);
    // Of another machine: one that was restored from the other and went on.
    Save { name: "other@c", parent: Some("vm@b"), seed: &seventh, state: b"c", ..Save::default() }.run(folder).unwrap();
}

#[test]
fn page_blocks_are_read_from_the_newest_that_has_them() {
    let (_, folder) = sim();
    chain(&folder);
    let reader = open(&folder, "other@c").unwrap();
    assert_eq!(reader.layers().len(), 3);
    compare(&reader, &seed_of).unwrap();
    assert_eq!(reader.state().unwrap(), b"c");
    for number in (0..reader.geometry().page_blocks()).map(PageBlock) {
        if let Found::Stored { layer, .. } = reader.place(number).unwrap() {
            assert_eq!(layer as u64, 3 - seed_of(number), "page block {number}");
        }
    }
    // Contents leave out what a newer one has otherwise.
    let mut seen = 0;
    for layer in 0..3 {
        for block in (0..reader.layers()[layer].footer().blocks).map(StorageBlock) {
            reader
                .contents(layer, block, |number, _| {
                    assert_eq!(layer as u64, 3 - seed_of(number));
                    seen += 1;
                    Ok(())
                })
                .unwrap();
        }
    }
    let stored = (0..reader.geometry().page_blocks()).map(PageBlock);
    assert_eq!(seen, stored.filter(|number| reader.place(*number).unwrap() != Found::Zero).count());
}

#[test]
fn a_flat_one_is_the_same_and_needs_no_other() {
    let (media, folder) = sim();
    chain(&folder);
    let before = open(&folder, "other@c").unwrap();
    let flat = checkpoint::flatten(&folder, &name("other@c"), &Silent).unwrap();
    assert_eq!((flat.parent, flat.uuid), (None, Some(before.header().uuid)));
    assert_eq!((flat.inherited_blocks, flat.state_version), (0, 7));
    let reader = open(&folder, "other@c").unwrap();
    assert_eq!(reader.layers().len(), 1);
    compare(&reader, &seed_of).unwrap();
    assert_eq!(reader.state().unwrap(), b"c");
    // What was stored is stored as it was.
    let mut bytes = 0;
    for number in (0..reader.geometry().page_blocks()).map(PageBlock) {
        let (old, new) = (before.place(number).unwrap(), reader.place(number).unwrap());
        match (old, new) {
            (Found::Zero, Found::Zero) => {}
            (Found::Stored { stored: old, .. }, Found::Stored { stored: new, layer: 0 }) => {
                assert_eq!((old.crc, old.length, old.codec), (new.crc, new.length, new.codec));
                bytes += u64::from(new.length);
            }
            other => panic!("page block {number}: {other:?}"),
        }
    }
    assert_eq!(reader.layers()[0].footer().bytes, bytes);
    // Hot is what was hot in it.
    let hot = |reader: &checkpoint::Reader| {
        let mut all = Vec::new();
        for block in reader.hot().unwrap() {
            reader
                .contents(0, block, |number, _| {
                    all.push(number.0);
                    Ok(())
                })
                .unwrap();
        }
        all
    };
    assert_eq!(hot(&before), hot(&reader));
    assert!(!hot(&reader).is_empty());
    // The old file is read on by who has it open.
    compare(&before, &seed_of).unwrap();
    let report = checkpoint::verify(&folder, &name("other@c"), &Silent).unwrap();
    assert!(report.is_sound() && report.files == 1, "{report:?}");
    // Flat already: nothing is written.
    let ios = media.io_count();
    checkpoint::flatten(&folder, &name("other@c"), &Silent).unwrap();
    assert_eq!(media.io_count(), ios);
}

/// One in the middle: what is based on it goes on, because it is the same state.
#[test]
fn one_that_others_are_based_on_can_be_flattened() {
    let (_, folder) = sim();
    chain(&folder);
    checkpoint::flatten(&folder, &name("vm@b"), &Silent).unwrap();
    let reader = open(&folder, "other@c").unwrap();
    assert_eq!(reader.layers().len(), 2);
    compare(&reader, &seed_of).unwrap();
}

#[test]
fn a_parent_that_is_gone_or_another_is_named() {
    let (media, folder) = sim();
    chain(&folder);
    media.rename("checkpoints/vm/a.ckpt", "checkpoints/vm/kept").unwrap();
    let error = open(&folder, "other@c").unwrap_err();
    assert_eq!(error.kind(), Kind::NotFound);
    assert!(error.to_string().contains("vm@b is based on the checkpoint vm@a, which is gone"), "{error}");
    Save::default().run(&folder).unwrap();
    let error = open(&folder, "other@c").unwrap_err();
    assert_eq!(error.kind(), Kind::Corrupt);
    assert!(error.to_string().contains("vm@b is based on another state than the checkpoint vm@a is now"), "{error}");
    media.rename("checkpoints/vm/kept", "checkpoints/vm/a.ckpt").unwrap();
    open(&folder, "other@c").unwrap();
    // A circle: a file that names itself.
    media.rename("checkpoints/vm/b.ckpt", "checkpoints/vm/a.ckpt").unwrap();
    open(&folder, "vm@a").unwrap_err();
}

#[test]
fn a_parent_must_be_of_the_same_memory() {
    let (_, folder) = sim();
    Save::default().run(&folder).unwrap();
    let other = Geometry::new(SMALL, &[Region { address: 0, length: 1 << 20 }]).unwrap();
    let inherit = |_| None;
    let save = Save { name: "vm@b", parent: Some("vm@a"), geometry: other, seed: &inherit, ..Save::default() };
    let error = save.run(&folder).unwrap_err();
    assert!(error.to_string().contains("of other memory"), "{error}");
    let error = Save { parent: Some("vm@none"), ..save }.run(&folder).unwrap_err();
    assert_eq!(error.kind(), Kind::NotFound);
    // Storage blocks may have another size.
    let wide = Sizes { storage_block: 64 << 10, table_page: 8192, ..SMALL };
    let geometry = super::geometry_of(wide, 40);
    let third = |number: PageBlock| number.0.is_multiple_of(3).then_some(2);
    Save { name: "vm@b", parent: Some("vm@a"), geometry, seed: &third, ..Save::default() }.run(&folder).unwrap();
    checkpoint::flatten(&folder, &name("vm@b"), &Silent).unwrap();
    let seed = |number: PageBlock| if number.0.is_multiple_of(3) { 2 } else { 1 };
    compare(&open(&folder, "vm@b").unwrap(), &seed).unwrap();
}

#[test]
fn a_chain_has_an_end() {
    let (_, folder) = sim();
    Save::default().run(&folder).unwrap();
    let inherit = |_| None;
    let mut parent = "vm@a".to_owned();
    for n in 1..checkpoint::CHAIN_MAX {
        let own = format!("vm@{n}");
        let save = Save { name: &own, parent: Some(&parent), seed: &inherit, ..Save::default() };
        save.run(&folder).unwrap();
        parent = own;
    }
    compare(&open(&folder, &parent).unwrap(), &|_| 1).unwrap();
    let error = Save { name: "vm@more", parent: Some(&parent), seed: &inherit, ..Save::default() }.run(&folder);
    let error = error.unwrap_err();
    assert!(error.to_string().contains("the most there can be"), "{error}");
    checkpoint::flatten(&folder, &name(&parent), &Silent).unwrap();
    Save { name: "vm@more", parent: Some(&parent), seed: &inherit, ..Save::default() }.run(&folder).unwrap();
}

#[test]
fn flattening_what_is_damaged_changes_nothing() {
    let (media, folder) = sim();
    chain(&folder);
    let reader = open(&folder, "vm@b").unwrap();
    let found = (0..40).map(PageBlock).find_map(|number| match reader.place(number).unwrap() {
        Found::Stored { layer: 1, stored } => Some((number, stored)),
        _ => None,
    });
    let (number, stored) = found.unwrap();
    let at = (u64::from(stored.block.0) + 1) * (32 << 10) + u64::from(stored.offset);
    media.flip_bit("checkpoints/vm/a.ckpt", at, 0).unwrap();
    let error = checkpoint::flatten(&folder, &name("vm@b"), &Silent).unwrap_err();
    assert_eq!(error.kind(), Kind::Corrupt);
    assert!(error.to_string().contains(&format!("page block {number} (guest address")), "{error}");
    media.open("checkpoints/vm/b.ckpt.new", Open::ReadOnly).unwrap_err();
    assert_eq!(open(&folder, "vm@b").unwrap().layers().len(), 2);
}
