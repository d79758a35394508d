//! The rules of the house that no compiler knows, read off the source tree.
//!
//! Each test collects everything that breaks its rule and names it with file and line, so that one run shows it all.
//!
//! # What is looked at
//! Rules about code look at code: comments are left out, and so is a `#[cfg(test)]` module at the end of a file where
//! the rule is about the program. Strings are not told apart; a rule that trips over one is worded around in the string.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Layers, lowest first: a module names its own layer and those before it.
const LAYERS: [&[&str]; 12] = [
    &["units", "codec", "error", "clock", "sync", "parallel", "workers", "budget", "metrics", "progress"],
    &["sys"],
    &["media"],
    &["pool"],
    &["map"],
    &["store"],
    &["snapshot", "disk"],
    &["stream", "export", "checkpoint"],
    &["archive", "memory"],
    &["tree", "nbd", "vhost_blk", "vmm", "console"],
    &["api"],
    &["cli"],
];
const LINES_MAX: usize = 600;
const HEADER_MIN: usize = 5;
const HEADINGS: [&str; 10] = [
    "Purpose",
    "Picture",
    "Fields",
    "Checksums",
    "Atomic step",
    "Invariants",
    "After a crash",
    "What we assume of the disk",
    "Limits",
    "Versions",
];

struct Source {
    /// Relative to the repository.
    path: String,
    text: String,
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn walk(dir: &Path, out: &mut Vec<PathBuf>) {
    let Ok(entries) = fs::read_dir(dir) else { return };
    for entry in entries {
        let path = entry.unwrap().path();
        // What tools put there themselves is not ours.
        if path.is_dir() && !path.ends_with("node_modules") {
            walk(&path, out);
        } else if path.is_file() {
            out.push(path);
        }
    }
    out.sort();
}

/// All files of these folders (or files) whose names end like that.
fn sources(places: &[&str], end: &str) -> Vec<Source> {
    let mut paths = Vec::new();
    for place in places {
        let path = root().join(place);
        if path.is_file() { paths.push(path) } else { walk(&path, &mut paths) }
    }
    let read = |path: PathBuf| {
        let text = fs::read(&path).unwrap();
        let path = path.strip_prefix(root()).unwrap().to_str().expect("names are ASCII").to_owned();
        Source { path, text: String::from_utf8_lossy(&text).into_owned() }
    };
    paths.into_iter().filter(|path| path.to_string_lossy().ends_with(end)).map(read).collect()
}

impl Source {
    /// The lines of code with their numbers, without comments.
    fn code(&self) -> impl Iterator<Item = (usize, &str)> {
        let lines = self.text.lines().enumerate().map(|(n, line)| (n + 1, line.split("//").next().unwrap_or("")));
        // "//" inside a string cuts the line short, which only hides the rest of it.
        lines.filter(|(_, line)| !line.trim().is_empty())
    }

    /// The same without the tests at the end of the file; nothing for a file that is all tests.
    fn program(&self) -> impl Iterator<Item = (usize, &str)> {
        // `#[cfg(test)]` before a `mod x;` is no end: what follows is program again.
        let next = self.text.lines().skip(1);
        let mut pairs = self.text.lines().zip(next);
        let end = pairs.position(|(line, next)| line == "#[cfg(test)]" && next.ends_with('{'));
        let upto = if self.all_tests() { 0 } else { end.unwrap_or(usize::MAX) };
        self.code().take_while(move |(n, _)| *n <= upto)
    }

    fn all_tests(&self) -> bool {
        self.path.ends_with("/tests.rs") || self.path.ends_with("/conformance.rs")
    }

