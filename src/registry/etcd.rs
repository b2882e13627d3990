//! The registry of a cluster on several machines: etcd, version 3.4 or later.
//!
//! Guards are compares of `mod_revision`, a transaction is one `Txn`, reads are linearizable, watches resume by revision
//! (`etcd_watch.rs`). No lock is taken, and the one lease of a node (`etcd_alive.rs`) is a hint for people: who may write
//! is decided by compare-and-swap alone.
//!
//! The trait's calls block. The client is a task on a runtime of one thread, and each call waits for its answer.

use std::future::Future;
use std::sync::Arc;
use std::sync::mpsc::sync_channel;
use std::thread;
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::oneshot;
use tokio_rustls::TlsConnector;

use super::etcd_alive::keep;
use super::etcd_location::{Access, EtcdLocation, tls};
use super::etcd_members::{CALL, CallError, Kind, Members};
use super::etcd_proto::{
    Compare, DeleteRangeRequest, KeyValue, Op, PutRequest, RANGE, RangeRequest, RangeResponse,
    RequestOp, TARGET_MOD, TXN, TxnRequest, TxnResponse,
};
use super::etcd_watch::follow;
use super::{
    ALIVE, CasError, Change, Entry, Guard, Listing, Presence, Present, Registry, RegistryError,
    Revision, Watch, check_announced, check_sizes,
};

/// A call ends by itself within [`CALL`]; this much later its thread is taken for lost.
const SLACK: Duration = Duration::from_secs(4);
/// How long an announcement that ends waits until etcd knows. If it does not, the lease ends by itself.
const WITHDRAWAL: Duration = Duration::from_secs(1);
/// Batches a slow reader may leave unread before its watch stands still.
const BACKLOG: usize = 64;

/// A registry in etcd.
pub struct Etcd {
    name: Arc<str>,
    prefix: Arc<str>,
    members: Arc<Members>,
    runtime: Handle,
    /// Dropped, it ends the thread with all that runs on it.
    _alive: oneshot::Sender<()>,
}

impl Etcd {
    /// A client of the etcd at `location`. It connects when it is first used.
    ///
    /// TLS files that are missing or cannot be read are [`RegistryError::Unusable`].
    pub fn open(location: &EtcdLocation, access: &Access) -> Result<Self, RegistryError> {
        let name: Arc<str> = location.to_string().into();
        let unusable = |why: String| RegistryError::Unusable {
            registry: name.to_string(),
            why,
        };
        let connector = match (location.is_tls(), &access.tls_dir) {
            (false, _) => None,
            (true, Some(dir)) => Some(TlsConnector::from(Arc::new(tls(dir).map_err(unusable)?))),
            (true, None) => {
                return Err(unusable(
                    "https: needs --tls-dir with etcd's certificate authority in etcd-ca.pem"
                        .into(),
                ));
            }
        };
        let prefix: Arc<str> = location.prefix().into();
        let members = Members::new(
            location.endpoints.clone(),
            connector,
            access.credentials.clone(),
            prefix.to_string(),
        );
        let (alive, ended) = oneshot::channel::<()>();
        let runtime = run(ended).map_err(|e| RegistryError::Unavailable {
            registry: name.to_string(),
            why: format!("no thread for its client: {e}"),
        })?;
        Ok(Self {
            name,
            prefix,
            members: Arc::new(members),
            runtime,
            _alive: alive,
        })
    }

