//! Increments that the program exported, applied to a block device.

use std::fs;
use std::io::Read;
use std::os::unix::fs::FileExt;

use super::{Loop, Place, command, require_loop, require_programs, run, scratch};
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
