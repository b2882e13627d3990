//! TLS 1.3 below the greeting: each node proves with a certificate which node it is, by an authority that is the cluster's own.
//!
//! | file in `--tls-dir` | what it is |
//! | --- | --- |
//! | `ca.pem` | the authority; nobody else is believed |
//! | `node.pem` | this node's certificate, with the node's name as a DNS name |
//! | `node-key.pem` | its key |

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;

use rustls::client::verify_server_name;
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use rustls::version::TLS13;
use rustls::{ClientConfig, ClientConnection, RootCertStore, ServerConfig};

use crate::replication::ids::NodeName;

const CA_FILE: &str = "ca.pem";
const CERT_FILE: &str = "node.pem";
const KEY_FILE: &str = "node-key.pem";
/// What the first byte of a TLS connection is (RFC 8446, 5.1: a handshake record). A greeting begins with another one.
pub const FIRST_BYTE: u8 = 22;

/// What is said when the other node ends a handshake without a word: one without TLS does not even understand it.
pub const ENDED: &str = "it ended the TLS handshake: does it run with --tls-dir, and with the same authority in its ca.pem?";

/// How connections between nodes are secured.
#[derive(Clone, Debug)]
pub enum Security {
    /// Not at all.
    Plaintext,
    /// By TLS; nothing else is spoken or taken.
    Tls(Keys),
    /// While a running cluster changes to TLS: both are taken, and TLS is tried first.
    Either(Keys),
}

/// A node's certificate and whom it believes, for both ends of a connection.
#[derive(Clone, Debug)]
pub struct Keys {
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
}

/// Whether `dir` has what a node needs to prove who it is; a directory may hold etcd's files alone.
pub fn has_keys(dir: &Path) -> bool {
    dir.join(CERT_FILE).exists() || dir.join(KEY_FILE).exists()
}

impl Security {
    /// What node `me` of a cluster uses, from the files in its `--tls-dir`.
    ///
    /// # Errors
    ///
    /// For the person who starts it: which file is missing, cannot be read, or does not fit the others or `me`.
    pub fn load(
        dir: Option<&Path>,
        insecure_plaintext: bool,
        me: &NodeName,
    ) -> Result<Self, String> {
        let Some(dir) = dir.filter(|dir| has_keys(dir)) else {
            return Ok(Self::Plaintext);
        };
        let keys = Keys::load(dir, me)?;
        Ok(match insecure_plaintext {
            false => Self::Tls(keys),
            true => Self::Either(keys),
        })
    }

    /// What a node that takes connections needs; `None`: it speaks no TLS.
    pub fn server(&self) -> Option<Arc<ServerConfig>> {
        self.keys().map(|keys| Arc::clone(&keys.server))
    }

    /// What a node that connects needs; `None`: it speaks no TLS.
    pub fn client(&self) -> Option<Arc<ClientConfig>> {
        self.keys().map(|keys| Arc::clone(&keys.client))
    }

    fn keys(&self) -> Option<&Keys> {
        match self {
            Self::Plaintext => None,
            Self::Tls(keys) | Self::Either(keys) => Some(keys),
        }
    }

    /// Whether a connection without TLS will do.
    pub fn takes_plaintext(&self) -> bool {
        !matches!(self, Self::Tls(_))
    }

    /// The connecting end of a session with `node`; `None`: without TLS.
    ///
    /// # Errors
    ///
    /// The node's name cannot be in a certificate.
    pub fn connect(&self, node: &NodeName) -> Result<Option<ClientConnection>, String> {
        let Some(config) = self.client() else {
            return Ok(None);
        };
        ClientConnection::new(config, server_name(node)?)
            .map(Some)
            .map_err(|e| format!("no TLS with node {node}: {e}"))
    }

