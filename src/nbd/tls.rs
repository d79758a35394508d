//! TLS for the server: its certificate, and who may connect.
//!
//! # Rules
//! 1. Where it is configured it is forced: a client that has not said STARTTLS learns nothing, not even names.
//! 2. With a CA the client must show a certificate that leads to it. Without one anybody may connect who reaches the port.

use std::path::Path;
use std::sync::Arc;

use rustls::crypto::ring::default_provider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig, ServerConnection};

use crate::error::{Error, Result};

/// The configuration of a server.
#[derive(Debug, Clone)]
pub struct Tls {
    config: Arc<ServerConfig>,
}

impl Tls {
    /// Reads the files, all of them PEM: the certificate with those that lead to its root, its key, and, to ask clients
    /// for certificates, the roots of these.
    ///
    /// # Errors
    /// When a file cannot be read or does not hold what it should; when key and certificate do not belong together.
    pub fn load(certificate: &Path, key: &Path, ca: Option<&Path>) -> Result<Self> {
        let chain = certificates(certificate)?;
        let shown = key.display();
        let private = PrivateKeyDer::from_pem_slice(&read(key)?).map_err(|e| {
            Error::usage(format!("{shown} holds no private key: {e}"))
                .hint("it is a PEM file with a section PRIVATE KEY, without a passphrase")
        })?;
        let provider = Arc::new(default_provider());
        let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .map_err(|e| Error::failed(format!("cannot use TLS: {e}")))?;
        let builder = match ca {
            None => builder.with_no_client_auth(),
            Some(ca) => {
                let mut roots = RootCertStore::empty();
                let refuse = |e: &dyn std::fmt::Display| Error::usage(format!("{} is no CA: {e}", ca.display()));
                for root in certificates(ca)? {
                    roots.add(root).map_err(|e| refuse(&e))?;
                }
                let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build();
                builder.with_client_cert_verifier(verifier.map_err(|e| refuse(&e))?)
            }
        };
        let config = builder.with_single_cert(chain, private).map_err(|e| {
            Error::usage(format!("{} and {shown} cannot be used: {e}", certificate.display()))
                .hint("the key must be that of the first certificate in the file")
        })?;
        Ok(Self { config: Arc::new(config) })
    }

    /// Begins a connection.
    ///
    /// # Errors
    /// When the configuration does not allow any.
    pub(super) fn accept(&self) -> Result<ServerConnection> {
        ServerConnection::new(Arc::clone(&self.config)).map_err(|e| Error::failed(format!("cannot begin TLS: {e}")))
    }
}

fn read(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).map_err(|e| Error::io(format!("cannot read {}", path.display()), e))
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>> {
    let bytes = read(path)?;
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&bytes).collect();
    match found {
        Ok(found) if !found.is_empty() => Ok(found),
        Ok(_) => Err(Error::usage(format!("{} holds no certificate", path.display()))
            .hint("it is a PEM file with a section CERTIFICATE")),
        Err(error) => Err(Error::usage(format!("{} is damaged: {error}", path.display()))),
    }
}
