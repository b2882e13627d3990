//! The embedded registry: one SQLite file shared by all nodes of one machine.
//!
//! Every transaction begins IMMEDIATE, so that guards are checked and changes made under one write lock; WAL keeps
//! readers from blocking; `synchronous=FULL` makes a commit durable before it is reported, which ejections need (S4).
//! A change is written twice: to `entries`, and to the log `changes` that watches read.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rusqlite::types::{FromSql, FromSqlError, FromSqlResult, ToSql, ToSqlOutput, ValueRef};
use rusqlite::{Connection, ErrorCode, OpenFlags, OptionalExtension, TransactionBehavior, params};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use super::sqlite_alive;
use super::sqlite_watch::Watcher;
use super::{
    CasError, Change, Entry, Guard, Listing, Presence, Present, Registry, RegistryError, Revision,
    Watch, check_announced, check_sizes,
};

/// "lstp": tells our file from any other program's SQLite file.
const APPLICATION_ID: i32 = 0x6c73_7470;
/// Version of the tables below. A file of a later one is refused: its meaning is unknown.
const SCHEMA_VERSION: i32 = 1;
/// How long a call waits for another process's write lock. Longer than any commit on a busy disk, short enough that
/// an ejection which waits for it stays within a guest's patience.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);
/// Pause before a new file is tried again.
const PREPARE_PAUSE: Duration = Duration::from_millis(10);
/// How many revisions the log of changes keeps. A watch that is further behind lists again.
const HISTORY: u64 = 10_000;
/// Old changes are cut off once in this many revisions, not at each.
const COMPACT_EVERY: u64 = 256;

/// Ends the name of the file beside the registry on which everybody who has it open holds a shared lock, and who moves it
/// the only one. Not on the registry itself: closing a second descriptor of that would drop SQLite's own locks.
const USERS: &str = "-users";

/// A table that is there once the records were moved elsewhere. It names the place.
const MOVED: &str = "moved";

const SCHEMA: &str = "
    CREATE TABLE entries (key TEXT PRIMARY KEY, value BLOB NOT NULL, revision INTEGER NOT NULL) WITHOUT ROWID;
    CREATE TABLE changes (seq INTEGER PRIMARY KEY, revision INTEGER NOT NULL, key TEXT NOT NULL, value BLOB);
    CREATE INDEX changes_by_revision ON changes (revision);
    CREATE TABLE counters (one INTEGER PRIMARY KEY CHECK (one = 1), revision INTEGER NOT NULL,
                           compacted INTEGER NOT NULL);
    INSERT INTO counters VALUES (1, 0, 0);
";

impl ToSql for Revision {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        // SQLite's integers are signed; 2^63 changes do not happen.
        i64::try_from(self.0)
            .map(ToSqlOutput::from)
            .map_err(|e| rusqlite::Error::ToSqlConversionFailure(Box::new(e)))
    }
}

impl FromSql for Revision {
    fn column_result(value: ValueRef<'_>) -> FromSqlResult<Self> {
        let number = i64::column_result(value)?;
        u64::try_from(number)
            .map(Self)
            .map_err(|_| FromSqlError::OutOfRange(number))
    }
}

/// A registry in a SQLite file.
pub struct Sqlite {
    name: String,
    path: PathBuf,
    connection: Mutex<Connection>,
    watcher: Watcher,
    /// Held for its lock alone.
    _user: File,
}

impl Sqlite {
    /// Opens `path`, creating the file (not its directory) when it is absent.
    ///
    /// A file that is not ours, of a later version, damaged or read-only is [`RegistryError::Unusable`], one whose
    /// records are elsewhere [`RegistryError::Moved`].
    pub fn open(path: &Path) -> Result<Self, RegistryError> {
        let shared = FlockOperation::NonBlockingLockShared;
        Self::open_as(path, shared)?.ok_or_else(|| RegistryError::Unavailable {
            registry: name(path),
            why: "it is being moved (lockstep registry migrate); look where it is when that has ended".into(),
        })
    }

    /// The same for one who moves it: nobody else opens it as long as this lives. `None`: somebody has it open.
    pub fn open_alone(path: &Path) -> Result<Option<Self>, RegistryError> {
        Self::open_as(path, FlockOperation::NonBlockingLockExclusive)
    }

