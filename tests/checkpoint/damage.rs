//! Damage: every byte of a file that means something is covered, and what is damaged is named.

use afterimage::checkpoint::{self, Found, PageBlock};
use afterimage::error::Kind;
use afterimage::media::{Media, Open};
use afterimage::progress::Silent;

use super::{Save, compare, name, open, sim};

#[test]
fn each_damaged_page_block_is_named_with_its_address_and_place() {
    let (media, folder) = sim();
    Save::default().run(&folder).unwrap();
    let reader = open(&folder, "vm@a").unwrap();
    let geometry = reader.geometry().clone();
    let mut expected = Vec::new();
    for number in [3, 19, 20, 33].map(PageBlock) {
        let Found::Stored { stored, .. } = reader.place(number).unwrap() else { continue };
        let at = (u64::from(stored.block.0) + 1) * (32 << 10) + u64::from(stored.offset + stored.length - 1);
        media.flip_bit("checkpoints/vm/a.ckpt", at, 7).unwrap();
        expected.push((number.0, geometry.span(number).unwrap().address, stored.block.0, stored.offset));
    }
    assert!(expected.len() > 1 && expected.last().unwrap().1 >= 1 << 32);
    let report = checkpoint::verify(&folder, &name("vm@a"), &Silent).unwrap();
    let mut found: Vec<_> = report
        .faults
        .iter()
        .map(|fault| {
            assert!(fault.why.contains("do not match their checksum"), "{fault:?}");
            assert_eq!(fault.file, "the checkpoint vm@a");
            let (number, address) = (fault.page_block.unwrap(), fault.address.unwrap());
            (number, address, fault.storage_block.unwrap(), fault.offset.unwrap())
        })
        .collect();
    found.sort_unstable();
    assert_eq!(found, expected);
    // What is read says it too, and the others are still there.
    let mut scratch = vec![0; geometry.storage_block()];
    for number in (0..geometry.page_blocks()).map(PageBlock) {
        let mut out = vec![0; geometry.length(number).unwrap()];
        let read = reader.read(number, &mut scratch, &mut out);
        match expected.iter().find(|(bad, ..)| *bad == number.0) {
            None => assert!(out == super::content(1, number, out.len())),
            Some((_, address, block, offset)) => {
                let text = read.unwrap_err().to_string();
                let named = format!(
                    "page block {number} (guest address {address:#x}) in storage block {block} at byte {offset}"
                );
                assert!(text.contains(&named), "{text}");
            }
        }
    }
}

#[test]
fn a_damaged_page_of_the_index_costs_what_it_has() {
    let (media, folder) = sim();
    let geometry = super::geometry_of(super::SMALL, 600);
    Save { geometry: geometry.clone(), ..Save::default() }.run(&folder).unwrap();
    let blocks = open(&folder, "vm@a").unwrap().layers()[0].footer().blocks;
    // The second page of three: 255 cells to a page.
    media.flip_bit("checkpoints/vm/a.ckpt", (u64::from(blocks) + 1) * (32 << 10) + 4096 + 77, 0).unwrap();
    let report = checkpoint::verify(&folder, &name("vm@a"), &Silent).unwrap();
    let cells: Vec<u64> = report.faults.iter().filter_map(|fault| fault.page_block).collect();
    assert!(cells.iter().all(|number| (255..510).contains(number)), "{cells:?}");
    assert!((255..510).all(|number| cells.contains(&number)));
    let reader = open(&folder, "vm@a").unwrap();
    reader.place(PageBlock(254)).unwrap();
    reader.place(PageBlock(510)).unwrap();
    let error = reader.place(PageBlock(255)).unwrap_err();
    assert!(error.kind() == Kind::Corrupt && error.to_string().contains("page 1 of its index"), "{error}");
}

#[test]
fn a_file_that_is_cut_off_or_grown_is_refused_at_opening() {
    let (media, folder) = sim();
    Save::default().run(&folder).unwrap();
    let path = "checkpoints/vm/a.ckpt";
    let length = media.open(path, Open::ReadOnly).unwrap().len().unwrap();
    for other in [0, 1, 63, 64, 4095, 4096, length / 2, length - 4096, length - 1, length + 1, length + 4096] {
        let fork = media.fork(1);
        fork.truncate(path, other).unwrap();
        let shared: std::sync::Arc<dyn Media> = std::sync::Arc::new(fork);
        let error = open(&checkpoint::Folder::of_pool(&shared), "vm@a").unwrap_err();
        assert_eq!(error.kind(), Kind::Corrupt, "{other} of {length}: {error}");
    }
    // Cut off while it is open: what is gone is an error, what is there can be read.
    let reader = open(&folder, "vm@a").unwrap();
    reader.place(PageBlock(0)).unwrap();
    media.truncate(path, 64 << 10).unwrap();
    let error = compare(&reader, &|_| 1).unwrap_err();
    assert_eq!(error.kind(), Kind::Io);
    let told = error.to_string();
    assert!(
        told.contains("cannot read storage block ") && told.contains(" of the checkpoint vm@a: the file"),
        "{told}"
    );
}

/// A source that fails now and then does not spoil what is read after that.
#[test]
fn a_source_that_fails_is_asked_again() {
    use std::io;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

    use afterimage::checkpoint::{Source, StorageBlock};

    #[derive(Debug)]
    struct Faulty {
        inner: Arc<dyn Source>,
        reads: AtomicU64,
    }

    impl Source for Faulty {
        fn read_block(&self, block: StorageBlock, out: &mut [u8]) -> io::Result<()> {
            if self.reads.fetch_add(1, Ordering::Relaxed).is_multiple_of(2) {
                return Err(io::Error::from_raw_os_error(libc::ESTALE));
            }
            self.inner.read_block(block, out)
        }
    }

    let (_, folder) = sim();
    Save::default().run(&folder).unwrap();
    let mut reader = open(&folder, "vm@a").unwrap();
    reader.wrap(|_, inner| Arc::new(Faulty { inner, reads: AtomicU64::new(0) }));
    let geometry = reader.geometry().clone();
    let mut scratch = vec![0; geometry.storage_block()];
    let mut failed = 0;
    for number in (0..geometry.page_blocks()).map(PageBlock) {
        let mut out = vec![0; geometry.length(number).unwrap()];
        while let Err(error) = reader.read(number, &mut scratch, &mut out) {
            assert_eq!(error.kind(), Kind::Io);
            failed += 1;
        }
        assert!(out == super::content(1, number, out.len()));
    }
    assert!(failed > 10);
}