    /// Whether whoever connected may be `node`. `proof`: the certificates it showed, its own first; `None`: it speaks no TLS.
    ///
    /// # Errors
    ///
    /// Why not, for the person at the other end.
    pub fn admit(
        &self,
        proof: Option<&[CertificateDer<'_>]>,
        node: &NodeName,
    ) -> Result<(), String> {
        match proof {
            Some(chain) => is_of(chain, node),
            None if self.takes_plaintext() => Ok(()),
            None => Err(format!(
                "connections without TLS are not taken: start node {node} with --tls-dir"
            )),
        }
    }
}

impl Keys {
    fn load(dir: &Path, me: &NodeName) -> Result<Self, String> {
        let roots = Arc::new(authorities(&dir.join(CA_FILE))?);
        let (certificate, key) = (dir.join(CERT_FILE), dir.join(KEY_FILE));
        if fs::metadata(&key).is_ok_and(|m| m.mode() & 0o007 != 0) {
            return Err(format!(
                "{} can be read by everybody: chmod 600 {0}",
                key.display()
            ));
        }
        let (chain, secret) = identity(&certificate, &key)?;
        is_of(&chain, me).map_err(|why| format!("{}: {why}", certificate.display()))?;
        let unfit =
            |e: rustls::Error| format!("{} and {}: {e}", certificate.display(), key.display());
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let client = ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&[&TLS13])
            .map_err(unfit)?
            .with_root_certificates(Arc::clone(&roots))
            .with_client_auth_cert(chain.clone(), secret.clone_key())
            .map_err(unfit)?;
        let verifier = WebPkiClientVerifier::builder_with_provider(roots, Arc::clone(&provider))
            .build()
            .map_err(|e| format!("{}: {e}", dir.join(CA_FILE).display()))?;
        let mut server = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&TLS13])
            .map_err(unfit)?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain, secret)
            .map_err(unfit)?;
        // Connections last for days: nothing is won by taking an old session up again.
        server.send_tls13_tickets = 0;
        Ok(Self {
            client: Arc::new(client),
            server: Arc::new(server),
        })
    }
}

/// What the certificate of `node` is to be for.
///
/// # Errors
///
/// The node's name cannot be in a certificate.
pub fn server_name(node: &NodeName) -> Result<ServerName<'static>, String> {
    ServerName::try_from(node.0.clone()).map_err(|_| {
        format!("node name {node} is no DNS name: with TLS, give nodes names that a certificate can have")
    })
}

/// Whether a certificate is one of node `node`.
fn is_of(chain: &[CertificateDer<'_>], node: &NodeName) -> Result<(), String> {
    let own = chain.first().ok_or("no certificate")?;
    let parsed = ParsedCertificate::try_from(own).map_err(|e| e.to_string())?;
    verify_server_name(&parsed, &server_name(node)?).map_err(|_| {
        format!(
            "the certificate is not of node {node}: it needs DNS:{node} among its subject alternative names"
        )
    })
}

/// The authorities of a PEM file. Nobody else is trusted.
///
/// # Errors
///
/// The file cannot be read, or holds none.
pub fn authorities(path: &Path) -> Result<RootCertStore, String> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(path)? {
        roots
            .add(certificate)
            .map_err(|e| format!("{}: {e}", path.display()))?;
    }
    Ok(roots)
}

/// A certificate, with those between it and the authority, and its key.
///
/// # Errors
///
/// One of the files cannot be read, or holds none.
pub fn identity(
    certificate: &Path,
    key: &Path,
) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>), String> {
    let secret = PrivateKeyDer::from_pem_file(key).map_err(|e| unreadable(key, &e))?;
    Ok((certificates(certificate)?, secret))
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let all = CertificateDer::pem_file_iter(path)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|e| unreadable(path, &e))?;
    if all.is_empty() {
        return Err(format!("{} holds no certificate in PEM", path.display()));
    }
    Ok(all)
}

fn unreadable(path: &Path, error: &pem::Error) -> String {
    format!("{} cannot be read: {error}", path.display())
}
