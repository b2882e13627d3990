//! A watch over etcd: a task that keeps a stream open to whichever member answers, and resumes it by revision.
//!
//! Nothing is lost over a break: the next stream begins at the last revision that was handed over. When etcd has
//! compacted what lies between, the reader is told, lists again, and watches from the listing.

use std::sync::mpsc::{SyncSender, TrySendError};
use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio::time::{Instant, sleep, timeout};

use super::etcd::{behind, own_key, revision};
use super::etcd_members::{ANSWER, CallError, Kind, Members, Trouble};
use super::etcd_proto::{
    DELETE, RANGE, RangeRequest, RangeResponse, WATCH, WatchCreateRequest, WatchEvent,
    WatchRequest, WatchResponse,
};
use super::etcd_rpc::{Failure, Stream, late};
use super::{ALIVE, Event, RegistryError, Revision, WatchError};

/// How long a watch goes on trying before its reader is told. Longer than an election or the restart of a member.
const PATIENCE: Duration = Duration::from_secs(10);
/// Between two attempts at a stream.
const PAUSE: Duration = Duration::from_millis(200);
/// How often a quiet watch looks whether anybody still reads it.
const LOOK: Duration = Duration::from_secs(1);
/// Pause before a batch is offered to a slow reader again. Meanwhile the stream's window holds etcd back.
const FULL: Duration = Duration::from_millis(20);

/// Why a stream ended.
enum End {
    /// Nobody reads the watch any more.
    Unread,
    /// The reader must list again.
    Compacted,
    /// Another one may do better.
    Broke(String),
}

impl From<Trouble> for End {
    fn from(trouble: Trouble) -> Self {
        match trouble {
            Trouble::Unreachable(why) | Trouble::Refused(why) => Self::Broke(why),
        }
    }
}

struct Follower {
    members: Arc<Members>,
    space: Arc<str>,
    key: Vec<u8>,
    /// All changes up to it were handed over.
    from: Revision,
    batches: SyncSender<Result<Vec<Event>, WatchError>>,
    reader: Weak<()>,
    /// Since when there is no stream.
    down: Option<Instant>,
}

/// Hands every change after `from` of keys that begin with `prefix` to `batches`, until nobody reads them.
pub(super) async fn follow(
    members: Arc<Members>,
    registry: Arc<str>,
    space: Arc<str>,
    prefix: String,
    from: Revision,
    batches: SyncSender<Result<Vec<Event>, WatchError>>,
    reader: Weak<()>,
) {
    let mut follower = Follower {
        key: [space.as_bytes(), prefix.as_bytes()].concat(),
        members,
        space,
        from,
        batches,
        reader,
        down: None,
    };
    let error = loop {
        match follower.stream().await {
            End::Unread => return,
            End::Compacted => {
                break WatchError::Compacted {
                    from: follower.from,
                };
            }
            End::Broke(why) => {
                log::debug!("a watch of {registry} from {} broke: {why}", follower.from);
                let down = *follower.down.get_or_insert_with(Instant::now);
                if down.elapsed() >= PATIENCE {
                    break WatchError::Registry(RegistryError::Unavailable {
                        registry: registry.to_string(),
                        why,
                    });
                }
            }
        }
        if follower.is_unread() {
            return;
        }
        sleep(PAUSE).await;
    };
    // A reader whose queue is full finds the closed end behind it.
    let _ = follower.batches.try_send(Err(error));
}

impl Follower {
    fn is_unread(&self) -> bool {
        self.reader.strong_count() == 0
    }

    /// One stream, from its beginning to its end.
    async fn stream(&mut self) -> End {
        match self.begin().await {
            Ok(stream) => {
                self.down = None;
                self.read(stream).await
            }
            Err(end) => end,
        }
    }

