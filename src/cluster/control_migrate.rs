//! The two nodes of a live migration do what the spec says (see `migrate`).

use std::time::{Duration, Instant};

use super::control::{Control, raced};
use super::events::What;
use super::host::Phase;
use super::live::gather;
use super::model::{Desired, Successor, VolumeSpec};
use super::snapshot::Snapshot;
use super::store::Versioned;
use crate::registry::RegistryError;
use crate::replication::ids::VolumeId;
use crate::replication::record::Record;

/// A takeover ends between two changes of the registry: it is looked at again after this long.
const LOOK: Duration = Duration::from_millis(200);

impl Control {
    /// The machine of this volume may come here.
    pub(super) fn await_machine(
        &mut self,
        id: VolumeId,
        (spec, record): (&Versioned<VolumeSpec>, &Versioned<Record>),
        (desired, successor): (&Desired, &Successor),
        phase: Option<Phase>,
        snapshot: &Snapshot,
    ) -> Result<(), RegistryError> {
        let here = Desired {
            node: successor.node.clone(),
            socket: successor.socket.clone(),
            successor: None,
            ..desired.clone()
        };
        match phase {
            None => self.serve(id, spec, &here, record, true),
            Some(Phase::Waiting) => self.tell(id, record),
            // Anything of the machine may be under way in it.
            Some(Phase::Fenced) => self.let_go(id, spec.0.full_name(), "moving", "fenced"),
            Some(Phase::Acquiring) => {
                self.tell(id, record);
                self.retry.insert(id, (spec.1, Instant::now() + LOOK));
            }
            Some(Phase::Recovering | Phase::Serving | Phase::Suspended) => {
                self.tell(id, record);
                self.has_come(id, spec, desired, here, snapshot)?;
            }
        }
        Ok(())
    }

    /// The machine runs here now: from now on that is what the spec says.
    fn has_come(
        &mut self,
        id: VolumeId,
        spec: &Versioned<VolumeSpec>,
        former: &Desired,
        here: Desired,
        snapshot: &Snapshot,
    ) -> Result<(), RegistryError> {
        // Before the former node lets go, which then knows nothing of it any more.
        let node = snapshot.nodes.get(&former.node).map(|(node, _)| node);
        let live = gather(&self.plane, node.into_iter());
        match live.node(&former.node).and_then(|n| n.attachment(id)) {
            Some(status) => self.plane.host.set_write_cache(id, status.writeback),
            None => log::warn!(
                "volume {}: {} does not say what the machine negotiated about its write cache ({}): every write stays durable \
                 when it completes until the machine is started anew",
                spec.0.full_name(),
                former.node,
                live.why_not(&former.node)
            ),
        }
        let next = VolumeSpec {
            attachment: Some(here),
            ..spec.0.clone()
        };
        if raced(self.plane.store.cas_spec(id, spec.1, &next))? {
            self.plane.host.by_turns(id, false);
            let text = format!("from {} to {}", former.node, self.plane.node);
            self.plane
                .events
                .push(What::volume(spec.0.full_name(), "moving", "attached", "migrate").text(text));
        }
        Ok(())
    }

    /// The machine of this volume, which is served here, may leave, or may not any more.
    pub(super) fn may_leave(&mut self, id: VolumeId, may: bool) {
        let told = match may {
            true => self.by_turns.insert(id),
            false => self.by_turns.remove(&id),
        };
        if told {
            self.plane.host.by_turns(id, may);
        }
    }
}
