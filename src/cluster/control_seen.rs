//! What the control loop looks at besides the records: what this node's host does, asked once a round however many volumes
//! there are, and what other nodes say, asked only when something depends on it and then not again for a while.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::control::Control;
use super::host::AttachmentStatus;
use super::live::{Live, gather};
use super::snapshot::Snapshot;
use crate::replication::ids::{CopyId, VolumeId};

/// How long the nodes' answers are good for. Each is as long as the node has copies; with hundreds of volumes to look after
/// a question for each would be a load of its own. A node that fell silent since then costs an attempt in vain.
const GOOD_FOR: Duration = Duration::from_secs(2);

/// Answers that are still good.
#[derive(Default)]
pub(super) struct Seen {
    attached: Option<Arc<BTreeMap<VolumeId, AttachmentStatus>>>,
    copies: Option<Arc<BTreeMap<VolumeId, CopyId>>>,
    live: Option<(Instant, Arc<Live>)>,
}

impl Control {
    /// What is attached here, for a machine or to look after its copies.
    pub(super) fn attached(&mut self) -> Arc<BTreeMap<VolumeId, AttachmentStatus>> {
        let host = &self.plane.host;
        let ask = || {
            Arc::new(
                host.attachments()
                    .into_iter()
                    .map(|a| (a.volume, a))
                    .collect(),
            )
        };
        Arc::clone(self.seen.attached.get_or_insert_with(ask))
    }

    /// The copies on this node's disk; the identity is zero where it cannot be read.
    pub(super) fn copies_here(&mut self) -> Arc<BTreeMap<VolumeId, CopyId>> {
        let host = &self.plane.host;
        let ask = || Arc::new(host.copies_here());
        Arc::clone(self.seen.copies.get_or_insert_with(ask))
    }

    /// What all nodes say.
    pub(super) fn live(&mut self, snapshot: &Snapshot) -> Arc<Live> {
        if let Some((at, live)) = &self.seen.live
            && at.elapsed() < GOOD_FOR
        {
            return Arc::clone(live);
        }
        let live = gather(&self.plane, snapshot.nodes.values().map(|(n, _)| n));
        let live = Arc::new(live);
        self.seen.live = Some((Instant::now(), Arc::clone(&live)));
        live
    }

    /// A new round, or the host was told to do something.
    pub(super) fn look_again(&mut self) {
        (self.seen.attached, self.seen.copies) = (None, None);
    }
}