    fn open_as(path: &Path, how: FlockOperation) -> Result<Option<Self>, RegistryError> {
        let name = name(path);
        let mut connection = connect(path, &name)?;
        patiently(&mut connection, &name, refuse_strangers)?;
        let Some(user) = lock_users(path, &name, how)? else {
            return Ok(None);
        };
        patiently(&mut connection, &name, prepare)?;
        let watcher = Watcher::start(Arc::from(path), name.clone())?;
        Ok(Some(Self {
            name,
            path: path.into(),
            connection: Mutex::new(connection),
            watcher,
            _user: user,
        }))
    }

    /// Notes that the records are at `to` now. From then on nobody can open this one; what it holds stays as it is.
    pub fn mark_moved(&self, to: &str) -> Result<(), RegistryError> {
        let mut connection = self.lock();
        let mark = |connection: &mut Connection| -> rusqlite::Result<()> {
            let transaction =
                connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
            transaction.execute_batch(&format!("CREATE TABLE {MOVED} (place TEXT NOT NULL)"))?;
            transaction.execute(&format!("INSERT INTO {MOVED} VALUES (?1)"), [to])?;
            transaction.commit()
        };
        mark(&mut connection).map_err(|e| self.failed(&e))
    }

    fn lock(&self) -> MutexGuard<'_, Connection> {
        // A thread that panicked inside a transaction dropped it, which rolls it back: the connection is sound.
        self.connection
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn failed(&self, error: &rusqlite::Error) -> RegistryError {
        explain(&self.name, error)
    }

    fn beside(&self, error: &std::io::Error) -> RegistryError {
        unusable(
            &self.name,
            &format!(
                "who lives is noted in the directory {}-alive, which fails ({error}); give this user write access to it",
                self.path.display()
            ),
        )
    }
}

impl Registry for Sqlite {
    fn get(&self, key: &str) -> Result<Option<Entry>, RegistryError> {
        read_entry(&self.lock(), key).map_err(|e| self.failed(&e))
    }

    fn list(&self, prefix: &str) -> Result<Listing, RegistryError> {
        let mut connection = self.lock();
        let read = |connection: &mut Connection| -> rusqlite::Result<Listing> {
            // One read transaction: entries and the revision are of the same instant.
            let snapshot = connection.transaction_with_behavior(TransactionBehavior::Deferred)?;
            let revision = current_revision(&snapshot)?;
            let mut rows = snapshot.prepare_cached(
                "SELECT key, value, revision FROM entries
                 WHERE key >= ?1 AND substr(key, 1, length(?1)) = ?1 ORDER BY key",
            )?;
            let entries = rows
                .query_map([prefix], |row| {
                    let entry = Entry {
                        value: row.get(1)?,
                        revision: row.get(2)?,
                    };
                    Ok((row.get(0)?, entry))
                })?
                .collect::<rusqlite::Result<_>>()?;
            Ok(Listing { entries, revision })
        };
        read(&mut connection).map_err(|e| self.failed(&e))
    }

    fn txn(&self, guards: &[Guard<'_>], changes: &[Change]) -> Result<Revision, CasError> {
        check_sizes(guards, changes).map_err(|why| RegistryError::Unusable {
            registry: self.name.clone(),
            why,
        })?;
        let mut connection = self.lock();
        let transaction = connection
            .transaction_with_behavior(TransactionBehavior::Immediate)
            .map_err(|e| self.failed(&e))?;
        for guard in guards {
            let found = read_entry(&transaction, guard.key).map_err(|e| self.failed(&e))?;
            if found.as_ref().map(|e| e.revision) != guard.expected {
                return Err(CasError::Conflict {
                    key: guard.key.into(),
                    found,
                });
            }
        }
        let revision = apply(&transaction, changes).map_err(|e| self.failed(&e))?;
        match transaction.commit() {
            Ok(()) => {
                self.watcher.nudge();
                Ok(revision)
            }
            // Busy is answered before the commit record is written. Any other failure may come after it was
            // written and before it was synced: a crash then decides whether it is there.
            Err(e) if e.sqlite_error_code() == Some(ErrorCode::DatabaseBusy) => {
                Err(self.failed(&e).into())
            }
            Err(e) => Err(CasError::Ambiguous {
                why: format!("commit to {}: {e}", self.name),
            }),
        }
    }

    fn watch(&self, prefix: &str, from: Revision) -> Result<Watch, RegistryError> {
        self.watcher.add(prefix, from)
    }

    /// The kernel knows when a process is no more: `ttl` has no part in it.
    fn announce(&self, name: &str, _ttl: Duration) -> Result<Presence, RegistryError> {
        check_announced(name).map_err(|why| unusable(&self.name, &why))?;
        sqlite_alive::announce(&self.path, name).map_err(|e| self.beside(&e))
    }

    fn present(&self) -> Result<Present, RegistryError> {
        sqlite_alive::present(&self.path).map_err(|e| self.beside(&e))
    }

    fn name(&self) -> String {
        self.name.clone()
    }
}

fn name(path: &Path) -> String {
    format!("sqlite:{}", path.display())
}

/// `None`: somebody else's lock forbids it.
fn lock_users(path: &Path, name: &str, how: FlockOperation) -> Result<Option<File>, RegistryError> {
    let mut users = path.as_os_str().to_owned();
    users.push(USERS);
    let users = PathBuf::from(users);
    let cannot = |why: String| {
        unusable(
            name,
            &format!(
                "{} cannot be locked ({why}); give this user write access to it",
                users.display()
            ),
        )
    };
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&users)
        .map_err(|e| cannot(e.to_string()))?;
    match flock(&file, how) {
        Ok(()) => Ok(Some(file)),
        Err(Errno::WOULDBLOCK) => Ok(None),
        Err(e) => Err(cannot(e.to_string())),
    }
}

