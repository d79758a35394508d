//! Pools that are not what they were: each is refused, or told about, by name and with the right exit code, and loses
//! nothing else.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::{Place, run, scratch};
use crate::cli::Afterimage;
use crate::tree::noise;

/// Looks for the needle in all segment files; returns the file and where in it.
fn find(pool: &Path, needle: &[u8]) -> (PathBuf, u64) {
    let list = super::shell("find \"$1\" -name '*.seg'", &[pool.as_os_str()]);
    for path in list.lines().map(PathBuf::from) {
        let bytes = fs::read(&path).unwrap();
        if let Some(at) = bytes.chunks(4096).position(|block| block.starts_with(needle)) {
            return (path, at as u64 * 4096);
        }
    }
    panic!("no segment holds it");
}

fn flip(path: &Path, at: u64) {
    let file = fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 0x10], at).unwrap();
}

/// A pool with two disks and a snapshot, not served.
fn pool() -> Option<Place> {
    let place = Place::new()?;
    let server = place.serve();
    fs::write(place.disk("a"), noise(1 << 20, 1)).unwrap();
    fs::write(place.disk("b"), noise(3 << 20, 2)).unwrap();
    place.cli.json(&["snapshot", "a@s", "b@s"]);
    fs::write(place.disk("b"), noise(1 << 20, 3)).unwrap();
    place.wait_until_free("a");
    place.wait_until_free("b");
    server.stop();
    Some(place)
}

/// Runs a command that must fail with one of the codes, and returns the message.
#[track_caller]
fn refused(cli: &Afterimage, words: &[&str], codes: &[i32]) -> String {
    let (code, error) = cli.error(words);
    let message = error["message"].as_str().unwrap().to_owned();
    assert!(codes.contains(&code), "{words:?}: {code}: {error}");
    message
}

#[test]
fn a_flipped_bit_in_a_sealed_block_is_found_and_named() {
    let Some(place) = pool() else { return };
    assert_eq!(place.cli.json(&["scrub"])["damaged"], serde_json::json!([]));
    // The block 100 of disk a, which its snapshot shares.
    let offset = 100 * 4096;
    let (segment, at) = find(&place.cli.pool(), &noise(1 << 20, 1)[offset..offset + 4096]);
    flip(&segment, at + 1234);
    let output = place.cli.run(&["--json", "scrub"]);
    assert_eq!(output.status.code(), Some(5));
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let damaged = report["damaged"].as_array().unwrap();
    let named: Vec<_> =
        damaged.iter().map(|d| (d["disk"].as_str(), d["snapshot"].as_str(), d["offset"].as_u64())).collect();
    assert_eq!(named.len(), 2, "{report}");
    for snapshot in [None, Some("s")] {
        assert!(named.contains(&(Some("a"), snapshot, Some(offset as u64))), "{report}");
    }
    let output = place.cli.run(&["scrub"]);
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.code() == Some(5) && said.contains("a@s") && said.contains("409600"), "{said}");

    // A server that found it answers reads of the block with an error, and of all others with data.
    let server = place.serve();
    assert_eq!(place.cli.run(&["scrub"]).status.code(), Some(5));
    let file = fs::File::open(place.disk("a")).unwrap();
    let mut block = [0; 4096];
    assert_eq!(file.read_at(&mut block, offset as u64).unwrap_err().raw_os_error(), Some(libc::EIO));
    file.read_exact_at(&mut block, offset as u64 - 4096).unwrap();
    assert!(block[..] == noise(1 << 20, 1)[offset - 4096..offset]);
    drop(file);
    // Written again it is whole again.
    let file = fs::OpenOptions::new().write(true).open(place.disk("a")).unwrap();
    file.write_all_at(&[7; 4096], offset as u64).unwrap();
    drop(file);
    assert!(fs::read(place.disk("a")).unwrap()[offset..offset + 4096] == [7; 4096]);
    server.stop();
}

#[test]
fn a_pool_of_a_newer_format_or_with_unknown_features_is_left_alone() {
    let Some(place) = pool() else { return };
    let path = place.cli.pool().join("afterimage.toml");
    let text = fs::read_to_string(&path).unwrap();
    for (from, to, named) in [
        ("format = 1", "format = 2\nnew = \"thing\"", "format 2"),
        ("features = []", "features = [\"teleport\"]", "teleport"),
    ] {
        fs::write(&path, text.replace(from, to)).unwrap();
        for words in [&["ls"][..], &["check"], &["scrub"], &["mount", place.mnt.to_str().unwrap()]] {
            let message = refused(&place.cli, words, &[1]);
            assert!(message.contains(named), "{message}");
        }
    }
    for bad in ["", "format = ", "format = \"one\"", "format = 1", "\u{0}\u{1}"] {
        fs::write(&path, bad).unwrap();
        let message = refused(&place.cli, &["ls"], &[5]);
        assert!(message.contains("afterimage.toml"), "{message}");
    }
    fs::write(&path, text).unwrap();
    place.check();
}

