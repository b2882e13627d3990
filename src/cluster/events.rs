//! Every change of state is an event: kept in memory for the API, and in a bounded file for afterwards.

use std::collections::VecDeque;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::units::{show_time, wall_ms};
use crate::replication::ids::{Epoch, NodeName};

/// Events kept in memory: some hours of an unlucky day, under a megabyte.
const RING: usize = 2048;
/// Bytes of the file before it becomes `events.jsonl.1` and a new one begins; so at most twice this on disk.
const FILE_MAX: u64 = 4 << 20;
/// Lines that may wait for the disk. Beyond, the file lacks them; memory and log have them.
const FILE_BACKLOG: usize = 4096;
/// The longest text of one event, in characters.
const TEXT_MAX: usize = 1000;

/// One change of state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// Counts a node's events since its file began; with `node` it names the event.
    pub seq: u64,
    /// When, UTC with milliseconds, by the node's clock.
    pub time: String,
    /// Where.
    pub node: NodeName,
    /// What happened.
    #[serde(flatten)]
    pub what: What,
}

/// What happened.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct What {
    /// `namespace/name`; `None`: it concerns the node.
    pub volume: Option<String>,
    /// The state before.
    pub from: String,
    /// The state after.
    pub to: String,
    /// The rule that decided it.
    pub rule: String,
    /// The epoch in force, where there is one.
    pub epoch: Option<Epoch>,
    /// One sentence.
    pub text: String,
}

impl What {
    /// A change of `volume`.
    pub fn volume(volume: impl ToString, from: &str, to: &str, rule: &str) -> Self {
        Self {
            volume: Some(volume.to_string()),
            ..Self::node(from, to, rule)
        }
    }

    /// A change of the node itself.
    pub fn node(from: &str, to: &str, rule: &str) -> Self {
        Self {
            from: from.into(),
            to: to.into(),
            rule: rule.into(),
            ..Self::default()
        }
    }

    /// The same under `epoch`.
    #[must_use]
    pub fn epoch(mut self, epoch: Epoch) -> Self {
        self.epoch = Some(epoch);
        self
    }

    /// The same with a sentence.
    #[must_use]
    pub fn text(mut self, text: impl Into<String>) -> Self {
        self.text = text.into();
        self
    }
}

struct Ring {
    events: VecDeque<Event>,
    next: u64,
}

/// A node's events.
pub struct EventLog {
    node: NodeName,
    ring: Mutex<Ring>,
    grown: Condvar,
    lines: SyncSender<String>,
}

impl EventLog {
    /// Opens `<data_dir>/events.jsonl` and remembers its end. Lines that cannot be read (a torn one after a crash)
    /// are skipped.
    pub fn open(node: NodeName, data_dir: &Path) -> io::Result<Arc<Self>> {
        let path = data_dir.join("events.jsonl");
        let events = tail(&path)?;
        let next = events.back().map_or(1, |e| e.seq + 1);
        let file = Appender::open(path)?;
        let (lines, inbox) = sync_channel(FILE_BACKLOG);
        thread::Builder::new()
            .name("events".into())
            .spawn(move || file.run(&inbox))?;
        Ok(Arc::new(Self {
            node,
            ring: Mutex::new(Ring { events, next }),
            grown: Condvar::new(),
            lines,
        }))
    }

    /// Notes and logs a change. Does not wait for the disk.
    pub fn push(&self, mut what: What) {
        if let Some((cut, _)) = what.text.char_indices().nth(TEXT_MAX) {
            what.text.truncate(cut);
        }
        log::info!(
            "{}: {} -> {} (rule {}, epoch {}) {}",
            what.volume.as_deref().unwrap_or("node"),
            what.from,
            what.to,
            what.rule,
            what.epoch.map_or_else(|| "-".into(), |e| e.to_string()),
            what.text
        );
        let mut ring = self.lock();
        let event = Event {
            seq: ring.next,
            time: show_time(wall_ms()),
            node: self.node.clone(),
            what,
        };
        ring.next += 1;
        if let Ok(line) = serde_json::to_string(&event) {
            // Full: the disk does not keep up; it must not hold up a change of state.
            let _ = self.lines.try_send(line);
        }
        if ring.events.len() == RING {
            ring.events.pop_front();
        }
        ring.events.push_back(event);
        drop(ring);
        self.grown.notify_all();
    }

