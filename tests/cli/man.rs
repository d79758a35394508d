//! The pages in `man/` are those the program makes, say what is so, and name only each other.

use std::collections::BTreeSet;
use std::path::Path;

use super::{commands, man_dir, program};

#[test]
fn pages_are_current() {
    let pages = afterimage::cli::man_pages();
    for (name, page) in &pages {
        let there = std::fs::read(man_dir().join(name)).unwrap_or_default();
        assert!(there == *page, "man/{name} is out of date: run 'cargo run -- man man'");
    }
    let mut names: Vec<String> =
        std::fs::read_dir(man_dir()).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    let want: Vec<String> = pages.into_iter().map(|(name, _)| name).collect();
    assert_eq!(names, want, "man/ holds the pages and nothing else");
}

#[test]
fn every_command_has_a_page_and_a_see_also() {
    let pages = afterimage::cli::man_pages();
    for command in commands() {
        let name = format!("afterimage-{command}.1");
        let page = pages.iter().find(|(page, _)| *page == name).map(|(_, page)| super::text(page)).unwrap();
        for want in [".SH SYNOPSIS", ".SH DESCRIPTION", ".SH OPTIONS", ".SH \"SEE ALSO\""] {
            assert!(page.contains(want), "{name} has {want}");
        }
        assert!(page.is_ascii(), "{name}");
    }
}

#[test]
fn the_command_writes_them() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().join("new/man");
    assert!(program().args(["-q", "man"]).arg(&at).output().unwrap().status.success());
    assert_eq!(std::fs::read_dir(at).unwrap().count(), afterimage::cli::man_pages().len());
}

/// Returns the pages of ours that a text names, as `name.section`, whatever it is written in.
fn named(text: &str) -> BTreeSet<String> {
    let mut plain = text.replace("\\-", "-").replace(".BR ", "").replace(" (", "(");
    for font in ["\\fB", "\\fR", "\\fP", "\\fI"] {
        plain = plain.replace(font, "");
    }
    let mut found = BTreeSet::new();
    for (at, _) in plain.match_indices("afterimage") {
        let rest = &plain[at..];
        let len = rest.find(|c: char| !c.is_ascii_lowercase() && c != '-').unwrap_or(rest.len());
        if let [b'(', section @ b'1'..=b'9', b')', ..] = rest.as_bytes()[len..] {
            found.insert(format!("{}.{}", &rest[..len], char::from(section)));
        }
    }
    found
}

fn texts(dir: &Path, out: &mut Vec<(String, String)>) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            texts(&path, out);
        } else if let Ok(text) = std::fs::read_to_string(&path) {
            out.push((path.display().to_string(), text));
        }
    }
}

#[test]
fn every_page_that_is_named_anywhere_is_there() {
    let pages = afterimage::cli::man_pages();
    let there: BTreeSet<&str> = pages.iter().map(|(name, _)| name.as_str()).collect();
    let mut all: Vec<(String, String)> =
        pages.iter().map(|(name, page)| (name.clone(), super::text(page).to_owned())).collect();
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    texts(&root.join("src"), &mut all);
    all.push(("README.md".into(), std::fs::read_to_string(root.join("README.md")).unwrap()));
    let mut count = 0;
    for (place, text) in &all {
        for page in named(text) {
            assert!(there.contains(page.as_str()), "{place} names {page}, and there is none");
            count += 1;
        }
    }
    assert!(count > 300, "the reader sees them: {count}");
    // What is to be seen also is something else.
    for (name, page) in &pages {
        let (_, also) = super::text(page).rsplit_once("SEE ALSO").unwrap();
        let also = named(also);
        assert!(also.len() >= 2 && !also.contains(name), "{name}: {also:?}");
    }
    // Nobody is left out: each page is named by another one.
    for (name, _) in &pages {
        let named_by = pages.iter().filter(|(other, page)| other != name && named(super::text(page)).contains(name));
        assert!(named_by.count() > 0, "{name} is named by no other page");
    }
}

/// The rows of the table that follows `heading` in a FORMAT page, without the column that says who checks.
fn rows(page: &str, heading: &str) -> Vec<String> {
    let (_, rest) = page.split_once(heading).unwrap_or_else(|| panic!("no '{heading}'"));
    let lines = rest.lines().skip_while(|line| !line.starts_with("| "));
    let mut table = lines.take_while(|line| line.starts_with('|')).map(|line| {
        line.trim_matches('|').split(" | ").map(|cell| cell.trim().replace('`', "").replace('-', "\\-")).collect()
    });
    let head: Vec<String> = table.next().unwrap();
    let cells = head.iter().position(|name| name == "meaning").unwrap();
    table.skip(1).map(|row: Vec<String>| format!("{}\tT{{\n{}\nT}}\n", row[..cells].join("\t"), row[cells])).collect()
}

/// Bytes are described once, beside the code; the page for people has the same words.
#[test]
fn the_page_of_formats_has_the_tables_of_the_format_pages() {
    let page = include_str!("../../man/afterimage-formats.5");
    let stream = include_str!("../../src/stream/FORMAT.md");
    let record = include_str!("../../src/snapshot/record/FORMAT.md");
    let export = include_str!("../../src/export/FORMAT.md");
    let checkpoint = include_str!("../../src/checkpoint/FORMAT.md");
    let mut count = 0;
    for (format, heading) in [
        (stream, "Prefix, 16 bytes"),
        (stream, "\nBody:"),
        (stream, "A state:"),
        (stream, "Record header, 32 bytes"),
        (record, "Record header, 64 bytes"),
        (record, "Identity, in this order"),
        (record, "Directory entry, 60 bytes"),
        (checkpoint, "\nHeader, 64 bytes"),
        (checkpoint, "Page trailer, 16 bytes"),
        (checkpoint, "Index cell, 16 bytes"),
        (checkpoint, "Footer, 128 bytes"),
        (export, "`manifest.json`, one object"),
        (export, "The marker, `TARGET"),
    ] {
        for row in rows(format, heading) {
            assert!(page.contains(&row), "{heading}: the page lacks {row}");
            count += 1;
        }
    }
    assert!(count > 70, "{count} rows");
    for magic in ["4A 4E", "53 47", "53 4C", "55 46", "41 49", "53 54", "43 4B"] {
        let magic = format!("89 41 46 54 {magic} 0D 0A");
        let (pool, store) = (include_str!("../../src/pool/FORMAT.md"), include_str!("../../src/store/FORMAT.md"));
        let of = [stream, record, checkpoint, pool, store];
        assert!(page.contains(&magic) && of.iter().any(|format| format.contains(&magic)), "{magic}");
    }
}