/// Where the records are, if they are not here.
fn moved(connection: &Connection) -> rusqlite::Result<Option<String>> {
    let tables = "SELECT count(*) FROM sqlite_schema WHERE type = 'table' AND name = ?1";
    let count: i64 = connection.query_row(tables, [MOVED], |row| row.get(0))?;
    if count == 0 {
        return Ok(None);
    }
    connection
        .query_row(&format!("SELECT place FROM {MOVED}"), [], |row| row.get(0))
        .optional()
}

fn read_entry(connection: &Connection, key: &str) -> rusqlite::Result<Option<Entry>> {
    connection
        .prepare_cached("SELECT value, revision FROM entries WHERE key = ?1")?
        .query_row([key], |row| {
            Ok(Entry {
                value: row.get(0)?,
                revision: row.get(1)?,
            })
        })
        .optional()
}

fn current_revision(connection: &Connection) -> rusqlite::Result<Revision> {
    connection
        .prepare_cached("SELECT revision FROM counters")?
        .query_row([], |row| row.get(0))
}

/// Writes `changes` under the next revision; without a real change the revision stands.
fn apply(connection: &Connection, changes: &[Change]) -> rusqlite::Result<Revision> {
    let now = current_revision(connection)?;
    let next = Revision(now.0 + 1);
    let mut changed = false;
    for Change { key, value } in changes {
        match value {
            Some(bytes) => {
                connection
                    .prepare_cached(
                        "INSERT INTO entries (key, value, revision) VALUES (?1, ?2, ?3)
                         ON CONFLICT (key) DO UPDATE SET value = ?2, revision = ?3",
                    )?
                    .execute(params![key, bytes, next])?;
            }
            None => {
                let gone = connection
                    .prepare_cached("DELETE FROM entries WHERE key = ?1")?
                    .execute([key])?;
                if gone == 0 {
                    continue;
                }
            }
        }
        changed = true;
        connection
            .prepare_cached("INSERT INTO changes (revision, key, value) VALUES (?1, ?2, ?3)")?
            .execute(params![next, key, value])?;
    }
    if !changed {
        return Ok(now);
    }
    connection.execute("UPDATE counters SET revision = ?1", [next])?;
    if next.0 > HISTORY && next.0.is_multiple_of(COMPACT_EVERY) {
        let horizon = Revision(next.0 - HISTORY);
        connection.execute("DELETE FROM changes WHERE revision <= ?1", [horizon])?;
        connection.execute("UPDATE counters SET compacted = ?1", [horizon])?;
    }
    Ok(next)
}

/// A connection with the settings that every user of the file must have.
pub(super) fn connect(path: &Path, name: &str) -> Result<Connection, RegistryError> {
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE
        | OpenFlags::SQLITE_OPEN_CREATE
        | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let open = || -> rusqlite::Result<Connection> {
        let connection = Connection::open_with_flags(path, flags)?;
        connection.busy_timeout(BUSY_TIMEOUT)?;
        Ok(connection)
    };
    let connection = open().map_err(|e| explain(name, &e))?;
    if connection
        .is_readonly("main")
        .map_err(|e| explain(name, &e))?
    {
        return Err(unusable(
            name,
            "the file cannot be written; give this user write access to it and to its directory",
        ));
    }
    Ok(connection)
}

