//! The commands, with and without a server.

use std::os::unix::fs::FileExt;
use std::sync::Arc;

use afterimage::checkpoint::Folder;
use afterimage::media::{HostMedia, Media};

use super::Save;
use crate::cli::{Afterimage, text};

fn with_checkpoints() -> Afterimage {
    let it = Afterimage::with_pool();
    let media: Arc<dyn Media> = Arc::new(HostMedia::new(&it.pool()).unwrap());
    let folder = Folder::of_pool(&media);
    Save::default().run(&folder).unwrap();
    let third = |number: super::PageBlock| number.0.is_multiple_of(3).then_some(2);
    Save { name: "vm@b", parent: Some("vm@a"), seed: &third, ..Save::default() }.run(&folder).unwrap();
    it
}

#[test]
fn checkpoints_are_listed_told_of_flattened_and_removed() {
    let it = with_checkpoints();
    let list = it.json(&["checkpoint", "ls"]);
    let list = list["checkpoints"].as_array().unwrap();
    assert_eq!(list.len(), 2);
    assert_eq!((list[1]["name"].as_str(), list[1]["parent"].as_str()), (Some("b"), Some("vm@a")));
    assert!(it.json(&["checkpoint", "ls", "other"])["checkpoints"].as_array().unwrap().is_empty());
    let info = it.json(&["checkpoint", "info", "vm@a"]);
    assert_eq!((info["memory"].as_u64(), info["maker"].as_str()), (Some(40 * 8192 - 4096), Some("test")));
    assert_eq!(info["children"][0].as_str(), Some("vm@b"));
    let output = it.run(&["checkpoint", "ls"]);
    assert!(text(&output.stdout).starts_with("CHECKPOINT"), "{}", text(&output.stdout));
    let output = it.run(&["checkpoint", "info", "vm@b"]);
    let based = text(&output.stdout).lines().find(|line| line.starts_with("based on:"));
    assert!(based.is_some_and(|line| line.ends_with(" vm@a")), "{}", text(&output.stdout));
    let verified = it.json(&["checkpoint", "verify", "vm@b"]);
    assert_eq!((verified["files"].as_u64(), verified["more"].as_u64()), (Some(2), Some(0)));
    let (code, error) = it.error(&["checkpoint", "rm", "vm@a"]);
    assert_eq!((code, error["kind"].as_str()), (4, Some("busy")));
    assert_eq!(it.json(&["checkpoint", "flatten", "vm@b"])["parent"], serde_json::Value::Null);
    assert_eq!(it.json(&["checkpoint", "rm", "vm@a"])["name"].as_str(), Some("vm@a"));
    assert_eq!(it.error(&["checkpoint", "info", "vm@a"]).0, 3);
    assert_eq!(it.error(&["checkpoint", "rm", "vm@a"]).0, 3);
    assert_eq!(it.error(&["checkpoint", "verify", "vm"]).0, 2);
    assert_eq!(it.error(&["checkpoint", "info", "../x@a"]).0, 2);
}

#[test]
fn damage_is_told_and_is_exit_code_5() {
    let it = with_checkpoints();
    let path = it.pool().join("checkpoints/vm/a.ckpt");
    let file = std::fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, (32 << 10) + 5).unwrap();
    file.write_all_at(&[byte[0] ^ 1], (32 << 10) + 5).unwrap();
    let output = it.run(&["checkpoint", "verify", "vm@b"]);
    assert_eq!(output.status.code(), Some(5));
    let told = text(&output.stdout);
    assert!(told.contains("the checkpoint vm@a: page block ") && told.contains("guest address 0x"), "{told}");
    assert!(told.contains(" in storage block 0 at byte 0: ") && told.ends_with("; 1 fault\n"), "{told}");
    // One that cannot be opened at all is listed.
    file.write_all_at(&[0], 0).unwrap();
    let output = it.run(&["checkpoint", "ls"]);
    assert_eq!(output.status.code(), Some(0));
    assert!(text(&output.stdout).contains("the checkpoint vm@a is damaged"), "{}", text(&output.stdout));
    assert_eq!(it.error(&["checkpoint", "verify", "vm@b"]).0, 5);
    assert!(it.json(&["checkpoint", "ls"])["checkpoints"][0]["damage"].is_string());
}
