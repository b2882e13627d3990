//! `lockstep node`: run one, or look at them.

use std::collections::BTreeSet;
use std::path::PathBuf;

use clap::{Args, Subcommand};
use hyper::Method;
use serde_json::json;

use super::node_flags::Flags;
use super::output::{Table, fields, or_dash, print, show_labels};
use super::{Failure, Global, RunNode, drain, note, upgrade};
use crate::cluster::fault::Fault;
use crate::cluster::labels::{Of, own_key, parse_all};
use crate::cluster::model::check_name;
use crate::cluster::nodes::{NodeDone, NodeUpdate};
use crate::cluster::units::{show_ms, show_size};
use crate::cluster::view::NodeView;
use crate::node::can_take_over;

const EXAMPLE: &str = "Examples:\n  \
    lockstep node --name n1\n  \
    lockstep node --name n2 --listen 127.0.0.2:5703 --http 127.0.0.2:5705 \\\n      \
    --data-dir /var/lib/lockstep-n2 --run-dir /run/lockstep-n2 \\\n      \
    --registry sqlite:/var/lib/lockstep/registry.db\n  \
    lockstep node --config /etc/lockstep/node.toml\n  \
    lockstep node --name n1 --vhost-user-blk vm1,size=10GiB,replicas=1\n  \
    lockstep node --name n1 --listen 10.0.0.1:5703 --http 10.0.0.1:5705 --insecure-plaintext \\\n      \
    --registry etcd:http://10.0.0.11:2379,http://10.0.0.12:2379,http://10.0.0.13:2379\n  \
    lockstep node ls";
const LS_EXAMPLE: &str = "Example:\n  lockstep node ls\n  lockstep node ls -o json";
const INSPECT_EXAMPLE: &str = "Example:\n  lockstep node inspect n1";
const CORDON_EXAMPLE: &str = "Example:\n  lockstep node cordon n1";
const UNCORDON_EXAMPLE: &str = "Example:\n  lockstep node uncordon n1";
const DRAIN_EXAMPLE: &str = "Examples:\n  lockstep node drain n1\n  lockstep node drain n1 --async\n\n\
    Ctrl-C ends the waiting and not the drain: the same command waits again, lockstep node undrain ends it.";
const UNDRAIN_EXAMPLE: &str = "Example:\n  lockstep node undrain n1\n\n\
    Copies that are on their way arrive; the others stay.";
const LABEL_EXAMPLE: &str = "Examples:\n  lockstep node label n1 zone=a rack=7\n  \
    lockstep node label n1 lockstep.io/computeonly=true\n  lockstep node label n1 rack-";
const UPGRADE_EXAMPLE: &str = "Example:\n  \
    install -m 755 lockstep-new /usr/local/bin/lockstep.new &&\n    \
    mv /usr/local/bin/lockstep.new /usr/local/bin/lockstep\n  \
    lockstep node upgrade\n\n\
    Nothing is stopped before the new program has said that it can take over. The process stays the same.";
const RM_EXAMPLE: &str = "Example:\n  lockstep node rm n3";

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
    /// Run nothing: say whether this program could replace one that runs with these flags and hands over in this format
    #[arg(long, value_name = "FORMAT", hide = true)]
    can_take_over: Option<u32>,
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
    /// Place no more copies on a node, and make none of its copies the master
    #[command(after_help = CORDON_EXAMPLE)]
    Cordon {
        /// Its name
        name: String,
    },
    /// Place copies on a node again
    #[command(after_help = UNCORDON_EXAMPLE)]
    Uncordon {
        /// Its name
        name: String,
    },
    /// Move every copy away from a node, with no interruption of the volumes, and wait until none is left
    #[command(after_help = DRAIN_EXAMPLE)]
    Drain {
        /// Its name
        name: String,
        /// Return at once
        #[arg(long)]
        r#async: bool,
    },
    /// Move no more copies away, and place copies on the node again
    #[command(after_help = UNDRAIN_EXAMPLE)]
    Undrain {
        /// Its name
        name: String,
    },
    /// Set labels of a node, or take them away; they outlive its process
    #[command(after_help = LABEL_EXAMPLE)]
    Label {
        /// Its name
        name: String,
        /// K=V sets a label, K- takes it away
        #[arg(value_name = "K=V|K-", required = true)]
        labels: Vec<String>,
    },
    /// Run the program that is now in the file of the one that runs (on the node of --host), under its running machines
    #[command(after_help = UPGRADE_EXAMPLE)]
    Upgrade,
    /// Forget a node that is gone for good; refused while it lives or holds copies
    #[command(after_help = RM_EXAMPLE)]
    Rm {
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
            let node: NodeView = global.remote().get(&path(&name)?)?;
            print(global.output, &node, inspect)
        }
        Some(Verb::Cordon { name }) => cordon(global, &name, true),
        Some(Verb::Uncordon { name }) => cordon(global, &name, false),
        Some(Verb::Drain { name, r#async }) => {
            let path = path(&name)?;
            let done: NodeDone =
                global
                    .remote()
                    .send(Method::POST, &format!("{path}/drain"), &json!({}))?;
            if !r#async {
                drain::follow(global, &path)?;
            }
            told(global, &done)
        }
        Some(Verb::Undrain { name }) => {
            let path = format!("{}/undrain", path(&name)?);
            told(
                global,
                &global.remote().send(Method::POST, &path, &json!({}))?,
            )
        }
        Some(Verb::Upgrade) => upgrade::run(global),
        Some(Verb::Label { name, labels }) => label(global, &name, &labels),
        Some(Verb::Rm { name }) => {
            let path = path(&name)?;
            told(
                global,
                &global.remote().send(Method::DELETE, &path, &json!({}))?,
            )
        }
        None => {
            let flags = match &command.config {
                Some(path) => command.flags.or(Flags::of_file(path)?),
                None => command.flags,
            };
            let config = flags.config()?;
            if let Some(format) = command.can_take_over {
                return Ok(can_take_over(&config, format)?);
            }
            let filter = env_logger::Env::default().default_filter_or("info");
            // A logger that is set already was set by whoever runs us in-process.
            let _ = env_logger::Builder::from_env(filter).try_init();
            Ok(run_node(config)?)
        }
    }
}

