//! Increment directories, applied by the script that is in them with the shells that are installed.

mod apply;
mod history;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use afterimage::export::{Increment, Member, Part, Plan, Planner, Side};
use afterimage::snapshot::diff::Extent;
use uuid::Uuid;

const BLOCK: usize = 4096;

/// How the script is run.
#[derive(Debug, Clone, Copy)]
pub struct Shell {
    words: &'static [&'static str],
    /// The only programs there are; all of the host when empty.
    programs: &'static [&'static str],
}

const COREUTILS: &[&str] = &["cksum", "dd", "dirname", "head", "mv", "stat", "sync", "truncate", "wc"];

/// The shells to try: every one that is installed, and dash with nothing but coreutils.
pub fn shells() -> Vec<Shell> {
    let all = [
        Shell { words: &["dash"], programs: &[] },
        Shell { words: &["dash"], programs: COREUTILS },
        Shell { words: &["bash", "--posix"], programs: &[] },
        Shell { words: &["busybox", "sh"], programs: &[] },
    ];
    let there: Vec<Shell> = all.into_iter().filter(|shell| find(shell.words[0]).is_some()).collect();
    let has = |name: &str| there.iter().any(|shell| shell.words[0] == name);
    for name in ["dash", "busybox"] {
        crate::real::require(has(name), name);
    }
    there
}

fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap();
    std::env::split_paths(&path).map(|dir| dir.join(program)).find(|at| at.is_file())
}

/// A folder with an image to bring from state to state.
pub struct Bench {
    dir: tempfile::TempDir,
}

impl Bench {
    fn new() -> Self {
        Self { dir: tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap() }
    }

    /// Makes one in memory where the host has such a place: on a disk 65,536 files are removed slowly.
    pub fn in_memory() -> Self {
        tempfile::tempdir_in("/dev/shm").map_or_else(|_| Self::new(), |dir| Self { dir })
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Returns the command `apply` of a directory.
    fn command(&self, shell: Shell, dir: &str, words: &[&str]) -> Command {
        let mut command = Command::new(find(shell.words[0]).unwrap());
        command.args(&shell.words[1..]).arg(format!("{dir}/apply")).args(words).current_dir(self.dir.path());
        if !shell.programs.is_empty() {
            let few = self.path("programs");
            if !few.exists() {
                fs::create_dir(&few).unwrap();
                for program in shell.programs {
                    std::os::unix::fs::symlink(find(program).unwrap(), few.join(program)).unwrap();
                }
            }
            command.env("PATH", few);
        }
        command
    }

    fn apply(&self, shell: Shell, dir: &str, words: &[&str]) -> Output {
        self.command(shell, dir, words).output().unwrap()
    }

    #[track_caller]
    pub fn applies(&self, shell: Shell, dir: &str, words: &[&str]) -> String {
        let output = self.apply(shell, dir, words);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && said.is_empty(), "{shell:?} {dir} {words:?}: {}: {said}", output.status);
        String::from_utf8(output.stdout).unwrap()
    }

    #[track_caller]
    fn refuses(&self, shell: Shell, dir: &str, words: &[&str]) -> String {
        let output = self.apply(shell, dir, words);
        assert!(!output.status.success(), "{shell:?} {dir} {words:?}: {}", String::from_utf8_lossy(&output.stdout));
        String::from_utf8(output.stderr).unwrap()
    }

    /// Writes the directory that leads from one image to another.
    fn export(&self, name: &str, from: Option<(u128, &[u8])>, to: (u128, &[u8])) -> Increment {
        let increment = Increment {
            from: from.map(|(id, image)| side(id, image)),
            to: side(to.0, to.1),
            plan: plan(from.map(|(_, image)| image), to.1),
        };
        self.write(name, &increment, to.1);
        increment
    }

    fn write(&self, name: &str, increment: &Increment, image: &[u8]) {
        let dir = self.path(name);
        fs::create_dir(&dir).unwrap();
        let bytes = |part: Part| &image[part.offset as usize..part.end() as usize];
        let sums = increment
            .sums(|buf, offset| {
                buf.copy_from_slice(&image[offset as usize..offset as usize + buf.len()]);
                Ok(())
            })
            .unwrap();
        for member in increment.members() {
            let content = match member {
                Member::Data(part) => bytes(part).to_vec(),
                Member::Zeros => increment.zeros_text().into(),
                Member::Manifest => increment.manifest_text(&sums).into(),
                Member::Cksums => increment.cksums_text(&sums).into(),
                Member::Apply => increment.apply_text().into(),
            };
            assert_eq!(content.len() as u64, increment.len(member), "{member:?}");
            fs::write(dir.join(member.name()), content).unwrap();
        }
    }
}

/// Does what the script does, with an image in memory.
pub fn apply_in_memory(dir: &Path, image: &mut Vec<u8>) {
    let manifest: serde_json::Value = serde_json::from_slice(&fs::read(dir.join("manifest.json")).unwrap()).unwrap();
    image.resize(manifest["to"]["size"].as_u64().unwrap() as usize, 0);
    for file in manifest["files"].as_array().unwrap() {
        let data = fs::read(dir.join(file["name"].as_str().unwrap())).unwrap();
        let offset = file["offset"].as_u64().unwrap() as usize;
        image[offset..offset + data.len()].copy_from_slice(&data);
    }
    for range in fs::read_to_string(dir.join("zeros")).unwrap().lines() {
        let (offset, length) = range.split_once(' ').unwrap();
        let (offset, length): (usize, usize) = (offset.parse().unwrap(), length.parse().unwrap());
        image[offset..offset + length].fill(0);
    }
}

fn side(id: u128, image: &[u8]) -> Side {
    Side {
        disk: "web".into(),
        disk_uuid: Uuid::nil(),
        snapshot: format!("s {id}'"),
        uuid: Uuid::from_u128(id),
        size: image.len() as u64,
        created: 1,
    }
}

/// The plan from the bytes of both sides.
fn plan(from: Option<&[u8]>, to: &[u8]) -> Plan {
    let mut planner = Planner::default();
    let mut offset = 0;
    for block in to.chunks(BLOCK) {
        let old = from.and_then(|image| image.get(offset..offset + block.len()));
        if old != Some(block) {
            let zero = block.iter().all(|byte| *byte == 0);
            planner.push(Extent { offset: offset as u64, length: block.len() as u64, zero });
        }
        offset += block.len();
    }
    planner.finish()
}

/// Numbers that look random.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % limit
    }

    fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| self.below(256) as u8).collect()
    }
}

/// Puts the checksums of a directory in order after a file of it was changed on purpose.
fn cksum(dir: &Path, names: &[&str]) -> String {
    let output = Command::new("cksum").args(names).current_dir(dir).output().unwrap();
    String::from_utf8(output.stdout).unwrap()
}
