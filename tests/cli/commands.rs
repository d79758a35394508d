//! The commands against a real pool, without a server: what they answer, and how they refuse.

use serde_json::json;

use super::{Afterimage, text};

const GIB: u64 = 1 << 30;

#[test]
fn a_pool_is_made_once() {
    let it = Afterimage::new();
    let made = it.json(&["init"]);
    assert_eq!((made["answer"].as_str(), made["uuid"].as_str().unwrap().len()), (Some("pool"), 36));
    let (code, error) = it.error(&["init"]);
    assert_eq!((code, error["kind"].as_str()), (1, Some("exists")));
    let list = json!({ "answer": "disks", "disks": [], "health": null, "damage": null, "full": null, "records": null });
    assert_eq!(it.json(&["ls"]), list);
}

#[test]
fn of_many_who_make_a_pool_in_one_place_one_does() {
    let it = Afterimage::new();
    let start = || {
        let mut command = it.command(&["--json", "init"]);
        command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped()).spawn().unwrap()
    };
    let all: Vec<_> = (0..4).map(|_| start()).collect();
    let ended: Vec<_> = all.into_iter().map(|child| child.wait_with_output().unwrap()).collect();
    let made: Vec<_> = ended.iter().filter(|output| output.status.success()).collect();
    assert_eq!(made.len(), 1);
    for output in ended.iter().filter(|output| !output.status.success()) {
        let error: serde_json::Value = serde_json::from_slice(&output.stderr).unwrap();
        assert_eq!((output.status.code(), error["error"]["kind"].as_str()), (Some(1), Some("exists")), "{error}");
    }
    let answer: serde_json::Value = serde_json::from_slice(&made[0].stdout).unwrap();
    let text = std::fs::read_to_string(it.pool().join("afterimage.toml")).unwrap();
    assert!(text.contains(answer["uuid"].as_str().unwrap()), "the pool is that of the one who said so: {text}");
    it.json(&["create", "web", "-s", "1G"]);
    it.json(&["check"]);
}

#[test]
fn a_directory_with_something_in_it_is_refused() {
    let it = Afterimage::new();
    std::fs::create_dir(it.pool()).unwrap();
    std::fs::write(it.pool().join("precious"), "x").unwrap();
    let (code, _) = it.error(&["init"]);
    assert_eq!(code, 1);
    assert_eq!(std::fs::read_dir(it.pool()).unwrap().count(), 1);
}

#[test]
fn disks_are_made_listed_renamed_resized_and_removed() {
    let it = Afterimage::with_pool();
    let made = it.json(&["create", "web", "--size", "1.5G"]);
    assert_eq!(made["answer"], "disk");
    assert_eq!(made["size"], GIB * 3 / 2);
    it.json(&["create", "db", "-s", "1001"]);
    let list = it.json(&["ls"]);
    let names: Vec<_> = list["disks"].as_array().unwrap().iter().map(|disk| disk["name"].clone()).collect();
    assert_eq!(names, ["db", "web"]);
    assert_eq!(list["disks"][0]["size"], 1024, "rounded up");
    assert_eq!(it.json(&["rename", "db", "data"])["name"], "data");
    let nothing = it.json(&["diff", "web", "-"]);
    assert_eq!((&nothing["to"], &nothing["extents"]), (&json!("-"), &json!([])));
    assert_eq!(it.json(&["resize", "web", "2G"])["size"], 2 * GIB);
    assert_eq!(it.error(&["resize", "web", "1G"]).0, 1, "not without --shrink");
    assert_eq!(it.json(&["resize", "web", "1G", "--shrink"])["size"], GIB);
    let info = it.json(&["info", "web"]);
    assert_eq!((&info["referenced"], &info["unique"], &info["snapshots"]), (&json!(0), &json!(0), &json!(0)));
    assert_eq!(it.json(&["rm", "data"]), json!({ "answer": "removed", "name": "data" }));
    assert_eq!(it.error(&["info", "data"]).0, 3);
}

