//! `doctor`: looks at the host and the pool, and says what to do about what it finds.
//!
//! # Rules
//! 1. It changes nothing, and never fails because something it looks at is broken: that is a finding.
//! 2. A problem keeps the main job from working and makes the command exit with 1; a warning does not.

use std::fs;
use std::path::Path;

use clap::Args;
use serde::Serialize;

use super::screen::Screen;
use super::{Global, host};
use crate::api::{Request, Response, Way, check_is_pool};
use crate::error::Result;
use crate::progress::Silent;
use crate::sys::process;
use crate::units::show_size;

/// The oldest kernel the mount is built for: FUSE with parallel direct writes (6.2) and 1 MiB requests.
const KERNEL_MIN: (u32, u32) = (5, 15);

/// Open files a server needs to have all it may have: one part in four is for 512 segments of two files each, one for 256
/// connections of four, and there is room for the rest.
const OPEN_FILES_MIN: u64 = 4096;

/// Check that this host has what is needed
///
/// Looks at the kernel, FUSE, the tools and, if one is named, the pool; tells what to do about each finding.
#[derive(Debug, Args)]
pub(super) struct Doctor {}

/// How something is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum State {
    Good,
    Warning,
    Problem,
}

/// Something that was looked at.
#[derive(Debug, Serialize)]
struct Finding {
    name: &'static str,
    state: State,
    message: String,
    hint: Option<String>,
}

impl Finding {
    fn good(name: &'static str, message: impl Into<String>) -> Self {
        Self { name, state: State::Good, message: message.into(), hint: None }
    }

    fn warning(name: &'static str, message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { name, state: State::Warning, message: message.into(), hint: Some(hint.into()) }
    }

    fn problem(name: &'static str, message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { name, state: State::Problem, message: message.into(), hint: Some(hint.into()) }
    }
}

impl Doctor {
    #[expect(clippy::unused_self, reason = "all commands are run alike")]
    pub(super) fn run(self, global: &Global, screen: &Screen) -> Result<u8> {
        let mut findings = vec![kernel(), fuse_device(), fusermount(), allow_other(), qemu_img(), open_files()];
        match &global.pool {
            Some(dir) => look_at_pool(dir, &mut findings),
            None => findings.push(Finding::good("pool", "none was named; --pool DIR looks at one")),
        }
        let value = serde_json::json!({ "answer": "doctor", "findings": findings });
        screen.text(&value, &show(&findings));
        let problem = findings.iter().any(|finding| finding.state == State::Problem);
        Ok(u8::from(problem))
    }
}

fn show(findings: &[Finding]) -> String {
    let mut text = String::new();
    for Finding { name, state, message, hint } in findings {
        let state = match state {
            State::Good => "good",
            State::Warning => "warning",
            State::Problem => "PROBLEM",
        };
        text.push_str(&format!("{state:<8} {name:<12} {message}\n"));
        if let Some(hint) = hint {
            text.push_str(&format!("{:21} hint: {hint}\n", ""));
        }
    }
    text
}

fn kernel() -> Finding {
    let release = process::kernel();
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse::<u32>);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(major)), Some(Ok(minor))) if (major, minor) >= KERNEL_MIN => {
            Finding::good("kernel", format!("Linux {release}"))
        }
        (Some(Ok(_)), Some(Ok(_))) => Finding::warning(
            "kernel",
            format!("Linux {release} is older than what this was built for"),
            format!("use {}.{} or newer", KERNEL_MIN.0, KERNEL_MIN.1),
        ),
        _ => Finding::warning("kernel", "its version is not known", "is /proc mounted?"),
    }
}

fn fuse_device() -> Finding {
    match fs::OpenOptions::new().read(true).write(true).open("/dev/fuse") {
        Ok(_) => Finding::good("FUSE", "/dev/fuse opens"),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Finding::problem(
            "FUSE",
            "there is no /dev/fuse, so nothing can be mounted",
            "'modprobe fuse' as root; in a container, pass the device in",
        ),
        Err(error) => Finding::problem(
            "FUSE",
            format!("/dev/fuse does not open: {error}"),
            "it needs mode 0666; in a container, allow the device",
        ),
    }
}

/// Looks for a program the way a shell does.
fn in_path(program: &str) -> Option<std::path::PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|dir| dir.join(program)).find(|file| file.is_file())
}

fn fusermount() -> Finding {
    use std::os::unix::fs::MetadataExt;
    let Some(path) = in_path("fusermount3") else {
        let hint = "Debian: apt install fuse3; Fedora: dnf install fuse3";
        return Finding::problem("fusermount3", "it is not installed", hint);
    };
    let setuid = fs::metadata(&path).is_ok_and(|meta| meta.uid() == 0 && meta.mode() & 0o4000 != 0);
    if setuid || rustix::process::geteuid().is_root() {
        return Finding::good("fusermount3", path.display().to_string());
    }
    let hint = format!("'chmod u+s {}' as root, or mount as root", path.display());
    Finding::problem("fusermount3", format!("{} is not setuid root", path.display()), hint)
}

