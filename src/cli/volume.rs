//! `lockstep volume`.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use hyper::Method;
use serde_json::{Value, json};

use super::frontend::Frontend;
use super::output::{Format, print, write};
use super::progress::{follow, grown, moved, resized};
use super::remote::encode;
use super::volume_text::{inspect, list};
use super::{Failure, Global, note, scrub};
use crate::cluster::attach::{AttachOptions, Attached};
use crate::cluster::create::{CreateRequest, Created};
use crate::cluster::fault::Fault;
use crate::cluster::host::Phase;
use crate::cluster::labels::{Of, parse_all};
use crate::cluster::migrate::MigrateRequest;
use crate::cluster::model::{VolumeName, check_name};
use crate::cluster::replicas::{MoveRequest, PromoteRequest};
use crate::cluster::scrub::{ScrubAsked, ScrubRequest};
use crate::cluster::selector::Selector;
use crate::cluster::settings::Wishes;
use crate::cluster::units::{parse_size, parse_span};
use crate::cluster::update::{UpdateRequest, Updated};
use crate::cluster::view::VolumeView;
use crate::replication::ids::NodeName;

const CREATE_EXAMPLE: &str =
    "Example:\n  lockstep volume create vm1 --size 10GiB --replicas 1 --failure-mode soft";
const LS_EXAMPLE: &str =
    "Example:\n  lockstep volume ls\n  lockstep volume ls -A -l 'env in (prod,stage),!scratch'";
const INSPECT_EXAMPLE: &str = "Example:\n  lockstep volume inspect vm1";
const UPDATE_EXAMPLE: &str = "Example:\n  lockstep volume update vm1 --replicas 2\n  lockstep volume update vm1 --size 20GiB\n  \
    lockstep volume update vm1 --failure-mode hard --label-add env=prod --label-rm scratch\n  \
    lockstep volume update vm1 --reapply --preview";
const ATTACH_EXAMPLE: &str = "Example:\n  lockstep volume attach vm1\n  lockstep volume attach vm1 --print qemu\n  \
     lockstep volume attach vm1 --node n2 --incoming   # then migrate the machine to n2";
const DETACH_EXAMPLE: &str =
    "Example:\n  lockstep volume detach vm1\n  lockstep volume detach vm1 --incoming";
const MOVE_EXAMPLE: &str =
    "Example:\n  lockstep volume move vm1 n2 n4\n  lockstep volume move vm1 n2 n4 --async";
const PROMOTE_EXAMPLE: &str = "Example:\n  lockstep volume promote vm1 --node n2";
const SCRUB_EXAMPLE: &str = "Exit codes:\n  \
    0 all copies are the same, or are now (--repair); 11 copies differ, or cannot be read;\n  \
    12 it broke off: try again\n\n\
    Example:\n  lockstep volume scrub vm1\n  lockstep volume scrub vm1 --repair\n  lockstep volume scrub vm1 --stop";
const RM_EXAMPLE: &str = "Example:\n  lockstep volume rm vm1";