#[test]
fn snapshots_are_taken_cloned_reverted_and_removed() {
    let it = Afterimage::with_pool();
    it.json(&["create", "a", "-s", "1G"]);
    it.json(&["create", "b", "-s", "1G"]);
    let taken = it.json(&["snapshot", "a@one", "b@one"]);
    assert_eq!(taken["snapshots"].as_array().unwrap().len(), 2);
    assert_eq!(it.error(&["snapshot", "b@two", "a@one"]).0, 1, "all or none");
    assert_eq!(it.json(&["ls", "b"])["snapshots"].as_array().unwrap().len(), 1);
    let clone = it.json(&["clone", "a@one", "c"]);
    assert_eq!((&clone["name"], &clone["origin"]), (&json!("c"), &json!("a@one")));
    assert_eq!(clone["origin_gone"], json!(false));
    it.json(&["resize", "a", "3G"]);
    let reverted = it.json(&["revert", "a@one", "--keep", "grown"]);
    assert_eq!((&reverted["answer"], &reverted["kept"]), (&json!("reverted"), &json!("grown")));
    assert_eq!(it.json(&["info", "a"])["size"], GIB);
    assert_eq!(it.json(&["info", "a@grown"])["size"], 3 * GIB);
    let origin = || {
        let info = it.json(&["info", "c"]);
        (info["origin"].as_str().unwrap().to_owned(), info["origin_gone"].as_bool().unwrap())
    };
    assert_eq!(it.json(&["rename", "a@one", "a@first"])["name"], "first");
    it.json(&["rename", "a", "old"]);
    assert_eq!(origin(), ("old@first".into(), false));
    it.json(&["rename", "old", "a"]);
    assert_eq!(it.error(&["rm", "a"]).0, 4, "it has snapshots");
    it.json(&["rm", "a@first"]);
    it.json(&["rm", "a", "--recursive"]);
    assert_eq!(it.json(&["info", "c"])["size"], GIB, "the clone stays");
    assert_eq!(origin(), ("a@one".into(), true));
    // The name is given again, and is nothing that it comes from.
    it.json(&["create", "a", "-s", "1G"]);
    it.json(&["snapshot", "a@one"]);
    assert_eq!(origin(), ("a@one".into(), true));
    let listed = it.run(&["ls"]).stdout;
    assert!(super::text(&listed).contains("a@one (gone)"));
}

#[test]
fn a_held_snapshot_stays_until_it_is_released() {
    let it = Afterimage::with_pool();
    it.json(&["create", "a", "-s", "1M"]);
    it.json(&["snapshot", "a@s"]);
    assert_eq!(it.json(&["hold", "a@s"])["holds"], json!(["user"]));
    assert_eq!(it.error(&["rm", "a@s"]).0, 4);
    assert_eq!(it.json(&["release", "a@s"])["holds"], json!([]));
    it.json(&["rm", "a@s"]);
}

#[test]
fn prune_keeps_what_the_rules_say() {
    let it = Afterimage::with_pool();
    it.json(&["create", "a", "-s", "1M"]);
    for name in ["a@1", "a@2", "a@3"] {
        it.json(&["snapshot", name]);
    }
    assert_eq!(it.error(&["prune", "a"]).0, 2, "no rule at all would remove everything");
    let plan = it.json(&["prune", "a", "--keep-last", "1", "-n"]);
    let kept: Vec<_> = plan["snapshots"].as_array().unwrap().iter().map(|line| line["kept"].clone()).collect();
    assert_eq!((plan["dry_run"].clone(), kept), (json!(true), vec![json!(false), json!(false), json!(true)]));
    assert_eq!(it.json(&["ls", "a"])["snapshots"].as_array().unwrap().len(), 3);
    it.json(&["prune", "a", "--keep-last", "1"]);
    assert_eq!(it.json(&["ls", "a"])["snapshots"][0]["name"], "3");
}

