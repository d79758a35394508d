//! What the command line accepts, before anything is asked of a pool.

use afterimage::cli;

use super::{Afterimage, commands, program, text};

fn accepts(words: &str) {
    assert_eq!(cli::parse(format!("afterimage {words}").split(' ')), Ok(()), "{words}");
}

fn refuses(words: &str) {
    assert_eq!(cli::parse(format!("afterimage {words}").split(' ')), Err(2), "{words}");
}

#[test]
fn the_definition_is_consistent() {
    cli::command().debug_assert();
}

#[test]
fn the_documented_forms_are_accepted() {
    for words in [
        "init",
        "init /srv/pool",
        "init --allow-network /srv/pool",
        "--pool /srv/pool mount /mnt",
        "mount --pool /srv/pool --init --daemon --allow-other /mnt",
        "mount --map-cache 2G /mnt",
        "serve nbd web --socket /run/web --map-cache=1M",
        "umount /mnt",
        "umount --force /mnt",
        "serve nbd web --socket /run/web.sock",
        "serve nbd web web@a db --listen 127.0.0.1:10809 --read-only --daemon",
        "serve nbd web --listen 0.0.0.0:10809 --tls-cert c.pem --tls-key k.pem --tls-ca ca.pem --persist",
        "serve vhost-user web --socket /run/web.sock --queues 4",
        "serve",
        "serve --daemon",
        "attach nbd web@a --listen [::]:10809 --unprotected --persist",
        "attach vhost-user web --socket /run/web.sock --persist",
        "detach web",
        "detach 3",
        "exports",
        "create web --size 10G",
        "create web -s 10G --json",
        "import web.qcow2 web",
        "send web@b",
        "send --from web@a web@b --no-compress",
        "send --from - web@b",
        "send --resume 01ff",
        "receive web",
        "receive web --force --as monday",
        "receive web --token",
        "receive web --abort",
        "receive --file /dev/vg/web --state /var/lib/afterimage --force",
        "receive --file web.raw --token",
        "import --format vmdk web.img web",
        "resize web 20G",
        "resize web 1G --shrink",
        "ls",
        "ls web",
        "info web@monday",
        "rename web web2",
        "rename web@a web@b",
        "rm web --recursive",
        "rm web@monday",
        "snapshot web@a db@a",
        "clone web@a web2",
        "revert web@a --keep b",
        "hold web@a --tag backup",
        "release web@a",
        "prune web --keep-last 3 --keep-daily 7 --dry-run",
        "set web enospc=wait quota=20G",
        "get web",
        "get web quota",
        "check",
        "check --repair",
        "check --rebuild",
        "scrub",
        "reclaim --wait",
        "metrics",
        "doctor",
        "completions bash",
        "man /tmp/man",
        "-vv ls",
        "-q ls",
    ] {
        accepts(words);
    }
}

#[test]
fn nonsense_is_a_usage_error() {
    for words in [
        "",
        "nonsense",
        "create web",
        "create --size 1G",
        "import file disk --format iso",
        "resize web",
        "snapshot",
        "clone web@a",
        "mount --map-cache 1023K /mnt",
        "mount --map-cache many /mnt",
        "prune web --keep-last -1",
        "prune web --keep-last many",
        "set web",
        "check --repair --rebuild",
        "-q -v ls",
        "mount",
        "ls a b",
        "completions cmd.exe",
        "serve nbd web",
        "serve nbd --socket s",
        "serve iscsi web --socket s",
        "serve nbd web --socket s --listen 127.0.0.1:1",
        "attach nbd web --listen 127.0.0.1:1 --tls-cert c",
        "attach nbd web --listen 127.0.0.1:1 --tls-ca c",
        "attach nbd web --socket s --daemon",
        "detach",
    ] {
        refuses(words);
    }
}

#[test]
fn serving_without_an_address_tells_both_kinds() {
    for command in ["serve", "attach"] {
        let output = program().args([command, "nbd", "web"]).output().unwrap();
        let told = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{told}");
        assert!(told.contains("--socket <PATH>|--listen <ADDRESS:PORT>"), "{told}");
    }
}

