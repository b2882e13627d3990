//! `lockstep top`: what the volumes do now, on one screen.
//!
//! Two readings of every node's `/metrics`, an interval apart, give rates; the volumes' views give health and copies.
//! A node counts only what it serves itself, so all are asked, each with little patience.

use std::collections::BTreeMap;
use std::io::{self, IsTerminal};
use std::time::{Duration, Instant};

use clap::Args;
use hyper::Method;
use serde::Serialize;
use tokio::task::JoinSet;

use super::output::{Format, Table, or_dash, write};
use super::samples::{Sample, parse};
use super::volume_text::percent;
use super::{Failure, Global, yaml};
use crate::api::client::{Target, ask, runtime};
use crate::cluster::fault::Fault;
use crate::cluster::units::parse_span;
use crate::cluster::view::{CopyView, NodeView, VolumeView};

const EXAMPLE: &str = "Examples:\n  lockstep top\n  lockstep top -n prod --interval 5s\n  lockstep top --once -o json";
/// How long a node has to tell its figures.
const PATIENCE: Duration = Duration::from_secs(2);
/// The shortest interval: below, figures are noise and asking for them is load.
const INTERVAL_MIN: Duration = Duration::from_millis(100);
/// To the upper left corner, and nothing below (ECMA-48 CUP, ED).
const CLEAR_SCREEN: &str = "\x1b[H\x1b[J";
/// Lines of a terminal that does not tell.
const ROWS: usize = 24;
const MIB: f64 = (1 << 20) as f64;

#[derive(Args)]
#[command(after_help = EXAMPLE)]
pub(super) struct Command {
    /// Of all namespaces (so it is when no -n is given)
    #[arg(short = 'A', long)]
    all: bool,
    /// Time between two readings
    #[arg(long, value_name = "TIME", default_value = "1s")]
    interval: String,
    /// Print one screen and end
    #[arg(long)]
    once: bool,
}

/// What one kind of request did on one volume since the process began.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Count {
    requests: f64,
    bytes: f64,
    seconds: f64,
}

/// The same as rates.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
struct Rate {
    /// Requests a second.
    iops: f64,
    /// Bytes a second.
    bytes_per_second: f64,
    /// Seconds that a request took on average; `None`: there was none.
    latency_seconds: Option<f64>,
}

const KINDS: [&str; 3] = ["read", "write", "flush"];

/// All counts of one volume on the node that serves it.
#[derive(Clone, Debug, Default, PartialEq)]
struct Counts {
    kinds: [Count; KINDS.len()],
    inflight: f64,
}

type Reading = BTreeMap<String, Counts>;

/// One volume's line.
#[derive(Debug, Serialize)]
struct Line {
    namespace: String,
    name: String,
    health: String,
    node: Option<String>,
    read: Rate,
    write: Rate,
    flush: Rate,
    inflight: f64,
    copies: Vec<CopyLine>,
}

#[derive(Debug, Serialize)]
struct CopyLine {
    node: String,
    role: String,
    state: String,
    sync_percent: Option<u64>,
}

pub(super) fn run(command: &Command, global: &Global) -> Result<(), Failure> {
    let interval = parse_span(&command.interval).map_err(Fault::from)?;
    if interval < INTERVAL_MIN {
        return Err(Fault::input(format!(
            "--interval {}: at least {} ms",
            command.interval,
            INTERVAL_MIN.as_millis()
        ))
        .into());
    }
    let in_place = !command.once && global.output == Format::Table && io::stdout().is_terminal();
    let mut before = (Instant::now(), read(global)?);
    loop {
        std::thread::sleep(interval);
        let now = (Instant::now(), read(global)?);
        let volumes = volumes(command, global)?;
        let span = now.0.duration_since(before.0).as_secs_f64();
        let lines = lines(&volumes, &before.1, &now.1, span);
        let text = match global.output {
            Format::Table if in_place => format!("{CLEAR_SCREEN}{}", one_screen(&table(&lines))),
            Format::Table => table(&lines),
            Format::Json => serde_json::to_string(&lines).map_err(unprintable)? + "\n",
            Format::Yaml => format!(
                "---\n{}",
                yaml::emit(&serde_json::to_value(&lines).map_err(unprintable)?)
            ),
        };
        write(&text)?;
        if command.once {
            return Ok(());
        }
        before = now;
    }
}

fn unprintable(error: serde_json::Error) -> Failure {
    Fault::internal(format!("cannot print: {error}")).into()
}

fn volumes(command: &Command, global: &Global) -> Result<Vec<VolumeView>, Fault> {
    let mut volumes: Vec<VolumeView> = global.remote().get("/api/v1/volumes")?;
    if let Some(namespace) = global.namespace.as_ref().filter(|_| !command.all) {
        volumes.retain(|v| v.namespace == *namespace);
    }
    Ok(volumes)
}