    /// Waits for a task on the client's thread; `None`: the thread is stuck or gone.
    fn wait<T: Send + 'static>(&self, task: impl Future<Output = T> + Send + 'static) -> Option<T> {
        let (sender, answer) = sync_channel(1);
        self.runtime.spawn(async move {
            // Nobody waits for it any more.
            let _ = sender.send(task.await);
        });
        answer.recv_timeout(CALL + SLACK).ok()
    }

    fn range(&self, key: Vec<u8>, range_end: Vec<u8>) -> Result<RangeResponse, RegistryError> {
        let members = self.members.clone();
        let question = RangeRequest { key, range_end };
        self.wait(async move { members.call(RANGE, &question, Kind::Read).await })
            .unwrap_or_else(|| Err(stuck()))
            .map_err(|e| self.failed(e))
    }

    fn failed(&self, error: CallError) -> RegistryError {
        let registry = self.name.to_string();
        match error {
            CallError::Unusable(why) => RegistryError::Unusable { registry, why },
            CallError::Unavailable(why) | CallError::Ambiguous(why) => {
                RegistryError::Unavailable { registry, why }
            }
        }
    }

    fn odd(&self, what: &str) -> RegistryError {
        RegistryError::Unusable {
            registry: self.name.to_string(),
            why: format!("{what}; is it etcd 3.4 or later?"),
        }
    }

    fn key(&self, key: &str) -> Vec<u8> {
        [self.prefix.as_bytes(), key.as_bytes()].concat()
    }

    /// The first guard that does not hold, from what etcd found under the guards' keys.
    fn conflict(&self, guards: &[Guard<'_>], answer: &TxnResponse) -> CasError {
        for (i, guard) in guards.iter().enumerate() {
            let found = answer.responses.get(i).and_then(|r| r.range.as_ref());
            let Some(range) = found else { break };
            let entry = match range.kvs.first().map(entry).transpose() {
                Ok(entry) => entry,
                Err(what) => return self.odd(what).into(),
            };
            if entry.as_ref().map(|e| e.revision) != guard.expected {
                return CasError::Conflict {
                    key: guard.key.into(),
                    found: entry,
                };
            }
        }
        self.odd("it refused a change all of whose guards hold")
            .into()
    }
}

/// A thread with a runtime, until the other end of `ended` is dropped.
fn run(ended: oneshot::Receiver<()>) -> std::io::Result<Handle> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let handle = runtime.handle().clone();
    thread::Builder::new()
        .name("registry-etcd".into())
        .spawn(move || {
            let _ = runtime.block_on(ended);
            // A look-up of a name may still be under way on a thread of the runtime; nobody waits for it.
            runtime.shutdown_background();
        })?;
    Ok(handle)
}

fn stuck() -> CallError {
    // Whether a write left is not known.
    CallError::Ambiguous("the client's thread does not answer".into())
}

pub(super) fn revision(number: i64) -> Result<Revision, &'static str> {
    u64::try_from(number)
        .map(Revision)
        .map_err(|_| "it answered with a revision below zero")
}

fn entry(kv: &KeyValue) -> Result<Entry, &'static str> {
    Ok(Entry {
        value: kv.value.clone(),
        revision: revision(kv.mod_revision)?,
    })
}

/// The first key behind all that begin with `prefix`. Ours is text, whose bytes are never 255.
pub(super) fn behind(prefix: &[u8]) -> Vec<u8> {
    let mut end = prefix.to_vec();
    if let Some(last) = end.last_mut() {
        *last = last.saturating_add(1);
    }
    end
}

/// A key as its readers know it. One that somebody else put there and that is no text is nobody's key.
pub(super) fn own_key(prefix: &str, key: &[u8]) -> String {
    let rest = key.strip_prefix(prefix.as_bytes()).unwrap_or(key);
    String::from_utf8_lossy(rest).into_owned()
}

impl Registry for Etcd {
    fn get(&self, key: &str) -> Result<Option<Entry>, RegistryError> {
        let answer = self.range(self.key(key), Vec::new())?;
        let found = answer.kvs.first().map(entry).transpose();
        found.map_err(|what| self.odd(what))
    }

