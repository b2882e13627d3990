//! What a node is told when it starts.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;

use super::fault::Fault;
use super::labels::{Of, check};
use super::model::{Labels, VolumeName, check_name};
use super::settings::{check_num_queues, check_size, parse_failure_mode};
use super::units::parse_size;
use crate::registry::{Access, Location};
use crate::replication::ids::NodeName;
use crate::wire::tls::{Security, has_keys};

/// Default of `--data-dir`.
pub const DATA_DIR: &str = "/var/lib/lockstep";
/// Default of `--run-dir`.
pub const RUN_DIR: &str = "/run/lockstep";
/// Default of `--listen`.
pub const LISTEN: &str = "127.0.0.1:5703";
/// Default of `--http`.
pub const HTTP: &str = "127.0.0.1:5705";
/// The API's socket in the run directory.
pub const API_SOCKET: &str = "api.sock";

/// A node's configuration, complete and checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeConfig {
    /// Its name in the cluster.
    pub name: NodeName,
    /// Where copies, events and the embedded registry live.
    pub data_dir: PathBuf,
    /// Where sockets live.
    pub run_dir: PathBuf,
    /// Where it takes replication connections.
    pub listen: SocketAddr,
    /// `HOST:PORT` that other nodes use instead of `listen`.
    pub advertise: Option<String>,
    /// Where it serves HTTP.
    pub http: SocketAddr,
    /// The cluster's registry.
    pub registry: Location,
    /// What proves to it who we are, and to us who it is.
    pub access: Access,
    /// Replication may be read and changed by whoever is on the network.
    pub insecure_plaintext: bool,
    /// Its labels.
    pub labels: Labels,
    /// Volumes to create when absent and to serve from here.
    pub serve: Vec<Serve>,
}

impl NodeConfig {
    /// Checks what no single flag shows.
    pub fn check(mut self) -> Result<Self, Fault> {
        check_name(&self.name.0)?;
        self.labels = check(self.labels, Of::Node)?;
        let is_public = !self.listen.ip().is_loopback();
        if self.registry.is_of_one_machine() && is_public {
            return Err(Fault::input(format!(
                "--listen {} can be reached from other machines, and the registry {} serves the nodes of this one only",
                self.listen, self.registry
            ))
            .hint(
                "listen on a loopback address (127.0.0.1, 127.0.0.2, …), or use etcd: --registry etcd:http://HOST:2379",
            ));
        }
        let has_keys = self.access.tls_dir.as_deref().is_some_and(has_keys);
        if let Some(dir) = &self.access.tls_dir
            && !has_keys
            && !self.registry.is_tls()
        {
            // Whoever names a directory means to be encrypted.
            return Err(Fault::input(format!(
                "--tls-dir {} has neither node.pem nor node-key.pem",
                dir.display()
            ))
            .hint("put this node's certificate and key there, and ca.pem (docs/OPERATIONS.md), or leave --tls-dir out"));
        }
        if is_public && !has_keys && !self.insecure_plaintext {
            return Err(Fault::input(format!(
                "--listen {} can be reached from other machines, and replication would not be encrypted",
                self.listen
            ))
            .hint(
                "give --tls-dir with ca.pem, node.pem and node-key.pem, or --insecure-plaintext if nobody else is on the \
                 network between the nodes",
            ));
        }
        if is_public && self.http.ip().is_loopback() {
            let reached = SocketAddr::new(self.listen.ip(), self.http.port());
            return Err(Fault::input(format!(
                "--listen {} can be reached from other machines, and --http {} cannot: other nodes ask there how this one \
                 is, and would find themselves",
                self.listen, self.http
            ))
            .hint(format!("give --http {reached}")));
        }
        if self.listen.ip().is_unspecified() && self.advertise.is_none() {
            return Err(Fault::input(format!(
                "--listen {} is every address of this machine, and other nodes need one of them",
                self.listen
            ))
            .hint(format!(
                "give --advertise HOST:{}, by which other machines reach this one",
                self.listen.port()
            )));
        }
        if let Some(advertise) = &self.advertise {
            let port = advertise
                .rsplit_once(':')
                .map(|(_, port)| port.parse::<u16>());
            if !matches!(port, Some(Ok(1..))) {
                return Err(Fault::input(format!(
                    "--advertise {advertise} is not HOST:PORT"
                )));
            }
            let address = advertise.parse::<SocketAddr>();
            if address.is_ok_and(|a| a.ip().is_unspecified()) {
                return Err(Fault::input(format!(
                    "--advertise {advertise} is no address of a machine"
                ))
                .hint("give the name or address by which other machines reach this one"));
            }
        }
        for (i, serve) in self.serve.iter().enumerate() {
            if self.serve[..i].iter().any(|s| s.name == serve.name) {
                return Err(Fault::input(format!(
                    "--vhost-user-blk names {} twice",
                    serve.name
                )));
            }
        }
        Ok(self)
    }