#[derive(Subcommand)]
pub(super) enum Command {
    /// Create a volume and print its name; creates nothing when a copy cannot get its own node
    #[command(after_help = CREATE_EXAMPLE)]
    Create(Create),
    /// List volumes
    #[command(after_help = LS_EXAMPLE)]
    Ls(Ls),
    /// Show all about a volume, and why it is not healthy
    #[command(after_help = INSPECT_EXAMPLE)]
    Inspect {
        /// NAME or NS/NAME
        name: String,
    },
    /// Change a volume, live
    #[command(after_help = UPDATE_EXAMPLE)]
    Update(Update),
    /// Serve a volume to a virtual machine and print the socket
    #[command(after_help = ATTACH_EXAMPLE)]
    Attach(Attach),
    /// Stop serving a volume; refused while a virtual machine is connected
    #[command(after_help = DETACH_EXAMPLE)]
    Detach {
        /// NAME or NS/NAME
        name: String,
        /// Even while a virtual machine is connected, or when the node that serves it is gone
        #[arg(long)]
        force: bool,
        /// Only take back `attach --incoming`: the machine stays where it is
        #[arg(long, conflicts_with_all = ["force", "async"])]
        incoming: bool,
        /// Return at once
        #[arg(long)]
        r#async: bool,
    },
    /// Move a copy to another node: brought up to date there first, dropped here afterwards
    #[command(after_help = MOVE_EXAMPLE)]
    Move {
        /// NAME or NS/NAME
        name: String,
        /// The node that gives its copy up
        from: String,
        /// The node that gets one
        to: String,
        /// Return at once
        #[arg(long)]
        r#async: bool,
    },
    /// Serve reads from the copy on another node; refused unless that copy is in sync
    #[command(after_help = PROMOTE_EXAMPLE)]
    Promote {
        /// NAME or NS/NAME
        name: String,
        /// The node of the copy that becomes the master
        #[arg(long)]
        node: String,
        /// Return at once
        #[arg(long)]
        r#async: bool,
    },
    /// Compare all copies of a volume while it is in use, and report where they differ
    ///
    /// Copies that are not in sync are not compared; the report names them. What a disk cannot read, and the other copies
    /// agree on, is written anew. Ctrl-C ends the waiting only.
    #[command(after_help = SCRUB_EXAMPLE)]
    Scrub {
        /// NAME or NS/NAME
        name: String,
        /// Make what differs what the master holds: it is what the virtual machine has read. Look at a report first; if the
        /// others are right, make one of them the master: lockstep volume promote
        #[arg(long)]
        repair: bool,
        /// Return at once; see how far it is with: lockstep volume inspect
        #[arg(long)]
        r#async: bool,
        /// End the one that is under way
        #[arg(long, conflicts_with_all = ["repair", "async"])]
        stop: bool,
    },
    /// Remove a volume and its data on every node; refused while it is attached
    #[command(after_help = RM_EXAMPLE)]
    Rm {
        /// NAME or NS/NAME
        name: String,
        /// Detach it first, even while a virtual machine is connected
        #[arg(long)]
        force: bool,
    },
}

#[derive(Args)]
pub(super) struct Settings {
    /// Copies beside the master, each on its own node: 0 to 5
    #[arg(long, value_name = "R")]
    replicas: Option<u8>,
    /// When it may serve with fewer replicas: hard, soft or alwayson
    #[arg(long, value_name = "MODE")]
    failure_mode: Option<String>,
    /// How many replicas soft may lose
    #[arg(long, value_name = "T")]
    failure_tolerance: Option<u8>,
    /// How long requests wait while it may not serve [default at creation: 30s]
    #[arg(long, value_name = "TIME")]
    suspend_deadline: Option<String>,
}

impl Settings {
    fn wishes(self) -> Result<Wishes, Fault> {
        let deadline = self
            .suspend_deadline
            .as_deref()
            .map(parse_span)
            .transpose()?;
        Ok(Wishes {
            replicas: self.replicas,
            failure_mode: self.failure_mode,
            failure_tolerance: self.failure_tolerance,
            suspend_deadline_ms: deadline.map(|d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX)),
            ..Wishes::default()
        })
    }
}

#[derive(Args)]
pub(super) struct Create {
    /// NAME or NS/NAME
    name: String,
    /// Its size: 10GiB, 512MiB, 10G
    #[arg(long)]
    size: String,
    #[command(flatten)]
    settings: Settings,
    /// A label; may be repeated
    #[arg(long, value_name = "K=V")]
    label: Vec<String>,
    /// The node for the master copy
    #[arg(long, value_name = "NODE")]
    master: Option<String>,
    /// Return before the copies are made
    #[arg(long)]
    r#async: bool,
}

#[derive(Args)]
pub(super) struct Ls {
    /// Of all namespaces
    #[arg(short = 'A', long)]
    all: bool,
    /// With these labels: k, !k, k==v, k!=v, k in (a,b), k notin (a,b), k>1, k<1, joined by ','
    #[arg(short = 'l', long, value_name = "SELECTOR")]
    selector: Option<String>,
}

#[derive(Args)]
pub(super) struct Update {
    /// NAME or NS/NAME
    name: String,
    #[command(flatten)]
    settings: Settings,
    /// The new size; a volume only grows, under a running virtual machine too
    #[arg(long)]
    size: Option<String>,
    /// A label to set; may be repeated
    #[arg(long, value_name = "K=V")]
    label_add: Vec<String>,
    /// A label to take away; may be repeated
    #[arg(long, value_name = "K")]
    label_rm: Vec<String>,
    /// Apply the namespace's rules again, as at creation: flags win over labels, labels over rules
    #[arg(long)]
    reapply: bool,
    /// Only say what would change
    #[arg(long)]
    preview: bool,
    /// Return before new copies are in sync, or all copies have grown
    #[arg(long)]
    r#async: bool,
}

