//! How handlers answer: JSON, or a fault with its status; and how they wait without holding up the server.

use std::sync::Arc;

use axum::Json;
use axum::body::Bytes;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::cluster::fault::Fault;
use crate::cluster::model::VolumeName;
use crate::cluster::plane::Plane;

/// A fault as an answer.
pub(super) struct Failure(pub(super) Fault);

impl From<Fault> for Failure {
    fn from(fault: Fault) -> Self {
        Self(fault)
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let status =
            StatusCode::from_u16(self.0.code.status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        (status, Json(self.0)).into_response()
    }
}

/// What a handler returns.
pub(super) type Reply<T> = Result<Json<T>, Failure>;

/// Runs `work` where it may block, and answers with its result.
pub(super) async fn blocking<T, F>(plane: Arc<Plane>, work: F) -> Result<T, Failure>
where
    T: Send + 'static,
    F: FnOnce(&Arc<Plane>) -> Result<T, Fault> + Send + 'static,
{
    match tokio::task::spawn_blocking(move || work(&plane)).await {
        Ok(result) => result.map_err(Failure),
        Err(e) => Err(Failure(Fault::internal(format!("the request failed: {e}")))),
    }
}

/// The same, as JSON.
pub(super) async fn json<T, F>(plane: Arc<Plane>, work: F) -> Reply<T>
where
    T: Serialize + Send + 'static,
    F: FnOnce(&Arc<Plane>) -> Result<T, Fault> + Send + 'static,
{
    blocking(plane, work).await.map(Json)
}

/// The request's body. An empty one stands for `{}`.
pub(super) fn body<T: DeserializeOwned>(bytes: &Bytes) -> Result<T, Failure> {
    let bytes: &[u8] = if bytes.is_empty() { b"{}" } else { bytes };
    serde_json::from_slice(bytes).map_err(|e| {
        Failure(Fault::input(format!(
            "the request's body is not understood: {e}"
        )))
    })
}

/// The volume a path names.
pub(super) fn name((namespace, name): &(String, String)) -> Result<VolumeName, Failure> {
    Ok(VolumeName::new(namespace, name).map_err(Fault::from)?)
}
