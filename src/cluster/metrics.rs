//! What the engine counts, as plain numbers; `api` writes them in Prometheus' text format under the names of the
//! interface. Counters start at zero with the process and only grow.

use crate::replication::attachment::SyncView;
use crate::replication::ids::VolumeId;
use crate::replication::scrub::Counters;

/// Upper bounds of the latency buckets, in seconds: 50 µs, where a local NVMe write is, to 10 s, beyond which every
/// deadline has passed.
pub const LATENCY_BUCKETS: [f64; 16] = [
    0.000_05, 0.000_1, 0.000_2, 0.000_4, 0.000_8, 0.001_5, 0.003, 0.006, 0.012, 0.025, 0.05, 0.1,
    0.25, 1.0, 3.0, 10.0,
];

/// How often something took how long.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Histogram {
    /// Observations in each of [`LATENCY_BUCKETS`] (not cumulative), then those above the last.
    pub counts: [u64; LATENCY_BUCKETS.len() + 1],
    /// The sum of all observations, in seconds.
    pub sum: f64,
}

impl Histogram {
    /// Counts one observation of `seconds`.
    pub fn observe(&mut self, seconds: f64) {
        let bucket = LATENCY_BUCKETS.partition_point(|bound| *bound < seconds);
        self.counts[bucket] += 1;
        self.sum += seconds;
    }

    /// Counts what `other` counted, too.
    pub fn add(&mut self, other: &Self) {
        for (count, more) in self.counts.iter_mut().zip(other.counts) {
            *count += more;
        }
        self.sum += other.sum;
    }

    /// Observations in all.
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }
}

/// One kind of request on one layer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Operation {
    /// Requests completed, failed ones included.
    pub total: u64,
    /// Bytes they moved (or, for discard, gave back).
    pub bytes: u64,
    /// Those that failed.
    pub errors: u64,
    /// How long each took.
    pub seconds: Histogram,
}

/// All kinds of requests on one layer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Layer {
    /// Reads.
    pub read: Operation,
    /// Writes, and write-zeroes that keep their space.
    pub write: Operation,
    /// Flushes.
    pub flush: Operation,
    /// Discards, and write-zeroes that may give space back.
    pub discard: Operation,
}

/// One attached volume.
#[derive(Clone, Debug, PartialEq)]
pub struct VolumeMetrics {
    /// Which.
    pub volume: VolumeId,
    /// `namespace/name`.
    pub name: String,
    /// What the guest asked.
    pub frontend: Layer,
    /// What went to copies on other nodes.
    pub network: Layer,
    /// What went to this node's disk.
    pub backend: Layer,
    /// Guest requests taken and not completed.
    pub inflight: u64,
    /// Bytes still to bring up to date, in all, and in a second, over all syncing copies.
    pub sync: SyncView,
    /// What scrubs have compared and found.
    pub scrub: Counters,
    /// Reads that one copy's disk could not do, and that were written back to it from another copy.
    pub read_repairs: u64,
}

/// Copies that are brought up to date at one end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SyncsHere {
    /// `from` this node, or `to` it.
    pub end: &'static str,
    /// Now.
    pub now: u64,
    /// At once at most, since the process began.
    pub most: u64,
}

/// The engine's counters at one instant.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Metrics {
    /// Attached volumes.
    pub volumes: Vec<VolumeMetrics>,
    /// Payload bytes before compression.
    pub wire_raw_bytes: u64,
    /// The same as sent.
    pub wire_compressed_bytes: u64,
    /// Masters switched.
    pub promotions: u64,
    /// Copies ejected, by reason (`late`, `disconnected`, `io_error`, …).
    pub ejections: Vec<(String, u64)>,
    /// Copies that were begun to be brought up to date.
    pub syncs_started: u64,
    /// Copies that are in sync again.
    pub syncs_completed: u64,
    /// Syncs from this node and to it: now, and at once at most.
    pub syncs: [SyncsHere; 2],
    /// From the loss of a copy that counted, or of an attachment, until the volume served again.
    pub failover: Histogram,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_observation_lands_in_the_first_bucket_that_holds_it() {
        let mut h = Histogram::default();
        h.observe(0.000_05);
        h.observe(0.000_06);
        h.observe(100.0);
        assert_eq!(h.counts[0], 1);
        assert_eq!(h.counts[1], 1);
        assert_eq!(h.counts[LATENCY_BUCKETS.len()], 1);
        assert_eq!(h.count(), 3);
        let other = h.clone();
        h.add(&other);
        assert_eq!((h.counts[1], h.count()), (2, 6));
        assert_eq!(h.sum, 2.0 * other.sum);
    }
}