    /// How connections with other nodes are secured.
    ///
    /// # Errors
    ///
    /// Files of `--tls-dir` are missing, cannot be read, or do not fit each other or the node.
    pub fn security(&self) -> Result<Security, Fault> {
        let dir = self.access.tls_dir.as_deref();
        Security::load(dir, self.insecure_plaintext, &self.name)
            .map_err(|why| Fault::input(format!("--tls-dir: {why}")))
    }

    /// Where the management API listens.
    pub fn api_socket(&self) -> PathBuf {
        self.run_dir.join(API_SOCKET)
    }
}

/// A value of `--vhost-user-blk`: `VOLUME[,socket=PATH][,num-queues=N][,size=10GiB][,replicas=2][,failure-mode=soft]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Serve {
    /// The volume.
    pub name: VolumeName,
    /// Where to listen instead of the default.
    pub socket: Option<PathBuf>,
    /// Virtqueues.
    pub num_queues: Option<u16>,
    /// Its size, in bytes; needed when it does not exist yet.
    pub size: Option<u64>,
    /// R.
    pub replicas: Option<u8>,
    /// As text, so that a difference is reported in the user's words.
    pub failure_mode: Option<String>,
}

impl FromStr for Serve {
    type Err = Fault;

    fn from_str(text: &str) -> Result<Self, Fault> {
        let (name, options) = text.split_once(',').unwrap_or((text, ""));
        let mut serve = Self {
            name: name.parse()?,
            socket: None,
            num_queues: None,
            size: None,
            replicas: None,
            failure_mode: None,
        };
        let number = |key: &str, value: &str| -> Result<u16, Fault> {
            value
                .parse()
                .map_err(|_| Fault::input(format!("{key}={value}: not a number")))
        };
        for option in options.split(',').filter(|o| !o.is_empty()) {
            match option.split_once('=') {
                Some(("socket", path)) if !path.is_empty() => serve.socket = Some(path.into()),
                Some(("num-queues", n)) => {
                    serve.num_queues = Some(check_num_queues(number("num-queues", n)?)?);
                }
                Some(("size", size)) => serve.size = Some(check_size(parse_size(size)?)?),
                Some(("replicas", n)) => {
                    let n = number("replicas", n)?;
                    serve.replicas = Some(u8::try_from(n).unwrap_or(u8::MAX));
                }
                Some(("failure-mode", mode)) => {
                    parse_failure_mode(mode)?;
                    serve.failure_mode = Some(mode.into());
                }
                _ => {
                    return Err(Fault::input(format!(
                        "'{option}' is not an option of --vhost-user-blk: \
                         use socket=, num-queues=, size=, replicas= or failure-mode="
                    )));
                }
            }
        }
        super::settings::Wishes {
            replicas: serve.replicas,
            ..Default::default()
        }
        .replicas()?;
        Ok(serve)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_served_volume_is_named_with_its_options() {
        let serve: Serve =
            "prod/vm1,size=10GiB,replicas=2,failure-mode=hard,num-queues=4,socket=/s"
                .parse()
                .unwrap();
        assert_eq!(serve.name.to_string(), "prod/vm1");
        assert_eq!(serve.size, Some(10 << 30));
        assert_eq!(serve.replicas, Some(2));
        assert_eq!(serve.num_queues, Some(4));
        assert_eq!(serve.socket, Some("/s".into()));
        assert_eq!("vm1".parse::<Serve>().unwrap().size, None);
        for bad in [
            "",
            "vm1,size",
            "vm1,size=0",
            "vm1,replicas=6",
            "vm1,replicas=x",
            "vm1,num-queues=0",
            "vm1,failure-mode=perhaps",
            "vm1,color=red",
            "../vm1",
        ] {
            assert!(bad.parse::<Serve>().is_err(), "{bad}");
        }
    }

    fn config(listen: &str) -> NodeConfig {
        NodeConfig {
            name: NodeName("n1".into()),
            data_dir: "/d".into(),
            run_dir: "/r".into(),
            listen: listen.parse().unwrap(),
            advertise: None,
            http: HTTP.parse().unwrap(),
            registry: Location::embedded("/d".as_ref()),
            access: Access::default(),
            insecure_plaintext: false,
            labels: Labels::new(),
            serve: Vec::new(),
        }
    }

    #[test]
    fn a_registry_of_one_machine_forbids_listening_to_others() {
        assert!(config("127.0.0.2:5703").check().is_ok());
        assert!(config("[::1]:5703").check().is_ok());
        for public in ["0.0.0.0:5703", "10.0.0.1:5703", "[::]:5703"] {
            let fault = config(public).check().unwrap_err();
            assert!(fault.message.contains("--listen"), "{fault}");
            let plain = NodeConfig {
                insecure_plaintext: true,
                ..config(public)
            };
            assert!(plain.check().is_err());
        }
    }

    #[test]
    fn with_etcd_a_node_listens_to_others_if_told_that_all_can_listen_in() {
        let etcd = |listen: &str| NodeConfig {
            registry: "etcd:http://10.0.0.9:2379".parse().unwrap(),
            ..config(listen)
        };
        assert!(etcd("127.0.0.2:5703").check().is_ok());
        let fault = etcd("10.0.0.1:5703").check().unwrap_err();
        let hint = fault.hint.unwrap_or_default();
        assert!(hint.contains("--insecure-plaintext"), "{hint}");
        let told = NodeConfig {
            insecure_plaintext: true,
            http: "10.0.0.1:5705".parse().unwrap(),
            ..etcd("10.0.0.1:5703")
        };
        assert!(told.check().is_ok());
    }

    #[test]
    fn with_a_certificate_a_node_listens_to_others_and_a_directory_without_one_is_a_mistake() {
        let dir = tempfile::tempdir().unwrap();
        let with = |registry: &str| NodeConfig {
            registry: registry.parse().unwrap(),
            access: Access {
                tls_dir: Some(dir.path().into()),
                ..Access::default()
            },
            http: "10.0.0.1:5705".parse().unwrap(),
            ..config("10.0.0.1:5703")
        };
        let (plain, tls) = ("etcd:http://10.0.0.9:2379", "etcd:https://10.0.0.9:2379");
        let fault = with(plain).check().unwrap_err();
        assert!(fault.message.contains("neither node.pem"), "{fault}");
        // It may be there for etcd alone.
        let fault = with(tls).check().unwrap_err();
        assert!(fault.message.contains("--listen"), "{fault}");
        std::fs::write(dir.path().join("node.pem"), "").unwrap();
        assert!(with(plain).check().is_ok());
        // What is in it is looked at when it is used.
        let fault = with(plain).security().unwrap_err();
        assert!(fault.message.contains("ca.pem"), "{fault}");
    }

    #[test]
    fn who_is_reached_from_other_machines_says_where_by_addresses_that_are_its_own() {
        // (--listen, --http, --advertise: what is to be given instead)
        for (listen, http, advertise, remedy) in [
            ("127.0.0.2:5703", "127.0.0.1:5705", "", None),
            ("127.0.0.2:5703", "0.0.0.0:5705", "", None),
            ("10.0.0.1:5703", "10.0.0.1:5705", "", None),
            ("10.0.0.1:5703", "0.0.0.0:5705", "", None),
            (
                "10.0.0.1:5703",
                "127.0.0.1:5705",
                "",
                Some("--http 10.0.0.1:5705"),
            ),
            (
                "10.0.0.1:5703",
                "127.0.0.1:80",
                "n1:5703",
                Some("--http 10.0.0.1:80"),
            ),
            (
                "[fd00::1]:5703",
                "[::1]:5705",
                "",
                Some("--http [fd00::1]:5705"),
            ),
            (
                "0.0.0.0:5703",
                "127.0.0.1:5705",
                "n1:5703",
                Some("--http 0.0.0.0:5705"),
            ),
            ("0.0.0.0:5703", "0.0.0.0:5705", "n1:5703", None),
            (
                "0.0.0.0:5703",
                "0.0.0.0:5705",
                "",
                Some("--advertise HOST:5703"),
            ),
            (
                "10.0.0.1:5703",
                "10.0.0.1:5705",
                "0.0.0.0:5703",
                Some("reach this one"),
            ),
        ] {
            let told = NodeConfig {
                registry: "etcd:http://10.0.0.9:2379".parse().unwrap(),
                insecure_plaintext: true,
                http: http.parse().unwrap(),
                advertise: (!advertise.is_empty()).then(|| advertise.into()),
                ..config(listen)
            };
            let hint = told.check().err().map(|fault| {
                assert_eq!(fault.code, super::super::fault::Code::InvalidInput);
                fault.hint.unwrap_or_default()
            });
            match (hint, remedy) {
                (None, None) => {}
                (Some(hint), Some(remedy)) if hint.contains(remedy) => {}
                (hint, _) => panic!("{listen} {http} {advertise}: {hint:?}"),
            }
        }
    }
}
