//! Namespaces and rules: read on both ends, changed on the socket alone.

use std::sync::Arc;

use axum::Router;
use axum::body::Bytes;
use axum::extract::{Path, Query, State};
use axum::routing::{MethodRouter, get};
use serde::{Deserialize, Serialize};

use super::reply::{Reply, body, json, name};
use crate::cluster::model::check_name;
use crate::cluster::namespaces::{self, NamespaceView};
use crate::cluster::plane::Plane;
use crate::cluster::rules::{self, Reach, RuleDone, RuleRequest, RuleUpdate, RuleView};

const NAMESPACES: &str = "/api/v1/namespaces";
const NAMESPACE: &str = "/api/v1/namespaces/{name}";
const RULES: &str = "/api/v1/rules";
const RULE: &str = "/api/v1/rules/{namespace}/{name}";

fn router(
    with: impl Fn(&str, MethodRouter<Arc<Plane>>) -> MethodRouter<Arc<Plane>>,
) -> Router<Arc<Plane>> {
    Router::new()
        .route(NAMESPACES, with(NAMESPACES, get(all_namespaces)))
        .route(NAMESPACE, with(NAMESPACE, get(one_namespace)))
        .route(RULES, with(RULES, get(all_rules)))
        .route(RULE, with(RULE, get(one_rule)))
}

/// What can be read.
pub(super) fn reads() -> Router<Arc<Plane>> {
    router(|_, read| read)
}

/// That, and what changes something.
pub(super) fn all() -> Router<Arc<Plane>> {
    router(|path, read| match path {
        NAMESPACES => read.post(create_namespace),
        NAMESPACE => read.delete(remove_namespace),
        RULES => read.post(create_rule),
        RULE => read.patch(update_rule).delete(remove_rule),
        _ => read,
    })
}

async fn all_namespaces(State(plane): State<Arc<Plane>>) -> Reply<Vec<NamespaceView>> {
    json(plane, |plane| {
        Ok(namespaces::list(&plane.store.snapshot()?))
    })
    .await
}

async fn one_namespace(
    State(plane): State<Arc<Plane>>,
    Path(name): Path<String>,
) -> Reply<NamespaceView> {
    json(plane, move |plane| {
        check_name(&name)?;
        namespaces::inspect(&plane.store.snapshot()?, &name)
    })
    .await
}

/// Names what is to be made, or what was made or removed.
#[derive(Deserialize, Serialize)]
struct Named {
    name: String,
}

async fn create_namespace(State(plane): State<Arc<Plane>>, bytes: Bytes) -> Reply<Named> {
    let named: Named = body(&bytes)?;
    json(plane, move |plane| {
        namespaces::create(plane, &named.name)?;
        Ok(named)
    })
    .await
}

async fn remove_namespace(
    State(plane): State<Arc<Plane>>,
    Path(name): Path<String>,
) -> Reply<Named> {
    json(plane, move |plane| {
        namespaces::remove(plane, &name)?;
        Ok(Named { name })
    })
    .await
}

#[derive(Deserialize)]
struct Which {
    /// Of this namespace; of all when not said.
    namespace: Option<String>,
}

async fn all_rules(
    State(plane): State<Arc<Plane>>,
    Query(which): Query<Which>,
) -> Reply<Vec<RuleView>> {
    json(plane, move |plane| {
        let snapshot = plane.store.snapshot()?;
        Ok(rules::list(&snapshot, which.namespace.as_deref()))
    })
    .await
}

async fn one_rule(
    State(plane): State<Arc<Plane>>,
    Path(path): Path<(String, String)>,
) -> Reply<RuleView> {
    let name = name(&path)?;
    json(plane, move |plane| {
        rules::inspect(&plane.store.snapshot()?, &name)
    })
    .await
}

async fn create_rule(State(plane): State<Arc<Plane>>, bytes: Bytes) -> Reply<RuleDone> {
    let request: RuleRequest = body(&bytes)?;
    json(plane, move |plane| rules::create(plane, &request)).await
}

async fn update_rule(
    State(plane): State<Arc<Plane>>,
    Path(path): Path<(String, String)>,
    bytes: Bytes,
) -> Reply<RuleDone> {
    let (name, request): (_, RuleUpdate) = (name(&path)?, body(&bytes)?);
    json(plane, move |plane| rules::update(plane, &name, &request)).await
}

async fn remove_rule(
    State(plane): State<Arc<Plane>>,
    Path(path): Path<(String, String)>,
    bytes: Bytes,
) -> Reply<RuleDone> {
    let (name, reach): (_, Reach) = (name(&path)?, body(&bytes)?);
    json(plane, move |plane| rules::remove(plane, &name, reach)).await
}
