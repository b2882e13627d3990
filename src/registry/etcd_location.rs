//! Where etcd is, and what proves to each side who the other is.

use std::fmt;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::ClientConfig;

use crate::wire::tls::{authorities, identity};

/// etcd's own default for its clients.
const PORT: u16 = 2379;
/// Members that may be named. etcd advises against more than seven.
const ENDPOINTS_MAX: usize = 16;
/// Under which all keys of lockstep lie, whatever else is kept in the same etcd.
const ROOT: &str = "/lockstep";
/// The cluster's part of it when the location names none.
const SPACE: &str = "default";
/// The longest name of a part: keys stay well below [`super::KEY_MAX`].
const SPACE_MAX: usize = 63;
/// Those that sign etcd's certificates; the first that is there is taken.
const CA_FILES: [&str; 2] = ["etcd-ca.pem", "ca.pem"];
/// Our certificate for etcd, if it asks for one, and its key.
const CERT_FILE: &str = "etcd.pem";
const KEY_FILE: &str = "etcd-key.pem";

/// One member's address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// Whether it speaks TLS.
    pub tls: bool,
    /// Its name or address; an IPv6 address without its brackets.
    pub host: String,
    /// Its port for clients.
    pub port: u16,
}

/// `etcd:http://H:2379[,http://H2:2379…][/NAME]`: members of one etcd, and the cluster's part of its keys.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EtcdLocation {
    /// Its members, as many as are known; the first that answers is used.
    pub endpoints: Vec<Endpoint>,
    /// Several lockstep clusters share one etcd under different names.
    pub space: String,
}

/// What opening a registry may take besides its location.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Access {
    /// Holds `etcd-ca.pem` (or `ca.pem`), and `etcd.pem` with `etcd-key.pem` if etcd asks for a certificate.
    pub tls_dir: Option<PathBuf>,
    /// A file with `USER:PASSWORD`.
    pub credentials: Option<PathBuf>,
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.tls { "https" } else { "http" };
        match self.host.contains(':') {
            true => write!(f, "{scheme}://[{}]:{}", self.host, self.port),
            false => write!(f, "{scheme}://{}:{}", self.host, self.port),
        }
    }
}

impl fmt::Display for EtcdLocation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("etcd:")?;
        for (i, endpoint) in self.endpoints.iter().enumerate() {
            let comma = if i > 0 { "," } else { "" };
            write!(f, "{comma}{endpoint}")?;
        }
        match self.space.as_str() {
            SPACE => Ok(()),
            other => write!(f, "/{other}"),
        }
    }
}

impl EtcdLocation {
    /// Reads what follows `etcd:`; the error says what is wrong with it.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        // The last `/` is the name's, unless it is the scheme's.
        let (members, space) = match text.rsplit_once('/') {
            Some((members, name)) if !members.is_empty() && !members.ends_with('/') => {
                (members, name)
            }
            _ => (text, SPACE),
        };
        let known = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        if space.is_empty() || space.len() > SPACE_MAX || !space.chars().all(known) {
            return Err(format!(
                "'{space}' is no name for the cluster's part of etcd (letters, digits, '-', '_' and '.')"
            ));
        }
        let endpoints = members
            .split(',')
            .map(endpoint)
            .collect::<Result<Vec<_>, _>>()?;
        if endpoints.len() > ENDPOINTS_MAX {
            return Err(format!("at most {ENDPOINTS_MAX} members may be named"));
        }
        if endpoints.iter().any(|e| e.tls != endpoints[0].tls) {
            return Err("name all members with http: or all with https:".into());
        }
        Ok(Self {
            endpoints,
            space: space.into(),
        })
    }

    /// What all keys begin with.
    pub(super) fn prefix(&self) -> String {
        format!("{ROOT}/{}/", self.space)
    }

    /// Whether its members speak TLS.
    pub(super) fn is_tls(&self) -> bool {
        self.endpoints.iter().any(|e| e.tls)
    }
}

fn endpoint(text: &str) -> Result<Endpoint, String> {
    let (tls, rest) = match (text.strip_prefix("http://"), text.strip_prefix("https://")) {
        (Some(rest), _) => (false, rest),
        (_, Some(rest)) => (true, rest),
        _ => {
            return Err(format!(
                "'{text}' begins neither with http: nor with https:"
            ));
        }
    };
    if rest.contains('@') {
        // Not shown again: logs and process lists have seen enough of it.
        return Err(
            "a user and password do not belong on a command line: put USER:PASSWORD into a file and name it with \
             --etcd-credentials"
                .into(),
        );
    }
    let bad = || format!("'{text}' is not http://HOST:PORT");
    let (host, port) = match rest.strip_prefix('[') {
        Some(v6) => {
            let (host, after) = v6.split_once(']').ok_or_else(bad)?;
            if host.parse::<std::net::Ipv6Addr>().is_err() {
                return Err(bad());
            }
            (
                host,
                after.strip_prefix(':').or(after.is_empty().then_some("")),
            )
        }
        None => match rest.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (rest, Some("")),
        },
    };
    let port = match port.ok_or_else(bad)? {
        "" => PORT,
        digits => digits.parse().map_err(|_| bad())?,
    };
    let known = |c: char| c.is_ascii_alphanumeric() || "-_.:".contains(c);
    if host.is_empty() || port == 0 || !host.chars().all(known) {
        return Err(bad());
    }
    Ok(Endpoint {
        tls,
        host: host.into(),
        port,
    })
}

