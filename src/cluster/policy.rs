//! What holds for the whole cluster and may be changed while it runs.

use serde::{Deserialize, Serialize};

use super::events::What;
use super::fault::Fault;
use super::plane::Plane;
use super::store::Race;
use super::units::{show_ms, show_time, wall_ms};

/// The longest wait for a missing copy: a month is for ever, and for that there is 0.
const REPLACE_AFTER_MS_MAX: u64 = 30 * 86_400_000;

/// A request to change the cluster.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ClusterUpdate {
    /// How long a missing copy is waited for before another node gets one, in milliseconds; 0: for ever.
    pub replace_after_ms: Option<u64>,
    /// People work on the nodes: no lost copy is replaced meanwhile.
    pub maintenance: Option<bool>,
}

/// What holds now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterPolicy {
    /// How long a missing copy is waited for, in milliseconds; 0: for ever.
    pub replace_after_ms: u64,
    /// Since when maintenance is on.
    pub maintenance: Option<String>,
}

/// Changes it.
pub fn update_cluster(plane: &Plane, request: &ClusterUpdate) -> Result<ClusterPolicy, Fault> {
    if *request == ClusterUpdate::default() {
        return Err(Fault::input("nothing to change on the cluster")
            .hint("see: lockstep cluster update --help"));
    }
    if let Some(ms) = request
        .replace_after_ms
        .filter(|ms| *ms > REPLACE_AFTER_MS_MAX)
    {
        return Err(Fault::input(format!(
            "a missing copy cannot be waited for {}: at most {}",
            show_ms(ms),
            show_ms(REPLACE_AFTER_MS_MAX)
        ))
        .hint("0 waits for ever"));
    }
    let (changes, policy) = plane
        .store
        .retry(|| {
            let Some((mut record, at)) = plane.store.cluster()? else {
                return Err(Race::Fault(Fault::internal(
                    "the registry has lost the cluster's record; restore the registry",
                )));
            };
            if record.id != plane.cluster {
                return Err(Race::Fault(Fault::state(format!(
                    "the registry belongs to cluster {} now, and this node to {}",
                    record.id, plane.cluster
                ))));
            }
            let mut changes = Vec::new();
            if let Some(ms) = request
                .replace_after_ms
                .filter(|ms| *ms != record.replace_after_ms)
            {
                let before = std::mem::replace(&mut record.replace_after_ms, ms);
                changes.push(format!(
                    "replace after {} -> {}",
                    show_ms(before),
                    show_ms(ms)
                ));
            }
            if let Some(on) = request
                .maintenance
                .filter(|on| *on != record.maintenance.is_some())
            {
                record.maintenance = on.then(wall_ms);
                changes.push(format!("maintenance {}", if on { "on" } else { "off" }));
            }
            if !changes.is_empty() {
                plane.store.cas_cluster(at, &record)?;
            }
            let policy = ClusterPolicy {
                replace_after_ms: record.replace_after_ms,
                maintenance: record.maintenance.map(show_time),
            };
            Ok((changes, policy))
        })
        .map_err(Fault::from)?;
    if !changes.is_empty() {
        plane
            .events
            .push(What::node("", "updated", "update").text(changes.join(", ")));
    }
    Ok(policy)
}
