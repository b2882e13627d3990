//! The engine's status in the words of the API.

use std::collections::BTreeMap;

use super::Served;
use crate::cluster::host::{
    AttachmentStatus, CopyState, Difference, Phase, ScrubState, ScrubStatus, SyncProgress,
};
use crate::cluster::metrics::{Metrics, SyncsHere};
use crate::engine::{Syncs, VolumeStatus, WorkerMetrics};
use crate::replication::attachment::{CopyView, Phase as Is};
use crate::replication::record::CopyStatus;
use crate::replication::scrub::{Outcome, Place, Progress, View as ScrubView};

/// One attachment.
pub(super) fn describe(status: &VolumeStatus, served: &Served) -> AttachmentStatus {
    let (phase, why) = match &status.phase {
        None => (Phase::Waiting, status.why.clone()),
        Some(phase) => describe_phase(phase, status),
    };
    let present = |c: &&CopyView| c.status != CopyStatus::Removed;
    AttachmentStatus {
        volume: status.volume,
        phase,
        why: why.unwrap_or_default(),
        socket: served.front.as_ref().map(|f| f.socket().to_owned()),
        connected: served.front.as_ref().is_some_and(|f| f.server.connected()),
        epoch: status.epoch,
        copies: status.copies.iter().filter(present).map(copy).collect(),
        inflight: status.in_flight as u32,
        writeback: status.writeback,
        scrub: status.scrub.as_ref().map(scrub),
    }
}

fn scrub(view: &ScrubView) -> ScrubStatus {
    let (state, why) = match &view.progress {
        Progress::Running => (ScrubState::Running, String::new()),
        Progress::Done => (ScrubState::Done, String::new()),
        Progress::BrokeOff(why) => (ScrubState::BrokenOff, why.clone()),
    };
    let report = &view.report;
    ScrubStatus {
        id: view.id,
        repair: view.repair,
        state,
        why,
        done_bytes: view.done_bytes,
        total_bytes: view.total_bytes,
        bytes_per_second: view.bytes_per_second,
        compared_bytes: report.compared_bytes,
        differing_bytes: report.differing_bytes,
        unreadable_bytes: report.unreadable_bytes,
        lost_bytes: report.lost_bytes,
        repaired_bytes: report.mended_bytes,
        misread_chunks: report.misread_chunks,
        differences: report.places().filter_map(difference).collect(),
        left_out: view.left_out.clone(),
    }
}

fn difference(place: &Place) -> Option<Difference> {
    let kind = match place.outcome {
        Outcome::Same => return None,
        Outcome::Differs => "differs",
        Outcome::Unreadable => "unreadable",
        Outcome::Lost => "lost",
    };
    Some(Difference {
        offset: place.offset,
        length: place.len,
        kind: kind.into(),
        agree: place.agree.clone(),
        unreadable: place.unreadable.clone(),
        repaired: place.mended,
    })
}

fn describe_phase(phase: &Is, status: &VolumeStatus) -> (Phase, Option<String>) {
    match (phase, &status.why) {
        (Is::Joining | Is::Claiming | Is::Configuring, why) => (Phase::Acquiring, why.clone()),
        (Is::Serving, None) if status.undecided > 0 => (
            Phase::Recovering,
            Some(format!(
                "{} chunks in which copies may differ are left to be decided",
                status.undecided
            )),
        ),
        (Is::Serving, None) => (Phase::Serving, None),
        (Is::Serving, why) => (Phase::Suspended, why.clone()),
        (Is::Leaving | Is::Left, _) => (Phase::Serving, Some("it is being detached".into())),
        (Is::Fenced(why), _) => (Phase::Fenced, Some(why.clone())),
    }
}

fn copy(c: &CopyView) -> CopyState {
    let (state, well) = match c.status {
        CopyStatus::InSync => ("in_sync", c.connected),
        _ if c.sync.is_some() => ("syncing", true),
        CopyStatus::Syncing | CopyStatus::Missing => ("missing", false),
        CopyStatus::Removed => ("removed", true),
    };
    CopyState {
        copy: c.copy_id,
        node: c.node.clone(),
        role: if c.master { "master" } else { "replica" }.into(),
        state: state.into(),
        // Why it was lost last is of no interest when it is there again.
        lag: if well { String::new() } else { c.why.clone() },
        sync: c
            .sync
            .map(|s| SyncProgress::new(s.remaining_bytes, s.total_bytes, s.bytes_per_second)),
    }
}

/// The counters of all workers.
pub(super) fn metrics(workers: Vec<WorkerMetrics>, [from, to]: [Syncs; 2]) -> Metrics {
    let syncs = |end, syncs: Syncs| SyncsHere {
        end,
        now: syncs.now as u64,
        most: syncs.most as u64,
    };
    let mut all = Metrics {
        syncs: [syncs("from", from), syncs("to", to)],
        ..Metrics::default()
    };
    let mut ejections: BTreeMap<String, u64> = BTreeMap::new();
    for worker in workers {
        all.volumes.extend(worker.volumes);
        all.wire_raw_bytes += worker.wire_raw;
        all.wire_compressed_bytes += worker.wire_sent;
        all.promotions += worker.promotions;
        all.failover.add(&worker.failover);
        all.syncs_started += worker.syncs_started;
        all.syncs_completed += worker.syncs_completed;
        for (reason, count) in worker.ejections {
            *ejections.entry(reason).or_default() += count;
        }
    }
    all.ejections = ejections.into_iter().collect();
    all
}
