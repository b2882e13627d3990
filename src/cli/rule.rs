//! `lockstep rule`.

use std::collections::BTreeMap;

use clap::{Args, Subcommand, ValueEnum};
use hyper::Method;

use super::output::{Format, Table, fields, or_dash, print, show_labels, write};
use super::{Failure, Global};
use crate::cluster::fault::Fault;
use crate::cluster::labels::{self, Of, parse_all};
use crate::cluster::model::{Action, Labels, VolumeName, check_name};
use crate::cluster::rules::{Reach, RuleDone, RuleRequest, RuleUpdate, RuleView, WEIGHT};
use crate::cluster::selector::Selector;

const PATH: &str = "/api/v1/rules";
const CREATE_EXAMPLE: &str = "Examples:\n  \
    lockstep rule create ha --selector env==prod --label lockstep.io/replicas=2\n  \
    lockstep rule create big --selector 'size>100,!scratch' --label tier=big --weight 1\n  \
    lockstep rule create ha --selector env==prod --label lockstep.io/replicas=2 --preview";
const LS_EXAMPLE: &str = "Example:\n  lockstep rule ls -A";
const INSPECT_EXAMPLE: &str = "Example:\n  lockstep rule inspect ha";
const UPDATE_EXAMPLE: &str = "Examples:\n  \
    lockstep rule update ha --selector 'env in (prod,stage)'\n  \
    lockstep rule update ha --label-add lockstep.io/replicas=1 --reapply\n  \
    lockstep rule update ha --inactive";
const RM_EXAMPLE: &str = "Example:\n  lockstep rule rm ha";

#[derive(Subcommand)]
pub(super) enum Command {
    /// Create a rule and print its name; it is applied to volumes that are created from now on
    #[command(after_help = CREATE_EXAMPLE)]
    Create(Create),
    /// List rules, in the order in which they are applied
    #[command(after_help = LS_EXAMPLE)]
    Ls {
        /// Of all namespaces
        #[arg(short = 'A', long)]
        all: bool,
    },
    /// Show all about a rule, and which volumes have labels of it
    #[command(after_help = INSPECT_EXAMPLE)]
    Inspect {
        /// NAME or NS/NAME
        name: String,
    },
    /// Change a rule
    #[command(after_help = UPDATE_EXAMPLE)]
    Update(Update),
    /// Remove a rule; volumes keep what it gave them, unless the rules are applied again
    #[command(after_help = RM_EXAMPLE)]
    Rm {
        /// NAME or NS/NAME
        name: String,
        #[command(flatten)]
        reach: ReachFlags,
    },
}

/// What a rule does with its labels.
#[derive(Clone, Copy, ValueEnum)]
enum ActionFlag {
    /// Set them
    Add,
    /// Take away what rules of lower weight set
    Remove,
}

impl From<ActionFlag> for Action {
    fn from(flag: ActionFlag) -> Self {
        match flag {
            ActionFlag::Add => Self::Add,
            ActionFlag::Remove => Self::Remove,
        }
    }
}

#[derive(Args, Clone, Copy)]
pub(super) struct ReachFlags {
    /// Apply the namespace's rules to all its volumes again
    #[arg(long)]
    reapply: bool,
    /// Only say what that would change; nothing is written
    #[arg(long)]
    preview: bool,
}

impl From<ReachFlags> for Reach {
    fn from(flags: ReachFlags) -> Self {
        Self {
            reapply: flags.reapply,
            preview: flags.preview,
        }
    }
}

#[derive(Args)]
pub(super) struct Create {
    /// NAME or NS/NAME
    name: String,
    /// Which volumes, by their labels: k, !k, k==v, k!=v, k in (a,b), k notin (a,b), k>1, k<1, joined by ','
    #[arg(short, long)]
    selector: String,
    /// A label that they get; may be repeated
    #[arg(long, value_name = "K=V", required = true)]
    label: Vec<String>,
    /// Set the labels, or take them away
    #[arg(short, long, value_enum, default_value_t = ActionFlag::Add)]
    action: ActionFlag,
    /// The rule's turn, the lowest first; of two that set one label the heavier wins
    #[arg(short, long, default_value_t = WEIGHT, allow_negative_numbers = true)]
    weight: i32,
    /// Do not apply it for now
    #[arg(long)]
    inactive: bool,
    #[command(flatten)]
    reach: ReachFlags,
}

#[derive(Args)]
pub(super) struct Update {
    /// NAME or NS/NAME
    name: String,
    /// Which volumes, by their labels
    #[arg(short, long)]
    selector: Option<String>,
    /// A label to put in; may be repeated
    #[arg(long, value_name = "K=V")]
    label_add: Vec<String>,
    /// A label to take out; may be repeated
    #[arg(long, value_name = "K")]
    label_rm: Vec<String>,
    /// Set the labels, or take them away
    #[arg(short, long, value_enum)]
    action: Option<ActionFlag>,
    /// The rule's turn, the lowest first
    #[arg(short, long, allow_negative_numbers = true)]
    weight: Option<i32>,
    /// Apply it
    #[arg(long, conflicts_with = "inactive")]
    active: bool,
    /// Do not apply it for now
    #[arg(long)]
    inactive: bool,
    #[command(flatten)]
    reach: ReachFlags,
}

