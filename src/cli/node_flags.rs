//! The flags of a running node, on the command line or in a file; flags win.

use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, Command};
use serde::Deserialize;

use super::Failure;
use crate::cluster::config::{DATA_DIR, HTTP, LISTEN, NodeConfig, RUN_DIR, Serve};
use crate::cluster::fault::Fault;
use crate::cluster::labels::{Of, nearest, parse_all};
use crate::registry::{Access, Location};
use crate::replication::ids::NodeName;

/// What a node may be told. The same names, in kebab case, are the keys of the file.
#[derive(Args, Clone, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub(super) struct Flags {
    /// The node's name, unique in the cluster
    #[arg(long)]
    name: Option<String>,
    /// Where copies, events and the embedded registry live [default: /var/lib/lockstep]
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// Where sockets live [default: /run/lockstep]
    #[arg(long, value_name = "DIR")]
    run_dir: Option<PathBuf>,
    /// Where to take replication connections [default: 127.0.0.1:5703]
    #[arg(long, value_name = "IP:PORT")]
    listen: Option<SocketAddr>,
    /// What other nodes use instead of --listen
    #[arg(long, value_name = "HOST:PORT")]
    advertise: Option<String>,
    /// Where to serve the dashboard, /metrics, /healthz and the read-only API [default: 127.0.0.1:5705]
    #[arg(long, value_name = "IP:PORT")]
    http: Option<SocketAddr>,
    /// The cluster's registry [default: sqlite:<data-dir>/registry.db]
    #[arg(long, value_name = "sqlite:PATH|etcd:http://H:2379[,http://H2:2379]")]
    registry: Option<String>,
    /// A file with USER:PASSWORD for etcd
    #[arg(long, value_name = "FILE")]
    etcd_credentials: Option<PathBuf>,
    /// Certificates: ca.pem, node.pem and node-key.pem for replication; etcd-ca.pem (or ca.pem), and etcd.pem with etcd-key.pem if
    /// etcd asks for them, for etcd over https
    #[arg(long, value_name = "DIR")]
    tls_dir: Option<PathBuf>,
    /// Let replication cross the network unencrypted, where others could read and change it; with certificates in --tls-dir,
    /// take both while a running cluster changes to TLS
    #[arg(long)]
    insecure_plaintext: bool,
    /// A label of the node; may be repeated
    #[arg(long, value_name = "K=V")]
    label: Vec<String>,
    /// Serve this volume; with a size, create it when it is absent; may be repeated
    #[arg(
        long,
        value_name = "VOLUME[,socket=PATH][,num-queues=N][,size=S][,replicas=R][,failure-mode=M]"
    )]
    vhost_user_blk: Vec<String>,
}

impl Flags {
    /// Reads a file.
    pub(super) fn of_file(path: &PathBuf) -> Result<Self, Failure> {
        let text = fs::read_to_string(path)
            .map_err(|e| Fault::input(format!("cannot read --config {}: {e}", path.display())))?;
        let wrong = |e: toml::de::Error| {
            Fault::input(format!("--config {}: {e}", path.display()))
                .hint("the keys are the flags without their dashes: name = \"n1\"")
        };
        let table: toml::Table = toml::from_str(&text).map_err(wrong)?;
        let command = Flags::augment_args(Command::new("node"));
        let keys: Vec<&str> = command
            .get_arguments()
            .filter_map(|a| a.get_long())
            .collect();
        if let Some(key) = table.keys().find(|key| !keys.contains(&key.as_str())) {
            let fault = Fault::input(format!(
                "--config {}: no flag is called {key}",
                path.display()
            ));
            return Err(match nearest(key, &keys) {
                Some(near) => fault.hint(format!("did you mean {near}?")),
                None => fault,
            }
            .into());
        }
        Ok(toml::from_str(&text).map_err(wrong)?)
    }

    /// These flags, and the file's where these say nothing. Of a label or volume named in both, these win.
    #[must_use]
    pub(super) fn or(self, file: Self) -> Self {
        Self {
            name: self.name.or(file.name),
            data_dir: self.data_dir.or(file.data_dir),
            run_dir: self.run_dir.or(file.run_dir),
            listen: self.listen.or(file.listen),
            advertise: self.advertise.or(file.advertise),
            http: self.http.or(file.http),
            registry: self.registry.or(file.registry),
            etcd_credentials: self.etcd_credentials.or(file.etcd_credentials),
            tls_dir: self.tls_dir.or(file.tls_dir),
            insecure_plaintext: self.insecure_plaintext || file.insecure_plaintext,
            label: merge(self.label, file.label, '='),
            vhost_user_blk: merge(self.vhost_user_blk, file.vhost_user_blk, ','),
        }
    }