#[test]
fn a_catalog_with_flipped_bits_is_refused_or_whole() {
    let Some(place) = pool() else { return };
    let path = place.cli.pool().join("catalog.redb");
    let listed = place.cli.json(&["ls"]);
    // Opening writes, so every try begins with the same files.
    let sound = scratch();
    let copy = |from: &Path, to: &Path| run("cp", ["-a".as_ref(), from.as_os_str(), to.as_os_str()]);
    let kept = sound.path().join("pool");
    copy(&place.cli.pool(), &kept);
    let catalog = fs::read(&path).unwrap();
    let restore = || {
        fs::remove_dir_all(place.cli.pool()).unwrap();
        copy(&kept, &place.cli.pool());
    };
    let mut refusals = 0;
    let used = (0..catalog.len()).step_by(997).filter(|at| catalog[at & !4095..][..4096].iter().any(|byte| *byte != 0));
    for at in used.chain([0, 8, 9, 64, 128, 192]) {
        restore();
        flip(&path, at as u64);
        let output = place.cli.run(&["--json", "ls"]);
        let told = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!told.contains("panicked"), "byte {at}: {told}");
        match output.status.code() {
            Some(0) => {
                let now: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
                assert_eq!(now, listed, "byte {at} changed what is listed");
            }
            Some(5) => {
                assert!(told.contains("catalog"), "byte {at}: {told}");
                refusals += 1;
            }
            code => panic!("byte {at}: {code:?}: {told}"),
        }
    }
    assert!(refusals > 0, "some of it is in use");
    for len in [0, 100, 4096, catalog.len() / 2] {
        restore();
        fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(len as u64).unwrap();
        let message = refused(&place.cli, &["ls"], &[5]);
        assert!(message.contains("catalog"), "{len} bytes left: {message}");
    }
    restore();
    fs::remove_file(&path).unwrap();
    let message = refused(&place.cli, &["ls"], &[5]);
    assert!(message.contains("catalog.redb"), "{message}");
    restore();
    place.check();
    assert_eq!(place.cli.json(&["ls"]), listed);
}

#[test]
fn a_journal_of_another_pool_or_none_is_refused() {
    let (Some(place), Some(other)) = (pool(), pool()) else { return };
    let path = place.cli.pool().join("journal");
    let mine = fs::read(&path).unwrap();
    fs::copy(other.cli.pool().join("journal"), &path).unwrap();
    let message = refused(&place.cli, &["ls"], &[5]);
    assert!(message.contains("journal") && message.contains("another pool"), "{message}");
    for bad in [&b""[..], &[0; 4096], &mine[..8192]] {
        fs::write(&path, bad).unwrap();
        let message = refused(&place.cli, &["ls"], &[5]);
        assert!(message.contains("journal"), "{message}");
    }
    fs::remove_file(&path).unwrap();
    let message = refused(&place.cli, &["ls"], &[5]);
    assert!(message.contains("journal"), "{message}");
    fs::write(&path, mine).unwrap();
    place.check();
}

#[test]
fn a_truncated_or_foreign_segment_is_told_and_other_disks_stay_readable() {
    let Some(place) = pool() else { return };
    let (segment, _) = find(&place.cli.pool(), &noise(1 << 20, 1)[..4096]);
    let name = segment.file_name().unwrap().to_str().unwrap().to_owned();
    let whole = fs::read(&segment).unwrap();
    let cut = whole.len() as u64 - (512 << 10);
    fs::OpenOptions::new().write(true).open(&segment).unwrap().set_len(cut).unwrap();
    let output = place.cli.run(&["check"]);
    let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert_eq!(output.status.code(), Some(5), "{said}");
    assert!(said.contains(name.trim_end_matches(".seg")), "{said}");
    let server = place.serve();
    assert!(fs::read(place.disk("b")).unwrap() == noise(1 << 20, 3));
    let error = fs::read(place.disk("a")).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EIO), "{error}");
    server.stop();
    fs::write(&segment, &whole).unwrap();

    for damage in [0, 16, 32, 40] {
        flip(&segment, damage);
        let output = place.cli.run(&["scrub"]);
        assert_eq!(output.status.code(), Some(5), "byte {damage} of the header");
        fs::write(&segment, &whole).unwrap();
    }
    place.check();
    let server = place.serve();
    assert!(fs::read(place.disk("a")).unwrap() == noise(1 << 20, 1));
    server.stop();
}

