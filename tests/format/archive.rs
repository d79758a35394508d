//! A pool in two files that git can keep: `files.txt` lists directories, files and their pages; `pages.bin` has the pages.
//!
//! A page is 4096 bytes that are not all zeros, cut behind its last byte that is not zero. Everything else is a hole.
//!
//! ```text
//! dir PATH
//! file PATH LENGTH
//! page INDEX BYTES       of the file above; the bytes are the next ones of pages.bin
//! ```

use std::path::Path;

use afterimage::media::{Media, Open, SimMedia};

const PAGE: usize = 4096;

/// Packs every file of a tree.
pub fn pack(media: &SimMedia) -> (String, Vec<u8>) {
    let mut list = "# A pool of format 1, for tests: see tests/format/archive.rs.\n".to_owned();
    let mut pages = Vec::new();
    let mut dirs = std::collections::BTreeSet::new();
    for path in media.paths() {
        for (at, _) in path.match_indices('/') {
            if dirs.insert(path[..at].to_owned()) {
                list += &format!("dir {}\n", &path[..at]);
            }
        }
        let file = media.open(&path, Open::ReadOnly).unwrap();
        let len = file.len().unwrap();
        list += &format!("file {path} {len}\n");
        for index in 0..len.div_ceil(PAGE as u64) {
            let mut page = [0; PAGE];
            let got = file.read_at(&mut page, index * PAGE as u64).unwrap();
            if let Some(last) = page[..got].iter().rposition(|byte| *byte != 0) {
                list += &format!("page {index} {}\n", last + 1);
                pages.extend_from_slice(&page[..=last]);
            }
        }
    }
    (list, pages)
}

/// Puts the files of a fixture into a tree.
pub fn unpack(fixture: &Path, media: &dyn Media) {
    let list = std::fs::read_to_string(fixture.join("files.txt")).unwrap();
    let pages = std::fs::read(fixture.join("pages.bin")).unwrap();
    let mut rest = &pages[..];
    let mut file = None;
    for line in list.lines().filter(|line| !line.starts_with('#')) {
        let words: Vec<&str> = line.split(' ').collect();
        match words[..] {
            ["dir", path] => media.make_dir(path).unwrap(),
            ["file", path, len] => {
                let new = media.open(path, Open::New).unwrap();
                new.set_len(len.parse().unwrap()).unwrap();
                file = Some(new);
            }
            ["page", index, len] => {
                let (page, more) = rest.split_at(len.parse().unwrap());
                let at = index.parse::<u64>().unwrap() * PAGE as u64;
                file.as_ref().expect("pages follow their file").write_at(page, at).unwrap();
                rest = more;
            }
            _ => panic!("'{line}' is no line of an archive"),
        }
    }
    assert!(rest.is_empty(), "pages that no line names");
}