    fn list(&self, prefix: &str) -> Result<Listing, RegistryError> {
        let from = self.key(prefix);
        let answer = self.range(from.clone(), behind(&from))?;
        let read = || -> Result<Listing, &'static str> {
            let header = answer
                .header
                .as_ref()
                .ok_or("it answered without a header")?;
            let entries = answer.kvs.iter();
            Ok(Listing {
                entries: entries
                    .map(|kv| Ok((own_key(&self.prefix, &kv.key), entry(kv)?)))
                    .filter(|read| !read.as_ref().is_ok_and(|(key, _)| key.starts_with(ALIVE)))
                    .collect::<Result<_, &'static str>>()?,
                revision: revision(header.revision)?,
            })
        };
        read().map_err(|what| self.odd(what))
    }

    fn txn(&self, guards: &[Guard<'_>], changes: &[Change]) -> Result<Revision, CasError> {
        check_sizes(guards, changes).map_err(|why| RegistryError::Unusable {
            registry: self.name.to_string(),
            why,
        })?;
        let question = TxnRequest {
            compare: guards
                .iter()
                .map(|guard| Compare {
                    target: TARGET_MOD,
                    key: self.key(guard.key),
                    // 0: absent. A revision beyond etcd's own range holds for no key.
                    mod_revision: Some(guard.expected.map_or(0, |Revision(number)| {
                        i64::try_from(number).unwrap_or(i64::MAX)
                    })),
                })
                .collect(),
            success: changes
                .iter()
                .map(|change| self.operation(change))
                .collect(),
            failure: guards
                .iter()
                .map(|guard| {
                    operation(Op::Range(RangeRequest {
                        key: self.key(guard.key),
                        range_end: Vec::new(),
                    }))
                })
                .collect(),
        };
        let members = self.members.clone();
        let answer: TxnResponse = self
            .wait(async move { members.call(TXN, &question, Kind::Write).await })
            .unwrap_or_else(|| Err(stuck()))
            .map_err(|e| match e {
                CallError::Ambiguous(why) => CasError::Ambiguous {
                    why: format!("{}: {why}", self.name),
                },
                other => self.failed(other).into(),
            })?;
        if !answer.succeeded {
            return Err(self.conflict(guards, &answer));
        }
        let now = answer.header.as_ref().map(|h| revision(h.revision));
        match now {
            Some(Ok(now)) => Ok(now),
            // It says that it was done, and not in which revision.
            _ => Err(CasError::Ambiguous {
                why: format!("{}: an answer without a revision", self.name),
            }),
        }
    }

    fn watch(&self, prefix: &str, from: Revision) -> Result<Watch, RegistryError> {
        let (batches, receiver) = sync_channel(BACKLOG);
        let (watch, reader) = Watch::new(receiver);
        self.runtime.spawn(follow(
            self.members.clone(),
            self.name.clone(),
            self.prefix.clone(),
            prefix.into(),
            from,
            batches,
            reader,
        ));
        Ok(watch)
    }

    fn announce(&self, name: &str, ttl: Duration) -> Result<Presence, RegistryError> {
        check_announced(name).map_err(|why| RegistryError::Unusable {
            registry: self.name.to_string(),
            why,
        })?;
        let (withdraw, withdrawn) = oneshot::channel::<()>();
        let (sender, done) = sync_channel(1);
        let kept = keep(
            self.members.clone(),
            self.name.clone(),
            self.key(&format!("{ALIVE}{name}")),
            ttl,
            withdrawn,
        );
        self.runtime.spawn(async move {
            kept.await;
            // Nobody waits for it when the client goes first.
            let _ = sender.send(());
        });
        Ok(Presence::new(move || {
            drop(withdraw);
            let _ = done.recv_timeout(WITHDRAWAL);
        }))
    }

    fn present(&self) -> Result<Present, RegistryError> {
        let from = self.key(ALIVE);
        let answer = self.range(from.clone(), behind(&from))?;
        let keys = answer.kvs.iter();
        let name = |key: &[u8]| {
            let (name, _lease) = str::from_utf8(key.strip_prefix(&*from)?)
                .ok()?
                .rsplit_once('/')?;
            Some(name.to_string())
        };
        Ok(Present {
            names: keys.filter_map(|kv| name(&kv.key)).collect(),
            certain: false,
        })
    }

    fn name(&self) -> String {
        self.name.to_string()
    }
}

pub(super) fn operation(op: Op) -> RequestOp {
    RequestOp { request: Some(op) }
}

impl Etcd {
    fn operation(&self, change: &Change) -> RequestOp {
        let key = self.key(&change.key);
        operation(match &change.value {
            Some(value) => Op::Put(PutRequest {
                key,
                value: value.clone(),
                lease: 0,
            }),
            None => Op::DeleteRange(DeleteRangeRequest { key }),
        })
    }
}
