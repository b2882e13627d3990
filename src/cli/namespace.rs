//! `lockstep namespace`.

use clap::Subcommand;
use hyper::Method;
use serde_json::{Value, json};

use super::output::{Table, fields, or_dash, print};
use super::{Failure, Global};
use crate::cluster::fault::Fault;
use crate::cluster::model::check_name;
use crate::cluster::namespaces::NamespaceView;
use crate::cluster::units::{show_age, wall_ms};

const PATH: &str = "/api/v1/namespaces";
const CREATE_EXAMPLE: &str =
    "Example:\n  lockstep namespace create prod\n  lockstep volume create -n prod vm1 --size 10GiB";
const LS_EXAMPLE: &str = "Example:\n  lockstep namespace ls";
const INSPECT_EXAMPLE: &str = "Example:\n  lockstep namespace inspect prod";
const RM_EXAMPLE: &str = "Example:\n  lockstep namespace rm prod";

#[derive(Subcommand)]
pub(super) enum Command {
    /// Create a namespace and print its name; the first volume or rule in it does so as well
    #[command(after_help = CREATE_EXAMPLE)]
    Create {
        /// Its name
        name: String,
    },
    /// List all namespaces
    #[command(after_help = LS_EXAMPLE)]
    Ls,
    /// Show all about a namespace
    #[command(after_help = INSPECT_EXAMPLE)]
    Inspect {
        /// Its name
        name: String,
    },
    /// Remove a namespace and its rules; refused while it has volumes
    #[command(after_help = RM_EXAMPLE)]
    Rm {
        /// Its name
        name: String,
    },
}

pub(super) fn run(command: &Command, global: &Global) -> Result<(), Failure> {
    let one = |name: &String| -> Result<String, Fault> {
        check_name(name)?;
        Ok(format!("{PATH}/{name}"))
    };
    match command {
        Command::Create { name } => {
            check_name(name).map_err(Fault::from)?;
            let body = json!({ "name": name });
            let done: Value = global.remote().send(Method::POST, PATH, &body)?;
            print(global.output, &done, |_| format!("{name}\n"))
        }
        Command::Ls => {
            let namespaces: Vec<NamespaceView> = global.remote().get(PATH)?;
            print(global.output, &namespaces, |n| list(n))
        }
        Command::Inspect { name } => {
            let namespace: NamespaceView = global.remote().get(&one(name)?)?;
            print(global.output, &namespace, inspect)
        }
        Command::Rm { name } => {
            let done: Value = global
                .remote()
                .send(Method::DELETE, &one(name)?, &json!({}))?;
            print(global.output, &done, |_| format!("{name}\n"))
        }
    }
}

fn list(namespaces: &[NamespaceView]) -> String {
    let mut table = Table::new(&["NAME", "VOLUMES", "RULES", "AGE"]);
    for n in namespaces {
        let age = n.created_ms.map_or_else(
            || "-".into(),
            |ms| show_age(wall_ms().saturating_sub(ms) / 1000),
        );
        table.row(vec![
            n.name.clone(),
            n.volumes.len().to_string(),
            n.rules.len().to_string(),
            age,
        ]);
    }
    table.text()
}

fn inspect(namespace: &NamespaceView) -> String {
    fields(&[
        ("Name", namespace.name.clone()),
        (
            "Created",
            or_dash(namespace.created.as_deref().unwrap_or_default()),
        ),
        ("Volumes", or_dash(&namespace.volumes.join(", "))),
        ("Rules", or_dash(&namespace.rules.join(", "))),
    ])
}
