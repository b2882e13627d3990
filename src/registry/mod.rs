//! The cluster's records behind one small compare-and-swap-and-watch trait.
//!
//! A registry is an ordered map from text keys to bytes with one revision counter for the whole map, as in etcd: a
//! change gets the next revision, a key remembers the revision that changed it last, and a reader that listed at
//! revision r and watches from r misses nothing. Steady-state I/O never comes here (PROTOCOL 4); configuration
//! changes do, and their safety rests on [`Registry::cas`] being atomic and durable when it says so.
//!
//! What an implementation promises is written as tests in `tests/mgmt_registry.rs`, generic over this trait.

mod etcd;
mod etcd_alive;
mod etcd_location;
mod etcd_members;
mod etcd_proto;
mod etcd_rpc;
mod etcd_watch;
mod sqlite;
mod sqlite_alive;
mod sqlite_watch;

use std::collections::BTreeSet;
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use serde::{Deserialize, Serialize};

pub use etcd::Etcd;
pub use etcd_location::{Access, Endpoint, EtcdLocation};
pub use sqlite::Sqlite;

/// The longest key, in bytes. Ours are names of at most 63 bytes and ids; anything longer is a mistake.
pub const KEY_MAX: usize = 512;
/// The largest value, in bytes. etcd refuses requests above 1.5 MiB by default; a record is some kilobytes.
pub const VALUE_MAX: usize = 1 << 20;

/// How long a name is taken for living after its process fell silent, where silence is all there is to go by. Longer than
/// the election of a leader or the restart of a registry's member, so that these end no announcement.
pub const PRESENCE: Duration = Duration::from_secs(30);
/// What the keys under which a registry keeps announcements begin with. They are no records: nobody is shown them.
const ALIVE: &str = "alive/";

/// One step in the life of a whole registry. Grows with every change, never repeats.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Revision(pub u64);

impl fmt::Display for Revision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

/// A key's value and the revision that wrote it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The bytes.
    pub value: Vec<u8>,
    /// The change that wrote them; what the next [`Registry::cas`] expects.
    pub revision: Revision,
}

/// All keys under a prefix at one instant.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Listing {
    /// Key and entry, in the order of the keys.
    pub entries: Vec<(String, Entry)>,
    /// The instant: a watch from here continues without a gap.
    pub revision: Revision,
}

/// What must hold for a transaction to be carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Guard<'a> {
    /// The key.
    pub key: &'a str,
    /// The revision that must have written it last; `None`: it must be absent.
    pub expected: Option<Revision>,
}

/// One change of a transaction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// The key.
    pub key: String,
    /// Its new value; `None` deletes it (deleting what is absent is no change).
    pub value: Option<Vec<u8>>,
}

/// A change that a watch reports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// The key.
    pub key: String,
    /// The change's revision. All events of one transaction share it and come in one batch.
    pub revision: Revision,
    /// The new value; `None`: deleted.
    pub value: Option<Vec<u8>>,
}

/// Why a registry could not answer. Nothing was changed.
#[derive(Clone, Debug, thiserror::Error)]
pub enum RegistryError {
    /// It does not answer now; trying again may help.
    #[error("the registry {registry} cannot be reached: {why}")]
    Unavailable {
        /// Which.
        registry: String,
        /// What happened.
        why: String,
    },
    /// It answers, and what it says cannot be worked with; trying again does not help.
    #[error("the registry {registry} cannot be used: {why}")]
    Unusable {
        /// Which.
        registry: String,
        /// What is wrong and what to do.
        why: String,
    },
    /// Its records are elsewhere now (`lockstep registry migrate`); what is still here is of the past.
    #[error("the registry {registry} was moved to {to}")]
    Moved {
        /// Which.
        registry: String,
        /// Where the records are.
        to: String,
    },
    /// A value is not what the key's reader expects.
    #[error("the registry holds an unreadable value under '{key}': {why}")]
    Malformed {
        /// Where.
        key: String,
        /// What the reader said.
        why: String,
    },
}

