//! TLS: forced where it is configured, with and without certificates of clients.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::sync::Arc;

use afterimage::disk::BlockDevice;
use afterimage::error::Kind;
use afterimage::nbd::option::{self, Choice, GREETING, OPTION_REPLY, OptionReply, kind, reply};
use afterimage::nbd::{self, Listen, Options, Server, Tls};

use super::{MIB, Pool, Rig, content};
use crate::real::{command, require_programs, run, shell};
use crate::tree::noise;

/// Makes a CA, and certificates for a server and a client with the names that libnbd and QEMU want.
fn certificates(dir: &Path) {
    let script = r#"
cd "$1"
new() {
  openssl req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -keyout "$1-key.pem" -subj "/CN=$1" "${@:2}" 2>&1
}
new ca -x509 -days 30 -out ca-cert.pem
printf 'subjectAltName=DNS:localhost,IP:127.0.0.1\n' > ext
for name in server client; do
  new $name -out $name.csr
  openssl x509 -req -in $name.csr -CA ca-cert.pem -CAkey ca-key.pem -CAcreateserial -days 30 -extfile ext \
    -out $name-cert.pem 2>&1
done
"#;
    shell(script, &[dir.as_os_str()]);
}

/// Starts a second server of the pool, on a port, with TLS.
fn start(rig: &Rig, dir: &Path, ask_clients: bool) -> (Server, String) {
    let ca = ask_clients.then(|| dir.join("ca-cert.pem"));
    let tls = Tls::load(&dir.join("server-cert.pem"), &dir.join("server-key.pem"), ca.as_deref()).unwrap();
    let limits = super::limits(8);
    let options = Options { listen: Listen::Tcp("127.0.0.1:0".parse().unwrap()), tls: Some(tls), limits };
    let server = nbd::start(options, Arc::new(Pool(Arc::clone(&rig.store)))).unwrap();
    let port = server.address().rsplit(':').next().unwrap().to_owned();
    (server, port)
}

#[test]
fn real_clients_talk_tls_and_copy_through_it() {
    if !require_programs(&["openssl", "nbdinfo", "nbdcopy", "qemu-img"]) {
        return;
    }
    let rig = Rig::new();
    let disk = rig.disk("a", 24 * MIB);
    disk.write(&noise(8 << 20, 3), 4 * MIB).unwrap();
    let dir = rig.file("pki");
    std::fs::create_dir(&dir).unwrap();
    certificates(&dir);
    let shown = dir.display();
    for ask_clients in [false, true] {
        let (server, port) = start(&rig, &dir, ask_clients);
        let uri = format!("nbds://localhost:{port}/a?tls-certificates={shown}");
        let told: serde_json::Value = serde_json::from_str(&run("nbdinfo", ["--json", &uri])).unwrap();
        assert_eq!((&told["TLS"], &told["exports"][0]["export-size"]), (&true.into(), &(24 * MIB).into()));
        let out = rig.file("out.raw");
        run("nbdcopy", [&uri, out.to_str().unwrap()]);
        assert!(std::fs::read(&out).unwrap() == content(&*disk));
        rig.disk(&format!("b{ask_clients}"), 24 * MIB);
        let back = format!("nbds://localhost:{port}/b{ask_clients}?tls-certificates={shown}");
        run("nbdcopy", [out.to_str().unwrap(), &back]);
        let copy = afterimage::disk::open(&rig.store, &format!("b{ask_clients}")).unwrap();
        assert!(content(&*copy) == content(&*disk));
        let creds = format!("tls-creds-x509,id=t,dir={shown},endpoint=client");
        let image = format!("driver=nbd,host=localhost,port={port},export=a,tls-creds=t");
        let file = format!("driver=file,filename={}", out.display());
        run("qemu-img", ["compare", "--object", &creds, "--image-opts", &image, &file]);
        // Who does not want TLS learns nothing, and who has no certificate is not let in if one is asked for.
        let plain = command("nbdinfo", ["--size", &format!("nbd://localhost:{port}/a")]).output().unwrap();
        assert!(!plain.status.success());
        let bare = rig.file(&format!("bare{ask_clients}"));
        std::fs::create_dir(&bare).unwrap();
        std::fs::copy(dir.join("ca-cert.pem"), bare.join("ca-cert.pem")).unwrap();
        let uri = format!("nbds://localhost:{port}/a?tls-certificates={}", bare.display());
        let bare = command("nbdinfo", ["--size", &uri]).output().unwrap();
        assert_eq!(bare.status.success(), !ask_clients, "{}", String::from_utf8_lossy(&bare.stderr));
        server.stop();
    }
}

