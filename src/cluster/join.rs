//! A process becomes a node: its ports are its own, its name is its own, and it knows the cluster.

use std::collections::BTreeMap;
use std::io;
use std::net::{SocketAddr, TcpListener, ToSocketAddrs};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use std::{fs, process};

use super::config::NodeConfig;
use super::events::EventLog;
use super::fault::{Code, Fault};
use super::host::Capacity;
use super::model::{ClusterRecord, NodeRecord};
use super::store::{Race, Store};
use super::units::wall_ms;
use super::whois::{self, introducing, is_ours};
use crate::registry::Registry;
use crate::replication::ids::{BootId, ClusterId, Instance, NodeName};
use crate::wire::tls::Security;

/// Mode of the API's socket: its owner and group manage the node.
const API_SOCKET_MODE: u32 = 0o660;
/// Pause before a registry that does not answer is asked again.
const REGISTRY_PAUSE: Duration = Duration::from_millis(500);
/// The kernel's name of this boot.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// A node that has its place in the cluster and does not work yet.
pub struct Membership {
    /// The cluster.
    pub cluster: ClusterId,
    /// This node.
    pub node: NodeName,
    /// This run of its process.
    pub instance: Instance,
    /// This boot of its kernel.
    pub boot_id: BootId,
    /// When the process started, milliseconds since 1970.
    pub started: u64,
    /// The typed registry; the engine's [`super::store::Registrar`].
    pub store: Arc<Store>,
    /// Where every change of state is noted.
    pub events: Arc<EventLog>,
    /// What it was told.
    pub config: NodeConfig,
    /// What connections with other nodes are secured by.
    pub security: Security,
    /// Why the cluster does not know this process yet; `None`: it does.
    pub waits: Option<String>,
    /// `--listen`, bound, for replication.
    pub replication: TcpListener,
    pub(super) http: TcpListener,
    pub(super) api: UnixListener,
}

/// Listening sockets that the program before left open, so that whoever connects while the program changes waits instead of
/// being refused. Those that are not there are made.
#[derive(Debug, Default)]
pub struct Doors {
    /// For `--listen`.
    pub replication: Option<TcpListener>,
    /// For `--http`.
    pub http: Option<TcpListener>,
    /// For the API.
    pub api: Option<UnixListener>,
}

impl Membership {
    /// One more descriptor for each of the sockets.
    ///
    /// # Errors
    ///
    /// The process has none left.
    pub fn doors(&self) -> io::Result<Doors> {
        Ok(Doors {
            replication: Some(self.replication.try_clone()?),
            http: Some(self.http.try_clone()?),
            api: Some(self.api.try_clone()?),
        })
    }
}

/// Random bytes from the kernel.
pub(super) fn random<const N: usize>() -> Result<[u8; N], Fault> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes)
        .map_err(|e| Fault::internal(format!("the kernel gives no random bytes: {e}")))?;
    Ok(bytes)
}

/// Opens the configured registry; the embedded one lives in the data directory, which is made when it is absent.
pub fn open_registry(config: &NodeConfig) -> Result<Arc<dyn Registry>, Fault> {
    make_dir("--data-dir", &config.data_dir)?;
    Ok(config.registry.open(&config.access)?)
}

/// A process that has its ports and is not known to the cluster yet.
pub struct Place {
    config: NodeConfig,
    security: Security,
    store: Arc<Store>,
    events: Arc<EventLog>,
    replication: TcpListener,
    http: TcpListener,
    api: UnixListener,
    node: NodeRecord,
}

/// Takes ports and name. Refuses when another process has them.
pub fn join(
    config: NodeConfig,
    registry: Arc<dyn Registry>,
    doors: Doors,
) -> Result<Membership, Fault> {
    let place = Place::take(config, registry, doors)?;
    let cluster = place.entrance()?.enter(None)?;
    Ok(place.member(cluster))
}