/// Why a compare-and-swap did not report success.
#[derive(Clone, Debug, thiserror::Error)]
pub enum CasError {
    /// A guard did not hold; nothing was changed.
    #[error("'{key}' was changed by someone else")]
    Conflict {
        /// The first guard's key that did not hold.
        key: String,
        /// What is there instead.
        found: Option<Entry>,
    },
    /// It may or may not have been carried out: read back until it is known, never assume (PROTOCOL 2.6).
    #[error("whether the registry took the change is unknown: {why}")]
    Ambiguous {
        /// What happened.
        why: String,
    },
    /// Nothing was changed.
    #[error(transparent)]
    Registry(#[from] RegistryError),
}

/// Why a watch ended.
#[derive(Clone, Debug, thiserror::Error)]
pub enum WatchError {
    /// The history from there on is no longer kept: list again, then watch from the listing.
    #[error("the registry no longer keeps the changes since revision {from}")]
    Compacted {
        /// Where the watch stood.
        from: Revision,
    },
    /// The registry went away.
    #[error(transparent)]
    Registry(#[from] RegistryError),
}

/// The cluster's small shared memory. All calls block, for a bounded time.
pub trait Registry: Send + Sync {
    /// The entry of `key`, as of a moment after the call began.
    fn get(&self, key: &str) -> Result<Option<Entry>, RegistryError>;

    /// Every key that starts with `prefix`, at one instant.
    fn list(&self, prefix: &str) -> Result<Listing, RegistryError>;

    /// Carries out all `changes` in one step if every guard holds. Durable when it returns `Ok`; the revision is the
    /// one that all changed keys now carry.
    fn txn(&self, guards: &[Guard<'_>], changes: &[Change]) -> Result<Revision, CasError>;

    /// Delivers every change after `from` of keys that start with `prefix`, in order and without a gap.
    fn watch(&self, prefix: &str, from: Revision) -> Result<Watch, RegistryError>;

    /// Writes (`Some`) or deletes (`None`) one key if it is still at `expected` (`None`: absent).
    fn cas(
        &self,
        key: &str,
        expected: Option<Revision>,
        value: Option<&[u8]>,
    ) -> Result<Revision, CasError> {
        let change = Change {
            key: key.into(),
            value: value.map(<[u8]>::to_vec),
        };
        self.txn(&[Guard { key, expected }], &[change])
    }

    /// Says that the process `name` lives, until the answer is dropped or this process is no more.
    ///
    /// A hint for people, never a lock or a fence (PROTOCOL 10): whoever is announced may have died up to `ttl` ago, and
    /// who is not may be alive and cut off from the registry. It is outside of the records: no listing or watch shows it.
    /// A registry that does not answer is told later, without a word. Announced twice, a name is announced until both ended.
    fn announce(&self, name: &str, ttl: Duration) -> Result<Presence, RegistryError>;

    /// Who is announced.
    fn present(&self) -> Result<Present, RegistryError>;

    /// How people name this registry in messages and in `cluster status`.
    fn name(&self) -> String;
}

/// Who is announced in a registry.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Present {
    /// The names.
    pub names: BTreeSet<String>,
    /// An announcement ends with its process, not later and not earlier: the kernel that runs all of them says so.
    pub certain: bool,
}

/// A name that is announced. Dropped, it is withdrawn, as far as the registry answers within a moment.
pub struct Presence(Mutex<Option<Box<dyn FnOnce() + Send>>>);

impl Presence {
    /// One that ends by `withdraw`. For implementations.
    pub fn new(withdraw: impl FnOnce() + Send + 'static) -> Self {
        Self(Mutex::new(Some(Box::new(withdraw))))
    }
}

impl Drop for Presence {
    fn drop(&mut self) {
        let withdraw = self.0.get_mut().unwrap_or_else(PoisonError::into_inner);
        if let Some(withdraw) = withdraw.take() {
            withdraw();
        }
    }
}

/// The receiving end of [`Registry::watch`]. Dropping it ends the watch.
pub struct Watch {
    batches: Receiver<Result<Vec<Event>, WatchError>>,
    _reader: Arc<()>,
}

impl Watch {
    /// A watch that is fed through the sender of `batches`, and a token that dies with it, so that whoever feeds a
    /// quiet watch notices that nobody reads it any more. For implementations.
    pub fn new(batches: Receiver<Result<Vec<Event>, WatchError>>) -> (Self, Weak<()>) {
        let reader = Arc::new(());
        let token = Arc::downgrade(&reader);
        let watch = Self {
            batches,
            _reader: reader,
        };
        (watch, token)
    }

