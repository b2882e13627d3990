//! The command line: a noun, then a verb. One file a noun; each talks to a node through its socket.

mod cluster;
mod doctor;
mod drain;
mod events;
mod first;
mod frontend;
mod namespace;
mod node;
mod node_flags;
mod output;
mod pages;
mod progress;
mod registry;
mod remote;
mod rule;
mod samples;
mod scrub;
mod top;
mod upgrade;
mod volume;
mod volume_text;
mod yaml;

use std::io::{self, Write};
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

use crate::api::client::Target;
use crate::cluster::config::NodeConfig;
use crate::cluster::fault::Fault;
use crate::cluster::model::{DEFAULT_NAMESPACE, VolumeName};
use output::Format;
use remote::Remote;

/// What runs a node until it is told to stop.
pub type RunNode = fn(NodeConfig) -> Result<(), Fault>;

const EXIT_CODES: &str = "Exit codes:\n  \
    0 ok, 2 usage, 8 not found, 9 exists, 10 invalid input, 11 invalid state,\n  \
    12 try again, 13 internal\n\n\
    Example:\n  \
    lockstep node --name n1 &\n  \
    lockstep volume create vm1 --size 10GiB\n  \
    lockstep volume attach vm1 --print qemu";

/// Disks for virtual machines that survive the loss of a node.
#[derive(Parser)]
#[command(name = "lockstep", version, after_help = EXIT_CODES, max_term_width = 100)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    noun: Option<Noun>,
}

/// Flags of every command.
#[derive(Args)]
struct Global {
    /// The node to talk to
    #[arg(
        long,
        global = true,
        env = "LOCKSTEP_HOST",
        default_value = "unix:/run/lockstep/api.sock",
        value_name = "unix:PATH"
    )]
    host: Target,
    /// How to print
    #[arg(short, long, global = true, value_enum, default_value_t = Format::Table)]
    output: Format,
    /// The namespace of volumes that name none
    #[arg(short, long, global = true, value_name = "NS")]
    namespace: Option<String>,
}

impl Global {
    fn namespace(&self) -> &str {
        self.namespace.as_deref().unwrap_or(DEFAULT_NAMESPACE)
    }

    fn volume(&self, text: &str) -> Result<VolumeName, Fault> {
        Ok(VolumeName::parse(text, self.namespace())?)
    }

    fn remote(&self) -> Remote<'_> {
        Remote::new(&self.host)
    }
}

#[derive(Subcommand)]
enum Noun {
    /// Run a node, and look at nodes
    Node(Box<node::Command>),
    /// Create, attach, change and remove volumes
    #[command(subcommand)]
    Volume(volume::Command),
    /// Policies: give labels to the volumes that a selector selects
    #[command(subcommand)]
    Rule(rule::Command),
    /// Create, look at and remove namespaces
    #[command(subcommand)]
    Namespace(namespace::Command),
    /// Look at the cluster
    #[command(subcommand)]
    Cluster(cluster::Command),
    /// Move the cluster's records
    #[command(subcommand)]
    Registry(registry::Command),
    /// Show every change of state
    Events(events::Command),
    /// Show what the volumes do now: requests, bytes and latency, on one screen
    Top(top::Command),
    /// Check whether this machine can run a node
    Doctor(Box<doctor::Command>),
    /// Print the script that completes command lines in a shell
    Completions(pages::Completions),
    /// Print a manual page
    Man(pages::Manual),
}

/// Why a command failed.
enum Failure {
    /// What was typed is not a command; exit code 2.
    Usage(String),
    /// It could not be done.
    Fault(Fault),
    /// Output went nowhere.
    Output(io::Error),
}

impl From<Fault> for Failure {
    fn from(fault: Fault) -> Self {
        Self::Fault(fault)
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Output(error)
    }
}

/// The exit code of wrong usage, the one that clap uses.
const USAGE: u8 = 2;

/// Reads the command line, carries it out and says how it went. `run_node` is what `lockstep node` does.
pub fn run(run_node: RunNode) -> ExitCode {
    let cli = Cli::parse();
    let global = &cli.global;
    let Some(noun) = cli.noun else {
        complain_plainly(&first::steps(global));
        return ExitCode::from(USAGE);
    };
    let done = match noun {
        Noun::Node(command) => node::run(*command, global, run_node),
        Noun::Volume(command) => volume::run(command, global),
        Noun::Rule(command) => rule::run(command, global),
        Noun::Namespace(command) => namespace::run(&command, global),
        Noun::Cluster(command) => cluster::run(&command, global),
        Noun::Registry(command) => registry::run(&command, global),
        Noun::Events(command) => events::run(&command, global),
        Noun::Top(command) => top::run(&command, global),
        Noun::Doctor(command) => doctor::run(*command, global),
        Noun::Completions(args) => pages::completions(&args),
        Noun::Man(args) => pages::manual(&args),
    };
    let code = match done {
        Ok(()) => return ExitCode::SUCCESS,
        Err(Failure::Usage(text)) => {
            complain(&text, None);
            USAGE
        }
        Err(Failure::Fault(fault)) => {
            complain(&fault.message, fault.hint.as_deref());
            fault.code.exit()
        }
        // The reader of a pipe had enough: that is its right.
        Err(Failure::Output(e)) if e.kind() == io::ErrorKind::BrokenPipe => {
            return ExitCode::SUCCESS;
        }
        Err(Failure::Output(e)) => {
            complain(&format!("cannot write the output: {e}"), None);
            crate::cluster::fault::Code::Internal.exit()
        }
    };
    ExitCode::from(code)
}

fn complain(message: &str, hint: Option<&str>) {
    let mut err = io::stderr().lock();
    // With stderr gone nobody can be told.
    let _ = writeln!(err, "error: {message}");
    if let Some(hint) = hint {
        let _ = writeln!(err, "hint: {hint}");
    }
}

fn complain_plainly(text: &str) {
    let _ = io::stderr().lock().write_all(text.as_bytes());
}

/// Something worth knowing beside the output.
fn note(text: &str) {
    let _ = writeln!(io::stderr().lock(), "note: {text}");
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_command_shows_an_example() {
        fn visit(command: &clap::Command, path: &str) {
            let path = format!("{path} {}", command.get_name());
            let help = command
                .get_after_help()
                .map(ToString::to_string)
                .unwrap_or_default();
            if command.get_subcommands().next().is_none() || command.get_name() == "node" {
                assert!(help.contains("Example"), "{path}");
            }
            // Broken by the width, a command is another one when it is pasted.
            for line in help.lines().filter(|l| l.starts_with(' ')) {
                assert!(line.chars().count() <= 100, "{path}: {line}");
            }
            command.get_subcommands().for_each(|c| visit(c, &path));
        }
        visit(&Cli::command(), "");
    }
}