    /// The same with this name where none is given.
    #[must_use]
    pub(super) fn named(self, name: &str) -> Self {
        Self {
            name: self.name.or_else(|| Some(name.into())),
            ..self
        }
    }

    /// The whole configuration, checked.
    pub(super) fn config(self) -> Result<NodeConfig, Failure> {
        let name = self.name.ok_or_else(|| {
            Failure::Usage(
                "a node needs a name: lockstep node --name n1 (or name = \"n1\" in --config)"
                    .into(),
            )
        })?;
        let data_dir = self.data_dir.unwrap_or_else(|| DATA_DIR.into());
        let registry = match self.registry {
            Some(text) => text
                .parse::<Location>()
                .map_err(|e| Fault::input(format!("--registry: {e}")))?,
            None => Location::embedded(&data_dir),
        };
        let serve = self
            .vhost_user_blk
            .iter()
            .map(|text| {
                text.parse::<Serve>().map_err(|fault| Fault {
                    message: format!("--vhost-user-blk {text}: {}", fault.message),
                    ..fault
                })
            })
            .collect::<Result<_, _>>()?;
        let config = NodeConfig {
            name: NodeName(name),
            data_dir,
            run_dir: self.run_dir.unwrap_or_else(|| RUN_DIR.into()),
            listen: self.listen.map_or_else(|| default(LISTEN), Ok)?,
            advertise: self.advertise,
            http: self.http.map_or_else(|| default(HTTP), Ok)?,
            registry,
            access: Access {
                tls_dir: self.tls_dir,
                credentials: self.etcd_credentials,
            },
            insecure_plaintext: self.insecure_plaintext,
            labels: parse_all(&self.label, Of::Node)?,
            serve,
        };
        Ok(config.check()?)
    }
}

fn default(address: &str) -> Result<SocketAddr, Fault> {
    address
        .parse()
        .map_err(|e| Fault::internal(format!("{address}: {e}")))
}

/// Both lists, without the file's items whose part before `separator` the flags name too.
fn merge(flags: Vec<String>, file: Vec<String>, separator: char) -> Vec<String> {
    let key = |item: &String| {
        item.split(separator)
            .next()
            .unwrap_or_default()
            .trim()
            .to_string()
    };
    let named: Vec<String> = flags.iter().map(key).collect();
    let mut all: Vec<String> = file
        .into_iter()
        .filter(|item| !named.contains(&key(item)))
        .collect();
    all.extend(flags);
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_flag_is_a_key_of_the_file() {
        let command = Flags::augment_args(Command::new("node"));
        let names: Vec<&str> = command
            .get_arguments()
            .filter_map(|a| a.get_long())
            .collect();
        assert!(names.len() >= 9, "{names:?}");
        for name in names {
            // One of these fits, whatever the type; a key that is not known fits none.
            let values = ["\"127.0.0.1:1\"", "[\"a=1\"]", "true", "1"];
            let known = values
                .iter()
                .any(|v| toml::from_str::<Flags>(&format!("{name} = {v}")).is_ok());
            assert!(known, "--{name} is no key of --config");
        }
    }

    #[test]
    fn flags_win_over_the_file() {
        let file: Flags = toml::from_str(
            "name = \"n1\"\ndata-dir = \"/d\"\nlisten = \"127.0.0.2:5703\"\nlabel = [\"a=1\", \"b=2\"]\n\
             vhost-user-blk = [\"vm1,size=1GiB\", \"vm2\"]\n",
        )
        .unwrap();
        let flags = Flags {
            name: Some("n2".into()),
            label: vec!["b=3".into()],
            vhost_user_blk: vec!["vm1,size=2GiB".into()],
            ..Flags::default()
        };
        let Ok(config) = flags.or(file).config() else {
            panic!("a good configuration was refused");
        };
        assert_eq!(config.name.0, "n2");
        assert_eq!(config.registry.to_string(), "sqlite:/d/registry.db");
        assert_eq!(config.labels["a"], "1");
        assert_eq!(config.labels["b"], "3");
        assert_eq!(config.serve.len(), 2);
        assert!(config.serve.iter().any(|s| s.size == Some(2 << 30)));
        assert!(toml::from_str::<Flags>("nmae = \"n1\"").is_err());
    }
}
