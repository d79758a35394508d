//! Making a pool where none can be: on host file systems that are too small, too full, or read-only.

use std::fs;

use super::{FileSystem, require};
use crate::cli::Afterimage;

#[test]
fn a_host_on_which_no_block_could_be_written_gets_no_pool() {
    if !require(rustix::process::geteuid().is_root(), "root, to mount file systems of all sizes") {
        return;
    }
    let it = Afterimage::new();
    let at = it.path("host");
    let left = || fs::read_dir(&at).unwrap().map(|entry| entry.unwrap().file_name()).collect::<Vec<_>>();
    let refused = |dir: &str| {
        let (code, error) = it.error(&["init", it.path(dir).to_str().unwrap()]);
        assert!(error["hint"].is_string(), "{error}");
        (code, error["message"].as_str().unwrap().to_owned())
    };
    {
        let _host = FileSystem::in_memory(&at, "size=200m");
        for dir in ["host", "host/pool", "host/deep/pool"] {
            let (code, message) = refused(dir);
            assert_eq!(code, 6, "{message}");
            assert!(message.contains("200.0 MiB is too small") && message.contains("256.0 MiB free"), "{message}");
            assert!(left().is_empty(), "{:?}", left());
        }
    }
    fs::remove_dir(&at).unwrap();
    {
        let _host = FileSystem::in_memory(&at, "size=400m");
        let filler = fs::File::create(at.join("filler")).unwrap();
        rustix::fs::fallocate(&filler, rustix::fs::FallocateFlags::empty(), 0, 100 << 20).unwrap();
        drop(filler);
        let (code, message) = refused("host/pool");
        assert_eq!(code, 6, "{message}");
        assert!(message.contains("too full") && message.contains("300.0 MiB are free"), "{message}");
        assert_eq!(left(), ["filler"]);
        fs::remove_file(at.join("filler")).unwrap();
        it.json(&["init", at.join("pool").to_str().unwrap()]);
    }
    fs::remove_dir(&at).unwrap();
    let _host = FileSystem::in_memory(&at, "size=1g,ro");
    for dir in ["host", "host/pool"] {
        let (code, message) = refused(dir);
        assert_eq!(code, 1, "{message}");
        assert!(message.contains("Read-only file system") && message.contains("/host"), "{message}");
    }
}
