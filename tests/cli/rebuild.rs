//! A pool that lost its catalog, as somebody meets it who has only the command line.

use std::fs;

use serde_json::json;

use super::{Afterimage, text};

/// An image of `blocks` blocks, no two alike.
fn image(it: &Afterimage, name: &str, blocks: u32, tag: u8) -> std::path::PathBuf {
    let bytes: Vec<u8> = (0..blocks).flat_map(|n| [&n.to_le_bytes()[..], &[tag; 4092]].concat()).collect();
    let path = it.path(name);
    fs::write(&path, bytes).unwrap();
    path
}

fn pool() -> Afterimage {
    let it = Afterimage::with_pool();
    let raw = image(&it, "raw", 300, 7);
    it.json(&["import", raw.to_str().unwrap(), "web"]);
    it.json(&["snapshot", "web@first"]);
    it.json(&["clone", "web@first", "copy"]);
    it.json(&["snapshot", "copy@second"]);
    it
}

#[test]
fn a_sound_catalog_is_left_alone() {
    let it = pool();
    let before = fs::read(it.pool().join("catalog.redb")).unwrap();
    let answer = it.json(&["check", "--rebuild"]);
    assert_eq!((&answer["answer"], &answer["rebuilt"]), (&json!("rebuilt"), &json!(false)));
    assert_eq!(fs::read(it.pool().join("catalog.redb")).unwrap(), before);
    let output = it.run(&["check", "--rebuild"]);
    assert_eq!(text(&output.stdout), "the catalog is sound: nothing was changed\n");
}

#[test]
fn a_lost_catalog_is_named_and_comes_back_from_the_journal() {
    let it = pool();
    let info = it.json(&["info", "web"]);
    fs::remove_file(it.pool().join("catalog.redb")).unwrap();
    let (code, error) = it.error(&["ls"]);
    assert_eq!(code, 5, "{error}");
    assert!(error["hint"].as_str().unwrap().contains("afterimage check --rebuild"), "{error}");
    let answer = it.json(&["check", "--rebuild"]);
    assert_eq!((&answer["rebuilt"], &answer["complete"]), (&json!(true), &json!(true)), "{answer}");
    assert_eq!(it.json(&["check"])["problems"], json!([]));
    assert_eq!(it.json(&["scrub"])["damaged"], json!([]));
    assert_eq!(it.json(&["info", "web"]), info);
}

#[test]
fn without_a_journal_the_snapshots_come_back_from_their_seals() {
    let it = pool();
    it.json(&["snapshot", "web@old"]);
    it.json(&["retire", "--wait", "web@old"]);
    // Seals are written in the background of a server, and by a scrub.
    it.json(&["scrub"]);
    let was = it.json(&["info", "web@first"]);
    fs::write(it.pool().join("catalog.redb"), b"not a catalog").unwrap();
    for name in fs::read_dir(it.pool()).unwrap().map(|entry| entry.unwrap().file_name()) {
        let name = name.to_str().unwrap().to_owned();
        if name == "journal" || name.starts_with("catalog.backup-") {
            fs::remove_file(it.pool().join(name)).unwrap();
        }
    }
    let output = it.run(&["ls"]);
    assert_eq!(output.status.code(), Some(5), "{}", text(&output.stderr));
    assert!(text(&output.stderr).contains("afterimage check --rebuild"), "{}", text(&output.stderr));
    let output = it.run(&["check", "--rebuild"]);
    let said = text(&output.stdout);
    assert_eq!(output.status.code(), Some(0), "{said}{}", text(&output.stderr));
    assert!(said.contains("disk web: 1 snapshot, 1.2 MiB mapped, now like snapshot 'first'\n"), "{said}");
    assert!(said.contains("  lost: what was written to it since snapshot 'first'\n"), "{said}");
    assert!(said.contains("the old one is catalog.damaged-1.redb now\n"), "{said}");
    assert_eq!(fs::read(it.pool().join("catalog.damaged-1.redb")).unwrap(), b"not a catalog");
    assert!(said.contains("retired snapshots are not there any more") && said.contains("retired.damaged-1"), "{said}");
    assert_eq!(it.json(&["check"])["problems"], json!([]));
    assert_eq!(fs::read_dir(it.pool().join("retired.damaged-1")).unwrap().count(), 1, "and stay there");
    assert_eq!(it.error(&["info", "web@old"]).0, 3);
    let scrub = it.json(&["scrub"]);
    assert_eq!((&scrub["damaged"], &scrub["blocks"]), (&json!([]), &json!(300)));
    let now = it.json(&["info", "web@first"]);
    for key in ["uuid", "size", "referenced", "created"] {
        assert_eq!(now[key], was[key], "{key}");
    }
    it.json(&["snapshot", "web@again"]);
    assert_eq!(it.json(&["ls", "copy"])["snapshots"][0]["name"], json!("second"));
    assert_eq!(it.json(&["check", "--repair"])["problems"], json!([]));
}

#[test]
fn a_pool_that_is_in_use_is_not_rebuilt() {
    let it = pool();
    let lock = afterimage::pool::PoolLock::take(&it.pool()).unwrap();
    let (code, error) = it.error(&["check", "--rebuild"]);
    assert_eq!(code, 4, "{error}");
    assert!(!error["hint"].is_null(), "{error}");
    drop(lock);
}
