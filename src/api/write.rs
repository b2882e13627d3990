//! What changes something: on the socket alone.

use std::sync::Arc;

use axum::body::Bytes;
use axum::extract::{Path, Query, State};
use axum::routing::post;
use axum::{Json, Router};
use serde::{Deserialize, Serialize};

use super::reply::{Failure, Reply, body, json, name};
use crate::cluster::attach::{AttachOptions, Attached, attach, detach};
use crate::cluster::create::{CreateRequest, Created, create};
use crate::cluster::drain::drain;
use crate::cluster::fault::Fault;
use crate::cluster::host::UpgradeView;
use crate::cluster::migrate::{self, MigrateRequest};
use crate::cluster::model::check_name;
use crate::cluster::nodes::{self, NodeDone, NodeUpdate};
use crate::cluster::plane::Plane;
use crate::cluster::policy::{ClusterPolicy, ClusterUpdate, update_cluster};
use crate::cluster::replicas::{MoveRequest, PromoteRequest, move_copy, promote};
use crate::cluster::scrub::{self, ScrubAsked, ScrubRequest};
use crate::cluster::update::{UpdateRequest, Updated, remove, update};
use crate::replication::ids::NodeName;

pub(super) fn router() -> Router<Arc<Plane>> {
    Router::new()
        .route("/api/v1/cluster", axum::routing::patch(change_cluster))
        .route(
            "/api/v1/nodes/{name}",
            axum::routing::patch(update_node).delete(remove_node),
        )
        .route("/api/v1/nodes/{name}/drain", post(drain_node))
        .route("/api/v1/nodes/{name}/undrain", post(undrain_node))
        .route("/api/v1/local/upgrade", post(upgrade))
        .route("/api/v1/volumes", post(create_volume))
        .route(
            "/api/v1/volumes/{namespace}/{name}",
            axum::routing::patch(update_volume).delete(remove_volume),
        )
        .route(
            "/api/v1/volumes/{namespace}/{name}/attach",
            post(attach_volume),
        )
        .route(
            "/api/v1/volumes/{namespace}/{name}/migrate",
            post(migrate_volume).delete(withdraw_migration),
        )
        .route(
            "/api/v1/volumes/{namespace}/{name}/detach",
            post(detach_volume),
        )
        .route("/api/v1/volumes/{namespace}/{name}/move", post(move_volume))
        .route(
            "/api/v1/volumes/{namespace}/{name}/promote",
            post(promote_volume),
        )
        .route(
            "/api/v1/volumes/{namespace}/{name}/scrub",
            post(scrub_volume).delete(stop_scrub),
        )
}