pub(super) fn run(command: Command, global: &Global) -> Result<(), Failure> {
    match command {
        Command::Create(args) => create(args, global),
        Command::Ls { all } => {
            let mut path = PATH.to_string();
            if !all {
                check_name(global.namespace()).map_err(Fault::from)?;
                path += &format!("?namespace={}", global.namespace());
            }
            let rules: Vec<RuleView> = global.remote().get(&path)?;
            print(global.output, &rules, |rules| list(rules))
        }
        Command::Inspect { name } => {
            let name = global.volume(&name)?;
            let rule: RuleView = global.remote().get(&path(&name))?;
            print(global.output, &rule, inspect)
        }
        Command::Update(args) => update(args, global),
        Command::Rm { name, reach } => {
            let name = global.volume(&name)?;
            let request = Reach::from(reach);
            done(
                &global
                    .remote()
                    .send(Method::DELETE, &path(&name), &request)?,
                global,
            )
        }
    }
}

fn path(name: &VolumeName) -> String {
    format!("{PATH}/{}/{}", name.namespace, name.name)
}

/// The labels of a rule. One that removes may name a key alone: whatever its value.
fn rule_labels(texts: &[String], action: Option<Action>) -> Result<Labels, Fault> {
    if action != Some(Action::Remove) {
        return parse_all(texts, Of::Volume);
    }
    let mut labels = BTreeMap::new();
    for text in texts {
        let (key, value) = text.split_once('=').unwrap_or((text, ""));
        labels.insert(key.trim().into(), value.trim().into());
    }
    labels::check(labels, Of::Volume)
}

fn create(args: Create, global: &Global) -> Result<(), Failure> {
    let name = global.volume(&args.name)?;
    let action = Action::from(args.action);
    // Refused here before it travels, so that without a node the mistake is named as well.
    Selector::parse(&args.selector, Of::Volume).map_err(Fault::from)?;
    let request = RuleRequest {
        namespace: name.namespace,
        name: name.name,
        selector: args.selector,
        action,
        labels: rule_labels(&args.label, Some(action))?,
        weight: Some(args.weight),
        inactive: args.inactive,
        reach: args.reach.into(),
    };
    done(&global.remote().send(Method::POST, PATH, &request)?, global)
}

fn update(args: Update, global: &Global) -> Result<(), Failure> {
    let name = global.volume(&args.name)?;
    let action = args.action.map(Action::from);
    let request = RuleUpdate {
        selector: args.selector,
        action,
        label_add: rule_labels(&args.label_add, action)?,
        label_rm: args.label_rm,
        weight: args.weight,
        active: match (args.active, args.inactive) {
            (true, _) => Some(true),
            (_, true) => Some(false),
            _ => None,
        },
        reach: args.reach.into(),
    };
    done(
        &global
            .remote()
            .send(Method::PATCH, &path(&name), &request)?,
        global,
    )
}

/// Says what came of a change, and fails when volumes could not follow.
fn done(done: &RuleDone, global: &Global) -> Result<(), Failure> {
    if global.output == Format::Table {
        let mut text = String::new();
        if !done.preview {
            text += &format!("{}\n", done.rule);
        } else if done.volumes.is_empty() {
            text += "no volume would change\n";
        }
        if !done.volumes.is_empty() {
            let mut table = Table::new(&["VOLUME", "CHANGES"]);
            for v in &done.volumes {
                let changes = match &v.fault {
                    Some(fault) => format!("none: {fault}"),
                    None => v.changes.join(", "),
                };
                table.row(vec![v.volume.clone(), changes]);
            }
            text += &table.text();
        }
        write(&text)?;
    } else {
        print(global.output, done, |_| String::new())?;
    }
    let failed: Vec<&str> = done
        .volumes
        .iter()
        .filter(|v| v.fault.is_some())
        .map(|v| v.volume.as_str())
        .collect();
    if failed.is_empty() {
        return Ok(());
    }
    Err(Fault::state(format!("not changed: {}", failed.join(", ")))
        .hint("the reasons are in the list; lockstep volume update NAME --reapply tries one again")
        .into())
}

fn list(rules: &[RuleView]) -> String {
    let mut table = Table::new(&[
        "NAMESPACE/NAME",
        "SELECTOR",
        "ACTION",
        "LABELS",
        "WEIGHT",
        "ACTIVE",
    ]);
    for r in rules {
        table.row(vec![
            format!("{}/{}", r.namespace, r.name),
            or_dash(&r.selector),
            r.action.word().into(),
            show_labels(&r.labels),
            r.weight.to_string(),
            r.active.to_string(),
        ]);
    }
    table.text()
}

fn inspect(rule: &RuleView) -> String {
    let selector = match rule.selector.as_str() {
        "" => "all volumes of the namespace",
        selector => selector,
    };
    fields(&[
        ("Name", format!("{}/{}", rule.namespace, rule.name)),
        ("Selector", selector.into()),
        ("Action", rule.action.word().into()),
        ("Labels", show_labels(&rule.labels)),
        ("Weight", rule.weight.to_string()),
        ("Active", rule.active.to_string()),
        ("Created", rule.created.clone()),
        ("Volumes", or_dash(&rule.volumes.join(", "))),
    ])
}