    async fn begin(&mut self) -> Result<Stream, End> {
        let channel = self.members.channel().await?;
        let question = WatchRequest {
            create: Some(WatchCreateRequest {
                key: self.key.clone(),
                range_end: behind(&self.key),
                // Not one later. An etcd without its change 18274 (August 2024) forgets a deletion made at the very
                // revision that it compacts at, and would begin a watch there all the same: what was deleted would live
                // on for the reader. From one earlier on, it says "compacted". What is told twice is left out below.
                start_revision: i64::try_from(self.from.0.max(1)).unwrap_or(i64::MAX),
                progress_notify: true,
            }),
        };
        let opening = async {
            let mut stream = channel.open(WATCH, &question, None).await?;
            let first = stream.next::<WatchResponse>().await?;
            Ok((stream, first))
        };
        let opened = timeout(ANSWER, opening)
            .await
            .unwrap_or_else(|_| Err(Failure::Lost(late(ANSWER))));
        let (stream, first) = match opened {
            Ok((stream, Some(first))) => (stream, first),
            Ok((_, None)) => return Err(End::Broke("the watch ended at once".into())),
            Err(failure) => {
                channel.close();
                return Err(broke(failure));
            }
        };
        if first.canceled {
            // It may be our token that is too old.
            self.members.log_in(&channel).await?;
            return Err(canceled(&first));
        }
        let now = first.header.map_or(0, |h| h.revision);
        if revision(now).is_ok_and(|now| now < self.from) {
            // The member lags behind, and the watch goes on when it has caught up; or all of etcd is an older one, whose
            // history is not the one the reader knows.
            let now = self.current().await?;
            if now < self.from {
                return Err(End::Compacted);
            }
        }
        Ok(stream)
    }

    /// The store's revision, by a linearizable read.
    async fn current(&self) -> Result<Revision, End> {
        let question = RangeRequest {
            key: self.key.clone(),
            range_end: Vec::new(),
        };
        let asked = self.members.call(RANGE, &question, Kind::Read).await;
        let answer: RangeResponse = asked.map_err(|e| match e {
            CallError::Unavailable(why) | CallError::Unusable(why) | CallError::Ambiguous(why) => {
                End::Broke(why)
            }
        })?;
        let header = answer
            .header
            .ok_or_else(|| End::Broke("an answer without a header".into()))?;
        revision(header.revision).map_err(|what| End::Broke(what.into()))
    }

    async fn read(&mut self, mut stream: Stream) -> End {
        loop {
            let next = match timeout(LOOK, stream.next::<WatchResponse>()).await {
                Err(_) if self.is_unread() => return End::Unread,
                Err(_) => continue,
                Ok(Ok(Some(next))) => next,
                Ok(Ok(None)) => return End::Broke("the stream ended".into()),
                Ok(Err(failure)) => return broke(failure),
            };
            if next.canceled {
                return canceled(&next);
            }
            match self.take(next).await {
                Ok(()) => {}
                Err(end) => return end,
            }
        }
    }

    async fn take(&mut self, response: WatchResponse) -> Result<(), End> {
        if response.events.is_empty() {
            // Progress: nothing happened here up to this revision, so a compaction up to it is no loss.
            if let Some(Ok(now)) = response.header.map(|h| revision(h.revision)) {
                self.from = self.from.max(now);
            }
            return Ok(());
        }
        let events = response.events.into_iter().map(|e| self.event(e));
        let mut batch = events
            .collect::<Result<Vec<_>, _>>()
            .map_err(|what| End::Broke(what.into()))?;
        // etcd never spreads one revision over two answers, so what is left of a batch is still whole revisions.
        let last = batch.last().map_or(self.from, |event| event.revision);
        batch.retain(|event| event.revision > self.from && !event.key.starts_with(ALIVE));
        if !batch.is_empty() {
            self.hand_over(batch).await?;
        }
        self.from = self.from.max(last);
        Ok(())
    }

    fn event(&self, event: WatchEvent) -> Result<Event, &'static str> {
        let kv = event.kv.ok_or("an event without a key")?;
        Ok(Event {
            key: own_key(&self.space, &kv.key),
            revision: revision(kv.mod_revision)?,
            value: (event.kind != DELETE).then_some(kv.value),
        })
    }

    async fn hand_over(&self, batch: Vec<Event>) -> Result<(), End> {
        let mut offer = Ok(batch);
        loop {
            offer = match self.batches.try_send(offer) {
                Ok(()) => return Ok(()),
                Err(TrySendError::Disconnected(_)) => return Err(End::Unread),
                Err(TrySendError::Full(_)) if self.is_unread() => return Err(End::Unread),
                Err(TrySendError::Full(back)) => back,
            };
            sleep(FULL).await;
        }
    }
}

fn broke(failure: Failure) -> End {
    match failure {
        Failure::Unsent(why) | Failure::Lost(why) | Failure::Refused(_, why) => End::Broke(why),
    }
}

fn canceled(response: &WatchResponse) -> End {
    match response.compact_revision {
        0 => End::Broke(format!("etcd ended it: {}", response.cancel_reason)),
        _ => End::Compacted,
    }
}
