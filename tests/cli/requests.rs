//! The JSON of requests: pinned, because programs write it.

use std::collections::BTreeMap;

use afterimage::api::{Keep, Request, Response};
use afterimage::checkpoint::{Checkpoint, DiskInfo, Fault, RegionInfo, VerifyReport};
use afterimage::disk::{Damage, ScrubReport};
use afterimage::pool::ExportKind;
use afterimage::store::{CheckReport, Problem, RebuildReport, RebuiltDisk};
use afterimage::stream::{ReceiveReport, SendReport};

fn golden() -> Vec<(Request, &'static str)> {
    let web = || "web".to_owned();
    let monday = || "web@monday".to_owned();
    let keep = Keep { last: 3, daily: 7, ..Keep::default() };
    let settings = BTreeMap::from([("enospc".to_owned(), "wait".to_owned()), ("quota".to_owned(), "1G".to_owned())]);
    vec![
        (Request::Create { disk: web(), size: 512 }, r#"{"command":"create","disk":"web","size":512}"#),
        (Request::Ls { disk: None }, r#"{"command":"ls"}"#),
        (Request::Ls { disk: Some(web()) }, r#"{"command":"ls","disk":"web"}"#),
        (Request::Info { name: monday() }, r#"{"command":"info","name":"web@monday"}"#),
        (
            Request::Resize { disk: web(), size: u64::MAX, shrink: true },
            r#"{"command":"resize","disk":"web","size":18446744073709551615,"shrink":true}"#,
        ),
        (Request::Rename { old: web(), new: "db".into() }, r#"{"command":"rename","old":"web","new":"db"}"#),
        (Request::Rm { name: web(), recursive: false }, r#"{"command":"rm","name":"web"}"#),
        (Request::Rm { name: web(), recursive: true }, r#"{"command":"rm","name":"web","recursive":true}"#),
        (Request::Snapshot { snapshots: vec![monday()] }, r#"{"command":"snapshot","snapshots":["web@monday"]}"#),
        (
            Request::Clone { snapshot: monday(), disk: "new".into() },
            r#"{"command":"clone","snapshot":"web@monday","disk":"new"}"#,
        ),
        (Request::Revert { snapshot: monday(), keep: None }, r#"{"command":"revert","snapshot":"web@monday"}"#),
        (
            Request::Revert { snapshot: monday(), keep: Some("k".into()) },
            r#"{"command":"revert","snapshot":"web@monday","keep":"k"}"#,
        ),
        (
            Request::Hold { snapshot: monday(), tag: "user".into() },
            r#"{"command":"hold","snapshot":"web@monday","tag":"user"}"#,
        ),
        (
            Request::Release { snapshot: monday(), tag: "t".into() },
            r#"{"command":"release","snapshot":"web@monday","tag":"t"}"#,
        ),
        (
            Request::Prune { disk: web(), keep, dry_run: true },
            r#"{"command":"prune","disk":"web","keep":{"last":3,"daily":7},"dry_run":true}"#,
        ),
        (
            Request::Set { disk: web(), settings },
            r#"{"command":"set","disk":"web","settings":{"enospc":"wait","quota":"1G"}}"#,
        ),
        (Request::Get { disk: web() }, r#"{"command":"get","disk":"web"}"#),
        (Request::Check { repair: false, rebuild: false }, r#"{"command":"check"}"#),
        (Request::Check { repair: true, rebuild: false }, r#"{"command":"check","repair":true}"#),
        (Request::Scrub {}, r#"{"command":"scrub"}"#),
        (Request::Reclaim { wait: true }, r#"{"command":"reclaim","wait":true}"#),
        (Request::Metrics {}, r#"{"command":"metrics"}"#),
        (
            Request::MountExport { snapshot: monday(), path: "/m".into(), allow_other: false },
            r#"{"command":"mount-export","snapshot":"web@monday","path":"/m"}"#,
        ),
        (
            Request::Attach {
                kind: ExportKind::Nbd,
                disks: vec![web(), monday()],
                socket: Some("/s".into()),
                listen: None,
                tls_cert: None,
                tls_key: None,
                tls_ca: None,
                unprotected: false,
                read_only: false,
                queues: None,
                persist: false,
            },
            r#"{"command":"attach","kind":"nbd","disks":["web","web@monday"],"socket":"/s"}"#,
        ),
        (
            Request::Attach {
                kind: ExportKind::VhostUser,
                disks: vec![web()],
                socket: None,
                listen: Some("[::1]:1".into()),
                tls_cert: Some("/c".into()),
                tls_key: Some("/k".into()),
                tls_ca: Some("/r".into()),
                unprotected: true,
                read_only: true,
                queues: Some(2),
                persist: true,
            },
            concat!(
                r#"{"command":"attach","kind":"vhost-user","disks":["web"],"listen":"[::1]:1","tls_cert":"/c","#,
                r#""tls_key":"/k","tls_ca":"/r","unprotected":true,"read_only":true,"queues":2,"persist":true}"#
            ),
        ),
        (Request::Detach { name: "3".into() }, r#"{"command":"detach","name":"3"}"#),
        (
            Request::AttachVm { vm: web(), disk: monday(), read_only: true, claim: None },
            r#"{"command":"attach-vm","vm":"web","disk":"web@monday","read_only":true}"#,
        ),
        (
            Request::AttachVm { vm: web(), disk: web(), read_only: false, claim: Some("disk-1".into()) },
            r#"{"command":"attach-vm","vm":"web","disk":"web","claim":"disk-1"}"#,
        ),
        (Request::DetachVm { vm: web() }, r#"{"command":"detach-vm","vm":"web"}"#),
        (Request::Exports {}, r#"{"command":"exports"}"#),
        (Request::Flush {}, r#"{"command":"flush"}"#),
        (
            Request::Import { path: "/i".into(), format: Some("raw".into()), disk: web() },
            r#"{"command":"import","path":"/i","format":"raw","disk":"web"}"#,
        ),
        (
            Request::Export { from: Some(monday()), to: "web@tuesday".into(), path: "/d".into() },
            r#"{"command":"export","from":"web@monday","to":"web@tuesday","path":"/d"}"#,
        ),
        (
            Request::Send {
                snapshot: Some(monday()),
                from: Some("web@sunday".into()),
                resume: None,
                no_compress: false,
                output: "/p".into(),
            },
            r#"{"command":"send","snapshot":"web@monday","from":"web@sunday","output":"/p"}"#,
        ),
        (
            Request::Send {
                snapshot: None,
                from: None,
                resume: Some("01ff".into()),
                no_compress: true,
                output: "/p".into(),
            },
            r#"{"command":"send","resume":"01ff","no_compress":true,"output":"/p"}"#,
        ),
        (
            Request::Receive { disk: web(), name: Some("n".into()), force: true, input: "/p".into() },
            r#"{"command":"receive","disk":"web","name":"n","force":true,"input":"/p"}"#,
        ),
        (Request::ReceiveToken { disk: web() }, r#"{"command":"receive-token","disk":"web"}"#),
        (Request::ReceiveAbort { disk: web() }, r#"{"command":"receive-abort","disk":"web"}"#),
        (Request::CheckpointLs { machine: None }, r#"{"command":"checkpoint-ls"}"#),
        (Request::CheckpointLs { machine: Some("vm".into()) }, r#"{"command":"checkpoint-ls","machine":"vm"}"#),
        (Request::CheckpointInfo { checkpoint: "vm@a".into() }, r#"{"command":"checkpoint-info","checkpoint":"vm@a"}"#),
        (
            Request::CheckpointVerify { checkpoint: "vm@a".into() },
            r#"{"command":"checkpoint-verify","checkpoint":"vm@a"}"#,
        ),
        (
            Request::CheckpointDisks { checkpoint: "vm@a".into(), disks: vec!["web".into()] },
            r#"{"command":"checkpoint-disks","checkpoint":"vm@a","disks":["web"]}"#,
        ),
        (
            Request::CheckpointForget { checkpoint: "vm@a".into() },
            r#"{"command":"checkpoint-forget","checkpoint":"vm@a"}"#,
        ),
        (Request::CheckpointRm { checkpoint: "vm@a".into() }, r#"{"command":"checkpoint-rm","checkpoint":"vm@a"}"#),
        (
            Request::CheckpointSave {
                checkpoint: "vm@b".into(),
                memory: "/m".into(),
                state: "/s".into(),
                disks: vec![monday()],
                parent: Some("vm@a".into()),
            },
            concat!(
                r#"{"command":"checkpoint-save","checkpoint":"vm@b","memory":"/m","state":"/s","#,
                r#""disks":["web@monday"],"parent":"vm@a"}"#
            ),
        ),
        (
            Request::CheckpointFlatten { checkpoint: "vm@a".into() },
            r#"{"command":"checkpoint-flatten","checkpoint":"vm@a"}"#,
        ),
        (Request::Status {}, r#"{"command":"status"}"#),
        (Request::Shutdown {}, r#"{"command":"shutdown"}"#),
    ]
}

#[test]
fn requests_are_written_and_read_as_ever() {
    for (request, json) in golden() {
        assert_eq!(serde_json::to_string(&request).unwrap(), json);
        assert_eq!(serde_json::from_str::<Request>(json).unwrap(), request);
    }
}

/// The structs of the core that are answers as they are: their fields are what programs read.
#[test]
fn reports_are_written_as_ever() {
    let uuid = uuid::Uuid::from_u128(7);
    let damage = Damage { disk: "d".into(), snapshot: None, offset: 1, segment: 2, why: "w".into() };
    let rebuilt = RebuiltDisk { disk: "d".into(), snapshots: 1, referenced: 2, live: None, lost: vec!["l".into()] };
    let golden = [
        (
            Response::Checked(CheckReport {
                problems: vec![Problem { what: "w".into(), fixed: true }],
                found: 7,
                unmended: 8,
                disks: 1,
                snapshots: 2,
                segments: 3,
                blocks: 4,
                leaked: 5,
                kept: 6,
                notes: vec!["n".into()],
            }),
            r#"{"answer":"checked","problems":[{"what":"w","fixed":true}],"found":7,"unmended":8,"disks":1,"snapshots":2,"segments":3,"blocks":4,"leaked":5,"kept":6,"notes":["n"]}"#,
        ),
        (
            Response::Scrubbed(ScrubReport { blocks: 1, bytes: 2, unverified: 3, damaged: vec![damage], more: 4 }),
            r#"{"answer":"scrubbed","blocks":1,"bytes":2,"unverified":3,"damaged":[{"disk":"d","snapshot":null,"offset":1,"segment":2,"why":"w"}],"more":4}"#,
        ),
        (
            Response::Rebuilt(RebuildReport {
                rebuilt: true,
                complete: false,
                source: Some("s".into()),
                frames: 1,
                kept: None,
                unnamed: 2,
                disks: vec![rebuilt],
                notes: vec!["n".into()],
            }),
            r#"{"answer":"rebuilt","rebuilt":true,"complete":false,"source":"s","frames":1,"kept":null,"unnamed":2,"disks":[{"disk":"d","snapshots":1,"referenced":2,"live":null,"lost":["l"]}],"notes":["n"]}"#,
        ),
        (
            Response::Sent(SendReport {
                disk: "d".into(),
                snapshot: "s".into(),
                uuid,
                base: None,
                start: 1,
                data: 2,
                zeros: 3,
                stream: 4,
                unverified: 5,
            }),
            r#"{"answer":"sent","disk":"d","snapshot":"s","uuid":"00000000-0000-0000-0000-000000000007","base":null,"start":1,"data":2,"zeros":3,"stream":4,"unverified":5}"#,
        ),
        (
            Response::Received(ReceiveReport {
                disk: "d".into(),
                snapshot: "s".into(),
                uuid,
                base: Some(uuid),
                start: 1,
                data: 2,
                zeros: 3,
                kept: None,
            }),
            r#"{"answer":"received","disk":"d","snapshot":"s","uuid":"00000000-0000-0000-0000-000000000007","base":"00000000-0000-0000-0000-000000000007","start":1,"data":2,"zeros":3,"kept":null}"#,
        ),
    ];
    for (answer, json) in golden.into_iter().chain(checkpoint_answers()) {
        assert_eq!(serde_json::to_string(&answer).unwrap(), json);
        assert_eq!(serde_json::from_str::<Response>(json).unwrap(), answer);
    }
}

fn checkpoint_answers() -> [(Response, &'static str); 3] {
    let uuid = uuid::Uuid::from_u128(7);
    let checkpoint = Checkpoint {
        machine: "vm".into(),
        name: "a".into(),
        damage: None,
        uuid: Some(uuid),
        created: 1,
        memory: 2,
        stored: 3,
        allocated: 4,
        page_block: 5,
        storage_block: 6,
        stored_blocks: 7,
        zero_blocks: 8,
        inherited_blocks: 9,
        storage_blocks: 10,
        hot_blocks: 11,
        maker: "m".into(),
        state_version: 12,
        state_bytes: 13,
        regions: vec![RegionInfo { address: 14, bytes: 15 }],
        disks: vec![DiskInfo { snapshot: "d@s".into(), disk_uuid: uuid, uuid }],
        parent: Some("vm@b".into()),
        children: vec!["vm@c".into()],
    };
    let fault = Fault {
        file: "f".into(),
        page_block: Some(1),
        address: Some(2),
        storage_block: Some(3),
        offset: None,
        why: "w".into(),
    };
    let checkpoints = vec![Checkpoint { damage: Some("d".into()), ..Checkpoint::default() }];
    [
        (
            Response::Checkpoint(Box::new(checkpoint)),
            r#"{"answer":"checkpoint","machine":"vm","name":"a","damage":null,"uuid":"00000000-0000-0000-0000-000000000007","created":1,"memory":2,"stored":3,"allocated":4,"page_block":5,"storage_block":6,"stored_blocks":7,"zero_blocks":8,"inherited_blocks":9,"storage_blocks":10,"hot_blocks":11,"maker":"m","state_version":12,"state_bytes":13,"regions":[{"address":14,"bytes":15}],"disks":[{"snapshot":"d@s","disk_uuid":"00000000-0000-0000-0000-000000000007","uuid":"00000000-0000-0000-0000-000000000007"}],"parent":"vm@b","children":["vm@c"]}"#,
        ),
        (
            Response::Checkpoints { checkpoints },
            r#"{"answer":"checkpoints","checkpoints":[{"machine":"","name":"","damage":"d","uuid":null,"created":0,"memory":0,"stored":0,"allocated":0,"page_block":0,"storage_block":0,"stored_blocks":0,"zero_blocks":0,"inherited_blocks":0,"storage_blocks":0,"hot_blocks":0,"maker":"","state_version":0,"state_bytes":0,"regions":[],"disks":[],"parent":null,"children":[]}]}"#,
        ),
        (
            Response::CheckpointVerified(VerifyReport {
                checkpoint: "vm@a".into(),
                files: 1,
                stored_blocks: 2,
                bytes: 3,
                faults: vec![fault],
                more: 4,
            }),
            r#"{"answer":"checkpoint-verified","checkpoint":"vm@a","files":1,"stored_blocks":2,"bytes":3,"faults":[{"file":"f","page_block":1,"address":2,"storage_block":3,"offset":null,"why":"w"}],"more":4}"#,
        ),
    ]
}

#[test]
fn unknown_fields_are_refused_in_every_request() {
    for (_, json) in golden() {
        let json = format!(r#"{},"recusrive":true}}"#, &json[..json.len() - 1]);
        let error = serde_json::from_str::<Request>(&json).unwrap_err().to_string();
        assert!(error.contains("recusrive"), "{json}: {error}");
    }
    serde_json::from_str::<Request>(r#"{"command":"prune","disk":"d","keep":{"lats":3}}"#).unwrap_err();
    serde_json::from_str::<Request>(r#"{"command":"init"}"#).unwrap_err();
}

#[test]
fn the_tag_of_a_hold_has_a_default() {
    let request: Request = serde_json::from_str(r#"{"command":"hold","snapshot":"a@b"}"#).unwrap();
    assert_eq!(request, Request::Hold { snapshot: "a@b".into(), tag: "user".into() });
}

#[test]
fn the_page_lists_every_request_and_answer() {
    let page = std::fs::read_to_string(super::man_dir().join("afterimage-api.5")).unwrap();
    for (request, _) in golden() {
        let value = serde_json::to_value(&request).unwrap();
        let command = value["command"].as_str().unwrap();
        assert!(page.contains(&format!(".B {command}")) || page.contains(&format!("\\fB{command}")), "{command}");
        for field in value.as_object().unwrap().keys().filter(|key| *key != "command") {
            assert!(page.contains(field.as_str()), "{command}: {field}");
        }
    }
}

/// One kind of error was missing in the page: programs that match on the kind did not know of it.
#[test]
fn every_kind_of_error_is_in_the_page_with_its_exit_code() {
    let page = std::fs::read_to_string(super::man_dir().join("afterimage-api.5")).unwrap();
    for kind in afterimage::error::Kind::ALL {
        let (name, code) = (kind.name().replace('-', "\\-"), kind.exit_code().to_string());
        let told = page.lines().any(|line| {
            let cells: Vec<_> = line.split('\t').collect();
            matches!(cells[..], [kind, status, exit] if kind == name && exit == code && status.parse::<u16>().is_ok())
        });
        assert!(told, "{name} with exit code {code}");
    }
}