fn path(name: &str) -> Result<String, Fault> {
    check_name(name)?;
    Ok(format!("/api/v1/nodes/{name}"))
}

fn told(global: &Global, done: &NodeDone) -> Result<(), Failure> {
    if let Some(remark) = &done.remark {
        note(remark);
    }
    print(global.output, done, |done| format!("{}\n", done.node))
}

fn cordon(global: &Global, name: &str, cordoned: bool) -> Result<(), Failure> {
    let request = NodeUpdate {
        cordoned: Some(cordoned),
        ..NodeUpdate::default()
    };
    let done = global
        .remote()
        .send(Method::PATCH, &path(name)?, &request)?;
    told(global, &done)
}

fn label(global: &Global, name: &str, labels: &[String]) -> Result<(), Failure> {
    let (set, gone): (Vec<&String>, Vec<&String>) = labels.iter().partition(|l| l.contains('='));
    let mut request = NodeUpdate {
        label_add: parse_all(&set, Of::Node)?,
        ..NodeUpdate::default()
    };
    for text in gone {
        let Some(key) = text.strip_suffix('-') else {
            return Err(Fault::input(format!("'{text}' changes no label"))
                .hint("write k=v to set a label, k- to take it away")
                .into());
        };
        request.label_rm.push(own_key(key, Of::Node)?);
    }
    let done = global
        .remote()
        .send(Method::PATCH, &path(name)?, &request)?;
    told(global, &done)
}

/// `true`, or `false` and why.
fn schedulable(node: &NodeView) -> String {
    match node.closed.is_empty() {
        true => node.schedulable.to_string(),
        false => format!("{} ({})", node.schedulable, node.closed.join(", ")),
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
            schedulable(n),
            format!("M: {}, R: {}", n.masters, n.replicas),
            show_size(n.capacity.total),
            used(n),
            n.version.clone(),
        ]);
    }
    let mut out = table.text();
    // Each cut is said by the nodes at both its ends.
    let said = nodes.iter().flat_map(|n| {
        let why = (!n.why.is_empty()).then(|| format!("{} is {}: {}", n.name, n.health, n.why));
        why.into_iter().chain(n.cuts.iter().cloned())
    });
    let said: BTreeSet<String> = said.collect();
    if !said.is_empty() {
        out += "\n";
    }
    for line in said {
        out += &format!("{line}\n");
    }
    out
}

/// `n2, n3; not n4 (no answer within 2s, for 12s)`.
fn reaches(node: &NodeView) -> String {
    let (reached, lost): (Vec<_>, Vec<_>) = node.ways.iter().partition(|way| way.reached);
    let reached: Vec<&str> = reached.iter().map(|way| way.node.0.as_str()).collect();
    let lost = lost.iter().map(|way| {
        let span = show_ms(way.for_ms / 1000 * 1000);
        format!("not {} ({}, for {span})", way.node, way.why)
    });
    let parts = [reached.join(", ")].into_iter().filter(|r| !r.is_empty());
    parts.chain(lost).collect::<Vec<_>>().join("; ")
}

fn inspect(node: &NodeView) -> String {
    let mut out = fields(&[
        ("Name", node.name.to_string()),
        ("Health", node.health.clone()),
        ("Why", or_dash(&node.why)),
        ("Reaches", or_dash(&reaches(node))),
        ("Cut", or_dash(&node.cuts.join("; "))),
        ("Address", node.address.clone()),
        ("HTTP", node.http.clone()),
        ("Version", node.version.clone()),
        ("Started", node.started.clone()),
        ("Instance", node.instance.to_string()),
        ("Boot", node.boot_id.to_string()),
        ("Labels", show_labels(&node.labels)),
        ("Scheduler", schedulable(node)),
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
    if let Some(view) = &node.drain {
        out += &drain::describe(view);
    }
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