impl Place {
    /// Takes the ports. Refuses when another process has them. The registry is not asked.
    pub fn take(
        config: NodeConfig,
        registry: Arc<dyn Registry>,
        doors: Doors,
    ) -> Result<Place, Fault> {
        let mut config = config.check()?;
        let security = config.security()?;
        // Sockets are handed to other processes, whose working directory is another.
        config.run_dir = absolute(&config.run_dir)?;
        config.data_dir = absolute(&config.data_dir)?;
        make_dir("--data-dir", &config.data_dir)?;
        make_dir("--run-dir", &config.run_dir)?;
        let events = EventLog::open(config.name.clone(), &config.data_dir).map_err(|e| {
            Fault::internal(format!(
                "cannot write events in --data-dir {}: {e}",
                config.data_dir.display()
            ))
        })?;
        let replication =
            (doors.replication).map_or_else(|| bind("--listen", config.listen), Ok)?;
        let http = doors.http.map_or_else(|| bind("--http", config.http), Ok)?;
        let api = doors.api.map_or_else(|| bind_api(&config), Ok)?;
        let node = NodeRecord {
            name: config.name.clone(),
            instance: Instance(random()?),
            boot_id: boot_id()?,
            address: match &config.advertise {
                Some(address) => address.clone(),
                None => local(&replication)?.to_string(),
            },
            http: http_address(&config, local(&http)?),
            labels: config.labels.clone(),
            relabelled: BTreeMap::new(),
            cordoned: false,
            draining: None,
            version: env!("CARGO_PKG_VERSION").into(),
            started: wall_ms(),
            capacity: Capacity::default(),
        };
        Ok(Place {
            store: Arc::new(Store::new(registry)),
            config,
            security,
            events,
            replication,
            http,
            api,
            node,
        })
    }

    fn entrance(&self) -> Result<Entrance, Fault> {
        let none_left = |e| Fault::internal(format!("--listen {}: {e}", self.node.address));
        Ok(Entrance {
            store: Arc::clone(&self.store),
            node: self.node.clone(),
            replication: self.replication.try_clone().map_err(none_left)?,
            http: local(&self.http)?,
        })
    }

    /// Begins to make it known, on a thread of its own. With `known` it is of that cluster, and joins no other one.
    pub fn join(&self, known: Option<ClusterId>) -> Result<Joining, Fault> {
        let (send, answers) = channel();
        let entrance = self.entrance()?;
        let why = Arc::<Mutex<String>>::default();
        let said = Arc::clone(&why);
        let ask = move || {
            loop {
                match entrance.enter(known) {
                    // The registry's silence, and not what it said.
                    Err(fault) if fault.code == Code::TryAgain && !entrance.is_open() => {
                        let mut said = lock(&said);
                        if *said != fault.message {
                            log::warn!("{}; waiting for it", fault.message);
                            *said = fault.message;
                        }
                    }
                    end => {
                        let joined = end.is_ok();
                        if let Err(fault) = &end {
                            let hint = fault.hint.as_deref().map(|hint| format!(": {hint}"));
                            *lock(&said) = format!("{fault}{}", hint.unwrap_or_default());
                        }
                        if send.send(end).is_err() || joined {
                            return;
                        }
                    }
                }
                std::thread::sleep(REGISTRY_PAUSE);
            }
        };
        let thread = std::thread::Builder::new().name("join".into()).spawn(ask);
        thread.map_err(|e| Fault::internal(format!("a thread cannot start: {e}")))?;
        Ok(Joining { answers, why })
    }

    /// The node that it is in this cluster, joined or not.
    pub fn member(self, cluster: ClusterId) -> Membership {
        Membership {
            cluster,
            node: self.node.name,
            instance: self.node.instance,
            boot_id: self.node.boot_id,
            started: self.node.started,
            store: self.store,
            events: self.events,
            config: self.config,
            security: self.security,
            waits: None,
            replication: self.replication,
            http: self.http,
            api: self.api,
        }
    }
}

/// A process that becomes known to the cluster, for as long as it takes: machines that lost power together come back in any
/// order.
pub struct Joining {
    answers: Receiver<Result<ClusterId, Fault>>,
    why: Arc<Mutex<String>>,
}