/// What TLS with etcd needs, from the files in `dir`. Nobody is trusted but those that the CA file names.
pub(super) fn tls(dir: &Path) -> Result<ClientConfig, String> {
    let ca = CA_FILES
        .iter()
        .map(|name| dir.join(name))
        .find(|path| path.exists())
        .ok_or_else(|| {
            format!(
                "{} has neither {} nor {}: put the certificate of the authority that signed etcd's there",
                dir.display(),
                CA_FILES[0],
                CA_FILES[1]
            )
        })?;
    let roots = authorities(&ca)?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|e| e.to_string())?
        .with_root_certificates(roots);
    let (certificate, key) = (dir.join(CERT_FILE), dir.join(KEY_FILE));
    let mut config = match (certificate.exists(), key.exists()) {
        (false, false) => builder.with_no_client_auth(),
        (true, true) => {
            let (chain, secret) = identity(&certificate, &key)?;
            builder
                .with_client_auth_cert(chain, secret)
                .map_err(|e| format!("{} and {}: {e}", certificate.display(), key.display()))?
        }
        _ => {
            return Err(format!(
                "{} has only one of {CERT_FILE} and {KEY_FILE}: etcd needs both, or neither",
                dir.display()
            ));
        }
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(config)
}

/// User and password from a file that nobody else may read. Read anew at each log-in, so that the password can be
/// changed under a running node.
pub(super) fn credentials(path: &Path) -> Result<(String, String), String> {
    let failed = |e: std::io::Error| format!("{} cannot be read: {e}", path.display());
    let mode = fs::metadata(path).map_err(failed)?.mode();
    if mode & 0o007 != 0 {
        return Err(format!(
            "{} can be read by everybody: chmod 600 {0}",
            path.display()
        ));
    }
    let text = fs::read_to_string(path).map_err(failed)?;
    match text.trim_end_matches(['\r', '\n']).split_once(':') {
        Some((user, password)) if !user.is_empty() && !password.contains('\n') => {
            Ok((user.into(), password.into()))
        }
        _ => Err(format!("{} is not one line USER:PASSWORD", path.display())),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn members_are_read_with_their_defaults() {
        let one = EtcdLocation::parse("http://127.0.0.1:2379").unwrap();
        assert_eq!(one.prefix(), "/lockstep/default/");
        assert!(!one.is_tls());
        let three =
            EtcdLocation::parse("https://a,https://b.example:23790,https://[::1]/blue").unwrap();
        assert_eq!(three.prefix(), "/lockstep/blue/");
        assert!(three.is_tls());
        assert_eq!(
            three.to_string(),
            "etcd:https://a:2379,https://b.example:23790,https://[::1]:2379/blue"
        );
        for (bad, why) in [
            ("", "begins neither"),
            ("127.0.0.1:2379", "begins neither"),
            ("ftp://a", "begins neither"),
            ("http://", "HOST:PORT"),
            ("http://a:0", "HOST:PORT"),
            ("http://a:x", "HOST:PORT"),
            ("http://a b", "HOST:PORT"),
            ("http://[::1", "HOST:PORT"),
            ("http://[a]:1", "HOST:PORT"),
            ("http://a,", "begins neither"),
            ("http://a,https://b", "all with https"),
            ("http://a/", "name"),
            ("http://a/b c", "name"),
            ("http://u:p@a", "--etcd-credentials"),
        ] {
            let error = EtcdLocation::parse(bad).unwrap_err();
            assert!(error.contains(why), "{bad}: {error}");
        }
    }

    #[test]
    fn credentials_are_for_our_eyes_only() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("user");
        let write = |text: &str, mode| {
            fs::write(&path, text).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            credentials(&path)
        };
        let (user, password) = write("lockstep:a:b c\n", 0o600).unwrap();
        assert_eq!((user.as_str(), password.as_str()), ("lockstep", "a:b c"));
        assert!(write("u:p", 0o640).is_ok());
        assert!(write("u:p", 0o644).unwrap_err().contains("chmod 600"));
        for bad in ["", ":p", "user", "a:b\nc:d\n"] {
            let error = write(bad, 0o600).unwrap_err();
            assert!(error.contains("USER:PASSWORD"), "{bad}: {error}");
        }
    }

    #[test]
    fn a_tls_directory_says_what_it_lacks() {
        let dir = tempfile::tempdir().unwrap();
        let error = || tls(dir.path()).unwrap_err();
        assert!(error().contains("etcd-ca.pem"), "{}", error());
        fs::write(dir.path().join("ca.pem"), "not PEM").unwrap();
        assert!(error().contains("holds no certificate"), "{}", error());
    }
}
