//! `/metrics`: what the engine counts, what the registry and the nodes say of this node's volumes, and the process.
//!
//! A volume's own gauges (health, epoch, …) come from one node, or sums over nodes would count it twice: the node that
//! should serve it, and while it is detached the node of its master copy.

use std::fs;

use super::prometheus::{Exposition, Kind, Pairs};
use crate::cluster::health::Health;
use crate::cluster::live::gather;
use crate::cluster::metrics::{Layer, Metrics, VolumeMetrics};
use crate::cluster::plane::Plane;
use crate::cluster::view::{self, VolumeView};

/// Clock ticks a second in /proc: fixed by Linux's user-space interface on every architecture we run on.
const USER_HZ: f64 = 100.0;

pub(super) fn render(plane: &Plane) -> String {
    let mut out = Exposition::default();
    out.sample(
        "lockstep_build_info",
        Kind::Gauge,
        "Always 1; the version is in the label.",
        &[("version", env!("CARGO_PKG_VERSION"))],
        1.0,
    );
    engine(&mut out, &plane.host.metrics());
    let node = plane.node.0.as_str();
    let capacity = plane.host.capacity();
    for (name, help, bytes) in [
        (
            "lockstep_node_capacity_bytes",
            "Size of the data directory's file system.",
            capacity.total,
        ),
        (
            "lockstep_node_free_bytes",
            "Free space of the data directory's file system.",
            capacity.free,
        ),
    ] {
        out.sample(name, Kind::Gauge, help, &[("node", node)], bytes as f64);
    }
    for way in plane.reach.ways() {
        out.sample(
            "lockstep_node_reaches",
            Kind::Gauge,
            "1 when this node reaches the other one on the replication port, 0 when it does not.",
            &[("node", &way.node.0)],
            if way.reached { 1.0 } else { 0.0 },
        );
    }
    let seconds = plane.store.seconds();
    for (op, histogram) in [("read", &seconds.read), ("write", &seconds.write)] {
        out.histogram(
            "lockstep_registry_seconds",
            "Time that calls of the registry took.",
            &[("op", op)],
            histogram,
        );
    }
    // What the control loop knows: a figure may be a moment old, and whoever scrapes asks the registry nothing.
    if let Some(snapshot) = plane.known() {
        let live = gather(plane, snapshot.nodes.values().map(|(n, _)| n));
        for volume in view::volumes(&snapshot, &live) {
            volume_gauges(&mut out, plane, &volume);
        }
    }
    process(&mut out, plane.started);
    out.text()
}

fn engine(out: &mut Exposition, metrics: &Metrics) {
    for volume in &metrics.volumes {
        let (namespace, name) = volume.name.split_once('/').unwrap_or(("", &volume.name));
        let labels: Pairs<'_> = &[("namespace", namespace), ("volume", name)];
        layers(out, labels, volume);
    }
    for (name, help, value) in [
        (
            "lockstep_wire_raw_bytes_total",
            "Bytes of data sent to other nodes, before compression.",
            metrics.wire_raw_bytes,
        ),
        (
            "lockstep_wire_compressed_bytes_total",
            "Bytes of data sent to other nodes, as sent.",
            metrics.wire_compressed_bytes,
        ),
        (
            "lockstep_promotions_total",
            "Switches to another master copy.",
            metrics.promotions,
        ),
    ] {
        out.sample(name, Kind::Counter, help, &[], value as f64);
    }
    for (reason, count) in &metrics.ejections {
        out.sample(
            "lockstep_ejections_total",
            Kind::Counter,
            "Copies taken out of an in-sync set.",
            &[("reason", reason)],
            *count as f64,
        );
    }
    for (result, count) in [
        ("started", metrics.syncs_started),
        ("completed", metrics.syncs_completed),
    ] {
        out.sample(
            "lockstep_syncs_total",
            Kind::Counter,
            "Copies that were begun to be brought up to date, and those that are in sync again.",
            &[("result", result)],
            count as f64,
        );
    }
    for syncs in &metrics.syncs {
        for (name, help, count) in [
            (
                "lockstep_syncs_running",
                "Copies that are brought up to date from this node, and on it.",
                syncs.now,
            ),
            (
                "lockstep_syncs_running_max",
                "The most of them at once since the process began.",
                syncs.most,
            ),
        ] {
            let labels: Pairs<'_> = &[("end", syncs.end)];
            out.sample(name, Kind::Gauge, help, labels, count as f64);
        }
    }
    out.histogram(
        "lockstep_failover_seconds",
        "Time from the loss of a copy that counted, or of an attachment, until the volume served again.",
        &[],
        &metrics.failover,
    );
}

