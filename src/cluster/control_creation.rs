//! Creations that nobody carries out any more are cleaned up.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::control::{Control, raced};
use super::create::{self, abandon};
use super::live::gather;
use super::model::{Creator, VolumeName};
use super::plane::Found;
use super::snapshot::Snapshot;
use crate::registry::RegistryError;
use crate::replication::ids::VolumeId;
use crate::replication::record::State;

/// How long this process sees a creation by another node before it asks whether that node still lives: longer than
/// any creation takes.
const DOUBT: Duration = create::PATIENCE.saturating_mul(2);

/// Since when, by our own clock, each creation of another node is seen; and when to look at it next.
#[derive(Default)]
pub(super) struct Creations {
    doubt: BTreeMap<VolumeId, Instant>,
}

impl Creations {
    /// Whether one should be looked at.
    pub(super) fn due(&self, now: Instant) -> bool {
        self.doubt.values().any(|at| *at <= now)
    }
}

impl Control {
    pub(super) fn clean_creations(&mut self, snapshot: &Snapshot) -> Result<(), RegistryError> {
        let creating: Vec<Found> = super::plane::whole_volumes(snapshot)
            .filter(|(_, _, (record, _))| record.state == State::Creating)
            .map(|(id, spec, record)| Found {
                id,
                name: spec.0.full_name(),
                spec: spec.clone(),
                record: record.clone(),
            })
            .collect();
        self.creations
            .doubt
            .retain(|id, _| creating.iter().any(|f| f.id == *id));
        for found in creating {
            if let Some(why) = self.given_up(snapshot, &found) {
                self.abandon(&found, &why)?;
            }
        }
        Ok(())
    }

    /// Why nobody carries the creation out, if so.
    fn given_up(&mut self, snapshot: &Snapshot, found: &Found) -> Option<String> {
        let Creator { node, instance } = &found.spec.0.creator;
        if *instance == self.plane.instance {
            return (!self.plane.is_creating(found.id))
                .then(|| "its creation failed and is cleaned up".to_string());
        }
        let record = snapshot.nodes.get(node).map(|(n, _)| n);
        let Some(record) = record.filter(|n| n.instance == *instance) else {
            return Some(format!("the process on {node} that created it is gone"));
        };
        let now = Instant::now();
        let doubt = self.creations.doubt.entry(found.id).or_insert(now + DOUBT);
        if now < *doubt {
            return None;
        }
        *doubt = now + DOUBT;
        let live = gather(&self.plane, [record].into_iter());
        live.node(node).is_none().then(|| {
            format!(
                "{node}, which created it, cannot be reached: {}",
                live.why_not(node)
            )
        })
    }

    fn abandon(&mut self, found: &Found, why: &str) -> Result<(), RegistryError> {
        let name: &VolumeName = &found.name;
        if raced(abandon(&self.plane, found, why))? {
            log::warn!("volume {name} is removed: {why}");
        }
        Ok(())
    }
}
