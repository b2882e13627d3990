//! Watches over the SQLite registry: one thread reads the log of changes for all watches of one open registry.
//!
//! SQLite tells nobody of another process's commit, so the thread asks `PRAGMA data_version`, which costs no disk
//! access, every [`POLL`]. A commit through our own connection nudges it at once. A watch whose reader is slow is not
//! waited for: its position stays and is read again later, so nothing is lost and no queue grows.

use std::path::Path;
use std::sync::mpsc::{
    Receiver, RecvTimeoutError, Sender, SyncSender, TrySendError, channel, sync_channel,
};
use std::sync::{Arc, Weak};
use std::thread;
use std::time::Duration;

use rusqlite::{Connection, TransactionBehavior, params};

use super::sqlite::{connect, explain};
use super::{Event, RegistryError, Revision, Watch, WatchError};

/// How late a change of another process is seen at most. A creation or an attach takes some of these.
const POLL: Duration = Duration::from_millis(50);
/// Batches a slow reader may leave unread before its watch stands still.
const BACKLOG: usize = 64;
/// Rows read for one watch in one turn, so that one far behind does not starve the others.
const ROWS_MAX: u32 = 1024;
/// Failed turns in a row before watches are told. SQLite's busy timeout is inside each turn already.
const FAILURES_MAX: u32 = 3;

enum Ask {
    Add(Follower),
    Nudge,
}

struct Follower {
    prefix: String,
    from: Revision,
    batches: SyncSender<Result<Vec<Event>, WatchError>>,
    reader: Weak<()>,
}

/// The thread's handle; the thread ends when it is dropped.
pub(super) struct Watcher {
    asks: Sender<Ask>,
    registry: String,
}

impl Watcher {
    pub(super) fn start(path: Arc<Path>, registry: String) -> Result<Self, RegistryError> {
        // Its own connection: `data_version` tells only of commits made through others.
        let connection = connect(&path, &registry)?;
        let (asks, inbox) = channel();
        let name = registry.clone();
        thread::Builder::new()
            .name("registry-watch".into())
            .spawn(move || Turns::new(connection, name).run(&inbox))
            .map_err(|e| RegistryError::Unavailable {
                registry: registry.clone(),
                why: format!("no thread for its watches: {e}"),
            })?;
        Ok(Self { asks, registry })
    }

    pub(super) fn add(&self, prefix: &str, from: Revision) -> Result<Watch, RegistryError> {
        let (batches, receiver) = sync_channel(BACKLOG);
        let (watch, reader) = Watch::new(receiver);
        let follower = Follower {
            prefix: prefix.into(),
            from,
            batches,
            reader,
        };
        self.asks
            .send(Ask::Add(follower))
            .map_err(|_| RegistryError::Unavailable {
                registry: self.registry.clone(),
                why: "the thread for its watches has ended".into(),
            })?;
        Ok(watch)
    }

    /// Something was committed here.
    pub(super) fn nudge(&self) {
        // A thread that ended has closed every watch already.
        let _ = self.asks.send(Ask::Nudge);
    }
}

struct Turns {
    connection: Connection,
    registry: String,
    followers: Vec<Follower>,
    seen_version: Option<i64>,
    failures: u32,
}

/// What became of one follower in one turn.
enum Step {
    /// It has everything.
    Level,
    /// More is to be read for it, or it is full.
    Behind,
    /// Its reader is gone or its watch broke.
    Over,
}

impl Turns {
    fn new(connection: Connection, registry: String) -> Self {
        Self {
            connection,
            registry,
            followers: Vec::new(),
            seen_version: None,
            failures: 0,
        }
    }

