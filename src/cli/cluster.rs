//! `lockstep cluster`.

use clap::{Subcommand, ValueEnum};
use hyper::Method;

use super::output::{fields, or_dash, print};
use super::{Failure, Global};
use crate::cluster::fault::Fault;
use crate::cluster::policy::{ClusterPolicy, ClusterUpdate};
use crate::cluster::units::{parse_span, show_ms};
use crate::cluster::view::ClusterView;

const STATUS_EXAMPLE: &str = "Example:\n  lockstep cluster status";
const UPDATE_EXAMPLE: &str = "Example:\n  lockstep cluster update --replace-after 5m";
const MAINTENANCE_EXAMPLE: &str =
    "Example:\n  lockstep cluster maintenance on\n  lockstep cluster maintenance off";

#[derive(Subcommand)]
pub(super) enum Command {
    /// Say how the cluster is and what needs attention
    #[command(after_help = STATUS_EXAMPLE)]
    Status,
    /// Change what holds for the whole cluster
    #[command(after_help = UPDATE_EXAMPLE)]
    Update {
        /// How long a missing copy is waited for before another node gets one; 0 waits for ever
        #[arg(long, value_name = "TIME")]
        replace_after: String,
    },
    /// While people work on the nodes: lost copies are waited for and not replaced
    #[command(after_help = MAINTENANCE_EXAMPLE)]
    Maintenance {
        /// Begin, or end
        #[arg(value_enum, value_name = "on|off")]
        switch: Switch,
    },
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Switch {
    /// Replace no lost copy from now on
    On,
    /// Replace copies that stay lost; each wait begins anew
    Off,
}

pub(super) fn run(command: &Command, global: &Global) -> Result<(), Failure> {
    match command {
        Command::Status => {
            let cluster: ClusterView = global.remote().get("/api/v1/cluster")?;
            print(global.output, &cluster, status)
        }
        Command::Update { replace_after } => {
            let wait = parse_span(replace_after).map_err(Fault::from)?;
            change(
                global,
                &ClusterUpdate {
                    replace_after_ms: Some(u64::try_from(wait.as_millis()).unwrap_or(u64::MAX)),
                    ..ClusterUpdate::default()
                },
            )
        }
        Command::Maintenance { switch } => change(
            global,
            &ClusterUpdate {
                maintenance: Some(*switch == Switch::On),
                ..ClusterUpdate::default()
            },
        ),
    }
}

fn change(global: &Global, request: &ClusterUpdate) -> Result<(), Failure> {
    let done: ClusterPolicy = global
        .remote()
        .send(Method::PATCH, "/api/v1/cluster", request)?;
    print(global.output, &done, |_| String::new())
}

fn status(cluster: &ClusterView) -> String {
    let health: Vec<String> = cluster
        .health
        .iter()
        .map(|(health, n)| format!("{n} {}", health.word()))
        .collect();
    let mut out = fields(&[
        ("Cluster", cluster.id.to_string()),
        ("Created", cluster.created.clone()),
        ("Registry", cluster.registry.clone()),
        (
            "Replace after",
            match cluster.replace_after_ms {
                0 => "never".into(),
                ms => show_ms(ms),
            },
        ),
        (
            "Maintenance",
            match &cluster.maintenance {
                Some(since) => format!("on since {since}"),
                None => "off".into(),
            },
        ),
        (
            "Nodes",
            format!("{} ({} online)", cluster.nodes.len(), cluster.nodes_online),
        ),
        (
            "Volumes",
            format!("{} ({})", cluster.volumes, or_dash(&health.join(", "))),
        ),
    ]);
    if cluster.problems.is_empty() {
        out += "\nNothing needs attention.\n";
    } else {
        out += "\nNeeds attention:\n";
        for problem in &cluster.problems {
            out += &format!("  {problem}\n");
        }
    }
    out
}
