//! What can be read: on the socket and on the TCP port.

use std::sync::Arc;

use axum::extract::{Path, Query, State};
use axum::http::{Method, StatusCode, Uri};
use axum::response::{Html, IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use serde::{Deserialize, Serialize};

use super::reply::{Failure, Reply, blocking, json, name};
use super::{events, html, metrics};
use crate::cluster::drain;
use crate::cluster::events::Event;
use crate::cluster::fault::{Code, Fault};
use crate::cluster::host::UpgradeView;
use crate::cluster::labels::Of;
use crate::cluster::live::{Identity, Live, LocalStatus, gather, gather_brief, sight};
use crate::cluster::model::check_name;
use crate::cluster::plane::Plane;
use crate::cluster::scrub::{self, ScrubView};
use crate::cluster::selector::Selector;
use crate::cluster::snapshot::Snapshot;
use crate::cluster::view::{self, ClusterView, NodeView, VolumeView};
use crate::replication::ids::{NodeName, VolumeId};

/// The media type of Prometheus' text format.
const METRICS_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";
/// Events in an inspection.
const EVENTS_SHOWN: usize = 10;

pub(super) fn router() -> Router<Arc<Plane>> {
    Router::new()
        .route("/", get(page))
        .route("/healthz", get(healthz))
        .route("/metrics", get(metrics_text))
        .route("/api/v1/cluster", get(cluster))
        .route("/api/v1/nodes", get(nodes))
        .route("/api/v1/nodes/{name}", get(node))
        .route("/api/v1/volumes", get(volumes))
        .route("/api/v1/volumes/{namespace}/{name}", get(volume))
        .route("/api/v1/volumes/{namespace}/{name}/scrub", get(scrub))
        .route("/api/v1/events", get(events::all))
        .route("/api/v1/local/status", get(status))
        .route("/api/v1/local/upgrade", get(upgrade))
        .route("/api/v1/local/events", get(events::local))
        .fallback(nothing_here)
        .method_not_allowed_fallback(not_that_way)
}

async fn nothing_here(uri: Uri) -> Failure {
    Failure(
        Fault::not_found(format!("there is nothing at {}", uri.path()))
            .hint("the API is under /api/v1/"),
    )
}

async fn not_that_way(method: Method, uri: Uri) -> Response {
    let fault = Fault::new(
        Code::InvalidInput,
        format!("{} does not take {method}", uri.path()),
    )
    .hint("changes are made on the node's socket (<run-dir>/api.sock); the HTTP port only reads");
    (StatusCode::METHOD_NOT_ALLOWED, Json(fault)).into_response()
}

/// Registry and live status of all nodes.
pub(super) fn look(plane: &Plane) -> Result<(Snapshot, Live), Fault> {
    let snapshot = plane.store.snapshot()?;
    let live = gather(plane, snapshot.nodes.values().map(|(n, _)| n));
    Ok((snapshot, live))
}

#[derive(Serialize)]
struct Healthz {
    status: &'static str,
    #[serde(flatten)]
    identity: Identity,
    #[serde(skip_serializing_if = "Option::is_none")]
    why: Option<String>,
}

async fn upgrade(State(plane): State<Arc<Plane>>) -> Reply<UpgradeView> {
    json(plane, |plane| plane.host.upgrade_state()).await
}

async fn healthz(State(plane): State<Arc<Plane>>) -> Response {
    let (fatal, waits) = (plane.fatal(), plane.waits());
    let (status, state) = match (&fatal, &waits) {
        (Some(_), _) => (StatusCode::SERVICE_UNAVAILABLE, "failed"),
        // It answers for its copies, whatever it waits for.
        (None, Some(_)) => (StatusCode::OK, "waiting"),
        (None, None) => (StatusCode::OK, "ok"),
    };
    let answer = Healthz {
        status: state,
        identity: Identity {
            cluster: plane.cluster,
            node: plane.node.clone(),
            instance: plane.instance,
        },
        why: fatal.or(waits),
    };
    (status, Json(answer)).into_response()
}

async fn metrics_text(State(plane): State<Arc<Plane>>) -> Result<Response, Failure> {
    let text = blocking(plane, |plane| Ok(metrics::render(plane))).await?;
    Ok(([("content-type", METRICS_TYPE)], text).into_response())
}

async fn page(State(plane): State<Arc<Plane>>) -> Result<Html<String>, Failure> {
    let html = blocking(plane, |plane| {
        let (snapshot, live) = look(plane)?;
        Ok(html::page(
            &view::volumes(&snapshot, &live),
            &view::nodes(&snapshot, &live, &sight(plane, &live)),
        ))
    });
    html.await.map(Html)
}

async fn cluster(State(plane): State<Arc<Plane>>) -> Reply<ClusterView> {
    json(plane, |plane| {
        let (snapshot, live) = look(plane)?;
        let registry = plane.store.registry_name();
        let sight = sight(plane, &live);
        Ok(view::cluster(
            &snapshot,
            &live,
            &sight,
            plane.cluster,
            registry,
        ))
    })
    .await
}

async fn nodes(State(plane): State<Arc<Plane>>) -> Reply<Vec<NodeView>> {
    json(plane, |plane| {
        let (snapshot, live) = look(plane)?;
        Ok(view::nodes(&snapshot, &live, &sight(plane, &live)))
    })
    .await
}

async fn node(State(plane): State<Arc<Plane>>, Path(name): Path<String>) -> Reply<NodeView> {
    json(plane, move |plane| {
        check_name(&name)?;
        let name = NodeName(name);
        let snapshot = plane.store.snapshot()?;
        let (record, _) = snapshot.nodes.get(&name).ok_or_else(|| {
            Fault::not_found(format!("there is no node {name}")).hint("see: lockstep node ls")
        })?;
        // Where its copies go depends on all that the others have; how it is, on whom they reach.
        let all = snapshot.nodes.values().map(|(n, _)| n);
        let live = match record.draining {
            Some(_) => gather(plane, all),
            None => {
                let mut live = gather_brief(plane, all);
                live.0.extend(gather(plane, [record].into_iter()).0);
                live
            }
        };
        let mut node = view::node(record, &snapshot, &live, &sight(plane, &live));
        node.drain = drain::progress(record, &snapshot, &live);
        if let Some(status) = live.node(&name) {
            node.copies = view::node_copies(&status.copies, &snapshot);
            node.ways = status.ways.clone();
        }
        Ok(node)
    })
    .await
}

/// Which volumes.
#[derive(Deserialize)]
struct Which {
    /// Of this namespace; of all when not said.
    namespace: Option<String>,
    /// With these labels.
    selector: Option<String>,
}

async fn volumes(
    State(plane): State<Arc<Plane>>,
    Query(which): Query<Which>,
) -> Reply<Vec<VolumeView>> {
    json(plane, move |plane| {
        let selector = Selector::parse(which.selector.as_deref().unwrap_or(""), Of::Volume)?;
        let (snapshot, live) = look(plane)?;
        let mut views = view::volumes(&snapshot, &live);
        views.retain(|v| {
            which.namespace.as_ref().is_none_or(|n| *n == v.namespace)
                && selector.matches(&v.labels)
        });
        Ok(views)
    })
    .await
}

async fn volume(
    State(plane): State<Arc<Plane>>,
    Path(path): Path<(String, String)>,
) -> Reply<VolumeView> {
    let name = name(&path)?;
    json(plane, move |plane| {
        let found = plane.find(&name)?;
        let snapshot = plane.store.snapshot()?;
        let live = gather(plane, snapshot.nodes.values().map(|(n, _)| n));
        let mut view = view::volume(&found.spec.0, &found.record.0, &live);
        view.remarks = view::remarks(&found.spec.0, &found.record.0, &snapshot);
        let (events, _) = events::gathered(plane, Some(&name.to_string()), EVENTS_SHOWN)?;
        view.events = events;
        Ok(view)
    })
    .await
}

async fn scrub(
    State(plane): State<Arc<Plane>>,
    Path(path): Path<(String, String)>,
) -> Reply<ScrubView> {
    let name = name(&path)?;
    json(plane, move |plane| scrub::inspect(plane, &name)).await
}

/// How much of it.
#[derive(Deserialize)]
struct Much {
    /// Without copies and attachments.
    #[serde(default)]
    brief: bool,
    /// Without copies, and with what concerns this volume only.
    volume: Option<VolumeId>,
}

async fn status(State(plane): State<Arc<Plane>>, Query(much): Query<Much>) -> Reply<LocalStatus> {
    json(plane, move |plane| {
        Ok(match much.volume {
            Some(volume) => LocalStatus::of_volume(plane, volume),
            None if much.brief => LocalStatus::brief(plane),
            None => LocalStatus::of(plane),
        })
    })
    .await
}

/// A node's own events, and where to go on from.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct LocalEvents {
    /// The number of its last event.
    pub(super) last: u64,
    /// Those asked for.
    pub(super) events: Vec<Event>,
}