/// The counts of all nodes that answer.
fn read(global: &Global) -> Result<Reading, Failure> {
    let nodes: Vec<NodeView> = global.remote().get("/api/v1/nodes")?;
    let runtime = runtime()?;
    let texts = runtime.block_on(async {
        let mut asked = JoinSet::new();
        for node in nodes.into_iter().filter(|n| n.health == "online") {
            asked.spawn(async move {
                let target = Target::Tcp(node.http);
                ask(&target, Method::GET, "/metrics", None, Some(PATIENCE)).await
            });
        }
        let mut texts = Vec::new();
        while let Some(done) = asked.join_next().await {
            // One that fell silent between two questions is left out; its volumes show no figures.
            if let Ok(Ok(answer)) = done {
                texts.push(String::from_utf8_lossy(&answer.body).into_owned());
            }
        }
        texts
    });
    let mut reading = Reading::new();
    for text in texts {
        reading.extend(counts(&parse(&text)));
    }
    Ok(reading)
}

fn counts(samples: &[Sample]) -> Reading {
    let mut reading = Reading::new();
    for sample in samples {
        let (Some(namespace), Some(volume)) =
            (sample.labels.get("namespace"), sample.labels.get("volume"))
        else {
            continue;
        };
        let Some(figure) = sample.name.strip_prefix("lockstep_volume_") else {
            continue;
        };
        let name = format!("{namespace}/{volume}");
        if figure == "inflight_requests" {
            reading.entry(name).or_default().inflight = sample.value;
            continue;
        }
        let Some(figure) = figure.strip_prefix("frontend_") else {
            continue;
        };
        let Some((kind, what)) = figure.split_once('_') else {
            continue;
        };
        let Some(kind) = KINDS.iter().position(|k| *k == kind) else {
            continue;
        };
        let counts = reading.entry(name).or_default();
        match what {
            "total" => counts.kinds[kind].requests = sample.value,
            "bytes_total" => counts.kinds[kind].bytes = sample.value,
            "seconds_sum" => counts.kinds[kind].seconds = sample.value,
            _ => {}
        }
    }
    reading
}

/// What happened in `span` seconds. A process that began anew counts from nothing.
fn rate(before: Count, now: Count, span: f64) -> Rate {
    let before = match now.requests < before.requests {
        true => Count::default(),
        false => before,
    };
    let requests = now.requests - before.requests;
    Rate {
        iops: requests / span,
        bytes_per_second: (now.bytes - before.bytes).max(0.0) / span,
        latency_seconds: (requests > 0.0)
            .then(|| (now.seconds - before.seconds).max(0.0) / requests),
    }
}

/// The busiest first.
fn lines(volumes: &[VolumeView], before: &Reading, now: &Reading, span: f64) -> Vec<Line> {
    let mut lines: Vec<Line> = volumes
        .iter()
        .map(|v| {
            let name = format!("{}/{}", v.namespace, v.name);
            let rates = match (before.get(&name), now.get(&name)) {
                (Some(before), Some(now)) => {
                    std::array::from_fn(|k| rate(before.kinds[k], now.kinds[k], span))
                }
                // Attached since, or detached: two readings make a rate.
                _ => [Rate::default(); KINDS.len()],
            };
            let [read, write, flush] = rates;
            Line {
                namespace: v.namespace.clone(),
                name: v.name.clone(),
                health: v.health.word().into(),
                node: v.attachment.as_ref().map(|a| a.node.to_string()),
                read,
                write,
                flush,
                inflight: now.get(&name).map_or(0.0, |c| c.inflight),
                copies: v.copies.iter().map(copy).collect(),
            }
        })
        .collect();
    let load = |l: &Line| l.read.iops + l.write.iops + l.flush.iops;
    lines.sort_by(|a, b| {
        load(b)
            .total_cmp(&load(a))
            .then_with(|| (&a.namespace, &a.name).cmp(&(&b.namespace, &b.name)))
    });
    lines
}

fn copy(copy: &CopyView) -> CopyLine {
    CopyLine {
        node: copy.node.to_string(),
        role: copy.role.clone(),
        state: copy.state.clone(),
        sync_percent: copy.sync.as_ref().map(percent),
    }
}