#[derive(Args)]
pub(super) struct Attach {
    /// NAME or NS/NAME
    name: String,
    /// Where to serve it [default: the node that is asked]
    #[arg(long)]
    node: Option<String>,
    /// Where to listen [default: <run-dir>/vhost/<namespace>/<volume>.sock]
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Virtqueues [default: 1]
    #[arg(long, value_name = "N")]
    num_queues: Option<u16>,
    /// Offer the disk read-only
    #[arg(long)]
    read_only: bool,
    /// Print what the virtual machine monitor needs instead of the socket
    #[arg(long, value_enum)]
    print: Option<Frontend>,
    /// Let the running machine move to NODE: listen there, and take over when it runs there
    #[arg(long, requires = "node", conflicts_with_all = ["num_queues", "read_only", "async"])]
    incoming: bool,
    /// Return before it is served
    #[arg(long)]
    r#async: bool,
}

pub(super) fn path(name: &VolumeName) -> String {
    format!("/api/v1/volumes/{}/{}", name.namespace, name.name)
}

fn node_name(name: Option<String>) -> Result<Option<NodeName>, Fault> {
    name.map(a_node).transpose()
}

fn a_node(name: String) -> Result<NodeName, Fault> {
    check_name(&name)?;
    Ok(NodeName(name))
}

pub(super) fn run(command: Command, global: &Global) -> Result<(), Failure> {
    match command {
        Command::Create(args) => create(args, global),
        Command::Ls(args) => ls(&args, global),
        Command::Inspect { name } => {
            let name = global.volume(&name)?;
            let volume: VolumeView = global.remote().get(&path(&name))?;
            print(global.output, &volume, inspect)
        }
        Command::Update(args) => update(args, global),
        Command::Attach(args) => attach(args, global),
        Command::Detach {
            name,
            force,
            incoming,
            r#async,
        } => {
            let name = global.volume(&name)?;
            let remote = global.remote();
            let done: Value = if incoming {
                let none = json!({});
                remote.send(Method::DELETE, &format!("{}/migrate", path(&name)), &none)?
            } else {
                let body = json!({"force": force, "no_wait": r#async});
                remote.send(Method::POST, &format!("{}/detach", path(&name)), &body)?
            };
            print(global.output, &done, |_| format!("{name}\n"))
        }
        Command::Move {
            name,
            from,
            to,
            r#async,
        } => {
            let name = global.volume(&name)?;
            let request = MoveRequest {
                from: a_node(from)?,
                to: a_node(to)?,
            };
            let done: Value =
                global
                    .remote()
                    .send(Method::POST, &format!("{}/move", path(&name)), &request)?;
            if !r#async {
                follow(global, &name, |v| moved(v, &request.from, &request.to))?;
            }
            print(global.output, &done, |_| format!("{name}\n"))
        }
        Command::Promote {
            name,
            node,
            r#async,
        } => {
            let name = global.volume(&name)?;
            let request = PromoteRequest {
                node: a_node(node)?,
                no_wait: r#async,
            };
            let done: Value = global.remote().send(
                Method::POST,
                &format!("{}/promote", path(&name)),
                &request,
            )?;
            print(global.output, &done, |_| format!("{name}\n"))
        }
        Command::Scrub {
            name,
            repair,
            r#async,
            stop,
        } => {
            let name = global.volume(&name)?;
            let path = format!("{}/scrub", path(&name));
            if stop {
                let done: Value = global.remote().send(Method::DELETE, &path, &json!({}))?;
                return print(global.output, &done, |_| format!("{name}\n"));
            }
            let request = ScrubRequest { repair };
            let asked: ScrubAsked = global.remote().send(Method::POST, &path, &request)?;
            if asked.followed {
                note(&format!(
                    "a scrub of {name} is under way on {} already; this one follows it",
                    asked.node
                ));
            }
            match r#async {
                true => print(global.output, &asked, |_| format!("{name}\n")),
                false => scrub::follow(global, &name, &path, asked.id),
            }
        }
        Command::Rm { name, force } => {
            let name = global.volume(&name)?;
            let path = format!("{}?force={force}", path(&name));
            let done: Value = global.remote().send(Method::DELETE, &path, &json!({}))?;
            print(global.output, &done, |_| format!("{name}\n"))
        }
    }
}