fn layers(out: &mut Exposition, labels: Pairs<'_>, volume: &VolumeMetrics) {
    for (layer, figures) in [
        ("frontend", &volume.frontend),
        ("network", &volume.network),
        ("backend", &volume.backend),
    ] {
        one_layer(out, labels, layer, figures);
    }
    for (name, help, value) in [
        (
            "lockstep_volume_inflight_requests",
            "Guest requests taken and not completed.",
            volume.inflight,
        ),
        (
            "lockstep_volume_sync_remaining_bytes",
            "Bytes still to bring up to date, over all syncing copies.",
            volume.sync.remaining_bytes,
        ),
        (
            "lockstep_volume_sync_total_bytes",
            "Bytes that these syncs had to bring up to date when they began.",
            volume.sync.total_bytes,
        ),
        (
            "lockstep_volume_sync_bytes_per_second",
            "Bytes that they bring up to date in a second, lately.",
            volume.sync.bytes_per_second,
        ),
    ] {
        out.sample(name, Kind::Gauge, help, labels, value as f64);
    }
    for (name, help, value) in [
        (
            "lockstep_volume_read_repairs_total",
            "Reads that one copy's disk could not do, answered by another copy and written back.",
            volume.read_repairs,
        ),
        (
            "lockstep_scrub_chunks_total",
            "Chunks of 64 KiB that scrubs compared on all in-sync copies.",
            volume.scrub.chunks,
        ),
        (
            "lockstep_scrub_differences_total",
            "Blocks of 4 KiB in which a scrub found copies to differ.",
            volume.scrub.differences,
        ),
        (
            "lockstep_scrub_unreadable_total",
            "Blocks of 4 KiB that a copy's disk could not read for a scrub.",
            volume.scrub.unreadable,
        ),
        (
            "lockstep_scrub_repaired_total",
            "Blocks of both kinds that a scrub made the same on every copy.",
            volume.scrub.repaired,
        ),
    ] {
        out.sample(name, Kind::Counter, help, labels, value as f64);
    }
}

fn one_layer(out: &mut Exposition, labels: Pairs<'_>, layer: &str, figures: &Layer) {
    for (kind, op) in [
        ("read", &figures.read),
        ("write", &figures.write),
        ("flush", &figures.flush),
        ("discard", &figures.discard),
    ] {
        let base = format!("lockstep_volume_{layer}_{kind}");
        let mut count = |suffix: &str, help, value: u64| {
            let name = format!("{base}{suffix}");
            out.sample(&name, Kind::Counter, help, labels, value as f64);
        };
        count(
            "_total",
            "Requests completed, failed ones included.",
            op.total,
        );
        count("_bytes_total", "Bytes moved.", op.bytes);
        count("_errors_total", "Requests that failed.", op.errors);
        out.histogram(
            &format!("{base}_seconds"),
            "Time that requests took.",
            labels,
            &op.seconds,
        );
    }
}

fn volume_gauges(out: &mut Exposition, plane: &Plane, volume: &VolumeView) {
    let labels: Pairs<'_> = &[("namespace", &volume.namespace), ("volume", &volume.name)];
    let mut gauge = |name: &str, help, value: f64| {
        out.sample(name, Kind::Gauge, help, labels, value);
    };
    let here = volume.copies.iter().find(|c| c.node == plane.node);
    if let Some(bytes) = here.and_then(|c| c.allocated) {
        gauge(
            "lockstep_volume_allocated_bytes",
            "Bytes that this node's copy takes.",
            bytes as f64,
        );
    }
    let speaker = volume
        .attachment
        .as_ref()
        .map_or(&volume.master.node, |a| &a.node);
    if *speaker != plane.node {
        return;
    }
    gauge(
        "lockstep_volume_replicas_wanted",
        "Replicas asked for.",
        f64::from(volume.replicas),
    );
    gauge(
        "lockstep_volume_replicas_in_sync",
        "Replicas in sync.",
        volume.replicas_in_sync as f64,
    );
    gauge(
        "lockstep_volume_size_bytes",
        "Size that the guest sees.",
        volume.size as f64,
    );
    gauge(
        "lockstep_volume_epoch",
        "Epoch in force.",
        volume.epoch.0 as f64,
    );
    for health in Health::ALL {
        out.sample(
            "lockstep_volume_health",
            Kind::Gauge,
            "1 for the state that the volume is in, 0 for the others.",
            &[
                ("namespace", &volume.namespace),
                ("volume", &volume.name),
                ("state", health.word()),
            ],
            if volume.health == health { 1.0 } else { 0.0 },
        );
    }
}

/// The usual figures of a process, as far as /proc tells.
fn process(out: &mut Exposition, started_ms: u64) {
    let mut gauge = |name: &str, help, value: Option<f64>| {
        if let Some(value) = value {
            out.sample(name, Kind::Gauge, help, &[], value);
        }
    };
    gauge(
        "process_start_time_seconds",
        "Start time, seconds since 1970.",
        Some(started_ms as f64 / 1000.0),
    );
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let figure = |key: &str| -> Option<f64> {
        let line = status.lines().find_map(|l| l.strip_prefix(key))?;
        line.split_whitespace().next()?.parse().ok()
    };
    gauge(
        "process_resident_memory_bytes",
        "Resident memory.",
        figure("VmRSS:").map(|kib| kib * 1024.0),
    );
    gauge(
        "process_virtual_memory_bytes",
        "Virtual memory.",
        figure("VmSize:").map(|kib| kib * 1024.0),
    );
    gauge("process_threads", "Threads.", figure("Threads:"));
    gauge(
        "process_open_fds",
        "Open file descriptors.",
        fs::read_dir("/proc/self/fd").ok().map(|d| d.count() as f64),
    );
    if let Some(seconds) = cpu_seconds() {
        out.sample(
            "process_cpu_seconds_total",
            Kind::Counter,
            "User and system time.",
            &[],
            seconds,
        );
    }
}

fn cpu_seconds() -> Option<f64> {
    let stat = fs::read_to_string("/proc/self/stat").ok()?;
    // The second field, the command in parentheses, may hold anything; utime and stime are the 12th and 13th after.
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_whitespace().skip(11);
    let user: f64 = fields.next()?.parse().ok()?;
    let system: f64 = fields.next()?.parse().ok()?;
    Some((user + system) / USER_HZ)
}