impl Joining {
    /// Waits at most `patience` until it is known. `None`: not yet.
    ///
    /// # Errors
    ///
    /// It is refused. It is tried again all the same.
    pub fn wait(&self, patience: Duration) -> Result<Option<ClusterId>, Fault> {
        match self.answers.recv_timeout(patience) {
            Ok(answer) => answer.map(Some),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => Err(Fault::internal(
                "the thread that makes this node known has ended",
            )),
        }
    }

    /// What it waits for, one sentence.
    pub fn why(&self) -> String {
        match lock(&self.why).as_str() {
            "" => "the registry has not answered yet".into(),
            why => why.into(),
        }
    }
}

/// Replaced whole under the lock.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What it takes to become known.
struct Entrance {
    store: Arc<Store>,
    node: NodeRecord,
    replication: TcpListener,
    http: SocketAddr,
}

impl Entrance {
    /// Makes the node known: it has its name in the cluster of the registry, which is the `known` one if there is one.
    fn enter(&self, known: Option<ClusterId>) -> Result<ClusterId, Fault> {
        let cluster = cluster_id(&self.store, known)?;
        claim(
            &self.store,
            cluster,
            (&self.node, &self.replication, self.http),
        )?;
        Ok(cluster)
    }

    /// The registry answers.
    fn is_open(&self) -> bool {
        self.store.cluster().is_ok()
    }
}

fn absolute(path: &Path) -> Result<PathBuf, Fault> {
    std::path::absolute(path)
        .map_err(|e| Fault::input(format!("'{}' is no directory: {e}", path.display())))
}

fn make_dir(flag: &str, path: &Path) -> Result<(), Fault> {
    fs::create_dir_all(path).map_err(|e| {
        Fault::input(format!("cannot make {flag} {}: {e}", path.display()))
            .hint(format!("give {flag} a directory that this user may write"))
    })
}

fn bind(flag: &str, address: SocketAddr) -> Result<TcpListener, Fault> {
    TcpListener::bind(address).map_err(|e| {
        let fault = Fault::state(format!("cannot listen on {flag} {address}: {e}"));
        if e.kind() == io::ErrorKind::AddrInUse {
            fault.hint(format!(
                "another process (another node?) has it; give {flag} another address"
            ))
        } else {
            fault
        }
    })
}

fn local(listener: &TcpListener) -> Result<SocketAddr, Fault> {
    listener
        .local_addr()
        .map_err(|e| Fault::internal(format!("a listening socket has no address: {e}")))
}

/// Where other nodes reach our HTTP: an address that means "every interface" is no address to them.
fn http_address(config: &NodeConfig, bound: SocketAddr) -> String {
    if !bound.ip().is_unspecified() {
        return bound.to_string();
    }
    let host = config
        .advertise
        .as_deref()
        .and_then(|a| a.rsplit_once(':'))
        .map_or_else(|| config.listen.ip().to_string(), |(host, _)| host.into());
    format!("{host}:{}", bound.port())
}

fn bind_api(config: &NodeConfig) -> Result<UnixListener, Fault> {
    let path = config.api_socket();
    super::plane::check_socket(&path)?;
    if UnixStream::connect(&path).is_ok() {
        return Err(
            Fault::state(format!("another node already serves {}", path.display()))
                .hint("give each node of this machine its own --run-dir"),
        );
    }
    // Bound under another name and renamed, so that the socket is never there with a wider mode, and a stale one of a
    // process that died is replaced.
    let fresh = config.run_dir.join(format!("api.{}", process::id()));
    let bind = || -> io::Result<UnixListener> {
        match fs::remove_file(&fresh) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        let listener = UnixListener::bind(&fresh)?;
        fs::set_permissions(&fresh, fs::Permissions::from_mode(API_SOCKET_MODE))?;
        fs::rename(&fresh, &path)?;
        Ok(listener)
    };
    bind().map_err(|e| {
        Fault::state(format!("cannot make the socket {}: {e}", path.display()))
            .hint("give --run-dir a directory that this user may write")
    })
}