#[test]
fn help_ends_well_everywhere() {
    for name in commands() {
        for flag in ["-h", "--help"] {
            let output = program().args([name.as_str(), flag]).output().unwrap();
            assert!(output.status.success(), "{name} {flag}");
            assert!(text(&output.stdout).contains("Usage: afterimage"), "{name} {flag}");
            assert_eq!(text(&output.stderr), "");
        }
    }
    for flag in ["--help", "--version"] {
        assert!(program().arg(flag).output().unwrap().status.success());
    }
}

#[test]
fn help_has_what_is_of_the_command_before_what_is_of_all() {
    let output = program().args(["serve", "-h"]).output().unwrap();
    let told = text(&output.stdout);
    let at = |word: &str| told.find(word).unwrap_or_else(|| panic!("{word} in {told}"));
    assert!(
        at("--daemon") < at("Options of every command:") && at("Options of every command:") < at("--pool"),
        "{told}"
    );
}

#[test]
fn help_speaks_in_the_imperative_and_without_a_full_stop() {
    for sub in cli::command().get_subcommands() {
        let about = sub.get_about().map(ToString::to_string).unwrap_or_default();
        assert!(about.starts_with(char::is_uppercase) && !about.ends_with('.'), "{}: {about:?}", sub.get_name());
        let first = about.split(' ').next().unwrap();
        assert!(!first.ends_with('s'), "{}: '{about}' is no imperative", sub.get_name());
    }
}

#[test]
fn completions_are_made_for_the_usual_shells() {
    for shell in ["bash", "zsh", "fish"] {
        let output = program().args(["completions", shell]).output().unwrap();
        let script = text(&output.stdout);
        assert!(output.status.success());
        for name in ["snapshot", "umount"] {
            assert!(script.contains(name), "{shell} knows {name}");
        }
    }
    // And one is loaded and asked: the shell that is everywhere.
    let ask = "source /dev/stdin; COMP_WORDS=(afterimage snaps) COMP_CWORD=1; _afterimage afterimage snaps afterimage
        complete -p afterimage; echo ${COMPREPLY[@]}";
    let mut bash = std::process::Command::new("bash");
    bash.args(["-c", ask]).stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::piped());
    let mut bash = bash.spawn().unwrap();
    let script = program().args(["completions", "bash"]).output().unwrap().stdout;
    std::io::Write::write_all(&mut bash.stdin.take().unwrap(), &script).unwrap();
    let said = bash.wait_with_output().unwrap().stdout;
    assert!(text(&said).contains(" afterimage\n") && text(&said).ends_with("snapshot\n"), "{}", text(&said));
}

#[test]
fn without_a_pool_the_way_out_is_told() {
    let output = program().arg("ls").output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    let told = text(&output.stderr);
    assert!(
        told.starts_with("afterimage: ") && told.contains("\n  hint: ") && told.contains("AFTERIMAGE_POOL"),
        "{told}"
    );
}

#[test]
fn a_directory_that_is_no_pool_stays_as_it_was() {
    let it = Afterimage::new();
    assert_eq!(it.error(&["ls"]).0, 3, "no such directory");
    std::fs::create_dir(it.pool()).unwrap();
    let (code, error) = it.error(&["ls"]);
    assert_eq!((code, error["kind"].as_str()), (3, Some("not-found")));
    assert_eq!(std::fs::read_dir(it.pool()).unwrap().count(), 0);
    std::fs::remove_dir(it.pool()).unwrap();
    std::fs::write(it.pool(), "").unwrap();
    let (code, error) = it.error(&["ls"]);
    assert_eq!((code, error["kind"].as_str()), (2, Some("usage")));
    assert!(error["message"].as_str().unwrap().contains("is a file"));
    assert_eq!(it.error(&["init"]).0, 2);
}

#[test]
fn a_reader_that_goes_away_ends_it_quietly() {
    let mut child = program()
        .args(["completions", "zsh"])
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), text(&output.stderr)), (Some(0), ""));
}

#[test]
fn doctor_has_a_finding_for_everything_it_looks_at() {
    let output = program().args(["doctor", "--json"]).output().unwrap();
    let answer: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let findings = answer["findings"].as_array().unwrap();
    assert!(findings.len() >= 7, "{answer}");
    let problem = findings.iter().any(|finding| finding["state"] == "problem");
    assert_eq!(output.status.code(), Some(i32::from(problem)));
    assert!(findings.iter().all(|finding| finding["state"] == "good" || finding["hint"].is_string()), "{answer}");
}
