//! Increments on a block device: exported and applied, and as streams.

use std::fs;
use std::io::Read;
use std::os::unix::fs::FileExt;

use super::{FileSystem, Loop, Place, command, require_loop, require_programs, run, scratch};
use crate::tree::noise;

const MIB: usize = 1 << 20;

#[test]
fn increments_go_onto_a_block_device() {
    if !require_loop() || !require_programs(&["losetup", "fallocate", "dash"]) {
        return;
    }
    let place = Place::within(scratch());
    let server = place.serve();
    let path = |name: &str| place.cli.path(name).to_str().unwrap().to_owned();
    place.cli.json(&["create", "web", "--size", "8M"]);
    let disk = fs::OpenOptions::new().write(true).open(place.disk("web")).unwrap();
    disk.write_all_at(&noise(3 * MIB, 1), MIB as u64).unwrap();
    place.cli.json(&["snapshot", "web@a"]);
    place.cli.json(&["export", "web@a", &path("full")]);

    fs::write(path("backing"), vec![0xff; 10 * MIB]).unwrap();
    let device = Loop::attach(place.cli.path("backing").as_path(), &[]);
    let marker = path("marker");
    let words = |dir: &str| [format!("{}/apply", path(dir)), "--marker".into(), marker.clone(), device.0.clone()];
    let refuses = |dir: &str, why: &str| {
        let output = command("dash", words(dir)).output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success() && said.contains(why), "{said}");
    };
    let compare = |name: &str, size: usize| {
        let mut found = Vec::new();
        fs::File::open(&device.0).unwrap().read_to_end(&mut found).unwrap();
        assert_eq!(found.len(), 10 * MIB);
        assert!(found[..size] == fs::read(place.snapshot("web", name)).unwrap(), "{name}");
        assert!(found[8 * MIB..].iter().all(|byte| *byte == 0xff), "nothing beyond the end is touched");
    };
    // Nobody knows what is on it.
    refuses("full", "--force");
    let [script, rest @ ..] = words("full");
    run("dash", [script, "--force".into()].into_iter().chain(rest));
    compare("a", 8 * MIB);

    place.cli.json(&["retire", "--wait", "web@a"]);
    disk.write_all_at(&noise(5000, 2), 7 * MIB as u64 + 100).unwrap();
    run("fallocate", ["-p", "-o", "2M", "-l", "1M", place.disk("web").to_str().unwrap()]);
    place.cli.json(&["snapshot", "web@b"]);
    place.cli.json(&["export", "--from", "web@a", "web@b", &path("next")]);
    run("dash", words("next"));
    compare("b", 8 * MIB);

    place.cli.json(&["resize", "web", "12M"]);
    place.cli.json(&["snapshot", "web@c"]);
    place.cli.json(&["export", "--from", "web@b", "web@c", &path("large")]);
    refuses("large", "smaller");
    drop(disk);
    server.stop();
}

#[test]
fn streams_go_onto_a_block_device() {
    if !require_loop() || !require_programs(&["losetup", "mkfs.ext4"]) {
        return;
    }
    let place = Place::within(scratch());
    let server = place.serve();
    let path = |name: &str| place.cli.path(name).to_str().unwrap().to_owned();
    place.cli.json(&["create", "web", "--size", "8M"]);
    let disk = fs::OpenOptions::new().write(true).open(place.disk("web")).unwrap();
    disk.write_all_at(&noise(3 * MIB, 1), MIB as u64).unwrap();
    place.cli.json(&["snapshot", "web@a"]);
    disk.write_all_at(&noise(MIB, 2), 2 * MIB as u64 + 100).unwrap();
    run("fallocate", ["-p", "-o", "1M", "-l", "512K", place.disk("web").to_str().unwrap()]);
    place.cli.json(&["snapshot", "web@b"]);

    let send = |words: &[&str]| {
        let output = place.cli.command(&[&["send", "--no-compress"], words].concat()).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        output.stdout
    };
    fs::create_dir(path("state")).unwrap();
    let state = path("state");
    let receive = |device: &str, words: &[&str], stream: &[u8]| {
        fs::write(path("stream"), stream).unwrap();
        let words = [&["receive", "--file", device], words].concat();
        let output = place.cli.command(&words).stdin(fs::File::open(path("stream")).unwrap()).output().unwrap();
        (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
    };
    fs::write(path("backing"), vec![0xff; 10 * MIB]).unwrap();
    let device = Loop::attach(place.cli.path("backing").as_path(), &[]);
    let holds = |name: &str| {
        let mut found = Vec::new();
        fs::File::open(&device.0).unwrap().read_to_end(&mut found).unwrap();
        assert!(found[..8 * MIB] == fs::read(place.snapshot("web", name)).unwrap(), "{name}");
        assert!(found[8 * MIB..].iter().all(|byte| *byte == 0xff), "nothing beyond the end is touched");
    };

    // A device has no file beside it to note what it is, and nobody knows what is on it.
    let (full, kept) = (send(&["web@a"]), ["--state", &state]);
    let (code, said) = receive(&device.0, &[], &full);
    assert!(code != 0 && said.contains("--state"), "{code}: {said}");
    let (code, said) = receive(&device.0, &kept, &full);
    assert!(code != 0 && said.contains("--force"), "{code}: {said}");
    assert!(fs::read(path("backing")).unwrap().iter().all(|byte| *byte == 0xff), "nothing was touched");
    let forced = ["--state", &state, "--force"];
    let (code, said) = receive(&device.0, &forced, &full[..2 * MIB]);
    assert_eq!(code, 5, "{said}");
    assert_eq!(receive(&device.0, &forced, &full), (0, String::new()));
    holds("a");

    // Cut off, and gone on with.
    let next = send(&["--from", "web@a", "web@b"]);
    let (code, said) = receive(&device.0, &kept, &next[..700_000]);
    assert_eq!(code, 5, "{said}");
    let words = ["receive", "--file", &device.0, "--state", &state, "--token"];
    let token = place.cli.json(&words)["token"].as_str().unwrap().to_owned();
    assert_eq!(receive(&device.0, &kept, &send(&["--resume", &token])), (0, String::new()));
    holds("b");

    run("mkfs.ext4", ["-q", &device.0]);
    {
        let at = place.cli.path("at");
        let _mounted = FileSystem::mount(&device, &at, "rw");
        let (code, said) = receive(&device.0, &forced, &full);
        assert_eq!(code, 4, "one that is mounted is not overwritten: {said}");
    }
    fs::write(path("small"), vec![0; 4 * MIB]).unwrap();
    let small = Loop::attach(place.cli.path("small").as_path(), &[]);
    let (code, said) = receive(&small.0, &forced, &full);
    assert!(code == 6 && said.contains("smaller than the disk"), "{code}: {said}");
    assert!(fs::read(path("small")).unwrap().iter().all(|byte| *byte == 0));
    drop(disk);
    server.stop();
}