/// The name of what was changed.
#[derive(Serialize)]
struct Done {
    volume: String,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Force {
    force: bool,
    no_wait: bool,
}

async fn change_cluster(State(plane): State<Arc<Plane>>, bytes: Bytes) -> Reply<ClusterPolicy> {
    let request: ClusterUpdate = body(&bytes)?;
    json(plane, move |plane| update_cluster(plane, &request)).await
}

fn node_name(name: String) -> Result<NodeName, Failure> {
    check_name(&name).map_err(Fault::from)?;
    Ok(NodeName(name))
}

async fn update_node(
    State(plane): State<Arc<Plane>>,
    Path(name): Path<String>,
    bytes: Bytes,
) -> Reply<NodeDone> {
    let (name, request): (_, NodeUpdate) = (node_name(name)?, body(&bytes)?);
    json(plane, move |plane| nodes::update(plane, &name, &request)).await
}

async fn remove_node(State(plane): State<Arc<Plane>>, Path(name): Path<String>) -> Reply<NodeDone> {
    let name = node_name(name)?;
    json(plane, move |plane| {
        nodes::remove(plane, &name)?;
        Ok(NodeDone {
            node: name,
            remark: None,
        })
    })
    .await
}

async fn drain_node(State(plane): State<Arc<Plane>>, Path(name): Path<String>) -> Reply<NodeDone> {
    let name = node_name(name)?;
    json(plane, move |plane| drain(plane, &name, true)).await
}

async fn undrain_node(
    State(plane): State<Arc<Plane>>,
    Path(name): Path<String>,
) -> Reply<NodeDone> {
    let name = node_name(name)?;
    json(plane, move |plane| drain(plane, &name, false)).await
}

async fn upgrade(State(plane): State<Arc<Plane>>) -> Reply<UpgradeView> {
    json(plane, |plane| plane.host.upgrade()).await
}

async fn create_volume(State(plane): State<Arc<Plane>>, bytes: Bytes) -> Reply<Created> {
    let request: CreateRequest = body(&bytes)?;
    json(plane, move |plane| create(plane, request)).await
}

async fn update_volume(
    State(plane): State<Arc<Plane>>,
    Path(path): Path<(String, String)>,
    bytes: Bytes,
) -> Reply<Updated> {
    let (name, request): (_, UpdateRequest) = (name(&path)?, body(&bytes)?);
    json(plane, move |plane| {
        Ok(Updated {
            changes: update(plane, &name, &request)?,
            volume: name.to_string(),
        })
    })
    .await
}

async fn remove_volume(
    State(plane): State<Arc<Plane>>,
    Path(path): Path<(String, String)>,
    Query(options): Query<Force>,
) -> Result<Json<Done>, Failure> {
    let name = name(&path)?;
    json(plane, move |plane| {
        remove(plane, &name, options.force)?;
        Ok(Done {
            volume: name.to_string(),
        })
    })
    .await
}

async fn attach_volume(
    State(plane): State<Arc<Plane>>,
    Path(path): Path<(String, String)>,
    bytes: Bytes,
) -> Reply<Attached> {
    let (name, options): (_, AttachOptions) = (name(&path)?, body(&bytes)?);
    json(plane, move |plane| attach(plane, &name, options)).await
}

async fn migrate_volume(
    State(plane): State<Arc<Plane>>,
    Path(path): Path<(String, String)>,
    bytes: Bytes,
) -> Reply<Attached> {
    let (name, request): (_, MigrateRequest) = (name(&path)?, body(&bytes)?);
    json(plane, move |plane| migrate::prepare(plane, &name, &request)).await
}

async fn withdraw_migration(
    State(plane): State<Arc<Plane>>,
    Path(path): Path<(String, String)>,
) -> Reply<Done> {
    let name = name(&path)?;
    json(plane, move |plane| {
        migrate::withdraw(plane, &name)?;
        Ok(Done {
            volume: name.to_string(),
        })
    })
    .await
}

async fn detach_volume(
    State(plane): State<Arc<Plane>>,
    Path(path): Path<(String, String)>,
    bytes: Bytes,
) -> Reply<Done> {
    let (name, options): (_, Force) = (name(&path)?, body(&bytes)?);
    json(plane, move |plane| {
        detach(plane, &name, options.force, options.no_wait)?;
        Ok(Done {
            volume: name.to_string(),
        })
    })
    .await
}

async fn move_volume(
    State(plane): State<Arc<Plane>>,
    Path(path): Path<(String, String)>,
    bytes: Bytes,
) -> Reply<Done> {
    let (name, request): (_, MoveRequest) = (name(&path)?, body(&bytes)?);
    json(plane, move |plane| {
        move_copy(plane, &name, &request)?;
        Ok(Done {
            volume: name.to_string(),
        })
    })
    .await
}

async fn promote_volume(
    State(plane): State<Arc<Plane>>,
    Path(path): Path<(String, String)>,
    bytes: Bytes,
) -> Reply<Done> {
    let (name, request): (_, PromoteRequest) = (name(&path)?, body(&bytes)?);
    json(plane, move |plane| {
        promote(plane, &name, &request)?;
        Ok(Done {
            volume: name.to_string(),
        })
    })
    .await
}

async fn scrub_volume(
    State(plane): State<Arc<Plane>>,
    Path(path): Path<(String, String)>,
    bytes: Bytes,
) -> Reply<ScrubAsked> {
    let (name, request): (_, ScrubRequest) = (name(&path)?, body(&bytes)?);
    json(plane, move |plane| scrub::ask(plane, &name, request)).await
}

async fn stop_scrub(
    State(plane): State<Arc<Plane>>,
    Path(path): Path<(String, String)>,
) -> Reply<Done> {
    let name = name(&path)?;
    json(plane, move |plane| {
        scrub::stop(plane, &name)?;
        Ok(Done {
            volume: name.to_string(),
        })
    })
    .await
}