    /// The first folder or file below `src`: the module the file belongs to.
    fn module(&self) -> &str {
        let below = self.path.strip_prefix("src/").unwrap_or(&self.path);
        below.split('/').next().unwrap_or("").trim_end_matches(".rs")
    }
}

fn layer(module: &str) -> Option<usize> {
    LAYERS.iter().position(|layer| layer.contains(&module))
}

/// Tells whether `word` stands in the line by itself.
fn has_word(line: &str, word: &str) -> bool {
    let part = |c: char| c.is_alphanumeric() || c == '_';
    line.match_indices(word).any(|(at, _)| {
        let after = line[at + word.len()..].chars().next();
        !line[..at].chars().next_back().is_some_and(part) && (word.ends_with(':') || !after.is_some_and(part))
    })
}

fn report(rule: &str, broken: &[String]) {
    assert!(broken.is_empty(), "{rule}:\n  {}", broken.join("\n  "));
}

/// The modules that a line names as `crate::x`, also in `use crate::{x, y::z}`.
fn named(line: &str) -> Vec<String> {
    let mut out = Vec::new();
    let name = |text: &str| text.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect::<String>();
    for (at, word) in line.match_indices("crate::") {
        let rest = &line[at + word.len()..];
        let Some(group) = rest.strip_prefix('{') else {
            out.push(name(rest));
            continue;
        };
        let mut depth = 0;
        let mut first = true;
        for (at, c) in group.char_indices() {
            match c {
                '{' => depth += 1,
                '}' if depth == 0 => break,
                '}' => depth -= 1,
                ',' if depth == 0 => first = true,
                c if first && !c.is_whitespace() => {
                    out.push(name(&group[at..]));
                    first = false;
                }
                _ => {}
            }
        }
    }
    out
}

#[test]
fn no_module_names_a_higher_layer() {
    let mut broken = Vec::new();
    for source in sources(&["src"], ".rs") {
        let module = source.module().to_owned();
        if module == "lib" || module == "main" {
            continue;
        }
        let Some(own) = layer(&module) else {
            broken
                .push(format!("{}: module '{module}' is in no layer; add it to LAYERS in tests/tidy.rs", source.path));
            continue;
        };
        for (line, code) in source.code() {
            for name in named(code) {
                if layer(&name).is_some_and(|other| other > own) {
                    broken.push(format!("{}:{line}: '{module}' names '{name}', which is above it", source.path));
                }
            }
        }
    }
    report("a layer names only itself and lower ones", &broken);
}

/// Fails for each line of the program that has one of the words outside the files that may.
fn only_in(rule: &str, words: &[&str], may: impl Fn(&Source) -> bool) {
    let mut broken = Vec::new();
    for source in sources(&["src"], ".rs").into_iter().filter(|source| !may(source)) {
        for (line, code) in source.program() {
            for word in words.iter().filter(|word| has_word(code, word)) {
                broken.push(format!("{}:{line}: {word}", source.path));
            }
        }
    }
    report(rule, &broken);
}

#[test]
fn clap_is_only_in_the_command_line() {
    only_in("clap only in src/cli", &["clap::", "clap_complete::", "clap_mangen::", "indicatif::"], |s| {
        s.module() == "cli"
    });
}

#[test]
fn fuser_is_only_in_its_adapter() {
    only_in("fuser only in src/tree/fuse*.rs", &["fuser::"], |s| s.path.starts_with("src/tree/fuse"));
}

#[test]
fn async_is_only_at_the_top() {
    let api = layer("api").expect("it is in the table");
    only_in(
        "tokio, axum and hyper only in src/api and above",
        &["tokio::", "axum::", "hyper::", "hyper_util::"],
        |s| layer(s.module()).is_some_and(|own| own >= api),
    );
}

#[test]
fn redb_is_only_in_the_catalog() {
    only_in("redb only in src/store/catalog.rs", &["redb::"], |s| s.path == "src/store/catalog.rs");
}

#[test]
fn printing_and_the_environment_are_only_in_the_command_line() {
    let words = ["println!", "eprintln!", "print!", "eprint!", "env::var", "env::var_os", "env::args", "env::args_os"];
    only_in("printing and the environment only in src/cli", &words, |s| s.module() == "cli");
    only_in("std::env only in src/cli", &["std::env"], |s| s.module() == "cli");
}

/// Files below `tree` that reach the host past `media`, and why they may. Above it nobody knows the name of a file of the
/// pool: there it is sockets, mounts, and what people name.
const PAST_MEDIA: [(&str, &str); 5] = [
    ("src/disk/import/", "images of others, which are only read"),
    ("src/checkpoint/flat.rs", "reads files of another program, outside the pool"),
    ("src/export/write.rs", "looks for and takes away a directory outside the pool; what is in it is written by media"),
    ("src/pool/lock.rs", "locks the directory before anything in it is opened"),
    ("src/pool/segment.rs", "hands on a descriptor that media opened"),
    ("src/store/locate.rs", "hands on a descriptor that media opened"),
];

/// A crash can only be simulated of I/O that the simulator sees.
#[test]
fn files_of_the_pool_are_reached_through_media() {
    let storage = layer("media").expect("it is in the table") + 1..layer("tree").expect("it is in the table");
    let ours = |source: &Source| layer(source.module()).is_some_and(|own| storage.contains(&own));
    let past = ["std::fs", "rustix::fs::open", "openat", "unlinkat", "renameat", "mkdirat", "linkat", "symlinkat"];
    only_in("files of the pool through media", &past, |source| {
        !ours(source) || PAST_MEDIA.iter().any(|(path, _)| source.path.starts_with(path))
    });
    let sources = sources(&["src"], ".rs");
    let used = |path: &str| {
        let mut of = sources.iter().filter(|source| source.path.starts_with(path));
        of.any(|source| source.program().any(|(_, code)| past.iter().any(|word| has_word(code, word))))
    };
    let idle: Vec<String> =
        PAST_MEDIA.iter().filter(|(path, _)| !used(path)).map(|(path, why)| format!("{path} ({why})")).collect();
    report("every exception is needed", &idle);
}

#[test]
fn unsafe_code_is_only_in_sys() {
    only_in("unsafe only in src/sys", &["unsafe"], |s| s.module() == "sys");
}

#[test]
fn every_file_begins_with_what_it_is() {
    let mut broken = Vec::new();
    for source in sources(&["src", "tests"], ".rs") {
        if !source.text.starts_with("//!") {
            broken.push(source.path);
        }
    }
    report("a file begins with a `//!` header", &broken);
}

#[test]
fn every_folder_opens_with_its_rules() {
    let mut broken = Vec::new();
    let mut folders = BTreeSet::new();
    for source in sources(&["src"], ".rs") {
        let folder = Path::new(&source.path).parent().unwrap().to_str().unwrap().to_owned();
        if folder != "src" {
            folders.insert(folder);
        }
    }
    for folder in folders {
        // A folder of parts may also stand beside its file: sim.rs and sim/.
        let beside = root().join(format!("{folder}.rs"));
        let inside = root().join(&folder).join("mod.rs");
        let nested = folder.matches('/').count() > 1;
        let door = if nested && beside.exists() { beside } else { inside };
        let text = fs::read_to_string(&door).unwrap_or_default();
        let header = text.lines().take_while(|line| line.starts_with("//!")).count();
        if header < HEADER_MIN {
            let door = door.strip_prefix(root()).unwrap().display();
            broken.push(format!("{door}: {header} lines of header, at least {HEADER_MIN} say what, rules and why"));
        }
    }
    report("a folder opens with a header", &broken);
}

#[test]
fn no_file_is_too_long() {
    let mut broken = Vec::new();
    for source in sources(&["src"], ".rs") {
        let lines = source.text.lines().count();
        if lines > LINES_MAX {
            broken.push(format!("{}: {lines} lines", source.path));
        }
    }
    report("a file of src has at most 600 lines", &broken);
}

#[test]
fn nothing_is_left_for_later() {
    // Put together here, so that this file does not name them.
    let words = [concat!("FIX", "ME"), concat!("X", "XX"), concat!("to", "do!"), concat!("unimplemented", "!(")];
    let mut broken = Vec::new();
    for source in sources(&["src", "tests"], ".rs").into_iter().chain(sources(&["src", "README.md"], ".md")) {
        for (n, line) in source.text.lines().enumerate() {
            for word in words.iter().filter(|word| line.contains(**word)) {
                broken.push(format!("{}:{}: {word}", source.path, n + 1));
            }
        }
    }
    report("no notes to finish something later", &broken);
}

#[test]
fn people_are_told_names_not_numbers() {
    let mut broken = Vec::new();
    for source in sources(&["src"], ".rs") {
        for (n, line) in source.program() {
            for word in ["disk {id}", "disk {}\", id", "snapshot {id}", "disk.id()", "head.id)"] {
                let told = line.contains('"') && ["tracing::", "Error::", "format!"].iter().any(|to| line.contains(to));
                if told && line.contains(word) {
                    broken.push(format!("{}:{n}: {word}", source.path));
                }
            }
        }
    }
    report("messages name disks and snapshots as people do", &broken);
}

#[test]
fn sources_are_ascii() {
    let mut broken = Vec::new();
    for end in [".rs", ".md", ".1", ".5", ".7", ".toml"] {
        for source in sources(&["src", "tests", "man", "README.md", "Cargo.toml"], end) {
            for (n, line) in source.text.lines().enumerate() {
                if let Some(c) = line.chars().find(|c| !c.is_ascii()) {
                    broken.push(format!("{}:{}: {}", source.path, n + 1, c.escape_unicode()));
                }
            }
        }
    }
    report("ASCII only; write other characters in strings as escapes", &broken);
}

#[test]
fn nothing_points_out_of_the_repository() {
    let words = [concat!("../", "shared"), concat!("/wo", "rk/"), concat!("issue", " #")];
    let mut broken = Vec::new();
    for end in [".rs", ".md", ".1", ".5", ".7", ".toml", ".sh", ".txt"] {
        for source in sources(&["src", "tests", "man", "fixtures", "README.md", "Cargo.toml", ".ci", ".cargo"], end) {
            for (n, line) in source.text.lines().enumerate() {
                for word in words.iter().filter(|word| line.contains(**word)) {
                    broken.push(format!("{}:{}: {word}", source.path, n + 1));
                }
            }
        }
    }
    report("a reader has only the repository", &broken);
}

#[test]
fn format_pages_have_their_headings() {
    let mut broken = Vec::new();
    for page in sources(&["src"], "FORMAT.md") {
        let found: Vec<&str> = page.text.lines().filter_map(|line| line.strip_prefix("## ")).collect();
        if found != HEADINGS {
            broken.push(format!("{}: {found:?}, not {HEADINGS:?}", page.path));
        }
        for (n, line) in page.text.lines().enumerate() {
            // rustdoc would run it.
            if line == "```" && page.text.lines().take(n).filter(|line| line.starts_with("```")).count() % 2 == 0 {
                broken.push(format!("{}:{}: a fence without a language", page.path, n + 1));
            }
        }
        let module = page.path.replace("FORMAT.md", "mod.rs");
        let text = fs::read_to_string(root().join(&module)).unwrap_or_default();
        if !text.contains("#![doc = include_str!(\"FORMAT.md\")]") {
            broken.push(format!("{module} does not include its FORMAT.md"));
        }
    }
    report("a FORMAT page has the fixed headings and is in rustdoc", &broken);
}

/// Follows `mod x;` from a root file.
fn reach(file: &Path, found: &mut BTreeSet<PathBuf>) {
    if !found.insert(file.to_owned()) {
        return;
    }
    let text = fs::read_to_string(file).unwrap();
    let stem = file.file_stem().unwrap().to_str().unwrap();
    let dir = file.parent().unwrap();
    let below = if ["mod", "lib", "main"].contains(&stem) { dir.to_owned() } else { dir.join(stem) };
    for line in text.lines() {
        let Some(head) = line.strip_suffix(';') else { continue };
        let mut words = head.split_whitespace().skip_while(|word| word.starts_with("pub"));
        let (Some("mod"), Some(name), None) = (words.next(), words.next(), words.next()) else { continue };
        for path in [below.join(format!("{name}.rs")), below.join(name).join("mod.rs")] {
            if path.exists() {
                reach(&path, found);
            }
        }
    }
}

#[test]
fn no_file_is_dead() {
    let mut found = BTreeSet::new();
    for start in ["src/lib.rs", "src/main.rs", "tests/main.rs"] {
        reach(&root().join(start), &mut found);
    }
    let mut broken = Vec::new();
    // Benches and the like that Cargo builds by themselves are named in Cargo.toml.
    let manifest = fs::read_to_string(root().join("Cargo.toml")).unwrap();
    for source in sources(&["src", "tests"], ".rs") {
        if !found.contains(&root().join(&source.path)) && !manifest.contains(&format!("\"{}\"", source.path)) {
            broken.push(source.path);
        }
    }
    report("every file is a module of the program or of the tests", &broken);
}

/// The rules can fail: each of these breaks one.
#[test]
fn the_readers_see_what_they_should() {
    assert_eq!(named("use crate::{a, b::{c, d}, e_f};"), ["a", "b", "e_f"]);
    assert_eq!(named("    fn x(y: &crate::store::Head) -> crate::units::Epoch {"), ["store", "units"]);
    assert_eq!(named("pub(crate) fn x()"), [""; 0]);
    assert!(
        has_word("    redb::Database", "redb::")
            && !has_word("    my_redb::X", "redb::")
            && !has_word("unsafe_code", "unsafe")
    );
    let text = "//! crate::cli\nlet a = 1; // crate::api\n#[cfg(test)]\nmod x;\nunsafe {}\n#[cfg(test)]\nmod tests {\n";
    let source = Source { path: "src/map/entry.rs".into(), text: text.into() };
    assert_eq!(source.module(), "map");
    assert_eq!(source.program().map(|(n, _)| n).collect::<Vec<_>>(), [2, 3, 4, 5]);
    assert_eq!(source.code().map(|(n, _)| n).collect::<Vec<_>>(), [2, 3, 4, 5, 6, 7]);
    assert!(layer("cli") > layer("api") && layer("map") < layer("store"));
}
