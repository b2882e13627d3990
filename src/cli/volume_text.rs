//! Volumes as people read them.

use super::output::{Table, fields, or_dash, show_labels};
use super::scrub;
use crate::cluster::host::{Phase, SyncProgress};
use crate::cluster::units::{show_age, show_size, wall_ms};
use crate::cluster::view::{AttachmentView, CopyView, MasterView, VolumeView};
use crate::guest::Serial;

/// Width of a progress bar, in characters.
const BAR: u64 = 20;

pub(super) fn list(volumes: &[VolumeView]) -> String {
    let mut table = Table::new(&[
        "NAMESPACE/NAME",
        "SIZE",
        "ATTACHED",
        "STATUS",
        "REPLICAS",
        "MASTER",
        "AGE",
    ]);
    for v in volumes {
        table.row(vec![
            format!("{}/{}", v.namespace, v.name),
            show_size(v.size),
            v.attachment
                .as_ref()
                .map_or_else(|| "-".into(), |a| a.node.to_string()),
            v.health.word().into(),
            format!("{}/{}", v.replicas_in_sync, v.replicas),
            master(&v.master),
            show_age(wall_ms().saturating_sub(v.created_ms) / 1000),
        ]);
    }
    table.text()
}

fn master(master: &MasterView) -> String {
    let health = if master.online { "online" } else { "offline" };
    format!("{} ({health})", master.node)
}

fn phase(phase: Option<Phase>) -> &'static str {
    match phase {
        None => "not served",
        Some(Phase::Acquiring) => "acquiring",
        Some(Phase::Recovering) => "recovering",
        Some(Phase::Serving) => "serving",
        Some(Phase::Suspended) => "suspended",
        Some(Phase::Fenced) => "fenced",
        Some(Phase::Waiting) => "waiting",
    }
}

fn attachment(a: &AttachmentView) -> String {
    let mut text = format!("{} ({})", a.node, phase(a.phase));
    if a.releasing {
        text += ", being released";
    }
    if a.read_only {
        text += ", read-only";
    }
    text
}

fn guest(a: &AttachmentView) -> String {
    match (a.connected, a.inflight) {
        (None, _) => "not known".into(),
        (Some(false), _) => "not connected".into(),
        (Some(true), inflight) => format!("connected, {} in flight", inflight.unwrap_or(0)),
    }
}

pub(super) fn inspect(v: &VolumeView) -> String {
    let mut lines = vec![
        ("Name", format!("{}/{}", v.namespace, v.name)),
        ("ID", v.id.to_string()),
        ("Serial", serial(&v.id.to_string())),
        ("Health", v.health.word().into()),
        ("Why", or_dash(&v.why)),
        ("Size", size(v)),
        ("Block size", show_size(u64::from(v.block_size))),
        (
            "Replicas",
            format!("{}/{} in sync", v.replicas_in_sync, v.replicas),
        ),
        ("Failure mode", failure_mode(v)),
        (
            "Suspend deadline",
            format!("{}s", v.suspend_deadline_ms as f64 / 1000.0),
        ),
        (
            "Compression",
            if v.compress { "on the wire" } else { "off" }.into(),
        ),
        ("Labels", show_labels(&v.labels)),
        ("From rules", from_rules(v)),
        ("Created", v.created.clone()),
        ("State", format!("{:?}", v.state).to_lowercase()),
        ("Epoch", format!("{} (tag {:016x})", v.epoch, v.epoch_tag.0)),
        ("Master", master(&v.master)),
    ];
    if let Some(node) = &v.preferred {
        lines.push(("Next master", node.to_string()));
    }
    match &v.attachment {
        None => lines.push(("Attached", "-".into())),
        Some(a) => {
            lines.push(("Attached", attachment(a)));
            lines.push(("Socket", a.socket.display().to_string()));
            lines.push(("Queues", a.num_queues.to_string()));
            lines.push(("Guest", guest(a)));
            if let Some(s) = &a.successor {
                let at = format!("{} ({}) at {}", s.node, phase(s.phase), s.socket.display());
                lines.push(("May move to", at));
            }
        }
    }
    if let Some(scrub) = &v.scrub {
        lines.push(("Scrub", scrub::line(scrub)));
    }
    if !v.remarks.is_empty() {
        lines.push(("Remarks", v.remarks.join("; ")));
    }
    let mut out = fields(&lines);
    let mut table = Table::new(&["COPY", "NODE", "ROLE", "STATE", "ALLOCATED", "PROGRESS"]);
    for c in &v.copies {
        let node = if c.online {
            c.node.to_string()
        } else {
            format!("{} (offline)", c.node)
        };
        let progress = match &c.sync {
            Some(sync) => bar(sync),
            None => or_dash(&c.lag),
        };
        table.row(vec![
            c.id.to_string(),
            node,
            c.role.clone(),
            state(c),
            c.allocated.map_or_else(|| "-".into(), show_size),
            progress,
        ]);
    }
    out += &format!("\n{}", table.text());
    if !v.events.is_empty() {
        let mut table = Table::new(&["TIME", "NODE", "FROM", "TO", "RULE", "TEXT"]);
        for e in &v.events {
            table.row(vec![
                e.time.clone(),
                e.node.to_string(),
                or_dash(&e.what.from),
                or_dash(&e.what.to),
                or_dash(&e.what.rule),
                e.what.text.clone(),
            ]);
        }
        out += &format!("\n{}", table.text());
    }
    out
}

