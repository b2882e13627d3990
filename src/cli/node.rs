//! `lockstep node`: run one, or look at them.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::node_flags::Flags;
use super::output::{Table, fields, or_dash, print, show_labels};
use super::{Failure, Global, RunNode};
use crate::cluster::fault::Fault;
use crate::cluster::model::check_name;
use crate::cluster::units::show_size;
use crate::cluster::view::NodeView;

const EXAMPLE: &str = "Examples:\n  \
    lockstep node --name n1\n  \
    lockstep node --name n2 --listen 127.0.0.2:5703 --http 127.0.0.2:5705 --data-dir /var/lib/lockstep-n2 \\\n      \
    --run-dir /run/lockstep-n2 --registry sqlite:/var/lib/lockstep/registry.db\n  \
    lockstep node --name n1 --vhost-user-blk vm1,size=10GiB,replicas=1\n  \
    lockstep node ls";
const LS_EXAMPLE: &str = "Example:\n  lockstep node ls\n  lockstep node ls -o json";
const INSPECT_EXAMPLE: &str = "Example:\n  lockstep node inspect n1";

#[derive(Args)]
#[command(args_conflicts_with_subcommands = true, after_help = EXAMPLE)]
pub(super) struct Command {
    #[command(subcommand)]
    verb: Option<Verb>,
    #[command(flatten)]
    flags: Flags,
    /// A TOML file with any of these flags as keys; flags win
    #[arg(long, value_name = "FILE.toml")]
    config: Option<PathBuf>,
}

#[derive(Subcommand)]
enum Verb {
    /// List all nodes
    #[command(after_help = LS_EXAMPLE)]
    Ls,
    /// Show all about a node
    #[command(after_help = INSPECT_EXAMPLE)]
    Inspect {
        /// Its name
        name: String,
    },
}

pub(super) fn run(command: Command, global: &Global, run_node: RunNode) -> Result<(), Failure> {
    match command.verb {
        Some(Verb::Ls) => {
            let nodes: Vec<NodeView> = global.remote().get("/api/v1/nodes")?;
            print(global.output, &nodes, |nodes| list(nodes))
        }
        Some(Verb::Inspect { name }) => {
            check_name(&name).map_err(Fault::from)?;
            let node: NodeView = global.remote().get(&format!("/api/v1/nodes/{name}"))?;
            print(global.output, &node, inspect)
        }
        None => {
            let flags = match &command.config {
                Some(path) => command.flags.or(Flags::of_file(path)?),
                None => command.flags,
            };
            let config = flags.config()?;
            let filter = env_logger::Env::default().default_filter_or("info");
            // A logger that is set already was set by whoever runs us in-process.
            let _ = env_logger::Builder::from_env(filter).try_init();
            Ok(run_node(config)?)
        }
    }
}

fn used(node: &NodeView) -> String {
    let total = node.capacity.total;
    if total == 0 {
        return "-".into();
    }
    let used = total.saturating_sub(node.capacity.free);
    format!("{:.1}%", used as f64 * 100.0 / total as f64)
}

fn list(nodes: &[NodeView]) -> String {
    let mut table = Table::new(&[
        "NAME",
        "ADDRESS",
        "HEALTH",
        "SCHEDULER",
        "VOLUMES",
        "CAPACITY",
        "USED",
        "VERSION",
    ]);
    for n in nodes {
        table.row(vec![
            n.name.to_string(),
            n.address.clone(),
            n.health.clone(),
            n.schedulable.to_string(),
            format!("M: {}, R: {}", n.masters, n.replicas),
            show_size(n.capacity.total),
            used(n),
            n.version.clone(),
        ]);
    }
    table.text()
}

fn inspect(node: &NodeView) -> String {
    let mut out = fields(&[
        ("Name", node.name.to_string()),
        ("Health", node.health.clone()),
        ("Why", or_dash(&node.why)),
        ("Address", node.address.clone()),
        ("HTTP", node.http.clone()),
        ("Version", node.version.clone()),
        ("Started", node.started.clone()),
        ("Instance", node.instance.to_string()),
        ("Boot", node.boot_id.to_string()),
        ("Labels", show_labels(&node.labels)),
        ("Scheduler", node.schedulable.to_string()),
        (
            "Volumes",
            format!("M: {}, R: {}", node.masters, node.replicas),
        ),
        ("Serves", or_dash(&node.serves.join(", "))),
        (
            "Capacity",
            format!(
                "{}, {} free, {} used",
                show_size(node.capacity.total),
                show_size(node.capacity.free),
                used(node)
            ),
        ),
    ]);
    if !node.copies.is_empty() {
        let mut table = Table::new(&["VOLUME", "COPY", "EPOCH", "STANDING", "ALLOCATED"]);
        for c in &node.copies {
            let unknown = || format!("? ({})", c.copy.volume);
            table.row(vec![
                c.name.clone().unwrap_or_else(unknown),
                c.copy.copy.to_string(),
                c.copy.epoch.to_string(),
                c.copy.standing.clone(),
                show_size(c.copy.allocated),
            ]);
        }
        out += &format!("\n{}", table.text());
    }
    out
}
