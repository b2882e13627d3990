//! `lockstep cluster`.

use clap::Subcommand;

use super::output::{fields, or_dash, print};
use super::{Failure, Global};
use crate::cluster::view::ClusterView;

const STATUS_EXAMPLE: &str = "Example:\n  lockstep cluster status";

#[derive(Subcommand)]
pub(super) enum Command {
    /// Say how the cluster is and what needs attention
    #[command(after_help = STATUS_EXAMPLE)]
    Status,
}

pub(super) fn run(command: &Command, global: &Global) -> Result<(), Failure> {
    match command {
        Command::Status => {
            let cluster: ClusterView = global.remote().get("/api/v1/cluster")?;
            print(global.output, &cluster, status)
        }
    }
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
