//! Events: a node's own, all nodes' merged, and followed as lines of JSON.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::thread;
use std::time::Duration;

use axum::Json;
use axum::body::{Body, Bytes};
use axum::extract::{Query, State};
use axum::response::{IntoResponse, Response};
use hyper::body::Frame;
use serde::Deserialize;
use tokio::sync::mpsc::{Receiver, Sender, channel};

use super::read::LocalEvents;
use super::reply::{Failure, json};
use crate::cluster::events::Event;
use crate::cluster::fault::Fault;
use crate::cluster::live::{Question, fan_out};
use crate::cluster::model::VolumeName;
use crate::cluster::plane::Plane;
use crate::replication::ids::NodeName;

/// Events returned when no limit is given, and the most that are.
const LIMIT: usize = 100;
const LIMIT_MAX: usize = 2000;
/// Streams at once: each holds a thread and asks every node once a second.
const FOLLOWERS_MAX: usize = 32;
/// How often a stream asks the other nodes.
const FOLLOW_PAUSE: Duration = Duration::from_secs(1);
/// Lines a slow reader may leave unread before the stream waits for it.
const BACKLOG: usize = 64;

static FOLLOWERS: AtomicUsize = AtomicUsize::new(0);

/// Which events.
#[derive(Deserialize)]
pub(super) struct Which {
    volume: Option<String>,
    #[serde(default)]
    after: u64,
    limit: Option<usize>,
    #[serde(default)]
    follow: bool,
}

impl Which {
    fn limit(&self) -> usize {
        self.limit.unwrap_or(LIMIT).min(LIMIT_MAX)
    }

    /// The volume as `namespace/name`.
    fn volume(&self) -> Result<Option<String>, Fault> {
        let name = self.volume.as_deref().map(str::parse::<VolumeName>);
        Ok(name.transpose()?.map(|n| n.to_string()))
    }
}

/// This node's events.
pub(super) async fn local(
    State(plane): State<Arc<Plane>>,
    Query(which): Query<Which>,
) -> Result<Json<LocalEvents>, Failure> {
    let volume = which.volume()?;
    Ok(Json(LocalEvents {
        last: plane.events.last(),
        events: plane
            .events
            .after(which.after, volume.as_deref(), which.limit()),
    }))
}

/// All nodes' events in the order of their time; nodes that do not answer are passed over.
pub(super) async fn all(State(plane): State<Arc<Plane>>, Query(which): Query<Which>) -> Response {
    let volume = match which.volume() {
        Ok(volume) => volume,
        Err(fault) => return Failure(fault).into_response(),
    };
    if which.follow {
        return follow(plane, volume, which.limit()).into_response();
    }
    json(plane, move |plane| {
        gathered(plane, volume.as_deref(), which.limit()).map(|(events, _)| events)
    })
    .await
    .into_response()
}

/// How far each node's events were read.
type Cursors = BTreeMap<NodeName, u64>;

/// The last `limit` events of all nodes, and how far they reach.
pub(super) fn gathered(
    plane: &Plane,
    volume: Option<&str>,
    limit: usize,
) -> Result<(Vec<Event>, Cursors), Fault> {
    let mut cursors = Cursors::new();
    let mut events = round(plane, volume, limit, &mut cursors)?;
    let surplus = events.len().saturating_sub(limit);
    events.drain(..surplus);
    Ok((events, cursors))
}

/// What is new since `cursors`, in the order of time.
fn round(
    plane: &Plane,
    volume: Option<&str>,
    limit: usize,
    cursors: &mut Cursors,
) -> Result<Vec<Event>, Fault> {
    let from = |cursors: &Cursors, node: &NodeName| cursors.get(node).copied().unwrap_or(0);
    // Read before the events: one that comes in between is passed over by neither this round nor the next.
    let last = plane.events.last();
    let mut events = plane
        .events
        .after(from(cursors, &plane.node), volume, limit);
    let last = events.last().map_or(last, |e| e.seq.max(last));
    cursors.insert(plane.node.clone(), last);

    let snapshot = plane.store.snapshot()?;
    let filter = volume.map_or(String::new(), |v| format!("&volume={v}"));
    let others: Vec<Question> = snapshot
        .nodes
        .values()
        .filter(|(node, _)| node.name != plane.node)
        .map(|(node, _)| Question {
            node: node.name.clone(),
            address: plane.http_of(node),
            path: format!(
                "/api/v1/local/events?after={}&limit={limit}{filter}",
                from(cursors, &node.name)
            ),
        })
        .collect();
    for (node, answer) in fan_out::<LocalEvents>(others) {
        let Ok(answer) = answer else { continue };
        // A node that begins to count anew lost its data directory: the next round asks for all it has.
        let last = answer
            .events
            .last()
            .map_or(answer.last, |e| e.seq.max(answer.last));
        events.extend(answer.events);
        cursors.insert(node, last);
    }
    events.sort_by(|a, b| (&a.time, &a.node, a.seq).cmp(&(&b.time, &b.node, b.seq)));
    Ok(events)
}

/// A stream of the last `limit` events and all that follow.
fn follow(plane: Arc<Plane>, volume: Option<String>, limit: usize) -> Result<Response, Failure> {
    if FOLLOWERS.fetch_add(1, Ordering::Relaxed) >= FOLLOWERS_MAX {
        FOLLOWERS.fetch_sub(1, Ordering::Relaxed);
        return Err(Failure(Fault::try_again(format!(
            "{FOLLOWERS_MAX} streams of events are open already"
        ))));
    }
    let (lines, body) = channel(BACKLOG);
    thread::spawn(move || {
        stream(&plane, volume.as_deref(), limit, &lines);
        FOLLOWERS.fetch_sub(1, Ordering::Relaxed);
    });
    let body = Body::new(Lines(body));
    Ok(([("content-type", "application/x-ndjson")], body).into_response())
}

fn stream(plane: &Plane, volume: Option<&str>, limit: usize, lines: &Sender<Bytes>) {
    let mut cursors = None;
    while !lines.is_closed() && plane.still_running().is_ok() {
        let news = match &mut cursors {
            None => gathered(plane, volume, limit).map(|(events, at)| {
                cursors = Some(at);
                events
            }),
            Some(cursors) => round(plane, volume, LIMIT_MAX, cursors),
        };
        // A registry that does not answer now only hides the other nodes' events for a while.
        for event in news.unwrap_or_default() {
            let Ok(mut line) = serde_json::to_vec(&event) else {
                continue;
            };
            line.push(b'\n');
            if lines.blocking_send(line.into()).is_err() {
                return;
            }
        }
        plane.events.wait(plane.events.last(), FOLLOW_PAUSE);
    }
}

/// Lines as a response body.
struct Lines(Receiver<Bytes>);

impl hyper::body::Body for Lines {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        self.0
            .poll_recv(cx)
            .map(|line| line.map(|l| Ok(Frame::data(l))))
    }
}