/// `lockstep.io/replicas (ha)`.
fn from_rules(v: &VolumeView) -> String {
    let labels = v.rules.iter().map(|(key, l)| format!("{key} ({})", l.rule));
    or_dash(&labels.collect::<Vec<_>>().join(", "))
}

/// What a guest finds the disk by (`/dev/disk/by-id/virtio-…`): as much of the id as a serial takes.
fn serial(id: &str) -> String {
    id.chars().take(Serial::LEN).collect()
}

fn size(v: &VolumeView) -> String {
    let is = show_size(v.size);
    match (v.growing_to.map(show_size), &v.growth_refused) {
        (None, _) => is,
        (Some(to), None) => format!("{is}, growing to {to}"),
        (Some(to), Some(why)) => format!("{is} (it cannot grow to {to}: {why})"),
    }
}

fn state(copy: &CopyView) -> String {
    let leaving = if copy.leaving { ", leaving" } else { "" };
    format!("{}{leaving}", copy.state)
}

fn failure_mode(v: &VolumeView) -> String {
    match v.failure_tolerance {
        Some(t) => format!("soft, tolerates the loss of {t}"),
        None => v.failure_mode.clone(),
    }
}

/// How much of a sync is done, in percent.
pub(super) fn percent(sync: &SyncProgress) -> u64 {
    let total = sync.total_bytes.max(sync.remaining_bytes);
    let done = u128::from(total - sync.remaining_bytes);
    (done * 100).checked_div(u128::from(total)).unwrap_or(0) as u64
}

/// `[##########..........] 50 %  1 GiB left  128 MiB/s  ETA 0:08`.
pub(super) fn bar(sync: &SyncProgress) -> String {
    let total = sync.total_bytes.max(sync.remaining_bytes);
    if total == 0 {
        // Marks and holes are still being read.
        return format!(
            "[{}] 0 %  finding out what is left",
            ".".repeat(BAR as usize)
        );
    }
    let done = total - sync.remaining_bytes;
    let filled = (u128::from(done) * u128::from(BAR) / u128::from(total)) as usize;
    let percent = percent(sync);
    let eta = sync.eta_seconds.map_or_else(|| "?".into(), clock);
    format!(
        "[{}{}] {percent} %  {} left  {}/s  ETA {eta}",
        "#".repeat(filled),
        ".".repeat(BAR as usize - filled),
        show_size(sync.remaining_bytes),
        show_size(sync.bytes_per_second),
    )
}

/// `0:15`, `1:02:03`.
fn clock(seconds: u64) -> String {
    let (hours, minutes, seconds) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    match hours {
        0 => format!("{minutes}:{seconds:02}"),
        _ => format!("{hours}:{minutes:02}:{seconds:02}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_is_drawn_from_what_is_left() {
        let sync = SyncProgress::new;
        assert_eq!(
            bar(&sync(1 << 30, 2 << 30, 128 << 20)),
            "[##########..........] 50 %  1 GiB left  128 MiB/s  ETA 0:08"
        );
        assert!(bar(&sync(0, 1, 0)).starts_with("[####################] 100 %"));
        assert!(bar(&sync(0, 0, 0)).starts_with("[....................] 0 %  finding"));
        assert!(bar(&sync(7325, 7325, 1)).ends_with("  7.2 KiB left  1 B/s  ETA 2:02:05"));
        assert!(bar(&sync(5, 1, 0)).ends_with("ETA ?"));
    }
}