    /// The next batch, at most `patience` later; `None` when nothing changed. After an error the watch is over.
    pub fn next(&self, patience: Duration) -> Result<Option<Vec<Event>>, WatchError> {
        match self.batches.recv_timeout(patience) {
            Ok(batch) => batch.map(Some),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => Err(RegistryError::Unavailable {
                registry: "watch".into(),
                why: "the watch was closed".into(),
            }
            .into()),
        }
    }
}

/// Where a registry is: the value of `--registry`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Location {
    /// `sqlite:PATH`: a file shared by all nodes of one machine.
    Sqlite(PathBuf),
    /// `etcd:http://H:2379[,…]`: etcd, for nodes on several machines.
    Etcd(EtcdLocation),
}

/// A `--registry` that names no known kind.
#[derive(Debug, thiserror::Error)]
#[error(
    "'{text}' is not a registry: {why}; use sqlite:PATH, for example sqlite:/var/lib/lockstep/registry.db, \
     or etcd:http://HOST:2379[,http://HOST2:2379]"
)]
pub struct BadLocation {
    text: String,
    why: String,
}

impl FromStr for Location {
    type Err = BadLocation;

    fn from_str(text: &str) -> Result<Self, BadLocation> {
        let bad = |why: String| BadLocation {
            // What may hold a password is not shown again.
            text: text.split('@').next_back().unwrap_or_default().into(),
            why,
        };
        match text.split_once(':') {
            Some(("sqlite", path)) if !path.is_empty() => Ok(Self::Sqlite(path.into())),
            Some(("sqlite", _)) => Err(bad("it names no file".into())),
            Some(("etcd", members)) => EtcdLocation::parse(members).map(Self::Etcd).map_err(bad),
            _ => Err(bad("it begins neither with sqlite: nor with etcd:".into())),
        }
    }
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Sqlite(path) => write!(f, "sqlite:{}", path.display()),
            Self::Etcd(location) => location.fmt(f),
        }
    }
}

impl Location {
    /// The embedded default of a node with this data directory.
    pub fn embedded(data_dir: &Path) -> Self {
        Self::Sqlite(data_dir.join("registry.db"))
    }

    /// Whether only nodes of one machine can share it.
    pub fn is_of_one_machine(&self) -> bool {
        match self {
            Self::Sqlite(_) => true,
            Self::Etcd(_) => false,
        }
    }

    /// Whether it is reached over TLS, with files from a `--tls-dir`.
    pub fn is_tls(&self) -> bool {
        match self {
            Self::Sqlite(_) => false,
            Self::Etcd(location) => location.is_tls(),
        }
    }

    /// Opens it, creating it when it is absent and can be.
    pub fn open(&self, access: &Access) -> Result<Arc<dyn Registry>, RegistryError> {
        match self {
            Self::Sqlite(path) => Ok(Arc::new(Sqlite::open(path)?)),
            Self::Etcd(location) => Ok(Arc::new(Etcd::open(location, access)?)),
        }
    }
}

/// Refuses a name that could not be announced everywhere: it becomes part of a key and of a file's name.
fn check_announced(name: &str) -> Result<(), String> {
    let room = KEY_MAX / 4;
    match name.is_empty() || name.len() > room || name.starts_with('.') || name.contains('/') {
        true => Err(format!(
            "'{name}' is no name of 1 to {room} bytes to announce"
        )),
        false => Ok(()),
    }
}

/// Refuses what no implementation could store.
fn check_sizes(guards: &[Guard<'_>], changes: &[Change]) -> Result<(), String> {
    let keys = guards
        .iter()
        .map(|g| g.key)
        .chain(changes.iter().map(|c| c.key.as_str()));
    for key in keys {
        if key.is_empty() || key.len() > KEY_MAX {
            return Err(format!(
                "a key of {} bytes (1 to {KEY_MAX} are allowed)",
                key.len()
            ));
        }
        if key.starts_with(ALIVE) {
            return Err(format!(
                "the key '{key}': what begins with {ALIVE} is no record"
            ));
        }
    }
    for change in changes {
        let len = change.value.as_ref().map_or(0, Vec::len);
        if len > VALUE_MAX {
            return Err(format!(
                "a value of {len} bytes for '{}' (at most {VALUE_MAX})",
                change.key
            ));
        }
    }
    Ok(())
}