fn table(lines: &[Line]) -> String {
    let mut table = Table::new(&[
        "VOLUME", "HEALTH", "NODE", "R IOPS", "W IOPS", "R MiB/s", "W MiB/s", "R LAT", "W LAT",
        "FLUSH/s", "BUSY", "COPIES",
    ]);
    let mib = |r: &Rate| format!("{:.1}", r.bytes_per_second / MIB);
    for l in lines {
        let copies: Vec<String> = l.copies.iter().map(one_copy).collect();
        table.row(vec![
            format!("{}/{}", l.namespace, l.name),
            l.health.clone(),
            or_dash(l.node.as_deref().unwrap_or_default()),
            format!("{:.0}", l.read.iops),
            format!("{:.0}", l.write.iops),
            mib(&l.read),
            mib(&l.write),
            latency(&l.read),
            latency(&l.write),
            format!("{:.0}", l.flush.iops),
            format!("{:.0}", l.inflight),
            copies.join(" "),
        ]);
    }
    table.text()
}

/// `n1*` is the master; what is not in sync says so.
fn one_copy(copy: &CopyLine) -> String {
    let mark = if copy.role == "master" { "*" } else { "" };
    match (copy.state.as_str(), copy.sync_percent) {
        ("in_sync", _) => format!("{}{mark}", copy.node),
        (_, Some(percent)) => format!("{}{mark}({percent}%)", copy.node),
        (state, None) => format!("{}{mark}({state})", copy.node),
    }
}

fn latency(rate: &Rate) -> String {
    match rate.latency_seconds {
        None => "-".into(),
        Some(s) if s < 0.001 => format!("{:.0} us", s * 1e6),
        Some(s) if s < 1.0 => format!("{:.1} ms", s * 1e3),
        Some(s) => format!("{s:.1} s"),
    }
}

/// As many lines as the terminal has, none longer than it is wide: what wraps or scrolls is not drawn over.
fn one_screen(text: &str) -> String {
    let size = rustix::termios::tcgetwinsize(io::stdout()).ok();
    let (rows, columns) = size.map_or((ROWS, usize::MAX), |s| {
        (usize::from(s.ws_row.max(2)), usize::from(s.ws_col.max(20)))
    });
    fit(text, rows - 1, columns)
}

fn fit(text: &str, rows: usize, columns: usize) -> String {
    let all = text.lines().count();
    let cut = |line: &str| line.chars().take(columns).collect::<String>() + "\n";
    if all <= rows {
        return text.lines().map(cut).collect();
    }
    let mut out: String = text.lines().take(rows - 1).map(cut).collect();
    out += &cut(&format!("… {} more", all - (rows - 1)));
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn count(requests: f64, bytes: f64, seconds: f64) -> Count {
        Count {
            requests,
            bytes,
            seconds,
        }
    }

    #[test]
    fn two_readings_make_rates() {
        let r = rate(
            count(10.0, 4096.0, 1.0),
            count(30.0, 4096.0 + 2.0 * MIB, 1.5),
            2.0,
        );
        assert_eq!((r.iops, r.bytes_per_second), (10.0, MIB));
        assert_eq!(latency(&r), "25.0 ms");
        // Nothing happened; the process began anew.
        let r = rate(count(10.0, 1.0, 1.0), count(10.0, 1.0, 1.0), 1.0);
        assert_eq!((r.iops, latency(&r).as_str()), (0.0, "-"));
        let r = rate(count(1000.0, 1e9, 5.0), count(10.0, 100.0, 0.001), 1.0);
        assert_eq!((r.iops, latency(&r).as_str()), (10.0, "100 us"));
    }

    #[test]
    fn the_figures_of_a_node_are_found_by_volume() {
        let text = "lockstep_volume_frontend_write_total{namespace=\"a\",volume=\"b\"} 7\n\
                    lockstep_volume_frontend_write_bytes_total{namespace=\"a\",volume=\"b\"} 8192\n\
                    lockstep_volume_frontend_write_seconds_sum{namespace=\"a\",volume=\"b\"} 0.5\n\
                    lockstep_volume_frontend_write_seconds_bucket{namespace=\"a\",volume=\"b\",le=\"1\"} 9\n\
                    lockstep_volume_network_write_total{namespace=\"a\",volume=\"b\"} 99\n\
                    lockstep_volume_inflight_requests{namespace=\"a\",volume=\"b\"} 3\n\
                    lockstep_volume_epoch{namespace=\"a\",volume=\"c\"} 3\n";
        let found = counts(&parse(text));
        assert_eq!(found.len(), 1, "{found:?}");
        assert_eq!(found["a/b"].kinds[1], count(7.0, 8192.0, 0.5));
        assert_eq!(found["a/b"].inflight, 3.0);
    }

    #[test]
    fn a_screen_holds_what_fits() {
        assert_eq!(fit("abc\nde\n", 2, 2), "ab\nde\n");
        assert_eq!(fit("a\nb\nc\n", 2, 9), "a\n… 2 more\n");
    }
}