#[test]
fn settings_are_set_all_or_none() {
    let it = Afterimage::with_pool();
    it.json(&["create", "a", "-s", "1M"]);
    let set = it.json(&["set", "a", "enospc=wait", "quota=20G"]);
    assert_eq!((&set["settings"]["enospc"], &set["settings"]["quota"]), (&json!("wait"), &json!(20 * GIB)));
    assert_eq!(it.error(&["set", "a", "iops=100", "nonsense=1"]).0, 2);
    assert_eq!(it.json(&["get", "a"])["settings"]["iops"], json!(null));
    it.prints(&["get", "a", "quota"], &format!("{}\n", 20 * GIB));
    it.prints(&["set", "a", "quota=none", "-q"], "");
    it.prints(&["get", "a", "quota"], "none\n");
    for bad in ["quota", "=1", "quota=many"] {
        assert_eq!(it.error(&["set", "a", bad]).0, 2, "{bad}");
    }
    for (bad, want) in [
        ("iops=abc", "iops is a number of reads and writes a second, such as 500, or 'none' for no limit, not 'abc'"),
        ("quota=1K", "quota is a size, at least 4K, such as 20G, or 'none' for no limit, not '1K'"),
        (
            "bandwidth=",
            "bandwidth is a number of bytes a second, at least 4K, such as 100M, or 'none' for no limit, not ''",
        ),
        ("extent-size=x", "extent-size is a power of two from 2M to 1G, not 'x'"),
    ] {
        let (code, error) = it.error(&["set", "a", bad]);
        assert_eq!((code, error["message"].as_str()), (2, Some(want)));
    }
    assert_eq!(it.error(&["set", "a", "iops=1", "iops=2"]).0, 2);
    // What each of them is may be known only when it is set: the first one stayed behind.
    it.json(&["snapshot", "a@s"]);
    let before = it.json(&["get", "a"]);
    assert_eq!(it.error(&["set", "a", "bandwidth=10M", "extent-size=8M", "quota=9G"]).0, 1);
    assert_eq!(it.json(&["get", "a"]), before);
    assert_eq!(it.error(&["get", "a", "nonsense"]).0, 2);
}

#[test]
fn bad_names_and_sizes_are_usage_errors() {
    let it = Afterimage::with_pool();
    it.json(&["create", "a", "-s", "1M"]);
    let long = "x".repeat(129);
    for name in ["", "a/b", "a@b", "a#b", "..", ".a", "a\u{7}", "a\nb", long.as_str()] {
        let (code, error) = it.error(&["create", "--size", "1M", "--", name]);
        assert_eq!((code, error["kind"].as_str()), (2, Some("usage")), "{name:?}");
    }
    it.json(&["create", "--size", "1M", &"x".repeat(128)]);
    assert_eq!(it.error(&["snapshot", &format!("a@{}", "x".repeat(121))]).0, 2);
    for size in ["0", "", "-1", "many", "64.1T", "99999999999T"] {
        assert_eq!(it.error(&["create", "b", &format!("--size={size}")]).0, 2, "{size:?}");
        assert_eq!(it.error(&["resize", "a", "--", size]).0, 2, "{size:?}");
    }
    it.json(&["create", "largest", "-s", "64T"]);
    assert_eq!(it.error(&["snapshot", "a"]).0, 2, "a disk where a snapshot is wanted");
    assert_eq!(it.error(&["snapshot", "a@s", "a@t"]).0, 2, "twice at one instant");
    assert_eq!(it.error(&["rename", "a", "a@s"]).0, 2);
    assert_eq!(it.json(&["ls"])["disks"].as_array().unwrap().len(), 3, "nothing else was made");
}