#[test]
fn before_tls_nothing_is_told_and_after_it_garbage_ends_the_connection() {
    if !require_programs(&["openssl"]) {
        return;
    }
    let rig = Rig::new();
    rig.disk("a", MIB);
    let dir = rig.file("pki");
    std::fs::create_dir(&dir).unwrap();
    certificates(&dir);
    let (server, _) = start(&rig, &dir, false);
    let greet = || {
        let mut stream = TcpStream::connect(server.address()).unwrap();
        stream.read_exact(&mut [0; GREETING]).unwrap();
        stream.write_all(&3u32.to_be_bytes()).unwrap();
        stream
    };
    let ask = |stream: &mut TcpStream, kind, data: &[u8]| {
        stream.write_all(&option::option(kind, data)).unwrap();
        let mut header = [0; OPTION_REPLY];
        stream.read_exact(&mut header).unwrap();
        let header = OptionReply::decode(&header).unwrap();
        stream.read_exact(&mut vec![0; header.length as usize]).unwrap();
        header.kind
    };
    let mut stream = greet();
    let choice = Choice { name: "a".into(), infos: Vec::new() }.encode();
    for (kind, data) in
        [(kind::LIST, &[][..]), (kind::INFO, &choice), (kind::GO, &choice), (kind::STRUCTURED_REPLY, &[])]
    {
        assert_eq!(ask(&mut stream, kind, data), reply::ERR_TLS_REQD);
    }
    assert_eq!(ask(&mut stream, kind::STARTTLS, b"x"), reply::ERR_INVALID);
    assert_eq!(ask(&mut stream, kind::STARTTLS, &[]), reply::ACK);
    // What is sent in the clear after that is no hello.
    stream.write_all(&option::option(kind::LIST, &[])).unwrap();
    stream.read_to_end(&mut Vec::new()).ok();
    let mut stream = greet();
    stream.write_all(&option::option(kind::EXPORT_NAME, b"a")).unwrap();
    assert_eq!(stream.read(&mut [0; 1]).unwrap_or(0), 0);
    for seed in 0..100 {
        let mut stream = greet();
        assert_eq!(ask(&mut stream, kind::STARTTLS, &[]), reply::ACK);
        let mut bytes = noise(300, seed);
        if seed % 2 == 0 {
            // Looks like a hello at first.
            bytes.splice(..6, [0x16, 3, 1, 0, 200, 1]);
        }
        stream.write_all(&bytes).ok();
        stream.shutdown(std::net::Shutdown::Write).ok();
        stream.read_to_end(&mut Vec::new()).ok();
    }
    assert_eq!(ask(&mut greet(), kind::STARTTLS, &[]), reply::ACK);
}

#[test]
fn files_that_are_not_what_they_should_be_are_named() {
    if !require_programs(&["openssl"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    certificates(dir.path());
    let path = |name: &str| dir.path().join(name);
    let load = |certificate: &str, key: &str, ca: Option<&str>| {
        let ca = ca.map(path);
        Tls::load(&path(certificate), &path(key), ca.as_deref()).map(|_| ())
    };
    load("server-cert.pem", "server-key.pem", Some("ca-cert.pem")).unwrap();
    let cases = [
        (load("missing.pem", "server-key.pem", None), Kind::NotFound, "missing.pem"),
        (load("server-key.pem", "server-key.pem", None), Kind::Usage, "holds no certificate"),
        (load("server-cert.pem", "server-cert.pem", None), Kind::Usage, "holds no private key"),
        (load("server-cert.pem", "client-key.pem", None), Kind::Usage, "cannot be used"),
        (load("server-cert.pem", "server-key.pem", Some("ext")), Kind::Usage, "holds no certificate"),
    ];
    for (result, kind, said) in cases {
        let error = result.unwrap_err();
        assert!(error.kind() == kind && error.to_string().contains(said), "{error}");
    }
}