fn allow_other() -> Finding {
    let text = fs::read_to_string("/etc/fuse.conf").unwrap_or_default();
    if rustix::process::geteuid().is_root() || text.lines().any(|line| line.trim() == "user_allow_other") {
        return Finding::good("allow-other", "mount --allow-other works");
    }
    let hint = "add the line user_allow_other to /etc/fuse.conf if others (such as libvirt) shall see the files";
    Finding::good("allow-other", format!("mount --allow-other is not allowed here; {hint}"))
}

fn qemu_img() -> Finding {
    match in_path("qemu-img") {
        Some(path) => Finding::good("qemu-img", path.display().to_string()),
        None => Finding::warning(
            "qemu-img",
            "it is not installed, so some images cannot be imported",
            "Debian: apt install qemu-utils; Fedora: dnf install qemu-img",
        ),
    }
}

fn open_files() -> Finding {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    match limit.maximum.or(limit.current) {
        Some(most) if most < OPEN_FILES_MIN => Finding::warning(
            "open files",
            format!("at most {most}, and a server with many segments and clients wants {OPEN_FILES_MIN}"),
            format!("'ulimit -Hn {OPEN_FILES_MIN}' or LimitNOFILE= in the unit"),
        ),
        Some(most) => Finding::good("open files", format!("up to {most}")),
        None => Finding::good("open files", "without limit"),
    }
}

fn look_at_pool(dir: &Path, findings: &mut Vec<Finding>) {
    let status = check_is_pool(dir).and_then(|pool| {
        let mut way = Way::find(&pool)?;
        let served = matches!(way, Way::Server(_));
        let status = way.ask(Request::Status {}, &Silent)?;
        way.close()?;
        Ok((served, status))
    });
    let (served, status) = match status {
        Ok((served, Response::Status(status))) => (served, status),
        Ok(_) => {
            return findings.push(Finding::problem(
                "pool",
                "its server gives answers that make no sense",
                "unmount it and mount it again with this version",
            ));
        }
        Err(error) => {
            let hint = error.next_step().unwrap_or("see afterimage-pool(7)").to_owned();
            return findings.push(Finding::problem("pool", error.message().to_owned(), hint));
        }
    };
    findings.push(match &status.health {
        None => Finding::good("pool", format!("{} ({})", status.pool, status.uuid)),
        Some(why) => Finding::problem(
            "pool",
            format!("it refuses writes: {why}"),
            "mend the cause, unmount it and mount it again: that reads what is really there",
        ),
    });
    if let Some(what) = &status.damage {
        findings.push(Finding::problem(
            "data",
            what.clone(),
            "'afterimage check' and 'afterimage scrub' say what is affected; everything else can be read and written",
        ));
    }
    if let Some(what) = &status.records {
        let hint = "'afterimage record import FILE' brings back a record you have a copy of; for a backup that needs another, \
                    take the next one in full and remove the retired snapshot; 'afterimage check' names each";
        findings.push(Finding::problem("records", what.clone(), hint));
    }
    findings.push(server(served, &status));
    findings.push(room(&status));
    if let Ok(Some(name)) = host::network_file_system(dir) {
        findings.push(Finding::warning(
            "file system",
            format!("the pool lies on a network file system ({name})"),
            "it may lose what it said was durable; move the pool to a local one",
        ));
    }
}

fn server(served: bool, status: &crate::api::answer::Status) -> Finding {
    if !served {
        return Finding::good("server", "none is running; commands open the pool themselves");
    }
    let at = status.mount.as_ref().map(|at| format!(", mounted at {at}")).unwrap_or_default();
    let message = format!("process {}, version {}{at}", status.pid, status.version);
    if status.version == env!("CARGO_PKG_VERSION") {
        return Finding::good("server", message);
    }
    let hint = "it is another version than this command; unmount and mount again to bring it up to date";
    Finding::warning("server", message, hint)
}

fn room(status: &crate::api::answer::Status) -> Finding {
    if let Some(why) = &status.full {
        return Finding::problem(
            "space",
            why.clone(),
            "new data is refused; remove snapshots or make room on the host",
        );
    }
    let (available, total) = (show_size(status.available), show_size(status.total));
    let message = format!("{} free of {total}, {available} for new data", show_size(status.free));
    let kept = status.free.saturating_sub(status.available);
    if status.available <= kept.saturating_mul(3) {
        return Finding::warning("space", message, "it runs short; remove snapshots or make room on the host");
    }
    Finding::good("space", message)
}