fn boot_id() -> Result<BootId, Fault> {
    let text = fs::read_to_string(BOOT_ID)
        .map_err(|e| Fault::internal(format!("cannot read {BOOT_ID}: {e}")))?;
    text.trim()
        .parse()
        .map_err(|e| Fault::internal(format!("{BOOT_ID}: {e}")))
}

fn cluster_id(store: &Store, known: Option<ClusterId>) -> Result<ClusterId, Fault> {
    let found = store.cluster()?.map(|(record, _)| record.id);
    if let Some(ours) = known
        && found != known
    {
        let found = found.map_or("empty".into(), |found| format!("of cluster {found}"));
        // Nothing is made in it: it may be about to be restored.
        return Err(Fault::state(format!(
            "this node belongs to cluster {ours}, but the registry is {found}"
        ))
        .hint("check --registry, restore the registry, or use another --data-dir"));
    }
    store
        .retry(|| {
            if let Some((record, _)) = store.cluster()? {
                return Ok(record.id);
            }
            let record = ClusterRecord::new(ClusterId(random()?), wall_ms());
            // Read back by the next round if another node was faster.
            store.create_cluster(&record).map_err(Race::Cas)?;
            Ok::<_, Race>(record.id)
        })
        .map_err(Fault::from)
}

/// Writes `node` into the registry, which takes replication connections by this socket and listens there for HTTP.
fn claim(
    store: &Store,
    cluster: ClusterId,
    (node, replication, http): (&NodeRecord, &TcpListener, SocketAddr),
) -> Result<(), Fault> {
    store
        .retry(|| {
            let present = store.node(&node.name)?;
            if let Some((other, _)) = &present {
                if other.instance == node.instance {
                    return Ok(()); // an ambiguous write that went through
                }
                refuse_if_alive(store, cluster, other, (node, replication, http))?;
            }
            let mut node = node.clone();
            if let Some((before, _)) = &present {
                node.inherit(before);
            }
            store
                .cas_node(present.map(|(_, revision)| revision), &node)
                .map(drop)
                .map_err(Race::Cas)
        })
        .map_err(Fault::from)
}

/// Whether the process that has our name still runs.
///
/// Its ports tell, if it can be reached: ours are bound already, so an address of its that is also ours is not in its hands any
/// more, and is not asked. A process elsewhere that cannot be reached from here may run all the same, with its machines: its
/// lease in the registry tells. Were it driven out, it would end, and they with it.
fn refuse_if_alive(
    store: &Store,
    cluster: ClusterId,
    other: &NodeRecord,
    (me, replication, http): (&NodeRecord, &TcpListener, SocketAddr),
) -> Result<(), Fault> {
    let alive = |how: &str| {
        Fault::new(
            Code::Exists,
            format!("a node named {} runs already: {how}", other.name),
        )
        .hint("give this node another --name, or stop the other one")
    };
    let has_listen = other.address == me.address || is_ours(&other.address, local(replication)?);
    let has_http = other.http == me.http || is_ours(&other.http, http);
    let how = match (has_listen, has_http) {
        (false, _) => introducing(replication, &me.name, || whois::alive(cluster, other))
            .map_err(|e| Fault::internal(format!("--listen {}: {e}", me.address)))??,
        (true, false) => whois::http_alive(cluster, other)?,
        (true, true) => None,
    };
    if let Some(how) = how {
        return Err(alive(&how));
    }
    // Every machine has loopback addresses of its own.
    let only_one = |address: &str| {
        let mut all = address.to_socket_addrs().into_iter().flatten();
        other.boot_id == me.boot_id || !all.any(|a| a.ip().is_loopback())
    };
    if has_listen && only_one(&other.address) || has_http && only_one(&other.http) {
        return Ok(());
    }
    let present = store.present()?;
    if !present.names.contains(&other.name.0) {
        return Ok(());
    }
    if present.certain {
        return Err(alive("its lease in the registry is held"));
    }
    Err(Fault::try_again(format!(
        "a node named {} may be running at {}: its lease in the registry is held",
        other.name, other.address
    ))
    .hint(
        "if it ended without a word (killed, power lost), try again in 30 seconds; if it runs, give this node another \
         --name, or stop the other one",
    ))
}