/// The other disks are served; what lay in the file is EIO, and comes back with it.
#[test]
fn a_missing_segment_keeps_nobody_from_the_other_disks() {
    let Some(place) = pool() else { return };
    let (segment, _) = find(&place.cli.pool(), &noise(1 << 20, 1)[..4096]);
    let away = place.cli.path("away");
    fs::rename(&segment, &away).unwrap();
    let name = segment.file_name().unwrap().to_str().unwrap().to_owned();
    let listed = place.cli.json(&["ls"]);
    assert!(listed["damage"].as_str().unwrap().contains(&name) && listed["health"].is_null(), "{listed}");
    for command in ["check", "scrub"] {
        let output = place.cli.run(&[command]);
        let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.code() == Some(5) && said.contains(&name), "{command}: {said}");
    }
    let server = place.serve();
    assert!(fs::read(place.disk("b")).unwrap() == noise(1 << 20, 3));
    assert_eq!(fs::read(place.disk("a")).unwrap_err().raw_os_error(), Some(libc::EIO));
    let file = fs::OpenOptions::new().read(true).write(true).open(place.disk("a")).unwrap();
    // A part of a block that is lost: refused, and nobody else is kept from writing for that.
    assert_eq!(file.write_all_at(&[9; 100], 4096).unwrap_err().raw_os_error(), Some(libc::EIO));
    file.write_all_at(&[9; 4096], 8192).unwrap();
    file.sync_all().unwrap();
    let mut block = [0; 4096];
    file.read_exact_at(&mut block, 8192).unwrap();
    assert_eq!(block, [9; 4096]);
    drop(file);
    fs::write(place.disk("new"), noise(1 << 20, 4)).unwrap();
    place.cli.json(&["snapshot", "b@t", "new@t", "a@t"]);
    place.cli.json(&["rm", "a@s"]);
    place.cli.json(&["reclaim", "--wait"]);
    assert!(place.cli.json(&["ls"])["health"].is_null());
    server.stop();

    fs::rename(&away, &segment).unwrap();
    place.check();
    let server = place.serve();
    let mut expected = noise(1 << 20, 1);
    expected[8192..12288].fill(9);
    assert!(fs::read(place.disk("a")).unwrap() == expected);
    assert!(fs::read(place.disk("new")).unwrap() == noise(1 << 20, 4));
    place.cli.json(&["reclaim", "--wait"]);
    server.stop();
    place.check();
}

#[test]
fn a_pool_without_any_segment_stays_closed() {
    let Some(place) = pool() else { return };
    let (segments, away) = (place.cli.pool().join("segments"), place.cli.path("away"));
    fs::rename(&segments, &away).unwrap();
    fs::create_dir(&segments).unwrap();
    let (code, error) = place.cli.error(&["ls"]);
    assert_eq!(code, 5, "{error}");
    assert!(error["hint"].as_str().unwrap().contains("mounted"), "{error}");
    fs::remove_dir(&segments).unwrap();
    fs::rename(&away, &segments).unwrap();
    place.check();
}

#[test]
fn what_is_no_pool_is_left_as_it_is() {
    let dir = scratch();
    let cli = Afterimage { dir };
    assert!(refused(&cli, &["ls"], &[3]).contains(cli.pool().to_str().unwrap()));
    fs::write(cli.pool(), "a file").unwrap();
    for command in ["ls", "init", "check"] {
        assert!(refused(&cli, &[command], &[2]).contains(cli.pool().to_str().unwrap()));
    }
    assert_eq!(fs::read(cli.pool()).unwrap(), b"a file");
    fs::remove_file(cli.pool()).unwrap();
    fs::create_dir(cli.pool()).unwrap();
    assert!(refused(&cli, &["ls"], &[3]).contains(cli.pool().to_str().unwrap()));
    assert_eq!(fs::read_dir(cli.pool()).unwrap().count(), 0);
}

#[test]
fn a_second_server_and_a_locked_pool_are_exit_4_with_the_pid() {
    let Some(place) = pool() else { return };
    let server = place.serve();
    let pid = server.child.id().to_string();
    let other = place.cli.path("other");
    fs::create_dir(&other).unwrap();
    for at in [&other, &place.mnt] {
        let message = refused(&place.cli, &["mount", at.to_str().unwrap()], &[4]);
        assert!(message.contains(&pid) || at == &place.mnt, "{message}");
    }
    // Its socket gone, the lock still says who has the pool.
    fs::remove_file(place.cli.pool().join("control.sock")).unwrap();
    assert!(refused(&place.cli, &["ls"], &[4]).contains(&pid));
    server.stop();
    place.check();
}