fn create(args: Create, global: &Global) -> Result<(), Failure> {
    let name = global.volume(&args.name)?;
    let request = CreateRequest {
        namespace: name.namespace,
        name: name.name,
        size: parse_size(&args.size).map_err(Fault::from)?,
        labels: parse_all(&args.label, Of::Volume)?,
        wishes: Wishes {
            master: node_name(args.master)?,
            ..args.settings.wishes()?
        },
        no_wait: args.r#async,
    };
    let created: Created = global
        .remote()
        .send(Method::POST, "/api/v1/volumes", &request)?;
    for remark in &created.remarks {
        note(remark);
    }
    for (key, label) in &created.rules {
        note(&format!("rule {}: {key}={}", label.rule, label.value));
    }
    print(global.output, &created, |c| {
        format!("{}/{}\n", c.namespace, c.name)
    })
}

fn ls(args: &Ls, global: &Global) -> Result<(), Failure> {
    let mut query = Vec::new();
    if !args.all {
        check_name(global.namespace()).map_err(Fault::from)?;
        query.push(format!("namespace={}", global.namespace()));
    }
    if let Some(selector) = &args.selector {
        Selector::parse(selector, Of::Volume).map_err(Fault::from)?;
        query.push(format!("selector={}", encode(selector)));
    }
    let volumes: Vec<VolumeView> = global
        .remote()
        .get(&format!("/api/v1/volumes?{}", query.join("&")))?;
    print(global.output, &volumes, |volumes| list(volumes))
}

fn update(args: Update, global: &Global) -> Result<(), Failure> {
    let name = global.volume(&args.name)?;
    let replicas = args.settings.replicas;
    let size = args.size.as_deref().map(parse_size).transpose();
    let size = size.map_err(Fault::from)?;
    let request = UpdateRequest {
        wishes: args.settings.wishes()?,
        size,
        label_add: parse_all(&args.label_add, Of::Volume)?,
        label_rm: args.label_rm,
        reapply: args.reapply,
        preview: args.preview,
    };
    let before = match (replicas.is_some() || args.reapply) && !args.r#async && !args.preview {
        true => Some(global.remote().get::<VolumeView>(&path(&name))?.replicas),
        false => None,
    };
    let done: Updated = global
        .remote()
        .send(Method::PATCH, &path(&name), &request)?;
    if let Some(size) = size.filter(|_| !args.r#async && !args.preview) {
        follow(global, &name, |v| grown(v, size))?;
    }
    if let Some(before) = before {
        // Rules may have said how many.
        let after = match replicas {
            Some(replicas) => replicas,
            None => global.remote().get::<VolumeView>(&path(&name))?.replicas,
        };
        // More replicas are there when they are in sync, fewer when the surplus is gone.
        if replicas.is_some() || after != before {
            follow(global, &name, |v| resized(v, after, after >= before))?;
        }
    }
    print(global.output, &done, |done| {
        match (args.preview, done.changes.is_empty()) {
            (false, _) => format!("{name}\n"),
            (true, true) => "nothing would change\n".into(),
            (true, false) => done.changes.iter().map(|c| format!("{c}\n")).collect(),
        }
    })
}

fn attach(args: Attach, global: &Global) -> Result<(), Failure> {
    let name = global.volume(&args.name)?;
    let socket = match args.socket {
        // Relative to where the command is typed, not to where the node runs.
        Some(path) => Some(
            std::path::absolute(&path)
                .map_err(|e| Fault::input(format!("--socket {}: {e}", path.display())))?,
        ),
        None => None,
    };
    if let (true, Some(node)) = (args.incoming, &args.node) {
        let request = MigrateRequest {
            node: a_node(node.clone())?,
            socket,
        };
        let attached: Attached =
            global
                .remote()
                .send(Method::POST, &format!("{}/migrate", path(&name)), &request)?;
        return print_attached(args.print, &attached, global);
    }
    let options = AttachOptions {
        node: node_name(args.node)?,
        socket,
        num_queues: args.num_queues,
        read_only: args.read_only,
        no_wait: args.r#async,
    };
    let attached: Attached =
        global
            .remote()
            .send(Method::POST, &format!("{}/attach", path(&name)), &options)?;
    if attached.phase == Some(Phase::Suspended) {
        note(&format!("{name} is suspended: {}", attached.why));
    }
    print_attached(args.print, &attached, global)
}

fn print_attached(
    frontend: Option<Frontend>,
    attached: &Attached,
    global: &Global,
) -> Result<(), Failure> {
    match frontend {
        Some(frontend) if global.output == Format::Table => {
            note(frontend.remark());
            Ok(write(&frontend.text(attached))?)
        }
        _ => print(global.output, attached, |a| {
            format!("{}\n", a.socket.display())
        }),
    }
}
