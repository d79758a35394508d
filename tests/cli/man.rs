//! The pages in `man/` are those the program makes.

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