type Step = fn(&mut Connection, &str) -> Result<(), RegistryError>;

/// Nodes that start together find the same new file. SQLite answers some of the races for its journal mode with
/// "busy" at once, whatever the busy timeout, because waiting could deadlock: so the waiting is done here.
fn patiently(connection: &mut Connection, name: &str, step: Step) -> Result<(), RegistryError> {
    let deadline = Instant::now() + BUSY_TIMEOUT;
    loop {
        match step(connection, name) {
            Err(RegistryError::Unavailable { .. }) if Instant::now() < deadline => {
                std::thread::sleep(PREPARE_PAUSE);
            }
            done => return done,
        }
    }
}

fn pragma(connection: &Connection, what: &str) -> rusqlite::Result<i32> {
    connection.query_row(&format!("PRAGMA {what}"), [], |row| row.get(0))
}

/// Refuses a file that is not ours or too new. Comes before any write to it or beside it: the journal mode is stored in
/// the file.
fn refuse_strangers(connection: &mut Connection, name: &str) -> Result<(), RegistryError> {
    let fail = |e: rusqlite::Error| explain(name, &e);
    let tables: i64 = connection
        .query_row("SELECT count(*) FROM sqlite_schema", [], |row| row.get(0))
        .map_err(fail)?;
    let owner = pragma(connection, "application_id").map_err(fail)?;
    let version = pragma(connection, "user_version").map_err(fail)?;
    if tables > 0 && owner != APPLICATION_ID {
        return Err(unusable(
            name,
            "the file is an SQLite database of another program; give --registry another path",
        ));
    }
    if version > SCHEMA_VERSION {
        return Err(unusable(
            name,
            &format!(
                "its format is version {version} and this lockstep knows up to {SCHEMA_VERSION}; \
                 run the newer lockstep that wrote it"
            ),
        ));
    }
    Ok(())
}

/// Makes the tables in a new file and refuses one that was left.
fn prepare(connection: &mut Connection, name: &str) -> Result<(), RegistryError> {
    let fail = |e: rusqlite::Error| explain(name, &e);
    if let Some(to) = moved(connection).map_err(fail)? {
        return Err(RegistryError::Moved {
            registry: name.into(),
            to,
        });
    }
    let mode: String = connection
        .query_row("PRAGMA journal_mode=WAL", [], |row| row.get(0))
        .map_err(fail)?;
    if mode != "wal" {
        return Err(unusable(
            name,
            "its file system does not support shared memory for SQLite's WAL; use a local disk",
        ));
    }
    connection
        .execute_batch("PRAGMA synchronous=FULL")
        .map_err(fail)?;
    let create = |connection: &mut Connection| -> rusqlite::Result<()> {
        let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        // Read again under the lock: another node may have made the tables meanwhile.
        if pragma(&transaction, "user_version")? == 0 {
            transaction.execute_batch(SCHEMA)?;
            transaction.pragma_update(None, "application_id", APPLICATION_ID)?;
            transaction.pragma_update(None, "user_version", SCHEMA_VERSION)?;
        }
        transaction.commit()
    };
    create(connection).map_err(fail)
}

fn unusable(name: &str, why: &str) -> RegistryError {
    RegistryError::Unusable {
        registry: name.into(),
        why: why.into(),
    }
}

/// What SQLite said, as something a person can act on.
pub(super) fn explain(name: &str, error: &rusqlite::Error) -> RegistryError {
    match error.sqlite_error_code() {
        Some(ErrorCode::NotADatabase | ErrorCode::DatabaseCorrupt) => unusable(
            name,
            &format!("the file is damaged or not a database ({error}); restore it from a backup"),
        ),
        Some(ErrorCode::ReadOnly | ErrorCode::PermissionDenied) => unusable(
            name,
            &format!("the file cannot be written ({error}); check its owner, mode and mount"),
        ),
        Some(ErrorCode::CannotOpen) => unusable(
            name,
            &format!("{error}; its directory must exist and be writable"),
        ),
        _ => RegistryError::Unavailable {
            registry: name.into(),
            why: error.to_string(),
        },
    }
}