#[test]
fn what_is_not_there_is_exit_3_and_what_is_there_already_1() {
    let it = Afterimage::with_pool();
    it.json(&["create", "a", "-s", "1M"]);
    it.json(&["create", "b", "-s", "1M"]);
    it.json(&["snapshot", "a@s"]);
    for words in [
        &["ls", "x"][..],
        &["info", "x"],
        &["info", "a@x"],
        &["rm", "x"],
        &["rm", "a@x"],
        &["rename", "x", "y"],
        &["resize", "x", "1G"],
        &["snapshot", "x@s"],
        &["clone", "a@x", "y"],
        &["revert", "a@x"],
        &["hold", "a@x"],
        &["prune", "x", "--keep-last", "1"],
        &["get", "x"],
        &["set", "x", "iops=1"],
        &["import", "/nowhere/at/all", "y"],
    ] {
        let (code, error) = it.error(words);
        assert_eq!((code, error["kind"].as_str()), (3, Some("not-found")), "{words:?}: {error}");
    }
    for words in [&["create", "a", "-s", "1M"][..], &["rename", "a", "b"], &["clone", "a@s", "b"], &["snapshot", "a@s"]]
    {
        let (code, error) = it.error(words);
        assert_eq!((code, error["kind"].as_str()), (1, Some("exists")), "{words:?}: {error}");
    }
}

#[test]
fn a_locked_pool_without_a_server_is_exit_4_and_names_the_holder() {
    let it = Afterimage::with_pool();
    let lock = afterimage::pool::PoolLock::take(&it.pool()).unwrap();
    let (code, error) = it.error(&["ls"]);
    assert_eq!((code, error["kind"].as_str()), (4, Some("busy")));
    assert!(error["message"].as_str().unwrap().contains(&std::process::id().to_string()), "{error}");
    let child = it.command(&["ls", "--json"]).stdout(std::process::Stdio::piped()).spawn().unwrap();
    std::thread::sleep(std::time::Duration::from_millis(500));
    drop(lock);
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "a lock that goes away within two seconds is waited for");
}

#[test]
fn the_pool_is_looked_after() {
    let it = Afterimage::with_pool();
    it.json(&["create", "a", "-s", "1M"]);
    let checked = it.json(&["check"]);
    assert_eq!(
        (&checked["answer"], &checked["problems"], &checked["disks"]),
        (&json!("checked"), &json!([]), &json!(1))
    );
    assert_eq!(it.json(&["scrub"])["damaged"], json!([]));
    assert_eq!(it.json(&["reclaim", "--wait"])["complete"], json!(true));
    assert!(text(&it.run(&["metrics"]).stdout).contains("afterimage_"));
}

#[test]
fn people_read_tables() {
    let it = Afterimage::with_pool();
    it.prints(&["create", "web", "-s", "10G"], "disk web, 10.0 GiB\n");
    it.prints(&["-q", "create", "db", "-s", "1G"], "");
    it.prints(&["snapshot", "web@a", "db@a"], "snapshot web@a\nsnapshot db@a\n");
    let output = it.run(&["ls"]);
    let lines: Vec<&str> = text(&output.stdout).lines().collect();
    assert!(lines[0].starts_with("DISK      SIZE  REFERENCED  WRITTEN  SNAPSHOTS"), "{lines:?}");
    assert!(lines[2].starts_with("web   10.0 GiB"), "{lines:?}");
    it.prints(&["snapshot", "db@b"], "snapshot db@b\n");
    it.prints(&["retire", "db@b"], "snapshot db@b, retired\n");
    let sheet = it.run(&["info", "web@a"]);
    assert!(text(&sheet.stdout).contains("size:       10.0 GiB (10737418240 bytes)\n"), "{}", text(&sheet.stdout));
    let output = it.run(&["rm", "web"]);
    assert_eq!(output.status.code(), Some(4));
    let told = text(&output.stderr);
    assert!(told.starts_with("afterimage: ") && told.contains("\n  hint: "), "{told}");
}