    /// The events after `seq`, of `volume` alone if given, the last `limit` of them.
    pub fn after(&self, seq: u64, volume: Option<&str>, limit: usize) -> Vec<Event> {
        let ring = self.lock();
        let matching = ring
            .events
            .iter()
            .rev()
            .take_while(|e| e.seq > seq)
            .filter(|e| volume.is_none_or(|v| e.what.volume.as_deref() == Some(v)));
        let mut events: Vec<Event> = matching.take(limit).cloned().collect();
        events.reverse();
        events
    }

    /// The number of the last event, 0 when there is none.
    pub fn last(&self) -> u64 {
        self.lock().next - 1
    }

    /// Waits until there is an event after `seq`, at most `patience`.
    pub fn wait(&self, seq: u64, patience: Duration) {
        let deadline = Instant::now() + patience;
        let mut ring = self.lock();
        while ring.next <= seq + 1 {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            ring = self
                .grown
                .wait_timeout(ring, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    fn lock(&self) -> MutexGuard<'_, Ring> {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn tail(path: &Path) -> io::Result<VecDeque<Event>> {
    let mut events = VecDeque::new();
    for path in [older(path), path.to_path_buf()] {
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
            Err(e) => return Err(e),
        };
        for line in BufReader::new(file).split(b'\n') {
            if let Ok(event) = serde_json::from_slice(&line?) {
                if events.len() == RING {
                    events.pop_front();
                }
                events.push_back(event);
            }
        }
    }
    Ok(events)
}

fn older(path: &Path) -> PathBuf {
    path.with_extension("jsonl.1")
}

/// The file's only writer.
struct Appender {
    path: PathBuf,
    file: File,
    len: u64,
}

impl Appender {
    fn open(path: PathBuf) -> io::Result<Self> {
        let mut file = OpenOptions::new()
            .create(true)
            .append(true)
            .read(true)
            .open(&path)?;
        let mut len = file.metadata()?.len();
        if len > 0 {
            let mut last = [0];
            file.seek(SeekFrom::End(-1))?;
            file.read_exact(&mut last)?;
            if last != *b"\n" {
                // A crash tore the last line: end it, so that the next one stands alone.
                file.write_all(b"\n")?;
                len += 1;
            }
        }
        Ok(Self { path, file, len })
    }

    fn run(mut self, inbox: &Receiver<String>) {
        let mut failing = false;
        while let Ok(line) = inbox.recv() {
            match self.append(&line) {
                Ok(()) => failing = false,
                Err(e) => {
                    if !failing {
                        log::warn!("events are not written to {}: {e}", self.path.display());
                    }
                    failing = true;
                }
            }
        }
    }

    fn append(&mut self, line: &str) -> io::Result<()> {
        if self.len > FILE_MAX {
            fs::rename(&self.path, older(&self.path))?;
            *self = Self::open(self.path.clone())?;
        }
        let text = format!("{line}\n");
        self.file.write_all(text.as_bytes())?;
        self.len += text.len() as u64;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_filtered_numbered_and_survive_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let node = NodeName("n1".into());
        let log = EventLog::open(node.clone(), dir.path()).unwrap();
        log.push(What::volume("default/a", "clean", "active", "attach").epoch(Epoch(2)));
        log.push(What::node("", "up", "start"));
        log.push(What::volume("default/b", "clean", "active", "attach"));
        assert_eq!(log.after(0, Some("default/a"), 10).len(), 1);
        assert_eq!(log.after(2, None, 10).len(), 1);
        assert_eq!(log.after(0, None, 2)[0].seq, 2);
        log.wait(2, Duration::from_secs(60));
        drop(log);
        // The writer ends after its queue; wait until the file has all lines.
        let path = dir.path().join("events.jsonl");
        while fs::read_to_string(&path).unwrap().lines().count() < 3 {
            thread::yield_now();
        }
        fs::write(&path, fs::read_to_string(&path).unwrap() + "{\"torn").unwrap();
        let log = EventLog::open(node, dir.path()).unwrap();
        assert_eq!(log.last(), 3);
        log.push(What::node("", "up", "start"));
        assert_eq!(log.after(3, None, 10)[0].seq, 4);
        assert_eq!(
            log.after(0, Some("default/a"), 1)[0].what.epoch,
            Some(Epoch(2))
        );
    }
}