    fn run(mut self, inbox: &Receiver<Ask>) {
        loop {
            let mut look = false;
            match inbox.recv_timeout(POLL) {
                Ok(ask) => {
                    self.take(ask);
                    while let Ok(more) = inbox.try_recv() {
                        self.take(more);
                    }
                    look = true;
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            self.followers.retain(|f| f.reader.strong_count() > 0);
            if self.followers.is_empty() {
                continue;
            }
            match self.turn(look) {
                Ok(()) => self.failures = 0,
                Err(e) => {
                    self.failures += 1;
                    self.seen_version = None;
                    if self.failures >= FAILURES_MAX {
                        self.close_all(&explain(&self.registry, &e));
                    }
                }
            }
        }
    }

    fn take(&mut self, ask: Ask) {
        if let Ask::Add(follower) = ask {
            self.followers.push(follower);
        }
    }

    fn close_all(&mut self, error: &RegistryError) {
        for follower in self.followers.drain(..) {
            // A full queue: the reader finds the closed end after it.
            let _ = follower.batches.try_send(Err(error.clone().into()));
        }
    }

    fn turn(&mut self, look: bool) -> rusqlite::Result<()> {
        let version: i64 = self
            .connection
            .query_row("PRAGMA data_version", [], |row| row.get(0))?;
        if !look && self.seen_version == Some(version) {
            return Ok(());
        }
        let mut all_level = true;
        let mut i = 0;
        while i < self.followers.len() {
            match step(&mut self.connection, &mut self.followers[i])? {
                Step::Level => i += 1,
                Step::Behind => {
                    all_level = false;
                    i += 1;
                }
                Step::Over => {
                    self.followers.swap_remove(i);
                }
            }
        }
        // `version` was read before the rows: a commit in between changes it and is looked at next time.
        self.seen_version = all_level.then_some(version);
        Ok(())
    }
}

/// Hands one follower what is new for it.
fn step(connection: &mut Connection, follower: &mut Follower) -> rusqlite::Result<Step> {
    let snapshot = connection.transaction_with_behavior(TransactionBehavior::Deferred)?;
    let (now, compacted): (Revision, Revision) =
        snapshot.query_row("SELECT revision, compacted FROM counters", [], |row| {
            Ok((row.get(0)?, row.get(1)?))
        })?;
    let from = follower.from;
    // Beyond the end: the file was replaced by an older one; its history is not the one the reader knows.
    if from < compacted || from > now {
        let _ = follower
            .batches
            .try_send(Err(WatchError::Compacted { from }));
        return Ok(Step::Over);
    }
    let mut rows = snapshot.prepare_cached(
        "SELECT revision, key, value FROM changes
         WHERE revision > ?1 AND substr(key, 1, length(?2)) = ?2 ORDER BY seq LIMIT ?3",
    )?;
    let mut events: Vec<Event> = rows
        .query_map(params![from, follower.prefix, ROWS_MAX], |row| {
            Ok(Event {
                revision: row.get(0)?,
                key: row.get(1)?,
                value: row.get(2)?,
            })
        })?
        .collect::<rusqlite::Result<_>>()?;
    let cut = events.len() == ROWS_MAX as usize;
    let mut upto = now;
    if cut && let Some(last) = events.last().map(|e| e.revision) {
        // Never half a transaction in a batch: what was cut off is read next time with the rest of its revision.
        let whole = events.iter().filter(|e| e.revision < last).count();
        if whole > 0 {
            events.truncate(whole);
            upto = Revision(last.0 - 1);
        } else {
            events = whole_revision(&snapshot, follower, last)?;
            upto = last;
        }
    }
    if events.is_empty() {
        follower.from = upto;
        return Ok(Step::Level);
    }
    Ok(match follower.batches.try_send(Ok(events)) {
        Ok(()) => {
            follower.from = upto;
            if cut { Step::Behind } else { Step::Level }
        }
        Err(TrySendError::Full(_)) => Step::Behind,
        Err(TrySendError::Disconnected(_)) => Step::Over,
    })
}

/// All events of one revision, however many: a transaction larger than a turn.
fn whole_revision(
    connection: &Connection,
    follower: &Follower,
    revision: Revision,
) -> rusqlite::Result<Vec<Event>> {
    connection
        .prepare_cached(
            "SELECT key, value FROM changes
             WHERE revision = ?1 AND substr(key, 1, length(?2)) = ?2 ORDER BY seq",
        )?
        .query_map(params![revision, follower.prefix], |row| {
            Ok(Event {
                revision,
                key: row.get(0)?,
                value: row.get(1)?,
            })
        })?
        .collect()
}
